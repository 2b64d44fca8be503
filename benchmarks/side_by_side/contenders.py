"""Who is compared: transformers, vLLM with a full cache, and this package's presets."""

from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

TRANSFORMERS, STOCK = "transformers", "stock"


@dataclass(frozen=True)
class Contender:
    """One system.

    Parameters
    ----------
    name : str
        As in tables and files.
    section : dict or None
        The ``kvcompress`` settings; None for the full caches.
    """

    name: str
    section: dict[str, Any] | None = field(default=None, hash=False)

    @property
    def is_transformers(self) -> bool:
        return self.name == TRANSFORMERS

    @property
    def budget(self) -> float:
        """Share of a picture's tokens that stays resident."""
        return 1.0 if self.section is None else self.section["budget"]


def _compressed(preset: str, budget: Fraction) -> Contender:
    return Contender(f"{preset} {budget}", {"preset": preset, "budget": round(float(budget), 4)})


PRESETS = ("streaming", "h2o", "line_ar", "ssd", "decoupled", "fitted")
BUDGETS = (Fraction(1, 5), Fraction(1, 6))
CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender(TRANSFORMERS),
        Contender(STOCK),
        *(_compressed(preset, budget) for budget in BUDGETS for preset in PRESETS),
        _compressed("fitted", Fraction(1, 8)),
    )
}
OURS = "fitted 1/6"  # the one that the bars are about
EARLIER = "decoupled 1/6"  # whom they were about until decision 102
LONG = "fitted 1/8"  # of pictures of thousands of tokens
