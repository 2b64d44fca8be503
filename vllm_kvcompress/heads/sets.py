"""The search among sets of candidate types: by their bounds, only sets that may be best are fitted."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import product

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
_MOST_NODES = 50_000  # of the search among sets of types


class Sets:
    """Sets of candidate types, compared by their Lagrangian bound.

    At any price of a slot, the sum over heads of the least (loss + price * slots), less what the budget is
    worth, is no more than what any assignment within the set loses; the best price gives the bound.
    """

    def __init__(self, losses: Floats, slots: Ints, budget: float, size: int) -> None:
        self.losses, self.slots, self.size = losses, slots, size
        self.total = budget * len(losses)
        self.budget = budget
        self.best = np.inf  # what is reached already

    def bound(self, chosen: Sequence[int], tolerance: float = 1e-3) -> tuple[float, float]:
        """(bound, price): the dual function is concave, so a search by thirds finds its top."""
        losses, slots = self.losses[:, chosen], self.slots[list(chosen)]

        def value(log_price: float) -> float:
            price = np.exp(log_price)
            return float((losses + price * slots).min(1).sum() - price * self.total)

        low, high = self._log_prices
        while high - low > tolerance:
            one, two = low + (high - low) / 3, high - (high - low) / 3
            if value(one) < value(two):
                low = one
            else:
                high = two
        top = (low + high) / 2
        return max(value(top), float(losses.min(1).sum())), float(np.exp(top))

    @property
    def _goal(self) -> float:
        return self.best * (1 - 1e-9)

    @cached_property
    def _log_prices(self) -> tuple[float, float]:
        """Logarithms of prices below and above which nothing changes."""
        gain = float(np.ptp(self.losses)) or 1.0
        return np.log(gain) - 30.0, np.log(gain) + 1.0

    def climb(self) -> list[int]:
        """A good set: from evenly spread candidates, exchanged one at a time while the bound falls."""
        number = len(self.slots)
        chosen = sorted({round(n) for n in np.linspace(0, number - 1, self.size)})
        smallest = int(self.slots.argmin())
        if self.slots[chosen].min() > self.budget:
            chosen[0] = smallest
        best, _ = self.bound(chosen, 0.05)
        while True:
            options = []
            for out, into in product(chosen, set(range(number)) - set(chosen)):
                other = sorted({*chosen, into} - {out})
                if self.slots[other].min() <= self.budget:
                    options.append((self.bound(other, 0.05)[0], other))
            if not options or min(options)[0] >= best:
                return chosen
            best, chosen = min(options)

    def better(self, near: Sequence[int]) -> Iterator[list[int]]:
        """Every set whose bound is below ``best``, which may fall while this goes on: branch and bound.

        Bounds are taken at prices around the best one of the set ``near``.

        It ends early, the set found so far being nearly as good as any, after `_MOST_NODES` steps.
        """
        steps = 0
        number = len(self.slots)
        _, price = self.bound(near)
        prices = price * np.array([0.6, 0.8, 1.0, 1.25, 1.6])
        priced = self.losses + prices[:, None, None] * self.slots  # [prices, heads, candidates]
        worth = prices * self.total
        rest = np.minimum.accumulate(priced[..., ::-1], -1)[..., ::-1]  # of this candidate and those after

        def grow(chosen: list[int], least: Floats) -> Iterator[list[int]]:
            nonlocal steps
            start, missing = (chosen[-1] + 1 if chosen else 0), self.size - len(chosen)
            for n in range(start, number - missing + 1):
                steps += 1
                if steps > _MOST_NODES:
                    return
                if (np.minimum(least, rest[..., n]).sum(1) - worth).max() >= self._goal:
                    return  # nothing from here on is better, nor is less of it
                one, now = [*chosen, n], np.minimum(least, priced[..., n])
                if missing > 1:
                    yield from grow(one, now)
                elif (
                    self.slots[one].min() <= self.budget
                    and (now.sum(1) - worth).max() < self._goal > (self.bound(one)[0])
                ):
                    yield one

        yield from grow([], np.full(priced.shape[:2], np.inf))
