"""One run with a full cache that says which heads look at their neighbourhood (SSD, arXiv 2510.18716).

The score of a head is the attention mass that its image queries give to image tokens outside their
neighbourhood, as a share of what they give to image tokens at all, mean over prompts and queries: what
a spatial head would lose. The neighbourhood is the ``recent`` window in raster order. The model draws
the prompts by itself, without vLLM's scheduler: it has to be known which heads are which before vLLM
can be told how much memory a picture takes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from vllm_kvcompress.models.janus import JanusForImageGeneration

BRANCHES = 2
PROMPTS = (
    "a red apple on a wooden table, soft morning light",
    "two green birds above a lake, mountains behind them",
    "a small blue car left of a tall white house",
    "portrait of an old sailor, oil painting, striped shirt",
)


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
    """

    layers: int
    kv_heads: int
    head_size: int
    steps: int
    prefix: Tensor
    image: int
    neighbourhood: int
    dtype: torch.dtype
    step: int = 0
    outside: Tensor = field(init=False)
    queries: Tensor = field(init=False)

    def __post_init__(self) -> None:
        shape = (self.layers, len(self.prefix), BRANCHES * self.kv_heads, self.steps, self.head_size)
        self._k = torch.zeros(shape, dtype=self.dtype, device=self.prefix.device)
        self._v = torch.zeros_like(self._k)
        self.outside = torch.zeros(self.layers, self.kv_heads, dtype=torch.float64)
        self.queries = torch.zeros(self.layers, dtype=torch.float64)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int, scale: float) -> Tensor:
        """Full attention of one token a row. ``[rows, 2 * Hq, D]`` in, the same out."""
        rows, _, size = k.shape
        keys, values = self._k[layer], self._v[layer]
        keys[:, :, self.step], values[:, :, self.step] = k, v
        keys, values = keys[:, :, : self.step + 1], values[:, :, : self.step + 1]
        grouped = q.view(rows, k.shape[1], -1, size)
        weights = (torch.einsum("rhgd,rhsd->rhgs", grouped.float(), keys.float()) * scale).softmax(-1)
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
        share = share[drawing].view(-1, BRANCHES, self.kv_heads).mean(1)
        self.outside[layer] += share.sum(0).double().cpu()
        self.queries[layer] += int(drawing.sum())

    @property
    def scores(self) -> Tensor:
        """``[layers, kv_heads]`` float64 locality scores."""
        return self.outside / self.queries.clamp(min=1)[:, None]


@torch.inference_mode()
def locality_scores(
    model: "JanusForImageGeneration",
    prompts: Sequence[Sequence[int]],
    neighbourhood: int,
    *,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Draw a picture for each prompt with a full cache, and score the heads.

    Parameters
    ----------
    model : JanusForImageGeneration
        Loaded, with its compressed cache not yet allocated.
    prompts : sequence of token ids
        Each ends in begin-of-image.
    neighbourhood : int
        Image tokens counted as near.
    progress : callable, optional
        Called with (steps done, steps in all).

    Returns
    -------
    Tensor
        ``[layers, kv_heads]`` float64, each in [0, 1].
    """
    cache_of = model.compressed
    assert cache_of is not None
    device = next(model.parameters()).device
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    steps = int(lengths.max()) + model.image.raster.tokens - 1
    text = model.config.get_text_config()
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    full = FullCache(
        text.num_hidden_layers, text.num_key_value_heads, head_size, steps, lengths,
        model.image.raster.tokens, neighbourhood, model.dtype,
    )  # fmt: skip
    generator = torch.Generator(device=device).manual_seed(seed)
    ids = torch.tensor([p[0] for p in prompts], device=device)
    cache_of.recorder = full
    try:
        for full.step in range(steps):
            positions = torch.full_like(ids, full.step)
            logits = model.compute_logits(model(ids, positions))
            drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator).flatten()
            given = [p[full.step + 1] if full.step + 1 < len(p) else -1 for p in prompts]
            forced = torch.tensor(given, device=device)
            ids = torch.where(forced >= 0, forced, drawn)
            if progress is not None:
                progress(full.step + 1, steps)
    finally:
        cache_of.recorder = None
    return full.scores
