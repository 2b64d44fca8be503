"""Ends of servers, again and again: races that one run does not meet, and what ``make test`` leaves out.

By hand: ``make soak``, or ``python -m pytest tests/soak/soak_ends.py``; ``SOAK_ENDS`` is how often.
"""

import os
import signal
import sys
import time as clock
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
import test_server_ends as ends
from test_server_ends import start  # noqa: F401

from vllm_kvcompress.testing.server import Server

TIMES = int(os.environ.get("SOAK_ENDS", "3"))

pytestmark = pytest.mark.parametrize("time", range(TIMES))


@pytest.mark.parametrize("servers", ["1", "2"])
def test_drains_that_are_over(start: Callable[..., Server], servers: str, time: int) -> None:  # noqa: F811
    ends.test_a_drain_that_is_over_before_its_pictures(start, servers)


@pytest.mark.parametrize("name", ["EngineCore", "APIServer_0", "APIServer_1"])
def test_crashes_among_several(start: Callable[..., Server], name: str, time: int) -> None:  # noqa: F811
    ends.test_a_crash_among_several_api_servers(start, name)


def test_stops(start: Callable[..., Server], time: int) -> None:  # noqa: F811
    ends.test_a_server_that_is_stopped_leaves_nobody_hanging(start)


@pytest.mark.parametrize("name", ["EngineCore", "Worker"])
def test_crashes_while_draining(start: Callable[..., Server], name: str, time: int) -> None:  # noqa: F811
    """vLLM has told the engine to end, and does not look how it does."""
    slow = ("--additional-config", '{"kvcompress": {"window": 1}}')
    server = start(f"drained-{name}-{time}", "--shutdown-timeout", "60", *slow)
    with ends.crowded(server) as (crowd, before, process):
        victim = ends.child(process, f"VLLM::{name}")
        process.send_signal(signal.SIGTERM)
        clock.sleep(0.5)
        victim.kill()
        killed = clock.monotonic()
        ends.told_in_time(crowd, before, killed)
        assert ends.exit_status(server) == 1
        assert clock.monotonic() - killed < 15
