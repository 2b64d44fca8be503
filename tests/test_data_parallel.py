"""``vllm serve --data-parallel-size 2 --api-server-count 2``: two engines draw, one decodes a picture."""

import os
import re
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import preloaded
import pytest
from crowd import MIXED, WORDS, Crowd, Writer, ask
from test_compressed_server import ARGS, TOKENS, draw, metric

from vllm_kvcompress.serving.drain import SHUTTING_DOWN
from vllm_kvcompress.serving.one_engine import OneEngine
from vllm_kvcompress.testing.server import Server

PARALLEL = ("--data-parallel-size", "2", "--api-server-count", "2", "--shutdown-timeout", "160")
LIMIT_S = 150  # where the processes get in each other's way


@pytest.fixture(scope="module")
def server(
    checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, measured_cache: str
) -> Iterator[Server]:
    env = {
        "VLLM_LOGGING_LEVEL": "DEBUG", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1",
        "VLLM_CACHE_ROOT": measured_cache,
    }  # fmt: skip
    log, begin = tmp_path_factory.mktemp("parallel") / "server.log", partial(preloaded.Popen, forked=True)
    with Server(checkpoints["gqa-hf"], log, (*ARGS, *PARALLEL), env=env, start=begin) as running:
        yield running


@pytest.fixture(scope="module")
def answers(server: Server) -> list[openai.types.ImagesResponse]:
    """Twelve pictures, asked for at once; each seed twice."""

    def one(seed: int) -> openai.types.ImagesResponse:
        # A connection each: both API servers are asked.
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300) as client:
            return draw(client, seed=seed)

    with ThreadPoolExecutor(12) as pool:
        return list(pool.map(one, [*range(6), *range(6)]))


def test_pictures_do_not_depend_on_the_engine(answers: list[openai.types.ImagesResponse]) -> None:
    drawn = [answer.data[0].b64_json for answer in answers if answer.data]
    assert len(drawn) == 12
    assert drawn[:6] == drawn[6:]
    assert len(set(drawn)) == 6
    assert all(answer.usage and answer.usage.output_tokens == TOKENS for answer in answers)


def test_each_picture_is_decoded_once(server: Server, answers: list[openai.types.ImagesResponse]) -> None:
    log = server.log.read_text(errors="replace")
    decoded = [int(count) for count in re.findall(r"Decoding (\d+) pictures on rank 0", log)]
    assert sum(decoded) == len(answers)


def test_metrics_say_which_engine_drew(server: Server, answers: list[openai.types.ImagesResponse]) -> None:
    counts = [metric(server, "image_pictures_total", model_name="janus", engine=str(n)) for n in (0, 1)]
    assert sum(counts) == len(answers)
    assert min(counts) > 0
    held = sum(
        (answer.usage.model_extra or {})["kv_cache"]["resident_bytes"] for answer in answers if answer.usage
    )
    assert metric(server, "image_kv_resident_bytes_total", model_name="janus") == held


def test_a_drain_of_all_processes_answers_everybody(server: Server) -> None:
    """The last of those that ask the server."""
    before = Crowd(server.url, MIXED).wait()
    assert all(told.whole for told in before)
    assert server.process is not None
    words = Writer(server.url, LIMIT_S)
    crowd = Crowd(server.url, MIXED, LIMIT_S)
    # From four to sixty pictures a second, as the processes get in each other's way: work for seconds.
    long = Crowd(server.url, [{"seed": 50 + 10 * n, "n": 10} for n in range(12)], LIMIT_S)
    crowd.wait_sent()
    long.wait_sent()
    time.sleep(1)  # taken in by the one or the other
    client = httpx.Client(timeout=LIMIT_S)
    os.kill(server.process.pid, signal.SIGTERM)
    while server.log.read_text(errors="replace").count("stopping engine client mode=drain") < 2:
        time.sleep(0.02)
    late = ask(server.url, client=client, seed=1)
    # Refused, at once, where a fast machine had answered everybody by then; never reset.
    is_over = long.unanswered == 0 and "refused" in (late.broke or "")
    assert is_over or (late.status, late.error) == (503, SHUTTING_DOWN), late
    assert all(one.whole for one in long.wait())
    told = crowd.wait()
    assert [one.pictures for one in told] == [one.pictures for one in before]
    assert all(one.whole for one in told)
    assert words.wait() == WORDS
    assert server.process.wait(60) == 0


async def test_calls_take_turns_among_engines() -> None:
    class Core:
        core_engines = (b"zero", b"one")
        asked: list[Any] = []  # noqa: RUF012

        async def _call_utility_async(self, *args: Any, engine: bytes) -> list[Any]:
            self.asked.append((args, engine))
            return [engine]

    workers = OneEngine(SimpleNamespace(engine_core=Core()))  # type: ignore[arg-type]
    answers = [await workers.call("decode", ([1],)) for _ in range(3)]
    assert answers == [[b"zero"], [b"one"], [b"zero"]]
    assert Core.asked[0] == (("collective_rpc", "decode", None, ([1],), None), b"zero")


async def test_a_single_engine_is_asked_as_ever() -> None:
    class Client:
        engine_core = SimpleNamespace(core_engines=[b"zero"])

        async def collective_rpc(self, method: str, args: tuple[Any, ...]) -> list[Any]:
            return [method, *args]

    assert await OneEngine(Client()).call("decode", (1,)) == ["decode", 1]  # type: ignore[arg-type]
