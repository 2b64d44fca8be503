"""Shares and means with 95% confidence intervals."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Z = 1.959964
RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A value and its 95% interval."""

    value: float
    low: float
    high: float

    def text(self, digits: int = 3, scale: float = 1.0) -> str:
        """``value [low, high]``."""
        value, low, high = (f"{x * scale:.{digits}f}" for x in (self.value, self.low, self.high))
        return f"{value} [{low}, {high}]"


def share(right: int, number: int) -> Estimate:
    """Wilson's interval of a share."""
    if not number:
        return Estimate(math.nan, math.nan, math.nan)
    p, z2 = right / number, Z * Z / number
    centre = (p + z2 / 2) / (1 + z2)
    half = Z * math.sqrt(p * (1 - p) / number + z2 / (4 * number)) / (1 + z2)
    return Estimate(p, max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half)))


def mean(values: Sequence[float], seed: int = 0) -> Estimate:
    """Mean with a bootstrap percentile interval; the values are independent scenes or pictures.

    For two systems on the same scenes pass their differences: the pairing takes the scenes' own spread
    out of the interval.
    """
    array = np.asarray(values, float)
    if not len(array):
        return Estimate(math.nan, math.nan, math.nan)
    rng = np.random.default_rng(seed)
    means = array[rng.integers(0, len(array), (RESAMPLES, len(array)))].mean(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return Estimate(float(array.mean()), float(low), float(high))
