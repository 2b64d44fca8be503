"""LlamaGen's class-conditional models as a family of models."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from vllm_kvcompress.models.config import ImageModel, ModelSettings, raster_of
from vllm_kvcompress.models.family import JanusLike
from vllm_kvcompress.models.llamagen.tokenizer import check_names, class_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

GUIDANCE_SCALE, TOP_K = 4.0, 2000  # LlamaGen's own demo (autoregressive/sample/sample_c2i.py)


class LlamaGenFamily(JanusLike):
    """A prompt is one class; the unconditional branch has the null class, or another class of the user's."""

    name: ClassVar[str] = "LlamaGen"
    sentences: ClassVar[bool] = False

    def shapes(self, hf_config: "PreTrainedConfig") -> dict[str, tuple[int, ...]]:
        from vllm_kvcompress.models.weights import decoder_shapes

        text = hf_config.get_text_config()
        table = (hf_config.vq_config.num_embeddings, text.hidden_size)
        return {**decoder_shapes(text), "image_embedding.weight": table, "gen_head.weight": table}

    def resolve(self, hf_config: "PreTrainedConfig", tokenizer: Any, settings: ModelSettings) -> None:
        self.one_size(hf_config, settings)
        check_names(tokenizer, hf_config.num_classes)

    def describe(self, hf_config: "PreTrainedConfig", defaults: Mapping[str, Any]) -> ImageModel:
        classes = hf_config.num_classes
        return ImageModel(
            raster=raster_of(hf_config),
            text_vocab=classes + 1,
            codes=hf_config.vq_config.num_embeddings,
            bos=-1,
            pad=classes,
            boi=-1,
            classes=classes,
            writes=False,
            **{"guidance_scale": GUIDANCE_SCALE, "top_k": TOP_K, **defaults},
        )

    def prompt_ids(self, tokenizer: Any, model: ImageModel, text: str) -> list[int]:
        return [class_of(tokenizer, model.classes, text)]

    def negative_ids(self, tokenizer: Any, model: ImageModel, text: str, length: int) -> list[int]:
        return [class_of(tokenizer, model.classes, text)]

    def lengthened(self, model: ImageModel, prompt_ids: list[int], length: int) -> list[int]:
        return prompt_ids  # every prompt is one class

    def calibration_ids(self, tokenizer: Any, model: ImageModel, prompt: int | str) -> list[int]:
        from vllm_kvcompress.heads.calibrate import PROMPTS

        if isinstance(prompt, str):
            return self.prompt_ids(tokenizer, model, prompt)
        return [prompt * model.classes // len(PROMPTS)]  # spread evenly over the classes


FAMILY = LlamaGenFamily()
