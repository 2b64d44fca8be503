"""What lies between attention and commit of a window on a GPU: `triton_window` fills it and reads it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_kvcompress.attention.pages import HeadType
from vllm_kvcompress.attention.triton_decode import longest_first
from vllm_kvcompress.attention.triton_kinds import KindArgs, packed
from vllm_kvcompress.attention.window import WindowPlan

PLACES = 16  # of a row at most: the least rows of a matrix product


@dataclass
class Room:
    """A layer's memory between `triton_window.verify` and `commit`.

    Parameters
    ----------
    k, v : Tensor
        ``[tokens, 2 * Hkv, D]`` of the step.
    logits : Tensor
        float32: of each row, scored head and query, those of the resident slots and of the window's places.
    tops : Tensor
        float32: of each row, head and query, the greatest logit and the sum of what it scales.
    group : int
        Query heads per KV head.
    """

    k: Tensor
    v: Tensor
    logits: Tensor
    tops: Tensor
    group: int


@dataclass
class Held:
    """A layer between them: its head types, longest first, the rows with drafts, and what `verify` left."""

    types: Sequence[HeadType]
    plan: WindowPlan
    room: Room


def room(types: Sequence[HeadType], k: Tensor, group: int, rows: int, places: int) -> Room:
    """For so many rows of a layer, whatever the step; ``k`` has its heads, head size and dtype."""
    _, _, kept = kinds_of(longest_first(types))
    shape = (rows * places, *k.shape[1:])
    return Room(
        torch.empty(shape, dtype=k.dtype, device=k.device),
        torch.empty(shape, dtype=k.dtype, device=k.device),
        *scratch(rows, kept, k, group),
        group,
    )


def held(types: Sequence[HeadType], plan: WindowPlan, room: Room) -> Held:
    """What `triton_window.verify` has left in a room, also where a CUDA graph ran in its place."""
    return Held(longest_first(types), plan, room)


def scratch(rows: int, kept: int, k: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Logits of all queries, and each query's maximum and sum; ``kept`` as `kinds_of` has it."""
    logits = torch.empty(rows * kept * PLACES * group, dtype=torch.float32, device=k.device)
    tops = torch.empty(rows * k.shape[1] * PLACES * group * 2, dtype=torch.float32, device=k.device)
    return logits, tops


def kinds_of(types: Sequence[HeadType]) -> tuple[tuple[KindArgs, ...], int, int]:
    """As `packed`; scratch memory in lines of PLACES queries."""
    return packed(
        types,
        lambda kind: kind.pages.kv.shape[1] * (kind.capacity + PLACES) if kind.scores else 0,
    )
