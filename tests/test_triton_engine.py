"""Engines with the Triton kernels, in Triton's interpreter: the tokens of the torch reference.

The reference draws on the V1 runner, the kernels on the V2 runner, which is what runs on GPUs, and one
preset on V1 as well.
"""

from pathlib import Path
from typing import Any

import pytest
from engine_process import V1, V2, EngineProcess
from test_v2_runner import SETTINGS, Prompts, mixed_requests

from vllm_kvcompress.policy import PRESETS

PICTURE = 25
PREEMPT = (6, 16)  # steps at which all running pictures lose their blocks
INTERPRETED = {"TRITON_INTERPRET": "1"}
ON_V1, MIXED = "line_ar", "decoupled"  # lengths, chunks, arrivals, guidance and a negative prompt mixed
Drawn = dict[str, dict[str, Any]]


def jobs(tiny: Path, gqa: Path, kernels: str) -> list[dict[str, Any]]:
    """Every preset, one in a mixed batch; grouped queries; a picture that is preempted twice."""

    def engine(
        name: str, model: Path, preset: str, requests: slice, cache: str = "auto", **more: Any
    ) -> dict[str, Any]:
        section = {"preset": preset, "budget": 0.4, "kernels": kernels}
        args: dict[str, Any] = {
            "attention_backend": "kvcompress",
            "additional_config": {"kvcompress": section},
        }
        args["kv_cache_dtype"] = cache
        waves = [mixed_requests(Prompts(model))[requests]]
        return {"name": name, "args": {**SETTINGS, "model": str(model), **args}, "waves": waves, **more}

    return [
        *(engine(preset, tiny, preset, slice(3 if preset == MIXED else 1)) for preset in PRESETS),
        engine("gqa", gqa, "decoupled", slice(1)),
        engine("fp8", tiny, "decoupled", slice(1), cache="fp8"),
        engine("preempted", tiny, "decoupled", slice(1), preempt=PREEMPT),
    ]


@pytest.fixture(scope="module")
def drawn(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Drawn]:
    folder, models = tmp_path_factory.mktemp("engines"), (checkpoints["five-hf"], checkpoints["five-gqa-hf"])
    mine = jobs(*models, "triton")
    on_v1 = [{**job, "name": "v1"} for job in mine if job["name"] == ON_V1]
    processes = {
        "triton": EngineProcess(folder / "triton", V2, mine),
        "torch": EngineProcess(folder / "torch", V1 | INTERPRETED, [*jobs(*models, "torch"), *on_v1]),
    }
    found = {name: process.finish() for name, process in processes.items()}
    used = {name: process.log.count("kernels triton (interpreted)") for name, process in processes.items()}
    assert used == {"triton": len(mine), "torch": len(on_v1)}
    return found


@pytest.mark.parametrize("engine", [*PRESETS, "gqa", "fp8", "preempted"])
def test_tokens_of_the_reference(drawn: dict[str, Drawn], engine: str) -> None:
    found, [reference] = drawn["triton"][engine], drawn["torch"][engine]["waves"]
    assert found["waves"] == [reference]
    assert found["runner"] == "vllm.v1.worker.cpu.model_runner"  # V2's, derived from the one for GPUs
    assert all(len(tokens) == PICTURE for tokens in reference)


def test_tokens_of_the_reference_on_v1(drawn: dict[str, Drawn]) -> None:
    found, reference = drawn["torch"]["v1"], drawn["torch"][ON_V1]
    assert found["waves"] == reference["waves"]
    assert found["runner"] == reference["runner"] == "vllm.v1.worker.cpu_model_runner"


def test_presets_draw_different_pictures(drawn: dict[str, Drawn]) -> None:
    """Or the equality would say nothing about eviction."""
    pictures = [tuple(drawn["triton"][preset]["waves"][0][0]) for preset in PRESETS]
    assert len(set(pictures)) == len(pictures)


def test_an_8_bit_cache_draws_other_pictures(drawn: dict[str, Drawn]) -> None:
    """Or it was none."""
    assert drawn["triton"]["fp8"]["waves"][0] != drawn["triton"]["decoupled"]["waves"][0][:1]


def test_pictures_survive_losing_their_blocks(drawn: dict[str, Drawn]) -> None:
    found = drawn["triton"]["preempted"]
    assert found["preempted"] == drawn["torch"]["preempted"]["preempted"] == len(PREEMPT)
    assert found["waves"][0] == drawn["triton"]["decoupled"]["waves"][0][:1]
