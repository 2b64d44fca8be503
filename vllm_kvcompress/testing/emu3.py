"""Make random Emu3 checkpoints in transformers' layout, with the published strings at other ids."""

import json
import zlib
from dataclasses import dataclass
from math import prod, sqrt
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

GAIN = 2.0  # of random matrices: greedy pictures then have many codes
SPECIAL = (
    "<|endoftext|>", "<|extra_200|>", "<|extra_201|>", "<|extra_203|>", "<|extra_204|>", "<|image token|>",
    "<|image start|>", "<|image end|>",
)  # fmt: skip
_CORPUS = ("a portrait of a girl, film grained, best quality; lowres, bad anatomy, worst quality, blurry",)


@dataclass(frozen=True)
class Emu3Geometry:
    """Sizes of a small Emu3; pictures are of any size, in tokens of 4 pixels."""

    hidden: int = 64
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    intermediate: int = 96
    codes: int = 128
    positions: int = 1024


def make_emu3(
    path: Path, geometry: Emu3Geometry | None = None, seed: int = 0, *, in_memory: bool = False
) -> Path:
    """Write a checkpoint: config.json, tokenizer and weights as transformers saves them.

    Codes lie in the middle of the vocabulary. ``in_memory`` writes the tensors' names that transformers 5 has
    in memory (``model.text_model.``) rather than the published ones, which it saves.
    """
    from safetensors.torch import save_file
    from transformers import Emu3ForConditionalGeneration

    path.mkdir(parents=True, exist_ok=True)
    g = geometry or Emu3Geometry()
    tokenizer = build_tokenizer(g.codes)
    config = emu3_config(g, tokenizer.get_vocab())
    model = Emu3ForConditionalGeneration(config).eval()
    state = {name: _drawn(name, tensor, seed) for name, tensor in model.state_dict().items()}
    model.load_state_dict(state)
    config.architectures = ["Emu3ForConditionalGeneration"]
    config.dtype = "float32"
    if in_memory:
        config.save_pretrained(path)
        save_file(
            {name: x.contiguous() for name, x in state.items()}, path / "model.safetensors", {"format": "pt"}
        )
    else:
        model.save_pretrained(path)
        (path / "generation_config.json").unlink(missing_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    special: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|extra_203|>",
        "eos_token": "<|extra_204|>", "pad_token": "<|endoftext|>", "model_max_length": g.positions,
    }  # fmt: skip
    (path / "tokenizer_config.json").write_text(json.dumps(special))
    return path


def emu3_config(g: Emu3Geometry, vocabulary: dict[str, int]) -> Any:
    """transformers' configuration of these sizes."""
    from transformers import Emu3Config

    special = {
        name: vocabulary[token]
        for name, token in (
            ("pad_token_id", SPECIAL[0]), ("bos_token_id", SPECIAL[3]), ("eos_token_id", SPECIAL[4])
        )
    }  # fmt: skip
    return Emu3Config(
        vocabulary_map=vocabulary,
        text_config={
            "vocab_size": len(vocabulary), "hidden_size": g.hidden, "intermediate_size": g.intermediate,
            "num_hidden_layers": g.layers, "num_attention_heads": g.heads, "num_key_value_heads": g.kv_heads,
            "max_position_embeddings": g.positions, **special,
        },
        vq_config={
            "codebook_size": g.codes, "embed_dim": 4, "latent_channels": 4, "base_channels": 32,
            "channel_multiplier": [1, 1, 2], "num_res_blocks": 1, "attn_resolutions": [2], "hidden_size": 64,
        },
    )  # fmt: skip


def build_tokenizer(codes: int) -> Tokenizer:
    """Byte-level, with Emu3's special tokens, the codes, and one more token after them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(_CORPUS, trainer)
    visual = (f"<|visual token {code:06d}|>" for code in range(codes))
    tokens = [*SPECIAL, *visual, "<image>"]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in tokens])
    return tokenizer


def _drawn(name: str, tensor: Tensor, seed: int) -> Tensor:
    """Random numbers of a tensor's shape: scaled matrices, norms near 1, variances that are none of 1."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
    new = torch.empty_like(tensor, dtype=torch.float32)
    if not tensor.is_floating_point() or name.endswith("inv_freq"):
        return tensor
    if name.endswith("running_var"):
        return new.uniform_(0.5, 2.0, generator=generator)
    if name.endswith("bias") or name.endswith("running_mean"):
        return new.normal_(0.0, 0.1, generator=generator)
    if tensor.ndim == 1:
        return new.normal_(1.0, 0.1, generator=generator)
    if "embed" in name:  # words, and the codebook
        return new.normal_(generator=generator)
    return new.normal_(0.0, GAIN / sqrt(prod(tensor.shape[1:])), generator=generator)
