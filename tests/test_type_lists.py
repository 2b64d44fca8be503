"""Engines with any list of head types: one to six rules, any mix, layers in which a type has no head.

Presets make few of the lists that a fit may come to. Here they are drawn at random, put in the place of what
the settings would have chosen, and held against the dense simulation, and against themselves: in company,
in windows, in the other kernels.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from dense_janus import draw_dense
from inprocess import KERNELS, Engine, in_process  # noqa: F401
from parity import load_reference
from vllm import SamplingParams

from vllm_kvcompress.cache.paging import plan_pages
from vllm_kvcompress.cache.plan import ModelShape
from vllm_kvcompress.heads.fit import Assignment
from vllm_kvcompress.models import compression
from vllm_kvcompress.policy.raster import Raster
from vllm_kvcompress.policy.rule import HeadRule
from vllm_kvcompress.windows.choice import WindowChoice

GREEDY = SamplingParams(temperature=0.0)
TEXTS = ("a red bird", "two boats by the sea", "an old clock", "grass at night, in the rain")


def random_rule(rng: random.Random, raster: Raster) -> HeadRule:
    """A ring or a scored rule of any size, refinements and all; one in eight keeps everything."""
    line, image = raster.width, raster.tokens
    slots = image if rng.random() < 1 / 8 else rng.randrange(line, image)
    room = image if slots == image else slots - line
    anchors = rng.randint(0, room)
    if rng.random() < 0.5:
        return HeadRule(slots, line, image, anchors, slots - anchors, ring=True)
    refine = {name: rng.random() < 0.5 for name in ("value_norm", "smooth_row")}
    return HeadRule(
        slots,
        line,
        image,
        anchors,
        rng.randint(0, room - anchors),
        decay=rng.choice((0.0, 0.5, 1.0)),
        **refine,
    )


def random_list(seed: int, kinds: int, raster: Raster, shape: ModelShape) -> Assignment:
    """So many types, each with a head, that share pages; the last has none in the first layer."""
    rng = random.Random(seed)
    heads = 2 * shape.kv_heads
    while True:
        rules = tuple(random_rule(rng, raster) for _ in range(kinds))
        flat = [rng.randrange(kinds) for _ in range(shape.layers * heads)]
        if kinds > 1:
            flat[:heads] = [kind % (kinds - 1) for kind in flat[:heads]]
        counts = [flat.count(kind) for kind in range(kinds)]
        if len(set(rules)) == kinds and all(counts) and plan_pages(counts, [rule.capacity for rule in rules]):
            return Assignment(rules, np.array(flat).reshape(shape.layers, heads))


@contextmanager
def given(seed: int, kinds: int) -> Iterator[None]:
    """Engines that start have such a list."""

    def assign(config: object, raster: Raster, shape: ModelShape, *_: object) -> Assignment:
        return random_list(seed, kinds, raster, shape)

    with mock.patch.object(compression, "assign", assign):
        yield


@pytest.mark.parametrize("kinds", range(1, 7))
def test_any_list_of_types(checkpoints: dict[str, Path], kinds: int) -> None:
    model = checkpoints["gqa-hf" if kinds % 2 else "tiny-hf"]
    params = [GREEDY, SamplingParams(temperature=1.0, seed=7, extra_args={"guidance_scale": 2.0})] * 2
    drawn = {}
    with given(kinds, kinds):
        for kernels in KERNELS:
            engine = Engine.get(
                model, kvcompress={"kernels": kernels, "window": 16}, max_model_len=128, seed=kinds
            )
            prompts = [engine.prompt(text) for text in TEXTS]
            for windows in ((1,), (5, 16, 2)):
                with mock.patch.object(WindowChoice, "choose", side_effect=cycle(windows)):
                    drawn[kernels, windows] = engine.draw(prompts, params)
                    alone = engine.draw(prompts[2:3], params[2:3])
                assert alone == drawn[kernels, windows][2:3]
            assert engine.free == engine.scheduler.kv_cache_manager.block_pool.num_gpu_blocks - 1
    layout = engine.model.compressed._layout
    assert len(layout.rules) == kinds == len({kind for row in layout.types for kind in row})
    assert kinds == 1 or kinds - 1 not in layout.types[0], "a layer in which a type has no head"
    pictures = next(iter(drawn.values()))
    assert all(other == pictures for other in drawn.values())
    codes, heads = draw_dense(
        load_reference(model), prompts[0], engine.image.pad,
        lambda layer, head: layout.rules[layout.types[layer][head]], engine.image.raster.tokens,
    )  # fmt: skip
    assert [engine.image.code(token) for token in pictures[0]] == codes
    held, fed = [[len(head.seen) for head in row] for row in heads], len(codes) - 1  # not the last
    assert held == [[min(layout.rules[kind].capacity, fed) for kind in row] for row in layout.types]
