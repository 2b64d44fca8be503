"""Why a server did not start is the last line that it prints."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

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


SCRIPT = """
import os, subprocess, sys
from vllm_kvcompress import last_word

last_word.listen()
try:
    with last_word.heard():
        raise ValueError("caught, and of no matter")
except ValueError:
    pass
if sys.argv[1] == "other":
    raise RuntimeError("something else")
child = "from vllm_kvcompress import last_word\\nwith last_word.heard(): raise ValueError('the\\\\nreason')"
subprocess.run([sys.executable, "-c", child], stderr=subprocess.DEVNULL)
raise RuntimeError("Engine core initialization failed. See root cause above.")
"""


@pytest.mark.parametrize(
    ("ending", "line"),
    [
        ("engine", "vllm-kvcompress: the reason"),  # of another process
        ("other", "RuntimeError: something else"),
    ],
)
def test_only_what_ended_the_process(ending: str, line: str, tmp_path: Path) -> None:
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    env.pop("KVCOMPRESS_LAST_WORD", None)
    done = subprocess.run([sys.executable, "-c", SCRIPT, ending], capture_output=True, text=True, env=env)
    assert done.returncode == 1
    assert done.stderr.rstrip().splitlines()[-1] == line
    assert not list(tmp_path.iterdir())
