"""What a step's prefill needs to know of its rows: worked out once for all layers and head types."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from vllm.utils.torch_utils import async_tensor_h2d

from vllm_kvcompress.attention.padding import Padded, alike
from vllm_kvcompress.attention.pages import locate

MOST_SLOTS = 2**14  # that one call gathers, unless a single row has more: 256 MiB of Janus-Pro-1B's K and V


class Row(NamedTuple):
    """A row's tokens in the step, and the prefix and length that they take it to."""

    first: int
    last: int
    prefix: int
    length: int

    @property
    def before(self) -> int:
        """Tokens of the row before this step."""
        return self.length - (self.last - self.first)

    @property
    def prompt(self) -> int:
        """How many of the tokens are the prompt's."""
        return max(0, min(self.last - self.first, self.prefix - self.before))


@dataclass(frozen=True)
class Written:
    """Prompt tokens of all rows, as they go into the pages.

    Parameters
    ----------
    tokens, rows, position : Tensor
        [n] int64: the step's token, its row, and its logical slot.
    """

    tokens: Tensor
    rows: Tensor
    position: Tensor


@dataclass(frozen=True)
class Chunks:
    """Later chunks of prompts, of rows that are alike in chunk and length.

    Parameters
    ----------
    queries : Padded
        The chunks' tokens.
    rows : Tensor
        [rows] int64.
    slot : Tensor
        [rows, slots] int64: logical slots from 0; beyond a row's tokens its last one, which exists.
    mask : Tensor
        [rows, 1, chunk, slots] bool: what each query sees.
    """

    queries: Padded
    rows: Tensor
    slot: Tensor
    mask: Tensor

    @classmethod
    def of(
        cls, numbers: Sequence[int], rows: Sequence[Row], size: tuple[int, ...], device: torch.device
    ) -> "Chunks":
        """Of the rows with these numbers; ``size`` is what their chunks and their slots are padded to."""
        mine = [rows[n] for n in numbers]
        firsts = [row.first for row in mine]
        queries = Padded.of(firsts, [row.prompt for row in mine], size[0], device)
        number, ahead, last = async_tensor_h2d(
            [
                [*numbers],
                [row.before - row.first for row in mine],
                [row.before + row.prompt - 1 for row in mine],
            ],
            device=device,
            dtype=torch.int64,
        )
        slot = torch.arange(size[1], device=device)
        mask = slot <= (queries.at + ahead[:, None])[:, :, None]
        return cls(queries, number, slot.minimum(last[:, None]), mask[:, None])


class Drawn(NamedTuple):
    """A row's image tokens: the row, the step's first and last (exclusive), and where the picture stands."""

    row: int
    first: int
    last: int
    prefix: int
    token: int


@dataclass
class PrefillPlan:
    """The rows of a step that have several tokens.

    Parameters
    ----------
    written : Written or None
        All prompt tokens.
    begun : Tensor
        [n] int64: the tokens of prompts that begin here, one prompt after another.
    begun_counts : list of int
        How many each of them has.
    chunks : list of Chunks
        Prompts' later chunks.
    drawn : list of Drawn
        Replayed image tokens.
    """

    written: Written | None
    begun: Tensor
    begun_counts: list[int]
    chunks: list[Chunks]
    drawn: list[Drawn]
    _located: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)

    @classmethod
    def of(
        cls, starts: Sequence[int], prefixes: Sequence[int], lengths: Sequence[int], device: torch.device
    ) -> "PrefillPlan | None":
        """The plan of rows; None if none has anything to do.

        Parameters
        ----------
        starts : sequence of int
            Where each row's tokens start, and the end of the last.
        prefixes, lengths : sequence of int
            Prompt tokens of each row, and its tokens up to and including these; with 0 it is left out.
        device : torch.device
            Where the cache is.
        """
        spans = zip(pairwise(starts), prefixes, lengths, strict=True)
        rows = [Row(*span, prefix, length) for span, prefix, length in spans]
        live = [n for n, row in enumerate(rows) if row.length]
        if not live:
            return None
        drawn = [
            Drawn(n, row.first + row.prompt, row.last, row.prefix, row.before + row.prompt - row.prefix)
            for n in live
            if (row := rows[n]).prompt < row.last - row.first
        ]
        begun = [n for n in live if rows[n].prompt and not rows[n].before]
        later = [n for n in live if rows[n].prompt and rows[n].before]
        groups = alike((rows[n].prompt, rows[n].before + rows[n].prompt) for n in later)
        chunks = [
            Chunks.of([later[i] for i in part], rows, size, device)
            for size, group in groups.items()
            for part in _parts(group, size[1])
        ]
        tokens = [i for n in begun for i in range(rows[n].first, rows[n].first + rows[n].prompt)]
        return cls(
            _written([*begun, *later], rows, device),
            async_tensor_h2d(tokens, device=device, dtype=torch.int64),
            [rows[n].prompt for n in begun],
            chunks,
            drawn,
        )

    def located(self, number: int, table: Tensor, page: int) -> tuple[Tensor, Tensor]:
        """Page and place of the slots of ``chunks[number]``, [rows, slots]; kept for the other layers."""
        key = number, id(table)
        if key not in self._located:
            chunk = self.chunks[number]
            self._located[key] = (
                table,
                *locate(table[chunk.rows], chunk.slot, page),
            )  # so its id stays its own
        return self._located[key][1:]


def _parts(group: list[int], slots: int) -> list[list[int]]:
    """The group cut so that a part has at most `MOST_SLOTS` slots, or one row."""
    most = max(1, MOST_SLOTS // slots)
    return [group[i : i + most] for i in range(0, len(group), most)]


def _written(numbers: Sequence[int], rows: Sequence[Row], device: torch.device) -> Written | None:
    if not numbers:
        return None
    flat = [
        (rows[n].first + i, n, rows[n].before + i) for n in numbers for i in range(rows[n].prompt)
    ]  # fmt: skip
    return Written(*async_tensor_h2d(list(zip(*flat, strict=True)), device=device, dtype=torch.int64))
