"""How a model's heads are split over the two caches, and what a picture costs there."""

from dataclasses import dataclass

import torch
from vllm.utils.math_utils import cdiv

from vllm_kvcompress.attention.pages import SIDE_BYTES, page_bytes
from vllm_kvcompress.cache.paging import Paging
from vllm_kvcompress.policy.rule import HeadRule

BRANCHES = 2
TYPICAL_PREFIX = 20  # tokens of a short prompt, for the figures in the log
_ALIGNMENT = 64  # bytes; a cache line


@dataclass(frozen=True)
class CacheLayout:
    """How the heads of a model are split over the two caches.

    Parameters
    ----------
    spatial : tuple of tuple of int
        Per layer, the KV heads that are spatial; the others are semantic.
    kv_heads, head_size : int
        KV heads of a layer (one branch), numbers per key.
    rules : (HeadRule or None, HeadRule or None)
        Of the spatial and the semantic heads.
    paging : Paging
        Tokens per page of each.
    dtype : torch.dtype
        Of K and V.
    summary : str
        What was decided, for the start-up log.
    """

    spatial: tuple[tuple[int, ...], ...]
    kv_heads: int
    head_size: int
    rules: tuple[HeadRule | None, HeadRule | None]
    paging: Paging
    dtype: torch.dtype
    summary: str = ""

    def heads(self, kind: int, layer: int) -> list[int]:
        """KV heads of type ``kind`` (0 spatial, 1 semantic) in ``layer``."""
        spatial = self.spatial[layer]
        return list(spatial) if kind == 0 else [h for h in range(self.kv_heads) if h not in spatial]

    def total(self, kind: int) -> int:
        """Cache heads of a type over all layers and branches."""
        return BRANCHES * sum(len(self.heads(kind, layer)) for layer in range(len(self.spatial)))

    def page_tokens(self, kind: int) -> int:
        """Tokens a page of this type holds."""
        return (self.paging.spatial_tokens, self.paging.semantic_tokens)[kind]

    @property
    def page_bytes(self) -> int:
        """Bytes of a page of either type, side state included."""
        need = max(
            page_bytes(self.total(kind), self.page_tokens(kind), self.head_size, self.dtype)
            for kind in (0, 1)
            if self.total(kind)
        )
        return -(-need // _ALIGNMENT) * _ALIGNMENT

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot of one head."""
        return 2 * self.head_size * self.dtype.itemsize + SIDE_BYTES


@dataclass(frozen=True)
class Footprint:
    """KV bytes of one picture.

    Parameters
    ----------
    resident : int
        Bytes of the pages that a request holds, rounding and side state included.
    full : int
        Bytes of K and V of all its tokens.
    """

    resident: int
    full: int

    @property
    def ratio(self) -> float:
        """How many times smaller."""
        return self.full / self.resident


def footprint(layout: CacheLayout, prefix: int) -> Footprint:
    """Bytes of a picture with ``prefix`` prompt tokens."""
    pages = sum(
        cdiv(prefix + rule.capacity, layout.page_tokens(kind))
        for kind, rule in enumerate(layout.rules)
        if rule is not None
    )
    image = next(rule for rule in layout.rules if rule is not None).image
    heads = layout.total(0) + layout.total(1)
    full = (prefix + image) * heads * 2 * layout.head_size * layout.dtype.itemsize
    return Footprint(pages * layout.page_bytes, full)


def at_once(layout: CacheLayout, blocks: int) -> str:
    """How many pictures with a short prompt the allocated blocks hold, for the log."""
    size = footprint(layout, TYPICAL_PREFIX)
    free = (blocks - 1) * layout.page_bytes  # one block is vLLM's null block
    return (
        f"memory for {free // size.resident} pictures at once instead of {free // size.full} "
        "with the full cache"
    )
