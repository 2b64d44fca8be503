"""Checkpoints with fewer bytes a weight, as llm-compressor writes them: 8-bit (W8A8) and 4-bit (W4A16)."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from inprocess import Engine, in_process  # noqa: F401
from safetensors.torch import load_file, save_file
from torch import Tensor
from vllm import SamplingParams

from vllm_kvcompress.models.weights import CheckpointError

GROUP = 32
GREEDY = SamplingParams(temperature=0.0, logprobs=0)
Tensors = dict[str, Tensor]


def int8(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
    """A scale an output channel, whole numbers up to 127; and the weight that they stand for."""
    scale = weight.abs().amax(1, keepdim=True) / 127
    whole = (weight / scale).round()
    return {f"{name}.weight": whole.to(torch.int8), f"{name}.weight_scale": scale}, whole * scale


def int4(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
    """A scale per 32 inputs, -8 to 7, eight of them in an int32, the first lowest."""
    rows, columns = weight.shape
    parts = weight.view(rows, -1, GROUP)
    scale = (parts.abs().amax(-1, keepdim=True) / 7.5).bfloat16().float()
    whole = (parts / scale).round().clamp(-8, 7)
    held = (whole.view(rows, -1, 8).to(torch.int64) + 8) << torch.arange(0, 32, 4)
    packed = held.sum(-1)
    packed = torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)
    tensors = {
        f"{name}.weight_packed": packed,
        f"{name}.weight_scale": scale[..., 0].bfloat16(),
        f"{name}.weight_shape": torch.tensor([rows, columns]),
    }
    return tensors, (whole * scale).view(rows, columns)


def arguments(bits: int, **more: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": "int", "symmetric": True, "dynamic": False, **more}


FORMS: dict[str, tuple[Callable[[str, Tensor], tuple[Tensors, Tensor]], str, dict[str, Any]]] = {
    "int8": (
        int8,
        "int-quantized",
        {
            "weights": arguments(8, strategy="channel"),
            "input_activations": arguments(8, strategy="token") | {"dynamic": True},
        },
    ),
    "int4": (int4, "pack-quantized", {"weights": arguments(4, strategy="group", group_size=GROUP)}),
}


def quantise(source: Path, target: Path, form: str) -> tuple[Path, Path]:
    """(the quantised checkpoint, one in bfloat16 of the weights that it stands for)."""
    convert, file_format, scheme = FORMS[form]
    plain = target / "plain"
    shutil.copytree(source, target / "packed")
    shutil.copytree(source, plain)
    packed: Tensors = {}
    meant: Tensors = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if "language_model.layers." in name and name.endswith("proj.weight"):
            tensors, meant[name] = convert(name.removesuffix(".weight"), tensor.float())
            packed |= tensors
        else:
            packed[name] = meant[name] = tensor
    for folder, tensors in ((target / "packed", packed), (plain, meant)):
        save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors")
    config = json.loads((target / "packed" / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": file_format, "quantization_status": "compressed",
        "ignore": ["lm_head"], "config_groups": {"group_0": {"targets": ["Linear"], **scheme}},
    }  # fmt: skip
    (target / "packed" / "config.json").write_text(json.dumps(config))
    return target / "packed", plain


def drawn(model: Path, backend: str | None) -> tuple[list[int], list[float]]:
    """A greedy picture's tokens, and their log-probabilities."""
    engine = Engine.get(model, backend, dtype="bfloat16", max_model_len=128)
    (out,) = engine.outputs([engine.prompt("a red bird")], GREEDY)
    steps = out.outputs[0].logprobs
    ids = list(out.outputs[0].token_ids)
    return ids, [step[token].logprob for step, token in zip(steps, ids, strict=True)]


@pytest.mark.parametrize("form", FORMS)
def test_quantised_layers_draw_what_their_weights_say(
    checkpoints: dict[str, Path], tmp_path: Path, form: str
) -> None:
    packed, plain = quantise(checkpoints["gqa-hf"], tmp_path, form)
    ids, logs = drawn(packed, None)
    expected_ids, expected = drawn(plain, None)
    assert len(ids) == 64
    same = next((n for n, (a, b) in enumerate(zip(ids, expected_ids, strict=True)) if a != b), 64)
    assert same > 8
    apart = [abs(a - b) for a, b in zip(logs[:same], expected[:same], strict=True)]
    assert sum(apart) / same < 0.1  # activations of the 8-bit form are rounded as well, and guidance is 5
    engine = Engine.get(packed, None, dtype="bfloat16", max_model_len=128)
    linear = engine.model.language_model.layers[0].self_attn.qkv_proj
    assert "CompressedTensors" in type(linear.quant_method).__name__


@pytest.mark.parametrize("form", FORMS)
def test_the_compressed_cache_serves_them(checkpoints: dict[str, Path], tmp_path: Path, form: str) -> None:
    """Heads are measured through the quantised layers, too."""
    packed, _ = quantise(checkpoints["gqa-hf"], tmp_path, form)
    ids, _ = drawn(packed, "kvcompress")
    assert len(ids) == 64
    assert len(set(ids)) > 5


def test_a_missing_scale_is_named(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    packed, _ = quantise(checkpoints["gqa-hf"], tmp_path, "int8")
    tensors = load_file(packed / "model.safetensors")
    gone = next(name for name in tensors if name.endswith("o_proj.weight_scale"))
    del tensors[gone]
    save_file(tensors, packed / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"lacks tensor language_model\..*o_proj.weight_scale: is a shard"
    ):
        drawn(packed, None)


def test_scales_without_a_word_in_the_config_are_unknown(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    packed, plain = quantise(checkpoints["gqa-hf"], tmp_path, "int8")
    shutil.copy(plain / "config.json", packed / "config.json")
    with pytest.raises(ValueError, match=r"unknown tensor .*weight_scale"):  # before an engine starts
        drawn(packed, None)
