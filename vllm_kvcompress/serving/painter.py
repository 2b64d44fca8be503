"""From a checked request to encoded pictures, through vLLM's engine client.

Three resources, none of which may wait for another: the engine draws tokens for all pictures at once;
its worker turns codes into pixels between two steps; threads of this process tokenize prompts and encode
files.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm import SamplingParams
from vllm.exceptions import GenerationError, RetryableRequestError, VLLMError
from vllm.inputs import tokens_input
from vllm.sampling_params import RequestOutputKind
from vllm.utils import random_uuid
from vllm.v1.engine.exceptions import EngineDeadError

from vllm_kvcompress.config import parse_config
from vllm_kvcompress.log import logger_for
from vllm_kvcompress.rows import GUIDANCE_SCALE, NEGATIVE_IDS
from vllm_kvcompress.serving.alive import unless_dead
from vllm_kvcompress.serving.decoder import Decoder
from vllm_kvcompress.serving.drain import SHUTTING_DOWN, is_draining
from vllm_kvcompress.serving.encode import encode_base64
from vllm_kvcompress.serving.kept import KeptReader
from vllm_kvcompress.serving.protocol import MAX_SEED, BadParameter, ImageRequest, Kept
from vllm_kvcompress.serving.wishes import nearest

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient
    from vllm.outputs import RequestOutput

    from vllm_kvcompress.models.config import ImageModel
    from vllm_kvcompress.policy.raster import Raster
    from vllm_kvcompress.serving.spare import SpareDecoder

# (tokenizer, image model, text) -> ids that end in begin-of-image
PromptIds = Callable[[Any, "ImageModel", str], list[int]]
# (tokenizer, image model, text, length) -> ids of exactly that length; ValueError when it does not fit
NegativeIds = Callable[[Any, "ImageModel", str, int], list[int]]
# (image model, prompt ids, length) -> the prompt, made as long as a longer negative one
Lengthened = Callable[["ImageModel", list[int], int], list[int]]

logger = logger_for(__name__)


@dataclass(frozen=True)
class Job:
    """A request that the engine will accept: what to draw, and how.

    ``size`` is which of the model's sizes, ``raster`` its grid.
    """

    request: ImageRequest
    size: int
    raster: "Raster"
    prompt_ids: list[int]
    extra_args: dict[str, Any]
    request_id: str
    trace_headers: Mapping[str, str] | None = None
    notes: tuple[str, ...] = ()  # on what the picture is not

    @property
    def size_name(self) -> str:
        """The pictures' size as the API spells it."""
        return self.raster.name


@dataclass(frozen=True)
class Picture:
    """An encoded picture; ``output`` is the engine's last word on it, None while it is unfinished."""

    b64_json: str
    output: "RequestOutput | None" = None
    kept: Kept | None = None


def partial_lines(lines: int, partials: int) -> list[int]:
    """After how many lines to show an unfinished picture: ``partials`` times, evenly spread."""
    at = {lines * k // (partials + 1) for k in range(1, partials + 1)}
    return sorted(at - {0})


async def _next(outputs: AsyncGenerator["RequestOutput", None]) -> "RequestOutput | None":
    """The next one, None after the last."""
    return await anext(outputs, None)


class Painter:
    """Draws pictures with one model.

    Parameters
    ----------
    engine : EngineClient
        The server's.
    model : ImageModel
        What is being served.
    prompt_ids, negative_ids, lengthened : callable
        How this model's prompts are tokenized, and made as long as each other.
    spare : SpareDecoder, optional
        What decodes pictures that a draining engine has drawn.
    """

    def __init__(
        self,
        engine: "EngineClient",
        model: "ImageModel",
        prompt_ids: PromptIds,
        negative_ids: NegativeIds,
        lengthened: Lengthened,
        spare: "SpareDecoder | None" = None,
    ) -> None:
        self.engine = engine
        self.model = model
        self._prompt_ids = prompt_ids
        self._negative_ids = negative_ids
        self._lengthened = lengthened
        # vLLM's own, which is safe to use from several threads.
        self._tokenizer = engine.renderer.get_tokenizer()
        self._decoder = Decoder(engine, spare)
        self._kept = KeptReader(engine, model)
        self._models = [model.of(size) for size in range(len(model.sizes))]

    @property
    def compressed(self) -> bool:
        """Whether the engine has a compressed cache."""
        return self._kept.compressed

    async def prepare(
        self,
        request: ImageRequest,
        request_id: str,
        trace_headers: Mapping[str, str] | None = None,
        notes: Sequence[str] = (),
    ) -> Job:
        """Check what needs the model, and tokenize.

        Raises
        ------
        BadParameter
            A prompt, or a negative prompt, that leaves no room for the picture.
        EngineDeadError, GracefulHTTPError
            The engine takes no requests (more).
        """
        if is_draining(self.engine):  # until the server has gone, which its engine does before
            raise RetryableRequestError(SHUTTING_DOWN)
        if self.engine.errored:
            raise self.engine.dead_error
        size = nearest(request.size, self.model.names)
        model = self._models[size]
        suffix = model.suffix if request.default_texts else ""
        prompt_ids = await self._tokenized("prompt", self._prompt_ids, model, request.prompt + suffix)
        self._check_room("prompt", prompt_ids, model)
        scale = self.model.guidance_scale if request.guidance_scale is None else request.guidance_scale
        negative = self._negative(request, scale)
        if negative is not None:
            # As long as the longer of the two: both branches of a token share its position.
            alone = await self._tokenized("negative_prompt", self._prompt_ids, model, negative)
            self._check_room("negative_prompt", alone, model)
            prompt_ids = self._lengthened(model, prompt_ids, len(alone))
        extra_args: dict[str, Any] = {GUIDANCE_SCALE: scale}
        if negative is not None:
            extra_args[NEGATIVE_IDS] = await self._tokenized(
                "negative_prompt", self._negative_ids, model, negative, len(prompt_ids)
            )
        self.engine.check_admission(request.n)
        # The random part keeps ids apart when a client repeats its X-Request-Id.
        name = f"img-{request_id}-{random_uuid()}"
        return Job(request, size, model.raster, prompt_ids, extra_args, name, trace_headers, tuple(notes))

    def _negative(self, request: ImageRequest, scale: float) -> str | None:
        """The unconditional branch's text; None where it has none."""
        if not self.model.aligns:
            return request.negative_prompt or None
        if scale == 1:
            return None
        if request.negative_prompt is not None:
            return request.negative_prompt  # an empty one is a prompt too
        return self.model.negative_text if request.default_texts else ""

    def _check_room(self, parameter: str, ids: list[int], model: "ImageModel") -> None:
        limit = parse_config(self.engine.vllm_config.additional_config).limits.prompt_tokens
        if len(ids) > limit:
            raise BadParameter(
                parameter, f"{parameter} has {len(ids)} tokens, and this server takes {limit}: shorten it"
            )
        context, picture = self.engine.model_config.max_model_len, model.raster.tokens
        if len(ids) + picture > context:
            raise BadParameter(
                parameter,
                f"{parameter} has {len(ids)} tokens and the picture {picture}, "
                f"but the context holds {context}",
            )

    async def _tokenized(
        self, parameter: str, tokenize: Callable[..., list[int]], model: "ImageModel", *args: Any
    ) -> list[int]:
        try:
            return await asyncio.to_thread(tokenize, self._tokenizer, model, *args)
        except ValueError as error:
            raise BadParameter(parameter, str(error)) from None

    async def draw(self, job: Job, index: int = 0) -> AsyncGenerator[Picture, None]:
        """Picture ``index`` of a job: its partial pictures, then the whole.

        A partial picture is skipped, until the next line's end, while the decoder is busy, so that it never
        makes a finished picture wait in line; and while partial pictures, of all streams together, have had
        their share of the time. Close the generator, or cancel its task, to abort.

        Raises
        ------
        GenerationError
            The engine did not finish the picture, or it could not be decoded.
        RetryableRequestError
            The engine is shutting down.
        EngineDeadError
            It has died.
        """
        raster = job.raster
        due = partial_lines(raster.lines, job.request.partial_images)
        if every := job.request.partial_lines:
            due = list(range(every, raster.lines, every))
        tokens: list[int] = []
        output: RequestOutput | None = None
        async with contextlib.aclosing(self._outputs(job, index, streaming=bool(due))) as outputs:
            async for output in outputs:
                tokens += output.outputs[0].token_ids
                lines = len(tokens) // raster.width
                if output.finished or not due or lines < due[0] or not self._takes_partial:
                    continue
                kept = None
                if job.request.kept:
                    kept = await self._kept(f"{job.request_id}-{index}", len(job.prompt_ids), job.size)
                    if not self._takes_partial:  # a finished one has come meanwhile, or the engine has died
                        continue
                due = [line for line in due if line > lines]
                try:
                    picture = await self._picture(tokens[: lines * raster.width], job, partial=True)
                except EngineDeadError:  # the outputs end too, and know whether it was told to
                    continue
                yield Picture(picture, kept=kept)
        if output is None or not output.finished or len(tokens) != raster.tokens:
            reason = output.outputs[0].finish_reason if output is not None else None
            if reason == "abort":  # nobody else than the engine itself aborts what is still waited for
                raise RetryableRequestError(SHUTTING_DOWN)
            raise GenerationError(
                f"the picture ended after {len(tokens)} of {raster.tokens} tokens (finish reason {reason})"
            )
        yield Picture(await self._picture(tokens, job), output)

    @property
    def _takes_partial(self) -> bool:
        """Whether this is the time for an unfinished picture, of any stream."""
        return self._decoder.takes_partial and not self._kept.busy and not self.engine.errored

    async def _outputs(self, job: Job, index: int, streaming: bool) -> AsyncGenerator["RequestOutput", None]:
        """The engine's outputs for one picture; each holds the tokens since the one before."""
        request_id = f"{job.request_id}-{index}"
        outputs = self.engine.generate(
            tokens_input(job.prompt_ids),
            self._sampling(job, index, streaming),
            request_id=request_id,
            trace_headers=job.trace_headers,
        )
        try:
            async with contextlib.aclosing(outputs):
                while (output := await unless_dead(self.engine, _next(outputs))) is not None:
                    yield output
        except BaseException as error:
            # vLLM's generator aborts its request when it is closed, except while it is still adding it.
            with contextlib.suppress(Exception):
                await self.engine.abort(request_id)
            if isinstance(error, EngineDeadError) and is_draining(self.engine):  # told to end, and not done
                raise RetryableRequestError(SHUTTING_DOWN) from error
            raise

    def _sampling(self, job: Job, index: int, streaming: bool) -> SamplingParams:
        request, raster = job.request, job.raster
        top_k = self.model.top_k if request.top_k is None else request.top_k
        seed = None if request.seed is None else (request.seed + index) % (MAX_SEED + 1)
        return SamplingParams(
            temperature=request.temperature,
            top_p=request.top_p,
            # All codes is no restriction; and the engine keeps k in 32 bits.
            top_k=top_k if 0 < top_k < self.model.codes else 0,
            seed=seed,
            max_tokens=raster.tokens,
            ignore_eos=True,
            detokenize=False,
            extra_args=dict(job.extra_args),
            output_kind=RequestOutputKind.DELTA if streaming else RequestOutputKind.FINAL_ONLY,
            stream_interval=raster.width if streaming else None,  # nobody looks between line ends
        )

    async def _picture(self, tokens: list[int], job: Job, partial: bool = False) -> str:
        """Encoded picture of whole lines' token ids. Raises GenerationError."""
        request, raster = job.request, job.raster
        codes = [self.model.code(token) for token in raster.cells(tokens)]
        if any(not 0 <= code < self.model.codes for code in codes):
            raise GenerationError("the model drew a token that is not an image token")
        try:
            pixels = await self._decoder.decode(codes, job.size, partial)
            return await asyncio.to_thread(
                encode_base64, pixels, raster.pixel_size, request.file_format, request.output_compression
            )
        except VLLMError:  # a dead engine
            raise
        except Exception as error:
            logger.exception("A picture could not be decoded")
            raise GenerationError("the picture could not be decoded") from error
