"""The runner of GPUs, on the CPU, with two ranks: what it draws is what V1 draws in one process."""

from pathlib import Path
from typing import Any

import pytest
from conftest import share_model_infos
from engine_process import V2, EngineProcess, run_here
from inprocess import in_process  # noqa: F401
from test_v2_runner import SETTINGS, Prompts

RANKS = 2
SECTIONS: dict[str, dict[str, Any] | None] = {
    "full": None,
    "compressed": {"preset": "line_ar", "budget": 0.5},
}


def jobs(model: Path, ranks: int) -> list[dict[str, Any]]:
    ids = Prompts(model).picture(6)
    wave = [{"ids": ids, "params": {"temperature": 0.0}}]
    found = []
    for name, section in SECTIONS.items():
        config = {"kvcompress": {"window": 1, **(section or {})}}
        backend = {} if section is None else {"attention_backend": "kvcompress"}
        args = {**SETTINGS, "model": str(model), "tensor_parallel_size": ranks, "additional_config": config}
        found.append({"name": name, "args": {**args, **backend}, "waves": [wave], "as_ranks": RANKS})
    return found


@pytest.mark.timeout(600)
def test_two_ranks_of_the_v2_runner_draw_what_one_process_draws(
    checkpoints: dict[str, Path], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    model = checkpoints["five-gqa-hf"]
    share_model_infos(tmp_path / "cache", tmp_path_factory)
    env = {**V2, "VLLM_CACHE_ROOT": str(tmp_path / "cache")}
    process = EngineProcess(tmp_path / "two", env, jobs(model, RANKS))
    one = run_here(jobs(model, 1))
    two = process.finish()
    assert {answer["runner"] for answer in two.values()} == {"vllm.v1.worker.cpu.model_runner"}
    for name in SECTIONS:
        [[drawn]] = two[name]["waves"]
        assert len(drawn) == 25, name
        assert two[name]["waves"] == one[name]["waves"], name
    assert one["full"]["waves"] != one["compressed"]["waves"]
