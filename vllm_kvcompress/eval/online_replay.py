"""What heads hold whose picture decides their budgets (`vllm_kvcompress.eval.online`), and replays of it."""

import torch
from torch import Tensor

from vllm_kvcompress.cache.layout import CacheLayout
from vllm_kvcompress.eval.online import Budgets, outside_of
from vllm_kvcompress.heads.dense import DenseReplay, Kept, summed
from vllm_kvcompress.heads.replay import FullReplay, Rows
from vllm_kvcompress.policy.rule import HeadRule


class OnlineKept(Kept):
    """What heads of one layer hold of their pictures, each with its own number of slots.

    Everything, until the early stage's end; from then on what `end_line` leaves: a head that holds more than
    its slots drops the rest at once, and its next line's victims go one by one as under any `HeadRule`.

    Parameters
    ----------
    rule : HeadRule
        LineAR's with the mean budget: line, image, decay, and the anchors of a head that has room for them
        (`Policy.rules`).
    strata : bool
        As in `OnlineRule`.
    """

    def __init__(self, rule: HeadRule, rows: int, heads: int, device: torch.device, strata: bool) -> None:
        super().__init__(rule, rows, heads, device)
        self.strata = strata
        self.slots: Tensor | None = None

    def settle(self, slots: Tensor, ring: Tensor, early: int) -> None:
        """Budgets ``[rows, heads]`` from ``early`` image tokens on."""
        line, image = self.rule.line, self.rule.image
        self.slots, self.ring, self.early = slots, ring, early
        self.anchors = ((slots - line) // 4).clamp(min=0, max=self.rule.anchors)
        self.recent = ((slots - line - self.anchors) // 2).clamp(min=0, max=line)
        token = torch.arange(image, device=slots.device)
        leaves = token + (slots - self.anchors)[..., None]
        stays = ~ring[..., None] | (token < self.anchors[..., None]) | (slots >= image)[..., None]
        # Nobody has seen less than everything of the early stage.
        self.dies = leaves.clamp(min=early).masked_fill(stays, image)

    def end_line(self, score: Tensor) -> None:
        """Drop and choose by ``score [rows, heads, drawn]``, lowest first, older first."""
        drawn, image = score.shape[-1], self.rule.image
        if self.slots is None or drawn < self.early or drawn == image:
            return
        token = torch.arange(drawn, device=score.device)
        held = self.dies[..., :drawn] >= image
        candidate = held & (token >= self.anchors[..., None]) & (token < drawn - self.recent[..., None])
        candidate &= ~self.ring[..., None]
        line, free = self.rule.line, self.slots - held.sum(-1)
        over = (-free).clamp(min=0)[..., None]
        due = (line - free.clamp(min=0)).clamp(min=0)[..., None]
        key = self._by_line(score, candidate) if self.strata else score
        order = key.masked_fill(~candidate, torch.inf).argsort(dim=-1, stable=True)
        # Free slots are used first, so the last `due` tokens of the next line overwrite.
        when = torch.where(token < over, drawn, drawn + line - due + token - over)
        goes = (token < over + due) & ~self.ring[..., None]
        before = self.dies[..., :drawn]
        self.dies[..., :drawn] = before.scatter(-1, order, torch.where(goes, when, before.gather(-1, order)))

    def _by_line(self, score: Tensor, candidate: Tensor) -> Tensor:
        """Order in which the line goes first of which most is left, of it the lowest score."""
        score, candidate = (x.unflatten(-1, (-1, self.rule.line)) for x in (score, candidate))
        lowest = score.masked_fill(~candidate, torch.inf).argsort(dim=-1, stable=True).argsort(-1)
        better = candidate.sum(-1, keepdim=True) - 1 - lowest
        return -better.flatten(-2).float()


class OnlineReplay(DenseReplay):
    """Known pictures under budgets that their first lines gave them.

    Parameters
    ----------
    rows : Rows
    layout : CacheLayout
        All heads of one type, LineAR's with the mean budget.
    found : Budgets
    strata : bool
        As in `OnlineRule`.
    """

    def __init__(self, rows: Rows, layout: CacheLayout, found: Budgets, strata: bool) -> None:
        super().__init__(rows, layout.rules, layout.types, summed)
        self.found, self.strata = found, strata

    def layer(self, q: Tensor, k: Tensor, v: Tensor, layer: int, scale: float) -> Tensor:
        self._at = layer
        return super().layer(q, k, v, layer, scale)

    def kept(self, rule: HeadRule, rows: int, heads: int, device: torch.device) -> Kept:
        kept = OnlineKept(rule, rows, heads, device, self.strata)
        kept.settle(self.found.slots[:, self._at], self.found.ring[:, self._at], self.found.early)
        return kept


class EarlyLines:
    """A `Recorder` with a full cache, of rows that end with the early stage: where their heads look.

    Parameters
    ----------
    rows : Rows
        ``image`` is the early stage's.
    near : int
        Image tokens that count as near.
    prompt : bool
        As in `OnlineRule`.
    layers, heads : int
        ``2 * Hkv`` cache heads of a layer.
    """

    def __init__(self, rows: Rows, near: int, prompt: bool, layers: int, heads: int) -> None:
        self.rows, self.near, self.prompt = rows, near, prompt
        self.outside = torch.zeros(len(rows), layers, heads, device=rows.prefix.device)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int, scale: float) -> Tensor:
        """``[rows * steps, heads, D]`` in, the same out."""
        rows = self.rows
        q, k, v = (x.unflatten(0, (len(rows), rows.steps)) for x in (q, k, v))
        row = torch.arange(len(rows), device=q.device)[:, None]
        at = rows.prefix[:, None].long() + torch.arange(rows.image, device=q.device)
        slot = torch.arange(rows.steps, device=q.device)
        seen = (slot <= at[..., None])[:, None]  # [rows, heads or 1, image, steps]
        if rows.begins is not None:
            begins = rows.begins.repeat_interleave(k.shape[2] // 2, 1)
            seen = seen & (slot >= begins[..., None, None])
        query = q[row, at].float().unflatten(2, (k.shape[2], -1))
        logits = torch.einsum("rnhgd,rshd->rhgns", query, k.float()) * scale
        weights = logits.masked_fill(~seen[:, :, None], -torch.inf).softmax(-1)
        image = at[:, None, None, None].expand(*weights.shape[:4], -1)
        self.outside[:, layer] = outside_of(weights.gather(-1, image), 0, self.near, self.prompt)
        return FullReplay(rows.begins).layer(q, k, v, layer, scale).flatten(0, 1)
