"""LlamaGen's ``.pt`` files -> one folder that ``vllm serve`` takes: config, weights, tokenizer, defaults."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vllm_kvcompress.log import logger_for
from vllm_kvcompress.models.conversion import (
    VQSizes,
    decoder_tensors,
    is_written,
    load_state,
    write_folder,
)
from vllm_kvcompress.models.llamagen.config import ARCHITECTURE, CLASS_CONDITIONAL, MODEL_TYPE, LlamaGenConfig
from vllm_kvcompress.models.llamagen.family import GUIDANCE_SCALE, TOP_K
from vllm_kvcompress.models.llamagen.source import PATCH, ROPE_TABLE, VQ_WRAPPERS, DecoderSizes, vq_sizes
from vllm_kvcompress.models.llamagen.tokenizer import NULL_CLASS, build_tokenizer, class_names
from vllm_kvcompress.models.vq import VQDecoder
from vllm_kvcompress.models.weights import CheckpointError
from vllm_kvcompress.policy.raster import Raster

logger = logger_for(__name__)

DECODER, VQ = "model.safetensors", "vq.safetensors"
VQ_PREFIX = "gen_vision_model."
VQ_FILE = "vq_ds16_c2i.pt"  # the published one, looked for beside the decoder
_OUTSIDE = {
    "cls_embedding.embedding_table.weight": "language_model.embed_tokens.weight",
    "tok_embeddings.weight": "image_embedding.weight",
    "norm.weight": "language_model.norm.weight",
    "output.weight": "gen_head.weight",
}
_OF_LAYER = {
    "attention.wo": ("self_attn.o_proj",),
    "attention.wqkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),  # stacked in this order
    "feed_forward.w1": ("mlp.gate_proj",),
    "feed_forward.w2": ("mlp.down_proj",),
    "feed_forward.w3": ("mlp.up_proj",),
    "attention_norm": ("input_layernorm",),
    "ffn_norm": ("post_attention_layernorm",),
}


def convert(
    source: Path,
    folder: Path,
    *,
    vq: Path | None = None,
    grid: int | None = None,
    heads: int | None = None,
    overwrite: bool = False,
) -> bool:
    """Write ``folder`` from a decoder's and a VQ model's ``.pt``.

    It appears when it is whole. What an interrupted run has finished is taken over by the next one from the
    same files. Tensors keep their dtype; every tensor is used, knowingly skipped (the VQ model's encoder, a
    stray RoPE table) or named in the error.

    Parameters
    ----------
    source : Path
        ``c2i_*.pt``, or a folder with one such file.
    vq : Path, optional
        The file, or the folder of ``vq_ds16_c2i.pt``; by default that of the decoder.
    grid, heads : int, optional
        Tokens a line, and attention heads, where names and sizes do not tell.
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
    if is_written(folder, overwrite):
        return False
    source = _decoder_file(source)
    vq = vq or source.with_name(VQ_FILE)
    vq = vq / VQ_FILE if vq.is_dir() else vq
    if not vq.is_file():
        raise CheckpointError(
            f"--vq: {vq} is not there; give LlamaGen's {VQ_FILE}, which turns codes into pixels"
        )
    state, vq_state = load_state(source), load_state(vq, VQ_WRAPPERS)
    sizes, of_vq = DecoderSizes.of(state, source.name, grid, heads), vq_sizes(vq_state, vq.name)
    sizes.check(state, source.name)
    if of_vq.codes != sizes.codes:
        raise CheckpointError(
            f"{vq.name} has {of_vq.codes} codes, {source.name} {sizes.codes}: not of one model"
        )
    if (patch := 2 ** (len(of_vq.ch_mult) - 1)) != PATCH:
        side = sizes.grid * patch
        logger.warning(
            "--vq: %s draws %d pixels a token, published c2i_*.pt go with one of %d (%s): pictures are %dx%d",
            vq.name, patch, PATCH, VQ_FILE, side, side,
        )  # fmt: skip
    config = _config(sizes, of_vq, state["tok_embeddings.weight"].dtype)  # the RoPE table has its own
    parts = {VQ: _vq_tensors(vq_state, config, vq.name), DECODER: dict(_decoder_tensors(state))}
    write_folder(folder, (source, vq), _texts(sizes, config), parts)
    return True


def _decoder_file(source: Path) -> Path:
    if not source.is_dir():
        return source
    found = sorted(source.glob("c2i_*.pt"))
    if len(found) != 1:
        shown = ", ".join(file.name for file in found) or "none"
        raise CheckpointError(f"{source} must hold one c2i_*.pt, or name the file itself; there: {shown}")
    return found[0]


def _config(sizes: DecoderSizes, vq: VQSizes, dtype: torch.dtype) -> dict[str, Any]:
    config = {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "dtype": str(dtype).removeprefix("torch."),
        "condition": CLASS_CONDITIONAL,
        "num_classes": sizes.classes,
        "grid": sizes.grid,
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.intermediate,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "vq": asdict(vq),
    }
    try:
        LlamaGenConfig(**config)
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    return config


def _texts(sizes: DecoderSizes, config: dict[str, Any]) -> dict[str, Any]:
    return {
        "config.json": config,
        "generation_config.json": {"do_sample": True, "guidance_scale": GUIDANCE_SCALE, "top_k": TOP_K},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": NULL_CLASS,
            "clean_up_tokenization_spaces": False,
        },
        "tokenizer.json": build_tokenizer(class_names(sizes.classes), sizes.codes).to_str(pretty=True),
    }


def _decoder_tensors(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Published names -> the served model's; wqkv in its three parts, views of the stored tensor."""
    for name, tensor in state.items():
        if name == ROPE_TABLE:
            continue
        if name in _OUTSIDE:
            yield _OUTSIDE[name], tensor
            continue
        _, layer, rest = name.split(".", 2)
        targets = _OF_LAYER[rest.removesuffix(".weight")]
        for target, part in zip(targets, tensor.chunk(len(targets)), strict=True):
            yield f"language_model.layers.{layer}.{target}.weight", part


def _vq_tensors(state: Mapping[str, Tensor], config: dict[str, Any], file: str) -> dict[str, Tensor]:
    """The decoder half, under the names that Janus's files have."""
    served = LlamaGenConfig(**config)
    with torch.device("meta"):
        vq = VQDecoder(served.vq_config, Raster(1, 1), torch.float32)
    return decoder_tensors(state, vq, VQ_PREFIX, file)
