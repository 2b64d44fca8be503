"""The end of a server that drains: who comes late, and what several API processes wait for.

With one API process, vLLM stops the engine, which finishes its pictures while the process listens to it; the
HTTP server goes on for a moment after the engine has ended, and would tell who comes then of a dead engine.
With several (``--api-server-count``), the engine belongs to their parent: on SIGTERM each API process leaves
its clients at once, and only then is the engine stopped (``vllm/entrypoints/cli/serve.py``,
``run_multi_api_server``; ``launchers/launcher.py``, ``handle_shutdown``). The same signal, and five seconds,
are what the others get when an engine or an API process has died.

However it ends, vLLM then cancels the task that hands answers out, and tells nobody who waits for one, or for
a call to the workers.
"""

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from starlette.datastructures import State
from vllm.exceptions import GracefulHTTPError, RetryableRequestError
from vllm.v1.engine.exceptions import EngineDeadError

from vllm_kvcompress.log import logger_for
from vllm_kvcompress.serving.listening import Listening
from vllm_kvcompress.serving.siblings import Siblings

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient

SHUTTING_DOWN = "the server is shutting down: ask again, or another server"
CLOSE = (b"connection", b"close")
LOOK_S = 0.1  # between two looks whether somebody is still answered
TAKE_S = 5.0  # for an engine to take in what was sent before: a step, of which the longest reads prompts
GONE_S = 1.0  # after an engine's end: what it said last is still on its way
LEAVE_S = 1.0  # for requests of connections that this process has just accepted
MARGIN_S = 5.0  # before the parent kills this process, at most half the timeout: who waits is told

logger = logger_for(__name__)


def is_draining(engine: "EngineClient") -> bool:
    """Whether a server that drains was told to end."""
    return getattr(engine, "check_admission", None) is Drain._refuse


class Drain:
    """Refuses new requests from the signal on, with a 503; lets those of before be answered, text's too.

    The engine sees to that where it is this process's own; one that shares its engine waits for its answers
    before it ends, until ``--shutdown-timeout`` is nearly over, or an engine is gone. It does not wait where
    the signal comes of a crash. Without such a timeout nothing is waited for. Who is left without an answer
    is told to ask again.

    Parameters
    ----------
    engine : EngineClient
        The server's; its ``shutdown`` is wrapped.
    state : State
        The app's; vLLM's launcher puts its HTTP server there.
    crashed : callable, optional
        Is called if the engine fails while it drains: vLLM, which has told it to end, does not look.
    """

    def __init__(
        self, engine: "EngineClient", state: State, crashed: Callable[[], None] | None = None
    ) -> None:
        self._engine, self._state, self._crashed = engine, state, crashed
        resources = getattr(getattr(engine, "engine_core", None), "resources", None)
        self._manager = getattr(resources, "engine_manager", None)  # of the engine's processes, if ours
        self._drains = bool(engine.vllm_config.shutdown_timeout)
        is_shared = resources is not None and self._manager is None
        self._siblings = Siblings() if is_shared and self._drains else None
        self._shutdown, self._stops = engine.shutdown, False
        engine.shutdown = self._drained  # type: ignore[method-assign]

    def _drained(self, timeout: float | None = None) -> None:
        """In place of the engine client's ``shutdown``.

        The launcher calls it off the event loop, then the engine's context manager on it: that must not wait.
        """
        was_dead = getattr(self._engine, "errored", False)
        if self._drains and timeout and not is_draining(self._engine):
            self._engine.check_admission = self._refuse  # type: ignore[method-assign]
            self._close_connections()
            if self._siblings is not None:
                try:
                    self._wait(timeout, self._siblings)
                except (
                    Exception
                ):  # of vLLM's insides that `Listening` reads: whatever it is, the engine is stopped
                    logger.exception("A drain has failed; the server ends")
            elif self._manager is not None and not was_dead:
                timeout -= self._wait_taken(min(TAKE_S, timeout / 2))
        elif not was_dead:  # before the engine ends texts as if they were whole
            self._tell_who_waits(then_stop=True)
        # A dead engine ends the HTTP server, and this is called again while it still waits for the process.
        has_failed = was_dead and self._stops
        began, self._stops = time.monotonic(), True
        self._shutdown(timeout=timeout)
        self._stops = has_failed
        # What is still there when its time is over vLLM kills itself.
        has_failed |= not was_dead and time.monotonic() - began < (timeout or 0) and self._has_failed
        if self._drains and timeout and has_failed:
            logger.error("The engine has died while it drained")
            if self._crashed is not None:
                self._crashed()
        if not was_dead:
            self._tell_who_waits()

    def _wait_taken(self, limit: float) -> float:
        """Let the engine take in what it was sent, and give the seconds that this took.

        vLLM's engine aborts what it reads after it was told to end (``vllm/v1/engine/core.py``,
        ``_reject_add_in_shutdown``): a text of the moment before would be answered with no tokens and a 200.
        It reads in turn, so what it answers now stands behind all of that.
        """
        handler: Any = getattr(self._engine, "output_handler", None)
        ask = getattr(getattr(self._engine, "engine_core", None), "call_utility_all_async", None)
        if handler is None or ask is None:  # nobody has asked for anything yet; or another engine client
            return 0
        began = time.monotonic()
        answer = asyncio.run_coroutine_threadsafe(ask("is_sleeping"), handler.get_loop())
        try:
            answer.result(limit)
        except Exception as error:  # late, or of an engine that has just died: it is stopped all the same
            answer.cancel()
            logger.warning("The engine did not answer before it was stopped: %r", error)
        return time.monotonic() - began

    @property
    def _has_failed(self) -> bool:
        """Whether a process of the engine has ended other than it was told to, before all were answered.

        After that a library that stumbles as the process ends takes nothing from anybody. An engine that says
        it has died, of a worker's death say, leaves nobody waiting: who waited has been told.
        """
        handler: Any = getattr(self._engine, "output_handler", None)
        said_so = handler is not None and handler.done() and not handler.cancelled()
        ended: dict[str, int] = getattr(self._manager, "finished_procs", dict)()
        processor: Any = getattr(self._engine, "output_processor", None)
        waits = processor is None or processor.has_unfinished_requests()
        return any(ended.values()) and (waits or said_so)

    def _tell_who_waits(self, then_stop: bool = False) -> None:
        handler: Any = getattr(self._engine, "output_handler", None)  # None until the first request
        if handler is None:
            return
        error = GracefulHTTPError(SHUTTING_DOWN, HTTPStatus.SERVICE_UNAVAILABLE)
        processor: Any = self._engine.output_processor  # type: ignore[attr-defined]
        core: Any = getattr(self._engine, "engine_core", None)

        def tell() -> None:
            processor.propagate_error(error)
            for call in list(getattr(core, "utility_results", {}).values()):
                if not call.done():
                    call.set_exception(EngineDeadError())
            if then_stop:  # vLLM does that when the engine is gone, and logs a dead engine if it looks first
                handler.cancel()

        with suppress(RuntimeError):  # the event loop has ended: nobody is left
            handler.get_loop().call_soon_threadsafe(tell)

    def _wait(self, timeout: float, siblings: Siblings) -> None:
        if siblings.anybody_is_gone:  # those that drain have only just heard of it
            logger.error("A process of this server has died: its requests are not waited for")
            self._leave(siblings)
            return
        deadline = time.monotonic() + max(timeout - MARGIN_S, timeout / 2)
        while (busy := self._busy) and time.monotonic() < deadline:
            time.sleep(LOOK_S)
            if siblings.engine_is_gone:
                deadline = min(deadline, time.monotonic() + GONE_S)
        if busy:
            logger.warning("%d requests were not finished in the %d s of shutdown_timeout", busy, timeout)
        self._leave(siblings)

    def _leave(self, siblings: Siblings) -> None:
        Listening(getattr(self._state, "server", None)).leave(siblings.servers_gone, LEAVE_S)

    def _close_connections(self) -> None:
        """Tell clients with every answer from now on that their connection ends."""
        if (server := getattr(self._state, "server", None)) is not None:
            server.server_state.default_headers.append(CLOSE)
            server.config.encoded_headers.append(CLOSE)  # of which uvicorn makes those anew every second

    @property
    def _busy(self) -> int:
        """Requests that this process still answers."""
        server = getattr(self._state, "server", None)
        return 0 if server is None else len(server.server_state.tasks)

    @staticmethod
    def _refuse(*_: Any, **__: Any) -> None:
        raise RetryableRequestError(SHUTTING_DOWN)
