"""How many pictures calibration draws and replays at once: as many as the memory beside the weights holds.

Long pictures are large: a full cache of one of Lumina-mGPT-1024 is 4.4 GB. What is measured does not depend
on it, but for the last digits of sums.
"""

from collections.abc import Iterator

import torch

from vllm_kvcompress.attention.pages import BRANCHES

ON_CPU = 6 << 30  # bytes; Janus-Pro-7B's pictures in one pass, as smaller models' are anyway
SHARE = 0.5  # of a GPU's free memory: allocators do not use it without gaps
LINES = 6  # float32 copies of a line of queries against the picture that are alive at once in `losses`
STREAMS = 16  # widths of the residual stream that a layer's matrices make of a token


def passes(rows: int, at_once: int) -> Iterator[slice]:
    """``rows`` in as few parts of at most ``at_once`` as can be, nearly equal ones."""
    number = -(-rows // max(1, at_once))
    size = -(-rows // number)
    for first in range(0, rows, size):
        yield slice(first, min(rows, first + size))


def rows_at_once(row_bytes: int, device: torch.device, what: str) -> int:
    """How many rows of so many bytes there is room for.

    Parameters
    ----------
    what : str
        Is done with a row, for the error.

    Raises
    ------
    ValueError
        One line: not even one fits a GPU.
    """
    if device.type != "cuda":
        return max(1, ON_CPU // row_bytes)
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch's to use again
    if row_bytes > free:
        raise ValueError(
            f"head_profile: to {what} one picture takes {row_bytes / 1e9:.1f} GB beside the weights, "
            f"{free / 1e9:.1f} are free: name a profile made on a larger device, or use the preset line_ar"
        )
    return max(1, int(SHARE * free) // row_bytes)


def drawing_bytes(layers: int, kv_heads: int, head_size: int, steps: int, dtype: torch.dtype) -> int:
    """Of a row of `calibrate.FullCache`: K and V of all layers, those of one in float32 as well."""
    slot = 2 * BRANCHES * kv_heads * head_size
    return slot * steps * (layers * dtype.itemsize + torch.float32.itemsize)


def replaying_bytes(
    hidden: int, heads: int, kv_heads: int, head_size: int, steps: int, line: int, dtype: torch.dtype
) -> int:
    """Of a row of a replay, about: a line's probabilities, queries, keys and values, and the layer's own.

    ``heads`` are query heads of one branch, ``steps`` the row's tokens, ``line`` those of a line.
    """
    exact, short = torch.float32.itemsize, dtype.itemsize
    probabilities = LINES * exact * heads * line * steps
    attended = steps * head_size * (heads + 2 * kv_heads) * (exact + short)
    return BRANCHES * (probabilities + attended + steps * STREAMS * hidden * short)
