"""Choosing victims at a line's end (docs/design.md, "The method", points 3, 5 and 6), in plain torch.

Where two implementations must choose alike, the arithmetic is part of the rule: all of it is float32,
a weighted score is ``score * norm``, a smoothed one ``((own + left) + right) / count``, and the order is
(rank within the column if stratified, score, token).
"""

import torch
from torch import Tensor

from vllm_kvcompress.attention.pages import HeadType, Plan, locate
from vllm_kvcompress.policy.rule import HeadRule


def select_victims(type_all_layers: HeadType, plan: Plan) -> None:
    """Choose the victims of every row whose line has just ended; once per step, after the last layer.

    Every cache head chooses for itself, lowest score first, the older token first among equals, among
    the resident slots that hold neither an anchor nor a recent token. Scores are then
    multiplied by `HeadRule.decay`, whether or not victims were due. A second call for the same step would
    choose by those: rows that `prefill` has taken to a line's end must come as padding rows.

    Parameters
    ----------
    type_all_layers : HeadType
        One head type, pages of any number of layers; ``victim`` and ``score`` are written.
    plan : Plan
        The plan of the step that has just run.
    """
    if plan.size is not None:
        for size, which, mine in plan.by_size():
            select_victims(type_all_layers.of(size, which), mine)
        return
    kind, rule, pages = type_all_layers, type_all_layers.rule, type_all_layers.pages
    if not rule.scores:
        return
    every = plan.length.long() - plan.prefix.long()
    rows = ((plan.length > 0) & (every > 0) & (every % rule.line == 0)).nonzero().flatten()
    if not len(rows):
        return
    drawn, prefix, table = every[rows, None], plan.prefix[rows, None].long(), kind.block_table[rows]
    slot = torch.arange(rule.capacity, device=rows.device)
    resident = slot < drawn
    block, place = locate(table, prefix + slot, pages.page, resident)
    nth = torch.arange(rule.line, device=rows.device)
    due = (rule.image - drawn).clamp(max=rule.line) - (rule.capacity - drawn).clamp(min=0)
    row, turn = (nth < due).nonzero(as_tuple=True)
    if len(row):
        token = pages.token[block, :, place].long().transpose(1, 2)  # [rows, heads, slots]
        here = resident[:, None]
        score = pages.score[block, :, place].transpose(1, 2)
        if rule.value_norm:
            value = pages.kv[block, :, place][..., pages.head_size :]
            score = score * value.float().norm(dim=-1).transpose(1, 2)
        if rule.smooth_row:
            score = smooth_row(score.masked_fill(~here, 0), token, here, rule)
        kept = ~here | (token < rule.anchors) | (token >= drawn[:, :, None] - rule.recent)
        order = victim_order(score, token, kept, rule)
        at, offset = locate(table, nth.expand(len(rows), -1), pages.page, nth < due)
        pages.victim[at[row, turn], :, offset[row, turn]] = order[row, :, turn].to(torch.int16)
    if rule.decay < 1:
        row, turn = resident.nonzero(as_tuple=True)
        at, offset = block[row, turn], place[row, turn]
        pages.score[at, :, offset] = pages.score[at, :, offset] * rule.decay if rule.decay else 0.0


def victim_order(score: Tensor, token: Tensor, kept: Tensor, rule: HeadRule) -> Tensor:
    """Slots in the order in which they go.

    Parameters
    ----------
    score : Tensor
        [rows, heads, slots] float32.
    token : Tensor
        [rows, heads, slots] int64 indices of image tokens.
    kept : Tensor
        [rows, heads, slots] bool: slots that must not go; they come last.
    rule : HeadRule
        Its ``stratify`` and ``line`` matter here.

    Returns
    -------
    Tensor
        [rows, heads, slots] int64 permutation.
    """
    if not rule.stratify:
        return _lexsort(token, score, kept)
    column = (token % rule.line).masked_fill(kept, rule.line)
    order = _lexsort(token, score, column)
    ordered = column.gather(-1, order)
    index = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    starts = torch.ones_like(ordered, dtype=torch.bool)
    starts[..., 1:] = ordered[..., 1:] != ordered[..., :-1]
    rank = index - index.masked_fill(~starts, 0).cummax(-1).values
    return _lexsort(token, score, torch.zeros_like(rank).scatter(-1, order, rank), kept)


def smooth_row(score: Tensor, token: Tensor, resident: Tensor, rule: HeadRule) -> Tensor:
    """Mean of each score and those of its left and right neighbours in the raster row, where resident.

    Parameters
    ----------
    score : Tensor
        [rows, heads, slots] float32, zero where not resident.
    token : Tensor
        [rows, heads, slots] int64 indices of image tokens.
    resident : Tensor
        Bool, broadcasts to [rows, heads, slots].
    rule : HeadRule
        Its ``line`` and ``image`` matter here.
    """
    # The grid gets an empty column on either side; slots without a token share cell 0, which stays empty.
    width = rule.line + 2
    cell = (token // rule.line * width + token % rule.line + 1).masked_fill(~resident, 0)
    empty = score.new_zeros(*score.shape[:2], rule.image // rule.line * width)
    value = empty.scatter(-1, cell, score)
    count = empty.scatter(-1, cell, resident.to(score.dtype).expand_as(score))
    left, right = (cell - 1).clamp(min=0), cell + 1
    total = (score + value.gather(-1, left)) + value.gather(-1, right)
    return total / (1 + count.gather(-1, left) + count.gather(-1, right))


def _lexsort(*keys: Tensor) -> Tensor:
    """Argsort of the last axis by several keys, the last one first; stable."""
    order = keys[0].argsort(dim=-1, stable=True)
    for key in keys[1:]:
        order = order.gather(-1, key.gather(-1, order).argsort(dim=-1, stable=True))
    return order
