"""Requests that no engine has: what a model must know of prompts that it is fed outside an engine's steps.

Only a model whose guidance branches may be of unlike length has to know anything.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vllm_kvcompress.rows import GuidanceParams, RequestFacts, RequestRows

if TYPE_CHECKING:
    from vllm_kvcompress.models.branched import BranchedImageModel


@contextmanager
def replaying(model: "BranchedImageModel", prompts: Sequence[Sequence[int]]) -> Iterator[Tensor | None]:
    """A context in which the model's rows are requests with these prompts and the model's own guidance.

    Parameters
    ----------
    prompts : sequence of token ids
        At least as long as the model's own negative one.

    Yields
    ------
    Tensor or None
        ``[rows, 2]`` int64, where the branches of each begin; None where they always begin together.
    """
    image = model.image
    if not image.aligns:
        yield None
        return
    rows = RequestRows(len(prompts), image, max(map(len, prompts)))
    rows.to(next(model.parameters()).device)
    rows.narrow_allowed, rows.replays = False, True
    facts = {}
    for row, ids in enumerate(prompts):
        guidance = GuidanceParams(image.guidance_scale, tuple(image.aligned(image.negative, len(ids))))
        begins = image.padding(ids), len(ids) - len(image.negative)
        facts[row] = RequestFacts(guidance, len(ids), begins=begins)
    rows.replace(facts)
    before, model.rows = model.rows, rows
    try:
        assert rows.begins is not None
        yield rows.begins.long()
    finally:
        model.rows = before


def place(model: "BranchedImageModel", tokens: int) -> None:
    """So many tokens come now: as many of each row, one row after another."""
    rows = model.rows
    if rows.replays:
        each = torch.arange(len(rows.scale), device=rows.scale.device)
        rows.token_rows = each.repeat_interleave(tokens // len(each))
