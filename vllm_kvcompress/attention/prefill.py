"""Many tokens of a row at once: prompts, chunks of prompts, and replayed image tokens.

The prompt is plain causal attention over pages. Image tokens (docs/design.md, "The method", point 10)
are taken line by line through the same rule as in drawing: within a line every token's slot is known
beforehand, so a whole line is one masked attention, and the line's end chooses victims.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from vllm_kvcompress.attention.pages import HeadType, Plan, locate
from vllm_kvcompress.attention.reference import slot_of
from vllm_kvcompress.attention.select import select_victims


def prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    types: Sequence[HeadType],
    query_start: Sequence[int] | Tensor,
    plan_prefix: Tensor,
    plan_length: Tensor,
    scale: float,
    out: Tensor,
) -> None:
    """Write any number of tokens per row into the cache of one layer, and attend causally.

    Outputs, pages, scores and victims are those of drawing the same tokens one by one with `decode` and
    `select_victims`. Victims are chosen here, also when the chunk's last token ends a line: in this
    step's `select_victims` such a row must be a padding row.

    Parameters
    ----------
    q : Tensor
        [tokens, 2 * Hq, D], rows one after another, heads as in `decode`.
    k, v : Tensor
        [tokens, 2 * Hkv, D], keys after RoPE.
    types : Sequence[HeadType]
        The layer's head types.
    query_start : Sequence[int] or Tensor
        [rows + 1]: where each row's tokens start. Tokens after the last are padding.
    plan_prefix : Tensor
        [rows] prompt tokens of each row.
    plan_length : Tensor
        [rows] tokens of each row up to and including this chunk; 0 is a padding row.
    scale : float
        Factor of q . k before the softmax.
    out : Tensor
        [tokens, 2 * Hq, D], written; zeros for padding.
    """
    starts = [int(start) for start in query_start]
    q, out = (x.unflatten(1, (-1, q.shape[1] // k.shape[1])) for x in (q, out))
    out[starts[-1] :] = 0
    rows = zip(pairwise(starts), plan_prefix.tolist(), plan_length.tolist(), strict=True)
    for row, ((first, last), prefix, length) in enumerate(rows):
        if not length:
            out[first:last] = 0
            continue
        # Indexing heads copies, so each type works on its own slice and `out` is written here.
        mine = [replace(kind, block_table=kind.block_table[row : row + 1]) for kind in types]
        before = length - (last - first)
        at = first
        while at < last:
            position = before + at - first
            token = position - prefix
            line = types[0].rule.line
            end = min(last, at + (-token if token < 0 else line - token % line))
            for kind in mine:
                heads = kind.head_index.long()
                part = q[at:end, heads], k[at:end, heads], v[at:end, heads]
                if token < 0:
                    got = _prompt(*part, kind, position, scale)
                else:
                    got = _line(*part, kind, prefix, token, scale)
                out[at:end, heads] = got.to(out.dtype)
            at = end


def _prompt(q: Tensor, k: Tensor, v: Tensor, kind: HeadType, position: int, scale: float) -> Tensor:
    """Prompt tokens from ``position`` on: q [n, heads, group, D] against everything before them."""
    pages, count = kind.pages, len(q)
    slot = torch.arange(position + count, device=q.device)
    block, place = (x[0] for x in locate(kind.block_table, slot[None], pages.page))
    pages.kv[block[position:], :, place[position:]] = torch.cat((k, v), -1).to(pages.kv.dtype)
    pages.token[block[position:], :, place[position:]] = -1
    pages.score[block[position:], :, place[position:]] = 0.0
    key, value = pages.kv[block, :, place].to(q.dtype).transpose(0, 1).chunk(2, -1)  # [heads, slots, D]
    mask = torch.ones(count, position + count, dtype=torch.bool, device=q.device).tril(position)
    out = scaled_dot_product_attention(
        q.flatten(1, 2).transpose(0, 1)[None],
        key[None],
        value[None],
        attn_mask=mask if position else None,
        is_causal=not position,
        scale=scale,
        enable_gqa=True,
    )
    return out[0].transpose(0, 1).reshape(q.shape)


def _line(q: Tensor, k: Tensor, v: Tensor, kind: HeadType, prefix: int, token: int, scale: float) -> Tensor:
    """Image tokens from ``token`` on, all of one line: q [n, heads, group, D]."""
    pages, rule, (count, heads) = kind.pages, kind.rule, q.shape[:2]
    nth = torch.arange(count, device=q.device)
    slot = prefix + slot_of(kind, kind.block_table.expand(count, -1), token + nth)  # [n, heads]
    held = prefix + rule.resident(token)
    old = torch.arange(held, device=q.device)[None]
    block, place = (x[0] for x in locate(kind.block_table, old, pages.page))
    fresh = torch.cat((k, v), -1).to(pages.kv.dtype)
    key, value = torch.cat((pages.kv[block, :, place], fresh)).float().chunk(2, -1)  # [held + n, heads, D]

    # An old slot is seen until a token of this line lands in it, a new one from its own token on.
    until = torch.full((heads, prefix + rule.capacity), count, device=q.device)
    until = until.scatter(1, slot.T, nth.expand(heads, -1))[:, :held]
    seen_old = nth[:, None] < until[:, None]
    seen_new = (nth <= nth[:, None]).expand(heads, -1, -1)
    mask = torch.cat((seen_old, seen_new), -1)  # [heads, n, held + n]
    logits = torch.einsum("nhgd,shd->hgns", q.float(), key) * scale
    probability = logits.masked_fill(~mask[:, None], -torch.inf).softmax(-1)

    mass = probability.sum((1, 2)) if rule.scores else probability.new_zeros(heads, held + count)
    pages.score[block[prefix:], :, place[prefix:]] += mass[:, prefix:held].T
    block, place = locate(kind.block_table.expand(count, -1), slot, pages.page)
    head = torch.arange(heads, device=q.device)
    pages.kv[block, head, place] = fresh
    pages.token[block, head, place] = (token + nth).to(torch.int16)[:, None]
    pages.score[block, head, place] = mass[:, held:].T
    if (token + count) % rule.line == 0:
        length = torch.tensor([prefix, prefix + token + count], device=q.device)
        select_victims(kind, Plan(length[:1], length[1:]))
    return torch.einsum("hgns,shd->nhgd", probability, value)
