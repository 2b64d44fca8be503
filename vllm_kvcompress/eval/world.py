"""The vocabulary of the shapes world: what a picture can contain and what a caption can say.

A `Prompt` is what a caption *claims* (and what the judge checks); a `Scene` is what a picture
*contains*. A claim may leave attributes open (`None`), a scene never does.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

IMAGE_SIZE = 96
"""Pixels per side of a scene."""
PIXELS_PER_TOKEN = 4
"""Object centres lie on this lattice, which is also the VQ tokenizer's patch size."""

SHAPES = ("circle", "square", "triangle", "star", "cross")
SIZES = {"small": 9.0, "medium": 13.0, "big": 19.0}
"""Size word -> radius in pixels (half the side of the box that holds the shape)."""
COLOURS = {
    "red": (218, 38, 38),
    "orange": (246, 140, 20),
    "green": (36, 150, 50),
    "cyan": (0, 186, 212),
    "blue": (32, 70, 214),
    "purple": (130, 40, 170),
    "pink": (244, 104, 176),
    "black": (24, 24, 24),
}
"""Object colours, sRGB."""
GROUND_COLOURS = {
    "yellow": (250, 232, 150),
    "white": (246, 246, 246),
    "grey": (190, 190, 190),
    "mint": (186, 234, 204),
}
"""Ground colours, sRGB: pale, so that no object colour is near one."""
GROUND_SHADE = 0.86
"""A patterned ground alternates (or fades) between its colour and its colour times this."""
PATTERNS = ("plain", "striped", "checkered", "gradient")
RELATIONS = ("left of", "right of", "above", "below")
PLACES = {
    "top left": (0.0, 0.0),
    "top": (0.5, 0.0),
    "top right": (1.0, 0.0),
    "left": (0.0, 0.5),
    "centre": (0.5, 0.5),
    "right": (1.0, 0.5),
    "bottom left": (0.0, 1.0),
    "bottom": (0.5, 1.0),
    "bottom right": (1.0, 1.0),
}
"""Place word -> (x, y) as fractions of the free range of an object's centre."""
COUNT_WORDS = ("zero", "one", "two", "three", "four")
MAX_OBJECTS = 4

Kind = tuple[str, str]
"""(colour, shape)"""

HELD_OUT_KINDS: frozenset[Kind] = frozenset(
    {("red", "star"), ("green", "square"), ("blue", "cross"), ("orange", "triangle"), ("purple", "circle")}
)
"""Colour-shape combinations that no training scene contains (5 of 40)."""


def pair_is_held_out(a: Kind, b: Kind) -> bool:
    """Whether two kinds never share a training scene although each is seen elsewhere (1 pair in 8)."""
    if a == b:
        return False
    key = "+".join(sorted(("-".join(a), "-".join(b))))
    return zlib.crc32(key.encode()) % 8 == 0


@dataclass(frozen=True)
class Thing:
    """One drawn object: centre `x, y` and `radius` in pixels."""

    shape: str
    colour: str
    size: str
    x: float
    y: float

    @property
    def kind(self) -> Kind:
        return self.colour, self.shape

    @property
    def radius(self) -> float:
        return SIZES[self.size]


@dataclass(frozen=True)
class Ground:
    """The background. `phase` shifts a pattern by whole tokens, `vertical` turns it by 90 degrees."""

    pattern: str
    colour: str
    phase: int = 0
    vertical: bool = False


@dataclass(frozen=True)
class Scene:
    things: tuple[Thing, ...]
    ground: Ground


@dataclass(frozen=True)
class Phrase:
    """A noun phrase, "two big red circles": `size` and `colour` may be left open."""

    count: int
    shape: str
    colour: str | None = None
    size: str | None = None

    def describes(self, shape: str, colour: str, size: str) -> bool:
        """Whether an object with these attributes fits the phrase."""
        return (
            shape == self.shape
            and (self.colour is None or colour == self.colour)
            and (self.size is None or size == self.size)
        )


@dataclass(frozen=True)
class Prompt:
    """A caption and its meaning.

    Parameters
    ----------
    text
        The caption.
    phrases
        What the picture must contain: exactly `count` objects of each phrase and nothing else.
    relation
        How the first phrase's objects lie relative to the second's (one of `RELATIONS`).
    place
        Where the only object lies (a key of `PLACES`).
    pattern, ground
        The background's pattern and colour word.
    category
        GenEval's category (arXiv 2310.11513, table 1) when the prompt is an evaluation prompt.
    """

    text: str
    phrases: tuple[Phrase, ...]
    relation: str | None = None
    place: str | None = None
    pattern: str | None = None
    ground: str | None = None
    category: str | None = None
