"""Make random Lumina-mGPT files as they are published, scattered, to be converted as a user would.

The strings of ids are the published ones, the ids themselves not: codes lie in the middle, text around them.
"""

import json
from dataclasses import dataclass
from math import prod, sqrt
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from vllm_kvcompress.testing.weights import GAIN

_CORPUS = ("Generate an image of 64x32 according to the following prompt:\n a portrait of a girl; blurry",)
_SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")
_AFTER = ("<eoss>", "<racm3:break>", "<reserved08706>", "<reserved08799>")
UNITS = 17  # size tokens: for none, up to 16 times 2 tokens


@dataclass(frozen=True)
class LuminaGeometry:
    """Sizes of a small Lumina-mGPT; pictures are of any size, in tokens of 4 pixels."""

    hidden: int = 64
    layers: int = 2
    heads: int = 4
    intermediate: int = 96
    codes: int = 128
    positions: int = 1024
    rows: int = 1
    """Of the norms of queries and keys: 1 as Lumina-mGPT has them, 0 for none, or as many as shards."""

    @property
    def head(self) -> int:
        return self.hidden // self.heads


def _trained() -> tuple[list[str], list[tuple[str, str]]]:
    """Tokens of text, and what they are merged from."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(_CORPUS, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return sorted(model["vocab"], key=model["vocab"].get), [tuple(pair) for pair in model["merges"]]


def vocabulary_of(codes: int) -> dict[str, int]:
    """String -> id: special tokens, some of the text, codes, what says a picture's form, the rest."""
    text, _ = _trained()
    spelled = (str(code).translate(str.maketrans("0123456789", "ABCDEFGHIJ")) for code in range(codes))
    sizes = (f"<reserved{8800 + n:05d}>" for n in range(UNITS))
    tokens = [*_SPECIAL, *text[:100], *(f"IMGIMG{one}Z" for one in spelled), *_AFTER, *sizes, *text[100:]]
    return {token: number for number, token in enumerate(tokens)}


def build_tokenizer(codes: int) -> Tokenizer:
    """Byte-level; its vocabulary is `vocabulary_of`, of which no token is marked as special."""
    tokenizer = Tokenizer(models.BPE(vocabulary_of(codes), _trained()[1]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def published_config(g: LuminaGeometry) -> dict[str, Any]:
    """config.json as Lumina-mGPT's: a Chameleon's, whose bos is not the one that prompts begin with."""
    vocabulary = vocabulary_of(g.codes)
    return {
        "architectures": ["ChameleonForConditionalGeneration"], "model_type": "chameleon",
        "vocab_size": len(vocabulary), "hidden_size": g.hidden, "intermediate_size": g.intermediate,
        "num_hidden_layers": g.layers, "num_attention_heads": g.heads, "num_key_value_heads": g.heads,
        "max_position_embeddings": g.positions, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "model_parallel_size": max(1, g.rows), "swin_norm": False, "bos_token_id": 1, "eos_token_id": 2,
        "mask_image_logits": False, "torch_dtype": "float32", "vocabulary_map": vocabulary,
    }  # fmt: skip


def decoder_state(g: LuminaGeometry, seed: int = 0) -> dict[str, Tensor]:
    """Random float32 tensors under the published names; norms of queries and keys are no near ones."""
    d, vocabulary = g.hidden, len(vocabulary_of(g.codes))
    norm = (g.rows, g.head) if g.rows else (g.head,)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocabulary, d), "lm_head.weight": (vocabulary, d),
        "model.norm.weight": (d,),
    }  # fmt: skip
    for n in range(g.layers):
        layer = {
            **{f"self_attn.{x}_proj.weight": (d, d) for x in "qkvo"},
            **{f"self_attn.{x}_norm.{kind}": norm for x in "qk" for kind in ("weight", "bias")},
            "mlp.gate_proj.weight": (g.intermediate, d), "mlp.up_proj.weight": (g.intermediate, d),
            "mlp.down_proj.weight": (d, g.intermediate), "input_layernorm.weight": (d,),
            "post_attention_layernorm.weight": (d,),
        }  # fmt: skip
        shapes |= {f"model.layers.{n}.{name}": shape for name, shape in layer.items()}
    return {name: _draw(name, shape, seed) for name, shape in shapes.items()}


def vq_state(g: LuminaGeometry, seed: int = 0) -> dict[str, Tensor]:
    """Random float32 tensors of ``vqgan.ckpt``: three levels of 32, 32, 64 channels, a bit of an encoder."""
    widths, blocks, z = (32, 32, 64), 2, 8
    shapes: dict[str, tuple[int, ...]] = {
        "quantize.embedding.weight": (g.codes, z),
        "encoder.conv_in.weight": (32, 3, 3, 3), "quant_conv.weight": (z, z, 1, 1), "quant_conv.bias": (z,),
        "loss.discriminator.main.0.weight": (8, 3, 4, 4),
    }  # fmt: skip

    def conv(name: str, out: int, into: int, side: int = 3) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (out, into, side, side), (out,)

    def norm(name: str, channels: int) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (channels,)

    def residual(name: str, out: int, into: int) -> None:
        norm(f"{name}.norm1", into)
        conv(f"{name}.conv1", out, into)
        norm(f"{name}.norm2", out)
        conv(f"{name}.conv2", out, out)
        if out != into:
            conv(f"{name}.nin_shortcut", out, into, 1)

    conv("post_quant_conv", z, z, 1)
    into = widths[-1]
    conv("decoder.conv_in", into, z)
    residual("decoder.mid.block_1", into, into)
    residual("decoder.mid.block_2", into, into)
    norm("decoder.mid.attn_1.norm", into)
    for part in ("q", "k", "v", "proj_out"):
        conv(f"decoder.mid.attn_1.{part}", into, into, 1)
    for level in reversed(range(len(widths))):
        for block in range(blocks + 1):
            residual(f"decoder.up.{level}.block.{block}", widths[level], into)
            into = widths[level]
        if level:
            conv(f"decoder.up.{level}.upsample.conv", into, into)
    norm("decoder.norm_out", into)
    conv("decoder.conv_out", 3, into)
    return {name: _draw(name, shape, seed) for name, shape in shapes.items()}


def _draw(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(crc32(f"{seed}:{name}".encode()))
    new = torch.empty(shape)
    if name.endswith("bias"):
        return new.normal_(0.0, 0.3 if "_norm." in name else 0.1, generator=generator)
    if "_norm." in name or len(shape) == 1:  # those of heads differ in rows, too
        return new.normal_(1.0, 0.3 if "_norm." in name else 0.1, generator=generator)
    if "embed" in name:  # words, and the codebook
        return new.normal_(generator=generator)
    return new.normal_(0.0, GAIN / sqrt(prod(shape[1:])), generator=generator)


def write_sources(path: Path, g: LuminaGeometry, seed: int = 0) -> tuple[Path, Path, Path]:
    """Write a model's folder with its weights in two files, ``vqgan.ckpt`` and a tokenizer's folder."""
    from safetensors.torch import save_file

    model, words = path / "Lumina-mGPT-7B-32", path / "Lumina-mGPT-7B-768"
    model.mkdir(parents=True)
    words.mkdir()
    (model / "config.json").write_text(json.dumps(published_config(g)))
    state = decoder_state(g, seed)
    files = {name: f"model-0000{1 + n % 2}-of-00002.safetensors" for n, name in enumerate(state)}
    for file in set(files.values()):
        mine = {name: x for name, x in state.items() if files[name] == file}
        save_file(mine, model / file, {"format": "pt"})
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    torch.save({"state_dict": vq_state(g, seed), "epoch": 3}, path / "vqgan.ckpt")
    build_tokenizer(g.codes).save(str(words / "tokenizer.json"))
    return model, path / "vqgan.ckpt", words


def make_lumina(path: Path, geometry: LuminaGeometry | None = None, seed: int = 0) -> Path:
    """Write the files below ``path``; convert them into ``path/served``, returned.

    Raises CheckpointError as `vllm_kvcompress.models.lumina.convert.convert` does.
    """
    from vllm_kvcompress.models.lumina.convert import convert

    model, vq, words = write_sources(path, geometry or LuminaGeometry(), seed)
    convert(model, path / "served", vq=vq, tokenizer=words)
    return path / "served"
