"""What a request must look like: pictures get their length, wrong ones a line that names the parameter."""

import math
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import StructuredOutputsParams

from vllm_kvcompress.admission import admit, admit_request, drawn_in_prompt
from vllm_kvcompress.models.config import ImageModel
from vllm_kvcompress.policy.raster import Raster

MODEL = ImageModel(Raster(lines=6, width=5), text_vocab=300, codes=200, bos=1, pad=2, boi=3)
TOKENS = 30
PROMPT = [1, 50, 51, 3]
CONTEXT = 64


def admitted(prompt=PROMPT, context=CONTEXT, text=True, **params) -> SamplingParams:
    params = SamplingParams(**params)
    admit(list(prompt), params, MODEL, context, text=text)
    return params


def refusal(prompt=PROMPT, context=CONTEXT, text=True, **params) -> VLLMValidationError:
    with pytest.raises(VLLMValidationError) as raised:
        admitted(prompt, context, text, **params)
    assert "\n" not in str(raised.value)
    return raised.value


def drawn(count):
    return [300 + i for i in range(count)]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ([], None),
        ([1, 50], None),
        ([1, 3, 50], None),  # begin-of-image, then text: a text request
        ([1, 3], 0),
        ([3], 0),
        ([1, 50, 3, *drawn(7)], 7),
        ([1, 3, *drawn(30)], 30),
    ],
)
def test_a_picture_is_wanted_when_the_prompt_ends_in_begin_of_image(prompt, expected):
    assert drawn_in_prompt(prompt, MODEL) == expected


@pytest.mark.parametrize("prompt", [[300], [1, 50, 300], [1, 300, 3], [1, 3, 300, 50], [1, 3, 300, 50, 301]])
def test_image_tokens_follow_begin_of_image(prompt):
    error = refusal(prompt)
    assert error.parameter == "prompt"
    assert "must follow begin-of-image (id 3)" in str(error)


@given(st.lists(st.integers(0, 499), max_size=12))
def test_any_prompt_is_text_a_picture_or_refused_by_name(prompt):
    try:
        count = drawn_in_prompt(prompt, MODEL)
    except VLLMValidationError:
        assert any(i >= 300 for i in prompt)
        return
    if count is None:
        assert all(i < 300 for i in prompt)
    else:
        assert prompt[len(prompt) - count - 1] == MODEL.boi
        assert all(i < 300 for i in prompt[: len(prompt) - count])
        assert all(i >= 300 for i in prompt[len(prompt) - count :])


@pytest.mark.parametrize("asked", [{}, {"max_tokens": 5}, {"max_tokens": 1000}, {"max_tokens": None}])
@pytest.mark.parametrize("held", [0, 7, 29])
def test_exactly_the_rest_of_the_grid(asked, held):
    params = admitted([*PROMPT, *drawn(held)], **asked)
    assert params.max_tokens == TOKENS - held


def test_nothing_ends_a_picture_early():
    params = SamplingParams(stop=["a"], stop_token_ids=[301], min_tokens=3, ignore_eos=False, max_tokens=9)
    params.update_from_generation_config({"eos_token_id": [302]}, 303)
    assert params.all_stop_token_ids
    admit(PROMPT, params, MODEL, CONTEXT)
    assert params.ignore_eos
    assert not params.stop
    assert not params.stop_token_ids
    assert not params.all_stop_token_ids
    assert params.eos_token_id is None
    assert (params.min_tokens, params.max_tokens) == (0, TOKENS)
    assert not params.detokenize


def test_sampling_is_left_alone():
    params = admitted(temperature=0.7, top_k=9, top_p=0.5, min_p=0.1, seed=4, logprobs=2, n=3)
    assert (params.temperature, params.top_k, params.top_p, params.min_p) == (0.7, 9, 0.5, 0.1)
    assert (params.seed, params.logprobs, params.n) == (4, 2, 3)


def test_text_requests_are_left_alone():
    asked = {"max_tokens": 5, "stop": ["a"], "stop_token_ids": [7], "min_tokens": 1}
    params = admitted([1, 50], **asked, extra_args={"guidance_scale": "not mine"})
    assert (params.max_tokens, params.stop, params.stop_token_ids, params.min_tokens) == (5, ["a"], [7], 1)
    assert params.detokenize


def test_text_where_only_pictures_are_served():
    error = refusal([1, 50], text=False)
    assert error.parameter == "prompt"
    assert "/v1/images/generations" in str(error)
    admitted(text=False)


def test_the_picture_must_fit_the_context():
    admitted(context=len(PROMPT) + TOKENS)
    error = refusal(context=len(PROMPT) + TOKENS - 1)
    assert error.parameter == "prompt"
    assert "4 tokens and the picture 30, but the context holds 33" in str(error)


def test_a_whole_picture_can_be_scored_but_not_continued():
    whole = [*PROMPT, *drawn(TOKENS)]
    assert "nothing is left to draw" in str(refusal(whole))
    assert admitted(whole, prompt_logprobs=0).max_tokens == 1
    assert "already holds 31 image tokens of 30" in str(refusal([*whole, 301], prompt_logprobs=0))


@pytest.mark.parametrize(
    "scale", ["5", None, True, math.nan, math.inf, -math.inf, -0.1, 100.1, 1e300, 10**18, [5.0], {}]
)
def test_guidance_scale(scale):
    error = refusal(extra_args={"guidance_scale": scale})
    assert error.parameter == "guidance_scale"
    assert str(error).startswith("guidance_scale must be a number from 0 to 100, got ")
    assert len(str(error)) < 130


@pytest.mark.parametrize("scale", [0, 0.0, 1, 1.0, 3.7, 100])
def test_guidance_scales_that_are_fine(scale):
    admitted(extra_args={"guidance_scale": scale})


@pytest.mark.parametrize(
    "negative", [5, "text", {"a": 1}, [1, "x", 2, 3], [1, True, 2, 3], [1, 2.0, 2, 3], [None]]
)
def test_negative_prompt_is_a_list_of_ids(negative):
    error = refusal(extra_args={"negative_prompt_token_ids": negative})
    assert error.parameter == "negative_prompt_token_ids"
    assert "must be a list of token ids" in str(error)


@pytest.mark.parametrize("negative", [[], [1, 3], [1, 2, 2, 2, 3]])
def test_negative_prompt_is_as_long_as_the_prompt(negative):
    error = refusal(extra_args={"negative_prompt_token_ids": negative})
    assert error.parameter == "negative_prompt_token_ids"
    assert f"has {len(negative)} ids, the prompt 4" in str(error)


@pytest.mark.parametrize("token", [-1, 300, 499, 2**40])
def test_negative_prompt_is_text(token):
    error = refusal(extra_args={"negative_prompt_token_ids": [1, token, 2, 3]})
    assert error.parameter == "negative_prompt_token_ids"
    assert "text ids below 300" in str(error)


def test_negative_prompt_of_a_resumed_picture_matches_the_text_alone():
    admitted([*PROMPT, *drawn(3)], extra_args={"negative_prompt_token_ids": [1, 9, 9, 3]})
    admitted(extra_args={"negative_prompt_token_ids": (1, 9, 9, 3)})


def test_grammars():
    grammar = StructuredOutputsParams(regex="a*")
    assert refusal(structured_outputs=grammar).parameter == "structured_outputs"


def test_allowed_tokens_are_image_tokens():
    assert refusal(allowed_token_ids=[5]).parameter == "allowed_token_ids"
    assert refusal(allowed_token_ids=[301, 299]).parameter == "allowed_token_ids"
    admitted(allowed_token_ids=[300, 301])


@pytest.mark.parametrize(
    ("params", "ids"), [(None, PROMPT), (SamplingParams(), None)], ids=["pooling", "embeddings"]
)
def test_only_token_prompts_are_generated_from(params, ids):
    with pytest.raises(VLLMValidationError, match="takes token prompts and generates only"):
        admit_request(SimpleNamespace(sampling_params=params, prompt_token_ids=ids), MODEL, CONTEXT)
