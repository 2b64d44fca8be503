"""Request bodies and picture files: no engine, no server."""

import base64
import io
import json
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vllm_kvcompress.serving.encode import Pixels, encode_base64
from vllm_kvcompress.serving.painter import partial_lines
from vllm_kvcompress.serving.protocol import BadParameter, ImageRequest, parse_request
from vllm_kvcompress.serving.wishes import unmet

JSON = "application/json"


def parse(**fields):
    return parse_request(JSON, json.dumps({"prompt": "a cat", **fields}).encode())


def refused(body, content_type=JSON):
    with pytest.raises(BadParameter) as error:
        parse_request(content_type, body if isinstance(body, bytes) else json.dumps(body).encode())
    return error.value


def test_defaults():
    request = parse()
    assert (request.n, request.size, request.output_format, request.stream) == (1, "auto", "png", False)
    assert (request.temperature, request.top_k, request.top_p) == (1.0, None, 1.0)
    assert request.seed is request.guidance_scale is request.negative_prompt is None


def test_null_means_not_given():
    assert parse(n=None, size=None, stream=None, seed=None, style=None) == parse()


def test_every_field_of_the_openai_sdk_is_known():
    from openai.types.image_generate_params import ImageGenerateParamsBase

    assert set(ImageGenerateParamsBase.__annotations__) <= set(ImageRequest.model_fields)


def test_every_value_of_the_openai_sdk_is_accepted():
    """What its types name, this server draws, noted or not."""
    from openai.types.image_generate_params import ImageGenerateParamsBase

    for name, kind in get_type_hints(ImageGenerateParamsBase).items():
        for value in literals(kind):
            request = parse(**{name: value})
            assert getattr(request, name) == value
            noted = [field for field, _ in unmet(request, ["384x384"])]
            assert noted in ([], [name])


def literals(kind):
    """The values that a type names."""
    if get_origin(kind) is Literal:
        return get_args(kind)
    return [value for part in get_args(kind) for value in literals(part)]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("prompt", ""), ("prompt", " \n\t"), ("prompt", 3), ("prompt", ["a"]), ("prompt", "x" * 32_001),
        ("n", 0), ("n", 11), ("n", -1), ("n", 10**30), ("n", "2"), ("n", True), ("n", 1.0), ("n", 1.5),
        ("size", 384), ("size", "big"), ("size", "1024"), ("size", "1024X1024"), ("size", "-1x5"),
        ("model", 1), ("user", {}), ("safety_identifier", 1),
        ("response_format", "file"), ("output_format", 1), ("output_format", "x" * 41),
        ("output_compression", 101), ("output_compression", -1),
        ("quality", 1), ("style", True), ("background", []), ("moderation", 0), ("svg", "x"),
        ("frame_count", "9"),
        ("stream", 1), ("stream", "true"), ("partial_images", 4), ("partial_images", -1),
        ("partial_images", 1),
        ("seed", 1.5), ("seed", -1), ("seed", 2**63), ("seed", "1"), ("seed", True),
        ("guidance_scale", float("nan")), ("guidance_scale", float("inf")), ("guidance_scale", -0.1),
        ("guidance_scale", 101), ("guidance_scale", "5"), ("guidance_scale", True),
        ("temperature", -0.1), ("temperature", 2.1), ("temperature", float("nan")),
        ("top_k", -2), ("top_k", 1.5), ("top_p", 0), ("top_p", 1.01), ("top_p", float("nan")),
        ("negative_prompt", 1), ("num_inference_steps", 20), ("promt", "a dog"), ("extra_body", {}),
    ],
)  # fmt: skip
def test_a_wrong_value_is_named(name, value):
    error = refused({"prompt": "a cat", name: value})
    assert error.parameter == name
    assert name in str(error)
    assert "\n" not in str(error)
    assert len(str(error)) < 200


@pytest.mark.parametrize(
    ("fields", "parameter"),
    [
        ({"stream": True, "n": 2}, "n"),
        ({"negative_prompt": "fog", "guidance_scale": 1.0}, "negative_prompt"),
    ],
)
def test_fields_that_contradict_each_other(fields, parameter):
    assert refused({"prompt": "a cat", **fields}).parameter == parameter


def test_the_prompt_is_required():
    assert str(refused({})) == "prompt is required"
    assert refused({"prompt": None}).parameter == "prompt"


def test_messages_say_what_would_be_right():
    assert str(refused({"prompt": "a", "n": 11})) == "n must be less than or equal to 10, got 11"
    form = refused({"prompt": "a", "response_format": "file"})
    assert str(form) == "response_format must be 'b64_json' or 'url', got 'file'"
    size = refused({"prompt": "a", "size": "big"})
    assert str(size) == "size must be auto or WIDTHxHEIGHT, got 'big'"


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b'"a cat"', b"null", b"3", b'{"prompt": "a" "n": 1}', b'{"prompt": "\xff"}',
     b'{"n": ' + b"1" * 5000 + b"}", b"[" * 100_000],
)  # fmt: skip
def test_a_body_that_is_no_json_object(body):
    assert refused(body).parameter == "body"


def test_half_a_surrogate_pair_is_no_text():
    assert refused(b'{"prompt": "\\ud800"}').parameter == "prompt"
    assert refused(b'{"prompt": "a", "\\ud800": 1}').parameter == "body"


@pytest.mark.parametrize("content_type", ["", "text/plain", "multipart/form-data; b=x", "application/jsonx"])
def test_content_type(content_type):
    assert refused({"prompt": "a cat"}, content_type).parameter == "body"


def test_content_type_with_a_charset():
    assert parse_request("Application/JSON; charset=utf-8", b'{"prompt": "a cat"}').prompt == "a cat"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(st.dictionaries(st.sampled_from(sorted(ImageRequest.model_fields)) | st.text(max_size=8), json_values))
def test_any_body_is_accepted_or_refused_by_name(fields):
    try:
        assert parse_request(JSON, json.dumps(fields).encode()).prompt.strip()
    except BadParameter as refusal:
        named = refusal.parameter
    else:
        named = "prompt"
    assert named in {"prompt", *fields}


@pytest.mark.parametrize(
    ("lines", "partials", "at"),
    [(24, 0, []), (24, 1, [12]), (24, 2, [8, 16]), (24, 3, [6, 12, 18]), (5, 3, [1, 2, 3]), (1, 3, []),
     (2, 3, [1])],
)  # fmt: skip
def test_partial_pictures_are_spread_over_the_lines(lines, partials, at):
    assert partial_lines(lines, partials) == at


def decoded(b64):
    return Image.open(io.BytesIO(base64.b64decode(b64, validate=True)))


GRADIENT = bytes(v for y in range(32) for x in range(48) for v in (5 * x, 7 * y, 128))


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
def test_files(output_format):
    picture = decoded(encode_base64(Pixels(48, 32, GRADIENT), (48, 32), output_format, 100))
    assert (picture.format, picture.size, picture.mode) == (output_format.upper(), (48, 32), "RGB")
    difference = max(abs(a - b) for a, b in zip(picture.tobytes(), GRADIENT, strict=True))
    assert difference <= {"png": 0, "jpeg": 4, "webp": 24}[output_format]


@pytest.mark.parametrize("output_format", ["jpeg", "webp"])
def test_lower_quality_is_smaller(output_format):
    sizes = [len(encode_base64(Pixels(48, 32, GRADIENT), (48, 32), output_format, q)) for q in (0, 50, 100)]
    assert sizes[0] < sizes[1] < sizes[2]


def test_what_is_not_drawn_is_grey():
    picture = decoded(encode_base64(Pixels(48, 8, GRADIENT[: 48 * 8 * 3]), (48, 32), "png", 100))
    assert picture.tobytes() == GRADIENT[: 48 * 8 * 3] + bytes((127,)) * (48 * 24 * 3)
