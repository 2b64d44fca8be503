"""Grid geometry of an image drawn token by token in raster order.

The words are those of docs/design.md: an image is a *grid* of L *lines* of W tokens. W is a property
of the model (a line may end in an end-of-line token), never the square root of the token count. The columns
are the tokens of a line that stand for pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Raster:
    """An image's token grid.

    Parameters
    ----------
    lines : int
        L, the number of lines.
    width : int
        W, tokens per line, in raster order.
    patch : int
        Side of the square of pixels that one token stands for.
    ends : int
        Tokens at a line's end that stand for no pixels: 1 where lines end in an end-of-line token, else 0.
    """

    lines: int
    width: int
    patch: int = 16
    ends: int = 0

    def __post_init__(self) -> None:
        for name in ("lines", "width", "patch", "columns"):
            if getattr(self, name) < 1:
                raise ValueError(f"raster.{name} must be at least 1, got {getattr(self, name)}")
        if self.ends not in (0, 1):
            raise ValueError(f"raster.ends must be 0 or 1, got {self.ends}")

    @property
    def columns(self) -> int:
        """Tokens of a line that stand for pixels."""
        return self.width - self.ends

    @property
    def tokens(self) -> int:
        """Image tokens in a whole picture (L * W)."""
        return self.lines * self.width

    @property
    def pixel_size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return self.columns * self.patch, self.lines * self.patch

    @property
    def name(self) -> str:
        """``WIDTHxHEIGHT`` in pixels, as users say it."""
        return "{}x{}".format(*self.pixel_size)

    def is_end(self, token: int) -> bool:
        """Whether the ``token``-th image token is an end-of-line token."""
        return token % self.width >= self.columns

    def cells(self, tokens: Sequence[T]) -> list[T]:
        """What stands for pixels, of things that come one per image token."""
        return [one for number, one in enumerate(tokens) if not self.is_end(number)]

    def position(self, token: int) -> tuple[int, int]:
        """(line, column) of the ``token``-th image token."""
        return divmod(token, self.width)

    def ends_line(self, token: int) -> bool:
        """Whether the ``token``-th image token is the last of its line."""
        return (token + 1) % self.width == 0
