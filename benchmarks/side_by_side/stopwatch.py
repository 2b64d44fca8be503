"""Where the time of a step goes: exclusive wall time of labelled calls.

Everything runs in one process on the CPU and operations return when they are done, so wall time between
entering and leaving a function is its time. A call inside another one pauses the outer one's clock, so the
parts add up to the whole. Calls are wrapped only while a split is being taken: timed steps run untouched.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

OTHER = "other"


class Stopwatch:
    """Seconds per label, and which label's clock is running."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._running: list[str] = []
        self._since = 0.0

    def _charge(self) -> None:
        now = time.perf_counter()
        if self._running:
            self.seconds[self._running[-1]] += now - self._since
        self._since = now

    def enter(self, label: str) -> None:
        """From here on time belongs to ``label``."""
        self._charge()
        self._running.append(label)

    def leave(self) -> None:
        """Back to the label before."""
        self._charge()
        self._running.pop()

    def wrap(self, label: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """``call``, timed as ``label``."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            self.enter(label)
            try:
                return call(*args, **kwargs)
            finally:
                self.leave()

        return timed

    @contextmanager
    def methods(self, targets: list[tuple[Any, str, str]]) -> Iterator[None]:
        """While this lasts, methods are timed: ``(object, method's name, label)``."""
        wrapped = []
        for owner, name, label in targets:
            own = vars(owner).get(name)
            setattr(owner, name, self.wrap(label, getattr(owner, name)))
            wrapped.append((owner, name, own))
        try:
            yield
        finally:
            for owner, name, own in reversed(wrapped):
                if own is None:
                    delattr(owner, name)
                else:
                    setattr(owner, name, own)

    def shares(self, whole: float, steps: int) -> dict[str, float]:
        """Seconds per step and label; what no label has is ``other``."""
        parts = {label: seconds / steps for label, seconds in self.seconds.items()}
        return parts | {OTHER: whole / steps - sum(parts.values())}

    def per_step(self, step: Callable[[], float], steps: int) -> dict[str, float]:
        """``shares`` of ``steps`` calls of ``step``, which returns its seconds."""
        self.seconds.clear()
        return self.shares(sum(step() for _ in range(steps)), steps)


def modules_named(model: nn.Module, *endings: str) -> list[nn.Module]:
    """Modules whose name's last part is one of ``endings``."""
    return [module for name, module in model.named_modules() if name.rpartition(".")[2] in endings]
