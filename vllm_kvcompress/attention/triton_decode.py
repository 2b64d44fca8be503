"""The decode step on a GPU, in Triton: one launch per layer, for both head types and both branches.

Arguments as in `reference.decode`. A program is one cache head of one row. It works out the slot of the
new token, writes K and V there, attends to what is resident, and leaves each slot's probability in its
score. Nothing is read back on the host, and shapes depend on the batch alone: a CUDA graph can hold it.

Two passes for the score, because a probability is known only once all logits are: the first pass writes
the logits of the image slots to scratch memory in float32 (4 bytes beside the 512 of K and V at head size
128, and still in the L2 cache when the same program reads them again), the second normalises. K and V are
read once, and marked to leave the cache first.

The new token's K and V are in registers: its slot is written, never read, so no barrier is needed.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_kvcompress.attention.pages import HeadType, Plan
from vllm_kvcompress.attention.triton_attend import add_scores, attend_group, attend_single, to_cache

__all__ = ["decode", "launch"]

LOG2E = 1.4426950408889634
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
NARROW = torch.float8_e4m3fn  # what the cache may be in beside them, at scale 1
MAX_GROUP = 16  # rows of one matrix product
MAX_HEAD_SIZE = 256  # a tile of slots fits the registers
LIMITS = (MAX_HEAD_SIZE, MAX_GROUP)  # what `kernels.check_shape` holds a model to at start-up


class KindArgs(NamedTuple):
    """One head type as the kernel sees it: tensors, strides in elements, and the rule's numbers."""

    kv: Any
    score: Any
    token: Any
    victim: Any
    head_index: Any
    table: Any
    scratch: Any  # [rows, heads, group, capacity] float32
    kv_block: Any
    kv_head: Any
    score_block: Any
    score_head: Any
    token_block: Any
    token_head: Any
    victim_block: Any
    victim_head: Any
    table_row: Any
    heads: Any
    capacity: Any
    line: Any
    anchors: Any
    recent: Any
    image: Any


@triton.jit
def _slot_of(kind, table, head, token, RING: tl.constexpr, PAGE: tl.constexpr):
    """Image slot of an image token: its own number, a turn of the ring, or the victim chosen for it."""
    slot = token
    if token >= kind.capacity:
        if RING:
            turn = tl.maximum(kind.capacity - kind.anchors, 1)
            slot = kind.anchors + (token - kind.anchors) % turn
        else:
            start = token - token % kind.line
            nth = token - start - tl.maximum(kind.capacity - start, 0)
            block = tl.load(table + nth // PAGE).to(tl.int64)
            at = block * kind.victim_block + head * kind.victim_head + nth % PAGE
            slot = tl.load(kind.victim + at).to(tl.int32)
    return slot


@triton.jit
def _head(
    kind, head, row, q, k, v, out, prefix, length,
    q_row, q_head, k_row, k_head, v_row, v_head, out_row, out_head, scale,
    RING: tl.constexpr, SCORES: tl.constexpr, PAGE: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr,
    WIDTH: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One cache head of one row; see `decode`. LANES: query heads, padded to what the products need."""
    row = row.to(tl.int64)
    place = tl.load(kind.head_index + head)
    group = tl.arange(0, LANES)
    dim = tl.arange(0, WIDTH)
    inside = dim < DIM
    lanes = (group < GROUP)[:, None] & inside[None, :]
    out_at = out + row * out_row + (place * GROUP + group)[:, None] * out_head + dim[None, :]
    if length == 0:  # a padding row
        tl.store(out_at, tl.zeros([LANES, WIDTH], out.dtype.element_ty), mask=lanes)
    else:
        table = kind.table + row * kind.table_row
        token = length - 1 - prefix
        own = length - 1
        if token >= 0:
            own = prefix + _slot_of(kind, table, head, token, RING, PAGE)
        own_page = tl.load(table + own // PAGE).to(tl.int64)
        own_at = own % PAGE
        key = tl.load(k + row * k_row + place * k_head + dim, mask=inside, other=0.0)
        value = tl.load(v + row * v_row + place * v_head + dim, mask=inside, other=0.0)
        key, value = to_cache(key, kind.kv.dtype.element_ty), to_cache(value, kind.kv.dtype.element_ty)
        pages = kind.kv + head.to(tl.int64) * kind.kv_head
        cell = pages + own_page * kind.kv_block + own_at * (2 * DIM) + dim
        tl.store(cell, key, mask=inside)
        tl.store(cell + DIM, value, mask=inside)
        held = kind.token + own_page * kind.token_block + head * kind.token_head + own_at
        tl.store(held, tl.maximum(token, -1).to(tl.int16))

        query_at = q + row * q_row + (place * GROUP + group)[:, None] * q_head + dim[None, :]
        query = tl.load(query_at, mask=lanes, other=0.0)
        visible = tl.minimum(length, prefix + kind.capacity)
        logits = kind.scratch + ((row * kind.heads + head) * GROUP) * kind.capacity
        if LANES == 1:
            mixed, top, total, own_logit = attend_single(
                tl.reshape(query, [WIDTH]), key, value, pages, kind.kv_block, table, visible, own, prefix,
                logits, scale, SCORES, PAGE, DIM, WIDTH, BLOCK, STAGES,
            )  # fmt: skip
        else:
            mixed, top, total, own_logit = attend_group(
                query, key, value, pages, kind.kv_block, table, visible, own, prefix,
                logits, kind.capacity, scale, SCORES, PAGE, GROUP, DIM, WIDTH, LANES, BLOCK, STAGES,
            )  # fmt: skip
        tl.store(out_at, (mixed / total[:, None]).to(out.dtype.element_ty), mask=lanes)

        score = kind.score + head * kind.score_head
        mass = 0.0
        if SCORES:
            share = tl.where(group < GROUP, tl.exp2(own_logit - top) / total, 0.0)
            mass = tl.where(token >= 0, tl.sum(share, 0), 0.0)
            add_scores(
                score, kind.score_block, table, visible, own, prefix, logits, kind.capacity, top, total,
                PAGE, GROUP, LANES,
            )  # fmt: skip
        tl.store(score + own_page * kind.score_block + own_at, mass)


@triton.jit
def _decode(
    first, second, q, k, v, out, prefix, length,
    q_row, q_head, k_row, k_head, v_row, v_head, out_row, out_head, scale,
    TYPES: tl.constexpr, RING_1: tl.constexpr, SCORES_1: tl.constexpr, PAGE_1: tl.constexpr,
    RING_2: tl.constexpr, SCORES_2: tl.constexpr, PAGE_2: tl.constexpr,
    GROUP: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Grid: cache heads of both types, rows. A type's flags and page are compiled in: two code paths."""
    head, row = tl.program_id(0), tl.program_id(1)
    before, tokens = tl.load(prefix + row), tl.load(length + row)
    if head < first.heads:
        _head(
            first, head, row, q, k, v, out, before, tokens,
            q_row, q_head, k_row, k_head, v_row, v_head, out_row, out_head, scale,
            RING_1, SCORES_1, PAGE_1, GROUP, DIM, WIDTH, LANES, BLOCK, STAGES,
        )  # fmt: skip
    elif TYPES == 2:  # otherwise not compiled
        _head(
            second, head - first.heads, row, q, k, v, out, before, tokens,
            q_row, q_head, k_row, k_head, v_row, v_head, out_row, out_head, scale,
            RING_2, SCORES_2, PAGE_2, GROUP, DIM, WIDTH, LANES, BLOCK, STAGES,
        )  # fmt: skip


class Launch(NamedTuple):
    """What one launch needs: the grid, positional arguments, and what is compiled in."""

    grid: tuple[int, int]
    args: tuple[Any, ...]
    constants: dict[str, Any]


def launch(
    q: Tensor, k: Tensor, v: Tensor, types: Sequence[HeadType], plan: Plan, scale: float, out: Tensor
) -> Launch:
    """The launch that `decode` makes, with arguments as there; scratch memory is allocated here.

    Raises ValueError for what the kernel can't do.
    """
    types = [kind for kind in types if len(kind.head_index)]
    rows, heads, dim = q.shape
    group = heads // k.shape[1]
    _check(q, k, v, types, out, group)
    kinds = [kind_args(kind, (rows, group)) for kind in types]
    width = max(16, triton.next_power_of_2(dim))
    constants: dict[str, Any] = {"TYPES": len(types), "GROUP": group, "DIM": dim, "WIDTH": width}
    for n, kind in enumerate((types[0], types[-1]), 1):
        flags = {"RING": kind.rule.ring, "SCORES": kind.rule.scores, "PAGE": kind.pages.page}
        constants |= {f"{name}_{n}": value for name, value in flags.items()}
    # 32 accumulators a thread, fewer slots at a time where a number takes four bytes. The matrix units'
    # operands pass through shared memory, loaded ahead: 22 KiB at head size 128 in bfloat16.
    block = max(16, 8192 // (width * q.element_size()))
    constants |= {"LANES": 1 if group == 1 else MAX_GROUP, "STAGES": 1 if group == 1 else 3}
    constants |= {"BLOCK": block, "num_warps": 4, "enable_fp_fusion": True}
    strides = [stride for x in (q, k, v, out) for stride in x.stride()[:2]]
    args = (kinds[0], kinds[-1], q, k, v, out, plan.prefix, plan.length, *strides, scale * LOG2E)
    return Launch((sum(len(kind.head_index) for kind in types), rows), args, constants)


def decode(
    q: Tensor, k: Tensor, v: Tensor, types: Sequence[HeadType], plan: Plan, scale: float, out: Tensor
) -> None:
    """Write one token per row into the cache of one layer, and attend to what is resident.

    Shapes and meaning as in `reference.decode`. All tensors are of one dtype, bfloat16, float16 or
    float32, with any strides of rows and heads; the cache may be in float8_e4m3fn instead. Safe inside a
    CUDA graph: the scratch memory for the logits ([rows, heads, group, capacity] float32 of the types that
    score) then comes from the graph's own pool.

    Raises
    ------
    ValueError
        For another dtype, a head size above 256, more than 16 query heads per KV head, or numbers of a
        head that do not lie next to each other.
    """
    if len(q):
        grid, args, constants = launch(q, k, v, types, plan, scale, out)
        _decode[grid](*args, **constants)


def _check(q: Tensor, k: Tensor, v: Tensor, types: Sequence[HeadType], out: Tensor, group: int) -> None:
    cached = {kind.pages.kv.dtype for kind in types}
    dtypes = {x.dtype for x in (q, k, v, out)} | (cached - {NARROW} or cached & {q.dtype})
    if len(dtypes) != 1 or q.dtype not in DTYPES:
        raise ValueError(
            f"q, k, v, out and the cache: {dtypes | cached}; need one of {DTYPES}, or {NARROW} for the cache"
        )
    if q.shape[2] > MAX_HEAD_SIZE or group > MAX_GROUP or not 1 <= len(types) <= 2:
        raise ValueError(
            f"q: head size {q.shape[2]}, {group} query heads per KV head, {len(types)} head types; need at "
            f"most {MAX_HEAD_SIZE}, {MAX_GROUP} and 2"
        )
    for kind in types:
        pages = kind.pages
        dense = pages.kv.stride()[2:] == (2 * pages.head_size, 1) and kind.block_table.stride(1) == 1
        if not dense or any(x.stride(2) != 1 for x in (pages.score, pages.token, pages.victim)):
            raise ValueError("pages: the slots of a head must lie next to each other, K and V in one piece")
    if any(x.stride(2) != 1 for x in (q, k, v, out)):
        raise ValueError("q, k, v, out: the numbers of a head must lie next to each other")


def kind_args(kind: HeadType, scratch_for: tuple[int, int] | None = None) -> KindArgs:
    """A head type for a kernel; ``scratch_for`` (rows, group) also allocates memory for the logits."""
    pages, rule, heads = kind.pages, kind.rule, kind.pages.kv.shape[1]
    scratch = pages.score  # stands in where no logits are kept
    if rule.scores and scratch_for:
        rows, group = scratch_for
        shape = (rows, heads, group, rule.capacity)
        scratch = torch.empty(shape, dtype=torch.float32, device=pages.score.device)
    paged = (pages.kv, pages.score, pages.token, pages.victim)
    args: list[Any] = [*paged, kind.head_index, kind.block_table, scratch]
    args += [stride for x in paged for stride in x.stride()[:2]]
    args += [kind.block_table.stride(0), heads]
    args += [rule.capacity, rule.line, rule.anchors, rule.recent, rule.image]
    return KindArgs(*args)
