"""Codes to pixels, by the engine's worker; in this process where the engine takes no calls any more.

The engine draws no tokens while its worker decodes, so there is one call in flight, and it takes what
waits: pictures that end together cost the others one pause. Unfinished ones have half of the time at most.
"""

import asyncio
import time
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

from vllm.v1.engine.exceptions import EngineDeadError

from vllm_kvcompress.log import logger_for
from vllm_kvcompress.serving.alive import unless_dead
from vllm_kvcompress.serving.encode import Pixels
from vllm_kvcompress.serving.one_engine import OneEngine

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient

    from vllm_kvcompress.serving.spare import SpareDecoder

DECODE_METHOD = "kvcompress_decode_images"
MOST = 8  # pictures a call, which bounds the pause
CREDIT_S = 0.25  # of decoding unfinished pictures, before there is a rest: a stream alone has all of its own

_REFUSED = "Server shutting down"  # what vLLM says of calls to an engine that drains

logger = logger_for(__name__)

Drawn = tuple[list[int], int]  # the codes of whole lines, and which of the model's sizes the picture has


class Waiting(NamedTuple):
    """A picture that somebody waits for; a partial one is unfinished."""

    drawn: Drawn
    pixels: "asyncio.Future[Pixels]"
    partial: bool


class Decoder:
    """Decodes for all requests of a server.

    Parameters
    ----------
    engine : EngineClient
        The server's.
    spare : SpareDecoder, optional
        What decodes when the engine does not.
    """

    def __init__(self, engine: "EngineClient", spare: "SpareDecoder | None" = None) -> None:
        self._engine = engine
        self._workers = OneEngine(engine)
        self._spare = spare
        self._closed = False  # the engine answers no calls any more
        self._waiting: deque[Waiting] = deque()
        self._work: asyncio.Task[None] | None = None
        self._rested = 0.0  # time.monotonic() when all partial pictures so far have been rested for

    @property
    def takes_partial(self) -> bool:
        """Whether an unfinished picture may come now: nothing is decoded, and they have not had their half.

        What one takes is owed as a rest; a debt of `CREDIT_S` is none yet.
        """
        return self._work is None and self._rested - time.monotonic() <= CREDIT_S

    async def decode(self, codes: list[int], size: int = 0, partial: bool = False) -> Pixels:
        """Pixels of whole lines of a picture of one of the model's sizes.

        If the caller is cancelled, its picture is not decoded, unless that has begun: a worker can't be
        interrupted. Partial pictures are to be sent where `takes_partial` says so.

        Raises
        ------
        Exception
            What the call raised, EngineDeadError among others.
        """
        pixels: asyncio.Future[Pixels] = asyncio.get_running_loop().create_future()
        self._waiting.append(Waiting((codes, size), pixels, partial))
        if self._work is None:
            self._work = asyncio.create_task(self._work_off())
        return await pixels

    async def _work_off(self) -> None:
        batch: list[Waiting] = []
        try:
            while batch := self._next():
                began = time.monotonic()
                await self._settle(batch)
                if any(one.partial for one in batch):
                    took = time.monotonic() - began
                    self._rested = max(self._rested, began) + 2 * took
        finally:  # there is something left only if this task was cancelled
            for one in (*batch, *self._waiting):
                one.pixels.cancel()
            self._waiting.clear()
            self._work = None

    def _next(self) -> list[Waiting]:
        """The oldest pictures that somebody still waits for; one at a time where this process decodes."""
        batch: list[Waiting] = []
        while self._waiting and len(batch) < (1 if self._closed else MOST):
            if not (one := self._waiting.popleft()).pixels.done():
                batch.append(one)
        return batch

    async def _settle(self, batch: list[Waiting]) -> None:
        """Give each its pixels, or the error; one that can't be decoded is not the others' failure."""
        try:
            pictures = await self._decoded(batch)
        except Exception as error:
            if len(batch) > 1 and not _has_ended(error):
                logger.warning("%d pictures could not be decoded at once: one by one", len(batch))
                for one in batch:
                    if not one.pixels.done():
                        await self._settle([one])
                return
            for one in batch:
                if not one.pixels.done():  # a caller that left hears of nothing
                    one.pixels.set_exception(error)
        else:
            for one, picture in zip(batch, pictures, strict=True):
                if not one.pixels.done():
                    one.pixels.set_result(picture)

    async def _decoded(self, batch: list[Waiting]) -> list[Pixels]:
        pictures = [one.drawn for one in batch]
        if not self._closed:
            try:
                return [Pixels(*picture) for picture in await unless_dead(self._engine, self._call(pictures))]
            except Exception as error:
                if self._spare is None or (len(batch) > 1 and not _has_ended(error)):
                    raise
                self._closed = _has_ended(error)
                if self._engine.errored and all(one.partial for one in batch):
                    raise  # nothing more is drawn of them, and the server has no time to lose
                logger.info("The engine did not decode (%s): this process does", " ".join(str(error).split()))
        assert self._spare is not None
        return [await asyncio.to_thread(self._spare.decode, *drawn) for drawn in pictures]

    async def _call(self, pictures: list[Drawn]) -> list[tuple[int, int, bytes]]:
        answers = await self._workers.call(DECODE_METHOD, (pictures,))
        (decoded,) = [answer for answer in answers if answer is not None]
        return decoded


def _has_ended(error: Exception) -> bool:
    """Whether the engine answers no calls any more."""
    return isinstance(error, EngineDeadError) or _REFUSED in str(error)
