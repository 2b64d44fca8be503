"""Janus-Pro's tokenizer: begin-of-sentence, padding, begin-of-image; and transformers 5 reading it wrong.

deepseek-ai's files name ``LlamaTokenizer`` as the class of a byte-level tokenizer.json. transformers 4
took the file's word for the rest; transformers 5 puts SentencePiece's pre-tokenizer in its place, and
every space of a prompt is dropped without a word (transformers issues 45488 and 48206; the models
known to be affected are listed in tokenization_auto.py, ``multi_modality`` is not among them).
"""

# ruff: noqa: RUF001 (the full-width bars are part of the tokens)

from collections.abc import Callable
from functools import partial
from operator import setitem
from typing import Any

from vllm_kvcompress.log import logger_for

logger = logger_for(__name__)

# The same in every family, unlike their ids: 100015 and 100002 are both the pad of some Janus.
BOS = "<｜begin▁of▁sentence｜>"
PAD = "<｜▁pad▁｜>"
BOI, EOI = "<begin_of_image>", "<end_of_image>"
IMAGE = "<image_placeholder>"  # in a chat, where a picture goes

_PROBE = "a cat on 2 mats"


def tokenizer_fix() -> Callable[[], object]:
    """What makes transformers read ``multi_modality`` tokenizers from tokenizer.json as they are.

    A table entry, which no other model type looks at. Raises ImportError if transformers has moved the table.
    """
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

    from vllm_kvcompress.models.janus_config import ORIGINAL_LAYOUT

    return partial(setitem, TOKENIZER_MAPPING_NAMES, ORIGINAL_LAYOUT, "TokenizersBackend")


def token_id(tokenizer: Any, token: str) -> int | None:
    """The id of a token, by string; None when the tokenizer has no such token."""
    found = tokenizer.convert_tokens_to_ids(token)
    if found is None or tokenizer.convert_ids_to_tokens(found) != token:  # the unknown token's id
        return None
    return found


def resolve_special_ids(tokenizer: Any) -> tuple[int, int, int]:
    """Ids of begin-of-sentence, padding and begin-of-image.

    Raises
    ------
    ValueError
        Naming the token that the tokenizer lacks.
    """
    bos, pad, boi = (_required(tokenizer, token) for token in (BOS, PAD, BOI))
    return bos, pad, boi


def _required(tokenizer: Any, token: str) -> int:
    found = token_id(tokenizer, token)
    if found is None:
        raise ValueError(f"the tokenizer has no token {token}: not a Janus or Janus-Pro tokenizer")
    return found


def check_tokenizer(tokenizer: Any) -> None:
    """Check at start-up what would otherwise show as wrong pictures.

    Raises
    ------
    ValueError
        The tokenizer loses spaces, or has no begin-of-sentence, padding or begin-of-image.
    """
    bos, _, _ = resolve_special_ids(tokenizer)
    ids = tokenizer.encode(_PROBE, add_special_tokens=False)
    back = tokenizer.decode(ids, skip_special_tokens=True)
    if back != _PROBE:
        raise ValueError(
            f"the tokenizer reads {_PROBE!r} as {back!r}: transformers took it for a LlamaTokenizer; "
            "let the kvcompress plugin load (VLLM_PLUGINS, if set, must name it), or set tokenizer_class to "
            "PreTrainedTokenizerFast in tokenizer_config.json"
        )
    # Image prompts get theirs from image_prompt_ids, so this is no reason not to serve.
    if tokenizer.encode(_PROBE)[:1] != [bos]:
        logger.warning("The tokenizer does not begin text with %s: text answers may suffer.", BOS)
