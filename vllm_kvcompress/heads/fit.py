"""Which head type each head gets: by a locality threshold (two types), or fitted to measured losses.

The fit is a multiple-choice knapsack: one type per cache head, of at most a given number of types, so that
the sum of losses is least and the mean of slots stays within the budget. For a given set of types a dynamic
programme solves it exactly; sets are ruled out by their Lagrangian bound. The page constraint (all types
draw pages of one size from one pool) is met afterwards by the cheapest changes of type.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product

import numpy as np
from numpy.typing import NDArray

from vllm_kvcompress.heads.curves import LossCurves
from vllm_kvcompress.heads.paged import Pages, to_pages
from vllm_kvcompress.policy import MAX_TYPES, HeadRule, Policy, Raster

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
SplitPages = Callable[[int, int, Callable[[int, int], tuple[int, int]]], tuple[tuple[int, int], int]]
_LESS = (0.0, 0.003, 0.006, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06)  # of the budget, to make room for pages
_MOST_NODES = 50_000  # of the search among sets of types
_MOST_STATES = 60_000  # of the dynamic programme; finer budgets are rounded


@dataclass(frozen=True, eq=False)
class Assignment:
    """A head type for every cache head.

    Parameters
    ----------
    rules : tuple of HeadRule
        The types; each has a head.
    types : array
        ``[layers, 2 * kv_heads]`` int: index into ``rules``.
    loss : float, optional
        Predicted: mean over heads of the fitted losses, weighted by branch.
    page_tokens : tuple of int, optional
        Tokens a page of each type, where the fit has settled them.
    moved : int
        Heads of the papers' types that changed type to make the pages fit: positive to semantic.
    """

    rules: tuple[HeadRule, ...]
    types: Ints
    loss: float | None = None
    page_tokens: tuple[int, ...] | None = None
    moved: int = 0

    @property
    def counts(self) -> list[int]:
        """Cache heads of each type."""
        return np.bincount(self.types.ravel(), minlength=len(self.rules)).tolist()

    @property
    def mean_slots(self) -> float:
        """Image slots per head, mean over the heads."""
        return float(np.dot(self.counts, [rule.capacity for rule in self.rules]) / self.types.size)


def by_threshold(
    policy: Policy, raster: Raster, spatial: NDArray[np.bool_], margin: Floats, pages: SplitPages
) -> Assignment:
    """The papers' two types from a locality threshold; both branches of a head have one type.

    Parameters
    ----------
    policy : Policy
    raster : Raster
    spatial : array
        ``[layers, kv_heads]`` bool.
    margin : array
        ``[layers, kv_heads]``: how far a head is from the threshold; the nearest change type first where
        the pages do not fit.
    pages : callable
        (spatial heads, semantic heads, capacities) -> (heads of each after moving, heads moved), as
        `vllm_kvcompress.cache.plan.split_pages`.
    """
    branches = 2
    spatial = spatial.copy()

    def capacities(ring: int, scored: int) -> tuple[int, int]:
        rules = policy.rules(raster, ring, scored)
        return tuple(rule.capacity if rule else 0 for rule in rules)  # type: ignore[return-value]

    number = branches * int(spatial.sum())
    heads, moved = pages(number, branches * spatial.size - number, capacities)
    change = abs(moved) // branches
    candidates = np.flatnonzero(spatial.ravel() if moved > 0 else ~spatial.ravel())
    nearest = candidates[np.argsort(np.abs(margin.ravel()[candidates]), kind="stable")][:change]
    spatial.ravel()[nearest] = moved < 0
    ring, scored = policy.rules(raster, *heads)
    rules = tuple(rule for rule in (ring, scored) if rule is not None)
    kinds = np.where(spatial, 0, len(rules) - 1)
    return Assignment(rules, np.concatenate([kinds, kinds], 1), moved=moved // branches)


def fit(curves: LossCurves, budget: float, types: int = MAX_TYPES, pages: Pages | None = None) -> Assignment:
    """The assignment of least predicted loss.

    Parameters
    ----------
    curves : LossCurves
    budget : float
        Image slots per head, mean over the heads.
    types : int
        At most that many head types.
    pages : Pages, optional
        Bytes of a slot: the counts are then such that pages of one size fit all types. A fit for a slightly
        smaller budget makes room for what pages waste; a model of few heads may end with fewer types.

    Raises
    ------
    ValueError
        One line: no candidate is small enough for the budget.
    """
    slots, losses = curves.slots, curves.weighted
    if slots.min() > budget:
        share = np.ceil(slots.min() / curves.candidates[0].image * 1e4) / 1e4
        raise ValueError(
            f"budget: {budget:g} slots per head, the smallest head type needs {slots.min()}; set budget to "
            f"at least {share:g}"
        )
    for number in range(min(types, len(slots)), 0, -1):
        chosen, choice = _best_set(losses, slots, budget, number)
        if pages is None:
            return _assignment(curves, chosen[choice])
        found = _paged(curves, chosen, choice, budget, pages)
        if found is not None:
            return found
    raise AssertionError("pages of a single type always fit")


def _best_set(losses: Floats, slots: Ints, budget: float, types: int) -> tuple[Ints, Ints]:
    """The best set of that many candidates, and each head's place in it."""
    search = Sets(losses, slots, budget, types)
    chosen = search.climb()
    search.best, choice = knapsack(losses[:, chosen], slots[chosen], budget)
    for other in search.better(chosen):
        loss, found = knapsack(losses[:, other], slots[other], budget)
        if loss < search.best:
            search.best, choice, chosen = loss, found, other
    return np.array(chosen), choice


def predict(curves: LossCurves, budget: float, types: int = MAX_TYPES) -> float:
    """The loss that a fit of a budget comes to, by a good set of types, without pages: quick."""
    slots, losses = curves.slots, curves.weighted
    if slots.min() > budget:
        return np.inf
    chosen = Sets(losses, slots, budget, min(types, len(slots))).climb()
    return knapsack(losses[:, chosen], slots[chosen], budget)[0] / len(losses)


def smallest_budget(
    curves: LossCurves, tolerance: float, types: int = MAX_TYPES, pages: Pages | None = None
) -> Assignment:
    """The fit of the smallest budget, in quarters of a line, whose predicted loss is within ``tolerance``."""
    first = curves.candidates[0]
    step = max(1, first.line // 4)
    budgets = [*range(int(curves.slots.min()), first.image, step), first.image]
    low, high = 0, len(budgets) - 1  # the last loses nothing
    while low < high:
        middle = (low + high) // 2
        if predict(curves, budgets[middle], types) <= tolerance:
            high = middle
        else:
            low = middle + 1
    found = fit(curves, budgets[high], types, pages)
    while found.loss is not None and found.loss > tolerance:  # what pages cost comes on top
        high += 1
        found = fit(curves, budgets[high], types, pages)
    return found


def _assignment(curves: LossCurves, choice: Ints) -> Assignment:
    """From a candidate for every head, ``[layers * 2 * kv_heads]``; types in the candidates' order."""
    used = np.unique(choice)
    layers, heads, _ = curves.losses.shape
    types = np.searchsorted(used, choice).reshape(layers, heads)
    loss = float(curves.weighted[np.arange(len(choice)), choice].mean())
    return Assignment(tuple(curves.candidates[n] for n in used), types, loss)


def _paged(curves: LossCurves, chosen: Ints, choice: Ints, budget: float, pages: Pages) -> Assignment | None:
    """The nearest assignment whose pages fit, of this budget or a little less; None where none does."""
    losses, layers_heads = curves.weighted, curves.losses.shape[:2]
    for less in _LESS:
        if less:
            smaller = budget * (1 - less)
            if curves.slots[chosen].min() > smaller:
                continue
            _, choice = knapsack(losses[:, chosen], curves.slots[chosen], smaller)
        used = np.unique(choice)
        columns = chosen[used]
        rules = [curves.candidates[n] for n in columns]
        found = to_pages(losses[:, columns], np.searchsorted(used, choice), rules, budget, pages)
        if found is not None:
            types = found.choice.reshape(layers_heads)
            return Assignment(found.rules, types, found.loss / len(losses), page_tokens=found.tokens)
    return None


def knapsack(losses: Floats, slots: Ints, budget: float) -> tuple[float, Ints]:
    """One column per row so that the sum of losses is least and the mean of slots within the budget.

    Parameters
    ----------
    losses : array
        ``[heads, types]``.
    slots : array
        ``[types]``; the smallest is within the budget.

    Returns
    -------
    (float, array)
        The sum, and ``[heads]`` columns. Exact while the budget has at most 60,000 units of the slots'
        common divisor; beyond that slots are rounded up to coarser units.
    """
    heads = len(losses)
    smallest = int(slots.min())
    extra = slots - smallest
    room = int(np.floor(budget * heads + 1e-9)) - smallest * heads
    unit = int(np.gcd.reduce(extra)) or 1
    while room // unit > _MOST_STATES:
        unit *= 2
    cost, states = -(-extra // unit), room // unit + 1
    best = np.zeros(states)
    chosen = np.zeros((heads, states), np.uint8)
    for head in range(heads):
        now = np.full(states, np.inf)
        for column, price in enumerate(cost):
            if price < states:
                option, least = best[: states - price] + losses[head, column], now[price:]
                np.copyto(chosen[head, price:], column, where=option < least)  # ties: the first column
                np.minimum(option, least, out=least)
        best = now
    state = int(best.argmin())
    choice = np.empty(heads, np.int64)
    for head in reversed(range(heads)):
        choice[head] = chosen[head, state]
        state -= cost[choice[head]]
    return float(losses[np.arange(heads), choice].sum()), choice


class Sets:
    """Sets of candidate types, compared by their Lagrangian bound.

    At any price of a slot, the sum over heads of the least (loss + price * slots), less what the budget is
    worth, is no more than what any assignment within the set loses; the best price gives the bound.
    """

    def __init__(self, losses: Floats, slots: Ints, budget: float, size: int) -> None:
        self.losses, self.slots, self.size = losses, slots, size
        self.total = budget * len(losses)
        self.budget = budget
        self.best = np.inf  # what is reached already

    def bound(self, chosen: Sequence[int], tolerance: float = 1e-3) -> tuple[float, float]:
        """(bound, price): the dual function is concave, so a search by thirds finds its top."""
        losses, slots = self.losses[:, chosen], self.slots[list(chosen)]

        def value(log_price: float) -> float:
            price = np.exp(log_price)
            return float((losses + price * slots).min(1).sum() - price * self.total)

        low, high = self._log_prices
        while high - low > tolerance:
            one, two = low + (high - low) / 3, high - (high - low) / 3
            if value(one) < value(two):
                low = one
            else:
                high = two
        top = (low + high) / 2
        return max(value(top), float(losses.min(1).sum())), float(np.exp(top))

    @property
    def _goal(self) -> float:
        return self.best * (1 - 1e-9)

    @cached_property
    def _log_prices(self) -> tuple[float, float]:
        """Logarithms of prices below and above which nothing changes."""
        gain = float(np.ptp(self.losses)) or 1.0
        return np.log(gain) - 30.0, np.log(gain) + 1.0

    def climb(self) -> list[int]:
        """A good set: from evenly spread candidates, exchanged one at a time while the bound falls."""
        number = len(self.slots)
        chosen = sorted({round(n) for n in np.linspace(0, number - 1, self.size)})
        smallest = int(self.slots.argmin())
        if self.slots[chosen].min() > self.budget:
            chosen[0] = smallest
        best, _ = self.bound(chosen, 0.05)
        while True:
            options = []
            for out, into in product(chosen, set(range(number)) - set(chosen)):
                other = sorted({*chosen, into} - {out})
                if self.slots[other].min() <= self.budget:
                    options.append((self.bound(other, 0.05)[0], other))
            if not options or min(options)[0] >= best:
                return chosen
            best, chosen = min(options)

    def better(self, near: Sequence[int]) -> Iterator[list[int]]:
        """Every set whose bound is below ``best``, which may fall while this goes on: branch and bound.

        Bounds are taken at prices around the best one of the set ``near``.

        It ends early, the set found so far being nearly as good as any, after `_MOST_NODES` steps.
        """
        steps = 0
        number = len(self.slots)
        _, price = self.bound(near)
        prices = price * np.array([0.6, 0.8, 1.0, 1.25, 1.6])
        priced = self.losses + prices[:, None, None] * self.slots  # [prices, heads, candidates]
        worth = prices * self.total
        rest = np.minimum.accumulate(priced[..., ::-1], -1)[..., ::-1]  # of this candidate and those after

        def grow(chosen: list[int], least: Floats) -> Iterator[list[int]]:
            nonlocal steps
            start, missing = (chosen[-1] + 1 if chosen else 0), self.size - len(chosen)
            for n in range(start, number - missing + 1):
                steps += 1
                if steps > _MOST_NODES:
                    return
                if (np.minimum(least, rest[..., n]).sum(1) - worth).max() >= self._goal:
                    return  # nothing from here on is better, nor is less of it
                one, now = [*chosen, n], np.minimum(least, priced[..., n])
                if missing > 1:
                    yield from grow(one, now)
                elif (
                    self.slots[one].min() <= self.budget
                    and (now.sum(1) - worth).max() < self._goal > (self.bound(one)[0])
                ):
                    yield one

        yield from grow([], np.full(priced.shape[:2], np.inf))
