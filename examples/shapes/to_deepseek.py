"""Convert a model folder from the transformers layout to deepseek-ai's original one.

python examples/shapes/to_deepseek.py examples/shapes/model out/shapes-original
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from geometry import GEOMETRY, MODEL_FOLDER
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from vllm_kvcompress.testing import tokenizer as janus
from vllm_kvcompress.testing.configs import original_config, original_files
from vllm_kvcompress.testing.weights import original_name


def convert_tensors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename every tensor; the vision tower's q, k and v become timm's fused `qkv`."""
    fused: dict[str, dict[str, Tensor]] = {}
    converted: dict[str, Tensor] = {}
    for name, tensor in state.items():
        new = original_name(name)
        if ".attn.qkv." in new:
            fused.setdefault(new, {})[name.split(".self_attn.")[1][0]] = tensor
        elif new.endswith("pos_embed"):
            converted[new] = tensor[None]
        else:
            converted[new] = tensor
    for new, parts in fused.items():
        converted[new] = torch.cat([parts[part] for part in "qkv"])
    return {name: tensor.contiguous() for name, tensor in converted.items()}


def convert(source: Path, out: Path) -> None:
    """Write the folder `out` from the folder `source`.

    The attention pool and the training statistic that the published files carry unused are left out.
    """
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    ids = {token: tokenizer.token_to_id(token) for token in janus.special_tokens(GEOMETRY.text_vocab)}
    files = {"config.json": original_config(GEOMETRY, "bfloat16"), **original_files(GEOMETRY, ids)}
    for name, content in files.items():
        (out / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    shutil.copyfile(source / "tokenizer.json", out / "tokenizer.json")
    state = load_file(source / "model.safetensors")
    save_file(convert_tensors(state), out / "model.safetensors", metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, nargs="?", default=MODEL_FOLDER)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    convert(args.source, args.out)


if __name__ == "__main__":
    main()
