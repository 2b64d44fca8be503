"""The page constraint on a fit: changes of type that make all types' pages fit one pool.

All types draw pages of one size, so a type with n heads and t tokens a page leaves unused what n * t falls
short of the page, and a request's last page of each type what its tokens fall short of it. Page sizes around
those that the fitted counts suggest are tried; for each, heads leave the types that have too many by the
cheapest chain of changes, and capacities grow to the end of their last page, which costs nothing.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product

import numpy as np
from numpy.typing import NDArray

from vllm_kvcompress.policy import HeadRule

MOST_WASTE = 0.03  # lost to unequal pages, of an average request's bytes
MOST_OVERHEAD = 0.022  # beside K and V of the budget, for a typical prompt: waste, rounding and side state
MOST_BESIDE_SIDE = 0.008  # of it, where small heads' side state alone is more
MOST_ROUNDING = 0.025  # more than that on average over prompts
TYPICAL_PREFIX = 20  # tokens of a short prompt
ALIGNMENT = 64  # bytes; a cache line
PREFIXES = np.arange(8, 72)  # prompt lengths over which rounding is averaged
_NEAR = (0.0, -0.01, 0.01, -0.02, 0.02, -0.035, 0.035)
_TRIED = 40  # page sizes for which heads are moved
MOST_TOKENS = 16

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Pages:
    """Bytes of a slot: K and V, and the side state that scored heads have beside them."""

    slot: int
    side: int

    @property
    def of_both_branches(self) -> "Pages":
        """Of two heads' slots, where the branches' heads of a KV head get one type."""
        return Pages(2 * self.slot, 2 * self.side)

    def weights(self, rules: Sequence[HeadRule]) -> Ints:
        """``[types]`` bytes of a slot of one head."""
        return np.array([self.slot + (self.side if rule.scores else 0) for rule in rules], np.int64)


@dataclass(frozen=True, eq=False)
class Paged:
    """An assignment whose pages fit: ``choice [heads]``, the types' rules, tokens a page, the losses' sum."""

    choice: Ints
    rules: tuple[HeadRule, ...]
    tokens: tuple[int, ...]
    loss: float


def picture_bytes(
    counts: Sequence[int], slots: Sequence[int], tokens: Sequence[int], weights: Sequence[int], prefix: int
) -> int:
    """KV bytes of the pages of one picture, rounding and side state included.

    Parameters
    ----------
    counts, slots, tokens, weights : sequence of int
        Of each head type: heads, image slots of each, tokens a page, bytes of a slot of one head.
    prefix : int
        Prompt tokens.
    """
    pages = sum(-(-(prefix + capacity) // t) for capacity, t in zip(slots, tokens, strict=True))
    return pages * page_bytes(counts, tokens, weights)


def page_bytes(counts: Sequence[int], tokens: Sequence[int], weights: Sequence[int]) -> int:
    """Bytes of a page of any type: those of the largest, whole cache lines."""
    need = max(n * t * weight for n, t, weight in zip(counts, tokens, weights, strict=True))
    return -(-need // ALIGNMENT) * ALIGNMENT


def to_pages(
    losses: Floats, choice: Ints, rules: Sequence[HeadRule], budget: float, pages: Pages
) -> Paged | None:
    """The cheapest assignment near ``choice`` whose pages fit; None where none within reach does.

    Parameters
    ----------
    losses : array
        ``[heads, types]``.
    choice : array
        ``[heads]``: the types that the heads would have; every type has one.
    rules : sequence of HeadRule
        Of the types.
    budget : float
        Image slots per head, mean over the heads, which the result keeps to as well.
    """
    heads, weights = len(choice), pages.weights(rules)
    counts = np.bincount(choice, minlength=len(rules))
    slots = np.array([rule.capacity for rule in rules])
    best: Paged | None = None
    for tokens, most in _page_sizes(counts, slots, weights):
        moved = within(losses, choice, most)
        if moved is None:
            continue
        now = np.bincount(moved, minlength=len(rules))
        full = tokens * -(-(TYPICAL_PREFIX + slots) // tokens) - TYPICAL_PREFIX
        grown = np.minimum(full, rules[0].image)
        if now @ grown > budget * heads + 1e-9:
            grown = slots
        if now @ grown > budget * heads + 1e-9 or not _fits(now, grown, tokens, weights, budget, pages.slot):
            continue
        loss = float(losses[np.arange(heads), moved].sum())
        if best is None or loss < best.loss:
            longer = tuple(_grown(rule, int(n)) for rule, n in zip(rules, grown, strict=True))
            best = Paged(moved, longer, tuple(int(t) for t in tokens), loss)
    return best


def _grown(rule: HeadRule, slots: int) -> HeadRule:
    more = slots - rule.capacity
    return (
        replace(rule, capacity=slots, recent=rule.recent + more)
        if rule.ring
        else replace(rule, capacity=slots)
    )


def _page_sizes(counts: Ints, slots: Ints, weights: Ints) -> Iterator[tuple[Ints, Ints]]:
    """(tokens a page, most heads) of each type, for page sizes near the counts'; fewest moves first."""
    size = counts * weights
    found: dict[tuple[bytes, bytes], tuple[float, Ints, Ints]] = {}
    for first, tokens, off in product(range(len(size)), range(1, MOST_TOKENS + 1), _NEAR):
        page = size[first] * tokens * (1 + off)
        options = [_tokens(page, n) for n in size]
        t = np.array(list(product(*options)))  # [choices, types]
        most = (page // (t * weights)).astype(np.int64)
        enough = (most.sum(1) >= counts.sum()) & (most >= 1).all(1)
        t, most = t[enough], most[enough]
        excess = np.maximum(counts - most, 0).sum(1) / counts.sum()
        taken = (-(-(TYPICAL_PREFIX + slots) // t)).sum(1) * page
        # A head moved is worth about a tenth of what memory lost would be.
        cost = excess * 0.1 + taken / float(size @ (TYPICAL_PREFIX + slots))
        for each, one, some in zip(cost.tolist(), t, most, strict=True):
            found.setdefault((one.tobytes(), some.tobytes()), (each, one, some))
    yield from ((t, most) for _, t, most in sorted(found.values(), key=lambda one: one[0])[:_TRIED])


def _tokens(page: float, size: int) -> list[int]:
    """Whole tokens of a type in a page, and one more where few heads would have to leave for it."""
    whole = int(page // size)
    more = [whole + 1] if (whole + 1) * size <= 1.08 * page else []
    return [t for t in (whole, *more) if t > 0] or [1]


def _fits(counts: Ints, slots: Ints, tokens: Ints, weights: Ints, budget: float, slot: int) -> bool:
    """Whether waste and rounding are within their limits."""
    heads, size = counts.sum(), counts * tokens * weights
    page = size.max()

    def taken(prefix: Ints) -> Ints:
        return -(-(prefix[:, None] + slots) // tokens)

    average = taken(PREFIXES).mean(0)
    wasted = (average * (page - size)).sum() / (average * page).sum()
    typical = taken(np.array([TYPICAL_PREFIX])).sum() * page
    whole = heads * (TYPICAL_PREFIX + budget) * slot
    side = (counts * (TYPICAL_PREFIX + slots) * (weights - slot)).sum() / whole
    most = 1 + max(MOST_OVERHEAD, side + MOST_BESIDE_SIDE)
    if len(counts) == 1:  # nothing is wasted, and rounding is what whole pages cost any layout
        return bool(typical <= (1 + 2 * MOST_OVERHEAD + side) * whole)
    return bool(
        wasted <= MOST_WASTE
        and typical <= most * whole
        and (average * page).sum() <= (most + MOST_ROUNDING) * heads * (PREFIXES.mean() + budget) * slot
    )


def within(losses: Floats, choice: Ints, most: Ints) -> Ints | None:
    """The least costly assignment near ``choice`` with at most ``most`` heads of each type.

    Successive shortest paths over the types: one head at a time leaves a type that has too many, by the chain
    of changes that costs least (a step's cost is that of its cheapest head), for a type that has room.
    """
    choice, kinds = choice.copy(), len(most)
    counts = np.bincount(choice, minlength=kinds)
    while (counts > most).any():
        step = np.full((kinds, kinds), np.inf)
        who = np.zeros((kinds, kinds), np.int64)
        for kind in range(kinds):
            mine = np.flatnonzero(choice == kind)
            if len(mine):
                change = losses[mine] - losses[mine, kind][:, None]
                who[kind] = mine[change.argmin(0)]
                step[kind] = change.min(0)
        path = _cheapest(step, counts > most, counts < most)
        if path is None:
            return None
        for out, into in reversed(list(pairwise(path))):
            choice[who[out, into]] = into
        counts = np.bincount(choice, minlength=kinds)
    return choice if (counts > 0).all() else None


def _cheapest(step: Floats, sources: NDArray[np.bool_], targets: NDArray[np.bool_]) -> list[int] | None:
    """Types along the cheapest path from a source to a target (Bellman and Ford); None without one."""
    kinds = len(step)
    cost = np.where(sources, 0.0, np.inf)
    before = np.full(kinds, -1)
    for _ in range(kinds - 1):
        through = cost[:, None] + step
        better = through.min(0) < cost - 1e-15
        before[better] = through.argmin(0)[better]
        cost = np.minimum(cost, through.min(0))
    ends = np.flatnonzero(targets & np.isfinite(cost))
    if not len(ends):
        return None
    path = [int(ends[cost[ends].argmin()])]
    while not sources[path[-1]] and len(path) <= kinds:
        path.append(int(before[path[-1]]))
    return path[::-1] if sources[path[-1]] else None
