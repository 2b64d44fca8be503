"""The implementation of the decode step in use: plain torch, or compiled for the device at hand."""

import sys
from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor

from vllm_kvcompress.attention import cpu, reference
from vllm_kvcompress.attention.pages import HeadType, Plan
from vllm_kvcompress.config import KEY, Kernels

FIELD = f"additional_config.{KEY}.kernels"

decode: Callable[[Tensor, Tensor, Tensor, Sequence[HeadType], Plan, float, Tensor], None]
select_victims: Callable[[HeadType, Plan], None]
select_all: Callable[[Sequence[HeadType], Plan], None]


def choose(kernels: Kernels, device_type: str, cache_dtype: torch.dtype | None = None) -> str:
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


def use(kernels: Kernels, device_type: str, cache_dtype: torch.dtype | None = None) -> str:
    """Make a choice this process's; arguments and errors as in `choose`.

    Returns
    -------
    str
        The name of what is used, for the start-up log.
    """
    global decode, select_victims, select_all
    name = choose(kernels, device_type, cache_dtype)
    if name == "triton":
        # Triton decides at import whether it compiles or interprets, and other devices need none of it.
        from vllm_kvcompress.attention import triton_decode, triton_select

        decode, select_victims = triton_decode.decode, triton_select.select_victims
        select_all = triton_select.select_all
        return "triton (interpreted)" if interpreted() else "triton"
    module: ModuleType = cpu if name == "cpu" else reference
    decode, select_victims, select_all = module.decode, module.select_victims, _one_by_one
    if name == "cpu":
        return f"cpu ({cpu.isa()})"
    unread = device_type == "cpu" and choose(kernels, device_type) == "cpu"
    return "torch (the CPU kernels read no 8-bit cache)" if unread else "torch"


def check_shape(head_size: int, group: int) -> None:
    """Raise ValueError, one line, if the kernels in use can't serve a model of this shape.

    ``group`` is the number of query heads per KV head.
    """
    limits = getattr(sys.modules[decode.__module__], "LIMITS", (head_size, group))
    if head_size > limits[0] or group > limits[1]:
        raise ValueError(
            f"{FIELD}: triton kernels take head sizes to {limits[0]} and {limits[1]} query heads a KV head, "
            f"the model has {head_size} and {group}; set torch"
        )


def _one_by_one(types: Sequence[HeadType], plan: Plan) -> None:
    """`select_victims` of every head type."""
    for kind in types:
        select_victims(kind, plan)


use("torch", "cpu")
