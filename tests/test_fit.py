"""The fit: exact where everything can be tried, within budget and pages everywhere else."""

from itertools import combinations, product
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracle import bounded, made_up_fit

from vllm_kvcompress.heads import fit as heads_fit
from vllm_kvcompress.heads.curves import SQUARES, LossCurves, Weighing, candidate_types
from vllm_kvcompress.heads.fit import Assignment, fit, knapsack, predict, smallest_budget
from vllm_kvcompress.heads.paged import (
    MOST_WASTE,
    PREFIXES,
    TYPICAL_PREFIX,
    Pages,
    _fits,
    page_bytes,
    picture_bytes,
    within,
)
from vllm_kvcompress.policy import MAX_TYPES, HeadRule, Raster

GRID = Raster(24, 24)
# Janus-Pro-1B and -7B: layers, cache heads, bytes of K and V of a slot in bfloat16.
GEOMETRIES = {"1B": (24, 32, 512), "7B": (30, 64, 512)}


def tried(losses: np.ndarray, slots: np.ndarray, budget: float) -> float:
    """The least sum by trying every assignment."""
    heads, number = losses.shape
    return min(
        sum(losses[h, c] for h, c in enumerate(choice))
        for choice in product(range(number), repeat=heads)
        if slots[list(choice)].sum() <= budget * heads + 1e-9
    )


@bounded
@given(st.data())
def test_the_knapsack_is_exact(data: st.DataObject) -> None:
    heads, number = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 4))
    slots = np.array(data.draw(st.lists(st.integers(3, 40), min_size=number, max_size=number)))
    row = st.lists(st.floats(0, 1), min_size=number, max_size=number)
    losses = np.array([data.draw(row) for _ in range(heads)])
    budget = data.draw(st.floats(float(slots.min()), 45))
    loss, choice = knapsack(losses, slots, budget)
    assert slots[choice].mean() <= budget + 1e-9
    assert loss == pytest.approx(losses[np.arange(heads), choice].sum())
    assert loss == pytest.approx(tried(losses, slots, budget), abs=1e-12)


def curves_of(losses: np.ndarray, slots: list[int]) -> LossCurves:
    rules = tuple(HeadRule(n, 2, 60, recent=n, ring=True) if n < 60 else HeadRule(60, 2, 60) for n in slots)
    return LossCurves(rules, losses)


@bounded
@given(st.data())
def test_the_fit_is_the_best_of_all_sets_of_types(data: st.DataObject) -> None:
    """With ties, curves that rise, candidates of one size, and budgets that a sum of slots meets exactly."""
    number, layers = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 2))
    slots = sorted(data.draw(st.lists(st.integers(2, 60), min_size=number, max_size=number)))
    loss = data.draw(st.sampled_from([st.floats(0, 1), st.integers(0, 2).map(float), st.just(0.0)]))
    row = st.lists(loss, min_size=number, max_size=number)
    losses = np.array([[data.draw(row) for _ in range(2)] for _ in range(layers)])  # of two branches
    types = data.draw(st.integers(1, MAX_TYPES))
    budget = data.draw(st.floats(slots[0], 62) | st.integers(slots[0], 62).map(float))
    curves = curves_of(losses, slots)
    found = fit(curves, budget, types)
    assert 1 <= len(found.rules) <= types
    assert found.mean_slots <= budget + 1e-9
    best = min(
        tried(curves.weighted()[:, chosen], np.array(slots)[list(chosen)], budget)
        for chosen in combinations(range(number), min(types, number))
        if slots[chosen[0]] <= budget
    )
    assert found.loss == pytest.approx(best / (2 * layers), abs=1e-9)
    assert all(found.counts)
    paged = fit(curves, budget, types, Pages(data.draw(st.sampled_from([16, 512])), 8))
    assert paged.mean_slots <= budget + 1e-9
    assert 1 <= len(paged.rules) <= types
    assert all(paged.counts)
    assert paged.loss >= found.loss - 1e-9


def test_pages_cost_a_small_model_no_more_than_they_must() -> None:
    """Against every assignment of eight heads to four candidates, and every page size."""
    rules = tuple(HeadRule(n, 24, 576, 4 * (n > 24), n - 4 * (n > 24), ring=True) for n in (24, 76))
    rules += tuple(HeadRule(n, 24, 576, 4, 24, decay=0.5) for n in (148, 292))
    slots, pages = np.array([rule.capacity for rule in rules]), Pages(256, 8)
    weights, rng = pages.weights(rules), np.random.default_rng(3)
    sizes = {n: np.array(list(product(range(1, 17), repeat=n))) for n in (1, 2, 3)}
    for _ in range(3):
        need, reach = rng.lognormal(0, 2, (2, 4, 1)), rng.uniform(20, 150, (2, 4, 1))
        curves = LossCurves(rules, need * np.exp(-slots / reach))
        found, losses, best = fit(curves, 115, 3, pages), curves.weighted(), np.inf
        fits: dict[tuple[int, ...], bool] = {}
        for choice in map(list, product(range(4), repeat=8)):
            if (loss := losses[range(8), choice].sum()) >= best or slots[choice].sum() > 115 * 8:
                continue
            used, counts = np.unique(choice, return_counts=True)
            if len(used) > 3:
                continue
            key = (*used, *counts)
            if key not in fits:
                fits[key] = any(
                    _fits(counts, slots[used], one, weights[used], 115, 256) for one in sizes[len(used)]
                )
            best = loss if fits[key] else best
        assert found.loss == pytest.approx(best / 8, rel=1e-6)


def made_up(geometry: str, seed: int = 0) -> LossCurves:
    """Losses that fall with the slots, each head in its own way, some better scored and some as rings."""
    layers, heads, _ = GEOMETRIES[geometry]
    candidates, rng = candidate_types(GRID), np.random.default_rng(seed)
    slots = np.array([rule.capacity for rule in candidates])
    need, reach = rng.lognormal(-6, 2, (layers, heads, 1)), rng.uniform(20, 120, (layers, heads, 1))
    kind = np.where([rule.ring for rule in candidates], 1.0, rng.uniform(0.5, 1.6, (layers, heads, 1)))
    losses = need * kind * np.exp(-slots / reach)
    losses[..., [not rule.evicts for rule in candidates]] = 0
    return LossCurves(candidates, losses)


@pytest.mark.parametrize(
    ("geometry", "budget"),
    [*(("1B", budget) for budget in (0.5, 0.2, 1 / 6, 0.1)), ("7B", 0.2), ("7B", 1 / 6)],
)
def test_pages_fit_and_a_picture_holds_little(geometry: str, budget: float) -> None:
    """Rounding, side state and unequal pages included, with a prompt of 20 tokens."""
    curves, slot = made_up(geometry), GEOMETRIES[geometry][2]
    mean = np.floor(budget * GRID.tokens)
    found = fit(curves, mean, pages=Pages(slot, 8))
    assert found.mean_slots <= mean + 1e-9
    assert found.page_tokens is not None
    weights = [slot + 8 * rule.scores for rule in found.rules]
    slots = [rule.capacity for rule in found.rules]
    args = (found.counts, slots, found.page_tokens, weights)
    heads = found.types.size
    ratio = (TYPICAL_PREFIX + GRID.tokens) * heads * slot / picture_bytes(*args, TYPICAL_PREFIX)
    assert ratio >= {0.2: 4.3, 1 / 6: 5.0}.get(budget, 0)
    sizes = [n * t * w for n, t, w in zip(found.counts, found.page_tokens, weights, strict=True)]
    wasted = taken = 0
    for prefix in PREFIXES:
        for size, capacity, tokens in zip(sizes, slots, found.page_tokens, strict=True):
            pages = -(-(prefix + capacity) // tokens)
            wasted, taken = wasted + pages * (max(sizes) - size), taken + pages * max(sizes)
    assert wasted <= MOST_WASTE * taken
    assert page_bytes(found.counts, found.page_tokens, weights) % 64 == 0
    free = fit(curves, mean)
    assert free.loss <= found.loss <= 1.25 * free.loss, "what pages cost"


def test_the_fit_is_deterministic_and_more_types_are_no_worse() -> None:
    curves = made_up("1B", 3)
    losses = [fit(curves, 96, types).loss for types in range(1, MAX_TYPES + 1)]
    assert losses == sorted(losses, reverse=True)
    once, again = (fit(curves, 96, pages=Pages(512, 8)) for _ in range(2))
    assert once.rules == again.rules
    assert np.array_equal(once.types, again.types)


def test_a_large_model_is_fitted_in_bounded_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the budget is rounded few sets are ruled out by their bounds; thousands took hours."""
    curves = made_up("1B", 2)
    exact, tried = fit(curves, 115), []

    def counted(*arguments: Any) -> Any:
        tried.append(arguments)
        return knapsack(*arguments)

    monkeypatch.setattr(heads_fit, "_MOST_STATES", 1500)
    monkeypatch.setattr(heads_fit, "knapsack", counted)
    found = fit(curves, 115)
    assert len(tried) <= 1 + heads_fit._MOST_ROUNDED
    assert found.mean_slots <= 115
    assert exact.loss <= found.loss < 1.25 * exact.loss


def test_a_budget_of_everything_keeps_everything() -> None:
    found = made_up_fit(Raster(8, 8), 1.0, (2, 4))
    assert [rule.evicts for rule in found.rules] == [False]
    assert found.loss == 0


def test_the_conditional_branch_counts_twice() -> None:
    losses = np.tile(np.array([1.0, 0.6, 0.0]), (1, 4, 1))  # four heads, all alike
    found = fit(curves_of(losses, [10, 30, 60]), 35, 2)
    assert SQUARES.branches[0] == 2 * SQUARES.branches[1]
    conditional, unconditional = found.types[0, :2], found.types[0, 2:]
    slots = np.array([rule.capacity for rule in found.rules])
    assert slots[conditional].mean() > slots[unconditional].mean()


@pytest.mark.parametrize("power", [1.0, 0.5])
def test_tied_branches_share_a_type_and_guided_losses_choose_it(power: float) -> None:
    rng, slots = np.random.default_rng(4), [10, 30, 60]
    guided = np.sort(rng.uniform(0, 1, (2, 2, 3)))[..., ::-1]
    curves = curves_of(rng.uniform(0, 1, (2, 4, 3)), slots)
    tied = Weighing(power, tied=True)
    found = fit(LossCurves(curves.candidates, curves.losses, guided), 30, 3, weighing=tied)
    assert np.array_equal(found.types[:, :2], found.types[:, 2:])
    assert found.mean_slots <= 30
    columns = np.array([curves.candidates.index(rule) for rule in found.rules])[found.types]
    best = tried((guided**power).reshape(4, 3), np.array(slots), 30)
    taken = np.take_along_axis(guided**power, columns[:, :2, None], 2).sum()
    assert taken == pytest.approx(best)
    own = np.take_along_axis(curves.losses, columns[..., None], 2)[..., 0]
    assert found.loss == pytest.approx((own * np.repeat(SQUARES.branches, 2)).mean()), "by squares"
    both = curves.weighted(Weighing(power)).reshape(2, 2, 2, 3).sum(1).reshape(4, 3)
    np.testing.assert_allclose(curves.weighted(tied), both, err_msg="where guided ones were not measured")


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("budget", [0.2, 1 / 6])
def test_pages_fit_tied_branches(ranks: int, budget: float) -> None:
    curves, mean = made_up("1B"), np.floor(budget * GRID.tokens)
    found = fit(curves, mean, pages=Pages(512, 8), ranks=ranks, weighing=Weighing(tied=True))
    assert np.array_equal(found.types[:, :16], found.types[:, 16:])
    assert found.mean_slots <= mean + 1e-9
    mine = [found.of_rank(rank, ranks).counts for rank in range(ranks)]
    assert mine == [mine[0]] * ranks
    slots, weights = zip(*((rule.capacity, 512 + 8 * rule.scores) for rule in found.rules), strict=True)
    assert found.page_tokens is not None
    held = picture_bytes(mine[0], slots, found.page_tokens, weights, TYPICAL_PREFIX)
    heads = found.types.size // ranks
    ratio = (TYPICAL_PREFIX + GRID.tokens) * heads * 512 / held
    assert ratio >= {0.2: 4.3, 1 / 6: 5.0}[budget]


def test_the_smallest_budget_within_a_tolerance() -> None:
    curves = made_up("1B", 1)
    curves = LossCurves(curves.candidates, curves.losses[:6])
    pages = Pages(512, 8)
    loose, tight = (smallest_budget(curves, tolerance, pages=pages) for tolerance in (1e-3, 1e-4))
    assert loose.mean_slots < tight.mean_slots
    for found, tolerance in ((loose, 1e-3), (tight, 1e-4)):
        assert found.loss is not None
        assert found.loss <= tolerance
        assert predict(curves, found.mean_slots - 24) > tolerance
    nothing = smallest_budget(curves, 1e-30)
    assert [rule.evicts for rule in nothing.rules] == [False]
    whole = curves.candidates[-1]
    assert not whole.evicts
    with pytest.raises(ValueError, match=r"^budget: auto finds none within tolerance 1e-30; raise it"):
        smallest_budget(LossCurves(curves.candidates[:-1], curves.losses[..., :-1]), 1e-30)


def test_too_small_a_budget_is_one_line() -> None:
    with pytest.raises(
        ValueError, match=r"^budget: 20 slots .* needs 24; set budget to at least 0.0417$"
    ) as caught:
        fit(made_up("1B"), 20)
    assert "\n" not in str(caught.value)


@bounded
@given(st.data())
def test_heads_leave_full_types_at_the_least_cost(data: st.DataObject) -> None:
    heads, kinds = data.draw(st.integers(3, 6)), 3
    row = st.lists(st.floats(0, 1), min_size=kinds, max_size=kinds)
    losses = np.array([data.draw(row) for _ in range(heads)])
    choice = losses.argmin(1)
    most = np.array(data.draw(st.lists(st.integers(1, heads), min_size=kinds, max_size=kinds)))
    found = within(losses, choice, most)
    allowed = [
        c for c in product(range(kinds), repeat=heads) if (np.bincount(c, minlength=kinds) <= most).all()
    ]
    if not allowed:
        assert found is None
        return
    best = min(sum(losses[h, c] for h, c in enumerate(one)) for one in allowed)
    if found is None:  # every type must keep a head, and the cheapest would empty one
        return
    assert (np.bincount(found, minlength=kinds) <= most).all()
    assert losses[np.arange(heads), found].sum() == pytest.approx(best, abs=1e-9)


def test_curves_survive_a_file() -> None:
    curves = made_up("1B")
    again = LossCurves.load(curves.dump())
    assert again.candidates == curves.candidates
    np.testing.assert_allclose(again.losses, curves.losses, rtol=1e-3)
    assert again.guided is None
    both = LossCurves(curves.candidates, curves.losses, curves.losses[:, :16])
    np.testing.assert_allclose(LossCurves.load(both.dump()).guided, both.guided, rtol=1e-3)
    for broken, match in (
        ({"candidates": []}, "no candidates"),
        ({"losses": [[[1.0]]]}, "for .* candidates"),
        ({"line": None}, "curves: "),
        ({"guided": [[[1.0]]]}, r"guided losses .1, 1, 1.; need .24, 16, 22."),
        ({"guided": "x"}, "a loss is no number"),
    ):
        with pytest.raises((ValueError, TypeError), match=match):
            LossCurves.load(curves.dump() | broken)
    with pytest.raises(ValueError, match="negative or not a number"):
        LossCurves(curves.candidates, -1 - curves.losses)
    with pytest.raises(ValueError, match="negative or not a number"):
        LossCurves(curves.candidates, curves.losses, np.full_like(curves.losses[:, :16], np.nan))


@pytest.mark.parametrize(
    "raster", [Raster(1, 1), Raster(3, 7), Raster(8, 8), Raster(16, 16), GRID, Raster(64, 65)]
)
def test_candidates_exist_on_any_grid(raster: Raster) -> None:
    found = candidate_types(raster)
    assert len(set(found)) == len(found)
    assert min(rule.capacity for rule in found) <= max(raster.width, 1)
    assert not found[-1].evicts
    assert isinstance(made_up_fit(raster, max(0.9, 1 / raster.lines), (2, 4)), Assignment)
