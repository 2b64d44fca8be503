"""Emu3 as a family of models: ``BAAI/Emu3-Gen-hf`` and what else has transformers' layout.

Sources: baaivision/Emu3, emu3/mllm/processing_emu3.py and image_generation.py; transformers models/emu3.
"""

import re
from collections.abc import Mapping
from math import sqrt
from typing import TYPE_CHECKING, Any, ClassVar

from vllm_kvcompress.models.config import ImageModel, ModelSettings, PictureSize
from vllm_kvcompress.policy.raster import Raster

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

    from vllm_kvcompress.models.vq import PictureDecoder

GUIDANCE_SCALE, TOP_K = 3.0, 2048  # Emu3's own script (image_generation.py), as the next two
SUFFIX = " masterpiece, film grained, best quality."
NEGATIVE = (
    "lowres, bad anatomy, bad hands, text, error, missing fingers, extra digit, fewer digits, cropped, "
    "worst quality, low quality, normal quality, jpeg artifacts, signature, watermark, username, blurry."
)
AREA = 720 * 720  # pixels of a picture where no size is set
RATIOS = ((1, 1), (4, 3), (3, 4), (3, 2), (2, 3), (16, 9), (9, 16))  # and its width to its height
MOST_TOKENS = 32767  # of a picture: what a head rule can count
LEAST_PROMPT = 64  # tokens that a size of the model's own list leaves for the prompt

# Ids differ between checkpoints; these strings don't.
_BOS, _PAD, _EOL = "<|extra_203|>", "<|endoftext|>", "<|extra_200|>"
_BOI, _IMG, _CODE = "<|image start|>", "<|image token|>", "<|visual token {:06d}|>"
_RESOLVED = "kvcompress_emu3"
_RENAME = (
    (re.compile(r"^(?:text_model\.model|model\.text_model)\."), "language_model."),
    (re.compile(r"^text_model\.lm_head\."), "lm_head."),
    (re.compile(r"^vqmodel\."), "model.vqmodel."),
)
VQ_SIZES = {
    "codebook_size": (2, 1 << 20),
    "embed_dim": (1, 4096),
    "latent_channels": (1, 4096),
    "base_channels": (1, 1024),
    "num_res_blocks": (0, 16),
    "hidden_size": (1, 1 << 16),
    "temporal_downsample_factor": (1, 64),
}


class Emu3Family:
    """Prompts say the grid; the unconditional branch is a text of its own, of any length."""

    name: ClassVar[str] = "Emu3"
    sentences: ClassVar[bool] = True
    evaluated: ClassVar[bool] = False

    def check(self, hf_config: "PreTrainedConfig") -> None:
        from vllm_kvcompress.models.checkpoint import check_channels, check_numbers, check_text

        vq = hf_config.vq_config
        check_channels(vq.channel_multiplier)
        check_numbers(vq, VQ_SIZES)
        check_text(hf_config.get_text_config())
        width = vq.base_channels * vq.channel_multiplier[-1]
        if vq.embed_dim != vq.latent_channels or vq.hidden_size != width:
            raise ValueError(
                f"config.json: vq_config must have embed_dim as latent_channels, and hidden_size {width}; "
                f"got {vq.embed_dim}, {vq.latent_channels} and {vq.hidden_size}"
            )
        if hf_config.tie_word_embeddings:
            raise ValueError("config.json: tie_word_embeddings must be false: Emu3 has a head of its own")

    def canonical_name(self, name: str) -> str | None:
        """Of either of transformers' layouts; what belongs to the VQ model is the decoder's business."""
        for pattern, new in _RENAME:
            name, hit = pattern.subn(new, name)
            if hit:
                break
        return None if name.endswith("rotary_emb.inv_freq") else name

    def shapes(self, hf_config: "PreTrainedConfig") -> dict[str, tuple[int, ...]]:
        from vllm_kvcompress.models.weights import decoder_shapes

        text = hf_config.get_text_config()
        return decoder_shapes(text) | {"lm_head.weight": (text.vocab_size, text.hidden_size)}

    def decoder(
        self, hf_config: "PreTrainedConfig", raster: Raster, dtype: "torch.dtype | None" = None
    ) -> "PictureDecoder":
        from vllm_kvcompress.models.emu3.vq import MoVQDecoder

        return MoVQDecoder(hf_config.vq_config, raster, dtype)

    def rasters(self, hf_config: "PreTrainedConfig", settings: ModelSettings) -> list[Raster]:
        """The token grids that are served, the default first: those that are set, or the usual ratios.

        Raises ValueError, one line, for a size that is set and can't be drawn.
        """
        patch = 2 ** (len(hf_config.vq_config.channel_multiplier) - 1)
        setting = f"additional_config.kvcompress.{'sizes' if settings.sizes else 'size'}"
        for width, height in settings.named:
            if width % patch or height % patch:
                raise ValueError(
                    f"{setting}: {width}x{height} is no multiple of the model's {patch} pixels a token"
                )
        grids = [(width // patch, height // patch) for width, height in settings.named]
        rasters = [
            Raster(lines, columns + 1, patch, ends=1)
            for columns, lines in grids or [usual_grid(*ratio, patch) for ratio in RATIOS]
        ]
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

    def resolve(self, hf_config: "PreTrainedConfig", tokenizer: Any, settings: ModelSettings) -> None:
        """Find every id by its string, and the ids that say the grid and the default negative prompt."""
        vocabulary = _Vocabulary(hf_config, tokenizer)
        codes = hf_config.vq_config.codebook_size
        first = vocabulary[_CODE.format(0)]
        gap = next((n for n in range(codes) if vocabulary.get(_CODE.format(n)) != first + n), None)
        if gap is not None:
            raise ValueError(
                f"config.json: vocabulary_map gives {_CODE.format(gap)} another id than {first + gap}: the "
                "ids of codes must follow one another"
            )
        sizes = [
            PictureSize(raster, (*_encoded(tokenizer, f"{raster.lines}*{raster.columns}"), vocabulary[_IMG]))
            for raster in self.rasters(hf_config, settings)
        ]
        raster, grid = sizes[0]
        begin = [vocabulary[_BOI], *grid]
        words = _encoded(tokenizer, NEGATIVE) if settings.default_texts else []
        found = {
            "raster": raster,
            "more_sizes": tuple(sizes[1:]),
            "bos": vocabulary[_BOS],
            "pad": vocabulary[_PAD],
            "boi": vocabulary[_BOI],
            "eol": vocabulary[_EOL],
            "first_code": first,
            "grid_ids": grid,
            "negative": (vocabulary[_BOS], *words, *begin),
        }
        if settings.default_texts:
            found |= {"suffix": SUFFIX, "negative_text": NEGATIVE}
        setattr(hf_config, _RESOLVED, found)

    def describe(self, hf_config: "PreTrainedConfig", defaults: Mapping[str, Any]) -> ImageModel:
        found = getattr(hf_config, _RESOLVED, None)
        if found is None:
            raise RuntimeError("the model's token ids were never resolved: is the kvcompress plugin loaded?")
        return ImageModel(
            text_vocab=hf_config.get_text_config().vocab_size,
            codes=hf_config.vq_config.codebook_size,
            writes=False,
            **found,
            **{"guidance_scale": GUIDANCE_SCALE, "top_k": TOP_K, **defaults},
        )

    def prompt_ids(self, tokenizer: Any, model: ImageModel, text: str) -> list[int]:
        return [model.bos, *_encoded(tokenizer, text), *model.begin]

    def negative_ids(self, tokenizer: Any, model: ImageModel, text: str, length: int) -> list[int]:
        return model.aligned(self.prompt_ids(tokenizer, model, text), length)

    def lengthened(self, model: ImageModel, prompt_ids: list[int], length: int) -> list[int]:
        return model.aligned(prompt_ids, length)

    def calibration_ids(self, tokenizer: Any, model: ImageModel, number: int) -> list[int]:
        from vllm_kvcompress.heads.calibrate import PROMPTS

        ids = self.prompt_ids(tokenizer, model, PROMPTS[number] + model.suffix)
        return model.aligned(ids, len(model.negative))


def usual_grid(width: int, height: int, patch: int) -> tuple[int, int]:
    """Columns and lines of a picture of Emu3's area in a ratio, rounded as Emu3's processor does.

    (processing_emu3.py, ``calculate_generate_size``; halves go to the even number, as Python's do.)
    """
    side = sqrt(AREA / (width * height))
    return round(width * side / patch), round(height * side / patch)


class _Vocabulary:
    """Ids by string: config.json's ``vocabulary_map``, else the tokenizer's."""

    def __init__(self, hf_config: "PreTrainedConfig", tokenizer: Any) -> None:
        self._ids: dict[str, int] = getattr(hf_config, "vocabulary_map", None) or tokenizer.get_vocab()
        self._size = hf_config.get_text_config().vocab_size

    def get(self, token: str) -> int | None:
        found = self._ids.get(token)
        return found if type(found) is int and 0 <= found < self._size else None

    def __getitem__(self, token: str) -> int:
        if (found := self.get(token)) is None:
            raise ValueError(
                f"config.json: vocabulary_map has no id for {token} below vocab_size {self._size}"
            )
        return found


def _encoded(tokenizer: Any, text: str) -> list[int]:
    from vllm_kvcompress.models.prompt import encode_plain

    return encode_plain(tokenizer, text)


FAMILY = Emu3Family()
