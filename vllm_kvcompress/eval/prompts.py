"""Evaluation prompts of the shapes world: GenEval's categories (arXiv 2310.11513) and held-out sets.

Deterministic, in the plainest words, none with a ground: what is judged is what a prompt says.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import permutations, product

import numpy as np

from .captions import compose
from .scenes import TRAIN_KINDS
from .world import (
    HELD_OUT_KINDS,
    MAX_OBJECTS,
    RELATIONS,
    SHAPES,
    Kind,
    Phrase,
    Prompt,
    pair_is_held_out,
)

GENEVAL = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
HELD_OUT = ("held_out_kind", "held_out_pair")
CATEGORIES = GENEVAL + HELD_OUT


def _one(kind: Kind) -> Phrase:
    return Phrase(1, kind[1], kind[0])


def _pairs(held_out: bool) -> Iterator[tuple[Kind, Kind]]:
    """Ordered pairs of training kinds that differ in both colour and shape."""
    for a, b in permutations(TRAIN_KINDS, 2):
        if a[0] != b[0] and a[1] != b[1] and pair_is_held_out(a, b) == held_out:
            yield a, b


def all_prompts(category: str) -> list[Prompt]:
    """Every prompt of a category.

    ``single_object`` "a star"; ``two_object`` "a star and a circle"; ``counting`` "three blue stars";
    ``colors`` "a blue star" (training kinds); ``position`` "a blue star left of a red circle";
    ``color_attr`` "a blue star and a red circle" (pairs that training may contain);
    ``held_out_kind`` as colors, ``held_out_pair`` as color_attr, on what training never contains.

    Raises
    ------
    ValueError
        Unknown category.
    """
    meanings: list[tuple[tuple[Phrase, ...], str | None]]
    if category == "single_object":
        meanings = [((Phrase(1, shape),), None) for shape in SHAPES]
    elif category == "two_object":
        meanings = [((Phrase(1, a), Phrase(1, b)), None) for a, b in permutations(SHAPES, 2)]
    elif category == "counting":
        numbers = range(2, MAX_OBJECTS + 1)
        meanings = [((Phrase(n, shape, c),), None) for (c, shape), n in product(TRAIN_KINDS, numbers)]
    elif category in ("colors", "held_out_kind"):
        kinds = TRAIN_KINDS if category == "colors" else tuple(sorted(HELD_OUT_KINDS))
        meanings = [((_one(kind),), None) for kind in kinds]
    elif category == "position":
        meanings = [((_one(a), _one(b)), r) for (a, b), r in product(_pairs(held_out=False), RELATIONS)]
    elif category in ("color_attr", "held_out_pair"):
        meanings = [((_one(a), _one(b)), None) for a, b in _pairs(held_out=category == "held_out_pair")]
    else:
        raise ValueError(f"unknown category {category!r}: use one of {', '.join(CATEGORIES)}")
    return [compose(phrases, relation, category=category) for phrases, relation in meanings]


def prompts(category: str, number: int, seed: int = 0) -> list[Prompt]:
    """`number` prompts of a category: without repetition while they last, then round again."""
    every = all_prompts(category)
    rng = np.random.default_rng((seed, CATEGORIES.index(category)))
    rounds = [rng.permutation(len(every)) for _ in range(-(-number // len(every)))]
    return [every[i] for i in np.concatenate(rounds)[:number]]


def prompt_set(number: int, categories: tuple[str, ...] = CATEGORIES, seed: int = 0) -> list[Prompt]:
    """`number` prompts of each category, category by category."""
    return [prompt for category in categories for prompt in prompts(category, number, seed)]
