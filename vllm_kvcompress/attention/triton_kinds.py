"""Triton: head types as arguments of a kernel, so that all layers of a model share one compiled variant.

Layers differ in the types they have, and in how many heads of each. Nothing of that is compiled in: a
kernel always takes `MAX_TYPES` types, of which each program picks its own by its place in the grid, a few
dozen selects beside thousands of instructions. And no argument that differs by layer may make Triton
compile anew, as integers do that are 1 or divisible by 16, and pointers that are not aligned to 16 bytes:
`odd` and `_aligned` see to that, since Triton's do_not_specialize does not reach into tuples.
"""

from collections.abc import Callable, Sequence
from math import gcd
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_kvcompress.attention.pages import NUMBERS, HeadType
from vllm_kvcompress.policy.rule import MAX_TYPES, HeadRule

RING, SCORES, VALUE_NORM, SMOOTH_ROW = (tl.constexpr(1 << n) for n in range(4))
# Triton's interpreter compiles nothing and takes its time for every operation: there, numbers go as they are
# and no types are added.
PLAIN = tl.constexpr(bool(triton.knobs.runtime.interpret))


class Numbers(NamedTuple):
    """What a kernel needs to know of one head type; strides in elements, and all `odd`."""

    score_at: Any  # elements from the pointer, which is `_aligned`, to the tensor's first
    token_at: Any
    victim_at: Any
    kv_block: Any  # in units of ALIGN, as kv_head is
    kv_head: Any
    score_block: Any
    index_block: Any  # token's and victim's
    side_head: Any  # score's, token's and victim's
    table_row: Any
    heads: Any
    scratch: Any  # where this type's part of a row's scratch memory begins; the kernel's own units
    page: Any
    capacity: Any
    line: Any
    anchors: Any
    recent: Any
    image: Any
    flags: Any


class KindArgs(NamedTuple):
    """One head type as a kernel sees it."""

    kv: Any
    score: Any
    token: Any
    victim: Any
    head_index: Any
    table: Any
    sized: Any  # [sizes, 5] int32, what `NUMBERS` names of each; any pointer where there is one size
    numbers: Any
    per_slot: Any  # 1 / page: floor((slot + 0.5) * per_slot) is a slot's page, exactly to 2**20 slots
    decay: Any


class Packed(NamedTuple):
    """The arguments made of a `HeadPages`, and what they were made for."""

    rule: HeadRule
    sized: tuple[HeadRule, ...]
    rest: tuple[int, int, tuple[int, ...]]  # align, scratch, the block table's strides
    args: KindArgs


@triton.jit
def pick(kinds, item, PER_ITEM: tl.constexpr, TYPES: tl.constexpr):
    """The type whose heads hold the ``item``-th group of PER_ITEM, its numbers, the group's place in it.

    Types that only fill up the tuple are never reached.
    """
    kind = kinds[0]
    for n in tl.static_range(1, TYPES):
        heads = kind.numbers.heads
        if not PLAIN:
            heads = (heads >> 1) - 1
        groups = (heads + (PER_ITEM - 1)) // PER_ITEM
        if item >= groups:
            item -= groups
            kind = kinds[n]
    numbers = kind.numbers
    if not PLAIN:
        numbers = Numbers(*[(number >> 1) - 1 for number in numbers])
    return kind, numbers, item


@triton.jit
def of_row(kind, n, size, row, SIZED: tl.constexpr):
    """A type's numbers as they are for a row: with those of its size where SIZED, else as they are."""
    if SIZED:
        at = kind.sized + 5 * tl.load(size + row)
        capacity, image = tl.load(at), tl.load(at + 2)
        flags = tl.where(capacity < image, n.flags, n.flags & ~SCORES)
        n = Numbers(
            n.score_at, n.token_at, n.victim_at, n.kv_block, n.kv_head, n.score_block, n.index_block,
            n.side_head, n.table_row, n.heads, n.scratch, n.page, capacity, tl.load(at + 1), tl.load(at + 3),
            tl.load(at + 4), image, flags,
        )  # fmt: skip
    return n


def sized(size: Tensor | None) -> dict[str, bool]:
    """The constant of `of_row`: servers of several sizes have variants of their own."""
    return {"SIZED": size is not None}


def odd(number: int) -> int:
    """A number, at least 0, that Triton compiles no variant for: never 1, never divisible by 16."""
    return number if PLAIN else 2 * number + 3


def filled(kinds: Sequence[KindArgs]) -> tuple[KindArgs, ...]:
    """As many as a kernel has places for: it is compiled once for any number of types."""
    return tuple(kinds) if PLAIN else (*kinds, *[kinds[-1]] * (MAX_TYPES - len(kinds)))


def packed(
    types: Sequence[HeadType], scratch: Callable[[HeadType], int]
) -> tuple[tuple[KindArgs, ...], int, int]:
    """Head types as a kernel's argument.

    Parameters
    ----------
    scratch : callable
        How much of a row's scratch memory a type takes, in the kernel's own units.

    Returns
    -------
    kinds, align, kept
        The argument; numbers of K and V that make 16 bytes; scratch memory of a row.
    """
    args, align, kept = [], alignment(types), 0
    for kind in types:
        args.append(kind_args(kind, align, kept))
        kept += scratch(kind)
    return filled(args), align, kept


def alignment(types: Sequence[HeadType]) -> int:
    """Numbers of K and V that make 16 bytes; fewer where the pages of a type lie less evenly."""
    size = types[0].pages.kv.element_size()
    return gcd(16 // size, *(stride for kind in types for stride in kind.pages.kv.stride()[:2]))


def kind_args(kind: HeadType, align: int, scratch: int) -> KindArgs:
    """A head type for a kernel; ``align`` is of all types, ``scratch`` as in `Numbers`.

    What is known of the pages is kept on that object, for the next step.

    Raises ValueError where the slots of a head do not lie next to each other.
    """
    table, pages = kind.block_table, kind.pages
    rest, kept = (align, scratch, table.stride()), pages.packed
    if kept is None or kept.rule is not kind.rule or kept.sized is not kind.sized or kept.rest != rest:
        if table.stride(1) != 1:
            raise ValueError("block_table: the pages of a row must lie next to each other")
        kept = pages.packed = Packed(kind.rule, kind.sized, rest, _kind_args(kind, align, scratch))
    args, index = kept.args, kind.head_index
    return args._replace(head_index=index, table=table, sized=index if args.sized is None else args.sized)


def _kind_args(kind: HeadType, align: int, scratch: int) -> KindArgs:
    """All but the tensors that a step brings."""
    pages, rule = kind.pages, kind.rule
    side = (pages.score, pages.token, pages.victim)
    if pages.kv.stride()[2:] != (2 * pages.head_size, 1) or any(x.stride(2) != 1 for x in side):
        raise ValueError("pages: the slots of a head must lie next to each other, K and V in one piece")
    if kind.scores and (len({x.stride(1) for x in side}) > 1 or side[1].stride() != side[2].stride()):
        raise ValueError("pages: the heads of score, token and victim must be equally far apart")
    (score, score_at), (token, token_at), (victim, victim_at) = (_aligned(x) for x in side)
    kv_block, kv_head = (stride // align for stride in pages.kv.stride()[:2])
    flags = RING.value * rule.ring + SCORES.value * kind.scores
    flags += VALUE_NORM.value * rule.value_norm + SMOOTH_ROW.value * rule.smooth_row
    numbers = Numbers(
        score_at=score_at, token_at=token_at, victim_at=victim_at, kv_block=kv_block, kv_head=kv_head,
        score_block=pages.score.stride(0), index_block=pages.token.stride(0), side_head=pages.score.stride(1),
        table_row=kind.block_table.stride(0), heads=pages.kv.shape[1], scratch=scratch, page=pages.page,
        capacity=rule.capacity, line=rule.line, anchors=rule.anchors, recent=rule.recent, image=rule.image,
        flags=flags,
    )  # fmt: skip
    odds = Numbers(*map(odd, numbers))
    of_sizes = None
    if kind.sized:
        table = [[getattr(one, name) for name in NUMBERS] for one in kind.sized]
        of_sizes = torch.tensor(table, dtype=torch.int32, device=pages.kv.device)
    rest = odds, 1 / pages.page, float(rule.decay)
    return KindArgs(pages.kv, score, token, victim, None, None, of_sizes, *rest)


def _aligned(x: Tensor) -> tuple[Tensor, int]:
    """``x`` from up to 15 bytes further down, at a multiple of 16 bytes, and how many elements that is."""
    first = int(x.storage_offset())
    shift = min(x.data_ptr() % 16 // x.element_size(), first)
    return (x.as_strided(x.shape, x.stride(), first - shift) if shift else x), shift
