"""Whole pictures of the published grid, 576 of 576 tokens, by two ranks and by one process: the same.

By hand: ``make soak``, or ``python -m pytest tests/soak/soak_ranks.py``. Every run of the suite has smaller
pictures and more cases (tests/test_tensor_parallel.py). Both layouts, grouped queries, the full cache and
compressed ones; greedy and seeded, with guidance of their own, in float32 on the CPU.
"""

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from engine_process import V1, EngineProcess
from oracle import write_profile
from test_v2_runner import Prompts, drafted_requests

from vllm_kvcompress.policy.raster import Raster
from vllm_kvcompress.testing.checkpoints import GQA, SMALL_24, make_checkpoint

RANKS, TOKENS, PICTURES = 2, 576, 3
WIDE_GQA = replace(GQA, lines=24)
MODELS = {  # layout, geometry
    "hf": ("hf", SMALL_24),
    "deepseek": ("deepseek", SMALL_24),
    "hf, grouped queries": ("hf", WIDE_GQA),
    "deepseek, grouped queries": ("deepseek", WIDE_GQA),
}
# Windows of a length that no clock chooses, so that steps are the same, too.
CACHES: dict[str, dict[str, Any]] = {
    "full": {"window": 6},  # vLLM's own attention
    "decoupled": {"window": 1, "preset": "decoupled", "budget": 0.3},
    "fitted": {"window": 6, "budget": 0.3},
}


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("model", MODELS)
def test_two_ranks_draw_one_process_pictures(tmp_path: Path, model: str, cache: str) -> None:
    layout, geometry = MODELS[model]
    folder = make_checkpoint(tmp_path / "model", layout=layout, geometry=geometry, seed=0)
    half = [[head % 2 for head in range(geometry.kv_heads)]] * geometry.layers
    profile = write_profile(tmp_path / "profile.json", half, Raster(24, 24))
    section, compressed = CACHES[cache], cache != "full"
    args: dict[str, Any] = {
        "model": str(folder), "dtype": "float32", "enforce_eager": True, "max_model_len": 640,
        "max_num_seqs": 4, "max_num_batched_tokens": 64, "kv_cache_memory_bytes": 2**27,
        "limit_mm_per_prompt": {"image": 0},
    }  # fmt: skip
    if compressed:
        section = {**section, "head_profile": str(profile)}
        args["attention_backend"] = "kvcompress"
    args["additional_config"] = {"kvcompress": section}
    waves = [drafted_requests(Prompts(folder))]
    found, took = {}, {}
    for ranks in (RANKS, 1):
        job = {"name": cache, "args": args | {"tensor_parallel_size": ranks}, "waves": waves}
        began = time.monotonic()
        process = EngineProcess(tmp_path / str(ranks), V1, [job | {"as_ranks": RANKS}])
        found[ranks] = process.finish()[cache]
        took[ranks] = time.monotonic() - began
    two, one = (found[ranks]["waves"][0] for ranks in (RANKS, 1))
    assert [len(tokens) for tokens in two] == [TOKENS] * PICTURES
    assert len({tuple(tokens) for tokens in two}) == PICTURES
    assert two == one
    reports = [[report["kv_cache"] for report in found[ranks]["held"][0]] for ranks in (RANKS, 1)]
    for mine, alone in zip(*reports, strict=True):
        assert mine["full_bytes"] == alone["full_bytes"]
        for name in ("evicted_spatial", "evicted_semantic", "steps"):
            assert mine[name] == alone[name]
        assert min(mine["evicted_semantic"], mine["evicted_spatial"]) > (300 if compressed else -1)
    assert (min(report["steps"] for report in reports[0]) < TOKENS) == (section["window"] > 1)
    shown = ", ".join(f"{seconds:.0f} s with {ranks}" for ranks, seconds in took.items())
    print(f"{model}, {cache}: {PICTURES} x {TOKENS} tokens the same; {shown}")
