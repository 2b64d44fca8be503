"""From samples to figures: whole pictures, medians with their spread, ratios between contenders."""

import statistics
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from side_by_side.contenders import CONTENDERS
from side_by_side.floor import step_bytes
from side_by_side.workloads import Workload

Cell = dict[str, Any]


@dataclass(frozen=True)
class Figure:
    """A median and its spread (least, most) over repeats."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> "Figure":
        return cls(statistics.median(values), min(values), max(values))

    def text(self, digits: int = 2) -> str:
        """``1.52 (1.48-1.60)``."""
        return f"{self.median:.{digits}f} ({self.low:.{digits}f}-{self.high:.{digits}f})"


def line_seconds(cell: Cell) -> dict[int, float]:
    """Mean seconds of a step, by line timed: the line's end is in it."""
    return {int(line): statistics.fmean(steps) for line, steps in cell["lines"].items()}


def drawing_seconds(cell: Cell, workload: Workload) -> float:
    """Seconds that a batch of whole pictures takes up to its last token.

    The prompts, and every line's steps: those of the timed lines, straight lines in between, level outside.
    """
    known = sorted(line_seconds(cell).items())
    total = 0.0
    for line in range(workload.lines):
        before = max((k for k in known if k[0] <= line), default=known[0])
        after = min((k for k in known if k[0] >= line), default=known[-1])
        share = (line - before[0]) / (after[0] - before[0]) if after[0] > before[0] else 0.0
        total += workload.width * (before[1] + share * (after[1] - before[1]))
    return cell["prompt_s"] + total


def tokens_per_second(cell: Cell, workload: Workload) -> float:
    """Image tokens a second, of all pictures of the batch; pixels not included."""
    return cell["drawn_at_once"] * workload.tokens / drawing_seconds(cell, workload)


def seconds_per_image(cell: Cell, workload: Workload) -> float:
    """From prompts to pixels."""
    return drawing_seconds(cell, workload) / cell["drawn_at_once"] + cell["vq_s"]


def pictures_per_second(cell: Cell, workload: Workload) -> float:
    return 1 / seconds_per_image(cell, workload)


def late_step_seconds(cell: Cell, workload: Workload) -> float:
    """A step in the last line timed."""
    return max(line_seconds(cell).items())[1]


def growth(cell: Cell, workload: Workload) -> float:
    """A step in the last line timed over one in the first line past the budget of a sixth."""
    known = sorted(line_seconds(cell).items())
    past = [seconds for line, seconds in known if line >= workload.lines / 6]
    return past[-1] / past[0]


def over_floor(cell: Cell, workload: Workload) -> float:
    """A late step's time over the time to move its bytes at the speed of a copy."""
    line, seconds = max(line_seconds(cell).items())
    contender = CONTENDERS[cell["contender"]]
    drawn = (line + 0.5) * workload.width
    moved = step_bytes(
        workload, cell["drawn_at_once"], cell["prefix"], drawn, contender.budget, contender.weights
    )
    return seconds / (moved / (cell["copy_gb_s"] * 1e9))


class Samples:
    """Cells by (workload, contender, batch), each a dictionary of repeats."""

    def __init__(self, cells: list[Cell]) -> None:
        self._by: dict[tuple[str, str, str], dict[int, Cell]] = defaultdict(dict)
        for cell in cells:
            if "lines" in cell:
                self._by[cell["workload"], cell["contender"], str(cell["batch"])][cell["repeat"]] = cell

    def batches(self, workload: str) -> list[str]:
        """Batches measured, as text, least first."""
        return sorted({key[2] for key in self._by if key[0] == workload}, key=lambda b: (len(b), b))

    def contenders(self, workload: str, batch: str) -> list[str]:
        """In the order of ``CONTENDERS``."""
        return [name for name in CONTENDERS if (workload, name, batch) in self._by]

    def cells(self, workload: str, contender: str, batch: str) -> dict[int, Cell]:
        """By repeat; empty if not measured."""
        return self._by.get((workload, contender, batch), {})

    def figure(self, workload: Workload, contender: str, batch: str, value: Any) -> Figure | None:
        """``value(cell, workload)`` over the repeats."""
        cells = self.cells(workload.name, contender, batch)
        return Figure.of([value(cell, workload) for cell in cells.values()]) if cells else None

    def ratio(self, workload: Workload, batch: str, over: str, under: str, value: Any) -> Figure | None:
        """``over``'s value divided by ``under``'s, turn by turn: each repeat with its neighbour in time."""
        top = self.cells(workload.name, over, batch)
        bottom = self.cells(workload.name, under, batch)
        both = [
            value(top[repeat], workload) / value(bottom[repeat], workload) for repeat in top.keys() & bottom
        ]
        return Figure.of(both) if both else None
