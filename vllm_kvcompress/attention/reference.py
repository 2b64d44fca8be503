"""The decode step in plain torch: what every other implementation is measured against.

docs/design.md, "The method", points 2 to 7. Vectorised over rows and heads, on any device.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_kvcompress.attention.pages import HeadType, Plan, begins_of, locate
from vllm_kvcompress.attention.select import select_victims

__all__ = ["decode", "select_all", "select_victims", "slot_of"]


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    types: Sequence[HeadType],
    plan: Plan,
    scale: float,
    out: Tensor,
) -> None:
    """Write one token per row into the cache of one layer, and attend to what is resident.

    Parameters
    ----------
    q : Tensor
        [rows, 2 * Hq, D]: branch b's query head h at ``b * Hq + h``.
    k, v : Tensor
        [rows, 2 * Hkv, D], keys after RoPE. Hq is a multiple of Hkv.
    types : Sequence[HeadType]
        The layer's head types; together they cover every cache head once.
    plan : Plan
        Prefix and length of each row.
    scale : float
        Factor of q . k before the softmax, which runs in float32.
    out : Tensor
        [rows, 2 * Hq, D], written; zeros in padding rows.
    """
    if plan.size is not None:
        out[plan.length == 0] = 0
        for size, rows, mine in plan.by_size():
            part = torch.empty_like(q[rows])
            decode(q[rows], k[rows], v[rows], [kind.of(size, rows) for kind in types], mine, scale, part)
            out[rows] = part
        return
    group = q.shape[1] // k.shape[1]
    out[plan.length == 0] = 0
    live = (plan.length > 0).nonzero().flatten()
    if not len(live):
        return
    cache_heads = k.shape[1]
    prefix, length = plan.prefix[live].long(), plan.length[live].long()
    q, k, v = q[live].unflatten(1, (-1, group)), k[live], v[live]
    out = out.unflatten(1, (-1, group))
    for kind in types:
        heads, table = kind.head_index.long(), kind.block_table[live]
        _write(k[:, heads], v[:, heads], kind, table, prefix, length)
        begin = None if plan.begins is None else begins_of(plan.begins[live], kind.head_index, cache_heads)
        got = _attend(q[:, heads], kind, table, prefix, length, begin, scale)
        out[live[:, None], heads] = got.to(out.dtype)


def select_all(types: Sequence[HeadType], plan: Plan) -> None:
    """Choose the victims of every head type; once per step, after the last layer."""
    for kind in types:
        select_victims(kind, plan)


def slot_of(kind: HeadType, table: Tensor, token: Tensor) -> Tensor:
    """Image slots that image tokens are written to.

    Parameters
    ----------
    kind : HeadType
        Its pages hold the victims that were chosen at the end of the line before.
    table : Tensor
        [n, max_blocks] block table of each token's row.
    token : Tensor
        [n] int64 indices of image tokens; negative for a prefix token, whose answer means nothing.

    Returns
    -------
    Tensor
        [n, heads] int64.
    """
    rule, pages = kind.rule, kind.pages
    heads = pages.kv.shape[1]
    if rule.ring:
        turn = rule.anchors + (token - rule.anchors) % max(1, rule.capacity - rule.anchors)
        return token.where(token < rule.capacity, turn)[:, None].expand(-1, heads)
    if not rule.evicts:
        return token[:, None].expand(-1, heads)
    start = token - token % rule.line
    nth = token - start - (rule.capacity - start).clamp(min=0)
    full = token >= rule.capacity
    block, place = locate(table, nth[:, None], pages.page, full[:, None])
    victim = pages.victim[block[:, 0], :, place[:, 0]].long()
    return torch.where(full[:, None], victim, token[:, None])


def _write(k: Tensor, v: Tensor, kind: HeadType, table: Tensor, prefix: Tensor, length: Tensor) -> None:
    pages = kind.pages
    token = length - 1 - prefix
    slot = prefix[:, None] + slot_of(kind, table, token)
    logical = torch.where(token[:, None] < 0, (length - 1)[:, None], slot)
    block, place = locate(table, logical, pages.page)
    head = torch.arange(logical.shape[1], device=logical.device)
    pages.kv[block, head, place] = torch.cat((k, v), -1).to(pages.kv.dtype)
    if kind.rule.scores:
        pages.token[block, head, place] = token.clamp(min=-1).to(torch.int16)[:, None]
        pages.score[block, head, place] = 0.0


def _attend(
    q: Tensor,
    kind: HeadType,
    table: Tensor,
    prefix: Tensor,
    length: Tensor,
    begin: Tensor | None,
    scale: float,
) -> Tensor:
    """[rows, heads, group, D] float32 outputs; adds the probabilities to the scores.

    ``begin`` is [rows, heads] int64, or None for zeros.
    """
    pages, rule = kind.pages, kind.rule
    visible = length.minimum(prefix + rule.capacity)
    logical = torch.arange(int(visible.max()), device=q.device).expand(len(q), -1)
    mask = logical < visible[:, None]
    block, place = locate(table, logical, pages.page, mask)
    seen = mask[:, None]  # [rows, heads or 1, slots]
    if begin is not None:
        seen = seen & (logical[:, None] >= begin.minimum(length[:, None] - 1)[:, :, None])
    key, value = pages.kv[block, :, place].float().chunk(2, -1)  # [rows, slots, heads, D]
    logits = torch.einsum("rhgd,rshd->rhgs", q.float(), key) * scale
    probability = logits.masked_fill(~seen[:, :, None], -torch.inf).softmax(-1)
    # An unused slot may hold anything, a NaN too, and 0 * NaN is NaN.
    value = value.masked_fill(~seen.transpose(1, 2)[..., None], 0)
    if rule.scores:
        row, slot = (mask & (logical >= prefix[:, None])).nonzero(as_tuple=True)
        pages.score[block[row, slot], :, place[row, slot]] += probability.sum(2)[row, :, slot]
    return torch.einsum("rhgs,rshd->rhgd", probability, value)
