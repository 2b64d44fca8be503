"""The decode step on a GPU, in Triton: one launch per layer, for all head types and both branches.

Arguments as in `reference.decode`. A program is one cache head of one row. It works out the slot of the
new token, writes K and V there, attends to what is resident, and leaves each slot's probability in its
score. Nothing is read back on the host, and shapes depend on the batch alone: a CUDA graph can hold it.

Two passes for the score, because a probability is known only once all logits are: the first pass writes
the logits of the image slots to scratch memory in float32 (4 bytes beside the 512 of K and V at head size
128, and still in the L2 cache when the same program reads them again), the second normalises. K and V are
read once, and marked to leave the cache first.

The new token's K and V are in registers: its slot is written, never read, so no barrier is needed.

One compiled variant for all layers of a model, whatever types they have: see triton_kinds.py.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_kvcompress.attention.pages import HeadType, Plan
from vllm_kvcompress.attention.triton_attend import add_scores, attend_group, attend_single, to_cache
from vllm_kvcompress.attention.triton_kinds import RING, SCORES, of_row, packed, pick, sized
from vllm_kvcompress.policy.rule import MAX_TYPES

__all__ = ["decode", "launch"]

LOG2E = 1.4426950408889634
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
NARROW = torch.float8_e4m3fn  # what the cache may be in beside them, at scale 1
MAX_GROUP = 16  # rows of one matrix product
MAX_HEAD_SIZE = 256  # a tile of slots fits the registers
LIMITS = (MAX_HEAD_SIZE, MAX_GROUP)  # what `kernels.check_shape` holds a model to at start-up


@triton.jit
def first_seen(begins, row, place, ALIGNED: tl.constexpr):
    """First slot that a cache head sees, of its place on k's head axis."""
    begin = 0
    if ALIGNED:
        begin = tl.load(begins + 2 * row + (place >= ALIGNED).to(tl.int32))
    return begin


@triton.jit
def _victim(kind, n, table, head, token):
    """Image slot of a token of a scored head that is full: the victim chosen for it."""
    start = token - token % n.line
    nth = token - start - tl.maximum(n.capacity - start, 0)
    number = ((nth + 0.5) * kind.per_slot).to(tl.int32)
    block = tl.load(table + number).to(tl.int64)
    at = block * n.index_block + (n.victim_at + head * n.side_head + nth - number * n.page)
    return tl.load(kind.victim + at).to(tl.int32)


@triton.jit(do_not_specialize=("scratch_row", "prefix", "length", "begins", "size"))
def _decode(
    kinds, q, k, v, out, scratch, prefix, length, begins, size,
    q_row, q_head, k_row, k_head, v_row, v_head, out_row, out_head, scratch_row, scale,
    TYPES: tl.constexpr, ALIGN: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    LANES: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, ALIGNED: tl.constexpr,
    SIZED: tl.constexpr,
):  # fmt: skip
    """Grid: cache heads of all types, rows. LANES: query heads, padded to what the products need.
    ALIGNED: KV heads of a branch where branches may begin at unlike slots; else 0: ``begins`` is not read.
    SIZED: whether rows have a ``size``.
    """
    row = tl.program_id(1)
    prefix, length = tl.load(prefix + row), tl.load(length + row)
    row = row.to(tl.int64)
    kind, n, head = pick(kinds, tl.program_id(0), 1, TYPES)
    n = of_row(kind, n, size, row, SIZED)
    place = tl.load(kind.head_index + head)
    group = tl.arange(0, LANES)
    dim = tl.arange(0, WIDTH)
    inside = dim < DIM
    lanes = (group < GROUP)[:, None] & inside[None, :]
    out_at = out + row * out_row + (place * GROUP + group)[:, None] * out_head + dim[None, :]
    if length == 0:  # a padding row
        tl.store(out_at, tl.zeros([LANES, WIDTH], out.dtype.element_ty), mask=lanes)
    else:
        table = kind.table + row * n.table_row
        begin = first_seen(begins, row, place, ALIGNED)
        token = length - 1 - prefix
        own = length - 1
        if token >= n.capacity:
            if (n.flags & RING) != 0:
                turn = tl.maximum(n.capacity - n.anchors, 1)
                own = prefix + (n.anchors + (token - n.anchors) % turn)
            else:
                own = prefix + _victim(kind, n, table, head, token)
        number = ((own + 0.5) * kind.per_slot).to(tl.int32)
        own_page = tl.load(table + number).to(tl.int64)
        own_at = own - number * n.page
        key = tl.load(k + row * k_row + place * k_head + dim, mask=inside, other=0.0)
        value = tl.load(v + row * v_row + place * v_head + dim, mask=inside, other=0.0)
        key, value = to_cache(key, kind.kv.dtype.element_ty), to_cache(value, kind.kv.dtype.element_ty)
        pages = kind.kv + head.to(tl.int64) * (n.kv_head * ALIGN)
        kv_block = n.kv_block * ALIGN
        cell = pages + own_page * kv_block + own_at * (2 * DIM) + dim
        tl.store(cell, key, mask=inside)
        tl.store(cell + DIM, value, mask=inside)
        scores = (n.flags & SCORES) != 0
        if scores:
            held = kind.token + (n.token_at + head * n.side_head + own_page * n.index_block + own_at)
            tl.store(held, tl.maximum(token, -1).to(tl.int16))

        query_at = q + row * q_row + (place * GROUP + group)[:, None] * q_head + dim[None, :]
        query = tl.load(query_at, mask=lanes, other=0.0)
        visible = tl.minimum(length, prefix + n.capacity)
        logits = scratch + ((row * scratch_row + (n.scratch + head * n.capacity)) * GROUP - prefix)
        if LANES == 1:
            mixed, top, total, own_logit = attend_single(
                tl.reshape(query, [WIDTH]), key, value, pages, kv_block, table, n.page, kind.per_slot, begin,
                visible, own, prefix, logits, scale, scores, DIM, WIDTH, BLOCK, STAGES,
            )  # fmt: skip
        else:
            mixed, top, total, own_logit = attend_group(
                query, key, value, pages, kv_block, table, n.page, kind.per_slot, begin, visible, own, prefix,
                logits, n.capacity, scale, scores, GROUP, DIM, WIDTH, LANES, BLOCK, STAGES,
            )  # fmt: skip
        tl.store(out_at, (mixed / total[:, None]).to(out.dtype.element_ty), mask=lanes)

        if scores:
            score = kind.score + (n.score_at + head * n.side_head)
            share = tl.where(group < GROUP, tl.exp2(own_logit - top) / total, 0.0)
            mass = tl.where(token >= 0, tl.sum(share, 0), 0.0)
            add_scores(
                score, n.score_block, table, n.page, kind.per_slot, visible, own, prefix, logits, n.capacity,
                top, total, GROUP, LANES,
            )  # fmt: skip
            tl.store(score + own_page * n.score_block + own_at, mass)


class Launch(NamedTuple):
    """What one launch needs: the grid, positional arguments, and what is compiled in."""

    grid: tuple[int, int]
    args: tuple[Any, ...]
    constants: dict[str, Any]


def longest_first(types: Sequence[HeadType]) -> list[HeadType]:
    """The types that have heads, in the order in which they leave a row's last programs least idle."""
    return sorted((t for t in types if len(t.head_index)), key=lambda t: -t.capacity)


def launch(
    q: Tensor, k: Tensor, v: Tensor, types: Sequence[HeadType], plan: Plan, scale: float, out: Tensor
) -> Launch:
    """The launch that `decode` makes, with arguments as there; scratch memory is allocated here.

    Raises ValueError for what the kernel can't do.
    """
    types = longest_first(types)
    rows, heads, dim = q.shape
    group = heads // k.shape[1]
    check_inputs(q, k, v, types, out, group)
    kinds, align, kept = packed(
        types, lambda kind: kind.pages.kv.shape[1] * kind.capacity if kind.scores else 0
    )
    scratch = torch.empty(rows * kept * group, dtype=torch.float32, device=q.device)
    width = max(16, triton.next_power_of_2(dim))
    # 32 accumulators a thread, fewer slots at a time where a number takes four bytes. The matrix units'
    # operands pass through shared memory, loaded ahead: 22 KiB at head size 128 in bfloat16.
    block = max(16, 8192 // (width * q.element_size()))
    constants: dict[str, Any] = {
        "TYPES": len(kinds), "ALIGN": align, "GROUP": group, "DIM": dim, "WIDTH": width,
        "LANES": 1 if group == 1 else MAX_GROUP, "STAGES": 1 if group == 1 else 3, "BLOCK": block,
        "num_warps": 4, "enable_fp_fusion": True, **aligned(plan.begins, k), **sized(plan.size),
    }  # fmt: skip
    strides = [stride for x in (q, k, v, out) for stride in x.stride()[:2]]
    begins, size = (plan.prefix if x is None else x for x in (plan.begins, plan.size))
    given = (
        kinds, q, k, v, out, scratch, plan.prefix, plan.length, begins, size, *strides, kept, scale * LOG2E,
    )  # fmt: skip
    return Launch((sum(len(kind.head_index) for kind in types), rows), given, constants)


def decode(
    q: Tensor, k: Tensor, v: Tensor, types: Sequence[HeadType], plan: Plan, scale: float, out: Tensor
) -> None:
    """Write one token per row into the cache of one layer, and attend to what is resident.

    Shapes and meaning as in `reference.decode`. All tensors are of one dtype, bfloat16, float16 or
    float32, with any strides of rows and heads; the cache may be in float8_e4m3fn instead. A layer has one
    to `MAX_TYPES` types. Safe inside a CUDA graph: the scratch memory for the logits ([rows, heads, group,
    capacity] float32 of the types that score) then comes from the graph's own pool.

    What is known of a `HeadPages` is kept on that object: keep one per layer for the life of the cache, and
    don't put other tensors into it.

    Raises
    ------
    ValueError
        For another dtype, a head size above 256, more than 16 query heads per KV head, no head type or
        too many, or numbers of a head that do not lie next to each other.
    """
    if len(q):
        grid, args, constants = launch(q, k, v, types, plan, scale, out)
        _decode[grid](*args, **constants)


def aligned(begins: Tensor | None, k: Tensor) -> dict[str, int]:
    """The constant of `first_seen`: models with branches of unlike length have variants of their own."""
    return {"ALIGNED": 0 if begins is None else k.shape[1] // 2}


def check_inputs(q: Tensor, k: Tensor, v: Tensor, types: Sequence[HeadType], out: Tensor, group: int) -> None:
    """Raise ValueError for what the kernels can't do."""
    cached = {kind.pages.kv.dtype for kind in types}
    dtypes = {x.dtype for x in (q, k, v, out)} | (cached - {NARROW} or cached & {q.dtype})
    if len(dtypes) != 1 or q.dtype not in DTYPES:
        raise ValueError(
            f"q, k, v, out and the cache: {dtypes | cached}; need one of {DTYPES}, or {NARROW} for the cache"
        )
    if q.shape[2] > MAX_HEAD_SIZE or group > MAX_GROUP or not 1 <= len(types) <= MAX_TYPES:
        raise ValueError(
            f"q: head size {q.shape[2]}, {group} query heads per KV head, {len(types)} head types; need at "
            f"most {MAX_HEAD_SIZE}, {MAX_GROUP} and {MAX_TYPES}"
        )
    if any(x.stride(2) != 1 for x in (q, k, v, out)):
        raise ValueError("q, k, v, out: the numbers of a head must lie next to each other")
