"""The end of a server of several API processes, which vLLM does not make wait (``--api-server-count``).

With one API process, vLLM stops the engine, which finishes its pictures while the process listens to it.
With several, the engine belongs to their parent: on SIGTERM each API process leaves its clients at once, and
only then is the engine stopped (``vllm/entrypoints/cli/serve.py``, ``run_multi_api_server``;
``launchers/launcher.py``, ``handle_shutdown``).
"""

import time
from typing import TYPE_CHECKING, Any

from starlette.datastructures import State
from vllm.exceptions import RetryableRequestError

from vllm_kvcompress.log import logger_for

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient

SHUTTING_DOWN = "the server is shutting down: ask again, or another server"
LOOK_S = 0.1  # between two looks whether somebody is still answered
MARGIN_S = 2.0  # before the parent kills this process: answers leave

logger = logger_for(__name__)


class SharedDrain:
    """Lets an API process that shares its engine finish its answers before it ends, text's too.

    From the signal on new requests get a 503; those of before are answered, until ``--shutdown-timeout`` is
    nearly over. Nothing is changed where there is no such timeout, or where the engine is this process's own.

    Parameters
    ----------
    engine : EngineClient
        The server's; its ``shutdown`` is wrapped.
    state : State
        The app's; vLLM's launcher puts its HTTP server there.
    """

    def __init__(self, engine: "EngineClient", state: State) -> None:
        self._engine, self._state = engine, state
        resources = getattr(getattr(engine, "engine_core", None), "resources", None)
        owner = resources is None or resources.engine_manager is not None
        if owner or not engine.vllm_config.shutdown_timeout:
            return
        self._shutdown = engine.shutdown
        engine.shutdown = self._drained  # type: ignore[method-assign]

    def _drained(self, timeout: float | None = None) -> None:
        """In place of the engine client's ``shutdown``; the launcher calls it off the event loop."""
        if timeout:
            self._engine.check_admission = self._refuse  # type: ignore[method-assign]
            deadline = time.monotonic() + max(timeout - MARGIN_S, 0)
            while (busy := self._busy) and time.monotonic() < deadline:
                time.sleep(LOOK_S)
            if busy:
                logger.warning("%d requests were not finished in the %d s of shutdown_timeout", busy, timeout)
        self._shutdown(timeout=timeout)

    @property
    def _busy(self) -> int:
        """Requests that this process still answers."""
        server = getattr(self._state, "server", None)
        return 0 if server is None else len(server.server_state.tasks)

    @staticmethod
    def _refuse(*_: Any, **__: Any) -> None:
        raise RetryableRequestError(SHUTTING_DOWN)
