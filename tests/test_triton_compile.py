"""The kernels compile for sm_80, sm_90 and sm_100 without a GPU, within the registers of the card.

Triton is told of a card that is not there; the launches are those of `decode` and `select_victims`, so what
is compiled is what would run. A process of its own, because other tests set ``TRITON_INTERPRET``.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import triton

from vllm_kvcompress.attention import triton_decode, triton_select, triton_window
from vllm_kvcompress.attention.pages import HeadPages, HeadType, Plan, page_bytes, pages_from_bytes
from vllm_kvcompress.attention.window import WindowPlan
from vllm_kvcompress.policy import Policy
from vllm_kvcompress.policy.raster import Raster
from vllm_kvcompress.policy.rule import HeadRule

ARCHITECTURES = (80, 90, 100)
# dtype, the cache's dtype, head size, query heads per KV head, head types; the first is Janus-Pro's
CONFIGURATIONS = (
    ("bfloat16", "bfloat16", 128, 1, 2),
    ("float16", "float16", 64, 1, 2),
    ("bfloat16", "bfloat16", 80, 1, 2),
    ("bfloat16", "bfloat16", 128, 4, 2),
    ("float16", "float16", 96, 8, 2),
    ("float32", "float32", 128, 1, 2),
    ("bfloat16", "float8_e4m3fn", 128, 1, 2),
    ("bfloat16", "float8_e4m3fn", 128, 4, 2),
    ("bfloat16", "bfloat16", 128, 1, 6),
    ("bfloat16", "bfloat16", 128, 4, 6),
)
KERNELS = [  # sm_80 has no e4m3
    (architecture, *configuration)
    for architecture, configuration in product(ARCHITECTURES, CONFIGURATIONS)
    if configuration[1] != "float8_e4m3fn" or architecture > 80
]
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SHARED_LIMIT = 99 * 1024  # bytes that every one of these cards gives a program


class AbsentCard:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, architecture: int, device: int | None = None) -> None:
        self.architecture = architecture
        self.device = architecture if device is None else device  # compiled kernels are kept per device

    def get_current_target(self) -> Any:
        return triton.backends.compiler.GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0


def janus_rules(types: int) -> list[HeadRule]:
    """At Janus-Pro's grid: the papers' two types, or six as a fit picks them."""
    if types == 2:
        return [rule for rule in Policy("decoupled").rules(Raster(24, 24), 1, 1) if rule]
    rings = [HeadRule(slots, 24, 576, 4, slots - 4, ring=True) for slots in (28, 52, 76, 100)]
    scored = HeadRule(148, 24, 576, 4, 48, value_norm=True, smooth_row=True)
    return [*rings, scored, HeadRule(576, 24, 576)]


def pages_of(rule: HeadRule, heads: int, page: int, dim: int, dtype: torch.dtype) -> HeadPages:
    """Four pages."""
    size = -(-page_bytes(heads, page, dim, dtype, rule.scores) // 64) * 64
    raw = torch.zeros(4, size, dtype=torch.uint8)
    return pages_from_bytes(raw, heads, page, dim, dtype, rule.scores)


def janus_types(dtype: torch.dtype, dim: int, types: int) -> list[HeadType]:
    """One layer, two heads of each type; page sizes as the paging picks."""
    found = []
    for kind, rule in enumerate(janus_rules(types)):
        index = torch.tensor([2 * kind, 2 * kind + 1], dtype=torch.int32)
        table = torch.zeros(2, 64, dtype=torch.int32)
        found.append(HeadType(pages_of(rule, 2, 5 - kind % 3, dim, dtype), rule, index, table))
    return found


def resources(compiled: Any) -> dict[str, int]:
    """Registers, stack and local memory of a thread, as the binary itself says; shared memory in bytes."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [TOOLS / "cuobjdump", "-res-usage", file.name]
        told = subprocess.run(command, capture_output=True, text=True, check=True)
    numbers = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", told.stdout + told.stderr))
    named = {name.lower(): int(number) for name, number in numbers.items()}
    code = compiled.asm["ptx"]
    wide = len(re.findall(r"ld\.global\S*\.v4\.b32", code)) + len(re.findall(r"cp\.async\.cg.*0x10", code))
    return named | {"shared": compiled.metadata.shared, "wide": wide}


def plan_of(rows: int) -> Plan:
    return Plan(torch.zeros(rows, dtype=torch.int32), torch.ones(rows, dtype=torch.int32))


def compile_all() -> dict[str, dict[str, int]]:
    """Compile every configuration for every architecture."""
    found, plan = {}, plan_of(2)
    for architecture in ARCHITECTURES:
        triton.runtime.driver.set_active(AbsentCard(architecture))
        for _, name, cache, dim, group, types in (k for k in KERNELS if k[0] == architecture):
            dtype = getattr(torch, name)
            kinds = janus_types(getattr(torch, cache), dim, types)
            heads = 2 * len(kinds)
            q, k = torch.zeros(2, heads * group, dim, dtype=dtype), torch.zeros(2, heads, dim, dtype=dtype)
            grid, args, constants = triton_decode.launch(q, k, k, kinds, plan, dim**-0.5, torch.empty_like(q))
            compiled = triton_decode._decode.warmup(*args, **constants, grid=grid)
            found[f"decode sm_{architecture} {name} {cache} {dim} {group} {types}"] = resources(compiled)
        q, k = (torch.zeros(2, n, 128, dtype=torch.bfloat16) for n in (16, 4))
        unlike = replace(plan, begins=torch.zeros(2, 2, dtype=torch.int32))  # Emu3's branches
        kinds = janus_types(torch.bfloat16, 128, 2)
        grid, args, constants = triton_decode.launch(q, k, k, kinds, unlike, 0.1, torch.empty_like(q))
        compiled = triton_decode._decode.warmup(*args, **constants, grid=grid)
        found[f"aligned sm_{architecture}"] = resources(compiled)
        unlike = replace(unlike, size=torch.zeros(2, dtype=torch.int32))  # and pictures of several sizes
        kinds = [replace(kind, sized=(kind.rule, kind.rule)) for kind in kinds]
        grid, args, constants = triton_decode.launch(q, k, k, kinds, unlike, 0.1, torch.empty_like(q))
        compiled = triton_decode._decode.warmup(*args, **constants, grid=grid)
        found[f"sized sm_{architecture}"] = resources(compiled)
        for group in (1, 4):
            found |= compile_windows(architecture, group)
        kinds = [kind for kind in janus_types(torch.bfloat16, 128, 6) if kind.rule.scores]
        grid, args, constants = triton_select.launch(kinds, plan)
        compiled = triton_select._select.warmup(*args, **constants, grid=grid)
        found[f"select sm_{architecture}"] = resources(compiled)
    return found


def compile_windows(architecture: int, group: int) -> dict[str, dict[str, int]]:
    """The two kernels of a window step, at Janus-Pro's head size with six types."""
    kinds = janus_types(torch.bfloat16, 128, 6)
    heads = 2 * len(kinds)
    q, k = (torch.zeros(32, n, 128, dtype=torch.bfloat16) for n in (heads * group, heads))
    rows = plan_of(2)
    plan = WindowPlan([0, 1], [0, 16], [16, 16], rows.prefix, rows.length)
    launch, held = triton_window.launch_verify(q, k, k, kinds, plan, 0.1, torch.empty_like(q))
    grid, args, constants = launch
    verify = triton_window._verify.warmup(*args, **constants, grid=grid)
    grid, args, constants = triton_window.launch_commit(held, torch.ones(2, dtype=torch.int32))
    commit = triton_window._commit.warmup(*args, **constants, grid=grid)
    name = f"{architecture} {group}"
    return {f"verify {name}": resources(verify), f"commit {name}": resources(commit)}


def variants() -> dict[str, int]:
    """Variants that all layers of a model like Janus-Pro-1B compile: 24 layers of 2 x 16 heads, six types.

    Every layer has other numbers of heads, most lack a type, some have one only; batches of 1, 5 and 16 rows,
    q, k and v in one piece or each its own, block tables of the whole batch or fresh ones.
    """
    layers, heads, rules, generator = 24, 32, janus_rules(6), torch.Generator().manual_seed(0)
    share = torch.rand(layers, 6, generator=generator) ** 4 + 1e-6
    kind_of = torch.stack([torch.multinomial(row, heads, True, generator=generator) for row in share])
    kind_of[1], kind_of[2] = 0, 4
    counts = torch.stack([(kind_of == kind).sum(1) for kind in range(6)])
    assert len(counts.T.unique(dim=0)) == layers
    assert (counts == 0).any(0).sum() > layers // 2
    whole = [
        pages_of(rule, int(count.sum()), page, 128, torch.bfloat16)
        for rule, count, page in zip(rules, counts, (7, 3, 4, 1, 5, 6), strict=True)
    ]
    device = 1000
    triton.runtime.driver.set_active(AbsentCard(90, device))
    for rows, layer in product((1, 5, 16), range(layers)):
        tables = [torch.zeros(16, n, dtype=torch.int32)[:rows] for n in (12, 16, 33, 100, 41, 120)]
        kinds = []
        for kind in range(6):
            index = (kind_of[layer] == kind).nonzero().flatten().int()
            first = int(counts[kind, :layer].sum())
            part = whole[kind].layer(first, first + len(index))
            kinds.append(
                HeadType(part, rules[kind], index, tables[kind].clone() if rows == 5 else tables[kind])
            )
        fused = torch.zeros(rows, 3 * heads, 128, dtype=torch.bfloat16)
        q, k, v = (x.clone() if rows == 5 else x for x in fused.split(heads, 1))
        grid, args, constants = triton_decode.launch(q, k, v, kinds, plan_of(rows), 0.1, torch.empty_like(q))
        triton_decode._decode.warmup(*args, **constants, grid=grid)
        every = [HeadType(whole[kind], rules[kind], index, tables[kind]) for kind in range(6)]
        grid, args, constants = triton_select.launch([t for t in every if t.rule.scores], plan_of(rows))
        triton_select._select.warmup(*args, **constants, grid=grid)
    kernels = {"decode": triton_decode._decode, "select": triton_select._select}
    return {name: len(kernel.device_caches[device][0]) for name, kernel in kernels.items()}


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest) -> dict[str, dict[str, int]]:
    """Kernel name -> what it needs; Triton's cache lies with pytest's."""
    cache = request.config.cache
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if cache is not None:
        environment["TRITON_CACHE_DIR"] = str(cache.mkdir("triton"))
    command = [sys.executable, str(Path(__file__).resolve())]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_spills(compiled: dict[str, dict[str, int]], architecture: int) -> None:
    mine = {name: need for name, need in compiled.items() if f"sm_{architecture}" in name}
    assert len(mine) == sum(kernel[0] == architecture for kernel in KERNELS) + 3
    for name, need in mine.items():
        assert need["stack"] == need["local"] == 0, (name, need)
        assert 0 < need["reg"] < 255, (name, need)
        assert need["shared"] <= SHARED_LIMIT, (name, need)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_windows_do_not_spill(compiled: dict[str, dict[str, int]], architecture: int) -> None:
    for kernel, group in product(("verify", "commit"), (1, 4)):
        need = compiled[f"{kernel} {architecture} {group}"]
        # 64 queries on sm_80 do not quite fit: a few numbers of each thread go to its stack.
        most = 64 if (kernel, architecture, group) == ("verify", 80, 4) else 0
        assert need["local"] == 0, need
        assert need["stack"] <= most, need
        assert need["shared"] <= SHARED_LIMIT, need


def test_sixteen_byte_accesses(compiled: dict[str, dict[str, int]]) -> None:
    """K and V of all head types come in 16-byte pieces: tile bytes / 16 / threads, K and V."""
    for architecture, *configuration in KERNELS:
        need = compiled[f"decode sm_{architecture} {' '.join(map(str, configuration))}"]
        assert need["wide"] >= (4 if configuration[1] == "float8_e4m3fn" else 8), (configuration, need)


def test_registers_leave_room_for_other_programs(compiled: dict[str, dict[str, int]]) -> None:
    """Janus-Pro's kernel hides latency by programs side by side: four of 128 threads and more."""
    for architecture in ARCHITECTURES:
        for types in (2, 6):
            assert compiled[f"decode sm_{architecture} bfloat16 bfloat16 128 1 {types}"]["reg"] <= 128


def test_all_layers_share_one_variant(compiled: dict[str, dict[str, int]]) -> None:
    assert compiled["variants"] == {"decode": 1, "select": 1}


if __name__ == "__main__":
    print(json.dumps(compile_all() | {"variants": variants()}))
