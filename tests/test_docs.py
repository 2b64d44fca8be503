"""The documents: links lead somewhere, and what the API and the settings have is told."""

import re
import runpy
from pathlib import Path
from urllib.parse import unquote

import pytest

from vllm_kvcompress.config import CompressionConfig
from vllm_kvcompress.serving.metrics import _counters
from vllm_kvcompress.serving.protocol import ImageRequest, ImagesUsage, Kept, KeptOfType

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [*ROOT.glob("*.md"), *(page for folder in ("docs", "benchmarks", "examples", "patches")
                           for page in (ROOT / folder).rglob("*.md"))]
)  # fmt: skip


def anchors(page: Path) -> set[str]:
    """What GitHub makes of the headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        there = page.parent / unquote(path) if path else page
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), target


def told(page: str) -> set[str]:
    return set(re.findall(r"`([\w.:]+)`", (ROOT / "docs" / page).read_text()))


def test_every_field_of_the_api_is_told() -> None:
    found = told("api.md")
    assert set(ImageRequest.model_fields) <= found
    assert {name for name in ImagesUsage.model_fields if name != "kv_cache"} <= found
    example = (ROOT / "docs" / "api.md").read_text()
    assert all(f'"{name}":' in example for name in (*Kept.model_fields, *KeptOfType.model_fields))


def test_every_metric_is_told() -> None:
    names = {f"{metric.name}_total" for metric in _counters().collect()}
    assert names
    assert names <= told("api.md")


def test_every_setting_is_told() -> None:
    assert set(CompressionConfig.model_fields) <= told("serving.md")


def test_the_readmes_costs_and_gains_are_those_of_their_pages() -> None:
    """After new numbers in docs/ or in the README's benchmark part: ``python tools/costs.py``."""
    costs = runpy.run_path(str(ROOT / "tools" / "costs.py"))
    [table] = costs["PLACE"].findall((ROOT / "README.md").read_text())
    assert table == costs["table"]()


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) < 150
