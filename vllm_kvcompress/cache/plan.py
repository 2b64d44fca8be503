"""From an assignment of head types to the cache's layout. Asks nobody: no model, no configuration."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from vllm_kvcompress.attention.pages import slot_bytes
from vllm_kvcompress.cache.layout import TYPICAL_PREFIX, CacheLayout, footprint
from vllm_kvcompress.cache.paging import MAX_WASTE, Paging, plan_pages, plan_two, priced
from vllm_kvcompress.heads.fit import Assignment
from vllm_kvcompress.policy.rule import HeadRule


@dataclass(frozen=True)
class ModelShape:
    """What the cache needs to know of a model: layers, KV heads of a branch, numbers per key."""

    layers: int
    kv_heads: int
    head_size: int


def split_pages(
    spatial: int, semantic: int, capacities: Callable[[int, int], tuple[int, int]]
) -> tuple[tuple[int, int], int]:
    """(heads of each of two types, heads moved) so that their pages fit; branches move together."""
    split = plan_two(spatial, semantic, capacities, step=2)
    return split.heads, split.moved


def plan_layout(
    assignment: Assignment,
    shape: ModelShape,
    dtype: torch.dtype,
    others: tuple[tuple[HeadRule, ...], ...] = (),
) -> CacheLayout:
    """Pages for an assignment; ``others`` as in `CacheLayout`.

    Raises ValueError, one line, where no page size fits its counts.
    """
    slots = [rule.capacity for rule in assignment.rules]
    of_types = zip(assignment.rules, *others, strict=True)
    scores = [any(rule.scores for rule in of_type) for of_type in of_types]
    weights = [slot_bytes(shape.head_size, dtype, scored) for scored in scores]
    counts = assignment.counts
    paging: Paging | None
    if assignment.page_tokens is not None:
        paging = priced(counts, slots, assignment.page_tokens, weights)
    else:
        paging = plan_pages(counts, slots, weights) or plan_pages(counts, slots)
    if paging is None:
        heads = ", ".join(f"{n} of {slot}" for n, slot in zip(counts, slots, strict=True))
        raise ValueError(
            f"no page size fits heads of these slots with at most {MAX_WASTE:.0%} waste: {heads}; change "
            "budget or the head profile"
        )
    types = tuple(tuple(row) for row in np.asarray(assignment.types).tolist())
    return CacheLayout(types, shape.kv_heads, shape.head_size, assignment.rules, paging, dtype, others=others)


def describe(layout: CacheLayout) -> str:
    """The head types and what a picture costs, for the start-up log."""
    types = "; ".join(f"{rule.name}: {layout.total(kind)} heads" for kind, rule in enumerate(layout.rules))
    pages = ", ".join(map(str, layout.paging.tokens))
    size = footprint(layout, TYPICAL_PREFIX)
    sizes = [footprint(layout, TYPICAL_PREFIX, n).resident / 2**20 for n in range(1 + len(layout.others))]
    spread = f" (of other sizes {min(sizes[1:]):.2f} to {max(sizes[1:]):.2f})" if layout.others else ""
    return (
        f"{types}; tokens a page {pages}; page waste {layout.paging.waste:.1%}; KV of a picture with a "
        f"{TYPICAL_PREFIX}-token prompt {size.resident / 2**20:.2f} MiB instead of {size.full / 2**20:.2f}"
        f"{spread}"
    )
