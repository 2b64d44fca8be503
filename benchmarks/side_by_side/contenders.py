"""Who is compared: transformers, vLLM with a full cache, and this package's presets."""

from dataclasses import dataclass, field, replace
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
    weights : str or None
        Form of the decoder's linear layers (`vllm_kvcompress.testing.quantised`); None is bfloat16.
    """

    name: str
    section: dict[str, Any] | None = field(default=None, hash=False)
    weights: str | None = None

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
OURS = "fitted 1/6"  # the one that the bars are about
EARLIER = "decoupled 1/6"  # whom they were about until decision 102
LONG = "fitted 1/8"  # of pictures of thousands of tokens
STOCK_INT8, OURS_INT8 = f"{STOCK} int8", f"{OURS} int8"
CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender(TRANSFORMERS),
        Contender(STOCK),
        *(_compressed(preset, budget) for budget in BUDGETS for preset in PRESETS),
        _compressed("fitted", Fraction(1, 8)),
        Contender(STOCK_INT8, weights="int8"),
        replace(_compressed("fitted", Fraction(1, 6)), name=OURS_INT8, weights="int8"),
    )
}
