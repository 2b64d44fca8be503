"""The results file: written whole after every cell, so that an interrupted run goes on where it stopped."""

import json
import os
import re
import subprocess
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from side_by_side.workloads import ROOT

FOLDER = ROOT / "benchmarks" / "results"
_KEYS = ("workload", "contender", "batch", "repeat", "load")


def cpu_model() -> str:
    """The processor's name, as it calls itself."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found.group(1).strip() if found else "unknown CPU"


def machine_name(cpu: str, cores: int) -> str:
    """A short name for a kind of machine: ``xeon-2core``."""
    plain = re.sub(r"\((?:r|tm)\)|@.*", " ", cpu.lower())
    words = [w for w in re.findall(r"[a-z]+", plain) if w not in ("intel", "amd", "processor", "cpu", "core")]
    return f"{words[0] if words else 'cpu'}-{cores}core"


def describe(mode: str, threads: int) -> dict[str, Any]:
    """What the numbers depend on, and nothing that names the machine."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    cpu, cores = cpu_model(), os.cpu_count() or 1
    return {
        "mode": mode,
        "machine": machine_name(cpu, cores),
        "cpu": cpu,
        "cores": cores,
        "memory_gb": round(psutil.virtual_memory().total / 1e9),
        "threads": threads,
        "dtype": "bfloat16",
        "guidance_scale": 5.0,
        "commit": commit.stdout.strip() or "unknown",
        "versions": {name: version(name) for name in ("torch", "transformers", "vllm", "vllm-kvcompress")},
    }


class Results:
    """A results file and what is in it.

    Parameters
    ----------
    path : Path
        Read if it exists; raises ValueError if it holds another mode's run.
    about : dict
        From ``describe``; a file that exists keeps its own.
    """

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self.path = path
        self.data: dict[str, Any] = {"about": about, "finished": False, "cells": []}
        if path.exists():
            self.data = json.loads(path.read_text())
            if self.data["about"]["mode"] != about["mode"]:
                raise ValueError(f"{path.name} holds a {self.data['about']['mode']} run: name another file")
        self._done = {_key(cell) for cell in self.cells}

    @classmethod
    def open(cls, mode: str, threads: int, path: Path | None = None, fresh: bool = False) -> "Results":
        """The file at ``path``; or today's; or, unless ``fresh``, this mode's last unfinished one."""
        about = describe(mode, threads)
        if path is None:
            suffix = "" if mode == "quick" else f"-{mode}"
            path = FOLDER / f"{date.today().isoformat()}-{about['machine']}{suffix}.json"
            begun = sorted(FOLDER.glob(f"*-{about['machine']}{suffix}.json"))
            if not fresh and begun and not json.loads(begun[-1].read_text())["finished"]:
                path = begun[-1]
        if fresh:
            path.unlink(missing_ok=True)
        return cls(path, about)

    @property
    def cells(self) -> list[dict[str, Any]]:
        return self.data["cells"]

    def has(self, **key: Any) -> bool:
        """Whether a cell has been measured."""
        return _key(key) in self._done

    def add(self, cell: dict[str, Any]) -> None:
        """Keep a cell and write the file."""
        self.cells.append(cell)
        self._done.add(_key(cell))
        self.write()

    def finish(self) -> None:
        """Nothing is missing any more: a later run begins a new file."""
        self.data["finished"] = True
        self.write()

    def write(self) -> None:
        """Replace the file in one go: whenever the power fails, one whole version is there."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        cells = ",\n".join(json.dumps(cell) for cell in self.cells)
        head = json.dumps({k: v for k, v in self.data.items() if k != "cells"}, indent=1)
        new = self.path.with_suffix(".tmp")
        new.write_text(f'{head[:-2]},\n "cells": [\n{cells}\n]}}\n')
        new.replace(self.path)


def _key(cell: dict[str, Any]) -> tuple[str, ...]:
    return tuple(str(cell.get(name)) for name in _KEYS)
