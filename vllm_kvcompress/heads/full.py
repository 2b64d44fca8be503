"""A full cache that calibration draws with, and what its heads look at beyond their neighbourhood."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vllm_kvcompress.attention.pages import BRANCHES


@dataclass
class FullCache:
    """Dense K and V of all layers, and the locality sums; rows draw in lock-step, one token a step.

    Parameters
    ----------
    layers, kv_heads, head_size, steps : int
        Geometry; ``steps`` is the longest row.
    prefix : Tensor
        ``[rows]`` int64, prompt tokens of each row.
    image : int
        Tokens of a picture; a row that has drawn them is no longer looked at.
    neighbourhood : int
        Image tokens before the query that count as near.
    begins : Tensor or None
        ``[rows, 2]`` int64: the first slot that each branch sees; a token before it sees itself.
    """

    layers: int
    kv_heads: int
    head_size: int
    steps: int
    prefix: Tensor
    image: int
    neighbourhood: int
    dtype: torch.dtype
    begins: Tensor | None = None
    step: int = 0
    outside: Tensor = field(init=False)
    queries: Tensor = field(init=False)

    def __post_init__(self) -> None:
        shape = (self.layers, len(self.prefix), BRANCHES * self.kv_heads, self.steps, self.head_size)
        self._k = torch.zeros(shape, dtype=self.dtype, device=self.prefix.device)
        self._v = torch.zeros_like(self._k)
        self.outside = torch.zeros(self.layers, len(self.prefix), self.kv_heads, dtype=torch.float64)
        self.queries = torch.zeros(self.layers, dtype=torch.float64)

    def release(self) -> None:
        """Let go of K and V; what was scored stays."""
        self._k = self._v = torch.empty(0)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int, scale: float) -> Tensor:
        """Full attention of one token a row. ``[rows, 2 * Hq, D]`` in, the same out."""
        rows, _, size = k.shape
        keys, values = self._k[layer], self._v[layer]
        keys[:, :, self.step], values[:, :, self.step] = k, v
        keys, values = keys[:, :, : self.step + 1], values[:, :, : self.step + 1]
        grouped = q.view(rows, k.shape[1], -1, size)
        logits = torch.einsum("rhgd,rhsd->rhgs", grouped.float(), keys.float()) * scale
        if self.begins is not None:
            begins = self.begins.clamp(max=self.step).repeat_interleave(self.kv_heads, 1)
            hidden = torch.arange(self.step + 1, device=q.device) < begins[..., None]
            logits = logits.masked_fill(hidden[:, :, None], -torch.inf)
        weights = logits.softmax(-1)
        self._score(weights, layer)
        return torch.einsum("rhgs,rhsd->rhgd", weights, values.float()).to(q.dtype).reshape(q.shape)

    def _score(self, weights: Tensor, layer: int) -> None:
        """``weights``: ``[rows, 2 * Hkv, group, slots]`` probabilities of this step's queries."""
        position = torch.arange(weights.shape[-1], device=weights.device)
        image = position >= self.prefix[:, None]
        near = position >= self.step - self.neighbourhood
        total = (weights * image[:, None, None]).sum(-1)
        far = (weights * (image & ~near)[:, None, None]).sum(-1)
        share = torch.where(total > 0, far / total.clamp(min=1e-20), 0.0).mean(2)
        drawing = (self.step >= self.prefix) & (self.step < self.prefix + self.image)
        share = torch.where(drawing[:, None], share, 0.0).view(-1, BRANCHES, self.kv_heads).mean(1)
        self.outside[layer] += share.double().cpu()
        self.queries[layer] += int(drawing.sum())


def scores_of(caches: Sequence[FullCache]) -> Tensor:
    """``[layers, kv_heads]`` float64 locality scores of rows that were drawn in several passes, or one."""
    outside = torch.cat([cache.outside for cache in caches], 1).sum(1)
    queries = torch.stack([cache.queries for cache in caches]).sum(0)
    return outside / queries.clamp(min=1)[:, None]
