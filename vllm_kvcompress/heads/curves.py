"""Loss curves: what every cache head would lose under every candidate type. No torch, no vLLM."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_type_hints

import numpy as np
from numpy.typing import NDArray

from vllm_kvcompress.policy import HeadRule, Raster


@dataclass(frozen=True)
class Weighing:
    """How a fit adds losses up: each to the ``power``, a conditional head's ``conditional`` times an other's.

    The guided distribution leans on the conditional branch. A power of a half adds errors up instead of their
    squares: one head that loses much then counts less beside several that lose some. ``tied``: both branches
    of a KV head have one type, so that they err alike: guidance multiplies what the branches differ in, and
    leaves what is common to both errors as it is. ``later``: the last layer's loss counts that many times the
    first's, layers between in even steps of its logarithm: a loss is a share of its own layer's residual, to
    which the layers behind still add.
    """

    power: float = 1.0
    conditional: float = 2.0
    tied: bool = False
    later: float = 1.0

    @property
    def branches(self) -> tuple[float, float]:
        """Factors of the conditional and the unconditional branch, 1 on average."""
        return 2 * self.conditional / (1 + self.conditional), 2 / (1 + self.conditional)

    def depths(self, layers: int) -> NDArray[np.float64]:
        """``[layers]``: factors of the layers, their geometric mean 1."""
        return self.later ** (np.linspace(-0.5, 0.5, layers) if layers > 1 else np.zeros(1))


SQUARES = Weighing()
"""Predicted losses are by this one, whichever a fit was made with."""
_POWERS = (1.0, 0.75, 0.5)
WEIGHINGS = (
    *(Weighing(p, branch, later=later) for later in (1.0, 8.0) for p in _POWERS for branch in (2.0, 4.0)),
    *(Weighing(power, tied=True) for power in _POWERS),
)
"""That are tried (`vllm_kvcompress.heads.trials`), `SQUARES` first."""
EARLIER = tuple(Weighing(power, 8.0) for power in _POWERS)
"""That are tried no more; a profile may say that one of them was chosen."""
MOST_LOSS = 1e12  # a share of the residual's square; sums and powers of it are still numbers
_RULE_FIELDS = ("capacity", "anchors", "recent", "ring", "decay", "value_norm", "smooth_row")
_TYPES: dict[str, type] = get_type_hints(HeadRule)
_NEEDED = {bool: "true or false", int: "a whole number", float: "a number"}


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
    guided : array, optional
        ``[layers, kv_heads, candidates]`` float64: of both branches' heads under one type, as guidance
        combines their errors.
    """

    candidates: tuple[HeadRule, ...]
    losses: NDArray[np.float64]
    guided: NDArray[np.float64] | None = None

    def __post_init__(self) -> None:
        layers_heads_candidates = self.losses.shape
        if len(layers_heads_candidates) != 3 or layers_heads_candidates[2] != len(self.candidates):
            raise ValueError(
                f"curves: losses {list(self.losses.shape)} for {len(self.candidates)} candidates; need "
                "[layers, 2 * kv_heads, candidates]"
            )
        layers, heads, number = layers_heads_candidates
        if self.guided is not None and self.guided.shape != (layers, heads // 2, number):
            raise ValueError(
                f"curves: guided losses {list(self.guided.shape)}; need {[layers, heads // 2, number]}"
            )
        for losses in (self.losses, self.guided):
            if losses is not None and not ((losses >= 0) & (losses <= MOST_LOSS)).all():  # nor of no number
                raise ValueError(f"curves: a loss is negative or not a number below {MOST_LOSS:g}")

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

    def weighted(self, weighing: Weighing = SQUARES) -> NDArray[np.float64]:
        """Losses as a fit adds them up, of what gets a type: ``[layers * 2 * kv_heads, candidates]``.

        Under a tied weighing the branches' heads get theirs together: ``[layers * kv_heads, candidates]``,
        guided losses where they were measured.
        """
        layers, heads, number = self.losses.shape
        depths = weighing.depths(layers)[:, None, None]
        if weighing.tied and self.guided is not None:
            return (self.guided**weighing.power * depths).reshape(-1, number)
        weights = np.repeat(weighing.branches, heads // len(weighing.branches))
        losses = self.losses**weighing.power * weights[:, None] * depths
        if weighing.tied:
            losses = losses.reshape(layers, len(weighing.branches), -1, number).sum(1)
        return losses.reshape(-1, number)

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
            "losses": _rounded(self.losses),
            **({} if self.guided is None else {"guided": _rounded(self.guided)}),
        }

    @classmethod
    def load(cls, fields: dict[str, Any]) -> "LossCurves":
        """From `dump`'s fields. Raises ValueError, one line, on what is no such thing."""
        try:
            grid = {"line": fields["line"], "image": fields["image"]}
            candidates = tuple(_rule(**grid, **rule) for rule in fields["candidates"])
            losses, guided = _numbers(fields["losses"]), None
            if fields.get("guided") is not None:
                guided = _numbers(fields["guided"])
        except (KeyError, TypeError, OverflowError) as error:
            raise ValueError(f"curves: {error}") from None
        if not candidates:
            raise ValueError("curves: no candidates")
        return cls(candidates, losses, guided)


def _rounded(losses: NDArray[np.float64]) -> list[list[list[float]]]:
    return [[[float(f"{x:.4g}") for x in head] for head in layer] for layer in losses]


def _numbers(losses: Any) -> NDArray[np.float64]:
    """Of a file. Raises TypeError for what is none."""
    if np.array(losses).dtype.kind in "USb":  # the next line would make numbers of them
        raise TypeError("a loss is no number")
    return np.array(losses, np.float64)


def _rule(**fields: Any) -> HeadRule:
    """A candidate of a file. Raises TypeError for a value of another type: a rule takes them as they come."""
    for name, value in fields.items():
        wanted = _TYPES.get(name, type(value))
        if type(value) is not wanted and (wanted, type(value)) != (float, int):
            raise TypeError(f"{name} is {value!r:.60}; need {_NEEDED[wanted]}")
    return HeadRule(**fields)


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
