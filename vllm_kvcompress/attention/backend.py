"""The backend that vLLM's runners see, and the plan of a step.

The plan is arithmetic on (prefix, length, block table); nothing about a request is kept here. The
prefix comes from the request rows rather than from ``CommonAttentionMetadata.rswa_prefix_lens``, which
is the prompt's length: a prompt that is continued or scored ends in image tokens (decision 6).
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_layout import KVCacheLayout

from vllm_kvcompress.attention.pages import Plan
from vllm_kvcompress.guidance import request_rows


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
    others : list of (row, first, last)
        Rows with several tokens (prompts, chunks, replays) and their token range.
    prefix, length : Tensor
        ``[rows]`` int32.
    """

    query_start_loc: Tensor
    block_table: Tensor
    decode_rows: Tensor | None
    decode_tokens: Tensor | None
    decode: Plan
    others: list[tuple[int, int, int]]
    prefix: Tensor
    length: Tensor


class StepPlanner(AttentionMetadataBuilder[StepPlan]):
    """Builds a ``StepPlan``; the second head type's shares all but the block table."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.NEVER

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: Any) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.rows = request_rows(vllm_config)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> StepPlan:
        m = common_attn_metadata
        prefix, length = self.rows.prefix[: m.num_reqs], m.seq_lens[: m.num_reqs].to(torch.int32)
        table = m.block_table_tensor[: m.num_reqs]
        if m.max_query_len == 1:
            return StepPlan(m.query_start_loc, table, None, None, Plan(prefix, length), [], prefix, length)
        starts = m.query_start_loc_cpu[: m.num_reqs + 1]
        lengths = starts.diff()
        single = torch.nonzero(lengths == 1).flatten()
        many = torch.nonzero(lengths > 1).flatten().tolist()
        return StepPlan(
            m.query_start_loc,
            table,
            single.to(table.device),
            starts[single].long().to(table.device),
            Plan(prefix[single].contiguous(), length[single].contiguous()),
            [(row, int(starts[row]), int(starts[row + 1])) for row in many],
            prefix,
            length,
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
