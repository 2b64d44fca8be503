"""Grid geometry of an image drawn token by token in raster order.

The words are those of docs/design.md: an image is a *grid* of L *lines* of W tokens. W is a property
of the model (a line may end in an end-of-line token), never the square root of the token count.
"""

from dataclasses import dataclass


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
    """

    lines: int
    width: int
    patch: int = 16

    def __post_init__(self) -> None:
        for name in ("lines", "width", "patch"):
            if getattr(self, name) < 1:
                raise ValueError(f"raster.{name} must be at least 1, got {getattr(self, name)}")

    @property
    def tokens(self) -> int:
        """Image tokens in a whole picture (L * W)."""
        return self.lines * self.width

    @property
    def pixel_size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return self.width * self.patch, self.lines * self.patch

    def position(self, token: int) -> tuple[int, int]:
        """(line, column) of the ``token``-th image token."""
        return divmod(token, self.width)

    def ends_line(self, token: int) -> bool:
        """Whether the ``token``-th image token is the last of its line."""
        return (token + 1) % self.width == 0
