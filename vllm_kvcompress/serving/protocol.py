"""What a request to ``POST /v1/images/generations`` may say, and what the answers look like.

OpenAI's images schema with the sampling fields that other picture servers have. What is wrong in itself (a
type, a range, an unknown name) is a 400 that names the field, always. What is right but not to be had here
(another size, a quality, a style) is a wish: see ``wishes.py``. ``null`` means "not given", as in OpenAI's.
"""

import json
from collections.abc import Mapping
from typing import Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator

from vllm_kvcompress.refusal import BadParameter
from vllm_kvcompress.rows import MAX_SCALE

OutputFormat = Literal["png", "jpeg", "webp"]
PNG: OutputFormat = "png"
MAX_PROMPT_CHARACTERS = 32_000  # OpenAI's limit; also bounds the time spent in the tokenizer
MAX_SEED = 2**63 - 1

# What to do instead, for values and names that clients of other servers are likely to send.
_HINTS = {
    "seed": "leave it out for a different picture each time",
    "num_inference_steps": "the model draws token by token, without diffusion steps",
}


class ImageRequest(BaseModel):
    """Body of a request. ``parse_request`` makes one from bytes."""

    model_config = ConfigDict(strict=True, extra="forbid")

    prompt: str = Field(
        max_length=MAX_PROMPT_CHARACTERS,
        json_schema_extra={"minLength": 1},  # said by `_fields_agree`, which looks at more than the length
        description="What to draw.",
    )
    model: str | None = Field(None, description="A name the model is served under.")
    n: int = Field(1, ge=1, le=10, description="Number of pictures; 1 when streaming.")
    size: str = Field(
        "auto",
        pattern=r"^(auto|\d{1,5}x\d{1,5})$",
        description="`auto`, or `WIDTHxHEIGHT`: one of the model's; a wish.",
    )
    response_format: Literal["b64_json", "url"] | None = Field(
        None,
        description="`url` is a data: URL. Default: `b64_json`, or `url` with a `model` whose name begins "
        "with `dall-e`, as OpenAI had it. Streams send `b64_json`.",
    )
    output_format: str = Field(PNG, max_length=40, description="`png`, `jpeg` or `webp`; others are wishes.")
    output_compression: int = Field(
        100, ge=0, le=100, description="Quality of jpeg and webp, 100 the best. A png is lossless."
    )
    stream: bool = Field(False, description="Answer with server-sent events.")
    partial_images: int = Field(
        0,
        ge=0,
        le=3,
        description="Unfinished pictures to send while streaming: the lines drawn so far, the rest grey. "
        "A busy server may send fewer.",
    )
    partial_lines: int | None = Field(
        None,
        ge=1,
        description="Instead of `partial_images`: an unfinished picture every so many lines. Not OpenAI's.",
    )
    kept: bool = Field(
        False,
        description="With a compressed cache, unfinished pictures come with what each head type keeps then. "
        "Needs `partial_images` or `partial_lines`. Not OpenAI's.",
    )
    user: str | None = Field(None, description="A label; no effect.")
    safety_identifier: str | None = Field(None, description="A label; no effect.")
    moderation: str = Field("auto", description="No effect: there is no filter. A wish.")
    quality: str = Field("auto", description="No effect: there is one quality. A wish.")
    background: str = Field("auto", description="Pictures are opaque. A wish.")
    style: str | None = Field(None, description="No effect: describe it in the prompt. A wish.")
    complexity: str | None = Field(None, description="No effect. A wish.")
    frame_count: int | None = Field(None, description="No effect: pictures do not move. A wish.")
    frame_duration_ms: int | None = Field(None, description="No effect: pictures do not move. A wish.")
    svg: dict[str, Any] | None = Field(None, description="No effect: pictures are pixels. A wish.")
    # Beyond OpenAI.
    seed: int | None = Field(
        None,
        ge=0,
        le=MAX_SEED,
        description="Makes pictures reproducible: picture i of n, from 0, is the one that seed + i draws.",
    )
    guidance_scale: FiniteFloat | None = Field(
        None, ge=0, le=MAX_SCALE, description="Classifier-free guidance; 1 is none. Default: the model's."
    )
    temperature: FiniteFloat = Field(1.0, ge=0, le=2, description="0 is greedy.")
    top_k: int | None = Field(
        None, ge=-1, description="Draw among the k likeliest codes; 0 or -1: among all. Default: the model's."
    )
    top_p: FiniteFloat = Field(1.0, gt=0, le=1)
    negative_prompt: str | None = Field(
        None,
        max_length=MAX_PROMPT_CHARACTERS,
        description="What to keep away from: the unconditional branch's text.",
    )
    default_texts: bool = Field(
        True,
        description="Whether the model's own texts are used, where it has any (Emu3): what it adds to a "
        "prompt, and its negative prompt where none is given. Not OpenAI's.",
    )

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        """Raises BadParameter (which passes through pydantic) where fields contradict each other."""
        if not self.prompt.strip():
            raise BadParameter("prompt", "prompt must not be empty")
        if self.stream and self.n > 1:
            raise BadParameter("n", f"n must be 1 when streaming, got {self.n}: events name no picture")
        if self.partial_images and not self.stream:
            raise BadParameter("partial_images", "partial_images needs stream=true")
        if self.partial_lines and not self.stream:
            raise BadParameter("partial_lines", "partial_lines needs stream=true")
        if self.partial_lines and self.partial_images:
            raise BadParameter("partial_lines", "partial_lines and partial_images say the same: send one")
        if self.kept and not (self.partial_lines or self.partial_images):
            raise BadParameter("kept", "kept comes with unfinished pictures: send partial_lines, stream=true")
        if self.negative_prompt and self.guidance_scale == 1:
            raise BadParameter(
                "negative_prompt", "negative_prompt has no effect with guidance_scale 1 (none)"
            )
        return self

    @property
    def file_format(self) -> OutputFormat:
        """What is written: ``output_format`` where it can be."""
        return next((known for known in get_args(OutputFormat) if known == self.output_format), PNG)

    @property
    def wants_url(self) -> bool:
        """Whether pictures go into ``url``. OpenAI's dall-e models did so unless told otherwise."""
        if self.response_format is None:
            return (self.model or "").startswith("dall-e") and not self.stream
        return self.response_format == "url" and not self.stream


def parse_request(content_type: str, body: bytes) -> ImageRequest:
    """The request in an HTTP body.

    FastAPI could parse it, but vLLM's handler for its errors answers with pydantic's own wording and
    ``body.n`` as the parameter of ``n``.

    Raises
    ------
    BadParameter
        Naming the field, or ``body`` when there are no fields to name.
    """
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise BadParameter("body", f"Content-Type must be application/json, got {shown(content_type)}")
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:  # ValueError: bad JSON, bad UTF-8, absurdly long numbers
        raise BadParameter("body", f"the body is not valid JSON: {error}") from None
    if not isinstance(fields, dict):
        raise BadParameter("body", "the body must be a JSON object")
    try:
        return ImageRequest.model_validate({k: v for k, v in fields.items() if v is not None})
    except ValidationError as error:
        raise _refusal(error) from None


def _refusal(error: ValidationError) -> BadParameter:
    """The first complaint, as one line that names the field."""
    first = error.errors(include_url=False, include_context=False)[0]
    if not first["loc"]:
        return BadParameter("body", "the body has a field whose name is not valid text")
    name = str(first["loc"][0])[:64]
    hint = f": {_HINTS[name]}" if name in _HINTS else ""
    if first["type"] == "missing":
        return BadParameter(name, f"{name} is required")
    if first["type"] == "extra_forbidden":
        return BadParameter(name, f"{name} is not a parameter of image generation here{hint}")
    if first["type"] == "string_pattern_mismatch":  # only the size has a pattern
        return BadParameter(name, f"{name} must be auto or WIDTHxHEIGHT, got {shown(first['input'])}")
    demand = first["msg"].replace("Input should be", "must be").replace("String should", "must")
    return BadParameter(name, f"{name} {demand}, got {shown(first['input'])}{hint}")


def shown(value: Any) -> str:
    """A value as an error message shows it: short, however long it is, and always encodable."""
    if isinstance(value, (dict, list)):
        return f"a JSON {'object' if isinstance(value, dict) else 'array'}"
    if isinstance(value, str) and len(value) > 40:
        return f"{len(value)} characters"
    text = ascii(value)
    return text if len(text) <= 80 else text[:80] + "..."


class ImagesTokenDetails(BaseModel):
    """Tokens by kind."""

    text_tokens: int
    image_tokens: int


class ImagesUsage(BaseModel):
    """Token counts: the prompt counts once, however many pictures it has."""

    input_tokens: int
    output_tokens: int
    total_tokens: int
    input_tokens_details: ImagesTokenDetails
    output_tokens_details: ImagesTokenDetails
    steps: int | None = None
    kv_cache: dict[str, Any] | None = None

    @classmethod
    def of(cls, prompt_tokens: int, image_tokens: int, extra: Mapping[str, Any] | None = None) -> Self:
        """Counts of text in, pictures out; ``extra`` fields as they are."""
        return cls(
            input_tokens=prompt_tokens,
            output_tokens=image_tokens,
            total_tokens=prompt_tokens + image_tokens,
            input_tokens_details=ImagesTokenDetails(text_tokens=prompt_tokens, image_tokens=0),
            output_tokens_details=ImagesTokenDetails(text_tokens=0, image_tokens=image_tokens),
            **(extra or {}),
        )


class EncodedPicture(BaseModel):
    """One picture of the answer: a file, in base64, or in a data: URL."""

    b64_json: str | None = None
    url: str | None = None

    @classmethod
    def of(cls, b64: str, request: ImageRequest) -> Self:
        """In the field that the request asks for."""
        if request.wants_url:
            return cls(url=f"data:image/{request.file_format};base64,{b64}")
        return cls(b64_json=b64)


class ImagesResponse(BaseModel):
    """The answer to a request that does not stream.

    ``size``, ``background`` and ``output_format`` say what was done, ``notes`` in what that differs from what
    was asked. There is no ``quality``: OpenAI's types have names of qualities only, and this model has one.
    """

    created: int
    background: Literal["opaque"] = "opaque"
    data: list[EncodedPicture]
    output_format: OutputFormat
    size: str
    usage: ImagesUsage
    notes: list[str] | None = None


class _Event(BaseModel):
    b64_json: str
    background: Literal["opaque"] = "opaque"
    created_at: int
    output_format: OutputFormat
    quality: Literal["auto"] = "auto"
    size: str


class KeptOfType(BaseModel):
    """What the heads of one type keep of an unfinished picture."""

    name: str = Field(description="The rule: `full`, `ring N` or `scored N`, N slots a head.")
    heads: int = Field(description="Cache heads of this type, over layers and branches.")
    percent: list[int] = Field(
        description="Heads that hold each token that stands for pixels, in raster order, 0-100."
    )


class Kept(BaseModel):
    """What the compressed cache keeps of an unfinished picture."""

    lines: int
    columns: int
    drawn: int = Field(
        description="Of these tokens, those written when this was read: the picture may be ahead."
    )
    types: list[KeptOfType]


class PartialImageEvent(_Event):
    """An unfinished picture of the full size; ``kept`` where the request asked for it."""

    type: Literal["image_generation.partial_image"] = "image_generation.partial_image"
    partial_image_index: int
    kept: Kept | None = None


class CompletedEvent(_Event):
    """The picture."""

    type: Literal["image_generation.completed"] = "image_generation.completed"
    usage: ImagesUsage
    notes: list[str] | None = None
