"""The floor of a step: the bytes that must move, at the speed of a plain copy measured in the same run."""

import time

import torch

from side_by_side.workloads import BYTES, Workload

_BYTES = {None: BYTES, "int8": 1, "int4": 0.5}  # of a weight of a linear layer, by form
_COPIED = 1 << 29  # bytes, twice: source and target together are larger than any cache


class Copy:
    """A multi-threaded copy of half a gibibyte: what this machine's memory gives, now."""

    def __init__(self, size: int = _COPIED) -> None:
        self._source = torch.ones(size, dtype=torch.uint8)
        self._target = torch.zeros_like(self._source)

    def gb_s(self) -> float:
        """Bytes read and written, in 1e9 a second; the median of three copies."""
        taken = []
        for _ in range(3):
            start = time.perf_counter()
            self._target.copy_(self._source)
            taken.append(time.perf_counter() - start)
        return 2 * self._source.numel() / sorted(taken)[1] / 1e9


def weight_bytes(workload: Workload, weights: str | None = None) -> int:
    """Weights that a decode step reads: decoder layers and image head, each once whatever the batch.

    ``weights`` is the form of the decoder's linear layers; None is bfloat16. Scales are left out. 0 for the
    demo model, whose weights fit a cache.
    """
    g = workload.geometry
    if g is None:
        return 0
    kv = g.hidden // g.heads * g.kv_heads
    layer = 2 * g.hidden * g.hidden + 2 * g.hidden * kv + 3 * g.hidden * g.intermediate
    return round(_BYTES[weights] * g.layers * layer) + BYTES * (g.hidden * g.hidden + g.hidden * g.codebook)


def step_bytes(
    workload: Workload, batch: int, prefix: int, drawn: float, budget: float, weights: str | None = None
) -> float:
    """Bytes that one step of ``batch`` pictures must move: weights, and K and V of what is resident.

    Parameters
    ----------
    prefix : int
        Prompt tokens of each picture.
    drawn : float
        Image tokens that the step sees, before eviction.
    budget : float
        Share of a picture's tokens that stays resident.
    weights : str or None
        Form of the linear layers' weights.
    """
    resident = prefix + min(drawn, budget * workload.tokens)
    return weight_bytes(workload, weights) + batch * resident * workload.token_bytes
