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
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import triton

from vllm_kvcompress.attention import triton_decode, triton_select
from vllm_kvcompress.attention.pages import HeadType, Plan, page_bytes, pages_from_bytes
from vllm_kvcompress.policy import Policy
from vllm_kvcompress.policy.raster import Raster

ARCHITECTURES = (80, 90, 100)
# dtype, the cache's dtype, head size, query heads per KV head; the first is Janus-Pro's
CONFIGURATIONS = (
    ("bfloat16", "bfloat16", 128, 1),
    ("float16", "float16", 64, 1),
    ("bfloat16", "bfloat16", 80, 1),
    ("bfloat16", "bfloat16", 128, 4),
    ("float16", "float16", 96, 8),
    ("float32", "float32", 128, 1),
    ("bfloat16", "float8_e4m3fn", 128, 1),
    ("bfloat16", "float8_e4m3fn", 128, 4),
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

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_target(self) -> Any:
        return triton.backends.compiler.GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return self.architecture  # compiled kernels are kept per device

    def get_current_stream(self, device: int) -> int:
        return 0


def janus_types(dtype: torch.dtype, dim: int) -> list[HeadType]:
    """The default policy at Janus-Pro's grid, one layer of 2 x 2 heads; page sizes as the paging picks."""
    rules = Policy().rules(Raster(24, 24), 1, 1)
    found = []
    for kind, rule in enumerate(rules):
        assert rule is not None
        page, heads = (5, 3)[kind], 2
        size = -(-page_bytes(heads, page, dim, dtype) // 64) * 64
        pages = pages_from_bytes(torch.zeros(4, size, dtype=torch.uint8), heads, page, dim, dtype)
        index = torch.tensor([kind, 2 + kind], dtype=torch.int32)
        found.append(HeadType(pages, rule, index, torch.zeros(2, 64, dtype=torch.int32)))
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


def compile_all() -> dict[str, dict[str, int]]:
    """Compile every configuration for every architecture."""
    found = {}
    plan = Plan(torch.zeros(2, dtype=torch.int32), torch.ones(2, dtype=torch.int32))
    for architecture in ARCHITECTURES:
        triton.runtime.driver.set_active(AbsentCard(architecture))
        for name, cache, dim, group in (kernel[1:] for kernel in KERNELS if kernel[0] == architecture):
            dtype = getattr(torch, name)
            types = janus_types(getattr(torch, cache), dim)
            q, k = torch.zeros(2, 4 * group, dim, dtype=dtype), torch.zeros(2, 4, dim, dtype=dtype)
            grid, args, constants = triton_decode.launch(q, k, k, types, plan, dim**-0.5, torch.empty_like(q))
            compiled = triton_decode._decode.warmup(*args, **constants, grid=grid)
            found[f"decode sm_{architecture} {name} {cache} {dim} {group}"] = resources(compiled)
        grid, args, constants = triton_select.launch([types[1]], plan)
        compiled = triton_select._select.warmup(*args, **constants, grid=grid)
        found[f"select sm_{architecture}"] = resources(compiled)
    return found


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
    assert len(mine) == sum(kernel[0] == architecture for kernel in KERNELS) + 1
    for name, need in mine.items():
        assert need["stack"] == need["local"] == 0, (name, need)
        assert 0 < need["reg"] < 255, (name, need)
        assert need["shared"] <= SHARED_LIMIT, (name, need)


def test_sixteen_byte_accesses(compiled: dict[str, dict[str, int]]) -> None:
    """K and V of both head types come in 16-byte pieces: tile bytes / 16 / threads, K and V, both types."""
    for architecture, name, cache, dim, group in KERNELS:
        need = compiled[f"decode sm_{architecture} {name} {cache} {dim} {group}"]
        assert need["wide"] >= (8 if cache == "float8_e4m3fn" else 16), (name, cache, dim, group, need)


def test_registers_leave_room_for_other_programs(compiled: dict[str, dict[str, int]]) -> None:
    """Janus-Pro's kernel hides latency by programs side by side: four of 128 threads and more."""
    for architecture in ARCHITECTURES:
        assert compiled[f"decode sm_{architecture} bfloat16 bfloat16 128 1"]["reg"] <= 128


if __name__ == "__main__":
    print(json.dumps(compile_all()))
