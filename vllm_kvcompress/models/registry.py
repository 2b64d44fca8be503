"""Which models this plugin serves, and where the rest of the package finds their description."""

from pathlib import Path
from typing import TYPE_CHECKING

from vllm_kvcompress.models.config import ImageModel, raster_of, text_vocab_size

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from vllm.config import ModelConfig

# architecture name in config.json -> our model class, as vLLM's registry wants it (imported lazily)
ARCHITECTURES = {
    "MultiModalityCausalLM": "vllm_kvcompress.models.janus:JanusForImageGeneration",
    "JanusForConditionalGeneration": "vllm_kvcompress.models.janus:JanusForImageGeneration",
}

# Janus-Pro's roles; the original layout's files hold no chat template.
CHAT_TEMPLATE = Path(__file__).parent / "templates" / "janus_pro.jinja"

_SPECIAL_IDS = "kvcompress_special_ids"
_GUIDANCE_SCALE = "kvcompress_guidance_scale"


def serves(model_config: "ModelConfig") -> bool:
    """Whether the model is one of ours."""
    return any(arch in ARCHITECTURES for arch in getattr(model_config.hf_config, "architectures", None) or ())


def store_special_ids(hf_config: "PreTrainedConfig", bos: int, pad: int, boi: int) -> None:
    """Keep the tokenizer's ids with the configuration, so that every process has them."""
    setattr(hf_config, _SPECIAL_IDS, (bos, pad, boi))


def store_guidance_scale(hf_config: "PreTrainedConfig", scale: float) -> None:
    """Keep the checkpoint's default guidance scale with the configuration."""
    setattr(hf_config, _GUIDANCE_SCALE, scale)


def image_model_of(hf_config: "PreTrainedConfig") -> ImageModel:
    """The description of a configuration that ``store_special_ids`` has completed."""
    ids = getattr(hf_config, _SPECIAL_IDS, None)
    if ids is None:
        raise RuntimeError(
            "the model's special token ids were never resolved: is the kvcompress plugin loaded?"
        )
    bos, pad, boi = ids
    return ImageModel(
        raster=raster_of(hf_config),
        text_vocab=text_vocab_size(hf_config),
        codes=hf_config.vq_config.num_embeddings,
        bos=bos,
        pad=pad,
        boi=boi,
        guidance_scale=getattr(hf_config, _GUIDANCE_SCALE, ImageModel.guidance_scale),
    )


def image_model(model_config: "ModelConfig") -> ImageModel:
    """The description of the served model. RuntimeError when the model is not ours."""
    return image_model_of(model_config.hf_config)
