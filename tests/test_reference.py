"""The paged reference against the dense oracle, for every preset and for anything hypothesis finds."""

import random
from copy import deepcopy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import Run, World, bounded, draw, one_thread, world, worlds

from vllm_kvcompress.attention.pages import (
    SIDE_BYTES,
    HeadType,
    Plan,
    page_bytes,
    pages_from_bytes,
)
from vllm_kvcompress.attention.reference import decode, slot_of
from vllm_kvcompress.attention.select import select_victims, victim_order
from vllm_kvcompress.policy import PRESETS, Preset
from vllm_kvcompress.policy.raster import Raster
from vllm_kvcompress.policy.rule import HeadRule

_threads = pytest.fixture(scope="module", autouse=True)(one_thread)

RASTER = Raster(6, 5)
PROFILE = [[1, 0, 1], [0, 0, 0], [1, 1, 1]]


def image(world: World) -> int:
    return world.rules[0].image


def play(run: Run, rng: random.Random) -> None:
    """Draw everything, in batches of different phases with padding rows between."""
    rows = range(len(run.total))
    while left := [row for row in rows if run.length[row] < run.total[row]]:
        batch = [row for row in left if rng.random() < 0.8]
        rng.shuffle(batch)
        for _ in range(rng.randrange(3)):
            batch.insert(rng.randint(0, len(batch)), -1)
        if batch:
            run.step(batch)


@bounded
@given(worlds(), st.lists(st.integers(0, 9), min_size=1, max_size=3), st.integers(0, 999))
def test_equals_the_oracle(world: World, prefix: list[int], seed: int) -> None:
    rng = random.Random(seed)
    total = [p + (image(world) if rng.random() < 0.6 else rng.randint(1, image(world))) for p in prefix]
    run = Run(world, prefix, total, seed)
    play(run, rng)
    run.check()


@bounded
@given(worlds(), st.integers(0, 999))
def test_an_aborted_request_leaves_nothing_behind(world: World, seed: int) -> None:
    rng = random.Random(seed)
    run = Run(world, [5, 2], [5 + image(world), 2 + image(world)], seed)
    for _ in range(rng.randint(1, run.total[1])):
        run.step([0, 1])
    run.restart(0, rng.randint(0, 5))
    play(run, rng)
    run.check()


def check_preset(preset: str) -> None:
    """What holds for every preset: the shared matrix, which a new one joins by being in `PRESETS`."""
    shape = {"group": 2, "pages": (3, 4)}
    whole = Run(world("full", 1.0, RASTER, PROFILE, **shape), [4, 1], [34, 31])
    play(whole, random.Random(1))
    same = Run(world(preset, 1.0, RASTER, PROFILE, **shape), [4, 1], [34, 31])
    play(same, random.Random(2))
    torch.testing.assert_close(same.out[0, :34], whole.out[0, :34], atol=1e-6, rtol=0)
    torch.testing.assert_close(same.out[1, :31], whole.out[1, :31], atol=1e-6, rtol=0)
    for budget in (1 / 6, 0.34, 0.5, 0.8):
        small = world(preset, budget, RASTER, PROFILE, **shape)
        run = Run(small, [4, 1], [34, 31])
        play(run, random.Random(3))
        run.check()
        grown = min(rule.capacity for rule in small.rules)
        torch.testing.assert_close(run.out[0, : 4 + grown], whole.out[0, : 4 + grown], atol=1e-6, rtol=0)
        if PRESETS[preset].evicts:
            assert (run.out[0, 4 + grown : 34] - whole.out[0, 4 + grown : 34]).abs().max() > 1e-3


@pytest.mark.parametrize("preset", PRESETS)
def test_preset(preset: str) -> None:
    check_preset(preset)


def test_a_seventh_preset_is_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    seventh = Preset("profile", score="averaged", anchors=1, recent_lines=2, stratify=True)
    monkeypatch.setitem(PRESETS, "seventh", seventh)
    check_preset("seventh")


def test_bfloat16_pages_store_what_was_written() -> None:
    run = Run(world("decoupled", 0.4, RASTER, PROFILE), [3], [33], dtype=torch.bfloat16)
    run.k, run.v = run.k.bfloat16().float(), run.v.bfloat16().float()
    play(run, random.Random(0))
    run.check()


@pytest.mark.parametrize("refinement", ["none", "value_norm", "smooth_row", "stratify"])
def test_ties_go_to_the_older_token(refinement: str) -> None:
    refine = {} if refinement == "none" else {refinement: True}
    run = Run(world("line_ar", 0.5, RASTER, PROFILE, anchor_tokens=0, **refine), [3], [33])
    run.k.zero_()  # every visible token gets the same probability
    run.v = run.v.sign()  # and every value has the same norm
    play(run, random.Random(0))
    run.check()
    rule = HeadRule(6, 2, 8)
    token = torch.tensor([[[4, 3, 0, 5, 2, 1]]])
    order = victim_order(torch.zeros(1, 1, 6), token, token < 1, rule)
    assert token[0, 0, order[0, 0]].tolist() == [1, 2, 3, 4, 5, 0]


def test_stratified_choice_takes_one_of_each_column_first() -> None:
    rule = HeadRule(7, 3, 9, stratify=True)
    token = torch.arange(7).reshape(1, 1, 7)
    score = torch.tensor([[[1.0, 9, 8, 2, 5, 7, 3]]])  # column 0: 1, 2, 3; column 1: 9, 5; column 2: 8, 7
    order = victim_order(score, token, torch.zeros_like(token, dtype=torch.bool), rule)
    assert order[0, 0].tolist() == [0, 4, 5, 3, 2, 1, 6]


def test_smoothing_reads_no_slot_that_holds_nothing() -> None:
    raw = torch.zeros(3, page_bytes(1, 4, 4, torch.float32), dtype=torch.int8)
    pages = pages_from_bytes(raw, 1, 4, 4, torch.float32)
    pages.score.fill_(1e9)
    pages.score[1, 0] = torch.tensor([0.1, 0.2, 5.0, 5.0])
    pages.token[1, 0] = torch.arange(4)
    rule = HeadRule(5, 2, 8, smooth_row=True)
    kind = HeadType(pages, rule, torch.arange(1), torch.tensor([[1, 2]], dtype=torch.int32))
    pages.victim.fill_(-7)
    select_victims(kind, Plan(torch.tensor([0]), torch.tensor([4])))
    assert pages.victim[1, 0].tolist() == [0, -7, -7, -7]  # one slot is free, one victim is due
    assert pages.score[1, 0].tolist() == [0.0] * 4


def poison(run: Run, row: int) -> None:
    """NaN into every slot that the row's next token must not see: free ones, and the one it lands in."""
    drawn = run.length[row] - run.prefix[row]
    for kind in filter(None, run.types):
        page, pages, table = kind.pages.page, kind.pages, kind.block_table[row]
        seen = torch.zeros(pages.kv.shape[:3], dtype=torch.bool)
        landing = slot_of(kind, table[None], torch.tensor([drawn]))[0]
        for slot in range(run.prefix[row] + kind.rule.resident(drawn)):
            seen[table[slot // page], :, slot % page] = landing != slot - run.prefix[row]
        pages.kv[~seen] = torch.nan
        if kind.rule.scores:
            pages.score[~seen] = torch.nan
            pages.token[~seen] = -9


@pytest.mark.parametrize("preset", PRESETS)
def test_evicted_is_really_evicted(preset: str) -> None:
    small = world(preset, 0.34, RASTER, PROFILE)
    clean, dirty = (Run(small, [4], [34], seed=5) for _ in range(2))
    for n in range(34):
        clean.step([0])
        if n >= 4:
            poison(dirty, 0)
        dirty.step([0])
    assert torch.equal(clean.out, dirty.out)
    dirty.check()


@pytest.mark.parametrize("preset", PRESETS)
def test_a_resident_slot_is_really_seen(preset: str) -> None:
    small = world(preset, 0.34, RASTER, PROFILE)
    clean, rng = Run(small, [4], [34], seed=5), random.Random(0)
    for _ in range(29):
        clean.step([0])
    for n, whole in enumerate(clean.types):
        if whole is None:
            continue
        for slot in (0, 3, *rng.sample(range(4, 4 + whole.rule.resident(25)), 3)):
            landing = slot_of(whole, whole.block_table, torch.tensor([25]))[0]
            run = deepcopy(clean)
            kind = run.types[n]
            assert kind is not None
            kind.pages.kv[kind.block_table[0, slot // kind.pages.page], 0, slot % kind.pages.page] = torch.nan
            run.step([0])
            overwritten = landing[0] == slot - 4
            assert bool(run.out[0, 29].isnan().any()) is not bool(overwritten)


def test_groups_sum_their_scores_and_heads_choose_for_themselves() -> None:
    run = Run(world("line_ar", 0.5, RASTER, [[0, 0]], group=3), [2], [32])
    play(run, random.Random(0))
    run.check()
    chosen = [found.tolist() for found in run.victims[0].values() if found is not None]
    assert any(len({tuple(head) for head in heads}) == 4 for heads in chosen)  # 2 heads x 2 branches


def test_a_batch_of_padding_writes_nothing() -> None:
    raw = torch.zeros(2, page_bytes(2, 4, 4, torch.float32), dtype=torch.int8)
    pages = pages_from_bytes(raw, 2, 4, 4, torch.float32)
    kind = HeadType(pages, HeadRule(4, 2, 8), torch.arange(2), torch.full((3, 2), -1, dtype=torch.int32))
    plan = Plan(torch.tensor([3, 0, 2]), torch.zeros(3, dtype=torch.int32))
    q, k, out = torch.randn(3, 4, 4), torch.randn(3, 2, 4), torch.full((3, 4, 4), torch.nan)
    decode(q, k, k, [kind], plan, 1.0, out)
    select_victims(kind, plan)
    assert not raw.any()
    assert not out.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pages_are_views_that_do_not_overlap(dtype: torch.dtype) -> None:
    heads, page, size = 3, 5, 2
    need = page_bytes(heads, page, size, dtype)
    assert need == heads * page * (2 * size * dtype.itemsize + SIDE_BYTES)
    raw = torch.zeros(4, need + 16, dtype=torch.int8)
    pages = pages_from_bytes(raw, heads, page, size, dtype)
    for number, part in enumerate((pages.kv, pages.score, pages.token, pages.victim), 1):
        part.fill_(number)
    for number, part in enumerate((pages.kv, pages.score, pages.token, pages.victim), 1):
        assert (part == number).all()
        assert part.shape[:3] == (4, heads, page)
        assert part.untyped_storage().data_ptr() == raw.untyped_storage().data_ptr()
    assert not raw[:, need:].any()
    layer = pages.layer(1, 3)
    assert layer.kv.shape == (4, 2, page, 2 * size)
    assert (layer.page, layer.head_size) == (page, size)


def test_pages_refuse_memory_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"^raw: .*at least 240\] bytes for 3 heads"):
        pages_from_bytes(torch.zeros(2, 239, dtype=torch.int8), 3, 5, 2, torch.bfloat16)
    with pytest.raises(ValueError, match=r"^raw: .*not aligned"):
        pages_from_bytes(torch.zeros(2, 242, dtype=torch.int8), 3, 5, 2, torch.bfloat16)


def test_the_oracle_by_hand() -> None:
    """Two lines of the oracle's story checked on paper: a ring of 3 slots with one anchor, W = 2."""
    rule = HeadRule(3, 2, 6, anchors=1, ring=True)
    one = torch.zeros(7, 1, 1).numpy()
    done = draw(rule, 1, one, one[:, 0], one[:, 0], 1.0)
    assert [mask.nonzero()[0].tolist() for mask in done.mask[3:]] == [
        [0, 1, 2, 3],
        [0, 1, 3, 4],
        [0, 1, 4, 5],
        [0, 1, 5, 6],
    ]
    assert done.holds == [0, 5, 4]
