"""Engines with the Triton kernels, in Triton's interpreter: the tokens of the torch reference.

The reference draws on the V1 runner, one token a step; the kernels on the V2 runner, which is what runs on
GPUs. That the kernels are the reference for every rule is tests/test_triton_kernels.py's; here they meet the
engine.
"""

from pathlib import Path
from typing import Any

import pytest
from engine_process import V2, EngineProcess, run_here
from inprocess import in_process  # noqa: F401
from test_v2_runner import SETTINGS, Prompts, mixed_requests

MODELS = {"gqa": "five-gqa-hf", "windows": "six-hf"}  # else five-hf, in whose few tokens no draft stood
PREEMPT = (6, 16)  # steps at which all running pictures lose their blocks
MIXED = slice(3)  # lengths, chunks, arrivals, guidance and a negative prompt
WINDOW = 5
# name -> preset, requests, more
ENGINES: dict[str, tuple[str, slice, dict[str, Any]]] = {
    "fitted": ("fitted", MIXED, {}),
    "decoupled": ("decoupled", MIXED, {}),
    "line_ar": ("line_ar", slice(1), {}),
    "h2o": ("h2o", slice(1), {}),
    "gqa": ("decoupled", slice(2, 3), {}),  # the first meets two codes 1e-5 apart: the order of sums decides
    "fp8": ("decoupled", slice(1), {}),
    "preempted": ("decoupled", slice(1), {"preempt": PREEMPT}),
    "windows": ("fitted", slice(2), {}),
}
Drawn = dict[str, dict[str, Any]]


def jobs(models: dict[str, Path], kernels: str) -> list[dict[str, Any]]:
    found = []
    for name, (preset, requests, more) in ENGINES.items():
        window = WINDOW if name == "windows" and kernels == "triton" else 1
        budget = 0.6 if name == "windows" else 0.4
        section = {"preset": preset, "budget": budget, "kernels": kernels, "window": window}
        model = models[MODELS.get(name, "five-hf")]
        args = {
            **SETTINGS, "model": str(model), "attention_backend": "kvcompress",
            "additional_config": {"kvcompress": section},
            "kv_cache_dtype": "fp8" if name == "fp8" else "auto",
        }  # fmt: skip
        waves = [mixed_requests(Prompts(model))[requests]]
        found.append({"name": name, "args": args, "waves": waves, **more})
    return found


@pytest.fixture(scope="module")
def drawn(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Drawn]:
    triton = EngineProcess(tmp_path_factory.mktemp("triton"), V2, jobs(checkpoints, "triton"))
    found = {"torch": run_here(jobs(checkpoints, "torch")), "triton": triton.finish()}
    assert triton.log.count("kernels triton (interpreted)") == len(ENGINES)
    return found


@pytest.mark.parametrize("engine", ENGINES)
def test_tokens_of_the_reference(drawn: dict[str, Drawn], engine: str) -> None:
    found, [reference] = drawn["triton"][engine], drawn["torch"][engine]["waves"]
    assert found["waves"] == [reference]
    assert found["runner"] == "vllm.v1.worker.cpu.model_runner"  # V2's, derived from the one for GPUs
    assert {len(tokens) for tokens in reference} == {36 if engine == "windows" else 25}


def test_some_drafts_stood(drawn: dict[str, Drawn]) -> None:
    steps, one_by_one = (
        [report["kv_cache"]["steps"] for report in drawn[kernels]["windows"]["held"][0]]
        for kernels in ("triton", "torch")
    )
    assert min(steps) < 36
    assert set(one_by_one) == {36}


def test_presets_draw_different_pictures(drawn: dict[str, Drawn]) -> None:
    """Or the equality would say nothing about eviction."""
    presets = ("fitted", "decoupled", "line_ar", "h2o")
    pictures = [tuple(drawn["triton"][preset]["waves"][0][0]) for preset in presets]
    assert len(set(pictures)) == len(pictures)


def test_an_8_bit_cache_draws_other_pictures(drawn: dict[str, Drawn]) -> None:
    """Or it was none."""
    assert drawn["triton"]["fp8"]["waves"][0] != drawn["triton"]["decoupled"]["waves"][0][:1]


def test_pictures_survive_losing_their_blocks(drawn: dict[str, Drawn]) -> None:
    found = drawn["triton"]["preempted"]
    assert found["preempted"] == drawn["torch"]["preempted"]["preempted"] == len(PREEMPT)
    assert found["waves"][0] == drawn["triton"]["decoupled"]["waves"][0][:1]
