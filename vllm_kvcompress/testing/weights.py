"""Random tensors of a Janus-Pro checkpoint, streamed, in either layout's names.

A tensor's values depend on the seed and its transformers name alone, so both layouts, and both file
formats, hold the same weights.
"""

import json
import os
import re
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import prod, sqrt
from pathlib import Path

import torch
from torch import Tensor
from transformers import JanusConfig, JanusForConditionalGeneration

GAIN = 1.5  # of fan-in scaled matrices; with transformers' initial values greedy output is one token
_CHUNK = 1 << 22  # values drawn at a time; part of what a seed means
_SAFETENSORS_DTYPE = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}

# transformers name -> original name; janus notes section 3, transformers convert_janus_weights_to_hf.py.
_TO_ORIGINAL = (
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^model\.generation_embeddings\.", "gen_embed."),
    (r"^model\.generation_aligner\.fc1\.", "gen_aligner.layers.0."),
    (r"^model\.generation_aligner\.hidden_layers\.0\.", "gen_aligner.layers.2."),
    (r"^model\.generation_head\.proj_out\.", "gen_head.output_mlp_projector."),
    (r"^model\.generation_head\.", "gen_head."),
    (r"^model\.aligner\.fc1\.", "aligner.layers.0."),
    (r"^model\.aligner\.hidden_layers\.0\.", "aligner.layers.2."),
    (r"^model\.vqmodel\.", "gen_vision_model."),
    (r"^(gen_vision_model\.(?:en|de)coder)\.(?:up|down)\.", r"\1.conv_blocks."),
    (r"^(gen_vision_model\..*\.conv_blocks\.\d+)\.block\.", r"\1.res."),
    (r"^(gen_vision_model\..*)\.mid\.block_1\.", r"\1.mid.0."),
    (r"^(gen_vision_model\..*)\.mid\.attn_1\.", r"\1.mid.1."),
    (r"^(gen_vision_model\..*)\.mid\.block_2\.", r"\1.mid.2."),
    (r"^model\.vision_model\.", "vision_model.vision_tower."),
    (r"^(vision_model\.vision_tower)\.embeddings\.patch_embedding\.", r"\1.patch_embed.proj."),
    (r"^(vision_model\.vision_tower)\.embeddings\.position_embedding\.weight$", r"\1.pos_embed"),
    (r"^(vision_model\.vision_tower)\.post_layernorm\.", r"\1.norm."),
    (r"^(vision_model\.vision_tower)\.encoder\.layers\.", r"\1.blocks."),
    (r"^(vision_model\..*)\.layer_norm([12])\.", r"\1.norm\2."),
    (r"^(vision_model\..*)\.self_attn\.projection_layer\.", r"\1.attn.proj."),
    (r"^(vision_model\..*)\.self_attn\.[qkv]_proj\.", r"\1.attn.qkv."),
)


@dataclass(frozen=True)
class TensorSpec:
    """A stored tensor: random ``parts`` (name that seeds, shape), one after the other along axis 0."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[tuple[str, tuple[int, ...]], ...]


def original_name(name: str) -> str:
    """The original layout's name of a transformers tensor (q, k and v of the vision tower share one)."""
    for pattern, new in _TO_ORIGINAL:
        name = re.sub(pattern, new, name)
    return name


def transformers_specs(config: JanusConfig, with_lm_head: bool = True) -> list[TensorSpec]:
    """Tensors of ``JanusForConditionalGeneration``, by transformers' own account."""
    with torch.device("meta"):
        state = JanusForConditionalGeneration(config).state_dict()
    if not with_lm_head:
        del state["lm_head.weight"]
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    return [TensorSpec(name, shape, ((name, shape),)) for name, shape in shapes.items()]


def original_specs(config: JanusConfig, with_lm_head: bool = True) -> list[TensorSpec]:
    """Tensors of ``MultiModalityCausalLM``, the ones that drawing has no use for included."""
    merged: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
    for spec in transformers_specs(config, with_lm_head):
        merged.setdefault(original_name(spec.name), []).extend(spec.parts)
    # q, k, v is the order of timm's fused matrix; transformers lists k, v, q.
    specs = []
    for name, unordered in merged.items():
        parts = sorted(unordered, key=lambda part: "qkv".find(_projection(part[0])))
        shape = (sum(part[1][0] for part in parts), *parts[0][1][1:])
        specs.append(TensorSpec(name, (1, *shape) if name.endswith("pos_embed") else shape, tuple(parts)))
    width = next(spec.shape[0] for spec in specs if spec.name == "vision_model.vision_tower.norm.weight")
    extra = {"gen_vision_model.quantize.codebook_used": (65536,), **_attention_pool(width)}
    return specs + [TensorSpec(name, shape, ((name, shape),)) for name, shape in extra.items()]


def _projection(name: str) -> str:
    found = re.search(r"\.self_attn\.([qkv])_proj\.", name)
    return found.group(1) if found else "q"


def _attention_pool(width: int) -> dict[str, tuple[int, ...]]:
    """timm's AttentionPoolLatent, stored though never used (siglip_vit.py, ``ignore_head``)."""
    wide = 4 * width
    shapes: dict[str, tuple[int, ...]] = {"latent": (1, 1, width)}
    linear = {"q": (width, width), "kv": (2 * width, width), "proj": (width, width),
              "mlp.fc1": (wide, width), "mlp.fc2": (width, wide)}  # fmt: skip
    for name, shape in linear.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    shapes |= {"norm.weight": (width,), "norm.bias": (width,)}
    return {f"vision_model.vision_tower.attn_pool.{name}": shape for name, shape in shapes.items()}


def _mean_std(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    if name.endswith("codebook_used"):
        return 0.0, 0.0
    if name.endswith(".bias"):
        return 0.0, 0.1
    if len(shape) == 1:  # norms; not quite one, so that a loader that forgets one is caught
        return 1.0, 0.1
    if "embed" in name and "patch_embed" not in name:
        return 0.0, 1.0
    if name.endswith("vqmodel.decoder.conv_out.weight"):
        return 0.0, 0.3 * GAIN / sqrt(prod(shape[1:]))  # pixels within [-1, 1], mostly
    return 0.0, GAIN / sqrt(prod(shape[1:]))


def _draw(name: str, shape: tuple[int, ...], chunk: int, seed: int, dtype: torch.dtype) -> Tensor:
    mean, std = _mean_std(name, shape)
    size = min(_CHUNK, prod(shape) - chunk * _CHUNK)
    # A generator per chunk, so that chunks can be drawn in any order.
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}:{chunk}".encode()))
    return torch.empty(size).normal_(mean, std, generator=generator).to(dtype)


def chunks(specs: Iterable[TensorSpec], seed: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """The tensors' values, flat, one tensor after the other, at most 4 Mi values at a time."""
    workers = os.cpu_count() or 1
    pending: deque[Future[Tensor]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        for spec in specs:
            for name, shape in spec.parts:
                for chunk in range(-(-prod(shape) // _CHUNK)):
                    pending.append(pool.submit(_draw, name, shape, chunk, seed, dtype))
                    if len(pending) > 2 * workers:
                        yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def write_safetensors(path: Path, specs: list[TensorSpec], seed: int, dtype: torch.dtype) -> None:
    """Write one safetensors file without ever holding a whole tensor.

    Format: https://huggingface.co/docs/safetensors (header size as u64, JSON header, data).
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for spec in specs:
        start, end = end, end + prod(spec.shape) * dtype.itemsize
        header[spec.name] = {
            "dtype": _SAFETENSORS_DTYPE[dtype], "shape": spec.shape, "data_offsets": (start, end),
        }  # fmt: skip
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # data aligned, as the format recommends
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for chunk in chunks(specs, seed, dtype):
            file.write(chunk.view(torch.uint8).numpy().data)


def write_bin(path: Path, specs: list[TensorSpec], seed: int, dtype: torch.dtype) -> None:
    """Write a pickled state dict (``pytorch_model.bin``); needs memory for all of it."""
    state = {spec.name: torch.cat(list(chunks([spec], seed, dtype))).view(spec.shape) for spec in specs}
    torch.save(state, path)
