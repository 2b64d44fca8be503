"""A step of windows on the CPU: C++ kernels (csrc/) behind the signatures of `window`."""

from collections.abc import Sequence
from ctypes import addressof, byref, c_void_p
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vllm_kvcompress.attention import window
from vllm_kvcompress.attention.cpu_library import (
    NO_SCRATCH,
    Native,
    Step,
    Window,
    library,
    pointers_to,
    readable,
    step_of,
    warn_layout,
)
from vllm_kvcompress.attention.pages import HeadPages, HeadType
from vllm_kvcompress.attention.window import WindowPlan

__all__ = ["commit", "verify"]


@dataclass
class Held:
    """A layer between `verify` and `commit`: what the kernels read again, and what must stay alive for it."""

    natives: list[Native]
    tables: list[tuple[int, int]]
    step: Step
    window: Window
    alive: tuple[Any, ...]

    def run(self) -> None:
        """Attend, or keep what stands."""
        loaded = library()
        assert loaded is not None
        for native, (address, stride) in zip(self.natives, self.tables, strict=True):
            native.struct.block_table, native.struct.table_row = address, stride
        pointers = pointers_to(self.natives)
        if loaded.kvc_window(pointers, len(self.natives), byref(self.step), byref(self.window)):
            raise MemoryError(NO_SCRATCH)


def verify(
    q: Tensor, k: Tensor, v: Tensor, types: Sequence[HeadType], plan: WindowPlan, scale: float, out: Tensor
) -> Any:
    """As `window.verify`; k and v must not change before `commit`, nor may the next step begin."""
    natives = readable(q, k, v, out, types)
    if natives is None:
        if library() is not None:
            warn_layout()
        return window.verify(q, k, v, types, plan, scale, out)
    places = max(plan.counts)
    mass = [
        _buffer(kind.pages, (len(plan.rows), kind.pages.kv.shape[1], places, kind.capacity + places))
        if kind.scores
        else None
        for kind in types
    ]
    start, count = plan.on_device
    pointers = (c_void_p * len(mass))(*(None if x is None else x.data_ptr() for x in mass))
    held = Held(
        natives,
        [(native.struct.block_table, native.struct.table_row) for native in natives],
        step_of(q, k, v, plan, scale, out),
        Window(start.data_ptr(), count.data_ptr(), None, addressof(pointers), places),
        (q, k, v, out, plan, list(types), mass, pointers),
    )
    held.run()
    return held


def commit(layers: Sequence[Any], standing: Sequence[int] | Tensor) -> None:
    """As `window.commit`."""
    count = torch.as_tensor(standing, dtype=torch.int32)
    for held in layers:
        if not isinstance(held, Held):
            window.commit([held], standing)
            continue
        held.window.standing = count.data_ptr()
        held.run()


def _buffer(pages: HeadPages, shape: tuple[int, ...]) -> Tensor:
    """Uninitialised float32 memory that stays with a layer's pages: fresh memory costs more than the work."""
    size = torch.Size(shape).numel()
    if pages.mass is None or pages.mass.numel() < size:
        pages.mass = torch.empty(size)
    return pages.mass[:size]
