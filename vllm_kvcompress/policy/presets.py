"""The presets and the space they are points in. Pure arithmetic, no vLLM, no torch.

The method is docs/design.md, "The method". A `Policy` is one point in its space; together with a grid
and the number of heads of each type it gives a `HeadRule` per head type, and a rule is all that the
attention code needs to know. Under `fitted` every head has the rule that measured losses give it
(`vllm_kvcompress.heads.fit`).

Papers: SSD, https://arxiv.org/abs/2510.18716; LineAR, https://arxiv.org/abs/2512.04857; StreamingLLM,
https://arxiv.org/abs/2309.17453; H2O, https://arxiv.org/abs/2306.14048.
"""

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Final, Literal

from vllm_kvcompress.policy.raster import Raster
from vllm_kvcompress.policy.rule import HeadRule

Score = Literal["inter_line", "averaged", "accumulated"]
HeadTypes = Literal["profile", "semantic", "spatial", "fitted"]

DECAY: dict[Score, float] = {"inter_line": 0.0, "averaged": 0.5, "accumulated": 1.0}
"""What a line's end leaves of the scores: nothing, half (an exponential average over lines), or all."""
REFINEMENTS = ("value_norm", "smooth_row", "stratify")


@dataclass(frozen=True)
class Preset:
    """What a preset's name stands for. A new preset is one more entry in `PRESETS`.

    ``anchors``, ``recent_lines`` and ``spatial_lines`` are defaults: shrunk to what fits a small grid or
    budget, unlike the values that a user sets in `Policy`, which are refused where they do not fit.
    """

    head_types: HeadTypes
    score: Score = "inter_line"
    anchors: int = 0
    recent_lines: int = 1
    spatial_lines: int = 3  # docs/quality.md: with two, shapes lose their height
    evicts: bool = True
    value_norm: bool = False
    smooth_row: bool = False
    stratify: bool = False


PRESETS: dict[str, Preset] = {
    "full": Preset("semantic", evicts=False),
    "streaming": Preset("spatial", anchors=4),  # StreamingLLM's four sinks
    "h2o": Preset("semantic", score="accumulated"),
    "line_ar": Preset("semantic", anchors=4),
    "ssd": Preset("profile", score="accumulated"),
    "decoupled": Preset("profile", anchors=4),
    "fitted": Preset("fitted", anchors=4),
}
TOLERANCE = 0.0004  # predicted loss; docs/quality.md says how it was set
AUTO: Final = "auto"  # as a budget: the smallest whose predicted loss is within the tolerance


def number_of(text: str) -> float | None:
    """A budget as somebody writes it, ``"0.15"`` or ``"1/6"``; None where it is no number."""
    try:
        return float(Fraction(text.strip()))
    except (ValueError, ZeroDivisionError, OverflowError):
        return None


@dataclass(frozen=True)
class Policy:
    """One point in the design's space: a preset, a budget, and what the user set differently.

    Parameters
    ----------
    preset : str
        A name in `PRESETS`. It decides whatever is None below.
    budget : float
        Resident image slots per head as a share of the image, in (0, 1], mean over the heads, the line
        being written included: 0.2 of 576 is 115 slots. `full` keeps everything whatever the budget; under
        `fitted` "auto" takes the smallest whose predicted loss is within the tolerance.
    spatial_tokens : int, optional
        Resident image slots of a spatial head; the semantic heads get the rest. None: the preset's
        number of lines (three) beside the anchors, at most the mean, and more only where semantic
        heads already keep all.
    anchor_tokens : int, optional
        Anchors. None: the preset's number (4 or 0), at most a quarter of what a line of victims leaves.
    recent_tokens : int, optional
        Recent tokens of a semantic head. None: the preset's number of lines (one), but at most half of
        what a line of victims and the anchors leave, so that the score has a choice.
    score : {"inter_line", "averaged", "accumulated"}, optional
        Over how many lines a slot's attention counts: `DECAY`.
    head_types : {"profile", "semantic", "spatial"}, optional
        From the head profile, or all heads alike.
    value_norm, smooth_row, stratify : bool, optional
        Refinements of the score, see `HeadRule`.

    Raises ValueError, one line that names the field, for anything out of range.
    """

    preset: str = "fitted"
    budget: float | Literal["auto"] = 0.2
    spatial_tokens: int | None = None
    anchor_tokens: int | None = None
    recent_tokens: int | None = None
    score: Score | None = None
    head_types: HeadTypes | None = None
    value_norm: bool | None = None
    smooth_row: bool | None = None
    stratify: bool | None = None

    def __post_init__(self) -> None:
        number = type(self.budget) in (int, float) and 0 < self.budget <= 1  # type: ignore[operator]
        if not number and (self.budget != AUTO or self.preset != "fitted"):  # a NaN fails the comparison
            auto = ", or auto under the preset fitted" if self.budget == AUTO else ""
            raise ValueError(
                f"budget: {self.budget!r} is not a share of the image; need 0 < budget <= 1{auto}"
            )
        for name in ("spatial_tokens", "anchor_tokens", "recent_tokens"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 0):
                raise ValueError(f"{name}: {value!r} is not a number of tokens; need a whole number >= 0")
        allowed: dict[str, tuple] = {name: (None, False, True) for name in REFINEMENTS}
        allowed["preset"] = tuple(PRESETS)
        allowed["score"] = (None, *DECAY)
        allowed["head_types"] = (None, "profile", "semantic", "spatial")
        for name, choices in allowed.items():
            if getattr(self, name) not in choices:
                names = ", ".join(str(choice) for choice in choices if choice is not None)
                raise ValueError(f"{name}: unknown {getattr(self, name)!r}; one of {names}")
        fitted = ("head_types", "spatial_tokens", "anchor_tokens", "recent_tokens", "score", *REFINEMENTS)
        for name in fitted if self.preset == "fitted" else ():
            if getattr(self, name) is not None:
                raise ValueError(
                    f"{name}: preset fitted chooses every head's rule by measured losses; leave it out, or "
                    "set preset to decoupled"
                )
        if self.spatial_tokens is not None and self.types != "profile":
            raise ValueError(f"spatial_tokens: all heads are {self.types}, nothing to share; set budget")
        for name in ("recent_tokens", "score", *REFINEMENTS) if self.types == "spatial" else ():
            if getattr(self, name):
                raise ValueError(f"{name}: spatial heads neither score nor choose; leave it out")

    @property
    def types(self) -> HeadTypes:
        """Where the head types come from, the preset's choice unless set."""
        return self.head_types or PRESETS[self.preset].head_types

    @property
    def refinements(self) -> dict[str, bool]:
        """Which of `REFINEMENTS` semantic heads use."""
        preset, mine = PRESETS[self.preset], {name: getattr(self, name) for name in REFINEMENTS}
        return {name: getattr(preset, name) if set_ is None else set_ for name, set_ in mine.items()}

    def slots(self, raster: Raster) -> int:
        """The budget in slots: resident image slots per head, mean over the heads."""
        if not PRESETS[self.preset].evicts or self.budget == AUTO:
            return raster.tokens
        assert not isinstance(self.budget, str)
        return math.floor(self.budget * raster.tokens + 1e-9)

    def check(self, raster: Raster) -> None:
        """Raise ValueError, one line, where no heads could find their victims on this grid."""
        if self.types == "fitted":
            mean, line, image = self.slots(raster), raster.width, raster.tokens
            if mean < line:
                least = math.ceil(line / image * 1e4) / 1e4
                raise ValueError(
                    f"budget: budget {self.budget:g} of {image} tokens is {mean} slots per head, {line} "
                    f"needed (a line of {line}); set budget to at least {least:g}"
                )
            return
        for heads in {"profile": [(1, 1)], "semantic": [(0, 1)], "spatial": [(1, 0)]}[self.types]:
            self.rules(raster, *heads)

    def rules(
        self, raster: Raster, n_spatial: int, n_semantic: int
    ) -> tuple[HeadRule | None, HeadRule | None]:
        """Rules of the spatial and of the semantic heads; None for a type that has no heads.

        Parameters
        ----------
        raster : Raster
            The model's grid.
        n_spatial, n_semantic : int
            Heads of each type in the whole model; the mean of the two capacities, weighted with them,
            stays within the budget.

        Raises
        ------
        ValueError
            One line that names the field, the numbers and what would work.
        """
        if self.types == "fitted":
            raise ValueError("preset: fitted has no two rules; vllm_kvcompress.heads.fit gives its types")
        preset, line, image = PRESETS[self.preset], raster.width, raster.tokens
        if min(n_spatial, n_semantic) < 0 or n_spatial + n_semantic < 1:
            raise ValueError(f"head_types: {n_spatial} spatial, {n_semantic} semantic; need a head")
        if (self.types == "semantic" and n_spatial) or (self.types == "spatial" and n_semantic):
            raise ValueError(f"head_types: all {self.types}, got {n_spatial} spatial, {n_semantic} semantic")
        spatial, semantic = self._capacities(raster, n_spatial, n_semantic)
        ring = rule = None
        if n_spatial:
            anchors = self._anchors(spatial - line)
            ring = HeadRule(spatial, line, image, anchors, spatial - anchors, ring=True)
        if n_semantic:
            anchors = self._anchors(semantic - line - (self.recent_tokens or 0))
            recent = self.recent_tokens
            if recent is None:
                recent = min(preset.recent_lines * line, max(0, semantic - line - anchors) // 2)
            decay = DECAY[self.score or preset.score]
            rule = HeadRule(semantic, line, image, anchors, recent, decay=decay, **self.refinements)
        return ring, rule

    def _anchors(self, room: int) -> int:
        """The anchors asked for; else the preset's, at most a quarter of the ``room`` beside a line."""
        if self.anchor_tokens is not None:
            return self.anchor_tokens
        return max(0, min(PRESETS[self.preset].anchors, room // 4))

    def _capacities(self, raster: Raster, n_spatial: int, n_semantic: int) -> tuple[int, int]:
        """Slots of a spatial and of a semantic head."""
        line, image, mean = raster.width, raster.tokens, self.slots(raster)
        anchors, recent, wanted = self.anchor_tokens or 0, self.recent_tokens or 0, self.spatial_tokens
        for name in ("anchor_tokens", "recent_tokens", "spatial_tokens"):
            if (getattr(self, name) or 0) > image:
                raise ValueError(f"{name}: {getattr(self, name)}; need at most the image's {image} tokens")
        # A head that keeps the whole image needs no victims, whatever its anchors.
        least_spatial, least_semantic = min(image, anchors + line), min(image, anchors + recent + line)
        if wanted is not None and n_spatial and wanted < least_spatial:
            raise ValueError(
                f"spatial_tokens: {wanted}, a line of {line} beside {anchors} anchors needs {least_spatial}"
            )
        floor = least_spatial if wanted is None else wanted
        heads = n_spatial + n_semantic
        total, need = mean * heads, n_spatial * floor + n_semantic * least_semantic
        if need > total:
            slots = math.ceil(need / heads)
            asked = [n for n in ("spatial_tokens", "recent_tokens", "anchor_tokens") if getattr(self, n)]
            field = asked[0] if asked and mean >= line else "budget"  # less than a line fails on its own
            raise ValueError(
                f"{field}: budget {self.budget:g} of {image} tokens is {mean} slots per head, "
                f"{slots} needed ({n_spatial} spatial heads of {floor}, {n_semantic} semantic of "
                f"{least_semantic}: a line of {line} beside {anchors} anchors, {recent} recent); "
                f"{'' if field == 'budget' else f'lower {field} or '}"
                f"set budget to at least {min(1.0, math.ceil(slots / image * 1e4) / 1e4):g}"
            )
        if not n_spatial or not n_semantic:
            return (mean if wanted is None else wanted), mean
        spatial = wanted
        if spatial is None:
            most = (total - n_semantic * least_semantic) // n_spatial
            preset = PRESETS[self.preset]
            # Whole lines beside the anchors: a few tokens short of a line cost half of what it gives.
            first = preset.anchors if self.anchor_tokens is None else anchors
            spatial = max(least_spatial, min(first + preset.spatial_lines * line, mean, most))
        semantic = min(image, (total - n_spatial * spatial) // n_semantic)
        if wanted is None and semantic == image:
            spatial = max(spatial, min(image, (total - n_semantic * image) // n_spatial))
        return spatial, semantic
