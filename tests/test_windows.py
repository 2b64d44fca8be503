"""Windows of drafts on paged caches: outputs, pages and victims are those of drawing one by one."""

import random
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Run, World, bounded, one_thread, sized_worlds, worlds

from vllm_kvcompress.attention import cpu, cpu_window, reference, window
from vllm_kvcompress.attention.pages import HeadType, Plan
from vllm_kvcompress.attention.window import WindowPlan

KERNELS = {"torch": (reference, window), "cpu": (cpu, cpu_window)}
quiet = pytest.fixture(autouse=True)(one_thread)


def kernels_of(name: str) -> Any:
    """Both modules of that name; the test is skipped where they can't be used."""
    if name == "cpu" and cpu.isa() is None:
        pytest.skip("the kernels were not built")
    return KERNELS[name]


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    kernels_of(request.param)
    yield request.param
    cpu.set_isa(cpu.ISAS[-1])


class WindowRun(Run):
    """Requests that draw in windows: ``count`` places are fed, ``standing`` of them are kept."""

    window: SimpleNamespace = SimpleNamespace(verify=window.verify, commit=window.commit)
    ahead: list[tuple[int, int, int, torch.Tensor]]

    def place(self, steps: dict[int, tuple[int, int]], *, wrong: bool, gen: torch.Generator) -> None:
        """A step: by row, places and how many stand; drafts beyond those are ``wrong``, or right."""
        rows, counts = list(steps), [count for count, _ in steps.values()]
        starts = [sum(counts[:n]) for n in range(len(rows))]
        prefix = torch.tensor([self.prefix[row] for row in rows], dtype=torch.int32)
        length = torch.tensor([self.length[row] + 1 for row in rows], dtype=torch.int32)
        size = self.size_of(rows)
        plan = WindowPlan(rows, starts, counts, prefix, length, self.begins_of(rows), size)
        held = []
        for layer in range(len(self.world.kinds)):
            parts = []
            for whole in (self.q, self.k, self.v):
                for row, (count, standing) in steps.items():
                    at = torch.arange(self.length[row], self.length[row] + count)
                    part = whole[row, at.clamp(max=whole.shape[1] - 1), layer].clone()
                    if wrong:
                        part[standing:] = torch.randn(part[standing:].shape, generator=gen) * 3
                    parts.append(part)
            n = len(rows)
            q, k, v = (torch.cat(parts[i * n : (i + 1) * n]) for i in range(3))
            out = torch.full_like(q, torch.nan)
            types = self.layer(layer, rows)
            held.append(self.window.verify(q, k, v, types, plan, self.scale, out))
            for start, (row, (count, standing)) in zip(starts, steps.items(), strict=True):
                assert out[start : start + count].isfinite().all()
                self.out[row, self.length[row] : self.length[row] + standing, layer] = out[start:][:standing]
                if not wrong:
                    for nth in range(standing, min(count, self._left(row))):
                        self.ahead.append((row, self.length[row] + nth, layer, out[start + nth]))
        before = [self._bytes(whole) for whole in self.types if whole]
        assert before == self.untouched, "attention alone writes nothing"
        standing = [stands for _, stands in steps.values()]
        self.window.commit(held, standing)
        for row, stands in zip(rows, standing, strict=True):
            self.length[row] += stands
        ends = torch.tensor([self.length[row] for row in rows], dtype=torch.int32)
        for whole in filter(None, self.types):
            self.select(replace(whole, block_table=whole.block_table[rows]), Plan(prefix, ends, None, size))
        self.note(rows)

    def _left(self, row: int) -> int:
        """Places to the end of the line."""
        line = self.world.of_size(self.size(row))[0].line
        return line - (self.length[row] - self.prefix[row]) % line

    @property
    def untouched(self) -> list[bytes]:
        return self._seen

    def remember(self) -> None:
        self._seen = [self._bytes(whole) for whole in self.types if whole]

    @staticmethod
    def _bytes(whole: HeadType) -> bytes:
        pages = whole.pages
        return b"".join(
            x.contiguous().view(torch.uint8).numpy().tobytes()
            for x in (pages.kv, pages.score, pages.token, pages.victim)
            if x.numel()
        )


def draw_in_windows(
    decoder: Any, windows: Any, world: World, prefix: list[int], seed: int,
    begins: list[tuple[int, int]] | None = None, sizes: list[int] | None = None,
) -> None:  # fmt: skip
    """Draw pictures with windows of any length, of which any number stands, and compare with the oracle."""
    rng, gen = random.Random(seed), torch.Generator().manual_seed(seed)
    total = [p + world.image(sizes[row] if sizes else 0) for row, p in enumerate(prefix)]
    run = WindowRun(
        world, prefix, total, seed=seed, decode=decoder.decode, select=decoder.select_victims, begins=begins,
        sizes=sizes,
    )  # fmt: skip
    run.window, run.ahead = SimpleNamespace(verify=windows.verify, commit=windows.commit), []
    run.chunk(dict(enumerate(prefix)))
    while any(run.length[row] < run.total[row] for row in range(len(prefix))):
        steps, ones = {}, []
        for row in range(len(prefix)):
            left = run.total[row] - run.length[row]
            if not left:
                continue
            count = rng.randint(1, 16)
            if count == 1:
                ones.append(row)
                continue
            steps[row] = count, rng.randint(1, min(count, run._left(row), left))
        if ones:
            run.step(ones)
        if steps:
            run.remember()
            run.place(steps, wrong=rng.random() < 0.5, gen=gen)
    run.check()
    for row, position, layer, out in run.ahead:
        torch.testing.assert_close(out, run.out[row, position, layer], rtol=1e-5, atol=1e-5)


@given(worlds(), st.lists(st.integers(1, 4), min_size=1, max_size=3), st.integers(0, 2**20))
@settings(bounded, max_examples=60)
def check(kernel: str, isa: str, world: World, prefix: list[int], seed: int) -> None:
    if kernel == "cpu":
        cpu.set_isa(isa)
    draw_in_windows(*KERNELS[kernel], world, prefix, seed)


def test_a_window_leaves_what_drawing_one_by_one_leaves(kernel: str) -> None:
    check(kernel, cpu.ISAS[-1])


@given(sized_worlds(), st.integers(0, 2**20))
@settings(bounded, max_examples=25)
def check_sizes(kernel: str, world: World, seed: int) -> None:
    sizes = [*range(1 + len(world.others)), 0]
    prefix = [1 + (seed + row) % 4 for row in sizes]
    draw_in_windows(*KERNELS[kernel], world, prefix, seed, sizes=sizes)


def test_pictures_of_several_sizes_in_windows(kernel: str) -> None:
    """Each window ends with its own picture's line; what stands is kept by its own size's rule."""
    check_sizes(kernel)


@pytest.mark.parametrize("isa", cpu.ISAS[:-1])
def test_on_every_instruction_set(isa: str) -> None:
    if cpu.set_isa(isa) != isa:
        pytest.skip(f"this CPU has no {isa}")
    check("cpu", isa)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("group", "dim"), [(1, 128), (4, 64), (7, 80)])
@pytest.mark.skipif(cpu.isa() is None, reason="the kernels were not built")
def test_kernels_equal_the_reference_at_real_sizes(dtype: torch.dtype, group: int, dim: int) -> None:
    """Hundreds of slots, every element type, windows of 16: one window after a long drawing."""
    from test_cpu_kernels import TOLERANCE, Scene

    from vllm_kvcompress.policy.rule import HeadRule

    rules = [HeadRule(60, 24, 576, 8, 52, ring=True), HeadRule(150, 24, 576, 8, 30, decay=0.5)]
    scene = Scene(rules, [[0, 3], [1, 2]], 1, group, dim, 16, dtype, [37, 5], [0, 0], 0, 0)
    torch.manual_seed(0)
    theirs = scene.caches()
    torch.manual_seed(0)
    mine = scene.caches()
    for (a, _), (b, _) in zip(mine, theirs, strict=True):
        kv = torch.randn(a.kv.shape).to(dtype)
        a.kv.copy_(kv), b.kv.copy_(kv)
        for name in ("score", "token"):
            if getattr(a, name).numel():
                getattr(a, name).zero_(), getattr(b, name).zero_()
    for row in range(2):  # any 24 different slots will do as victims
        for n in range(24):
            for pages, table in (mine[1], theirs[1]):
                pages.victim[table[row, n // 16], :, n % 16] = 10 + 5 * n
    length = torch.tensor([37 + 24 * 9 + 1, 5 + 24 * 12 + 3], dtype=torch.int32)
    plan = WindowPlan([0, 1], [0, 16], [16, 16], torch.tensor([37, 5], dtype=torch.int32), length)
    q = torch.randn(32, 4 * group, dim).to(dtype)
    k, v = torch.randn(2, 32, 4, dim).to(dtype)
    out, expected = torch.full_like(q, torch.nan), torch.full_like(q, torch.nan)
    native, plain = scene.types(mine, 0), scene.types(theirs, 0)
    held = cpu_window.verify(q, k, v, native, plan, dim**-0.5, out)
    plain_held = window.verify(q, k, v, plain, plan, dim**-0.5, expected)
    assert isinstance(held, cpu_window.Held)
    torch.testing.assert_close(out, expected, **TOLERANCE[dtype])
    cpu_window.commit([held], [16, 5])
    window.commit([plain_held], [16, 5])
    for a, b in zip(native, plain, strict=True):
        for name in ("kv", "token"):
            assert torch.equal(getattr(a.pages, name), getattr(b.pages, name)), name
        torch.testing.assert_close(a.pages.score, b.pages.score, rtol=1e-4, atol=1e-5)
