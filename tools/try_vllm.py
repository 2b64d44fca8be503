#!/usr/bin/env python3
"""Another vLLM release's Python beside this environment's CPU extensions, and the seam tests against it.

    .venv/bin/python tools/try_vllm.py 0.33.0                    # tests/test_seams.py
    .venv/bin/python tools/try_vllm.py 0.33.0 tests/test_guidance.py tests/test_compressed_engine.py

The day a release appears, the failing tests' names are the work order. What it shows is that the Python seams
agree; the release's own compiled operations, its torch and its GPU paths are not in it. What its wheel
requires, and this environment has in another version or not at all, is named. Nothing of the environment
changes: all is in ``build/vllm-VERSION`` (--site), which goes first on PYTHONPATH.
"""

import argparse
import os
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
COMPILED = (".so", ".pyd")
# Of what is lacking, what vLLM imports at start-up; the rest is for devices and models that are not tried.
NEEDED = ("orjson",)


def download(release: str, folder: Path) -> Path:
    """The release's wheel of any platform, without what it requires."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    subprocess.run([*pip, "--dest", str(folder), f"vllm=={release}"], check=True)
    [wheel] = folder.glob(f"vllm-{release}-*.whl")
    return wheel


def lacking(wheel: Path) -> dict[Requirement, str | None]:
    """What the wheel requires here and has not: the requirement -> the installed version, None for none."""
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = Parser().parsestr(archive.read(name).decode())
    found: dict[Requirement, str | None] = {}
    for one in map(Requirement, metadata.get_all("Requires-Dist", [])):
        if one.marker is not None and not one.marker.evaluate({"extra": ""}):
            continue
        try:
            installed = version(one.name)
        except PackageNotFoundError:
            found[one] = None
        else:
            if not one.specifier.contains(installed, prereleases=True):
                found[one] = installed
    return found


def lay_out(wheel: Path, release: str, site: Path) -> int:
    """Unpack the Python, link the compiled files of the installed vLLM into it; returns how many.

    ``site`` is there when all of it is: an interrupted run leaves none, and half of a vLLM is never tried.
    """
    part = site.with_name(f"{site.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    with zipfile.ZipFile(wheel) as archive:
        mine = [
            name for name in archive.namelist() if name.startswith("vllm/") and not name.endswith(COMPILED)
        ]
        archive.extractall(part, mine)
    spec = find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    installed, linked = Path(spec.origin).parent, 0
    for path in installed.rglob("*"):
        target = part / "vllm" / path.relative_to(installed)
        if path.suffix in COMPILED and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(path)
            linked += 1
    for one in lacking(wheel):
        if one.name in NEEDED:
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(part)]
            subprocess.run([*pip, f"{one.name}{one.specifier}"], check=True)
    info = part / f"vllm-{release}+cpu.dist-info"  # "+cpu": by it vLLM knows its platform
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {release}+cpu\n")
    part.rename(site)
    return linked


def is_whole(site: Path, release: str) -> bool:
    """Whether ``site`` has been laid out. Raises SystemExit, one line, for a folder of something else."""
    if not site.exists():
        return False
    if not (site / f"vllm-{release}+cpu.dist-info" / "METADATA").is_file():
        raise SystemExit(f"{site} is not a whole vLLM {release}: remove it, or name another --site")
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("release", help="such as 0.33.0")
    parser.add_argument("tests", nargs="*", default=["tests/test_seams.py"], help="what pytest runs")
    parser.add_argument("--site", type=Path, help="where it is laid out; taken as it is if it is there")
    args = parser.parse_args()
    site = (args.site or ROOT / "build" / f"vllm-{args.release}").absolute()
    if not is_whole(site, args.release):
        site.parent.mkdir(parents=True, exist_ok=True)
        held = sorted(site.parent.glob(f"vllm-{args.release}-*.whl"))
        wheel = held[0] if held else download(args.release, site.parent)
        linked = lay_out(wheel, args.release, site)
        print(f"{site}: Python of vLLM {args.release}, {linked} compiled files of {version('vllm')}")
        for one, installed in lacking(wheel).items():
            how = "in the folder" if one.name in NEEDED else f"here {installed or 'not installed'}"
            print(f"  it requires {one}: {how}", flush=True)
    path = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *args.tests]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}).returncode


if __name__ == "__main__":
    sys.exit(main())
