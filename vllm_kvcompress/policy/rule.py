"""The line rule: which image tokens one head type keeps. Pure arithmetic, no vLLM, no torch.

docs/design.md, "The method". The attention code needs to know nothing else of a policy.
"""

from dataclasses import dataclass

MAX_IMAGE = 2**15 - 1  # token and victim indices are stored as int16 beside the pages
SIDE_BYTES = 8  # per scored head and slot, beside K and V: float32 score, int16 token, int16 victim
MAX_TYPES = 6  # head types of one layout: KV-cache groups, block tables, code paths of a GPU kernel


@dataclass(frozen=True)
class HeadRule:
    """What one head type does with the image tokens of a request.

    The t-th image token goes to image slot t while t < capacity. After that a ring (spatial heads)
    overwrites its oldest non-anchor slot, and a semantic head overwrites the victims chosen at the last
    line's end, in their order. Image slots are numbered after the prefix: logical slot = prefix + slot.

    Parameters
    ----------
    capacity : int
        Resident image slots per head, those of the line being written included.
    line : int
        W, tokens per line.
    image : int
        L * W, tokens of a whole picture; at most 32767.
    anchors : int
        The first image tokens, never victims.
    recent : int
        The last drawn tokens, never victims. For a ring it follows from the rest: capacity - anchors.
    ring : bool
        Spatial head: overwrite the oldest non-anchor slot, without a score.
    decay : float
        What every line's end leaves of a score, in [0, 1]; `policy.DECAY` names some.
    value_norm : bool
        Weight the score by the L2 norm of the slot's value vector.
    smooth_row : bool
        Average the score with those of the left and right neighbours in the raster row, where resident.
    stratify : bool
        Choose within columns first: every column's lowest score, then every column's second lowest, ...

    Raises ValueError where a line would not find W victims or a number is out of range.
    """

    capacity: int
    line: int
    image: int
    anchors: int = 0
    recent: int = 0
    ring: bool = False
    decay: float = 0.0
    value_norm: bool = False
    smooth_row: bool = False
    stratify: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.decay <= 1:
            raise ValueError(f"decay: {self.decay}; need a share of the score, 0 to 1")
        if self.line < 1 or self.image % self.line or not 1 <= self.image <= MAX_IMAGE:
            raise ValueError(
                f"image: {self.image} tokens by {self.line}; need whole lines, at most {MAX_IMAGE} tokens"
            )
        if not 1 <= self.capacity <= self.image:
            raise ValueError(f"capacity: {self.capacity} slots; need 1 to the image's {self.image}")
        for name in ("anchors", "recent"):
            if not 0 <= getattr(self, name) <= self.capacity:
                raise ValueError(f"{name}: {getattr(self, name)}; need 0 to the capacity of {self.capacity}")
        kept = self.anchors + (0 if self.ring else self.recent)
        if self.evicts and self.capacity - kept < self.line:
            raise ValueError(
                f"capacity: {self.capacity} slots less {kept} that are never victims leave "
                f"{self.capacity - kept}, a line needs {self.line}; need at least {kept + self.line}"
            )

    @property
    def evicts(self) -> bool:
        """Whether any token is ever overwritten."""
        return self.capacity < self.image

    @property
    def scores(self) -> bool:
        """Whether the rule needs a score at all."""
        return self.evicts and not self.ring

    @property
    def name(self) -> str:
        """What the log and the pictures call it: ``full``, ``ring 28`` or ``scored 148``."""
        return f"{'ring' if self.ring else 'scored'} {self.capacity}" if self.evicts else "full"

    def resident(self, drawn: int) -> int:
        """Image slots in use once ``drawn`` tokens have been written."""
        return min(drawn, self.capacity)

    def slot(self, token: int) -> int:
        """Image slot of the ``token``-th image token: of a ring, or of a head that is not full yet."""
        if token < self.capacity:
            return token
        if not self.ring:
            raise ValueError(f"token {token} of a semantic head of {self.capacity} slots goes into a victim")
        return self.anchors + (token - self.anchors) % (self.capacity - self.anchors)

    def held(self, drawn: int) -> list[int]:
        """The tokens in the slots once ``drawn`` have been written: of a ring, or a head not yet full."""
        tokens = list(range(self.resident(drawn)))
        for token in range(max(self.capacity, drawn - self.capacity), drawn):
            tokens[self.slot(token)] = token
        return tokens

    def free(self, drawn: int) -> int:
        """Image slots never written to once ``drawn`` tokens have been."""
        return max(0, self.capacity - drawn)

    def victims_due(self, drawn: int) -> int:
        """Victims to choose now that ``drawn`` tokens have been drawn: 0 unless a line has just ended."""
        if drawn % self.line or not 0 < drawn < self.image:
            return 0
        return max(0, min(self.line, self.image - drawn) - self.free(drawn))
