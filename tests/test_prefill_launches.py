"""A step launches as many operations for many rows as for few."""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from inprocess import Engine, in_process  # noqa: F401
from oracle import Run, one_thread, world
from torch.utils._python_dispatch import TorchDispatchMode
from vllm import SamplingParams

from vllm_kvcompress.attention.backend import StepPlanner
from vllm_kvcompress.cache.store import CompressedCache
from vllm_kvcompress.policy.raster import Raster

_threads = pytest.fixture(scope="module", autouse=True)(one_thread)


class Launches(TorchDispatchMode):
    """Counts the operations that torch dispatches."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def launches(rows: int, begun: int) -> int:
    """Of one step: prompts of 20 tokens that go on after ``begun``, in so many rows, and checked."""
    run = Run(world("decoupled", 0.45, Raster(5, 4), [[1, 0], [0, 0]], group=2), [20] * rows, [21] * rows)
    counting = Launches()
    if begun:
        run.chunk(dict.fromkeys(range(rows), begun))
    real = run.prefill

    def counted(*args: Any) -> None:
        with counting:
            real(*args)

    run.prefill = counted
    run.chunk(dict.fromkeys(range(rows), 20 - begun))
    run.prefill = real
    run.step(list(range(rows)))
    run.check()
    return counting.count


@pytest.mark.parametrize("begun", [0, 5, 17])
def test_launches_do_not_depend_on_rows(begun: int) -> None:
    two, eight = launches(2, begun), launches(8, begun)
    assert two == eight > 0


def test_a_prompt_beside_pictures_launches_alike(checkpoints: dict[str, Path]) -> None:
    """In the engine, with two head types: the plan, made once for all layers, and a layer's attention.

    What compiled kernels do is one launch each, and no operation of torch's.
    """
    engine = Engine.get(
        checkpoints["five-hf"], max_model_len=128, kvcompress={"preset": "decoupled", "kernels": "cpu"}
    )
    assert len(engine.model.compressed._layout.rules) == 2
    seen: list[dict[str, list[int]]] = []

    def counting(owner: type, name: str, counts: list[int]) -> Any:
        original = getattr(owner, name)

        def counted(self: Any, *args: Any, **more: Any) -> Any:
            with Launches() as launches:
                out = original(self, *args, **more)
            counts.append(launches.count)
            return out

        return mock.patch.object(owner, name, counted)

    for wave, rows in enumerate((2, 2, 8)):  # the first finds some of what is kept for later steps
        for row in range(rows):
            engine.add(f"{wave} {row}", engine.prompt("a red bird"), SamplingParams(temperature=0.0))
        engine.steps(3)
        engine.add(f"{wave} late", engine.prompt("two boats by the sea"), SamplingParams(temperature=0.0))
        counts: dict[str, list[int]] = {"build": [], "_mixed": []}
        with (
            counting(StepPlanner, "build", counts["build"]),
            counting(CompressedCache, "_mixed", counts["_mixed"]),
        ):
            engine.steps(1)
        engine.steps()
        seen.append(counts)
    assert seen[1] == seen[2]
    first, second = seen[2]["build"]
    assert first > second > 0, "the second head type has the first one's plan"
    assert len(seen[2]["_mixed"]) == engine.model.compressed._layout.layers
    assert min(seen[2]["_mixed"]) > 0
