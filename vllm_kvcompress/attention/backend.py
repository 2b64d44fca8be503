"""The backend that vLLM's runners see, and the plan of a step.

The plan is arithmetic on (prefix, length, block table); nothing about a request is kept here. The
prefix comes from the request rows rather than from ``CommonAttentionMetadata.rswa_prefix_lens``, which
is the prompt's length: a prompt that is continued or scored ends in image tokens (decision 6).
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_layout import KVCacheLayout

from vllm_kvcompress.attention import kernels
from vllm_kvcompress.attention.layer import CACHES
from vllm_kvcompress.attention.pages import Plan
from vllm_kvcompress.attention.prefill_plan import PrefillPlan
from vllm_kvcompress.attention.window import FixedPlan, WindowPlan
from vllm_kvcompress.config import parse_config
from vllm_kvcompress.rows import request_rows
from vllm_kvcompress.windows.settings import longest, most_rows, window_config


@dataclass
class StepPlan:
    """One step of one head type. Rows are requests in batch order.

    Parameters
    ----------
    query_start_loc : Tensor
        ``[rows + 1]`` int32.
    block_table : Tensor
        ``[rows, max_blocks]`` int32, this head type's.
    decode_rows, decode_tokens : Tensor or None
        ``[n]`` rows with a single token, and where that token is; None if every row is one.
    decode : Plan
        The single-token rows.
    prefill : PrefillPlan or None
        The rows with several tokens: prompts, chunks, replays.
    window : WindowPlan or None
        The rows with drafts.
    """

    query_start_loc: Tensor
    block_table: Tensor
    decode_rows: Tensor | None
    decode_tokens: Tensor | None
    decode: Plan
    prefill: PrefillPlan | None = None
    window: WindowPlan | None = None


class StepPlanner(AttentionMetadataBuilder[StepPlan]):
    """Builds a ``StepPlan``; the other head types' share all but the block table.

    In a decode step the plan is made of tensors that keep their addresses from step to step (vLLM's
    lengths, block tables and query starts, and the rows' prefixes), so a full CUDA graph can hold the step.
    A row that only fills up a captured batch has length 0: it writes nowhere.
    """

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        """Full graphs of decode steps where no kernel of such a step looks at the host.

        With windows they are of steps in which every row has a whole one.
        """
        config = parse_config(vllm_config.additional_config)
        used = kernels.choose(config.kernels, vllm_config.device_config.device_type)
        if used != "triton" or config.policy.refinements["stratify"]:  # chosen in torch, on the host
            return AttentionCGSupport.NEVER
        if vllm_config.diffusion_config is not None:
            return AttentionCGSupport.UNIFORM_BATCH
        return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: Any) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.rows = request_rows(vllm_config)
        self._kind = CACHES.index(layer_names[0])
        support, config = self.get_cudagraph_support(vllm_config, kv_cache_spec), window_config(vllm_config)
        self._places = longest(config) if support is AttentionCGSupport.UNIFORM_BATCH else 0
        self._window_rows = most_rows(config, vllm_config)

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> StepPlan:
        """As `build`; a batch of several tokens a row is one of windows, which has no requests yet."""
        m = common_attn_metadata
        if m.max_query_len > 1 and m.max_query_len == self._places:
            return self._fixed(m)
        return self.build(0, m)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> StepPlan:
        m = common_attn_metadata
        if self._places and set(self.rows.places or ()) == {self._places}:
            return self._fixed(m)
        self.rows.fixed = {}
        every = self._every(m)
        begins, size = every.begins, every.size
        table = m.block_table_tensor[: m.num_reqs]
        if m.max_query_len == 1:
            return StepPlan(m.query_start_loc, table, None, None, every)
        starts = m.query_start_loc_cpu[: m.num_reqs + 1]
        ends = starts.tolist()
        shared = self.rows.shared_plan
        if shared is not None and shared[0] == ends:
            return replace(shared[1], block_table=table)
        counts = starts.diff()
        single = torch.nonzero(counts == 1).flatten()
        known = m.seq_lens_cpu_upper_bound  # exact but for rows with drafts
        if known is None:
            known = m.seq_lens.cpu()
        prefixes = [self.rows.prefix_of(row) for row in range(m.num_reqs)]
        many = (counts > 1).tolist()
        window = self._window(ends, every)
        drafted = set(window.rows) if window else set()
        lengths = [
            int(known[row]) if several and row not in drafted else 0 for row, several in enumerate(many)
        ]
        rows = async_tensor_h2d(single, device=table.device)
        tokens = async_tensor_h2d(starts[single].long(), device=table.device)
        plan = every.of(rows)
        firsts = None if begins is None else [self.rows.begins_of(row) for row in range(m.num_reqs)]
        sizes = None if size is None else [self.rows.size_of(row) for row in range(m.num_reqs)]
        prompts = PrefillPlan.of(ends, prefixes, lengths, table.device, firsts, sizes)
        made = StepPlan(m.query_start_loc, table, rows, tokens, plan, prompts, window)
        self.rows.shared_plan = ends, made
        return made

    def _every(self, m: CommonAttentionMetadata) -> Plan:
        """All rows of the step."""
        mine = slice(m.num_reqs)
        begins, size = (None if x is None else x[mine] for x in (self.rows.begins, self.rows.size))
        return Plan(self.rows.prefix[mine], m.seq_lens[mine].to(torch.int32), begins, size)

    def _fixed(self, m: CommonAttentionMetadata) -> StepPlan:
        """Of a step in which every row has a whole window: tensors that keep their addresses alone.

        Rows beyond those that may have windows are captured, since vLLM captures them, but never drawn.
        """
        table, shared = m.block_table_tensor[: m.num_reqs], self.rows.shared_plan
        if shared is not None and shared[0] == self._places:
            made = replace(shared[1], block_table=table)
        else:
            every, mine = self._every(m), slice(min(m.num_reqs, self._window_rows))
            starts = m.query_start_loc[: m.num_reqs + 1]
            counts, lengths = self.rows.window_counts[mine], self.rows.window_lengths[mine]
            torch.sub(starts[1:][mine], starts[:-1][mine], out=counts)
            lengths.copy_(torch.where(counts > 0, every.length[mine] - counts + 1, 0))
            rows = replace(every.of(mine), length=lengths)
            window = FixedPlan.of(self._places, starts[:-1][mine], counts, rows)
            none, nobody = self.rows.token_rows[:0], every.of(slice(0))
            made = StepPlan(m.query_start_loc, table, none, none, nobody, None, window)
            self.rows.shared_plan = self._places, made
        self.rows.fixed[self._kind] = made
        return made

    def _window(self, starts: list[int], every: Plan) -> WindowPlan | None:
        """The rows whose places after the first are drafts; ``every`` has all rows."""
        counts = self.rows.places
        if counts is None:
            return None
        rows = [row for row, count in enumerate(counts) if count > 1]
        device = every.prefix.device
        mine = every.of(async_tensor_h2d(rows, device=device))
        drafts = async_tensor_h2d([counts[row] - 1 for row in rows], device=device, dtype=torch.int32)
        return WindowPlan(
            rows,
            [starts[row] for row in rows],
            [counts[row] for row in rows],
            mine.prefix,
            mine.length - drafts,
            mine.begins,
            mine.size,
        )


class KVCompressBackend(AttentionBackend):
    """``--attention-backend kvcompress``. The cache layers name it themselves."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]

    @staticmethod
    def get_name() -> str:
        return "KVCOMPRESS"

    @staticmethod
    def get_impl_cls() -> Any:
        raise RuntimeError("kvcompress has no per-layer implementation: it serves image models only")

    @staticmethod
    def get_builder_cls() -> type[StepPlanner]:
        return StepPlanner

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        # A block holds all heads of its type: one contiguous page, side state at its end.
        return (KVCacheLayout.BLHNC,)
