"""Choosing victims on a GPU, in Triton: one launch per step for all layers and all head types that score.

The rule is `select.select_victims`'s. The launch is the same at every step, so that a CUDA graph can hold
it; programs whose row is not at a line's end leave at once.

A slot's place in the order is the number of slots with a smaller key, where the key is the pair (score,
token) as one integer: no sort, no atomics, the same answer whatever the order of execution. That takes
capacity squared comparisons once a line: 13 thousand for a fifth of a 576-token picture, and half a
million for a sixth of 4,160 tokens, about ten microseconds of one multiprocessor.
"""

from collections.abc import Sequence

import triton
import triton.language as tl

from vllm_kvcompress.attention import select as torch_select
from vllm_kvcompress.attention.pages import HeadType, Plan
from vllm_kvcompress.attention.triton_decode import KindArgs, Launch, kind_args

__all__ = ["launch", "native", "select_all", "select_victims"]

HEADS = 8  # cache heads that one program takes in turn: most programs only find that nothing is due


@triton.jit
def _keys(kind, head, table, prefix, slot, resident, drawn, PAGE: tl.constexpr):
    """int64 keys of image slots: ascending in (score, token); the largest number where it must stay."""
    use = slot < resident
    logical = prefix + slot
    block = tl.load(table + logical // PAGE, mask=use, other=0).to(tl.int64)
    place = logical % PAGE
    score_at = block * kind.score_block + head * kind.score_head + place
    token_at = block * kind.token_block + head * kind.token_head + place
    score = tl.load(kind.score + score_at, mask=use, other=0.0)
    token = tl.load(kind.token + token_at, mask=use, other=0).to(tl.int32)
    bits = (score + 0.0).to(tl.int32, bitcast=True)  # + 0.0: -0.0 and 0.0 are equals
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # integers in the order of the floats
    stays = (slot >= resident) | (token < kind.anchors) | (token >= drawn - kind.recent)
    key = (bits.to(tl.int64) << 16) | token.to(tl.int64)
    return tl.where(stays, 0x7FFFFFFFFFFFFFFF, key)


@triton.jit
def _heads(
    kind, group, prefix, length, PAGE: tl.constexpr, DECAY: tl.constexpr, HEADS: tl.constexpr
):  # fmt: skip
    """Victims of HEADS cache heads of one row of one head type."""
    BLOCK: tl.constexpr = 128
    AGAINST: tl.constexpr = 16
    row = tl.program_id(1)
    before, tokens = tl.load(prefix + row), tl.load(length + row)
    drawn = tokens - before
    if (tokens > 0) & (drawn > 0) & (drawn % kind.line == 0):
        table = kind.table + row.to(tl.int64) * kind.table_row
        due = tl.minimum(kind.line, kind.image - drawn) - tl.maximum(kind.capacity - drawn, 0)
        resident = tl.minimum(drawn, kind.capacity)
        first = group * HEADS
        for head in range(first, tl.minimum(first + HEADS, kind.heads)):
            if due > 0:
                for start in range(0, resident, BLOCK):
                    slot = start + tl.arange(0, BLOCK)
                    mine = _keys(kind, head, table, before, slot, resident, drawn, PAGE)
                    lower = tl.zeros([AGAINST, BLOCK], tl.int32)
                    for other in range(0, resident, AGAINST):
                        at = other + tl.arange(0, AGAINST)
                        key = _keys(kind, head, table, before, at, resident, drawn, PAGE)
                        lower += (key[:, None] < mine[None, :]).to(tl.int32)
                    turn = tl.sum(lower, 0)
                    goes = (mine < 0x7FFFFFFFFFFFFFFF) & (turn < due)
                    block = tl.load(table + turn // PAGE, mask=goes, other=0).to(tl.int64)
                    to = block * kind.victim_block + head * kind.victim_head + turn % PAGE
                    tl.store(kind.victim + to, slot.to(tl.int16), mask=goes)
            if DECAY < 1:
                tl.debug_barrier()  # every thread has read the scores
                for start in range(0, resident, BLOCK):
                    slot = start + tl.arange(0, BLOCK)
                    logical = before + slot
                    block = tl.load(table + logical // PAGE, mask=slot < resident, other=0).to(tl.int64)
                    to = block * kind.score_block + head * kind.score_head + logical % PAGE
                    left = tl.zeros([BLOCK], tl.float32)
                    if DECAY > 0:
                        left = tl.load(kind.score + to, mask=slot < resident, other=0.0) * DECAY
                    tl.store(kind.score + to, left, mask=slot < resident)


@triton.jit
def _select(
    one, two, prefix, length,
    TYPES: tl.constexpr, PAGE_1: tl.constexpr, DECAY_1: tl.constexpr, PAGE_2: tl.constexpr,
    DECAY_2: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Grid: groups of HEADS cache heads of both types, rows."""
    group, ours = tl.program_id(0), tl.cdiv(one.heads, HEADS)
    if group < ours:
        _heads(one, group, prefix, length, PAGE_1, DECAY_1, HEADS)
    elif TYPES == 2:  # otherwise not compiled
        _heads(two, group - ours, prefix, length, PAGE_2, DECAY_2, HEADS)


def native(type_all_layers: HeadType) -> bool:
    """Whether the kernel knows this type's rule, or torch does its work."""
    rule = type_all_layers.rule
    return not (rule.value_norm or rule.smooth_row or rule.stratify)


def launch(types: Sequence[HeadType], plan: Plan) -> Launch:
    """The launch that `select_all` makes for one or two head types that score and are `native`."""
    kinds: list[KindArgs] = [kind_args(kind) for kind in types]
    constants: dict[str, float] = {"TYPES": len(types), "HEADS": HEADS, "num_warps": 4}
    for n, kind in enumerate((types[0], types[-1]), 1):
        constants |= {f"PAGE_{n}": kind.pages.page, f"DECAY_{n}": kind.rule.decay}
    groups = sum(triton.cdiv(kind.heads, HEADS) for kind in kinds)
    return Launch((groups, len(plan.length)), (kinds[0], kinds[-1], plan.prefix, plan.length), constants)


def select_all(types: Sequence[HeadType], plan: Plan) -> None:
    """Choose the victims of every row whose line has just ended; once per step, after the last layer.

    As `select.select_victims` for each of the head types, which also does the work of rules that refine
    their score: those look up neighbours or columns, and read on the host which rows are due, so a CUDA
    graph can't hold them.
    """
    scoring = [kind for kind in types if kind.rule.scores]
    here = [kind for kind in scoring if native(kind)]
    for kind in scoring:
        if not native(kind):
            torch_select.select_victims(kind, plan)
    for pair in (here[n : n + 2] for n in range(0, len(here), 2)):
        if len(plan.length):
            grid, args, constants = launch(pair, plan)
            _select[grid](*args, **constants)


def select_victims(type_all_layers: HeadType, plan: Plan) -> None:
    """`select_all` for one head type."""
    select_all([type_all_layers], plan)
