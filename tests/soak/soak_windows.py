"""Whole pictures of the published grid on the V2 runner, in windows and one by one: 576 of 576 the same.

By hand: ``make soak``, or ``python -m pytest tests/soak/soak_windows.py``. Every run of the suite has smaller
pictures and more ways to go wrong (tests/test_windows_engine.py, tests/test_v2_runner.py). Every preset and
vLLM's own attention, greedy and seeded, the longest windows, with the package's drafts and with the truth in
their place, in float32 on the CPU, vLLM's own kernels in Triton's interpreter.
"""

import sys
import time
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from engine_process import V2, EngineProcess
from oracle import write_profile
from test_v2_runner import Prompts, drafted_requests

from vllm_kvcompress.policy import PRESETS
from vllm_kvcompress.policy.raster import Raster
from vllm_kvcompress.testing.checkpoints import SMALL_24, make_checkpoint

TOKENS, LINE, PICTURES, WINDOW = 576, 24, 3, 16
STOCK = "full cache"
TRUTH = {"drafts": "truth", "places": [WINDOW]}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    half = [[head % 2 for head in range(SMALL_24.kv_heads)]] * SMALL_24.layers
    write_profile(folder / "profile.json", half, Raster(LINE, LINE))
    # With seed 0, h2o's sums of two tokens come within 6e-8 of each other after nine lines, and products of
    # more rows at once differ by more: the two go in another order, on V1 too, and the picture changes.
    return make_checkpoint(folder / "model", geometry=SMALL_24, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("cache", [STOCK, *PRESETS])
def test_windows_of_the_v2_runner_draw_the_v1_runners_pictures(
    model: Path, tmp_path: Path, cache: str
) -> None:
    args: dict[str, Any] = {
        "model": str(model), "dtype": "float32", "enforce_eager": True, "max_model_len": 640,
        "max_num_seqs": 4, "max_num_batched_tokens": 64, "kv_cache_memory_bytes": 2**27,
        "limit_mm_per_prompt": {"image": 0},
    }  # fmt: skip
    section: dict[str, Any] = {}
    if cache != STOCK:
        args["attention_backend"] = "kvcompress"
        section = {"preset": cache, "budget": 0.3, "head_profile": str(model.parent / "profile.json")}
    three = drafted_requests(Prompts(model))

    def job(window: int, drafts: list[Any]) -> dict[str, Any]:
        settings = args | {"additional_config": {"kvcompress": {**section, "window": window}}}
        return {"name": str(window), "args": settings, "waves": [three for _ in drafts], "drafts": drafts}

    began = time.monotonic()
    drawn = EngineProcess(tmp_path, V2, [job(1, [None]), job(WINDOW, [None, TRUTH])]).finish()
    (wanted,), windowed = drawn["1"]["waves"], drawn[str(WINDOW)]
    assert windowed["runner"] == "vllm.v1.worker.cpu.model_runner"
    assert [len(tokens) for tokens in wanted] == [TOKENS] * PICTURES
    assert len({tuple(tokens) for tokens in wanted}) == PICTURES
    for wave in windowed["waves"]:
        for number, (mine, theirs) in enumerate(zip(wave, wanted, strict=True)):
            apart = next((n for n, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a != b), None)
            assert apart is None, f"picture {number} from token {apart} on"
    own, truth = ([report["kv_cache"]["steps"] for report in wave] for wave in windowed["held"])
    assert max(own) < TOKENS, "some drafts stood"
    lines = TOKENS // LINE
    cut = (lines - 1) * -(-LINE // WINDOW) + -(-(LINE - 1) // WINDOW)
    assert truth == [1 + (-(-(TOKENS - 1) // WINDOW) if cache == STOCK else cut)] * PICTURES
    took = time.monotonic() - began
    print(
        f"{cache}: {PICTURES} x {TOKENS} tokens the same, twice; {own} steps, then {truth[0]}; {took:.0f} s"
    )
