"""Scenes whose object the left or right border cuts, and from which line on they are trained.

Training scenes are whole: what is begun too near to the right border is then something that the language
model has never seen, and it went on at the left, which in raster order comes next. Of these scenes only what
follows the object's first line is trained: how a cut object goes on, and not to place any there.
"""

from __future__ import annotations

from dataclasses import replace
from math import ceil

import numpy as np

from vllm_kvcompress.eval.scenes import IMAGE_SIZE, render, render_ground, sample_pair
from vllm_kvcompress.eval.world import PIXELS_PER_TOKEN, SIZES, Prompt, Scene

RIGHT = 0.75
"""Share that the right border cuts; of the rest it is the left one."""
LEAST_SEEN = 0.3
"""Of the object's width."""


def cut_pair(seed: tuple[int, ...]) -> tuple[Scene, Prompt]:
    """One object, moved so that a border cuts it, and a caption that names no place.

    Where the caption leaves the size open, not even a small object would fit there: sizes stay as likely
    as they were wherever an object can be whole.
    """
    for tried in range(1000):
        scene, prompt = sample_pair((*seed, tried), {"single": 1.0})
        if prompt.place is None:
            break
    else:
        raise ValueError(f"no scene without a place in a thousand of seed {seed}")
    rng = np.random.default_rng((*seed, 1000))
    [thing] = scene.things
    said = prompt.phrases[0].size is not None
    inwards = (-thing.radius * (1 - 2 * LEAST_SEEN), thing.radius if said else SIZES["small"])
    tokens = int(rng.integers(*(ceil(pixels / PIXELS_PER_TOKEN) for pixels in inwards)))
    x = float(tokens * PIXELS_PER_TOKEN)
    x = IMAGE_SIZE - x if rng.random() < RIGHT else x
    return replace(scene, things=(replace(thing, x=x),)), prompt


def lines_until_known(scene: Scene) -> int:
    """Lines of tokens up to the first that shows an object, that one included."""
    shows = (render(scene) != render_ground(scene.ground)).any((1, 2))
    return int(shows.argmax()) // PIXELS_PER_TOKEN + 1
