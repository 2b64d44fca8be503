"""Fits tried on known pictures: the one is served whose guided distribution strays least.

A fit adds up losses of single heads, which says little of what the heads' errors do together: some stand in
for one another, and what becomes of an error differs a thousandfold from head to head (docs/quality.md). So
curves are weighed in several ways, each gives a fit, and the pictures that calibration drew are replayed
under every one of them, whole and with all heads compressed at once.

Cost: a forward pass of the pictures for each fit, and one for the full cache; for Janus-Pro-1B and 12
pictures 37 TFLOP each. Memory: as of measuring losses, and what the model makes of a pass's tokens, twice.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vllm_kvcompress.heads.dense import DenseReplay
from vllm_kvcompress.heads.fit import Assignment
from vllm_kvcompress.heads.known import Fed, Picture, feeding, in_batches
from vllm_kvcompress.heads.replay import FullReplay, Layered, Rows
from vllm_kvcompress.heads.subject import Progress, Subject


@torch.inference_mode()
def divergences(
    subject: Subject,
    pictures: Sequence[Picture],
    assignments: Sequence[Assignment],
    progress: Progress | None = None,
) -> NDArray[np.float64]:
    """What whole fits cost on known pictures; all ranks call it together, each with its own heads.

    Parameters
    ----------
    subject : Subject
    pictures : sequence of Picture
    assignments : sequence of Assignment
        This rank's heads.

    Returns
    -------
    array
        ``[assignments]``: Kullback-Leibler divergence from the full cache's next-token distribution at the
        model's own guidance, nats per token, mean over the pictures.
    """
    total = np.zeros(len(assignments))
    parts = in_batches(subject, pictures)
    for number, part in enumerate(parts):
        with feeding(subject, part) as fed:

            def under(method: Layered, fed: Fed = fed) -> Tensor:
                with subject.recording(_Attending(fed.rows, method)):
                    return subject.forward(fed.ids, fed.positions)

            full = under(FullReplay(fed.rows.begins))
            for place, one in enumerate(assignments):
                other = under(DenseReplay(fed.rows, one.rules, one.types.tolist()))
                total[place] += float(subject.apart(full, other, fed.rows).sum())
                if progress is not None:
                    progress(number * len(assignments) + place + 1, len(parts) * len(assignments))
    return np.maximum(total, 0) / len(pictures)


@dataclass
class _Attending:
    """A `Recorder` of whole rows."""

    rows: Rows
    method: Layered

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int, scale: float) -> Tensor:
        """``[rows * steps, heads, D]`` in, the same out."""
        shape = (len(self.rows), self.rows.steps)
        q, k, v = (x.unflatten(0, shape) for x in (q, k, v))
        return self.method.layer(q, k, v, layer, scale).flatten(0, 1)
