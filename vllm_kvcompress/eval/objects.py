"""Find the objects of a picture of the shapes world by classical vision; no learned part.

Pixels are compared with the world's palette in CIE Lab; what is nearer to an object colour than to any
ground is an object; connected components are objects, each named by the shape of its contour. The name
says what an object is most like; whether it is that undamaged, `whole.best_overlap` says.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from .scenes import render
from .whole import UPSAMPLING, best_overlap
from .world import (
    COLOURS,
    GROUND_COLOURS,
    GROUND_SHADE,
    IMAGE_SIZE,
    SHAPES,
    SIZES,
    Ground,
    Scene,
    Thing,
)

MIN_AREA = 40.0
"""Least area of an object in pixels; the smallest true one has 90."""
SHADES = 5
"""Samples of a ground's colour between its own and its shade."""


@dataclass(frozen=True)
class Seen:
    """One object found: centre `x, y`, `area` and box `side` in pixels.

    `overlap`: intersection over union with the best template; `whole`: undamaged, see `whole.Overlap`.
    """

    shape: str
    colour: str
    size: str
    x: float
    y: float
    area: float
    side: float
    overlap: float
    whole: bool


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
    away = lab[:, :, None] - palette[None, None]
    return np.sqrt(np.einsum("...i,...i->...", away, away))


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
            for core, mask, colour in _split_by_colour(parts == index, label):
                seen = _describe(core, mask, colour)
                if seen is not None:
                    found.append(seen)
    return found


def _split_by_colour(
    part: NDArray[np.bool_], label: NDArray[np.uint8]
) -> list[tuple[NDArray[np.uint8], NDArray[np.uint8], str]]:
    """A component as one object of its main colour, or, where objects of two colours touch, as several.

    Of each object core, mask and colour; the core lacks what is narrower than two pixels (a mixed colour
    at another object's edge, but also the tips of a star).
    """
    names = list(COLOURS)
    area = int(part.sum())
    counts = np.bincount(label[part], minlength=len(names))
    kernel = np.ones((2 * UPSAMPLING + 1, 2 * UPSAMPLING + 1), np.uint8)
    found: list[tuple[NDArray[np.uint8], NDArray[np.uint8], str]] = []
    for colour in np.flatnonzero(counts >= max(0.15 * area, MIN_AREA * UPSAMPLING**2)):
        mask = (part & (label == colour)).astype(np.uint8)
        core = np.asarray(cv2.morphologyEx(mask, cv2.MORPH_OPEN, kernel), np.uint8)
        if core.sum() >= MIN_AREA * UPSAMPLING**2:
            found.append((core, mask, names[colour]))
    if len(found) > 1:
        return [(core, _connected_to(core, mask), name) for core, mask, name in found]
    mask = part.astype(np.uint8)
    return [(mask, mask, names[int(counts.argmax())])]


def _connected_to(core: NDArray[np.uint8], mask: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The components of a mask that have pixels of a core in them."""
    number, components = cv2.connectedComponents(mask, connectivity=4)
    kept = np.zeros(number, np.uint8)
    kept[components[core > 0]] = 1
    return kept[components]


def _describe(core: NDArray[np.uint8], mask: NDArray[np.uint8], colour: str) -> Seen | None:
    shape = _classify(core)
    if shape is None:
        return None
    x, y, width, height = cv2.boundingRect(core)
    best = best_overlap(mask)
    return Seen(
        shape,
        colour,
        size=_size_word(max(width, height) / UPSAMPLING),
        x=(x + width / 2) / UPSAMPLING,
        y=(y + height / 2) / UPSAMPLING,
        area=float(core.sum()) / UPSAMPLING**2,
        side=max(width, height) / UPSAMPLING,
        overlap=best.score,
        whole=best.whole,
    )
