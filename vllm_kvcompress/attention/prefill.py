"""Many tokens of a row at once: prompts, chunks of prompts, and replayed image tokens.

Prompts that begin here are plain causal attention of all rows and heads at once; a prompt's later chunks
read the pages, of all rows alike at once. How many calls that takes depends on how unlike the rows are, not
on how many there are.

Image tokens (docs/design.md, "The method", point 10) are taken line by line through the same rule as in
drawing: within a line every token's slot is known beforehand, so a whole line is one masked attention, and
the line's end chooses victims. These go row by row: they come where a picture is resumed or scored, not in
the course of serving.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from vllm_kvcompress.attention.line import attend_line
from vllm_kvcompress.attention.pages import HeadType, Plan, begins_of
from vllm_kvcompress.attention.prefill_plan import Begun, Chunks, Drawn, PrefillPlan
from vllm_kvcompress.attention.prompt import attend_prompts
from vllm_kvcompress.attention.select import select_victims


def prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    types: Sequence[HeadType],
    plan: PrefillPlan,
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
        The layer's head types; their block tables have all rows of the step.
    plan : PrefillPlan
        Which tokens are whose.
    scale : float
        Factor of q . k before the softmax.
    out : Tensor
        [tokens, 2 * Hq, D], written at the plan's tokens.
    """
    q, out = (x.unflatten(1, (-1, q.shape[1] // k.shape[1])) for x in (q, out))
    if plan.written is not None:
        for kind in types:
            _write(k, v, kind, plan)
    for begun in plan.begun:
        _begin(q, k, v, types, begun, scale, out)
    for number, chunk in enumerate(plan.chunks):
        for kind in types:
            _continue(q, kind, chunk, plan.located(number, kind.block_table, kind.pages.page), scale, out)
    for row in plan.drawn:
        _replay(q, k, v, types, row, scale, out)


def _write(k: Tensor, v: Tensor, kind: HeadType, plan: PrefillPlan) -> None:
    """All prompt tokens of the step into the pages of a head type."""
    assert plan.written is not None
    pages, heads, new = kind.pages, kind.head_index.long(), plan.written
    block = kind.block_table[new.rows, new.position // pages.page].long()
    place = new.position % pages.page
    fresh = torch.cat((k[new.tokens[:, None], heads], v[new.tokens[:, None], heads]), -1)
    pages.kv[block, :, place] = fresh.to(pages.kv.dtype)
    if kind.scores:
        pages.token[block, :, place] = -1
        pages.score[block, :, place] = 0.0


def _begin(
    q: Tensor, k: Tensor, v: Tensor, types: Sequence[HeadType], begun: Begun, scale: float, out: Tensor
) -> None:
    """Attention of the prompts that begin in this step, all heads at once, or all of a branch."""
    if begun.branch is not None:
        half = k.shape[1] // 2
        q, k, v, out = (x[:, begun.branch * half : (begun.branch + 1) * half] for x in (q, k, v, out))
        out[begun.padding] = 0  # what nobody looks at must still be numbers
    at = begun.tokens
    # As decode steps will see them.
    key, value = (x[at].to(types[0].pages.kv.dtype).to(q.dtype) for x in (k, v))
    got = attend_prompts(q[at].flatten(1, 2), key, value, begun.counts, scale)
    out[at] = got.view(-1, *q.shape[1:]).to(out.dtype)


def _continue(
    q: Tensor, kind: HeadType, chunk: Chunks, located: tuple[Tensor, Tensor], scale: float, out: Tensor
) -> None:
    """Later chunks of prompts against everything before, which is in the pages."""
    heads, (block, place) = kind.head_index.long(), located
    held = kind.pages.kv[block, :, place].to(q.dtype).transpose(1, 2)  # [rows, heads, slots, 2 * D]
    key, value = held.chunk(2, -1)
    query = q[chunk.queries.at[:, :, None], heads]  # [rows, chunk, heads, group, D]
    mask = chunk.mask
    if mask.shape[1] == 2:
        mask = mask[:, (heads >= q.shape[1] // 2).long()].repeat_interleave(query.shape[3], 1)
    got = scaled_dot_product_attention(
        query.flatten(2, 3).transpose(1, 2),
        key,
        value,
        attn_mask=mask,
        scale=scale,
        enable_gqa=True,
    )
    got = got.transpose(1, 2).reshape(-1, *query.shape[2:])[chunk.queries.real]
    out[chunk.queries.tokens[:, None], heads] = got.to(out.dtype)


def _replay(
    q: Tensor, k: Tensor, v: Tensor, types: Sequence[HeadType], row: Drawn, scale: float, out: Tensor
) -> None:
    """Image tokens of one row, line by line."""
    # Indexing heads copies, so each type works on its own slice and `out` is written here.
    mine = [kind.of(row.size, slice(row.row, row.row + 1)) for kind in types]
    at, token, line = row.first, row.token, mine[0].rule.line
    first = torch.tensor([row.begins], device=q.device) if any(row.begins) else None
    while at < row.last:
        end = min(row.last, at + line - token % line)
        for kind in mine:
            heads = kind.head_index.long()
            part = q[at:end, heads], k[at:end, heads], v[at:end, heads]
            begins = None if first is None else begins_of(first, kind.head_index, k.shape[1])[0]
            drawn = attend_line(*part, kind, row.prefix, token, scale, begins)
            drawn.keep(end - at)
            if (token + end - at) % line == 0:
                bounds = torch.tensor([row.prefix, row.prefix + token + end - at], device=q.device)
                select_victims(kind, Plan(bounds[:1], bounds[1:]))
            out[at:end, heads] = drawn.out.to(out.dtype)
        at, token = end, token + end - at
