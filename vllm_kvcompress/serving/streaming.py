"""A picture as server-sent events, in the shapes that OpenAI's clients read."""

import contextlib
import json
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send
from vllm.entrypoints.serve import create_error_response
from vllm.exceptions import GenerationError, VLLMError

from vllm_kvcompress.log import logger_for
from vllm_kvcompress.serving.painter import Job, Painter, Picture
from vllm_kvcompress.serving.protocol import CompletedEvent, ImagesUsage, PartialImageEvent
from vllm_kvcompress.serving.tasks import until_disconnect

logger = logger_for(__name__)


def _event(name: str, data: dict[str, Any]) -> str:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"


def foreseen(error: Exception) -> VLLMError:
    """What a client is told of an error: of one that nobody foresaw, that the log has it, with its paths."""
    if isinstance(error, VLLMError) and str(error):  # the engine wraps others, and says nothing
        return error
    logger.error("A picture failed", exc_info=error)
    return GenerationError("the picture failed: the server's log says why")


async def picture_events(
    painter: Painter, job: Job, usage: Callable[[Job, list[Picture]], Awaitable[ImagesUsage]]
) -> AsyncGenerator[str, None]:
    """The events of one picture.

    The status line has been sent by now, so a failure is an ``error`` event, after which the stream
    ends: OpenAI's clients raise ``APIError`` with its message.
    """
    partials = 0
    try:
        async with contextlib.aclosing(painter.draw(job)) as pictures:
            async for picture in pictures:
                common: dict[str, Any] = {
                    "b64_json": picture.b64_json,
                    "created_at": int(time.time()),
                    "output_format": job.request.file_format,
                    "size": job.size_name,
                }
                event: PartialImageEvent | CompletedEvent
                if picture.output is None:
                    event = PartialImageEvent(partial_image_index=partials, kept=picture.kept, **common)
                    partials += 1
                else:
                    event = CompletedEvent(
                        usage=await usage(job, [picture]), notes=list(job.notes) or None, **common
                    )
                yield _event(event.type, event.model_dump(exclude_none=True))
    except Exception as error:
        yield _event("error", {"type": "error", **create_error_response(foreseen(error)).model_dump()})


class EventStream(StreamingResponse):
    """A streaming response that stops its generator as soon as the client has gone.

    Starlette alone may learn that only at the next event, minutes later, and leaves a generator that
    is waiting to be read to the garbage collector.
    """

    def __init__(self, events: AsyncGenerator[str, None]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await until_disconnect(receive, self.stream_response(send))
        finally:
            await self._events.aclose()
            if self.background is not None:
                await self.background()
