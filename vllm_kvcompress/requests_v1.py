"""How the V1 model runner tells the model about requests: a logits processor that processes nothing.

vLLM calls ``update_state`` before every forward with the requests that entered, left or moved in the
batch; that is all that guidance needs of them. The class is listed in the served model's own configuration,
not as an entry point, so other models never load it. Which row a token is of the runner tells attention
backends alone, so it is heard there.
"""

from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import entry_points
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import CommonAttentionMetadata, subclass_attention_backend
from vllm.v1.sample.logits_processor import LOGITSPROCS_GROUP
from vllm.v1.sample.logits_processor.interface import BatchUpdate, MoveDirectionality
from vllm.v1.sample.logits_processor.interface import LogitsProcessor as V1LogitsProcessor
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor as V2LogitsProcessor

from vllm_kvcompress.patches import drafts, seeds
from vllm_kvcompress.rows import RequestFacts, RequestRows, request_rows
from vllm_kvcompress.sampling import patch_v1
from vllm_kvcompress.windows.drawing import Drawing


class RequestTracker(V1LogitsProcessor, V2LogitsProcessor):
    """Keeps ``RequestRows`` in step with the V1 runner's batch.

    It is both runners' class because each refuses the other's; the V2 runner has a better place for
    the same facts (``JanusModelState``), so there it does nothing.
    """

    def __init__(self, vllm_config: Any, *runner_specific: Any) -> None:
        self.rows = request_rows(vllm_config)
        # Other processors may look at any id: those of the command line, and those that vLLM loads from
        # every installed package. It builds them without telling one of another.
        listed = len(vllm_config.model_config.logits_processors or ())
        self.rows.narrow_allowed = listed <= 1 and not entry_points(group=LOGITSPROCS_GROUP)
        patch_v1()
        drafts.apply()
        if vllm_config.device_config.device_type == "cpu":
            seeds.apply()

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Guidance arguments are checked at admission (``admission.py``), with the prompt at hand."""

    def is_argmax_invariant(self) -> bool:
        # The logits stay as they are, and vLLM skips the class altogether in greedy batches.
        return True

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        if batch_update is not None:
            for row in batch_update.removed:
                self.rows.remove(row)
            for row, params, prompt, outputs in batch_update.added:
                facts = RequestFacts.read(params, prompt, self.rows.model)
                if not facts.is_text:
                    facts = replace(facts, drawing=self._drawing(params, prompt or (), outputs, facts))
                self.rows.add(row, facts)
            for source, target, direction in batch_update.moved:
                self.rows.move(source, target, swap=direction == MoveDirectionality.SWAP)
        self.rows.flush()

    def _drawing(
        self, params: Any, prompt: Sequence[int], outputs: list[int], facts: RequestFacts
    ) -> Drawing:
        # vLLM's own generator, so that an engine's seed decides unseeded pictures too.
        seed = int(torch.randint(2**62, ())) if params.seed is None else params.seed
        model = self.rows.model
        line = model.sizes[facts.size].raster.width
        return Drawing(seed, line, prompt[facts.prefix :], outputs, model.eol)

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        return False

    def apply(self, logits: Tensor, ctx: Any = None) -> Tensor:
        return logits


def hear_token_rows(layer: Attention, rows: RequestRows) -> None:
    """From now on the layer's metadata builder also tells ``rows`` which row each token is of.

    The builders' input has that, and what they make of it is their own: FlashInfer's metadata has no
    ``query_start_loc``. vLLM's own local and cross attention extend backends in the same way.
    """
    backend = layer.attn_backend

    class Builder(backend.get_builder_cls()):  # type: ignore[misc]
        def build(
            self,
            common_prefix_len: int,
            common_attn_metadata: CommonAttentionMetadata,
            fast_build: bool = False,
        ) -> Any:
            rows.place_tokens(common_attn_metadata.query_start_loc)
            return super().build(common_prefix_len, common_attn_metadata, fast_build)

    layer.attn_backend = subclass_attention_backend("TokenRows", backend, Builder)
