"""Prompts, chunks and replayed lines must leave exactly what drawing one by one leaves."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import Run, World, bounded, one_thread, world, worlds

from vllm_kvcompress.attention.prefill import prefill
from vllm_kvcompress.attention.prefill_plan import PrefillPlan
from vllm_kvcompress.policy import PRESETS
from vllm_kvcompress.policy.raster import Raster

_threads = pytest.fixture(scope="module", autouse=True)(one_thread)

RASTER = Raster(5, 4)
PROFILE = [[1, 0], [0, 0], [1, 1]]


def assert_same(one: Run, other: Run) -> None:
    """The same requests over the same block tables: outputs, pages, scores and victims agree."""
    for row, length in enumerate(one.length):
        torch.testing.assert_close(other.out[row, :length], one.out[row, :length], atol=1e-5, rtol=0)
    for mine, theirs in zip(one.types, other.types, strict=True):
        if mine is None or theirs is None:
            continue
        assert torch.equal(mine.pages.token, theirs.pages.token)
        assert torch.equal(mine.pages.victim, theirs.pages.victim)
        for name in ("kv", "score"):
            pair = getattr(theirs.pages, name), getattr(mine.pages, name)
            torch.testing.assert_close(*pair, atol=1e-5, rtol=1e-5, equal_nan=True)


def pieces(total: int, rng: random.Random, longest: int) -> list[int]:
    found = []
    while total:
        found.append(rng.randint(1, min(total, longest)))
        total -= found[-1]
    return found


@bounded
@given(worlds(), st.lists(st.integers(0, 9), min_size=1, max_size=3), st.integers(0, 999))
def test_chunks_and_replay_equal_drawing(world: World, prefix: list[int], seed: int) -> None:
    rng = random.Random(seed)
    image = world.rules[0].image
    total = [p + rng.randint(1, image) for p in prefix]
    drawn, replayed = (Run(world, prefix, total, seed) for _ in range(2))
    for row, n in enumerate(total):
        for _ in range(n):
            drawn.step([row])
    todo = {row: pieces(n, rng, rng.choice((1, 3, 40))) for row, n in enumerate(total)}
    while any(todo.values()):
        rows = [row for row in todo if todo[row] and rng.random() < 0.7]
        if rows and rng.random() < 0.3 and all(todo[row][0] == 1 for row in rows):
            replayed.step([todo[row].pop(0) and row for row in rows])  # drawing goes on after a replay
        elif rows:
            replayed.chunk({row: todo[row].pop(0) for row in rows})
    assert_same(drawn, replayed)
    replayed.check()


@pytest.mark.parametrize("cut", [3, 6, 8, 11, 20, 26])
@pytest.mark.parametrize("preset", PRESETS)
def test_preset_replays_from_any_cut(preset: str, cut: int) -> None:
    drawn, replayed = (Run(world(preset, 0.45, RASTER, PROFILE, group=2), [6], [26]) for _ in range(2))
    for _ in range(26):
        drawn.step([0])
    replayed.chunk({0: cut})
    for _ in range(26 - cut):
        replayed.step([0])
    assert_same(drawn, replayed)


def test_bfloat16_prompts_stay_close() -> None:
    run = Run(world("decoupled", 0.45, RASTER, PROFILE, group=2), [40], [41], dtype=torch.bfloat16)
    exact = Run(world("decoupled", 0.45, RASTER, PROFILE, group=2), [40], [41])
    run.q, run.k, run.v = (x.bfloat16() for x in (run.q, run.k, run.v))
    for one in (run, exact):
        one.chunk({0: 25})
        one.chunk({0: 15})
    torch.testing.assert_close(run.out[0, :40].float(), exact.out[0, :40], atol=0.05, rtol=0)


def test_padding_rows_and_tokens_are_left_alone() -> None:
    run = Run(world("decoupled", 0.45, RASTER, PROFILE), [3, 2], [4, 4])
    types = run.layer(0)
    q, k = torch.randn(9, 4, 8), torch.randn(9, 4, 8)
    out = torch.full_like(q, torch.nan)
    plan = PrefillPlan.of([0, 3, 5], [3, 2], [3, 0], torch.device("cpu"))
    assert plan is not None
    prefill(q, k, k, types, plan, 1.0, out)
    assert out[:3].isfinite().all()
    assert out[:3].any()
    assert out[3:].isnan().all()
    for kind in types:
        assert kind.pages.kv[int(kind.block_table[1, 0])].isnan().all()
