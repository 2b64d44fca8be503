"""A step's prefill launches as many operations for many rows as for few."""

from typing import Any

import pytest
from oracle import Run, one_thread, world
from torch.utils._python_dispatch import TorchDispatchMode

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
