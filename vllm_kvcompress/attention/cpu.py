"""The decode step on the CPU: C++ kernels (csrc/) behind the signatures of `reference`.

The kernels are a plain shared library, built by setup.py and loaded with ctypes after torch, so that they
run on torch's own OpenMP threads. Where the library is missing, or an input is not laid out as the
kernels need it, the torch reference does the work: slower, same results. docs/cpu_kernels.md has numbers.
"""

import ctypes
import sys
from collections.abc import Sequence
from ctypes import byref, c_int, c_size_t, c_void_p

import torch
from torch import Tensor

from vllm_kvcompress.attention import reference
from vllm_kvcompress.attention import select as torch_select
from vllm_kvcompress.attention.cpu_library import (
    ISAS,
    NO_SCRATCH,
    is_plain,
    isa,
    library,
    native_of,
    pointers_to,
    readable,
    set_isa,
    step_of,
    warn_layout,
)
from vllm_kvcompress.attention.pages import HeadType, Plan

__all__ = ["ISAS", "decode", "isa", "select_all", "select_victims", "set_isa", "use_huge_pages"]


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    types: Sequence[HeadType],
    plan: Plan,
    scale: float,
    out: Tensor,
) -> None:
    """Write one token per row into the cache of one layer, and attend to what is resident.

    Shapes and meaning as in `reference.decode`. The kernels take float32, bfloat16 and float16, all
    tensors of one dtype, any strides of rows and heads. They keep what they know of a `HeadPages` on that
    object: keep one per layer for the life of the cache, and don't put other tensors into it.
    """
    natives = readable(q, k, v, out, types) if is_plain(plan) else None
    if natives is None:
        if library() is not None:
            warn_layout()
        reference.decode(q, k, v, types, plan, scale, out)
        return
    step = step_of(q, k, v, plan, scale, out)
    if library().kvc_decode(pointers_to(natives), len(natives), byref(step)):  # type: ignore[union-attr]
        raise MemoryError(NO_SCRATCH)


def select_victims(type_all_layers: HeadType, plan: Plan) -> None:
    """Choose the victims of every row whose line has just ended; once per step, after the last layer.

    As `select.select_victims`, which also does the work of rules that choose within columns.
    """
    rule = type_all_layers.rule
    if not type_all_layers.scores:
        return
    loaded = library()
    native = native_of(type_all_layers) if loaded and is_plain(plan) else None
    if loaded is None or native is None or rule.stratify:
        torch_select.select_victims(type_all_layers, plan)
        return
    rows, threads = len(plan.length), torch.get_num_threads()
    size = None if plan.size is None else plan.size.data_ptr()
    loaded.kvc_select(native.address, plan.prefix.data_ptr(), plan.length.data_ptr(), size, rows, threads)


def select_all(types: Sequence[HeadType], plan: Plan) -> None:
    """`select_victims` of every head type."""
    for kind in types:
        select_victims(kind, plan)


def use_huge_pages(memory: Tensor, collapse: bool = False) -> bool:
    """Ask Linux to back the cache with 2 MiB pages, once, after it was allocated.

    A step reads far more memory than the processor's address cache covers with 4 KiB pages: a quarter
    faster. Contents stay.

    Parameters
    ----------
    memory : Tensor
        A contiguous CPU tensor; its whole 2 MiB stretches are affected.
    collapse : bool
        Also what has been written to already, at once: about a second per GiB, and all of the memory is
        then in use. A fresh cache needs none of that: it gets its pages as it is first written to.

    Returns
    -------
    bool
        Whether the kernel did it; False where it cannot, which costs only speed.
    """
    advise_huge, collapse_now, huge = 14, 25, 2**21  # MADV_HUGEPAGE, MADV_COLLAPSE (Linux 6.1)
    first = -(-memory.data_ptr() // huge) * huge
    size = (memory.data_ptr() + memory.nbytes - first) // huge * huge
    if sys.platform != "linux" or not memory.is_cpu or size <= 0:
        return False
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (c_void_p, c_size_t, c_int)
    advised = madvise(first, size, advise_huge) == 0
    return advised and (not collapse or madvise(first, size, collapse_now) == 0)
