"""``vllm serve`` as a context manager: for the demo, the tests and the benchmarks."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

START_LIMIT_S = 300
_STOP_LIMIT_S = 30


class ServerError(RuntimeError):
    """The server did not come up; the message ends with the end of its log."""


class Server:
    """A ``vllm serve`` process on a free port of this machine.

    Parameters
    ----------
    model : path or str
        Checkpoint to serve.
    log : path
        Where its output goes.
    args : sequence of str
        Further arguments of ``vllm serve``.
    name : str
        The served model's name.
    env : mapping, optional
        Environment variables beside this process's own.
    start : callable
        Starts the process: ``subprocess.Popen``, or what takes and gives the same.
    """

    def __init__(
        self,
        model: str | Path,
        log: Path,
        args: Sequence[str] = (),
        *,
        name: str = "janus",
        env: Mapping[str, str] | None = None,
        start: Callable[..., "subprocess.Popen[bytes]"] = subprocess.Popen,
    ) -> None:
        self._start = start
        self.log, self.name = log, name
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.command = [
            str(Path(sys.executable).with_name("vllm")), "serve", str(model), "--served-model-name", name,
            "--host", "127.0.0.1", "--port", str(self.port), *args,
        ]  # fmt: skip
        self._env = {**os.environ, **(env or {})}
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """The server's root, without a slash at its end."""
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> "Server":
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as out:
            # A session of its own, so that the engine processes can be stopped with it.
            self.process = self._start(
                self.command, stdout=out, stderr=subprocess.STDOUT, env=self._env, start_new_session=True
            )
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _wait(self) -> None:
        assert self.process is not None
        deadline = time.monotonic() + START_LIMIT_S
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=2):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-40:])
        raise ServerError(f"vllm serve did not start; the end of {self.log}:\n{tail}")

    def stop(self) -> None:
        """Stop the server and every process it started."""
        if self.process is None:
            return
        for sign in (signal.SIGINT, signal.SIGKILL):
            try:
                os.killpg(self.process.pid, sign)
                self.process.wait(_STOP_LIMIT_S)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue
        self.process = None
