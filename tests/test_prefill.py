"""Prompts, chunks and replayed lines must leave exactly what drawing one by one leaves."""

import random
from collections.abc import Callable
from itertools import accumulate
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import Run, World, bounded, one_thread, world, worlds
from torch.nn.attention import SDPBackend, sdpa_kernel

from vllm_kvcompress.attention import prefill as calls
from vllm_kvcompress.attention import prefill_plan
from vllm_kvcompress.attention.padding import LEAST
from vllm_kvcompress.attention.prefill import prefill
from vllm_kvcompress.attention.prefill_plan import PrefillPlan
from vllm_kvcompress.cache import scratch
from vllm_kvcompress.cache.layout import CacheLayout
from vllm_kvcompress.cache.paging import Paging
from vllm_kvcompress.cache.scratch import Prompts, prefill_bytes
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


@pytest.mark.parametrize("begins", [None, [(0, 3), (9, 0)]], ids=["alike", "unlike"])
def test_chunks_in_pieces_are_the_same(
    monkeypatch: pytest.MonkeyPatch, begins: list[tuple[int, int]] | None
) -> None:
    small, runs = world("decoupled", 0.45, RASTER, PROFILE, group=2), []
    for pairs in (2**20, 700, 1):
        monkeypatch.setattr(prefill_plan, "MOST_PAIRS", pairs)
        run = Run(small, [40, 37], [42, 39], begins=begins)
        run.chunk({0: 5, 1: 3})
        run.chunk({0: 35, 1: 34})
        run.step([0, 1])
        run.check()
        runs.append(run)
    for other in runs[1:]:
        assert_same(runs[0], other)


@bounded
@given(
    st.lists(st.tuples(st.integers(1, 200), st.integers(1, 200)), min_size=1, max_size=6),
    st.integers(8, 13),
)
def test_a_call_has_a_bounded_number_of_logits(rows: list[tuple[int, int]], bits: int) -> None:
    """Every token in one call, and cut as it is alone: sums are of the same shape in any company."""
    most = 1 << bits

    def planned(rows: list[tuple[int, int]]) -> PrefillPlan:
        starts = [0, *accumulate(new for _, new in rows)]
        lengths = [before + new for before, new in rows]
        plan = PrefillPlan.of(starts, lengths, lengths, torch.device("cpu"))
        assert plan is not None
        return plan

    with mock.patch.object(prefill_plan, "MOST_PAIRS", most):
        plan, alone = planned(rows), [planned([row]) for row in rows]
    tokens = torch.cat([chunk.queries.tokens for chunk in plan.chunks])
    assert tokens.sort().values.tolist() == list(range(sum(new for _, new in rows)))
    for chunk in plan.chunks:
        (count, queries), slots = chunk.queries.at.shape, chunk.slot.shape[1]
        assert count * queries * slots <= most or (count, queries) == (1, LEAST)
    assert sorted(tuple(chunk.mask.shape[2:]) for chunk in plan.chunks for _ in chunk.rows) == sorted(
        tuple(chunk.mask.shape[2:]) for one in alone for chunk in one.chunks for _ in chunk.rows
    )


def peak_bytes(work: Callable[[], None]) -> int:
    """The most that is allocated at once while it runs, beyond what was before; torch's own scratch too."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as seen:
        work()
    results: Any = seen.profiler.kineto_results
    changes = [event for event in results.events() if event.name() == "[memory]"]
    held = accumulate(event.nbytes() for event in sorted(changes, key=lambda event: event.start_ns()))
    return max(held)


@pytest.mark.parametrize("unlike", [False, True], ids=["alike", "unlike"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["as it comes", "cast"])
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("begun", [0, 32])
def test_prompts_take_what_is_reckoned(
    monkeypatch: pytest.MonkeyPatch, group: int, dtype: torch.dtype, unlike: bool, begun: int
) -> None:
    """On a GPU, where whole prompts are flash attention's, which takes nothing beside what it finds, and
    grouped queries under a mask plain operations."""
    monkeypatch.setattr(calls, "attend_prompts", lambda q, *others: torch.empty_like(q))
    for module in (prefill_plan, scratch):
        monkeypatch.setattr(module, "MOST_SLOTS", 192)
        monkeypatch.setattr(module, "MOST_PAIRS", 2**13 if group == 3 else 2**14)
    small = world("decoupled", 0.45, RASTER, PROFILE, group=group, head_size=64, pages=(8, 8))
    begins = [(2, 0), (0, 5), (7, 0), (0, 9)] if unlike else None
    run = Run(small, [96] * 4, [97] * 4, dtype=dtype, begins=begins)
    if begun:
        run.chunk(dict.fromkeys(range(4), begun))
    real, peaks = run.prefill, []

    def measured(*args: Any) -> None:
        with sdpa_kernel(SDPBackend.MATH if group > 1 else SDPBackend.FLASH_ATTENTION):
            peaks.append(peak_bytes(lambda: real(*args)))

    run.prefill = measured
    run.chunk(dict.fromkeys(range(4), 96 - begun))
    kinds = tuple(tuple(map(int, row)) for row in small.kinds)
    paging = Paging(tuple(small.page(kind) for kind in range(len(small.rules))), 0.0)
    layout = CacheLayout(kinds, small.kinds.shape[1] // 2, small.head_size, small.rules, paging, dtype)
    prompts = Prompts(4 * (96 - begun), 4, 96, unlike)
    reckoned = prefill_bytes(layout, group, torch.float32, prompts)
    assert max(peaks) <= reckoned
    if begun:
        assert reckoned < 4 * max(peaks)
