"""Fixtures that modules share: small checkpoints, made once a session."""

import os
from pathlib import Path

import pytest

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
