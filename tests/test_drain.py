"""An API process drains: it refuses who comes late; one that shares its engine waits, but not for ever."""

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import httpx
import psutil
import pytest
import uvicorn
import vllm.plugins
from starlette.datastructures import State
from vllm.entrypoints.launchers import launcher
from vllm.entrypoints.launchers.launcher import NoSignalServer
from vllm.exceptions import RetryableRequestError
from vllm.v1.engine.exceptions import EngineDeadError

from vllm_kvcompress import plugin
from vllm_kvcompress.patches import images_route
from vllm_kvcompress.serving import drain
from vllm_kvcompress.serving.siblings import Siblings


class Shared:
    """As much of an engine client, and of the launcher's server, as a drain looks at."""

    def __init__(self, owner: bool = False, timeout: int = 60) -> None:
        manager = object() if owner else None
        self.engine_core = SimpleNamespace(resources=SimpleNamespace(engine_manager=manager))
        self.vllm_config = SimpleNamespace(shutdown_timeout=timeout)
        self.ended: list[float | None] = []
        self.state, self.answered = State(), {"one", "two"}
        self.headers: list[Any] = []
        self.state.server = SimpleNamespace(
            server_state=SimpleNamespace(
                tasks=self.answered, default_headers=self.headers, connections=set()
            ),
            config=SimpleNamespace(encoded_headers=[]),
        )
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
    monkeypatch.setattr(drain, "LEAVE_S", 0.01)
    for level in ("warning", "error"):
        monkeypatch.setattr(drain.logger, level, lambda text, *args: lines.append(text % args))
    return lines


@pytest.fixture(autouse=True)
def siblings(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The other processes of the server: all there."""
    found = SimpleNamespace(engine_is_gone=False, anybody_is_gone=False, servers_gone=set())
    monkeypatch.setattr(drain, "Siblings", lambda: found)
    return found


def test_answers_that_come_in_time(told: list[str]) -> None:
    engine = Shared()
    threading.Timer(0.05, engine.answered.clear).start()
    engine.shutdown(timeout=60)
    assert engine.ended == [60]
    assert not told
    assert engine.headers == [(b"connection", b"close")]
    with pytest.raises(RetryableRequestError, match=drain.SHUTTING_DOWN):
        engine.check_admission()


async def app(scope: Any, receive: Any, send: Any) -> None:
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 503, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body", "body": b""})


@contextlib.asynccontextmanager
async def serving(engine: Shared, loads: list[int]) -> AsyncIterator[str]:
    """vLLM's server of the first process of two."""
    listening = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(app, lifespan="off", log_level="critical")
    engine.state.server = server = NoSignalServer(config, peer_loads=(loads, 0))
    task = asyncio.create_task(server.serve(sockets=[listening]))
    while not server.started:
        await asyncio.sleep(0.01)
    yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    server.should_exit = True
    await task


async def test_an_idle_process_leaves_new_connections_to_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it has accepted is answered, and closed."""
    monkeypatch.setattr(drain, "LEAVE_S", 0.4)
    engine, loads = Shared(), [0, 5]
    async with serving(engine, loads) as url, httpx.AsyncClient(base_url=url, timeout=0.5) as client:
        assert "connection" not in (await client.get("/")).headers
        # One that has connected and not asked yet.
        reader, writer = await asyncio.open_connection(*url.removeprefix("http://").split(":"))
        await asyncio.sleep(0.05)
        ended = asyncio.create_task(asyncio.to_thread(engine.shutdown, 60))
        await asyncio.sleep(0.1)
        assert loads[0] > 2**30  # the other process does not leave connections to this one
        assert (await client.get("/")).headers["connection"] == "close"  # on the first one's
        assert not ended.done()
        writer.write(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
        assert (await reader.readline()).startswith(b"HTTP/1.1 503")
        await asyncio.wait_for(ended, 0.2)
        writer.close()
        with pytest.raises(httpx.ReadTimeout):  # it waits for another process to accept it
            await client.get("/")


@pytest.mark.parametrize("dead", [False, True])
async def test_the_last_process_answers_the_queue_and_closes_the_socket(
    monkeypatch: pytest.MonkeyPatch, siblings: SimpleNamespace, dead: bool
) -> None:
    """Its parent holds the socket for seconds: nobody may wait in its queue, and be reset."""
    monkeypatch.setattr(drain, "LEAVE_S", 1)
    engine, loads = Shared(), [0, 0 if dead else 2**31 - 1]
    siblings.servers_gone, siblings.anybody_is_gone = ({1}, True) if dead else (set(), False)
    async with serving(engine, loads) as url, httpx.AsyncClient(base_url=url, timeout=5) as client:
        server, held = engine.state.server, asyncio.Event()
        publish = server._publish_load

        def ending() -> None:  # at the moment when a connection is accepted
            if server._connecting and not held.is_set():
                held.set()
                threading.Thread(target=engine.shutdown, args=(60,)).start()
                time.sleep(0.1)
            publish()

        monkeypatch.setattr(server, "_publish_load", ending)
        asked = [asyncio.to_thread(httpx.get, url, timeout=5) for _ in range(8)]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        # Each is answered, or refused at once: nobody is reset.
        assert {getattr(one, "status_code", type(one)) for one in answers} <= {503, httpx.ConnectError}
        assert any(isinstance(one, httpx.Response) for one in answers)
        with pytest.raises(httpx.ConnectError):
            await client.get("/")
    assert engine.ended == [60]


def test_a_crash_is_not_waited_for(siblings: SimpleNamespace, told: list[str]) -> None:
    """The parent's signal leaves five seconds."""
    siblings.anybody_is_gone = True
    engine, began = Shared(), time.monotonic()
    engine.shutdown(timeout=60)
    assert time.monotonic() - began < 1
    assert engine.ended == [60]
    assert told == ["A process of this server has died: its requests are not waited for"]


def test_an_engine_that_dies_while_it_drains(
    siblings: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, told: list[str]
) -> None:
    """What it said last may be on its way."""
    monkeypatch.setattr(drain, "GONE_S", 0.2)
    engine, began = Shared(), time.monotonic()
    threading.Timer(0.05, setattr, (siblings, "engine_is_gone", True)).start()
    engine.shutdown(timeout=60)
    assert 0.2 <= time.monotonic() - began < 2
    assert engine.ended == [60]
    assert told == ["2 requests were not finished in the 60 s of shutdown_timeout"]


TITLED = "import setproctitle, time; setproctitle.setproctitle('VLLM::{}'); print(flush=True); time.sleep(60)"


def test_siblings_are_processes_of_one_parent() -> None:
    """Of which some have ended, known to their parent or not yet."""
    children = []
    for title in ("EngineCore_DP0", "APIServer_1", "DPCoordinator"):
        command = [sys.executable, "-c", TITLED.format(title)]
        children.append(subprocess.Popen(command, stdout=subprocess.PIPE))
    try:
        for child in children:
            assert child.stdout is not None
            child.stdout.readline()  # it has its title
        engine, server, coordinator = children
        found = Siblings(psutil.Process())
        coordinator.kill()
        coordinator.wait()
        assert (found.engine_is_gone, found.anybody_is_gone) == (False, False)
        server.kill()
        os.waitid(os.P_PID, server.pid, os.WEXITED | os.WNOWAIT)
        assert (found.engine_is_gone, found.servers_gone, found.anybody_is_gone) == (False, {1}, True)
        engine.kill()
        engine.wait()
        assert (found.engine_is_gone, found.anybody_is_gone) == (True, True)
    finally:
        for child in children:
            child.kill()
            child.wait()


def test_a_sibling_that_is_ending_is_gone() -> None:
    """Its parent hears of a kill before it is a zombie: its memory, and its command line, are gone."""
    ending = SimpleNamespace(pid=0, is_running=lambda: True, status=lambda: psutil.STATUS_RUNNING)
    ending.cmdline = lambda: ["VLLM::APIServer_1"]
    found = Siblings(SimpleNamespace(children=lambda: [ending]))  # type: ignore[arg-type]
    assert not found.anybody_is_gone
    ending.cmdline = list
    assert found.anybody_is_gone


@pytest.mark.parametrize("ended", [psutil.ZombieProcess(7), psutil.NoSuchProcess(7)])
def test_who_else_has_the_port_may_end(ended: psutil.Error, monkeypatch: pytest.MonkeyPatch) -> None:
    """A forked engine, or another API server: the launcher asks it for its command line."""

    class Ending(psutil.Process):
        asked = 0

        def name(self) -> str:  # psutil asks for the command line itself where a name is long
            return "vllm"

        def cmdline(self) -> list[str]:
            self.asked += 1
            if self.asked > 1:
                raise ended
            return ["vllm"]

    process = Ending(os.getpid())
    monkeypatch.setattr(launcher, "find_process_using_port", {80: process, 81: None}.get)
    monkeypatch.setattr(images_route, "_served", True)
    plugin.register()
    for _ in range(2):
        [_endpoint] = vllm.plugins.load_endpoint_plugins(("generate",))
    found = launcher.find_process_using_port(80)
    assert found.cmdline() == found.cmdline() == ["vllm"]
    assert str(found) == str(process)
    assert launcher.find_process_using_port(80) is None
    assert launcher.find_process_using_port(81) is None


@pytest.mark.parametrize(("margin", "waits"), [(0.3, 0.7), (0.9, 0.5)])
def test_a_drain_that_outlasts_its_timeout(
    margin: float, waits: float, monkeypatch: pytest.MonkeyPatch, told: list[str]
) -> None:
    """What is left is given up before the parent kills the process, and the log says how much that was."""
    monkeypatch.setattr(drain, "MARGIN_S", margin)
    engine, began = Shared(), time.monotonic()
    engine.shutdown(timeout=1)
    assert waits <= time.monotonic() - began < 0.95
    again = time.monotonic()
    engine.shutdown(timeout=1)  # on the event loop, which has answers to send
    assert time.monotonic() - again < 0.2
    assert engine.ended == [1, 1]
    assert told == ["2 requests were not finished in the 1 s of shutdown_timeout"]


def test_without_a_timeout_it_ends_as_it_did(told: list[str]) -> None:
    engine = Shared(timeout=0)
    engine.shutdown(timeout=1)
    assert engine.ended == [1]
    engine.check_admission()
    assert not told


def test_an_engine_of_its_own_finishes_by_itself(told: list[str]) -> None:
    """It is stopped at once, and its client refuses until the HTTP server ends (of texts: while it lives)."""
    engine, began = Shared(owner=True), time.monotonic()
    engine.shutdown(timeout=60)
    assert time.monotonic() - began < 1
    assert engine.ended == [60]
    assert not told
    with pytest.raises(RetryableRequestError, match=drain.SHUTTING_DOWN):
        engine.check_admission()


async def test_who_waits_for_an_engine_that_was_stopped_is_told() -> None:
    """vLLM cancels what hands answers out, and says nothing; it does so in a thread of the launcher's."""
    engine, waits = Shared(owner=True, timeout=0), asyncio.get_running_loop().create_future()
    engine.output_processor = SimpleNamespace(propagate_error=waits.set_result)  # type: ignore[attr-defined]
    engine.output_handler = asyncio.create_task(asyncio.sleep(60))  # type: ignore[attr-defined]
    calls = [asyncio.get_running_loop().create_future() for _ in range(2)]
    calls[0].set_result("answered")
    engine.engine_core.utility_results = dict(enumerate(calls))
    await asyncio.to_thread(engine.shutdown, 0)
    told = await asyncio.wait_for(waits, 1)
    assert (str(told), told.http_status) == (drain.SHUTTING_DOWN, 503)
    with pytest.raises(EngineDeadError):  # a call to the workers
        await asyncio.wait_for(calls[1], 1)
    with pytest.raises(asyncio.CancelledError):  # it would log the end of its engine as a death
        await asyncio.wait_for(engine.output_handler, 1)  # type: ignore[attr-defined]


@pytest.mark.parametrize("is_late", [False, True])
async def test_an_engine_of_its_own_reads_first_what_it_was_sent(
    is_late: bool, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It aborts what it reads after it was told to end; one that does not answer is told all the same."""
    monkeypatch.setattr(drain, "TAKE_S", 0.2)
    engine, asked = Shared(owner=True), []
    engine.output_handler = asyncio.create_task(asyncio.sleep(60))  # type: ignore[attr-defined]
    engine.output_processor = SimpleNamespace(  # type: ignore[attr-defined]
        propagate_error=lambda error: None, has_unfinished_requests=lambda: False
    )

    async def call(name: str) -> list[bool]:
        assert not engine.ended
        assert drain.is_draining(engine)  # type: ignore[arg-type]
        asked.append(name)
        await asyncio.sleep(60 if is_late else 0.05)
        return [False]

    engine.engine_core.call_utility_all_async = call
    await asyncio.to_thread(engine.shutdown, 60)
    engine.output_handler.cancel()  # type: ignore[attr-defined]
    assert asked == ["is_sleeping"]
    [left] = engine.ended
    assert left is not None
    assert left <= (59.8 if is_late else 59.95)
    assert len(told) == is_late


@pytest.mark.parametrize(
    ("code", "lasts", "waits", "says_so", "crashed"),
    [(-9, 0, True, False, True), (1, 0, True, False, True), (0, 0, True, False, False),
     (-9, 0.2, True, False, False), (-6, 0, False, False, False), (1, 0, False, True, True)],
)  # fmt: skip
def test_an_engine_of_its_own_that_dies_while_it_drains(
    code: int, lasts: float, waits: bool, says_so: bool, crashed: bool, told: list[str]
) -> None:
    """Its process fails before all are answered, and before its time is over, when vLLM kills it."""
    engine, heard = Shared(owner=True), []
    del engine.shutdown  # the class's
    ended: dict[str, int] = {}
    engine.engine_core.resources.engine_manager = SimpleNamespace(finished_procs=lambda: ended)
    processor = SimpleNamespace(has_unfinished_requests=lambda: waits, propagate_error=lambda error: None)
    engine.output_processor = processor  # type: ignore[attr-defined]
    loop = SimpleNamespace(call_soon_threadsafe=lambda tell: tell())
    engine.output_handler = SimpleNamespace(  # type: ignore[attr-defined]
        done=lambda: says_so, cancelled=lambda: False, get_loop=lambda: loop
    )

    def shutdown(timeout: float | None = None) -> None:
        time.sleep(lasts)
        ended["EngineCore"] = code

    engine.shutdown = shutdown  # type: ignore[method-assign]
    drain.Drain(engine, engine.state, lambda: heard.append(True))  # type: ignore[arg-type]
    engine.shutdown(timeout=0.1)
    assert bool(heard) == crashed == bool(told)


def test_a_dead_engine_whose_process_outlives_the_server() -> None:
    """Its clients are told, which ends the HTTP server: the engine is stopped again, and still there."""
    engine, heard, ends = Shared(owner=True), [], threading.Event()
    del engine.shutdown  # the class's
    engine.engine_core.resources.engine_manager = SimpleNamespace(finished_procs=dict)
    calls = iter((lambda: ends.wait(5), lambda: True))
    engine.shutdown = lambda timeout=None: next(calls)()  # type: ignore[method-assign]
    drain.Drain(engine, engine.state, lambda: heard.append(True))  # type: ignore[arg-type]
    first = threading.Thread(target=engine.shutdown, args=(60,))
    first.start()
    time.sleep(0.05)
    engine.errored = True  # type: ignore[attr-defined]
    engine.shutdown(60)
    assert heard
    ends.set()
    first.join()
