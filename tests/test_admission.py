"""What a request must look like: pictures get their length, wrong ones a line that names the parameter."""

import math
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import RepetitionDetectionParams, StructuredOutputsParams

from vllm_kvcompress.admission import NOT_GIVEN, WORDS_ONLY, admit, admit_request, drawn_in_prompt
from vllm_kvcompress.config import Limits
from vllm_kvcompress.models.config import ImageModel
from vllm_kvcompress.policy.raster import Raster

MODEL = ImageModel(Raster(lines=6, width=5), text_vocab=300, codes=200, bos=1, pad=2, boi=3)
TOKENS = 30
PROMPT = [1, 50, 51, 3]
CONTEXT = 64


def admitted(prompt=PROMPT, context=CONTEXT, room=None, **params) -> SamplingParams:
    params = SamplingParams(**params)
    admit(list(prompt), params, MODEL, context, room=room)
    return params


def refusal(prompt=PROMPT, context=CONTEXT, room=None, **params) -> VLLMValidationError:
    with pytest.raises(VLLMValidationError) as raised:
        admitted(prompt, context, room, **params)
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


@pytest.mark.parametrize("asked", [{}, {"max_tokens": 30}, {"max_tokens": 1000}, {"max_tokens": None}])
@pytest.mark.parametrize("held", [0, 7, 29])
def test_exactly_the_rest_of_the_grid(asked, held):
    params = admitted([*PROMPT, *drawn(held)], **asked)
    assert params.max_tokens == TOKENS - held


def test_nothing_ends_a_picture_early():
    params = SamplingParams(stop=["a"], stop_token_ids=[299], min_tokens=3, ignore_eos=False, max_tokens=99)
    params.update_from_generation_config({"eos_token_id": [202]}, 203)
    assert params.all_stop_token_ids
    admit(PROMPT, params, MODEL, CONTEXT)
    assert params.ignore_eos
    assert not params.stop
    assert not params.stop_token_ids
    assert not params.all_stop_token_ids
    assert params.eos_token_id is None
    assert (params.min_tokens, params.max_tokens) == (0, TOKENS)
    assert not params.detokenize


def test_what_is_admitted_is_admitted_again():
    """By the engine, after the front end."""
    params = admitted(stop=["a"], max_tokens=None, seed=1)
    admit(list(PROMPT), params, MODEL, CONTEXT)
    assert params.max_tokens == TOKENS


@pytest.mark.parametrize("asked", [1, 15, 17, 29])
def test_less_than_the_picture_is_refused(asked):
    error = refusal(max_tokens=asked)
    assert error.parameter == "max_tokens"
    assert f"is {asked}, but the picture takes 30" in str(error)
    assert admitted([*PROMPT, *drawn(30 - asked)], max_tokens=asked).max_tokens == asked


def test_vllms_own_max_tokens_is_no_wish():
    """16 is what its front ends fill in where a client says nothing: who asks for it gets the picture."""
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    said_by_nobody = CompletionRequest(prompt="x").to_sampling_params(NOT_GIVEN, {})
    assert NOT_GIVEN == SamplingParams().max_tokens == said_by_nobody.max_tokens == 16
    assert admitted(PROMPT, max_tokens=16).max_tokens == 30


def test_the_servers_own_max_tokens_is_no_wish():
    """It is filled in where a client says nothing, and caps what others say."""
    params = SamplingParams(max_tokens=20)
    admit(list(PROMPT), params, MODEL, CONTEXT, default=20)
    assert params.max_tokens == 30
    with pytest.raises(VLLMValidationError, match="max_tokens is 19, but the picture takes 30"):
        admit(list(PROMPT), SamplingParams(max_tokens=19), MODEL, CONTEXT, default=20)
    with pytest.raises(VLLMValidationError, match="60 tokens of a text request"):  # of a text it is one
        admit([1, 50], SamplingParams(max_tokens=70), MODEL, CONTEXT, room=60, default=70)


def test_beam_search_is_refused():
    """It asks for one token at a time, and would be given pictures."""
    assert "beam search" in str(refusal(max_tokens=1, logprobs=2, detokenize=False))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (
            "repetition_detection",
            RepetitionDetectionParams(max_pattern_size=4, min_pattern_size=1, min_count=4),
        ),
        ("thinking_token_budget", 3),
        ("trace_decode_token_ids", [5, 6]),
        ("stop_token_ids", [7, 301]),
    ],
)
def test_what_would_end_or_change_a_picture_is_refused(name, value):
    params = SamplingParams()
    setattr(params, name, value)
    with pytest.raises(VLLMValidationError) as raised:
        admit(PROMPT, params, MODEL, CONTEXT)
    assert raised.value.parameter == name


def test_prompts_and_pictures_have_limits():
    limits = Limits(prompt_tokens=4, pictures=3)
    admit(PROMPT, SamplingParams(n=3), MODEL, CONTEXT, limits=limits)
    admit([*PROMPT, *drawn(9)], SamplingParams(), MODEL, CONTEXT, limits=limits)  # of text
    for prompt, n, name, setting in (
        ([1, *PROMPT], 1, "prompt", "prompt_tokens"),
        (PROMPT, 4, "n", "pictures"),
    ):
        with pytest.raises(
            VLLMValidationError, match=rf"additional_config\.kvcompress\.limits\.{setting}"
        ) as one:
            admit(prompt, SamplingParams(n=n), MODEL, CONTEXT, limits=limits)
        assert one.value.parameter == name
    assert refusal(n=1000).parameter == "n"


def test_every_setting_of_vllms_has_been_looked_at():
    """One that vLLM adds may end a picture early, or change it: say here that it does not, or refuse it."""
    harmless = (
        "n presence_penalty frequency_penalty repetition_penalty temperature watermarking top_p top_k "
        "min_p seed stop ignore_eos min_tokens logprobs prompt_logprobs prompt_logprob_token_ids "
        "prompt_logprob_start "
        "logprob_token_ids flat_logprobs detokenize skip_special_tokens spaces_between_special_tokens "
        "include_stop_str_in_output output_kind stream_interval skip_clone output_text_buffer_length "
        "_eos_token_id _all_stop_token_ids _watermarking_skipped logit_bias extra_args bad_words "
        "_bad_words_token_ids skip_reading_prefix_cache routed_experts_prompt_start"
    )
    checked = {"max_tokens", "stop_token_ids", "allowed_token_ids", *WORDS_ONLY}
    assert set(SamplingParams.__struct_fields__) == {*harmless.split(), *checked}


def test_sampling_is_left_alone():
    params = admitted(temperature=0.7, top_k=9, top_p=0.5, min_p=0.1, seed=4, logprobs=2, n=3)
    assert (params.temperature, params.top_k, params.top_p, params.min_p) == (0.7, 9, 0.5, 0.1)
    assert (params.seed, params.logprobs, params.n) == (4, 2, 3)


def test_text_requests_are_left_alone():
    asked = {"max_tokens": 5, "stop": ["a"], "stop_token_ids": [7], "min_tokens": 1}
    params = admitted([1, 50], **asked, extra_args={"guidance_scale": "not mine"})
    assert (params.max_tokens, params.stop, params.stop_token_ids, params.min_tokens) == (5, ["a"], [7], 1)
    assert params.detokenize


@pytest.mark.parametrize(
    ("prompt", "tokens", "room", "parameter"),
    [
        (4, 6, 10, None),
        (9, 1, 10, None),
        (4, None, 5, None),
        (4, 7, 10, "max_tokens"),
        (9, 2, 10, "max_tokens"),
        (10, 1, 10, "prompt"),
        (4, None, 4, "prompt"),
        (60, 2000, None, None),
    ],
)
def test_a_text_that_the_cache_could_never_hold(prompt, tokens, room, parameter):
    ids = [1, *range(50, 49 + prompt)]
    if parameter is None:
        assert admitted(ids, room=room, max_tokens=tokens).max_tokens == tokens
        return
    error = refusal(ids, room=room, max_tokens=tokens)
    assert error.parameter == parameter
    assert "--kv-cache-memory-bytes" in str(error)
    assert f"{prompt} " in str(error)
    assert parameter == "prompt" or f"set max_tokens to {room - prompt} or less" in str(error)


def test_room_for_text_is_nothing_to_a_picture():
    assert admitted(room=5).max_tokens == TOKENS


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
    admitted(whole, context=len(whole) + 1, prompt_logprobs=0)
    error = refusal(whole, context=len(whole), prompt_logprobs=0)  # vLLM draws a token after it
    assert "34 tokens and the picture 1, but the context holds 34" in str(error)


def test_a_text_must_fit_the_context():
    """With any cache: an engine that reads a longer prompt dies."""
    for room in (None, 10 * CONTEXT):
        assert admitted([1] * (CONTEXT - 1), room=room, max_tokens=7).max_tokens == 7
        for length in (CONTEXT, CONTEXT + 1, 5 * CONTEXT):
            error = refusal([1] * length, room=room, max_tokens=1)
            assert error.parameter == "prompt"
            assert f"{length} tokens, but the context holds 64" in str(error)


def test_what_the_context_ends_needs_no_more_room_than_the_context():
    assert admitted([1, 50], room=CONTEXT, max_tokens=10**6).max_tokens == 10**6
    assert refusal([1, 50], room=CONTEXT - 1, max_tokens=10**6).parameter == "max_tokens"


def test_a_prompt_of_nothing_is_refused():
    with pytest.raises(VLLMValidationError, match="the prompt has no tokens"):
        admit_request(request(SamplingParams(), []), MODEL, CONTEXT)


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


def request(params=None, ids=PROMPT, embeds=None, resumable=False):
    return SimpleNamespace(
        sampling_params=params, prompt_token_ids=ids, prompt_embeds=embeds, resumable=resumable
    )


@pytest.mark.parametrize(
    "asked",
    [request(), request(SamplingParams(), None), request(SamplingParams(), embeds="a tensor")],
    ids=["pooling", "embeddings", "embeddings beside tokens"],
)
def test_only_token_prompts_are_generated_from(asked):
    with pytest.raises(VLLMValidationError, match="takes token prompts and generates only"):
        admit_request(asked, MODEL, CONTEXT)


@pytest.mark.parametrize("token", [-1, 500, 2**40])
def test_ids_are_the_vocabularys(token):
    """Of text too: an engine that looks such a token up dies."""
    for prompt in ([1, token], [token, *PROMPT], [token]):
        with pytest.raises(
            VLLMValidationError, match="outside the vocabulary: use ids from 0 to 499"
        ) as raised:
            admit_request(request(SamplingParams(), prompt), MODEL, CONTEXT)
        assert raised.value.parameter == "prompt"
    admit_request(request(SamplingParams(), [1, 299]), MODEL, CONTEXT)


def test_pictures_are_not_asked_for_in_parts():
    admit_request(request(SamplingParams(), [1, 50], resumable=True), MODEL, CONTEXT)
    for asked, room in ((PROMPT, None), ([*PROMPT, *drawn(3)], None), ([1, 50], 60), (PROMPT, 60)):
        with pytest.raises(VLLMValidationError, match="must come whole"):
            admit_request(request(SamplingParams(), asked, resumable=True), MODEL, CONTEXT, room=room)


def test_a_picture_that_is_scored_half_drawn_must_fit_too():
    """It would wait for blocks that the pool need not have, and everybody behind it."""
    half = [*PROMPT, *drawn(15)]
    assert refusal(half, context=len(half) + 14, prompt_logprobs=0).parameter == "prompt"
    admitted(half, context=len(half) + 15, prompt_logprobs=0)
