"""Other drafts than the package's, and windows of other lengths, on the V2 runner."""

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import Tensor

if TYPE_CHECKING:
    from vllm_kvcompress.windows.v2 import Known


@contextmanager
def replaced(how: Mapping[str, Any] | None, truth: Mapping[tuple[int, ...], Sequence[int]]) -> Iterator[None]:
    """While engines step.

    Parameters
    ----------
    how : mapping or None
        ``drafts``: ``wrong``, half of them -1 and half random ids below ``ids``, or ``truth``; without it the
        package's.
        ``places``: places of a row, one of them drawn for each step. None changes nothing.
    truth : mapping
        By prompt, the ids that will be drawn.
    """
    from vllm_kvcompress import requests_v2
    from vllm_kvcompress.windows.choice import WindowChoice

    if how is None:
        yield
        return
    rng, ours = random.Random(0), requests_v2.next_drafts

    def made(
        samples: Tensor,
        counts: Tensor,
        stands: Tensor,
        known: "Known",
        places: Tensor,
        prefix: Tensor,
        *more: Any,
    ) -> Tensor:
        drafts = ours(samples, counts, stands, known, places, prefix, *more)
        match how.get("drafts"):
            case "wrong":
                wrong = [[rng.choice((-1, rng.randrange(how["ids"]))) for _ in row] for row in drafts]
                drafts = torch.tensor(wrong)
            case "truth":
                for row in range(len(drafts)):
                    first = int(places[row] + 1 + stands[row] - prefix[row])
                    prompt = known.table[known.slots[row], : prefix[row]].tolist()
                    told = truth[tuple(prompt)][first:][: drafts.shape[1]]
                    drafts[row, : len(told)] = torch.tensor(told)
        return drafts

    def choose(*_: Any) -> int:
        return rng.choice(how["places"])

    with (
        mock.patch.object(requests_v2, "next_drafts", made),
        mock.patch.object(WindowChoice, "choose", choose),
    ):
        yield
