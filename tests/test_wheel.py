"""What is built can be installed and serves: the wheel, not the checkout that every other test runs from."""

import base64
import io
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import httpx
import pytest
from PIL import Image

import vllm_kvcompress
from vllm_kvcompress.testing.checkpoints import TINY, make_checkpoint
from vllm_kvcompress.testing.server import Server

ROOT = Path(__file__).parents[1]
# Not sources; a library built here must not get into a wheel that was never compiled.
IGNORED = shutil.ignore_patterns(
    ".git", ".venv", ".*_cache", ".hypothesis", "out", "build", "dist", "*.egg-info", "__pycache__", "*.so"
)
LEFT_BEHIND = ("benchmarks/out/x", "benchmarks/.mypy_cache/x", "tests/.pytest_cache/x", "tests/.hypothesis/x",
               "tools/.ruff_cache/x", "examples/__pycache__/x")  # fmt: skip
PARTS = ("*.py", "*.jinja", "*.html", "*.css", "*.js", "*.txt", "py.typed")
OFFLINE = ("--no-deps", "--no-index", "--disable-pip-version-check", "--quiet")
SERVER = ("--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "4",
          "--kv-cache-memory-bytes", str(2**28), "--enforce-eager",
          "--additional-config", '{"kvcompress": {"playground": true}}')  # fmt: skip


@pytest.fixture(autouse=True)
def installed_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """No folder on the path that could stand in for the wheel."""
    monkeypatch.delenv("PYTHONPATH", raising=False)


def run(*command: object, cwd: Path, **env: str) -> str:
    """The command's output. AssertionError with its errors if it fails."""
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build_wheel(source: Path, out: Path, **env: str) -> Path:
    """A wheel of a folder or of an sdist, with the setuptools that are here."""
    run(sys.executable, "-m", "pip", "wheel", *OFFLINE, "--no-build-isolation", "-w", out, source,
        cwd=out.parent, **env)  # fmt: skip
    [wheel] = out.glob("*.whl")
    return wheel


def content(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tracked files, so that building leaves nothing behind; with what runs leave there."""
    copy = shutil.copytree(ROOT, tmp_path_factory.mktemp("wheel") / "checkout", ignore=IGNORED)
    for left in LEFT_BEHIND:
        (copy / left).parent.mkdir(parents=True, exist_ok=True)
        (copy / left).write_text("of a run")
    return copy


@pytest.fixture(scope="module")
def sdist(checkout: Path) -> Path:
    code = "import setuptools.build_meta as backend; print(backend.build_sdist('dist'))"
    return checkout / "dist" / run(sys.executable, "-c", code, cwd=checkout).splitlines()[-1]


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of the sdist: the longer way round."""
    return build_wheel(sdist, tmp_path_factory.mktemp("from_sdist"))


def sources(folder: str, *patterns: str) -> set[str]:
    return {
        str(path.relative_to(ROOT)) for pattern in patterns for path in sorted((ROOT / folder).rglob(pattern))
    }


def test_sdist_is_whole(sdist: Path) -> None:
    top = f"vllm_kvcompress-{vllm_kvcompress.__version__}"
    with tarfile.open(sdist) as archive:
        held = {name.removeprefix(f"{top}/") for name in archive.getnames()}
    assert {"LICENSE", "CHANGELOG.md", "README.md", "setup.py", "pyproject.toml", "tests/conftest.py"} <= held
    assert sources("csrc", "*.cpp", "*.h", "*.inl") <= held
    assert sources("tests", "*.py") <= held
    assert sources("docs", "*.md", "*.png") <= held
    assert sources("vllm_kvcompress", *PARTS) | sources("docker", "*") | sources(".github", "*.yml") <= held
    assert sources("examples", "*.py") | sources("examples/shapes/model", "*.json") <= held
    assert not [name for name in held if name.endswith((".so", ".pyc"))]
    assert not held & set(LEFT_BEHIND)
    assert not [name for name in held if Path(name).name in {Path(left).parent.name for left in LEFT_BEHIND}]


def test_wheel_holds_all_that_the_package_reads(wheel: Path) -> None:
    held = content(wheel)
    assert sources("vllm_kvcompress", *PARTS) <= held
    assert "vllm_kvcompress/attention/_kernels.so" in held
    assert any(name.endswith("licenses/LICENSE") for name in held)
    foreign = {name.split("/")[0] for name in held}
    assert foreign == {"vllm_kvcompress", f"vllm_kvcompress-{vllm_kvcompress.__version__}.dist-info"}


def test_wheel_is_for_a_platform_and_any_python(wheel: Path) -> None:
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert wheel.name == f"vllm_kvcompress-{vllm_kvcompress.__version__}-py3-none-{platform}.whl"


NO_COMPILER = {"CC": "/bin/false", "CXX": "/bin/false"}


@pytest.fixture(scope="module")
def plain(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(sdist, tmp_path_factory.mktemp("plain"), **NO_COMPILER)


def test_wheel_of_the_checkout_is_that_of_the_sdist(checkout: Path, plain: Path, tmp_path: Path) -> None:
    """Without kernels, whose sources are in both: compiling takes longer than all the rest."""
    assert content(build_wheel(checkout, tmp_path / "direct", **NO_COMPILER)) == content(plain)


def test_wheel_without_a_compiler_has_no_kernels(wheel: Path, plain: Path) -> None:
    assert content(wheel) - content(plain) == {"vllm_kvcompress/attention/_kernels.so"}


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter that has the wheel, and everything else from this one's site-packages.

    A .pth file inside those is not read, so the editable install's finder does not exist there.
    """
    folder = tmp_path_factory.mktemp("site") / "venv"
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", *OFFLINE, wheel, cwd=folder)
    [site] = folder.glob("lib/python*/site-packages")
    (site / "base.pth").write_text(f"{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n")
    return python


def test_what_is_imported_is_the_wheel(python: Path, tmp_path: Path) -> None:
    code = (
        "import vllm_kvcompress; from importlib.metadata import version, entry_points;"
        "print(vllm_kvcompress.__file__);"
        "print(version('vllm-kvcompress'), vllm_kvcompress.__version__);"
        "print([p.load().__module__ for p in entry_points(group='vllm.general_plugins', name='kvcompress')]);"
        "from vllm_kvcompress.attention import cpu; print(cpu.isa())"
    )
    place, versions, plugins, isa = run(python, "-c", code, cwd=tmp_path).splitlines()[-4:]
    assert Path(place).is_relative_to(python.parents[1])
    assert versions == f"{vllm_kvcompress.__version__} {vllm_kvcompress.__version__}"
    assert plugins == "['vllm_kvcompress.plugin']"
    assert isa in ("portable", "avx2", "avx512")


def test_version_on_the_command_line(python: Path, tmp_path: Path) -> None:
    shown = run(python.with_name("vllm-kvcompress"), "--version", cwd=tmp_path)
    assert shown == f"vllm-kvcompress {vllm_kvcompress.__version__}\n"


def test_wheel_serves_the_original_layout(
    python: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chat needs the template from the package: deepseek-ai's files have none."""
    model = make_checkpoint(tmp_path / "model", layout="deepseek", geometry=TINY)
    assert not [path for path in model.iterdir() if "template" in path.name]
    monkeypatch.chdir(tmp_path)  # `python -m` looks for packages in the working directory first
    server = Server(model, tmp_path / "server.log", SERVER, env={"VLLM_WORKER_MULTIPROC_METHOD": "spawn"})
    server.command[:1] = [str(python), "-m", "vllm.entrypoints.cli.main"]
    with server, httpx.Client(base_url=server.url, timeout=120) as http:
        counted = 'vllm:image_pictures_total{engine="0",model_name="janus"} '
        assert f"{counted}0.0" in http.get("/metrics").text
        page = http.get("/playground").text
        assert all(part in page for part in ("<form", "async function draw()", "color-scheme: light dark"))
        drawn = http.post("/v1/images/generations", json={"prompt": "a red circle", "seed": 1})
        assert drawn.status_code == 200, drawn.text
        picture = Image.open(io.BytesIO(base64.b64decode(drawn.json()["data"][0]["b64_json"])))
        assert "x".join(map(str, picture.size)) == drawn.json()["size"]
        assert f"{counted}1.0" in http.get("/metrics").text
        assert drawn.json()["usage"]["kv_cache"]["resident_bytes"] > 0
        messages = [{"role": "user", "content": "hello"}]
        said = http.post(
            "/v1/chat/completions", json={"model": "janus", "messages": messages, "max_tokens": 4}
        )
        assert said.status_code == 200, said.text
        assert said.json()["usage"]["completion_tokens"] == 4
