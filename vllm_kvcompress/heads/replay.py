"""Whole pictures in one forward pass: their rows, and the attention of a full cache over them.

A replay takes the place of the engine's cache for one forward pass of whole rows (prompt and picture).
`vllm_kvcompress.heads.dense` has one that masks by head types' rules, `vllm_kvcompress.eval.replay` one on
the kernels that serve.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


@dataclass
class Rows:
    """The rows that are replayed, padded on the right to one length.

    Parameters
    ----------
    prefix : Tensor
        ``[rows]`` int32 prompt tokens.
    image : int
        Image tokens of every row.
    steps : int
        Tokens of the longest row.
    begins : Tensor, optional
        ``[rows, 2]`` int64 where the branches' prompts begin, if of unlike length; as in `Plan`.
    """

    prefix: Tensor
    image: int
    steps: int
    begins: Tensor | None = None

    def __len__(self) -> int:
        return len(self.prefix)

    def drawn(self) -> Tensor:
        """``[rows, steps]`` bool: image tokens."""
        at = torch.arange(self.steps, device=self.prefix.device)
        return (at >= self.prefix[:, None]) & (at < self.prefix[:, None] + self.image)


class Layered(Protocol):
    """One layer's attention under a rule, of all tokens of all rows."""

    def layer(self, q: Tensor, k: Tensor, v: Tensor, layer: int, scale: float) -> Tensor:
        """``q [rows, steps, 2 * Hq, D]``, k and v alike -> like q."""


class FullReplay:
    """Causal attention to everything: the full cache.

    Parameters
    ----------
    begins : Tensor, optional
        As in `Rows`: nobody sees what lies before a branch's prompt, whose own outputs are zeros.
    """

    def __init__(self, begins: Tensor | None = None) -> None:
        self.begins = begins

    def layer(self, q: Tensor, k: Tensor, v: Tensor, layer: int, scale: float) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return causal(q, k, v, scale, self.begins).transpose(1, 2).contiguous()


def causal(q: Tensor, k: Tensor, v: Tensor, scale: float, begins: Tensor | None) -> Tensor:
    """Full causal attention of rows of one length, ``[rows, heads, steps, D]`` each; zeros before ``begins``.

    ``begins`` is ``[rows, 2]``, of the first and the second half of the heads; None stands for zeros.
    """
    if begins is None:
        return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    out = torch.zeros_like(q)
    for row, both in enumerate(begins.tolist()):
        for branch, first in enumerate(both):
            query, key, value = (x[row, None].chunk(2, 1)[branch][:, :, first:] for x in (q, k, v))
            got = scaled_dot_product_attention(
                query, key, value, is_causal=True, scale=scale, enable_gqa=True
            )
            out[row, None].chunk(2, 1)[branch][:, :, first:] = got
    return out
