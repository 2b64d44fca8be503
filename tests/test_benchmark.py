"""The side-by-side benchmark: it runs, with tiny numbers; its arithmetic; what the documents claim."""

import json
import socket
import statistics
import sys
import time
from pathlib import Path

import preloaded
import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from side_by_side import bars, plan, report, results, workloads  # noqa: E402
from side_by_side.contenders import CONTENDERS, OURS, OURS_INT8, STOCK, TRANSFORMERS  # noqa: E402
from side_by_side.floor import Copy, step_bytes, weight_bytes  # noqa: E402
from side_by_side.stopwatch import Stopwatch  # noqa: E402
from side_by_side.summary import (  # noqa: E402
    Figure,
    Samples,
    drawing_seconds,
    growth,
    over_floor,
    tokens_per_second,
)
from side_by_side.workloads import BLOCK, janus, tiny  # noqa: E402

DOCUMENTS = ("README.md", "benchmarks/README.md", "docs/performance.md")


def run(path: Path, *more: str, mode: str = "tiny") -> str:
    """``python -m side_by_side run``."""
    code = "import sys; sys.path.insert(0, '.'); from side_by_side.cli import app; app()"
    command = [
        sys.executable, "-c", code, "run", mode, "--output", str(path), "--threads", "1", *more
    ]  # fmt: skip
    done = preloaded.run(command, cwd=ROOT / "benchmarks", timeout=1000)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "tiny.json"
    run(path)
    return path


def cells_of(path: Path, **wanted: object) -> list[dict]:
    cells = json.loads(path.read_text())["cells"]
    return [cell for cell in cells if all(cell.get(k) == v for k, v in wanted.items())]


@pytest.mark.timeout(1200)
def test_every_cell_is_measured_in_turns(finished):
    data = json.loads(finished.read_text())
    assert data["finished"]
    turns = [(c["repeat"], c["batch"], c["contender"]) for c in cells_of(finished, workload="tiny")]
    assert turns == [(r, str(b), c) for r in (0, 1) for b in (1, 2) for c in (TRANSFORMERS, STOCK, OURS)]
    for cell in cells_of(finished, workload="tiny"):
        assert sorted(map(int, cell["lines"])) == [0, 4, 23]
        if cell["contender"] != TRANSFORMERS:
            assert all(len(steps) == 24 for steps in cell["lines"].values())
        assert ("split" in cell) == (cell["repeat"] == 0)
    for contender in (TRANSFORMERS, STOCK, OURS):
        ratios = []
        for cell in cells_of(finished, workload="tiny", contender=contender, repeat=0):
            split = cell["split"]
            assert all(split[part] > 0 for part in ("attention", "linear layers", "image head", "sampling"))
            # Of one step, not of a line's 24. The split is a mean: a moment taken by others makes it longer.
            ratios.append(sum(split.values()) / statistics.median(cell["lines"]["4"]))
        assert 0.1 < min(ratios) < 10


def test_a_picture_begun_in_the_middle_holds_what_a_drawn_one_would(finished):
    workload = tiny("tiny")
    (stock, _), (ours, _) = (
        cells_of(finished, workload="tiny", contender=n, batch="2") for n in (STOCK, OURS)
    )
    (other, _) = cells_of(finished, workload="tiny", contender=TRANSFORMERS, batch="2")
    assert stock["prefix"] == ours["prefix"] == other["prefix"]
    tokens = stock["prefix"] + workload.tokens
    assert stock["kv_bytes_per_image"] == -(-tokens // 128) * 128 * workload.token_bytes
    assert other["kv_bytes_per_image"] == tokens * workload.token_bytes
    kept = (ours["prefix"] + workload.tokens / 6) * workload.token_bytes
    assert kept < ours["kv_bytes_per_image"] < 1.2 * kept


def test_report_and_plots(finished):
    text = finished.with_suffix(".md").read_text()
    pictures = sorted(path.name for path in finished.parent.glob("*.png"))
    assert pictures == ["tiny-tiny.png"]
    assert all(f"]({name})" in text for name in pictures)
    for name in (TRANSFORMERS, STOCK, OURS):
        assert f"| {name} |" in text
    for private in (socket.gethostname(), str(ROOT), str(Path.home())):
        assert private not in finished.read_text()
        assert private not in text


@pytest.mark.timeout(600)
def test_an_interrupted_run_goes_on(finished):
    data = json.loads(finished.read_text())
    lost = data["cells"].pop(1)
    finished.write_text(json.dumps(data | {"finished": False}))
    run(finished)
    now = json.loads(finished.read_text())
    assert now["finished"]
    assert now["cells"][:-1] == data["cells"]
    again = now["cells"][-1]
    assert again["contender"] == lost["contender"]
    assert again["lines"] != lost["lines"]


def test_no_time_no_cells(tmp_path):
    path = tmp_path / "none.json"
    run(path, "--minutes", "0.0001")
    assert not path.exists()


def cell(contender: str, repeat: int, lines: dict[int, float], **more: object) -> dict:
    return {
        "workload": "tiny", "contender": contender, "batch": "2", "repeat": repeat, "drawn_at_once": 2,
        "prefix": 10, "prompt_s": 0.5, "lines": {str(k): [v] * 4 for k, v in lines.items()}, "vq_s": 1.0,
        "kv_bytes_per_image": 1, "copy_gb_s": 10.0, "peak_rss": 1, **more,
    }  # fmt: skip


def test_whole_pictures_are_integrated_between_lines():
    workload = tiny("tiny")
    flat = cell(STOCK, 0, {0: 0.01})
    assert drawing_seconds(flat, workload) == pytest.approx(0.5 + 576 * 0.01)
    assert tokens_per_second(flat, workload) == pytest.approx(2 * 576 / (0.5 + 5.76))
    rising = cell(STOCK, 0, {0: 0.0, 23: 0.23})
    assert drawing_seconds(rising, workload) == pytest.approx(0.5 + 24 * sum(i / 100 for i in range(24)))
    bent = cell(OURS, 0, {0: 0.0, 4: 0.04, 23: 0.04})
    assert drawing_seconds(bent, workload) == pytest.approx(0.5 + 24 * (0.06 + 20 * 0.04))
    assert growth(bent, workload) == pytest.approx(1)


def test_ratios_pair_the_turns():
    workload = tiny("tiny")
    cells = [cell(STOCK, r, {0: t}, prompt_s=0) for r, t in enumerate((0.1, 0.2, 0.4))]
    cells += [cell(OURS, r, {0: t}, prompt_s=0) for r, t in enumerate((0.05, 0.1, 0.1))]
    found = Samples(cells).ratio(workload, "2", OURS, STOCK, tokens_per_second)
    assert (found.median, found.low, found.high) == pytest.approx((2, 2, 4))
    assert Samples(cells).ratio(workload, "2", OURS, TRANSFORMERS, tokens_per_second) is None
    bar = bars.Bar("x", "bars", "2", tokens_per_second, STOCK, 2.5)
    assert not bar.met(found)
    assert bar.met(Figure(2.6, 1, 3))
    assert found.text() == "2.00 (2.00-4.00)"


def test_bytes_that_must_move():
    model = janus("x", 24, (0,))
    # 51.4 M weights a layer, 4.2 M + 33.6 M in the image head, 192 KiB of K and V a token and branch.
    assert weight_bytes(model) == pytest.approx(2 * (24 * 51.4e6 + 37.7e6), rel=0.01)
    assert model.token_bytes == 2 * 192 * 1024
    full, sixth = (step_bytes(model, 16, 30, 500, b) - weight_bytes(model) for b in (1.0, 1 / 6))
    assert full == 16 * 530 * model.token_bytes
    assert sixth == pytest.approx(16 * 126 * model.token_bytes)
    assert janus("x", 24, (0,), 8).fixed_memory(24) == (8 * 19 + 1) * BLOCK * model.token_bytes
    assert Copy(1 << 20).gb_s() > 0


def test_int8_weights_are_the_same_numbers_in_fewer_bytes(tmp_path, monkeypatch):
    """The checkpoint is written once, after bfloat16's; its floor is that of its bytes."""
    monkeypatch.setattr(workloads, "OUT", tmp_path)
    workload = tiny("tiny")
    packed = workload.checkpoint("int8")
    plain = workload.checkpoint()
    assert packed.parent == plain.parent
    assert packed != plain
    written = (packed / "model.safetensors").stat().st_mtime_ns
    assert workload.checkpoint("int8") == packed
    assert (packed / "model.safetensors").stat().st_mtime_ns == written
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (packed, plain))
    assert {name for name in ours if name not in theirs} == {
        name.replace(".weight", ".weight_scale") for name in ours if ours[name].dtype == torch.int8
    }
    assert sum(tensor.dtype == torch.int8 for tensor in ours.values()) == 7 * workload.layers
    for name, tensor in theirs.items():
        if ours[name].dtype == torch.int8:
            scale = ours[name.replace(".weight", ".weight_scale")]
            apart = (ours[name] * scale - tensor.float()).abs()
            assert bool((apart <= 0.51 * scale).all())
        else:
            assert torch.equal(ours[name], tensor)
    g = workload.geometry
    layers = g.layers * (4 * g.hidden**2 + 3 * g.hidden * g.intermediate)
    assert weight_bytes(workload) - weight_bytes(workload, "int8") == layers
    floors = [over_floor(cell(name, 0, {23: 1.0}), workload) for name in (OURS_INT8, OURS)]
    assert floors[0] > floors[1]
    with pytest.raises(ValueError, match="no int8 weights"):
        workloads.shapes("shapes", (0,)).checkpoint("int8")


def test_the_stopwatch_counts_each_moment_once():
    class Thing:
        def outer(self) -> None:
            time.sleep(0.02)
            self.inner()

        def inner(self) -> None:
            time.sleep(0.04)

    watch, thing = Stopwatch(), Thing()

    def step() -> float:
        start = time.perf_counter()
        thing.outer()
        time.sleep(0.01)
        return time.perf_counter() - start

    with watch.methods([(thing, "outer", "a"), (thing, "inner", "b")]):
        parts = watch.per_step(step, 2)
    assert not vars(thing)
    # Were the inner call's time in the outer's too, nothing, or less, would be left for "other".
    assert all(parts[name] >= least for name, least in (("a", 0.02), ("b", 0.04), ("other", 0.01)))


def test_machine_names_are_generic():
    assert results.machine_name("Intel(R) Xeon(R) Platinum 8488C CPU @ 2.40GHz", 2) == "xeon-2core"
    assert results.machine_name("AMD EPYC 9654 96-Core Processor", 8) == "epyc-8core"
    assert results.machine_name("", 4) == "cpu-4core"


@pytest.mark.parametrize("mode", plan.MODES)
def test_plans(mode):
    parts = plan.groups(mode)
    keys = [c.key for g in parts if isinstance(g, plan.Group) for c in g.cells()]
    assert len(keys) == len(set(keys))
    assert all(key[1] in CONTENDERS for key in keys)
    if not mode.startswith("tiny"):
        assert {key[1] for key in keys} == set(CONTENDERS)
        assert all(report._group_of(bar, mode) for bar in bars.BARS)


def test_claims_in_the_documents_are_those_of_the_results():
    kept = sorted(results.FOLDER.glob("*.json"))
    claims = [claim for name in DOCUMENTS for claim in report.claimed((ROOT / name).read_text())]
    for name, text in claims:
        assert text == report.claim(json.loads((results.FOLDER / name).read_text()), name)
    assert bool(kept) == bool(report.claimed((ROOT / "README.md").read_text()))
    for path in kept:
        plots = sorted(p.name for p in path.parent.glob(f"{path.stem}-*.png"))
        expected = report.markdown(json.loads(path.read_text()), plots)
        assert sorted(path.with_suffix(".md").read_text().splitlines()) == sorted(expected.splitlines())


def test_a_changed_claim_is_found():
    data = {"about": results.describe("tiny", 1), "cells": []}
    for repeat in range(2):
        for name, seconds in ((STOCK, 0.1), (OURS, 0.05)):
            data["cells"].append(cell(name, repeat, {0: seconds}, batch="1", prompt_s=0))
    part = report.claim(data, "x.json")
    assert "| 2.00 (2.00-2.00) | at least 0.97 | met |" in part
    document = report.with_claim("before\n<!-- benchmark: old.json -->\n<!-- /benchmark -->\nafter", part)
    assert document == f"before\n{part}\nafter"
    assert report.claimed(document) == [("x.json", part)]
    assert report.claimed(document.replace("at least", "at most")) != [("x.json", part)]
    assert report.with_claim(f"a\n{report.PLACE}\nb", part) == f"a\n{part}\nb"
    two = "".join(f"<!-- benchmark: {name}.json -->\n<!-- /benchmark -->\n" for name in ("old", "x"))
    assert report.with_claim(two, part) == two.replace(
        "<!-- benchmark: x.json -->\n<!-- /benchmark -->", part
    )
    for document in ("nothing here", two.replace(": x", ": y")):
        with pytest.raises(ValueError, match="neither <!-- benchmark"):
            report.with_claim(document, part)
