"""Fixtures that modules share: small checkpoints, made once a session."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import preloaded
import pytest

if TYPE_CHECKING:
    from vllm_kvcompress.testing.server import Server

# Tests must not depend on, nor leave anything in, the user's cache directory.
os.environ.setdefault("VLLM_LOGGING_LEVEL", "INFO")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
# What preloaded processes start is forked (tests/preloaded.py). On CPUs vLLM itself spawns, whatever this is:
# an engine and its worker import everything again. Tests that serve as users do have it so.
os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "fork")
if "PYTEST_XDIST_WORKER" in os.environ:  # a core for each worker, whatever it starts
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

ENGINES = (
    "test_v2_runner", "test_tensor_parallel", "test_windows_engine", "test_triton_engine", "test_server_ends",
    "test_benchmark", "test_compressed_engine", "test_llamagen", "test_emu3", "test_data_parallel",
    "test_aligned_v2", "test_lumina",
    "test_triton_kernels", "test_bench_commands", "test_text_engine", "test_server_states", "test_server",
    "test_engine_full", "test_llamagen_server", "test_lumina_server", "test_picture_chat",
    "test_wheel", "test_emu3_server",
    "test_cuda_graphs", "test_quantised", "test_triton_compile", "test_eval", "test_clients",
    "test_playground", "test_emu3_sizes",
    "test_examples", "test_playground_use",
    "test_cli", "test_plugin", "test_compressed_server", "test_eval_replay", "test_calibrate", "test_whole",
    "test_fit", "test_judge", "test_acceptance", "test_narrow_logits", "test_compressed_config",
    "test_token_rows",
    "test_generation_defaults", "test_weights", "test_manager", "test_windows", "test_engine_admission",
    "test_last_word", "test_soaks", "test_checkpoint_bounds", "test_cpu_kernels", "test_prefill_launches",
)  # fmt: skip
"""Modules that start engines, or take as long; the longest first, so that two workers end together."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark them, for ``make test-fast``, and put them first."""
    place = {name: number for number, name in enumerate(ENGINES)}
    for item in items:
        if item.path.stem in place:
            item.add_marker(pytest.mark.engine)
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


@pytest.fixture(scope="session", autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """vLLM's cache directory (head profiles included) of this session alone."""
    root = tmp_path_factory.mktemp("vllm-cache")
    share_model_infos(root, tmp_path_factory)
    os.environ["VLLM_CACHE_ROOT"] = str(root)
    return root


def share_model_infos(root: Path, factory: pytest.TempPathFactory) -> None:
    """Let a cache directory have what vLLM found out of the model classes, for which it starts a process.

    Its key is the class's source; all workers of a run share it.
    """
    known = shared(factory, "modelinfos")
    root.mkdir(parents=True, exist_ok=True)
    (root / "modelinfos").symlink_to(known, target_is_directory=True)


def shared(factory: pytest.TempPathFactory, name: str) -> Path:
    """A folder that all workers of a run share."""
    root = factory.getbasetemp()
    folder = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / name
    folder.mkdir(exist_ok=True, mode=0o700)
    return folder


@pytest.fixture(scope="session")
def measured_cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    """vLLM's cache directory of servers whose tests are not about measuring heads: once a run will do."""
    root = shared(tmp_path_factory, "measured-cache")
    if not (root / "modelinfos").is_symlink():
        with contextlib.suppress(FileExistsError):  # another worker's, since
            share_model_infos(root, tmp_path_factory)
    return str(root)


@pytest.fixture(scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    """vLLM's cache directory of a module: no heads were measured yet."""
    root = tmp_path_factory.mktemp("own-cache")
    share_model_infos(root, tmp_path_factory)
    return str(root)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """``tiny-hf``, ``small-hf``, ``small-deepseek``, ``gqa-hf``: float32, random weights, seed 0.

    ``six-hf``, ``five-hf`` and ``five-gqa-hf`` are the first and the last with fewer tokens a picture (6 x 6,
    5 x 5), for interpreters.
    """
    from vllm_kvcompress.testing.checkpoints import GQA, SMALL_24, TINY, make_checkpoint

    root = tmp_path_factory.mktemp("checkpoints")
    made = {}
    for name, layout, geometry in (
        ("tiny-hf", "hf", TINY),
        ("small-hf", "hf", SMALL_24),
        ("small-deepseek", "deepseek", SMALL_24),
        ("gqa-hf", "hf", GQA),
        ("six-hf", "hf", replace(TINY, lines=6)),
        ("five-hf", "hf", replace(TINY, lines=5)),
        ("five-gqa-hf", "hf", replace(GQA, lines=5)),
    ):
        made[name] = make_checkpoint(root / name, layout=layout, geometry=geometry, seed=0)
    return made


@pytest.fixture(scope="session")
def image_server(
    checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> "Iterator[Server]":
    """``vllm serve`` of ``tiny-hf`` as a user starts it; needs no VLLM_PLUGINS."""
    from vllm_kvcompress.testing.server import Server

    assert "VLLM_PLUGINS" not in os.environ
    args = (
        "--dtype", "float32", "--max-model-len", "1024", "--max-num-seqs", "16",
        "--kv-cache-memory-bytes", str(2**29), "--enforce-eager",
    )  # fmt: skip
    log = tmp_path_factory.mktemp("server") / "server.log"
    with Server(checkpoints["tiny-hf"], log, args, start=preloaded.Popen) as server:
        yield server
