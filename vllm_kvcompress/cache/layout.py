"""How a model's heads are shared out among the head types' caches, and what a picture costs there."""

from dataclasses import dataclass

import torch

from vllm_kvcompress.attention.pages import BRANCHES, slot_bytes
from vllm_kvcompress.cache.paging import Paging
from vllm_kvcompress.heads.paged import TYPICAL_PREFIX, page_bytes, picture_bytes
from vllm_kvcompress.policy.rule import HeadRule


@dataclass(frozen=True)
class CacheLayout:
    """How the cache heads of a model are shared out among its head types.

    Parameters
    ----------
    types : tuple of tuple of int
        ``[layers][2 * kv_heads]``: the head type of each cache head (branch * kv_heads + KV head).
    kv_heads, head_size : int
        KV heads of a layer (one branch), numbers per key.
    rules : tuple of HeadRule
        Of each head type, one to six; every one has a head somewhere. For pictures of the default size.
    paging : Paging
        Tokens per page of each.
    dtype : torch.dtype
        Of K and V.
    summary : str
        What was decided, for the start-up log; empty on ranks that leave it to the first to say.
    others : tuple of tuple of HeadRule
        ``[sizes beside the default][types]``: the types' rules for pictures of the model's other sizes.
    """

    types: tuple[tuple[int, ...], ...]
    kv_heads: int
    head_size: int
    rules: tuple[HeadRule, ...]
    paging: Paging
    dtype: torch.dtype
    summary: str = ""
    others: tuple[tuple[HeadRule, ...], ...] = ()

    def sized(self, kind: int) -> tuple[HeadRule, ...]:
        """A type's rules by size; empty where there is one size."""
        return tuple(rules[kind] for rules in (self.rules, *self.others)) if self.others else ()

    def capacity(self, kind: int) -> int:
        """Image slots of a head of a type, for pictures of the size that has most."""
        return max(rules[kind].capacity for rules in (self.rules, *self.others))

    def scores(self, kind: int) -> bool:
        """Whether a type's heads are scored, in pictures of any size."""
        return any(rules[kind].scores for rules in (self.rules, *self.others))

    @property
    def layers(self) -> int:
        """Decoder layers."""
        return len(self.types)

    def heads(self, kind: int, layer: int) -> list[int]:
        """Places of the cache heads of type ``kind`` on the ``2 * kv_heads`` axis of ``layer``."""
        return [place for place, mine in enumerate(self.types[layer]) if mine == kind]

    def total(self, kind: int) -> int:
        """Cache heads of a type over all layers and branches."""
        return sum(row.count(kind) for row in self.types)

    def page_tokens(self, kind: int) -> int:
        """Tokens a page of this type holds."""
        return self.paging.tokens[kind]

    @property
    def page_bytes(self) -> int:
        """Bytes of a page of any type, side state included: those of the largest."""
        return page_bytes(self.counts, self.paging.tokens, self.weights)

    @property
    def counts(self) -> list[int]:
        """Cache heads of each type."""
        return [self.total(kind) for kind in range(len(self.rules))]

    @property
    def weights(self) -> list[int]:
        """Bytes of a slot of one head of each type."""
        return [self.slot_bytes(kind) for kind in range(len(self.rules))]

    def slot_bytes(self, kind: int) -> int:
        """Bytes of one slot of one head of a type."""
        return slot_bytes(self.head_size, self.dtype, self.scores(kind))

    @property
    def mean_slots(self) -> float:
        """Image slots per head, mean over the heads: what the budget bounds."""
        slots = sum(self.total(kind) * rule.capacity for kind, rule in enumerate(self.rules))
        return slots / (self.layers * BRANCHES * self.kv_heads)


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


def footprint(layout: CacheLayout, prefix: int, size: int = 0) -> Footprint:
    """Bytes of a picture with ``prefix`` prompt tokens, of one of the model's sizes."""
    rules = (layout.rules, *layout.others)[size]
    slots = [rule.capacity for rule in rules]
    resident = picture_bytes(layout.counts, slots, layout.paging.tokens, layout.weights, prefix)
    heads = layout.layers * BRANCHES * layout.kv_heads
    full = (prefix + rules[0].image) * heads * 2 * layout.head_size * layout.dtype.itemsize
    return Footprint(resident, full)


def at_once(layout: CacheLayout, blocks: int) -> str:
    """How many pictures with a short prompt the allocated blocks hold, for the log."""
    size = footprint(layout, TYPICAL_PREFIX)
    free = (blocks - 1) * layout.page_bytes  # one block is vLLM's null block
    return (
        f"memory for {free // size.resident} pictures at once instead of {free // size.full} "
        "with the full cache"
    )
