"""Make a random Janus-Pro checkpoint, complete with tokenizer, in either published layout.

``python -m vllm_kvcompress.testing.checkpoints OUT --layout hf --preset tiny``
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

import torch

from vllm_kvcompress.testing import tokenizer as tok
from vllm_kvcompress.testing.configs import (
    original_config,
    original_files,
    transformers_config,
    transformers_files,
)
from vllm_kvcompress.testing.geometry import (
    GQA,
    PRESETS,
    SMALL_24,
    TINY,
    CheckpointGeometry,
    janus_pro_1b,
)
from vllm_kvcompress.testing.weights import original_specs, transformers_specs, write_bin, write_safetensors

__all__ = ["GQA", "SMALL_24", "TINY", "CheckpointGeometry", "Layout", "janus_pro_1b", "make_checkpoint"]

Layout = Literal["hf", "deepseek"]
FileFormat = Literal["safetensors", "bin"]
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def make_checkpoint(
    path: str | Path,
    *,
    layout: Layout = "hf",
    geometry: CheckpointGeometry = TINY,
    seed: int = 0,
    dtype: str | torch.dtype = "float32",
    file_format: FileFormat = "safetensors",
    with_lm_head: bool = True,
    pro_roles: bool = True,
) -> Path:
    """Write a checkpoint of random weights into the folder ``path`` (made if need be).

    Parameters
    ----------
    layout : "hf" or "deepseek"
        ``JanusForConditionalGeneration``, or deepseek-ai's ``MultiModalityCausalLM``. The same seed gives
        the same weights in both.
    dtype : str or torch.dtype
        Of the file: float32, bfloat16 or float16; also what config.json says.
    file_format : "safetensors" or "bin"
        One ``model.safetensors``, streamed; or one ``pytorch_model.bin``.
    with_lm_head : bool
        Whether the text head is in the file.
    pro_roles : bool
        Whether ``<|User|>`` and ``<|Assistant|>`` are special tokens; they are not in Janus-1.3B.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    ValueError
        An unknown layout, dtype or format, or sizes that do not fit together.
    """
    for name, value, allowed in (
        ("layout", layout, get_args(Layout)),
        ("file_format", file_format, get_args(FileFormat)),
    ):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    dtype_name = str(dtype).removeprefix("torch.")
    if dtype_name not in _DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype}")
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    tokenizer = tok.build_tokenizer(geometry.text_vocab, pro_roles)
    specials = tok.special_tokens(geometry.text_vocab, pro_roles)
    ids = {token: id for token, id in tokenizer.get_vocab().items() if token in specials}

    config = transformers_config(geometry, dtype_name, image_token_id=ids[tok.IMAGE])
    if layout == "hf":
        specs = transformers_specs(config, with_lm_head)
        config.save_pretrained(path)
        files = transformers_files(geometry, ids)
    else:
        specs = original_specs(config, with_lm_head)
        files = {"config.json": original_config(geometry, dtype_name), **original_files(geometry, ids)}
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content, indent=2, ensure_ascii=False)
        (path / name).write_text(text, encoding="utf-8")
    tokenizer.save(str(path / "tokenizer.json"))
    if file_format == "safetensors":
        write_safetensors(path / "model.safetensors", specs, seed, _DTYPES[dtype_name])
    else:
        write_bin(path / "pytorch_model.bin", specs, seed, _DTYPES[dtype_name])
    return path


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; prints the folder."""
    parser = argparse.ArgumentParser(description="Write a random Janus-Pro checkpoint.")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--layout", choices=get_args(Layout), default="hf")
    parser.add_argument("--format", choices=get_args(FileFormat), default="safetensors", dest="file_format")
    parser.add_argument("--preset", choices=PRESETS, default="tiny", help="sizes")
    parser.add_argument("--layers", type=int, help="layers of the language model, instead of the preset's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=_DTYPES, help="default: bfloat16 for janus-pro-1b, else float32")
    parser.add_argument("--no-lm-head", action="store_true", help="leave the text head out of the file")
    parser.add_argument("--plain-roles", action="store_true", help="Janus-1.3B's tokenizer: no <|User|>")
    options = parser.parse_args(arguments)
    geometry = PRESETS[options.preset]()
    if options.layers is not None:
        geometry = replace(geometry, layers=options.layers)
    path = make_checkpoint(
        options.out,
        layout=options.layout,
        geometry=geometry,
        seed=options.seed,
        dtype=options.dtype or ("bfloat16" if options.preset == "janus-pro-1b" else "float32"),
        file_format=options.file_format,
        with_lm_head=not options.no_lm_head,
        pro_roles=not options.plain_roles,
    )
    print(path)


if __name__ == "__main__":
    main()
