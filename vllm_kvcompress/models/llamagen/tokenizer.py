"""Class names, as a tokenizer of whole words: ids are classes, the null class, then codes.

A word-level tokenizer keeps vLLM's logs, detokenising and text completions alive in a model that reads no
text; ``tokenizer.encode("golden retriever")`` is the class's one id.
"""

import difflib
import re
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models

NULL_CLASS = "<no class>"
IMAGENET = Path(__file__).with_name("imagenet.txt")
NEAR_MATCHES = 5
_WORD = re.compile(r"\w+")


def class_names(classes: int) -> list[str]:
    """ImageNet's names where there are a thousand classes, else ``class 0`` and so on.

    Names that differ in capitals alone are told apart by their id: ``cardigan (474)``.
    """
    names = IMAGENET.read_text("utf-8").split("\n")[:-1] if classes == 1000 else []
    names = names or [f"class {number}" for number in range(classes)]
    count = Counter(name.casefold() for name in names)
    return [f"{name} ({n})" if count[name.casefold()] > 1 else name for n, name in enumerate(names)]


def build_tokenizer(names: Sequence[str], codes: int) -> Tokenizer:
    """The tokenizer of a model with these classes; what it does not know is the null class."""
    words = [*names, NULL_CLASS, *(f"<code {code}>" for code in range(codes))]
    if len(set(words)) < len(words):
        raise ValueError("class names must differ")
    return Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token=NULL_CLASS))


def check_names(tokenizer: Any, classes: int) -> None:
    """Raise ValueError, one line, unless ids are the classes, then the null class."""
    if tokenizer.convert_ids_to_tokens(classes) != NULL_CLASS:
        raise ValueError(
            f"the tokenizer has no {NULL_CLASS} at id {classes}, where config.json's num_classes has it: "
            "convert the checkpoint again"
        )


def class_of(tokenizer: Any, classes: int, text: str) -> int:
    """The class that a user means.

    Parameters
    ----------
    text : str
        A class's name, whatever its capitals and with ``_`` for a space, or its number; or both, as near
        matches are shown: ``golden retriever (207)``.

    Raises
    ------
    ValueError
        One line with near matches.
    """
    wanted = " ".join(text.replace("_", " ").split())
    if wanted.isascii() and wanted.isdecimal():
        if len(wanted) > 9 or int(wanted) >= classes:
            raise ValueError(f"there is no class {wanted[:20]}: classes are 0 to {classes - 1}")
        return int(wanted)
    names = _names(tokenizer, classes)
    if (found := names.get(wanted.casefold())) is not None:
        return found[1]
    name, _, number = wanted.casefold().removesuffix(")").rpartition(" (")
    if (found := names.get(name)) is not None and f"{found[1]}" == number:
        return found[1]
    shown = f"{wanted[:60]}..." if len(wanted) > 60 else wanted
    raise ValueError(
        f"the model has no class {shown!r}: say one of its {classes} classes by name or number"
        + _near(wanted, names)
    )


def _near(wanted: str, names: dict[str, tuple[str, int]]) -> str:
    wanted = wanted.casefold()[:60]
    near = [name for name in names if name.startswith(f"{wanted} (")]  # a name that several classes have
    if not near:
        # First where one has all words of the other: "labrador", or a sentence about a class.
        words = set(_WORD.findall(wanted))
        near = [
            name for name in names if words and ((its := set(_WORD.findall(name))) <= words or words <= its)
        ]
        near.sort(key=lambda name: -difflib.SequenceMatcher(None, wanted, name).ratio())
        near = [*dict.fromkeys((*near, *difflib.get_close_matches(wanted, names, n=NEAR_MATCHES)))]
    near = near or [name for name in names if len(wanted) > 2 and wanted in name]
    shown = [names[name] for name in near[:NEAR_MATCHES]]
    return (
        "; near: " + ", ".join(f"{name} ({n})" if f"({n})" not in name else name for name, n in shown)
        if near
        else ""
    )


@lru_cache(maxsize=8)
def _names(tokenizer: Any, classes: int) -> dict[str, tuple[str, int]]:
    """Casefolded name -> name and class."""
    names = tokenizer.convert_ids_to_tokens(list(range(classes)))
    return {name.casefold(): (name, n) for n, name in enumerate(names)}
