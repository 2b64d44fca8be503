"""Two ranks draw, and say of a picture, what one process does: full and compressed cache, GQA, every family.

Two processes on the CPU, float32. One process can plan its heads as two ranks have to, with as many of every
type among each rank's: then both hold the same tokens in every head. Each measures its heads by itself.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_emu3
import test_llamagen
import test_lumina
from conftest import share_model_infos
from engine_process import V1, EngineProcess
from oracle import write_profile
from test_v2_runner import Prompts, mixed_requests, seeded_requests

from vllm_kvcompress.heads.profile import HeadProfile
from vllm_kvcompress.policy.raster import Raster
from vllm_kvcompress.testing.checkpoints import GQA, SMALL_24, make_checkpoint
from vllm_kvcompress.testing.llamagen import make_llamagen
from vllm_kvcompress.testing.lumina import make_lumina

RANKS, WORDS = 2, 8
DECOUPLED: dict[str, Any] = {"preset": "decoupled", "budget": 0.4}
WHOLE: dict[str, Any] = {"budget": 0.3, "window": 16}  # of a named profile, too: nothing is measured for it
ONE_KV_HEAD, SIX = replace(GQA, kv_heads=1, lines=5), replace(SMALL_24, lines=6)
WIDE = replace(GQA, lines=24)
LUMINA, LLAMAGEN = "published", "bare"  # geometries of four heads


@dataclass(frozen=True)
class Case:
    """``section``: kvcompress's (None: vLLM's own attention); ``tokens`` of each of the ``pictures``.

    ``chats`` about a picture; where nobody does, the model looks at none.
    """

    model: str
    section: dict[str, Any] | None
    pictures: int
    tokens: int
    chats: bool = False


CASES = {
    "vLLM's cache, gqa": Case("five-gqa-hf", None, 5, 25, chats=True),
    "line_ar, gqa": Case("five-gqa-hf", {"preset": "line_ar", "budget": 0.5}, 3, 25),
    "one KV head on both ranks": Case("one-kv-head", None, 1, 25),
    "vLLM's cache, original layout": Case("six-deepseek", None, 1, 36),
    "fitted, original layout, windows": Case("six-deepseek", {"budget": 0.4, "window": 6}, 2, 36, chats=True),
    "whole pictures, fitted, gqa, original layout": Case("wide-deepseek", WHOLE, 2, 576),
    "decoupled, original layout": Case("six-deepseek", DECOUPLED, 1, 36),
    "Lumina-mGPT": Case("lumina", {"preset": "line_ar", "budget": 0.5, "size": "32x16"}, 1, 36),
    "LlamaGen": Case("llamagen", {"preset": "line_ar", "budget": 0.5}, 1, 36),
}
Drawn = dict[str, dict[str, Any]]


def asked(case: Case, model: Path) -> list[list[dict[str, Any]]]:
    """Waves: pictures, then a chat about one."""
    if case.model == "lumina":
        prompts = test_lumina.asked_for(LUMINA, "wide")[2:3]
        params = [test_emu3.params(*rest) for _, *rest in prompts]
        return [
            [
                {"ids": ids, "params": {"temperature": 0.0, "extra_args": one.extra_args}}
                for (ids, *_), one in zip(prompts, params, strict=True)
            ]
        ]
    if case.model == "llamagen":
        away = {"guidance_scale": 2.5, "negative_prompt_token_ids": [7]}
        return [[{"ids": [n], "params": {"temperature": 0.0, "extra_args": away}} for n in (3,)]]
    prompts = Prompts(model)
    pictures = mixed_requests(prompts)[: min(case.pictures, 3)]
    if case.pictures > 3:
        sampled = seeded_requests(prompts, pictures[0])
        pictures += [sampled[0], sampled[2]]
    if not case.chats:
        return [pictures]
    chat = {"temperature": 0.0, "max_tokens": WORDS, "ignore_eos": True}
    return [pictures, [{"ids": prompts.looking(7), "photos": [(90, 40)], "params": chat}]]


def is_measured(case: Case) -> bool:
    """Whether its engine measures heads."""
    return case.section is not None and "preset" not in case.section and case.section is not WHOLE


def jobs(models: dict[str, Path], profile: Path, ranks: int) -> list[dict[str, Any]]:
    found = []
    for name, case in CASES.items():
        model, section = models[case.model], case.section
        args: dict[str, Any] = {
            "model": str(model), "dtype": "float32", "enforce_eager": True,
            "max_model_len": 256 if case.model in ("lumina", "llamagen") else 320,
            "max_num_seqs": 8, "max_num_batched_tokens": 64, "kv_cache_memory_bytes": 2**26,
            "tensor_parallel_size": ranks,
        }  # fmt: skip
        if case.model == "llamagen":
            args["max_model_len"] = 37
        if not case.chats and case.model not in ("lumina", "llamagen"):
            args["limit_mm_per_prompt"] = {"image": 0}
        if section is DECOUPLED:
            section = {**section, "head_profile": str(profile)}
        if section is WHOLE:
            half = [[head % 2 for head in range(WIDE.kv_heads)]] * WIDE.layers
            curves = write_profile(profile.with_name("whole.json"), half, Raster(WIDE.lines, WIDE.lines))
            section, args["max_model_len"] = {**section, "head_profile": str(curves)}, 640
        args["additional_config"] = {"kvcompress": {"window": 1, **(section or {})}}
        if section is not None:
            args["attention_backend"] = "kvcompress"
        found.append({"name": name, "args": args, "waves": asked(case, model), "as_ranks": RANKS})
    return found


@pytest.fixture(scope="module")
def models(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        **checkpoints,
        "one-kv-head": make_checkpoint(root / "one", layout="hf", geometry=ONE_KV_HEAD, seed=0),
        "six-deepseek": make_checkpoint(root / "six-deepseek", layout="deepseek", geometry=SIX, seed=0),
        "wide-deepseek": make_checkpoint(root / "wide-deepseek", layout="deepseek", geometry=WIDE, seed=0),
        "lumina": make_lumina(root / "lumina", test_lumina.GEOMETRIES[LUMINA]),
        "llamagen": make_llamagen(root / "llamagen", test_llamagen.GEOMETRIES[LLAMAGEN], "bare"),
    }


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Locality scores of SMALL_24 that would put all spatial heads of a layer on one rank."""
    path = tmp_path_factory.mktemp("profile") / "profile.json"
    scores = [[0.1, 0.2, 0.8, 0.9], [0.7, 0.6, 0.3, 0.2], [0.1, 0.9, 0.9, 0.9]]
    fields = {
        "format": 1, "model": "", "model_hash": "", "metric": "made up", "threshold": 0.5, "prompts_hash": "",
        "neighbourhood": 24, "layers": 3, "kv_heads": 4, "scores": scores,
    }  # fmt: skip
    path.write_text(json.dumps(fields))
    return path


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Each has its own: nobody has measured these heads yet."""
    found = {ranks: tmp_path_factory.mktemp(f"cache-{ranks}") for ranks in (RANKS, 1)}
    for root in found.values():
        share_model_infos(root, tmp_path_factory)
    return found


@pytest.fixture(scope="module")
def drawn(
    models: dict[str, Path], profile: Path, caches: dict[int, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[int, Drawn]:
    folder, found = tmp_path_factory.mktemp("ranks"), {}
    for ranks, cache in caches.items():
        env = {**V1, "VLLM_CACHE_ROOT": str(cache)}
        process = EngineProcess(folder / str(ranks), env, jobs(models, profile, ranks))
        found[ranks] = {**process.finish(), "log": process.log}
    return found


@pytest.mark.parametrize("case", CASES)
def test_tokens_equal_one_process(drawn: dict[int, Drawn], case: str) -> None:
    two, one = (drawn[ranks][case]["waves"] for ranks in (RANKS, 1))
    wanted = CASES[case]
    assert [len(tokens) for tokens in two[0]] == [wanted.tokens] * wanted.pictures
    assert two == one
    if wanted.chats:
        assert [len(words) for words in two[1]] == [WORDS], "of a chat with a picture"
    assert len({tuple(tokens) for tokens in two[0]}) == wanted.pictures


@pytest.mark.parametrize("case", CASES)
def test_reports_count_all_ranks(drawn: dict[int, Drawn], case: str) -> None:
    (two, *_), (one, *_) = (drawn[ranks][case]["held"] for ranks in (RANKS, 1))
    copies = 2 if CASES[case].model == "one-kv-head" else 1  # held by each rank
    for mine, alone in zip(two, one, strict=True):
        mine, alone = mine["kv_cache"], alone["kv_cache"]
        assert mine["full_bytes"] == copies * alone["full_bytes"]
        # Each rank's page is a whole number of cache lines, which here are a tenth of one.
        assert mine["resident_bytes"] == pytest.approx(copies * alone["resident_bytes"], rel=0.1)
        for name in ("evicted_spatial", "evicted_semantic", "steps"):
            assert mine[name] == alone[name]


def test_eviction_had_a_say(drawn: dict[int, Drawn]) -> None:
    """Or equality would prove nothing for the compressed cache."""
    for full, fitted in (
        ("vLLM's cache, gqa", "line_ar, gqa"),
        ("vLLM's cache, original layout", "fitted, original layout, windows"),
    ):
        assert drawn[RANKS][full]["waves"][0][0] != drawn[RANKS][fitted]["waves"][0][0]
    [[report]] = drawn[RANKS]["decoupled, original layout"]["held"]
    assert report["kv_cache"]["evicted_spatial"] > 15
    assert report["kv_cache"]["evicted_semantic"] > 15
    [windowed, _] = drawn[RANKS]["fitted, original layout, windows"]["held"]
    assert min(report["kv_cache"]["steps"] for report in windowed) < 36
    [whole] = drawn[RANKS]["whole pictures, fitted, gqa, original layout"]["held"]
    for report in whole:
        assert report["kv_cache"]["evicted_spatial"] + report["kv_cache"]["evicted_semantic"] > 300
        assert report["kv_cache"]["steps"] < 576


def test_the_heads_were_measured_once_and_one_rank_speaks(drawn: dict[int, Drawn]) -> None:
    log = str(drawn[RANKS]["log"])
    fitted = {case.model for case in CASES.values() if is_measured(case)}
    assert log.count("Head profile calibrated, kept in") == len(fitted)
    assert log.count("kvcompress: preset") == sum(case.section is not None for case in CASES.values())
    assert "on each of 2 ranks" in log


def test_ranks_measure_what_one_process_measures(drawn: dict[int, Drawn], caches: dict[int, Path]) -> None:
    """Of every head, in the order of the whole model's heads."""
    two, one = (
        HeadProfile.load(path)
        for ranks in (RANKS, 1)
        for path in (caches[ranks] / "kvcompress" / "head_profiles").glob("six-deepseek-*.json")
    )
    assert len({tuple(row) for row in one.scores}) > 1
    np.testing.assert_allclose(two.scores, one.scores, rtol=1e-4)
    np.testing.assert_allclose(two.loss_curves.losses, one.loss_curves.losses, rtol=2e-3, atol=1e-9)
    assert one.loss_curves.guided is not None
    np.testing.assert_allclose(two.loss_curves.guided, one.loss_curves.guided, rtol=2e-3, atol=1e-9)


def test_ranks_choose_the_fit_that_one_process_chooses(
    drawn: dict[int, Drawn], caches: dict[int, Path]
) -> None:
    """Each replays its own heads of every fit; what their pictures cost is known to all."""
    models = {case.model for case in CASES.values() if is_measured(case)}
    for model in models:
        two, one = (
            HeadProfile.load(path).trials
            for ranks in (RANKS, 1)
            for path in (caches[ranks] / "kvcompress" / "head_profiles").glob(f"{model}-*.json")
        )
        assert [trial.ranks for trial in two] == [RANKS] * len(two)
        assert [trial.weighing for trial in two] == [trial.weighing for trial in one]
        for mine, alone in zip(two, one, strict=True):
            assert mine.divergence == pytest.approx(alone.divergence, rel=0.01)
            assert mine.squares == pytest.approx(alone.squares, rel=0.01)
    assert str(drawn[RANKS]["log"]).count("with fits tried, kept in") >= len(models)
