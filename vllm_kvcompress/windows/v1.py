"""The V1 runner's window step: what stands of the samples at all its places."""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.sample.rejection_sampler import PLACEHOLDER_TOKEN_ID

from vllm_kvcompress.windows.drawing import Window
from vllm_kvcompress.windows.noise import position_generator

if TYPE_CHECKING:
    from vllm_kvcompress.rows import RequestRows

# (logits [n, codes], vLLM's SamplingMetadata) -> (codes [n], log-probabilities)
Sample = Callable[[Tensor, Any], tuple[Tensor, Any]]


def settle(
    output: Any, window: Window, rows: "RequestRows", logits: Tensor, metadata: Any, sample: Sample
) -> None:
    """Sample after the drafts, and let stand what was drafted right.

    Parameters
    ----------
    output : SamplerOutput
        Of each row's first place; ``sampled_token_ids`` becomes ``[rows, longest window]``, filled with -1.
    window : Window
        The step's drafts.
    rows : RequestRows
        In batch order; its ``accept`` is told how many stand in each row.
    logits : Tensor
        ``[places, codes or vocabulary]``, row after row.
    metadata : SamplingMetadata
        The batch's.
    sample : callable
        vLLM's sampler, from filtered and scaled logits on.
    """
    counts, starts = window.counts, window.starts
    later = [(row, nth) for row, count in enumerate(counts) for nth in range(1, count)]
    drawings = rows.drawings
    at = torch.tensor([starts[row] + nth for row, nth in later], device=logits.device)
    of = torch.tensor([row for row, _ in later], device=logits.device)
    noise = {
        n: position_generator(drawings[row].seed, drawings[row].known + nth, logits.device)
        for n, (row, nth) in enumerate(later)
    }
    codes, _ = sample(rows.model.among(logits[at]).float(), _repeated(metadata, of, rows.model.codes, noise))
    ids = iter(rows.model.ids(codes).tolist())
    firsts = output.sampled_token_ids[:, 0].tolist()
    table = torch.full((len(counts), max(counts)), PLACEHOLDER_TOKEN_ID, dtype=torch.int32)
    standing = []
    for row, (count, drafts) in enumerate(zip(counts, window.drafts, strict=True)):
        samples = [firsts[row], *(next(ids) for _ in range(1, count))]
        stands = drawings[row].settle(samples, drafts) if drafts else 1
        table[row, :stands] = torch.tensor(samples[:stands])
        standing.append(stands)
    output.sampled_token_ids = table.to(logits.device)
    if output.logprobs_tensors is not None:
        output.logprobs_tensors = _spread(output.logprobs_tensors, max(counts))
    rows.accept(standing)


def _spread(reported: LogprobsTensors, places: int) -> LogprobsTensors:
    """Log-probabilities of one place a row, as the runner takes them where rows have ``places``.

    Only rows of one place want any; what stands at the other places is not read.
    """

    def spread(x: Tensor) -> Tensor:
        wide = x.new_zeros(len(x), places, *x.shape[1:])
        wide[:, 0] = x
        return wide.flatten(0, 1)

    return LogprobsTensors(
        spread(reported.logprob_token_ids), spread(reported.logprobs), spread(reported.selected_token_ranks)
    )


def _repeated(metadata: Any, of: Tensor, codes: int, noise: dict[int, torch.Generator]) -> Any:
    """The batch's settings for sampling proper, of each later place's row."""

    def take(setting: Tensor | None) -> Tensor | None:
        return None if setting is None else setting[of]

    return replace(
        metadata,
        temperature=take(metadata.temperature),
        top_p=take(metadata.top_p),
        top_k=None if metadata.top_k is None else take(metadata.top_k.clamp(max=codes)),
        generators=noise,
        max_num_logprobs=None,
        # Rows that need a processor have no window.
        logitsprocs=type(metadata.logitsprocs)(),
    )
