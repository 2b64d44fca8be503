#!/usr/bin/env python3
"""Another vLLM release's Python beside this environment's CPU extensions, and the seam tests against it.

    .venv/bin/python tools/try_vllm.py 0.33.0                    # tests/test_seams.py
    .venv/bin/python tools/try_vllm.py 0.33.0 tests/test_guidance.py tests/test_compressed_engine.py

The day a release appears, the failing tests' names are the work order. What it shows is that the Python seams
agree; the release's own compiled operations, its torch and its GPU paths are not in it. Nothing of the
environment changes: all is in ``build/vllm-VERSION`` (--site), which goes first on PYTHONPATH.
"""

import argparse
import os
import subprocess
import sys
import zipfile
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[1]
COMPILED = (".so", ".pyd")
# New requirements of releases since the environment's that are imported at start-up.
NEEDED = ("orjson",)


def download(release: str, folder: Path) -> Path:
    """The release's wheel of any platform, without what it requires."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    subprocess.run([*pip, "--dest", str(folder), f"vllm=={release}"], check=True)
    [wheel] = folder.glob(f"vllm-{release}-*.whl")
    return wheel


def lay_out(wheel: Path, release: str, site: Path) -> int:
    """Unpack the Python, link the compiled files of the installed vLLM into it; returns how many."""
    with zipfile.ZipFile(wheel) as archive:
        mine = [
            name for name in archive.namelist() if name.startswith("vllm/") and not name.endswith(COMPILED)
        ]
        archive.extractall(site, mine)
    spec = find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    installed, linked = Path(spec.origin).parent, 0
    for path in installed.rglob("*"):
        target = site / "vllm" / path.relative_to(installed)
        if path.suffix in COMPILED and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(path)
            linked += 1
    info = site / f"vllm-{release}+cpu.dist-info"  # "+cpu": by it vLLM knows its platform
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {release}+cpu\n")
    return linked


def add_requirements(site: Path) -> None:
    """What the release imports and the environment lacks."""
    for name in NEEDED:
        try:
            version(name)
        except PackageNotFoundError:
            pip = [
                sys.executable,
                "-m",
                "pip",
                "install",
                "--quiet",
                "--no-deps",
                "--target",
                str(site),
                name,
            ]
            subprocess.run(pip, check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("release", help="such as 0.33.0")
    parser.add_argument("tests", nargs="*", default=["tests/test_seams.py"], help="what pytest runs")
    parser.add_argument("--site", type=Path, help="where it is laid out; taken as it is if it is there")
    args = parser.parse_args()
    site = (args.site or ROOT / "build" / f"vllm-{args.release}").absolute()
    if not (site / "vllm").is_dir():
        site.mkdir(parents=True, exist_ok=True)
        held = sorted(site.glob("vllm-*.whl"))
        linked = lay_out(held[0] if held else download(args.release, site), args.release, site)
        add_requirements(site)
        print(
            f"{site}: Python of vLLM {args.release}, {linked} compiled files of {version('vllm')}", flush=True
        )
    path = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *args.tests]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}).returncode


if __name__ == "__main__":
    sys.exit(main())
