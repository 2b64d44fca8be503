"""Many tokens of a row at once: prompts, chunks of prompts, and replayed image tokens.

Prompts that begin here are plain causal attention of all rows and heads at once, and one scatter into the
pages of each head type; a prompt's later chunks read the pages.

Image tokens (docs/design.md, "The method", point 10) are taken line by line through the same rule as in
drawing: within a line every token's slot is known beforehand, so a whole line is one masked attention, and
the line's end chooses victims.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from vllm.utils.torch_utils import async_tensor_h2d

from vllm_kvcompress.attention.line import attend_line
from vllm_kvcompress.attention.pages import HeadType, Plan, locate
from vllm_kvcompress.attention.prompt import attend_prompts
from vllm_kvcompress.attention.select import select_victims


def prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    types: Sequence[HeadType],
    query_start: Sequence[int] | Tensor,
    plan_prefix: Sequence[int] | Tensor,
    plan_length: Sequence[int] | Tensor,
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
    plan_prefix : Sequence[int] or Tensor
        [rows] prompt tokens of each row.
    plan_length : Sequence[int] or Tensor
        [rows] tokens of each row up to and including this chunk; 0 is a padding row.
    scale : float
        Factor of q . k before the softmax.
    out : Tensor
        [tokens, 2 * Hq, D], written; zeros for padding.
    """
    starts = [int(start) for start in query_start]
    q, out = (x.unflatten(1, (-1, q.shape[1] // k.shape[1])) for x in (q, out))
    out[starts[-1] :] = 0
    spans = zip(pairwise(starts), map(int, plan_prefix), map(int, plan_length), strict=True)
    rows = [Row(*span, prefix, length) for span, prefix, length in spans]
    _begin(q, k, v, types, rows, scale, out)
    for n, (first, last, prefix, length) in enumerate(rows):
        if not length:
            out[first:last] = 0
            continue
        # Indexing heads copies, so each type works on its own slice and `out` is written here.
        mine = [replace(kind, block_table=kind.block_table[n : n + 1]) for kind in types]
        before = length - (last - first)
        at = first + rows[n].begins
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
                    drawn = attend_line(*part, kind, prefix, token, scale)
                    drawn.keep(end - at)
                    if (token + end - at) % line == 0:
                        bounds = torch.tensor([prefix, prefix + token + end - at], device=q.device)
                        select_victims(kind, Plan(bounds[:1], bounds[1:]))
                    got = drawn.out
                out[at:end, heads] = got.to(out.dtype)
            at = end


class Row(NamedTuple):
    """A row's tokens in the step, and the prefix and length that they take it to."""

    first: int
    last: int
    prefix: int
    length: int

    @property
    def begins(self) -> int:
        """Prompt tokens among them, if they are the row's first; else 0."""
        count = self.last - self.first
        return min(count, self.prefix) if count == self.length else 0


def _begin(
    q: Tensor, k: Tensor, v: Tensor, types: Sequence[HeadType], rows: Sequence[Row], scale: float, out: Tensor
) -> None:
    """The prompt tokens that rows begin with: attention of all heads at once, then the writes."""
    new = [(n, row.first, row.begins) for n, row in enumerate(rows) if row.begins]
    if not new:
        return
    device = q.device
    at = async_tensor_h2d([i for _, first, count in new for i in range(first, first + count)], device=device)
    row = async_tensor_h2d([n for n, _, count in new for _ in range(count)], device=device)
    position = async_tensor_h2d([i for *_, count in new for i in range(count)], device=device)
    k, v = k[at], v[at]
    # As decode steps will see them.
    key, value = (x.to(types[0].pages.kv.dtype).to(q.dtype) for x in (k, v))
    got = attend_prompts(q[at].flatten(1, 2), key, value, [count for *_, count in new], scale)
    out[at] = got.view(-1, *q.shape[1:]).to(out.dtype)
    for kind in types:
        pages, heads = kind.pages, kind.head_index.long()
        block = kind.block_table[row, position // pages.page].long()
        place = position % pages.page
        pages.kv[block, :, place] = torch.cat((k[:, heads], v[:, heads]), -1).to(pages.kv.dtype)
        if kind.rule.scores:
            pages.token[block, :, place] = -1
            pages.score[block, :, place] = 0.0


def _prompt(q: Tensor, k: Tensor, v: Tensor, kind: HeadType, position: int, scale: float) -> Tensor:
    """A prompt's later chunk, from ``position`` on: q [n, heads, group, D] against everything before."""
    pages, count = kind.pages, len(q)
    slot = torch.arange(position + count, device=q.device)
    block, place = (x[0] for x in locate(kind.block_table, slot[None], pages.page))
    pages.kv[block[position:], :, place[position:]] = torch.cat((k, v), -1).to(pages.kv.dtype)
    if kind.rule.scores:
        pages.token[block[position:], :, place[position:]] = -1
        pages.score[block[position:], :, place[position:]] = 0.0
    key, value = pages.kv[block, :, place].to(q.dtype).transpose(0, 1).chunk(2, -1)  # [heads, slots, D]
    mask = torch.ones(count, position + count, dtype=torch.bool, device=q.device).tril(position)
    out = scaled_dot_product_attention(
        q.flatten(1, 2).transpose(0, 1)[None],
        key[None],
        value[None],
        attn_mask=mask,
        scale=scale,
        enable_gqa=True,
    )
    return out[0].transpose(0, 1).reshape(q.shape)
