"""Which contenders' processes are alive: as many as the memory holds, so that they can take short turns."""

import re
from pathlib import Path

import psutil

from side_by_side.child import Child
from side_by_side.contenders import Contender
from side_by_side.floor import weight_bytes
from side_by_side.workloads import OUT, Workload

_PROCESS = 2 << 30  # bytes: interpreter, libraries, activations, embeddings


def need_bytes(contender: Contender, workload: Workload, batch: int) -> float:
    """About what a contender's process will take, generously."""
    kv = workload.fixed_memory(64) or workload.kv_memory(batch, contender.budget)
    embeddings = 0
    if g := workload.geometry:
        embeddings = 2 * 2 * g.text_vocab * g.hidden
    return _PROCESS + 1.5 * (weight_bytes(workload) + embeddings) + kv


class Children:
    """Processes by contender, of one workload at a time; the least recently used ends when room is short."""

    def __init__(self, logs: Path = OUT / "logs") -> None:
        self._logs = logs
        self._alive: dict[str, Child] = {}
        self._workload: Workload | None = None

    def get(self, contender: Contender, workload: Workload, batch: int) -> Child:
        """The contender's process, started if need be; ``batch`` is the largest it will be asked for."""
        if workload != self._workload:
            self.close()
            self._workload = workload
        child = self._alive.pop(contender.name, None)
        if child is None:
            self._make_room(need_bytes(contender, workload, batch))
            log = self._logs / f"{workload.name}-{re.sub(r'[^a-z0-9]+', '_', contender.name)}.log"
            child = Child(contender, workload, batch, log)
        elif contender.is_transformers:  # its cache is made for each cell
            self._make_room(workload.kv_memory(batch, 1.0))
        self._alive[contender.name] = child
        return child

    def _make_room(self, need: float) -> None:
        while self._alive and psutil.virtual_memory().available < need:
            self.drop(next(iter(self._alive)))

    def drop(self, name: str) -> None:
        """End one contender's process, if it lives."""
        if child := self._alive.pop(name, None):
            child.close()

    def close(self) -> None:
        """End all of them."""
        for name in list(self._alive):
            self.drop(name)
