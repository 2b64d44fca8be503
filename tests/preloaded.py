"""Commands that start in a process which has imported vLLM already: nine seconds of a core less for each.

``multiprocessing``'s fork server imports vLLM once; the child becomes what the command says, and what it
starts in its turn is forked, or comes from the same fork server. No plugin was loaded in it, no environment
variable read that the command may change, but ``TRITON_INTERPRET``: processes that have it come from a server
of their own, whose Triton interprets (engine_process.V2). Some tests of how a process starts or ends, and of
what users install, start theirs anew (test_compressed_server, test_wheel, test_last_word).
"""

import atexit
import gc
import importlib
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import forkserver, get_context
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import IO, Any
from unittest import mock

import setproctitle
from interpreter import fork_if_asked, inspect_here

_COMMANDS = {
    str(Path(sys.executable).with_name(name)): main
    for name, main in (("vllm", "vllm.entrypoints.cli.main"), ("vllm-kvcompress", "vllm_kvcompress.cli"))
}
_ADDRESS = ("_forkserver_address", "_forkserver_authkey")  # the latter since Python 3.14
_forks = get_context("forkserver")
_forks.set_forkserver_preload(["vllm.entrypoints.llm", "vllm.entrypoints.openai.api_server"])
_interpreting = forkserver.ForkServer()
_interpreting.set_forkserver_preload(["vllm.entrypoints.llm"])


class Popen:
    """What the tests use of ``subprocess.Popen``.

    Parameters
    ----------
    command : sequence of str
        ``vllm ...``, ``vllm-kvcompress ...``, or this Python with a script or ``-c CODE``.
    stdout, stderr : file
        Files on the disk; ``subprocess.STDOUT`` for one.
    forked : bool
        Fork the API servers of ``--api-server-count`` too, which vLLM spawns: ten seconds of a core less for
        each.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        stdout: IO[bytes],
        stderr: int | IO[bytes] = subprocess.STDOUT,
        env: Mapping[str, str] | None = None,
        cwd: str | Path | None = None,
        start_new_session: bool = False,
        forked: bool = False,
    ) -> None:
        files = [stdout.name, stdout.name if isinstance(stderr, int) else stderr.name]
        given = dict(os.environ if env is None else env)
        place = given, str(cwd or Path.cwd())
        server = _server(given)
        address = {name: getattr(server, name, None) for name in _ADDRESS}
        words = [str(word) for word in command]
        self._process = _forks.Process(
            target=_become, args=(words, files, place, address, forked), daemon=False
        )
        with mock.patch.object(forkserver, "connect_to_new_process", server.connect_to_new_process):
            self._process.start()
        self.args, self.pid = command, self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()


def run(
    command: Sequence[str],
    cwd: str | Path | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float = 500,
) -> "subprocess.CompletedProcess[str]":
    """``subprocess.run`` with both streams as text."""
    with tempfile.NamedTemporaryFile() as out, tempfile.NamedTemporaryFile() as err:
        process = Popen(command, stdout=out, stderr=err, env=env, cwd=cwd)  # type: ignore[arg-type]
        try:
            code = process.wait(timeout)
        finally:
            process.kill()
        texts = [Path(file.name).read_text(errors="replace") for file in (out, err)]
        return subprocess.CompletedProcess(command, code, *texts)


def _server(env: Mapping[str, str]) -> forkserver.ForkServer:
    """The fork server for processes of this environment, running."""
    if env.get("TRITON_INTERPRET") != "1":
        forkserver.ensure_running()
        return forkserver._forkserver
    with mock.patch.dict(os.environ, env):  # read at the import of Triton, and of vLLM
        _interpreting.ensure_running()
    return _interpreting


def _become(
    command: list[str],
    files: list[str],
    place: tuple[dict[str, str], str],
    address: dict[str, Any],
    forked: bool,
) -> None:
    gc.freeze()  # or every collection, of which vLLM makes many, looks through all of vLLM
    setproctitle.getproctitle()  # it finds its place by the environment that the process began with
    os.setsid()
    _move(*place)
    sys.path[:0] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))  # else its parent's alone
    for stream, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT), stream)
    _start_alike(address, forked)
    inspect_here()
    fork_if_asked()
    from vllm.logger import _configure_vllm_root_logger

    _configure_vllm_root_logger()  # the environment may want another level
    try:
        _run(command)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        atexit._run_exitfuncs()


def _move(env: dict[str, str], cwd: str) -> None:
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)


def _start_alike(address: dict[str, Any], forked: bool) -> None:
    """Let the fork server that this process came from be the one that it starts others by."""
    server, given = forkserver._forkserver, multiprocessing.get_context
    vars(server).update(address)
    server.ensure_running = lambda: None
    alike = {"forkserver": _Alike()} | ({"spawn": given("fork")} if forked else {})
    multiprocessing.get_context = lambda method=None: alike.get(method) or given(method)
    _count_together()
    if forked:
        os.register_at_fork(after_in_child=_count_together)


def _count_together() -> None:
    """Let metrics be those of several processes, if they are to: prometheus_client asks at its import."""
    if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
        from prometheus_client import values

        values.ValueClass = values.get_value_class()


class _Alike(ForkServerContext):
    """Processes that find themselves where their parent is, as those of a fork server of its own would."""

    def Process(self, target: Callable[..., Any], **more: Any) -> Any:
        return super().Process(target=_Placed(target, (dict(os.environ), str(Path.cwd()))), **more)

    def set_forkserver_preload(self, module_names: list[str]) -> None:
        """It has loaded what it is to load."""


class _Placed:
    def __init__(self, target: Callable[..., Any], place: tuple[dict[str, str], str]) -> None:
        self.target, self.place = target, place

    def __call__(self, *args: Any, **more: Any) -> Any:
        gc.freeze()
        _move(*self.place)
        return self.target(*args, **more)


def _run(command: list[str]) -> Any:
    program, *rest = command
    if program in _COMMANDS:
        sys.argv = command
        return importlib.import_module(_COMMANDS[program]).main()
    assert program == sys.executable, command
    if rest[0] == "-c":
        sys.argv = ["-c", *rest[2:]]
        return exec(compile(rest[1], "<string>", "exec"), {"__name__": "__main__"})
    sys.argv = rest
    return runpy.run_path(rest[0], run_name="__main__")
