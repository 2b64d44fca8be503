"""Choosing victims on a GPU, in Triton: one launch per step for all layers and all head types that score.

The rule is `select.select_victims`'s. The launch is the same at every step, so that a CUDA graph can hold
it; programs whose row is not at a line's end leave at once.

A slot's place in the order is the number of slots with a smaller key, where the key is the pair (score,
token) as one integer: no sort, no atomics, the same answer whatever the order of execution. That takes
capacity squared comparisons once a line: 13 thousand for a fifth of a 576-token picture, and half a
million for a sixth of 4,160 tokens, about ten microseconds of one multiprocessor.

The keys of a head are written to scratch memory first, and the score is refined on the way; its neighbours
in the raster row are found by the same comparison of every slot with every other. All arithmetic is that of
`select`, but the norm of a value vector is a sum in another order: it may differ in its last bit.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from vllm_kvcompress.attention import select as torch_select
from vllm_kvcompress.attention.pages import HeadType, Plan
from vllm_kvcompress.attention.triton_decode import Launch
from vllm_kvcompress.attention.triton_kinds import (
    SMOOTH_ROW,
    VALUE_NORM,
    of_row,
    packed,
    pick,
    sized,
)
from vllm_kvcompress.policy.rule import HeadRule

__all__ = ["launch", "native", "select_all", "select_victims"]

HEADS = 8  # cache heads that one program takes in turn: most programs only find that nothing is due
STAYS = tl.constexpr(0x7FFFFFFFFFFFFFFF)  # the key of a slot that must not go
BLOCK = tl.constexpr(128)  # slots at a time, and those that they are compared with
AGAINST = tl.constexpr(8)


@triton.jit
def _ordered(bits):
    """The bits of floats as integers in the floats' order, and back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _key(score, token):
    """int64, ascending in (score, token)."""
    bits = (score + 0.0).to(tl.int32, bitcast=True)  # + 0.0: -0.0 and 0.0 are equals
    return (_ordered(bits).to(tl.int64) << 16) | token.to(tl.int64)


@triton.jit
def _unless_kept(key, token, n, drawn):
    """The key, or STAYS for anchors and recent tokens."""
    stays = (token < n.anchors) | (token >= drawn - n.recent)
    return tl.where(stays, STAYS, key)


@triton.jit
def _gather(
    kind, n, head, table, before, resident, drawn, keys,
    ALIGN: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Write the keys of image slots, [resident] int64, with the score weighted by the norm of V.

    Where neighbours are to be looked up, anchors and recent tokens keep their score in them.
    """
    side = head * n.side_head
    dim = tl.arange(0, WIDTH)
    for start in range(0, resident, TILE):
        slot = start + tl.arange(0, TILE)
        use = slot < resident
        number = ((before + slot + 0.5) * kind.per_slot).to(tl.int32)
        place = before + slot - number * n.page
        block = tl.load(table + number, mask=use, other=0).to(tl.int64)
        score_at = block * n.score_block + (n.score_at + side + place)
        score = tl.load(kind.score + score_at, mask=use, other=0.0)
        token_at = block * n.index_block + (n.token_at + side + place)
        token = tl.load(kind.token + token_at, mask=use, other=0).to(tl.int32)
        if (n.flags & VALUE_NORM) != 0:
            pages = kind.kv + (n.kv_head * ALIGN).to(tl.int64) * head
            cell = pages + (block * (n.kv_block * ALIGN) + place * (2 * DIM) + DIM)
            mask = use[:, None] & (dim < DIM)[None, :]
            value = tl.load(cell[:, None] + dim[None, :], mask=mask, other=0.0).to(tl.float32)
            score = score * tl.sqrt_rn(tl.sum(value * value, 1))
        key = _key(score, token)
        if (n.flags & SMOOTH_ROW) == 0:
            key = _unless_kept(key, token, n, drawn)
        tl.store(keys + slot, key, mask=use)


@triton.jit
def _score_at(keys, slot, use):
    """The scores in the keys of some slots; 0 where not used."""
    key = tl.load(keys + slot, mask=use, other=0)
    return _ordered((key >> 16).to(tl.int32)).to(tl.float32, bitcast=True)


@triton.jit
def _smooth(n, resident, drawn, keys, to):
    """Keys with the mean of each score and its neighbours' in the raster row, where resident."""
    for start in range(0, resident, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        use = slot < resident
        token = (tl.load(keys + slot, mask=use, other=0) & 0xFFFF).to(tl.int32)
        column = token % n.line
        before, after = tl.where(column > 0, token - 1, -1), tl.where(column < n.line - 1, token + 1, -1)
        found = tl.full([AGAINST, BLOCK], 0, tl.int32)  # a neighbour's slot, from 1: left low, right high
        for other in range(0, resident, AGAINST):
            at = other + tl.arange(0, AGAINST)
            theirs = (tl.load(keys + at, mask=at < resident, other=0xFFFF) & 0xFFFF).to(tl.int32)
            found += tl.where(theirs[:, None] == before[None, :], (at + 1)[:, None], 0)
            found += tl.where(theirs[:, None] == after[None, :], ((at + 1) << 16)[:, None], 0)
        both = tl.sum(found, 0)
        left, right = both & 0xFFFF, (both >> 16) & 0xFFFF
        total = _score_at(keys, slot, use) + _score_at(keys, left - 1, left > 0)
        total += _score_at(keys, right - 1, right > 0)
        count = 1 + (left > 0).to(tl.int32) + (right > 0).to(tl.int32)
        mean = tl.div_rn(total, count.to(tl.float32))
        tl.store(to + slot, _unless_kept(_key(mean, token), token, n, drawn), mask=use)


@triton.jit
def _rank(kind, n, head, table, resident, due, keys):
    """Write the slots of the ``due`` smallest keys to the places of their victims."""
    for start in range(0, resident, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        mine = tl.load(keys + slot, mask=slot < resident, other=STAYS)
        lower = tl.full([AGAINST, BLOCK], 0, tl.int32)
        for other in range(0, resident, AGAINST):
            at = other + tl.arange(0, AGAINST)
            key = tl.load(keys + at, mask=at < resident, other=STAYS)
            lower += (key[:, None] < mine[None, :]).to(tl.int32)
        turn = tl.sum(lower, 0)
        goes = (mine < STAYS) & (turn < due)
        number = ((turn + 0.5) * kind.per_slot).to(tl.int32)
        block = tl.load(table + number, mask=goes, other=0).to(tl.int64)
        place = head * n.side_head + (turn - number * n.page)
        to = block * n.index_block + (n.victim_at + place)
        tl.store(kind.victim + to, slot.to(tl.int16), mask=goes)


@triton.jit
def _fade(kind, n, head, table, before, resident):
    """Multiply the scores by the decay."""
    for start in range(0, resident, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        use = slot < resident
        number = ((before + slot + 0.5) * kind.per_slot).to(tl.int32)
        block = tl.load(table + number, mask=use, other=0).to(tl.int64)
        place = head * n.side_head + (before + slot - number * n.page)
        to = kind.score + (block * n.score_block + (n.score_at + place))
        score = tl.load(to, mask=use & (kind.decay > 0), other=0.0)  # 0, whatever the score was
        tl.store(to, score * kind.decay, mask=use)


@triton.jit(do_not_specialize=("scratch_row", "prefix", "length", "size"))
def _select(
    kinds, scratch, prefix, length, size, scratch_row,
    TYPES: tl.constexpr, HEADS: tl.constexpr, ALIGN: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    TILE: tl.constexpr, SIZED: tl.constexpr,
):  # fmt: skip
    """Grid: groups of HEADS cache heads of all types, rows."""
    row = tl.program_id(1)
    before, tokens = tl.load(prefix + row), tl.load(length + row)
    kind, n, group = pick(kinds, tl.program_id(0), HEADS, TYPES)
    n = of_row(kind, n, size, row, SIZED)
    drawn = tokens - before
    if (tokens > 0) & (drawn > 0) & (drawn % n.line == 0) & (n.capacity < n.image):
        table = kind.table + row.to(tl.int64) * n.table_row
        due = tl.minimum(n.line, n.image - drawn) - tl.maximum(n.capacity - drawn, 0)
        resident = tl.minimum(drawn, n.capacity)
        smooth = (n.flags & SMOOTH_ROW) != 0
        keys = scratch + row.to(tl.int64) * scratch_row
        keys += n.scratch + group * tl.where(smooth, 2 * n.capacity, n.capacity)
        first = group * HEADS
        for head in range(first, tl.minimum(first + HEADS, n.heads)):
            if due > 0:
                tl.debug_barrier()  # every thread is done with the keys of the head before
                _gather(kind, n, head, table, before, resident, drawn, keys, ALIGN, DIM, WIDTH, TILE)
                tl.debug_barrier()  # keys are written by one thread and read by others
                ranked = keys
                if smooth:
                    ranked = keys + n.capacity
                    _smooth(n, resident, drawn, keys, ranked)
                    tl.debug_barrier()
                _rank(kind, n, head, table, resident, due, ranked)
            if kind.decay < 1:  # the scores have all been read, before a barrier
                _fade(kind, n, head, table, before, resident)


def native(rule: HeadRule) -> bool:
    """Whether the kernel knows the rule, or torch does its work."""
    return not rule.stratify


def launch(types: Sequence[HeadType], plan: Plan) -> Launch:
    """The launch that `select_all` makes for head types that score and are `native`.

    Scratch memory is allocated here: an int64 for every slot of one head of each program, two where rows
    are smoothed.
    """

    def programs(kind: HeadType) -> int:
        return triton.cdiv(kind.pages.kv.shape[1], HEADS)

    kinds, align, kept = packed(
        types, lambda kind: programs(kind) * kind.capacity * (1 + kind.rule.smooth_row)
    )
    groups, pages, rows = sum(map(programs, types)), types[0].pages, len(plan.length)
    width = max(16, triton.next_power_of_2(pages.head_size))
    # In the tile of values, 16 numbers a thread. Without fusing, scores are torch's to the last bit.
    constants = {
        "TYPES": len(kinds), "HEADS": HEADS, "ALIGN": align, "DIM": pages.head_size, "WIDTH": width,
        "TILE": max(16, 2048 // width), "num_warps": 4, "enable_fp_fusion": False,
        **sized(plan.size),
    }  # fmt: skip
    scratch = torch.empty(rows * kept, dtype=torch.int64, device=pages.kv.device)
    size = plan.prefix if plan.size is None else plan.size
    return Launch((groups, rows), (kinds, scratch, plan.prefix, plan.length, size, kept), constants)


def select_all(types: Sequence[HeadType], plan: Plan) -> None:
    """Choose the victims of every row whose line has just ended; once per step, after the last layer.

    As `select.select_victims` for each of the head types, which also does the work of rules that choose
    within columns: it reads on the host which rows are due, so a CUDA graph can't hold them. Types that
    score, to `MAX_TYPES` of one head size and dtype, are one launch.
    """
    scoring = [kind for kind in types if kind.scores and kind.pages.kv.shape[1]]
    here = [kind for kind in scoring if native(kind.rule)]
    for kind in scoring:
        if not native(kind.rule):
            torch_select.select_victims(kind, plan)
    if here and len(plan.length):
        grid, args, constants = launch(here, plan)
        _select[grid](*args, **constants)


def select_victims(type_all_layers: HeadType, plan: Plan) -> None:
    """`select_all` for one head type."""
    select_all([type_all_layers], plan)
