"""The demo model's sizes and its tokenizer, in one place for training, export and conversion."""

from __future__ import annotations

from pathlib import Path

from common import HERE, TRAIN_STREAM
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from vllm_kvcompress.eval.scenes import sample_pair
from vllm_kvcompress.testing import tokenizer as janus
from vllm_kvcompress.testing.geometry import CheckpointGeometry

MODEL_FOLDER = HERE / "model"
GEOMETRY = CheckpointGeometry(
    hidden=256,
    layers=6,
    heads=4,
    kv_heads=4,
    intermediate=704,
    lines=24,
    codebook=512,
    text_vocab=512,
    vq_channels=64,
    vq_multipliers=(1, 1, 1),
    vq_res_blocks=0,
    vq_latent=64,
    max_positions=2048,
)
CAPTIONS = 20_000
"""Captions that the tokenizer is trained on: the first ones of the training stream."""


def chat_prompt(caption: str) -> str:
    """Janus-Pro's prompt up to the first image token; the tokenizer puts BOS in front."""
    return f"<|User|>: {caption.strip()}\n\n<|Assistant|>:{janus.BOI}"


def build_tokenizer() -> Tokenizer:
    """Byte-level BPE over the captions' words, with Janus-Pro's special tokens in its order."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = janus.special_tokens(GEOMETRY.text_vocab)
    trainer = trainers.BpeTrainer(
        vocab_size=GEOMETRY.text_vocab - len(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    captions = (f": {sample_pair((TRAIN_STREAM, index))[1].text}\n\n" for index in range(CAPTIONS))
    tokenizer.train_from_iterator(captions, trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in specials])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{janus.BOS} $A",
        pair=f"{janus.BOS} $A {janus.BOS} $B",
        special_tokens=[(janus.BOS, tokenizer.token_to_id(janus.BOS))],
    )
    return tokenizer


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer file at `path`, built and saved there first if it is missing."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        build_tokenizer().save(str(path))
    return Tokenizer.from_file(str(path))
