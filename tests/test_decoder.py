"""Who is decoded when, and with whom, on an engine that is none."""

import asyncio
import time

import pytest
from images_fakes import HEIGHT, MODEL, WIDTH, FakeEngine, code, pixels
from vllm.v1.engine.exceptions import EngineDeadError

from vllm_kvcompress.serving import decoder
from vllm_kvcompress.serving.decoder import Decoder
from vllm_kvcompress.serving.encode import Pixels

PICTURES = [[code(seed, position) for position in range(MODEL.raster.tokens)] for seed in range(5)]
BAD = PICTURES[2]
LINE = PICTURES[0][: MODEL.raster.width]


class Spare:
    """What a draining server decodes with."""

    def decode(self, codes, size=0):
        if codes == BAD:
            raise ValueError("a picture that can't be decoded")
        return Pixels(WIDTH, HEIGHT, pixels(codes))


async def all_of(one):
    """What came of all pictures, asked for at once."""
    return await asyncio.gather(*(one.decode(codes) for codes in PICTURES), return_exceptions=True)


def check(found):
    assert [type(one) for one in found] == [ValueError if codes == BAD else Pixels for codes in PICTURES]
    assert [one.rgb for one in found if isinstance(one, Pixels)] == [
        pixels(codes) for codes in PICTURES if codes != BAD
    ]


@pytest.mark.parametrize("spare", [None, Spare()])
async def test_one_bad_picture_is_no_others_failure(spare):
    engine = FakeEngine()
    engine.is_bad = lambda codes: codes == BAD
    check(await all_of(Decoder(engine, spare)))
    assert engine.calls == [5, 1, 1, 1, 1, 1]


async def test_one_bad_picture_of_an_engine_that_drains():
    engine = FakeEngine()

    async def refuse():
        raise RuntimeError("Server shutting down")

    engine.decode_step = refuse
    one = Decoder(engine, Spare())
    for _ in range(2):  # the second time nobody asks the engine
        check(await all_of(one))
    assert engine.calls == [5]


async def test_a_dead_engine_is_not_asked_again_for_each():
    engine = FakeEngine()

    async def die():
        raise EngineDeadError

    engine.decode_step = die
    assert {type(one) for one in await all_of(Decoder(engine))} == {EngineDeadError}
    assert engine.calls == [5]


async def test_a_dead_engines_unfinished_pictures_are_not_decoded():
    """By nobody: finished ones are, where there is somebody."""
    engine = FakeEngine()

    async def die():
        raise EngineDeadError

    engine.decode_step, engine.errored = die, True
    one = Decoder(engine, Spare())
    with pytest.raises(EngineDeadError):
        await one.decode(LINE, partial=True)
    assert (await one.decode(PICTURES[0])).rgb == pixels(PICTURES[0])


async def test_unfinished_pictures_have_half_of_the_time(monkeypatch):
    """Of all streams together, however many come."""
    monkeypatch.setattr(decoder, "CREDIT_S", 0)
    engine, took = FakeEngine(), []

    async def decode():
        began = time.monotonic()
        await asyncio.sleep(0.005)
        took.append(time.monotonic() - began)

    async def stream():
        while len(took) < 12:
            if one.takes_partial:
                await one.decode(LINE, partial=True)
            await asyncio.sleep(0.0005)

    engine.decode_step = decode
    one, began = Decoder(engine), time.monotonic()
    await asyncio.gather(*(stream() for _ in range(8)))
    assert sum(took) <= (time.monotonic() - began + max(took)) / 2


async def test_a_finished_picture_rests_for_nobody(monkeypatch):
    monkeypatch.setattr(decoder, "CREDIT_S", 0)
    engine = FakeEngine()
    one = Decoder(engine)
    assert one.takes_partial
    engine.decode_step = lambda: asyncio.sleep(0.5)
    unfinished = asyncio.create_task(one.decode(LINE, partial=True))
    await asyncio.sleep(0.01)
    assert not one.takes_partial
    unfinished.cancel()  # its time counts: the worker can't be interrupted
    engine.decode_step = lambda: asyncio.sleep(0)
    await one.decode(BAD)
    assert not one.takes_partial
    await asyncio.wait_for(one.decode(BAD), 0.3)


async def test_a_stream_alone_has_its_pictures():
    """As many as take a quarter of a second."""
    one = Decoder(FakeEngine())
    for _ in range(3):
        assert one.takes_partial
        await one.decode(LINE, partial=True)
