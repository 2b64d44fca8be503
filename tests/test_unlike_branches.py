"""Branches whose prompts are of unlike length: to each branch its padding is as if it were not there.

The oracle knows nothing of padding: what begins at slot s is to it a request without the first s tokens.
"""

import random
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Run, World, bounded, one_thread, worlds
from test_windows import KERNELS, draw_in_windows, kernels_of

from vllm_kvcompress.attention.prefill_plan import PrefillPlan

_threads = pytest.fixture(scope="module", autouse=True)(one_thread)
kernels = pytest.mark.parametrize("name", KERNELS)
few = settings(bounded, max_examples=15)


@st.composite
def aligned(draw: st.DrawFn) -> tuple[list[int], list[tuple[int, int]]]:
    """Prefixes, and where each branch begins: at least one of the two at the row's beginning, or neither."""
    prefix = draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
    return prefix, [(draw(st.integers(0, p - 1)), draw(st.integers(0, p - 1))) for p in prefix]


def started(name: str, world: World, rows: tuple[list[int], list[tuple[int, int]]], seed: int) -> Run:
    prefix, begins = rows
    kernel, total = kernels_of(name)[0], [p + world.rules[0].image for p in prefix]
    return Run(world, prefix, total, seed, decode=kernel.decode, select=kernel.select_victims, begins=begins)


@kernels
@few
@given(worlds(), aligned(), st.integers(0, 999))
def test_drawing_equals_the_oracle(name: str, world: World, rows: Any, seed: int) -> None:
    """Token by token, the prompt too: a token of the padding sees itself."""
    run, rng = started(name, world, rows, seed), random.Random(seed)
    while left := [row for row, total in enumerate(run.total) if run.length[row] < total]:
        batch = [row for row in left if rng.random() < 0.8]
        batch.insert(rng.randint(0, len(batch)), -1)
        run.step(batch)
    run.check()


@kernels
@few
@given(worlds(), aligned(), st.integers(0, 999))
def test_prompts_chunks_and_replay_equal_the_oracle(name: str, world: World, rows: Any, seed: int) -> None:
    run, rng = started(name, world, rows, seed), random.Random(seed)
    cuts = []
    for total in run.total:
        inner = rng.sample(range(1, total), min(total - 1, rng.choice((0, 1, 3))))
        cuts.append([b - a for a, b in pairwise([0, *sorted(inner), total])])
    while any(cuts):
        mine = [row for row, left in enumerate(cuts) if left and rng.random() < 0.7]
        if mine:
            run.chunk({row: cuts[row].pop(0) for row in mine})
    run.check()


@kernels
@few
@given(worlds(), aligned(), st.integers(0, 999))
def test_windows_equal_the_oracle(name: str, world: World, rows: Any, seed: int) -> None:
    draw_in_windows(*kernels_of(name), world, rows[0], seed, rows[1])


@kernels
@few
@given(worlds(), st.lists(st.integers(1, 9), min_size=1, max_size=3), st.integers(0, 999))
def test_zeros_are_as_none(name: str, world: World, prefix: list[int], seed: int) -> None:
    """To the bit, whether the plan says that branches begin together or says nothing."""
    said = started(name, world, (prefix, [(0, 0)] * len(prefix)), seed)
    silent = started(name, world, (prefix, []), seed)
    silent.begins = None
    for run in (said, silent):
        run.chunk(dict(enumerate(prefix)))
        for step in range(world.rules[0].image):
            run.step([row for row in range(len(prefix)) if run.length[row] < run.total[row] and step >= row])
    assert torch.equal(said.out.nan_to_num(7), silent.out.nan_to_num(7))


def test_a_tiles_place_does_not_depend_on_the_other_heads() -> None:
    """The same head, beside heads that begin elsewhere, in chunks of one head and of many: the same bits."""
    kernel: Callable = kernels_of("cpu")[0].decode
    from oracle import world

    from vllm_kvcompress.policy.raster import Raster

    small = world("full", 1.0, Raster(5, 8), [[0, 0]], head_size=16, pages=(5,))
    outs = []
    for other in (0, 3, 37):
        run = Run(small, [45, 40], [85, 80], 1, decode=kernel, begins=[(11, other), (other, 0)])
        run.chunk({0: 45, 1: 40})
        for _ in range(40):
            run.step([0, 1])
        outs.append(run.out[0, 45:, :, :2])
    assert all(torch.equal(outs[0], other) for other in outs[1:])


def test_equal_prompts_are_planned_as_before() -> None:
    """One call for all heads, one mask for both branches."""
    args = [0, 4, 6], [4, 8], [4, 5], torch.device("cpu")
    plan, none = PrefillPlan.of(*args, [(0, 0), (0, 0)]), PrefillPlan.of(*args)
    assert plan is not None
    assert none is not None
    assert [begun.branch for begun in plan.begun] == [begun.branch for begun in none.begun] == [None]
    assert plan.chunks[0].mask.shape == none.chunks[0].mask.shape
    apart = PrefillPlan.of(*args, [(0, 2), (3, 0)])
    assert apart is not None
    assert [begun.counts for begun in apart.begun] == [[4], [2]]
