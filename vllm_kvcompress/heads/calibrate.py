"""One calibration: pictures drawn with a full cache, the heads' locality, and their loss curves.

The locality score of a head (SSD, arXiv 2510.18716) is the attention mass that its image queries give to
image tokens outside their neighbourhood, as a share of what they give to image tokens at all, mean over
prompts and queries: what a spatial head would lose. The neighbourhood is the ``recent`` window in raster
order. Loss curves are `vllm_kvcompress.heads.losses`; they are measured on the pictures drawn here.

The model draws by itself, without vLLM's scheduler: it has to be known which heads are which before vLLM
can be told how much memory a picture takes. Nothing here knows what model it is (`Subject`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vllm_kvcompress.attention.pages import BRANCHES
from vllm_kvcompress.heads import memory
from vllm_kvcompress.heads.full import FullCache, scores_of
from vllm_kvcompress.heads.known import Picture, agreed, feeding, in_batches
from vllm_kvcompress.heads.losses import LossMeter
from vllm_kvcompress.heads.subject import Progress, Subject
from vllm_kvcompress.policy import HeadRule

DRAWN_TOGETHER = 8  # whose noise is one generator's, at once or not
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


def text_of(prompt: int | str) -> str:
    """A prompt's text, or that of the built-in one of this number."""
    return prompt if isinstance(prompt, str) else PROMPTS[prompt]


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
    at_once: int | None = None,
    progress: Progress | None = None,
) -> Drawn:
    """Draw a picture for each prompt with a full cache, and score the heads.

    The noise of a row is the same however many are drawn at once: each pass makes that of all rows.

    Parameters
    ----------
    prompts : sequence of token ids
        The picture begins after each.
    neighbourhood : int
        Image tokens counted as near.
    at_once : int, optional
        Rows of a pass at most; all, if left out.
    """
    steps = max(map(len, prompts)) + subject.raster.tokens - 1
    parts = list(memory.passes(len(prompts), at_once or len(prompts)))
    ids, caches = [], []
    for number, part in enumerate(parts):

        def told(done: int, before: int = number * steps) -> None:
            if progress is not None:
                progress(before + done, len(parts) * steps)

        drawn, cache = _draw_pass(subject, prompts, part, steps, neighbourhood, seed, told)
        ids += drawn
        caches.append(cache)
    return Drawn(ids, scores_of(caches))


def _draw_pass(
    subject: Subject,
    every: Sequence[Sequence[int]],
    part: slice,
    steps: int,
    neighbourhood: int,
    seed: int,
    told: Callable[[int], None],
) -> tuple[list[list[int]], FullCache]:
    """Some of the rows: prompt and picture of each, and the cache, which lets go of K and V."""
    device, image, prompts = subject.device, subject.raster.tokens, every[part]
    lengths = torch.tensor([len(p) for p in prompts], device=device)
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
                likely = subject.step(ids, torch.full_like(ids, full.step)).softmax(-1)
                # What torch.multinomial does, of which this is a part of the rows.
                noise = likely.new_empty(len(every), likely.shape[1]).exponential_(generator=generator)
                drawn = subject.agree((likely / noise[part]).argmax(-1))
                given = [p[full.step + 1] if full.step + 1 < len(p) else -1 for p in prompts]
                forced = torch.tensor(given, device=device)
                ids = torch.where(forced >= 0, forced, drawn)
                seen.append(ids)
                told(full.step + 1)
    full.release()
    rows = torch.stack(seen, 1).tolist()
    return [row[: len(p) + image] for row, p in zip(rows, prompts, strict=True)], full


@torch.inference_mode()
def measure_losses(
    subject: Subject,
    pictures: Sequence[Picture],
    candidates: Sequence[HeadRule],
    progress: Progress | None = None,
) -> tuple[Tensor, Tensor]:
    """Loss curves from known pictures, replayed a few at a time.

    Returns
    -------
    Tensor, Tensor
        ``[layers, 2 * kv_heads, candidates]``, and guided ``[layers, kv_heads, candidates]``, both float64.
    """
    meter = LossMeter(
        candidates, subject.layers, BRANCHES * subject.kv_heads, subject.output_weight, subject.guidance
    )
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
                progress(done, len(parts) * subject.layers)
            return out

    parts = in_batches(subject, pictures)
    for part in parts:
        with feeding(subject, part) as fed, subject.recording(Counted):
            meter.begin(fed.rows.prefix, fed.rows.begins)
            subject.forward(fed.ids, fed.positions)
    return meter.curves, meter.guided


def _drawn_at_once(subject: Subject, steps: int) -> int:
    row = memory.drawing_bytes(subject.layers, subject.kv_heads, subject.head_size, steps, subject.dtype)
    return agreed(subject, memory.rows_at_once(row, subject.device, "draw"))


def measure(
    subject: Subject,
    prompts: Sequence[Sequence[int]],
    lines: int,
    candidates: Sequence[HeadRule],
    progress: Callable[[str, int, int], None],
) -> tuple[Tensor, Tensor, list[Picture], Tensor]:
    """Draw the prompts, then measure the heads on what was drawn.

    Parameters
    ----------
    prompts : sequence of token ids
        Of the model's family; locality is scored on the first, as many as `LOCALITY_PROMPTS`.
    lines : int
        Lines that count as near in the locality scores.
    progress : callable
        Called with (what is being done, steps done, steps in all).

    Returns
    -------
    Tensor, Tensor, list of Picture, Tensor
        ``[layers, kv_heads]`` locality scores; ``[layers, 2 * kv_heads, candidates]`` losses, both float64;
        what was drawn, in the prompts' order; guided losses ``[layers, kv_heads, candidates]`` float64.
    """
    first = len(LOCALITY_PROMPTS)
    rest = [prompts[n : n + DRAWN_TOGETHER] for n in range(first, len(prompts), DRAWN_TOGETHER)]
    batches = [prompts[:first], *rest]
    at_once = _drawn_at_once(subject, max(map(len, prompts)) + subject.raster.tokens - 1)
    per_batch = [
        (max(map(len, batch)) + subject.raster.tokens - 1) * len(list(memory.passes(len(batch), at_once)))
        for batch in batches
    ]
    before, found = 0, []
    for seed, (batch, steps) in enumerate(zip(batches, per_batch, strict=True)):

        def told(done: int, _: int, before: int = before) -> None:
            progress("drawing", before + done, sum(per_batch))

        found.append(
            draw_full(subject, batch, lines * subject.raster.width, seed=seed, at_once=at_once, progress=told)
        )
        before += steps
    pictures = [
        Picture(len(prompt), ids)
        for batch, drawn in zip(batches, found, strict=True)
        for prompt, ids in zip(batch, drawn.ids, strict=True)
    ]
    losses, guided = measure_losses(
        subject, pictures, candidates, lambda done, total: progress("measuring", done, total)
    )
    return found[0].scores, losses, pictures, guided
