"""Fréchet distance between sets of pictures, on features that nothing has learned.

The extractor, `EXTRACTOR`: on a 4 x 4 grid of cells, the mean Lab colour, its standard deviation, and the
histogram of gradient directions weighted by magnitude. True scenes fix a PCA to `COMPONENTS` numbers, so
that a covariance is estimated from a few hundred pictures. Distances compare systems with one another;
they are not the FID of the literature, which needs Inception's weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

EXTRACTOR = "Lab moments and gradient histograms on a 4x4 grid, PCA to 24"
CELLS, DIRECTIONS, COMPONENTS = 4, 8, 24

Array = NDArray[np.float64]


def features(pictures: Sequence[NDArray[np.uint8]]) -> Array:
    """Pictures ``[H, W, 3]`` uint8 RGB, H and W multiples of 4 -> ``[N, 4 * 4 * (3 + 3 + 8)]``."""
    return np.stack([_one(picture) for picture in pictures])


def _one(picture: NDArray[np.uint8]) -> Array:
    lab = cv2.cvtColor(picture.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
    light = lab[..., 0]
    across, down = cv2.Sobel(light, cv2.CV_32F, 1, 0), cv2.Sobel(light, cv2.CV_32F, 0, 1)
    size, angle = cv2.cartToPolar(across, down)
    bucket = (angle / (2 * np.pi) * DIRECTIONS).astype(int) % DIRECTIONS
    edges = size[..., None] * (bucket[..., None] == np.arange(DIRECTIONS))
    parts = []
    for lines in np.array_split(np.arange(len(lab)), CELLS):
        for columns in np.array_split(np.arange(lab.shape[1]), CELLS):
            cell = np.ix_(lines, columns)
            parts += [lab[cell].mean((0, 1)), lab[cell].std((0, 1)), edges[cell].mean((0, 1))]
    return np.concatenate(parts).astype(np.float64)


@dataclass(frozen=True)
class Frechet:
    """Distance to a fixed set of true pictures.

    Parameters
    ----------
    mean, scale : Array
        ``[features]``: standardisation, from the true pictures.
    basis : Array
        ``[features, COMPONENTS]`` principal directions of the true pictures.
    centre, covariance : Array
        Of the true pictures in that basis.
    """

    mean: Array
    scale: Array
    basis: Array
    centre: Array
    covariance: Array

    @classmethod
    def of(cls, pictures: Sequence[NDArray[np.uint8]]) -> "Frechet":
        """From true pictures; at least ten times as many as components make a steady covariance."""
        raw = features(pictures)
        mean, scale = raw.mean(0), raw.std(0) + 1e-6
        standard = (raw - mean) / scale
        _, _, rows = np.linalg.svd(standard, full_matrices=False)
        basis = rows[:COMPONENTS].T
        reduced = standard @ basis
        return cls(mean, scale, basis, reduced.mean(0), np.cov(reduced.T))

    def distance(self, pictures: Sequence[NDArray[np.uint8]]) -> float:
        """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of the pictures and the true ones."""
        reduced = (features(pictures) - self.mean) / self.scale @ self.basis
        centre, covariance = reduced.mean(0), np.cov(reduced.T)
        root = _root(self.covariance)
        between = np.sqrt(np.clip(np.linalg.eigvalsh(root @ covariance @ root), 0, None)).sum()
        apart = ((centre - self.centre) ** 2).sum()
        return float(apart + np.trace(covariance) + np.trace(self.covariance) - 2 * between)


def _root(covariance: Array) -> Array:
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
