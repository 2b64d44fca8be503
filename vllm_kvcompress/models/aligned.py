"""What families have in common whose guidance branches are prompts of their own, of any length.

Their codes, and the ends of their lines, are ids of the text's vocabulary, found by their strings.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from vllm_kvcompress.models.config import ImageModel, ModelSettings
from vllm_kvcompress.policy.raster import Raster

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

MOST_TOKENS = 32767  # of a picture: what a head rule can count
_RESOLVED = "kvcompress_resolved"


class AlignedLike:
    """Prompts that say the picture's size, in ids after begin-of-image; lines that end in a token."""

    sentences: ClassVar[bool] = True
    evaluated: ClassVar[bool] = False
    codes_apart: ClassVar[bool] = False

    guidance_scale: ClassVar[float]
    top_k: ClassVar[int]
    """Defaults where generation_config.json says none."""

    def keep(self, hf_config: "PreTrainedConfig", **found: Any) -> None:
        """What ``ImageModel`` needs of the tokenizer goes with the configuration to every process."""
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

    def calibration_ids(self, tokenizer: Any, model: ImageModel, number: int) -> list[int]:
        from vllm_kvcompress.heads.calibrate import PROMPTS

        ids = self.prompt_ids(tokenizer, model, PROMPTS[number] + model.suffix)
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


def raster_of_size(settings: ModelSettings, own: int, patch: int, unit: int) -> Raster:
    """The token grid of the size that is set, by default a square; lines end in a token.

    Parameters
    ----------
    own : int
        Side of the model's own pictures, in pixels.
    patch, unit : int
        Pixels a token, and of what width and height must be multiples.

    Raises
    ------
    ValueError
        One line: a size that the model can't draw.
    """
    width, height = settings.size or (own, own)
    if width % unit or height % unit:
        raise ValueError(
            f"additional_config.kvcompress.size: {width}x{height} is no multiple of the model's {unit} "
            f"pixels a {'token' if unit == patch else 'size token'}"
        )
    raster = Raster(height // patch, width // patch + 1, patch, ends=1)
    if raster.tokens > MOST_TOKENS:
        raise ValueError(
            f"additional_config.kvcompress.size: {width}x{height} takes {raster.tokens} tokens, and a "
            f"picture has at most {MOST_TOKENS}"
        )
    return raster
