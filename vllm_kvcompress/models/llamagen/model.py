"""LlamaGen drawing pictures of classes: Janus's two branches around a Llama with two-dimensional RoPE.

Source of the architecture: FoundationVision/LlamaGen, autoregressive/models/gpt.py.
"""

from typing import Any

import torch
from torch import Tensor, nn

from vllm_kvcompress.models.branched import BranchedImageModel
from vllm_kvcompress.models.branched_llama import BranchedAttention, BranchedLayer, BranchedLlama
from vllm_kvcompress.models.llamagen.config import PREFIX


def grid_rope_table(grid: int, head_size: int, theta: float, prefix: int = PREFIX) -> Tensor:
    """cos and sin of a picture's cells, after rows of zeros for the tokens before it.

    The zeros are LlamaGen's own, in training too: they make queries and keys of the prefix zero. A cell's row
    turns the first half of a head's pairs, its column the other half; each half has the frequencies
    ``theta ** (-4 m / head_size)``.

    Returns
    -------
    Tensor
        float32 ``[prefix + grid * grid, 2, head_size / 2]``.

    Raises
    ------
    ValueError
        ``head_size`` is not a multiple of 4.
    """
    if head_size % 4:
        raise ValueError(f"config.json: two-dimensional RoPE needs heads of a multiple of 4, got {head_size}")
    half = head_size // 2
    frequency = 1.0 / theta ** (torch.arange(0, half, 2, dtype=torch.float32) / half)
    angle = torch.arange(grid, dtype=torch.float32)[:, None] * frequency  # [grid, half / 2]
    row, column = angle[:, None].expand(-1, grid, -1), angle[None].expand(grid, -1, -1)
    cells = torch.cat([row, column], -1).flatten(0, 1)
    table = torch.stack([cells.cos(), cells.sin()], 1)
    return torch.cat([table.new_zeros(prefix, 2, half), table])


class GridRope(nn.Module):
    """Rotates adjacent channels of queries and keys by their cell in the picture, in float32.

    vLLM's own op would cast the table to the model's dtype, which LlamaGen does not.

    Parameters
    ----------
    table : Tensor
        Of `grid_rope_table`; a token's row is its position.
    """

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.register_buffer("table", table, persistent=False)
        self.table: Tensor

    def forward(self, positions: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """``positions`` ``[n]``; q and k ``[n, heads * head_size]``, the same out."""
        # Positions past the picture are of tokens that only fill up a batch.
        cos, sin = self.table[positions.clamp(max=len(self.table) - 1)].unbind(1)
        return self._turned(q, cos, sin), self._turned(k, cos, sin)

    @staticmethod
    def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        pairs = x.float().view(len(x), -1, cos.shape[-1], 2)
        even, odd = pairs.unbind(-1)
        cos, sin = cos[:, None], sin[:, None]
        return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).view(x.shape).to(x.dtype)


class GridAttention(BranchedAttention):
    """BranchedAttention whose RoPE knows the picture's grid."""

    def make_rope(self, config: Any, head_size: int, positions: int) -> nn.Module:
        return GridRope(grid_rope_table(config.grid, head_size, config.grid_rope_theta))


class GridLayer(BranchedLayer):
    attention = GridAttention


class GridLlama(BranchedLlama):
    layer = GridLayer


class LlamaGenForImageGeneration(BranchedImageModel):
    """Class-conditional LlamaGen; ``embed_tokens`` holds the classes, ``image_embedding`` the codes."""

    decoder = GridLlama
