"""Classifier-free guidance inside the model: the unconditional branch's ids, and the blend.

A row's two branches (conditional, unconditional) live next to each other inside the model, so the scheduler
needs no pairing and a branch can't be lost.
"""

import torch
from torch import Tensor

from vllm_kvcompress.models.config import ImageModel
from vllm_kvcompress.rows import RequestRows

TEXT_ROW = -1.0  # stands for the guidance scale in rows whose next token is text
LINE_END = -2.0  # and in rows whose next token is the end of a line, whatever the model would say


def unconditional_ids(input_ids: Tensor, positions: Tensor, model: ImageModel) -> Tensor:
    """Token ids of the unconditional branch.

    Every text id becomes the pad id, except the first token and begin-of-image; image tokens are
    shared by the branches (deepseek-ai/Janus generation_inference.py:70-73). A class becomes the null class
    (LlamaGen, autoregressive/models/generate.py). A model that aligns its branches has no such prompt: the
    branches are alike unless the request has a negative one.

    Parameters
    ----------
    input_ids, positions : Tensor
        ``[tokens]``, the conditional branch's ids and their positions.

    Returns
    -------
    Tensor
        ``[tokens]`` of input_ids' dtype.
    """
    if model.aligns:
        return input_ids  # who is guided has a negative prompt: `splice_negatives`
    kept = model.is_drawn(input_ids)
    if not model.classes:
        kept |= (positions == 0) | (input_ids == model.boi)
    return torch.where(kept, input_ids, model.pad)


def splice_negatives(
    uncond: Tensor, input_ids: Tensor, positions: Tensor, token_rows: Tensor, rows: RequestRows
) -> Tensor:
    """Put the users' own unconditional prompts into the rows that have one; nothing is read on the host.

    Parameters
    ----------
    uncond, input_ids, positions, token_rows : Tensor
        ``[tokens]``: the branch so far, the conditional ids, positions, and each token's batch row.
    rows : RequestRows
        Flushed.

    Returns
    -------
    Tensor
        ``[tokens]``, a new tensor.
    """
    mine = (positions < rows.negative_length[token_rows]) & ~rows.model.is_drawn(input_ids)
    own = rows.negative[token_rows, positions.clamp(max=rows.negative.shape[1] - 1)]
    return torch.where(mine, own.to(uncond.dtype), uncond)


def blend(cond: Tensor, uncond: Tensor, scale: Tensor) -> Tensor:
    """``u + w * (c - u)`` in float32.

    Guidance amplifies rounding up to 2w-1 times, hence float32; at w = 1 the conditional branch comes
    back exactly as it is.

    Parameters
    ----------
    cond, uncond : Tensor
        ``[rows, vocab]`` logits, any float dtype.
    scale : Tensor
        ``[rows]`` float32.

    Returns
    -------
    Tensor
        ``[rows, vocab]`` float32.
    """
    cond, uncond, scale = cond.float(), uncond.float(), scale[:, None]
    return torch.where(scale == 1.0, cond, uncond + scale * (cond - uncond))


def with_line_ends(logits: Tensor, ends: Tensor) -> Tensor:
    """Logits of codes, then of the end of a line: certain where it is due, impossible elsewhere.

    Parameters
    ----------
    logits : Tensor
        ``[rows, codes]`` float32.
    ends : Tensor
        ``[rows]`` bool: where a line's end is due.

    Returns
    -------
    Tensor
        ``[rows, codes + 1]`` float32.
    """
    last = torch.where(ends, 0.0, -torch.inf).to(logits.dtype)
    return torch.cat([logits.masked_fill(ends[:, None], -torch.inf), last[:, None]], -1)


def pack_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``[rows]`` float32 -> ``[rows, 2]`` columns of a narrower dtype that ride along with hidden rows.

    Two columns, value and remainder: a bfloat16 alone would turn 3.7 into 3.703.
    """
    head = scale.to(dtype)
    return torch.stack([head, (scale - head.float()).to(dtype)], dim=-1)


def unpack_scale(columns: Tensor) -> Tensor:
    """The inverse of ``pack_scale``: ``[rows, 2]`` -> ``[rows]`` float32."""
    return columns.float().sum(-1)
