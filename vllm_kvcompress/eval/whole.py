"""Is an object an undamaged shape? Its mask against the best of all templates, as the judge sees them.

A template is one of the five shapes at any place and size, drawn as `scenes.render` draws and brought to the
mask's resolution as the judge brings a picture, so what anti-aliasing takes from a tip is missing in both.

Thresholds were set on 600 scenes that went through the demo model's tokenizer (1111 objects: the largest
piece has 4.5 square pixels; 99.5% have none above 1.1% of the template, and an overlap above 0.88) and on
damaged renders; `tests/test_whole.py` measures on others. Not seen: wrong colour inside an object, a damaged
ground, what lies outside the border, half a triangle that is one too. What another object hides is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import cv2
import numpy as np
from numpy.typing import NDArray

from .scenes import outline
from .world import SHAPES

UPSAMPLING = 4
"""Pixels of a mask per pixel of the picture, in both directions."""
RADII = (6.5, 22.0)
"""Least and greatest radius of a template in pixels: the named sizes are 9 to 19."""
OVERLAP = 0.85
"""Least intersection over union with the best template. Catches what is wrong all around: a rectangle."""
OVERLAP_CUT = 0.75
"""The same where the picture's border cuts the object: less is seen, and of it more is edge."""
PIECE_WIDTH = 7
"""Odd, in mask pixels (1.75 of the picture's): what a disc as wide does not fit into is blur, not a piece."""
PIECE_SHARE = 0.02
"""Greatest area of one missing or surplus piece, as a share of the template's."""
PIECE_AREA = 6.0
"""The same in pixels; a token has 16."""
_PAD = 6
"""Pixels seen around an object's box. A template that reaches past them has that much surplus: it loses."""
_RADII_TRIED = 14
_RIVALS, _RIVAL_GAP = 3, 0.15
"""So many shapes are refined, if their coarse overlap is not further below the best."""
_COARSE, _FINE = (1.0, 0.5), (0.25, 0.125)
"""Steps in pixels: of all rivals on the picture's own pixels, then of the best of them on the mask's."""
_SUBPIXEL_BITS = 4

_UNIT = {shape: outline(shape, 1.0) for shape in SHAPES}
_UNIT_AREA = {shape: cv2.contourArea(points.astype(np.float32)) for shape, points in _UNIT.items()}
_MOVES = np.array(
    [(x, y, r) for x, y, r in product((-1, 0, 1), repeat=3) if (x == 0 or y == 0) and (x, y, r) != (0, 0, 0)],
    np.float64,
)
"""`[14, 3]`: x or y, the radius, or both. A shape that is seen from one side grows away from it."""
_DISC = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (PIECE_WIDTH, PIECE_WIDTH))


@dataclass(frozen=True)
class Overlap:
    """The best template of an object, and how far the object is from it.

    Parameters
    ----------
    score : float
        Intersection over union, of what lies inside the picture.
    shape : str
    x, y, radius : float
        Of the template, in pixels as in `world.Thing`; the centre may lie outside the picture.
    area : float
        Of the template inside the picture, in square pixels.
    piece : float
        Largest missing or surplus piece, in square pixels, after an opening with a disc of `PIECE_WIDTH`.
    cut : bool
        The object touches the picture's border, where it may go on.
    """

    score: float
    shape: str
    x: float
    y: float
    radius: float
    area: float
    piece: float
    cut: bool

    @property
    def whole(self) -> bool:
        """Undamaged: it overlaps enough all in all, and nothing in one place is missing or too much."""
        least = OVERLAP_CUT if self.cut else OVERLAP
        return self.score >= least and self.piece <= min(PIECE_SHARE * self.area, PIECE_AREA)


def best_overlap(mask: NDArray[np.uint8]) -> Overlap:
    """The template with the greatest intersection over union, by search: about 4 ms an object.

    Parameters
    ----------
    mask
        `[UPSAMPLING * H, UPSAMPLING * W]` uint8 of 0 and 1, one object in its whole picture.

    Raises
    ------
    ValueError
        If nothing is set.
    """
    window = _Window(mask)
    coarse = []
    for shape in SHAPES:
        tries = [(window.rough_overlap(shape, start), start) for start in window.starts(shape)]
        score, start = max(tries, key=lambda one: one[0])
        coarse.append((score, shape, start))
    coarse.sort(key=lambda one: -one[0])
    rivals = [one for one in coarse[:_RIVALS] if one[0] >= coarse[0][0] - _RIVAL_GAP]
    refined = [(*_climb(window.rough_overlap, shape, start, _COARSE), shape) for _, shape, start in rivals]
    _, place, shape = max(refined, key=lambda one: one[0])
    score, place = _climb(window.overlap, shape, place, _FINE)
    x, y, radius = place.tolist()
    area, piece = window.piece(shape, place)
    return Overlap(score, shape, x, y, radius, area, piece, window.is_cut)


class _Window:
    """An object and its surroundings. Places are `[x, y, radius]` float64, in pixels of the picture."""

    def __init__(self, mask: NDArray[np.uint8]) -> None:
        height, width = mask.shape
        x, y, across, down = cv2.boundingRect(mask)
        if not across:
            raise ValueError("the mask is empty")
        low, high = np.array([x, y]), np.array([x + across, y + down])
        self.low, self.high = (edge / UPSAMPLING - 0.5 for edge in (low, high))
        self.cut_low, self.cut_high = low == 0, high == (width, height)
        self.is_cut = bool(self.cut_low.any() or self.cut_high.any())
        # on whole pixels, or templates would be upsampled from other samples than the picture was
        self.origin = np.maximum(low // UPSAMPLING - _PAD, 0)
        end = np.minimum(-(-high // UPSAMPLING) + _PAD, np.array([width, height]) // UPSAMPLING)
        self.size = end - self.origin
        (left, top), (right, bottom) = self.origin * UPSAMPLING, end * UPSAMPLING
        self.mask = np.ascontiguousarray(mask[top:bottom, left:right])
        self.count = cv2.countNonZero(self.mask)
        self.cover = np.asarray(
            cv2.resize(self.mask * 255, self.size.tolist(), interpolation=cv2.INTER_AREA), np.uint8
        )

    def drawn(self, shape: str, place: NDArray[np.float64]) -> NDArray[np.uint8]:
        """A template as `render` draws it, 255 inside, on the picture's pixels."""
        drawn = np.zeros_like(self.cover)
        points = _UNIT[shape] * place[2] + (place[:2] - self.origin)
        fixed = np.round(points * (1 << _SUBPIXEL_BITS)).astype(np.int32)
        cv2.fillPoly(drawn, [fixed], 255, cv2.LINE_AA, _SUBPIXEL_BITS)
        return drawn

    def template(self, shape: str, place: NDArray[np.float64]) -> NDArray[np.uint8]:
        """Mask of a template, uint8 0 or 1, on the mask's pixels."""
        fine = cv2.resize(self.drawn(shape, place), self.mask.shape[::-1], interpolation=cv2.INTER_LINEAR)
        return np.asarray(cv2.threshold(fine, 127, 1, cv2.THRESH_BINARY)[1], np.uint8)

    def overlap(self, shape: str, place: NDArray[np.float64]) -> float:
        """Intersection over union."""
        template = self.template(shape, place)
        both = cv2.countNonZero(cv2.bitwise_and(template, self.mask))
        return both / (cv2.countNonZero(template) + self.count - both)

    def rough_overlap(self, shape: str, place: NDArray[np.float64]) -> float:
        """The same of covers on the picture's pixels, where it costs a third: least over greatest."""
        drawn = self.drawn(shape, place)
        both = cv2.sumElems(cv2.min(drawn, self.cover))[0]
        return both / cv2.sumElems(cv2.max(drawn, self.cover))[0]

    def starts(self, shape: str) -> Iterator[NDArray[np.float64]]:
        """Places to search from: the object's box, with radii by its area and by its sides.

        Where the border cuts, neither says the radius: all are tried, each laid against the sides that are
        seen.
        """
        first, last = _UNIT[shape].min(0), _UNIT[shape].max(0)
        if self.is_cut:
            radii = np.geomspace(*RADII, _RADII_TRIED)
        else:
            by_area = np.sqrt(self.count / UPSAMPLING**2 / _UNIT_AREA[shape])
            by_sides = ((self.high - self.low) / (last - first)).mean()
            radii = np.clip([by_area, by_sides], *RADII)
        for radius in radii:
            centre = (self.low + self.high - radius * (first + last)) / 2
            centre = np.where(self.cut_low & ~self.cut_high, self.high - radius * last, centre)
            centre = np.where(self.cut_high & ~self.cut_low, self.low - radius * first, centre)
            yield np.array([*centre, radius])

    def piece(self, shape: str, place: NDArray[np.float64]) -> tuple[float, float]:
        """Area of the template, and of the largest missing or surplus piece, in square pixels."""
        template = self.template(shape, place)
        largest = 0
        for wrong in (template & ~self.mask, self.mask & ~template):
            opened = np.asarray(cv2.morphologyEx(wrong, cv2.MORPH_OPEN, _DISC), np.uint8)
            _, _, stats, _ = cv2.connectedComponentsWithStats(opened)
            largest = max(largest, *stats[1:, cv2.CC_STAT_AREA].tolist(), 0)
        return cv2.countNonZero(template) / UPSAMPLING**2, largest / UPSAMPLING**2


def _climb(
    overlap: Callable[[str, NDArray[np.float64]], float],
    shape: str,
    place: NDArray[np.float64],
    steps: Sequence[float],
) -> tuple[float, NDArray[np.float64]]:
    """Overlap and place at the top of the hill that `place` is on, by steps of a size and then the next."""
    score = overlap(shape, place)
    for step in steps:
        while True:
            moved = place + _MOVES * step
            moved[:, 2] = moved[:, 2].clip(*RADII)
            scores = [overlap(shape, one) for one in moved]
            best = int(np.argmax(scores))
            if scores[best] <= score:
                break
            score, place = scores[best], moved[best]
    return score, place
