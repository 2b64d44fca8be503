"""Memory of an engine that may have to share its device with a server."""

from typing import Any

SHARE = 0.01  # of a GPU, to be free when an engine of so many bytes starts


def sharing(room: dict[str, Any]) -> dict[str, Any]:
    """vLLM's memory options ``room``, for a GPU that others may use.

    Before it looks at ``kv_cache_memory_bytes`` vLLM wants ``gpu_memory_utilization`` of a GPU, most of it,
    to be free; where bytes alone are given, it is to want little.
    """
    import torch

    alone = room.get("kv_cache_memory_bytes") is not None and room.get("gpu_memory_utilization") is None
    return {**room, "gpu_memory_utilization": SHARE} if alone and torch.cuda.is_available() else room
