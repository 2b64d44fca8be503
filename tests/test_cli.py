"""The ``vllm-kvcompress`` command."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import preloaded
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from vllm_kvcompress import cli
from vllm_kvcompress.heads.curves import LossCurves, candidate_types
from vllm_kvcompress.heads.plot import draw_profile
from vllm_kvcompress.heads.profile import HeadProfile
from vllm_kvcompress.policy import Raster
from vllm_kvcompress.testing.checkpoints import TINY

SCORES = [[0.1, 0.2, 0.9], [0.3, 0.75, 0.8]]


def profile(**changes: object) -> HeadProfile:
    """Two layers of three heads, half of them spatial."""
    fields = {
        "model": "painter [1B]",
        "model_hash": "ab",
        "metric": "mass outside",
        "threshold": 0.5,
        "prompts_hash": "cd",
        "neighbourhood": 16,
        "layers": 2,
        "kv_heads": 3,
        "scores": SCORES,
    }
    return HeadProfile(**{**fields, **changes})


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    profile().save(tmp_path / "profile.json")
    return tmp_path / "profile.json"


def invoke(*arguments: object) -> Result:
    """The command in this process; nothing but ``SystemExit`` may come out of it."""
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def one_line(result: Result) -> str:
    """The error message of a failed command."""
    assert result.exit_code == 1, result.output
    [line] = result.stderr.splitlines()
    return line


def test_summary_counts_heads_of_each_type(saved: Path) -> None:
    result = invoke("inspect", saved)
    assert result.exit_code == 0
    rows = [line.split() for line in result.stdout.replace("│", " ").replace("┃", " ").splitlines()]
    assert ["0", "2", "1", "0.400", "··█"] in rows
    assert ["1", "1", "2", "0.617", "·██"] in rows
    assert ["all", "3", "3", "0.508"] in rows
    assert "painter [1B]: mass outside" in result.stdout
    assert "threshold: 0.500" in result.stdout
    assert "16 image tokens" in result.stdout


def test_another_threshold(saved: Path) -> None:
    result = invoke("inspect", saved, "--threshold", "0.75")
    assert "threshold: 0.750" in result.stdout
    rows = [line.split() for line in result.stdout.replace("│", " ").splitlines()]
    assert ["1", "2", "1", "0.617", "··█"] in rows  # a score at the threshold is spatial


def test_many_heads_keep_to_one_row_each(tmp_path: Path) -> None:
    wide = profile(layers=1, kv_heads=32, scores=[[0.9] * 31 + [0.1]])
    wide.save(tmp_path / "wide.json")
    assert "█" * 31 + "·" in invoke("inspect", tmp_path / "wide.json").stdout


def test_picture_has_both_types_in_their_places(saved: Path, tmp_path: Path) -> None:
    path = tmp_path / "heads.png"
    result = invoke("inspect", saved, "-o", path)
    assert result.exit_code == 0
    assert str(path) in result.stdout.replace("\n", "")
    pixels = np.array(Image.open(path).convert("RGB")).astype(int)
    left = pixels[:, : pixels.shape[1] // 2]
    blue = (left[..., 2] - left[..., 0]) > 40
    orange = (left[..., 0] - left[..., 2]) > 40
    share = blue.sum() / (blue.sum() + orange.sum())
    assert 0.45 < share < 0.55
    # Layer 0 is at the top, its one semantic head on the right.
    rows, columns = np.nonzero(orange)
    top = rows < (rows.min() + rows.max()) / 2
    assert columns[top].min() > np.nonzero(blue)[1].mean()


@pytest.mark.parametrize("threshold", [None, 0.0, 1.0, 0.9])
@pytest.mark.parametrize("scores", [SCORES, [[0.4] * 3] * 2, [[0.0] * 3, [1.0] * 3]], ids=str)
def test_any_profile_can_be_drawn(tmp_path: Path, scores: list[list[float]], threshold: float | None) -> None:
    draw_profile(profile(scores=scores), tmp_path / "heads.svg", threshold)
    assert "<svg" in (tmp_path / "heads.svg").read_text()


def test_histogram_counts_every_head_once_on_its_side_of_the_threshold() -> None:
    from matplotlib.figure import Figure

    from vllm_kvcompress.heads import plot

    scores = np.random.default_rng(0).random((12, 8)).round(1)  # many of them exactly at the threshold
    many = profile(layers=12, kv_heads=8, scores=scores.tolist())
    axes = Figure().subplots()
    plot._draw_histogram(axes, many, 0.5)
    spatial, semantic = axes.containers
    assert sum(bar.get_height() for bar in spatial) == (scores <= 0.5).sum()
    assert sum(bar.get_height() for bar in semantic) == (scores > 0.5).sum()
    assert max(bar.get_x() + bar.get_width() for bar in spatial if bar.get_height()) <= 0.5 + 1e-9
    assert min(bar.get_x() for bar in semantic if bar.get_height()) >= 0.5 - 1e-9


def test_profiles_that_cannot_be_read(tmp_path: Path) -> None:
    assert "cannot read" in one_line(invoke("inspect", tmp_path / "none.json"))
    (tmp_path / "bad.json").write_text('{"model": 3}')
    assert "bad.json" in one_line(invoke("inspect", tmp_path / "bad.json"))
    assert "cannot read" in one_line(invoke("inspect", tmp_path))


def test_pictures_that_cannot_be_written(saved: Path, tmp_path: Path) -> None:
    assert "xyz" in one_line(invoke("inspect", saved, "-o", tmp_path / "heads.xyz"))
    assert "nowhere" in one_line(invoke("inspect", saved, "-o", tmp_path / "nowhere" / "heads.png"))


def test_no_matplotlib(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "vllm-kvcompress[plot]" in one_line(invoke("inspect", saved, "-o", tmp_path / "heads.png"))
    assert invoke("inspect", saved).exit_code == 0


def test_a_picture_without_an_ending_is_named_as_it_is_written(saved: Path, tmp_path: Path) -> None:
    result = invoke("inspect", saved, "-o", tmp_path / "heads")
    assert str(tmp_path / "heads.png") in result.stdout.replace("\n", "")
    assert Image.open(tmp_path / "heads.png").size[0] > 300


@pytest.mark.parametrize(
    "arguments",
    [
        ("inspect",),
        ("inspect", "p.json", "--threshold", "2"),
        ("inspect", "p.json", "-o", "."),
        ("inspect", "p.json", "--max-types", "7"),
        ("inspect", "p.json", "--tolerance", "0.1"),
        ("inspect", "p.json", "--budget", "auto", "--tolerance", "nan"),
        ("inspect", "p.json", "--kv-cache-dtype", "int8"),
        ("inspect", "p.json", "--tensor-parallel-size", "0"),
        ("calibrate", "model"),
        ("calibrate", "model", "-o", "."),
        ("calibrate", "model", "-o", "README.md/profile.json"),
        ("paint",),
    ],
    ids=" ".join,
)
def test_a_wrong_command_line_is_status_2(
    arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "README.md").touch()
    monkeypatch.chdir(tmp_path)
    assert invoke(*arguments).exit_code == 2


def calibrate(*arguments: object) -> "subprocess.CompletedProcess[str]":
    """The installed command, in a process of its own: it starts an engine."""
    return preloaded.run(
        [str(Path(sys.executable).with_name("vllm-kvcompress")), "calibrate", *map(str, arguments)],
        env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"},
    )  # fmt: skip


def test_calibrate_then_inspect(checkpoints: dict[str, Path], private_cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "made" / "profile.json"
    wanted = ("--force", "--budgets", "1/4, auto")
    done = calibrate(checkpoints["tiny-hf"], "-o", out, "--dtype", "float32", *wanted)
    assert done.returncode == 0, done.stderr
    made = HeadProfile.load(out)
    assert (made.layers, made.kv_heads) == (TINY.layers, TINY.kv_heads)
    assert made.neighbourhood == 2 * TINY.lines
    assert "Calibrating: drawing" in done.stderr
    assert "Calibrating: measuring heads" in done.stderr
    assert "Trying fits" in done.stderr
    assert f"{out}: curves of 8 cache heads; by locality 1 spatial and 3 semantic heads" in done.stdout
    # Beside those that other modules' engines of this model have left.
    kept = (private_cache / "kvcompress" / "head_profiles").glob(f"*{made.model_hash}.json")
    assert made in map(HeadProfile.load, kept)
    shown = invoke("inspect", out, "-o", tmp_path / "heads.png")
    assert shown.exit_code == 0
    assert "predicted loss" in shown.stdout
    (tried,) = [trial for trial in made.trials if trial.budget == 64 / 4]
    said = f"tried at 0.25: guided KL {tried.divergence:.2g} nats a token, {tried.squares:.2g} by predicted"
    assert said in shown.stdout
    one = invoke("inspect", out, "--budget", "1/4")
    assert one.exit_code == 0
    assert said in one.stdout
    assert "conditional" in one.stdout
    assert "preset to decoupled" not in one.output


def fitted(lines: int = 8, **changes: object) -> HeadProfile:
    """A profile with curves: two layers of three heads in two branches, that fall with the slots."""
    raster = Raster(lines, 8)
    candidates = candidate_types(raster)
    slots = np.array([rule.capacity for rule in candidates])
    reach = np.linspace(4, 20, 12).reshape(2, 6, 1)
    losses = np.exp(-slots / reach) * (slots < raster.tokens)
    curves = LossCurves(candidates, losses).dump()
    return profile(format=2, head_size=64, dtype="bfloat16", curves=curves, **changes)


def test_what_budgets_cost(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    fitted().save(path)
    result = invoke("inspect", path, "-o", tmp_path / "fit.png")
    assert result.exit_code == 0, result.output
    rows = [line.split() for line in result.stdout.replace("│", " ").splitlines()]
    table = [row for row in rows if len(row) == 5 and row[3].endswith("x")]
    budgets, losses = [float(row[0]) for row in table], [float(row[1]) for row in table]
    assert budgets == sorted(budgets, reverse=True)
    assert losses == sorted(losses)
    assert "0.2" in [row[0] for row in table]
    for row in table:
        assert int(row[4]) == pytest.approx(1024 / float(row[2]), rel=0.1)
    assert Image.open(tmp_path / "fit.png").size[0] > 600

    one = invoke("inspect", path, "--budget", "0.15")
    assert one.exit_code == 0
    heads = [line.split() for line in one.stdout.replace("│", " ").splitlines()]
    layers = [row for row in heads if len(row) == 3 and row[0] in ("0", "1")]
    assert [[len(part) for part in row[1:]] for row in layers] == [[3, 3], [3, 3]]
    for budget, match in (
        ("0.01", "^vllm-kvcompress: budget: .* at least 0.125"),
        ("much", "neither a share"),
    ):
        assert re.search(match, one_line(invoke("inspect", path, "--budget", budget)))
    assert invoke("inspect", path, "--budget", "auto").exit_code == 0
    assert invoke("inspect", path, "--budget", "0.2", "--threshold", "0.5").exit_code == 2


@pytest.mark.parametrize(("lines", "budgets"), [(1, ["1"]), (4, ["0.5", "0.333", "0.25"])])
def test_a_grid_of_few_lines_has_the_budgets_that_leave_one(
    tmp_path: Path, lines: int, budgets: list[str]
) -> None:
    fitted(lines).save(tmp_path / "profile.json")
    result = invoke("inspect", tmp_path / "profile.json", "-o", tmp_path / "heads.png")
    assert result.exit_code == 0, result.output
    rows = [line.split() for line in result.stdout.replace("│", " ").splitlines()]
    table = [row for row in rows if len(row) == 5 and row[3].endswith("x")]
    assert [row[0] for row in table] == budgets
    for row in table:  # of little, digits enough
        assert int(row[4]) == pytest.approx(1024 / float(row[2]), rel=0.01)


def test_settings_that_are_named_show_what_was_tried_for_them(tmp_path: Path) -> None:
    """Each is part of a fit; by itself the command knows a server's defaults alone."""
    path, pages = tmp_path / "profile.json", {"slot": 256, "side": 8}
    tried = {"tolerance": 0.0008, "power": 0.5, "conditional": 4.0, "squares": 0.5, "types": 6, "ranks": 1}
    cases = [
        ({}, ()),
        ({"types": 2}, ("--max-types", "2")),
        ({"slot": 128}, ("--kv-cache-dtype", "fp8")),
        ({"ranks": 3}, ("--tensor-parallel-size", "3")),
        ({"budget": "auto", "tolerance": 0.02}, ("--budget", "auto", "--tolerance", "0.02")),
    ]
    trials = [
        {"budget": 16, **pages, **tried, **changes, "divergence": 0.1 + number / 100}
        for number, (changes, _) in enumerate(cases)
    ]
    fitted(trials=trials).save(path)
    for number, (changes, options) in enumerate(cases):
        result = invoke("inspect", path, *(() if "budget" in changes else ("--budget", "1/4")), *options)
        assert result.exit_code == 0, result.output
        assert f"guided KL {0.1 + number / 100:.2g} nats" in result.stdout
    shared = invoke("inspect", path, "--budget", "1/4", "--tensor-parallel-size", "3").stdout
    [named] = [line for line in shared.splitlines() if line.startswith("at 0.25 on each of 3 ranks")]
    assert sum(map(int, re.findall(r": (\d+)", named))) == 2 * 6 / 3
    refused = invoke("inspect", path, "--budget", "1/4", "--tensor-parallel-size", "2")
    assert "can't be shared out evenly among 2 ranks" in one_line(refused)


def test_budgets_of_a_profile_without_curves(saved: Path) -> None:
    assert "format 1" in one_line(invoke("inspect", saved, "--budget", "0.2"))


def test_a_model_that_cannot_be_calibrated_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "janus", "architectures": ["X"]}')
    done = calibrate(tmp_path, "-o", tmp_path / "profile.json")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("vllm-kvcompress: ")
    assert not (tmp_path / "profile.json").exists()
