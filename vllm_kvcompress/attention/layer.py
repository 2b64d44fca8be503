"""The attention layer of a decoder layer: vLLM's own, or the compressed cache's."""

from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.utils.torch_utils import direct_register_custom_op

from vllm_kvcompress.config import is_compressed
from vllm_kvcompress.policy.rule import MAX_TYPES

# Names of the cache layers, by head type; the runner orders them by the one integer in a name. Through the
# first, an attention call finds its engine's cache.
CACHES = tuple(f"kvcompress.{kind}" for kind in range(MAX_TYPES))


def _attend(query: Tensor, key: Tensor, value: Tensor, layer: int, head_size: int, scale: float) -> Tensor:
    store = get_forward_context().no_compile_layers[CACHES[0]].store
    q, k, v = (x.view(x.shape[0], -1, head_size) for x in (query, key, value))
    return store.attend(q, k, v, layer, scale).view_as(query)


def _attend_fake(
    query: Tensor, key: Tensor, value: Tensor, layer: int, head_size: int, scale: float
) -> Tensor:
    return torch.empty_like(query)


# A custom op, so that torch.compile leaves the cache alone.
direct_register_custom_op("kvcompress_attend", _attend, fake_impl=_attend_fake)


class CompressedAttention(nn.Module):
    """One decoder layer's attention over the head types' caches.

    The cache itself belongs to the engine (``CompressedCache``); a layer is its index in it.
    """

    def __init__(self, head_size: int, layer: int, scale: float) -> None:
        super().__init__()
        self.head_size, self.layer, self.scale = head_size, layer, scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """``[tokens, heads * head_size]`` and twice ``[tokens, kv_heads * head_size]``; like query out."""
        return torch.ops.vllm.kvcompress_attend(query, key, value, self.layer, self.head_size, self.scale)


def attention_layer(
    *,
    heads: int,
    kv_heads: int,
    head_size: int,
    scale: float,
    cache_config: Any,
    quant_config: Any,
    prefix: str,
) -> nn.Module:
    """The layer that the served configuration asks for.

    Parameters
    ----------
    heads, kv_heads : int
        Query and KV heads of one row, both branches counted.
    head_size : int
        Channels of a head in the cache.
    scale : float
        Of the products of queries and keys.
    """
    if is_compressed(get_current_vllm_config()):
        return CompressedAttention(head_size, extract_layer_index(prefix), scale)
    return Attention(
        heads,
        head_size,
        scale,
        num_kv_heads=kv_heads,
        cache_config=cache_config,
        quant_config=quant_config,
        prefix=prefix,
    )
