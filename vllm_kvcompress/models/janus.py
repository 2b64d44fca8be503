"""Janus and Janus-Pro: heads for words and for codes, and the tower for pictures that are sent.

Source of the architecture and of the recipe: deepseek-ai/Janus, janus/models/modeling_vlm.py and
generation_inference.py; transformers models/janus.
"""

from typing import Any

from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.interfaces import MultiModalEmbeddings, SupportsMultiModal
from vllm.model_executor.models.utils import _merge_multimodal_embeddings, maybe_prefix
from vllm.multimodal import MULTIMODAL_REGISTRY

from vllm_kvcompress.models.branched import BranchedImageModel, decoder_named
from vllm_kvcompress.models.pictures import PIXELS, DummyPictures, PictureInfo, PictureProcessor, looks
from vllm_kvcompress.models.tokenizer import IMAGE
from vllm_kvcompress.models.vision import JanusVision, pixels_of
from vllm_kvcompress.models.vision_sizes import vision_sizes


@MULTIMODAL_REGISTRY.register_processor(PictureProcessor, info=PictureInfo, dummy_inputs=DummyPictures)
class JanusForImageGeneration(BranchedImageModel, SupportsMultiModal):
    """Janus and Janus-Pro, both published layouts; pictures in chats go through ``vision``."""

    # The unconditional branch, and which rows draw, are read off the ids.
    requires_raw_input_tokens = True
    hf_to_vllm_mapper = decoder_named("model.language_model.", "language_model.model.")

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        if looks(vllm_config.model_config):
            name = maybe_prefix(prefix, "vision")
            self.vision = JanusVision(vision_sizes(self.config), self.hidden_size, name)

    def embed_input_ids(
        self,
        input_ids: Tensor,
        multimodal_embeddings: MultiModalEmbeddings | None = None,
        *,
        is_multimodal: Tensor | None = None,
    ) -> Tensor:
        """``[tokens]`` ids of the one id space -> ``[tokens, hidden]``.

        ``multimodal_embeddings`` take the places that ``is_multimodal`` (bool ``[tokens]``) marks, in order.
        """
        embeds = super().embed_input_ids(input_ids)
        if multimodal_embeddings is None or not len(multimodal_embeddings):
            return embeds
        assert is_multimodal is not None
        return _merge_multimodal_embeddings(embeds, multimodal_embeddings, is_multimodal)

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        if modality == "image":
            return IMAGE
        raise ValueError(f"only pictures can be part of a chat, got {modality}")

    def embed_multimodal(self, **kwargs: Any) -> MultiModalEmbeddings:
        """``[tokens, hidden]`` of each picture, in order: of its pixels, or as it was sent."""
        if (pixels := kwargs.get(PIXELS)) is not None:
            assert self.vision is not None
            return self.vision(pixels_of(pixels, self.vision.sizes))
        return kwargs.get("image_embeds", ())

    def _make_heads(self, text: Any, prefix: str) -> None:
        self.lm_head = ParallelLMHead(
            text.vocab_size, text.hidden_size, prefix=maybe_prefix(prefix, "lm_head")
        )
        self.gen_head_proj = ReplicatedLinear(text.hidden_size, text.hidden_size, return_bias=False)
        self.gen_head = ParallelLMHead(
            self.image.codes, text.hidden_size, bias=True, prefix=maybe_prefix(prefix, "gen_head")
        )
        self.text_logits = LogitsProcessor(text.vocab_size)

    def _code_logits(self, hidden: Tensor) -> Tensor:
        x = nn.functional.gelu(self.gen_head_proj(hidden))
        return self.image_logits(self.gen_head, x, self.gen_head.bias)

    def _text_logits(self, hidden: Tensor) -> Tensor:
        return self.text_logits(self.lm_head, hidden)
