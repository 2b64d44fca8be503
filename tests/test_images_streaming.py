"""The images route on a fake engine: server-sent events, and clients that leave."""

import asyncio
import gc
import json

import openai
import pytest
from images_fakes import (
    MODEL,
    PATH,
    SIZE,
    AsgiCall,
    FakeEngine,
    draw,
    expected_rgb,
    http_client,
    make_app,
    openai_client,
    rgb,
    served,
    still_serves,
    until,
)
from vllm.sampling_params import RequestOutputKind

from vllm_kvcompress.serving import decoder

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


@pytest.fixture
async def sdk(app):
    async with openai_client(app) as sdk:
        yield sdk


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


async def test_partial_pictures_are_rested_for(client, engine, monkeypatch):
    """Lines that are drawn sooner than one was decoded are not shown; the whole picture does not wait."""
    monkeypatch.setattr(decoder, "CREDIT_S", 0)
    engine.decode_step = lambda: asyncio.sleep(0.2)
    assert [event["type"] for event in await events(client, partial_lines=1)] == [
        "image_generation.partial_image", "image_generation.completed"
    ]  # fmt: skip
    assert engine.decoded_lines == [1, LINES]


async def test_many_streams_ask_one_at_a_time_what_is_kept():
    """All ranks stop for an answer; the other streams do without, and are not held up."""
    engine, answered = FakeEngine(compressed=True), asyncio.Event()
    engine.kept_step = answered.wait
    async with http_client(await make_app(engine)) as client:
        asked = {"partial_lines": 1, "kept": True}
        streams = [asyncio.create_task(events(client, seed=seed, **asked)) for seed in range(8)]
        await until(lambda: sum(stream.done() for stream in streams) == 7)
        assert (engine.asking, engine.most_asking) == (1, 1)
        answered.set()
        *partial, last = await next(stream for stream in streams if not stream.done())
        everything = [event for stream in streams for event in await stream]
    assert last["type"] == "image_generation.completed"
    [kept] = partial[0]["kept"]["types"]
    drawn = MODEL.raster.width
    assert kept == {"name": "full", "heads": 2, "percent": [100] * drawn + [0] * (TOKENS - drawn)}
    assert sum(event["type"].endswith("completed") for event in everything) == 8
    assert engine.most_asking == 1


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
        await sdk.images.generate(prompt="a cat", stream=True, size="large")
    assert error.value.param == "size"


async def test_the_completed_event_has_the_notes(client):
    asked = {"size": "1x1", "response_format": "url", "model": "dall-e-2", "partial_images": 1}
    *unfinished, last = await events(client, **asked)
    assert last["notes"] == [
        f"size 1x1 is not to be had: pictures are {SIZE}",
        "response_format url is not to be had in a stream: events have b64_json",
        "model 'dall-e-2' is not served here: janus drew this",
    ]
    assert rgb(last["b64_json"])
    assert not any("notes" in event for event in unfinished)
    assert "notes" not in (await events(client))[-1]


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
    # Those of the call that had begun, and the other client's: what only waited is not decoded for nobody.
    assert len(engine.calls) == 2
    assert len(engine.decoded_lines) == engine.calls[0] + 1


async def test_a_reader_that_does_not_read(engine):
    """Its socket is full: the stream waits, nobody else does, and its end gives everything back."""

    class Stalled(AsgiCall):
        reads = asyncio.Event()

        async def _send(self, message):
            await super()._send(message)
            await self.reads.wait()

    app = await make_app(engine)
    stalled = [Stalled(app, body(stream=True, partial_images=3, seed=n)) for n in range(2)]
    await until(lambda: all(call.messages for call in stalled))
    async with http_client(app) as client:
        for _ in range(3):
            await asyncio.wait_for(still_serves(client), 5)
    assert not any(call.task.done() for call in stalled)
    assert all(len(call.messages) == 1 for call in stalled)
    stalled[0].hang_up.set()
    stalled[0].reads.set()
    await asyncio.wait_for(asyncio.gather(*(call.task for call in stalled)), 5)
    assert not engine.running
    assert b"image_generation.completed" in b"".join(one.get("body", b"") for one in stalled[1].messages)


async def test_a_call_that_fails_after_its_client_left_is_no_news(engine, caplog):
    """asyncio complains of an exception that nobody looks at, once the future is collected."""
    app, ended = await make_app(engine), asyncio.Event()

    async def fail():
        await ended.wait()
        raise ValueError("the engine is draining")

    engine.decode_step = fail
    call = AsgiCall(app, body())
    await until(lambda: engine.decoding)
    call.hang_up.set()
    await asyncio.wait_for(call.task, 5)
    ended.set()
    await until(lambda: not engine.decoding)
    await asyncio.sleep(0.01)
    gc.collect()
    assert "never retrieved" not in caplog.text
    engine.decode_step = lambda: asyncio.sleep(0)
    async with http_client(app) as client:
        await still_serves(client)


async def test_a_server_that_shuts_down_stops_the_drawing(engine):
    stuck = asyncio.Event()
    engine.step = lambda position: stuck.wait()
    call = AsgiCall(await make_app(engine), body(n=2))
    await until(lambda: len(engine.running) == 2)
    call.task.cancel()
    await asyncio.wait([call.task], timeout=5)
    assert not engine.running
