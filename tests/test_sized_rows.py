"""Pictures of several sizes in one batch: every row under its own size's rules, in all kernels.

The oracle knows one picture at a time, so each row must be what it would be on a server of its size alone.
"""

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Run, World, bounded, one_thread, sized_worlds
from test_reference import play

from vllm_kvcompress.attention import cpu, reference, select
from vllm_kvcompress.attention.pages import HeadType, Plan
from vllm_kvcompress.policy.rule import HeadRule

_threads = pytest.fixture(scope="module", autouse=True)(one_thread)
KERNELS: dict[str, tuple[Callable, Callable]] = {
    "torch": (reference.decode, select.select_victims),
    "cpu": (cpu.decode, cpu.select_victims),
}


def run_of(world: World, seed: int, kernel: str, **more: object) -> Run:
    """A request of every size, and one more of the first."""
    sizes = [*range(1 + len(world.others)), 0]
    prefix = [(seed + 3 * row) % 7 for row in range(len(sizes))]
    total = [p + world.image(size) for p, size in zip(prefix, sizes, strict=True)]
    decode, choose = KERNELS[kernel]
    return Run(world, prefix, total, seed, decode, choose, sizes=sizes, **more)


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest) -> str:
    if request.param == "cpu" and cpu.isa() is None:
        pytest.skip("the kernels were not built")
    return request.param


@given(sized_worlds(), st.integers(0, 999))
@settings(bounded, max_examples=40)
def check(kernel: str, world: World, seed: int) -> None:
    run = run_of(world, seed, kernel)
    play(run, random.Random(seed))
    run.check()


def test_each_row_is_what_it_would_be_alone(kernel: str) -> None:
    """Lines end, rings wrap and victims go by the row's own numbers; neighbours are of its own lines."""
    check(kernel)


@given(sized_worlds(), st.integers(0, 999))
@settings(bounded, max_examples=25)
def check_replayed(kernel: str, world: World, seed: int) -> None:
    rng, run = random.Random(seed), run_of(world, seed, kernel)
    for row in range(len(run.total)):
        if seed % 3:  # a prompt and the tokens of a picture that goes on, in chunks
            while run.length[row] < rng.randint(1, run.total[row]):
                run.chunk({row: rng.randint(1, run.total[row] - run.length[row])})
    play(run, rng)
    run.check()


def test_a_replayed_picture_goes_on_by_its_own_lines(kernel: str) -> None:
    check_replayed(kernel)


@given(sized_worlds(), st.integers(0, 99))
@settings(bounded, max_examples=20)
def check_same(world: World, seed: int) -> None:
    mixed = run_of(world, seed, "cpu")
    play(mixed, random.Random(seed))
    for row, size in enumerate(mixed.sizes or ()):
        own = replace(world, rules=world.of_size(size), others=())
        alone = Run(own, mixed.prefix[row : row + 1], mixed.total[row : row + 1], seed, *KERNELS["cpu"])
        alone.q, alone.k, alone.v = (x[row, None] for x in (mixed.q, mixed.k, mixed.v))
        alone.out = torch.full_like(alone.q, torch.nan)
        while alone.length[0] < (total := alone.total[0]):
            alone.step([0])
        assert torch.equal(mixed.out[row, :total], alone.out[0, :total])


@pytest.mark.skipif(cpu.isa() is None, reason="the kernels were not built")
def test_a_server_of_one_size_computes_the_same_bits() -> None:
    check_same()


def test_a_size_that_keeps_everything_beside_one_that_does_not() -> None:
    """The type is scored for the sake of one size; the other's rows choose no victims."""
    full, small = HeadRule(6, 3, 6), HeadRule(6, 4, 12, 1, 1)
    for first, other in ((full, small), (small, full)):
        world = World((first,), torch.zeros(1, 2).long().numpy(), head_size=4, others=((other,),))
        for kernel in KERNELS:
            run = run_of(world, 1, kernel)
            (kind,) = filter(None, run.types)
            assert (kind.scores, kind.capacity) == (True, 6)
            play(run, random.Random(0))
            run.check()
    kind = HeadType(kind.pages, small, kind.head_index, kind.block_table, (small, full))
    assert (kind.of(1).rule, kind.of(1).sized) == (full, ())
    plan = Plan(torch.zeros(3).int(), torch.tensor([1, 0, 2]).int(), None, torch.tensor([1, 0, 1]).int())
    assert [(size, rows.tolist(), mine.length.tolist()) for size, rows, mine in plan.by_size()] == [
        (1, [0, 2], [1, 2])
    ]
