"""Captions of scenes, and the prompts of the evaluation: a meaning in words."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .world import COUNT_WORDS, Ground, Phrase, Prompt

SIZE_SYNONYMS = {"small": ("small", "little"), "medium": ("medium",), "big": ("big", "large")}
RELATION_SYNONYMS = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
OPENINGS = ("", "", "", "", "a picture of ", "a drawing of ", "an image of ", "a scene with ")


def describe(
    rng: np.random.Generator,
    phrases: Sequence[Phrase],
    relation: str | None,
    place: str | None,
    ground: Ground,
) -> Prompt:
    """Leave some of the sizes, colours and the ground unsaid."""
    no_colour = rng.random() < 0.08
    said = tuple(
        Phrase(p.count, p.shape, None if no_colour else p.colour, p.size if rng.random() < 0.5 else None)
        for p in phrases
    )
    with_ground = rng.random() < 0.6
    return compose(
        said,
        relation,
        place,
        ground.pattern if with_ground else None,
        ground.colour if with_ground else None,
        rng=rng,
    )


def _noun_phrase(phrase: Phrase, rng: np.random.Generator | None) -> str:
    size = phrase.size
    if size is not None and rng is not None:
        size = str(rng.choice(SIZE_SYNONYMS[size]))
    words = [word for word in (size, phrase.colour, phrase.shape) if word]
    if phrase.count > 1:
        words[-1] += "es" if words[-1].endswith("s") else "s"
        return " ".join([COUNT_WORDS[phrase.count], *words])
    article = "one" if rng is not None and rng.random() < 0.1 else ("an" if words[0][0] in "aeiou" else "a")
    return " ".join([article, *words])


def compose(
    phrases: Sequence[Phrase],
    relation: str | None = None,
    place: str | None = None,
    pattern: str | None = None,
    ground: str | None = None,
    category: str | None = None,
    rng: np.random.Generator | None = None,
) -> Prompt:
    """Write the caption of a meaning: in the plainest words, or with synonyms drawn from `rng`."""

    def pick(options: Sequence[str]) -> str:
        return options[0] if rng is None else str(rng.choice(options))

    nouns = [_noun_phrase(phrase, rng) for phrase in phrases]
    if relation is not None:
        text = f"{nouns[0]} {pick(RELATION_SYNONYMS[relation])} {nouns[1]}"
    elif len(nouns) > 1:
        text = ", ".join(nouns[:-1]) + " and " + nouns[-1]
    else:
        text = nouns[0]
    if place is not None:
        prepositions = ("in the", "at the") if place != "centre" else ("in the",)
        text += f" {pick(prepositions)} {place}"
    if ground is not None:
        named = f"{pattern} {ground}" if pattern else ground
        if pattern == "plain":
            named = pick((f"plain {ground}", ground))
        article = "an" if named[0] in "aeiou" else "a"
        text += f" on {article} {named} {pick(('ground', 'background'))}"
    return Prompt(pick(OPENINGS) + text, tuple(phrases), relation, place, pattern, ground, category)
