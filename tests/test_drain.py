"""An API process that shares its engine ends: it waits for its answers, but not for ever."""

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
        drain.SharedDrain(self, self.state)  # type: ignore[arg-type]

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


@pytest.mark.parametrize(
    "engine", [Shared(owner=True), Shared(timeout=0)], ids=["its own engine", "no timeout"]
)
def test_others_end_as_they_did(engine: Shared, told: list[str]) -> None:
    engine.shutdown(timeout=1)
    assert engine.ended == [1]
    engine.check_admission()
    assert not told
