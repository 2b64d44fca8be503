"""``POST /v1/images/generations``: an endpoint plugin of vLLM's API server.

The route is under ``/v1``, so ``--api-key`` guards it as it guards the others; errors, request ids and
server load are vLLM's own. OpenAI's two routes beside it that take a picture are there to say no.
"""

import asyncio
import time
from argparse import Namespace
from collections.abc import Awaitable, Callable, Sequence
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from starlette.datastructures import State
from starlette.requests import ClientDisconnect
from vllm import envs
from vllm.entrypoints.generate.base.protocol import RequestResponseMetadata
from vllm.entrypoints.serve import create_error_response
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.utils.api_utils import load_aware_call
from vllm.entrypoints.serve.utils.sse_keep_alive import with_sse_keep_alive
from vllm.tracing import contains_trace_headers, extract_trace_headers
from vllm.utils import random_uuid

from vllm_kvcompress.config import Limits, is_compressed, parse_config
from vllm_kvcompress.serving import playground
from vllm_kvcompress.serving.alive import EngineWatch
from vllm_kvcompress.serving.drain import Drain
from vllm_kvcompress.serving.painter import Job, Lengthened, NegativeIds, Painter, Picture, PromptIds
from vllm_kvcompress.serving.protocol import (
    CompletedEvent,
    EncodedPicture,
    ImageRequest,
    ImagesResponse,
    ImagesUsage,
    PartialImageEvent,
    parse_request,
    shown,
)
from vllm_kvcompress.serving.spare import SpareDecoder
from vllm_kvcompress.serving.streaming import EventStream, foreseen, picture_events
from vllm_kvcompress.serving.tasks import all_or_none, until_disconnect
from vllm_kvcompress.serving.wishes import granted

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient
    from vllm.outputs import RequestOutput

    from vllm_kvcompress.models.config import ImageModel

PATH = "/v1/images/generations"
TAKE_PICTURES = ("/v1/images/edits", "/v1/images/variations")
CLIENT_CLOSED_REQUEST = 499  # nginx's; nobody receives it, but logs and metrics show it

# The engine's last output of each picture -> what ``usage`` says of them beside the counts of tokens
UsageExtra = Callable[[Sequence["RequestOutput"]], Awaitable[dict[str, Any] | None]]


class ImagesEndpoint:
    """The route and its state, one instance per server (vLLM's ``EndpointPlugin``).

    Parameters
    ----------
    image_model, prompt_ids, negative_ids, lengthened
        What to serve and how to tokenize for it; by default, what the engine serves.
    usage_extra
        Called with the engine at the server's start. What it returns is called with each finished request's
        outputs, and what that returns is added to ``usage``.
    """

    name = "kvcompress"
    required_tasks = ("generate",)

    def __init__(
        self,
        *,
        image_model: "ImageModel | None" = None,
        prompt_ids: PromptIds | None = None,
        negative_ids: NegativeIds | None = None,
        lengthened: Lengthened | None = None,
        usage_extra: "Callable[[EngineClient], UsageExtra] | None" = None,
    ) -> None:
        self._image_model = image_model
        self._prompt_ids = prompt_ids
        self._negative_ids = negative_ids
        self._lengthened = lengthened
        self._make_usage_extra = usage_extra
        self._usage_extra: UsageExtra | None = None
        self._painter: Painter | None = None
        self._limits = Limits()
        self._strict = self._playground = False

    def attach_router(self, app: FastAPI) -> None:
        """Add the route. The body is described by hand: see ``parse_request`` for why it is parsed here."""
        error = {"model": ErrorResponse}
        app.add_api_route(
            PATH,
            load_aware_call(self.create_images),
            methods=["POST"],
            summary="Create images",
            response_model=None,
            openapi_extra={
                "requestBody": {
                    "required": True,
                    "content": {"application/json": {"schema": ImageRequest.model_json_schema()}},
                }
            },
            responses={
                HTTPStatus.OK.value: {
                    "model": ImagesResponse,
                    "content": {"text/event-stream": {"schema": _events_schema()}},
                },
                HTTPStatus.BAD_REQUEST.value: error,
                HTTPStatus.NOT_FOUND.value: error,
                HTTPStatus.REQUEST_TIMEOUT.value: error,
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE.value: error,
                HTTPStatus.INTERNAL_SERVER_ERROR.value: error,
                HTTPStatus.SERVICE_UNAVAILABLE.value: error,
            },
        )
        app.add_api_route(playground.PATH, self.show_page, methods=["GET"], include_in_schema=False)
        for path in TAKE_PICTURES:
            app.add_api_route(path, no_pictures_in, methods=["POST"], include_in_schema=False)

    async def init_state(self, engine_client: "EngineClient | None", state: State, args: Namespace) -> None:
        """Bind the route to the engine. Raises ValueError without a tokenizer (--skip-tokenizer-init)."""
        if engine_client is None:  # vLLM's render server, which draws nothing
            return
        if self._image_model is None:
            from vllm_kvcompress.models.registry import image_model

            self._image_model = image_model(engine_client.model_config)
        if self._prompt_ids is None or self._negative_ids is None or self._lengthened is None:
            from vllm_kvcompress.models.registry import family_of

            family = family_of(engine_client.model_config.hf_config)
            self._prompt_ids = self._prompt_ids or family.prompt_ids
            self._negative_ids = self._negative_ids or family.negative_ids
            self._lengthened = self._lengthened or family.lengthened
        if self._make_usage_extra is not None:
            self._usage_extra = self._make_usage_extra(engine_client)
        config = parse_config(engine_client.vllm_config.additional_config)
        self._limits, self._strict, self._playground = config.limits, config.strict, config.playground
        self._cache = "full cache"
        if is_compressed(engine_client.vllm_config):
            self._cache = f"compressed cache, preset {config.preset}, budget {config.budget}"
        self._models = state.openai_serving_models
        self._keep_alive = float(getattr(args, "sse_keep_alive_interval", 0))
        spare = await SpareDecoder.of(engine_client)
        self._painter = Painter(
            engine_client, self._image_model, self._prompt_ids, self._negative_ids, self._lengthened, spare
        )
        self._watch = EngineWatch(engine_client, state)
        Drain(engine_client, state, self._watch.crashed)

    async def show_page(self, compare: str = "") -> Response:
        """The page to draw with, where the operator wants one; else as if there were none."""
        if self._painter is None or not self._playground:
            return JSONResponse({"detail": "Not Found"}, status_code=HTTPStatus.NOT_FOUND)
        model, painter = self._models.base_model_paths[0].name, self._painter
        return playground.page({"model": model, **self._facts(painter)}, compare)

    def _facts(self, painter: Painter) -> dict[str, Any]:
        return {
            "sizes": list(painter.model.names),
            "guidance_scale": painter.model.guidance_scale,
            "cache": self._cache,
        }

    async def create_images(self, raw_request: Request) -> Response:
        """Draw pictures from a prompt.

        OpenAI's images API with ``seed``, ``guidance_scale``, ``temperature``, ``top_k``, ``top_p`` and
        ``negative_prompt`` added. What the server does not have (another size, a quality, a style) is noted
        in the answer, or refused where the server is ``strict``; what is wrong is always refused.
        """
        if self._painter is None:
            raise NotImplementedError("this server has no engine to draw pictures with")
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                body = await _body(raw_request, self._limits.body_bytes)
        except ClientDisconnect:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        except TimeoutError:
            message = f"the body took more than {self._limits.body_seconds:g} s: send it at once"
            return _error(HTTPStatus.REQUEST_TIMEOUT, "RequestTimeoutError", "body", message)
        if body is None:
            message = f"the body has more than {self._limits.body_bytes} bytes: shorten it"
            return _error(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "RequestTooLargeError", "body", message)
        request = parse_request(raw_request.headers.get("content-type", ""), body)
        notes = granted(request, self._painter.model.names, self._strict)
        if request.model and not self._serves(request.model):
            served = ", ".join(path.name for path in self._models.base_model_paths)
            if self._strict:
                message = f"The model {shown(request.model)} does not exist. Valid aliases: {served}."
                return _error(HTTPStatus.NOT_FOUND, "NotFoundError", "model", message)
            drew = self._models.base_model_paths[0].name
            notes.append(f"model {shown(request.model)} is not served here: {drew} drew this")
        if request.kept and not self._painter.compressed:
            notes.append("kept: this server has a full cache, which keeps every token")
        try:
            response = await until_disconnect(
                raw_request.receive, self._respond(self._painter, request, notes, raw_request)
            )
        except Exception as error:
            if (told := foreseen(error)) is error:
                raise
            raise told from error
        return Response(status_code=CLIENT_CLOSED_REQUEST) if response is None else response

    async def _respond(
        self, painter: Painter, request: ImageRequest, notes: Sequence[str], raw_request: Request
    ) -> Response:
        # It is in the names of all pictures, and in the log.
        request_id = raw_request.headers.get("X-Request-Id", "")[: self._limits.request_id] or random_uuid()
        # vLLM's exception handlers log it.
        raw_request.state.request_metadata = RequestResponseMetadata(request_id=request_id)
        trace_headers = None
        if contains_trace_headers(raw_request.headers) and await painter.engine.is_tracing_enabled():
            trace_headers = extract_trace_headers(raw_request.headers)
        job = await painter.prepare(request, request_id, trace_headers, notes)
        if request.stream:
            events = picture_events(painter, job, self._usage)
            return EventStream(with_sse_keep_alive(events, self._keep_alive))
        pictures = await all_or_none(_whole(painter, job, index) for index in range(request.n))
        answer = ImagesResponse(
            created=int(time.time()),
            data=[EncodedPicture.of(picture.b64_json, request) for picture in pictures],
            output_format=request.file_format,
            size=job.size_name,
            usage=await self._usage(job, pictures),
            notes=list(notes) or None,
        )
        return JSONResponse(answer.model_dump(exclude_none=True))

    async def _usage(self, job: Job, pictures: Sequence[Picture]) -> ImagesUsage:
        extra = None
        if self._usage_extra is not None:
            extra = await self._usage_extra([p.output for p in pictures if p.output is not None])
        return ImagesUsage.of(len(job.prompt_ids), len(pictures) * job.raster.tokens, extra)

    def _serves(self, name: str) -> bool:
        """Whether vLLM's other routes know this name; without adapters: the model has none."""
        return envs.VLLM_SKIP_MODEL_NAME_VALIDATION or self._models.is_base_model(name)


async def no_pictures_in() -> Response:
    """The answer to whoever sends a picture. A 400: clients try a 501 again."""
    return _error(
        HTTPStatus.BAD_REQUEST,
        "BadRequestError",
        "image",
        f"this model draws from text alone and takes no picture to start from: ask {PATH}",
    )


def _error(status: HTTPStatus, kind: str, parameter: str, message: str) -> JSONResponse:
    """An answer in vLLM's shape, of a status that no exception of vLLM's stands for."""
    error = create_error_response(message, err_type=kind, status_code=status, param=parameter)
    return JSONResponse(error.model_dump(), status_code=status)


async def _body(raw_request: Request, limit: int) -> bytes | None:
    """The request's body, or None if it has more than ``limit`` bytes: no more than that is read."""
    declared = raw_request.headers.get("content-length", "")
    if declared.isdecimal() and (len(declared) > 18 or int(declared) > limit):
        return None
    body = bytearray()
    async for chunk in raw_request.stream():
        body += chunk
        if len(body) > limit:
            return None
    return bytes(body)


async def _whole(painter: Painter, job: Job, index: int) -> Picture:
    (picture,) = [picture async for picture in painter.draw(job, index)]
    return picture


def _events_schema() -> dict[str, Any]:
    """Schemas of the stream's events, whole: FastAPI only lists what a plain response is made of."""
    return {"oneOf": [_whole_schema(event) for event in (PartialImageEvent, CompletedEvent)]}


def _whole_schema(event: type[BaseModel]) -> dict[str, Any]:
    schema = event.model_json_schema()
    parts = schema.pop("$defs", {})

    def inline(node: Any) -> Any:
        if isinstance(node, list):
            return [inline(child) for child in node]
        if not isinstance(node, dict):
            return node
        if "$ref" in node:
            return inline(parts[node["$ref"].rpartition("/")[2]])
        return {key: inline(child) for key, child in node.items()}

    return inline(schema)
