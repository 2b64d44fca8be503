"""An engine that dies: who waits for it is told, and the process says so by its exit status.

vLLM fails what waits for an engine that died by itself, but not the calls to its workers; and nothing that
waits for one that a signal stopped. It exits with status 0 either way.
"""

import asyncio
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.datastructures import State
from vllm import envs

from vllm_kvcompress.log import logger_for

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient

T = TypeVar("T")

LOOK_S = 1.0  # between two looks whether the engine still lives
LAST_WORDS_S = 3.0  # for answers to leave a server whose engine has died
FAILURE = 1  # exit status

logger = logger_for(__name__)


async def unless_dead(engine: "EngineClient", work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``, which waits for the engine.

    ``work`` is stopped, and its clean-up waited for, when the caller is cancelled and when the engine is dead
    at two looks in a row: what it said last may still be on its way at the first.

    Raises
    ------
    EngineDeadError
        After one to two seconds of the engine's death.
    """
    task, looks = asyncio.ensure_future(work), 0
    try:
        while not (await asyncio.wait({task}, timeout=LOOK_S))[0]:
            looks = looks + 1 if engine.errored else 0
            if looks == 2:
                raise engine.dead_error
        return task.result()
    finally:
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


class EngineWatch:
    """Ends the server's process with status 1 when its engine has died by itself.

    vLLM's own watchdog ends it too, with status 0, after which a supervisor may not start it again. Where
    ``VLLM_KEEP_ALIVE_ON_ENGINE_DEATH`` is set, the process is left alone.

    Parameters
    ----------
    engine : EngineClient
        The server's.
    state : State
        The app's; vLLM's launcher puts its HTTP server there.
    """

    def __init__(self, engine: "EngineClient", state: State) -> None:
        self._state = state
        resources = getattr(getattr(engine, "engine_core", None), "resources", None)
        self._manager = getattr(resources, "engine_manager", None)  # of the engine's processes, if ours
        self._said_so = False
        if (listener := getattr(resources, "output_queue_task", None)) is not None:
            listener.add_done_callback(self._listener_ended)
        self._task = asyncio.create_task(self._watch())

    def _listener_ended(self, _: "asyncio.Future[Any]") -> None:
        """vLLM listens to the engine until that says it dies, or is stopped."""
        # It is stopped with the engine, too: who has said by then that it crashed is not contradicted.
        self._said_so |= self._manager is not None and not self._manager.manager_stopped.is_set()

    def crashed(self) -> None:
        """The engine has died, and not because it was stopped. Any thread may say so."""
        self._said_so = True

    async def _watch(self) -> None:
        try:
            while not self._crashed:
                await asyncio.sleep(LOOK_S)
            await self._answers_have_left()
        except asyncio.CancelledError:  # the server has ended before us: vLLM's watchdog
            if not self._crashed:
                raise
        # From a task it ends the event loop, and so the process: cleaned up, with this status.
        logger.error("The engine has died: this server exits with status %d", FAILURE)
        raise SystemExit(FAILURE)

    @property
    def _crashed(self) -> bool:
        """Whether the engine has ended by itself: it said so, or its process failed and nobody stopped it."""
        died = self._said_so or getattr(self._manager, "failed_proc_name", None) is not None
        return died and not envs.VLLM_KEEP_ALIVE_ON_ENGINE_DEATH

    async def _answers_have_left(self) -> None:
        server = getattr(self._state, "server", None)
        if server is None:
            return
        deadline = asyncio.get_running_loop().time() + LAST_WORDS_S
        while server.server_state.tasks and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.1)
        server.force_exit = True  # waits for no client that is left
