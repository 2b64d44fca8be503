"""Known pictures fed to a model whole, a few at a time."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_kvcompress.heads import memory
from vllm_kvcompress.heads.replay import Rows
from vllm_kvcompress.heads.subject import Subject

REPLAYED_AT_ONCE = 4


@dataclass(frozen=True)
class Picture:
    """``ids``: a prompt's tokens, ``prefix`` of them, and the whole picture's."""

    prefix: int
    ids: Sequence[int]


@dataclass(frozen=True)
class Fed:
    """Pictures as a model takes them: ``ids`` and ``positions`` ``[rows * steps]``, padded on the right."""

    rows: Rows
    ids: Tensor
    positions: Tensor


def in_batches(subject: Subject, pictures: Sequence[Picture]) -> list[Sequence[Picture]]:
    """The pictures in as few parts as the device's memory lets be, of four at most."""
    hidden, columns = subject.output_weight(0).shape
    row = memory.replaying_bytes(
        hidden, columns // subject.head_size, subject.kv_heads, subject.head_size,
        max(len(one.ids) for one in pictures), subject.raster.width, subject.dtype,
    )  # fmt: skip
    at_once = agreed(subject, memory.rows_at_once(row, subject.device, "measure"))
    return [pictures[part] for part in memory.passes(len(pictures), min(REPLAYED_AT_ONCE, at_once))]


@contextmanager
def feeding(subject: Subject, pictures: Sequence[Picture]) -> Iterator[Fed]:
    """A context in which the model's rows are these pictures."""
    device = subject.device
    steps = max(len(one.ids) for one in pictures)
    ids = [[*one.ids, *[one.ids[0]] * (steps - len(one.ids))] for one in pictures]
    prefix = torch.tensor([one.prefix for one in pictures], dtype=torch.int32, device=device)
    with subject.rows([one.ids[: one.prefix] for one in pictures]) as begins:
        rows = Rows(prefix, subject.raster.tokens, steps, begins)
        positions = torch.arange(steps, device=device).repeat(len(pictures))
        yield Fed(rows, torch.tensor(ids, device=device).flatten(), positions)


def agreed(subject: Subject, number: int) -> int:
    """The first rank's number: all ranks step together."""
    return int(subject.agree(torch.tensor([number], device=subject.device)))
