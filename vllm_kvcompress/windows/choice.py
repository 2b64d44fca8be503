"""``window: auto``: the window that draws the most tokens a second, by pictures at once. Pure; no vLLM."""

from collections import deque
from dataclasses import dataclass

CANDIDATES = (1, 4, 8, 16)
TRIAL = 4  # steps with a window never tried at so many pictures, and later with a neighbour of the best
SOON, EVERY = 32, 256  # steps until a neighbour is tried; the pause doubles from the one to the other
WORTH = 1.02  # a longer window must win by this much: its time varies more
FULL, KEEN = 0.75, 4  # of a window that stands: then a longer one is tried in so much less time
HOPELESS = 0.7  # of the best rate: then a neighbour is not tried again
BESIDE = 1.1  # of a step without windows: what one may take while it brings others one token
HOPE, TRUST = 0.5, 3  # before the first steps: the share of a window that stands, and as many steps' weight

Group = tuple[int, int]  # bits of the numbers of pictures, and of rows beside them


class _Tokens:
    """Running mean of the tokens that stand; hopeful at first, since lines above help later lines."""

    def __init__(self, places: int) -> None:
        self.mean, self._count = max(1.0, HOPE * places), TRUST

    def add(self, tokens: float) -> None:
        self._count += 1
        self.mean += (tokens - self.mean) / min(self._count, 64)


class _Seconds:
    """What a step takes when nothing else is in its way: the lower quartile of the last ones."""

    def __init__(self) -> None:
        self.count, self._last = 0, deque[float](maxlen=16)

    def add(self, seconds: float) -> None:
        self.count += 1
        self._last.append(seconds)

    @property
    def usual(self) -> float:
        return sorted(self._last)[len(self._last) // 4]


@dataclass
class _Trials:
    """When a neighbour of the best is tried, at one number of pictures."""

    waited: int = 0
    left: int = 0
    pause: int = SOON
    turn: bool = True
    longer: bool = True

    def due(self, *, full: bool) -> bool:
        """Count a step; whether it belongs to a trial. ``full``: nearly all of the best's drafts stand."""
        if self.left:
            self.left -= 1
            return True
        self.waited += 1
        if self.waited < (self.pause // KEEN if full else self.pause):
            return False
        self.waited, self.left = 0, TRIAL - 1
        self.longer = full or self.turn
        self.turn, self.pause = not self.longer, min(EVERY, 2 * self.pause)
        return True


class WindowChoice:
    """Learns what a step costs and brings, and chooses by it.

    A step's seconds depend on the pictures at once and on the rows beside them (by powers of two), the tokens
    that stand on the window. Windows are tried from short to long, as long as they get better. What is chosen
    changes when tokens come, never which.

    Rows beside pictures are texts, and pictures that have no window: a step brings them one token however
    long it is. So beside them no window is used that makes a step more than a tenth longer.

    Parameters
    ----------
    candidates : sequence of int
        Ascending; 1 is drawing one by one.
    """

    def __init__(self, candidates: tuple[int, ...] = CANDIDATES) -> None:
        self.candidates = candidates
        self._tokens = {n: _Tokens(n) for n in candidates}
        self._seconds: dict[tuple[Group, int], _Seconds] = {}
        self._trials: dict[Group, _Trials] = {}

    def choose(self, rows: int, others: int = 0) -> int:
        """Places of a row in a step of so many pictures, beside so many rows that have no window."""
        group = rows.bit_length(), others.bit_length()
        best = self.candidates[0]
        for n in self.candidates:
            tried = self._seconds.get((group, n))
            if tried is None or tried.count < TRIAL:
                return n
            worse = self._rate(group, n) <= WORTH * self._rate(group, best)
            if n != best and (worse or self._delays(group, n, BESIDE)):
                break  # longer ones are worse still
            best = n
        trials = self._trials.setdefault(group, _Trials())
        full = 1 < best < self.candidates[-1] and self._tokens[best].mean > FULL * best
        return self._neighbour(group, best, longer=trials.longer) if trials.due(full=full) else best

    def learn(self, rows: int, places: int, seconds: float, tokens: float, others: int = 0) -> None:
        """What a step took, and how many tokens stood in the mean of its pictures."""
        if places not in self._tokens:
            return
        self._tokens[places].add(tokens)
        group = rows.bit_length(), others.bit_length()
        self._seconds.setdefault((group, places), _Seconds()).add(seconds)

    def _delays(self, group: Group, places: int, most: float) -> bool:
        """Whether a step of such a window is longer for rows beside pictures than so many plain ones."""
        plain, seconds = self._seconds.get((group, 1)), self._seconds[group, places]
        return bool(group[1]) and plain is not None and seconds.usual > most * plain.usual

    def _rate(self, group: Group, places: int, least: float = 0.0) -> float:
        seconds = self._seconds.get((group, places))
        return max(least, self._tokens[places].mean) / max(seconds.usual, 1e-9) if seconds else 0.0

    def _neighbour(self, group: Group, best: int, *, longer: bool) -> int:
        at = self.candidates.index(best) + (1 if longer else -1)
        if not 0 <= at < len(self.candidates):
            return best
        other = self.candidates[at]
        if (group, other) not in self._seconds:
            return other
        # What stands in a window stands in a longer one: its last trial may have met a bad line.
        least = self._tokens[best].mean if other > best else 0.0
        hopeless = self._rate(group, other, least) < HOPELESS * self._rate(group, best)
        return best if hopeless or self._delays(group, other, 1 / HOPELESS) else other
