"""Two ranks draw, and say of a picture, what one process does: full and compressed cache, both layouts, GQA.

Two processes on the CPU, float32. One process can plan its heads as two ranks have to, with as many of every
type among each rank's: then both hold the same tokens in every head.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import preloaded
import pytest
from engine_process import V1, EngineProcess
from test_v2_runner import Prompts, mixed_requests

from vllm_kvcompress.testing.checkpoints import GQA, SMALL_24

RANKS, WORDS = 2, 8
DECOUPLED = {"preset": "decoupled", "budget": 0.2}
# name -> checkpoint, kvcompress section (None: vLLM's own attention), pictures
CASES: dict[str, tuple[str, dict[str, Any] | None, int]] = {
    "vLLM's cache, gqa": ("gqa-hf", None, 3),
    "fitted, gqa": ("gqa-hf", {"budget": 0.4}, 3),
    "decoupled, original layout, 144 tokens": ("twelve-deepseek", DECOUPLED, 1),
}
SIZE = {"twelve-deepseek": replace(SMALL_24, lines=12), "gqa-hf": GQA}
Drawn = dict[str, dict[str, Any]]


def jobs(checkpoints: dict[str, Path], profile: Path, ranks: int) -> list[dict[str, Any]]:
    found = []
    for name, (checkpoint, section, pictures) in CASES.items():
        model = checkpoints[checkpoint]
        args: dict[str, Any] = {
            "model": str(model), "dtype": "float32", "enforce_eager": True, "max_model_len": 320,
            "max_num_seqs": 4, "max_num_batched_tokens": 64, "kv_cache_memory_bytes": 2**26,
            "tensor_parallel_size": ranks,
        }  # fmt: skip
        if section is not None:
            if section is DECOUPLED:
                section = {**section, "head_profile": str(profile)}
            args |= {"attention_backend": "kvcompress", "additional_config": {"kvcompress": section}}
        prompts = Prompts(model)
        asked = {"temperature": 0.0, "max_tokens": WORDS, "ignore_eos": True}
        chat = {"ids": prompts.looking(7), "photos": [(90, 40)], "params": asked}
        waves = [mixed_requests(prompts)[:pictures], [chat]]
        found.append({"name": name, "args": args, "waves": waves, "as_ranks": RANKS})
    return found


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
def drawn(
    checkpoints: dict[str, Path], profile: Path, tmp_path_factory: pytest.TempPathFactory, own_cache: str
) -> dict[int, Drawn]:
    folder, found = tmp_path_factory.mktemp("ranks"), {}
    # A cache of its own: nobody has measured these heads yet, and the second start finds the first one's.
    env = {**V1, "VLLM_CACHE_ROOT": own_cache}
    for ranks in (RANKS, 1):
        process = EngineProcess(
            folder / str(ranks), env, jobs(checkpoints, profile, ranks), start=preloaded.Popen
        )
        found[ranks] = {**process.finish(), "log": process.log}
    return found


@pytest.mark.parametrize("case", CASES)
def test_tokens_equal_one_process(drawn: dict[int, Drawn], case: str) -> None:
    checkpoint, _, pictures = CASES[case]
    two, one = (drawn[ranks][case]["waves"] for ranks in (RANKS, 1))
    assert [len(tokens) for tokens in two[0]] == [SIZE[checkpoint].image_tokens] * pictures
    assert two == one
    assert [len(words) for words in two[1]] == [WORDS], "of a chat with a picture"
    assert len({tuple(tokens) for tokens in two[0]}) == pictures


@pytest.mark.parametrize("case", CASES)
def test_reports_count_all_ranks(drawn: dict[int, Drawn], case: str) -> None:
    (two, _), (one, _) = (drawn[ranks][case]["held"] for ranks in (RANKS, 1))
    for mine, alone in zip(two, one, strict=True):
        mine, alone = mine["kv_cache"], alone["kv_cache"]
        assert mine["full_bytes"] == alone["full_bytes"]
        # Each rank's page is a whole number of cache lines, which here are a tenth of one.
        assert mine["resident_bytes"] == pytest.approx(alone["resident_bytes"], rel=0.1)
        for name in ("evicted_spatial", "evicted_semantic"):
            assert mine[name] == alone[name]


def test_eviction_had_a_say(drawn: dict[int, Drawn]) -> None:
    """Or equality would prove nothing for the compressed cache."""
    full, fitted, decoupled = (drawn[RANKS][case] for case in CASES)
    assert full["waves"] != fitted["waves"]
    [[report], _] = decoupled["held"]
    assert report["kv_cache"]["evicted_spatial"] > 90
    assert report["kv_cache"]["evicted_semantic"] > 90


def test_the_heads_were_measured_once_and_one_rank_speaks(drawn: dict[int, Drawn]) -> None:
    log = str(drawn[RANKS]["log"])
    assert log.count("Head profile calibrated, kept in") == 1
    assert log.count("kvcompress: preset") == sum(section is not None for _, section, _ in CASES.values())
    assert "on each of 2 ranks" in log
    assert "calibrated" not in str(drawn[1]["log"])
