"""Everything that starts an engine takes vLLM's memory options, so that it runs beside a server."""

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

from vllm_kvcompress import cli
from vllm_kvcompress.eval import engine, run
from vllm_kvcompress.eval.engine import Room
from vllm_kvcompress.room import SHARE, sharing

OFFLINE = Path(__file__).parents[1] / "examples" / "offline.py"
GIVEN = [
    (["--gpu-memory-utilization", "0.25"], {"gpu_memory_utilization": 0.25}),
    (["--kv-cache-memory-bytes", "5000000"], {"kv_cache_memory_bytes": 5000000}),
]
NAMES = ("gpu_memory_utilization", "kv_cache_memory_bytes")


class Started(Exception):
    """An engine would start, with these settings."""


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What ``LLM`` was called with; no engine starts."""
    settings: dict[str, Any] = {}

    def llm(*args: Any, **kwargs: Any) -> None:
        settings.update(kwargs)
        raise Started

    monkeypatch.setattr("vllm.LLM", llm)
    return settings


@pytest.fixture(autouse=True)
def without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def memory(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: settings[name] for name in NAMES if settings.get(name) is not None}


@pytest.mark.parametrize(("options", "given"), GIVEN)
def test_calibrate(asked: dict[str, Any], tmp_path: Path, options: list[str], given: dict[str, Any]) -> None:
    CliRunner().invoke(cli.app, ["calibrate", "model", "-o", str(tmp_path / "profile.json"), *options])
    assert memory(asked) == given


def offline(*arguments: object) -> Result:
    """``python examples/offline.py``, in this process."""
    import typer

    spec = importlib.util.spec_from_file_location("offline", OFFLINE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    app = typer.Typer()
    app.command()(module.main)
    return CliRunner().invoke(app, list(map(str, arguments)))


@pytest.mark.parametrize(("options", "given"), GIVEN)
def test_offline(
    asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch, options: list[str], given: dict[str, Any]
) -> None:
    monkeypatch.setattr(engine, "sizes", lambda *args, **kwargs: (100, 64))
    offline("model", "a cat", *options)
    assert memory(asked) == given


@pytest.mark.parametrize(("token", "memory_bytes"), [(64, 2**30), (2**20, 10256 * 2**20)])
def test_offline_takes_what_a_picture_takes(
    asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch, token: int, memory_bytes: int
) -> None:
    monkeypatch.setattr(engine, "sizes", lambda *args, **kwargs: (10_000, token))
    offline("some/model", "a cat")
    assert memory(asked) == {"kv_cache_memory_bytes": memory_bytes}


@pytest.mark.parametrize(("context", "length"), [(16384, 1024 + 64), (700, 700)])
def test_offline_asks_for_no_longer_a_context_than_a_picture_needs(
    checkpoints: dict[str, Path], asked: dict[str, Any], tmp_path: Path, context: int, length: int
) -> None:
    shutil.copytree(checkpoints["tiny-hf"], tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    config["text_config"]["max_position_embeddings"] = context
    path.write_text(json.dumps(config))
    assert isinstance(offline(tmp_path / "model", "a cat").exception, Started)
    assert asked["max_model_len"] == length
    path.write_text(json.dumps(config | {"model_type": "llama"}))
    refused = offline(tmp_path / "model", "a cat")
    assert refused.exit_code == 2
    assert "serves no model of type" in refused.stderr


@pytest.mark.parametrize(("options", "given"), [*GIVEN, ([], None)])
@pytest.mark.parametrize("measured", ["pictures", "replay"])
def test_evals_command_line(
    checkpoints: dict[str, Path],
    asked: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    options: list[str],
    given: dict[str, Any] | None,
    measured: str,
) -> None:
    """From the options to the engine that would start, for pictures and for the replay."""
    monkeypatch.setattr(run, "in_process", lambda task, *args: task(*args))
    command = ["eval", str(checkpoints["tiny-hf"]), "-o", str(tmp_path / "out"), "--presets", "line_ar"]
    command += ["--budgets", "0.5", "--batch", "3"]
    if measured == "pictures":
        command += ["--pictures", "1", "--scenes", "0"]
    else:
        scenes = tmp_path / "scenes.npz"
        np.savez(scenes, captions=np.array(["a cat"]), codes=np.zeros((1, 64), np.int64))
        command += ["--pictures", "0", "--scenes", "1", "--scenes-file", str(scenes)]
    done = CliRunner().invoke(cli.app, [*command, *options])
    assert isinstance(done.exception, Started), done.output
    length, token = engine.sizes(str(checkpoints["tiny-hf"]))
    rows = {"pictures": 3, "replay": 1}[measured]
    assert (asked["max_num_seqs"], asked["max_model_len"]) == (rows, length)
    if given is None:
        given = {"kv_cache_memory_bytes": (rows + 1) * length * token}
    assert memory(asked) == given


@pytest.mark.parametrize(("options", "given"), GIVEN)
def test_eval(
    asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch, options: list[str], given: dict[str, Any]
) -> None:
    monkeypatch.setattr(engine, "sizes", lambda *args: (100, 64))
    with pytest.raises(Started):
        engine.start("model", {}, 3, room=Room(**given))
    assert memory(asked) == given


def test_bytes_alone_do_not_ask_for_most_of_a_gpu(
    asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """vLLM wants a share of it to be free, whatever the bytes: a server may have the rest."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    (_, share), (_, size) = GIVEN
    assert sharing(share) == share
    assert sharing({}) == {}
    assert sharing(size) == {**size, "gpu_memory_utilization": SHARE}
    both = {**size, **share}
    assert sharing(both) == both
    profile = str(tmp_path / "profile.json")
    CliRunner().invoke(cli.app, ["calibrate", "model", "-o", profile])
    assert memory(asked) == {"kv_cache_memory_bytes": 2**30, "gpu_memory_utilization": SHARE}
    monkeypatch.setattr(engine, "sizes", lambda *args: (100, 64))
    with pytest.raises(Started):
        engine.start("model", {}, 3, room=Room(**size))
    assert memory(asked) == {**size, "gpu_memory_utilization": SHARE}


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's default is vLLM's own")
def test_a_cpu_gives_no_engine_most_of_the_machine(
    asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "sizes", lambda *args: (100, 64))
    with pytest.raises(Started):
        engine.start("model", {}, 3)
    assert memory(asked) == {"kv_cache_memory_bytes": 4 * 100 * 64}
