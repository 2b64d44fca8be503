"""Blocks of a bounded request: all of them at admission, none later.

An image request needs ``ceil((prefix + budget) / page)`` pages of each head type, known before its
first token; a text request, of which all stays, ``ceil((prompt + max_tokens) / page)``. Taking them all at
once means that nothing that runs is ever preempted for want of memory: a full server queues instead. The
nearest relatives in vLLM are CircularBufferManager and RSWAManager (v1/core/single_type_kv_cache_manager.py).
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager

from vllm_kvcompress.cache.spec import HeadTypeSpec


class BoundedManager(FullAttentionManager):
    """One head type's blocks of every request.

    ``prefixes`` says how many tokens come before a request's first image token, where that is known (the
    scheduler fills it in); otherwise the whole prompt counts, which is never too little. ``sizes`` says of
    which of the model's sizes its picture is; where that is not known, the largest counts. ``texts`` says of
    every text request how many tokens it may have in all.
    """

    supports_fine_grained_hash_lookup: ClassVar[bool] = False
    kv_cache_spec: HeadTypeSpec

    def __init__(self, kv_cache_spec: HeadTypeSpec, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self.prefixes: Mapping[str, int] = {}
        self.sizes: Mapping[str, int] = {}
        self.texts: Mapping[str, int] = {}
        self._prompt_tokens: dict[str, int] = {}

    def _needed(self, request_id: str, prompt_tokens: int) -> int:
        if request_id in self.texts:
            return self.kv_cache_spec.blocks_for_text(self.texts[request_id])
        prefix = self.prefixes.get(request_id)
        if prefix is None:
            prefix = self._prompt_tokens.get(request_id, prompt_tokens)
        return self.kv_cache_spec.blocks_for(prefix, self.sizes.get(request_id))

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        # Called before every allocation, and the only place that says how long the prompt is.
        if num_prompt_tokens is not None and not self.req_to_blocks.get(request_id):
            self._prompt_tokens[request_id] = num_prompt_tokens

    def get_num_skipped_tokens(self, num_computed_tokens: int) -> int:
        return 0

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
        prefill_end: int = 0,
    ) -> int:
        if self.req_to_blocks.get(request_id):
            return 0
        return self._needed(request_id, prefill_end)

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        blocks = self.req_to_blocks[request_id]
        if blocks:
            return []
        blocks.extend(self.block_pool.get_new_blocks(self._needed(request_id, num_tokens)))
        return list(blocks)

    def pop_blocks_for_free(self, request_id: str) -> Any:
        self._prompt_tokens.pop(request_id, None)
        return super().pop_blocks_for_free(request_id)

    @classmethod
    def find_longest_cache_hit(
        cls, block_hashes: Any, max_length: int, kv_cache_group_ids: list[int], *args: Any, **kwargs: Any
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        return tuple([] for _ in kv_cache_group_ids), 0

    def cache_blocks(self, *args: Any, **kwargs: Any) -> None:
        """Blocks that are overwritten in place can't be shared."""

    def add_local_computed_blocks(self, *args: Any, **kwargs: Any) -> None:
        """There are none: the groups are not prefix-cacheable."""
