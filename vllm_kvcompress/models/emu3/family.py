"""Emu3 as a family of models: ``BAAI/Emu3-Gen-hf`` and what else has transformers' layout.

Sources: baaivision/Emu3, emu3/mllm/processing_emu3.py and image_generation.py; transformers models/emu3.
"""

import re
from math import sqrt
from typing import TYPE_CHECKING, Any, ClassVar

from vllm_kvcompress.models.aligned import RATIOS, AlignedLike, Vocabulary, rasters_of
from vllm_kvcompress.models.config import ImageModel, ModelSettings, PictureSize, patch_of
from vllm_kvcompress.policy.raster import Raster

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

    from vllm_kvcompress.models.vq import PictureDecoder

# Of Emu3's own script (image_generation.py).
SUFFIX = " masterpiece, film grained, best quality."
NEGATIVE = (
    "lowres, bad anatomy, bad hands, text, error, missing fingers, extra digit, fewer digits, cropped, "
    "worst quality, low quality, normal quality, jpeg artifacts, signature, watermark, username, blurry."
)
AREA = 720 * 720  # pixels of a picture where no size is set

# Ids differ between checkpoints; these strings don't.
_BOS, _PAD, _EOL = "<|extra_203|>", "<|endoftext|>", "<|extra_200|>"
_BOI, _IMG, _CODE = "<|image start|>", "<|image token|>", "<|visual token {:06d}|>"
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
    "out_channels": (3, 3),
}


class Emu3Family(AlignedLike):
    """Prompts say the grid in words; the unconditional branch is a text of its own."""

    name: ClassVar[str] = "Emu3"
    guidance_scale: ClassVar[float] = 3.0
    top_k: ClassVar[int] = 2048  # both of Emu3's own script

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

    def decoder(
        self, hf_config: "PreTrainedConfig", raster: Raster, dtype: "torch.dtype | None" = None
    ) -> "PictureDecoder":
        from vllm_kvcompress.models.emu3.vq import MoVQDecoder

        return MoVQDecoder(hf_config.vq_config, raster, dtype)

    def rasters(self, hf_config: "PreTrainedConfig", settings: ModelSettings) -> list[Raster]:
        """The token grids that are served, the default first: those that are set, or the usual ratios.

        Raises ValueError, one line, for a size that is set and can't be drawn.
        """
        patch = patch_of(hf_config)
        usual = [usual_grid(*ratio, patch) for ratio in RATIOS]
        return rasters_of(settings, usual, patch, unit=patch)

    def resolve(self, hf_config: "PreTrainedConfig", tokenizer: Any, settings: ModelSettings) -> None:
        """Find every id by its string, and the ids that say the grid and the default negative prompt."""
        vocabulary, codes = Vocabulary(hf_config, tokenizer), hf_config.vq_config.codebook_size
        first = vocabulary.first_code(codes, _CODE.format)
        sizes = [
            PictureSize(raster, (*_encoded(tokenizer, f"{raster.lines}*{raster.columns}"), vocabulary[_IMG]))
            for raster in self.rasters(hf_config, settings)
        ]
        begin = [vocabulary[_BOI], *sizes[0].grid_ids]
        words = _encoded(tokenizer, NEGATIVE) if settings.default_texts else []
        own = {"suffix": SUFFIX, "negative_text": NEGATIVE} if settings.default_texts else {}
        self.keep(
            hf_config,
            sizes,
            codes=codes,
            bos=vocabulary[_BOS],
            pad=vocabulary[_PAD],
            boi=vocabulary[_BOI],
            eol=vocabulary[_EOL],
            first_code=first,
            negative=(vocabulary[_BOS], *words, *begin),
            **own,
        )

    def prompt_ids(self, tokenizer: Any, model: ImageModel, text: str) -> list[int]:
        return [model.bos, *_encoded(tokenizer, text), *model.begin]


def usual_grid(width: int, height: int, patch: int) -> tuple[int, int]:
    """Columns and lines of a picture of Emu3's area in a ratio, rounded as Emu3's processor does.

    (processing_emu3.py, ``calculate_generate_size``; halves go to the even number, as Python's do.)
    """
    side = sqrt(AREA / (width * height))
    return round(width * side / patch), round(height * side / patch)


def _encoded(tokenizer: Any, text: str) -> list[int]:
    from vllm_kvcompress.models.prompt import encode_plain

    return encode_plain(tokenizer, text)


FAMILY = Emu3Family()
