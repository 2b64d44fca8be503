"""Several image tokens of one line at once: attention first, and only then, of as many as stand, the writes.

Within a line every token's slot is known beforehand, so its tokens are one masked attention. A prompt that
holds image tokens keeps all of them; a window of drafts keeps those that turn out right.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_kvcompress.attention.pages import HeadType, locate
from vllm_kvcompress.attention.reference import slot_of


@dataclass
class Line:
    """What was attended, and is not yet in the pages.

    Parameters
    ----------
    kind : HeadType
        Its block table has one row.
    prefix, token : int
        Of the row, and the first token's index in the picture.
    out : Tensor
        [n, heads, group, D] float32.
    slot : Tensor
        [n or less, heads] int64: the logical slots that the tokens will take, to the line's end.
    fresh : Tensor
        [n, heads, 2 * D], cache dtype: their K and V.
    mass : Tensor
        [n, heads, held + n] float32: each query's attention, its group's heads added up; first what was in
        the pages, then the tokens themselves. Not there where the rule does not score.
    """

    kind: HeadType
    prefix: int
    token: int
    out: Tensor
    slot: Tensor
    fresh: Tensor
    mass: Tensor | None

    def keep(self, count: int) -> None:
        """Write the first ``count`` tokens, with their queries' scores."""
        kind, prefix, token, mass = self.kind, self.prefix, self.token, self.mass
        pages, heads = kind.pages, self.slot.shape[1]
        device = self.slot.device
        at, to = locate(kind.block_table.expand(count, -1), self.slot[:count], pages.page)
        head = torch.arange(heads, device=device)
        pages.kv[at, head, to] = self.fresh[:count]
        if mass is not None:
            total = mass[:count].sum(0)
            held = mass.shape[-1] - len(self.fresh)
            old = torch.arange(prefix, held, device=device)[None]
            block, place = (x[0] for x in locate(kind.block_table, old, pages.page))
            pages.score[block, :, place] += total[:, prefix:held].T
            pages.token[at, head, to] = (token + torch.arange(count, device=device)).to(torch.int16)[:, None]
            pages.score[at, head, to] = total[:, held : held + count].T


def attend_line(
    q: Tensor, k: Tensor, v: Tensor, kind: HeadType, prefix: int, token: int, scale: float,
    begins: Tensor | None = None,
) -> Line:  # fmt: skip
    """Attend with image tokens from ``token`` on as if each had been written in its turn, to the line's end.

    Tokens past that end have no slots yet. They see what the line has left, and can't be kept.

    Parameters
    ----------
    q : Tensor
        [n, heads, group, D]; k and v: [n, heads, D], of this head type alone.
    kind : HeadType
        Its block table has one row.
    prefix, token : int
        Prompt tokens of the row, and the first token's index in the picture.
    scale : float
        Factor of q . k before the softmax.
    begins : Tensor, optional
        [heads] int64: the first slot that each head sees; by default they see all.
    """
    pages, rule, (count, heads) = kind.pages, kind.rule, q.shape[:2]
    nth = torch.arange(count, device=q.device)
    inside = nth[: rule.line - token % rule.line]
    slot = prefix + slot_of(kind, kind.block_table.expand(len(inside), -1), token + inside)
    held = prefix + rule.resident(token)
    old = torch.arange(held, device=q.device)[None]
    block, place = (x[0] for x in locate(kind.block_table, old, pages.page))
    fresh = torch.cat((k, v), -1).to(pages.kv.dtype)
    key, value = torch.cat((pages.kv[block, :, place], fresh)).float().chunk(2, -1)  # [held + n, heads, D]

    # An old slot is seen until a token of this line lands in it, a new one from its own token on.
    until = torch.full((heads, prefix + rule.capacity), count, device=q.device)
    until = until.scatter(1, slot.T, inside.expand(heads, -1))[:, :held]
    seen_old = nth[:, None] < until[:, None]
    if begins is not None:
        seen_old &= (old >= begins[:, None])[:, None]
    seen_new = (nth <= nth[:, None]).expand(heads, -1, -1)
    mask = torch.cat((seen_old, seen_new), -1)  # [heads, n, held + n]
    logits = torch.einsum("nhgd,shd->hgns", q.float(), key) * scale
    probability = logits.masked_fill(~mask[:, None], -torch.inf).softmax(-1)
    out = torch.einsum("hgns,shd->nhgd", probability, value)
    mass = probability.sum(1).transpose(0, 1) if rule.scores else None
    return Line(kind, prefix, token, out, slot, fresh, mass)
