"""The image codes: k-means over 4x4 pixel patches, and unit vectors that stand for the codes.

Scenes are made of few distinct patches, so the codebook is fitted directly instead of being learned
through the decoder. That decouples the two stages: codes are fixed before anything is trained.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from common import TRAIN_STREAM, scene_batch
from geometry import GEOMETRY
from torch import Tensor
from tqdm import tqdm

SCENES = 3000
ITERATIONS = 25
EMBED_DIM = 8
LIFT = 1.0
"""Constant last coordinate before normalisation: keeps patches that differ in scale alone apart."""


def to_patches(pixels: Tensor) -> Tensor:
    """Pixels `[B, 3, H, W]` -> patches `[B, H/4 * W/4, 48]`, raster order."""
    return F.unfold(pixels, GEOMETRY.patch, stride=GEOMETRY.patch).transpose(1, 2)


def from_patches(patches: Tensor, size: int) -> Tensor:
    """Inverse of `to_patches` for pictures of `size` pixels a side."""
    return F.fold(patches.transpose(1, 2), size, GEOMETRY.patch, stride=GEOMETRY.patch)


def nearest(patches: Tensor, centres: Tensor) -> Tensor:
    """Patches `[..., 48]`, centres `[K, 48]` -> index of the nearest centre, int64 `[...]`."""
    score = patches @ centres.T - 0.5 * centres.square().sum(-1)
    return score.argmax(-1)


def fit_centres(seed: int) -> Tensor:
    """Weighted k-means over the distinct patches of the first training scenes, `[codebook, 48]`.

    A distinct patch weighs the square root of its count, so that edges are not drowned by the ground.
    """
    seen: dict[bytes, tuple[np.ndarray, int]] = {}
    for first in tqdm(range(0, SCENES, 100), desc="patches"):
        pixels, _ = scene_batch(TRAIN_STREAM, first, 100)
        patches = ((to_patches(pixels).reshape(-1, 48) + 1) * 127.5).round().to(torch.uint8).numpy()
        unique, counts = np.unique(patches, axis=0, return_counts=True)
        for patch, count in zip(unique, counts, strict=True):
            key = patch.tobytes()
            seen[key] = (patch, seen[key][1] + int(count) if key in seen else int(count))
    points = torch.from_numpy(np.stack([patch for patch, _ in seen.values()])).float() / 127.5 - 1
    weights = torch.tensor([count for _, count in seen.values()]).float().sqrt()
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.multinomial(weights, GEOMETRY.codebook, generator=generator)
    centres = points[chosen].clone()
    for _ in tqdm(range(ITERATIONS), desc="k-means"):
        codes = nearest(points, centres)
        mass = torch.zeros(len(centres)).index_add_(0, codes, weights)
        centres.zero_().index_add_(0, codes, points * weights[:, None])
        centres /= mass.clamp(min=1e-9)[:, None]
        cost = (points - centres[codes]).square().sum(-1) * weights
        empty = (mass == 0).nonzero().flatten()
        centres[empty] = points[cost.topk(len(empty)).indices]
    return centres


def code_vectors(centres: Tensor) -> Tensor:
    """Centres `[K, 48]` -> distinct unit vectors `[K, 8]`: 7 principal components, lifted, normalised."""
    centred = centres - centres.mean(0)
    _, scale, basis = torch.linalg.svd(centred, full_matrices=False)
    components = centred @ basis[: EMBED_DIM - 1].T
    components *= (len(centres) / EMBED_DIM) ** 0.5 / scale[0]
    return F.normalize(F.pad(components, (0, 1), value=LIFT), dim=-1)
