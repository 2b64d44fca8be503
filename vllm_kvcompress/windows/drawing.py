"""One picture while it is drawn: its tokens so far, its seed, and the drafts of what comes next."""

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Drawing:
    """What windows and noise need of a request that draws; host memory only.

    Parameters
    ----------
    seed : int
        Of the picture's noise.
    line, total : int
        Tokens a line, and of the whole picture.
    given : sequence of int
        Image token ids at the prompt's end.
    outputs : list of int
        Ids drawn since. The runner's own list, which grows as it keeps its books.
    """

    seed: int
    line: int
    total: int
    given: Sequence[int]
    outputs: list[int]
    _kept: list[int] = field(default_factory=list)

    @property
    def known(self) -> int:
        """Image tokens known so far, which is the index of the next."""
        return len(self.given) + len(self.outputs)

    def drafts(self, count: int) -> list[int]:
        """Ids for the next ``count`` tokens: the last pass's samples, then the tokens above.

        Any draft is right: a wrong one costs a step, not the picture. The first line has nothing above it, so
        its drafts repeat what stands to the left. At least one token must be known.
        """
        drafts = self._kept[:count]
        while len(drafts) < count:
            index = self.known + len(drafts)
            drafts.append(self._token(index - self.line if index >= self.line else index - 1, drafts))
        return drafts

    def _token(self, index: int, drafts: Sequence[int]) -> int:
        given = len(self.given)
        if index < given:
            return self.given[index]
        return self.outputs[index - given] if index < self.known else drafts[index - self.known]

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
