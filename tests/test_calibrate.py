"""Locality scores against transformers' own attention, and the life of the automatic head profile."""

import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from inprocess import Engine, in_process  # noqa: F401
from parity import load_reference
from vllm import SamplingParams

from vllm_kvcompress.cli import _least_budget
from vllm_kvcompress.heads import memory, provide
from vllm_kvcompress.heads.calibrate import draw_full
from vllm_kvcompress.heads.full import FullCache, scores_of
from vllm_kvcompress.heads.prices import price
from vllm_kvcompress.heads.profile import HeadProfile
from vllm_kvcompress.heads.provide import cache_directory
from vllm_kvcompress.models.calibration import METRIC, default_threshold, subject_of
from vllm_kvcompress.testing.checkpoints import TINY, make_checkpoint

SMALL = {"max_model_len": 128}


class Lines(logging.Handler):
    """Messages of the package's loggers."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def said(self, text: str) -> list[str]:
        return [line for line in self.lines if text in line]


@pytest.fixture
def log() -> Iterator[Lines]:
    handler, logger = Lines(), logging.getLogger("vllm.kvcompress")
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)


def locality(attention: torch.Tensor, prefix: int, near: int) -> float:
    """One head, ``[queries, keys]`` probabilities: mean over image queries, by the definition."""
    shares = []
    for query in range(prefix, len(attention)):
        row = attention[query]
        image = sum(float(row[key]) for key in range(prefix, query + 1))
        outside = sum(float(row[key]) for key in range(prefix, query - near))
        shares.append(outside / image)
    return sum(shares) / len(shares)


@pytest.mark.parametrize("near", [1, 5, 16])
@pytest.mark.parametrize("group", [1, 2])
def test_full_cache_measures_the_definition(near: int, group: int) -> None:
    gen = torch.Generator().manual_seed(near)
    prefix, image, kv_heads, size = [3, 5], 20, 2, 8
    steps = max(prefix) + image - 1
    q = torch.randn(steps, 2, 2 * kv_heads * group, size, generator=gen)
    k, v = (torch.randn(steps, 2, 2 * kv_heads, size, generator=gen) for _ in range(2))
    cache = FullCache(1, kv_heads, size, steps, torch.tensor(prefix), image, near, torch.float32)
    for cache.step in range(steps):
        out = cache.attend(q[cache.step], k[cache.step], v[cache.step], 0, 0.3)
    want = torch.zeros(kv_heads, dtype=torch.float64)
    queries = [min(p + image, steps) - p for p in prefix]
    for row, (p, n) in enumerate(zip(prefix, queries, strict=True)):
        for head in range(2 * kv_heads * group):
            keys = k[: p + n, row, head // group].double()
            mask = torch.full((p + n, p + n), -torch.inf).triu(1)
            weights = (q[: p + n, row, head].double() @ keys.T * 0.3 + mask).softmax(-1)
            want[head // group % kv_heads] += locality(weights, p, near) * n / (2 * group)
    torch.testing.assert_close(scores_of([cache])[0], want / sum(queries), atol=1e-6, rtol=0)
    whole = q[-1, 0, :group].double() @ k[:steps, 0, 0].double().T * 0.3
    torch.testing.assert_close(
        out[0, :group].double(), whole.softmax(-1) @ v[:, 0, 0].double(), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("name", ["tiny-hf", "gqa-hf"])
def test_scores_equal_those_from_the_attentions_of_transformers(
    checkpoints: dict[str, Path], name: str
) -> None:
    """The pictures that calibration drew, run through transformers with ``output_attentions``."""

    engine = Engine.get(checkpoints[name], kvcompress={"preset": "h2o"}, **SMALL)
    model, image = engine.model, engine.image
    prompts = [engine.prompt(text) for text in ("a red bird", "grass at night by the sea")]
    subject = subject_of(engine.core.vllm_config, model)
    drawn = draw_full(subject, prompts, 16)
    scores = drawn.scores
    apart = draw_full(subject, prompts, 16, at_once=1)
    assert apart.ids == drawn.ids, "a row's noise is its own, however many are drawn at once"
    torch.testing.assert_close(apart.scores, scores, atol=1e-6, rtol=0)

    reference = load_reference(checkpoints[name])
    reference.set_attn_implementation("eager")
    text = reference.model.language_model
    kv_heads = text.config.num_key_value_heads
    want = torch.zeros(text.config.num_hidden_layers, kv_heads, dtype=torch.float64)
    total = 0
    for prompt, row in zip(prompts, drawn.ids, strict=True):
        assert row[: len(prompt)] == prompt
        codes = torch.tensor([[t - image.text_vocab for t in row[len(prompt) :]]])
        assert codes.shape[1] == image.raster.tokens
        codes = codes[:, : image.raster.tokens - 1 + (len(prompt) < max(map(len, prompts)))]
        uncond = [prompt[0], *[image.pad] * (len(prompt) - 2), prompt[-1]]
        with torch.no_grad():
            words = text.embed_tokens(torch.tensor([prompt, uncond]))
            picture = reference.prepare_embeddings_for_image_generation(codes).expand(2, -1, -1)
            out = text(inputs_embeds=torch.cat([words, picture], 1), output_attentions=True)
        n = codes.shape[1]
        total += n
        for layer, attention in enumerate(out.attentions):  # [branches, heads, queries, keys]
            group = attention.shape[1] // kv_heads
            for branch in range(2):
                for head in range(attention.shape[1]):
                    share = locality(attention[branch, head], len(prompt), 16)
                    want[layer, head // group] += share * n / (2 * group)
    torch.testing.assert_close(scores, want / total, atol=1e-4, rtol=0)
    assert scores.std() > 0


def test_pictures_at_once_are_what_the_memory_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lumina-mGPT-1024's sizes, on the CPU and on cards with its weights in them."""
    row = memory.drawing_bytes(32, 32, 128, 64 * 65 + 40, torch.bfloat16)
    assert 4.4e9 < row < 5e9
    replayed = memory.replaying_bytes(4096, 32, 32, 128, 64 * 65 + 40, 65, torch.bfloat16)
    assert 1.5e9 < replayed < 3e9
    assert memory.rows_at_once(row, torch.device("cpu"), "draw") == 1
    seven = memory.drawing_bytes(30, 32, 128, 576 + 40, torch.bfloat16)
    assert memory.rows_at_once(seven, torch.device("cpu"), "draw") >= 8, "Janus-Pro-7B as ever"
    card = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2 << 30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1 << 30)
    for free, rows in ((60 << 30, 6), (8 << 30, 1)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 80 << 30))
        assert memory.rows_at_once(row, card, "draw") == rows
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 << 30, 24 << 30))
    with pytest.raises(
        ValueError, match=r"^head_profile: to draw one picture takes 4.* use the preset"
    ) as caught:
        memory.rows_at_once(row, card, "draw")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("rows", "at_once", "sizes"), [(8, 8, [8]), (8, 6, [4, 4]), (5, 2, [2, 2, 1]), (3, 9, [3])]
)
def test_passes_are_few_and_nearly_equal(rows: int, at_once: int, sizes: list[int]) -> None:
    parts = list(memory.passes(rows, at_once))
    assert [part.stop - part.start for part in parts] == sizes
    assert [n for part in parts for n in range(rows)[part]] == list(range(rows))


def test_auto_calibrates_once_and_says_where(checkpoints: dict[str, Path], log: Lines) -> None:
    for old in cache_directory().glob("gqa-hf-*.json"):
        old.unlink()
    first = Engine(checkpoints["gqa-hf"], kvcompress={}, **SMALL)
    (path,) = cache_directory().glob("gqa-hf-*.json")
    assert log.said(f"Head profile calibrated, kept in {path}")
    profile = HeadProfile.load(path)
    assert (profile.metric, profile.layers, profile.kv_heads) == (METRIC, 2, 2)
    assert profile.neighbourhood == 16
    assert profile.format == 2
    assert profile.loss_curves.losses.shape[:2] == (2, 4)
    assert (profile.loss_curves.losses[..., :-1].sum((0, 1)) > 0).all()
    assert (profile.head_size, profile.dtype) == (32, "float32")
    assert profile.model_hash == first.model.fingerprint != ""
    assert len(profile.prompts_hash) == 16
    assert profile.threshold == pytest.approx(np.quantile(profile.scores, 0.25), abs=1e-6)

    stamp = path.stat().st_mtime_ns
    second = Engine.get(checkpoints["gqa-hf"], kvcompress={}, **SMALL)
    assert log.said(f"Head profile: {path}")
    assert path.stat().st_mtime_ns == stamp
    assert second.model.compressed._layout == first.model.compressed._layout

    third = Engine(checkpoints["gqa-hf"], kvcompress={"recalibrate": True}, **SMALL)
    assert path.stat().st_mtime_ns > stamp
    assert HeadProfile.load(path) == profile, "the same weights give the same scores"
    assert len(log.said("Head profile calibrated")) == 2
    Engine.started |= {"first": first, "third": third}  # stopped with the others

    profile.model_copy(update={"threshold": 0.9}).save(path)  # of a version with another default
    Engine.started["fourth"] = Engine(checkpoints["gqa-hf"], kvcompress={}, **SMALL)
    assert HeadProfile.load(path) == profile
    path.write_text('{"broken')
    Engine.started["fifth"] = Engine(checkpoints["gqa-hf"], kvcompress={}, **SMALL)
    assert log.said("Cached head profile set aside, the heads are measured again")
    assert HeadProfile.load(path) == profile


@pytest.mark.parametrize("lines", [1, 4])
def test_a_grid_of_fewer_than_five_lines_is_calibrated(lines: int, tmp_path: Path) -> None:
    """As the command does it: a fifth of such a picture is less than the line that is written."""
    model = make_checkpoint(tmp_path / f"lines-{lines}", geometry=replace(TINY, lines=lines))
    budget = _least_budget(str(model), None)
    assert budget == 1 / lines
    engine = Engine(model, kvcompress={"preset": "decoupled", "budget": budget}, **SMALL)
    Engine.started[f"{lines} lines"] = engine
    [found] = engine.llm.collective_rpc("kvcompress_head_profile", args=([budget], ""))
    profile = HeadProfile.model_validate_json(found)
    assert [trial.budget for trial in profile.trials] == [lines]
    assert price(profile, budget).assignment.mean_slots == lines
    assert _least_budget(str(tmp_path / "none"), None) == 0.2


def test_an_unwritable_home_is_a_warning(
    checkpoints: dict[str, Path], log: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For all that vLLM keeps below it too; nobody can make files in ``/proc``, not even root."""
    from vllm import envs

    envs.disable_envs_cache()
    monkeypatch.setenv("HOME", "/proc")
    monkeypatch.setenv("VLLM_CACHE_ROOT", "/proc/.cache/vllm")
    assert str(cache_directory()).startswith("/proc/.cache/vllm/")
    engine = Engine(checkpoints["tiny-hf"], kvcompress={}, **SMALL)
    Engine.started["unwritable"] = engine
    assert log.said("Head profile calibrated; not kept for the next start:")
    assert len(engine.draw([engine.prompt("grass")], SamplingParams(temperature=0.0))[0]) == 64


def test_a_cache_that_others_can_write_is_not_trusted(
    checkpoints: dict[str, Path], tmp_path: Path, log: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither read nor written: what is planted there would be taken, were the folder the user's own."""
    folder = tmp_path / "profiles"
    folder.mkdir(mode=0o700)
    monkeypatch.setattr(provide, "cache_directory", lambda: folder)
    wanted = {"preset": "decoupled"}  # by the scores; the default threshold would be measured again
    first = Engine(checkpoints["tiny-hf"], kvcompress=wanted, **SMALL)
    [path] = folder.iterdir()
    measured = HeadProfile.load(path)
    turned = [[1 - score for score in layer] for layer in measured.scores]
    planted = measured.model_copy(update={"scores": turned, "threshold": default_threshold(turned)})
    planted.save(path)
    content = path.read_bytes()
    second = Engine(checkpoints["tiny-hf"], kvcompress=wanted, **SMALL)
    assert log.said(f"Head profile: {path}")
    assert second.model.compressed._layout != first.model.compressed._layout, "another is another picture"
    folder.chmod(0o777)
    log.lines.clear()
    third = Engine(checkpoints["tiny-hf"], kvcompress=wanted, **SMALL)
    Engine.started |= {"private": first, "planted": second, "open": third}
    said = "can be written by others; chmod go-w, or set VLLM_CACHE_ROOT"
    assert [line.split(":")[0] for line in log.said(said)] == [
        "Cached head profile set aside, the heads are measured again",
        "Head profile calibrated; not kept for the next start",
    ]
    assert third.model.compressed._layout == first.model.compressed._layout
    assert third.model.head_profile.scores == measured.scores
    assert [(file, file.read_bytes()) for file in folder.iterdir()] == [(path, content)]


def test_an_explicit_profile_is_read_and_the_cache_left_alone(
    checkpoints: dict[str, Path], tmp_path: Path, log: Lines
) -> None:
    fields = {"model": "by hand", "model_hash": "", "metric": "x", "prompts_hash": "", "threshold": 0.5}
    sizes = {"layers": 2, "kv_heads": 2, "neighbourhood": 16, "scores": [[0.1, 0.9], [0.8, 0.2]]}
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(fields | sizes))
    before = sorted(cache_directory().glob("*"))
    section = {"preset": "decoupled", "head_profile": str(path)}
    engine = Engine.get(checkpoints["tiny-hf"], kvcompress=section, **SMALL)
    assert engine.model.compressed._layout.types == ((0, 1, 0, 1), (1, 0, 1, 0))
    assert sorted(cache_directory().glob("*")) == before
    assert not log.said("calibrated")


@pytest.mark.parametrize("preset", ["full", "h2o", "line_ar", "streaming"])
def test_presets_without_head_types_do_not_calibrate(
    checkpoints: dict[str, Path], log: Lines, preset: str
) -> None:
    Engine.get(checkpoints["tiny-hf"], kvcompress={"preset": preset}, **SMALL)
    assert not log.said("rofile")


def test_what_keeps_everything_has_a_budget_of_1(checkpoints: dict[str, Path], log: Lines) -> None:
    Engine.get(checkpoints["tiny-hf"], kvcompress={"preset": "full", "budget": 0.1}, **SMALL)
    (line,) = log.said("kvcompress: preset")
    assert line.startswith("kvcompress: preset full, budget 1; full: ")


def test_the_start_up_line_says_everything(checkpoints: dict[str, Path], log: Lines) -> None:
    engine = Engine.get(checkpoints["tiny-hf"], kvcompress={"budget": 0.4}, **SMALL)
    (line,) = log.said("kvcompress: preset")
    blocks = engine.scheduler.kv_cache_config.num_blocks - 1
    layout = engine.model.compressed._layout
    pages = sum(-(-(20 + r.capacity) // layout.page_tokens(kind)) for kind, r in enumerate(layout.rules))
    fits = blocks // pages
    full = (20 + 64) * 4 * 2 * 2 * 32 * 4
    at_once_full = blocks * layout.page_bytes // full
    for part in (
        "preset fitted, budget 0.4",
        *(f"{rule.name}: {layout.total(kind)} heads" for kind, rule in enumerate(layout.rules)),
        f"tokens a page {', '.join(map(str, layout.paging.tokens))}",
        "predicted loss",
        "page waste",
        f"{pages * layout.page_bytes / 2**20:.2f} MiB instead of {full / 2**20:.2f}",
        f"memory for {fits} pictures at once instead of {at_once_full}",
        "kernels",
    ):
        assert part in line, (part, line)
