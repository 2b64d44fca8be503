"""The line rule with everything kept: which tokens a head would still hold, line by line, as a mask.

For measuring rules without a paged cache: heads one by one (`vllm_kvcompress.heads.losses`), whole fits
(`vllm_kvcompress.heads.trials`), and rules that no server has. Vectorised over rows and heads.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_kvcompress.attention.pages import begins_of
from vllm_kvcompress.attention.select import smooth_row
from vllm_kvcompress.heads.replay import FullReplay, Rows
from vllm_kvcompress.policy.rule import HeadRule


class Kept:
    """What heads under one rule hold of their pictures.

    Parameters
    ----------
    rule : HeadRule
        ``stratify`` is not known here.
    rows, heads : int
        Pictures, and heads that each choose for themselves.
    device : torch.device
    """

    def __init__(self, rule: HeadRule, rows: int, heads: int, device: torch.device) -> None:
        self.rule = rule
        size = rule.image
        # The token of a later line that overwrites each token; none yet.
        self.dies = torch.full((rows, heads, size), size, device=device)
        if rule.ring and rule.evicts:
            self.dies[:] = torch.arange(size, device=device) + rule.capacity - rule.anchors
            self.dies[..., : rule.anchors] = size
        self.score = torch.zeros(rows, heads, size, device=device)

    def visible(self, first: int, last: int) -> Tensor:
        """``[rows, heads, W, last]`` bool: which tokens each query of the line ``first`` to ``last`` sees."""
        device = self.dies.device
        query = torch.arange(first, last, device=device)[:, None]
        seen = torch.arange(last, device=device)
        return (seen <= query) & (self.dies[:, :, None, :last] > query)

    def refined(self, score: Tensor, value: Tensor) -> Tensor:
        """``score [rows, heads, drawn]`` as victims are chosen by it; ``value [rows, heads, drawn, D]``."""
        drawn = score.shape[-1]
        if self.rule.value_norm:
            score = score * value.norm(dim=-1)
        if self.rule.smooth_row:
            held = self.dies[..., :drawn] >= self.rule.image
            token = torch.arange(drawn, device=score.device).expand(score.shape)
            score = smooth_row(score.masked_fill(~held, 0), token, held, self.rule)
        return score

    def end_line(self, score: Tensor) -> None:
        """Choose the next line's victims by ``score [rows, heads, drawn]``, lowest first, older first."""
        rule, drawn = self.rule, score.shape[-1]
        due = rule.victims_due(drawn) if rule.scores else 0
        if not due:
            return
        token = torch.arange(drawn, device=score.device)
        held = self.dies[..., :drawn] >= rule.image
        candidate = held & (token >= rule.anchors) & (token < drawn - rule.recent)
        order = score.masked_fill(~candidate, torch.inf).argsort(dim=-1, stable=True)[..., :due]
        # Free slots are used first, so the last `due` tokens of the next line overwrite.
        line = min(rule.line, rule.image - drawn)
        when = drawn + line - due + torch.arange(due, device=score.device)
        self.dies.scatter_(-1, order, when.expand(order.shape))


Choice = Callable[["Line"], Tensor]
"""Scores ``[rows, heads, tokens]`` of a line's end, from which the lowest are the victims."""


@dataclass
class Line:
    """What a score may depend on at a line's end.

    ``probability`` ``[rows, heads, group, W, tokens]`` of the line's queries, tokens drawn so far;
    ``before`` ``[rows, heads, tokens]`` the score of the line before (0 for new tokens); ``value``
    ``[rows, heads, tokens, D]``; ``rule`` of these heads.
    """

    probability: Tensor
    before: Tensor
    value: Tensor
    rule: HeadRule


def summed(line: Line) -> Tensor:
    """Serving's score: attention mass of the last line's queries, and what is left of those before."""
    return line.probability.sum((2, 3)) + line.rule.decay * line.before


class DenseReplay:
    """Everything is kept and masked by the rule, the score is any function: rules to try.

    Parameters
    ----------
    rows : Rows
    rules : sequence of HeadRule
        Of the head types.
    types : sequence
        ``[layers, cache heads]``: each one's type.
    score : Choice
    per_layer : bool
        All heads of a type in a layer (and both branches) evict the same tokens: their scores are summed.
    """

    def __init__(
        self,
        rows: Rows,
        rules: Sequence[HeadRule],
        types: Sequence[Sequence[int]],
        score: Choice = summed,
        per_layer: bool = False,
    ) -> None:
        self.rows, self.rules, self.types = rows, rules, types
        self.score, self.per_layer = score, per_layer

    def layer(self, q: Tensor, k: Tensor, v: Tensor, layer: int, scale: float) -> Tensor:
        """``q [rows, steps, 2 * Hq, D]``, k and v alike -> like q."""
        group = q.shape[2] // k.shape[2]
        out = FullReplay(self.rows.begins).layer(q, k, v, layer, scale).contiguous()  # right for the prompt
        at = (self.rows.prefix[:, None] + torch.arange(self.rows.image, device=q.device)).long()
        row = torch.arange(len(q), device=q.device)[:, None]
        words = int(self.rows.prefix.max())
        word = torch.arange(words, device=q.device)
        is_word = (word < self.rows.prefix[:, None])[:, None]
        for index, rule in self._alike(layer, k.shape[2]):
            grouped = torch.tensor([h * group + g for h in index for g in range(group)], device=q.device)
            queries = q[row, at][:, :, grouped].float().unflatten(2, (-1, group)).permute(0, 2, 3, 1, 4)
            keys, values = (x[row, at][:, :, index].float().transpose(1, 2) for x in (k, v))
            seen = is_word
            if self.rows.begins is not None:
                heads = torch.tensor(index[:1] if rule.ring else index, device=q.device)
                seen = is_word & (word >= begins_of(self.rows.begins, heads, k.shape[2])[..., None])
            prompt = [x[:, :words, index].float().transpose(1, 2) for x in (k, v)]
            attend = self._ring if rule.ring else self._scored
            got = attend(queries * scale, keys, values, prompt, seen, rule)
            picture = out[row, at]
            picture[:, :, grouped] = got.permute(0, 3, 1, 2, 4).flatten(2, 3).to(out.dtype)
            out[row, at] = picture
        return out

    def _alike(self, layer: int, heads: int) -> Iterator[tuple[list[int], HeadRule]]:
        """A layer's heads that lose tokens, by type; rings of branches that begin apart one by one."""
        half = [range(heads // 2), range(heads // 2, heads)]
        for kind, rule in enumerate(self.rules):
            for part in half if rule.ring and self.rows.begins is not None else [range(heads)]:
                index = [head for head in part if self.types[layer][head] == kind]
                if index and rule.evicts:
                    yield index, rule

    def kept(self, rule: HeadRule, rows: int, heads: int, device: torch.device) -> Kept:
        """What a layer's heads of one type hold, of nothing drawn yet."""
        return Kept(rule, rows, heads, device)

    @staticmethod
    def _ring(
        q: Tensor, k: Tensor, v: Tensor, prompt: list[Tensor], is_word: Tensor, rule: HeadRule
    ) -> Tensor:
        """`_scored` where the rule alone says what is held: of anchors and window, all heads alike."""
        out, W = torch.empty_like(q), rule.line
        unseen = ~is_word[:, :, None, None]
        for first in range(0, rule.image, W):
            last = first + W
            oldest = max(rule.anchors, first + 1 - (rule.capacity - rule.anchors))
            token = torch.cat(
                (
                    torch.arange(min(rule.anchors, last), device=q.device),
                    torch.arange(oldest, last, device=q.device),
                )
            )
            query = torch.arange(first, last, device=q.device)[:, None]
            near = (token < rule.anchors) | (token > query - (rule.capacity - rule.anchors))
            keys, values = (torch.cat((a, b[:, :, token]), 2) for a, b in zip(prompt, (k, v), strict=True))
            logits = torch.einsum("rhgnd,rhsd->rhgns", q[..., first:last, :], keys)
            words = is_word.shape[-1]
            logits[..., :words].masked_fill_(unseen, -torch.inf)
            logits[..., words:].masked_fill_(~(near & (token <= query)), -torch.inf)
            out[..., first:last, :] = logits.softmax(-1) @ values[:, :, None]
        return out

    def _scored(
        self, q: Tensor, k: Tensor, v: Tensor, prompt: list[Tensor], is_word: Tensor, rule: HeadRule
    ) -> Tensor:
        """``q [rows, heads, group, image, D]`` -> like q; ``is_word`` ``[rows, heads or 1, words]``."""
        rows, heads, size, W = len(q), q.shape[1], q.shape[3], rule.line
        out = torch.empty_like(q)
        kept = self.kept(rule, rows, heads, q.device)
        score = kept.score
        for first in range(0, size, W):
            last = first + W
            visible = kept.visible(first, last)
            to_words = torch.einsum("rhgnd,rhsd->rhgns", q[..., first:last, :], prompt[0])
            to_image = torch.einsum("rhgnd,rhsd->rhgns", q[..., first:last, :], k[:, :, :last])
            logits = torch.cat(
                (
                    to_words.masked_fill(~is_word[:, :, None, None], -torch.inf),
                    to_image.masked_fill(~visible[:, :, None], -torch.inf),
                ),
                -1,
            )
            p = logits.softmax(-1)
            out[..., first:last, :] = p @ torch.cat((prompt[1], v[:, :, :last]), 2)[:, :, None]
            if rule.scores:
                facts = Line(p[..., to_words.shape[-1] :], score[..., :last], v[:, :, :last], rule)
                score[..., :last] = self.score(facts)
                chosen = kept.refined(score[..., :last], v[:, :, :last])
                if self.per_layer:
                    chosen = chosen.sum(1, keepdim=True).expand(chosen.shape)
                kept.end_line(chosen)
        return out
