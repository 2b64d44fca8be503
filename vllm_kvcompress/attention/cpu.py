"""The decode step on the CPU: C++ kernels (csrc/) behind the signatures of `reference`.

The kernels are a plain shared library, built by setup.py and loaded with ctypes after torch, so that they
run on torch's own OpenMP threads. Where the library is missing, or an input is not laid out as the
kernels need it, the torch reference does the work: slower, same results. docs/cpu_kernels.md has numbers.
"""

import ctypes
import sys
from collections.abc import Sequence
from ctypes import Structure, byref, c_float, c_int, c_int32, c_int64, c_size_t, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from vllm_kvcompress.attention import reference
from vllm_kvcompress.attention import select as torch_select
from vllm_kvcompress.attention.pages import HeadPages, HeadType, Plan
from vllm_kvcompress.log import logger_for
from vllm_kvcompress.policy.rule import HeadRule

__all__ = ["decode", "isa", "select_all", "select_victims", "set_isa", "use_huge_pages"]

logger = logger_for(__name__)

LIBRARY = Path(__file__).with_name("_kernels.so")
ISAS = ("portable", "avx2", "avx512")
_ABI = 3
_PAGED = ("kv", "score", "token", "victim")
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class _HeadType(Structure):
    _fields_ = (
        *((name, c_void_p) for name in (*_PAGED, "head_index", "block_table")),
        *((f"{name}_{axis}", c_int64) for name in _PAGED for axis in ("block", "head")),
        ("table_row", c_int64),
        *((name, c_int32) for name in ("heads", "page", "capacity", "line", "image", "anchors", "recent")),
        *((name, c_int32) for name in ("ring", "evicts", "dim", "dtype", "value_norm", "smooth_row")),
        ("decay", c_float),
    )


class _Step(Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("q", "k", "v", "out", "prefix", "length")),
        *((f"{name}_{axis}", c_int64) for name in ("q", "k", "v", "out") for axis in ("row", "head")),
        *((name, c_int32) for name in ("rows", "group", "dim", "dtype", "threads")),
        ("scale", c_float),
    )


@cache
def _library() -> ctypes.CDLL | None:
    """The kernels, or None with one warning."""
    try:
        library = ctypes.CDLL(str(LIBRARY))
        if library.kvc_abi() != _ABI:
            raise OSError(f"{LIBRARY.name} is of another version; reinstall the package")
    except OSError as error:
        logger.warning(
            "kvcompress: no CPU kernels, decode steps run in plain torch, many times slower (%s). "
            "Install a C++ compiler and reinstall the package.",
            error,
        )
        return None
    library.kvc_decode.argtypes = (c_void_p, c_int32, c_void_p)
    library.kvc_select.argtypes = (c_void_p, c_void_p, c_void_p, c_int32, c_int32)
    return library


@cache
def _warn_layout() -> None:
    logger.warning(
        "kvcompress: inputs that the CPU kernels can't read (they need one dtype for q, k, v, out and cache, "
        "contiguous last dimensions, int32 tables and plan); the step runs in torch, many times slower."
    )


def isa() -> str | None:
    """Instruction set that the kernels run with, one of `ISAS`; None where there are no kernels."""
    library = _library()
    return ISAS[library.kvc_isa()] if library else None


def set_isa(name: str) -> str | None:
    """Choose a lesser instruction set, for tests and benchmarks; the best one the CPU has is the default.

    Returns what is in use from now on: never more than the CPU has.
    """
    library = _library()
    return ISAS[library.kvc_set_isa(ISAS.index(name))] if library else None


class _Native:
    """What the kernels need to know of one `HeadPages`, packed once; only the block table changes."""

    def __init__(self, pages: HeadPages, rule: HeadRule, head_index: Tensor) -> None:
        self.rule, self.head_index = rule, head_index
        self.struct = struct = _HeadType()
        self.address = ctypes.addressof(struct)
        self.dtype = pages.kv.dtype
        for name in _PAGED:
            tensor = getattr(pages, name)
            setattr(struct, name, tensor.data_ptr())
            setattr(struct, f"{name}_block", tensor.stride(0))
            setattr(struct, f"{name}_head", tensor.stride(1))
        struct.heads, struct.page = pages.kv.shape[1], pages.page
        struct.head_index = head_index.data_ptr()
        struct.dim, struct.dtype = pages.head_size, _DTYPES.get(self.dtype, 0)
        for name in (
            *("capacity", "line", "image", "anchors", "recent"),
            *("ring", "evicts", "value_norm", "smooth_row"),
        ):
            setattr(struct, name, int(getattr(rule, name)))
        struct.decay = rule.decay
        side = (pages.score, pages.token, pages.victim)
        self.fits = (
            pages.kv.is_cpu
            and self.dtype in _DTYPES
            and pages.kv.stride()[2:] == (2 * pages.head_size, 1)
            and [t.dtype for t in side] == [torch.float32, torch.int16, torch.int16]
            and all(t.stride(2) == 1 for t in side)
        )
        self.indexed = head_index.dtype == torch.int32 and head_index.stride() == (1,)


def _native(kind: HeadType) -> _Native | None:
    """The packed form of a head type, or None if the kernels can't read its tensors."""
    kept, table = kind.pages.__dict__, kind.block_table
    native: _Native | None = kept.get("_native")
    if native is None or native.rule is not kind.rule or native.head_index is not kind.head_index:
        native = kept["_native"] = _Native(kind.pages, kind.rule, kind.head_index)
    if not native.fits or table.dtype != torch.int32 or table.stride(1) != 1:
        return None
    native.struct.block_table, native.struct.table_row = table.data_ptr(), table.stride(0)
    return native


def _plain(plan: Plan) -> bool:
    return all(t.dtype == torch.int32 and t.is_contiguous() and t.is_cpu for t in (plan.prefix, plan.length))


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
    library = _library()
    natives = [_native(kind) for kind in types] if library else []
    strides = [tensor.stride() for tensor in (q, k, v, out)]
    dtype = q.dtype
    if (
        library is None
        or not _plain(plan)
        or not (dtype == k.dtype == v.dtype == out.dtype)
        or any(native is None or not native.indexed or native.dtype != dtype for native in natives)
        or any(stride[2] != 1 for stride in strides)
    ):
        if library is not None:
            _warn_layout()
        reference.decode(q, k, v, types, plan, scale, out)
        return
    rows, heads, dim = q.shape
    step = _Step(
        *(q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr()),
        *(plan.prefix.data_ptr(), plan.length.data_ptr()),
        *(stride[axis] for stride in strides for axis in (0, 1)),
        *(rows, heads // k.shape[1], dim, _DTYPES[dtype], torch.get_num_threads(), scale),
    )
    pointers = (c_void_p * len(natives))(*(native.address for native in natives if native))
    if library.kvc_decode(pointers, len(natives), byref(step)):
        raise MemoryError("kvcompress: no memory for the scratch of the CPU attention kernel")


def select_victims(type_all_layers: HeadType, plan: Plan) -> None:
    """Choose the victims of every row whose line has just ended; once per step, after the last layer.

    As `select.select_victims`, which also does the work of rules that choose within columns.
    """
    rule = type_all_layers.rule
    if not rule.scores:
        return
    library = _library()
    native = _native(type_all_layers) if library and _plain(plan) else None
    if library is None or native is None or rule.stratify:
        torch_select.select_victims(type_all_layers, plan)
        return
    rows, threads = len(plan.length), torch.get_num_threads()
    library.kvc_select(native.address, plan.prefix.data_ptr(), plan.length.data_ptr(), rows, threads)


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
