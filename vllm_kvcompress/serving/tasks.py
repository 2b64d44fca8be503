"""Work that ends together: pictures of one request, and a request with its client."""

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Any, TypeVar

from starlette.types import Receive

T = TypeVar("T")


async def _stop(tasks: Iterable["asyncio.Task[Any]"]) -> None:
    """Cancel what still runs, and wait for its clean-up (aborting the engine's requests)."""
    tasks = list(tasks)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def all_or_none(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Results in order. The first failure stops all others, then is raised."""
    tasks = [asyncio.create_task(part) for part in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        await _stop(tasks)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of ``work``, or None when the client went away first: ``work`` is then stopped.

    The request's body must have been read. Unlike vLLM's ``with_cancellation`` it also stops the work
    when it is itself cancelled (the server shutting down), and returns after the work's clean-up.
    """
    task = asyncio.create_task(work)
    client = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait({task, client}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        await _stop((task, client))
