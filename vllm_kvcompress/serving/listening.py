"""How one API process of several stops to accept connections from the socket that they share.

vLLM's servers (``launchers/launcher.py``, ``NoSignalServer``) accept from one socket, the least loaded first.
Their parent holds it too, for seconds after the last of them, until the engine has ended: whoever is in its
queue then waits all that time and is reset.
"""

import asyncio
import inspect
import socket
import time
from collections.abc import Container
from contextlib import suppress
from typing import Any

LOOK_S = 0.05  # between two looks at connections
_NOT_ACCEPTING = 2**31 - 1  # vLLM's word for it, in the loads that the processes share


class Listening:
    """One process's part of the shared socket.

    Parameters
    ----------
    server : NoSignalServer or None
        vLLM's. One that is alone has no ``peer_loads``: its socket is left as it is.
    """

    def __init__(self, server: Any) -> None:
        self._server = server

    def leave(self, gone: Container[int], within_s: float) -> None:
        """Accept nothing from now on; wait for requests on connections accepted last. Not on the event loop.

        Parameters
        ----------
        gone : container of int
            Indexes of API processes that have died, and so did not say that they left.
        within_s : float
            How long is waited. Requests that are answered now are not waited for.
        """
        before = self._requests
        deadline = time.monotonic() + within_s
        if acceptors := self._acceptors:
            stopped = asyncio.run_coroutine_threadsafe(self._stop(gone), next(iter(acceptors)).get_loop())
            with suppress(TimeoutError):  # a loop that has so much to do ends with the process
                stopped.result(within_s)
        while (self._is_connecting or self._requests - before) and time.monotonic() < deadline:
            time.sleep(LOOK_S)

    @property
    def _acceptors(self) -> "dict[asyncio.Task[None], socket.socket]":
        """vLLM's tasks that accept, and from what; not those that connect what was accepted."""
        tasks = tuple(getattr(self._server, "_accept_tasks", ()))
        accept = getattr(getattr(type(self._server), "_accept", None), "__code__", None)
        found = {}
        for task in tasks:
            routine = task.get_coro()
            if getattr(routine, "cr_code", None) is accept:
                found[task] = inspect.getcoroutinelocals(routine).get("sock")
        return {task: listening for task, listening in found.items() if listening is not None}  # else ended

    async def _stop(self, gone: Container[int]) -> None:
        loads, index = self._server.peer_loads
        loads[index] = _NOT_ACCEPTING
        # vLLM writes the load after every connection: from now on where nobody reads it.
        self._server.peer_loads = ([_NOT_ACCEPTING] * len(loads), index)
        is_last = all(load == _NOT_ACCEPTING or other in gone for other, load in enumerate(loads))
        for task, listening in self._acceptors.items():
            task.cancel()
            if is_last:
                self._close(listening)

    def _close(self, listening: socket.socket) -> None:
        """Take all that are in the queue; refuse whoever comes later, at once."""
        with suppress(OSError):  # the queue is empty, or another process has just done this
            while True:
                connection, _ = listening.accept()
                self._server._connecting += 1
                self._server._track(self._server._connect(asyncio.get_running_loop(), connection))
        with suppress(OSError):
            listening.shutdown(socket.SHUT_RDWR)

    @property
    def _requests(self) -> frozenset[Any]:
        return frozenset() if self._server is None else frozenset(self._server.server_state.tasks)

    @property
    def _is_connecting(self) -> bool:
        """Whether a connection has not sent its first request."""
        if (server := self._server) is None:
            return False
        connections = tuple(server.server_state.connections)
        return bool(getattr(server, "_connecting", 0)) or any(
            getattr(connection, "cycle", connection) is None for connection in connections
        )
