"""Draw the evaluation's prompts under one policy, and judge the pictures."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from vllm_kvcompress.eval.engine import Room, asking, start
from vllm_kvcompress.eval.features import Frechet
from vllm_kvcompress.eval.judge import judge
from vllm_kvcompress.eval.prompts import prompt_set
from vllm_kvcompress.eval.scenes import render, sample_pair
from vllm_kvcompress.eval.world import IMAGE_SIZE, Prompt

TRUE_STREAM = 3
"""First number of the seed of the true scenes that Fréchet distances are measured to."""
TRUE_SCENES = 2000


@dataclass(frozen=True)
class Asked:
    """What every cell draws: the same prompts with the same seeds.

    Parameters
    ----------
    categories : tuple of str
    number : int
        Pictures a category.
    seed : int
        Of the prompts; picture i of the list is drawn with seed ``seed + i``.
    guidance, temperature : float
    batch : int
        Pictures drawn at once.
    dtype : str
        As for vllm serve.
    room : Room
        The engine's memory.
    size : str, optional
        Of the pictures, where a model has several; as in ``additional_config.kvcompress``.
    """

    categories: tuple[str, ...]
    number: int
    seed: int = 0
    guidance: float = 5.0
    temperature: float = 1.0
    batch: int = 64
    dtype: str = "auto"
    room: Room = field(default_factory=Room)
    size: str | None = None

    def prompts(self) -> list[Prompt]:
        return prompt_set(self.number, self.categories, self.seed)


def draw(model: str, section: dict[str, Any], asked: Asked) -> NDArray[np.uint8]:
    """All pictures of a cell, ``[N, H, W, 3]`` uint8; a progress bar on stderr. Run it `in_process`."""
    from vllm import SamplingParams

    llm = start(model, section, asked.batch, asked.dtype, asked.room, asked.size)
    try:
        prompts = asked.prompts()
        ids = asking(llm, [prompt.text for prompt in prompts])
        params = [
            SamplingParams(
                temperature=asked.temperature,
                seed=asked.seed + n,
                extra_args={"guidance_scale": asked.guidance},
            )
            for n in range(len(prompts))
        ]
        outs = llm.generate([{"prompt_token_ids": one} for one in ids], params, use_tqdm=True)
        return np.stack([decoded(llm, out.outputs[0].token_ids) for out in outs])
    finally:
        llm.llm_engine.engine_core.shutdown()


def decoded(llm: Any, tokens: Sequence[int]) -> NDArray[np.uint8]:
    """The picture of these image tokens, ``[H, W, 3]`` uint8."""
    from vllm_kvcompress.models.registry import image_model

    image = image_model(llm.model_config)
    codes = [image.code(token) for token in image.raster.cells(tokens)]
    width, height, raw = llm.collective_rpc("kvcompress_decode_image", args=(codes,))[0]
    return np.frombuffer(raw, np.uint8).reshape(height, width, 3)


def true_scenes(number: int = TRUE_SCENES) -> list[NDArray[np.uint8]]:
    """Rendered scenes that nothing was trained on."""
    return [render(sample_pair((TRUE_STREAM, index))[0]) for index in range(number)]


def judge_all(pictures: NDArray[np.uint8], asked: Asked, truth: Frechet) -> dict[str, Any]:
    """Verdicts and distance of a cell.

    Returns
    -------
    dict
        ``verdicts``: per picture, a `Verdict` as a dict with ``correct`` and ``category``; ``frechet``.
    """
    sized = [_sized(picture) for picture in pictures]
    verdicts = []
    for picture, prompt in zip(sized, asked.prompts(), strict=True):
        verdict = judge(picture, prompt)
        verdicts.append({"category": prompt.category, "correct": verdict.correct, **asdict(verdict)})
    return {"verdicts": verdicts, "frechet": truth.distance(sized) if len(sized) > 1 else None}


def _sized(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A picture at the size of the shapes world."""
    if picture.shape[:2] == (IMAGE_SIZE, IMAGE_SIZE):
        return picture
    return np.asarray(cv2.resize(picture, (IMAGE_SIZE, IMAGE_SIZE), interpolation=cv2.INTER_AREA), np.uint8)
