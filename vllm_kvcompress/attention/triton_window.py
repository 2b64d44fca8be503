"""A step of windows on a GPU, in Triton: one launch a layer to attend, and one a layer to keep what stands.

Arguments as in `window`. A program is one cache head of one row. The queries of all places are the rows of
one matrix product, so K and V are read once for up to 16 of them. Logits, and each query's maximum and sum,
stay in scratch memory until it is known which queries count; pages are written by `commit` alone.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_kvcompress.attention.pages import HeadType
from vllm_kvcompress.attention.triton_attend import LOW, product, to_cache
from vllm_kvcompress.attention.triton_decode import (
    LOG2E,
    Launch,
    aligned,
    check_inputs,
    first_seen,
    longest_first,
)
from vllm_kvcompress.attention.triton_kinds import RING, SCORES, of_row, pick, sized
from vllm_kvcompress.attention.triton_room import PLACES, Held, Room, kinds_of, scratch
from vllm_kvcompress.attention.window import WindowPlan

__all__ = ["commit", "launch_commit", "launch_verify", "verify"]

NEVER = tl.constexpr(1 << 20)  # a place that no window has


@triton.jit
def _taken(kind, n, table, head, prefix, token, count, PLACES: tl.constexpr):
    """[PLACES] logical slots that the places' tokens take; -1 past the line's end and the window's."""
    nth = tl.arange(0, PLACES)
    t = token + nth
    inside = (nth < n.line - token % n.line) & (nth < count)
    full = t >= n.capacity
    slot = t
    if (n.flags & RING) != 0:
        turn = tl.maximum(n.capacity - n.anchors, 1)
        slot = tl.where(full, n.anchors + (t - n.anchors) % turn, t)
    elif (n.flags & SCORES) != 0:
        start = token - token % n.line
        order = t - start - tl.maximum(n.capacity - start, 0)
        number = ((order + 0.5) * kind.per_slot).to(tl.int32)
        known = inside & full
        block = tl.load(table + number, mask=known, other=0).to(tl.int64)
        at = block * n.index_block + (n.victim_at + head * n.side_head + order - number * n.page)
        slot = tl.where(full, tl.load(kind.victim + at, mask=known, other=0).to(tl.int32), t)
    return tl.where(inside, prefix + slot, -1)


@triton.jit
def _program(
    kinds, row, prefix, length, size, count, TYPES: tl.constexpr, PLACES: tl.constexpr, SIZED: tl.constexpr
):
    """A program's cache head and row: its type, numbers, place in the type and on k's head axis, block table,
    the row's prefix, its first place's token, slots in use before that, and `_taken` of ``count`` places."""
    prefix, length = tl.load(prefix + row), tl.load(length + row)
    kind, n, head = pick(kinds, tl.program_id(0), 1, TYPES)
    n = of_row(kind, n, size, row, SIZED)
    place = tl.load(kind.head_index + head)
    table = kind.table + row.to(tl.int64) * n.table_row
    token = length - 1 - prefix
    held = prefix + tl.minimum(token, n.capacity)
    taken = _taken(kind, n, table, head, prefix, token, count, PLACES)
    return kind, n, head, place, table, prefix, token, held, taken


@triton.jit(do_not_specialize=("scratch_row", "tops_row"))
def _verify(
    kinds, q, k, v, out, logits, tops, starts, counts, prefix, length, begins, size,
    q_row, q_head, k_row, k_head, v_row, v_head, out_row, out_head, scratch_row, tops_row, scale,
    TYPES: tl.constexpr, ALIGN: tl.constexpr, GROUP: tl.constexpr, SPREAD: tl.constexpr, DIM: tl.constexpr,
    WIDTH: tl.constexpr, PLACES: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
    ALIGNED: tl.constexpr, SIZED: tl.constexpr,
):  # fmt: skip
    """Grid: cache heads of all types, rows. SPREAD: query heads of a group, padded to a power of two.
    ALIGNED, SIZED: as in ``triton_decode``."""
    LANES: tl.constexpr = PLACES * SPREAD
    row = tl.program_id(1)
    first, count = tl.load(starts + row).to(tl.int64), tl.load(counts + row)
    kind, n, head, place, table, prefix, _, held, taken = _program(
        kinds, row, prefix, length, size, count, TYPES, PLACES, SIZED
    )
    row = row.to(tl.int64)

    lane, own, dim = tl.arange(0, LANES), tl.arange(0, PLACES), tl.arange(0, WIDTH)
    nth, member = lane // SPREAD, lane % SPREAD
    real = (nth < count) & (member < GROUP)
    inside = (dim < DIM)[None, :]
    at = (first + nth)[:, None] * q_row + (place * GROUP + member)[:, None] * q_head + dim[None, :]
    query = tl.load(q + at, mask=real[:, None] & inside, other=0.0)
    mine = (own < count)[:, None] & inside
    at = (first + own)[:, None] * k_row + place * k_head + dim[None, :]
    key = to_cache(tl.load(k + at, mask=mine, other=0.0), kind.kv.dtype.element_ty).to(query.dtype)
    at = (first + own)[:, None] * v_row + place * v_head + dim[None, :]
    value = to_cache(tl.load(v + at, mask=mine, other=0.0), kind.kv.dtype.element_ty).to(query.dtype)

    # The window's own tokens first: every query sees at least the first of them, so none starts at LOW.
    logit = product(query, tl.trans(key), tl.zeros([LANES, PLACES], tl.float32)) * scale
    logit = tl.where((own[None, :] <= nth[:, None]) & (own < count)[None, :], logit, LOW)
    scores = (n.flags & SCORES) != 0
    width = n.capacity + PLACES
    base = logits + (row * scratch_row + (n.scratch + head * width)) * (PLACES * GROUP)
    line_at = base + (nth * GROUP + member)[:, None] * width
    if scores:
        tl.store(line_at + n.capacity + own[None, :], logit, mask=real[:, None])
    top = tl.max(logit, 1)
    weight = tl.exp2(logit - top[:, None])
    total = tl.sum(weight, 1)
    mixed = tl.zeros([LANES, WIDTH], tl.float32)
    coarse = weight.to(value.dtype)
    mixed = product(coarse, value, mixed)
    if value.dtype != tl.float32:
        mixed = product((weight - coarse.to(tl.float32)).to(value.dtype), value, mixed)

    pages = kind.kv + head.to(tl.int64) * (n.kv_head * ALIGN)
    kv_block = n.kv_block * ALIGN
    slots = tl.arange(0, BLOCK)
    for start in tl.range(first_seen(begins, row, place, ALIGNED), held, BLOCK, num_stages=STAGES):
        slot = start + slots
        use = slot < held
        number = ((slot + 0.5) * kind.per_slot).to(tl.int32)
        block = tl.load(table + number, mask=use, other=0)
        cell = pages + (block.to(tl.int64) * kv_block + (slot - number * n.page) * (2 * DIM))
        here, mask = cell[:, None] + dim[None, :], use[:, None] & inside
        old_key = tl.load(here, mask=mask, other=0.0).to(query.dtype)
        old_value = tl.load(here + DIM, mask=mask, other=0.0).to(query.dtype)
        # A slot is seen until a token of the window lands in it.
        until = tl.min(tl.where(taken[:, None] == slot[None, :], own[:, None], NEVER), 0)
        seen = use[None, :] & (nth[:, None] < until[None, :])
        old = product(query, tl.trans(old_key), tl.zeros([LANES, BLOCK], tl.float32)) * scale
        old = tl.where(seen, old, LOW)
        if scores:
            kept = (use & (slot >= prefix))[None, :] & real[:, None]
            tl.store(line_at + (slot - prefix)[None, :], old, mask=kept)
        higher = tl.maximum(top, tl.max(old, 1))
        fade = tl.exp2(top - higher)
        share = tl.exp2(old - higher[:, None])
        total = total * fade + tl.sum(share, 1)
        rough = share.to(old_value.dtype)
        mixed = product(rough, old_value, mixed * fade[:, None])
        if old_value.dtype != tl.float32:
            mixed = product((share - rough.to(tl.float32)).to(old_value.dtype), old_value, mixed)
        top = higher
    at = (first + nth)[:, None] * out_row + (place * GROUP + member)[:, None] * out_head + dim[None, :]
    tl.store(out + at, (mixed / total[:, None]).to(out.dtype.element_ty), mask=real[:, None] & inside)
    ends = tops + (row * tops_row + place) * (2 * PLACES * GROUP) + 2 * (nth * GROUP + member)
    tl.store(ends, top, mask=real)
    tl.store(ends + 1, total, mask=real)


@triton.jit
def _mass(from_, ends, use, GROUP: tl.constexpr, width):
    """Attention that the queries of one place, GROUP lines of ``width`` logits, gave to some slots."""
    mass = tl.where(use, 0.0, 0.0)
    for member in tl.static_range(GROUP):
        logit = tl.load(from_ + member * width, mask=use, other=LOW)
        top, total = tl.load(ends + 2 * member), tl.load(ends + 2 * member + 1)
        mass += tl.exp2(logit - top) / total
    return mass


@triton.jit(do_not_specialize=("scratch_row", "tops_row"))
def _commit(
    kinds, k, v, logits, tops, starts, standing, prefix, length, size,
    k_row, k_head, v_row, v_head, scratch_row, tops_row,
    TYPES: tl.constexpr, ALIGN: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    PLACES: tl.constexpr, TILE: tl.constexpr, SIZED: tl.constexpr,
):  # fmt: skip
    """Grid: cache heads of all types, rows. Keeps the first ``standing`` places, as drawing one by one."""
    row = tl.program_id(1)
    first, stands = tl.load(starts + row).to(tl.int64), tl.load(standing + row).to(tl.int32)
    kind, n, head, place, table, prefix, token, held, taken = _program(
        kinds, row, prefix, length, size, stands, TYPES, PLACES, SIZED
    )
    row = row.to(tl.int64)
    own, dim = tl.arange(0, PLACES), tl.arange(0, WIDTH)
    lands = taken >= 0
    number = ((taken + 0.5) * kind.per_slot).to(tl.int32)
    block = tl.load(table + number, mask=lands, other=0).to(tl.int64)
    inside = taken - number * n.page
    if (n.flags & SCORES) != 0:
        width = n.capacity + PLACES
        base = logits + (row * scratch_row + (n.scratch + head * width)) * (PLACES * GROUP)
        ends = tops + (row * tops_row + place) * (2 * PLACES * GROUP)
        score = kind.score + (n.score_at + head * n.side_head)
        for start in tl.range(prefix, held, TILE):
            slot = start + tl.arange(0, TILE)
            use = slot < held
            page_of = ((slot + 0.5) * kind.per_slot).to(tl.int32)
            page = tl.load(table + page_of, mask=use, other=0).to(tl.int64)
            at = score + (page * n.score_block + (slot - page_of * n.page))
            mass = tl.load(at, mask=use, other=0.0)
            for nth in tl.range(0, stands):  # one query after the other, as they would have come
                mass += _mass(
                    base + nth * GROUP * width + (slot - prefix), ends + 2 * nth * GROUP, use, GROUP, width
                )
            tl.store(at, mass, mask=use)
        mass = tl.zeros([PLACES], tl.float32)
        for nth in tl.range(0, stands):
            from_ = base + nth * GROUP * width + n.capacity + own
            mass += _mass(from_, ends + 2 * nth * GROUP, own <= nth, GROUP, width)
        tl.debug_barrier()  # a slot that a token lands in has just been written by another thread
        tl.store(score + block * n.score_block + inside, mass, mask=lands)
        held_token = kind.token + (n.token_at + head * n.side_head + block * n.index_block + inside)
        tl.store(held_token, (token + own).to(tl.int16), mask=lands)
    mask = lands[:, None] & (dim < DIM)[None, :]
    key = tl.load(k + (first + own)[:, None] * k_row + place * k_head + dim[None, :], mask=mask, other=0.0)
    value = tl.load(v + (first + own)[:, None] * v_row + place * v_head + dim[None, :], mask=mask, other=0.0)
    pages = kind.kv + head.to(tl.int64) * (n.kv_head * ALIGN)
    cell = pages + (block * (n.kv_block * ALIGN) + inside * (2 * DIM))
    at = cell[:, None] + dim[None, :]
    tl.store(at, to_cache(key, kind.kv.dtype.element_ty), mask=mask)
    tl.store(at + DIM, to_cache(value, kind.kv.dtype.element_ty), mask=mask)


def launch_verify(
    q: Tensor, k: Tensor, v: Tensor, types: Sequence[HeadType], plan: WindowPlan, scale: float, out: Tensor,
    room: Room | None = None,
) -> tuple[Launch, Held]:  # fmt: skip
    """`verify`'s launch, and what it leaves; scratch is allocated here, if no room is given.

    Raises ValueError for what the kernel can't do.
    """
    types = longest_first(types)
    group, dim = q.shape[1] // k.shape[1], q.shape[2]
    check_inputs(q, k, v, types, out, group)
    kinds, align, kept = kinds_of(types)
    rows = len(plan.rows)
    if room is None:
        room = Room(k, v, *scratch(rows, kept, k, group), group)
    else:
        k, v = room.k[: len(k)].copy_(k), room.v[: len(v)].copy_(v)
    width = max(16, triton.next_power_of_2(dim))
    one = group == 1
    block = max(16, 8192 // (width * q.element_size() * (1 if one else 2)))
    constants = {
        "TYPES": len(kinds), "ALIGN": align, "GROUP": group, "SPREAD": triton.next_power_of_2(group),
        "DIM": dim, "WIDTH": width, "PLACES": PLACES, "BLOCK": block,
        "STAGES": 2, "num_warps": 4 if one else 8, **aligned(plan.begins, k), **sized(plan.size),
    }  # fmt: skip
    strides = [stride for x in (q, k, v, out) for stride in x.stride()[:2]]
    args = (
        kinds, q, k, v, out, room.logits, room.tops, *plan.on_device, plan.prefix,
        plan.length, *(plan.prefix if x is None else x for x in (plan.begins, plan.size)), *strides, kept,
        k.shape[1], scale * LOG2E,
    )  # fmt: skip
    launch = Launch((sum(len(kind.head_index) for kind in types), rows), args, constants)
    return launch, Held(types, plan, room)


def verify(
    q: Tensor, k: Tensor, v: Tensor, types: Sequence[HeadType], plan: WindowPlan, scale: float, out: Tensor,
    room: Room | None = None,
) -> Held:  # fmt: skip
    """As `window.verify`, for what `triton_decode.decode` takes; nothing is read on the host."""
    launch, held = launch_verify(q, k, v, types, plan, scale, out, room)
    _verify[launch.grid](*launch.args, **launch.constants)
    return held


def launch_commit(held: Held, standing: Tensor) -> Launch:
    """`commit`'s launch for one layer; ``standing`` [rows] on the device."""
    kinds, align, kept = kinds_of(held.types)
    plan, room = held.plan, held.room
    k, v, dim = room.k, room.v, room.k.shape[2]
    constants = {
        "TYPES": len(kinds), "ALIGN": align, "GROUP": room.group, "DIM": dim,
        "WIDTH": max(16, triton.next_power_of_2(dim)), "PLACES": PLACES, "TILE": 128, "num_warps": 4,
        **sized(plan.size),
    }  # fmt: skip
    args = (
        kinds, k, v, room.logits, room.tops, plan.on_device[0], standing, plan.prefix, plan.length,
        plan.prefix if plan.size is None else plan.size, *k.stride()[:2], *v.stride()[:2], kept, k.shape[1],
    )  # fmt: skip
    return Launch((sum(len(kind.head_index) for kind in held.types), len(plan.rows)), args, constants)


def commit(layers: Sequence[Held], standing: Sequence[int] | Tensor) -> None:
    """As `window.commit`; ``standing`` may be on the device."""
    if not layers:
        return
    on_device = torch.as_tensor(standing, device=layers[0].room.k.device)
    for held in layers:
        launch = launch_commit(held, on_device)
        _commit[launch.grid](*launch.args, **launch.constants)
