"""A contender in a process of its own: told what to measure, one cell at a time."""

import contextlib
import functools
import os
import resource
import sys
import traceback
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from threading import RLock
from typing import Any

from tqdm import tqdm

from side_by_side.contenders import Contender
from side_by_side.workloads import Workload

FIT = "fit"  # as a batch: as many pictures as the memory holds


class ContenderError(RuntimeError):
    """A contender's process failed; the message has its traceback."""


def _measure(drawer: Any, decoding: Callable[[], float], asked: dict[str, Any]) -> dict[str, Any]:
    batch = drawer.fit() if asked["batch"] == FIT else asked["batch"]
    samples = [drawer.line(batch, line) for line in asked["lines"]]
    _reset_peak()
    cell: dict[str, Any] = {
        "drawn_at_once": batch,
        "prefix": drawer.prefix,
        "prompt_s": round(samples[0].first_s, 5),
        "lines": {str(s.line): [round(x, 5) for x in s.step_s] for s in samples},
        "kv_bytes_per_image": round(max(s.kv_bytes for s in samples)),
    }
    if asked["split"] is not None:
        cell["split"] = {name: round(s, 6) for name, s in drawer.split(batch, asked["split"]).items()}
    if asked["whole"]:
        cell["whole_s"] = round(drawer.whole(batch), 3)
    cell["vq_s"] = round(decoding(), 4)
    if setting := getattr(drawer, "setting", None):
        cell["setting"] = setting[batch]
    return cell | {"peak_rss": _peak_rss()}


def _reset_peak() -> None:
    """Forget loading: the peak that counts is drawing's."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _peak_rss() -> int:
    """Bytes."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def _serve(pipe: Connection, contender: Contender, workload: Workload, batch: int, log: str) -> None:
    with open(log, "ab") as out:  # vLLM writes to both
        os.dup2(out.fileno(), sys.stdout.fileno())
        os.dup2(out.fileno(), sys.stderr.fileno())
    tqdm.set_lock(RLock())  # its own is a semaphore that outlives this process
    try:
        with workload.grid():
            drawer: Any
            if contender.is_transformers:
                from side_by_side.hf import Transformers

                drawer = Transformers(contender, workload, batch)
            else:
                from side_by_side.engine import Engine

                drawer = Engine(contender, workload, batch)
            # Once a process: a large picture takes a minute, and neither cache nor batch has a part in it.
            decoding = functools.cache(drawer.decode_picture)
            pipe.send({"ready": True})
            while (asked := pipe.recv()) is not None:
                pipe.send(_measure(drawer, decoding, asked))
    except EOFError:
        pass
    except BaseException:
        pipe.send({"error": traceback.format_exc()})
    finally:
        sys.stdout.flush()
        os._exit(0)  # an engine's own end takes seconds, and its memory goes with the process


class Child:
    """The parent's end of a contender's process."""

    def __init__(self, contender: Contender, workload: Workload, batch: int, log: Path) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        context = get_context("forkserver")  # vLLM is imported once for all of them
        context.set_forkserver_preload(["vllm.entrypoints.llm"])
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, contender, workload, batch, str(log)), daemon=False
        )
        self._process.start()
        theirs.close()
        self._answer()

    def _answer(self) -> dict[str, Any]:
        try:
            answer: dict[str, Any] = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise ContenderError(f"the process died, exit code {self._process.exitcode}") from None
        if "error" in answer:
            self._process.join()
            raise ContenderError(answer["error"])
        return answer

    def measure(
        self, batch: int | str, lines: tuple[int, ...], split: int | None = None, whole: bool = False
    ) -> dict[str, Any]:
        """Time ``lines`` of ``batch`` pictures; take a step of line ``split`` apart; draw ``whole`` ones."""
        self._pipe.send({"batch": batch, "lines": lines, "split": split, "whole": whole})
        return self._answer()

    def close(self) -> None:
        """End the process and wait for it: its memory is given back."""
        with contextlib.suppress(OSError):  # it may have failed and gone
            self._pipe.send(None)
        self._process.join()
        self._pipe.close()
