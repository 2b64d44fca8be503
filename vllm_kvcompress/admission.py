"""What a request must look like before the engine sees it.

A prompt that ends in begin-of-image (or in image tokens after it) asks for a picture: exactly the
grid's tokens are drawn, whatever ``max_tokens`` says, and nothing can end it early. All front ends
(``LLM``, completions, the images route) come through here; see patches/README.md.
"""

from typing import TYPE_CHECKING, Any

from vllm.exceptions import VLLMValidationError

from vllm_kvcompress.guidance import NEGATIVE_IDS, GuidanceParams
from vllm_kvcompress.models.config import ImageModel

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams


def drawn_in_prompt(prompt_ids: list[int], model: ImageModel) -> int | None:
    """Image tokens at the prompt's end if it asks for a picture, else None (a text prompt).

    Raises VLLMValidationError for image tokens that do not follow begin-of-image.
    """
    end, start = len(prompt_ids), model.prefix_length(prompt_ids)
    begun = start > 0 and prompt_ids[start - 1] == model.boi
    if (start < end and not begun) or any(i >= model.text_vocab for i in prompt_ids[:start]):
        raise VLLMValidationError(
            f"image tokens must follow begin-of-image (id {model.boi}) without a gap, at the prompt's end",
            parameter="prompt",
        )
    return end - start if begun else None


def admit(
    prompt_ids: list[int],
    params: "SamplingParams",
    model: ImageModel,
    max_model_len: int,
    *,
    text: bool = True,
) -> None:
    """Check a generation request and fix its length; ``params`` is the request's own copy.

    ``text``: whether requests that want text are served at all.

    Raises
    ------
    VLLMValidationError
        One line that names the parameter and the mend.
    """
    drawn = drawn_in_prompt(prompt_ids, model)
    if drawn is None:
        if not text:
            raise VLLMValidationError(
                "this server draws pictures only (--attention-backend kvcompress): "
                "ask /v1/images/generations, end the prompt in begin-of-image, "
                "or start a server without kvcompress for text",
                parameter="prompt",
            )
        return
    total = model.raster.tokens
    remaining = total - drawn
    scoring = params.prompt_logprobs is not None
    if remaining < 0 or (remaining == 0 and not scoring):
        raise VLLMValidationError(
            f"the prompt already holds {drawn} image tokens of {total}: nothing is left to draw",
            parameter="prompt",
        )
    remaining = max(remaining, 1)  # scoring a whole picture: vLLM always samples once
    if len(prompt_ids) + remaining > max_model_len and not scoring:
        raise VLLMValidationError(
            f"the prompt has {len(prompt_ids)} tokens and the picture {remaining}, but the context holds "
            f"{max_model_len}: shorten the prompt or raise --max-model-len",
            parameter="prompt",
        )
    if params.structured_outputs is not None:
        raise VLLMValidationError("a picture can't follow a text grammar", parameter="structured_outputs")
    if any(i < model.text_vocab for i in params.allowed_token_ids or ()):
        raise VLLMValidationError(
            f"the tokens allowed in a picture must be image tokens, ids from {model.text_vocab}",
            parameter="allowed_token_ids",
        )
    try:
        guidance = GuidanceParams.read(params.extra_args, model.guidance_scale)
    except ValueError as error:
        raise VLLMValidationError(str(error), parameter=str(error).split()[0]) from None
    text_length = len(prompt_ids) - drawn
    if guidance.negative_ids is not None:
        if len(guidance.negative_ids) != text_length:
            raise VLLMValidationError(
                f"{NEGATIVE_IDS} has {len(guidance.negative_ids)} ids, the prompt {text_length}: "
                "they must match",
                parameter=NEGATIVE_IDS,
            )
        if not all(0 <= i < model.text_vocab for i in guidance.negative_ids):
            raise VLLMValidationError(
                f"{NEGATIVE_IDS} must hold text ids below {model.text_vocab}", parameter=NEGATIVE_IDS
            )
    params.max_tokens = remaining
    params.min_tokens = 0
    params.ignore_eos = True
    params.stop = []
    params.stop_token_ids = []
    params._eos_token_id = None
    params._all_stop_token_ids = set()
    params.detokenize = False


def admit_request(request: Any, model: ImageModel, max_model_len: int, *, text: bool = True) -> None:
    """``admit`` for an ``EngineCoreRequest``; embeddings and pooling requests are refused."""
    if request.sampling_params is None or request.prompt_token_ids is None:
        raise VLLMValidationError("this model takes token prompts and generates only", parameter="prompt")
    admit(request.prompt_token_ids, request.sampling_params, model, max_model_len, text=text)
