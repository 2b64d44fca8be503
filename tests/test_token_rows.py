"""Which row a token is of: the runner's knowledge, whatever attention backend makes of it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from inprocess import Engine, in_process  # noqa: F401
from vllm import SamplingParams

from vllm_kvcompress.models import branched
from vllm_kvcompress.models.config import ImageModel
from vllm_kvcompress.policy.raster import Raster
from vllm_kvcompress.requests_v2 import JanusModelState
from vllm_kvcompress.rows import GuidanceParams, RequestFacts, RequestRows

MODEL = ImageModel(Raster(lines=6, width=5), text_vocab=300, codes=200, bos=1, pad=2, boi=3)


class FlashInferMetadata:
    """What V1's FlashInfer backend makes of a step, as far as it matters: no ``query_start_loc``."""

    num_actual_tokens = 7
    slot_mapping = torch.zeros(7)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(0, 5), st.booleans())
def test_tokens_are_placed_by_where_rows_start(lengths: list[int], padding: int, whole: bool) -> None:
    rows = RequestRows(6, MODEL, max_tokens=60)
    address = rows.token_rows.data_ptr()
    starts = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    # As captured batches are padded: further rows that start where the last one ends.
    starts = torch.cat([starts, starts[-1:].expand(padding)])
    tokens = sum(lengths)
    rows.place_tokens(starts, None if whole else tokens + padding)
    expected = [row for row, length in enumerate(lengths) for _ in range(length)]
    assert rows.token_rows[:tokens].tolist() == expected
    assert rows.token_rows.max() < 6
    assert rows.token_rows.data_ptr() == address
    assert rows.token_rows.dtype == torch.int64


def test_v2_runner_places_tokens_with_the_inputs() -> None:
    """In place and for the padding too: it is all that a captured decode step gets to see."""
    state = JanusModelState.__new__(JanusModelState)
    state.rows, state.rope_state = RequestRows(4, MODEL, max_tokens=16), None
    state._slots = {7: RequestFacts(GuidanceParams(2.0), 4), 3: RequestFacts(GuidanceParams(3.0), 4)}
    address = state.rows.token_rows.data_ptr()
    for lengths, padded in (([5, 2], 8), ([1, 1], 4)):
        starts = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
        batch: Any = SimpleNamespace(
            num_draft_tokens=0,
            idx_mapping_np=np.array([7, 3]),
            query_start_loc=starts,
            num_tokens_after_padding=padded,
        )
        state.prepare_inputs(batch, None)  # type: ignore[arg-type]
        placed = state.rows.token_rows[: sum(lengths)]
        assert placed.tolist() == [0] * lengths[0] + [1] * lengths[1]
        assert state.rows.scale[placed].tolist() == [2.0] * lengths[0] + [3.0] * lengths[1]
    assert state.rows.token_rows.data_ptr() == address


# ---- in an engine, on the V1 runner


@pytest.fixture(scope="module")
def stock(checkpoints: dict[str, Path]) -> Engine:
    """Prompts come in chunks, and beside pictures that draw."""
    return Engine.get(
        checkpoints["tiny-hf"], backend=None, max_model_len=128, max_num_batched_tokens=24, max_num_seqs=4
    )


@pytest.fixture(scope="module")
def compressed(checkpoints: dict[str, Path]) -> Engine:
    return Engine.get(
        checkpoints["tiny-hf"], max_model_len=128, max_num_batched_tokens=24, max_num_seqs=4,
        kvcompress={"preset": "full", "kernels": "torch"},
    )  # fmt: skip


def requests(engine: Engine) -> list[tuple[list[int], SamplingParams]]:
    """Pictures of several lengths, each with its own guidance and unconditional prompt."""
    made = []
    for number, words in enumerate(("a cat", "a dog on a red mat in the rain", "fog", "two boats")):
        prompt = engine.prompt(words)
        negative = [prompt[0], *(20 + number for _ in prompt[2:]), prompt[-1]]
        extra = {"guidance_scale": 2.0 + number, "negative_prompt_token_ids": negative}
        made.append((prompt, SamplingParams(temperature=0.0, detokenize=False, extra_args=extra)))
    return made


def draw(engine: Engine, asked: list[tuple[list[int], SamplingParams]]) -> list[list[int]]:
    prompts, params = zip(*asked, strict=True)
    return engine.draw(prompts, list(params))


@pytest.fixture(scope="module")
def alone(stock: Engine) -> list[list[int]]:
    """Each picture by itself, where every token is of row 0."""
    return [draw(stock, [request])[0] for request in requests(stock)]


def test_company_changes_nothing(stock: Engine, alone: list[list[int]]) -> None:
    assert len({tuple(tokens) for tokens in alone}) == len(alone)
    assert draw(stock, requests(stock)) == alone


def test_backend_whose_metadata_does_not_say_where_rows_start(
    stock: Engine, alone: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """FlashInfer's, which is vLLM's choice on Blackwell."""
    context, asked = branched.get_forward_context, []

    def other_backend() -> Any:
        asked.append(context().attn_metadata is not None)
        layers = {"language_model.layers.0.self_attn.attn": FlashInferMetadata()}
        return SimpleNamespace(attn_metadata=layers if asked[-1] else None)

    monkeypatch.setattr(branched, "get_forward_context", other_backend)
    assert draw(stock, requests(stock)) == alone
    assert sum(asked) > MODEL.raster.tokens


def test_compressed_cache_on_the_v1_runner(compressed: Engine, alone: list[list[int]]) -> None:
    assert draw(compressed, requests(compressed)) == alone


def test_layers_keep_their_backend_in_all_else(stock: Engine) -> None:
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionMetadataBuilder

    groups = stock.core.model_executor.driver_worker.worker.model_runner.attn_groups
    [[group]] = groups
    assert issubclass(group.backend, CPUAttentionBackend)
    assert group.backend.get_name() == CPUAttentionBackend.get_name()
    assert isinstance(group.get_metadata_builder(0), CPUAttentionMetadataBuilder)
    layers = stock.core.vllm_config.compilation_config.static_forward_context
    assert set(group.layer_names) == {name for name in layers if name.endswith("attn")}


def test_more_tokens_than_a_step_has_stay_where_they_are(stock: Engine) -> None:
    """Calibration and replays run outside the scheduler's limit."""
    model, limit = stock.model, 24
    try:
        model._embeds = torch.zeros(limit, 2 * model.hidden_size, dtype=model.dtype)
        few, many = (torch.rand(n, 2 * model.hidden_size, dtype=model.dtype) for n in (limit, limit + 1))
        assert model._in_place(few).data_ptr() == model._embeds.data_ptr()
        assert torch.equal(model._embeds, few)
        assert model._in_place(many) is many
    finally:
        model._embeds = None
