"""Everything that starts an engine takes vLLM's memory options, so that it runs beside a server."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from vllm_kvcompress import cli
from vllm_kvcompress.eval import engine
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


@pytest.mark.parametrize(("options", "given"), GIVEN)
def test_offline(asked: dict[str, Any], options: list[str], given: dict[str, Any]) -> None:
    import typer

    spec = importlib.util.spec_from_file_location("offline", OFFLINE)
    assert spec is not None
    assert spec.loader is not None
    offline = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(offline)
    app = typer.Typer()
    app.command()(offline.main)
    CliRunner().invoke(app, ["model", "a cat", *options])
    assert memory(asked) == given


@pytest.mark.parametrize(("options", "given"), GIVEN)
def test_eval(
    asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch, options: list[str], given: dict[str, Any]
) -> None:
    monkeypatch.setattr(engine, "_sizes", lambda model, size: (100, 64))
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
    monkeypatch.setattr(engine, "_sizes", lambda model, size: (100, 64))
    with pytest.raises(Started):
        engine.start("model", {}, 3, room=Room(**size))
    assert memory(asked) == {**size, "gpu_memory_utilization": SHARE}


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's default is vLLM's own")
def test_a_cpu_gives_no_engine_most_of_the_machine(
    asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "_sizes", lambda model, size: (100, 64))
    with pytest.raises(Started):
        engine.start("model", {}, 3)
    assert memory(asked) == {"kv_cache_memory_bytes": 4 * 100 * 64}
