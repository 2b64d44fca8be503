"""What both training scripts share: batches drawn by seed, checkpoints, loss curves, learning rate."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vllm_kvcompress.eval.scenes import FAMILIES, render, sample_pair
from vllm_kvcompress.eval.world import Prompt, Scene

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
TRAIN_STREAM, VALID_STREAM = 1, 2
"""First number of a scene's seed: the two streams never share a scene's random state."""


def command_line(description: str | None) -> argparse.ArgumentParser:
    """A parser that prints a script's docstring as it is."""
    formatter = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=description, formatter_class=formatter)


def to_pixels(images: NDArray[np.uint8]) -> Tensor:
    """`[B, H, W, 3]` uint8 -> `[B, 3, H, W]` float32 in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def scene_batch(
    stream: int, first: int, number: int, families: Mapping[str, float] = FAMILIES
) -> tuple[Tensor, list[str]]:
    """Scenes `first .. first + number` of a stream: pixels `[number, 3, 96, 96]` in [-1, 1], captions."""
    return as_batch([sample_pair((stream, index), families) for index in range(first, first + number)])


def as_batch(pairs: Sequence[tuple[Scene, Prompt]]) -> tuple[Tensor, list[str]]:
    """Pixels and captions of these scenes, as `scene_batch`."""
    images = np.stack([render(scene) for scene, _ in pairs])
    return to_pixels(images), [prompt.text for _, prompt in pairs]


def trapezoid(step: int, warmup: int, total: int, decay: int) -> float:
    """Learning-rate factor: linear warm-up, constant, linear decay over the last `decay` steps.

    Only the tail depends on `total`, so a run can be extended from any checkpoint before its decay.
    """
    return min(1.0, (step + 1) / warmup, max(0.0, (total - step) / max(1, decay)))


def save_checkpoint(path: Path, state: dict) -> None:
    """Write atomically: a stop in the middle leaves the previous checkpoint."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def log_record(path: Path, **record: float) -> None:
    """Append one JSON line."""
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def plot_curves(log: Path, picture: Path, names: tuple[str, ...]) -> None:
    """Draw the named columns of a JSON-lines log against `step`, one panel each."""
    records = [json.loads(line) for line in log.read_text().splitlines()]
    figure, axes = plt.subplots(1, len(names), figsize=(4.5 * len(names), 3.2), squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        points = [(r["step"], r[name]) for r in records if name in r]
        axis.plot(*zip(*points, strict=True), linewidth=1)
        axis.set(xlabel="step", title=name, yscale="log")
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(picture, dpi=90)
    plt.close(figure)
