"""Codes to pixels, by the engine's worker; in this process where the engine takes no calls any more.

The engine draws no tokens while its worker decodes, so there is one call in flight, and it takes what
waits: pictures that end together cost the others one pause.
"""

import asyncio
from collections import deque
from typing import TYPE_CHECKING

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

_REFUSED = "Server shutting down"  # what vLLM says of calls to an engine that drains

logger = logger_for(__name__)

Drawn = tuple[list[int], int]  # the codes of whole lines, and which of the model's sizes the picture has
Waiting = tuple[Drawn, "asyncio.Future[Pixels]"]


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

    @property
    def busy(self) -> bool:
        """Whether a picture that comes now has to wait."""
        return self._work is not None

    async def decode(self, codes: list[int], size: int = 0) -> Pixels:
        """Pixels of whole lines of a picture of one of the model's sizes.

        If the caller is cancelled, its picture is not decoded, unless that has begun: a worker can't be
        interrupted.

        Raises
        ------
        Exception
            What the call raised, EngineDeadError among others.
        """
        pixels: asyncio.Future[Pixels] = asyncio.get_running_loop().create_future()
        self._waiting.append(((codes, size), pixels))
        if self._work is None:
            self._work = asyncio.create_task(self._work_off())
        return await pixels

    async def _work_off(self) -> None:
        batch: list[Waiting] = []
        try:
            while batch := self._next():
                try:
                    pictures = await self._decoded([drawn for drawn, _ in batch])
                except Exception as error:
                    for _, pixels in batch:
                        if not pixels.done():  # a caller that left hears of nothing
                            pixels.set_exception(error)
                else:
                    for (_, pixels), picture in zip(batch, pictures, strict=True):
                        if not pixels.done():
                            pixels.set_result(picture)
        finally:  # there is something left only if this task was cancelled
            for _, pixels in (*batch, *self._waiting):
                pixels.cancel()
            self._waiting.clear()
            self._work = None

    def _next(self) -> list[Waiting]:
        """The oldest pictures that somebody still waits for."""
        batch: list[Waiting] = []
        while self._waiting and len(batch) < MOST:
            drawn, pixels = self._waiting.popleft()
            if not pixels.done():
                batch.append((drawn, pixels))
        return batch

    async def _decoded(self, pictures: list[Drawn]) -> list[Pixels]:
        if not self._closed:
            try:
                return [Pixels(*picture) for picture in await unless_dead(self._engine, self._call(pictures))]
            except Exception as error:
                if self._spare is None:
                    raise
                self._closed = isinstance(error, EngineDeadError) or _REFUSED in str(error)
                logger.info("The engine did not decode (%s): this process does", " ".join(str(error).split()))
        assert self._spare is not None
        return [await asyncio.to_thread(self._spare.decode, *drawn) for drawn in pictures]

    async def _call(self, pictures: list[Drawn]) -> list[tuple[int, int, bytes]]:
        answers = await self._workers.call(DECODE_METHOD, (pictures,))
        (decoded,) = [answer for answer in answers if answer is not None]
        return decoded
