"""The images route on a fake engine: answers and errors."""

import asyncio
import base64
import io
import json
import time
from functools import partial
from http import HTTPStatus
from types import SimpleNamespace

import openai
import pytest
from images_fakes import (
    MODEL,
    PATH,
    SIZE,
    AsgiCall,
    FakeEngine,
    code,
    draw,
    expected_rgb,
    http_client,
    make_app,
    openai_client,
    prompt_ids,
    rgb,
    still_serves,
    until,
)
from PIL import Image
from vllm.exceptions import VLLMValidationError
from vllm.plugins.endpoint_plugins.interface import EndpointPlugin
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.exceptions import EngineGenerateError

from vllm_kvcompress.config import Limits
from vllm_kvcompress.serving import alive, drain
from vllm_kvcompress.serving.decoder import MOST
from vllm_kvcompress.serving.images import ImagesEndpoint
from vllm_kvcompress.serving.protocol import MAX_PROMPT_CHARACTERS

TOKENS = MODEL.raster.tokens
BODY = Limits().body_bytes


@pytest.fixture
def engine():
    return FakeEngine()


@pytest.fixture
async def app(engine):
    return await make_app(engine)


@pytest.fixture
async def client(app):
    async with http_client(app) as client:
        yield client


@pytest.fixture
async def sdk(app):
    async with openai_client(app) as sdk:
        yield sdk


def test_it_is_an_endpoint_plugin():
    assert isinstance(ImagesEndpoint(), EndpointPlugin)


async def test_answer_through_the_openai_client(sdk, engine):
    answer = await sdk.images.generate(
        prompt="a cat", model="janus", size=SIZE, n=1, response_format="b64_json", user="me",
        quality="auto", background="opaque", moderation="low", extra_body={"seed": 7},
    )  # fmt: skip
    assert isinstance(answer, openai.types.ImagesResponse)
    assert rgb(answer.data[0].b64_json) == expected_rgb(7)
    assert (answer.size, answer.output_format, answer.background) == (SIZE, "png", "opaque")
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (len("a cat") + 2, TOKENS)
    assert answer.usage.total_tokens == len("a cat") + 2 + TOKENS
    assert answer.usage.input_tokens_details.text_tokens == len("a cat") + 2
    assert answer.usage.output_tokens_details.image_tokens == TOKENS
    assert abs(answer.created - time.time()) < 60
    assert engine.aborted == []


async def test_what_the_engine_is_asked(client, engine):
    await draw(client, guidance_scale=3, temperature=0.5, top_k=9, top_p=0.8, seed=4, negative_prompt="fog")
    (params,), (prompt,) = engine.params.values(), engine.prompts.values()
    assert prompt == [MODEL.bos, *(ord(c) + 10 for c in "a cat"), MODEL.boi]
    assert (params.temperature, params.top_k, params.top_p, params.seed) == (0.5, 9, 0.8, 4)
    assert (params.max_tokens, params.ignore_eos, params.detokenize) == (TOKENS, True, False)
    assert params.output_kind is RequestOutputKind.FINAL_ONLY
    negative = [MODEL.bos, *(ord(c) + 10 for c in "fog"), MODEL.pad, MODEL.pad, MODEL.boi]
    assert params.extra_args == {"guidance_scale": 3, "negative_prompt_token_ids": negative}


@pytest.mark.parametrize(("asked", "given"), [(-1, 0), (0, 0), (199, 199), (200, 0), (2**40, 0)])
async def test_defaults_and_top_k_in_the_engines_range(client, engine, asked, given):
    await draw(client, top_k=asked)
    (params,) = engine.params.values()
    assert (params.temperature, params.top_k, params.top_p, params.seed) == (1.0, given, 1.0, None)
    assert params.extra_args == {"guidance_scale": MODEL.guidance_scale}


async def test_pictures_of_one_request_differ_and_each_can_be_drawn_alone(client):
    answer = await draw(client, n=10, seed=5)
    assert [rgb(p["b64_json"]) for p in answer["data"]] == [expected_rgb(5 + i) for i in range(10)]
    assert answer["usage"]["output_tokens"] == 10 * TOKENS
    assert answer["usage"]["input_tokens"] == len("a cat") + 2


async def test_seeds_wrap_at_the_largest(client, engine):
    await draw(client, n=2, seed=2**63 - 1)
    assert [p.seed for p in engine.params.values()] == [2**63 - 1, 0]


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
async def test_output_format(client, output_format):
    answer = await draw(client, output_format=output_format)
    assert answer["output_format"] == output_format
    file = Image.open(io.BytesIO(base64.b64decode(answer["data"][0]["b64_json"])))
    assert file.format == output_format.upper()


async def test_sixteen_clients_and_one_decoder(app, engine):
    engine.decode_step = lambda: asyncio.sleep(0.001)

    async def one(seed):
        async with openai_client(app) as sdk:
            answer = await sdk.images.generate(prompt="p" * (seed + 1), n=2, extra_body={"seed": seed})
            assert [rgb(p.b64_json) for p in answer.data] == [expected_rgb(seed), expected_rgb(seed + 1)]

    await asyncio.gather(*map(one, range(16)))
    assert len(engine.params) == 32
    assert engine.most_decoding == 1
    assert sum(engine.calls) == 32


async def test_pictures_that_end_while_others_are_decoded_go_in_one_call(client, engine):
    first, decoded = asyncio.Event(), asyncio.Event()
    engine.decode_step = decoded.wait
    engine.step = lambda position: asyncio.sleep(0) if first.is_set() else first.wait()
    early = asyncio.create_task(draw(client, seed=50))
    await until(lambda: engine.running)
    first.set()
    await until(lambda: engine.decoding)
    late = asyncio.create_task(draw(client, n=10, seed=5))
    await until(lambda: len(engine.params) == 11 and not engine.running)
    decoded.set()
    assert [rgb(p["b64_json"]) for p in (await early)["data"]] == [expected_rgb(50)]
    assert [rgb(p["b64_json"]) for p in (await late)["data"]] == [expected_rgb(5 + i) for i in range(10)]
    assert engine.calls == [1, MOST, 10 - MOST]
    assert engine.most_decoding == 1


async def test_usage_has_room_for_the_cache(engine):
    async def summary(outputs):
        return {"steps": 7, "kv_cache": {"pictures": len(outputs), "ids": [o.request_id for o in outputs]}}

    async with http_client(await make_app(engine, usage_extra=lambda client: summary)) as client:
        usage = (await draw(client, n=2))["usage"]
        assert usage["steps"] == 7
        assert usage["kv_cache"] == {"pictures": 2, "ids": list(engine.params)}
        assert '"kv_cache"' in (await client.post(PATH, json={"prompt": "a cat", "stream": True})).text


@pytest.mark.parametrize(
    ("fields", "parameter"),
    [
        ({"prompt": ""}, "prompt"),
        ({"n": 0}, "n"),
        ({"n": 11}, "n"),
        ({"size": SIZE.upper()}, "size"),
        ({"response_format": "file"}, "response_format"),
        ({"temperature": -1}, "temperature"),
        ({"promt": "a dog"}, "promt"),
        ({"prompt": "x" * (100 - TOKENS - 1)}, "prompt"),
        ({"negative_prompt": "x" * (100 - TOKENS - 1)}, "negative_prompt"),
    ],
)
async def test_400_and_the_server_goes_on(client, engine, fields, parameter):
    error = (await draw(client, 400, **fields))["error"]
    assert (error["type"], error["param"], error["code"]) == ("BadRequestError", parameter, 400)
    assert parameter in error["message"]
    assert not engine.params
    await still_serves(client)


async def test_the_longest_prompt_that_fits(client):
    await draw(client, prompt="x" * (100 - TOKENS - 2))


@pytest.mark.parametrize(
    ("content", "content_type", "parameter"),
    [
        (b'{"prompt": "a cat", "guidance_scale": NaN}', "application/json", "guidance_scale"),
        (b'{"prompt": "a cat", "temperature": 1e999}', "application/json", "temperature"),
        (b'{"prompt": ', "application/json", "body"),
        (b"[1]", "application/json", "body"),
        (b"prompt=a+cat", "application/x-www-form-urlencoded", "body"),
        (b"", "application/json", "body"),
    ],
)
async def test_bodies_that_are_wrong(client, content, content_type, parameter):
    answer = await client.post(PATH, content=content, headers={"content-type": content_type})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == parameter
    await still_serves(client)


async def test_a_body_that_says_it_is_too_long_is_not_read(app, engine):
    """Answered before any of it is there."""
    call = AsgiCall(app, None, headers=[(b"content-length", str(BODY + 1).encode())])
    await asyncio.wait_for(call.task, 5)
    assert call.messages[0]["status"] == 413
    error = json.loads(call.messages[1]["body"])["error"]
    assert (error["code"], error["param"]) == (413, "body")
    assert str(BODY) in error["message"]
    assert not engine.params


async def test_a_body_of_unknown_length_is_read_up_to_the_limit(client, engine):
    sent = 0

    async def endless():
        nonlocal sent
        while True:
            sent += 2**16
            yield b" " * 2**16

    answer = await client.post(PATH, content=endless(), headers={"content-type": "application/json"})
    assert answer.status_code == 413
    assert BODY < sent <= BODY + 2**18
    assert not engine.params
    await still_serves(client)


async def test_a_body_that_trickles(engine):
    """Below the limit of bytes for hours."""
    engine.vllm_config.additional_config = {"kvcompress": {"limits": {"body_seconds": 0.1}}}
    app = await make_app(engine)

    async def trickle():
        while True:
            yield b" "
            await asyncio.sleep(0.01)

    async with http_client(app) as client:
        headers = {"content-type": "application/json"}
        answer = await asyncio.wait_for(client.post(PATH, content=trickle(), headers=headers), 5)
        assert (answer.status_code, answer.json()["error"]["param"]) == (408, "body")
        assert not engine.params
        await still_serves(client)


async def test_the_longest_texts_fit_the_body(client):
    """Whatever they are written in; they are refused for what they are."""
    text = "\N{GRINNING FACE}" * MAX_PROMPT_CHARACTERS
    body = json.dumps({"prompt": text, "negative_prompt": text}).encode()
    assert len(body) <= BODY
    answer = await client.post(PATH, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "prompt"


async def test_limits_are_settings(engine):
    limits = {"body_bytes": 2000, "request_id": 16, "prompt_tokens": 9}
    engine.vllm_config.additional_config = {"kvcompress": {"limits": limits}}
    async with http_client(await make_app(engine)) as client:
        answer = await client.post(PATH, json={"prompt": "a" * 2000})
        assert answer.status_code == 413
        assert "more than 2000 bytes" in answer.json()["error"]["message"]
        error = (await draw(client, 400, prompt="a" * 8))["error"]
        assert error["param"] == "prompt"
        assert "10 tokens, and this server takes 9" in error["message"]
        fine = await client.post(PATH, json={"prompt": "a" * 7}, headers={"X-Request-Id": "y" * 400})
        assert fine.status_code == 200
        (used,) = engine.params
        assert used.count("y") == 16


# What only a strict server refuses, and what the answer says elsewhere.
WISHES = (
    ({"size": "1024x1024"}, "size", f"size 1024x1024 is not to be had: pictures are {SIZE}"),
    ({"quality": "hd"}, "quality", "quality 'hd' is not to be had: the model has one quality"),
    ({"style": "vivid"}, "style", "style has no effect: describe the style in the prompt"),
    ({"moderation": "high"}, "moderation", "moderation 'high' is not to be had: there is no filter"),
    ({"complexity": "low"}, "complexity", "complexity has no effect: the model does not plan"),
    ({"frame_count": 9}, "frame_count", "frame_count has no effect: pictures do not move"),
    ({"svg": {"model": "x"}}, "svg", "svg has no effect: pictures are pixels"),
    (
        {"background": "transparent"},
        "background",
        "background 'transparent' is not to be had: the model draws opaque pictures",
    ),
    (
        {"output_format": "gif"},
        "output_format",
        "output_format 'gif' is not to be had: png, jpeg and webp are, this is png",
    ),
    (
        {"output_compression": 50},
        "output_compression",
        "output_compression has no effect on a png, which is lossless",
    ),
)


@pytest.fixture
async def strict(engine):
    engine.vllm_config.additional_config = {"kvcompress": {"strict": True}}
    async with http_client(await make_app(engine)) as client:
        yield client


@pytest.mark.parametrize(("fields", "parameter", "sentence"), WISHES)
async def test_wishes_are_noted(client, fields, parameter, sentence):
    answer = await draw(client, seed=1, **fields)
    assert answer["notes"] == [sentence]
    assert rgb(answer["data"][0]["b64_json"]) == expected_rgb(1)
    assert (answer["size"], answer["output_format"], answer["background"]) == (SIZE, "png", "opaque")
    assert "notes" not in await draw(client)


@pytest.mark.parametrize(("fields", "parameter", "sentence"), WISHES)
async def test_a_strict_server_refuses_wishes(strict, engine, fields, parameter, sentence):
    error = (await draw(strict, 400, **fields))["error"]
    assert (error["type"], error["param"], error["message"]) == ("BadRequestError", parameter, sentence)
    assert not engine.params
    assert "notes" not in await draw(strict, size=SIZE, quality="standard", response_format="url")


async def test_model_names(sdk, client, strict):
    for name in ("janus", "alias"):
        answer = await sdk.images.generate(prompt="a cat", model=name)
        assert answer.data
        assert not hasattr(answer, "notes")
    other = await draw(client, model="gpt-image-1")
    assert other["notes"] == ["model 'gpt-image-1' is not served here: janus drew this"]
    error = (await draw(strict, 404, model="dall-e-3"))["error"]
    assert (error["type"], error["param"]) == ("NotFoundError", "model")
    assert "janus, alias" in error["message"]


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({}, "b64_json"),
        ({"response_format": "url"}, "url"),
        ({"model": "dall-e-3"}, "url"),
        ({"model": "dall-e-3", "response_format": "b64_json"}, "b64_json"),
        ({"model": "gpt-image-1"}, "b64_json"),
    ],
)
async def test_urls_hold_the_picture(client, fields, field):
    [picture] = (await draw(client, seed=2, **fields))["data"]
    assert list(picture) == [field]
    assert rgb(picture[field].removeprefix("data:image/png;base64,")) == expected_rgb(2)


async def test_an_url_says_what_file_it_holds(client):
    [picture] = (await draw(client, response_format="url", output_format="webp"))["data"]
    kind, file = picture["url"].split(",")
    assert kind == "data:image/webp;base64"
    assert Image.open(io.BytesIO(base64.b64decode(file))).format == "WEBP"


async def test_a_long_negative_prompt_lengthens_the_prompt(client, engine):
    await draw(client, prompt="cat", negative_prompt="foggy")
    (params,), (prompt,) = engine.params.values(), engine.prompts.values()
    assert prompt == [MODEL.bos, MODEL.pad, MODEL.pad, *(ord(c) + 10 for c in "cat"), MODEL.boi]
    assert params.extra_args["negative_prompt_token_ids"] == prompt_ids(None, MODEL, "foggy")


@pytest.mark.parametrize("path", ["/v1/images/edits", "/v1/images/variations"])
async def test_pictures_are_not_taken(client, engine, path):
    answer = await client.post(path, files={"image": b"x" * 2**21}, data={"prompt": "a cat"})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["type"], error["param"], error["code"]) == ("BadRequestError", "image", 400)
    assert "takes no picture" in error["message"]
    assert "\n" not in error["message"]
    await still_serves(client)


async def test_api_key(engine):
    app = await make_app(engine, api_key="secret")
    async with openai_client(app, "wrong") as sdk:
        with pytest.raises(openai.AuthenticationError):
            await sdk.images.generate(prompt="a cat")
    async with openai_client(app, "secret") as sdk:
        assert (await sdk.images.generate(prompt="a cat")).data


async def test_request_id(client, engine):
    for _ in range(2):
        answer = await client.post(PATH, json={"prompt": "a cat"}, headers={"X-Request-Id": "mine"})
        assert answer.headers["X-Request-Id"] == "mine"
    assert len({i for i in engine.params if "mine" in i}) == 2


async def test_a_long_request_id_is_cut(client, engine):
    await client.post(PATH, json={"prompt": "a cat"}, headers={"X-Request-Id": "x" * 5000})
    (used,) = engine.params
    assert "x" * 128 in used
    assert len(used) < 200


async def test_a_dead_engine(client, engine, app):
    engine.errored = True
    error = (await draw(client, 500))["error"]
    assert error["type"] == "InternalServerError"
    assert app.state.server.should_exit


async def test_a_full_engine(client, engine):
    """``--max-num-queued-reqs 2``: vLLM's own count, of pictures."""
    from vllm.v1.engine.async_llm import AsyncLLM

    vllms = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_queued_reqs=2, max_num_queued_tokens=None),
        admission_stats=None,
        get_num_unfinished_requests=lambda: len(engine.running),
        _record_admission_rejection=lambda *_: None,
    )
    engine.check_admission = partial(AsyncLLM.check_admission, vllms)
    for stream in (False, True):
        engine.running = {"one", "two"}
        assert (await draw(client, 503, stream=stream))["error"]["code"] == 503
        engine.running = {"one"}
        await draw(client, 503, n=2)
        await still_serves(client)


async def test_the_engine_refuses_the_prompt(client, engine):
    async def refuse(position):
        raise VLLMValidationError("no", parameter="prompt")

    engine.step = refuse
    assert (await draw(client, 400))["error"]["param"] == "prompt"


async def test_a_picture_that_ends_early_is_an_error(client, engine):
    engine.finish_reason = "stop"
    whole = engine.generate

    async def half(prompt, params, request_id, **kwargs):
        async for output in whole(prompt, params, request_id, **kwargs):
            output.outputs[0].token_ids = output.outputs[0].token_ids[: TOKENS // 2]
            yield output

    engine.generate = half
    assert "15 of 30 tokens (finish reason stop)" in (await draw(client, 500))["error"]["message"]
    engine.finish_reason = "abort"  # what a server that is going down says of requests
    assert "shutting down" in (await draw(client, 503))["error"]["message"]


async def test_a_decoder_that_fails_is_not_the_clients_fault(client, engine):
    async def fail():
        raise ValueError("bad codes in /root/secret/place.py")

    engine.decode_step = fail
    error = (await draw(client, 500))["error"]
    assert error["message"] == "the picture could not be decoded"
    engine.decode_step = lambda: asyncio.sleep(0)
    await still_serves(client)


async def test_a_picture_that_cant_be_decoded_is_its_own_clients_error(client, engine):
    """Not that of those who were decoded in the same call."""
    bad = [code(50, position) for position in range(TOKENS)]
    engine.is_bad = lambda codes: codes == bad
    first = asyncio.Event()
    engine.decode_step = first.wait
    early = asyncio.create_task(draw(client, seed=9))
    await until(lambda: engine.decoding)
    fine = [asyncio.create_task(draw(client, seed=seed)) for seed in (1, 2)]
    broken = asyncio.create_task(draw(client, 500, seed=50))
    await until(lambda: len(engine.params) == 4 and not engine.running)
    first.set()
    for seed, task in zip((9, 1, 2), (early, *fine), strict=True):
        assert rgb((await task)["data"][0]["b64_json"]) == expected_rgb(seed)
    assert (await broken)["error"]["message"] == "the picture could not be decoded"
    assert engine.calls == [1, 3, 1, 1, 1]


TRACE = 'it broke\n  File "/root/secret/place.py", line 3, in draw\n    break()\nin /root/secret'


@pytest.mark.parametrize(
    "error",
    [RuntimeError(TRACE), ValueError(TRACE), EngineGenerateError()],
    ids=lambda error: type(error).__name__,
)
async def test_an_error_that_nobody_foresaw_is_one_line(client, engine, error):
    """vLLM keeps the lines, tells a ValueError as a 400, and its engine's wrapper says nothing."""

    async def fail(position):
        raise error

    engine.step = fail
    told = (await draw(client, 500))["error"]
    streamed = (await client.post(PATH, json={"prompt": "a cat", "stream": True})).text
    event = json.loads(streamed[streamed.index("data: ") + 6 :])
    for one in (told, event["error"]):
        assert (one["code"], one["message"]) == (500, "the picture failed: the server's log says why")


async def test_an_engine_that_dies_while_it_decodes(client, engine, monkeypatch):
    """Nobody tells the call."""
    monkeypatch.setattr(alive, "LOOK_S", 0.01)
    engine.decode_step = asyncio.Event().wait
    asked = asyncio.create_task(draw(client, 500))
    await until(lambda: engine.decoding)
    engine.errored = True
    assert (await asyncio.wait_for(asked, 5))["error"]["type"] == "InternalServerError"
    assert engine.decoding == 0
    engine.errored, engine.decode_step = False, lambda: asyncio.sleep(0)
    await still_serves(client)


async def test_an_engine_that_dies_while_it_draws(client, engine, monkeypatch):
    """Nobody tells those that wait for tokens either, where a signal has stopped it."""
    monkeypatch.setattr(alive, "LOOK_S", 0.01)
    engine.step = lambda position: asyncio.Event().wait() if position == 7 else asyncio.sleep(0)
    asked = [asyncio.create_task(draw(client, 500)), asyncio.create_task(draw(client, 500, n=3))]
    streamed = asyncio.create_task(client.post(PATH, json={"prompt": "a cat", "stream": True}))
    await until(lambda: len(engine.running) == 5)
    engine.errored = True
    for error in await asyncio.wait_for(asyncio.gather(*asked), 5):
        assert error["error"]["type"] == "InternalServerError"
    assert "event: error" in (await asyncio.wait_for(streamed, 5)).text
    assert not engine.running
    engine.errored, engine.step = False, lambda position: asyncio.sleep(0)
    await still_serves(client)


async def test_an_engine_that_dies_while_it_is_asked_what_it_keeps(monkeypatch):
    """Nobody tells this call either, and nobody waits for tokens meanwhile."""
    monkeypatch.setattr(alive, "LOOK_S", 0.01)
    engine = FakeEngine(compressed=True)
    engine.kept_step = asyncio.Event().wait
    engine.step = lambda position: asyncio.Event().wait() if position == TOKENS - 1 else asyncio.sleep(0)
    async with http_client(await make_app(engine)) as client:
        asked = {"prompt": "a cat", "stream": True, "partial_lines": 1, "kept": True}
        streamed = asyncio.create_task(client.post(PATH, json=asked))
        await until(lambda: engine.asking)
        engine.errored = True
        assert (await asyncio.wait_for(streamed, 5)).text.startswith("event: error")
        assert not engine.running
        assert (engine.asking, engine.decoding) == (0, 0)
        engine.errored, engine.step = False, lambda position: asyncio.sleep(0)
        await still_serves(client)


async def test_who_comes_after_a_drained_engine_has_ended(client, engine, app, monkeypatch):
    """The server goes on for a moment: an engine that was told to end is no dead one."""
    monkeypatch.setattr(engine, "check_admission", drain.Drain._refuse)
    engine.errored = True
    for stream in (False, True):
        assert (await draw(client, 503, stream=stream))["error"]["message"] == drain.SHUTTING_DOWN
    assert not app.state.server.should_exit


async def test_a_drain_that_is_over_before_the_picture(client, engine, monkeypatch):
    """The engine was told to end: not an error of the server's, and worth another try elsewhere."""
    monkeypatch.setattr(alive, "LOOK_S", 0.01)
    engine.step = lambda position: asyncio.Event().wait()
    asked = asyncio.create_task(draw(client, 503))
    streamed = asyncio.create_task(client.post(PATH, json={"prompt": "a cat", "stream": True}))
    await until(lambda: len(engine.running) == 2)
    monkeypatch.setattr(engine, "check_admission", drain.Drain._refuse)
    engine.errored = True
    assert (await asyncio.wait_for(asked, 5))["error"]["message"] == drain.SHUTTING_DOWN
    assert drain.SHUTTING_DOWN in (await asyncio.wait_for(streamed, 5)).text


async def test_a_drain_that_is_over_while_an_unfinished_picture_is_decoded(client, engine, monkeypatch):
    monkeypatch.setattr(alive, "LOOK_S", 0.01)
    engine.step = lambda position: asyncio.Event().wait() if position == TOKENS - 1 else asyncio.sleep(0)
    engine.decode_step = asyncio.Event().wait
    streamed = {"prompt": "a cat", "stream": True, "partial_lines": 1}
    asked = asyncio.create_task(client.post(PATH, json=streamed))
    await until(lambda: engine.decoding)
    monkeypatch.setattr(engine, "check_admission", drain.Drain._refuse)
    engine.errored = True
    assert drain.SHUTTING_DOWN in (await asyncio.wait_for(asked, 5)).text
    assert not engine.running


async def test_one_picture_that_fails_stops_the_others(client, engine):
    def fail(seed, position):
        return MODEL.codes if seed == 2 else 0

    engine.step = lambda position: asyncio.sleep(0.01 if position else 0)
    engine.draw_code = fail
    drawing = engine.generate

    def generate(prompt, params, request_id, **kwargs):
        if params.seed == 2:
            params.max_tokens = 1
        return drawing(prompt, params, request_id, **kwargs)

    engine.generate = generate
    assert (await draw(client, 500, n=4, seed=0))["error"]["code"] == HTTPStatus.INTERNAL_SERVER_ERROR
    assert not engine.running
    assert {i for i, p in engine.params.items() if p.seed != 2} <= set(engine.aborted)
    assert engine.decoded_lines == []


async def test_without_an_engine(engine):
    async with http_client(await make_app(engine, engine_client=False)) as client:
        assert (await draw(client, 501))["error"]["type"] == "NotImplementedError"


async def test_openapi_shows_the_route(client):
    document = (await client.get("/openapi.json")).json()
    route = document["paths"][PATH]["post"]
    assert "guidance_scale" in route["requestBody"]["content"]["application/json"]["schema"]["properties"]
    prompt = route["requestBody"]["content"]["application/json"]["schema"]["properties"]["prompt"]
    assert (prompt["minLength"], prompt["maxLength"]) == (1, MAX_PROMPT_CHARACTERS)
    assert {"200", "400", "404", "500", "503"} <= set(route["responses"])
    defined = {f"#/components/schemas/{name}" for name in document["components"]["schemas"]}
    assert set(references(document)) <= defined


def references(node):
    if isinstance(node, dict):
        yield from ([node["$ref"]] if isinstance(node.get("$ref"), str) else [])
        node = list(node.values())
    for child in node if isinstance(node, list) else []:
        yield from references(child)
