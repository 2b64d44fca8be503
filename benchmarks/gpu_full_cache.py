"""Decode attention over a full cache, for part (c) of gpu.py: the best implementation that is installed.

In this order: FlashAttention 3 or 2 as vLLM brings it, FlashAttention 3 (``flash_attn_interface``),
FlashAttention 2 (``flash_attn``), torch's scaled_dot_product_attention. The cache is contiguous and holds
exactly the tokens so far, which is kinder to it than any paged cache.
"""

from collections.abc import Callable
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
TOLERANCE = 2**-6  # relative error of a bfloat16 implementation against another


def attends(layers: int, rows: int, heads: int, tokens: int, size: int, device: str) -> dict[str, Attend]:
    """Every implementation that can be imported, best first, over one cache of random numbers.

    Each takes a layer's number and q, k, v ``[rows, heads, size]`` of the new token, puts k and v into the
    cache's last place and returns the attention ``[rows, heads, size]``.
    """
    shape = (layers, 2, rows, tokens, heads, size)
    cache = torch.empty(shape, device=device, dtype=torch.bfloat16).normal_()
    found = {name: make(cache) for name, make in MAKERS.items() if device != "cpu" or name == "sdpa"}
    return {name: attend for name, attend in found.items() if attend is not None}


def _vllm_flash(cache: Tensor) -> Attend | None:
    try:
        flash = import_module("vllm.vllm_flash_attn").flash_attn_varlen_func
    except (ImportError, AttributeError):
        return None
    rows, tokens = cache.shape[2:4]
    version = 3 if torch.cuda.get_device_capability()[0] == 9 else 2
    one = torch.arange(rows + 1, dtype=torch.int32, device=cache.device)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache[layer, 0, :, -1], cache[layer, 1, :, -1] = k, v
        keys, values = (x.flatten(0, 1) for x in cache[layer])
        return flash(
            q, keys, values, max_seqlen_q=1, cu_seqlens_q=one, max_seqlen_k=tokens,
            cu_seqlens_k=one * tokens, causal=True, fa_version=version,
        )  # fmt: skip

    return attend


def _flash_package(package: str) -> Callable[[Tensor], Attend | None]:
    def make(cache: Tensor) -> Attend | None:
        try:
            flash = import_module(package).flash_attn_with_kvcache
        except (ImportError, AttributeError):
            return None
        filled = torch.full((cache.shape[2],), cache.shape[3] - 1, dtype=torch.int32, device=cache.device)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            new = q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1)
            keys, values = cache[layer]
            out = flash(new[0], keys, values, k=new[1], v=new[2], cache_seqlens=filled, causal=True)
            return (out[0] if isinstance(out, tuple) else out).squeeze(1)

        return attend

    return make


def _sdpa(cache: Tensor) -> Attend:
    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache[layer, 0, :, -1], cache[layer, 1, :, -1] = k, v
        keys, values = (x.transpose(1, 2) for x in cache[layer])
        return F.scaled_dot_product_attention(q.unsqueeze(2), keys, values).squeeze(2)

    return attend


MAKERS: dict[str, Callable[[Tensor], Attend | None]] = {
    "vllm flash": _vllm_flash,
    "flash 3": _flash_package("flash_attn_interface"),
    "flash 2": _flash_package("flash_attn"),
    "sdpa": _sdpa,
}


def best(heads: int, size: int, device: str) -> tuple[str, dict[str, str]]:
    """The first implementation that runs here and agrees with torch's; and why others were passed over."""
    found = attends(1, 4, heads, 61, size, device)
    q, k, v = torch.randn(3, 4, heads, size, device=device).bfloat16().unbind()
    want = found["sdpa"](0, q, k, v).float()
    passed: dict[str, str] = {}
    for name, attend in found.items():
        try:
            error = float((attend(0, q, k, v).float() - want).norm() / want.norm())
        except Exception as problem:  # a library of another version, or without code for this card
            passed[name] = f"{type(problem).__name__}: {problem}"[:200]
            continue
        if error < TOLERANCE:
            return name, passed
        passed[name] = f"differs by {error:.1e}"
    raise AssertionError(f"torch's attention disagrees with itself: {passed}")
