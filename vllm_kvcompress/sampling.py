"""Sampling from the image ids alone, on both model runners.

A picture's next token is one of 16,384 codes, of a vocabulary of 118,784 ids. Where no row of a batch can
want a text id, and none has settings that name ids, `compute_logits` gives the codes' logits only, and
what vLLM's samplers make of them is moved up to the ids. Otherwise logits are as wide as the vocabulary, and
rows that draw are still sampled from the codes alone: the same seed draws the same picture in any company.
"""

import functools
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vllm_kvcompress.windows import v1 as window_v1
from vllm_kvcompress.windows.noise import position_generator

if TYPE_CHECKING:
    from vllm import SamplingParams

    from vllm_kvcompress.rows import RequestRows

_MARK = "_kvcompress_rows"


def names_ids(params: "SamplingParams | None") -> bool:
    """Whether a request's settings are about ids of the whole vocabulary, or all of it is to be reported."""
    if params is None:
        return False
    return bool(
        params.logit_bias
        or params.allowed_token_ids
        or params.bad_words
        or params.frequency_penalty
        or params.presence_penalty
        or params.repetition_penalty != 1.0
        or params.min_tokens
        or params.prompt_logprobs is not None
        or params.logprobs == -1
        or params.logprob_token_ids
    )


def mark(logits: Tensor, rows: "RequestRows") -> Tensor:
    """The same tensor, which now says whose rows it holds."""
    setattr(logits, _MARK, rows)
    return logits


def is_narrow(logits: Tensor, rows: "RequestRows") -> bool:
    """Whether the logits are of image tokens alone, not of all ids."""
    return logits.shape[-1] == rows.model.choices


def move_up(output: Any, rows: "RequestRows") -> Any:
    """A sampler's output over image tokens, in place, as ids; either runner's."""
    drawn = [output.sampled_token_ids]
    if output.logprobs_tensors is not None:
        drawn.append(output.logprobs_tensors.logprob_token_ids)
    for numbers in drawn:
        numbers.copy_(rows.model.ids(numbers))
    return output


def patch_v1() -> None:
    """Make the V1 runner's sampler take marked logits; others pass as they are.

    The V1 runner has no place for a model's own sampler (the V2 runner has: ``requests_v2.ImageSampler``).
    """
    from vllm.v1.sample.sampler import Sampler

    if getattr(Sampler.forward, _MARK, False):
        return
    forward: Any = Sampler.forward
    sample: Any = Sampler.sample

    @functools.wraps(forward)
    def forward_marked(self: Any, logits: Tensor, sampling_metadata: Any, *args: Any, **kwargs: Any) -> Any:
        rows = getattr(logits, _MARK, None)
        if rows is None:
            return forward(self, logits, sampling_metadata, *args, **kwargs)
        window = rows.take_window()
        one_each = logits if window is None else logits[window.starts]
        setattr(self, _MARK, rows)
        try:
            output = forward(self, one_each, sampling_metadata, *args, **kwargs)
        finally:
            delattr(self, _MARK)
        if is_narrow(logits, rows):
            output = move_up(output, rows)
        if window is not None:
            window_v1.settle(output, window, rows, logits, sampling_metadata, functools.partial(sample, self))
        return output

    @functools.wraps(sample)
    def sample_marked(self: Any, logits: Tensor, sampling_metadata: Any, *args: Any, **kwargs: Any) -> Any:
        rows, whole = getattr(self, _MARK, None), sampling_metadata
        if rows is None:
            return sample(self, logits, whole, *args, **kwargs)
        codes, text = rows.model.codes, rows.text_rows
        top_k = None if whole.top_k is None else whole.top_k.clamp(max=codes)
        noise = {
            row: position_generator(drawing.seed, drawing.known, logits.device)
            for row, drawing in rows.drawings.items()
            if row < len(logits)
        }
        image = replace(whole, top_k=top_k, generators=noise)
        if is_narrow(logits, rows):
            return sample(self, logits, image, *args, **kwargs)
        # Sampling works in place, hence the copy; each generator is used once.
        code, _ = sample(self, rows.model.among(logits).clone(), image, *args, **kwargs)
        writing = {row: made for row, made in whole.generators.items() if row in text}
        sampled, logprobs = sample(self, logits, replace(whole, generators=writing), *args, **kwargs)
        return torch.where(rows.is_text[: len(code)], sampled, rows.model.ids(code)), logprobs

    setattr(forward_marked, _MARK, True)
    Sampler.forward = forward_marked  # type: ignore[method-assign]
    Sampler.sample = sample_marked  # type: ignore[method-assign]
