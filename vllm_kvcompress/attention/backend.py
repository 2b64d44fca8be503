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
from vllm_kvcompress.attention.pages import Plan
from vllm_kvcompress.attention.prefill_plan import PrefillPlan
from vllm_kvcompress.attention.window import WindowPlan
from vllm_kvcompress.config import parse_config
from vllm_kvcompress.rows import request_rows


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
        """Full graphs of decode steps where no kernel of such a step looks at the host."""
        if vllm_config.diffusion_config is not None:  # windows, which are planned on the host
            return AttentionCGSupport.NEVER
        config = parse_config(vllm_config.additional_config)
        used = kernels.choose(config.kernels, vllm_config.device_config.device_type)
        if used == "triton" and not config.policy.refinements["stratify"]:  # chosen in torch, on the host
            return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
        return AttentionCGSupport.NEVER

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: Any) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.rows = request_rows(vllm_config)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> StepPlan:
        m = common_attn_metadata
        prefix, length = self.rows.prefix[: m.num_reqs], m.seq_lens[: m.num_reqs].to(torch.int32)
        begins = None if self.rows.begins is None else self.rows.begins[: m.num_reqs]
        size = None if self.rows.size is None else self.rows.size[: m.num_reqs]
        every = Plan(prefix, length, begins, size)
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
