"""A replay that keeps everything and masks by the rule: for scores and rules that serving does not have."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_kvcompress.attention.pages import begins_of
from vllm_kvcompress.cache.layout import CacheLayout
from vllm_kvcompress.eval.replay import FullReplay, Rows
from vllm_kvcompress.heads.dense import Kept
from vllm_kvcompress.policy.rule import HeadRule

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
    layout : CacheLayout
    score : Choice
    per_layer : bool
        All heads of a type in a layer (and both branches) evict the same tokens: their scores are summed.
    """

    def __init__(
        self, rows: Rows, layout: CacheLayout, score: Choice = summed, per_layer: bool = False
    ) -> None:
        self.rows, self.layout, self.score, self.per_layer = rows, layout, score, per_layer

    def layer(self, q: Tensor, k: Tensor, v: Tensor, layer: int, scale: float) -> Tensor:
        group = q.shape[2] // k.shape[2]
        out = FullReplay(self.rows.begins).layer(q, k, v, layer, scale).contiguous()  # right for the prompt
        at = (self.rows.prefix[:, None] + torch.arange(self.rows.image, device=q.device)).long()
        row = torch.arange(len(q), device=q.device)[:, None]
        words = int(self.rows.prefix.max())
        word = torch.arange(words, device=q.device)
        is_word = (word < self.rows.prefix[:, None])[:, None]
        for kind, rule in enumerate(self.layout.rules):
            index = self.layout.heads(kind, layer)
            if not index:
                continue
            grouped = torch.tensor([h * group + g for h in index for g in range(group)], device=q.device)
            queries = q[row, at][:, :, grouped].float().unflatten(2, (-1, group)).permute(0, 2, 3, 1, 4)
            keys, values = (x[row, at][:, :, index].float().transpose(1, 2) for x in (k, v))
            seen = is_word
            if self.rows.begins is not None:
                heads = torch.tensor(index, device=q.device)
                seen = is_word & (word >= begins_of(self.rows.begins, heads, k.shape[2])[..., None])
            prompt = [x[:, :words, index].float().transpose(1, 2) for x in (k, v)]
            got = self._heads(queries * scale, keys, values, prompt, seen, rule)
            picture = out[row, at]
            picture[:, :, grouped] = got.permute(0, 3, 1, 2, 4).flatten(2, 3).to(out.dtype)
            out[row, at] = picture
        return out

    def kept(self, rule: HeadRule, rows: int, heads: int, device: torch.device) -> Kept:
        """What a layer's heads of one type hold, of nothing drawn yet."""
        return Kept(rule, rows, heads, device)

    def _heads(
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
