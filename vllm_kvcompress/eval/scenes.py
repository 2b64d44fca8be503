"""Procedural scenes with captions: sampled, rendered and described deterministically by seed.

`sample_pair(seed)` gives one training example; nothing is stored or downloaded. A scene is drawn
first, then a caption that is true of it and leaves a random part of it unsaid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from .captions import describe
from .world import (
    COLOURS,
    GROUND_COLOURS,
    GROUND_SHADE,
    HELD_OUT_KINDS,
    IMAGE_SIZE,
    MAX_OBJECTS,
    PATTERNS,
    PIXELS_PER_TOKEN,
    PLACES,
    RELATIONS,
    SHAPES,
    SIZES,
    Ground,
    Kind,
    Phrase,
    Prompt,
    Scene,
    Thing,
    pair_is_held_out,
)

MARGIN = 2.0
"""Least distance of a shape's box to the border, and half of that between two boxes, in pixels."""
RELATION_SLACK = 12.0
"""Objects in a relation are at most this far off its axis, in pixels."""
TRIES = 60
FAMILIES = {"single": 0.36, "count": 0.16, "two": 0.36, "groups": 0.08, "three": 0.04}
"""Shares of the scene families in training."""
EASY_FAMILIES = {"single": 0.75, "two": 0.25}
"""Shares with which training may begin: what a word means is learned from pictures of few objects."""
PAIR_FAMILIES = {"single": 0.2, "count": 0.1, "two": 0.62, "groups": 0.04, "three": 0.04}
"""Shares of a stage between the two, mostly pairs: which word belongs to which object is learned there."""
ALL_KINDS: tuple[Kind, ...] = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)
TRAIN_KINDS: tuple[Kind, ...] = tuple(kind for kind in ALL_KINDS if kind not in HELD_OUT_KINDS)
_SUBPIXEL_BITS = 4


def outline(shape: str, radius: float) -> NDArray[np.float64]:
    """Polygon `[points, 2]` of a shape centred on the origin, y down."""

    def ring(radii: Sequence[float], start: float = -np.pi / 2) -> NDArray[np.float64]:
        angles = start + np.arange(len(radii)) * 2 * np.pi / len(radii)
        return np.stack([np.cos(angles), np.sin(angles)], 1) * np.asarray(radii)[:, None]

    if shape == "circle":
        return ring([radius] * 48)
    if shape == "square":
        half = 0.9 * radius
        return np.array([[-half, -half], [half, -half], [half, half], [-half, half]])
    if shape == "triangle":
        return np.array([[0, -radius], [radius, 0.85 * radius], [-radius, 0.85 * radius]])
    if shape == "star":
        return ring([1.08 * radius, 0.45 * radius] * 5)
    if shape == "cross":
        arm = 0.34 * radius
        corner = np.array([[arm, -radius], [arm, -arm], [radius, -arm]])
        turns = [np.array([[c, -s], [s, c]]) for c, s in ((1, 0), (0, 1), (-1, 0), (0, -1))]
        return np.concatenate([corner @ turn.T for turn in turns])
    raise ValueError(f"unknown shape {shape!r}: use one of {', '.join(SHAPES)}")


def render_ground(ground: Ground) -> NDArray[np.uint8]:
    """Background only, `[96, 96, 3]` uint8 RGB."""
    y, x = np.mgrid[:IMAGE_SIZE, :IMAGE_SIZE]
    along = (x if ground.vertical else y) + ground.phase * PIXELS_PER_TOKEN
    if ground.pattern == "plain":
        dark = np.zeros((IMAGE_SIZE, IMAGE_SIZE))
    elif ground.pattern == "striped":
        dark = (along // 8) % 2
    elif ground.pattern == "checkered":
        across = (y if ground.vertical else x) + ground.phase * PIXELS_PER_TOKEN
        dark = (along // 12 + across // 12) % 2
    elif ground.pattern == "gradient":
        dark = (x if ground.vertical else y) / (IMAGE_SIZE - 1)
        dark = 1 - dark if ground.phase % 2 else dark
    else:
        raise ValueError(f"unknown pattern {ground.pattern!r}: use one of {', '.join(PATTERNS)}")
    base = np.array(GROUND_COLOURS[ground.colour], dtype=np.float64)
    shade = 1 - (1 - GROUND_SHADE) * dark
    return np.round(shade[..., None] * base).astype(np.uint8)


def render(scene: Scene) -> NDArray[np.uint8]:
    """Draw a scene with anti-aliased edges, `[96, 96, 3]` uint8 RGB."""
    image = render_ground(scene.ground)
    for thing in scene.things:
        points = outline(thing.shape, thing.radius) + np.array([thing.x, thing.y])
        fixed = np.round(points * (1 << _SUBPIXEL_BITS)).astype(np.int32)
        cv2.fillPoly(image, [fixed], COLOURS[thing.colour], cv2.LINE_AA, _SUBPIXEL_BITS)
    return image


def _free_range(size: str) -> tuple[int, int]:
    """First and last lattice index at which an object of this size fits."""
    least = SIZES[size] * 1.08 + MARGIN
    first = int(np.ceil(least / PIXELS_PER_TOKEN))
    return first, IMAGE_SIZE // PIXELS_PER_TOKEN - first


def place_centre(place: str, size: str) -> tuple[float, float]:
    """Pixel centre `(x, y)` that a place word means for an object of this size."""
    first, last = _free_range(size)
    x, y = PLACES[place]
    across, down = (float(round(first + f * (last - first)) * PIXELS_PER_TOKEN) for f in (x, y))
    return across, down


def _apart(a: Thing, b: Thing) -> bool:
    least = (a.radius + b.radius) * 1.04 + MARGIN
    return abs(a.x - b.x) >= least or abs(a.y - b.y) >= least


def relation_holds(relation: str, a: tuple[float, float], b: tuple[float, float]) -> bool:
    """Whether centre `a` lies in `relation` to centre `b`: the axis named must dominate."""
    dx, dy = a[0] - b[0], a[1] - b[1]
    along = {"left of": -dx, "right of": dx, "above": -dy, "below": dy}[relation]
    across = abs(dy) if relation in ("left of", "right of") else abs(dx)
    return along > 0 and along >= across


def layout(
    rng: np.random.Generator,
    phrases: Sequence[tuple[int, str, str, str]],
    relation: str | None,
    place: str | None,
) -> tuple[Thing, ...] | None:
    """Place `count, size, colour, shape` groups; `None` if `TRIES` tries for an object were not enough."""
    groups: list[list[Thing]] = []
    for count, size, colour, shape in phrases:
        group: list[Thing] = []
        first, last = _free_range(size)
        for _ in range(count):
            for _ in range(TRIES):
                x, y = (rng.integers(first, last + 1, 2) * PIXELS_PER_TOKEN).astype(float)
                if place is not None:
                    x, y = place_centre(place, size)
                thing = Thing(shape, colour, size, float(x), float(y))
                clear = all(_apart(thing, other) for placed in (*groups, group) for other in placed)
                related = not (relation and groups) or all(
                    _in_relation(relation, a, thing) for a in groups[0]
                )
                if clear and related:
                    group.append(thing)
                    break
            else:
                return None
        groups.append(group)
    return tuple(thing for group in groups for thing in group)


def _in_relation(relation: str, a: Thing, b: Thing) -> bool:
    horizontal = relation in ("left of", "right of")
    off_axis = abs(a.y - b.y) if horizontal else abs(a.x - b.x)
    gap = abs(a.x - b.x) if horizontal else abs(a.y - b.y)
    clear = gap >= (a.radius + b.radius) * 1.04 + MARGIN
    return clear and off_axis <= RELATION_SLACK and relation_holds(relation, (a.x, a.y), (b.x, b.y))


def sample_ground(rng: np.random.Generator) -> Ground:
    pattern = str(rng.choice(PATTERNS, p=[0.4, 0.2, 0.2, 0.2]))
    colour = str(rng.choice(list(GROUND_COLOURS)))
    turned = pattern in ("striped", "gradient") and bool(rng.integers(2))
    phase = 0 if pattern == "plain" else int(rng.integers(2))
    return Ground(pattern, colour, phase, turned)


def _sample_kinds(rng: np.random.Generator, number: int) -> list[Kind]:
    """Distinct training kinds of which no two are a held-out pair."""
    kinds: list[Kind] = []
    while len(kinds) < number:
        kind = TRAIN_KINDS[rng.integers(len(TRAIN_KINDS))]
        if kind not in kinds and not any(pair_is_held_out(kind, other) for other in kinds):
            kinds.append(kind)
    return kinds


def _sample_size(rng: np.random.Generator, objects: int) -> str:
    choices = ("small", "medium", "big") if objects <= 2 else ("small", "medium")
    return str(rng.choice(choices))


def sample_pair(seed: int | Sequence[int], families: Mapping[str, float] = FAMILIES) -> tuple[Scene, Prompt]:
    """One training example: a scene and a caption that is true of it; `families` as `FAMILIES`."""
    rng = np.random.default_rng(seed)
    while True:
        relation = place = None
        family = rng.choice(tuple(families), p=tuple(families.values()))
        if family == "single":
            counts = [1]
            place = str(rng.choice(list(PLACES))) if rng.random() < 0.4 else None
        elif family == "count":
            counts = [int(rng.integers(2, MAX_OBJECTS + 1))]
        elif family == "two":
            counts = [1, 1]
        elif family == "groups":
            counts = list(((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))[rng.integers(5)])
        else:
            counts = [1, 1, 1]
        if len(counts) == 2 and rng.random() < 0.6:
            relation = str(rng.choice(RELATIONS))
        kinds = _sample_kinds(rng, len(counts))
        total = int(sum(counts))
        groups = [
            (int(count), _sample_size(rng, total), colour, shape)
            for count, (colour, shape) in zip(counts, kinds, strict=True)
        ]
        things = layout(rng, groups, relation, place)
        if things is not None:
            ground = sample_ground(rng)
            phrases = [Phrase(count, shape, colour, size) for count, size, colour, shape in groups]
            return Scene(things, ground), describe(rng, phrases, relation, place, ground)
