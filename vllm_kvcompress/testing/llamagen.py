"""Make random LlamaGen ``.pt`` files with the published names, to be converted as a user would."""

import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod, sqrt
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from vllm_kvcompress.testing.configs import transformers_config
from vllm_kvcompress.testing.geometry import CheckpointGeometry
from vllm_kvcompress.testing.weights import GAIN, chunks, original_specs

Wrapping = Literal["model", "module", "state_dict", "ema", "bare"]
_VQ_PREFIX = "gen_vision_model."


@dataclass(frozen=True)
class LlamaGenGeometry:
    """Sizes of a class-conditional LlamaGen; its feed-forward width follows from ``hidden`` as published."""

    hidden: int = 128
    layers: int = 2
    heads: int = 2
    grid: int = 4
    classes: int = 10
    codes: int = 256

    @property
    def intermediate(self) -> int:
        """``8 / 3`` of the width, rounded down, then up to a multiple of 256."""
        return -(-int(2 * 4 * self.hidden / 3) // 256) * 256

    @property
    def tokens(self) -> int:
        """Tokens of a picture."""
        return self.grid**2


def decoder_state(g: LlamaGenGeometry, seed: int = 0) -> dict[str, Tensor]:
    """Random float32 tensors under the names of FoundationVision/LlamaGen's ``c2i_*.pt``."""
    d, f = g.hidden, g.intermediate
    shapes: dict[str, tuple[int, ...]] = {
        "cls_embedding.embedding_table.weight": (g.classes + 1, d),
        "tok_embeddings.weight": (g.codes, d),
        "norm.weight": (d,),
        "output.weight": (g.codes, d),
    }
    for n in range(g.layers):
        shapes |= {
            f"layers.{n}.attention.wqkv.weight": (3 * d, d), f"layers.{n}.attention.wo.weight": (d, d),
            f"layers.{n}.feed_forward.w1.weight": (f, d), f"layers.{n}.feed_forward.w3.weight": (f, d),
            f"layers.{n}.feed_forward.w2.weight": (d, f), f"layers.{n}.attention_norm.weight": (d,),
            f"layers.{n}.ffn_norm.weight": (d,),
        }  # fmt: skip
    return {name: _draw(name, shape, seed) for name, shape in shapes.items()}


def _draw(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
    if len(shape) == 1:  # norms
        return torch.empty(shape).normal_(1.0, 0.1, generator=generator)
    std = 1.0 if "embed" in name else GAIN / sqrt(prod(shape[1:]))
    return torch.empty(shape).normal_(0.0, std, generator=generator)


def vq_state(
    g: LlamaGenGeometry, seed: int = 0, multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
) -> dict[str, Tensor]:
    """Random float32 tensors of ``vq_ds16_c2i.pt``: Janus's VQ model with its encoder, without the prefix.

    ``multipliers`` are (1, 2, 2, 4) in ``vq_ds8_c2i.pt``.
    """
    sizes = CheckpointGeometry(
        hidden=g.hidden, layers=1, heads=1, kv_heads=1, intermediate=8, lines=g.grid, codebook=g.codes,
        text_vocab=512, vq_multipliers=multipliers,
    )  # fmt: skip
    specs = original_specs(transformers_config(sizes, "float32", image_token_id=0))
    mine = [spec for spec in specs if spec.name.startswith(_VQ_PREFIX)]
    return {
        spec.name.removeprefix(_VQ_PREFIX): _whole(chunks([spec], seed, torch.float32), spec.shape)
        for spec in mine
    }


def _whole(parts: Iterable[Tensor], shape: tuple[int, ...]) -> Tensor:
    return torch.cat(list(parts)).view(shape)


def save_wrapped(path: Path, state: dict[str, Tensor], wrapping: Wrapping = "model", **more: object) -> Path:
    """``torch.save`` as the published files are: under a key, or bare; ``more`` goes beside it."""
    torch.save({**state, **more} if wrapping == "bare" else {wrapping: state, **more}, path)
    return path


def make_llamagen(
    path: Path, geometry: LlamaGenGeometry, wrapping: Wrapping = "model", seed: int = 0
) -> Path:
    """Write ``path/c2i.pt`` and ``path/vq_ds16_c2i.pt``; convert them into ``path/served``, returned.

    Raises CheckpointError as `vllm_kvcompress.models.llamagen.convert.convert` does.
    """
    from vllm_kvcompress.models.llamagen.convert import VQ_FILE, convert

    path.mkdir(parents=True, exist_ok=True)
    source = save_wrapped(path / "c2i.pt", decoder_state(geometry, seed), wrapping)
    save_wrapped(path / VQ_FILE, vq_state(geometry, seed))
    convert(source, path / "served", grid=geometry.grid, heads=geometry.heads)
    return path / "served"
