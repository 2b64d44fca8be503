"""Causal attention of whole prompts that lie one after another: the best implementation at hand.

On CUDA: vLLM's flash attention where it is installed, xformers with a block-diagonal causal mask where that
is (an optional extra), else torch's scaled_dot_product_attention, once for prompts of like length, as on
other devices.
"""

from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from importlib import import_module
from importlib.util import find_spec
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from vllm_kvcompress.attention.padding import Padded, alike

__all__ = ["attend_prompts", "choose"]

FLASH = "vllm.v1.attention.backends.fa_utils"
HALF = (torch.bfloat16, torch.float16)
MAX_HEAD_SIZE = 256  # of flash attention
Attend = Callable[[Tensor, Tensor, Tensor, Sequence[int], float], Tensor]


@cache
def choose(device_type: str, dtype: torch.dtype, head_size: int) -> str:
    """The implementation for such tensors: ``flash``, ``xformers`` or ``sdpa``."""
    if device_type == "cuda" and dtype in HALF:
        if head_size <= MAX_HEAD_SIZE and head_size % 8 == 0 and _flash_version(head_size) is not None:
            return "flash"
        if find_spec("xformers") is not None:
            return "xformers"
    return "sdpa"


def attend_prompts(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], scale: float) -> Tensor:
    """Each prompt's tokens attend to those before them and to themselves.

    Parameters
    ----------
    q : Tensor
        [tokens, heads, D], the prompts one after another.
    k, v : Tensor
        [tokens, kv_heads, D], of q's dtype; heads are a multiple of kv_heads, in its order.
    lengths : Sequence[int]
        Tokens of each prompt, none of them 0; they add up to ``tokens``.
    scale : float
        Factor of q . k before the softmax.

    Returns
    -------
    Tensor
        [tokens, heads, D].
    """
    return ATTEND[choose(q.device.type, q.dtype, q.shape[2])](q, k, v, lengths, scale)


def _flash_version(head_size: int) -> int | None:
    """The version of vLLM's flash attention that runs here; None where it isn't installed."""
    flash = import_module(FLASH)
    available = flash.is_flash_attn_varlen_func_available()
    return flash.get_flash_attn_version(head_size=head_size) if available else None


def _flash(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], scale: float) -> Tensor:
    from vllm.utils.torch_utils import async_tensor_h2d

    starts = async_tensor_h2d([0, *accumulate(lengths)], device=q.device, dtype=torch.int32)
    longest, version = max(lengths), _flash_version(q.shape[2])
    assert version is not None, "choose() takes another implementation"
    return import_module(FLASH).flash_attn_varlen_func(  # there only where it can run
        q.contiguous(), k.contiguous(), v.contiguous(),
        max_seqlen_q=longest, cu_seqlens_q=starts, max_seqlen_k=longest, cu_seqlens_k=starts,
        softmax_scale=scale, causal=True, fa_version=version,
    )  # fmt: skip


def _xformers(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], scale: float) -> Tensor:
    from xformers.ops import fmha, memory_efficient_attention

    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    bias = fmha.attn_bias.BlockDiagonalCausalMask.from_seqlens(list(lengths))
    return memory_efficient_attention(q[None], k[None], v[None], attn_bias=bias, scale=scale)[0]


def _sdpa(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], scale: float) -> Tensor:
    out = torch.empty_like(q)
    for group in _groups(tuple(lengths), q.device):
        mine, key, value = (x[group.at].transpose(1, 2) for x in (q, k, v))
        # What is repeated at a prompt's end is after all of it: nobody before looks there.
        got = scaled_dot_product_attention(mine, key, value, is_causal=True, scale=scale, enable_gqa=True)
        out[group.tokens] = got.transpose(1, 2).flatten(0, 1)[group.real]
    return out


@lru_cache(maxsize=2)  # a step's layers all ask for the same
def _groups(lengths: tuple[int, ...], device: torch.device) -> list[Padded]:
    firsts = [0, *accumulate(lengths)]
    return [
        Padded.of([firsts[n] for n in numbers], [lengths[n] for n in numbers], width, device)
        for (width,), numbers in alike((n,) for n in lengths).items()
    ]


ATTEND: dict[str, Attend] = {"flash": _flash, "xformers": _xformers, "sdpa": _sdpa}
