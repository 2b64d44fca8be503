"""Memory that kernels need beside the pages, in bytes."""

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
