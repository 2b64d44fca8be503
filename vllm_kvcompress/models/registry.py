"""Which models this plugin serves, and where the rest of the package finds their description."""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_kvcompress.models.config import ImageModel
from vllm_kvcompress.models.janus_config import ORIGINAL_LAYOUT, TRANSFORMERS_LAYOUT

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from vllm.config import ModelConfig

    from vllm_kvcompress.models.family import Family

# architecture name in config.json -> our model class, as vLLM's registry wants it (imported lazily)
ARCHITECTURES = {
    "MultiModalityCausalLM": "vllm_kvcompress.models.janus:JanusForImageGeneration",
    "JanusForConditionalGeneration": "vllm_kvcompress.models.janus:JanusForImageGeneration",
    "LlamaGenForImageGeneration": "vllm_kvcompress.models.llamagen.model:LlamaGenForImageGeneration",
    "Emu3ForConditionalGeneration": "vllm_kvcompress.models.emu3.model:Emu3ForImageGeneration",
    "LuminaMGPTForImageGeneration": "vllm_kvcompress.models.lumina.model:LuminaForImageGeneration",
}
# model_type in config.json -> the module that holds its ``FAMILY``
FAMILIES = {
    ORIGINAL_LAYOUT: "vllm_kvcompress.models.janus_family",
    TRANSFORMERS_LAYOUT: "vllm_kvcompress.models.janus_family",
    "llamagen": "vllm_kvcompress.models.llamagen.family",
    "emu3": "vllm_kvcompress.models.emu3.family",
    "lumina_mgpt": "vllm_kvcompress.models.lumina.family",
}

_TEMPLATES = Path(__file__).parent / "templates"
# model_type -> chat template of checkpoints that have none
CHAT_TEMPLATES = {
    ORIGINAL_LAYOUT: _TEMPLATES / "janus_pro.jinja",  # Janus-Pro's roles
    "llamagen": _TEMPLATES / "no_chat.jinja",  # an error that says so
    "emu3": _TEMPLATES / "no_chat.jinja",
    "lumina_mgpt": _TEMPLATES / "no_chat.jinja",
}

_DEFAULTS = "kvcompress_defaults"
_MAX_TOKENS = "kvcompress_max_tokens"


def serves(model_config: "ModelConfig") -> bool:
    """Whether the model is one of ours, and the operator has not asked for transformers' implementation."""
    return getattr(model_config, "model_impl", "auto") != "transformers" and knows(model_config)


def knows(model_config: "ModelConfig") -> bool:
    """Whether the model is one of ours, whoever serves it."""
    return any(arch in ARCHITECTURES for arch in getattr(model_config.hf_config, "architectures", None) or ())


def family_of(hf_config: "PreTrainedConfig") -> "Family":
    """The family of a checkpoint's configuration. RuntimeError if it is none of ours."""
    module = FAMILIES.get(hf_config.model_type)
    if module is None:
        raise RuntimeError(f"vllm-kvcompress serves no model of type {hf_config.model_type!r}")
    return import_module(module).FAMILY


def store_defaults(
    hf_config: "PreTrainedConfig", defaults: dict[str, Any], max_tokens: int | None = None
) -> None:
    """Keep what generation_config.json says with the configuration, so that every process has it.

    ``max_tokens``: see `default_max_tokens`.
    """
    setattr(hf_config, _DEFAULTS, defaults)
    setattr(hf_config, _MAX_TOKENS, max_tokens)


def default_max_tokens(model_config: "ModelConfig") -> int | None:
    """``max_tokens`` that vLLM's front ends fill in, or cap requests with: generation_config.json's, or
    ``--override-generation-config``'s ``max_new_tokens``."""
    return getattr(model_config.hf_config, _MAX_TOKENS, None)


def image_model_of(hf_config: "PreTrainedConfig") -> ImageModel:
    """The description of a configuration that its family has resolved."""
    return family_of(hf_config).describe(hf_config, getattr(hf_config, _DEFAULTS, {}))


def image_model(model_config: "ModelConfig") -> ImageModel:
    """The description of the served model. RuntimeError when the model is not ours."""
    return image_model_of(model_config.hf_config)
