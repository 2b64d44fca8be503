"""What a request asks for that this server does not have: refused, or noted in the answer.

Clients of OpenAI's API send a size, a quality or a model's name whether their user chose one or not, and
can't be told to leave it out. So by default the picture is drawn as it can be, and the answer's ``notes`` say
what is different. ``{"kvcompress": {"strict": true}}`` refuses instead, for whoever wants to be told.
"""

from collections.abc import Iterator, Sequence
from math import log

from vllm_kvcompress.config import pixels_of
from vllm_kvcompress.serving.protocol import BadParameter, ImageRequest, shown

_ONE_VALUE = {
    "quality": (("auto", "standard"), "the model has one quality"),
    "background": (("auto", "opaque"), "the model draws opaque pictures"),
    "moderation": (("auto", "low"), "there is no filter"),
}
_NO_EFFECT = {
    "style": "describe the style in the prompt",
    "complexity": "the model does not plan",
    "frame_count": "pictures do not move",
    "frame_duration_ms": "pictures do not move",
    "svg": "pictures are pixels",
}


def nearest(wish: str, sizes: Sequence[str]) -> int:
    """Which of the model's sizes is drawn for a wish: itself, or the nearest in shape.

    Parameters
    ----------
    wish : str
        ``auto``, for the first, or ``WIDTHxHEIGHT``.
    sizes : sequence of str
        ``WIDTHxHEIGHT`` each, the default first. Of several that are as near, the first.
    """
    if wish in sizes:
        return sizes.index(wish)
    if wish == "auto" or not min(pixels_of(wish)):
        return 0

    def shape(size: str) -> float:
        width, height = pixels_of(size)
        return log(width / height)

    off = [round(abs(shape(size) - shape(wish)), 9) for size in sizes]
    return off.index(min(off))


def unmet(request: ImageRequest, sizes: Sequence[str]) -> Iterator[tuple[str, str]]:
    """What of a request can't be had: (field, one sentence that says what is there instead).

    Parameters
    ----------
    request : ImageRequest
    sizes : sequence of str
        The model's, ``WIDTHxHEIGHT``, the default first.
    """
    if request.size not in ("auto", *sizes):
        drawn = sizes[nearest(request.size, sizes)]
        near = f", of which {drawn} is the nearest in shape" if len(sizes) > 1 else ""
        yield "size", f"size {request.size} is not to be had: pictures are {', '.join(sizes)}{near}"
    for field, (known, why) in _ONE_VALUE.items():
        if (value := getattr(request, field)) not in known:
            yield field, f"{field} {shown(value)} is not to be had: {why}"
    for field, why in _NO_EFFECT.items():
        if getattr(request, field) is not None:
            yield field, f"{field} has no effect: {why}"
    written = request.file_format
    if request.output_format != written:
        yield (
            "output_format",
            f"output_format {shown(request.output_format)} is not to be had: png, jpeg and webp are, "
            f"this is {written}",
        )
    if written == "png" and request.output_compression < 100:
        yield "output_compression", "output_compression has no effect on a png, which is lossless"
    if request.stream and request.response_format == "url":
        yield "response_format", "response_format url is not to be had in a stream: events have b64_json"


def granted(request: ImageRequest, sizes: Sequence[str], strict: bool) -> list[str]:
    """Notes on what a request can't have.

    Raises
    ------
    BadParameter
        With ``strict``, for the first of them.
    """
    wishes: Sequence[tuple[str, str]] = list(unmet(request, sizes))
    if strict and wishes:
        raise BadParameter(*wishes[0])
    return [note for _, note in wishes]
