"""``vllm-kvcompress eval``: its arithmetic, and one small evaluation from end to end."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import preloaded
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from vllm_kvcompress.cli import app
from vllm_kvcompress.eval import held_out, run, stats
from vllm_kvcompress.eval.cells import BUDGETS, FULL, Cell, ablation, baselines, grid, parse_budget
from vllm_kvcompress.eval.features import Frechet
from vllm_kvcompress.eval.online import BASELINES
from vllm_kvcompress.eval.pictures import Asked, true_scenes
from vllm_kvcompress.eval.plots import COLOURS
from vllm_kvcompress.eval.report import markdown, summarise
from vllm_kvcompress.eval.scenes import render
from vllm_kvcompress.eval.world import Ground, Scene, Thing
from vllm_kvcompress.policy import PRESETS, Policy
from vllm_kvcompress.policy.raster import Raster


@given(st.integers(1, 400), st.data())
def test_a_share_lies_in_its_interval(number: int, data: st.DataObject) -> None:
    right = data.draw(st.integers(0, number))
    found = stats.share(right, number)
    assert 0 <= found.low <= found.value == right / number <= found.high <= 1
    assert found.high - found.low > 0


def test_intervals_hold_what_they_promise() -> None:
    """Nine in ten at the least of a nominal 95%: 200 draws of 60 pictures of which 70% are right."""
    rng = np.random.default_rng(0)
    held = {"share": 0, "mean": 0}
    for _ in range(200):
        right = rng.random(60) < 0.7
        for name, found in (("share", stats.share(int(right.sum()), 60)), ("mean", stats.mean(right))):
            held[name] += found.low <= 0.7 <= found.high
    assert min(held.values()) >= 180


def test_distance_grows_with_what_is_wrong() -> None:
    truth = true_scenes(600)
    frechet = Frechet.of(truth[:300])
    same, other = frechet.distance(truth[300:]), [255 - picture for picture in truth[300:]]
    noisy = [np.where(np.indices(p.shape)[0] % 8 == 0, 0, p).astype(np.uint8) for p in truth[300:]]
    assert frechet.distance(truth[:300]) == pytest.approx(0, abs=1e-6)
    assert same < 0.2 * frechet.distance(noisy)
    assert same < 0.2 * frechet.distance(other)


def test_the_grid_has_every_preset_at_every_budget() -> None:
    cells = grid(PRESETS, BUDGETS)
    assert len({cell.name for cell in cells}) == len(cells) == 1 + (len(PRESETS) - 1) * len(BUDGETS)
    for cell in cells:
        assert Policy(cell.preset, cell.budget).budget == cell.budget
    for text in ("0", "2", "x", "1/0", ""):
        with pytest.raises(ValueError, match="budget"):
            parse_budget(text)
    with pytest.raises(ValueError, match="preset: unknown"):
        grid(["quest"], BUDGETS)


def test_baselines_are_cells_of_their_own() -> None:
    cells = baselines(["headkv_ar", "headkv_ar:early=2:halved=1"], ["1", "1/6"])
    assert [cell.name for cell in cells] == [
        "headkv_ar-1", "headkv_ar-1_6", "headkv_ar_early_2_halved_1-1", "headkv_ar_early_2_halved_1-1_6"
    ]  # fmt: skip
    assert [cell.preset for cell in cells[1:3]] == ["headkv_ar", "headkv_ar:early=2:halved=1"]
    assert [cell.keeps_all for cell in cells] == [True, False, True, False]
    assert cells[3].section == {"preset": "line_ar", "score": "averaged", "budget": 1 / 6}


def test_every_variation_is_a_policy_of_its_own() -> None:
    raster = Raster(24, 24)
    cells = ablation(raster.width, ["0.2", "1/6"])
    assert len({cell.name for cell in cells}) == len(cells)
    own = {"quantile", "neighbourhood"}
    refused = []
    for cell in cells:
        policy = Policy(**{k: v for k, v in cell.section.items() if k not in own})
        heads = {"profile": (24, 24), "semantic": (0, 48), "spatial": (48, 0)}
        try:
            policy.check(raster) if policy.types == "fitted" else policy.rules(raster, *heads[policy.types])
        except ValueError:
            refused.append(cell.factor)
    assert len(refused) < 0.2 * len(cells)
    assert set(refused) <= {"spatial tokens", "recent", "anchors"}, "only what a budget has no room for"


def test_held_out_scenes_come_back(tmp_path: Path) -> None:
    path = tmp_path / held_out.FILE
    codes = np.random.default_rng(0).integers(0, 16384, (3, 64))
    held_out.save(path, ["a", "an é", "c"], codes)
    captions, back = held_out.load(path, 2)
    assert captions == ["a", "an é"]
    assert (back == codes[:2]).all()
    with pytest.raises(ValueError, match="holds 3, 4 were asked for"):
        held_out.load(path, 4)
    np.savez(path, captions=["a", "b", "c"], codes=codes.astype(np.float32))
    assert (held_out.load(path)[1] == codes).all()
    for wrong in (codes + 0.5, np.where(codes == codes.max(), np.nan, codes), codes.astype(str), codes > 9):
        np.savez(path, captions=["a", "b", "c"], codes=wrong)
        with pytest.raises(ValueError, match=r"^scenes: cannot read .*: (a code is no|codes of)"):
            held_out.load(path)
    np.savez(path, captions=["a", "b", "c"], codes=codes.reshape(3, 8, 8))
    with pytest.raises(ValueError, match=r"codes \[3, 8, 8\]; need \[pictures, tokens\] and as many"):
        held_out.load(path)
    path.write_bytes(b"not a zip")
    with pytest.raises(ValueError, match="cannot read"):
        held_out.load(path, 1)


@pytest.fixture
def drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> run.Evaluation:
    """Pictures of two cells on disc: the full cache's as asked for, of the other's some with a half gone."""
    monkeypatch.setattr(run, "_truth", lambda: Frechet.of(true_scenes(100)))
    evaluation = run.Evaluation(
        "model", tmp_path, grid(["line_ar"], ["0.5"]), Asked(categories=("colors", "counting"), number=3)
    )
    (tmp_path / "pictures").mkdir()
    right, cut = [], []
    for prompt in evaluation.asked.prompts():
        [phrase] = prompt.phrases
        corners = ((24.0, 24.0), (72.0, 24.0), (24.0, 72.0), (72.0, 72.0))[: phrase.count]
        things = (Thing(phrase.shape, str(phrase.colour), "medium", x, y) for x, y in corners)
        right.append(render(Scene(tuple(things), Ground("plain", "white"))))
        cut.append(right[-1].copy())
        if prompt.category == "colors":
            cut[-1][:24] = right[-1][0, 0]
    for cell, pictures in zip(evaluation.cells, (right, cut), strict=True):
        np.savez_compressed(evaluation.raw(cell), pictures=np.stack(pictures))
    return evaluation


def test_the_report_tells_damaged_pictures(drawn: run.Evaluation) -> None:
    full, other = summarise(drawn.cells, {}, drawn.pictures())
    assert full["correct"][0] == full["whole"][0] == full["present"][0] == 1
    assert other["whole"] == pytest.approx(list(vars(stats.share(3, 6)).values()))
    assert other["categories_whole"]["colors"][0] == 0
    assert other["categories_whole"]["counting"][0] == 1
    low, high = other["whole_over_full"][1:]
    assert low < other["whole_over_full"][0] == -0.5 < high
    asked = [sum(phrase.count for phrase in prompt.phrases) for prompt in drawn.asked.prompts()]
    assert full["objects"][0] == pytest.approx(np.mean(asked))
    head, _, first, second = markdown([full, other], {"number": 3}, "eval").split("\n\n")[-1].splitlines()
    names = [name.strip() for name in head.split("|")[1:-1]]
    assert names[2:9] == [
        "all right", "less than full", "whole", "less than full", "there", "less than full", "objects"
    ]  # fmt: skip
    assert [cell.strip()[:5] for cell in first.split("|")[5:7]] == ["100.0", ""]
    assert [cell.strip()[:5] for cell in second.split("|")[5:7]] == ["50.0 ", "-50.0"]


def test_an_older_judges_verdicts_are_judged_again(drawn: run.Evaluation) -> None:
    found = drawn.pictures()
    judged = drawn.folder / "judged" / "line_ar-0.5.json"
    before = json.loads(judged.read_text())
    for name in ("whole", "objects_seen"):
        older = {**before, "verdicts": [{**v} for v in before["verdicts"]]}
        for verdict in older["verdicts"]:
            del verdict[name]
        judged.write_text(json.dumps(older))
        assert drawn.pictures() == found
        assert json.loads(judged.read_text()) == before


def test_a_folder_is_of_one_scenes_file(tmp_path: Path) -> None:
    asked = Asked(categories=("colors",), number=1)

    def evaluation(scenes: str | None) -> run.Evaluation:
        file = None if scenes is None else tmp_path / scenes
        return run.Evaluation("model", tmp_path / "out", grid([], []), asked, 2, file)

    evaluation("b.npz").check_folder()
    evaluation("a.npz").check_folder()  # no results yet
    (tmp_path / "out" / "likelihood.json").write_text("{}")
    evaluation("a.npz").check_folder()
    for other in ("b.npz", None):
        with pytest.raises(ValueError, match=r"results with scenes_file '.*a\.npz', not "):
            evaluation(other).check_folder()


def test_kept_tokens_are_of_the_cells_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[list[str]] = []

    def look(task: object, evaluation: run.Evaluation, cells: list[Cell], path: Path) -> None:
        looked.append([cell.name for cell in cells])
        path.touch()

    monkeypatch.setattr(run, "in_process", look)
    cells = grid(["line_ar", "ssd"], ["0.2"])[1:]
    evaluation = run.Evaluation("model", tmp_path, cells, Asked(categories=("colors",), number=1))
    for shown in (cells[:1], cells[:1], cells, cells, []):
        evaluation.kept(shown, tmp_path / "kept.png")
    assert looked == [["line_ar-0.2"], ["line_ar-0.2", "ssd-0.2"]]


def arguments(model: Path, folder: Path, *more: str) -> list[str]:
    return [
        "eval", str(model), "-o", str(folder), "--presets", "full,line_ar,ssd", "--budgets", "1,0.5",
        "--categories", "colors,position", "--scenes", "2", "--dtype", "float32",
        "--baselines", "headkv_ar:early=2", *more,
    ]  # fmt: skip


def in_this_process(model: Path, folder: Path, *more: str) -> Result:
    return CliRunner().invoke(app, arguments(model, folder, *more))


def evaluate(model: Path, folder: Path, *more: str) -> "subprocess.CompletedProcess[str]":
    command = [str(Path(sys.executable).parent / "vllm-kvcompress"), *arguments(model, folder, *more)]
    return preloaded.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.fixture(scope="module")
def folder(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluation of a random model on an 8x8 grid."""
    folder = tmp_path_factory.mktemp("eval")
    done = evaluate(checkpoints["tiny-hf"], folder, "--pictures", "2")
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


@pytest.mark.timeout(900)
def test_one_command_measures_and_reports(folder: Path) -> None:
    records = {r["name"]: r for r in json.loads((folder / "results.json").read_text())}
    online = ["headkv_ar_early_2-1", "headkv_ar_early_2-0.5"]
    assert list(records) == ["full", "line_ar-1", "line_ar-0.5", "ssd-1", "ssd-0.5", *online]
    for name in ("line_ar-1", "ssd-1", online[0]):
        assert records[name]["same_as"] == "full"
        assert abs(records[name]["nll_over_full"][0]) < 1e-5
    assert records["line_ar-0.5"]["kl"][0] > 1e-6
    assert set(records["ssd-0.5"]["head_error"]) == {"spatial", "semantic"}
    assert list(records["full"]["categories"]) == ["colors", "position"]
    for record in records.values():
        assert record["present"][0] >= record["correct"][0]  # the milder rule
    report = (folder / "report.md").read_text()
    assert "| line_ar | 0.5 |" in report
    assert "| headkv_ar:early=2 | 0.5 |" in report
    assert records[online[1]]["kl"][0] > 1e-6
    assert records[online[1]]["resident"] == pytest.approx(32, abs=1)
    assert re.search(r"Made by `vllm-kvcompress eval ", report)
    for name in ("quality.png", "sheet.png"):
        assert (folder / name).stat().st_size > 10_000
    drawn = {path.stem: np.load(path)["pictures"] for path in (folder / "pictures").glob("*.npz")}
    assert set(drawn) == {"full", "line_ar-0.5", "ssd-0.5", online[1]}
    for name in ("line_ar-0.5", online[1]):
        assert (drawn["full"] != drawn[name]).any()


@pytest.mark.timeout(900)
def test_it_goes_on_where_it_stopped_and_keeps_settings_apart(
    folder: Path, checkpoints: dict[str, Path]
) -> None:
    kept = {path: path.stat().st_mtime_ns for path in folder.rglob("*.npz")}
    before = (folder / "judged" / "full.json").read_text()
    (folder / "judged" / "full.json").unlink()
    again = evaluate(checkpoints["tiny-hf"], folder, "--pictures", "2")
    assert again.returncode == 0, again.stderr[-2000:]
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.npz")} == kept, "nothing drawn again"
    assert (folder / "judged" / "full.json").read_text() == before
    for more, complaint in ((("--pictures", "3"), "number 2, not 3"), (("--seed", "1"), "seed 0, not 1")):
        refused = in_this_process(checkpoints["tiny-hf"], folder, "--pictures", "2", *more)
        assert refused.exit_code == 1
        assert complaint in refused.stderr


@pytest.mark.timeout(900)
def test_a_short_file_of_scenes_is_replayed_whole(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """Likelihoods of a model alone, as the command stands in docs/quality.md."""
    rng = np.random.default_rng(0)
    scenes = tmp_path / "scenes.npz"
    held_out.save(scenes, ["a red bird", "grass", "two cups"], rng.integers(0, 64, (3, 64)))
    model, out = checkpoints["tiny-hf"], tmp_path / "out"
    asked = [
        "--scenes-file",
        str(scenes),
        "--pictures",
        "0",
        "--presets",
        "full,fitted",
        "--budgets",
        "0.5,1/3",
    ]
    command = [
        str(Path(sys.executable).parent / "vllm-kvcompress"),
        "eval",
        str(model),
        "-o",
        str(out),
        *asked,
    ]
    done = preloaded.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    records = {r["name"]: r for r in json.loads((out / "results.json").read_text())}
    assert list(records) == ["full", "fitted-0.5", "fitted-1_3"]
    for name, budget in (("fitted-0.5", 1 / 2), ("fitted-1_3", 1 / 3)):
        assert 0 < records[name]["kl_guided"][0] < 20
        assert records[name]["resident"] <= 64 * budget
    held_out.save(scenes, ["a red bird", "grass", "two cups"], rng.integers(0, 64, (3, 64)))
    changed = CliRunner().invoke(app, command[1:])
    assert changed.exit_code == 1
    assert "holds results with files" in changed.stderr


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut", b"no archive", None])
def test_scenes_of_no_use_are_one_line_before_an_engine_starts(
    checkpoints: dict[str, Path], tmp_path: Path, content: bytes | None
) -> None:
    scenes = tmp_path / "scenes.npz"
    if content is not None:
        scenes.write_bytes(content)
    refused = in_this_process(checkpoints["tiny-hf"], tmp_path / "new", "--scenes-file", str(scenes))
    assert refused.exit_code == 1
    assert refused.stderr.startswith("vllm-kvcompress: scenes: cannot read ")
    assert len(refused.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("codes", "more", "complaint"),
    [
        (np.zeros((2, 256), int), (), "scenes: pictures of 256 codes, where one of 128x128 has 64: name"),
        (np.full((2, 64), 10**6), (), "scenes: codes from 1000000 to 1000000, but this model's are from 0"),
        (np.zeros((2, 64), int), ("--scenes", "3"), "scenes: .*scenes.npz holds 2, 3 were asked for"),
    ],
)
def test_scenes_of_another_model_leave_the_folder_free(
    checkpoints: dict[str, Path], tmp_path: Path, codes: np.ndarray, more: tuple[str, ...], complaint: str
) -> None:
    """The folder would be theirs, and refuse the right ones after them."""
    scenes = tmp_path / "scenes.npz"
    np.savez(scenes, captions=["a red bird", "grass"], codes=codes)
    asked = ("--scenes-file", str(scenes), *more)
    refused = in_this_process(checkpoints["tiny-hf"], tmp_path / "new", *asked)
    assert refused.exit_code == 1
    assert re.match(f"vllm-kvcompress: {complaint}", refused.stderr)
    assert not (tmp_path / "new").exists()


def test_unknown_names_are_refused(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    for more, complaint in (
        (("--presets", "quest"), "preset: unknown 'quest'"),
        (("--baselines", "quest"), "baseline: unknown 'quest'"),
        (("--budgets", "7"), "budget: 7 is not in (0, 1]"),
        (("--categories", "poems"), "categories: unknown 'poems'"),
    ):
        refused = in_this_process(checkpoints["tiny-hf"], tmp_path / "new", *more)
        assert refused.exit_code == 1
        assert refused.stderr.startswith(f"vllm-kvcompress: {complaint}")
        assert len(refused.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "new").exists()


def test_every_line_of_a_plot_has_its_own_colour() -> None:
    assert set(COLOURS) == {*PRESETS, *BASELINES} - {FULL}
    assert len(set(COLOURS.values())) == len(COLOURS)
