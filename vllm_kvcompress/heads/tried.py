"""Which of several fits is served: what trials said of them, kept in the head profile. No torch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from vllm_kvcompress.heads.curves import EARLIER, SQUARES, WEIGHINGS, LossCurves, Weighing
from vllm_kvcompress.heads.fit import Assignment, fit, smallest_budget
from vllm_kvcompress.heads.paged import Pages
from vllm_kvcompress.policy import AUTO, MAX_TYPES, TOLERANCE

BETTER = 0.98  # of the best so far, to be taken instead: sums in another order change no choice

_NO_TOLERANCE = 0.0008  # what profiles say where the budget is a number: none was asked for
_NOT_A_NUMBER = 1e9  # nats: what overflowed is served last
Tried = Callable[[Sequence[Assignment]], NDArray[np.float64]]
"""Whole fits -> what each costs on known pictures: `vllm_kvcompress.heads.trials.divergences`."""


@dataclass(frozen=True)
class Wanted:
    """What is to be fitted: parameters as `vllm_kvcompress.heads.fit.fit`'s; budget may be ``auto``."""

    budget: float | Literal["auto"]
    types: int = MAX_TYPES
    pages: Pages | None = None
    ranks: int = 1
    tolerance: float = TOLERANCE

    def check(self, curves: LossCurves) -> None:
        """Raise ValueError, one line, where no head type is small enough for the budget; quick."""
        if self.budget != AUTO and curves.slots.min() > self.budget:
            fit(curves, self.budget, 1)  # says what would be

    def fits(self, curves: LossCurves) -> dict[Weighing, Assignment]:
        """The fits of all `WEIGHINGS` that differ, `SQUARES`' first.

        With ``auto`` it says the budget, and the others keep within the tolerance as well.
        """
        first = self._fit(curves, SQUARES)
        found = {SQUARES: first}
        if first.loss == 0:  # nothing better is to be found
            return found
        for weighing in WEIGHINGS:
            one = self._fit(curves, weighing, first)
            assert one.loss is not None
            if self.budget == AUTO and one.loss > self.tolerance:
                continue
            if not any(one.same_as(other) for other in found.values()):
                found[weighing] = one
        return found

    def served(self, curves: LossCurves, trial: "Trial | None") -> Assignment:
        """The fit that a trial has chosen, without one that of `SQUARES`."""
        if trial is None:
            return self._fit(curves, SQUARES)
        first = self._fit(curves, SQUARES) if self.budget == AUTO else None
        return replace(self._fit(curves, trial.weighing, first), divergence=trial.divergence)

    def _fit(self, curves: LossCurves, weighing: Weighing, first: Assignment | None = None) -> Assignment:
        if weighing == SQUARES and first is not None:
            return first
        if self.budget != AUTO:
            return fit(curves, self.budget, self.types, self.pages, self.ranks, weighing)
        if first is None:
            return smallest_budget(curves, self.tolerance, self.types, self.pages, self.ranks)
        return fit(curves, first.mean_slots, self.types, self.pages, self.ranks, weighing)


class Trial(BaseModel):
    """What was tried for one wish, and what came of it; as it stands in a profile.

    Parameters
    ----------
    budget, types, slot, side, ranks, tolerance
        The `Wanted` in plain numbers; slot and side 0 without pages.
    power, conditional, later : float
    tied : bool
        The `Weighing` whose fit strayed least; one that is or was tried, or the trial counts for nothing.
    divergence, squares : float
        Of that fit and of `SQUARES`', nats per token.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    budget: float | Literal["auto"]
    types: int
    slot: int
    side: int
    ranks: int
    tolerance: float
    power: float
    conditional: float
    tied: bool = False  # profiles from before there were tied fits do not say
    later: float | None = None  # nor those from before layers were weighed
    divergence: float = Field(ge=0, allow_inf_nan=False)
    squares: float = Field(ge=0, allow_inf_nan=False)

    @property
    def weighing(self) -> Weighing:
        """As a fit takes it."""
        return Weighing(self.power, self.conditional, self.tied, self.later or 1.0)

    def of(self, wanted: Wanted) -> bool:
        """Whether this is what was tried for it."""
        known = self.weighing in (*WEIGHINGS, *EARLIER)
        return known and all(getattr(self, name) == value for name, value in _plain(wanted).items())


def _plain(wanted: Wanted) -> dict[str, Any]:
    pages = wanted.pages or Pages(0, 0)
    return {
        "budget": wanted.budget, "types": wanted.types, "slot": pages.slot, "side": pages.side,
        "ranks": wanted.ranks, "tolerance": wanted.tolerance if wanted.budget == AUTO else _NO_TOLERANCE,
    }  # fmt: skip


def try_fits(curves: LossCurves, wanted: Wanted, tried: Tried) -> Trial:
    """Try the fits that differ and say what strays least.

    Raises ValueError, one line, as `vllm_kvcompress.heads.fit.fit`.
    """
    fits = wanted.fits(curves)
    found = np.zeros(1) if fits[SQUARES].loss == 0 else tried(list(fits.values()))
    found = np.nan_to_num(found, nan=_NOT_A_NUMBER, posinf=_NOT_A_NUMBER)
    costs = dict(zip(fits, found.tolist(), strict=True))
    best = SQUARES
    for weighing, cost in costs.items():
        if cost < BETTER * costs[best]:
            best = weighing
    return Trial(
        **_plain(wanted),
        power=best.power,
        conditional=best.conditional,
        tied=best.tied,
        later=best.later,
        divergence=float(f"{costs[best]:.4g}"),
        squares=float(f"{costs[SQUARES]:.4g}"),
    )
