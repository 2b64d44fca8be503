"""vLLM's Llama with both branches of classifier-free guidance in every row.

Every token enters it twice, as the conditional and the unconditional branch, next to each other
(``[N, H] -> [2N, H]``), so that q, k and v of one token are ``2 x heads`` heads of ONE row for the attention
backend.
"""

from typing import Any

from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaModel

from vllm_kvcompress.attention.layer import attention_layer
from vllm_kvcompress.attention.pages import BRANCHES
from vllm_kvcompress.models.config import cached_head_size, head_size


class BranchedAttention(nn.Module):
    """Llama's attention over rows that hold both branches of a token in the head axis.

    The parameters are LlamaAttention's (vllm model_executor/models/llama.py), so its weight loading
    applies; only the attention layer differs, having ``2 x heads`` heads.
    """

    def __init__(
        self,
        config: Any,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        max_position_embeddings: int = 8192,
        quant_config: Any = None,
        bias: bool = False,
        bias_o_proj: bool = False,
        cache_config: Any = None,
        prefix: str = "",
        attn_type: str = "decoder",
    ) -> None:
        super().__init__()
        tensor_parallel = get_tensor_model_parallel_world_size()
        head_dim = head_size(config)
        self.qkv_proj = QKVParallelLinear(
            hidden_size, head_dim, num_heads, num_kv_heads, bias=bias, quant_config=quant_config,
            prefix=f"{prefix}.qkv_proj",
        )  # fmt: skip
        self.o_proj = RowParallelLinear(
            num_heads * head_dim, hidden_size, bias=bias_o_proj, quant_config=quant_config,
            prefix=f"{prefix}.o_proj",
        )  # fmt: skip
        self.rotary_emb = self.make_rope(config, head_dim, max_position_embeddings)
        heads = num_heads // tensor_parallel
        kv_heads = max(1, num_kv_heads // tensor_parallel)
        self.q_size, self.kv_size = heads * head_dim, kv_heads * head_dim
        self.head_size, self.padding = head_dim, cached_head_size(config) - head_dim
        self.attn = attention_layer(
            heads=BRANCHES * heads,
            kv_heads=BRANCHES * kv_heads,
            head_size=head_dim + self.padding,
            scale=head_dim**-0.5,
            cache_config=cache_config,
            quant_config=quant_config,
            prefix=f"{prefix}.attn",
        )

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        qkv, _ = self.qkv_proj(hidden_states)
        q, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        q, k = self.placed(positions, q, k)
        out = self.attn(self._rows(q, self.q_size), self._rows(k, self.kv_size), self._rows(v, self.kv_size))
        if self.padding:
            out = out.unflatten(-1, (-1, self.head_size + self.padding))[..., : self.head_size]
        output, _ = self.o_proj(out.reshape(-1, self.q_size))
        return output

    def placed(self, positions: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys as they are attended to and cached: rotated; a model's own may do more."""
        q, k = self.rotary_emb(positions, q, k)
        return q, k

    def _rows(self, x: Tensor, size: int) -> Tensor:
        """``[2 * tokens, size]`` -> ``[tokens, 2 * size]``, heads filled up with zeros for the cache."""
        if self.padding:
            padded = nn.functional.pad(x.unflatten(-1, (-1, self.head_size)), (0, self.padding))
            return padded.reshape(len(x) // BRANCHES, -1)
        return x.reshape(-1, BRANCHES * size)

    def make_rope(self, config: Any, head_size: int, positions: int) -> nn.Module:
        """``(positions, q, k) -> (q, k)``, rotated."""
        return get_rope(
            head_size, max_position=positions, rope_parameters=getattr(config, "rope_parameters", None)
        )


class BranchedLayer(LlamaDecoderLayer):
    """LlamaDecoderLayer with ``BranchedAttention``."""

    attention: type[BranchedAttention] = BranchedAttention

    def __init__(self, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config, prefix=prefix, attn_layer_type=self.attention)


class BranchedLlama(LlamaModel):
    """vLLM's LlamaModel, seen from outside with one row a token.

    The rows double inside the compiled region, so that vLLM's compile ranges and CUDA graph sizes,
    which count tokens, are right as they are.
    """

    layer: type[BranchedLayer] = BranchedLayer

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=self.layer)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **extra: Any,
    ) -> Tensor:
        """``positions`` ``[tokens]``, or each branch's own ``[tokens, 2]``; ``inputs_embeds``
        ``[tokens, 2 * hidden]``, and the same comes out."""
        assert inputs_embeds is not None
        both = positions.repeat_interleave(BRANCHES) if positions.ndim == 1 else positions.flatten()
        hidden: Any = super().forward(None, both, None, inputs_embeds.view(-1, self.config.hidden_size))
        return hidden.view(positions.shape[0], -1)
