"""Memory that kernels need beside the pages, in bytes."""

from dataclasses import dataclass

import torch

from vllm_kvcompress.attention.padding import LEAST, rounded
from vllm_kvcompress.attention.prefill_plan import MOST_PAIRS, MOST_SLOTS
from vllm_kvcompress.cache.layout import BRANCHES, CacheLayout

EXACT = 4  # bytes of a probability; scratch is float32


def window_bytes(layout: CacheLayout, places: int, queries: int) -> int:
    """Of a picture's window, between its attention and its commit: K, V, and what its queries give slots.

    Parameters
    ----------
    places : int
        Of the window.
    queries : int
        A slot's numbers in a head that is scored: the C++ kernels add up a group's queries, Triton's keep
        each of them, and always as many places as there are lanes.
    """
    vectors = places * BRANCHES * layout.kv_heads * layout.layers * 2 * layout.head_size
    slots = sum(
        layout.total(kind) * (layout.capacity(kind) + places)
        for kind in range(len(layout.rules))
        if layout.scores(kind)
    )
    return vectors * layout.dtype.itemsize + EXACT * queries * slots


def decode_bytes(layout: CacheLayout, group: int) -> int:
    """Of a picture's step of one token: a layer's probabilities, or the order of victims of all layers."""
    scored = [kind for kind in range(len(layout.rules)) if layout.scores(kind)]
    of_layers = [
        sum(len(layout.heads(kind, layer)) * layout.capacity(kind) for kind in scored)
        for layer in range(layout.layers)
    ]
    return max(EXACT * group * max(of_layers), 2 * EXACT * sum(of_layers))


@dataclass(frozen=True)
class Prompts:
    """What a step's prompts may be.

    Parameters
    ----------
    tokens, rows, context : int
        Tokens and rows of a step, tokens of a row, at most.
    unlike : bool
        Whether a row's branches may begin apart, so that each has a mask.
    """

    tokens: int
    rows: int
    context: int
    unlike: bool = False


def prefill_bytes(layout: CacheLayout, group: int, dtype: torch.dtype, prompts: Prompts) -> int:
    """Of a step's prompts in a layer (`attention.prefill`), at whichever of its calls takes most.

    Parameters
    ----------
    dtype : torch.dtype
        Of queries, and of K and V as they come.
    """
    size, number, tokens = layout.head_size, dtype.itemsize, prompts.tokens
    cast = layout.dtype != dtype
    kinds, layers = range(len(layout.rules)), range(layout.layers)
    heads = max(len(layout.heads(kind, layer)) for kind in kinds for layer in layers)
    # `_write`: K, V, and both together as the pages have them.
    written = tokens * heads * 2 * size * (2 * number + cast * layout.dtype.itemsize)
    # `_begin`: queries, keys and values of all heads, and what is found.
    begun = tokens * BRANCHES * layout.kv_heads * size * number * (2 * group + 2 + 2 * cast)
    # `_continue`: what is gathered, and the chunk's queries, what is found, and that without the padding.
    most = rounded(prompts.context)
    slots = min(max(MOST_SLOTS, most), prompts.rows * most)
    queries = tokens + tokens // 4 + LEAST * prompts.rows
    pairs = min(max(MOST_PAIRS, LEAST * most), queries * most)
    gathered = slots * heads * 2 * size * (layout.dtype.itemsize + cast * number)
    asked = 3 * queries * heads * group * size * number
    masks = pairs * (heads * group if prompts.unlike else 1) * (1 + number)  # said, and to be added
    plain = 0
    if group > 1:  # K and V in float32, for each query head, K scaled; logits three times, and where none is
        plain = slots * heads * size * EXACT * (2 + 3 * group) + pairs * heads * group * (3 * EXACT + 1)
    return max(written, begun, gathered + asked + masks + plain)
