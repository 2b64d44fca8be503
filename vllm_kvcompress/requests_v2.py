"""How the V2 model runner tells the model about requests: its per-request model state hooks."""

from typing import Any

import torch
from torch import Tensor
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.sample.bad_words import BadWordsState
from vllm.v1.worker.gpu.sample.logit_bias import LogitBiasState
from vllm.v1.worker.gpu.sample.output import SamplerOutput
from vllm.v1.worker.gpu.sample.penalties import PenaltiesState
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu.states import RequestState

from vllm_kvcompress.config import KEY
from vllm_kvcompress.requests_v1 import RequestTracker
from vllm_kvcompress.rows import RequestFacts, RequestRows
from vllm_kvcompress.sampling import is_narrow, move_up
from vllm_kvcompress.windows.v2 import Known, Places, next_drafts, standing

# vLLM's processors change nothing for a request that names no ids (``sampling.names_ids``), and ours never.
_HARMLESS = (LogitBiasState, PenaltiesState, BadWordsState, RequestTracker)


class ImageSampler(Sampler):
    """vLLM's sampler; over image codes alone where the logits are, and for rows that draw."""

    rows: RequestRows
    num_speculative_tokens: int = 1  # vLLM's name for a row's places at most: its last token and the drafts
    _row_of: Tensor | None = None  # batch row of each place

    @classmethod
    def adopt(cls, sampler: Sampler, rows: RequestRows) -> "ImageSampler | None":
        """The same sampler as one of these; None for one whose features need all ids."""
        if type(sampler) is not Sampler or sampler.return_sampling_mask or sampler.trace_replay_state:
            return None
        adopted = cls.__new__(cls)
        vars(adopted).update(vars(sampler))
        adopted.rows = rows
        return adopted

    @property
    def takes_codes(self) -> bool:
        """Whether logits of codes alone will do: another package's processor may look at any id."""
        return all(type(processor) in _HARMLESS for processor in self.logits_processors)

    @property
    def has_windows(self) -> bool:
        """Whether any row may have drafts: a step without needs none of their bookkeeping."""
        return self.num_speculative_tokens > 1

    def __call__(self, logits: Tensor, input_batch: InputBatch) -> SamplerOutput:
        if not self.has_windows:
            output = super().__call__(logits, input_batch)
            return move_up(output, self.rows) if is_narrow(logits, self.rows) else output
        starts = async_tensor_h2d(input_batch.cu_num_logits_np, device=logits.device, dtype=torch.int64)
        counts = starts.diff()
        self._row_of = torch.repeat_interleave(
            torch.arange(len(counts), device=logits.device), counts, output_size=len(logits)
        )
        output = super().__call__(logits, input_batch)
        if is_narrow(logits, self.rows):
            output = move_up(output, self.rows)
        most = (
            1
            if input_batch.num_draft_tokens_per_req is None
            else 1 + int(input_batch.num_draft_tokens_per_req.max())
        )
        self._settle(output, input_batch, Places(counts, starts[:-1], most))
        return output

    def _settle(self, output: SamplerOutput, batch: InputBatch, places: Places) -> None:
        """How many tokens stand in each row, and its next drafts."""
        rows, mine = self.rows, slice(batch.num_reqs)
        width, total = rows.widths(mine), rows.totals(mine)
        prefix = rows.prefix[mine].long()
        first = batch.positions[batch.logits_indices][places.starts].long()
        samples = places.table(output.sampled_token_ids.flatten().long())
        inputs = places.table(batch.input_ids[batch.logits_indices].long())
        token = first - prefix  # the picture's token that the first place fed; negative for its prompt
        limit = total - 1 - token
        if rows.on_accept is not None:  # a cache that chooses victims at its line's end
            limit = torch.minimum(limit, torch.where(token < 0, 1, width - token % width))
        limit = torch.where(rows.is_text[mine], 1, limit)
        stands = standing(samples, inputs, places.counts, limit)
        reading = output.num_sampled == 0  # a prompt that is not read to its end yet
        output.num_sampled = torch.where(reading, 0, stands).to(output.num_sampled.dtype)
        output.num_rejected = torch.where(reading, 0, places.counts - stands).to(output.num_rejected.dtype)
        output.sampled_token_ids = samples
        states, index = self.req_states, batch.idx_mapping
        states.draft_tokens[index] = next_drafts(
            samples, places.counts, stands, Known(states.all_token_ids.gpu, index), first, prefix, width,
            states.draft_tokens.shape[1], rows.model.eol,
        ).to(states.draft_tokens.dtype)  # fmt: skip
        rows.accept(stands)

    def _sample_random(
        self, processed_logits: Tensor, expanded_idx_mapping: Tensor, idx_mapping_np: Any, pos: Tensor,
        top_k: Tensor | None, top_p: Tensor | None, *how: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """As vLLM's; ``how`` is ``use_fused_sampler``, from vLLM 0.33 on after ``has_topp_only_rows``."""
        where = expanded_idx_mapping, idx_mapping_np, pos
        model = self.rows.model
        if self.has_windows:
            how = (*how[:-1], False)  # the fused sampler's noise is not a function of the position
        few = None if top_k is None else top_k.clamp(max=model.codes)
        # vLLM reckons with all ids whether a row has top-p alone; a top-k beyond the codes is none either.
        among_codes = how if top_k is None else (*(True for _ in how[:-1]), *how[-1:])
        choose, logits = super()._sample_random, processed_logits
        if is_narrow(logits, self.rows):
            return choose(logits, *where, few, top_p, *among_codes)
        code, _ = choose(model.among(logits).clone(), *where, few, top_p, *among_codes)
        sampled, processed = choose(logits, *where, top_k, top_p, *how)
        is_text = self.rows.is_text[: len(code)] if self._row_of is None else self.rows.is_text[self._row_of]
        return torch.where(is_text, sampled, model.ids(code)), processed


class JanusModelState(DefaultModelState):
    """Keeps the facts of each request slot, and brings it into batch order before every forward."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        model: Any = self.model
        self.rows: RequestRows = model.rows
        self._slots: dict[int, RequestFacts] = {}
        self._slot_of: dict[str, int] = {}

    def custom_sampler(self, sampler: Any) -> tuple[Any, Any] | None:
        adopted = ImageSampler.adopt(sampler, self.rows)
        if adopted is None and sampler.num_speculative_tokens > 1:  # `windows.settings` knows vLLM's own
            raise ValueError(
                f"additional_config.{KEY}.window does not work with the sampler {type(sampler).__name__}: "
                "set it to 1"
            )
        self.rows.narrow_allowed &= adopted is not None and adopted.takes_codes
        return None if adopted is None else (adopted, None)

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        super().add_request(req_index, new_req_data)
        facts = RequestFacts.read(
            new_req_data.sampling_params, new_req_data.prompt_token_ids, self.rows.model
        )
        self._slots[req_index] = facts
        self._slot_of[new_req_data.req_id] = req_index

    def remove_request(self, req_id: str) -> None:
        super().remove_request(req_id)
        self._slots.pop(self._slot_of.pop(req_id, -1), None)

    def prepare_attn(self, input_batch: InputBatch, *args: Any, **kwargs: Any) -> dict[str, Any]:
        # Comes before prepare_inputs, and the attention's plan reads the rows.
        self._bring_in_order(input_batch)
        return super().prepare_attn(input_batch, *args, **kwargs)

    def prepare_inputs(
        self, input_batch: InputBatch, req_states: RequestState
    ) -> dict[str, torch.Tensor | None]:
        self._bring_in_order(input_batch)
        # In place: a captured step reads it where it was when the graph was made.
        self.rows.place_tokens(input_batch.query_start_loc, input_batch.num_tokens_after_padding)
        return super().prepare_inputs(input_batch, req_states)

    def _bring_in_order(self, input_batch: InputBatch) -> None:
        self.rows.replace(
            {
                row: self._slots[slot]
                for row, slot in enumerate(input_batch.idx_mapping_np)
                if slot in self._slots
            }
        )
        if input_batch.num_draft_tokens:
            drafts = input_batch.num_draft_tokens_per_req
            assert drafts is not None
            self.rows.places = (1 + drafts).tolist()
