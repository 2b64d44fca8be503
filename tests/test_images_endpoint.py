"""The images route on a fake engine: answers, errors, streams, and clients that leave."""

import asyncio
import base64
import io
import json
import time
from http import HTTPStatus

import openai
import pytest
from images_fakes import (
    HEIGHT,
    MODEL,
    PATH,
    SIZE,
    WIDTH,
    AsgiCall,
    FakeEngine,
    expected_rgb,
    http_client,
    make_app,
    served,
    until,
)
from PIL import Image
from vllm.exceptions import QueueOverflowError, VLLMValidationError
from vllm.plugins.endpoint_plugins.interface import EndpointPlugin
from vllm.sampling_params import RequestOutputKind

from vllm_kvcompress.serving.images import ImagesEndpoint

TOKENS, LINES = MODEL.raster.tokens, MODEL.raster.lines


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


def openai_client(app, api_key="none"):
    import httpx2  # what the openai package calls its HTTP client

    transport = httpx2.ASGITransport(app)
    return openai.AsyncOpenAI(
        base_url="http://server/v1",
        api_key=api_key,
        max_retries=0,
        http_client=httpx2.AsyncClient(transport=transport),
    )


@pytest.fixture
async def sdk(app):
    async with openai_client(app) as sdk:
        yield sdk


def rgb(b64):
    picture = Image.open(io.BytesIO(base64.b64decode(b64)))
    assert picture.size == (WIDTH, HEIGHT)
    return picture.tobytes()


async def draw(client, status=200, **fields):
    answer = await client.post(PATH, json={"prompt": "a cat", **fields})
    assert answer.status_code == status, answer.text
    return answer.json()


async def still_serves(client):
    assert rgb((await draw(client, seed=1))["data"][0]["b64_json"]) == expected_rgb(1)


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


async def test_usage_has_room_for_the_cache(engine):
    async def summary(outputs):
        return {"pictures": len(outputs), "ids": [o.request_id for o in outputs]}

    async with http_client(await make_app(engine, usage_extra=summary)) as client:
        usage = (await draw(client, n=2))["usage"]
        assert usage["kv_cache"] == {"pictures": 2, "ids": list(engine.params)}
        assert "kv_cache" in (await events(client))[-1]["usage"]


# Streaming


async def events(client, **fields):
    answer = await client.post(PATH, json={"prompt": "a cat", "stream": True, **fields})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    frames = [frame.split("\n") for frame in answer.text.strip().split("\n\n") if not frame.startswith(":")]
    parsed = [json.loads(data.removeprefix("data: ")) for _, data in frames]
    assert [name for name, _ in frames] == [f"event: {event['type']}" for event in parsed]
    return parsed


@pytest.mark.parametrize(("partials", "lines"), [(0, []), (1, [3]), (2, [2, 4]), (3, [1, 3, 4])])
async def test_stream_through_the_openai_client(sdk, engine, partials, lines):
    stream = await sdk.images.generate(
        prompt="a cat", stream=True, partial_images=partials, extra_body={"seed": 3}
    )
    *unfinished, last = [event async for event in stream]
    assert [event.partial_image_index for event in unfinished] == list(range(partials))
    for event, drawn in zip(unfinished, lines, strict=True):
        assert isinstance(event, openai.types.ImageGenPartialImageEvent)
        assert rgb(event.b64_json) == expected_rgb(3, lines=drawn)
    assert isinstance(last, openai.types.ImageGenCompletedEvent)
    assert rgb(last.b64_json) == expected_rgb(3)
    for event in (*unfinished, last):
        assert (event.size, event.output_format) == (SIZE, "png")
        assert (event.background, event.quality) == ("opaque", "auto")
    assert (last.usage.input_tokens, last.usage.output_tokens) == (len("a cat") + 2, TOKENS)
    assert engine.decoded_lines == [*lines, LINES]
    (params,) = engine.params.values()
    assert params.output_kind is (RequestOutputKind.DELTA if partials else RequestOutputKind.FINAL_ONLY)


async def test_events_arrive_while_the_picture_is_drawn(engine):
    second_half = asyncio.Event()

    async def step(position):
        if position > TOKENS // 2:
            await second_half.wait()

    engine.step = step
    async with (
        served(await make_app(engine)) as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="-") as sdk,
    ):
        stream = await sdk.images.generate(prompt="a cat", stream=True, partial_images=1)
        first = await anext(stream)
        assert first.type == "image_generation.partial_image"
        assert engine.running
        second_half.set()
        assert (await anext(stream)).type == "image_generation.completed"


async def test_a_busy_decoder_skips_partial_pictures(client, engine):
    decode = asyncio.Event()
    engine.decode_step = decode.wait
    other = asyncio.create_task(draw(client))
    await until(lambda: engine.decoding)  # ... somebody's finished picture
    streamed = asyncio.create_task(events(client, partial_images=3))
    await until(lambda: len(engine.params) == 2 and not engine.running)
    decode.set()
    assert [event["type"] for event in await streamed] == ["image_generation.completed"]
    await other
    assert engine.decoded_lines == [LINES, LINES]


async def test_keep_alive_comments(engine):
    engine.step = lambda position: asyncio.sleep(0.002)
    async with http_client(await make_app(engine, keep_alive=0.01)) as client:
        answer = await client.post(PATH, json={"prompt": "a cat", "stream": True})
    assert answer.text.startswith(": keep-alive\n\n")
    assert "event: image_generation.completed\n" in answer.text


async def test_an_error_in_mid_stream_is_raised_by_the_openai_client(sdk, client, engine):
    def fail(seed, position):
        return MODEL.codes if position == TOKENS - 1 else 0

    engine.draw_code = fail
    stream = await sdk.images.generate(prompt="a cat", stream=True, partial_images=2)
    with pytest.raises(openai.APIError, match="not an image token") as error:
        [event async for event in stream]
    assert error.value.body["type"] == "InternalServerError"
    last = (await events(client, partial_images=1))[-1]
    assert (last["type"], last["error"]["code"]) == ("error", 500)


async def test_a_streamed_request_that_is_wrong_is_a_400(sdk):
    with pytest.raises(openai.BadRequestError) as error:
        await sdk.images.generate(prompt="a cat", stream=True, size="1x1")
    assert error.value.param == "size"


# Errors


@pytest.mark.parametrize(
    ("fields", "parameter"),
    [
        ({"prompt": ""}, "prompt"),
        ({"n": 0}, "n"),
        ({"n": 11}, "n"),
        ({"size": "1024x1024"}, "size"),
        ({"size": SIZE.upper()}, "size"),
        ({"response_format": "url"}, "response_format"),
        ({"temperature": -1}, "temperature"),
        ({"promt": "a dog"}, "promt"),
        ({"prompt": "x" * (100 - TOKENS - 1)}, "prompt"),
        ({"negative_prompt": "longer than the prompt"}, "negative_prompt"),
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


async def test_model_names(sdk):
    for name in ("janus", "alias"):
        assert (await sdk.images.generate(prompt="a cat", model=name)).data
    with pytest.raises(openai.NotFoundError) as error:
        await sdk.images.generate(prompt="a cat", model="dall-e-3")
    assert error.value.param == "model"
    assert "janus, alias" in error.value.message


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


async def test_a_dead_engine(client, engine, app):
    engine.errored = True
    error = (await draw(client, 500))["error"]
    assert error["type"] == "InternalServerError"
    assert app.state.server.should_exit


async def test_a_full_engine(client, engine):
    engine.admission_error = QueueOverflowError()
    assert (await draw(client, 503, stream=True))["error"]["code"] == 503
    engine.admission_error = None
    await still_serves(client)


async def test_the_engine_refuses_the_prompt(client, engine):
    async def refuse(position):
        raise VLLMValidationError("no", parameter="prompt")

    engine.step = refuse
    assert (await draw(client, 400))["error"]["param"] == "prompt"


async def test_a_picture_that_ends_early_is_an_error(client, engine):
    engine.finish_reason = "abort"
    whole = engine.generate

    async def half(prompt, params, request_id, **kwargs):
        async for output in whole(prompt, params, request_id, **kwargs):
            output.outputs[0].token_ids = output.outputs[0].token_ids[: TOKENS // 2]
            yield output

    engine.generate = half
    assert "15 of 30 tokens (finish reason abort)" in (await draw(client, 500))["error"]["message"]


async def test_a_decoder_that_fails_is_not_the_clients_fault(client, engine):
    async def fail():
        raise ValueError("bad codes in /root/secret/place.py")

    engine.decode_step = fail
    error = (await draw(client, 500))["error"]
    assert error["message"] == "the picture could not be decoded"
    engine.decode_step = lambda: asyncio.sleep(0)
    await still_serves(client)


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


# Clients that leave


def body(**fields):
    return json.dumps({"prompt": "a cat", **fields}).encode()


@pytest.mark.parametrize("fields", [{"n": 3}, {"stream": True}, {"stream": True, "partial_images": 1}])
@pytest.mark.parametrize("spec_version", ["2.3", "2.4"])
@pytest.mark.parametrize("keep_alive", [0, 60])
async def test_leaving_while_tokens_are_drawn(engine, fields, spec_version, keep_alive):
    app = await make_app(engine, keep_alive=keep_alive)
    stuck = asyncio.Event()
    engine.step = lambda position: stuck.wait() if position == TOKENS - 1 else asyncio.sleep(0)
    call = AsgiCall(app, body(**fields), spec_version)
    await until(lambda: len(engine.running) == fields.get("n", 1))
    await until(lambda: len(call.messages) == (2 if "partial_images" in fields else "stream" in fields))
    call.hang_up.set()
    await asyncio.wait_for(call.task, 5)
    assert not engine.running
    assert set(engine.aborted) == set(engine.params)
    assert engine.decoding == 0
    assert app.state.server_load_metrics == 0
    engine.step = lambda position: asyncio.sleep(0)
    async with http_client(app) as client:
        await still_serves(client)


@pytest.mark.parametrize("fields", [{"n": 3}, {"stream": True}])
async def test_leaving_while_a_picture_is_decoded(engine, fields):
    app = await make_app(engine)
    decoded = asyncio.Event()
    engine.decode_step = decoded.wait
    call = AsgiCall(app, body(**fields))
    await until(lambda: engine.decoding and not engine.running)
    call.hang_up.set()
    await asyncio.wait_for(call.task, 5)
    # The worker can't be interrupted, and nobody else may call it meanwhile.
    async with http_client(app) as client:
        other = asyncio.create_task(still_serves(client))
        await asyncio.sleep(0.01)
        assert engine.most_decoding == 1
        decoded.set()
        await other
    assert engine.most_decoding == 1
    assert len(engine.decoded_lines) == 2  # the one that had begun, and the other client's


async def test_a_server_that_shuts_down_stops_the_drawing(engine):
    stuck = asyncio.Event()
    engine.step = lambda position: stuck.wait()
    call = AsgiCall(await make_app(engine), body(n=2))
    await until(lambda: len(engine.running) == 2)
    call.task.cancel()
    await asyncio.wait([call.task], timeout=5)
    assert not engine.running


async def test_openapi_shows_the_route(client):
    document = (await client.get("/openapi.json")).json()
    route = document["paths"][PATH]["post"]
    assert "guidance_scale" in route["requestBody"]["content"]["application/json"]["schema"]["properties"]
    assert {"200", "400", "404", "500", "503"} <= set(route["responses"])
    defined = {f"#/components/schemas/{name}" for name in document["components"]["schemas"]}
    assert set(references(document)) <= defined


def references(node):
    if isinstance(node, dict):
        yield from ([node["$ref"]] if isinstance(node.get("$ref"), str) else [])
        node = list(node.values())
    for child in node if isinstance(node, list) else []:
        yield from references(child)
