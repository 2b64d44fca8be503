"""One picture while it is drawn: its tokens so far, its seed, and the drafts of what comes next."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate


@dataclass
class Drawing:
    """What windows and noise need of a request that draws; host memory only.

    Parameters
    ----------
    seed : int
        Of the picture's noise.
    line : int
        Tokens a line.
    given : sequence of int
        Image token ids at the prompt's end.
    outputs : list of int
        Ids drawn since. The runner's own list, which grows as it keeps its books.
    eol : int
        Id that every line ends in; -1 without.
    """

    seed: int
    line: int
    given: Sequence[int]
    outputs: list[int]
    eol: int = -1
    _kept: list[int] = field(default_factory=list)

    @property
    def known(self) -> int:
        """Image tokens known so far, which is the index of the next."""
        return len(self.given) + len(self.outputs)

    def drafts(self, count: int) -> list[int]:
        """Ids for the next ``count`` tokens: the last pass's samples, then copies of earlier tokens.

        Any draft is right: a wrong one costs a step, not the picture. Copied is what stands as far back as
        would have been right most often in the last line's length: a line (the token above), a token (the
        left neighbour), or twice that, as in patterns. At least one token must be known. A line's end is
        always right.
        """
        drafts = self._kept[:count]
        if len(drafts) < count:
            recent = [*self.given, *self.outputs][-3 * self.line :]
            back = self._habit(recent)
            recent += drafts
            for _ in range(count - len(drafts)):
                ends = self.eol >= 0 and (self.known + len(drafts) + 1) % self.line == 0
                recent.append(self.eol if ends else recent[-back])
                drafts.append(recent[-1])
        return drafts

    def _habit(self, recent: Sequence[int]) -> int:
        """How far back to copy from."""
        best, most = 1, -1
        for back in (self.line, 1, 2 * self.line, 2):
            pairs = zip(recent[::-1][: self.line], recent[-back - 1 :: -1], strict=False)
            hits = sum(a == b for a, b in pairs) if back <= len(recent) else -1
            if hits > most:
                best, most = back, hits
        return best

    def settle(self, samples: Sequence[int], drafts: Sequence[int]) -> int:
        """How many samples stand; those beyond become the next drafts.

        Parameters
        ----------
        samples : sequence of int
            Ids sampled after the last known token and after each draft.
        drafts : sequence of int
            One less than the samples.

        Returns
        -------
        int
            At least 1: the first sample's input is known to be right.
        """
        stands = 1
        for sample, draft in zip(samples[:-1], drafts, strict=True):
            if sample != draft:
                break
            stands += 1
        self._kept = list(samples[stands:])
        return stands


@dataclass(frozen=True)
class Window:
    """One step's drafts, of all rows in batch order.

    Parameters
    ----------
    drafts : sequence of sequence of int
        Ids per row; empty in rows without.
    """

    drafts: Sequence[Sequence[int]]

    @property
    def counts(self) -> list[int]:
        """Samples of each row."""
        return [1 + len(drafts) for drafts in self.drafts]

    @property
    def starts(self) -> list[int]:
        """Each row's first sample, among all."""
        return [0, *accumulate(self.counts)][:-1]
