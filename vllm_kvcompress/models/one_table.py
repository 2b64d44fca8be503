"""Models whose codes are ids of the text's vocabulary: one table embeds both, one head predicts both."""

from torch import Tensor

from vllm_kvcompress.models.branched import BranchedImageModel


class OneTableImageModel(BranchedImageModel):
    """Of the head only the codes' rows are kept: such a model is asked for pictures alone."""

    def _make_embedding(self, hidden_size: int) -> None:
        """Codes are ids of the vocabulary."""

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        # A place without a draft holds -1: any id will do there, since no sample is ever -1.
        embeds: Tensor = self.language_model.embed_tokens(input_ids.clamp(min=0))
        return embeds
