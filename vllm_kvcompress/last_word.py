"""Why a server did not start, as the last line that it prints.

vLLM's own last lines are a link to pydantic's documentation, or that the engine failed, "see above", some
hundred lines up. The reason is kept where it is raised, also in the engine's processes, and printed when the
exception has ended the process that was started. Ours are kept as they are raised, vLLM's own as its
processes log them before they end; of what is no ValueError (memory that is not there) the first, and only
where a start fails.
"""

import atexit
import logging
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
_STARTING = "failed to start"  # in what vLLM's engine and workers log then
_FILE = "KVCOMPRESS_LAST_WORD"  # environment variable: where processes of one server leave the reason

_listening = False


def listen() -> None:
    """In the process that is started: print the reason last, if an exception ends it.

    Call it before other processes are started, whose reasons are to be heard.
    """
    global _listening
    # Another process's file is the server's that this one is a part of, or a program's that starts servers.
    if _listening or (_FILE in os.environ and parent_process() is not None):
        return
    _listening = True
    with suppress(OSError):  # nowhere to write: reasons of other processes are lost
        handle, name = tempfile.mkstemp(prefix=f"kvcompress-{os.getpid()}-")
        os.close(handle)
        os.environ[_FILE] = name
        atexit.register(_forget, name, os.getpid())
    hear_logs()
    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        before(kind, error, trace)
        reason = _kept()
        if not (reason and _is_about(error, reason)):
            reason = _line_of(error) if "\n" in str(error) and isinstance(error, ValueError) else ""
        if reason:
            _hear_the_tracker_out()
            print(f"vllm-kvcompress: {reason}", file=sys.stderr, flush=True)

    sys.excepthook = hook


def hear_logs() -> None:
    """In a server of ours: what vLLM logs an exception for is a reason, should that end the server."""
    logger = logging.getLogger("vllm")
    if not any(isinstance(handler, _Logged) for handler in logger.handlers):
        logger.addHandler(_Logged(logging.ERROR))


def is_heard() -> bool:
    """Whether this process is one of a server of ours."""
    return _FILE in os.environ


class _Logged(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, ValueError):
            _keep(_line_of(error))
        elif error is not None and _STARTING in str(record.msg) and not _kept():
            # An engine says of a worker's failure only that there was one, after the worker has.
            said = str(error).strip().splitlines()
            _keep(_line(": ".join((type(error).__name__, *said[:1]))))


def _keep(line: str) -> None:
    with suppress(OSError, KeyError):
        Path(os.environ[_FILE]).write_text(line)


def _kept() -> str:
    with suppress(OSError, KeyError):
        return Path(os.environ[_FILE]).read_text()
    return ""


def _line_of(error: ValueError) -> str:
    """What it says in one line; of pydantic's, the first thing that is wrong, without the frame around it."""
    text = str(error)
    if callable(details := getattr(error, "errors", None)):
        with suppress(Exception):  # another package's may be called so, and be something else
            first = details()[0]
            text = ": ".join((*map(str, first["loc"]), first["msg"].removeprefix("Value error, ")))
    return _line(text)


def _line(text: str) -> str:
    return " ".join(text.split())[:1000]


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
    _keep(_line(reason))


@contextmanager
def heard() -> Iterator[None]:
    """A ValueError that leaves this block is a reason, of one line, not to start."""
    try:
        yield
    except ValueError as error:
        if not is_heard():
            listen()
        _keep(_line_of(error))
        raise
