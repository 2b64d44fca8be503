# ruff: noqa: RUF001 (the full-width bars are part of the tokens)
"""A byte-level BPE tokenizer with Janus-Pro's special tokens, trained on a few sentences."""

import json

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
BOI, EOI, IMAGE = "<begin_of_image>", "<end_of_image>", "<image_placeholder>"
ROLES = ("<|User|>", "<|Assistant|>")
# Order of special_tokens_map.json's additional_special_tokens in Janus-Pro.
ADDITIONAL = (
    IMAGE, "<patch_placeholder>", "<|ref|>", "<|/ref|>", "<|det|>", "<|/det|>", "<|grounding|>", *ROLES,
)  # fmt: skip
_PRO_BASE, _PRO_RESERVED = 100_000, 576  # ids below BOS; ids between begin- and end-of-image
_CORPUS = (
    "User: A red bicycle leaning on a white wall, in the soft light of the morning.\n\nAssistant:",
    "The portrait of an old sailor with a grey beard, oil on canvas, highly detailed.",
    "A close-up photograph of a cat sleeping on the window sill, and rain behind the glass.",
    "Three green apples and one blue cup on the table; a still life with strong shadows.",
    "A city at night, seen from above: streets of light, a river, bridges, no people.",
    "Watercolour of a mountain lake with a small boat, pine trees, clouds and their reflections.",
    "An astronaut riding a horse on the moon, the earth in the black sky, 35 mm film, grainy.",
)


def special_tokens(text_vocab: int, pro_roles: bool = True) -> list[str]:
    """Special tokens in Janus-Pro's order.

    ``pro_roles=False`` leaves out ``<|User|>`` and ``<|Assistant|>``, as Janus-1.3B does.
    """
    reserved = _PRO_RESERVED if text_vocab > _PRO_BASE else 0
    additional = ADDITIONAL if pro_roles else ADDITIONAL[: -len(ROLES)]
    return [BOS, EOS, PAD, BOI, *(f"<｜place▁holder▁no▁{i}｜>" for i in range(reserved)), EOI, *additional]


def build_tokenizer(text_vocab: int, pro_roles: bool = True) -> Tokenizer:
    """The tokenizer of a checkpoint with ``text_vocab`` text embeddings.

    Covers every byte, so any text round-trips. A vocabulary as large as Janus-Pro's gets special tokens
    at the published ids (BOS 100000, begin-of-image 100003, ``<|Assistant|>`` 100589).

    Raises
    ------
    ValueError
        ``text_vocab`` has no room for 256 bytes and the special tokens.
    """
    specials = special_tokens(text_vocab, pro_roles)
    room = text_vocab - len(specials)
    if room < 256:
        raise ValueError(
            f"text_vocab {text_vocab} is too small for 256 bytes, {len(specials)} special tokens"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=min(room, _PRO_BASE),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    if text_vocab > _PRO_BASE:
        state = json.loads(tokenizer.to_str())
        vocab = state["model"]["vocab"]
        vocab.update({f"unused{i}": i for i in range(len(vocab), _PRO_BASE)})
        tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in specials])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS} $B",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )
    return tokenizer
