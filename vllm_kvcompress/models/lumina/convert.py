"""Lumina-mGPT's scattered files -> one folder that ``vllm serve`` takes.

Its repositories hold the language model; the picture decoder is Chameleon's (Meta's ``vqgan.ckpt``), and
only ``Lumina-mGPT-7B-768`` has the tokenizer.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import ChameleonConfig

from vllm_kvcompress.log import logger_for
from vllm_kvcompress.models.checkpoint import VQ_SIZES, check_channels, check_numbers, header, weight_files
from vllm_kvcompress.models.config import ModelSettings
from vllm_kvcompress.models.conversion import (
    VQSizes,
    decoder_tensors,
    is_written,
    load_state,
    write_folder,
)
from vllm_kvcompress.models.lumina.config import ARCHITECTURE, MODEL_TYPE, LuminaConfig
from vllm_kvcompress.models.lumina.family import BOS, FAMILY, PAD, SEPARATOR, UNIT
from vllm_kvcompress.models.lumina.vq import TamingDecoder
from vllm_kvcompress.models.weights import CheckpointError, Ledger
from vllm_kvcompress.policy.raster import Raster

logger = logger_for(__name__)

VQ = "vq.safetensors"
VQ_PREFIX = "model.vqmodel."
VQ_FILES = ("vqgan.ckpt", "model.safetensors")  # Meta's; leloy/Anole-7b-v0.1-vqvae-hf's
TOKENIZER_FILES = ("tokenizer.json", "text_tokenizer.json")  # 7B-768's; Meta's
PROMPT_ROOM = 1024  # positions for a prompt, where config.json does not even have the picture's
LUMINA_2 = 155000 + 16384  # ids of Lumina-mGPT-2.0, whose codes end there
Shapes = Sequence[tuple[str, tuple[int, ...]]]
_NORM = re.compile(r"\.self_attn\.[qk]_norm\.(?:weight|bias)$")
_SIZE = re.compile(r"mGPT-7B-(\d+)")
_TEXT = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "hidden_act", "max_position_embeddings", "rms_norm_eps", "rope_parameters",
    "attention_bias", "mlp_bias",
)  # fmt: skip


def convert(
    source: Path,
    folder: Path,
    *,
    vq: Path | None = None,
    tokenizer: Path | None = None,
    size: int | None = None,
    overwrite: bool = False,
) -> bool:
    """Write ``folder`` from a Lumina-mGPT 7B's folder, a VQ model's file and a tokenizer's.

    The weights' files go in as they are, by a second name on the same disk. Every tensor is used, knowingly
    skipped (the VQ model's encoder and what only trains it) or named in the error.

    Parameters
    ----------
    source : Path
        With config.json and safetensors files, as published.
    vq : Path, optional
        ``vqgan.ckpt``, or safetensors of the same, or a folder with one of both; by default in ``source``.
    tokenizer : Path, optional
        ``tokenizer.json`` or ``text_tokenizer.json``, or a folder with one; by default in ``source``.
    size : int, optional
        Side of the pictures in pixels, where the folder's name does not tell (``Lumina-mGPT-7B-768``).
    overwrite : bool
        Whether to replace a folder that is there.

    Returns
    -------
    bool
        False if the folder was there and was left alone.

    Raises
    ------
    CheckpointError
        One line that says what is missing, unknown or contradictory.
    """
    if folder.resolve() == source.resolve():
        raise CheckpointError(f"-o: {folder} is the source itself: name another folder")
    if is_written(folder, overwrite):
        return False
    published = _published(source)
    shards = list(weight_files(source))
    if not shards:
        raise CheckpointError(f"{source} holds no safetensors files: download Lumina-mGPT's again")
    shapes = [named for shard in shards for named in header(shard)]
    _check_kind(source, published, shapes)
    vq = _found(vq or source, VQ_FILES if vq else VQ_FILES[:1], "--vq", _NO_VQ)
    words = _found(tokenizer or source, TOKENIZER_FILES, "--tokenizer", _NO_TOKENIZER)
    state = _vq_state(vq)
    config = _config(published, shapes, state, vq.name, _size(source, size), _dtype(shards[0]))
    served = LuminaConfig(**config)
    try:
        check_channels(served.vq_config.channel_multiplier)
        check_numbers(served.vq_config, VQ_SIZES)
    except ValueError as error:
        raise CheckpointError(str(error).replace("config.json", vq.name, 1)) from None
    try:
        FAMILY.check(served)
        ledger = Ledger(served)
        for name, shape in shapes:
            ledger.take(name, shape)
        ledger.close()
        text = _tokenizer(words, served, published.get("vocabulary_map") or {})
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    with torch.device("meta"):
        decoder = TamingDecoder(served.vq_config, Raster(1, 1), torch.float32)
    tensors = {VQ: decoder_tensors(state, decoder, VQ_PREFIX, vq.name)}
    texts = _texts(config) | {"tokenizer.json": text}
    write_folder(folder, (*shards, vq, words), texts, tensors, {shard.name: shard for shard in shards})
    return True


_NO_VQ = (
    "Lumina-mGPT's files hold no picture decoder: give Chameleon's vqgan.ckpt, or the folder of "
    "leloy/Anole-7b-v0.1-vqvae-hf"
)
_NO_TOKENIZER = (
    "only Lumina-mGPT-7B-768's files hold the tokenizer, which all sizes share: give that folder, or "
    "Chameleon's text_tokenizer.json"
)


def _found(path: Path, names: tuple[str, ...], option: str, mend: str) -> Path:
    """The file itself, or the one of these names in the folder."""
    files = [path] if path.is_file() else [path / name for name in names if (path / name).is_file()]
    if not files:
        raise CheckpointError(f"{option}: no {' or '.join(names)} in {path}; {mend}")
    return files[0]


def _published(source: Path) -> dict[str, Any]:
    try:
        config = json.loads((source / "config.json").read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{source}: config.json can't be read ({error!r:.80})") from None
    if not isinstance(config, dict) or config.get("model_type") != "chameleon":
        kind = config.get("model_type") if isinstance(config, dict) else None
        raise CheckpointError(
            f"{source}: config.json has model_type {kind!r:.40}, where Lumina-mGPT's has chameleon"
        )
    return config


def _check_kind(source: Path, config: Mapping[str, Any], shapes: Shapes) -> None:
    """Raise CheckpointError for a relative of Lumina-mGPT 7B."""
    vocabulary = config.get("vocab_size")
    if config.get("swin_norm"):
        what = "of Chameleon's 34B kind (swin_norm), as Lumina-mGPT-34B is"
    elif type(vocabulary) is int and vocabulary >= LUMINA_2:
        what = "Lumina-mGPT-2.0, another architecture"
    elif any(name.startswith(VQ_PREFIX) for name, _ in shapes):
        what = "a Chameleon or an Anole, with its own VQ model"
    else:
        return
    raise CheckpointError(f"{source} is {what}: not supported; Lumina-mGPT-7B-512, -768 and -1024 are")


def _size(source: Path, said: int | None) -> int:
    """The last size that the folder's path names; the hub's cache has a folder of hashes below it."""
    named = _SIZE.findall(str(source.absolute()))
    size = said or (int(named[-1]) if named else None)
    if size is None:
        raise CheckpointError(
            "--size: neither the option nor the folder's name (Lumina-mGPT-7B-768) says for which pictures "
            "the model was trained; give 512, 768 or 1024"
        )
    if named and size != int(named[-1]):
        logger.warning("--size: pictures of %d pixels, where the folder's name says %s", size, named[-1])
    return size


def _vq_state(file: Path) -> dict[str, Tensor]:
    """A VQ model's tensors, by the names that they have in a file of their own."""
    if file.suffix != ".safetensors":
        return load_state(file)
    try:
        return {name.removeprefix(VQ_PREFIX): x for name, x in load_file(file).items()}
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{file.name} can't be read ({reason:.120}): download it again") from None


def _dtype(shard: Path) -> torch.dtype:
    """What the weights are stored in, where config.json does not say."""
    with safe_open(shard, framework="pt") as opened:
        name = next(iter(opened.keys()))
        return opened.get_tensor(name).dtype  # type: ignore[no-any-return]


def _config(
    published: dict[str, Any],
    shapes: Shapes,
    state: Mapping[str, Tensor],
    vq_file: str,
    size: int,
    dtype: torch.dtype,
) -> dict[str, Any]:
    try:
        vq = VQSizes.of(state, levels="decoder.up.{}.block", widest_first=True)
    except (KeyError, IndexError, ValueError) as error:
        raise CheckpointError(
            f"{vq_file} is no VQ model of Chameleon (vqgan.ckpt): no {error!s:.60}"
        ) from None
    try:
        chameleon = ChameleonConfig.from_dict(published)
    except (StrictDataclassError, ValueError, TypeError) as error:
        raise CheckpointError(f"config.json: {' '.join(str(error).split()):.160}") from None
    norms = sorted({shape for name, shape in shapes if _NORM.search(name)})
    if len(norms) != 1:
        raise CheckpointError(
            f"norms of queries and keys must have one shape in all layers, got {norms!s:.80}"
        )
    unit = UNIT * 2 ** (len(vq.ch_mult) - 1)
    if size % unit:
        raise CheckpointError(f"--size: {size} is no multiple of {unit} pixels, as a size token has them")
    text = {name: getattr(chameleon, name) for name in _TEXT}
    # RoPE needs no table as long as the context, so this is only a bound: the picture has to fit.
    side = UNIT * size // unit
    text["max_position_embeddings"] = max(text["max_position_embeddings"], side * (side + 1) + PROMPT_ROOM)
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "dtype": str(chameleon.dtype or dtype).removeprefix("torch."),
        "size": size,
        "qk_norm_shape": list(norms[0]),
        "text_config": text,
        "vq_config": {
            "num_embeddings": vq.codes, "embed_dim": vq.embed, "latent_channels": vq.z,
            "base_channels": vq.ch, "channel_multiplier": vq.ch_mult, "num_res_blocks": vq.res_blocks,
        },
    }  # fmt: skip


def _tokenizer(file: Path, config: LuminaConfig, vocabulary: Mapping[str, int]) -> str:
    """The tokenizer's text, if its ids are the model's. ValueError, one line."""
    try:
        text = file.read_text("utf-8")
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # tokenizers raises nothing more particular
        raise ValueError(f"{file.name} is no tokenizer ({' '.join(str(error).split()):.80})") from None
    own = tokenizer.get_vocab()
    for token, number in vocabulary.items():
        if own.get(token, number) != number:
            raise ValueError(
                f"{file.name} gives {token!r:.40} the id {own[token]}, config.json {number}: not of one model"
            )
    FAMILY.resolve(config, tokenizer, ModelSettings())
    return text


def _texts(config: dict[str, Any]) -> dict[str, Any]:
    return {
        "config.json": config,
        "generation_config.json": {
            "do_sample": True, "guidance_scale": FAMILY.guidance_scale, "top_k": FAMILY.top_k,
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": SEPARATOR,
            "pad_token": PAD, "clean_up_tokenization_spaces": False,
        },
    }  # fmt: skip
