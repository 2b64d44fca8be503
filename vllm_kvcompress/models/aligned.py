"""What families have in common whose guidance branches are prompts of their own, of any length.

Their codes, and the ends of their lines, are ids of the text's vocabulary, found by their strings.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from vllm_kvcompress.models.config import ImageModel, ModelSettings, PictureSize
from vllm_kvcompress.policy.raster import Raster

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

RATIOS = ((1, 1), (4, 3), (3, 4), (3, 2), (2, 3), (16, 9), (9, 16))  # width to height, of usual sizes
MOST_TOKENS = 32767  # of a picture: what a head rule can count
LEAST_PROMPT = 64  # tokens that a size of the model's own list leaves for the prompt
_RESOLVED = "kvcompress_resolved"


class AlignedLike:
    """Prompts that say the picture's size, in ids after begin-of-image; lines that end in a token."""

    sentences: ClassVar[bool] = True
    codes_apart: ClassVar[bool] = False

    guidance_scale: ClassVar[float]
    top_k: ClassVar[int]
    """Defaults where generation_config.json says none."""

    def shapes(self, hf_config: "PreTrainedConfig") -> dict[str, tuple[int, ...]]:
        from vllm_kvcompress.models.weights import decoder_shapes

        text = hf_config.get_text_config()
        return decoder_shapes(text) | {"lm_head.weight": (text.vocab_size, text.hidden_size)}

    def keep(self, hf_config: "PreTrainedConfig", sizes: Sequence[PictureSize], **found: Any) -> None:
        """What ``ImageModel`` needs of the tokenizer goes with the configuration to every process."""
        (raster, grid_ids), *more = sizes
        found |= {"raster": raster, "grid_ids": grid_ids, "more_sizes": tuple(more)}
        setattr(hf_config, _RESOLVED, found)

    def describe(self, hf_config: "PreTrainedConfig", defaults: Mapping[str, Any]) -> ImageModel:
        found = getattr(hf_config, _RESOLVED, None)
        if found is None:
            raise RuntimeError("the model's token ids were never resolved: is the kvcompress plugin loaded?")
        own = {"guidance_scale": self.guidance_scale, "top_k": self.top_k, **defaults}
        return ImageModel(text_vocab=hf_config.get_text_config().vocab_size, writes=False, **found, **own)

    def prompt_ids(self, tokenizer: Any, model: ImageModel, text: str) -> list[int]:
        raise NotImplementedError

    def negative_ids(self, tokenizer: Any, model: ImageModel, text: str, length: int) -> list[int]:
        return model.aligned(self.prompt_ids(tokenizer, model, text), length)

    def lengthened(self, model: ImageModel, prompt_ids: list[int], length: int) -> list[int]:
        return model.aligned(prompt_ids, length)

    def calibration_ids(self, tokenizer: Any, model: ImageModel, prompt: int | str) -> list[int]:
        from vllm_kvcompress.heads.calibrate import text_of

        ids = self.prompt_ids(tokenizer, model, text_of(prompt) + model.suffix)
        return model.aligned(ids, len(model.negative))


class Vocabulary:
    """Ids by string: config.json's ``vocabulary_map``, else the tokenizer's."""

    def __init__(self, hf_config: "PreTrainedConfig", tokenizer: Any) -> None:
        stored = getattr(hf_config, "vocabulary_map", None)
        self.source = "config.json: vocabulary_map" if stored else "the tokenizer"
        self._ids: dict[str, int] = stored or tokenizer.get_vocab()
        self._size = hf_config.get_text_config().vocab_size

    def get(self, token: str) -> int | None:
        found = self._ids.get(token)
        return found if type(found) is int and 0 <= found < self._size else None

    def __getitem__(self, token: str) -> int:
        if (found := self.get(token)) is None:
            raise ValueError(f"{self.source} has no id for {token} below vocab_size {self._size}")
        return found

    def first_code(self, codes: int, name: Callable[[int], str]) -> int:
        """The id of code 0, of codes whose ids follow one another; ``name`` gives a code's string."""
        first = self[name(0)]
        gap = next((n for n in range(codes) if self.get(name(n)) != first + n), None)
        if gap is not None:
            self[name(gap)]
            raise ValueError(
                f"{self.source} gives {name(gap)} another id than {first + gap}: the ids of codes must "
                "follow one another"
            )
        return first


def rasters_of(
    settings: ModelSettings, usual: Sequence[tuple[int, int]], patch: int, unit: int
) -> list[Raster]:
    """The token grids that are served, the default first; lines end in a token.

    Parameters
    ----------
    usual : sequence of (int, int)
        Columns and lines of the model's own sizes, for a server that is told none.
    patch, unit : int
        Pixels a token, and of what width and height must be multiples.

    Raises
    ------
    ValueError
        One line: a size that is set and can't be drawn.
    """
    setting = f"additional_config.kvcompress.{'sizes' if settings.sizes else 'size'}"
    for width, height in settings.named:
        if width % unit or height % unit:
            raise ValueError(
                f"{setting}: {width}x{height} is no multiple of the model's {unit} pixels a "
                f"{'token' if unit == patch else 'size token'}"
            )
    grids = [(width // patch, height // patch) for width, height in settings.named]
    rasters = [Raster(lines, columns + 1, patch, ends=1) for columns, lines in grids or usual]
    first = rasters[0]
    if not grids:  # a long one that does not fit is left out; the default is refused in another place
        context = min(settings.context or MOST_TOKENS, MOST_TOKENS)
        most = max(first.tokens, context - LEAST_PROMPT)
        rasters = [raster for raster in rasters if raster.tokens <= most]
    for raster in rasters:
        if raster.tokens > MOST_TOKENS:
            raise ValueError(
                f"{setting}: {raster.name} takes {raster.tokens} tokens, and a picture has at most "
                f"{MOST_TOKENS}"
            )
    return rasters
