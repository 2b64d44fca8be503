"""Lumina-mGPT drawing pictures: Chameleon, which is a Llama with a LayerNorm of every query and key head.

Sources of the architecture: Alpha-VLLM/Lumina-mGPT, lumina_mgpt/model/chameleon/modeling_chameleon.py;
transformers models/chameleon.
"""

from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.utils import set_weight_attrs

from vllm_kvcompress.models.branched import decoder_named
from vllm_kvcompress.models.branched_llama import BranchedAttention, BranchedLayer, BranchedLlama
from vllm_kvcompress.models.one_table import OneTableImageModel

EPS = 1e-5  # Chameleon's, whatever config.json says of the other norms


class HeadNorm(nn.Module):
    """LayerNorm of each head's channels, with weights and biases of its own; this rank's heads.

    Parameters
    ----------
    heads : int
        Of all ranks.
    size : int
        Channels of a head.
    """

    def __init__(self, heads: int, size: int) -> None:
        super().__init__()
        self.heads, self.size = heads, size
        mine = heads // get_tensor_model_parallel_world_size()
        self.weight = nn.Parameter(torch.ones(mine, size), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(mine, size), requires_grad=False)
        for parameter in (self.weight, self.bias):
            set_weight_attrs(parameter, {"weight_loader": self._load})

    def _load(self, parameter: nn.Parameter, tensor: Tensor) -> None:
        """``[size]`` of all heads, or ``[rows, size]``, each of as many heads that follow one another."""
        rows = tensor.reshape(-1, self.size)
        whole = rows.repeat_interleave(self.heads // len(rows), 0)
        first = get_tensor_model_parallel_rank() * len(parameter)
        parameter.data.copy_(whole[first : first + len(parameter)])

    def forward(self, x: Tensor) -> Tensor:
        """``[n, heads * size]`` of this rank -> the same, normalised."""
        heads = x.unflatten(-1, (-1, self.size))
        heads = nn.functional.layer_norm(heads, (self.size,), eps=EPS)
        return (heads * self.weight + self.bias).flatten(-2)


class NormedAttention(BranchedAttention):
    """BranchedAttention whose queries and keys are normalised before RoPE."""

    def __init__(self, config: Any, hidden_size: int, num_heads: int, num_kv_heads: int, **more: Any) -> None:
        super().__init__(config, hidden_size, num_heads, num_kv_heads, **more)
        self.q_norm, self.k_norm = (HeadNorm(heads, self.head_size) for heads in (num_heads, num_kv_heads))

    def placed(self, positions: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return super().placed(positions, self.q_norm(q), self.k_norm(k))


class NormedLayer(BranchedLayer):
    attention = NormedAttention


class NormedLlama(BranchedLlama):
    layer = NormedLayer


class LuminaForImageGeneration(OneTableImageModel):
    decoder = NormedLlama
    hf_to_vllm_mapper = decoder_named("model.")
