"""config.json of a converted Lumina-mGPT: model type ``lumina_mgpt``, written by ``vllm-kvcompress convert``.

Published files say ``chameleon``, as Chameleon's and Anole's do, which draw otherwise; and they lack the VQ
model, whose sizes this one has.
"""

from typing import Any, ClassVar

from transformers import JanusVQVAEConfig, LlamaConfig, PreTrainedConfig

from vllm_kvcompress.models.sections import reading

MODEL_TYPE = "lumina_mgpt"
ARCHITECTURE = "LuminaMGPTForImageGeneration"


class LuminaConfig(PreTrainedConfig):
    """Sizes of a Lumina-mGPT and of its VQ decoder.

    ``text_config`` has Llama's keys, ``vq_config`` those of Janus's VQ model. ``size`` is the side of the
    square, in pixels, that the checkpoint was trained for; ``qk_norm_shape`` the shape that the checkpoint
    has of the norms of queries and keys: ``[128]``, or ``[rows, 128]``.
    """

    model_type = MODEL_TYPE
    sub_configs: ClassVar[dict[str, Any]] = {"text_config": LlamaConfig, "vq_config": JanusVQVAEConfig}

    @reading()
    def __init__(self, **kwargs: Any) -> None:
        sections = {name: kwargs.pop(name, None) for name in self.sub_configs}
        if kwargs:  # transformers makes empty ones to compare with
            for name, section in sections.items():
                if not isinstance(section, (dict, PreTrainedConfig)):
                    raise ValueError(f"config.json: {name} must be an object: convert the checkpoint again")
        dtype = kwargs.pop("torch_dtype", None) or kwargs.pop("dtype", None)
        text, vq = (
            section if isinstance(section, dict) else {} if section is None else section.to_dict()
            for section in sections.values()
        )
        self.text_config = LlamaConfig(**{**text, "dtype": dtype or text.get("dtype")})
        self.vq_config = JanusVQVAEConfig(**vq)
        self.size = kwargs.pop("size", 768)
        self.qk_norm_shape = kwargs.pop("qk_norm_shape", [])
        kwargs["tie_word_embeddings"] = False
        super().__init__(dtype=self.text_config.dtype, **kwargs)
