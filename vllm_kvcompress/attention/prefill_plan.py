"""What a step's prefill needs to know of its rows: worked out once for all layers and head types."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from vllm.utils.torch_utils import async_tensor_h2d

from vllm_kvcompress.attention.padding import LEAST, Padded, alike, rounded
from vllm_kvcompress.attention.pages import locate

MOST_SLOTS = 2**14  # that one call gathers, unless a single row has more: 256 MiB of Janus-Pro-1B's K and V
MOST_PAIRS = 2**20
"""Queries times slots of one call: a mask and grouped queries at once may be plain operations to torch on
a GPU, where each pair is a logit: 4 MiB a query head in float32, 256 MiB of the 64 of Emu3's two branches."""


class Row(NamedTuple):
    """A row's tokens in the step, the prefix and length that they take it to, where its branches begin, and
    its picture's size."""

    first: int
    last: int
    prefix: int
    length: int
    begins: tuple[int, int] = (0, 0)
    size: int = 0

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


class Begun(NamedTuple):
    """Prompts that begin in this step, in all heads or in those of one branch.

    Parameters
    ----------
    tokens : Tensor
        [n] int64: the step's tokens of one prompt after another.
    counts : list of int
        How many each prompt has.
    branch : int or None
        0 or 1, where the branches' prompts are of unlike length; None for all heads.
    padding : Tensor or None
        [n] int64: the tokens before the branch's prompts.
    """

    tokens: Tensor
    counts: list[int]
    branch: int | None = None
    padding: Tensor | None = None

    @classmethod
    def of(cls, rows: Sequence[Row], device: torch.device) -> "list[Begun]":
        """Of rows that begin, in the order of their tokens; for all heads at once unless branches differ."""
        if not rows:
            return []
        if not any(any(row.begins) for row in rows):
            tokens = [i for row in rows for i in range(row.first, row.first + row.prompt)]
            return [cls(_indices(tokens, device), [row.prompt for row in rows])]
        found = []
        for branch in range(2):
            skipped = [min(row.begins[branch], row.prompt) for row in rows]
            spans = [
                (row.first, row.first + n, row.first + row.prompt)
                for row, n in zip(rows, skipped, strict=True)
            ]
            tokens = [i for _, begin, end in spans for i in range(begin, end)]
            padding = [i for first, begin, _ in spans for i in range(first, begin)]
            counts = [end - begin for _, begin, end in spans if end > begin]
            if counts or padding:
                found.append(cls(_indices(tokens, device), counts, branch, _indices(padding, device)))
        return found


def _indices(numbers: Sequence[int], device: torch.device) -> Tensor:
    return async_tensor_h2d(list(numbers), device=device, dtype=torch.int64)


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
        [rows, 1, chunk, slots] bool: what each query sees; [rows, 2, chunk, slots] where the branches'
        prompts are of unlike length.
    """

    queries: Padded
    rows: Tensor
    slot: Tensor
    mask: Tensor

    @classmethod
    def of(
        cls, numbers: Sequence[int], mine: Sequence[Row], size: tuple[int, ...], device: torch.device
    ) -> "Chunks":
        """Of these rows, or pieces of them, and their numbers in the step; ``size`` is what their chunks and
        their slots are padded to."""
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
        at = queries.at + ahead[:, None]
        mask = (slot <= at[:, :, None])[:, None]
        if any(any(row.begins) for row in mine):
            begins = async_tensor_h2d([row.begins for row in mine], device=device, dtype=torch.int64)
            begin = begins[:, :, None].minimum(at[:, None])  # a token of the padding sees itself
            mask = mask & (slot >= begin[..., None])
        return cls(queries, number, slot.minimum(last[:, None]), mask)


class Drawn(NamedTuple):
    """A row's image tokens: the row, the step's first and last (exclusive), prefix, the picture's first,
    where its branches begin, and the picture's size."""

    row: int
    first: int
    last: int
    prefix: int
    token: int
    begins: tuple[int, int] = (0, 0)
    size: int = 0


@dataclass
class PrefillPlan:
    """The rows of a step that have several tokens.

    Parameters
    ----------
    written : Written or None
        All prompt tokens.
    begun : list of Begun
        The prompts that begin here.
    chunks : list of Chunks
        Prompts' later chunks.
    drawn : list of Drawn
        Replayed image tokens.
    """

    written: Written | None
    begun: list[Begun]
    chunks: list[Chunks]
    drawn: list[Drawn]
    _located: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)

    @classmethod
    def of(
        cls, starts: Sequence[int], prefixes: Sequence[int], lengths: Sequence[int], device: torch.device,
        begins: Sequence[tuple[int, int]] | None = None, sizes: Sequence[int] | None = None,
    ) -> "PrefillPlan | None":  # fmt: skip
        """The plan of rows; None if none has anything to do.

        Parameters
        ----------
        starts : sequence of int
            Where each row's tokens start, and the end of the last.
        prefixes, lengths : sequence of int
            Prompt tokens of each row, and its tokens up to and including these; with 0 it is left out.
        device : torch.device
            Where the cache is.
        begins : sequence of (int, int), optional
            Where each row's branches begin, as in `Plan`.
        sizes : sequence of int, optional
            Of each row's picture, as in `Plan`.
        """
        firsts, sizes = begins or [(0, 0)] * len(prefixes), sizes or [0] * len(prefixes)
        spans = zip(pairwise(starts), prefixes, lengths, firsts, sizes, strict=True)
        rows = [Row(*span, prefix, length, begin, size) for span, prefix, length, begin, size in spans]
        live = [n for n, row in enumerate(rows) if row.length]
        if not live:
            return None
        drawn = [
            Drawn(
                n,
                row.first + row.prompt,
                row.last,
                row.prefix,
                row.before + row.prompt - row.prefix,
                row.begins,
                row.size,
            )
            for n in live
            if (row := rows[n]).prompt < row.last - row.first
        ]
        begun = [n for n in live if rows[n].prompt and not rows[n].before]
        later = [n for n in live if rows[n].prompt and rows[n].before]
        pieces = [(n, piece) for n in later for piece in _pieces(rows[n])]
        groups = alike((piece.prompt, piece.before + piece.prompt) for _, piece in pieces)
        chunks = [
            Chunks.of([pieces[i][0] for i in part], [pieces[i][1] for i in part], size, device)
            for size, group in groups.items()
            for part in _parts(group, *size)
        ]
        return cls(
            _written([*begun, *later], rows, device),
            Begun.of([rows[n] for n in begun], device),
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


def _pieces(row: Row) -> list[Row]:
    """The row's chunk cut so that a piece has at most `MOST_PAIRS` pairs, or `LEAST` queries.

    By the row's own lengths alone, as padding is: in any company it is cut alike.
    """
    most = max(LEAST, MOST_PAIRS // rounded(row.before + row.prompt))
    most = 1 << (most.bit_length() - 1)  # a length that padding leaves as it is
    return [
        row._replace(first=row.first + i, last=end, length=row.before + end - row.first)
        for i in range(0, row.prompt, most)
        for end in (row.first + min(i + most, row.prompt),)
    ]


def _parts(group: list[int], queries: int, slots: int) -> list[list[int]]:
    """The group cut so that a part has at most `MOST_SLOTS` slots and `MOST_PAIRS` pairs, or one row."""
    most = max(1, min(MOST_SLOTS // slots, MOST_PAIRS // (queries * slots)))
    return [group[i : i + most] for i in range(0, len(group), most)]


def _written(numbers: Sequence[int], rows: Sequence[Row], device: torch.device) -> Written | None:
    if not numbers:
        return None
    flat = [
        (rows[n].first + i, n, rows[n].before + i) for n in numbers for i in range(rows[n].prompt)
    ]  # fmt: skip
    return Written(*async_tensor_h2d(list(zip(*flat, strict=True)), device=device, dtype=torch.int64))
