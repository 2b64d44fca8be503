"""Known pictures for the replay: captions and image codes of scenes that training never saw.

A checkpoint folder may hold them as `FILE`, made by whoever trained it; otherwise rendered scenes go
through the model's own VQ encoder (transformers' layout).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from vllm_kvcompress.models.config import ImageModel

FILE = "held_out.npz"
STREAM = 4
"""First number of the seed of scenes that are encoded here."""


def save(path: Path, captions: Sequence[str], codes: NDArray[np.integer]) -> None:
    """Write captions and codes ``[N, tokens]``."""
    np.savez_compressed(path, captions=np.array(captions), codes=np.asarray(codes, np.uint16))


def load(path: Path, number: int | None = None) -> tuple[list[str], NDArray[np.int64]]:
    """The first ``number`` captions and codes ``[number, tokens]``, or all. Raises ValueError, one line."""
    try:
        with np.load(path) as file:
            captions, codes = file["captions"].tolist(), _whole_numbers(file["codes"])
    except (OSError, KeyError, ValueError, TypeError, EOFError, BadZipFile) as error:
        raise ValueError(f"scenes: cannot read {path}: {error}; need arrays captions and codes") from None
    if codes.ndim != 2 or not isinstance(captions, list) or len(codes) != len(captions) or not len(codes):
        raise ValueError(
            f"scenes: {path}: codes {list(codes.shape)}; need [pictures, tokens] and as many captions, "
            "one at least"
        )
    if not all(isinstance(caption, str) for caption in captions):
        raise ValueError(f"scenes: {path}: captions are to be texts")
    if number is None:
        return captions, codes
    if len(codes) < number:
        raise ValueError(f"scenes: {path} holds {len(codes)}, {number} were asked for")
    return captions[:number], codes[:number]


def _whole_numbers(codes: NDArray[Any]) -> NDArray[np.int64]:
    """As int64, where nothing is lost by that."""
    if codes.dtype.kind not in "iuf":
        raise ValueError(f"codes of {codes.dtype}")
    with np.errstate(invalid="ignore"):
        whole = codes.astype(np.int64)
    if (whole != codes).any():
        raise ValueError("a code is no whole number")
    return whole


def check(codes: NDArray[np.int64], image: "ImageModel") -> None:
    """Raise ValueError, one line, unless these are pictures of the model's size and codes."""
    raster = image.raster
    if codes.shape[1] != raster.lines * raster.columns:
        raise ValueError(
            f"scenes: pictures of {codes.shape[1]} codes, where one of {raster.name} has "
            f"{raster.lines * raster.columns}: name the size with --size, or other scenes with --scenes-file"
        )
    if codes.min() < 0 or codes.max() >= image.codes:
        raise ValueError(
            f"scenes: codes from {codes.min()} to {codes.max()}, but this model's are from 0 to "
            f"{image.codes - 1}: name scenes of its own codes with --scenes-file"
        )


def known(model: str, image: "ImageModel", file: Path | None = None, number: int | None = None) -> int | None:
    """How many scenes a file holds, or the checkpoint; None if they are rendered, as many as one likes.

    Raises ValueError, one line, for a file that can't be read, holds less than ``number``, or others' scenes.
    """
    beside = Path(model) / FILE
    if file is None and not beside.exists():
        return None
    _, codes = load(file or beside, number)
    check(codes, image)
    return len(codes)


def scenes_for(model: str, number: int, file: Path | None = None) -> tuple[list[str], NDArray[np.int64]]:
    """Held-out scenes for a checkpoint: ``file``, the checkpoint's own, or rendered and encoded.

    Raises ValueError, one line, where none of these can be had.
    """
    beside = Path(model) / FILE
    if file is not None or beside.exists():
        return load(file or beside, number)
    return _encode(model, number)


def _encode(model: str, number: int) -> tuple[list[str], NDArray[np.int64]]:
    import cv2
    import torch
    from transformers import JanusForConditionalGeneration, PreTrainedConfig

    from vllm_kvcompress.eval.scenes import render, sample_pair
    from vllm_kvcompress.models.janus_config import TRANSFORMERS_LAYOUT

    try:
        # transformers would make a Janus with random weights of any other type.
        if (kind := PreTrainedConfig.get_config_dict(model)[0].get("model_type")) != TRANSFORMERS_LAYOUT:
            raise ValueError(f"its model_type is {kind!r:.40}")
        whole = JanusForConditionalGeneration.from_pretrained(model, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"scenes: {model} has no {FILE} and is not in transformers' layout, whose VQ encoder could "
            f"make them; name a file with --scenes-file ({str(error).splitlines()[0]})"
        ) from None
    vq = whole.model.vqmodel
    vision: Any = whole.config.vision_config
    side = vision.image_size
    captions, codes = [], []
    for index in range(number):
        scene, prompt = sample_pair((STREAM, index))
        picture = cv2.resize(render(scene), (side, side), interpolation=cv2.INTER_CUBIC)
        pixels = torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 127.5 - 1
        with torch.inference_mode():
            codes.append(vq.encode(pixels).image_tokens.flatten().numpy())
        captions.append(prompt.text)
    return captions, np.stack(codes).astype(np.int64)
