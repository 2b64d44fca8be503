"""Loss curves: what every cache head would lose under every candidate type. No torch, no vLLM."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_kvcompress.policy import HeadRule, Raster

BRANCH_WEIGHTS = (4 / 3, 2 / 3)
"""A conditional head's loss counts twice an unconditional one's: the guided distribution leans on it."""
_RULE_FIELDS = ("capacity", "anchors", "recent", "ring", "decay", "value_norm", "smooth_row")


@dataclass(frozen=True, eq=False)
class LossCurves:
    """Losses of one model's heads.

    Parameters
    ----------
    candidates : tuple of HeadRule
        Head types to choose from, all of one grid.
    losses : array
        ``[layers, 2 * kv_heads, candidates]`` float64: `vllm_kvcompress.heads.losses`, cache heads as
        branch * kv_heads + KV head. Finite, not negative.
    """

    candidates: tuple[HeadRule, ...]
    losses: NDArray[np.float64]

    def __post_init__(self) -> None:
        layers_heads_candidates = self.losses.shape
        if len(layers_heads_candidates) != 3 or layers_heads_candidates[2] != len(self.candidates):
            raise ValueError(
                f"curves: losses {list(self.losses.shape)} for {len(self.candidates)} candidates; need "
                "[layers, 2 * kv_heads, candidates]"
            )
        if not np.isfinite(self.losses).all() or (self.losses < 0).any():
            raise ValueError("curves: a loss is negative or not a number")

    @property
    def raster(self) -> Raster:
        """The grid that was measured."""
        first = self.candidates[0]
        return Raster(first.image // first.line, first.line)

    def check_grid(self, raster: Raster) -> None:
        """Raise ValueError, one line, unless they were measured on this grid."""
        first = self.candidates[0]
        if (first.line, first.image) != (raster.width, raster.tokens):
            raise ValueError(
                f"head_profile: measured on lines of {first.line} in pictures of {first.image} tokens, the "
                f"served model has {raster.width} and {raster.tokens}; calibrate it, or set head_profile to "
                "auto"
            )

    @property
    def weighted(self) -> NDArray[np.float64]:
        """``[layers * 2 * kv_heads, candidates]``: losses by `BRANCH_WEIGHTS`, as the fit adds them up."""
        layers, heads, number = self.losses.shape
        weights = np.repeat(BRANCH_WEIGHTS, heads // len(BRANCH_WEIGHTS))
        return (self.losses * weights[:, None]).reshape(layers * heads, number)

    @property
    def slots(self) -> NDArray[np.int64]:
        """``[candidates]``: image slots of a head of each type."""
        return np.array([rule.capacity for rule in self.candidates], np.int64)

    def dump(self) -> dict[str, Any]:
        """For a JSON file; `load` reads it."""
        first = self.candidates[0]
        rules = [{name: getattr(rule, name) for name in _RULE_FIELDS} for rule in self.candidates]
        return {
            "line": first.line,
            "image": first.image,
            "candidates": rules,
            "losses": [[[float(f"{x:.4g}") for x in head] for head in layer] for layer in self.losses],
        }

    @classmethod
    def load(cls, fields: dict[str, Any]) -> "LossCurves":
        """From `dump`'s fields. Raises ValueError, one line, on what is no such thing."""
        try:
            grid = {"line": fields["line"], "image": fields["image"]}
            candidates = tuple(HeadRule(**grid, **rule) for rule in fields["candidates"])
            losses = np.array(fields["losses"], np.float64)
        except (KeyError, TypeError) as error:
            raise ValueError(f"curves: {error}") from None
        if not candidates:
            raise ValueError("curves: no candidates")
        return cls(candidates, losses)


def candidate_types(raster: Raster, anchors: int = 4) -> tuple[HeadRule, ...]:
    """The head types that are measured on a grid: rings, scored heads, and heads that keep everything.

    Parameters
    ----------
    raster : Raster
    anchors : int
        First image tokens that stay, fewer on grids whose lines are short.
    """
    line, image = raster.width, raster.tokens
    anchors = min(anchors, line // 6)
    found = [HeadRule(line, line, image, recent=line, ring=True)] if anchors else []
    for lines in RING_LINES:
        slots = anchors + int(lines * line)
        if slots < image:
            found.append(HeadRule(slots, line, image, anchors, slots - anchors, ring=True))
    for lines in SCORED_LINES:
        slots = anchors + int(lines * line)
        if slots < image:
            for refine in SCORED_RULES:
                found.append(HeadRule(slots, line, image, anchors, line, **refine))
    return (*found, HeadRule(image, line, image))


RING_LINES: Sequence[float] = (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10, 12, 16)
"""Lines that a ring keeps beside its anchors."""
SCORED_LINES: Sequence[float] = (3, 4, 5, 6, 8, 10, 12, 16)
"""Lines that a scored head keeps beside its anchors, the last one always."""
SCORED_RULES: Sequence[dict[str, Any]] = ({"decay": 0.5},)
"""How a scored head chooses: by the last line's attention and half of what the lines before left.

docs/quality.md has the others that were tried: the last line's sum, and value norm with a smoothed row.
"""
