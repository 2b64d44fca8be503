"""How many tokens a page holds, for each head type. Pure arithmetic, no vLLM, no torch.

All head types draw their pages from one pool, so a page of any costs the largest one's bytes. A page
holds all heads of its type over all layers (and both branches); the waste disappears when heads times
tokens times bytes is equal for all types, which few head counts allow exactly. `plan_pages` picks tokens
per page with little waste; where none will do, whoever chose the counts has to choose others:
`plan_two` moves the least decided heads of a head profile, `vllm_kvcompress.heads.fit` the cheapest ones.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from math import ceil

from vllm_kvcompress.heads.paged import MOST_TOKENS, PREFIXES
from vllm_kvcompress.heads.paged import MOST_WASTE as MAX_WASTE

Capacities = Callable[[int, int], tuple[int, int]]
# Few tokens a page round a request up by little; many make fewer, longer runs of memory for the
# kernels. 4 rows of K and V are 2 KiB at head size 128 in bfloat16.
_MIN_RUN = 4


@dataclass(frozen=True)
class Paging:
    """Tokens per page of each head type, and what that costs.

    Parameters
    ----------
    tokens : tuple of int
        Tokens that a page of each type holds.
    waste : float
        Fraction of an average request's bytes that unequal pages lose.
    """

    tokens: tuple[int, ...]
    waste: float


@dataclass(frozen=True)
class Split:
    """Two head types after heads were moved so that their pages fit.

    Parameters
    ----------
    heads : (int, int)
        Spatial and semantic heads over all layers and branches.
    moved : int
        Heads that changed type: positive to semantic, negative to spatial.
    paging : Paging
        Of the types that have heads.
    """

    heads: tuple[int, int]
    moved: int
    paging: Paging


def plan_pages(
    heads: Sequence[int], slots: Sequence[int], weights: Sequence[int] | None = None
) -> Paging | None:
    """Tokens per page that cost an average request least, with at most 3% of waste.

    Parameters
    ----------
    heads, slots : sequence of int
        Of each head type: its heads (at least one), and image slots of each.
    weights : sequence of int, optional
        Bytes of a slot of one head of each type; equal if left out.

    Returns
    -------
    Paging or None
        None where no choice within reach wastes 3% or less.
    """
    weights = weights or [1] * len(heads)
    size = [n * weight for n, weight in zip(heads, weights, strict=True)]
    best: tuple[float, Paging] | None = None
    for tokens in _choices(size):
        paging = priced(heads, slots, tokens, weights)
        page = max(n * t for n, t in zip(size, tokens, strict=True))
        allocated = page * sum(_pages(capacity, t) for capacity, t in zip(slots, tokens, strict=True))
        cost = allocated * (1.0 + 0.01 * max(0, _MIN_RUN - min(tokens)))
        if paging.waste <= MAX_WASTE and (best is None or cost < best[0]):
            best = cost, paging
    return best and best[1]


def priced(
    heads: Sequence[int], slots: Sequence[int], tokens: Sequence[int], weights: Sequence[int]
) -> Paging:
    """What tokens per page cost; arguments as in `plan_pages`."""
    size = [n * t * weight for n, t, weight in zip(heads, tokens, weights, strict=True)]
    pages = [_pages(capacity, t) for capacity, t in zip(slots, tokens, strict=True)]
    wasted = sum(n * (max(size) - mine) for n, mine in zip(pages, size, strict=True))
    return Paging(tuple(tokens), wasted / (sum(pages) * max(size)))


def plan_two(spatial: int, semantic: int, capacities: Capacities, step: int = 1) -> Split:
    """Pages of the papers' two head types, with heads moved between them where that must be.

    Parameters
    ----------
    spatial, semantic : int
        Heads of each type.
    capacities : callable
        (spatial heads, semantic heads) -> image slots of a head of each type: where heads move, the others
        share the budget anew. 0 for a type without heads; ValueError for a split that can't work.
    step : int
        Heads move in multiples of this (the branches of a KV head move together).

    Raises
    ------
    ValueError
        If no split within reach allows 3%; the message has the numbers.
    """
    asked = capacities(spatial, semantic)
    for moved in _moves(spatial, semantic, step):
        heads = (spatial - moved, semantic + moved)
        try:
            slots = capacities(*heads)
        except ValueError:
            continue
        there = [(n, capacity) for n, capacity in zip(heads, slots, strict=True) if n]
        # A slot counts alike in both: the split, and with it the picture, does not depend on side state.
        paging = plan_pages([n for n, _ in there], [capacity for _, capacity in there])
        if paging is not None:
            return Split(heads, moved, paging)
    raise ValueError(
        f"no page size fits {spatial} spatial heads of {asked[0]} slots and {semantic} semantic "
        f"heads of {asked[1]} with at most {MAX_WASTE:.0%} waste: change spatial_tokens or the head "
        "profile"
    )


def _moves(spatial: int, semantic: int, step: int) -> Iterator[int]:
    """0, then ever larger moves of heads between the types, never emptying one."""
    yield 0
    if not spatial or not semantic:
        return
    for size in range(step, spatial + semantic, step):
        if size < spatial:
            yield size
        if size < semantic:
            yield -size


def _choices(size: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """One type's tokens, 1 to 16, and for the others what equalises the pages, rounded either way."""
    seen = set()
    for first, tokens in product(range(len(size)), range(1, MOST_TOKENS + 1)):
        page = size[first] * tokens
        others = [sorted({page // n, ceil(page / n)} - {0}) for n in size]
        others[first] = [tokens]
        for choice in product(*others):
            if choice not in seen:
                seen.add(choice)
                yield choice


@cache
def _pages(capacity: int, tokens: int) -> int:
    """Pages of requests of all of `PREFIXES`, added up."""
    return sum(ceil((prefix + capacity) / tokens) for prefix in PREFIXES.tolist())
