"""Steps with drafts on a compressed cache: what lies between their attention and their commit."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.utils.torch_utils import async_tensor_h2d

from vllm_kvcompress.attention.backend import StepPlan
from vllm_kvcompress.attention.kernels import Kernels
from vllm_kvcompress.attention.pages import HeadType, Plan
from vllm_kvcompress.attention.window import FixedPlan, WindowPlan
from vllm_kvcompress.rows import RequestRows, request_rows
from vllm_kvcompress.windows.settings import longest, most_rows, window_config

if TYPE_CHECKING:
    from vllm.config import VllmConfig

Plans = Mapping[int, StepPlan]  # by head type


class WindowSteps:
    """`window.verify` of every layer, then, when it is known what stands, `window.commit`.

    A step whose rows all have a whole window may be in a CUDA graph, which runs no Python of the model. So
    what it leaves lies in memory that graphs of all sizes share, one running at a time, and its plans are
    those that the planner has put with the rows.

    Parameters
    ----------
    layers : mapping
        By head type, its part of every layer; filled when the pages are bound.
    whole : mapping
        By head type, its pages of all layers.
    """

    def __init__(
        self, vllm_config: "VllmConfig", layers: Mapping[int, list[HeadType]], whole: Mapping[int, HeadType]
    ) -> None:
        self._vllm_config, self._layers, self._whole = vllm_config, layers, whole
        self._window: WindowPlan | None = None
        self._tables: dict[int, Tensor] = {}  # block tables of the rows with drafts
        self._held: list[Any] = []  # what attention has left, by layer
        self._rooms: dict[int, Any] = {}  # where it is left in steps that a graph may hold

    def begin(self, plans: Plans) -> None:
        """A step's plans, before its first layer."""
        window = next(iter(plans.values())).window if plans else None
        self._window = window
        self._tables = {} if window is None else _tables_of(plans, window)

    def forget(self) -> None:
        """Let go of everything that lies in the pages or beside them."""
        self.begin({})
        self._held = []
        self._rooms.clear()

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, layer: int, kernels: Kernels, scale: float, out: Tensor,
        compiled: bool,
    ) -> None:  # fmt: skip
        """The rows with drafts, in one layer; arguments as `CompressedCache.attend`.

        ``compiled``: whether the model is, which gives the memory of k and v to what comes next.
        """
        window, mine = self._window, self.with_tables(layer, self._tables)
        assert window is not None
        if isinstance(window, FixedPlan):
            some, room = slice(window.tokens), self._room(layer, mine, k, q.shape[1] // k.shape[1], kernels)
            kernels.verify(q[some], k[some], v[some], mine, window, scale, out[some], room)
            return
        if layer == 0:
            self._held = []
        if compiled:
            k, v = k.clone(), v.clone()
        self._held.append(kernels.verify(q, k, v, mine, window, scale, out))

    def commit(self, standing: Sequence[int] | Tensor, kernels: Kernels) -> None:
        """Keep what stands, and choose victims where that ends a line.

        ``standing`` says how many tokens, for every row of the batch.
        """
        rows: RequestRows = request_rows(self._vllm_config)
        if rows.fixed:
            assert isinstance(standing, Tensor)
            self._commit_fixed(standing, rows.fixed, kernels)
            return
        window = self._window
        if window is None or not self._held:
            return
        if isinstance(standing, Tensor):
            kept = standing[async_tensor_h2d(window.rows, device=standing.device)].to(torch.int32)
        else:
            kept = torch.tensor([standing[row] for row in window.rows], dtype=torch.int32)
        kernels.commit(self._held, kept)
        self._held = []
        self._choose(window, window.length + kept - 1, self._tables, kernels)

    def _commit_fixed(self, standing: Tensor, plans: Plans, kernels: Kernels) -> None:
        window = next(iter(plans.values())).window
        assert isinstance(window, FixedPlan)
        assert kernels.held is not None
        # Rows that only fill up a captured batch come last.
        kept = torch.zeros(len(window.rows), dtype=torch.int32, device=standing.device)
        kept[: len(standing)] = standing.to(torch.int32)
        tables = _tables_of(plans, window)
        held = [
            kernels.held(self.with_tables(layer, tables), window, room)
            for layer, room in sorted(self._rooms.items())
        ]
        kernels.commit(held, kept)
        self._choose(window, torch.where(kept > 0, window.length + kept - 1, 0), tables, kernels)

    def _choose(self, window: WindowPlan, ends: Tensor, tables: dict[int, Tensor], kernels: Kernels) -> None:
        every = [replace(self._whole[kind], block_table=table) for kind, table in tables.items()]
        kernels.select_all(every, Plan(window.prefix, ends, None, window.size))

    def _room(self, layer: int, mine: list[HeadType], k: Tensor, group: int, kernels: Kernels) -> Any:
        if layer not in self._rooms:
            config = window_config(self._vllm_config)
            assert kernels.room is not None
            rows = most_rows(config, self._vllm_config)
            self._rooms[layer] = kernels.room(mine, k, group, rows, longest(config))
        return self._rooms[layer]

    def with_tables(self, layer: int, tables: Mapping[int, Tensor]) -> list[HeadType]:
        """A layer's head types, with these block tables by type."""
        return [
            replace(t, block_table=table)
            for kind, table in tables.items()
            if len((t := self._layers[kind][layer]).head_index)
        ]


def _tables_of(plans: Plans, window: WindowPlan) -> dict[int, Tensor]:
    """The window's rows of each head type's block table; those that a graph reads stay where they are."""
    rows: Any = slice(len(window.rows)) if isinstance(window, FixedPlan) else window.rows
    return {kind: plan.block_table[rows] for kind, plan in plans.items()}
