"""Stretches of tokens of unlike length as few rectangular tensors: few calls, and little of them padding.

A stretch is padded to a length that depends on its own alone: its sums are of the same shape in any company,
and the same to the last bit.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from vllm.utils.torch_utils import async_tensor_h2d

LEAST = 8  # lengths up to this are alike


@dataclass(frozen=True)
class Padded:
    """Stretches of consecutive tokens, below one another.

    Parameters
    ----------
    at : Tensor
        [rows, width] int64: the token at each place; a shorter row repeats its last one.
    real : Tensor
        [n] int64: the places, counted through all rows, that are not repetitions.
    tokens : Tensor
        [n] int64: the tokens at these places.
    """

    at: Tensor
    real: Tensor
    tokens: Tensor

    @classmethod
    def of(cls, firsts: Sequence[int], counts: Sequence[int], width: int, device: torch.device) -> "Padded":
        """Of stretches that begin at ``firsts`` and have ``counts`` tokens, from one to ``width``."""
        nth = np.arange(width)
        count = np.asarray(counts)[:, None]
        at = np.asarray(firsts)[:, None] + np.minimum(nth, count - 1)
        real = np.flatnonzero(nth < count)
        return cls(*(async_tensor_h2d(x, device=device) for x in (at, real, at.ravel()[real])))


def alike(sizes: Iterable[tuple[int, ...]]) -> dict[tuple[int, ...], list[int]]:
    """Numbers of the items by what their sizes are padded to: a quarter more at most, or `LEAST`.

    ``sizes`` has the same few lengths of each item. A length and its double are at most four groups apart.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, size in enumerate(sizes):
        groups.setdefault(tuple(map(rounded, size)), []).append(number)
    return groups


def rounded(length: int) -> int:
    """A length, padded, has up to three leading bits: four sizes between a power of two and the next."""
    step = max(LEAST, 1 << max(0, (length - 1).bit_length() - 3))
    return -(-length // step) * step
