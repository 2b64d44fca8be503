"""The Triton kernels against the torch reference and the dense oracle.

Triton decides at import whether its interpreter runs the kernels. Without a GPU this module therefore runs
itself, as a script, in a process of its own (``TRITON_INTERPRET=1``), and each check is a test here.
"""

import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import preloaded
import pytest
import torch
import triton.language as tl
from engine_process import V2
from interpreter import patch_once
from oracle import Run, World, world
from torch import Tensor

from vllm_kvcompress.attention import reference, select, triton_decode, triton_kinds, triton_select
from vllm_kvcompress.attention.pages import HeadPages, HeadType, Plan, page_bytes, pages_from_bytes
from vllm_kvcompress.policy.raster import Raster
from vllm_kvcompress.policy.rule import HeadRule

TOLERANCE = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.bfloat16: {"rtol": 2**-7, "atol": 1e-3},
    torch.float16: {"rtol": 2**-10, "atol": 1e-4},
}
CHECKS: dict[str, Callable[[], None]] = {}


def check(function: Callable[[], None]) -> Callable[[], None]:
    CHECKS[function.__name__] = function
    return function


@pytest.fixture(scope="module")
def failures() -> dict[str, str]:
    """Traceback of each check, empty where it passed."""
    command = [sys.executable, str(Path(__file__).resolve())]
    done = preloaded.run(command, env=os.environ | V2)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def same_cache(mine: HeadPages, theirs: HeadPages, tolerance: float) -> None:
    for name in ("kv", "token", "victim"):
        ours, others = (getattr(pages, name).contiguous().view(torch.uint8) for pages in (mine, theirs))
        assert torch.equal(ours, others), name
    torch.testing.assert_close(mine.score, theirs.score, rtol=tolerance, atol=tolerance, equal_nan=True)


def copied(types: Sequence[HeadType]) -> list[HeadType]:
    """The same types over copies of their pages."""
    names = ("kv", "score", "token", "victim")
    every = [HeadPages(**{name: getattr(t.pages, name).clone() for name in names}) for t in types]
    return [replace(kind, pages=pages) for kind, pages in zip(types, every, strict=True)]


@contextmanager
def counted(module: Any) -> Iterator[list[Any]]:
    """A list that grows with every launch of a module's kernel."""
    launches: list[Any] = []
    launch = module.launch
    with mock.patch.object(module, "launch", lambda *a: launches.append(a) or launch(*a)):
        yield launches


def decode_both(
    q: Tensor, k: Tensor, v: Tensor, types: Sequence[HeadType], plan: Plan, scale: float, out: Tensor,
    **tolerance: float,
) -> None:  # fmt: skip
    """The kernel, and the reference from the same state: same outputs, same bytes in the cache."""
    dtype = types[0].pages.kv.dtype
    sizes = [q.shape[1], k.shape[1], v.shape[1], 1]
    fused = torch.cat((q, k, v, k[:, :1]), 1).to(dtype)  # views of it: rows are further apart than heads * D
    q, k, v, _ = fused.split(sizes, 1)
    plain, expected, found = copied(types), torch.full_like(q, torch.nan), torch.full_like(q, torch.nan)
    with counted(triton_decode) as launches:
        triton_decode.decode(q, k, v, types, plan, scale, found)
    assert len(launches) == 1
    reference.decode(q, k, v, plain, plan, scale, expected)
    torch.testing.assert_close(found, expected, **(TOLERANCE[dtype] | tolerance))
    for mine, theirs in zip(types, plain, strict=True):
        same_cache(mine.pages, theirs.pages, 1e-5)
    out.copy_(found)


def select_both(*types_and_plan: HeadType | Plan) -> None:
    """From the same scores: the same victims, bit for bit, and the same scores afterwards."""
    *types, plan = types_and_plan
    plain = copied(types)
    triton_select.select_all(types, plan)
    for mine, theirs in zip(types, plain, strict=True):
        select.select_victims(theirs, plan)
        same_cache(mine.pages, theirs.pages, 0)


def draw(
    geometry: World, prefix: list[int], late: int, dtype: torch.dtype = torch.float32,
    begins: list[tuple[int, int]] | None = None,
) -> None:  # fmt: skip
    """Draw two whole pictures, the second ``late`` steps after the first, and padding rows at either end."""
    image = geometry.rules[0].image
    run = Run(
        geometry, prefix, [p + image for p in prefix], 0, decode_both, select_both, dtype=dtype, begins=begins
    )
    for step in range(max(run.total) + late):
        live = [row for row in (0, 1) if step >= row * late and run.length[row] < run.total[row]]
        run.step([-1, *live[::-1], -1])
    assert run.length == run.total
    if dtype == torch.float32:
        run.check()


@check
def whole_pictures_equal_the_oracle() -> None:
    """Presets, head splits that differ by layer, groups, pages, prefixes; all phases of a picture."""
    both, mixed = [[0, 1]], [[0, 1], [1, 1]]
    draw(world("decoupled", 0.5, Raster(4, 3), mixed, head_size=16, pages=(3, 2)), [3, 1], 2)
    draw(world("ssd", 0.4, Raster(5, 2), both, group=2, head_size=16, pages=(1, 5)), [1, 4], 3)
    draw(world("line_ar", 0.6, Raster(3, 4), both, group=3, head_size=8, pages=(4, 3)), [2, 2], 1)
    draw(world("h2o", 0.5, Raster(4, 2), both, head_size=24, pages=(7, 7)), [5, 1], 0)
    draw(world("streaming", 0.5, Raster(4, 3), both, group=4, head_size=16, pages=(32, 2)), [1, 6], 2)
    draw(world("full", 0.5, Raster(2, 3), both, group=8, head_size=16, pages=(2, 3)), [1, 2], 1)
    odd = {"anchor_tokens": 1, "head_size": 16, "pages": (2, 5)}
    draw(world("decoupled", 0.7, Raster(4, 3), both, value_norm=True, stratify=True, **odd), [2, 1], 1)


FITTED = (  # six types as a fit picks them, for pictures of 4 lines of 3
    *(HeadRule(slots, 3, 12, 1, slots - 1, ring=True) for slots in (4, 7)),
    HeadRule(8, 3, 12, 1, 2, decay=0.5, value_norm=True, smooth_row=True),
    HeadRule(9, 3, 12, 2, 3, value_norm=True),
    HeadRule(6, 3, 12, 1, 2, decay=1.0, smooth_row=True),
    HeadRule(12, 3, 12),
)


@check
def six_types_equal_the_oracle() -> None:
    """Refined scores, rings without side state, a layer without some types."""
    kinds = [[0, 1, 2, 3, 4, 5], [4, 2, 2, 3, 5, 2]]
    draw(World(FITTED, np.array(kinds), head_size=16, pages=(3, 1, 4, 2, 5, 7)), [3, 1], 2)


@check
def any_list_of_types_equals_the_oracle() -> None:
    """One to six types, in any order and on any heads; some have none."""
    random = np.random.default_rng(0)
    for count in range(1, 7):
        rules = tuple(FITTED[n] for n in random.permutation(6)[:count])
        kinds, pages = random.integers(0, count, (1, 3)), random.integers(1, 8, count)
        shape = {"group": 1 + count // 3, "head_size": 16, "pages": tuple(pages.tolist())}
        draw(World(rules, kinds, **shape), random.integers(1, 4, 2).tolist(), 1)


@check
def branches_of_unlike_length_equal_the_oracle() -> None:
    """Either branch the shorter one, by more slots than a tile has, or not at all; any group."""
    many = {"head_size": 16, "pages": (3, 2)}
    draw(world("decoupled", 0.5, Raster(4, 3), [[0, 1]], **many), [5, 3], 2, begins=[(0, 4), (2, 0)])
    draw(world("line_ar", 0.5, Raster(4, 3), [[0, 1]], group=3, **many), [4, 1], 2, begins=[(3, 0), (0, 0)])
    for group in (1, 4):  # a tile of these is 64 slots
        rule, prefix, length = HeadRule(20, 10, 30, 1, 4), [150, 20], [175, 45]
        kind = steady(rule, 32, 7, torch.float32, length, prefix)
        q, k, v = (torch.randn(2, n, 32) for n in (2 * group, 2, 2))
        plan = replace(plan_of(prefix, length), begins=torch.tensor([[0, 131], [19, 3]]).int())
        decode_both(q, k, v, [kind], plan, 0.2, torch.empty_like(q))


def sized_world(group: int) -> World:
    """A ring, two that choose and one that keeps all, for pictures of 4 x 3, 3 x 4 and 2 x 5 tokens."""
    grids = [(3, 12), (4, 12), (5, 10)]
    kept = [
        ((4, 1, 3), (7, 2, 5), (6, 1, 5)),
        ((8, 1, 2), (9, 0, 3), (10, 0, 4)),
        ((6, 1, 2), (12, 0, 0), (7, 1, 0)),
        ((12, 0, 0), (12, 0, 0), (10, 0, 0)),
    ]
    refine: list[dict[str, Any]] = [
        {"ring": True}, {"decay": 0.5, "value_norm": True, "smooth_row": True}, {"smooth_row": True}, {},
    ]  # fmt: skip
    rules = [
        tuple(
            HeadRule(of[n][0], *grid, of[n][1], of[n][2], **more)
            for of, more in zip(kept, refine, strict=True)
        )
        for n, grid in enumerate(grids)
    ]
    return World(
        rules[0], np.array([[0, 1, 2, 3]]), group, head_size=16, pages=(3, 2, 4, 5), others=tuple(rules[1:])
    )


@check
def pictures_of_several_sizes_equal_the_oracle() -> None:
    """Every row by its own lines and capacities; drawn one by one, then in windows."""
    from test_windows import draw_in_windows

    from vllm_kvcompress.attention import triton_window

    world, sizes, prefix = sized_world(1), [1, 0, 2], [2, 1, 3]
    total = [p + world.image(size) for p, size in zip(prefix, sizes, strict=True)]
    run = Run(world, prefix, total, 0, decode_both, select_both, sizes=sizes)
    for step in range(max(total) + 2):
        live = [row for row in range(3) if step >= row and run.length[row] < total[row]]
        run.step([-1, *live])
    assert run.length == total
    run.check()
    decoder = SimpleNamespace(
        decode=triton_decode.decode,
        select_victims=lambda kind, plan: triton_select.select_all([kind], plan),
    )
    draw_in_windows(decoder, triton_window, sized_world(2), prefix, 0, sizes=sizes)


@check
def windows_equal_the_oracle() -> None:
    """Windows of 2 to 16 places, any number of which stands; rings, full and scored heads."""
    from test_windows import draw_in_windows

    from vllm_kvcompress.attention import triton_window

    rules = (
        HeadRule(9, 6, 24, 2, 7, ring=True),
        HeadRule(12, 6, 24, 2, 3, decay=0.5),
        HeadRule(24, 6, 24),
        HeadRule(15, 6, 24, 1, 4, value_norm=True, smooth_row=True),
    )
    decoder = SimpleNamespace(
        decode=triton_decode.decode,
        select_victims=lambda kind, plan: triton_select.select_all([kind], plan),
    )
    for seed, (kinds, group) in enumerate((([[0, 1, 2, 3], [1, 1, 0, 2]], 1), ([[3, 1], [0, 1]], 3))):
        small = World(rules, np.array(kinds), group=group, head_size=8, pages=(4, 5, 3))
        draw_in_windows(decoder, triton_window, small, [3, 1], seed, [(2, 0), (0, 0)] if seed else None)


@check
def numbers_as_the_compiler_gets_them() -> None:
    """The interpreter takes plain numbers and no spare types; here it takes what is compiled on a GPU."""
    with mock.patch.object(triton_kinds, "PLAIN", tl.constexpr(False)):
        assert triton_kinds.odd(0) == 3
        draw(World(FITTED[:4], np.array([[0, 1, 2, 3]]), head_size=16, pages=(3, 1, 4, 2)), [2, 1], 1)


@check
def every_dtype_and_head_size() -> None:
    """A few lines of a small picture, far enough for victims, at every head size; groups 1 to 8."""
    sizes, groups = (32, 64, 80, 96, 128), (1, 2, 3, 4, 5, 6, 7, 8)
    for n, (dtype, size) in enumerate(product(TOLERANCE, sizes)):
        group = 1 if n % 2 else groups[n // 2 % 8]
        shape = {"group": group, "head_size": size, "pages": (2, 3), "branches": 1}
        draw(world("decoupled", 0.7, Raster(3, 1), [[0, 1]], **shape), [2, 1], 1, dtype)


def steady(rule: HeadRule, dim: int, page: int, dtype: torch.dtype, length: list[int], prefix: list[int]):
    """A type of two heads whose resident slots hold random tokens and scores; the others are all NaN."""
    torch.manual_seed(0)
    blocks = [-(-(p + rule.capacity) // page) for p in prefix]
    raw = torch.full((sum(blocks) + 1, -(-page_bytes(2, page, dim, dtype) // 4) * 4 + 8), 0xFF).byte()
    pages = pages_from_bytes(raw, 2, page, dim, dtype)
    table = torch.full((len(prefix), max(blocks) + 1), 2**30, dtype=torch.int32)  # must not be followed
    ids = torch.randperm(len(raw)).tolist()
    for row, (before, total) in enumerate(zip(prefix, length, strict=True)):
        mine = [ids.pop() for _ in range(blocks[row])]
        table[row, : blocks[row]] = torch.tensor(mine)
        drawn = total - before
        held = torch.stack([torch.randperm(max(1, drawn))[: rule.capacity] for _ in range(2)])
        for slot in range(min(total, before + rule.capacity)):
            at = mine[slot // page], slice(None), slot % page
            pages.kv[at] = torch.randn(2, 2 * dim).to(dtype)
            pages.score[at] = torch.rand(2) if slot >= before else 0.0
            pages.token[at] = held[:, slot - before].short() if slot >= before else -1
            pages.victim[at] = torch.randint(0, rule.capacity, (2,)).short()
    return HeadType(pages, rule, torch.arange(2, dtype=torch.int32), table)


def plan_of(prefix: list[int], length: list[int]) -> Plan:
    return Plan(torch.tensor(prefix, dtype=torch.int32), torch.tensor(length, dtype=torch.int32))


@check
def eight_bit_cache() -> None:
    """Written as torch writes e4m3, saturated, subnormal and halfway numbers too; read back as they are."""
    rule, prefix, length = HeadRule(90, 10, 300, 4, 20), [37, 5, 9], [290, 90, 5]
    for dtype, group in product(TOLERANCE, (1, 4)):
        kind = steady(rule, 64, 7, torch.float8_e4m3fn, length, prefix)
        q = torch.randn(3, 2 * group, 64)
        k = torch.randn(3, 2, 64) * torch.tensor([1e-3, 1.0, 300.0])[:, None, None]
        v = torch.arange(-3 * 64, 3 * 64).view(3, 2, 64) * 1.0625  # many ties between two numbers
        plan = plan_of(prefix, length)
        q, k, v = (x.to(dtype) for x in (q, k, v))
        plain = copied([kind])[0]
        found, expected = (torch.full_like(q, torch.nan) for _ in range(2))
        triton_decode.decode(q, k, v, [kind], plan, 0.01, found)
        reference.decode(q, k, v, [plain], plan, 0.01, expected)
        torch.testing.assert_close(found, expected, **(TOLERANCE[dtype] | {"atol": 2e-3}))
        same_cache(kind.pages, plain.pages, 1e-5)
        assert (kind.pages.kv.float().abs() == 448).any()


@check
def long_rows_and_large_logits() -> None:
    """Many tiles, a row in its growth, logits from -100 to 100: the maximum moves often."""
    rule, prefix, length = HeadRule(150, 10, 300, 4, 20), [37, 5], [290, 90]
    for dtype, dim, group in product(TOLERANCE, (64, 128), (1, 5)):
        kind = steady(rule, dim, 7, dtype, length, prefix)
        q, k, v = (20 * torch.randn(2, n, dim) for n in (2 * group, 2, 2))
        loose = 1e-4 if dtype == torch.float32 else 0.02
        decode_both(q, k, v, [kind], plan_of(prefix, length), dim**-0.5, torch.empty_like(q), atol=loose)


@check
def pictures_of_4160_tokens() -> None:
    """65 lines of 64: the full cache, and a third of it, near the end of the picture."""
    for rule in (HeadRule(4160, 64, 4160), HeadRule(1386, 64, 4160, 4, 64)):
        kind = steady(rule, 32, 16, torch.bfloat16, [4170], [18])
        q, k, v = (torch.randn(1, 2, 32) for _ in range(3))
        decode_both(q, k, v, [kind], plan_of([18], [4170]), 32**-0.5, torch.empty(1, 2, 32))


@check
def victims_of_long_rows() -> None:
    """More slots than a tile, few distinct scores, zeros of both signs; other rows are left alone."""
    prefix, length = [3, 1, 5, 2, 2], [3 + 280, 1 + 279, 0, 2, 2 + 180]  # line's end, middle, padding, prompt
    for decay, norm, smooth in product((0.0, 0.5, 1.0), (False, True), (False, True)):
        rule = HeadRule(200, 20, 300, 4, 20, decay=decay, value_norm=norm, smooth_row=smooth)
        kind = steady(rule, 16, 7, torch.float32, length, prefix)
        few = torch.tensor([0.0, -0.0, 1.0, 2.5, -1.0])
        kind.pages.score.copy_(few[torch.randint(0, 5, kind.pages.score.shape)])
        lengths = torch.randint(1, 4, kind.pages.score.shape)  # of V: norms that are exact, and few
        kind.pages.kv[..., 16:] = lengths[..., None] * torch.eye(16)[torch.randint(0, 16, lengths.shape)]
        before = kind.pages.victim.clone()
        select_both(kind, plan_of(prefix, length))
        assert not torch.equal(before, kind.pages.victim)


@check
def ties_go_to_the_older() -> None:
    kind = steady(HeadRule(6, 2, 10, 1, 1), 16, 4, torch.float32, [9], [1])
    page = kind.block_table[0, 0], kind.block_table[0, 1]
    held = torch.tensor([0, 7, 2, 3, 1, 6], dtype=torch.int16)  # logical slots 1 to 6: after the prefix
    kind.pages.token[page[0], :, 1:], kind.pages.token[page[1], :, :3] = held[:3], held[3:]
    kind.pages.score.zero_()
    triton_select.select_victims(kind, plan_of([1], [9]))
    assert kind.pages.victim[page[0], 0, :2].tolist() == [4, 2]  # tokens 1 and 2; 0 is the anchor


@check
def one_launch_for_all_types() -> None:
    """Each by its own rule and pages; rings need no launch at all."""
    prefix, length = [3, 1, 5], [3 + 280, 1 + 279, 5 + 180]
    rules = [
        HeadRule(200, 20, 300, 4, 20),
        HeadRule(90, 20, 300, 0, 7, decay=1.0),
        HeadRule(130, 20, 300, 4, 20, decay=0.5, smooth_row=True),
        HeadRule(60, 20, 300, 4, 20, value_norm=True, smooth_row=True),
        HeadRule(40, 20, 300, 4, 9, decay=0.3, value_norm=True),
    ]
    pages = zip(rules, (7, 3, 1, 9, 4), strict=True)
    types = [steady(rule, 16, page, torch.float32, length, prefix) for rule, page in pages]
    ring = steady(HeadRule(100, 20, 300, 4, 96, ring=True), 16, 5, torch.float32, length, prefix)
    with counted(triton_select) as launches:
        select_both(ring, *types, plan_of(prefix, length))
        triton_select.select_all([ring], plan_of(prefix, length))
    assert len(launches) == 1


@check
def empty_batches() -> None:
    """No rows, only padding rows: nothing is written but zeros."""
    kind = steady(HeadRule(4, 2, 8), 16, 4, torch.float32, [6], [2])
    for prefix in ([], [0], [2]):
        q = torch.randn(len(prefix), 2, 16)
        out, before = torch.full_like(q, torch.nan), copied([kind])[0]
        plan = plan_of(prefix, [0] * len(prefix))
        triton_decode.decode(q, q, q, [kind], plan, 1.0, out)
        triton_select.select_victims(kind, plan)
        same_cache(kind.pages, before.pages, 0)
        assert not out.any()


@check
def what_the_kernel_cannot_do_is_refused() -> None:
    kind = steady(HeadRule(4, 2, 8), 16, 4, torch.float32, [6], [2])
    q, plan = torch.randn(1, 2, 16), plan_of([2], [6])
    wide = torch.randn(1, 2, 32)[..., ::2]
    for word, query, key, types in (
        ("bfloat16", q.bfloat16(), q, [kind]),
        ("17 query heads", torch.randn(1, 34, 16), q, [kind]),
        ("7 head types", q, q, [kind] * 7),
        ("numbers of a head", wide, q, [kind]),
        ("numbers of a head", q, wide, [kind]),
    ):
        with pytest.raises(ValueError, match=word):
            triton_decode.decode(query, key, key, types, plan, 1.0, torch.empty_like(query))


@pytest.mark.parametrize("name", CHECKS)
def test_interpreted(name: str, failures: dict[str, str]) -> None:
    assert not failures[name], failures[name]


def test_choice_within_columns_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[HeadType] = []
    monkeypatch.setattr(triton_select.torch_select, "select_victims", lambda kind, plan: called.append(kind))
    kind = steady(HeadRule(4, 2, 8, stratify=True), 16, 2, torch.float32, [6], [2])
    assert not triton_select.native(kind.rule)
    triton_select.select_victims(kind, plan_of([2], [6]))
    assert called.pop() is kind


BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "gpu.py"


def test_benchmark_checks_itself(tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    command = [sys.executable, str(BENCHMARK), "--dry-run", "--json", str(result)]
    done = preloaded.run(command, env=os.environ | V2)
    assert done.returncode == 0, done.stderr
    found = json.loads(result.read_text())
    checked = [(check["dtype"], check["layout"]) for check in found["checks"]]
    assert checked == list(product(found["limits"], ("decoupled", "fitted")))
    cached = [(row["layout"], row["budget"]) for row in found["attention"]]
    assert cached == [("decoupled", 1.0), ("decoupled", 0.5), ("fitted", 0.5)]
    assert [row["cache"].split(",")[0] for row in found["step"]] == ["decoupled", "fitted", "full"]
    assert len(found["transformers"]) == 1
    rows = found["attention"] + found["step"] + found["transformers"]
    assert not any("us" in row or "ms" in row for row in rows)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_benchmark_needs_a_gpu() -> None:
    done = preloaded.run([sys.executable, str(BENCHMARK)])
    assert done.returncode == 2
    assert "needs a CUDA device" in done.stderr


def main() -> None:
    torch.set_num_threads(1)
    patch_once()
    found = dict.fromkeys(CHECKS, "")
    for name in sys.argv[1:] or CHECKS:
        try:
            with np.errstate(invalid="raise", over="raise"):
                CHECKS[name]()
        except Exception:
            found[name] = traceback.format_exc()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
