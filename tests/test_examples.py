"""Every file of examples/ runs: the demo, a picture without a server, and how the demo's model was made."""

import ast
import json
import re
import runpy
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import preloaded
import pytest
import shapes_process
from PIL import Image

from vllm_kvcompress.testing.server import Server

EXAMPLES = Path(__file__).parents[1] / "examples"
PROMPTS = "shapes/calibration_prompts.py"
RUN = {"demo.py", "offline.py", PROMPTS, *(f"shapes/{name}.py" for name in shapes_process.SCRIPTS)}
"""What these tests run as a program."""


def test_no_example_is_left_out() -> None:
    """A file is run here, or imported by one that is."""
    files = {str(path.relative_to(EXAMPLES)) for path in EXAMPLES.rglob("*.py")}
    reached, left = set[str](), set(RUN)
    while left:
        name = left.pop()
        reached.add(name)
        for node in ast.walk(ast.parse((EXAMPLES / name).read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            beside = {str(Path(name).with_name(f"{module}.py")) for module in modules}
            left |= (beside & files) - reached
    assert reached == files


def test_the_demo_models_calibration_prompts(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / PROMPTS), run_name="__main__")
    prompts = capsys.readouterr().out
    assert prompts == (EXAMPLES / "shapes/calibration.txt").read_text()
    assert len(set(prompts.splitlines())) == 48


def test_the_demo(
    checkpoints: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """``make demo COMPRESSED=1 WINDOW=3``; only vLLM is imported already in the server that it starts."""
    monkeypatch.setattr(f"{Server.__module__}.Server", partial(Server, start=preloaded.Popen))
    output = tmp_path / "out" / "demo.png"
    words = [
        "demo.py", "--model", checkpoints["tiny-hf"], "--output", output, "--seed", "3", "--compressed",
        "--window", "3",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", list(map(str, words)))
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(EXAMPLES / "demo.py"), run_name="__main__")
    said = capsys.readouterr().out
    assert not ended.value.code, said
    assert re.search(r"^pictures +1 of 128 x 128 pixels$", said, re.MULTILINE)
    assert re.search(r"^KV bytes per image +[1-9][\d,]+$", said, re.MULTILINE)
    with Image.open(output) as picture:
        assert (picture.size, len(picture.getcolors(2**24)) > 100) == ((384, 384), True)
    log = (output.parent / "demo-server-compressed.log").read_text()
    assert "kvcompress: preset fitted, budget 0.2" in log
    assert "Windows: 3 tokens a step" in log


def test_a_picture_without_a_server(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    output = tmp_path / "made" / "cat.png"
    done = run("offline.py", checkpoints["tiny-hf"], "a cat", "-o", output, "--seed", 3, "--compressed")
    assert f"64 image tokens -> {output}\n" in done.stdout
    with Image.open(output) as picture:
        assert (picture.size, len(picture.getcolors(2**24)) > 100) == ((128, 128), True)


def test_a_full_cache_need_not_hold_the_whole_context(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """vLLM wants memory for a request of the whole context: of Janus-Pro's, 32 MiB of this model's cache."""
    model, output = tmp_path / "model", tmp_path / "cat.png"
    shutil.copytree(checkpoints["tiny-hf"], model)
    config = json.loads((model / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 16384
    (model / "config.json").write_text(json.dumps(config))
    done = run("offline.py", model, "a cat", "-o", output, "--kv-cache-memory-bytes", 2**24)
    assert f"64 image tokens -> {output}\n" in done.stdout


def test_how_the_demos_model_was_made(tmp_path: Path) -> None:
    """Each stage leaves what the next one and the model card need; both layouts hold the same weights."""
    done = run(shapes_process.__file__, tmp_path)
    assert "tokenizer of step 2, language model of step 2" in done.stdout
    report = json.loads(done.stdout.splitlines()[-1])
    assert set(report) == {"round_trip", "colors"}
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (1004, 104)  # ten columns
    for stage, columns in (
        ("vq", {"drawing_loss", "pointing_loss", "valid_error", "encoder_agreement"}),
        ("lm", {"image_loss", "text_loss", "valid_image_loss"}),
    ):
        lines = (tmp_path / stage / f"{stage}.jsonl").read_text().splitlines()
        last = [record for record in map(json.loads, lines) if record["step"] == 2]
        assert set().union(*last) == {"step", *columns}
        assert (tmp_path / stage / f"{stage}.png").stat().st_size > 1000
    for folder in ("model", "original"):
        [model_type] = {json.loads((tmp_path / folder / "config.json").read_text())["model_type"]}
        assert model_type == {"model": "janus", "original": "multi_modality"}[folder]
    assert (tmp_path / "model" / "held_out.npz").exists()


def run(script: str | Path, *words: object) -> "subprocess.CompletedProcess[str]":
    done = preloaded.run([sys.executable, str(EXAMPLES / script), *map(str, words)])
    assert done.returncode == 0, done.stderr[-2000:]
    return done
