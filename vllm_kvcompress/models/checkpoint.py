"""A checkpoint is looked at before anything is allocated for it: its sizes, then what its files hold.

config.json is data from elsewhere. A width in it that is a few digits too long would otherwise be memory that
is asked for, or an engine that dies with three hundred lines after it has loaded everything else.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vllm_kvcompress.models.config import head_size, patch_of, text_vocab_size
from vllm_kvcompress.models.packed import LINEAR
from vllm_kvcompress.models.registry import family_of
from vllm_kvcompress.models.vision_sizes import described, is_vision
from vllm_kvcompress.models.weights import CheckpointError, Ledger
from vllm_kvcompress.policy.raster import Raster

if TYPE_CHECKING:
    from vllm_kvcompress.models.vq import PictureDecoder

INDEX = "model.safetensors.index.json"
READ = ("auto", "hf", "safetensors")  # load formats that read the checkpoint's own files

MOST_POSITIONS = 1 << 19  # four times any model's; vLLM makes a row of a table for each, scaled ones included
LEAST_BITS = 1  # of a weight, however it is quantised

# name in config.json -> least, most; an order of magnitude above any model of the kind
VQ_SIZES = {
    "num_patches": (1, 128),  # lines: their square must fit 16-bit token indices
    "num_embeddings": (2, 1 << 20),
    "embed_dim": (1, 4096),
    "latent_channels": (1, 4096),
    "base_channels": (1, 1024),
    "num_res_blocks": (0, 16),
    "out_channels": (3, 3),
}
TEXT_SIZES = {
    "vocab_size": (1, 1 << 22),
    "hidden_size": (1, 1 << 16),
    "intermediate_size": (1, 1 << 18),
    "num_hidden_layers": (1, 512),
    "num_attention_heads": (1, 1024),
    "num_key_value_heads": (1, 1024),
    "max_position_embeddings": (1, MOST_POSITIONS),
}
ROPE_SIZES = {
    "original_max_position_embeddings": (1, MOST_POSITIONS),
    "max_trained_positions": (1, MOST_POSITIONS),
}
ROPE_TYPES = ("default", "linear", "dynamic", "ntk", "yarn", "llama3")
MULTIPLIERS, MULTIPLIER = 8, 64  # resolutions of the VQ decoder, and the most of each


def check_checkpoint(hf_config: Any) -> None:
    """Raise ValueError, one line, on a config.json that looks like Janus's but can't be served."""
    vq = getattr(hf_config, "vq_config", None)
    if vq is None:
        raise ValueError("config.json describes no image tokenizer (vq_config): not a Janus checkpoint")
    check_sizes(hf_config)
    patch = patch_of(hf_config)
    vision = getattr(hf_config, "vision_config", None)
    size = vision.get("params", {}).get("image_size") if isinstance(vision, dict) else None
    size = size or getattr(vision, "image_size", None) or vq.num_patches * patch
    if size != vq.num_patches * patch:
        raise ValueError(
            f"unsupported image size {size}: the VQ decoder draws {vq.num_patches} x {vq.num_patches} tokens "
            f"of {patch} pixels, {vq.num_patches * patch} in all"
        )
    if text_vocab_size(hf_config) + vq.num_embeddings >= 2**31:
        raise ValueError("text and image vocabularies together exceed 31-bit token ids")


def check_sizes(hf_config: Any) -> None:
    """Raise ValueError, one line, naming a size in config.json that is none, or beyond any model's."""
    check_channels(hf_config.vq_config.channel_multiplier)
    check_numbers(hf_config.vq_config, VQ_SIZES)
    check_text(hf_config.get_text_config())


def check_channels(multipliers: Any) -> None:
    """`check_sizes` of a VQ decoder's resolutions."""
    if not isinstance(multipliers, (list, tuple)) or not 1 <= len(multipliers) <= MULTIPLIERS:
        raise ValueError(
            f"config.json: channel_multiplier must be a list of 1 to {MULTIPLIERS} numbers, "
            f"got {multipliers!s:.60}"
        )
    for multiplier in multipliers:
        _check("channel_multiplier", multiplier, 1, MULTIPLIER)


def check_numbers(section: Any, sizes: Mapping[str, tuple[int, int]]) -> None:
    """`check_sizes` of a section: name -> least, most."""
    for name, (least, most) in sizes.items():
        _check(name, getattr(section, name), least, most)


def check_text(text: Any) -> None:
    """`check_sizes` of a Llama's configuration."""
    check_numbers(text, TEXT_SIZES)
    if text.hidden_size % text.num_attention_heads or text.num_attention_heads % text.num_key_value_heads:
        raise ValueError(
            f"config.json: hidden_size {text.hidden_size} must be a multiple of num_attention_heads "
            f"{text.num_attention_heads}, and that of num_key_value_heads {text.num_key_value_heads}"
        )
    check_rope(text)


def check_rope(text: Any) -> None:
    """`check_sizes` of the positions that a Llama's keys are turned by: vLLM makes a table of all."""
    rope: Any = getattr(text, "rope_parameters", None)
    if rope is None:
        return
    if not isinstance(rope, dict):
        raise ValueError(f"config.json: rope_parameters must be an object, got {rope!r:.60}")
    if (kind := rope.get("rope_type", "default")) not in ROPE_TYPES:
        raise ValueError(
            f"config.json: rope_parameters.rope_type must be one of {', '.join(ROPE_TYPES)}, got {kind!r:.60}"
        )
    for name, (least, most) in (*ROPE_SIZES.items(), ("rope_dim", (1, head_size(text)))):
        if rope.get(name) is not None:
            _check(f"rope_parameters.{name}", rope[name], least, most)
    positions = {
        "linear": text.max_position_embeddings,
        "yarn": rope.get("original_max_position_embeddings") or text.max_position_embeddings,
    }.get(kind, 1)  # what vLLM multiplies
    factor, most = rope.get("factor", 1), MOST_POSITIONS / positions
    if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not 1 <= factor <= most:
        raise ValueError(
            f"config.json: rope_parameters.factor must be a number from 1 to {most:g}, got {factor!r:.60}"
        )


def _check(name: str, value: Any, least: int, most: int) -> None:
    if type(value) is not int or not least <= value <= most:
        wanted = f"a number from {least} to {most}" if least < most else str(least)
        raise ValueError(f"config.json: {name} must be {wanted}, got {value!r:.60}")


def has_vision(folder: Path, hf_config: Any) -> bool:
    """Whether a checkpoint can look at pictures; where its files can't tell, as config.json says.

    Raises nothing: files that can't be read are `check_files`' matter.
    """
    if not described(hf_config):
        return False
    try:
        names = [name for file in weight_files(folder) for name, _ in header(file)]
    except CheckpointError:
        return False
    return not names or any(map(is_vision, names))


def check_files(folder: Path, hf_config: Any, load_format: str, vision: bool = False) -> None:
    """Compare the headers of a folder's safetensors files with config.json; no tensor is read.

    ``vision`` says whether the understanding half's tensors will be loaded: else they may be anything.
    Folders without such files, and models that are yet to be downloaded, are checked as they are loaded.

    Raises
    ------
    CheckpointError
        One line: a file that is cut off or lies about itself, a tensor that is unknown, missing, or not of
        the size that config.json gives it.
    """
    files = list(weight_files(folder)) if load_format in READ else []
    if not files:
        _check_pickles(folder, hf_config)
        return
    ledger = Ledger(hf_config, _decoder(hf_config), vision=vision)
    packed: Counter[str] = Counter()  # bytes of a layer's quantised tensors
    for file in files:
        for name, shape, size in _tensors(file):
            known = ledger.take(name, shape)
            if known is not None and (linear := LINEAR.match(known)):
                packed[linear["layer"]] += size
    ledger.close()
    for layer, weights in _linear_weights(ledger.unchecked).items():
        if weights * LEAST_BITS > 8 * packed[layer]:
            raise CheckpointError(
                f"config.json gives {layer} {weights / 1e6:.4g} million quantised weights, the files hold "
                f"{packed[layer]} bytes of it: correct config.json's sizes, or download the files again"
            )


def _decoder(hf_config: Any) -> "PictureDecoder":
    """Names and shapes alone, which do not depend on the raster."""
    with torch.device("meta"):
        return family_of(hf_config).decoder(hf_config, Raster(1, 1), torch.float32)


def _linear_weights(shapes: Mapping[str, tuple[int, ...]]) -> Counter[str]:
    """How many weights the linear layers have of each decoder layer."""
    found: Counter[str] = Counter()
    for name, shape in shapes.items():
        if linear := LINEAR.match(name):
            found[linear["layer"]] += prod(shape)
    return found


def _check_pickles(folder: Path, hf_config: Any) -> None:
    """Of pickled weights, which must not be opened before they are loaded, the size alone."""
    if not (stored := sum(file.stat().st_size for file in folder.glob("*.bin"))):
        return
    shapes = family_of(hf_config).shapes(hf_config)
    wanted = sum(map(prod, shapes.values()))
    if getattr(hf_config, "quantization_config", None):
        packed = _linear_weights(shapes).total()
        wanted += packed * LEAST_BITS // 8 - packed
    wanted += sum(tensor.numel() for tensor in _decoder(hf_config).state_dict().values())
    if wanted > stored:
        raise CheckpointError(
            f"config.json describes {wanted / 1e9:.1f} billion weights, in {stored / 1e9:.1f} GB of files: "
            "is a shard missing?"
        )


def weight_files(folder: Path) -> Iterator[Path]:
    """Those that vLLM would read: what the index names, else all."""
    index = folder / INDEX
    if not index.is_file():
        yield from sorted(folder.glob("*.safetensors"))
        return
    try:
        names = sorted({str(name) for name in json.loads(index.read_text())["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{INDEX} is no index of a checkpoint's files: {error!r:.80}") from None
    for name in names:
        if Path(name).name != name:
            raise CheckpointError(f"{INDEX} names a file outside the checkpoint: {name!r:.80}")
        yield folder / name


def header(file: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a safetensors file's tensors. Raises CheckpointError, one line, if it is none."""
    for name, shape, _ in _tensors(file):
        yield name, shape


def _tensors(file: Path) -> Iterator[tuple[str, tuple[int, ...], int]]:
    """`header`, and bytes at least: those of a type that is narrower than one are not counted."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a mapping
                tensor = opened.get_slice(name)
                shape, bits = tuple(tensor.get_shape()), re.search(r"\d+", tensor.get_dtype())
                yield name, shape, prod(shape) * (int(bits[0]) if bits else 8) // 8
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{file.name} can't be read ({reason:.120}): download it again") from None
