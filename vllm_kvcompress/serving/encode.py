"""Pixels to picture files."""

import base64
import io
from dataclasses import dataclass
from typing import Any

from PIL import Image

from vllm_kvcompress.serving.protocol import OutputFormat

UNDRAWN = (127, 127, 127)


@dataclass(frozen=True)
class Pixels:
    """The top rows of a picture, or all of them: RGB, 8 bits, row by row."""

    width: int
    height: int
    rgb: bytes


def encode_base64(
    pixels: Pixels, size: tuple[int, int], output_format: OutputFormat, compression: int
) -> str:
    """A picture file in base64. Takes tens of milliseconds: keep it off the event loop.

    Parameters
    ----------
    pixels : Pixels
        What has been drawn, from the top.
    size : (int, int)
        Width and height of the picture; what is not drawn yet is grey.
    compression : int
        Quality of jpeg and webp, 0 to 100 (the best). A png is lossless whatever it says.
    """
    picture = Image.frombytes("RGB", (pixels.width, pixels.height), pixels.rgb)
    if picture.size != size:
        drawn, picture = picture, Image.new("RGB", size, UNDRAWN)
        picture.paste(drawn, (0, 0))
    options: dict[str, Any] = {}
    if output_format != "png":
        options["quality"] = compression
    if output_format == "jpeg" and compression == 100:
        options["subsampling"] = 0  # Pillow halves the colours' resolution otherwise, at every quality
    file = io.BytesIO()
    picture.save(file, output_format, **options)
    return base64.b64encode(file.getbuffer()).decode("ascii")
