"""Sizes of the checkpoints that this package makes."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class CheckpointGeometry:
    """Everything that decides a tensor's shape.

    Parameters
    ----------
    hidden, layers, heads, kv_heads, intermediate : int
        The language model's.
    lines : int
        Lines of the picture, and tokens a line: published pictures are square.
    codebook : int
        Image codes.
    vq_channels, vq_multipliers, vq_res_blocks, vq_latent
        The VQ model's base channels (a multiple of 32, its GroupNorm's groups), channel multiplier per
        resolution (each after the first doubles the picture's side), residual blocks, latent channels.
    text_vocab : int
        Rows of the text embedding; more than the tokenizer's ids, as published.
    max_positions : int
        Longest context, prompt and picture together.
    vision_hidden, vision_layers, vision_heads : int
        The understanding tower's, which drawing never uses.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    lines: int
    codebook: int
    text_vocab: int
    vq_channels: int = 32
    vq_multipliers: tuple[int, ...] = (1, 1, 1, 1, 1)
    vq_res_blocks: int = 1
    vq_latent: int = 32
    max_positions: int = 2048
    vision_hidden: int = 32
    vision_layers: int = 1
    vision_heads: int = 2

    def __post_init__(self) -> None:
        if self.hidden % self.heads or self.heads % self.kv_heads:
            raise ValueError(
                f"hidden {self.hidden} must be a multiple of heads {self.heads}, "
                f"and heads of kv_heads {self.kv_heads}"
            )
        if self.vq_channels % 32:
            raise ValueError(f"vq_channels {self.vq_channels} is not a multiple of GroupNorm's 32 groups")

    @property
    def patch(self) -> int:
        """Side of the square of pixels that one image token stands for."""
        return 2 ** (len(self.vq_multipliers) - 1)

    @property
    def image_size(self) -> int:
        """The picture's side in pixels."""
        return self.lines * self.patch

    @property
    def image_tokens(self) -> int:
        """Tokens of a picture."""
        return self.lines**2


TINY = CheckpointGeometry(
    hidden=64, layers=2, heads=2, kv_heads=2, intermediate=128, lines=8, codebook=256, text_vocab=640
)
# The published grid and picture size on a language model small enough to run in fp32 within seconds.
SMALL_24 = CheckpointGeometry(
    hidden=128, layers=3, heads=4, kv_heads=4, intermediate=256, lines=24, codebook=1024, text_vocab=1024
)
GQA = CheckpointGeometry(
    hidden=128, layers=2, heads=4, kv_heads=2, intermediate=256, lines=8, codebook=256, text_vocab=640
)


def janus_pro_1b(layers: int = 24, vision_layers: int = 1) -> CheckpointGeometry:
    """Janus-Pro-1B's sizes (2.1 G parameters with all 24 layers in both towers).

    The understanding tower, a seventh of the file, has one layer unless asked: serving skips it.
    """
    return CheckpointGeometry(
        hidden=2048,
        layers=layers,
        heads=16,
        kv_heads=16,
        intermediate=5632,
        lines=24,
        codebook=16384,
        text_vocab=102400,
        vq_channels=128,
        vq_multipliers=(1, 1, 2, 2, 4),
        vq_res_blocks=2,
        vq_latent=256,
        max_positions=16384,
        vision_hidden=1024,
        vision_layers=vision_layers,
        vision_heads=16,
    )


PRESETS: dict[str, Callable[[], CheckpointGeometry]] = {
    "tiny": lambda: TINY,
    "small-24": lambda: SMALL_24,
    "gqa": lambda: GQA,
    "janus-pro-1b": janus_pro_1b,
}
