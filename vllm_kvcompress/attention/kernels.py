"""Implementations of the decode step: plain torch, or compiled for the device at hand."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vllm_kvcompress.attention import cpu, cpu_window, reference, window
from vllm_kvcompress.attention.pages import HeadType, Plan
from vllm_kvcompress.attention.window import WindowPlan
from vllm_kvcompress.config import KEY, Choice

FIELD = f"additional_config.{KEY}.kernels"


class Kernels(NamedTuple):
    """One implementation of the decode step; an engine chooses once.

    Parameters
    ----------
    name : str
        For the start-up log.
    decode : callable
        As `reference.decode`.
    select_all : callable
        ``(head types, plan) -> None``: `select.select_victims` of each.
    limits : (int, int) or None
        Largest head size, most query heads per KV head.
    verify, commit : callable
        As `window.verify` and `window.commit`; what the one returns only the other understands.
    room, held : callable or None
        As `triton_room.room`, which `verify` then takes too, and `triton_room.held`: for CUDA graphs.
    """

    name: str
    decode: Callable[[Tensor, Tensor, Tensor, Sequence[HeadType], Plan, float, Tensor], None]
    select_all: Callable[[Sequence[HeadType], Plan], None]
    limits: tuple[int, int] | None = None
    verify: Callable[..., Any] = window.verify
    commit: Callable[[Sequence[Any], Sequence[int] | Tensor], None] = window.commit
    room: Callable[[Sequence[HeadType], Tensor, int, int, int], Any] | None = None
    held: Callable[[Sequence[HeadType], WindowPlan, Any], Any] | None = None

    def check_shape(self, head_size: int, group: int) -> None:
        """Raise ValueError, one line, if they can't serve a model of this shape.

        ``group`` is the number of query heads per KV head.
        """
        if self.limits and (head_size > self.limits[0] or group > self.limits[1]):
            raise ValueError(
                f"{FIELD}: triton kernels take head sizes to {self.limits[0]} and {self.limits[1]} query "
                f"heads a KV head, the model has {head_size} and {group}; set torch"
            )


def choose(kernels: Choice, device_type: str, cache_dtype: torch.dtype | None = None) -> str:
    """The implementation that a choice stands for on a device.

    Parameters
    ----------
    kernels : str
        ``auto``, ``torch``, ``cpu`` or ``triton``.
    device_type : str
        torch's name of the device that the cache lives on.
    cache_dtype : torch.dtype, optional
        Of K and V in the cache, where it matters: the CPU kernels read no 8-bit numbers.

    Returns
    -------
    str
        ``torch``, ``cpu`` or ``triton``.

    Raises
    ------
    ValueError
        One line naming the option, if what is asked for by name can't run here.
    """
    narrow = cache_dtype is not None and cache_dtype.itemsize == 1
    if kernels == "auto":
        if device_type == "cuda":
            return "triton"
        return "cpu" if device_type == "cpu" and cpu.isa() is not None and not narrow else "torch"
    if kernels == "cpu":
        reasons = {
            "the cache is on " + device_type: device_type != "cpu",
            "they read no 8-bit cache (--kv-cache-dtype)": narrow,
            "they were not built": cpu.isa() is None,
        }
        for reason, holds in reasons.items():
            if holds:
                raise ValueError(f"{FIELD}: cpu kernels can't be used, {reason}; set auto")
    if kernels == "triton" and device_type == "cpu" and not interpreted():
        raise ValueError(
            f"{FIELD}: triton kernels run on a CPU only in Triton's interpreter; set TRITON_INTERPRET=1 in "
            "the environment, or auto"
        )
    return kernels


def interpreted() -> bool:
    """Whether Triton's interpreter runs kernels in this process."""
    try:
        import triton
    except ImportError:
        return False
    return bool(triton.knobs.runtime.interpret)


def kernels_for(kernels: Choice, device_type: str, cache_dtype: torch.dtype | None = None) -> Kernels:
    """The implementation itself; arguments and errors as in `choose`."""
    name = choose(kernels, device_type, cache_dtype)
    if name == "triton":
        # Triton decides at import whether it compiles or interprets, and other devices need none of it.
        from vllm_kvcompress.attention import triton_decode, triton_room, triton_select, triton_window

        shown = "triton (interpreted)" if interpreted() else "triton"
        return Kernels(shown, triton_decode.decode, triton_select.select_all, triton_decode.LIMITS,
            triton_window.verify, triton_window.commit, triton_room.room, triton_room.held,
        )  # fmt: skip
    if name == "cpu":
        return Kernels(
            f"cpu ({cpu.isa()})", cpu.decode, cpu.select_all, None, cpu_window.verify, cpu_window.commit
        )
    unread = device_type == "cpu" and choose(kernels, device_type) == "cpu"
    shown = "torch (the CPU kernels read no 8-bit cache)" if unread else "torch"
    return Kernels(shown, reference.decode, reference.select_all)
