"""A vLLM engine that draws without a model, and the images route mounted on it as vLLM mounts it."""

import asyncio
import base64
import contextlib
import io
from argparse import Namespace
from types import SimpleNamespace

import httpx
import openai
from fastapi import FastAPI
from PIL import Image
from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve.exception_handling.register import init_exception_handler
from vllm.entrypoints.serve.middleware.register import init_entrypoints_middleware
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.engine.exceptions import EngineDeadError

from vllm_kvcompress.models.config import ImageModel
from vllm_kvcompress.models.prompt import lengthened
from vllm_kvcompress.policy.raster import Raster
from vllm_kvcompress.serving.images import PATH, ImagesEndpoint
from vllm_kvcompress.serving.kept import KEPT_METHOD

# Nothing square, and no size a power of two.
MODEL = ImageModel(raster=Raster(lines=6, width=5, patch=3), text_vocab=300, codes=200, bos=1, pad=2, boi=3)
WIDTH, HEIGHT = MODEL.raster.pixel_size
SIZE = f"{WIDTH}x{HEIGHT}"


def prompt_ids(tokenizer, model, text):
    return [model.bos, *(ord(c) % 256 + 10 for c in text), model.boi]


def negative_ids(tokenizer, model, text, length):
    ids = prompt_ids(tokenizer, model, text)
    if len(ids) > length:
        raise ValueError(f"negative_prompt has {len(ids)} tokens, the prompt {length}")
    return [*ids[:-1], *[model.pad] * (length - len(ids)), model.boi]


def code(seed, position):
    """The code that the fake engine draws."""
    return ((seed or 0) * 31 + position * 7) % MODEL.codes


class FakeEngine:
    """Has what the route uses of ``EngineClient``; aborts as ``AsyncLLM.generate`` does."""

    def __init__(self, compressed=False):
        self.renderer = SimpleNamespace(get_tokenizer=lambda: "tokenizer")
        self.model_config = SimpleNamespace(max_model_len=100)
        self.vllm_config = SimpleNamespace(
            shutdown_timeout=0,
            additional_config={},
            attention_config=SimpleNamespace(backend=AttentionBackendEnum.CUSTOM if compressed else None),
        )
        self.input_processor = None
        self.errored = self.is_running = self.should_keep_api_server_alive = False
        self.dead_error = EngineDeadError()
        self.params, self.prompts = {}, {}
        self.running, self.aborted = set(), []
        self.decoding = self.most_decoding = 0
        self.decoded_lines, self.calls = [], []
        self.step = lambda position: asyncio.sleep(0)
        self.decode_step = lambda: asyncio.sleep(0)
        self.asking = self.most_asking = 0
        self.kept_step = lambda: asyncio.sleep(0)
        self.is_bad = lambda codes: False
        self.draw_code = code
        self.admission_error = None
        self.finish_reason = "length"

    def check_admission(self, n=1, request_id=None):
        if self.admission_error:
            raise self.admission_error

    def shutdown(self, timeout=None):
        pass

    async def is_tracing_enabled(self):
        return False

    async def generate(self, prompt, params, request_id, *, trace_headers=None):
        assert request_id not in self.params
        self.params[request_id], self.prompts[request_id] = params, prompt["prompt_token_ids"]
        self.running.add(request_id)
        unsent, sent_any = [], False
        try:
            for position in range(params.max_tokens):
                await self.step(position)
                unsent.append(MODEL.text_vocab + self.draw_code(params.seed, position))
                finished = position + 1 == params.max_tokens
                due = not sent_any or len(unsent) >= (params.stream_interval or 1)
                if finished or (due and params.output_kind is RequestOutputKind.DELTA):
                    yield self._output(request_id, unsent, finished)
                    unsent, sent_any = [], True
        except (asyncio.CancelledError, GeneratorExit):
            await self.abort(request_id)
            raise
        finally:
            self.running.discard(request_id)

    def _output(self, request_id, ids, finished):
        reason = self.finish_reason if finished else None
        completion = CompletionOutput(0, "", list(ids), None, None, finish_reason=reason)
        return RequestOutput(request_id, None, self.prompts[request_id], None, [completion], finished)

    async def abort(self, request_id):
        self.aborted.append(request_id)

    async def collective_rpc(self, method, timeout=None, args=(), kwargs=None):
        if method == KEPT_METHOD:
            return await self._kept()
        assert method == "kvcompress_decode_images"
        (pictures,) = args
        assert pictures
        self.calls.append(len(pictures))
        self.decoding += 1
        self.most_decoding = max(self.most_decoding, self.decoding)
        try:
            await self.decode_step()
        finally:
            self.decoding -= 1
        if any(self.is_bad(codes) for codes, _ in pictures):
            raise ValueError("a picture that can't be decoded")
        return [None, [self._decoded(codes) for codes, _ in pictures], None]

    async def _kept(self):
        """Two ranks of which each has a head of one type, which keeps all."""
        self.asking += 1
        self.most_asking = max(self.most_asking, self.asking)
        try:
            await self.kept_step()
        finally:
            self.asking -= 1
        width, tokens = MODEL.raster.width, MODEL.raster.tokens
        return [(width, [("full", 1, [1] * width + [0] * (tokens - width))])] * 2

    def _decoded(self, codes):
        lines, rest = divmod(len(codes), MODEL.raster.width)
        assert lines
        assert not rest
        self.decoded_lines.append(lines)
        return WIDTH, lines * MODEL.raster.patch, pixels(codes)


def pixels(codes):
    """RGB of whole lines: every token a flat square, red its code, green its line."""
    raster, rows = MODEL.raster, b""
    for line in range(len(codes) // raster.width):
        row = b""
        for c in codes[line * raster.width :][: raster.width]:
            row += bytes((c, line, 255 - c)) * raster.patch
        rows += row * raster.patch
    return rows


def expected_rgb(seed=None, lines=MODEL.raster.lines):
    """A whole picture of which ``lines`` are drawn."""
    drawn = pixels([code(seed, i) for i in range(lines * MODEL.raster.width)])
    return drawn + bytes((127,)) * (WIDTH * HEIGHT * 3 - len(drawn))


async def make_app(engine, *, api_key=None, keep_alive=0, engine_client=True, origins=(), **endpoint_options):
    """The app as vLLM builds it: plugin routes, its exception handlers, its middleware.

    ``origins`` are those of ``--allowed-origins``; like vLLM's, the default is none.
    """
    args = Namespace(
        log_error_stack=False,
        allowed_origins=list(origins),
        allow_credentials=False,
        allowed_methods=["*"],
        allowed_headers=["*"],
        api_key=[api_key] if api_key else None,
        enable_request_id_headers=True,
        middleware=[],
        sse_keep_alive_interval=keep_alive,
    )
    app = FastAPI()
    app.state.args = args
    known = {
        "image_model": MODEL, "prompt_ids": prompt_ids, "negative_ids": negative_ids, "lengthened": lengthened
    }  # fmt: skip
    endpoint = ImagesEndpoint(**known | endpoint_options)
    endpoint.attach_router(app)
    init_exception_handler(app)
    init_entrypoints_middleware(args, app, ("generate",))
    app.state.enable_server_load_tracking = True
    app.state.server_load_metrics = 0
    app.state.server = SimpleNamespace(should_exit=False)
    app.state.engine_client = engine
    app.state.openai_serving_models = OpenAIServingModels(
        engine, [BaseModelPath("janus", "/models/janus"), BaseModelPath("alias", "/models/janus")]
    )
    await endpoint.init_state(engine if engine_client else None, app.state, args)
    return app


def http_client(app):
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server")


def openai_client(app, api_key="none"):
    import httpx2  # what the openai package calls its HTTP client

    transport = httpx2.ASGITransport(app)
    return openai.AsyncOpenAI(
        base_url="http://server/v1",
        api_key=api_key,
        max_retries=0,
        http_client=httpx2.AsyncClient(transport=transport),
    )


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


class AsgiCall:
    """A request whose client can hang up: ``messages`` is what it received until then.

    With None for a body it sends none.
    """

    def __init__(self, app, body, spec_version="2.3", headers=()):
        self.messages = []
        self.hang_up = asyncio.Event()
        self._body = [] if body is None else [body]
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": spec_version},
            "http_version": "1.1",
            "method": "POST",
            "path": PATH,
            "raw_path": PATH.encode(),
            "query_string": b"",
            "headers": [(b"content-type", b"application/json"), *headers],
        }
        self.task = asyncio.create_task(app(scope, self._receive, self._send))

    async def _receive(self):
        if self._body:
            return {"type": "http.request", "body": self._body.pop(), "more_body": False}
        await self.hang_up.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message):
        self.messages.append(message)


async def until(condition, seconds=5.0):
    """Wait for something that other tasks bring about."""

    async def poll():
        while not condition():
            await asyncio.sleep(0.002)

    await asyncio.wait_for(poll(), seconds)


@contextlib.asynccontextmanager
async def served(app, port=0):
    """The app behind a real socket; yields its URL. Leaving cuts what is being answered."""
    import uvicorn

    config = uvicorn.Config(app, port=port, log_level="critical", lifespan="off", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    server.capture_signals = contextlib.nullcontext
    task = asyncio.create_task(server.serve())
    try:
        await until(lambda: server.started)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        await task
