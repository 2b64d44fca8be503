"""What each head would lose under each candidate type: curves, from one pass over known pictures.

The loss of a head under a rule is how far its output strays from the full cache's, as the layer's output
feels it: ``|| W_o (out_full - out_rule) ||^2 / || residual after attention ||^2``, mean over image queries
and pictures, with everything else of the model as the full cache has it. Under a ring the mask is known
beforehand; a scored rule is played line by line with the scores that its own choices leave. Where both
branches of a KV head are under one rule, their errors are much alike, and guidance, ``w`` times the one less
``w - 1`` times the other, lets most of them cancel: the same measure of that combination is the guided loss.

Cost: for every candidate, layer, cache head and query, the visible keys once more: on Janus-Pro-1B with 12
pictures and 22 candidates 9 TFLOP. Memory: one layer's line of queries against the pictures of a pass,
``[pictures, heads, W, tokens]`` float32 (7 MB there, 4 at a time); errors wait for the layer's residual as
``[pictures, heads, candidates, tokens]`` (6 MB).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from vllm_kvcompress.heads.dense import Kept
from vllm_kvcompress.heads.replay import causal
from vllm_kvcompress.policy.rule import HeadRule


@dataclass
class LossMeter:
    """Attends with a full cache in the place of the engine's, and adds up the losses.

    Parameters
    ----------
    candidates : sequence of HeadRule
        Of one grid.
    layers, cache_heads : int
        Of the model on this rank; cache heads are ``branch * kv_heads + head``.
    output_weight : callable
        layer -> ``[hidden, query heads * head_size]``, this rank's columns of W_o.
    guidance : float
        The model's own scale ``w``: guided losses are of ``w`` times the conditional head's error less
        ``w - 1`` times the unconditional one's.
    """

    candidates: Sequence[HeadRule]
    layers: int
    cache_heads: int
    output_weight: Callable[[int], Tensor]
    guidance: float = 1.0
    prefix: Tensor = field(init=False)
    begins: Tensor | None = field(init=False, default=None)
    total: Tensor = field(init=False)
    total_guided: Tensor = field(init=False)
    queries: int = 0

    def __post_init__(self) -> None:
        self.total = torch.zeros(self.layers, self.cache_heads, len(self.candidates), dtype=torch.float64)
        self.total_guided = torch.zeros_like(self.total[:, : self.cache_heads // 2])
        self._waiting: tuple[int, Tensor, Tensor] | None = None

    @property
    def curves(self) -> Tensor:
        """``[layers, cache_heads, candidates]`` float64: mean loss of a query."""
        return self.total / max(1, self.queries)

    @property
    def guided(self) -> Tensor:
        """``[layers, kv_heads, candidates]`` float64: of both branches under one candidate, guided."""
        return self.total_guided / max(1, self.queries)

    def begin(self, prefix: Tensor, begins: Tensor | None = None) -> None:
        """The next pass has these rows: ``prefix [rows]`` prompt tokens, then a whole picture each.

        ``begins [rows, 2]`` are the first tokens that each branch sees.
        """
        self.prefix, self.begins = prefix, begins
        self.queries += len(prefix) * self.candidates[0].image

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int, scale: float) -> Tensor:
        """Full causal attention; ``q [rows * steps, 2 * Hq, D]``, k and v alike, rows of one length."""
        rows = len(self.prefix)
        q, k, v = (x.unflatten(0, (rows, -1)).transpose(1, 2) for x in (q, k, v))
        out = causal(q, k, v, scale, self.begins)
        self._waiting = layer, *self._errors(q, k, v, layer, scale)
        return out.transpose(1, 2).flatten(0, 1)

    def residual(self, hidden: Tensor) -> None:
        """The residual stream after the attention that just ran, ``[rows * steps * 2, hidden]``."""
        assert self._waiting is not None, "a residual without its attention"
        (layer, error, guided), self._waiting = self._waiting, None
        at = self._image_positions()
        norm = hidden.float().square().sum(-1).view(len(self.prefix), -1, 2)
        norm = norm.gather(1, at[..., None].expand(-1, -1, 2)).transpose(1, 2)  # [rows, 2, image]
        share = error.unflatten(1, (2, -1)) / norm[:, :, None, None].clamp(min=1e-30)
        self.total[layer] += share.sum((0, 4)).flatten(0, 1).double().cpu()
        share = guided / norm.mean(1)[:, None, None].clamp(min=1e-30)
        self.total_guided[layer] += share.sum((0, 3)).double().cpu()

    def _image_positions(self) -> Tensor:
        """``[rows, image]`` int64: where each row's image tokens are."""
        image = torch.arange(self.candidates[0].image, device=self.prefix.device)
        return self.prefix[:, None].long() + image

    def _errors(self, q: Tensor, k: Tensor, v: Tensor, layer: int, scale: float) -> tuple[Tensor, Tensor]:
        """``[rows, heads, steps, D]`` each -> squared errors ``[rows, heads, candidates, image]``.

        And those of the branches' heads guided, half as many.
        """
        rows, heads, size = len(q), k.shape[1], q.shape[3]
        at, words = self._image_positions(), int(self.prefix.max())
        row = torch.arange(rows, device=q.device)[:, None]
        # The advanced indices around the heads' axis put [rows, image] first.
        query, key, value = (x[row, :, at].transpose(1, 2).float() for x in (q, k, v))
        query = query.unflatten(1, (heads, -1)) * scale
        word_key, word_value = (x[:, :, :words].float() for x in (k, v))
        word = torch.arange(words, device=q.device)
        unseen = (word >= self.prefix[:, None])[:, None]  # [rows, heads or 1, words]
        if self.begins is not None:
            unseen = unseen | (word < self.begins.repeat_interleave(heads // 2, 1)[..., None])
        weight = self.output_weight(layer).float().view(-1, heads // 2, query.shape[2] * size)
        of_a_branch = torch.einsum("ohx,ohy->hxy", weight, weight)
        gram = of_a_branch.repeat(2, 1, 1)

        rule = self.candidates[0]
        kept = [Kept(c, rows, heads, q.device) if c.scores else None for c in self.candidates]
        image = rule.image
        error = query.new_zeros(rows, heads, len(self.candidates), image)
        guided = error.new_zeros(rows, heads // 2, len(self.candidates), image)
        for first in range(0, rule.image, rule.line):
            last = first + rule.line
            mine, keys, values = query[..., first:last, :], key[:, :, :last], value[:, :, :last]
            to_words = torch.einsum("rhgnd,rhsd->rhgns", mine, word_key)
            to_words = to_words.masked_fill(unseen[:, :, None, None], -torch.inf)
            to_image = torch.einsum("rhgnd,rhsd->rhgns", mine, keys)
            top = torch.maximum(to_words.amax(-1), to_image.amax(-1))[..., None]
            causal = torch.ones(rule.line, last, dtype=torch.bool, device=q.device).tril(first)
            mass = (to_image - top).exp().masked_fill(~causal, 0)
            word_mass = (to_words - top).exp()
            word_sum, word_out = word_mass.sum(-1), word_mass @ word_value[:, :, None]
            full = (word_out + mass @ values[:, :, None]) / (word_sum + mass.sum(-1))[..., None]
            line = _Line(mass, values, word_sum, word_out, first, last)
            for n, (candidate, held) in enumerate(zip(self.candidates, kept, strict=True)):
                loses = last > candidate.capacity
                chooses = (
                    held is not None and (candidate.decay or candidate.victims_due(last)) and last < image
                )
                if not loses and not chooses:
                    continue
                if held is None:
                    out = line.ring(candidate)
                else:
                    part = mass * held.visible(first, last)[:, :, None]
                    total = word_sum + part.sum(-1)
                    if chooses:
                        self._end_line(held, part, total, values)
                    out = (word_out + part @ values[:, :, None]) / total[..., None]
                if loses:
                    apart = (out - full).transpose(2, 3).flatten(3)  # [rows, heads, W, group * D]
                    error[:, :, n, first:last] = ((apart @ gram) * apart).sum(-1)
                    given, free = apart.chunk(2, 1)
                    both = free + self.guidance * (given - free)
                    guided[:, :, n, first:last] = ((both @ of_a_branch) * both).sum(-1)
        return error, guided

    @staticmethod
    def _end_line(held: Kept, mass: Tensor, total: Tensor, values: Tensor) -> None:
        """The line's probabilities ``mass / total`` to the scores; then the next line's victims."""
        drawn = mass.shape[-1]
        weight = total.reciprocal().flatten(2)[:, :, None]
        score = held.score[..., :drawn]
        score.mul_(held.rule.decay).add_((weight @ mass.flatten(2, 3))[:, :, 0])
        if held.rule.victims_due(drawn):
            held.end_line(held.refined(score, values))


class _Line(NamedTuple):
    """A line's queries against the picture: unnormalised probabilities, and what the prompt adds."""

    mass: Tensor  # [rows, heads, group, W, drawn], zero where causality hides
    values: Tensor  # [rows, heads, drawn, D]
    word_sum: Tensor  # [rows, heads, group, W]
    word_out: Tensor  # [rows, heads, group, W, D]
    first: int
    last: int

    def ring(self, rule: HeadRule) -> Tensor:
        """Outputs under a ring: prompt, anchors, and the last ``capacity - anchors`` tokens."""
        window, anchors = rule.capacity - rule.anchors, rule.anchors
        oldest = max(anchors, self.first - window + 1)
        query = torch.arange(self.first, self.last, device=self.mass.device)[:, None]
        token = torch.arange(oldest, self.last, device=self.mass.device)
        near = self.mass[..., oldest:] * (token > query - window)
        begin, values = self.mass[..., :anchors], self.values[:, :, None]
        out = self.word_out + near @ values[..., oldest:, :] + begin @ values[..., :anchors, :]
        return out / (self.word_sum + near.sum(-1) + begin.sum(-1))[..., None]
