"""Emu3 drawing pictures: a plain Llama with grouped queries, both branches of guidance in every row.

Source of the architecture: transformers models/emu3; baaivision/Emu3, emu3/mllm/modeling_emu3.py.
"""

from typing import Any

from torch import Tensor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.utils import maybe_prefix

from vllm_kvcompress.models.branched import BranchedImageModel


class Emu3ForImageGeneration(BranchedImageModel):
    """One table embeds words and codes; of the head only the codes' rows are kept."""

    def _make_embedding(self, hidden_size: int) -> None:
        """Codes are ids of the vocabulary."""

    def _make_heads(self, text: Any, prefix: str) -> None:
        self.gen_head = ParallelLMHead(
            self.image.codes, text.hidden_size, prefix=maybe_prefix(prefix, "gen_head")
        )

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        # A place without a draft holds -1: any id will do there, since no sample is ever -1.
        embeds: Tensor = self.language_model.embed_tokens(input_ids.clamp(min=0))
        return embeds

    def _code_logits(self, hidden: Tensor) -> Tensor:
        return self.image_logits(self.gen_head, hidden)
