"""10,000 small pictures over HTTP from a compressed server, among cut streams, aborts and bad bodies.

By hand: ``make soak``, or ``python -m pytest tests/soak/soak_server.py -rP``; ``SOAK_PICTURES`` makes it
shorter. A picture of a seed is compared with the first one of that seed, and in the end with it drawn alone;
every block must be back, and no process may have grown in the second half.
"""

import asyncio
import contextlib
import hashlib
import json
import os
import random
import re
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from vllm_kvcompress.testing.checkpoints import GQA, make_checkpoint
from vllm_kvcompress.testing.server import Server

PICTURES = int(os.environ.get("SOAK_PICTURES", "10000"))
CLIENTS, SEEDS, LINES = 24, 300, 6
GROWTH_MIB = 16  # of one process in the second half; allocators fill up in the first
# oneDNN keeps the kernels of its last 1,024 matrix shapes, a few for every number of tokens in a step: with
# that the worker grows for ten thousand pictures, and a leak would not be seen (docs/operations.md).
SHAPES = "32"
PATH = "/v1/images/generations"
PROMPT = "<|User|>: a red bird\n\n<|Assistant|>:<begin_of_image>"
ARGS = (
    *("--dtype", "float32", "--max-model-len", "96", "--max-num-seqs", "32", "--enforce-eager"),
    *("--kv-cache-memory-bytes", str(2 << 20), "--attention-backend", "kvcompress"),
)
BAD: tuple[tuple[bytes, str], ...] = (
    (b"", "application/json"),
    (b"{", "application/json"),
    (b"[1]", "application/json"),
    (b"\xff\xfe\x00", "application/json"),
    (b'{"prompt": "a", "n": 1e99}', "application/json"),
    (b'{"prompt": "a", "seed": NaN}', "application/json"),
    (b'{"prompt": "a", "size": 9}', "application/json"),
    (b'{"prompt": "a", "negative_prompt": 7}', "application/json"),
    (b'{"prompt": "a", "unknown": 1}', "application/json"),
    (b'{"prompt": "' + b"a " * 9000 + b'"}', "application/json"),
    (b" " * (2**20 + 1), "application/json"),
    (b"prompt=a", "application/x-www-form-urlencoded"),
)


class Soak:
    """The clients' common state."""

    def __init__(self, server: Server, http: httpx.AsyncClient) -> None:
        self.server, self.http, self.rng = server, http, random.Random(0)
        self.first: dict[int, str] = {}
        self.did: Counter[str] = Counter()
        self.pictures = 0

    def same(self, seed: int, b64: str) -> None:
        """The picture of this seed, as it was."""
        digest = hashlib.sha256(b64.encode()).hexdigest()
        assert self.first.setdefault(seed, digest) == digest, f"seed {seed} drew another picture"
        self.pictures += 1

    async def whole(self) -> None:
        seed, n = self.rng.randrange(SEEDS), self.rng.choice((1, 1, 1, 2, 3, 5, 8, 10))
        answer = await self.http.post(PATH, json={"prompt": "a red bird", "seed": seed, "n": n})
        assert answer.status_code == 200, answer.text
        for index, picture in enumerate(answer.json()["data"]):
            self.same(seed + index, picture["b64_json"])

    async def streamed(self) -> None:
        seed = self.rng.randrange(SEEDS)
        body = {"prompt": "a red bird", "seed": seed, "stream": True, "partial_images": self.rng.randrange(4)}
        async with self.http.stream("POST", PATH, json=body) as answer:
            events = [
                json.loads(line[6:]) async for line in answer.aiter_lines() if line.startswith("data: ")
            ]
        assert [event["type"] for event in events][-1] == "image_generation.completed", events[-1]
        self.same(seed, events[-1]["b64_json"])

    async def cut(self) -> None:
        """A client that hangs up, at any time."""
        body: dict[str, Any] = {"prompt": "a red bird", "seed": self.rng.randrange(SEEDS)}
        body |= self.rng.choice(({"n": 10}, {"n": 1}, {"stream": True, "partial_images": 3}))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.rng.random() ** 2 * 1.5):
                async with self.http.stream("POST", PATH, json=body) as answer:
                    async for _ in answer.aiter_lines():
                        pass

    async def bad(self) -> None:
        body, kind = self.rng.choice(BAD)
        answer = await self.http.post(PATH, content=body, headers={"content-type": kind})
        assert 400 <= answer.status_code < 500, (body[:60], answer.text)

    async def tokens(self) -> None:
        """Through completions, for those who decode themselves."""
        body = {"model": "janus", "prompt": PROMPT, "n": self.rng.randint(1, 4), "return_token_ids": True}
        answer = await self.http.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        assert all(len(choice["token_ids"]) == LINES * LINES for choice in answer.json()["choices"])
        self.pictures += body["n"]  # type: ignore[operator]

    async def looked(self) -> None:
        assert (
            await self.http.get(self.rng.choice(("/metrics", "/health", "/v1/models")))
        ).status_code == 200

    async def client(self) -> None:
        kinds = {
            self.whole: 55,
            self.streamed: 15,
            self.cut: 12,
            self.bad: 10,
            self.tokens: 4,
            self.looked: 4,
        }
        while self.pictures < PICTURES:
            (kind,) = self.rng.choices(list(kinds), list(kinds.values()))
            await kind()
            self.did[kind.__name__] += 1

    async def state(self) -> dict[str, float]:
        """RSS of the three processes in MiB, and the engine's gauges."""
        assert self.server.process is not None
        root = psutil.Process(self.server.process.pid)
        found = {"api": root.memory_info().rss / 2**20}
        for child in root.children(recursive=True):
            title = " ".join(child.cmdline()).lower()
            for name in ("enginecore", "worker"):
                if f"vllm::{name}" in title:
                    found[name] = child.memory_info().rss / 2**20
        text = (await self.http.get("/metrics")).text
        for gauge in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
            [value] = re.findall(rf"^vllm:{gauge}\{{.*\}} (\S+)$", text, re.MULTILINE)
            found[gauge] = float(value)
        return found

    async def report(self) -> None:
        """A line every tenth."""
        self.lines: list[dict[str, float]] = []
        start = time.monotonic()
        while True:
            if self.pictures >= (len(self.lines) + 1) * PICTURES // 10:
                now = {"pictures": self.pictures, "s": time.monotonic() - start, **await self.state()}
                self.lines.append(now)
                print({name: round(value, 3) for name, value in now.items()}, flush=True)
            await asyncio.sleep(0.05)

    async def quiet(self) -> dict[str, float]:
        for _ in range(100):
            state = await self.state()
            if not any(value for name, value in state.items() if name.startswith(("num", "kv"))):
                break
            await asyncio.sleep(0.1)
        return state

    async def run(self) -> None:
        reporter = asyncio.create_task(self.report())
        async with asyncio.TaskGroup() as clients:
            for _ in range(CLIENTS):
                clients.create_task(self.client())
        reporter.cancel()
        last = await self.quiet()
        print("did", dict(self.did), "then", {name: round(value, 3) for name, value in last.items()})
        assert (last["num_requests_running"], last["num_requests_waiting"]) == (0, 0)
        assert last["kv_cache_usage_perc"] == 0  # every block is free
        for seed in list(self.first)[:10]:  # alone
            answer = await self.http.post(PATH, json={"prompt": "a red bird", "seed": seed})
            self.same(seed, answer.json()["data"][0]["b64_json"])
        half = self.lines[len(self.lines) // 2]
        grown = {name: last[name] - half[name] for name in ("api", "enginecore", "worker")}
        print("grown in the second half, MiB", {name: round(value, 1) for name, value in grown.items()})
        assert max(grown.values()) < GROWTH_MIB, grown


@pytest.mark.timeout(7200)
async def test_soak(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model", geometry=replace(GQA, lines=LINES))
    env = {"VLLM_CACHE_ROOT": str(tmp_path / "cache"), "ONEDNN_PRIMITIVE_CACHE_CAPACITY": SHAPES}
    with Server(model, tmp_path / "server.log", ARGS, env=env) as server:
        # The server closes connections that were idle for 5 s, and on a busy machine a request may meet that.
        limits = httpx.Limits(max_connections=CLIENTS + 2, max_keepalive_connections=0)
        async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as http:
            await Soak(server, http).run()
    assert "Traceback" not in server.log.read_text().split("Shutting down")[0]
