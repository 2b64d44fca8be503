"""The CPU kernels as a shared library: loading, the C interface's structs (csrc/abi.h), packed head types."""

import ctypes
from collections.abc import Sequence
from ctypes import Structure, c_float, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vllm_kvcompress.attention.pages import NUMBERS, HeadType, Plan
from vllm_kvcompress.attention.window import WindowPlan
from vllm_kvcompress.log import logger_for

logger = logger_for(__name__)

LIBRARY = Path(__file__).with_name("_kernels.so")
ISAS = ("portable", "avx2", "avx512")
_ABI = 6
_PAGED = ("kv", "score", "token", "victim")
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class PackedType(Structure):
    _fields_ = (
        *((name, c_void_p) for name in (*_PAGED, "head_index", "block_table", "sized")),
        *((f"{name}_{axis}", c_int64) for name in _PAGED for axis in ("block", "head")),
        ("table_row", c_int64),
        *((name, c_int32) for name in ("heads", "page", "widest", *NUMBERS)),
        *((name, c_int32) for name in ("ring", "evicts", "dim", "dtype", "value_norm", "smooth_row")),
        ("decay", c_float),
    )


class Step(Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("q", "k", "v", "out", "prefix", "length", "begins", "size")),
        *((f"{name}_{axis}", c_int64) for name in ("q", "k", "v", "out") for axis in ("row", "head")),
        *((name, c_int32) for name in ("rows", "group", "dim", "dtype", "threads", "kv_heads")),
        ("scale", c_float),
    )


class Window(Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("start", "count", "standing", "mass")),
        ("places", c_int32),
    )


@cache
def library() -> ctypes.CDLL | None:
    """The kernels, or None with one warning."""
    try:
        loaded = ctypes.CDLL(str(LIBRARY))
        if loaded.kvc_abi() != _ABI:
            raise OSError(f"{LIBRARY.name} is of another version; reinstall the package")
    except OSError as error:
        logger.warning(
            "kvcompress: no CPU kernels, decode steps run in plain torch, many times slower (%s). "
            "Install a C++ compiler and reinstall the package.",
            error,
        )
        return None
    loaded.kvc_decode.argtypes = (c_void_p, c_int32, c_void_p)
    loaded.kvc_window.argtypes = (c_void_p, c_int32, c_void_p, c_void_p)
    loaded.kvc_select.argtypes = (c_void_p, c_void_p, c_void_p, c_void_p, c_int32, c_int32)
    return loaded


@cache
def warn_layout() -> None:
    logger.warning(
        "kvcompress: inputs that the CPU kernels can't read (they need one dtype for q, k, v, out and cache, "
        "contiguous last dimensions, int32 tables and plan); the step runs in torch, many times slower."
    )


def isa() -> str | None:
    """Instruction set that the kernels run with, one of `ISAS`; None where there are no kernels."""
    loaded = library()
    return ISAS[loaded.kvc_isa()] if loaded else None


def set_isa(name: str) -> str | None:
    """Choose a lesser instruction set, for tests and benchmarks; the best one the CPU has is the default.

    Returns what is in use from now on: never more than the CPU has.
    """
    loaded = library()
    return ISAS[loaded.kvc_set_isa(ISAS.index(name))] if loaded else None


NO_SCRATCH = "kvcompress: no memory for the scratch of the CPU attention kernel"


class Native:
    """What the kernels need to know of one `HeadPages`, packed once; only the block table changes."""

    def __init__(self, kind: HeadType) -> None:
        pages, rule, head_index = kind.pages, kind.rule, kind.head_index
        self.rule, self.sized, self.head_index = rule, kind.sized, head_index
        self.struct = struct = PackedType()
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
        for name in (*NUMBERS, "ring", "evicts", "value_norm", "smooth_row"):
            setattr(struct, name, int(getattr(rule, name)))
        struct.decay, struct.widest = rule.decay, kind.capacity
        if kind.sized:
            struct.evicts = any(one.evicts for one in kind.sized)
            numbers = [getattr(one, name) for one in kind.sized for name in NUMBERS]
            self.numbers = (c_int32 * len(numbers))(*numbers)  # as long as the struct points there
            struct.sized = ctypes.addressof(self.numbers)
        side = (pages.score, pages.token, pages.victim)
        self.fits = (
            pages.kv.is_cpu
            and self.dtype in _DTYPES
            and pages.kv.stride()[2:] == (2 * pages.head_size, 1)
            and [t.dtype for t in side] == [torch.float32, torch.int16, torch.int16]
            and all(t.stride(2) == 1 for t in side)
        )
        self.indexed = head_index.dtype == torch.int32 and head_index.stride() == (1,)


def native_of(kind: HeadType) -> Native | None:
    """The packed form of a head type, or None if the kernels can't read its tensors."""
    pages, table = kind.pages, kind.block_table
    native = pages.native
    if (
        native is None
        or native.rule is not kind.rule
        or native.sized is not kind.sized
        or native.head_index is not kind.head_index
    ):
        native = pages.native = Native(kind)
    if not native.fits or table.dtype != torch.int32 or table.stride(1) != 1:
        return None
    native.struct.block_table, native.struct.table_row = table.data_ptr(), table.stride(0)
    return native


def is_plain(plan: Plan) -> bool:
    """Whether the kernels can read a plan."""
    tensors = [x for x in (plan.prefix, plan.length, plan.begins, plan.size) if x is not None]
    return all(t.dtype == torch.int32 and t.is_contiguous() and t.is_cpu for t in tensors)


def readable(q: Tensor, k: Tensor, v: Tensor, out: Tensor, types: Sequence[HeadType]) -> list[Native] | None:
    """The packed head types, if the kernels can read all of a step's tensors; else None."""
    if library() is None or any(x.stride(2) != 1 or x.dtype != q.dtype for x in (q, k, v, out)):
        return None
    natives = [native_of(kind) for kind in types]
    if all(native is not None and native.indexed and native.dtype == q.dtype for native in natives):
        return natives  # type: ignore[return-value]
    return None


def step_of(q: Tensor, k: Tensor, v: Tensor, plan: Plan | WindowPlan, scale: float, out: Tensor) -> Step:
    """A step's tensors as the kernels see them; whoever has it keeps the tensors alive."""
    return Step(
        *(x.data_ptr() for x in (q, k, v, out, plan.prefix, plan.length)),
        None if plan.begins is None else plan.begins.data_ptr(),
        None if plan.size is None else plan.size.data_ptr(),
        *(x.stride(axis) for x in (q, k, v, out) for axis in (0, 1)),
        *(
            len(plan.prefix),
            q.shape[1] // k.shape[1],
            q.shape[2],
            _DTYPES[q.dtype],
            torch.get_num_threads(),
            k.shape[1] // 2,
            scale,
        ),
    )


def pointers_to(natives: Sequence[Native]) -> Any:
    """A C array of the packed head types."""
    return (c_void_p * len(natives))(*(native.address for native in natives))
