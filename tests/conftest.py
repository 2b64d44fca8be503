"""Fixtures that modules share: small checkpoints, made once a session."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from vllm_kvcompress.testing.server import Server

# Tests must not depend on, nor leave anything in, the user's cache directory.
os.environ.setdefault("VLLM_LOGGING_LEVEL", "INFO")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


@pytest.fixture(scope="session", autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """vLLM's cache directory (head profiles included) of this session alone."""
    root = tmp_path_factory.mktemp("vllm-cache")
    os.environ["VLLM_CACHE_ROOT"] = str(root)
    return root


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """``tiny-hf``, ``small-hf``, ``small-deepseek``, ``gqa-hf``: float32, random weights, seed 0."""
    from vllm_kvcompress.testing.checkpoints import GQA, SMALL_24, TINY, make_checkpoint

    root = tmp_path_factory.mktemp("checkpoints")
    made = {}
    for name, layout, geometry in (
        ("tiny-hf", "hf", TINY),
        ("small-hf", "hf", SMALL_24),
        ("small-deepseek", "deepseek", SMALL_24),
        ("gqa-hf", "hf", GQA),
    ):
        made[name] = make_checkpoint(root / name, layout=layout, geometry=geometry, seed=0)
    return made


@pytest.fixture(scope="session")
def image_server(
    checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> "Iterator[Server]":
    """``vllm serve`` of ``small-hf`` as a user starts it; needs no VLLM_PLUGINS."""
    from vllm_kvcompress.testing.server import Server

    assert "VLLM_PLUGINS" not in os.environ
    args = (
        "--dtype", "float32", "--max-model-len", "1024", "--max-num-seqs", "16",
        "--kv-cache-memory-bytes", str(2**29), "--enforce-eager",
    )  # fmt: skip
    log = tmp_path_factory.mktemp("server") / "server.log"
    with Server(checkpoints["small-hf"], log, args) as server:
        yield server
