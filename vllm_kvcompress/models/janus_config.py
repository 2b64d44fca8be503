"""The published Janus configurations: deepseek-ai's own layout, which transformers does not know.

Two layouts exist (facts and traps: the project's notes on Janus-Pro): deepseek-ai's own
(``model_type: multi_modality``) and deepseek-community's (``model_type: janus``,
``transformers.JanusConfig``). ``ImageModel.from_hf`` reads either.
"""

from typing import Any, ClassVar

from transformers import JanusVQVAEConfig, LlamaConfig, PreTrainedConfig

from vllm_kvcompress.models.sections import reading, section, section_params

ORIGINAL_LAYOUT = "multi_modality"
TRANSFORMERS_LAYOUT = "janus"
# deepseek-ai's model code builds its VQ model without arguments, so these values never appear in a
# published config.json; a small checkpoint states its own in gen_vision_config.params.
_VQ_16: dict[str, Any] = {
    "image_token_size": 16384,
    "n_embed": 8,
    "z_channels": 256,
    "ch": 128,
    "ch_mult": [1, 1, 2, 2, 4],
    "num_res_blocks": 2,
}


class MultiModalityConfig(PreTrainedConfig):
    """config.json of deepseek-ai/Janus-Pro-1B, -7B and Janus-1.3B.

    ``language_config`` may leave out sizes: they then have LlamaConfig's defaults, which is what
    Janus-Pro-7B relies on.
    """

    model_type = ORIGINAL_LAYOUT
    sub_configs: ClassVar[dict[str, Any]] = {"text_config": LlamaConfig, "vq_config": JanusVQVAEConfig}

    @reading()
    def __init__(self, **kwargs: Any) -> None:
        sections = {
            name: kwargs.pop(name, None)
            for name in (
                "language_config", "gen_vision_config", "gen_aligner_config", "gen_head_config",
                "vision_config", "aligner_config",
            )
        }  # fmt: skip
        for name in ("text_config", "vq_config"):  # derived below; present when read back from disk
            kwargs.pop(name, None)
        if kwargs and not sections["gen_vision_config"]:
            raise ValueError(
                "config.json has no gen_vision_config: not a Janus or Janus-Pro checkpoint "
                "(JanusFlow draws by rectified flow, not token by token, and is not supported)"
            )
        language = section(sections["language_config"], "language_config")
        language.pop("model_type", None)
        dtype = kwargs.pop("torch_dtype", None) or kwargs.pop("dtype", None)
        language.setdefault("dtype", dtype or language.pop("torch_dtype", None))
        language.pop("torch_dtype", None)
        self.text_config = LlamaConfig(**language)
        kwargs["dtype"] = self.text_config.dtype
        # Stored tensors are always both there, and different.
        kwargs["tie_word_embeddings"] = False

        vq = {**_VQ_16, **section_params(sections["gen_vision_config"], "gen_vision_config")}
        if not isinstance(vq["ch_mult"], list) or not 1 <= len(vq["ch_mult"]) <= 8:
            raise ValueError(
                "config.json: gen_vision_config.params.ch_mult must be a list of 1 to 8 numbers, got "
                f"{vq['ch_mult']!s:.60}"
            )
        image_size = section_params(sections["vision_config"], "vision_config").get("image_size", 384)
        if type(image_size) is not int:
            raise ValueError(
                f"config.json: vision_config.params.image_size must be a number, got {image_size!r:.60}"
            )
        downsampling = 2 ** (len(vq["ch_mult"]) - 1)
        if image_size % downsampling:
            raise ValueError(
                f"vision_config.params.image_size {image_size} is not a multiple of the VQ decoder's "
                f"{downsampling} pixels a token"
            )
        hidden = self.text_config.hidden_size
        self.vq_config = JanusVQVAEConfig(
            embed_dim=vq["n_embed"],
            num_embeddings=vq["image_token_size"],
            latent_channels=vq["z_channels"],
            base_channels=vq["ch"],
            channel_multiplier=list(vq["ch_mult"]),
            num_res_blocks=vq["num_res_blocks"],
            num_patches=image_size // downsampling,
            projection_dim=hidden,
            image_token_embed_dim=hidden,
        )
        super().__init__(**kwargs)
        for name, value in sections.items():
            setattr(self, name, value)
