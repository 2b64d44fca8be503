"""``vllm-kvcompress doctor``: what it finds is what is there."""

import inspect
import os
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner
from vllm.platforms import current_platform
from vllm.platforms.interface import DeviceCapability

from vllm_kvcompress import __version__, cli, doctor, served
from vllm_kvcompress.attention import cpu, cpu_library
from vllm_kvcompress.heads import provide
from vllm_kvcompress.models import vllm_config

SUBJECTS = [
    "vllm-kvcompress", "vLLM", "plugin", "device", "model runner", "kernels", "logits", "head profiles",
    "refused",
]  # fmt: skip


def found(subject: str) -> list[str]:
    """What the report says of a subject."""
    return [line.removeprefix(f"{subject}: ") for line in doctor.report() if line.startswith(f"{subject}: ")]


def test_report_on_the_command_line() -> None:
    result = CliRunner().invoke(cli.app, ["doctor"])
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines == doctor.report()
    assert [line.split(": ")[0] for line in lines] == SUBJECTS
    assert "; LoRA (both branches share a row, adapters know one); " in result.stdout
    assert "not to be found out" not in result.stdout
    assert lines[0].startswith(f"vllm-kvcompress: {__version__}, in ")
    assert lines[0].endswith(f", Python {sys.version.split()[0]}")
    assert found("plugin") == ["fits this vLLM"]


def test_ten_lines_at_most_where_most_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A CPU without built kernels; a GPU before 8-bit floats, as vLLM would describe an A100."""
    monkeypatch.setattr(cpu, "isa", lambda: None)
    monkeypatch.setattr(cpu_library, "LIBRARY", tmp_path / "_kernels.so")
    lines = doctor.report()
    assert [line.split(": ")[0] for line in lines] == SUBJECTS
    assert all(word in lines[-1] for word in ("cpu kernels", "triton kernels", "pipeline parallelism"))
    monkeypatch.setattr(doctor, "_device_type", lambda: "cuda")
    for name, value in {
        "is_cuda": True, "is_cuda_alike": True, "has_device_capability": False,
        "get_device_name": "NVIDIA A100-SXM4-80GB", "get_device_capability": DeviceCapability(8, 0),
    }.items():  # fmt: skip
        monkeypatch.setattr(type(current_platform), name, lambda *_, value=value: value, raising=False)
    lines = doctor.report()
    assert [line.split(": ")[0] for line in lines] == SUBJECTS
    assert lines[3] == "device: cuda, NVIDIA A100-SXM4-80GB, compute capability 8.0"
    assert "on this machine: --kv-cache-dtype fp8, for this GPU lacks e4m3" in lines[-1]


def test_vllm_that_was_not_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm

    assert found("vLLM") == [f"{vllm.__version__}, tested"]
    monkeypatch.setattr(vllm, "__version_tuple__", (0, 99, 0))
    monkeypatch.setattr(vllm, "__version__", "0.99.0")
    [line] = found("vLLM")
    assert "0.99.0" in line
    assert served.REQUIREMENT in line


def test_plugin_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.transformers_utils import config

    monkeypatch.delattr(config, "_CONFIG_REGISTRY")
    [line] = found("plugin")
    assert "_CONFIG_REGISTRY" in line
    assert served.REQUIREMENT in line


def test_plugin_that_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    assert found("plugin") == ["left out by VLLM_PLUGINS=other: add kvcompress"]
    monkeypatch.setenv("VLLM_PLUGINS", "other,kvcompress")
    assert found("plugin") == ["fits this vLLM"]


@pytest.mark.parametrize(("value", "runner"), [("0", "V1"), ("1", "V2")])
def test_model_runner(monkeypatch: pytest.MonkeyPatch, value: str, runner: str) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", value)
    assert found("model runner") == [f"{runner}, set by VLLM_USE_V2_MODEL_RUNNER"]


def test_kernels_of_a_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "_device_type", lambda: "cpu")
    monkeypatch.setattr(cpu, "isa", lambda: "avx2")
    assert found("kernels") == ["cpu (avx2)"]
    assert not any("cpu kernels" in line for line in found("refused"))
    monkeypatch.setattr(cpu, "isa", lambda: None)
    monkeypatch.setattr(cpu_library, "LIBRARY", tmp_path / "_kernels.so")
    slow = "torch, the reference, many times slower; _kernels.so"
    assert found("kernels")[0].startswith(f"{slow} was not built: install a C++ compiler")
    assert any("cpu kernels" in line and "not built" in line for line in found("refused"))
    cpu_library.LIBRARY.touch()
    assert found("kernels")[0].startswith(f"{slow} is of another version, or can't be loaded")


def test_kernels_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_device_type", lambda: "cuda")
    assert found("kernels") == ["triton"]
    assert any("cpu kernels can't be used, the cache is on cuda" in line for line in found("refused"))


def test_logits_where_another_package_looks_at_them(monkeypatch: pytest.MonkeyPatch) -> None:
    assert found("logits") == ["of image codes alone, while all requests draw"]

    def entry_points(**wanted: Any) -> list[EntryPoint]:
        return [EntryPoint("watermark", "other:Processor", wanted["group"])]

    monkeypatch.setattr("importlib.metadata.entry_points", entry_points)
    [line] = found("logits")
    assert "whole vocabulary" in line
    assert "watermark" in line


def test_head_profiles_that_cannot_be_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(provide, "cache_directory", lambda: tmp_path / "a" / "b")
    assert found("head profiles") == [f"kept in {tmp_path / 'a' / 'b'}, writable"]
    (tmp_path / "a").touch()  # a file where a folder should be; root may write anywhere else
    [line] = found("head profiles")
    assert "not writable" in line
    assert "VLLM_CACHE_ROOT" in line


def test_head_profiles_in_a_folder_that_others_may_write(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As at start-up: neither read nor kept."""
    folder = tmp_path / "shared"
    folder.mkdir()
    monkeypatch.setattr(provide, "cache_directory", lambda: folder)
    folder.chmod(0o755)
    assert found("head profiles") == [f"kept in {folder}, writable"]
    folder.chmod(0o775)
    refusal = f"{folder} can be written by others; chmod go-w, or set VLLM_CACHE_ROOT"
    measured = "neither read nor kept, heads are measured at every start"
    assert found("head profiles") == [f"{measured}: {refusal}"]
    folder.chmod(0o755)
    if os.geteuid() == 0:
        os.chown(folder, 1, -1)
    else:
        monkeypatch.setattr("os.geteuid", lambda: folder.stat().st_uid + 1)
    assert found("head profiles") == [f"{measured}: {refusal}"], "another's"


def test_what_can_not_be_found_out_is_said_and_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> str:
        raise OSError("no such device\nat all")

    monkeypatch.setitem(doctor._SUBJECTS, "device", broken)
    assert found("device") == ["not to be found out (OSError: no such device)"]
    assert found("vLLM")


def test_what_is_refused_is_refused_at_start_up() -> None:
    source = inspect.getsource(vllm_config)
    assert [name for name in doctor.REFUSED if name not in source] == []
