"""vLLM's scheduler, which also says what each request held when it ended."""

from dataclasses import asdict, dataclass
from typing import Any, cast

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.kv_cache_interface import AttentionSpec
from vllm.v1.request import Request

from vllm_kvcompress.cache.manager import BoundedManager
from vllm_kvcompress.cache.spec import HeadTypeSpec
from vllm_kvcompress.models.registry import image_model

REPORT = "kv_cache"  # key in RequestOutput.kv_transfer_params


@dataclass(frozen=True)
class CacheReport:
    """KV memory of one request on all ranks, counted from the blocks it held at its end.

    Parameters
    ----------
    resident_bytes : int
        Bytes of those blocks, page rounding and side state included.
    full_bytes : int
        Bytes of K and V of all its tokens, both branches.
    evicted_spatial, evicted_semantic : int
        Image tokens that a head has overwritten, of those with a ring and of those that choose; the mean
        where such heads differ in size.
    engine : int
        Which of the data-parallel engines drew it.
    """

    resident_bytes: int
    full_bytes: int
    evicted_spatial: int = 0
    evicted_semantic: int = 0
    engine: int = 0


class ImageScheduler(AsyncScheduler):
    """Adds a ``CacheReport`` to a finished request's outputs; schedules as vLLM does.

    It also tells the block managers where each prompt's text ends: vLLM's own call knows how long a prompt
    is, but not that a picture to continue or to score holds image tokens already.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._image = image_model(self.vllm_config.model_config)
        self._prefixes: dict[str, int] = {}
        for manager in self.kv_cache_manager.coordinator.single_type_managers:
            if isinstance(manager, BoundedManager):
                manager.prefixes = self._prefixes

    def add_request(self, request: Request) -> None:
        self._prefixes[request.request_id] = self._prefix(request)
        super().add_request(request)

    def _free_request(self, request: Request, delay_free_blocks: bool = False) -> tuple[Any, Any]:
        report = self._report(request)
        self._prefixes.pop(request.request_id, None)
        kv_params, ec_params = super()._free_request(request, delay_free_blocks)
        return {**(kv_params or {}), REPORT: asdict(report)}, ec_params

    def _report(self, request: Request) -> CacheReport:
        config = self.kv_cache_config
        blocks = self.kv_cache_manager.get_block_ids(request.request_id)
        resident = full = 0
        evicted: dict[str, list[tuple[int, int]]] = {"evicted_spatial": [], "evicted_semantic": []}
        # The last token drawn is never fed back, so it never reaches the cache.
        tokens = request.num_tokens - 1
        prefix = self._prefix(request)
        for group, ids in zip(config.kv_cache_groups, blocks, strict=True):
            spec = cast(AttentionSpec, group.kv_cache_spec)
            layers = len(group.layer_names)
            resident += len(ids) * spec.page_size_bytes * layers
            full += tokens * spec.num_kv_heads * 2 * spec.head_size * spec.dtype.itemsize * layers
            if isinstance(spec, HeadTypeSpec):
                name = "evicted_semantic" if spec.scored else "evicted_spatial"
                evicted[name].append((spec.num_kv_heads, max(0, tokens - prefix - spec.capacity)))
        means = {
            name: round(sum(n * count for n, count in parts) / max(1, sum(n for n, _ in parts)))
            for name, parts in evicted.items()
        }
        parallel = self.vllm_config.parallel_config
        ranks = parallel.tensor_parallel_size  # what one holds, each holds
        return CacheReport(ranks * resident, ranks * full, **means, engine=parallel.data_parallel_index)

    def _prefix(self, request: Request) -> int:
        """Tokens before the first image token."""
        return self._image.prefix_length(request.prompt_token_ids or [])
