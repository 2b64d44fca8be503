"""The V2 runner's window step: what stands, and the next drafts; nothing waits for the device.

vLLM runs drafts without a speculator for diffusion language models (v1/worker/gpu/model_runner.py): the
number of places comes from ``DiffusionConfig``, the sampler gets all places' logits, says how many tokens
stand, and writes ``req_states.draft_tokens``. Its noise is a function of seed and position already
(v1/worker/gpu/sample/gumbel.py).
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Places:
    """Where a step's samples lie.

    Parameters
    ----------
    counts : Tensor
        ``[rows]`` int64: places of each row, 1 without drafts.
    starts : Tensor
        ``[rows]`` int64: its first among all.
    most : int
        The most of any row.
    """

    counts: Tensor
    starts: Tensor
    most: int

    def table(self, flat: Tensor, fill: int = -1) -> Tensor:
        """``[places]`` -> ``[rows, most]``, filled up."""
        nth = torch.arange(self.most, device=flat.device)
        at = (self.starts[:, None] + nth).clamp(max=len(flat) - 1)
        return torch.where(nth < self.counts[:, None], flat[at], fill)


@dataclass(frozen=True)
class Known:
    """Ids known before a step, ``[rows, positions]``.

    vLLM keeps all requests' in the host's memory, where a GPU reads them: so only cells that are asked for.

    Parameters
    ----------
    table : Tensor
        ``[slots, positions]``.
    slots : Tensor
        ``[rows]``: where in it each row of the batch is.
    """

    table: Tensor
    slots: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """As a tensor's."""
        return len(self.slots), self.table.shape[1]

    def gather(self, dim: int, positions: Tensor) -> Tensor:
        """As a tensor's, along positions (``dim`` 1): ``[rows, n]`` -> ids at these."""
        return self.table[self.slots[:, None], positions]


def standing(samples: Tensor, inputs: Tensor, counts: Tensor, limit: Tensor) -> Tensor:
    """How many samples stand.

    Parameters
    ----------
    samples, inputs : Tensor
        ``[rows, most]`` ids sampled at each place, and fed there.
    counts, limit : Tensor
        ``[rows]``: places, and the most that may stand.

    Returns
    -------
    Tensor
        ``[rows]`` int64, at least 1.
    """
    right = samples[:, :-1] == inputs[:, 1:]
    right &= torch.arange(1, samples.shape[1], device=samples.device) < counts[:, None]
    return torch.minimum(1 + right.long().cumprod(1).sum(1), limit.clamp(min=1))


def next_drafts(
    samples: Tensor, counts: Tensor, stands: Tensor, known: Tensor | Known, places: Tensor, prefix: Tensor,
    line: Tensor | int, count: int, eol: int = -1,
) -> Tensor:  # fmt: skip
    """Drafts for the places after the tokens that stand.

    As `Drawing.drafts`: the samples beyond, then the tokens above. In the first line, and where a line is
    shorter than the window, the last sample fills up.

    Parameters
    ----------
    samples, counts, stands : Tensor
        As in `standing`, and what it returned.
    known : Tensor or Known
        ``[rows, positions]`` ids known before this step.
    places : Tensor
        ``[rows]`` position of the token that each row's first place fed.
    prefix : Tensor
        ``[rows]`` tokens before the picture's first.
    line : Tensor or int
        Tokens a line, ``[rows]`` or of all rows.
    count : int
        Drafts wanted.
    eol : int
        Id that every line ends in, a draft that is always right; -1 without.

    Returns
    -------
    Tensor
        ``[rows, count]`` ids.
    """
    line = line[:, None] if isinstance(line, Tensor) else line
    nth = torch.arange(count, device=samples.device)
    at = stands[:, None] + nth
    kept = samples.gather(1, at.clamp(max=samples.shape[1] - 1))
    position = places[:, None] + 1 + at
    above = position - line
    held = known.gather(1, above.clamp(min=0, max=known.shape[1] - 1)).to(samples.dtype)
    last = samples.gather(1, (counts - 1)[:, None])
    fill = torch.where((above >= prefix[:, None]) & (above <= places[:, None]), held, last)
    drafts = torch.where(at < counts[:, None], kept, fill)
    if eol < 0:
        return drafts
    return torch.where((position - prefix[:, None] + 1) % line == 0, eol, drafts)
