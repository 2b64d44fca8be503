"""An API process drains: it refuses who comes late; one that shares its engine waits, but not for ever."""

import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.datastructures import State
from vllm.exceptions import RetryableRequestError

from vllm_kvcompress.serving import drain


class Shared:
    """As much of an engine client, and of the launcher's server, as a drain looks at."""

    def __init__(self, owner: bool = False, timeout: int = 60) -> None:
        manager = object() if owner else None
        self.engine_core = SimpleNamespace(resources=SimpleNamespace(engine_manager=manager))
        self.vllm_config = SimpleNamespace(shutdown_timeout=timeout)
        self.ended: list[float | None] = []
        self.state, self.answered = State(), {"one", "two"}
        self.state.server = SimpleNamespace(server_state=SimpleNamespace(tasks=self.answered))
        drain.Drain(self, self.state)  # type: ignore[arg-type]

    def shutdown(self, timeout: float | None = None) -> None:
        self.ended.append(timeout)

    def check_admission(self, *_: Any) -> None:
        pass


@pytest.fixture(autouse=True)
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Warnings."""
    lines: list[str] = []
    monkeypatch.setattr(drain, "LOOK_S", 0.005)
    monkeypatch.setattr(drain.logger, "warning", lambda text, *args: lines.append(text % args))
    return lines


def test_answers_that_come_in_time(told: list[str]) -> None:
    engine = Shared()
    threading.Timer(0.05, engine.answered.clear).start()
    engine.shutdown(timeout=60)
    assert engine.ended == [60]
    assert not told
    with pytest.raises(RetryableRequestError, match=drain.SHUTTING_DOWN):
        engine.check_admission()


def test_a_drain_that_outlasts_its_timeout(monkeypatch: pytest.MonkeyPatch, told: list[str]) -> None:
    """What is left is given up before the parent kills the process, and the log says how much that was."""
    monkeypatch.setattr(drain, "MARGIN_S", 0.9)
    engine, began = Shared(), time.monotonic()
    engine.shutdown(timeout=1)
    assert 0.1 <= time.monotonic() - began < 0.9
    assert engine.ended == [1]
    assert told == ["2 requests were not finished in the 1 s of shutdown_timeout"]


def test_without_a_timeout_it_ends_as_it_did(told: list[str]) -> None:
    engine = Shared(timeout=0)
    engine.shutdown(timeout=1)
    assert engine.ended == [1]
    engine.check_admission()
    assert not told


def test_an_engine_of_its_own_finishes_by_itself(told: list[str]) -> None:
    """It is stopped at once; between its end and the HTTP server's nobody is told of a dead engine."""
    engine, began = Shared(owner=True), time.monotonic()
    engine.shutdown(timeout=60)
    assert time.monotonic() - began < 1
    assert engine.ended == [60]
    assert not told
    with pytest.raises(RetryableRequestError, match=drain.SHUTTING_DOWN):
        engine.check_admission()
