"""Janus and Janus-Pro as a family of models."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from vllm_kvcompress.models.config import ImageModel, ModelSettings, raster_of, text_vocab_size
from vllm_kvcompress.models.family import JanusLike

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_SPECIAL_IDS = "kvcompress_special_ids"


class JanusFamily(JanusLike):
    """Prompts are text that ends in begin-of-image; image ids come after the text's."""

    name: ClassVar[str] = "Janus or Janus-Pro"
    sentences: ClassVar[bool] = True

    def shapes(self, hf_config: "PreTrainedConfig") -> dict[str, tuple[int, ...]]:
        from vllm_kvcompress.models.weights import expected_shapes

        return expected_shapes(hf_config)

    def resolve(self, hf_config: "PreTrainedConfig", tokenizer: Any, settings: ModelSettings) -> None:
        """Find begin-of-sentence, padding and begin-of-image by name: ids differ between checkpoints."""
        from vllm_kvcompress.models.tokenizer import check_tokenizer, resolve_special_ids

        self.one_size(hf_config, settings)
        check_tokenizer(tokenizer)
        setattr(hf_config, _SPECIAL_IDS, resolve_special_ids(tokenizer))

    def describe(self, hf_config: "PreTrainedConfig", defaults: Mapping[str, Any]) -> ImageModel:
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
            **defaults,
        )

    def prompt_ids(self, tokenizer: Any, model: ImageModel, text: str) -> list[int]:
        from vllm_kvcompress.models.prompt import image_prompt_ids

        return image_prompt_ids(tokenizer, model, text)

    def negative_ids(self, tokenizer: Any, model: ImageModel, text: str, length: int) -> list[int]:
        from vllm_kvcompress.models.prompt import negative_ids

        return negative_ids(tokenizer, model, text, length)

    def lengthened(self, model: ImageModel, prompt_ids: list[int], length: int) -> list[int]:
        from vllm_kvcompress.models.prompt import lengthened

        return lengthened(model, prompt_ids, length)

    def calibration_ids(self, tokenizer: Any, model: ImageModel, prompt: int | str) -> list[int]:
        from vllm_kvcompress.heads.calibrate import text_of

        return self.prompt_ids(tokenizer, model, text_of(prompt))


FAMILY = JanusFamily()
