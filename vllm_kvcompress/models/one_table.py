"""Models whose codes are ids of the text's vocabulary: one table embeds both, one head predicts both."""

from typing import Any

from torch import Tensor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.utils import maybe_prefix

from vllm_kvcompress.models.branched import BranchedImageModel


class OneTableImageModel(BranchedImageModel):
    """Of the head only the codes' rows are kept: such a model is asked for pictures alone."""

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
