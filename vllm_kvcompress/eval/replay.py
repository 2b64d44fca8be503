"""Teacher-forced replay of known pictures under any policy: docs/design.md, "The method", point 10.

A replay takes the place of the engine's cache for one forward pass of whole rows (prompt and picture).
`PagedReplay` takes a layer's tokens one by one through the kernels that serve, on scratch pages of that
layer alone. `vllm_kvcompress.heads.dense` has another, which masks a full cache.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vllm_kvcompress.attention.kernels import Kernels
from vllm_kvcompress.attention.pages import BRANCHES, HeadType, Plan, locate, page_bytes, pages_from_bytes
from vllm_kvcompress.cache.layout import CacheLayout
from vllm_kvcompress.heads.replay import FullReplay, Layered, Rows

PAGE = 16


@dataclass
class Replay:
    """A `Recorder`: attention by ``method``, and how far it is from the full one.

    ``error`` and ``norm``, ``[layers, 2 * Hkv]`` float64, sum over rows and image queries the squared
    difference of a KV head's outputs to full attention on the same q, k and v, and the latter's square.
    """

    rows: Rows
    method: Layered
    layers: int
    heads: int
    error: Tensor = field(init=False)
    norm: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.error = torch.zeros(self.layers, self.heads, dtype=torch.float64)
        self.norm = torch.zeros_like(self.error)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int, scale: float) -> Tensor:
        """``[rows * steps, heads, D]`` in, the same out."""
        shape = (len(self.rows), self.rows.steps)
        q, k, v = (x.unflatten(0, shape) for x in (q, k, v))
        out = self.method.layer(q, k, v, layer, scale)
        full = FullReplay(self.rows.begins).layer(q, k, v, layer, scale)
        drawn = self.rows.drawn()
        got, want = (x[drawn].float().unflatten(1, (self.heads, -1)) for x in (out, full))
        self.error[layer] += (got - want).square().sum((0, 2, 3)).double().cpu()
        self.norm[layer] += want.square().sum((0, 2, 3)).double().cpu()
        return out.flatten(0, 1)

    @property
    def relative(self) -> Tensor:
        """``[layers, Hkv]`` relative error of the outputs, both branches together."""
        per_head = [x.unflatten(1, (BRANCHES, -1)).sum(1) for x in (self.error, self.norm)]
        return (per_head[0] / per_head[1].clamp(min=1e-30)).sqrt()


class PagedReplay:
    """The serving kernels, token by token: a compressed server's own numbers.

    Parameters
    ----------
    rows : Rows
    layout : CacheLayout
        Head types and rules, as planned for a server.
    kernels : Kernels
    look : callable, optional
        ``look(kind, line, held)`` after each line of each row and layer: ``held`` ``[heads, slots]`` are
        the image tokens that a layer's heads of this type keep.
    """

    def __init__(
        self, rows: Rows, layout: CacheLayout, kernels: Kernels, look: Callable | None = None
    ) -> None:
        self.rows, self.layout, self.kernels, self.look = rows, layout, kernels, look

    def layer(self, q: Tensor, k: Tensor, v: Tensor, layer: int, scale: float) -> Tensor:
        rows, device = self.rows, q.device
        every = range(len(self.layout.rules))
        types = {kind: held for kind in every if (held := self._scratch(kind, layer, k.dtype, device))}
        q, k, v = (x.transpose(0, 1).contiguous() for x in (q, k, v))  # a step is one slice
        out = torch.zeros_like(q)
        end = rows.prefix + rows.image
        begins = None if rows.begins is None else rows.begins.to(torch.int32)
        for step in range(rows.steps):
            length = torch.where(step < end, step + 1, 0).to(torch.int32)
            plan = Plan(rows.prefix, length, begins)
            self.kernels.decode(q[step], k[step], v[step], list(types.values()), plan, scale, out[step])
            self.kernels.select_all(list(types.values()), plan)
            if self.look is not None:
                for kind, held in types.items():
                    self._show(kind, held, length)
        return out.transpose(0, 1)

    def _scratch(self, kind: int, layer: int, dtype: torch.dtype, device: torch.device) -> HeadType | None:
        """Fresh pages of one layer's heads of one type."""
        layout, rule = self.layout, self.layout.rules[kind]
        index = layout.heads(kind, layer)
        if not index:
            return None
        blocks = -(-(int(self.rows.prefix.max()) + rule.capacity) // PAGE)
        size = -(-page_bytes(len(index), PAGE, layout.head_size, dtype, rule.scores) // 64) * 64
        raw = torch.zeros(len(self.rows) * blocks, size, dtype=torch.int8, device=device)
        pages = pages_from_bytes(raw, len(index), PAGE, layout.head_size, dtype, rule.scores)
        table = torch.arange(len(raw), dtype=torch.int32, device=device).view(-1, blocks)
        return HeadType(pages, rule, torch.tensor(index, dtype=torch.int32, device=device), table)

    def _show(self, kind: int, held: HeadType, length: Tensor) -> None:
        assert self.look is not None
        for row, (prefix, n) in enumerate(zip(self.rows.prefix.tolist(), length.tolist(), strict=True)):
            drawn = n - prefix
            if drawn > 0 and not drawn % held.rule.line:
                slots = torch.arange(held.rule.resident(drawn), device=length.device)
                if held.rule.scores:
                    at = prefix + slots[None]
                    block, place = (x[0] for x in locate(held.block_table[row : row + 1], at, PAGE))
                    tokens = held.pages.token[block, :, place].T
                else:
                    tokens = torch.tensor(held.rule.held(drawn)).expand(len(held.head_index), -1)
                self.look(kind, drawn // held.rule.line - 1, tokens)
