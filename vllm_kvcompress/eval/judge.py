"""Judge pictures of the shapes world by classical vision: what is where, and does it fit the prompt.

Pixels are compared with the world's palette in CIE Lab; what is nearer to an object colour than to any
ground is an object; connected components are objects, each named by the shape of its contour. No
learned part. The categories are GenEval's (arXiv 2310.11513, table 1).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import cv2
import numpy as np
from numpy.typing import NDArray

from .scenes import MARGIN, relation_holds, render
from .world import (
    COLOURS,
    GROUND_COLOURS,
    GROUND_SHADE,
    IMAGE_SIZE,
    PLACES,
    SHAPES,
    SIZES,
    Ground,
    Phrase,
    Prompt,
    Scene,
    Thing,
)

UPSAMPLING = 4
MIN_AREA = 40.0
"""Least area of an object in pixels; the smallest true one has 90."""
PLACE_TOLERANCE = 0.2
"""A place is met within this fraction of the picture's side."""
SHADES = 5
"""Samples of a ground's colour between its own and its shade."""


@dataclass(frozen=True)
class Seen:
    """One object found: centre `x, y`, `area` and box `side` in pixels."""

    shape: str
    colour: str
    size: str
    x: float
    y: float
    area: float
    side: float


def _lab(rgb: NDArray[np.uint8]) -> NDArray[np.float32]:
    """sRGB uint8 `[..., 3]` -> CIE Lab float32 (L in 0..100)."""
    flat = np.ascontiguousarray(rgb.reshape(1, -1, 3), dtype=np.float32) / 255
    return np.asarray(cv2.cvtColor(flat, cv2.COLOR_RGB2LAB), np.float32).reshape(rgb.shape)


def _ground_palette() -> NDArray[np.float32]:
    shades = 1 - (1 - GROUND_SHADE) * np.linspace(0, 1, SHADES)
    rgb = np.array(list(GROUND_COLOURS.values()))[:, None] * shades[None, :, None]
    return _lab(np.round(rgb).astype(np.uint8).reshape(-1, 3))


_OBJECT_LAB = _lab(np.array(list(COLOURS.values()), dtype=np.uint8))
_GROUND_LAB = _ground_palette()


def _distances(lab: NDArray[np.float32], palette: NDArray[np.float32]) -> NDArray[np.float32]:
    """Lab picture `[H, W, 3]`, palette `[K, 3]` -> Delta E (CIE76) `[H, W, K]`."""
    return np.linalg.norm(lab[:, :, None] - palette[None, None], axis=-1)


def _features(mask: NDArray[np.uint8]) -> NDArray[np.float64] | None:
    """Of the largest outer contour: solidity (area / hull), extent (area / box), box aspect, roundness."""
    contours, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    if not contours:
        return None
    contour = max(contours, key=cv2.contourArea)
    area = cv2.contourArea(contour)
    _, _, width, height = cv2.boundingRect(contour)
    hull = cv2.contourArea(cv2.convexHull(contour))
    if hull <= 0:
        return None
    (_, _), radius = cv2.minEnclosingCircle(contour)
    return np.array(
        [
            area / hull,
            area / (width * height),
            min(width, height) / max(width, height),
            area / (np.pi * radius**2),
        ]
    )


def _segment(image: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Picture `[H, W, 3]` -> object mask and object-colour index, both uint8 `[4 H, 4 W]`.

    A pixel is an object's where it is nearer to an object colour than to any ground; that difference is
    interpolated before it is compared with zero, so a contour keeps its position between pixels.
    """
    lab = _lab(image)
    to_object = _distances(lab, _OBJECT_LAB)
    nearness = _distances(lab, _GROUND_LAB).min(-1) - to_object.min(-1)
    label = to_object.argmin(-1).astype(np.uint8)
    height, width = (UPSAMPLING * side for side in label.shape)
    fine = cv2.resize(nearness, (width, height), interpolation=cv2.INTER_LINEAR)
    return (fine > 0).astype(np.uint8), cv2.resize(label, (width, height), interpolation=cv2.INTER_NEAREST)


def _reference(shape: str, size: str, blur: int) -> NDArray[np.float64]:
    thing = Thing(shape, "black", size, IMAGE_SIZE / 2, IMAGE_SIZE / 2)
    image = render(Scene((thing,), Ground("plain", "white")))
    blurred = np.asarray(cv2.GaussianBlur(image, (blur, blur), 0), np.uint8)
    features = _features(_segment(blurred)[0])
    assert features is not None
    return features


_REFERENCES = {
    (shape, size, blur): _reference(shape, size, blur)
    for shape in SHAPES
    for size in SIZES
    for blur in (1, 3)
}
"""Features of true shapes, sharp and slightly blurred, seen the way pictures are."""
_FEATURE_WEIGHTS = np.array([1.0, 1.0, 0.5, 0.7])


def _classify(mask: NDArray[np.uint8]) -> str | None:
    features = _features(mask)
    if features is None:
        return None
    nearest = min(
        _REFERENCES, key=lambda key: float(np.abs((_REFERENCES[key] - features) * _FEATURE_WEIGHTS).sum())
    )
    return nearest[0]


def _size_word(side: float) -> str:
    """Size whose box side (twice the radius) is nearest, in log scale."""
    return min(SIZES, key=lambda size: abs(np.log(side / (2 * SIZES[size]))))


def find_objects(image: NDArray[np.uint8]) -> list[Seen]:
    """All objects of a picture.

    Parameters
    ----------
    image
        `[96, 96, 3]` uint8 RGB.

    Raises
    ------
    ValueError
        If the picture has another shape or type.
    """
    if image.shape != (IMAGE_SIZE, IMAGE_SIZE, 3) or image.dtype != np.uint8:
        raise ValueError(
            f"expected uint8 [{IMAGE_SIZE}, {IMAGE_SIZE}, 3], got {image.dtype} {list(image.shape)}"
        )
    foreground, label = _segment(image)
    found: list[Seen] = []
    number, parts, stats, _ = cv2.connectedComponentsWithStats(foreground, connectivity=4)
    for index in range(1, number):
        if stats[index, cv2.CC_STAT_AREA] >= MIN_AREA * UPSAMPLING**2:
            for part, colour in _split_by_colour(parts == index, label):
                seen = _describe(part, colour)
                if seen is not None:
                    found.append(seen)
    return found


def _split_by_colour(
    part: NDArray[np.bool_], label: NDArray[np.uint8]
) -> list[tuple[NDArray[np.uint8], str]]:
    """A component as one object of its main colour, or, where objects of two colours touch, as several."""
    names = list(COLOURS)
    area = int(part.sum())
    counts = np.bincount(label[part], minlength=len(names))
    kernel = np.ones((2 * UPSAMPLING + 1, 2 * UPSAMPLING + 1), np.uint8)
    cores: list[tuple[NDArray[np.uint8], str]] = []
    for colour in np.flatnonzero(counts >= max(0.15 * area, MIN_AREA * UPSAMPLING**2)):
        mask = (part & (label == colour)).astype(np.uint8)
        core = np.asarray(cv2.morphologyEx(mask, cv2.MORPH_OPEN, kernel), np.uint8)
        if core.sum() >= MIN_AREA * UPSAMPLING**2:
            cores.append((core, names[colour]))
    if len(cores) > 1:
        return cores
    return [(part.astype(np.uint8), names[int(counts.argmax())])]


def _describe(mask: NDArray[np.uint8], colour: str) -> Seen | None:
    shape = _classify(mask)
    if shape is None:
        return None
    x, y, width, height = cv2.boundingRect(mask)
    side = max(width, height) / UPSAMPLING
    centre_x, centre_y = ((x + width / 2) / UPSAMPLING, (y + height / 2) / UPSAMPLING)
    return Seen(shape, colour, _size_word(side), centre_x, centre_y, float(mask.sum()) / UPSAMPLING**2, side)


@dataclass(frozen=True)
class Verdict:
    """What of a prompt a picture got right. `None`: the prompt does not say.

    `objects`: every phrase matched by exactly its count in shape (and colour and size where said), and
    nothing left over; `shapes`, `colours`: the same for shapes alone and for shape with colour;
    `count`: the number of objects; `relation`, `place`: see `Prompt`, on objects that fit the phrases.
    `present`: GenEval's own, milder rule: what is asked for is there, as often as a number says and in
    the relation asked for, whatever else is in the picture.
    """

    objects: bool
    shapes: bool
    colours: bool | None
    count: bool
    size: bool | None
    relation: bool | None
    place: bool | None
    present: bool

    @property
    def correct(self) -> bool:
        """Everything that the prompt says is so."""
        return self.objects and self.relation is not False and self.place is not False


def _matches(
    seen: list[Seen], phrases: Sequence[Phrase], colour: bool, size: bool, beside: bool = False
) -> Iterator[list[list[Seen]]]:
    """All ways to split the objects among the phrases, exactly each phrase's count to it.

    None is left over, unless others may stand `beside` them; those are of other kinds where a phrase
    names a number above one.
    """
    if not phrases:
        if beside or not seen:
            yield []
        return
    head = phrases[0]
    wanted = Phrase(head.count, head.shape, head.colour if colour else None, head.size if size else None)
    fitting = [s for s in seen if wanted.describes(s.shape, s.colour, s.size)]
    if beside and head.count > 1 and len(fitting) > head.count:
        return
    for chosen in combinations(fitting, head.count):
        rest = [s for s in seen if s not in chosen]
        for others in _matches(rest, phrases[1:], colour, size, beside):
            yield [list(chosen), *others]


def judge(image: NDArray[np.uint8], prompt: Prompt) -> Verdict:
    """Compare a picture (`[96, 96, 3]` uint8 RGB) with a prompt."""
    seen = find_objects(image)
    phrases = prompt.phrases
    shapes = any(_matches(seen, phrases, colour=False, size=False))
    coloured = list(_matches(seen, phrases, colour=True, size=False))
    sized = list(_matches(seen, phrases, colour=True, size=True))
    fits = sized or coloured
    relation = place = None
    if prompt.relation is not None:
        relation = any(_related(prompt.relation, *groups) for groups in fits)
    if prompt.place is not None:
        place = any(_in_place(prompt.place, groups[0][0]) for groups in fits)
    present = any(
        (prompt.relation is None or _related(prompt.relation, *groups))
        and (prompt.place is None or _in_place(prompt.place, groups[0][0]))
        for groups in _matches(seen, phrases, colour=True, size=True, beside=True)
    )
    return Verdict(
        objects=bool(sized),
        shapes=shapes,
        colours=bool(coloured) if any(phrase.colour for phrase in phrases) else None,
        count=len(seen) == sum(phrase.count for phrase in phrases),
        size=bool(sized) if any(phrase.size for phrase in phrases) else None,
        relation=relation,
        place=place,
        present=present,
    )


def _related(relation: str, first: list[Seen], second: list[Seen]) -> bool:
    return all(relation_holds(relation, (a.x, a.y), (b.x, b.y)) for a in first for b in second)


def _in_place(place: str, thing: Seen) -> bool:
    margin = thing.side / 2 + MARGIN
    wanted = (margin + fraction * (IMAGE_SIZE - 2 * margin) for fraction in PLACES[place])
    return all(
        abs(a - b) <= PLACE_TOLERANCE * IMAGE_SIZE for a, b in zip((thing.x, thing.y), wanted, strict=True)
    )
