"""The side-by-side benchmark's groups that need engines of their own: HTTP, a fixed memory, a wider grid."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "benchmarks")]

from side_by_side.contenders import OURS, STOCK  # noqa: E402
from side_by_side.workloads import tiny  # noqa: E402
from test_benchmark import cells_of, run  # noqa: E402


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "tiny.json"
    run(path, mode="tiny-more")
    return path


def test_pictures_at_once_at_a_fixed_memory(finished: Path) -> None:
    (stock,) = cells_of(finished, workload="tiny-memory", contender=STOCK)
    (ours,) = cells_of(finished, workload="tiny-memory", contender=OURS)
    assert stock["drawn_at_once"] == 2
    memory = tiny("tiny-memory", 2).fixed_memory(stock["prefix"])
    assert ours["drawn_at_once"] == memory // ours["kv_bytes_per_image"] > 2 * stock["drawn_at_once"]


def test_whole_pictures_on_a_wider_grid(finished: Path) -> None:
    for cell in cells_of(finished, workload="tiny-wide"):
        assert all(len(steps) == 25 for steps in cell["lines"].values())
        assert cell["whole_s"] > 24 * 25 * min(min(steps) for steps in cell["lines"].values()) / 2


def test_http(finished: Path) -> None:
    saturated, open_loop = cells_of(finished, workload="tiny-http")
    assert (saturated["completed"], open_loop["completed"]) == (3, 3)
    assert open_loop["rate"] == pytest.approx(0.7 * saturated["request_throughput"], abs=1e-3)
    assert 0 < saturated["p50_e2el_ms"] <= saturated["p95_e2el_ms"] <= saturated["p99_e2el_ms"]


def test_report_and_plots(finished: Path) -> None:
    text = finished.with_suffix(".md").read_text()
    assert [path.name for path in finished.parent.glob("*.png")] == ["tiny-tiny-wide.png"]
    assert "](tiny-tiny-wide.png)" in text
    assert "over HTTP" in text
