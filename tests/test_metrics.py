"""Counters of finished pictures: there from the start, with vLLM's labels, whatever else the process runs."""

import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import preloaded
import pytest
from prometheus_client import REGISTRY, generate_latest
from vllm.v1.metrics.prometheus import get_prometheus_registry, unregister_vllm_metrics

from vllm_kvcompress.scheduler import REPORT
from vllm_kvcompress.serving.cache_usage import CacheUsage

NAMES = ("pictures_total", "kv_resident_bytes_total", "kv_full_bytes_total")
REPORTED = {
    "resident_bytes": 10,
    "full_bytes": 40,
    "evicted_spatial": 3,
    "evicted_semantic": 2,
    "steps": 5,
    "tokens": 16,
}


def engine(name: str, ranks: list[int] | None = None) -> Any:
    core = {} if ranks is None else {"engine_core": SimpleNamespace(engine_ranks_managed=ranks)}
    return SimpleNamespace(model_config=SimpleNamespace(served_model_name=name), **core)


def picture(**report: int) -> Any:
    return SimpleNamespace(kv_transfer_params={REPORT: {**REPORTED, **report}})


def shown(model: str) -> dict[str, float]:
    """Values on /metrics by name, other labels after it."""
    text = generate_latest(get_prometheus_registry()).decode()
    found = re.findall(r"^vllm:image_(\w+)\{(.*)\} (\S+)$", text, re.MULTILINE)
    values = {}
    for name, labels, value in found:
        parts = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        if parts.pop("model_name") == model and not name.endswith("_created"):
            values[" ".join((name, *(f"{k}={v}" for k, v in sorted(parts.items()))))] = float(value)
    return values


def expected(rank: str, *values: float, steps: int = 0, tokens: int = 0) -> dict[str, float]:
    names = [f"{name} engine={rank}" for name in NAMES]
    names += [f"kv_evicted_tokens_total engine={rank} head_type={kind}" for kind in ("spatial", "semantic")]
    names += [f"steps_total engine={rank}", f"steps_tokens_total engine={rank}"]
    return dict(zip(names, (*values, steps, tokens), strict=True))


async def test_zero_before_the_first_picture_then_sums() -> None:
    usage = CacheUsage(engine("first", [0]))
    assert shown("first") == expected("0", 0, 0, 0, 0, 0)
    answer = await usage([picture(), picture(resident_bytes=1, evicted_semantic=5)])
    assert answer["kv_cache"] == {
        "resident_bytes": 11,
        "full_bytes": 80,
        "evicted_tokens": {"spatial": 6, "semantic": 7},
    }
    assert answer["steps"] == 10
    assert shown("first") == expected("0", 2, 11, 80, 6, 7, steps=10, tokens=32)


async def test_another_scheduler_reports_nothing() -> None:
    usage = CacheUsage(engine("silent", [0]))
    assert (
        await usage([SimpleNamespace(kv_transfer_params=None), SimpleNamespace(kv_transfer_params={})])
        is None
    )
    assert shown("silent") == expected("0", 0, 0, 0, 0, 0)


@pytest.mark.parametrize("ranks", [[3], [0, 1], None])
async def test_every_engine_has_its_counters(ranks: list[int] | None) -> None:
    """Data parallelism: each picture is counted where it was drawn."""
    name = f"ranks {ranks}"
    usage = CacheUsage(engine(name, ranks))
    mine = ranks or [0]
    nothing: dict[str, float] = {}
    for rank in mine:
        nothing |= expected(str(rank), 0, 0, 0, 0, 0)
    assert shown(name) == nothing
    await usage([picture(engine=mine[-1])])
    assert shown(name) == nothing | expected(str(mine[-1]), 1, 10, 40, 3, 2, steps=5, tokens=16)


async def test_a_second_engine_of_the_process_leaves_them() -> None:
    """vLLM then unregisters all of its metrics, and all that look like them."""
    usage = CacheUsage(engine("kept", [0]))
    await usage([picture()])
    unregister_vllm_metrics()
    assert shown("kept") == expected("0", 1, 10, 40, 3, 2, steps=5, tokens=16)
    other = CacheUsage(engine("later", [0]))
    await other([picture()])
    assert shown("kept") == shown("later")


async def test_the_registry_knows_their_names() -> None:
    """So that a metric of the same name is refused, as ever."""
    CacheUsage(engine("names", [0]))
    assert "vllm:image_pictures_total" in REGISTRY._names_to_collectors


def test_several_api_servers_add_up(tmp_path: Path) -> None:
    """vLLM gives each of them a process, and Prometheus' files a folder."""
    code = (
        "import os; from vllm_kvcompress.serving.metrics import PictureMetrics;"
        "from vllm_kvcompress.scheduler import CacheReport;"
        "first = os.fork() == 0;"
        "first or os.wait();"
        "metrics = PictureMetrics('shared', [0]);"
        "[metrics.count(CacheReport(10, 40, 1)) for _ in range(2 if first else 3)];"
        "first and os._exit(0);"
        "from prometheus_client import CollectorRegistry, generate_latest, multiprocess;"
        "registry = CollectorRegistry(); multiprocess.MultiProcessCollector(registry);"
        "print(generate_latest(registry).decode())"
    )
    env = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    last = preloaded.run([sys.executable, "-c", code], env=env)
    assert last.returncode == 0, last.stderr
    assert 'vllm:image_pictures_total{engine="0",model_name="shared"} 5.0' in last.stdout
    assert 'head_type="semantic",model_name="shared"} 0.0' in last.stdout
