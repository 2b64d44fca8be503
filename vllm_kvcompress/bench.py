"""``vllm bench serve --backend openai-images``: pictures per second and time to picture.

vLLM's benchmark client has no images backend. Its backends are a plain dict that its command line
reads when it builds ``--backend``'s choices, after the general plugins have been loaded: the plugin
adds one entry. Tables then read: *request throughput* is pictures per second (times ``n``), *output
token throughput* image tokens per second, *time to first token* and *end-to-end latency* the time to
picture. With ``--extra-body '{"stream": true, "partial_images": 3}'`` the time to first token is that
of the first partial picture and inter-token latencies are between pictures. The peak output token
throughput is not meaningful: it counts arrivals, which are pictures.
"""

import json
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from operator import setitem
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import aiohttp
    from tqdm.asyncio import tqdm
    from vllm.benchmarks.lib.endpoint_request_func import RequestFuncInput, RequestFuncOutput

BACKEND = "openai-images"


def changes() -> list[Callable[[], object]]:
    """What adds the backend to vLLM's benchmark client, once.

    Raises ImportError or AttributeError if vLLM has moved its tables.
    """
    from vllm.benchmarks.lib import endpoint_request_func as client

    added: list[Callable[[], object]] = [
        partial(setitem, client.ASYNC_REQUEST_FUNCS, BACKEND, async_request_openai_images)
    ]
    if BACKEND not in client.OPENAI_COMPATIBLE_BACKENDS:  # these take --temperature, --top-k, --top-p
        added.append(partial(client.OPENAI_COMPATIBLE_BACKENDS.append, BACKEND))
    return added


def changes_if_benchmarking() -> list[Callable[[], object]]:
    """``changes`` in a ``vllm bench`` process; elsewhere none, and the benchmarks are not even imported.

    The command is recognised as vLLM's own command line does it: the first positional argument.
    """
    first = next((argument for argument in sys.argv[1:] if not argument.startswith("-")), None)
    return changes() if first == "bench" else []


async def async_request_openai_images(
    request_func_input: "RequestFuncInput",
    session: "aiohttp.ClientSession",
    pbar: "tqdm | None" = None,
) -> "RequestFuncOutput":
    """One request for a picture, timed; ``--extra-body`` is added to its body.

    The requested output length and ``ignore_eos`` are left out: the model's grid says how long a
    picture is. A failed request's ``error`` holds the server's message.

    Raises ValueError for a URL that is not of the images endpoint.
    """
    from vllm.benchmarks.lib import endpoint_request_func as client

    client._validate_api_url(request_func_input.api_url, "OpenAI Images API", "images/generations")
    output = client.RequestFuncOutput(prompt_len=request_func_input.prompt_len)
    payload = {
        "model": request_func_input.model_name or request_func_input.model,
        "prompt": request_func_input.prompt,
        "response_format": "b64_json",
        **(request_func_input.extra_body or {}),
    }
    headers = client._get_headers("application/json")
    client._update_headers_common(headers, request_func_input)

    start = output.start_time = time.perf_counter()
    try:
        async with session.post(request_func_input.api_url, json=payload, headers=headers) as response:
            if response.status != 200:
                raise _Failed(_message(await response.text()) or response.reason or str(response.status))
            if response.content_type == "text/event-stream":
                usage = await _read_events(response, output)
            else:
                answer = json.loads(await response.read())
                output.latency = output.ttft = time.perf_counter() - start
                usage = answer.get("usage")
                if not answer.get("data"):
                    raise _Failed("the answer holds no picture")
            if usage:
                output.output_tokens = usage["output_tokens"]
                output.prompt_len = usage["input_tokens"]
            output.success = True
    except _Failed as failure:
        output.error = str(failure)
    except Exception:
        output.error = traceback.format_exc()
    if pbar:
        pbar.update(1)
    return output


class _Failed(Exception):
    """The server answered, but not with a picture."""


async def _read_events(
    response: "aiohttp.ClientResponse", output: "RequestFuncOutput"
) -> dict[str, Any] | None:
    """Time a stream's pictures into ``output``; the finished picture's usage."""
    from vllm.benchmarks.lib.endpoint_request_func import StreamedResponseHandler

    messages = StreamedResponseHandler()
    last = output.start_time
    async for chunk in response.content.iter_any():
        for message in messages.add_chunk(chunk):
            data = next((line[5:] for line in message.splitlines() if line.startswith("data:")), None)
            if data is None or data.strip() == "[DONE]":
                continue  # a keep-alive comment, or the end
            event = json.loads(data)
            if error := event.get("error"):
                raise _Failed(error.get("message", "the stream ended with an error"))
            now = time.perf_counter()
            if output.ttft:
                output.itl.append(now - last)
            else:
                output.ttft = now - output.start_time
            last, output.latency = now, now - output.start_time
            if str(event.get("type")).endswith(".completed"):
                return event.get("usage")
    raise _Failed("the stream ended without a picture")


def _message(body: str) -> str:
    """The message of an error answer, or the answer itself when it has another shape."""
    try:
        return json.loads(body)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return body[:500]
