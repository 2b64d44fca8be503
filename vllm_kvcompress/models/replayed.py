"""Requests that no engine has: what a model must know of prompts that it is fed outside an engine's steps.

Only a model whose guidance branches may be of unlike length has to know anything.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vllm_kvcompress.guidance import pack_scale
from vllm_kvcompress.heads.replay import Rows
from vllm_kvcompress.rows import GuidanceParams, RequestFacts, RequestRows

if TYPE_CHECKING:
    from vllm_kvcompress.models.branched import BranchedImageModel

AT_ONCE = 512  # tokens whose logits of all ids are held


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


def log_probabilities(model: "BranchedImageModel", hidden: Tensor, rows: Rows, guidance: float) -> Tensor:
    """What the full model foretells of whole pictures.

    Parameters
    ----------
    hidden : Tensor
        ``[rows * steps, 2 * hidden + 2]``: what the model's forward gives for them.
    rows : Rows
    guidance : float
        1 is the conditional branch alone.

    Returns
    -------
    Tensor
        ``[rows, drawn tokens, codes]`` float32; ends of lines are not drawn.
    """
    found = [_of_codes(model, some, guidance) for some in hidden[_foretells(model, rows)].split(AT_ONCE)]
    return torch.cat(found).unflatten(0, (len(rows), -1))


def apart(model: "BranchedImageModel", full: Tensor, other: Tensor, rows: Rows, guidance: float) -> Tensor:
    """Kullback-Leibler divergence of what ``other`` foretells from what ``full`` does.

    As of `log_probabilities` of each, without holding them: those of Emu3's picture are a gigabyte.

    Returns
    -------
    Tensor
        ``[rows]`` float64, nats, mean over drawn tokens.
    """
    at = _foretells(model, rows)
    found = []
    for one, two in zip(full[at].split(AT_ONCE), other[at].split(AT_ONCE), strict=True):
        found.append(divergence(_of_codes(model, one, guidance), _of_codes(model, two, guidance)))
    return torch.cat(found).double().unflatten(0, (len(rows), -1)).mean(1)


def divergence(full: Tensor, other: Tensor) -> Tensor:
    """KL(full || other) of log probabilities ``[..., codes]`` float32: ``[...]``."""
    return (full.exp() * (full - other)).sum(-1)


def _foretells(model: "BranchedImageModel", rows: Rows) -> Tensor:
    """``[rows * steps]`` bool: whose logits foretell a code of the picture."""
    # The token at position p is foretold at p - 1.
    token = torch.arange(rows.steps, device=rows.prefix.device) - rows.prefix[:, None]
    return (rows.drawn() & ~model.image.ends(token)).roll(-1, 1).flatten()


def _of_codes(model: "BranchedImageModel", hidden: Tensor, guidance: float) -> Tensor:
    """``[n, 2 * hidden + 2]`` -> ``[n, codes]`` float32 log probabilities."""
    branches, image = hidden[:, :-2], model.image
    column = torch.full((len(branches),), guidance, device=branches.device)
    logits = model.compute_logits(torch.cat([branches, pack_scale(column, branches.dtype)], -1))
    return logits[:, image.first_code : image.first_code + image.codes].float().log_softmax(-1)
