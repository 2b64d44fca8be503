"""Full CUDA graphs of decode steps, as far as they can be shown without a GPU.

A recorded step of more rows than ever run stands in for the graph (tests/graph_process.py). It must draw
what the torch reference draws eagerly, in a cache full of NaN, with rows that come and go.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_process import V2, EngineProcess, run_here
from graph_process import SIZE, NoWaiting
from inprocess import in_process  # noqa: F401
from test_v2_runner import SETTINGS, Prompts, mixed_requests
from vllm.v1.attention.backend import AttentionCGSupport

from vllm_kvcompress.attention.backend import StepPlanner
from vllm_kvcompress.testing.checkpoints import TINY

PICTURE, LINE = 25, 5
REQUESTS = slice(3)  # a picture, one without guidance in chunks, one with a negative prompt that comes later


WINDOW = 3


def jobs(model: Path, kernels: str, windows: Sequence[int] = (1, WINDOW)) -> list[dict[str, Any]]:
    wave = mixed_requests(Prompts(model))[REQUESTS]

    def job(window: int) -> dict[str, Any]:
        drafts = [None] if window == 1 else [None, {"drafts": "truth", "places": [window]}]
        section = {"preset": "fitted", "budget": 0.4, "kernels": kernels, "window": window}
        args = {"attention_backend": "kvcompress", "additional_config": {"kvcompress": section}}
        return {
            "name": str(window), "args": {**SETTINGS, "model": str(model), **args},
            "waves": [wave for _ in drafts], "drafts": drafts,
        }  # fmt: skip

    return [job(window) for window in windows]


@pytest.fixture(scope="module")
def drawn(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder, model = tmp_path_factory.mktemp("graphs"), checkpoints["five-hf"]
    graph = EngineProcess(folder / "graph", V2, jobs(model, "triton"), script="graph_process.py")
    eager = run_here(jobs(model, "torch", [1]))["1"]
    replayed = graph.finish()
    return {"eager": eager, "graph": replayed["1"], "windows": replayed[str(WINDOW)]}


graphs = pytest.mark.parametrize("graph", ["graph", "windows"])


@graphs
def test_replayed_steps_draw_the_reference_tokens(drawn: dict[str, Any], graph: str) -> None:
    assert all(wave == drawn["eager"]["waves"][0] for wave in drawn[graph]["waves"])
    assert all(len(tokens) == PICTURE for tokens in drawn[graph]["waves"][0])


@graphs
def test_steps_were_replayed_with_padding_rows(drawn: dict[str, Any], graph: str) -> None:
    rows = drawn[graph]["rows"]
    assert drawn[graph]["replays"] == len(rows) >= (PICTURE if graph == "graph" else PICTURE // WINDOW)
    assert {1, 2, 3} <= set(rows)
    assert max(rows) < SIZE
    assert drawn[graph]["operations"] > 50


def test_windows_in_graphs_take_fewer_steps(drawn: dict[str, Any]) -> None:
    """With the package's drafts and with the truth in their place, which is cut at lines' ends alone."""

    def steps(graph: str, wave: int = 0) -> list[int]:
        return [report["kv_cache"]["steps"] for report in drawn[graph]["held"][wave]]

    assert steps("graph") == [PICTURE] * 3
    assert min(steps("windows")) < PICTURE, "some drafts stood"
    lines = PICTURE // LINE
    cut = (lines - 1) * -(-LINE // WINDOW) + -(-(LINE - 1) // WINDOW)
    assert steps("windows", 1) == [1 + cut] * 3


@graphs
def test_logits_of_decode_steps_are_of_codes_and_wait_for_nothing(drawn: dict[str, Any], graph: str) -> None:
    """An operation that waits would have ended the process: in the recorded step, its plan or its logits."""
    assert len(drawn[graph]["widths"]) == drawn[graph]["replays"]
    assert set(drawn[graph]["widths"]) == {TINY.codebook}


def test_what_waits_is_recognised() -> None:
    numbers = torch.arange(4.0)
    for wait in (
        lambda: numbers.nonzero(),
        lambda: numbers[numbers > 1],
        lambda: numbers.sum().item(),
        lambda: bool(numbers[0]),
        lambda: numbers.tolist() and float(numbers[0]),
        lambda: numbers.clone().index_put_((numbers > 1,), torch.zeros(())),
        lambda: numbers.unique(),
    ):
        with NoWaiting(), pytest.raises(AssertionError, match="makes the host wait"):
            wait()
    with NoWaiting():
        numbers[torch.tensor([1, 2])].where(numbers[:2] > 1, 0.0)


@graphs
def test_padding_rows_write_nowhere(drawn: dict[str, Any], graph: str) -> None:
    """Their block tables point at block 0, which belongs to no request."""
    assert drawn[graph]["null_block_untouched"]
    assert drawn[graph]["poisoned"] > 0


def test_the_backend_says_so(drawn: dict[str, Any]) -> None:
    assert drawn["graph"]["support"] == ["UNIFORM_SINGLE_TOKEN_DECODE"]
    assert drawn["windows"]["support"] == ["UNIFORM_BATCH"]


@pytest.mark.parametrize(
    ("section", "device", "support"),
    [
        ({}, "cuda", AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE),
        ({"preset": "streaming"}, "cuda", AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE),
        ({"preset": "line_ar", "smooth_row": True}, "cuda", AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE),
        ({"preset": "line_ar", "stratify": True}, "cuda", AttentionCGSupport.NEVER),
        ({"kernels": "torch"}, "cuda", AttentionCGSupport.NEVER),
        ({}, "cpu", AttentionCGSupport.NEVER),
    ],
)
def test_support(section: dict[str, Any], device: str, support: AttentionCGSupport) -> None:
    """Choice within columns is torch's, which looks at the host; so does the reference."""

    class Config:
        additional_config: Any = {"kvcompress": section}  # noqa: RUF012

        class device_config:
            device_type = device

        diffusion_config = None

    assert StepPlanner.get_cudagraph_support(Config(), None) is support  # type: ignore[arg-type]
    Config.diffusion_config = object()
    windows = StepPlanner.get_cudagraph_support(Config(), None)  # type: ignore[arg-type]
    never = support is AttentionCGSupport.NEVER
    assert windows is (support if never else AttentionCGSupport.UNIFORM_BATCH)
