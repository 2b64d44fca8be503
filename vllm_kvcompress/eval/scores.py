"""Scores to compare with the presets' own: what could say that a token will not be missed.

Each takes a `Line` and gives ``[rows, heads, tokens]``; the lowest are overwritten. Serving has `sum`,
its decay and the refinements of `HeadRule`; the others are here to be measured
(`vllm-kvcompress eval --ablation`).
"""

import torch
from torch import Tensor

from vllm_kvcompress.heads.dense import Choice, Line, summed


def largest(line: Line) -> Tensor:
    """The most that any of the line's queries gave."""
    return line.probability.amax((2, 3))


def last_query(line: Line) -> Tensor:
    """What the line's last token gave."""
    return line.probability[..., -1, :].sum(2)


def random(line: Line) -> Tensor:
    """No score: chance decides. The floor that a score has to beat."""
    generator = torch.Generator(device=line.probability.device).manual_seed(line.probability.shape[-1])
    shape = line.before.shape
    return torch.rand(shape, generator=generator, device=line.before.device)


def value_weighted(line: Line) -> Tensor:
    """`sum` times the norm of the value."""
    return line.probability.sum((2, 3)) * line.value.norm(dim=-1)


SCORES: dict[str, Choice] = {
    "sum": summed,
    "max": largest,
    "last query": last_query,
    "sum x value norm": value_weighted,
    "random": random,
}
