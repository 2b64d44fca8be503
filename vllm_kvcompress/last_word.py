"""Why a server did not start, as the last line that it prints.

vLLM's own last lines are a link to pydantic's documentation, or that the engine failed, "see above", some
hundred lines up. The reason is kept where it is raised, also in the engine's processes, and printed when the
exception has ended the process that was started.
"""

import atexit
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import parent_process, resource_tracker
from pathlib import Path
from types import TracebackType

TRACKER_S = 3.0
_FILE = "KVCOMPRESS_LAST_WORD"  # environment variable: where processes of one server leave the reason


def listen() -> None:
    """In the process that is started: print the reason last, if an exception ends it.

    Call it before other processes are started, whose reasons are to be heard.
    """
    mine = f"kvcompress-{os.getpid()}-"
    # Another process's is the server's that this one is a part of, or a program's that starts servers.
    if _FILE in os.environ and (parent_process() is not None or mine in os.environ[_FILE]):
        return
    handle, name = tempfile.mkstemp(prefix=mine)
    os.close(handle)
    os.environ[_FILE] = name
    atexit.register(_forget, name, os.getpid())
    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        before(kind, error, trace)
        with suppress(OSError):
            reason = Path(name).read_text()
            if reason and _is_about(error, reason):
                _hear_the_tracker_out()
                print(f"vllm-kvcompress: {reason}", file=sys.stderr, flush=True)

    sys.excepthook = hook


def _hear_the_tracker_out() -> None:
    """Python's tracker of shared memory complains in a process of its own, once this one is gone: now."""
    stop = getattr(resource_tracker._resource_tracker, "_stop", None)  # type: ignore[attr-defined]
    if stop is not None:
        thread = threading.Thread(target=stop, daemon=True)
        thread.start()
        thread.join(TRACKER_S)  # it waits as long as any process of ours lives


def _is_about(error: BaseException, reason: str) -> bool:
    """Whether this is the exception, or vLLM's that the engine did not start; not one of later on."""
    text = " ".join(str(error).split())
    return reason in text or "initialization failed" in text


def _forget(name: str, owner: int) -> None:
    if os.getpid() == owner:  # not a fork of it
        Path(name).unlink(missing_ok=True)
        os.environ.pop(_FILE, None)


def suspect(reason: str) -> None:
    """What is printed last if the engine does not start and nothing better is known."""
    listen()
    with suppress(OSError):
        Path(os.environ[_FILE]).write_text(" ".join(reason.split())[:1000])


@contextmanager
def heard() -> Iterator[None]:
    """A ValueError that leaves this block is a reason, of one line, not to start."""
    try:
        yield
    except ValueError as error:
        if _FILE not in os.environ:
            listen()
        with suppress(OSError):
            Path(os.environ[_FILE]).write_text(" ".join(str(error).split())[:1000])
        raise
