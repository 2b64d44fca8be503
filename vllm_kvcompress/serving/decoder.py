"""Codes to pixels, by the engine's worker.

The engine draws no tokens while its worker decodes, so there is one call in flight, and it takes what
waits: pictures that end together cost the others one pause.
"""

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Any

from vllm_kvcompress.serving.encode import Pixels
from vllm_kvcompress.serving.one_engine import OneEngine

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient

DECODE_METHOD = "kvcompress_decode_images"
MOST = 8  # pictures a call, which bounds the pause
LOOK_S = 1.0  # between two looks whether the engine still lives; nobody fails a dead engine's calls

Waiting = tuple[list[int], "asyncio.Future[Pixels]"]


class Decoder:
    """Decodes for all requests of a server.

    Parameters
    ----------
    engine : EngineClient
        The server's.
    """

    def __init__(self, engine: "EngineClient") -> None:
        self._engine = engine
        self._workers = OneEngine(engine)
        self._waiting: deque[Waiting] = deque()
        self._work: asyncio.Task[None] | None = None

    @property
    def busy(self) -> bool:
        """Whether a picture that comes now has to wait."""
        return self._work is not None

    async def decode(self, codes: list[int]) -> Pixels:
        """Pixels of whole lines.

        If the caller is cancelled, its picture is not decoded, unless that has begun: a worker can't be
        interrupted.

        Raises
        ------
        Exception
            What the call raised, EngineDeadError among others.
        """
        pixels: asyncio.Future[Pixels] = asyncio.get_running_loop().create_future()
        self._waiting.append((codes, pixels))
        if self._work is None:
            self._work = asyncio.create_task(self._work_off())
        return await pixels

    async def _work_off(self) -> None:
        batch: list[Waiting] = []
        try:
            while batch := self._next():
                try:
                    pictures = await self._call([codes for codes, _ in batch])
                except Exception as error:
                    for _, pixels in batch:
                        if not pixels.done():  # a caller that left hears of nothing
                            pixels.set_exception(error)
                else:
                    for (_, pixels), picture in zip(batch, pictures, strict=True):
                        if not pixels.done():
                            pixels.set_result(Pixels(*picture))
        finally:  # there is something left only if this task was cancelled
            for _, pixels in (*batch, *self._waiting):
                pixels.cancel()
            self._waiting.clear()
            self._work = None

    def _next(self) -> list[Waiting]:
        """The oldest pictures that somebody still waits for."""
        batch: list[Waiting] = []
        while self._waiting and len(batch) < MOST:
            codes, pixels = self._waiting.popleft()
            if not pixels.done():
                batch.append((codes, pixels))
        return batch

    async def _call(self, pictures: list[list[int]]) -> list[tuple[int, int, bytes]]:
        call: asyncio.Future[Any] = asyncio.ensure_future(self._workers.call(DECODE_METHOD, (pictures,)))
        # Looked at even if nobody waits any more, or asyncio would complain of an exception never retrieved.
        call.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        while not (await asyncio.wait({call}, timeout=LOOK_S))[0]:
            if self._engine.errored:
                call.cancel()
                raise self._engine.dead_error
        (decoded,) = [answer for answer in call.result() if answer is not None]
        return decoded
