"""Prompts of two branches made equally long at admission; ids of lines that end in a token."""

from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

from vllm_kvcompress.admission import admit_request, align_request, drawn_in_prompt
from vllm_kvcompress.guidance import with_line_ends
from vllm_kvcompress.models.config import ImageModel
from vllm_kvcompress.policy.raster import Raster
from vllm_kvcompress.rows import NEGATIVE_IDS, RequestFacts, RequestRows
from vllm_kvcompress.windows.drawing import Drawing
from vllm_kvcompress.windows.v2 import next_drafts

PAD, BOS, EOL, BOI, IMG = 10, 11, 12, 13, 15
MODEL = ImageModel(
    Raster(lines=3, width=5, patch=4, ends=1), text_vocab=300, codes=100, bos=BOS, pad=PAD, boi=BOI,
    first_code=100, eol=EOL, grid_ids=(14, IMG), writes=False, negative=(BOS, 50, BOI, 14, IMG),
)  # fmt: skip
BEGIN = [BOI, 14, IMG]
WORDS = st.lists(st.integers(20, 99) | st.integers(200, 299), max_size=8)
PICTURE = [100, 101, 102, 103, EOL, 104, 105, 199, 106, EOL, 107, 108, 109, 110, EOL]


def request(ids: list[int], **extra: object) -> SimpleNamespace:
    params = SamplingParams(temperature=0.0, extra_args=extra)
    return SimpleNamespace(
        prompt_token_ids=ids, sampling_params=params, prompt_embeds=None, resumable=False, request_id="r"
    )


@given(WORDS, WORDS, st.integers(0, 14))
def test_the_shorter_branch_is_filled_up_at_its_beginning(
    words: list[int], unwanted: list[int], drawn: int
) -> None:
    ids, negative = [BOS, *words, *BEGIN], [BOS, *unwanted, *BEGIN]
    asked = request([*ids, *PICTURE[:drawn]], guidance_scale=3.0, **{NEGATIVE_IDS: negative})
    for _ in range(2):  # what is aligned stays as it is, and is admitted again
        align_request(asked, MODEL)
        admit_request(asked, MODEL, 64)
    longest = max(len(ids), len(negative))
    begins = longest - len(ids), longest - len(negative)
    assert asked.prompt_token_ids == [*[PAD] * begins[0], *ids, *PICTURE[:drawn]]
    assert asked.sampling_params.extra_args[NEGATIVE_IDS] == [*[PAD] * begins[1], *negative]
    assert asked.sampling_params.max_tokens == 15 - drawn
    facts = RequestFacts.read(asked.sampling_params, asked.prompt_token_ids, MODEL)
    assert (facts.begins, facts.prefix) == (begins, longest)


def test_a_guided_request_has_the_models_negative_prompt() -> None:
    asked = request([BOS, *BEGIN])
    align_request(asked, MODEL)
    assert asked.prompt_token_ids == [PAD, BOS, *BEGIN]
    assert asked.sampling_params.extra_args[NEGATIVE_IDS] == list(MODEL.negative)
    plain = request([BOS, *BEGIN], guidance_scale=1)
    align_request(plain, MODEL)
    assert plain.prompt_token_ids == [BOS, *BEGIN]
    assert NEGATIVE_IDS not in plain.sampling_params.extra_args


@pytest.mark.parametrize(
    ("ids", "extra", "said"),
    [
        ([BOS, *BEGIN], {NEGATIVE_IDS: [BOS, 50]}, "must end in the ids"),
        ([BOS, *BEGIN], {NEGATIVE_IDS: [BOS, 120, *BEGIN]}, "must hold text ids below 100 but not 12"),
        ([BOS, *BEGIN], {NEGATIVE_IDS: [BOS, EOL, *BEGIN]}, "must hold text ids below 100 but not 12"),
        ([BOS, *BEGIN], {NEGATIVE_IDS: "blurry"}, "must be a list of token ids"),
        ([BOS, *BEGIN], {"guidance_scale": "much"}, "guidance_scale must be a number"),
        ([BOS, 50], {}, "draws pictures and writes no text"),
        (
            [BOS, BOI, 99, IMG],
            {},
            r"ids \[13, 99, 15\] begin a picture of a size that this server does not draw",
        ),
        ([BOS, *BEGIN, 100, EOL], {}, "the picture's token 1 has id 12"),
        ([BOS, *BEGIN, *PICTURE[:4], 100], {}, "the picture's token 4 has id 100"),
        ([BOS, EOL, *BEGIN], {}, "must follow begin-of-image"),
        ([BOS, *BEGIN, *PICTURE], {}, "nothing is left to draw"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(ids: list[int], extra: dict, said: str) -> None:
    asked = request(ids, **extra)
    align_request(asked, MODEL)
    with pytest.raises(VLLMValidationError, match=said) as raised:
        admit_request(asked, MODEL, 64)
    assert "\n" not in str(raised.value)


def test_a_front_end_that_does_not_align_is_told() -> None:
    """The engine looks once more: a guided picture without its branch would be drawn without guidance."""
    with pytest.raises(VLLMValidationError, match="negative_prompt_token_ids is missing"):
        admit_request(request([BOS, *BEGIN]), MODEL, 64)
    admit_request(request([BOS, *BEGIN], guidance_scale=1.0), MODEL, 64)


def test_the_ends_of_lines_may_always_be_drawn() -> None:
    asked = request([BOS, *BEGIN], guidance_scale=1.0)
    asked.sampling_params.allowed_token_ids = [100, 101]
    admit_request(asked, MODEL, 64)
    assert asked.sampling_params.allowed_token_ids == [100, 101, EOL]
    asked.sampling_params.bad_words = ["line"]
    with pytest.raises(VLLMValidationError, match="bad_words is about text"):
        admit_request(asked, MODEL, 64)


@given(st.lists(st.integers(0, 299), max_size=12))
def test_any_prompt_is_a_picture_or_refused_by_name(ids: list[int]) -> None:
    """Nothing else is raised, and what is taken begins a picture."""
    with suppress(VLLMValidationError):
        assert drawn_in_prompt(ids, MODEL) == len(ids) - MODEL.prefix_length(ids)
        assert MODEL.is_begun(ids, MODEL.prefix_length(ids))


def test_rows_know_where_branches_begin() -> None:
    rows = RequestRows(3, MODEL, context=16)
    asked = request([BOS, *BEGIN])
    align_request(asked, MODEL)
    facts = RequestFacts.read(asked.sampling_params, asked.prompt_token_ids, MODEL)
    rows.replace({1: facts})
    assert rows.begins is not None
    assert rows.begins.tolist() == [[0, 0], [1, 0], [0, 0]]
    assert [rows.begins_of(row) for row in range(3)] == [(0, 0), (1, 0), (0, 0)]
    rows.replace({})
    assert not rows.begins.any()


def test_ids_and_choices() -> None:
    choices = torch.arange(MODEL.choices)
    ids = MODEL.ids(choices)
    assert ids.tolist() == [*range(100, 200), EOL]
    assert MODEL.is_drawn(ids).all()
    wide = torch.arange(300.0).repeat(2, 1)
    assert MODEL.among(wide).tolist() == [[*range(100, 200), EOL]] * 2
    assert MODEL.ends(torch.arange(-6, 10), MODEL.raster.width).nonzero().flatten().tolist() == [10, 15]
    logits = with_line_ends(torch.zeros(2, 3), torch.tensor([True, False]))
    assert logits.softmax(-1).tolist() == [[0, 0, 0, 1], [pytest.approx(1 / 3)] * 3 + [0]]
    with pytest.raises(ValueError, match="eol: id -1 with 1 end-of-line tokens a line"):
        ImageModel(Raster(3, 5, ends=1), 300, 100, 1, 2, 3)


@given(st.integers(1, 14), st.integers(1, 8))
def test_ends_of_lines_are_drafted_where_they_are_due(known: int, count: int) -> None:
    count = min(count, 15 - known)
    drafts = Drawing(0, 5, PICTURE[:1], PICTURE[1:known], EOL).drafts(count)
    assert [n for n, one in enumerate(drafts, known) if one == EOL and n % 5 == 4] == [
        n for n in range(known, known + count) if n % 5 == 4
    ]
    prefix = 7
    positions = torch.tensor([[0] * prefix + PICTURE + [0] * 9])
    sample = torch.tensor([[PICTURE[known]]]) if known < 15 else torch.tensor([[0]])
    ahead = next_drafts(
        sample, torch.tensor([1]), torch.tensor([1]), positions, torch.tensor([prefix + known - 1]),
        torch.tensor([prefix]), 5, count, EOL,
    )[0].tolist()  # fmt: skip
    due = [n for n in range(known + 1, known + 1 + count) if n % 5 == 4]
    assert [n for n in due if ahead[n - known - 1] == EOL] == due
