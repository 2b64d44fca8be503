"""A user's text -> the token ids that make Janus-Pro draw.

The format is the training data's ("deepseek" of deepseek-ai/Janus janus/utils/conversation.py:293-309,
generation_inference.py:29-57): ``<|User|>: {text}\\n\\n<|Assistant|>:<begin_of_image>``, after
begin-of-sentence. Any other, a missing space even, gives noise or a worse picture.
"""

import json
import re
import threading
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from tokenizers import Tokenizer

from vllm_kvcompress.models.tokenizer import resolve_special_ids, token_id

if TYPE_CHECKING:
    from vllm_kvcompress.models.config import ImageModel

__all__ = ["encode_plain", "image_prompt_ids", "lengthened", "negative_ids", "resolve_special_ids"]

_USER, _ASSISTANT = "<|User|>", "<|Assistant|>"
_CONTROL = re.compile(r"<.*>", re.DOTALL)

_plain: "WeakKeyDictionary[Any, Tokenizer]" = WeakKeyDictionary()
_plain_lock = threading.Lock()


def image_prompt_ids(tokenizer: Any, image_model: "ImageModel", text: str) -> list[int]:
    """Prompt ids for drawing ``text``.

    Control tokens spelled out in ``text`` are text: a user can't begin an image, or speak for the
    assistant, by writing ``<begin_of_image>``. Safe to call from several threads.

    Parameters
    ----------
    tokenizer
        A fast transformers tokenizer, as ``vllm.tokenizers.get_tokenizer`` gives it.
    text : str
        The user's; white space around it is dropped, as the published code does.

    Returns
    -------
    list of int
        Begin-of-sentence first, begin-of-image last, each exactly once.

    Raises
    ------
    ValueError
        ``text`` is not valid Unicode (a lone surrogate), or the tokenizer is not a fast one.
    """
    check_unicode(text)
    text = text.strip()
    said = f": {text}\n\n" if text else ":"
    user, assistant = token_id(tokenizer, _USER), token_id(tokenizer, _ASSISTANT)
    if user is None or assistant is None:  # Janus-1.3B, whose roles are words
        body = encode_plain(tokenizer, f"User{said}Assistant:")
    else:
        body = [user, *encode_plain(tokenizer, said), assistant, *encode_plain(tokenizer, ":")]
    return [image_model.bos, *body, image_model.boi]


def negative_ids(tokenizer: Any, image_model: "ImageModel", negative_text: str, length: int) -> list[int]:
    """Prompt ids of the unconditional branch, when the user says what not to draw.

    Both branches of a token share its position, hence the exact length. The padding goes between
    begin-of-sentence and the text: where the model's own unconditional prompt has it
    (``BOS, pad, ..., pad, begin-of-image``; generation_inference.py:70-73), which leaves the text next to
    begin-of-image as in every prompt the model has seen.

    Parameters
    ----------
    length : int
        Tokens of the conditional prompt.

    Returns
    -------
    list of int
        Of exactly ``length`` ids, begin-of-sentence first, begin-of-image last.

    Raises
    ------
    ValueError
        The formatted text is longer than ``length``.
    """
    bos, *body = image_prompt_ids(tokenizer, image_model, negative_text)
    padding = length - 1 - len(body)
    if padding < 0:
        raise ValueError(
            f"the negative prompt has {1 + len(body)} tokens, more than the prompt's {length}: "
            "shorten it or lengthen the prompt"
        )
    return [bos, *[image_model.pad] * padding, *body]


def lengthened(image_model: "ImageModel", prompt_ids: list[int], length: int) -> list[int]:
    """A prompt made as long as a longer negative one: padding between begin-of-sentence and the text.

    That is where an unconditional prompt has it too. Text and picture keep their distances; both move to
    later positions and see ``length - len(prompt_ids)`` padding tokens, which conditional prompts did not
    have in training. So the picture is another one than the same seed draws without the padding.

    Parameters
    ----------
    prompt_ids : list of int
        Begin-of-sentence first.
    length : int
        Tokens wanted; no more than there are leaves the prompt as it is.
    """
    return [*prompt_ids[:1], *[image_model.pad] * (length - len(prompt_ids)), *prompt_ids[1:]]


def check_unicode(text: str) -> None:
    """Raise ValueError for a lone surrogate, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the text is not valid Unicode at character {error.start}") from None


def encode_plain(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text in which control tokens are text; safe and errors as in `image_prompt_ids`."""
    check_unicode(text)
    return _plain_tokenizer(tokenizer).encode(text, add_special_tokens=False).ids


def _plain_tokenizer(tokenizer: Any) -> Tokenizer:
    """A copy of the tokenizer that reads control tokens as text.

    transformers' ``split_special_tokens=True`` flips a switch on the tokenizer that all requests share,
    so it needs a copy of its own. And it leaves alone control tokens that the file does not mark as
    special, while ordinary text may be an added token too (single letters are, in DeepSeek's files):
    what counts as control is either marked, or looks like a tag.
    """
    with _plain_lock:
        plain = _plain.get(tokenizer)
        if plain is None:
            backend = getattr(tokenizer, "backend_tokenizer", None)
            if backend is None:
                raise ValueError(f"image prompts need a fast tokenizer, got {type(tokenizer).__name__}")
            state = json.loads(backend.to_str())
            for token in state["added_tokens"]:
                token["special"] = token["special"] or _CONTROL.fullmatch(token["content"]) is not None
            plain = Tokenizer.from_str(json.dumps(state))
            plain.encode_special_tokens = True
            plain.no_truncation()
            plain.no_padding()
            _plain[tokenizer] = plain
        return plain
