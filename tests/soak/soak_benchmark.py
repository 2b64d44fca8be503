"""The side-by-side benchmark's groups with engines of their own: HTTP, a fixed memory, int8, a wider grid."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "benchmarks")]

from side_by_side.contenders import CONTENDERS, OURS, STOCK  # noqa: E402
from side_by_side.plan import Group, groups  # noqa: E402
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


def test_weights_of_fewer_bytes_take_turns_with_bfloat16(finished: Path) -> None:
    (group,) = [one for one in groups("tiny-more") if isinstance(one, Group) and one.name == "weights"]
    cells = cells_of(finished, workload=group.workload.name)
    assert [cell["contender"] for cell in cells] == [*group.contenders]
    held = {cell["contender"]: cell["kv_bytes_per_image"] for cell in cells}
    for name in held:
        if CONTENDERS[name].weights:
            assert held[name] == held[name.removesuffix(" int8")]


def test_http(finished: Path) -> None:
    saturated, open_loop = cells_of(finished, workload="tiny-http")
    assert (saturated["completed"], open_loop["completed"]) == (3, 3)
    assert open_loop["rate"] == pytest.approx(0.7 * saturated["request_throughput"], abs=1e-3)
    assert 0 < saturated["p50_e2el_ms"] <= saturated["p95_e2el_ms"] <= saturated["p99_e2el_ms"]


def test_report_and_plots(finished: Path) -> None:
    text = finished.with_suffix(".md").read_text()
    plots = sorted(path.name for path in finished.parent.glob("*.png"))
    assert plots == ["tiny-tiny-weights.png", "tiny-tiny-wide.png"]
    assert all(f"]({name})" in text for name in plots)
    assert "over HTTP" in text
