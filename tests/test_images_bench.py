"""The benchmark client's images backend against the images route on a fake engine."""

import asyncio
import sys

import aiohttp
import pytest
from images_fakes import MODEL, PATH, FakeEngine, make_app, served
from vllm.benchmarks.lib import endpoint_request_func as client
from vllm.benchmarks.serve import add_cli_args
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_kvcompress import bench


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(client, "ASYNC_REQUEST_FUNCS", functions := dict(client.ASYNC_REQUEST_FUNCS))
    monkeypatch.setattr(client, "OPENAI_COMPATIBLE_BACKENDS", list(client.OPENAI_COMPATIBLE_BACKENDS))
    functions.pop(bench.BACKEND, None)
    return functions


@pytest.fixture
async def ask():
    """Asks the fake server as ``vllm bench serve`` does."""
    engine = FakeEngine()
    async with served(await make_app(engine)) as url, aiohttp.ClientSession() as session:

        async def ask(endpoint=PATH, **fields):
            fields = {"prompt": "a cat", "model": "/models/janus", "model_name": "janus", **fields}
            request = client.RequestFuncInput(
                api_url=url + endpoint, prompt_len=7, output_len=128, ignore_eos=True, **fields
            )
            return await bench.async_request_openai_images(request, session)

        ask.engine = engine
        yield ask


def register(changes):
    for change in changes:
        change()


def test_register_adds_one_backend_once(registry):
    before = len(registry)
    register(bench.changes())
    register(bench.changes())
    assert len(registry) == before + 1
    assert client.OPENAI_COMPATIBLE_BACKENDS.count(bench.BACKEND) == 1


@pytest.mark.parametrize(
    ("arguments", "registered"),
    [(["bench", "serve"], True), (["-v", "bench"], True), (["serve", "bench"], False), ([], False)],
)
def test_register_only_in_benchmarks(registry, monkeypatch, arguments, registered):
    monkeypatch.setattr(sys, "argv", ["vllm", *arguments])
    register(bench.changes_if_benchmarking())
    assert (bench.BACKEND in registry) is registered


def test_the_command_line_takes_it():
    register(bench.changes())
    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    arguments = ["--model", "m", "--backend", bench.BACKEND, "--endpoint", PATH]
    assert parser.parse_args(arguments).backend == bench.BACKEND


async def test_a_picture(ask):
    output = await ask()
    assert output.success, output.error
    assert (output.prompt_len, output.output_tokens) == (7, MODEL.raster.tokens)
    assert 0 < output.latency == output.ttft
    assert output.itl == []


async def test_a_stream(ask):
    ask.engine.step = lambda position: asyncio.sleep(0.001)
    output = await ask(extra_body={"stream": True, "partial_images": 2})
    assert output.success, output.error
    assert output.output_tokens == MODEL.raster.tokens
    assert 0 < output.ttft < output.latency
    assert len(output.itl) == 2
    assert output.ttft + sum(output.itl) == pytest.approx(output.latency)


async def test_extra_body(ask):
    output = await ask(extra_body={"seed": 3, "n": 2, "temperature": 0.5})
    assert output.output_tokens == 2 * MODEL.raster.tokens
    assert [(p.seed, p.temperature) for p in ask.engine.params.values()] == [(3, 0.5), (4, 0.5)]


async def test_failures_carry_the_servers_message(ask):
    output = await ask(prompt=" ")
    assert (output.success, output.error) == (False, "prompt must not be empty")
    ask.engine.draw_code = lambda seed, position: MODEL.codes
    output = await ask(extra_body={"stream": True})
    assert (output.success, output.error) == (False, "the model drew a token that is not an image token")


async def test_the_url_must_be_of_the_images_endpoint(ask):
    with pytest.raises(ValueError, match="images/generations"):
        await ask(endpoint="/v1/completions")


async def test_a_server_that_is_not_there():
    async with aiohttp.ClientSession() as session:
        request = client.RequestFuncInput("a", f"http://127.0.0.1:1{PATH}", 1, 1, "janus")
        output = await bench.async_request_openai_images(request, session)
    assert not output.success
    assert "ClientConnectorError" in output.error
