"""Which head type each head gets: by a locality threshold (two types), or fitted to measured losses.

The fit is a multiple-choice knapsack: one type per cache head, of at most a given number of types, so that
the sum of losses is least and the mean of slots stays within the budget. For a given set of types a dynamic
programme solves it exactly; sets are ruled out by their Lagrangian bound. The page constraint (all types
draw pages of one size from one pool) is met afterwards by the cheapest changes of type.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from vllm_kvcompress.heads.curves import SQUARES, LossCurves, Weighing
from vllm_kvcompress.heads.paged import Paged, Pages, to_pages
from vllm_kvcompress.heads.ranks import grouped, least_of_each, own_heads, rank_of_heads, resettled
from vllm_kvcompress.heads.sets import Sets
from vllm_kvcompress.policy import MAX_TYPES, HeadRule, Policy, Raster

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
SplitPages = Callable[[int, int, Callable[[int, int], tuple[int, int]]], tuple[tuple[int, int], int]]
_LESS = (0.0, 0.003, 0.006, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06)  # of the budget, to make room for pages
_MOST_STATES = 60_000  # of the dynamic programme; finer budgets are rounded
_MOST_ROUNDED = 16  # sets of types that are fitted so: bounds rule few out then, and each takes a second


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
    divergence : float, optional
        Guided, nats per token, where it was tried on pictures.
    """

    rules: tuple[HeadRule, ...]
    types: Ints
    loss: float | None = None
    page_tokens: tuple[int, ...] | None = None
    moved: int = 0
    divergence: float | None = None

    @property
    def counts(self) -> list[int]:
        """Cache heads of each type."""
        return np.bincount(self.types.ravel(), minlength=len(self.rules)).tolist()

    @property
    def mean_slots(self) -> float:
        """Image slots per head, mean over the heads."""
        return float(np.dot(self.counts, [rule.capacity for rule in self.rules]) / self.types.size)

    def same_as(self, other: "Assignment") -> bool:
        """Whether the heads get the same rules on the same pages."""
        return (
            self.rules == other.rules
            and self.page_tokens == other.page_tokens
            and np.array_equal(self.types, other.types)
        )

    def of_rank(self, rank: int, ranks: int) -> "Assignment":
        """Its own heads of one made for ``ranks`` ranks; every rank has as many of each type."""
        return replace(self, types=own_heads(self.types, rank, ranks))


def by_threshold(
    policy: Policy,
    raster: Raster,
    spatial: NDArray[np.bool_],
    margin: Floats,
    pages: SplitPages,
    ranks: int = 1,
) -> Assignment:
    """The papers' two types from a locality threshold; both branches of a head have one type.

    Parameters
    ----------
    policy : Policy
    raster : Raster
    spatial : array
        ``[layers, kv_heads]`` bool.
    margin : array
        ``[layers, kv_heads]``: score less threshold; the nearest to the threshold change type first where
        the pages do not fit.
    pages : callable
        (spatial heads, semantic heads, capacities) -> (heads of each after moving, heads moved), as
        `vllm_kvcompress.cache.plan.split_pages`.
    ranks : int
        Of tensor parallelism: each gets its share of the spatial heads, those of least margin among its own.
    """
    branches = 2

    def capacities(ring: int, scored: int) -> tuple[int, int]:
        rules = policy.rules(raster, ring, scored)
        return tuple(rule.capacity if rule else 0 for rule in rules)  # type: ignore[return-value]

    total, mine = int(spatial.sum()), spatial.size // ranks
    share = round(total / ranks)
    if 0 < total < spatial.size:  # a type that there is stays, where a rank has heads for both
        share = min(max(share, 1), max(1, mine - 1))
    heads, moved = pages(branches * share, branches * (mine - share), capacities)
    if ranks > 1 or moved:
        # Those that are spatial already come before those that are not, whatever the margins say.
        spatial = least_of_each(np.where(spatial, margin, margin + 4), heads[0] // branches, ranks)
    ring, scored = policy.rules(raster, *heads)
    rules = tuple(rule for rule in (ring, scored) if rule is not None)
    kinds = np.where(spatial, 0, len(rules) - 1)
    return Assignment(rules, np.concatenate([kinds, kinds], 1), moved=ranks * moved // branches)


def fit(
    curves: LossCurves,
    budget: float,
    types: int = MAX_TYPES,
    pages: Pages | None = None,
    ranks: int = 1,
    weighing: Weighing = SQUARES,
) -> Assignment:
    """The assignment of least loss by a weighing; its ``loss`` is by `SQUARES`.

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
    ranks : int
        Of tensor parallelism: each gets as many heads of every type, and the pages fit one rank's.
    weighing : Weighing
        How losses are added up.

    Raises
    ------
    ValueError
        One line: no candidate is small enough for the budget.
    """
    slots, losses = curves.slots, curves.weighted(weighing)
    if slots.min() > budget:
        share = np.ceil(slots.min() / curves.candidates[0].image * 1e4) / 1e4
        raise ValueError(
            f"budget: {budget:g} slots per head, the smallest head type needs {slots.min()}; set budget to "
            f"at least {share:g}"
        )
    groups = np.arange(len(losses))[:, None]
    if weighing.tied and pages is not None:
        pages = pages.of_both_branches
    if ranks > 1:
        _, price = Sets(losses, slots, budget, len(slots)).bound(range(len(slots)))
        layers, heads, _ = curves.losses.shape
        rank = rank_of_heads(layers, heads, ranks)
        if weighing.tied:
            rank = rank.reshape(layers, 2, -1)[:, 0].ravel()
        groups = grouped(losses, slots, price, rank)
    together = losses[groups].sum(1)
    for number in range(min(types, len(slots)), 0, -1):
        chosen, choice = _best_set(together, slots, budget, number)
        found = _paged(curves.candidates, together, chosen, choice, budget, pages)
        if found is not None:
            return _assignment(curves, groups, losses, *found)
    raise AssertionError("pages of a single type always fit")


def _best_set(losses: Floats, slots: Ints, budget: float, types: int) -> tuple[Ints, Ints]:
    """The best set of that many candidates, and each head's place in it."""
    search = Sets(losses, slots, budget, types)
    chosen = search.climb()
    search.best, choice = knapsack(losses[:, chosen], slots[chosen], budget)
    rounded = 0
    for other in search.better(chosen):
        loss, found = knapsack(losses[:, other], slots[other], budget)
        if loss < search.best:
            search.best, choice, chosen = loss, found, other
        _, unit, exact = _units(slots[other], len(losses), budget)
        rounded += unit > exact
        if rounded == _MOST_ROUNDED:
            break
    return np.array(chosen), choice


def predict(curves: LossCurves, budget: float, types: int = MAX_TYPES) -> float:
    """The loss that a fit of a budget comes to, by a good set of types, without pages: quick."""
    slots, losses = curves.slots, curves.weighted()
    if slots.min() > budget:
        return np.inf
    chosen = Sets(losses, slots, budget, min(types, len(slots))).climb()
    return knapsack(losses[:, chosen], slots[chosen], budget)[0] / len(losses)


def smallest_budget(
    curves: LossCurves, tolerance: float, types: int = MAX_TYPES, pages: Pages | None = None, ranks: int = 1
) -> Assignment:
    """The fit of the smallest budget, in quarters of a line, whose predicted loss is within ``tolerance``.

    Raises ValueError, one line, where none is.
    """
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
    found = fit(curves, budgets[high], types, pages, ranks)
    while found.loss is not None and found.loss > tolerance:  # what pages cost comes on top
        high += 1
        if high == len(budgets):  # curves without the candidate that keeps all
            raise ValueError(
                f"budget: auto finds none within tolerance {tolerance:g}; raise it, or name a budget"
            )
        found = fit(curves, budgets[high], types, pages, ranks)
    return found


def _assignment(curves: LossCurves, groups: Ints, losses: Floats, columns: Ints, found: Paged) -> Assignment:
    """Types of all heads from those of ``groups [groups, ranks]``; ``columns``: the types' candidates."""
    settled = found.choice if groups.shape[1] == 1 else resettled(losses[:, columns], found.choice, groups)
    layers, heads, _ = curves.losses.shape
    types = settled.reshape(layers, -1)
    types = np.tile(types, heads // types.shape[1])  # tied: those of one branch, which are the other's too
    loss = float(curves.weighted()[np.arange(layers * heads), columns[types.ravel()]].mean())
    return Assignment(found.rules, types, loss, page_tokens=found.tokens or None)


def _paged(
    candidates: Sequence[HeadRule], losses: Floats, chosen: Ints, choice: Ints, budget: float,
    pages: Pages | None,
) -> tuple[Ints, Paged] | None:  # fmt: skip
    """(candidates of the types, the assignment): the nearest whose pages fit; None where none does.

    It is of this budget or a little less. Types are in the candidates' order.
    """
    slots = np.array([rule.capacity for rule in candidates])[chosen]
    for less in _LESS:
        if less:
            smaller = budget * (1 - less)
            if slots.min() > smaller:
                continue
            _, choice = knapsack(losses[:, chosen], slots, smaller)
        used = np.unique(choice)
        columns = chosen[used]
        rules = tuple(candidates[n] for n in columns)
        places = np.searchsorted(used, choice)
        if pages is None:
            return columns, Paged(places, rules, (), 0.0)
        found = to_pages(losses[:, columns], places, rules, budget, pages)
        if found is not None:
            return columns, found
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
    extra = slots - slots.min()
    room, unit, _ = _units(slots, heads, budget)
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


def _units(slots: Ints, heads: int, budget: float) -> tuple[int, int, int]:
    """(slots beyond all heads' smallest type, what the dynamic programme counts them in, what is exact)."""
    smallest = int(slots.min())
    room = int(np.floor(budget * heads + 1e-9)) - smallest * heads
    unit = exact = int(np.gcd.reduce(slots - smallest)) or 1
    while room // unit > _MOST_STATES:
        unit *= 2
    return room, unit, exact
