"""Guidance without an engine: rows in step with the batch, the unconditional prompt, the blend."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm import SamplingParams
from vllm.v1.sample.logits_processor.interface import BatchUpdate, MoveDirectionality

from vllm_kvcompress import rows as rows_module
from vllm_kvcompress.guidance import blend, pack_scale, splice_negatives, unconditional_ids, unpack_scale
from vllm_kvcompress.models.config import ImageModel
from vllm_kvcompress.policy.raster import Raster
from vllm_kvcompress.requests_v1 import RequestTracker
from vllm_kvcompress.rows import NO_IMAGE, GuidanceParams, RequestFacts, RequestRows, request_rows

MODEL = ImageModel(Raster(lines=6, width=5), text_vocab=300, codes=200, bos=1, pad=2, boi=3)
PROMPT = [1, 50, 51, 3]


def params(scale=None, negative=None):
    args = {"guidance_scale": scale, "negative_prompt_token_ids": negative}
    return SamplingParams(extra_args={k: v for k, v in args.items() if v is not None})


def facts(scale=5.0, prefix=4, negative=None):
    return RequestFacts(GuidanceParams(scale, negative), prefix)


def ids(*values):
    return torch.tensor(values)


def test_rows_belong_to_an_engine_not_to_a_model(monkeypatch):
    """Two engines of one configuration object, as in a notebook: each has its own rows."""
    monkeypatch.setattr(rows_module, "image_model", lambda model: MODEL)
    model = SimpleNamespace(hf_config=object(), max_model_len=32)

    def engine(rows):
        return SimpleNamespace(
            model_config=model,
            scheduler_config=SimpleNamespace(max_num_seqs=rows, max_num_batched_tokens=64),
            compilation_config=SimpleNamespace(static_forward_context={}),
        )

    small, large = engine(2), engine(5)
    assert len(request_rows(small).scale) == 2
    assert len(request_rows(large).scale) == 5
    assert request_rows(small) is request_rows(small) is not request_rows(large)


# ---- what is known of a request


def test_facts_of_a_picture():
    assert RequestFacts.read(params(2, [1, 9, 9, 3]), PROMPT, MODEL) == facts(2.0, 4, (1, 9, 9, 3))
    assert RequestFacts.read(SamplingParams(), PROMPT, MODEL) == facts(5.0, 4)


def test_the_prefix_of_a_resumed_picture_is_its_text():
    assert RequestFacts.read(SamplingParams(), [*PROMPT, 300, 499], MODEL).prefix == 4


@pytest.mark.parametrize("prompt", [None, [], [1, 50], [3, 50], [300], [50, 301]])
def test_text_requests_have_no_prefix_and_their_arguments_do_not_matter(prompt):
    """An exception here, in the engine, would end it."""
    for scale in ("nonsense", math.nan, 1e300):
        read = RequestFacts.read(params(scale, 7), prompt, MODEL)
        assert read == facts(5.0, NO_IMAGE)


def test_without_parameters():
    """Warm-up requests have none."""
    assert RequestFacts.read(None, None, MODEL) == facts(5.0, NO_IMAGE)


# ---- rows


class Batch:
    """A batch as the V1 runner keeps it: the requests that ``RequestRows`` should know, by row."""

    def __init__(self, rows=8):
        self.tracker = RequestTracker.__new__(RequestTracker)
        self.tracker.rows = RequestRows(rows, MODEL, context=4)
        self.rows = [None] * rows

    def update(self, removed=(), added=(), moved=()):
        batch = BatchUpdate(sum(r is not None for r in self.rows), list(removed), list(added), list(moved))
        self.tracker.update_state(batch)

    def check(self):
        rows = self.tracker.rows
        for row, request in enumerate(self.rows):
            if request is not None:
                assert rows.scale[row] == request.guidance.scale
                assert rows.prefix[row] == request.prefix
        wanted = [(r and r.guidance.negative_ids) or () for r in self.rows]
        assert rows.negatives == any(wanted)
        for row, ids in enumerate(wanted):
            if self.rows[row] is not None:
                assert tuple(rows.negative[row, : rows.negative_length[row]].tolist()) == ids


REQUESTS = st.tuples(
    st.sampled_from([0.0, 1.0, 2.5, 5.0]), st.sampled_from([None, [1, 7, 7, 3], [1, 8, 8, 3]])
)


@settings(deadline=None)
@given(st.data())
def test_rows_follow_the_batch(data):
    """Any sequence of the runner's updates: removals, additions, then moves and swaps."""
    batch = Batch()
    for _ in range(data.draw(st.integers(1, 6))):
        full = [row for row, request in enumerate(batch.rows) if request is not None]
        removed = data.draw(st.lists(st.sampled_from(full), unique=True)) if full else []
        for row in removed:
            batch.rows[row] = None
        added = []
        empty = [row for row, request in enumerate(batch.rows) if request is None]
        for row in data.draw(st.lists(st.sampled_from(empty), unique=True)) if empty else []:
            sampling = params(*data.draw(REQUESTS))
            added.append((row, sampling, PROMPT, []))
            batch.rows[row] = RequestFacts.read(sampling, PROMPT, MODEL)
        moved = []
        for _ in range(data.draw(st.integers(0, 3))):
            source, target = data.draw(st.permutations(range(len(batch.rows))))[:2]
            if batch.rows[source] is None:
                continue
            swap = batch.rows[target] is not None
            direction = MoveDirectionality.SWAP if swap else MoveDirectionality.UNIDIRECTIONAL
            moved.append((source, target, direction))
            batch.rows[source], batch.rows[target] = batch.rows[target], batch.rows[source]
        batch.update(removed, added, moved)
        batch.check()


def test_nothing_new_costs_nothing():
    rows = RequestRows(4, MODEL)
    rows.add(1, facts(2.0))
    rows.flush()
    rows.scale[1] = 9  # would be overwritten by a copy
    rows.flush()
    rows.replace({1: facts(2.0)})
    assert rows.scale[1] == 9
    rows.replace({1: facts(3.0)})
    assert rows.scale.tolist() == [5.0, 3.0, 5.0, 5.0]


def test_narrow_logits_are_for_batches_of_pictures_alone_and_for_one_sampling():
    rows, text = RequestRows(4, MODEL, context=4), facts(prefix=NO_IMAGE)
    named = RequestFacts.read(SamplingParams(logit_bias={301: 1.0}), PROMPT, MODEL)
    assert named.names_ids
    for batch, narrow in (
        ({}, False),
        ({0: facts(), 1: facts(1.0)}, True),
        ({0: facts(), 1: text}, False),
        ({0: facts(), 1: named}, False),
    ):
        rows.replace(batch)
        assert rows.take_narrow() is narrow
        assert rows.take_narrow() is False
        assert rows.is_text.tolist() == [row in batch and batch[row].is_text for row in range(4)]
    rows.narrow_allowed = False
    rows.replace({0: facts()})
    assert rows.take_narrow() is False


@pytest.mark.parametrize(
    "setting",
    [
        {"logit_bias": {301: 1.0}}, {"allowed_token_ids": [301]}, {"frequency_penalty": 0.1},
        {"presence_penalty": 0.1}, {"repetition_penalty": 1.1}, {"min_tokens": 2}, {"prompt_logprobs": 0},
        {"logprobs": -1}, {"bad_words": ["x"]},
    ],
)  # fmt: skip
def test_settings_that_name_ids(setting):
    assert RequestFacts.read(SamplingParams(**setting), PROMPT, MODEL).names_ids


@pytest.mark.parametrize(
    "setting", [{"temperature": 0.5, "top_k": 5}, {"top_p": 0.5, "seed": 3}, {"logprobs": 2}]
)
def test_settings_that_name_no_ids(setting):
    assert not RequestFacts.read(SamplingParams(**setting), PROMPT, MODEL).names_ids


def test_the_tracker_leaves_logits_alone():
    tracker = RequestTracker.__new__(RequestTracker)
    assert tracker.is_argmax_invariant()
    logits = torch.randn(2, 5)
    assert tracker.apply(logits) is logits
    assert tracker.add_request(0, SamplingParams()) is False


# ---- the unconditional prompt


def test_unconditional_ids_are_pads_but_for_bos_boi_and_the_picture():
    tokens, positions = ids(1, 50, 51, 3, 300, 499), torch.arange(6)
    assert unconditional_ids(tokens, positions, MODEL).tolist() == [1, 2, 2, 3, 300, 499]


def test_requests_side_by_side_and_in_chunks():
    tokens, positions = ids(1, 50, 3, 50, 3, 301), ids(0, 1, 2, 1, 2, 3)
    assert unconditional_ids(tokens, positions, MODEL).tolist() == [1, 2, 3, 2, 3, 301]


def test_first_token_is_kept_whatever_it_is():
    """As published: ``tokens[i, 1:-1] = pad``."""
    assert unconditional_ids(ids(50, 50, 3), torch.arange(3), MODEL).tolist() == [50, 2, 3]


def rows_of(*negatives):
    rows = RequestRows(len(negatives), MODEL, context=4)
    rows.replace({row: facts(negative=ids) for row, ids in enumerate(negatives)})
    return rows


def test_a_row_gets_another_negative():
    rows = rows_of((1, 77, 3), (1, 78, 3))
    before = rows.negative.data_ptr(), rows.negative_length.data_ptr(), rows.scale.data_ptr()
    rows.replace({0: facts(negative=(1, 78, 3)), 1: facts()})
    assert rows.negative_length.tolist() == [3, 0]
    assert rows.negative[0, :3].tolist() == [1, 78, 3]
    rows.replace({0: facts(), 1: facts(negative=(1, 78, 79, 3))})
    assert rows.negative_length.tolist() == [0, 4]
    assert rows.negative[1].tolist() == [1, 78, 79, 3]
    assert before == (rows.negative.data_ptr(), rows.negative_length.data_ptr(), rows.scale.data_ptr())


def test_negatives_go_to_their_own_rows():
    tokens = ids(1, 50, 3, 300, 1, 60, 3, 301)
    positions, rows = ids(0, 1, 2, 3, 0, 1, 2, 3), ids(0, 0, 0, 0, 1, 1, 1, 1)
    uncond = unconditional_ids(tokens, positions, MODEL)
    spliced = splice_negatives(uncond, tokens, positions, rows, rows_of(None, (1, 77, 3)))
    assert spliced.tolist() == [1, 2, 3, 300, 1, 77, 3, 301]
    assert uncond.tolist() == [1, 2, 3, 300, 1, 2, 3, 301]


def test_a_negative_in_a_later_chunk():
    """Chunked prefill: positions, not the place in the batch, say which id it is."""
    tokens, positions, rows = ids(51, 3, 300), ids(2, 3, 4), ids(0, 0, 0)
    uncond = unconditional_ids(tokens, positions, MODEL)
    spliced = splice_negatives(uncond, tokens, positions, rows, rows_of((1, 77, 78, 3)))
    assert spliced.tolist() == [78, 3, 300]


def test_a_negative_equal_to_the_default_changes_nothing():
    tokens, positions, rows = ids(*PROMPT, 300), torch.arange(5), torch.zeros(5, dtype=torch.int64)
    uncond = unconditional_ids(tokens, positions, MODEL)
    assert torch.equal(splice_negatives(uncond, tokens, positions, rows, rows_of((1, 2, 2, 3))), uncond)


# ---- the blend


def test_blend_is_the_published_formula():
    cond, uncond = torch.randn(3, 7), torch.randn(3, 7)
    scale = torch.tensor([0.0, 2.5, 5.0])
    torch.testing.assert_close(blend(cond, uncond, scale), uncond + scale[:, None] * (cond - uncond))


def test_scale_one_is_the_conditional_branch_to_the_bit():
    """Also where the other branch has overflowed, or the formula would round."""
    cond = torch.randn(2, 7)
    uncond = torch.full_like(cond, torch.inf)
    uncond[0] = 1e8
    assert torch.equal(blend(cond, uncond, torch.ones(2)), cond)


def test_rows_have_their_own_scale():
    cond, uncond = torch.randn(2, 7), torch.randn(2, 7)
    both = blend(cond, uncond, torch.tensor([1.0, 4.0]))
    assert torch.equal(both[0], cond[0])
    assert torch.equal(both[1:], blend(cond[1:], uncond[1:], torch.tensor([4.0])))


def test_blend_is_float32():
    """In bfloat16 the difference would be rounded before it is amplified."""
    cond, uncond = torch.randn(1, 7).bfloat16(), torch.randn(1, 7).bfloat16()
    blended = blend(cond, uncond, torch.tensor([5.0]))
    assert blended.dtype == torch.float32
    exact = uncond.double() + 5 * (cond.double() - uncond.double())
    torch.testing.assert_close(blended, exact.float())


@given(st.floats(0, 100, width=32), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_scales_survive_the_ride_in_hidden_rows(scale, dtype):
    """As precisely as two columns can: bfloat16 alone would make 3.703 of 3.7."""
    packed = unpack_scale(pack_scale(torch.tensor([scale]), dtype)).item()
    assert packed == pytest.approx(scale, rel=2**-15, abs=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [-1.0, 0.0, 1.0, 5.0, 100.0])
def test_the_scales_that_decide_are_exact(scale, dtype):
    """Text rows, guidance off, and the default."""
    assert unpack_scale(pack_scale(torch.tensor([scale]), dtype)).item() == scale
