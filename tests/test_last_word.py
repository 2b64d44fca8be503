"""Why a server did not start is the last line that it prints."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import preloaded
import pytest

from vllm_kvcompress import last_word

VLLM = str(Path(sys.executable).with_name("vllm"))


def last_line(*args: str) -> str:
    """Of a server that must not start."""
    done = subprocess.run(
        [VLLM, "serve", *args, "--dtype", "float32", "--max-model-len", "128", "--port", "0"],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=200,
    )  # fmt: skip
    assert done.returncode == 1
    return done.stderr.rstrip().splitlines()[-1]


def test_a_wrong_setting(checkpoints: dict[str, Path]) -> None:
    config = '{"kvcompress": {"bugdet": 0.1}}'
    line = last_line(str(checkpoints["tiny-hf"]), "--additional-config", config)
    assert (
        line == "vllm-kvcompress: additional_config.kvcompress has no setting 'bugdet'; did you mean budget?"
    )


ENGINE = """
import os
from pathlib import Path
from unittest.mock import MagicMock, patch
from vllm.v1.engine.core import EngineCoreProc
from vllm_kvcompress import last_word, plugin

os.environ[last_word._FILE] = os.environ["REASON"]
plugin.register()
with patch.object(EngineCoreProc, "__init__", side_effect=ValueError("No memory,\\nnone at all")):
    config = MagicMock(logging_config=None)
    config.parallel_config.data_parallel_size, config.parallel_config.numa_bind = 1, False
    EngineCoreProc.run_engine_core(vllm_config=config, log_stats=False)
"""


@pytest.mark.parametrize(
    ("kind", "kept", "line"),
    [
        ("ValueError", "", "No memory, none at all"),
        ("RuntimeError", "", "RuntimeError: No memory,"),
        ("RuntimeError", "a worker's reason", "a worker's reason"),
    ],
)
def test_what_vllms_engine_has_found(tmp_path: Path, kind: str, kept: str, line: str) -> None:
    """In a process of its own: it logs what it has raised, of which vLLM's front end does not know."""
    reason = tmp_path / "reason"
    reason.write_text(kept)
    env = {**os.environ, "REASON": str(reason)}
    done = preloaded.run([sys.executable, "-c", ENGINE.replace("ValueError", kind)], env=env, timeout=60)
    assert "EngineCore failed to start" in done.stdout + done.stderr
    assert reason.read_text() == line


def test_errors_of_a_server_that_runs_are_no_reasons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(last_word._FILE, str(tmp_path / "reason"))
    record = logging.makeLogRecord({"msg": "EngineCore encountered a fatal error."})
    record.exc_info = (RuntimeError, RuntimeError("no memory"), None)
    last_word._Logged().emit(record)
    assert not last_word._kept()
    record.msg = "WorkerProc failed to start."
    last_word._Logged().emit(record)
    assert last_word._kept() == "RuntimeError: no memory"


class Told(ValueError):
    """Of another package: its ``errors`` are not what pydantic calls so."""

    def __init__(self, errors: object) -> None:
        super().__init__("told,\ntwice")
        self.errors = errors


def log(error: Exception) -> None:
    """As a logger does whose handler ours is."""
    record = logging.makeLogRecord({"msg": "EngineCore encountered a fatal error."})
    record.exc_info = (type(error), error, None)
    last_word._Logged().handle(record)


@pytest.mark.parametrize("errors", [["a"], {"a": "b"}, None, list, lambda: [{}], lambda needed: needed])
def test_an_exception_with_errors_of_its_own(
    errors: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever logs or raises it gets no other for it."""
    monkeypatch.setenv(last_word._FILE, str(tmp_path / "reason"))
    log(Told(errors))
    assert last_word._kept() == "told, twice"
    with pytest.raises(Told, match="told"), last_word.heard():
        raise Told(errors)
    assert last_word._kept() == "told, twice"


SCRIPT = """
import logging, os, subprocess, sys
from vllm_kvcompress import last_word

last_word.listen()
assert last_word.is_heard() == ("TMPDIR" in os.environ)
try:
    with last_word.heard():
        raise ValueError("caught, and of no matter")
except ValueError:
    pass
if sys.argv[1] == "other":
    raise RuntimeError("something else")
if sys.argv[1] == "ours":
    with last_word.heard():
        raise ValueError("the\\nreason")
if sys.argv[1] == "pydantic":
    import pydantic
    pydantic.TypeAdapter(list[int]).validate_python(["x"])
child = "from vllm_kvcompress import last_word\\nwith last_word.heard(): raise ValueError('the\\\\nreason')"
if sys.argv[1] == "log":
    child = (
        "import logging; from vllm_kvcompress import last_word; last_word.hear_logs()\\n"
        "try: raise ValueError('the\\\\nreason')\\n"
        "except ValueError: logging.getLogger('vllm.v1.engine.core').exception('failed to start')"
    )
subprocess.run([sys.executable, "-c", child], stderr=subprocess.DEVNULL)
raise RuntimeError("Engine core initialization failed. See root cause above.")
"""


@pytest.mark.parametrize(
    ("ending", "line"),
    [
        ("engine", "vllm-kvcompress: the reason"),  # of another process
        ("log", "vllm-kvcompress: the reason"),  # that vLLM has raised and logged there
        ("ours", "vllm-kvcompress: the reason"),
        (
            "pydantic",
            "vllm-kvcompress: 0: Input should be a valid integer, unable to parse string as an integer",
        ),
        ("other", "RuntimeError: something else"),
    ],
)
def test_only_what_ended_the_process(ending: str, line: str, tmp_path: Path) -> None:
    assert said(SCRIPT, ending, TMPDIR=str(tmp_path)) == line
    assert not list(tmp_path.iterdir())


NOWHERE = "import tempfile; tempfile._candidate_tempdir_list = lambda: ['/nowhere']\n"


@pytest.mark.parametrize(
    ("ending", "line"),
    [
        ("ours", "vllm-kvcompress: the reason"),
        ("engine", "RuntimeError: Engine core initialization failed. See root cause above."),
    ],
)
def test_a_machine_without_room_for_a_file_keeps_its_reasons(ending: str, line: str) -> None:
    """Those of the process itself; nothing else replaces the others'."""
    assert said(NOWHERE + SCRIPT, ending) == line


def said(script: str, *args: str, **more: str) -> str:
    """The last line of a script that fails."""
    env = {
        name: value for name, value in os.environ.items() if name not in ("KVCOMPRESS_LAST_WORD", "TMPDIR")
    }
    done = subprocess.run(
        [sys.executable, "-c", script, *args], capture_output=True, text=True, env=env | more
    )
    assert done.returncode == 1
    return done.stderr.rstrip().splitlines()[-1]
