"""Attention of prompts: the torch path against plain arithmetic, and which implementation is taken where."""

import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from vllm_kvcompress.attention import prompt


def plain(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], scale: float) -> Tensor:
    """One prompt and one query head at a time, in float64."""
    out, first, group = torch.zeros_like(q, dtype=torch.float64), 0, q.shape[1] // k.shape[1]
    for length in lengths:
        rows = slice(first, first + length)
        for head in range(q.shape[1]):
            logits = q[rows, head].double() @ k[rows, head // group].double().T * scale
            logits.masked_fill_(torch.ones(length, length).triu(1).bool(), -torch.inf)
            out[rows, head] = logits.softmax(-1) @ v[rows, head // group].double()
        first += length
    return out


def tensors(group: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(tokens)
    return torch.randn(tokens, 4 * group, 16), torch.randn(tokens, 4, 16), torch.randn(tokens, 4, 16)


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    prompt.choose.cache_clear()
    yield
    prompt.choose.cache_clear()


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("lengths", [[1], [5], [3, 1, 9], [20, 2]])
def test_sdpa(group: int, lengths: list[int]) -> None:
    q, k, v = tensors(group, sum(lengths))
    out = prompt.attend_prompts(q, k, v, lengths, 0.3)
    torch.testing.assert_close(out.double(), plain(q, k, v, lengths, 0.3), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("device", "dtype", "size", "flash", "xformers", "chosen"),
    [
        ("cuda", torch.bfloat16, 128, 3, True, "flash"),
        ("cuda", torch.float16, 80, 2, False, "flash"),
        ("cuda", torch.bfloat16, 128, None, True, "xformers"),
        ("cuda", torch.bfloat16, 512, 3, True, "xformers"),
        ("cuda", torch.bfloat16, 128, None, False, "sdpa"),
        ("cuda", torch.float32, 128, 3, True, "sdpa"),
        ("cpu", torch.bfloat16, 128, 3, True, "sdpa"),
    ],
)
def test_choice(
    monkeypatch: pytest.MonkeyPatch, device: str, dtype: torch.dtype, size: int, flash: int | None,
    xformers: bool, chosen: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(prompt, "_flash_version", lambda head_size: flash)
    monkeypatch.setattr(prompt, "find_spec", lambda name: object() if xformers else None)
    assert prompt.choose(device, dtype, size) == chosen


@pytest.mark.skipif(torch.cuda.is_available(), reason="what a machine without a GPU has")
def test_without_a_gpu_there_is_no_flash_attention() -> None:
    assert prompt._flash_version(128) is None


def test_flash_attention_is_told_where_prompts_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths, told = [3, 1, 9], {}
    q, k, v = tensors(3, 13)

    def flash_attn_varlen_func(q: Tensor, k: Tensor, v: Tensor, **settings: Any) -> Tensor:
        told.update(settings)
        assert q.is_contiguous()
        return plain(q, k, v, settings["cu_seqlens_q"].diff().tolist(), settings["softmax_scale"]).float()

    name = "vllm.v1.attention.backends.fa_utils"
    fake: Any = ModuleType(name)
    fake.flash_attn_varlen_func = flash_attn_varlen_func
    fake.get_flash_attn_version = lambda head_size: 3
    fake.is_flash_attn_varlen_func_available = lambda: True
    monkeypatch.setitem(sys.modules, name, fake)
    monkeypatch.setattr(prompt, "choose", lambda *_: "flash")
    apart = torch.cat((q, q), 1)[:, : q.shape[1]]
    out = prompt.attend_prompts(apart, k, v, lengths, 0.3)
    torch.testing.assert_close(out, plain(q, k, v, lengths, 0.3).float())
    assert told["cu_seqlens_k"].tolist() == [0, 3, 4, 13]
    assert told["cu_seqlens_q"].dtype == torch.int32
    assert told["max_seqlen_q"] == told["max_seqlen_k"] == 9
    assert told["causal"] is True
    assert told["fa_version"] == 3


def test_xformers_gets_a_block_diagonal_causal_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [3, 1, 9]
    q, k, v = tensors(3, 13)

    def memory_efficient_attention(q: Tensor, k: Tensor, v: Tensor, attn_bias: Any, scale: float) -> Tensor:
        assert q.shape == k.shape == v.shape
        return plain(q[0], k[0], v[0], attn_bias, scale).float()[None]

    mask = SimpleNamespace(from_seqlens=lambda lengths: lengths)
    fake: Any = ModuleType("xformers.ops")
    fake.memory_efficient_attention = memory_efficient_attention
    fake.fmha = SimpleNamespace(attn_bias=SimpleNamespace(BlockDiagonalCausalMask=mask))
    monkeypatch.setitem(sys.modules, "xformers", ModuleType("xformers"))
    monkeypatch.setitem(sys.modules, "xformers.ops", fake)
    monkeypatch.setattr(prompt, "choose", lambda *_: "xformers")
    out = prompt.attend_prompts(q, k, v, lengths, 0.3)
    torch.testing.assert_close(out, plain(q, k, v, lengths, 0.3).float())
