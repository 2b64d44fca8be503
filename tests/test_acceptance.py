"""``benchmarks/acceptance.py``, as it is run: the steps it counts, and the entropies beside them.

And what ``benchmarks/windows.py steps`` times.
"""

import itertools
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import preloaded
import pytest
import torch
from inprocess import Engine, in_process  # noqa: F401
from parity import load_reference
from vllm import SamplingParams

from vllm_kvcompress.scheduler import REPORT

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from acceptance import table  # noqa: E402
from windows import prompts  # noqa: E402

PICTURE, PICTURES, WINDOW = 64, 3, 8
SCALE, TEMPERATURE, HOT = 5.0, 0.3, 3.0  # vLLM samples at 2 at most
CACHES, DRAFTS = ("full", "1/2"), ("ours", "above-alone")


@pytest.fixture(scope="module")
def printed(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[Any]]:
    """What the command says, and its records."""
    path = tmp_path_factory.mktemp("acceptance") / "found" / "records.json"
    words = [
        sys.executable, BENCHMARKS / "acceptance.py", "-o", path, "--model", checkpoints["tiny-hf"],
        "--caches", ",".join(CACHES), "--preset", "line_ar", "--guidance", SCALE,
        "--temperatures", f"{TEMPERATURE},{HOT}", "--windows", WINDOW, "--drafts", ",".join(DRAFTS),
        "--pictures", PICTURES,
    ]  # fmt: skip
    done = preloaded.run(list(map(str, words)), path.parent.parent)
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout, json.loads(path.read_text())


def drawn_at(temperature: float, seed: int) -> SamplingParams:
    return SamplingParams(temperature=temperature, seed=seed, extra_args={"guidance_scale": SCALE})


def test_steps_are_those_of_engines_with_such_windows(
    checkpoints: dict[str, Path], printed: tuple[str, list[Any]]
) -> None:
    """Found here with the setting itself, and the package's own drafts."""
    _, records = printed
    assert [(one["cache"], one["temperature"], one["drafts"]) for one in records] == list(
        itertools.product(CACHES, (TEMPERATURE, HOT), DRAFTS)
    )
    params = [drawn_at(TEMPERATURE, n) for n in range(PICTURES)]
    for record in records[::4]:
        compressed = {} if record["cache"] == "full" else {"preset": "line_ar", "budget": 0.5}
        config = {"additional_config": {"kvcompress": {"window": WINDOW, **compressed}}}
        engine = Engine.get(checkpoints["tiny-hf"], "kvcompress" if compressed else None, **config)
        done = engine.outputs([engine.prompt(text) for text in prompts()[:PICTURES]], params)
        assert record["steps"] == [out.kv_transfer_params[REPORT]["steps"] for out in done]
        assert min(record["steps"]) < PICTURE
    assert records[0]["steps"] != records[1]["steps"], "other drafts are other steps"
    assert records[0]["nats_mean"] != records[4]["nats_mean"], "what is evicted matters"
    assert records[0]["nats_mean"] < records[2]["nats_mean"], "hotter is flatter"


def test_entropies_are_those_of_transformers(
    checkpoints: dict[str, Path], printed: tuple[str, list[Any]]
) -> None:
    """Of the pictures that the full cache draws, fed to the reference."""
    model, engine = load_reference(checkpoints["tiny-hf"]), Engine.get(checkpoints["tiny-hf"], None)
    text, pad, nats = model.model.language_model, model.generation_config.pad_token_id, []
    for n, caption in enumerate(prompts()[:PICTURES]):
        prompt = engine.prompt(caption)
        [tokens] = engine.draw([prompt], drawn_at(TEMPERATURE, n))
        codes = torch.tensor([[engine.image.code(token) for token in tokens]])
        branches = torch.tensor([prompt, [prompt[0], *[pad] * (len(prompt) - 2), prompt[-1]]])
        with torch.no_grad():
            drawn = model.prepare_embeddings_for_image_generation(codes).expand(2, -1, -1)
            given = torch.cat([text.embed_tokens(branches), drawn], 1)
            hidden = text(inputs_embeds=given).last_hidden_state[:, len(prompt) - 1 : -1]
            wanted, without = model.model.generation_head(hidden)
        guided = (without + SCALE * (wanted - without)) / TEMPERATURE
        nats += torch.distributions.Categorical(logits=guided.double()).entropy().tolist()
    assert len(nats) == PICTURES * PICTURE
    record = printed[1][0]
    assert record["nats_mean"] == pytest.approx(sum(nats) / len(nats), rel=1e-3)
    assert record["nats_median"] == pytest.approx(float(torch.tensor(nats).quantile(0.5)), rel=1e-3)


def test_the_table(printed: tuple[str, list[Any]]) -> None:
    """A line for what was drawn, whose columns are windows; wider ones beside narrower ones."""
    said, records = printed
    wider = [{**record, "window": 16, "steps": [9, 30, 20]} for record in records]
    assert table(records) in said
    both = table([one for pair in zip(wider, records, strict=True) for one in pair]).splitlines()
    assert both[0].endswith("| window 8 | window 16 |")
    assert len(both) == 2 + len(records)
    for line, record in zip(both[2:], records, strict=True):
        least, median, most = sorted(record["steps"])
        assert line.startswith(f"| {record['cache']} | 5 | {record['temperature']:g} | {record['drafts']} |")
        assert line.endswith(f"| {median} ({least}-{most}) | 20 (9-30) |")


@pytest.mark.parametrize(
    ("name", "document"),
    [
        ("acceptance", "performance.md"),
        ("acceptance-flatter", "performance.md"),
        ("acceptance-drafts", "windows.md"),
    ],
)
def test_the_documents_figures_are_those_of_the_records(name: str, document: str) -> None:
    records = json.loads((BENCHMARKS / "results" / "windows" / f"2026-11-30-{name}.json").read_text())
    told = (BENCHMARKS.parent / "docs" / document).read_text().replace("**", "")
    for record in records:
        steps = sorted(record["steps"])
        assert f"| {statistics.median(steps):.0f} ({steps[0]}-{steps[-1]}) |" in told, record
        assert len(steps) == 16


def test_steps_are_timed_with_both_caches(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    words = [
        sys.executable, BENCHMARKS / "windows.py", "steps", "--model", checkpoints["small-hf"], "-o",
        tmp_path, "--preset", "line_ar", "--pictures", "2", "--warm", "3", "--count", "1",
    ]  # fmt: skip
    done = preloaded.run(list(map(str, words)), tmp_path)
    assert done.returncode == 0, done.stdout[-4000:]
    records = json.loads((tmp_path / "steps.json").read_text())
    assert [(one["cache"], one["window"]) for one in records] == list(
        itertools.product(("full", "kvcompress"), (1, 4, 8, 16))
    )
    assert all(one["ms"] > 0 and one["least"] <= one["ratio"] <= one["most"] for one in records)
