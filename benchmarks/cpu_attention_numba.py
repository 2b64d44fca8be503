"""The decode kernel in numba, for `cpu_attention.py` only: what a compiler without C++ would give."""

from collections.abc import Callable

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import prange, types
from numba.extending import intrinsic
from torch import Tensor

from vllm_kvcompress.attention.pages import HeadType, Plan


@intrinsic
def widen(typing_context, x):  # type: ignore[no-untyped-def]
    """bfloat16 in an uint16 to float32."""

    def code(context, builder, signature, args):  # type: ignore[no-untyped-def]
        wide = builder.zext(args[0], ir.IntType(32))
        return builder.bitcast(builder.shl(wide, ir.Constant(ir.IntType(32), 16)), ir.FloatType())

    return types.float32(types.uint16), code


@numba.njit(parallel=True, fastmath=True, cache=False)
def attend(q, kv, score, table, slots, prefix, head_index, group, scale, scores, out):  # type: ignore[no-untyped-def]
    rows, heads, page, dim = len(table), kv.shape[1], kv.shape[2], kv.shape[3] // 2
    for item in prange(rows * heads):
        row, head = item // heads, item % heads
        logit = np.empty(slots, np.float32)
        query = np.empty(dim, np.float32)
        total = np.empty(dim, np.float32)
        for g in range(group):
            at = head_index[head] * group + g
            for d in range(dim):
                query[d] = widen(q[row, at, d]) * scale
                total[d] = 0
            best = np.float32(-np.inf)
            for s in range(slots):
                key = kv[table[row, s // page], head, s % page]
                dot = np.float32(0)
                for d in range(dim):
                    dot += query[d] * widen(key[d])
                logit[s] = dot
                best = max(best, dot)
            mass = np.float32(0)
            for s in range(slots):
                logit[s] = np.exp(logit[s] - best)
                mass += logit[s]
            for s in range(slots):
                value = kv[table[row, s // page], head, s % page]
                weight = logit[s] / mass
                for d in range(dim):
                    total[d] += weight * widen(value[dim + d])
                if scores and s >= prefix:
                    score[table[row, s // page], head, s % page] += weight
            for d in range(dim):
                out[row, at, d] = total[d]


def numba_decode(threads: int) -> Callable[..., None]:
    """Attention and scores only: bfloat16, rows in a steady phase, without the write of this step's token."""
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))

    def decode(
        q: Tensor, k: Tensor, v: Tensor, kinds: list[HeadType], plan: Plan, scale: float, out: Tensor
    ) -> None:
        result = torch.empty(q.shape)
        prefix = int(plan.prefix[0])
        for kind in kinds:
            attend(
                q.view(torch.uint16).numpy(),
                kind.pages.kv.view(torch.uint16).numpy(),
                kind.pages.score.numpy(),
                kind.block_table.numpy(),
                prefix + kind.rule.capacity,
                prefix,
                kind.head_index.numpy(),
                q.shape[1] // k.shape[1],
                np.float32(scale),
                kind.rule.scores,
                result.numpy(),
            )
        out.copy_(result)

    return decode
