"""Patch 6: a server that ends may find that who else has its port ends too."""

import functools
from dataclasses import dataclass
from typing import Any

import psutil


@dataclass(frozen=True)
class PortUser:
    """What the launcher says of such a process, known while that was alive."""

    name: str
    words: list[str]

    def __str__(self) -> str:
        return self.name

    def cmdline(self) -> list[str]:
        """Its command line."""
        return self.words


def apply() -> None:
    """Wrap ``find_process_using_port`` of vllm entrypoints/launchers/launcher.py.

    Called in the server's process. Who has ended before it could be described is nobody.
    """
    from vllm.entrypoints.launchers import launcher

    original: Any = launcher.find_process_using_port
    if getattr(original, "_kvcompress", False):
        return

    @functools.wraps(original)
    def find_process_using_port(port: int) -> PortUser | None:
        try:
            process = original(port)
            return None if process is None else PortUser(str(process), process.cmdline())
        except psutil.Error:
            return None

    find_process_using_port._kvcompress = True  # type: ignore[attr-defined]
    launcher.find_process_using_port = find_process_using_port
