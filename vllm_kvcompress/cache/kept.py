"""Which image tokens a running picture's cache holds at this moment, by head type: for those who look on."""

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from vllm_kvcompress.attention.layer import CACHES
from vllm_kvcompress.attention.pages import HeadType, locate

if TYPE_CHECKING:
    from vllm_kvcompress.cache.store import CompressedCache


class KeptTokens(NamedTuple):
    """What the heads of one type hold of a picture.

    Parameters
    ----------
    name : str
        The rule's (`HeadRule.name`).
    heads : int
        Cache heads of this type, on this rank.
    counts : list of int
        [image tokens]: how many of the heads hold the token; 0 for those not drawn yet.
    """

    name: str
    heads: int
    counts: list[int]


class _Row(NamedTuple):
    """Where a runner has a request: what is written, and its blocks by KV-cache group."""

    written: int
    tables: list[Tensor]


def kept_tokens(
    runner: Any, request_id: str, prefix: int, size: int = 0
) -> tuple[int, list[KeptTokens]] | None:
    """What the cache holds of a picture, after the step that ran last.

    Reads the pages back from the device: a call costs some milliseconds, between two steps.

    Parameters
    ----------
    runner : GPUModelRunner
        vLLM's, V1 or V2.
    request_id : str
        The front end's; the engine adds eight random characters (vllm/v1/engine/input_processor.py).
    prefix : int
        Tokens before its first image token.
    size : int
        Which of the model's sizes it has.

    Returns
    -------
    (int, list of KeptTokens) or None
        Image tokens written, and what is held of them by head type; None where the request is not running, is
        still at its prompt, or has no compressed cache.
    """
    context = runner.vllm_config.compilation_config.static_forward_context
    row = _find(runner, request_id)
    if row is None or CACHES[0] not in context:
        return None
    store: CompressedCache = context[CACHES[0]].store
    groups = [group.layer_names[0] for group in runner.kv_cache_config.kv_cache_groups]
    found = []
    for name, table in zip(groups, row.tables, strict=True):
        kind = store.whole(context[name].kind).of(size)
        drawn = min(row.written - prefix, kind.rule.image)
        if drawn < 1:
            return None
        counts = held_by(kind, table.to(kind.head_index.device), prefix, drawn)
        found.append((context[name].kind, KeptTokens(kind.rule.name, len(kind.head_index), counts.tolist())))
    return drawn, [kept for _, kept in sorted(found)]


def held_by(kind: HeadType, table: Tensor, prefix: int, drawn: int) -> Tensor:
    """How many heads of a type hold each image token.

    Parameters
    ----------
    kind : HeadType
        Pages of all layers; its own block table is not read.
    table : Tensor
        [max_blocks] integer: the request's blocks.
    prefix, drawn : int
        Prompt tokens, and image tokens written.

    Returns
    -------
    Tensor
        [image] int64.
    """
    rule, heads = kind.rule, len(kind.head_index)
    counts = torch.zeros(rule.image, dtype=torch.int64)
    if not rule.scores:
        counts[rule.held(drawn)] = heads
        return counts
    slots = torch.arange(rule.resident(drawn), device=table.device)
    block, place = locate(table[None], prefix + slots[None], kind.pages.page)
    tokens = kind.pages.token[block[0], :, place[0]].flatten().long().cpu()
    return counts.index_add_(0, tokens, torch.ones_like(tokens))


def _find(runner: Any, request_id: str) -> _Row | None:
    states = getattr(runner, "req_states", None)  # V2's
    rows: dict[str, int] = (runner.input_batch if states is None else states).req_id_to_index
    row = next((row for name, row in rows.items() if request_id in (name, name.rpartition("-")[0])), None)
    if row is None:
        return None
    if states is not None:
        tables = [table.gpu[row] for table in runner.block_tables.block_tables]
        return _Row(int(states.num_computed_tokens.gpu[row]), tables)
    batch = runner.input_batch
    tables = [
        torch.from_numpy(batch.block_table[group].get_numpy_array()[row])
        for group in range(len(runner.kv_cache_config.kv_cache_groups))
    ]
    # The last known token has been sampled, and is written by the step that it enters.
    return _Row(int(batch.num_tokens_no_spec[row]) - 1, tables)
