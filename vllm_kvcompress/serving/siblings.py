"""The engines and API servers beside this process, which one parent has started (``--api-server-count``)."""

import os

import psutil
from vllm import envs

_ENGINE, _SERVER = "EngineCore", "APIServer_"  # vLLM's titles of processes


class Siblings:
    """Those there are now: make it once all have started.

    They are known by vLLM's titles; without ``setproctitle``, and of engines elsewhere, nothing is known.

    Parameters
    ----------
    parent : psutil.Process, optional
        By default this process's.
    """

    def __init__(self, parent: psutil.Process | None = None) -> None:
        try:
            parent = parent or psutil.Process().parent()
            found = [] if parent is None else parent.children()
        except psutil.Error:  # the parent has gone
            found = []
        self._engines = [one for one in found if _title(one).startswith(_ENGINE)]
        self._servers = [
            (one, int(index)) for one in found
            if one.pid != os.getpid() and (index := _title(one).removeprefix(_SERVER)).isdecimal()
        ]  # fmt: skip

    @property
    def engine_is_gone(self) -> bool:
        """Whether one of the engines has ended."""
        return any(map(_is_gone, self._engines))

    @property
    def anybody_is_gone(self) -> bool:
        """Whether an engine or an API server has ended."""
        return self.engine_is_gone or bool(self.servers_gone)

    @property
    def servers_gone(self) -> set[int]:
        """Indexes of the API servers that have ended."""
        return {index for one, index in self._servers if _is_gone(one)}


def _title(process: psutil.Process) -> str:
    """Without the prefix that all of a server have; "" for one of another kind."""
    prefix = f"{envs.VLLM_PROCESS_NAME_PREFIX}::"
    try:
        line = " ".join(process.cmdline()).strip()
    except psutil.Error:
        return ""
    return line.removeprefix(prefix) if line.startswith(prefix) else ""


def _is_gone(process: psutil.Process) -> bool:
    """Whether it has ended, or is about to: its parent may hear of that, and tell us, before it is a zombie.

    Its memory goes before the pipe that its parent listens to, and its command line with it.
    """
    try:
        return not process.is_running() or not process.cmdline()
    except psutil.NoSuchProcess:  # zombies too
        return True
