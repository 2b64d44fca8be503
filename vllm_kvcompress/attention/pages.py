"""The paged cache of one head type: tensors, block tables and the plan of a step. No vLLM import.

A *logical slot* of a request is a number: its prefix tokens come first, then the image slots. The block
table of the head type says where it lies: page ``block_table[row, slot // page]``, place ``slot % page``.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vllm_kvcompress.policy.rule import SIDE_BYTES, HeadRule

if TYPE_CHECKING:
    from vllm_kvcompress.attention.cpu_library import Native
    from vllm_kvcompress.attention.triton_kinds import Packed

BRANCHES = 2
"""Of guidance: every head has pages in both."""
NUMBERS = ("capacity", "line", "image", "anchors", "recent")
"""What of a rule may differ between the sizes of pictures."""


@dataclass
class HeadPages:
    """All pages of one head type; a layer uses a slice of the head axis.

    Parameters
    ----------
    kv : Tensor
        [blocks, heads, page, 2 * head_size], cache dtype: K (after RoPE), then V. Any strides.
    score : Tensor
        [blocks, heads, page], float32: attention mass that the slot received. This and the next two have
        no slots ([blocks, heads, 0]) where the rule does not score (rings, and heads that keep all): which
        token is where is then arithmetic.
    token : Tensor
        [blocks, heads, page], int16: index of the image token in the slot, -1 for a prefix token.
    victim : Tensor
        [blocks, heads, page], int16: at a request's logical slot j, j < W, the image slot (counted from
        the prefix's end) of the j-th victim chosen at the last line's end.
    native, packed, mass
        What kernels have made of these pages and keep for the next step: the C++ kernels' description, the
        Triton kernels' arguments, scratch memory of windows. Nobody else reads them.
    """

    kv: Tensor
    score: Tensor
    token: Tensor
    victim: Tensor
    native: "Native | None" = field(default=None, init=False, repr=False, compare=False)
    packed: "Packed | None" = field(default=None, init=False, repr=False, compare=False)
    mass: Tensor | None = field(default=None, init=False, repr=False, compare=False)

    @property
    def page(self) -> int:
        """Slots per page."""
        return self.kv.shape[2]

    @property
    def head_size(self) -> int:
        """D, numbers per key."""
        return self.kv.shape[3] // 2

    def layer(self, first: int, last: int) -> "HeadPages":
        """Views of the heads ``first`` to ``last`` (exclusive)."""
        return HeadPages(
            self.kv[:, first:last],
            self.score[:, first:last],
            self.token[:, first:last],
            self.victim[:, first:last],
        )


@dataclass
class HeadType:
    """One head type as one layer sees it; or, for `select_victims`, as all layers together see it.

    Parameters
    ----------
    pages : HeadPages
        Its head axis: branch 0's n heads, then branch 1's n heads.
    rule : HeadRule
        What these heads keep of a picture; of the default size, where there are several.
    head_index : Tensor
        [2 * n] int32: place of each cache head on the ``2 * Hkv`` axis of k and v (branch * Hkv + head).
        `select_victims` does not read it.
    block_table : Tensor
        [rows, max_blocks] int32. Entries beyond a row's resident slots are never followed.
    sized : tuple of HeadRule
        What they keep of pictures of each size that is drawn, alike but for the numbers of slots and tokens
        (`NUMBERS`); empty where there is one size, which costs nothing.
    """

    pages: HeadPages
    rule: HeadRule
    head_index: Tensor
    block_table: Tensor
    sized: tuple[HeadRule, ...] = ()

    @property
    def capacity(self) -> int:
        """Resident image slots of a head, of the size that has most."""
        return max(rule.capacity for rule in self.sized) if self.sized else self.rule.capacity

    @property
    def scores(self) -> bool:
        """Whether pictures of any size are scored."""
        return any(rule.scores for rule in self.sized) if self.sized else self.rule.scores

    def of(self, size: int, rows: Tensor | slice | None = None) -> "HeadType":
        """The same for pictures of one size alone; ``rows`` picks block tables."""
        rule = self.sized[size] if self.sized else self.rule
        table = self.block_table if rows is None else self.block_table[rows]
        return replace(self, rule=rule, block_table=table, sized=())


@dataclass
class Plan:
    """One decode step: a row is a request, with one token.

    Parameters
    ----------
    prefix : Tensor
        [rows] int32: prompt tokens of the row.
    length : Tensor
        [rows] int32: tokens of the row, that of this step included, at most prefix + image. 0 is a
        padding row: it writes nowhere and its output is zero.
    begins : Tensor, optional
        [rows, 2] int32: the logical slot that each branch's prompt begins at, at most ``prefix``. What lies
        before it fills the shorter prompt up: none of the branch's queries sees it, but its own does. None
        stands for zeros, and costs nothing.
    size : Tensor, optional
        [rows] int32: which of `HeadType.sized` rules the row. None where there is one size.
    """

    prefix: Tensor
    length: Tensor
    begins: Tensor | None = None
    size: Tensor | None = None

    def of(self, rows: Tensor | slice) -> "Plan":
        """The same of these rows, [n] integer; a slice's are views."""
        begins, size = (None if x is None else x[rows] for x in (self.begins, self.size))
        return Plan(self.prefix[rows], self.length[rows], begins, size)

    def by_size(self) -> "Iterator[tuple[int, Tensor, Plan]]":
        """The rows that are no padding, size by size: the size, [n] int64 which they are, their plan."""
        assert self.size is not None
        for size in self.size[self.length > 0].unique().tolist():
            rows = ((self.size == size) & (self.length > 0)).nonzero().flatten()
            yield size, rows, replace(self.of(rows), size=None)


def begins_of(begins: Tensor, head_index: Tensor, heads: int) -> Tensor:
    """``begins`` of a head type's heads.

    Parameters
    ----------
    begins : Tensor
        [rows, 2] int32, as in `Plan`.
    head_index : Tensor
        [n] int32, as in `HeadType`.
    heads : int
        ``2 * Hkv``.

    Returns
    -------
    Tensor
        [rows, n] int64.
    """
    return begins.long()[:, (head_index >= heads // 2).long()]


def slot_bytes(head_size: int, dtype: torch.dtype, scores: bool) -> int:
    """Bytes of one slot of one head: K, V and, where the rule ``scores``, score, token and victim."""
    return 2 * head_size * dtype.itemsize + (SIDE_BYTES if scores else 0)


def page_bytes(heads: int, page: int, head_size: int, dtype: torch.dtype, scores: bool = True) -> int:
    """Bytes of one page of ``heads * page`` slots; ``scores`` as in `slot_bytes`."""
    return heads * page * slot_bytes(head_size, dtype, scores)


def pages_from_bytes(
    raw: Tensor, heads: int, page: int, head_size: int, dtype: torch.dtype, scores: bool = True
) -> HeadPages:
    """Lay the cache of one head type over raw memory; everything returned is a view of ``raw``.

    Each page holds K and V of all heads, then scores, then tokens, then victims, then padding.

    Parameters
    ----------
    raw : Tensor
        [blocks, bytes] int8 or uint8 with bytes >= `page_bytes`; the surplus is padding.
    heads, page, head_size : int
        Cache heads of all layers and branches, slots per page, numbers per key.
    dtype : torch.dtype
        Of K and V.
    scores : bool
        Whether the rule scores: else there is no side state.

    Raises
    ------
    ValueError
        If a page is too small, or a field would not be aligned to its type.
    """
    need = page_bytes(heads, page, head_size, dtype, scores)
    if raw.dim() != 2 or raw.dtype.itemsize != 1 or raw.stride(1) != 1 or raw.shape[1] < need:
        raise ValueError(
            f"raw: {list(raw.shape)} {raw.dtype}; need [blocks, at least {need}] bytes for {heads} heads x "
            f"{page} slots"
        )
    first = raw.storage_offset()

    def view(start: int, kind: torch.dtype, *shape: int) -> Tensor:
        size = kind.itemsize
        if (first + start) % size or raw.stride(0) % size:
            raise ValueError(
                f"raw: a page of {raw.stride(0)} bytes with {kind} at byte {start} is not aligned to {size}; "
                "pad the page to a multiple of 4"
            )
        return raw[:, start : start + prod(shape) * size].view(kind).unflatten(1, shape)

    slots = heads * page
    kv, side = view(0, dtype, heads, page, 2 * head_size), slots * 2 * head_size * dtype.itemsize
    if not scores:
        none = torch.empty(len(raw), heads, 0, dtype=torch.int16, device=raw.device)
        return HeadPages(kv, none.float(), none, none)
    return HeadPages(
        kv,
        view(side, torch.float32, heads, page),
        view(side + 4 * slots, torch.int16, heads, page),
        view(side + 6 * slots, torch.int16, heads, page),
    )


def locate(
    block_table: Tensor, logical: Tensor, page: int, valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Page and place of logical slots.

    Parameters
    ----------
    block_table : Tensor
        [rows, max_blocks] integer.
    logical : Tensor
        [rows, n] int64.
    page : int
        Slots per page.
    valid : Tensor, optional
        [rows, n] bool: where False the answer is (0, 0), and the table is not followed.

    Returns
    -------
    block, place : Tensor
        [rows, n] int64 each.
    """
    if valid is not None:
        logical = logical.where(valid, 0)
    block = block_table.long().gather(1, logical // page)
    return (block if valid is None else block.where(valid, 0)), logical % page
