"""Two ranks in Ray's workers draw what one process draws.

By hand, where Ray is installed (``pip install '.[ray]'``): ``python -m pytest tests/soak/soak_ray.py``.
vLLM has Ray for GPUs alone: here it is told that a rank is a resource of Ray's, and which rank a worker is.
The rest, workers, plugins and messages, is as it is on GPUs.
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from engine_process import run_here
from inprocess import in_process  # noqa: F401
from test_v2_runner import Prompts, mixed_requests

ray = pytest.importorskip("ray")
RESOURCE, RANKS = "rank", 2


def ranks_on_cpus() -> None:
    """In every process of Ray's, and in the engine's."""
    import ray
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.executor.ray_executor_v2 import RayWorkerProc

    def placed(self: Any) -> tuple[str, list[int]]:
        return ray.get_runtime_context().get_node_id(), [self._init_kwargs["rank"]]

    CpuPlatform.ray_device_key = RESOURCE
    RayWorkerProc.get_node_and_physical_gpu_ids = placed


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))  # the heads are measured by two ranks
    ranks_on_cpus()
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers can't import this file
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    env = {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    ray.init(
        num_cpus=RANKS, resources={RESOURCE: RANKS}, include_dashboard=False,
        runtime_env={"worker_process_setup_hook": ranks_on_cpus, "env_vars": env},
    )  # fmt: skip
    yield
    ray.shutdown()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_ranks_of_ray_are_one_process(cluster: None, checkpoints: dict[str, Path]) -> None:
    model = checkpoints["gqa-hf"]
    args: dict[str, Any] = {
        "model": str(model), "dtype": "float32", "enforce_eager": True, "max_model_len": 128,
        "max_num_seqs": 4, "max_num_batched_tokens": 64, "kv_cache_memory_bytes": 2**26,
        "attention_backend": "kvcompress",
        "additional_config": {"kvcompress": {"budget": 0.4}},
    }  # fmt: skip
    over_ray = {"tensor_parallel_size": RANKS, "distributed_executor_backend": "ray"}
    waves = [mixed_requests(Prompts(model))[:3]]
    os.environ["VLLM_HOST_IP"] = ray.util.get_node_ip_address()
    two, one = (
        run_here([{"name": "engine", "args": args | more, "waves": waves, "as_ranks": RANKS}])["engine"]
        for more in (over_ray, {})
    )
    assert two["waves"] == one["waves"]
    assert [len(tokens) for tokens in two["waves"][0]] == [64] * 3
    for mine, alone in zip(two["held"][0], one["held"][0], strict=True):
        assert mine["kv_cache"]["evicted_semantic"] == alone["kv_cache"]["evicted_semantic"]
