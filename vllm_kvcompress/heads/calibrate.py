"""One calibration: pictures drawn with a full cache, the heads' locality, and their loss curves.

The locality score of a head (SSD, arXiv 2510.18716) is the attention mass that its image queries give to
image tokens outside their neighbourhood, as a share of what they give to image tokens at all, mean over
prompts and queries: what a spatial head would lose. The neighbourhood is the ``recent`` window in raster
order. Loss curves are `vllm_kvcompress.heads.losses`; they are measured on the pictures drawn here.

The model draws by itself, without vLLM's scheduler: it has to be known which heads are which before vLLM
can be told how much memory a picture takes. Nothing here knows what model it is (`Subject`).
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vllm_kvcompress.attention.pages import BRANCHES
from vllm_kvcompress.attention.recorder import Recorder
from vllm_kvcompress.heads.losses import LossMeter
from vllm_kvcompress.policy import HeadRule, Raster

DRAWN_AT_ONCE = 8
REPLAYED_AT_ONCE = 4
LOCALITY_PROMPTS = (
    "a red apple on a wooden table, soft morning light",
    "two green birds above a lake, mountains behind them",
    "a small blue car left of a tall white house",
    "portrait of an old sailor, oil painting, striped shirt",
)
"""Locality scores are measured on these, in one batch: what they say must not change with the next."""
MORE_PROMPTS = (
    "a big orange star on a plain white ground",
    "three small black circles",
    "a green cross right of a pink square",
    "a photo of a purple triangle above a cyan circle",
    "two red squares on a striped grey background",
    "a photo of a bench",
    "a photo of four books and a yellow cup",
    "a street in the rain at night, neon signs, wet asphalt",
)
"""Loss curves are measured on these as well, simple and rich ones."""
PROMPTS = LOCALITY_PROMPTS + MORE_PROMPTS
Progress = Callable[[int, int], None]
"""Called with (steps done, steps in all)."""


@dataclass
class Subject:
    """What calibration asks of a loaded model whose cache has not been allocated.

    Parameters
    ----------
    layers, kv_heads, head_size : int
        KV heads of one branch on this rank.
    raster : Raster
    dtype, device
        Of its activations.
    step : callable
        ``(ids [n], positions [n]) -> logits [n, vocab]`` of one token a row.
    forward : callable
        ``(ids [n], positions [n]) -> None``: any number of tokens, for what the recorder sees.
    recording : callable
        A context in which a `Recorder` does the attention, and, where it is one that `SeesResidual`, sees the
        stream after each.
    output_weight : callable
        layer -> ``[hidden, query heads * head_size]``.
    agree : callable
        Drawn ids ``[n]`` -> those of the first rank: all ranks draw the same picture.
    rows : callable
        A context in which the rows that are fed are those of these prompts, in their order. It gives the
        slots that the branches of each begin at, ``[rows, 2]`` int64, or None where they begin together.
    """

    layers: int
    kv_heads: int
    head_size: int
    raster: Raster
    dtype: torch.dtype
    device: torch.device
    step: Callable[[Tensor, Tensor], Tensor]
    forward: Callable[[Tensor, Tensor], None]
    recording: Callable[[Recorder], AbstractContextManager]
    output_weight: Callable[[int], Tensor]
    agree: Callable[[Tensor], Tensor] = lambda ids: ids
    rows: Callable[[Sequence[Sequence[int]]], AbstractContextManager[Tensor | None]] = lambda prompts: (
        nullcontext(None)
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
        self.outside = torch.zeros(self.layers, self.kv_heads, dtype=torch.float64)
        self.queries = torch.zeros(self.layers, dtype=torch.float64)

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
        share = share[drawing].view(-1, BRANCHES, self.kv_heads).mean(1)
        self.outside[layer] += share.sum(0).double().cpu()
        self.queries[layer] += int(drawing.sum())

    @property
    def scores(self) -> Tensor:
        """``[layers, kv_heads]`` float64 locality scores."""
        return self.outside / self.queries.clamp(min=1)[:, None]


@dataclass
class Drawn:
    """Pictures of a batch of prompts, and what was seen while they were drawn.

    ``ids``: per row the prompt and the whole picture; ``scores``: ``[layers, kv_heads]`` locality.
    """

    ids: list[list[int]]
    scores: Tensor


@torch.inference_mode()
def draw_full(
    subject: Subject,
    prompts: Sequence[Sequence[int]],
    neighbourhood: int,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> Drawn:
    """Draw a picture for each prompt with a full cache, and score the heads.

    Parameters
    ----------
    prompts : sequence of token ids
        The picture begins after each.
    neighbourhood : int
        Image tokens counted as near.
    """
    device, image = subject.device, subject.raster.tokens
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    steps = int(lengths.max()) + image - 1
    generator = torch.Generator(device=device).manual_seed(seed)
    ids = torch.tensor([p[0] for p in prompts], device=device)
    seen = [ids]
    with subject.rows(prompts) as begins:
        full = FullCache(
            subject.layers, subject.kv_heads, subject.head_size, steps, lengths, image, neighbourhood,
            subject.dtype, begins,
        )  # fmt: skip
        with subject.recording(full):
            for full.step in range(steps):
                logits = subject.step(ids, torch.full_like(ids, full.step))
                drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator).flatten()
                drawn = subject.agree(drawn)
                given = [p[full.step + 1] if full.step + 1 < len(p) else -1 for p in prompts]
                forced = torch.tensor(given, device=device)
                ids = torch.where(forced >= 0, forced, drawn)
                seen.append(ids)
                if progress is not None:
                    progress(full.step + 1, steps)
    rows = torch.stack(seen, 1).tolist()
    return Drawn([row[: len(p) + image] for row, p in zip(rows, prompts, strict=True)], full.scores)


@torch.inference_mode()
def measure_losses(
    subject: Subject,
    pictures: Sequence[tuple[int, Sequence[int]]],
    candidates: Sequence[HeadRule],
    progress: Progress | None = None,
) -> Tensor:
    """Loss curves from known pictures, replayed a few at a time.

    Parameters
    ----------
    pictures : sequence of (int, ids)
        Prompt tokens, and the prompt's and the picture's ids.

    Returns
    -------
    Tensor
        ``[layers, 2 * kv_heads, candidates]`` float64.
    """
    meter = LossMeter(candidates, subject.layers, BRANCHES * subject.kv_heads, subject.output_weight)
    done = 0

    class Counted:
        """The meter, which says after each layer how far it is."""

        residual = meter.residual

        @staticmethod
        def attend(*arguments: Any) -> Tensor:
            nonlocal done
            out = meter.attend(*arguments)
            done += 1
            if progress is not None:
                progress(done, batches * subject.layers)
            return out

    batches = -(-len(pictures) // REPLAYED_AT_ONCE)
    for first in range(0, len(pictures), REPLAYED_AT_ONCE):
        part = pictures[first : first + REPLAYED_AT_ONCE]
        steps = max(len(ids) for _, ids in part)
        rows = torch.tensor(
            [[*ids, *[ids[0]] * (steps - len(ids))] for _, ids in part], device=subject.device
        )
        prefix = torch.tensor([prefix for prefix, _ in part], device=subject.device)
        prompts = [ids[:prefix] for prefix, ids in part]
        with subject.rows(prompts) as begins, subject.recording(Counted):
            meter.begin(prefix, begins)
            subject.forward(rows.flatten(), torch.arange(steps, device=subject.device).repeat(len(part)))
    return meter.curves


def measure(
    subject: Subject,
    prompts: Sequence[Sequence[int]],
    lines: int,
    candidates: Sequence[HeadRule],
    progress: Callable[[str, int, int], None],
) -> tuple[Tensor, Tensor]:
    """Draw the prompts, then measure the heads on what was drawn.

    Parameters
    ----------
    prompts : sequence of token ids
        Of the model's family, as many as `PROMPTS`; locality is scored on as many as `LOCALITY_PROMPTS`.
    lines : int
        Lines that count as near in the locality scores.
    progress : callable
        Called with (what is being done, steps done, steps in all).

    Returns
    -------
    Tensor, Tensor
        ``[layers, kv_heads]`` locality scores; ``[layers, 2 * kv_heads, candidates]`` losses. float64.
    """
    first = len(LOCALITY_PROMPTS)
    rest = [prompts[n : n + DRAWN_AT_ONCE] for n in range(first, len(prompts), DRAWN_AT_ONCE)]
    batches = [prompts[:first], *rest]
    per_batch = [max(map(len, batch)) + subject.raster.tokens - 1 for batch in batches]
    before, found = 0, []
    for seed, (batch, steps) in enumerate(zip(batches, per_batch, strict=True)):

        def told(done: int, _: int, before: int = before) -> None:
            progress("drawing", before + done, sum(per_batch))

        found.append(draw_full(subject, batch, lines * subject.raster.width, seed=seed, progress=told))
        before += steps
    pictures = [
        (len(prompt), ids)
        for batch, drawn in zip(batches, found, strict=True)
        for prompt, ids in zip(batch, drawn.ids, strict=True)
    ]
    losses = measure_losses(
        subject, pictures, candidates, lambda done, total: progress("measuring", done, total)
    )
    return found[0].scores, losses
