"""A step of windows in plain torch: attention of last tokens and drafts, and later the writes that stand.

`verify` writes nothing but outputs; `commit` writes what was drafted right, as drawing one by one would have.
Between the two lies sampling. An abort between them leaves no trace in the pages.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from vllm.utils.torch_utils import async_tensor_h2d

from vllm_kvcompress.attention.line import Line, attend_line
from vllm_kvcompress.attention.pages import HeadType, Plan, begins_of


@dataclass
class WindowPlan:
    """The rows of a step that have drafts.

    Parameters
    ----------
    rows, starts, counts : list of int
        Batch row, where its tokens start, and how many there are: its last token and its drafts. Those past
        the end of its line of the picture can't stand.
    prefix, length : Tensor
        ``[n]`` int32, where the cache is: prompt tokens, and tokens up to and including the window's first.
    begins, size : Tensor, optional
        ``[n, 2]`` and ``[n]`` int32, as in `Plan`.
    """

    rows: list[int]
    starts: list[int]
    counts: list[int]
    prefix: Tensor
    length: Tensor
    begins: Tensor | None = None
    size: Tensor | None = None

    @cached_property
    def on_device(self) -> tuple[Tensor, Tensor]:
        """``starts`` and ``counts``, ``[n]`` int32, where the cache is."""
        starts, counts = async_tensor_h2d(
            [self.starts, self.counts], device=self.prefix.device, dtype=torch.int32
        ).unbind()
        return starts, counts

    @property
    def spans(self) -> list[tuple[int, int, int, int]]:
        """Start, count, prefix and the first token's index in the picture, of each row."""
        first = (self.length - 1 - self.prefix).tolist()
        return list(zip(self.starts, self.counts, self.prefix.tolist(), first, strict=True))


@dataclass
class FixedPlan(WindowPlan):
    """Rows that all have as many places, by tensors that keep their addresses from step to step.

    Parameters
    ----------
    tables : tuple of Tensor
        ``starts`` and ``counts``, ``[n]`` int32 on the device. A row that only fills up a captured batch has
        length and count 0, whatever the lists say.
    """

    tables: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(cls, places: int, starts: Tensor, counts: Tensor, plan: Plan) -> "FixedPlan":
        """``plan`` has the rows; lengths up to and including each window's first token."""
        rows = list(range(len(counts)))
        return cls(
            rows, [row * places for row in rows], [places] * len(rows), plan.prefix, plan.length, plan.begins,
            plan.size, (starts, counts),
        )  # fmt: skip

    @property
    def on_device(self) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """As `WindowPlan.on_device`."""
        assert self.tables is not None
        return self.tables

    @property
    def tokens(self) -> int:
        """Of all rows."""
        return sum(self.counts)


def verify(
    q: Tensor, k: Tensor, v: Tensor, types: Sequence[HeadType], plan: WindowPlan, scale: float, out: Tensor
) -> list[list[Line]]:
    """Attend with the windows of one layer; the pages stay as they are.

    Parameters
    ----------
    q : Tensor
        [tokens, 2 * Hq, D] of the whole step; k and v: [tokens, 2 * Hkv, D].
    types : Sequence[HeadType]
        The layer's head types; their block tables have a row per row of the plan.
    plan : WindowPlan
        Which tokens are whose.
    scale : float
        Factor of q . k before the softmax.
    out : Tensor
        [tokens, 2 * Hq, D], written at the windows' tokens.

    Returns
    -------
    list of list of Line
        What `commit` needs, by row and type.
    """
    q, out = (x.unflatten(1, (-1, q.shape[1] // k.shape[1])) for x in (q, out))
    begins = plan.begins
    sizes = [0] * len(plan.rows) if plan.size is None else plan.size.tolist()
    held: list[list[Line]] = []
    for row, (start, count, prefix, token) in enumerate(plan.spans):
        at = slice(start, start + count)
        held.append([])
        for kind in types:
            mine = kind.of(sizes[row], slice(row, row + 1))
            heads = kind.head_index.long()
            part = q[at, heads], k[at, heads], v[at, heads]
            first = None if begins is None else begins_of(begins[row, None], kind.head_index, k.shape[1])[0]
            line = attend_line(*part, mine, prefix, token, scale, first)
            out[at, heads] = line.out.to(out.dtype)
            held[-1].append(line)
    return held


def commit(layers: Sequence[list[list[Line]]], standing: Sequence[int] | Tensor) -> None:
    """Write what stands, in all layers; where that ends a line, the caller chooses victims.

    Parameters
    ----------
    layers : sequence
        What `verify` has returned, by layer.
    standing : sequence of int, or Tensor
        Tokens that stand in each row of the plan, the last one drawn included.
    """
    counts = [int(count) for count in standing]
    for held in layers:
        for lines, count in zip(held, counts, strict=True):
            for line in lines:
                line.keep(count)
