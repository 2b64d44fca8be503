"""A run: every cell that is not in the results yet, until all are there or the time is up."""

import time
from collections.abc import Callable
from typing import Any

from side_by_side import http
from side_by_side.child import ContenderError
from side_by_side.children import Children
from side_by_side.contenders import CONTENDERS
from side_by_side.floor import Copy
from side_by_side.plan import Cell, Group, HttpGroup
from side_by_side.results import Results

Say = Callable[[str], None]


class Run:
    """Measures groups into a results file.

    Parameters
    ----------
    deadline : float
        ``time.monotonic()`` after which no cell is begun.
    say : callable
        Gets a line after each cell, and for each failure.
    """

    def __init__(self, results: Results, deadline: float, say: Say, copy: Copy | None = None) -> None:
        self.results, self.deadline, self.say = results, deadline, say
        self._copy = copy or Copy()
        self._children = Children()
        self.failures = 0

    @property
    def out_of_time(self) -> bool:
        return time.monotonic() > self.deadline

    def missing(self, group: Group | HttpGroup) -> int:
        """Cells (of HTTP groups: servers) still to do."""
        if isinstance(group, HttpGroup):
            return sum(not self._served(group, repeat, c.name) for repeat, c in http.turns(group))
        return sum(not self.results.has(**_key(cell)) for cell in group.cells())

    def group(self, group: Group | HttpGroup, advance: Callable[[], None]) -> None:
        """Do what is missing of a group; ``advance`` is called after each cell or server."""
        try:
            if isinstance(group, HttpGroup):
                self._http(group, advance)
            else:
                for cell in group.cells():
                    if self.results.has(**_key(cell)):
                        continue
                    if self.out_of_time:
                        return
                    self._cell(cell)
                    advance()
        finally:
            self._children.close()

    def _cell(self, cell: Cell) -> None:
        start = time.monotonic()
        try:
            child = self._children.get(CONTENDERS[cell.contender], cell.workload, cell.limit)
            copied = self._copy.gb_s()
            measured = child.measure(cell.batch, cell.lines, cell.split, cell.whole)
        except ContenderError as error:
            self._children.drop(cell.contender)
            self._failed(f"{cell.workload.name}, {cell.contender}, batch {cell.batch}", error)
            return
        taken = time.monotonic() - start
        figures = {"copy_gb_s": round(copied, 2), **measured, "taken_s": round(taken, 1)}
        self.results.add(_key(cell) | figures)
        steps = [sum(s) / len(s) * 1e3 for s in measured["lines"].values()]
        speeds = ", ".join(f"{ms:.1f}" for ms in steps)
        self.say(
            f"{cell.workload.name} {cell.contender} x {measured['drawn_at_once']}: {speeds} ms a step, "
            f"{taken:.0f} s"
        )

    def _served(self, group: HttpGroup, repeat: int, contender: str) -> bool:
        loads: list[Any] = [http.SATURATION, *group.loads]
        name = group.workload.name
        return all(
            self.results.has(workload=name, contender=contender, batch=None, repeat=repeat, load=load)
            for load in loads
        )

    def _http(self, group: HttpGroup, advance: Callable[[], None]) -> None:
        for repeat, contender in http.turns(group):
            if self._served(group, repeat, contender.name):
                continue
            if self.out_of_time:
                return
            try:
                with http.serve(group, contender) as server:
                    self._ask(server, group, repeat, contender.name)
            except (ContenderError, http.ServerError) as error:
                self._failed(f"{group.workload.name}, {contender.name}", error)
            advance()

    def _ask(self, server: Any, group: HttpGroup, repeat: int, contender: str) -> None:
        for load in (http.SATURATION, *group.loads):
            key = {"workload": group.workload.name, "contender": contender, "repeat": repeat, "load": load}
            if self.results.has(**key):
                continue
            rate = float("inf")
            if isinstance(load, float):
                saturation = http.stock_saturation(self.results.cells, group)
                if saturation is None:
                    raise ContenderError("the stock server, whose speed sets the arrival rate, did not run")
                rate = round(load * saturation, 3)
            figures = http.ask(server, group, rate, repeat)
            self.results.add(key | {"rate": rate if load != http.SATURATION else None} | figures)
            self.say(f"{group.workload.name} {contender} at {load}: {figures['request_throughput']:.2f}/s")

    def _failed(self, what: str, error: Exception) -> None:
        self.failures += 1
        self.say(f"[red]{what} failed:[/red] {str(error).strip().splitlines()[-1]}")


def _key(cell: Cell) -> dict[str, Any]:
    return dict(zip(("workload", "contender", "batch", "repeat"), cell.key, strict=True))
