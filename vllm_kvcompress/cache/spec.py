"""A KV-cache group per head type, as vLLM's scheduler and worker see it."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm.utils.math_utils import cdiv
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheSpec

from vllm_kvcompress.config import parse_config

if TYPE_CHECKING:
    from vllm.config import VllmConfig


@dataclass(frozen=True, kw_only=True)
class HeadTypeSpec(AttentionSpec):
    """Pages of one head type: all its heads of all layers and both branches.

    Parameters
    ----------
    kind : int
        Index of the head type in the layout: no two groups are alike.
    scored : bool
        Whether its heads choose what they keep (semantic heads) or overwrite the oldest (spatial ones).
    capacity : int
        Resident image slots (the budget of this head type).
    image_tokens : int
        Tokens of a whole picture.
    others : tuple of (int, int)
        ``capacity`` and ``image_tokens`` of pictures of the model's other sizes, in its order.
    context : int
        The longest sequence that is served (max_model_len).
    page_size_padded : int
        Bytes of a page of any type: K and V, then the side state (scores, token indices, victims),
        then what the largest type has more.
    """

    kind: int
    scored: bool
    capacity: int
    image_tokens: int
    context: int
    others: tuple[tuple[int, int], ...] = ()
    dcp_sharded: bool = False

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        # Head types of equal pages would otherwise become one group with one block table.
        return len(kv_cache_specs) == 1

    @property
    def prefix_cacheable(self) -> bool:
        return False

    @property
    def block_table_token_alignment(self) -> int | None:
        return None

    @property
    def uses_slot_mapping(self) -> bool:
        return False

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Capacity and image tokens by size, the default's first."""
        return (self.capacity, self.image_tokens), *self.others

    def blocks_for(self, prefix: int, size: int | None = 0) -> int:
        """Pages that a request of ``prefix`` tokens before the picture holds for its whole life.

        ``size`` is the picture's; None takes the one that needs most. No request has more resident tokens
        than the context.
        """
        capacity = max(slots for slots, _ in self.sizes) if size is None else self.sizes[size][0]
        return cdiv(min(prefix + capacity, self.context), self.block_size)

    def blocks_for_text(self, tokens: int) -> int:
        """Pages that a text request of ``tokens``, prompt and answer, holds: all of them stay."""
        return cdiv(min(tokens, self.context), self.block_size)

    def max_num_blocks_per_req(self, vllm_config: "VllmConfig", max_len: int) -> int:
        return cdiv(self.context, self.block_size)

    def max_memory_usage_bytes(self, vllm_config: "VllmConfig") -> int:
        """What vLLM wants to have room for at least: a picture with the longest prompt that is let in.

        Texts may be longer; those that find no room are refused one by one (`admission`).
        """
        limit = parse_config(vllm_config.additional_config).limits.prompt_tokens
        longest = min(self.context, vllm_config.model_config.max_model_len)
        most = max(
            self.blocks_for(min(max(longest - tokens, 1), limit), size)
            for size, (_, tokens) in enumerate(self.sizes)
        )
        return most * self.page_size_bytes


def longest_text(specs: Sequence[HeadTypeSpec], blocks: int) -> int:
    """Tokens of the longest text request that an empty pool of ``blocks`` can hold."""
    sizes = [spec.block_size for spec in specs]
    # A request of n tokens needs no more than blocks if this is true of n, and of every fewer.
    return bisect_right(
        range(1, blocks * min(sizes) + 1), blocks, key=lambda n: sum(cdiv(n, size) for size in sizes)
    )
