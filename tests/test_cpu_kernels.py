"""The CPU kernels against the torch reference: same outputs, same bytes in the cache, same victims."""

import logging
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from vllm_kvcompress.attention import cpu, cpu_library, reference
from vllm_kvcompress.attention.pages import HeadPages, HeadType, Plan, page_bytes, pages_from_bytes
from vllm_kvcompress.policy.rule import MAX_TYPES, HeadRule

needs_kernels = pytest.mark.skipif(cpu.isa() is None, reason="the kernels were not built")

TOLERANCE = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.bfloat16: {"rtol": 2**-7, "atol": 1e-3},
    torch.float16: {"rtol": 2**-10, "atol": 1e-4},
}


@pytest.fixture(autouse=True)
def restore():
    """Tests lower the instruction set and the number of threads."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    cpu.set_isa(cpu.ISAS[-1])


@dataclass
class Scene:
    """A small model's cache and a batch whose rows start one after the other."""

    rules: list[HeadRule]
    kv_heads: list[list[int]]  # per type: heads on the 2 * Hkv axis
    layers: int
    group: int
    dim: int
    page: int
    dtype: torch.dtype
    prefix: list[int]
    start: list[int]  # step of each row's first token; a padding row before that and after the end
    tail: int
    seed: int

    @property
    def steps(self) -> int:
        image = self.rules[0].image
        return max(p + image + s for p, s in zip(self.prefix, self.start, strict=True))

    def caches(self) -> list[tuple[HeadPages, Tensor]]:
        """Per type: pages full of NaN, and a shuffled block table."""
        made = []
        for rule, heads in zip(self.rules, self.kv_heads, strict=True):
            n, rows = len(heads) * self.layers, len(self.prefix)
            blocks = -(-(max(self.prefix) + rule.capacity) // self.page)
            size = (page_bytes(n, self.page, self.dim, self.dtype, rule.scores) + 3) // 4 * 4 + self.tail * 4
            raw = torch.full((rows * blocks + 1, size), 0xFF, dtype=torch.uint8)
            table = torch.full((rows, blocks + 2), 2**30, dtype=torch.int32)  # must not be followed
            table[:, :blocks] = torch.randperm(rows * blocks + 1)[: rows * blocks].view(rows, blocks)
            pages = pages_from_bytes(raw, n, self.page, self.dim, self.dtype, rule.scores)
            made.append((pages, table))
        return made

    def types(self, caches: list[tuple[HeadPages, Tensor]], layer: int | None) -> list[HeadType]:
        """The head types as one layer sees them, or as all layers together do (None)."""
        seen = []
        for (pages, table), rule, heads in zip(caches, self.rules, self.kv_heads, strict=True):
            index = torch.tensor(heads, dtype=torch.int32)
            part = pages if layer is None else pages.layer(layer * len(heads), (layer + 1) * len(heads))
            seen.append(HeadType(part, rule, index, table))
        return seen

    def plan(self, step: int) -> Plan:
        length = [
            max(0, step + 1 - s) if step + 1 - s <= p + self.rules[0].image else 0
            for p, s in zip(self.prefix, self.start, strict=True)
        ]
        return Plan(torch.tensor(self.prefix, dtype=torch.int32), torch.tensor(length, dtype=torch.int32))


@st.composite
def scenes(draw: st.DrawFn) -> Scene:
    line, lines = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    image = line * lines
    hkv = draw(st.integers(1, 3))

    def rule(ring: bool) -> HeadRule:
        capacity = draw(st.integers(line, image))
        room = image if capacity == image else capacity - line
        anchors = draw(st.integers(0, room))
        recent = draw(st.integers(0, room - anchors))
        decay = draw(st.sampled_from([0.0, 0.5, 1.0]))
        refine = {name: draw(st.booleans()) for name in ("value_norm", "smooth_row")}
        return HeadRule(capacity, line, image, anchors, recent, ring, decay, **({} if ring else refine))

    number = draw(st.integers(1, MAX_TYPES))
    split = draw(st.lists(st.integers(0, number - 1), min_size=2 * hkv, max_size=2 * hkv))
    kinds = [(rule(draw(st.booleans())), [h for h in range(2 * hkv) if split[h] == n]) for n in set(split)]
    rows = draw(st.integers(1, 4))
    return Scene(
        rules=[r for r, _ in kinds],
        kv_heads=[h for _, h in kinds],
        layers=draw(st.integers(1, 2)),
        group=draw(st.integers(1, 7)),
        dim=draw(st.sampled_from([4, 8, 16, 24, 32, 48, 64, 80, 96, 128, 136])),
        page=draw(st.sampled_from([1, 2, 3, 4, 5, 8, 16, 40])),
        dtype=draw(st.sampled_from(list(TOLERANCE))),
        prefix=draw(st.lists(st.integers(1, 6), min_size=rows, max_size=rows)),
        start=draw(st.lists(st.integers(0, 4), min_size=rows, max_size=rows)),
        tail=draw(st.integers(0, 5)),
        seed=draw(st.integers(0, 2**20)),
    )


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


def assert_same_cache(mine: HeadPages, theirs: HeadPages, tolerance: float) -> None:
    for name in ("kv", "token", "victim"):
        assert torch.equal(bits(getattr(mine, name)), bits(getattr(theirs, name))), name
    torch.testing.assert_close(mine.score, theirs.score, rtol=tolerance, atol=tolerance, equal_nan=True)


def play(scene: Scene) -> None:
    """Draw all images with both implementations, step by step."""
    torch.manual_seed(scene.seed)
    theirs = scene.caches()
    torch.manual_seed(scene.seed)
    mine = scene.caches()
    rows, kv = len(scene.prefix), sum(map(len, scene.kv_heads))
    heads = kv * scene.group
    layers = [(scene.types(mine, i), scene.types(theirs, i)) for i in range(scene.layers)]
    every = list(zip(scene.types(mine, None), scene.types(theirs, None), strict=True))
    for step in range(scene.steps):
        plan = scene.plan(step)
        for native, plain in layers:
            mixed = torch.randn(rows, heads + 2 * kv + 1, scene.dim).to(scene.dtype)
            q, k, v = mixed[:, 1:].split([heads, kv, kv], 1)  # views: rows are further apart than heads * D
            out = torch.full((rows, heads, scene.dim), torch.nan, dtype=scene.dtype)
            expected = out.clone()
            cpu.decode(q, k, v, native, plan, scene.dim**-0.5, out)
            reference.decode(q, k, v, plain, plan, scene.dim**-0.5, expected)
            torch.testing.assert_close(out, expected, **TOLERANCE[scene.dtype])
        for native_type, plain_type in every:
            assert_same_cache(native_type.pages, plain_type.pages, 1e-5)
            native_type.pages.score.copy_(plain_type.pages.score)  # the same input for the choice
            cpu.select_victims(native_type, plan)
            reference.select_victims(plain_type, plan)
            assert_same_cache(native_type.pages, plain_type.pages, 0)


relaxed = settings(deadline=None, suppress_health_check=list(HealthCheck), max_examples=30)


@needs_kernels
@pytest.mark.parametrize("threads", [1, 2])
@given(scenes())
@relaxed
def test_equals_reference(threads, scene):
    torch.set_num_threads(threads)
    play(scene)


@needs_kernels
@pytest.mark.parametrize("isa", cpu.ISAS)
@given(scenes())
@settings(relaxed, max_examples=12)
def test_every_instruction_set(isa, scene):
    if cpu.set_isa(isa) != isa:
        pytest.skip(f"this CPU has no {isa}")
    play(scene)


@needs_kernels
@pytest.mark.parametrize("isa", cpu.ISAS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("dim", [32, 48, 64, 80, 96, 128])
def test_long_rows_and_extremes(isa, dtype, dim):
    """Hundreds of slots, logits from -100 to 100, values near the type's ends: the maximum moves often."""
    if cpu.set_isa(isa) != isa:
        pytest.skip(f"this CPU has no {isa}")
    torch.manual_seed(0)
    rule = HeadRule(200, 10, 300, 4, 20)
    scene = Scene([rule], [[0, 1]], 1, 2, dim, 8, dtype, [37, 5], [0, 0], 0, 0)
    mine, theirs = scene.caches(), scene.caches()
    theirs[0][1].copy_(mine[0][1])
    for pages, _ in (mine[0], theirs[0]):
        generator = torch.Generator().manual_seed(1)
        sign = torch.randn(pages.kv.shape, generator=generator).sign()
        pages.kv.copy_(sign * 10 ** (8 * torch.rand(pages.kv.shape, generator=generator) - 7))
        pages.kv[..., :dim] = torch.randn(pages.kv[..., :dim].shape, generator=generator).to(dtype)
        pages.score.zero_()
        pages.token.copy_(torch.arange(8, dtype=torch.int16))
        pages.victim.copy_(torch.arange(8, dtype=torch.int16))
    plan = Plan(torch.tensor([37, 5], dtype=torch.int32), torch.tensor([290, 297], dtype=torch.int32))
    q, k, v = (20 * torch.randn(2, n, dim).to(dtype) for n in (4, 2, 2))
    out, expected = torch.empty_like(q), torch.empty_like(q)
    cpu.decode(q, k, v, scene.types(mine, 0), plan, dim**-0.5, out)
    reference.decode(q, k, v, scene.types(theirs, 0), plan, dim**-0.5, expected)
    scale = TOLERANCE[dtype] | {"atol": 1e-4 if dtype == torch.float32 else 0.02}
    torch.testing.assert_close(out, expected, **scale)
    torch.testing.assert_close(mine[0][0].score, theirs[0][0].score, rtol=1e-4, atol=1e-5)


@needs_kernels
def test_ties_go_to_the_older():
    rule = HeadRule(6, 2, 10, 1, 1)
    scene = Scene([rule], [[0, 1]], 1, 1, 16, 4, torch.float32, [1], [0], 0, 0)
    pages, _ = scene.caches()[0]
    kind = scene.types([(pages, torch.tensor([[0, 1]], dtype=torch.int32))], None)[0]
    held = torch.tensor([0, 7, 2, 3, 1, 6], dtype=torch.int16)  # slots 1 to 6 of the row: after its prefix
    pages.token[0, :, 1:], pages.token[1, :, :3] = held[:3], held[3:]
    pages.score.zero_()
    cpu.select_victims(kind, Plan(torch.tensor([1], dtype=torch.int32), torch.tensor([9], dtype=torch.int32)))
    assert pages.victim[0, 0, :2].tolist() == [4, 2]  # tokens 1 and 2; 0 is the anchor


@needs_kernels
def test_rewritten_rule_and_moved_table():
    """What is cached about a HeadPages follows the rule, and never the block table."""
    rule = HeadRule(4, 2, 8)
    scene = Scene([rule], [[0, 1]], 1, 1, 16, 2, torch.float32, [2, 2], [0, 0], 0, 3)
    mine, theirs = scene.caches(), scene.caches()
    for table in (torch.tensor([[0, 1, 2], [3, 4, 5]]), torch.tensor([[5, 4, 3], [2, 1, 0]])):
        for ring in (False, True):
            q, k, v = torch.randn(3, 2, 2, 16).unbind()
            out, expected = torch.empty_like(q), torch.empty_like(q)
            plan = Plan(torch.tensor([2, 2], dtype=torch.int32), torch.tensor([1, 2], dtype=torch.int32))
            for caches, decode, to in ((mine, cpu.decode, out), (theirs, reference.decode, expected)):
                kind = scene.types(caches, 0)[0]
                kind.block_table, kind.rule = table.int(), HeadRule(4, 2, 8, ring=ring)
                kind.pages = caches[0][0]
                kind.pages.kv.nan_to_num_(0.5)
                decode(q, k, v, [kind], plan, 0.25, to)
            torch.testing.assert_close(out, expected)


def test_choice_within_columns_is_left_to_torch(monkeypatch):
    called = []
    monkeypatch.setattr(cpu.torch_select, "select_victims", lambda kind, plan: called.append(kind))
    rule = HeadRule(4, 2, 8, stratify=True)
    scene = Scene([rule], [[0, 1]], 1, 1, 16, 2, torch.float32, [2], [0], 0, 0)
    kind = scene.types(scene.caches(), None)[0]
    cpu.select_victims(kind, scene.plan(7))
    assert called == [kind]


def test_without_the_library(monkeypatch, tmp_path, caplog):
    """No compiler: one warning, and the reference does the work."""
    monkeypatch.setattr(cpu_library, "LIBRARY", tmp_path / "missing.so")
    cpu_library.library.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, "vllm.kvcompress"):
            scene = Scene([HeadRule(4, 2, 8)], [[0, 1]], 1, 2, 16, 4, torch.bfloat16, [2], [0], 0, 0)
            play(scene)
            assert cpu.isa() is None
        assert [("compiler" in record.message) for record in caplog.records] == [True]
    finally:
        cpu_library.library.cache_clear()


@needs_kernels
def test_unreadable_inputs(caplog):
    """A float32 query on a bfloat16 cache: one warning, and the reference does the work."""
    scene = Scene([HeadRule(4, 2, 8)], [[0, 1]], 1, 1, 16, 4, torch.bfloat16, [2], [0], 0, 0)
    kind = scene.types(scene.caches(), 0)[0]
    cpu_library.warn_layout.cache_clear()
    with caplog.at_level(logging.WARNING, "vllm.kvcompress"):
        for step in range(3):
            q, k, v = torch.randn(3, 1, 2, 16).unbind()
            out = torch.full_like(q, torch.nan)
            cpu.decode(q, k, v, [kind], scene.plan(step), 0.25, out)
            assert out.isfinite().all()
    assert len(caplog.records) == 1


@needs_kernels
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_shares_torch_threads():
    """One OpenMP runtime in the process: torch's."""
    code = (
        "from vllm_kvcompress.attention import cpu; assert cpu.isa();"
        "maps = {l.split()[-1] for l in open('/proc/self/maps') if '/libgomp' in l or '/libiomp' in l};"
        "print(*maps)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert len(done.stdout.split()) == 1, done.stdout


def test_huge_pages_keep_the_contents():
    memory = torch.arange(5 * 2**18, dtype=torch.int64)  # 10 MiB
    cpu.use_huge_pages(memory, collapse=True)
    assert torch.equal(memory, torch.arange(5 * 2**18, dtype=torch.int64))
    assert not cpu.use_huge_pages(torch.zeros(8))
