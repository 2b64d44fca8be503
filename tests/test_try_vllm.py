"""tools/try_vllm.py lays another vLLM out whole or not at all, and says what it is not tried with."""

import importlib.util
import subprocess
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

TOOL = Path(__file__).parents[1] / "tools" / "try_vllm.py"
RELEASE = "9.9.0"
REQUIRES = (
    "numpy>=999",
    "pillow",
    "orjson>=999",
    "nobody-has-this==1.0",
    'pydantic>=999; python_version < "3"',
    'pydantic>=999; extra == "audio"',
)


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("try_vllm", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    """As vLLM's: Python, a library of another platform, and what it requires."""
    path = tmp_path / f"vllm-{RELEASE}-cp38-abi3-some_platform.whl"
    required = "".join(f"Requires-Dist: {one}\n" for one in REQUIRES)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("vllm/__init__.py", "NEW = True\n")
        archive.writestr("vllm/v1/engine.py", "")
        archive.writestr("vllm/_C_of_another_platform.abi3.so", "not for here")
        archive.writestr(f"vllm-{RELEASE}.dist-info/METADATA", f"Name: vllm\n{required}\n")
    return path


@pytest.fixture
def installed(tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """A made-up vLLM in the environment's place; pip's commands are returned instead of run."""
    package = tmp_path / "environment" / "vllm"
    (package / "v1").mkdir(parents=True)
    for name in ("__init__.py", "_C.abi3.so", "v1/_more.so"):
        (package / name).write_text("of the environment")
    spec = importlib.util.spec_from_file_location("vllm", package / "__init__.py")
    monkeypatch.setattr(tool, "find_spec", lambda name: spec)
    commands: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", lambda command, **more: commands.append(command))
    return commands


def test_python_of_one_and_libraries_of_the_other(
    tool: ModuleType, wheel: Path, installed: list[list[str]], tmp_path: Path
) -> None:
    site = tmp_path / "build" / f"vllm-{RELEASE}"
    assert not tool.is_whole(site, RELEASE)
    assert tool.lay_out(wheel, RELEASE, site) == 2
    assert tool.is_whole(site, RELEASE)
    held = {str(path.relative_to(site)) for path in site.rglob("*") if path.is_file()}
    ours = {f"vllm/{name}" for name in ("__init__.py", "v1/engine.py", "_C.abi3.so", "v1/_more.so")}
    assert held == ours | {f"vllm-{RELEASE}+cpu.dist-info/METADATA"}
    assert (site / "vllm/__init__.py").read_text() == "NEW = True\n"
    assert (site / "vllm/_C.abi3.so").read_text() == "of the environment"
    assert [path.name for path in site.parent.iterdir()] == [site.name]
    [command] = installed  # orjson is new, and asked for in the version that the wheel says
    assert command[-1] == "orjson>=999"
    assert "--no-deps" in command


def test_an_interrupted_layout_is_none(
    tool: ModuleType, wheel: Path, installed: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / f"vllm-{RELEASE}"

    def stopped(self: Path, target: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(Path, "symlink_to", stopped)
        with pytest.raises(KeyboardInterrupt):
            tool.lay_out(wheel, RELEASE, site)
    assert not site.exists()
    assert tool.lay_out(wheel, RELEASE, site) == 2, "and the next one begins anew"
    assert tool.is_whole(site, RELEASE)


def test_a_folder_that_is_no_whole_layout_is_not_tried(tool: ModuleType, tmp_path: Path) -> None:
    """As versions before this one left it."""
    (tmp_path / "vllm").mkdir()
    with pytest.raises(SystemExit, match=rf"is not a whole vLLM {RELEASE}: remove it") as caught:
        tool.is_whole(tmp_path, RELEASE)
    assert "\n" not in str(caught.value)


def test_what_the_environment_has_older_or_not_is_named(tool: ModuleType, wheel: Path) -> None:
    found = {str(one): installed for one, installed in tool.lacking(wheel).items()}
    assert found.keys() == {"numpy>=999", "orjson>=999", "nobody-has-this==1.0"}
    assert found["nobody-has-this==1.0"] is None
    assert found["numpy>=999"] is not None
