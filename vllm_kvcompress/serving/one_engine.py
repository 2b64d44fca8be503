"""Worker calls that one engine has to answer, of the several that a data-parallel front end has."""

from collections.abc import Awaitable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient


class OneEngine:
    """Calls workers by name, each time those of the next engine.

    vLLM's own ``collective_rpc`` asks the workers of all engines and returns what the first one's say.

    Parameters
    ----------
    client : EngineClient
        The front end's.
    """

    def __init__(self, client: "EngineClient") -> None:
        self._client = client
        self._calls = 0

    @property
    def engines(self) -> int:
        """How many there are."""
        core: Any = getattr(self._client, "engine_core", None)
        return max(1, len(getattr(core, "core_engines", ())))

    def call(self, method: str, args: tuple[Any, ...]) -> Awaitable[list[Any]]:
        """What that engine's workers answer, one value a rank."""
        core: Any = getattr(self._client, "engine_core", None)
        engines = getattr(core, "core_engines", ())  # read anew: it changes where engines come and go
        if len(engines) < 2:
            return self._client.collective_rpc(method, args=args)
        engine = engines[self._calls % len(engines)]
        self._calls += 1
        return core._call_utility_async("collective_rpc", method, None, args, None, engine=engine)
