"""Checkpoints of fewer bytes a weight, made from others as llm-compressor writes them (compressed-tensors).

``int8`` is W8A8 (int-quantized: a scale an output channel, activations scaled a token at a time), ``int4``
W4A16 (pack-quantized: a scale per 32 inputs). https://github.com/vllm-project/compressed-tensors
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

GROUP = 32  # inputs that share an int4 scale
Tensors = dict[str, Tensor]

_DECODER = re.compile(r"(?:model\.)?(?:language_model|text_model)\.(?:model\.)?layers\.(\d+)\.(.+)")
_PARTS = {
    *(f"self_attn.{x}_proj" for x in "qkvo"),
    *(f"mlp.{x}_proj" for x in ("gate", "up", "down")),
}


def _int8(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
    """A scale an output channel, whole numbers up to 127; and the weight that they stand for."""
    scale = weight.abs().amax(1, keepdim=True) / 127
    whole = (weight / scale).round()
    return {f"{name}.weight": whole.to(torch.int8), f"{name}.weight_scale": scale}, whole * scale


def _int4(name: str, weight: Tensor) -> tuple[Tensors, Tensor]:
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


def _arguments(bits: int, **more: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": "int", "symmetric": True, "dynamic": False, **more}


_FORMS: dict[str, tuple[Callable[[str, Tensor], tuple[Tensors, Tensor]], str, dict[str, Any]]] = {
    "int8": (
        _int8,
        "int-quantized",
        {
            "weights": _arguments(8, strategy="channel"),
            "input_activations": _arguments(8, strategy="token") | {"dynamic": True},
        },
    ),
    "int4": (_int4, "pack-quantized", {"weights": _arguments(4, strategy="group", group_size=GROUP)}),
}
FORMS = tuple(_FORMS)


def quantise(
    source: Path, target: Path, form: str, *, plain_layer: int | None = None, meant: Path | None = None
) -> Path:
    """Write ``source``, a folder with one ``model.safetensors``, with its decoder's linear layers quantised.

    Embeddings, heads, norms, the picture decoder and the vision tower stay as they are.

    Parameters
    ----------
    target : Path
        Folder to write; it must not exist.
    form : str
        One of ``FORMS``.
    plain_layer : int, optional
        A decoder layer that is left as it is, its modules named in ``ignore`` as llm-compressor names them:
        as the published model does.
    meant : Path, optional
        Folder for a plain checkpoint of float32 weights that the quantised ones stand for.

    Returns
    -------
    Path
        ``target``.

    Raises
    ------
    ValueError
        An unknown form, or no linear layer of a decoder in the file.
    """
    if form not in _FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
    convert, file_format, scheme = _FORMS[form]
    packed: Tensors = {}
    stands_for: Tensors = {}
    ignored, converted = ["lm_head"], 0
    with safe_open(source / "model.safetensors", "pt") as file:
        for name in file.offset_keys():
            tensor, module = file.get_tensor(name), name.removesuffix(".weight")
            found = _DECODER.fullmatch(module)
            if found is None or found[2] not in _PARTS:
                packed[name] = stands_for[name] = tensor
            elif int(found[1]) == plain_layer:
                packed[name] = stands_for[name] = tensor
                ignored.append(module)
            else:
                tensors, weight = convert(module, tensor.float())
                packed |= tensors
                converted += 1
                if meant is not None:
                    stands_for[name] = weight
    if not converted:
        raise ValueError(f"{source / 'model.safetensors'} has no linear layer of a decoder")
    for folder, written in ((target, packed), (meant, stands_for)):
        if folder is not None:
            shutil.copytree(source, folder, ignore=shutil.ignore_patterns("model.safetensors"))
            contiguous = {name: tensor.contiguous() for name, tensor in written.items()}
            save_file(contiguous, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": file_format, "quantization_status": "compressed",
        "ignore": ignored, "config_groups": {"group_0": {"targets": ["Linear"], **scheme}},
    }  # fmt: skip
    (target / "config.json").write_text(json.dumps(config))
    return target
