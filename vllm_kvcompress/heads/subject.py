"""What calibration and trials ask of a model, whatever it is."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_kvcompress.attention.recorder import Recorder
from vllm_kvcompress.heads.replay import Rows
from vllm_kvcompress.policy import Raster

Progress = Callable[[int, int], None]
"""Called with (steps done, steps in all)."""


@dataclass
class Subject:
    """What calibration and trials ask of a loaded model, whose cache they leave alone.

    Parameters
    ----------
    layers, kv_heads, head_size : int
        KV heads of one branch on this rank.
    raster : Raster
    dtype, device
        Of its activations.
    step : callable
        ``(ids [n], positions [n]) -> logits [n, vocab]`` of one token a row.
    forward : callable
        ``(ids [n], positions [n]) -> [n, ...]``: what the model makes of any number of tokens.
    apart : callable
        ``(full, other, rows) -> [rows]`` float64: the divergence of what two such foretell of whole pictures,
        nats a drawn token, at the model's own guidance.
    recording : callable
        A context in which a `Recorder` does the attention, and, where it is one that `SeesResidual`, sees the
        stream after each.
    output_weight : callable
        layer -> ``[hidden, query heads * head_size]``.
    agree : callable
        Drawn ids ``[n]`` -> those of the first rank: all ranks draw the same picture.
    guidance : float
        The model's own scale.
    rows : callable
        A context in which the rows that are fed are those of these prompts, in their order. It gives the
        slots that the branches of each begin at, ``[rows, 2]`` int64, or None where they begin together.
    """

    layers: int
    kv_heads: int
    head_size: int
    raster: Raster
    dtype: torch.dtype
    device: torch.device
    step: Callable[[Tensor, Tensor], Tensor]
    forward: Callable[[Tensor, Tensor], Tensor]
    apart: Callable[[Tensor, Tensor, Rows], Tensor]
    recording: Callable[[Recorder], AbstractContextManager]
    output_weight: Callable[[int], Tensor]
    guidance: float
    agree: Callable[[Tensor], Tensor] = lambda ids: ids
    rows: Callable[[Sequence[Sequence[int]]], AbstractContextManager[Tensor | None]] = lambda prompts: (
        nullcontext(None)
    )
