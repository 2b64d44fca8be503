"""Lumina-mGPT as a family of models, of folders that ``vllm-kvcompress convert`` has written.

Sources: Alpha-VLLM/Lumina-mGPT, lumina_mgpt/inference_solver.py and data/item_processor.py; README.md.
"""

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from vllm_kvcompress.models.aligned import RATIOS, AlignedLike, Vocabulary, rasters_of
from vllm_kvcompress.models.config import ImageModel, ModelSettings, PictureSize, head_size, patch_of
from vllm_kvcompress.policy.raster import Raster

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

    from vllm_kvcompress.models.vq import PictureDecoder

PROMPT = "Generate an image of {width}x{height} according to the following prompt:\n{text}"
SEPARATOR = "<reserved08706>"  # ends what the user says
BOS, PAD, BOI, EOL = "<s>", "<pad>", "<racm3:break>", "<reserved08799>"
UNIT = 2  # tokens that a size token counts by
_SIZE = "<reserved{:05d}>"
_NO_UNITS = 8800  # the name of the size token for 0
_LETTERS = str.maketrans("0123456789", "ABCDEFGHIJ")
_DECODER = re.compile(r"^model\.(?!vqmodel\.)")


class LuminaFamily(AlignedLike):
    """Prompts say the size in words and in tokens; the unconditional branch is the tokens alone."""

    name: ClassVar[str] = "Lumina-mGPT"
    guidance_scale: ClassVar[float] = 4.0
    top_k: ClassVar[int] = 2000  # both as in its README

    def check(self, hf_config: "PreTrainedConfig") -> None:
        from vllm_kvcompress.models.checkpoint import check_checkpoint, check_numbers

        check_checkpoint(hf_config)
        check_numbers(hf_config, {"size": (1, 1 << 14)})
        text, shape = hf_config.get_text_config(), hf_config.qk_norm_shape
        size, heads = head_size(text), text.num_key_value_heads
        fits = isinstance(shape, (list, tuple)) and len(shape) in (1, 2) and shape[-1] == size
        if not fits or (len(shape) == 2 and (type(shape[0]) is not int or shape[0] < 1 or heads % shape[0])):
            raise ValueError(
                f"config.json: qk_norm_shape must be [{size}], or [rows, {size}] with a divisor of {heads} "
                f"rows, got {shape!s:.60}"
            )

    def canonical_name(self, name: str) -> str | None:
        return _DECODER.sub("language_model.", name)

    def shapes(self, hf_config: "PreTrainedConfig") -> dict[str, tuple[int, ...]]:
        shapes = super().shapes(hf_config)
        for layer in range(hf_config.get_text_config().num_hidden_layers):
            for norm in ("q_norm.weight", "q_norm.bias", "k_norm.weight", "k_norm.bias"):
                name = f"language_model.layers.{layer}.self_attn.{norm}"
                shapes[name] = tuple(hf_config.qk_norm_shape)
        return shapes

    def decoder(
        self, hf_config: "PreTrainedConfig", raster: Raster, dtype: "torch.dtype | None" = None
    ) -> "PictureDecoder":
        from vllm_kvcompress.models.lumina.vq import TamingDecoder

        return TamingDecoder(hf_config.vq_config, raster, dtype)

    def rasters(self, hf_config: "PreTrainedConfig", settings: ModelSettings) -> list[Raster]:
        """The token grids that are served, the default first: those that are set, or some of its training's.

        Raises ValueError, one line, for a size that is set and can't be drawn.
        """
        patch = patch_of(hf_config)
        side = hf_config.size // (UNIT * patch)
        usual = [trained_grid(*ratio, side) for ratio in RATIOS]
        return rasters_of(settings, [*dict.fromkeys(usual)], patch, unit=UNIT * patch)

    def resolve(self, hf_config: "PreTrainedConfig", tokenizer: Any, settings: ModelSettings) -> None:
        """Find every id by its string, those that say the size among them."""
        vocabulary, codes = Vocabulary(hf_config, tokenizer), hf_config.vq_config.num_embeddings
        boi, _ = vocabulary[BOI], vocabulary[SEPARATOR]  # the latter raises where there is none
        # The text says width, then height; these say height, then width.
        sizes = [
            PictureSize(raster, tuple(vocabulary[_size_token(n)] for n in (raster.lines, raster.columns)))
            for raster in self.rasters(hf_config, settings)
        ]
        self.keep(
            hf_config,
            sizes,
            codes=codes,
            bos=vocabulary[BOS],
            pad=vocabulary[PAD],
            boi=boi,
            eol=vocabulary[EOL],
            first_code=vocabulary.first_code(codes, _code_names(vocabulary, codes)),
            negative=(boi, *sizes[0].grid_ids),
        )

    def prompt_ids(self, tokenizer: Any, model: ImageModel, text: str) -> list[int]:
        from vllm_kvcompress.models.prompt import encode_plain

        width, height = model.raster.pixel_size
        words = encode_plain(tokenizer, PROMPT.format(width=width, height=height, text=text))
        return [model.bos, *words, tokenizer.convert_tokens_to_ids(SEPARATOR), *model.begin]

    def negative_ids(self, tokenizer: Any, model: ImageModel, text: str, length: int) -> list[int]:
        """In the template of prompts, the one that the model knows; of no text, the tokens alone."""
        if not text.strip():
            return model.aligned(model.negative, length)
        return super().negative_ids(tokenizer, model, text, length)


def trained_grid(width: int, height: int, side: int) -> tuple[int, int]:
    """Columns and lines that pictures of a ratio had in training: of those with about ``side * side`` units.

    (item_processor.py, ``generate_crop_size_list`` and ``var_center_crop``: of as many units as fit, and of
    one column or line fewer, what is nearest to the ratio.)
    """
    most = side * side
    crops = [
        (wide, high)
        for wide in range(1, most + 1)
        for high in range(max(1, most // (wide + 1)), most // wide + 1)
    ]

    def fit(crop: tuple[int, int]) -> tuple[float, int]:
        wide, high = crop[0] * height, crop[1] * width
        return min(wide, high) / max(wide, high), crop[0] * crop[1]

    columns, lines = max(crops, key=fit)
    return UNIT * columns, UNIT * lines


def _size_token(tokens: int) -> str:
    return _SIZE.format(_NO_UNITS + tokens // UNIT)


def _code_names(vocabulary: Vocabulary, codes: int) -> Callable[[int], str]:
    """A code's name spells its number in letters; how many zeros go before it, code 0 says."""

    def name(code: int, digits: int) -> str:
        return f"IMGIMG{str(code).zfill(digits).translate(_LETTERS)}Z"

    most = len(str(codes - 1))
    digits = next((n for n in range(1, most + 1) if vocabulary.get(name(0, n)) is not None), 1)
    return lambda code: name(code, digits)


FAMILY = LuminaFamily()
