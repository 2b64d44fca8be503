"""A model that draws pictures, of whatever family: branches, requests, logits, cache around vLLM's Llama."""

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.utils import WeightsMapper, maybe_prefix

from vllm_kvcompress import last_word
from vllm_kvcompress.attention.pages import BRANCHES
from vllm_kvcompress.cache.store import CompressedCache
from vllm_kvcompress.config import is_compressed
from vllm_kvcompress.guidance import (
    LINE_END,
    TEXT_ROW,
    blend,
    pack_scale,
    splice_negatives,
    unconditional_ids,
    unpack_scale,
    with_line_ends,
)
from vllm_kvcompress.log import logger_for
from vllm_kvcompress.models.branched_llama import BranchedLlama
from vllm_kvcompress.models.compression import plan_cache
from vllm_kvcompress.models.profiled import measured
from vllm_kvcompress.models.registry import family_of, image_model_of
from vllm_kvcompress.models.vision import JanusVision
from vllm_kvcompress.models.weights import load_weights
from vllm_kvcompress.requests_v1 import hear_token_rows
from vllm_kvcompress.rows import request_rows
from vllm_kvcompress.sampling import mark
from vllm_kvcompress.served import prepare_cpu
from vllm_kvcompress.windows.settings import describe

logger = logger_for(__name__)


class BranchedImageModel(nn.Module):
    """A prompt in, image tokens (or text) out: what families of models have in common.

    A family's class says which decoder it has, and makes what is around it. ``forward`` returns
    ``[tokens, 2 * hidden + 2]``: the branches' hidden states, and the row's guidance scale in two columns
    (``TEXT_ROW`` where the next token is text, ``LINE_END`` where it is the end of a line), which is how
    ``compute_logits``, which sees nothing but hidden rows, knows what to do with each of them.
    """

    packed_modules_mapping = LlamaForCausalLM.packed_modules_mapping  # what quantisers name apart
    decoder: ClassVar[type[BranchedLlama]] = BranchedLlama
    hf_to_vllm_mapper: ClassVar[WeightsMapper | None] = None  # names of layers that quantisers leave out

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        if vllm_config.device_config.device_type == "cpu":
            prepare_cpu()
        config = vllm_config.model_config.hf_config
        text = config.get_text_config()
        self.config = config
        self.image = image_model_of(config)
        self.hidden_size = text.hidden_size
        self.dtype: torch.dtype = torch.get_default_dtype()  # what vLLM loads the model in
        self.fingerprint = ""  # of the weights, set when they are loaded
        self.head_profile: Any = None  # the profile that this process has measured
        self.trials: dict[Any, Any] = {}  # of fits, by wish and curves: an evaluation asks again and again
        self.compressed = (
            CompressedCache(vllm_config, lambda config: plan_cache(config, self))
            if is_compressed(vllm_config)
            else None
        )
        self.rows = request_rows(vllm_config)
        self.rows.to(torch.get_default_device())
        if self.compressed is not None:
            self.rows.on_accept = self.compressed.commit

        self.language_model = self.decoder(
            vllm_config=vllm_config.with_hf_config(text, architectures=["LlamaForCausalLM"]),
            prefix=maybe_prefix(prefix, "language_model"),
        )
        self._make_embedding(text.hidden_size)
        self._make_heads(text, prefix)
        self.image_logits = LogitsProcessor(self.image.codes)
        tokens = vllm_config.scheduler_config.max_num_batched_tokens
        self.most_tokens, self.measured = tokens, False
        self._full_graphs = vllm_config.compilation_config.cudagraph_mode.has_full_cudagraphs()
        self._embeds = self._places = None
        if vllm_config.compilation_config.cudagraph_mode.has_piecewise_cudagraphs():
            self._embeds = torch.zeros(tokens, BRANCHES * text.hidden_size, dtype=self.dtype)
            self._places = torch.zeros(tokens, BRANCHES, dtype=torch.int64) if self.image.aligns else None
        if self.compressed is None:
            logger.info("%s", describe(vllm_config))
        self.vq = family_of(config).decoder(config, self.image.raster)
        self.vision: JanusVision | None = None  # of a model that takes pictures, where they are allowed
        self._v2 = vllm_config.use_v2_model_runner
        if not self._v2:
            for layer in self.modules():
                if isinstance(layer, Attention):
                    hear_token_rows(layer, self.rows)

    def _make_embedding(self, hidden_size: int) -> None:
        """``image_embedding`` of the codes, where they are not the decoder's own ids."""
        self.image_embedding = VocabParallelEmbedding(self.image.codes, hidden_size)

    def _make_heads(self, text: Any, prefix: str) -> None:
        """``gen_head`` and what else makes logits: a row a code. ``text`` is the decoder's configuration."""
        self.gen_head = ParallelLMHead(
            self.image.codes, text.hidden_size, prefix=maybe_prefix(prefix, "gen_head")
        )

    def _code_logits(self, hidden: Tensor) -> Tensor:
        """``[n, hidden]`` -> ``[n, codes]``."""
        return self.image_logits(self.gen_head, hidden)

    def _text_logits(self, hidden: Tensor) -> Tensor:
        """``[n, hidden]`` of rows that want text -> ``[n, text_vocab]``; not asked in a model of pictures."""
        raise NotImplementedError

    @staticmethod
    def get_model_state_cls() -> type:
        """vLLM's V2 runner asks here for the per-request hooks of the model."""
        from vllm_kvcompress.requests_v2 import JanusModelState

        return JanusModelState

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """``[tokens]`` ids of the one id space -> ``[tokens, hidden]``."""
        is_image = self.image.is_drawn(input_ids)
        # A place without a draft holds -1: any id will do there, since no sample is ever -1.
        text = torch.where(is_image, self.image.pad, input_ids.clamp(min=0))
        text = self.language_model.embed_tokens(text)
        codes = (input_ids - self.image.first_code).clamp_(0, self.image.codes - 1)
        return torch.where(is_image[:, None], self.image_embedding(codes), text)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        intermediate_tensors: None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Both branches of every token. ``input_ids``, ``positions``: ``[tokens]``.

        ``inputs_embeds`` ``[tokens, hidden]``, where pictures are taken in, is the conditional branch,
        embedded already; no picture is in the unconditional one, which only rows that draw look at. Nothing
        comes in ``intermediate_tensors``: the model has no pipeline stages.
        """
        with measured(self, input_ids.shape[0]):
            return self._forward(input_ids, positions, inputs_embeds)

    def _forward(self, input_ids: Tensor, positions: Tensor, inputs_embeds: Tensor | None) -> Tensor:
        token_rows = self._token_rows(input_ids)
        uncond = unconditional_ids(input_ids, positions, self.image)
        if self._full_graphs or self.rows.negatives:  # a graph holds it for the rows to come
            uncond = splice_negatives(uncond, input_ids, positions, token_rows, self.rows)
        if inputs_embeds is None:
            embeds = self.embed_input_ids(torch.stack([input_ids, uncond], 1).flatten())
        else:
            embeds = torch.stack([inputs_embeds, self.embed_input_ids(uncond)], 1)
        embeds = self._in_place(embeds.view(input_ids.shape[0], -1))
        places = positions
        if self.rows.begins is not None:  # to its branch a token is where it would be without the padding
            begins = self.rows.begins[token_rows]
            places = _held(self._places, (positions[:, None] - begins).clamp(min=0))
        hidden = self.language_model(None, places, None, embeds)
        # Begin-of-image is in texts too, in front of a picture that was sent.
        draws = self.image.draws(input_ids) & ~self.rows.is_text[token_rows]
        scale = torch.where(draws, self.rows.scale[token_rows], TEXT_ROW)
        if self.image.eol >= 0:
            coming = positions + 1 - self.rows.prefix[token_rows]
            ends = self.image.ends(coming, self.rows.widths(token_rows))
            scale = torch.where(draws & ends, LINE_END, scale)
        return torch.cat([hidden, pack_scale(scale, hidden.dtype)], dim=-1)

    def _in_place(self, embeds: Tensor) -> Tensor:
        """The same values where piecewise CUDA graphs expect their input: always at one address.

        More tokens than vLLM schedules in a step (calibration, replays) are of no graph and stay as they are.
        """
        return _held(self._embeds, embeds)

    def _token_rows(self, input_ids: Tensor) -> Tensor:
        """``[tokens]`` int64: the batch row of each token, as the runner has told; one each outside steps.

        But where known rows are replayed outside steps, whoever does that has told.
        """
        tokens = input_ids.shape[0]
        metadata: Any = get_forward_context().attn_metadata
        if not metadata and self.rows.replays:
            return self.rows.token_rows
        if not metadata:
            rows = torch.arange(tokens, device=input_ids.device)
            return rows.clamp_(max=len(self.rows.scale) - 1)
        if self.compressed is not None and not self._v2:  # our own metadata; other backends': hear_token_rows
            self.rows.place_tokens(next(iter(metadata.values())).query_start_loc, tokens)
        return self.rows.token_rows[:tokens]

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """``[rows, 2 * hidden + 2]`` -> float32 ``[rows, vocab]``, or ``[rows, choices]``.

        The latter for a step's sampling where every row draws (``vllm_kvcompress.sampling``). Otherwise a row
        has either text or image logits, never both; the others are -inf. A text row can't begin an
        image: that is what a prompt ending in begin-of-image is for.
        """
        scale = unpack_scale(hidden_states[:, -2:])
        branches = hidden_states[:, :-2].reshape(-1, BRANCHES, self.hidden_size)
        if self.rows.take_narrow():
            return mark(self._guided(branches, scale), self.rows)
        image = self.image
        # A model without words is asked for them by half-read prompts alone, whose samples are thrown away.
        is_text = (scale == TEXT_ROW) if image.writes else torch.zeros_like(scale, dtype=torch.bool)
        logits = hidden_states.new_full((len(scale), image.vocab), -torch.inf, dtype=torch.float32)
        rows = torch.nonzero(~is_text).flatten()
        if len(rows):
            guided = self._guided(branches[rows], scale[rows])
            logits[rows, image.first_code : image.first_code + image.codes] = guided[:, : image.codes]
            if image.eol >= 0:
                logits[rows, image.eol] = guided[:, image.codes]
        rows = torch.nonzero(is_text).flatten()
        if len(rows):
            text = self._text_logits(branches[rows, 0]).float()
            text[:, image.boi] = -torch.inf
            logits[rows, : image.text_vocab] = text
        return mark(logits, self.rows)

    def _guided(self, branches: Tensor, scale: Tensor) -> Tensor:
        """``[rows, 2, hidden]`` -> guided image logits, float32 ``[rows, choices]``."""
        logits = self._code_logits(branches.flatten(0, 1))
        logits = logits.view(-1, BRANCHES, self.image.codes)
        guided = blend(logits[:, 0], logits[:, 1], scale)
        return guided if self.image.eol < 0 else with_line_ends(guided, scale == LINE_END)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """See ``vllm_kvcompress.models.weights``."""
        with last_word.heard():
            return load_weights(self, weights)


def decoder_named(*published: str) -> WeightsMapper:
    """Where a checkpoint's modules of these prefixes are: in the decoder, as its tensors are."""
    return WeightsMapper(orig_to_new_prefix=dict.fromkeys(published, "language_model."))


def _held(memory: Tensor | None, value: Tensor) -> Tensor:
    """``value``, at the beginning of ``memory`` where there is one and it fits."""
    return value if memory is None or len(value) > len(memory) else memory[: len(value)].copy_(value)
