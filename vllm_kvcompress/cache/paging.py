"""How many tokens a page holds, for each head type.

Both head types draw their pages from one pool, so a page of either costs the larger one's bytes. A
page holds all heads of its type over all layers (and both branches); the waste disappears when
``heads x tokens`` is equal for both types, which few head splits allow exactly. ``plan_paging`` picks
tokens per page with little waste and, where none exists, moves the least decided heads to the other
type until one does.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import ceil

Capacities = Callable[[int, int], tuple[int, int]]
MAX_WASTE = 0.03  # of a request's bytes, lost to unequal pages
# Few tokens a page round a request up by little; many make fewer, longer runs of memory for the
# kernels. 4 rows of K and V are 2 KiB at head size 128 in bfloat16.
_MIN_RUN = 4
_MAX_TOKENS = 16
_PREFIXES = range(8, 72)  # prompt lengths over which rounding is averaged


@dataclass(frozen=True)
class Paging:
    """Tokens per page of each head type, and what that costs.

    Parameters
    ----------
    spatial_heads, semantic_heads : int
        Heads of each type over all layers (and branches), after ``moved``.
    spatial_tokens, semantic_tokens : int
        Tokens a page holds; 0 for a type without heads.
    moved : int
        Heads that changed type to make the pages fit: positive to semantic, negative to spatial.
    waste : float
        Fraction of an average request's bytes that unequal pages lose.
    """

    spatial_heads: int
    semantic_heads: int
    spatial_tokens: int
    semantic_tokens: int
    moved: int
    waste: float

    @property
    def rows(self) -> int:
        """(head, token) rows that a page has room for: the larger type's."""
        return max(self.spatial_heads * self.spatial_tokens, self.semantic_heads * self.semantic_tokens)


def plan_paging(spatial: int, semantic: int, capacities: Capacities, step: int = 1) -> Paging:
    """Choose tokens per page, with at most 3% of waste.

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
        try:
            slots = capacities(spatial - moved, semantic + moved)
        except ValueError:
            continue
        best = _best(spatial - moved, semantic + moved, *slots, moved)
        if best is not None and best.waste <= MAX_WASTE:
            return best
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


def _best(
    spatial: int, semantic: int, spatial_capacity: int, semantic_capacity: int, moved: int
) -> Paging | None:
    options = [
        _priced(Paging(spatial, semantic, a, b, moved, 0.0), spatial_capacity, semantic_capacity)
        for a, b in _token_pairs(spatial, semantic)
    ]
    fitting = [option for option in options if option[1].waste <= MAX_WASTE]
    return min(fitting, key=lambda option: option[0])[1] if fitting else None


def _token_pairs(spatial: int, semantic: int) -> Iterator[tuple[int, int]]:
    for tokens in range(1, _MAX_TOKENS + 1):
        if not spatial:
            yield 0, tokens
        elif not semantic:
            yield tokens, 0
        else:
            # One type's count, and what equalises the rows on the other side.
            for a in {spatial * tokens // semantic, ceil(spatial * tokens / semantic)} - {0}:
                yield tokens, a
            for b in {semantic * tokens // spatial, ceil(semantic * tokens / spatial)} - {0}:
                yield b, tokens


def _priced(paging: Paging, spatial_capacity: int, semantic_capacity: int) -> tuple[float, Paging]:
    """(rows an average request takes, with a penalty for short runs; the plan with its waste)."""
    allocated = wasted = 0
    parts = (
        (paging.spatial_heads, paging.spatial_tokens, spatial_capacity),
        (paging.semantic_heads, paging.semantic_tokens, semantic_capacity),
    )
    for heads, tokens, capacity in parts:
        if not heads:
            continue
        pages = sum(ceil((prefix + capacity) / tokens) for prefix in _PREFIXES)
        allocated += pages * paging.rows
        wasted += pages * (paging.rows - heads * tokens)
    shortest = min(tokens for heads, tokens, _ in parts if heads)
    penalty = 1.0 + 0.01 * max(0, _MIN_RUN - shortest)
    priced = Paging(
        paging.spatial_heads, paging.semantic_heads, paging.spatial_tokens, paging.semantic_tokens,
        paging.moved, wasted / allocated,
    )  # fmt: skip
    return allocated * penalty, priced
