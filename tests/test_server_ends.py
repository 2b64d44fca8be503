"""How a real server ends: drained, stopped, its engine or worker killed, with clients of every kind waiting.

Nobody is left hanging, what was drawn is answered, and the exit status says whether it was meant to end.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import httpx
import preloaded
import psutil
import pytest
from crowd import MIXED, WORDS, Crowd, Told, Writer, ask, wait_taken

from vllm_kvcompress.serving.drain import SHUTTING_DOWN
from vllm_kvcompress.testing.server import Server

ARGS = (
    *("--dtype", "float32", "--max-model-len", "128", "--max-num-seqs", "2", "--enforce-eager"),
    *("--kv-cache-memory-bytes", str(8 << 20)),
)
COMPRESSED = ("--attention-backend", "kvcompress")
CLEAN_S = 5  # after a crash everybody knows


@pytest.fixture(scope="module")
def start(
    checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, measured_cache: str
) -> Callable[..., Server]:
    """A server on a cache directory that others have, too: no calibration of its own."""
    folder = tmp_path_factory.mktemp("ends")

    def server(name: str, *args: str) -> Server:
        # One thread for the engine and for the front end, which draws pixels after it: the same roundings.
        env = {
            "VLLM_CACHE_ROOT": measured_cache,
            "OMP_NUM_THREADS": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        }
        begin = partial(preloaded.Popen, forked=True)
        return Server(checkpoints["gqa-hf"], folder / f"{name}.log", (*ARGS, *args), env=env, start=begin)

    return server


@contextmanager
def crowded(server: Server) -> Iterator[tuple[Crowd, list[Told], psutil.Process]]:
    """Clients in the midst of things, what they were told in peace, and the server's process."""
    with server:
        assert server.process is not None
        process = psutil.Process(server.process.pid)
        before = Crowd(server.url, MIXED).wait()
        assert all(told.whole for told in before)
        with held(process):
            crowd = Crowd(server.url, MIXED * 2)
            crowd.wait_sent()
        crowd.wait_heard()
        assert crowd.unanswered
        yield crowd, before * 2, process


@contextmanager
def held(process: psutil.Process) -> Iterator[None]:
    """The server's engine draws nothing meanwhile: on a quiet machine it may be done before we are."""
    engine = child(process, "VLLM::EngineCore")
    engine.suspend()
    try:
        yield
    finally:
        engine.resume()


def child(process: psutil.Process, name: str) -> psutil.Process:
    """The process of that name (vLLM's titles) below the server's."""
    [found] = [one for one in process.children(recursive=True) if name in " ".join(one.cmdline())]
    return found


def exit_status(server: Server) -> int:
    assert server.process is not None
    return server.process.wait(30)


def test_a_drain_finishes_and_answers_every_picture(start: Callable[..., Server]) -> None:
    """With the full cache; compressed ones drain in test_server_states and test_data_parallel."""
    server = start("drain", "--shutdown-timeout", "60")
    with crowded(server) as (crowd, before, process):
        with held(process):
            words = Writer(server.url)
            wait_taken(server.url)
            os.kill(process.pid, signal.SIGTERM)
            time.sleep(0.3)
            late = ask(server.url, seed=1)
        assert late.status == 503, late
        assert "shutting down" in (late.error or "")
        told = crowd.wait()
        assert [one.pictures for one in told] == [one.pictures for one in before]
        assert all(one.whole for one in told)
        assert sum(one.partials for one in told)
        assert words.wait() == WORDS
        assert exit_status(server) == 0
    log = server.log.read_text()
    assert log.count("this process does") <= 1, "not for each picture; none, where the engine decoded all"
    assert "could not be decoded" not in log


@pytest.mark.parametrize("servers", ["2"])  # one: tests/soak/soak_ends.py
def test_a_drain_that_is_over_before_its_pictures(start: Callable[..., Server], servers: str) -> None:
    """3,456 steps, one picture at a time, and four seconds: who is not answered is told to ask again."""
    limit = 4
    slow = ("--max-num-seqs", "1", "--additional-config", '{"kvcompress": {"window": 1}}')
    with start(
        f"late-{servers}", *slow, "--api-server-count", servers, "--shutdown-timeout", f"{limit}"
    ) as server:
        crowd = Crowd(server.url, MIXED * 2)
        crowd.wait_sent()
        time.sleep(0.3)
        assert server.process is not None
        with held(psutil.Process(server.process.pid)):
            os.kill(server.process.pid, signal.SIGTERM)
            asked = time.monotonic()
            time.sleep(limit / 2)  # whatever the machine, it has no time for all of them
        for one in crowd.wait():
            assert one.clean, one
            assert one.ended - asked < limit + CLEAN_S, one
        assert sum(one.error == SHUTTING_DOWN for one in crowd.told) > 2
        assert exit_status(server) == 0


@pytest.mark.parametrize("name", ["EngineCore", "Worker"])
def test_a_crash_is_told_to_everybody(start: Callable[..., Server], name: str) -> None:
    server = start(name, *COMPRESSED)
    with crowded(server) as (crowd, before, process):
        child(process, f"VLLM::{name}").kill()
        killed = time.monotonic()
        told_in_time(crowd, before, killed)
        assert exit_status(server) == 1
        assert time.monotonic() - killed < 15
    assert "this server exits with status 1" in server.log.read_text()


def test_a_server_that_is_stopped_leaves_nobody_hanging(start: Callable[..., Server]) -> None:
    server = start("stop", *COMPRESSED)
    with crowded(server) as (crowd, before, process):
        with held(process):
            words = Writer(server.url)
            wait_taken(server.url)
            process.send_signal(signal.SIGTERM)
            stopped = time.monotonic()
        told_in_time(crowd, before, stopped)
        answer = words.hear()  # vLLM's own routes too
        assert answer.get("error", {}).get("message") == SHUTTING_DOWN, answer
        assert time.monotonic() - stopped < CLEAN_S
        assert exit_status(server) == 0


@pytest.mark.parametrize("name", ["APIServer_0"])  # EngineCore: tests/soak/soak_ends.py
def test_a_crash_among_several_api_servers(start: Callable[..., Server], name: str) -> None:
    """All are told to end, as for a drain, but have five seconds: nobody waits for what is gone."""
    server = start(f"several-{name}", "--api-server-count", "2", "--shutdown-timeout", "60")
    with crowded(server) as (crowd, before, process):
        child(process, f"VLLM::{name}").kill()
        killed = time.monotonic()
        told_in_time(crowd, before, killed, may_break=name != "EngineCore")  # the clients of what was killed
        assert any(one.clean for one in crowd.told if one.ended > killed)
        client = httpx.Client(timeout=60)
        asked = time.monotonic()  # the parent still holds the socket
        late = ask(server.url, client=client, seed=1)
        assert late.clean or "refused" in (late.broke or ""), late
        assert late.ended - asked < 1, late
        assert exit_status(server) == 1
        assert time.monotonic() - killed < 15
    log = server.log.read_text()
    assert "A process of this server has died: its requests are not waited for" in log


def told_in_time(crowd: Crowd, before: list[Told], since: float, may_break: bool = False) -> None:
    for one, peaceful in zip(crowd.wait(), before, strict=True):
        assert one.clean or (may_break and one.broke), one
        assert one.ended - since < CLEAN_S, one
        if one.whole:
            assert one.pictures == peaceful.pictures
