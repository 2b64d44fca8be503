"""``window: auto``: the window that draws the most tokens a second, by pictures at once. Pure; no vLLM."""

from dataclasses import dataclass

CANDIDATES = (1, 4, 8, 16)
FIRST_TRIAL = 4  # steps with a window that was never tried at so many pictures
TRIAL = 4  # and with a neighbour of the best, later on
EVERY = 256  # steps between such trials
WORTH = 1.02  # a longer window must win by this much: its time varies more
HOPELESS = 0.7  # of the best rate: then a neighbour is not tried again
_SLOW, _FAST = 1 / 64, 1 / 4  # weights of a new observation, of tokens and of seconds


@dataclass
class _Mean:
    """A running mean that forgets; the first observations count alike."""

    rate: float
    value: float = 0.0
    count: int = 0

    def add(self, x: float) -> None:
        self.count += 1
        self.value += (x - self.value) * max(self.rate, 1 / self.count)


class WindowChoice:
    """Learns what a step costs and brings, and chooses by it.

    A step's seconds depend on the pictures at once (by powers of two), the tokens that stand on the window.
    Windows are tried from short to long, as long as they get better. What is chosen changes when tokens come,
    never which.

    Parameters
    ----------
    candidates : sequence of int
        Ascending; 1 is drawing one by one.
    """

    def __init__(self, candidates: tuple[int, ...] = CANDIDATES) -> None:
        self.candidates = candidates
        self._tokens = {n: _Mean(_SLOW) for n in candidates}
        self._seconds: dict[tuple[int, int], _Mean] = {}
        self._steps: dict[int, int] = {}

    def choose(self, rows: int) -> int:
        """Places of a row in a step of so many pictures."""
        group = rows.bit_length()
        step = self._steps[group] = self._steps.get(group, -1) + 1
        best = self.candidates[0]
        for n in self.candidates:
            tried = self._seconds.get((group, n))
            if tried is None or tried.count < FIRST_TRIAL:
                return n
            if n != best and self._rate(group, n) <= WORTH * self._rate(group, best):
                break  # longer ones are worse still
            best = n
        nth, phase = divmod(step, EVERY)
        if nth and phase < TRIAL:
            return self._neighbour(group, best, nth)
        return best

    def learn(self, rows: int, places: int, seconds: float, tokens: float) -> None:
        """What a step took, and how many tokens stood in the mean of its rows."""
        if places not in self._tokens:
            return
        self._tokens[places].add(tokens)
        self._seconds.setdefault((rows.bit_length(), places), _Mean(_FAST)).add(seconds)

    def _rate(self, group: int, places: int) -> float:
        seconds = self._seconds.get((group, places))
        return self._tokens[places].value / max(seconds.value, 1e-9) if seconds else 0.0

    def _neighbour(self, group: int, best: int, nth: int) -> int:
        at = self.candidates.index(best) + (1 if nth % 2 else -1)
        if not 0 <= at < len(self.candidates):
            return best
        other = self.candidates[at]
        untried = (group, other) not in self._seconds
        return other if untried or self._rate(group, other) >= HOPELESS * self._rate(group, best) else best
