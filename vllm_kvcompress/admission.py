"""What a request must look like before the engine sees it, and again where the engine takes it.

A prompt that ends in begin-of-image (or in image tokens after it) asks for a picture: exactly the
grid's tokens are drawn and nothing can end it early; what would is refused, like what a picture can't have.
All of vLLM's front ends (``LLM``, completions, the images route) come through here, see patches/README.md;
requests of any other are checked by the scheduler, with the same call.

Text requests are vLLM's own business, but for two things: what is longer than the context would end an engine
whose front end has not looked, and a compressed cache takes all that a request may need when it is admitted,
so what could never have it is refused.
"""

from typing import TYPE_CHECKING, Any

from vllm_kvcompress.config import KEY, Limits
from vllm_kvcompress.models.config import ImageModel
from vllm_kvcompress.refusal import BadParameter
from vllm_kvcompress.rows import NEGATIVE_IDS, GuidanceParams
from vllm_kvcompress.text_room import check_room

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams

NOT_GIVEN = 16  # SamplingParams' and completions' own ``max_tokens``: who does not set it means the picture

# Settings about words, which a picture has none of; where they are set, somebody expects them to matter.
WORDS_ONLY = (
    "structured_outputs", "repetition_detection", "thinking_token_budget", "trace_decode_token_ids",
)  # fmt: skip


def drawn_in_prompt(prompt_ids: list[int], model: ImageModel) -> int | None:
    """Image tokens at the prompt's end if it asks for a picture, else None (a text prompt).

    Raises BadParameter for image tokens that do not follow begin-of-image.
    """
    end, start = len(prompt_ids), model.prefix_length(prompt_ids)
    size = model.size_of(prompt_ids, start)
    if model.classes and size is None:
        raise BadParameter(
            "prompt",
            "this model draws pictures of classes and writes no text: the prompt must be one class, by exact "
            f"name or by its id, 0 to {model.classes - 1}",
        )
    if (start < end and size is None) or any(map(model.is_drawn, prompt_ids[:start])):
        raise BadParameter(
            "prompt",
            f"image tokens must follow begin-of-image (id {model.boi}) without a gap, at the prompt's end",
        )
    if size is None:
        if not model.writes:
            raise BadParameter("prompt", _no_picture(prompt_ids[:start], model))
        return None
    raster = model.sizes[size].raster
    for number, token in enumerate(prompt_ids[start:]):
        if (token == model.eol) != raster.is_end(number):
            raise BadParameter(
                "prompt",
                f"the picture's token {number} has id {token}: every {raster.width}th token, and no "
                f"other, must be the end of a line, id {model.eol}",
            )
    return end - start


def _no_picture(prompt_ids: list[int], model: ImageModel) -> str:
    """What is wrong with a prompt for no picture that is served, of a model that does nothing else."""
    served = ", or ".join(
        f"{list(begin)} ({name})" for begin, name in zip(model.begins, model.names, strict=True)
    )
    mend = f"end the prompt in the ids {served}, which begin a picture of a size that is served"
    if prompt_ids and model.boi in prompt_ids and prompt_ids[-1] in {begin[-1] for begin in model.begins}:
        last = len(prompt_ids) - 1 - prompt_ids[::-1].index(model.boi)
        return f"ids {prompt_ids[last:]} begin a picture of a size that this server does not draw: {mend}"
    return f"this model draws pictures and writes no text: ask /v1/images/generations, or {mend}"


def admit(
    prompt_ids: list[int],
    params: "SamplingParams",
    model: ImageModel,
    max_model_len: int,
    *,
    room: int | None = None,
    limits: Limits | None = None,
    default: int | None = None,
) -> None:
    """Check a generation request and fix its length; ``params`` is the request's own copy.

    What it has admitted it admits again, unchanged.

    Parameters
    ----------
    room : int, optional
        Tokens that one text request can have, prompt and ``max_tokens`` together (`text_room`); by default
        vLLM sees to that.
    limits : Limits, optional
        The server's; by default the defaults.
    default : int, optional
        ``max_tokens`` that the server fills in, and caps what requests say with: no wish of theirs either.

    Raises
    ------
    BadParameter
        One line that names the parameter and the mend.
    """
    drawn = drawn_in_prompt(prompt_ids, model)
    if drawn is None:
        left = max_model_len - len(prompt_ids)
        if left < 1:  # a token is sampled in any case
            raise BadParameter(
                "prompt",
                f"the prompt has {len(prompt_ids)} tokens, but the context holds {max_model_len}, the answer "
                "included: shorten it or raise --max-model-len",
            )
        if room is not None:
            check_room(len(prompt_ids), min(params.max_tokens or 1, left), room)  # the context ends it too
        return
    prefix = len(prompt_ids) - drawn
    size = model.size_of(prompt_ids, prefix)
    assert size is not None
    model = model.of(size)
    scoring = params.prompt_logprobs is not None
    remaining = _remaining(len(prompt_ids), drawn, model, max_model_len, scoring)
    _check_limits(prefix, params.n, limits or Limits())
    _check_params(params, remaining, model, default)
    _check_guidance(params, prefix, model)
    params.max_tokens = remaining
    params.min_tokens = 0
    params.ignore_eos = True
    params.stop = []
    params.stop_token_ids = []
    params._eos_token_id = None
    params._all_stop_token_ids = set()
    params.detokenize = False
    params.skip_reading_prefix_cache = True


def _remaining(length: int, drawn: int, model: ImageModel, max_model_len: int, scoring: bool) -> int:
    """Tokens that are left to draw; 1 if none are and the picture is to be scored: vLLM samples once."""
    total = model.raster.tokens
    whole = drawn == total and scoring
    if drawn >= total and not whole:
        raise BadParameter(
            "prompt", f"the prompt already holds {drawn} image tokens of {total}: nothing is left to draw"
        )
    remaining = max(total - drawn, 1)
    if length + remaining > max_model_len:
        raise BadParameter(
            "prompt",
            f"the prompt has {length} tokens and the picture {remaining}, but the context holds "
            f"{max_model_len}: shorten the prompt or raise --max-model-len",
        )
    return remaining


def _check_limits(prefix: int, pictures: int, limits: Limits) -> None:
    for parameter, name, value, unit in (
        ("prompt", "prompt_tokens", prefix, "tokens"), ("n", "pictures", pictures, "pictures")
    ):  # fmt: skip
        if value > (limit := getattr(limits, name)):
            raise BadParameter(
                parameter,
                f"{parameter} has {value} {unit}, and this server takes {limit}: ask for less, or raise "
                f"additional_config.{KEY}.limits.{name}",
            )


def _check_params(
    params: "SamplingParams", remaining: int, model: ImageModel, default: int | None = None
) -> None:
    wished = None if params.max_tokens in (NOT_GIVEN, default) else params.max_tokens
    if wished is not None and wished < remaining:
        raise BadParameter(
            "max_tokens",
            f"max_tokens is {wished}, but the picture takes {remaining}: leave it out, or set it "
            f"to {remaining} or more (beam search sets it to 1: pictures can't be searched for)",
        )
    for name in WORDS_ONLY:
        if getattr(params, name) is not None:
            raise BadParameter(
                name, f"{name} is about text, and this prompt asks for a picture: leave it out"
            )
    if any(map(model.is_drawn, params.stop_token_ids or ())):
        raise BadParameter(
            "stop_token_ids",
            f"a picture can't end before its last token: stop at text ids only, {_text_range(model)}",
        )
    if not all(map(model.is_drawn, params.allowed_token_ids or ())):
        raise BadParameter(
            "allowed_token_ids",
            f"the tokens allowed in a picture must be image tokens, ids from {model.first_code}",
        )
    if model.eol >= 0 and params.allowed_token_ids and model.eol not in params.allowed_token_ids:
        params.allowed_token_ids = [*params.allowed_token_ids, model.eol]  # every line has to end
    if model.eol >= 0 and params.bad_words:
        raise BadParameter(
            "bad_words", "bad_words is about text, and this prompt asks for a picture: leave it out"
        )
    if params.prompt_logprobs is not None and not model.writes and not model.classes:
        raise BadParameter(
            "prompt_logprobs",
            "prompt_logprobs is about words, which this model does not predict: leave it out",
        )


def _check_guidance(params: "SamplingParams", prefix: int, model: ImageModel) -> None:
    try:
        guidance = GuidanceParams.read(params.extra_args, model.guidance_scale)
    except ValueError as error:
        raise BadParameter(str(error).split()[0], str(error)) from None
    if guidance.negative_ids is None:
        if model.aligns and guidance.scale != 1:  # a front end that has not come by `align_request`
            raise BadParameter(
                NEGATIVE_IDS, f"{NEGATIVE_IDS} is missing: this model is guided away from a prompt"
            )
        return
    if len(guidance.negative_ids) != prefix:
        raise BadParameter(
            NEGATIVE_IDS,
            f"{NEGATIVE_IDS} has {len(guidance.negative_ids)} ids, the prompt {prefix}: they must match",
        )
    if model.aligns and not model.is_begun(guidance.negative_ids, prefix):
        raise BadParameter(
            NEGATIVE_IDS, f"{NEGATIVE_IDS} must end in the ids {list(model.begin)}, as the prompt does"
        )
    if not all(0 <= i < model.text_vocab and not model.is_drawn(i) for i in guidance.negative_ids):
        raise BadParameter(NEGATIVE_IDS, f"{NEGATIVE_IDS} must hold text ids {_text_range(model)}")


def align_request(request: Any, model: ImageModel) -> None:
    """Make both branches of an ``EngineCoreRequest`` equally long, for a model that aligns them, in place.

    A guided request without a negative prompt gets the model's own. The shorter of the two prompts is filled
    up at its beginning. What is wrong with the request otherwise is left for `admit_request` to say; what is
    aligned is left as it is.
    """
    ids, params = request.prompt_token_ids, request.sampling_params
    if not model.aligns or ids is None or params is None:
        return
    prefix = model.prefix_length(ids)
    try:
        guidance = GuidanceParams.read(params.extra_args, model.guidance_scale)
    except ValueError:
        return
    size = model.size_of(ids, prefix)
    if size is None:
        return
    negative = guidance.negative_ids or (() if guidance.scale == 1 else model.of(size).negative)
    if not negative:
        return
    request.prompt_token_ids = model.aligned(ids, len(negative) + len(ids) - prefix)
    params.extra_args = {**(params.extra_args or {}), NEGATIVE_IDS: model.aligned(negative, prefix)}


def _text_range(model: ImageModel) -> str:
    """Which ids are not image tokens, as a message says it."""
    return f"below {model.first_code}" if model.eol < 0 else f"below {model.first_code} but not {model.eol}"


def admit_request(
    request: Any,
    model: ImageModel,
    max_model_len: int,
    *,
    room: int | None = None,
    limits: Limits | None = None,
    default: int | None = None,
) -> None:
    """``admit`` for an ``EngineCoreRequest`` or a scheduler's ``Request``.

    Embeddings, pooling requests and prompts that come in parts are refused.
    """
    ids, params = request.prompt_token_ids, request.sampling_params
    if params is None or ids is None or request.prompt_embeds is not None:
        raise BadParameter("prompt", "this model takes token prompts and generates only")
    if not ids:
        raise BadParameter("prompt", "the prompt has no tokens: it needs one at least")
    if not 0 <= min(ids) <= max(ids) < model.vocab:
        raise BadParameter(
            "prompt", f"a token id is outside the vocabulary: use ids from 0 to {model.vocab - 1}"
        )
    if getattr(request, "mm_features", None) and model.is_begun(ids, model.prefix_length(ids)):
        raise BadParameter(
            "image_url", "a picture is drawn from text alone: leave out the pictures in the prompt"
        )
    drawn = model.prefix_length(ids) < len(ids) or model.boi in ids or model.classes
    if request.resumable and drawn:
        raise BadParameter("prompt", "a picture's prompt must come whole, not in parts")
    if request.resumable and room is not None:
        raise BadParameter("prompt", "with a compressed cache a prompt must come whole, not in parts")
    admit(ids, params, model, max_model_len, room=room, limits=limits, default=default)
