"""A state machine over HTTP against a real compressed server: whatever its clients do, it is as it was.

Draw, stream, hang up, send nonsense, look at the metrics, drain with clients waiting, start again; after
every sequence nothing runs, every block is back, and a seeded picture is the one it was. A minute in the
suite; ``STATES=100 RESTARTS=20 pytest tests/test_server_states.py`` for an hour. The soak that is run by hand
(``soak/soak_server.py``) draws a few pictures on the same server.
"""

import contextlib
import json
import os
import re
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import preloaded
import pytest
from crowd import PATH, Crowd, Told, ask, wait_taken
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from vllm_kvcompress.testing.server import Server

sys.path.insert(0, str(Path(__file__).parent / "soak"))

import soak_server

ARGS = (
    *("--dtype", "float32", "--max-model-len", "128", "--max-num-seqs", "4", "--enforce-eager"),
    *("--kv-cache-memory-bytes", str(2 << 20), "--attention-backend", "kvcompress"),
    *("--shutdown-timeout", "60"),
)
WINDOWS = (5, 1, "auto", 16)  # of the servers, one after another: a seed's picture is the same in all
SEQUENCES = int(os.environ.get("STATES", "5"))
RESTARTS = int(os.environ.get("RESTARTS", "1"))
SEEDS = st.integers(0, 5)
GAUGES = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")


class Site:
    """The one server that stands at a time, and the pictures that it has drawn, by seed."""

    def __init__(self, model: Path, folder: Path, cache: str) -> None:
        self._model, self._folder, self._cache = model, folder, cache
        self.drawn: dict[int, str] = {}
        self.did: Counter[str] = Counter()
        self.server = self._started()

    def _started(self) -> Server:
        number = self.did["drain"]
        window = json.dumps({"kvcompress": {"window": WINDOWS[number % len(WINDOWS)]}})
        args = (*ARGS, "--additional-config", window)
        log = self._folder / f"server-{number}.log"
        server = Server(self._model, log, args, env={"VLLM_CACHE_ROOT": self._cache}, start=preloaded.Popen)
        return server.__enter__()

    @property
    def url(self) -> str:
        return self.server.url

    def same(self, told: Told) -> None:
        """Whole pictures, each that of its seed."""
        assert told.whole, told
        for index, picture in enumerate(told.pictures):
            seed = told.asked["seed"] + index
            assert self.drawn.setdefault(seed, picture) == picture, f"seed {seed} drew another picture"

    def restart(self, crowd: Crowd) -> None:
        """Drain: clients that wait get their pictures, and the process says that all is well."""
        process = self.server.process
        assert process is not None
        crowd.wait_sent()
        wait_taken(self.url)
        os.kill(process.pid, signal.SIGTERM)
        for told in crowd.wait():
            self.same(told)
        assert process.wait(60) == 0
        self.server.stop()
        self.did["drain"] += 1
        self.server = self._started()

    def settled(self) -> None:
        """Nothing runs or waits, and every block is free."""
        for _ in range(50):
            text = httpx.get(f"{self.url}/metrics").text
            state = {name: re.findall(rf"^vllm:{name}\{{.*\}} (\S+)$", text, re.MULTILINE) for name in GAUGES}
            assert all(state.values()), f"no such gauge: {state}"
            if all(float(value) == 0 for values in state.values() for value in values):
                return
            time.sleep(0.1)
        raise AssertionError(state)


site: Site


class Clients(RuleBasedStateMachine):
    """Any order of what clients and operators do."""

    @rule(seed=SEEDS, n=st.integers(1, 3))
    def draw(self, seed: int, n: int) -> None:
        site.did["draw"] += 1
        site.same(ask(site.url, seed=seed, n=n))

    @rule(seed=SEEDS, partials=st.integers(0, 3))
    def stream(self, seed: int, partials: int) -> None:
        site.did["stream"] += 1
        site.same(ask(site.url, seed=seed, stream=True, partial_images=partials))

    @rule(seed=SEEDS)
    def crowd(self, seed: int) -> None:
        site.did["crowd"] += 1
        for told in Crowd(
            site.url, [{"seed": seed}, {"seed": seed, "stream": True}, {"seed": 0, "n": 6}]
        ).wait():
            site.same(told)

    @rule(
        after=st.sampled_from((0.0, 0.02, 0.1, 0.3)),
        fields=st.sampled_from(({"n": 10}, {"stream": True, "partial_images": 3}, {})),
    )
    def cut(self, after: float, fields: dict[str, Any]) -> None:
        """A client that hangs up, before or in the midst of its answer."""
        site.did["cut"] += 1
        with httpx.Client(verify=False, timeout=60) as client:
            hang_up = threading.Timer(after, client.close)
            hang_up.start()
            with (
                contextlib.suppress(httpx.HTTPError, RuntimeError, OSError),
                client.stream("POST", site.url + PATH, json={"prompt": "a red bird", **fields}) as answer,
            ):
                for _ in answer.iter_raw():
                    pass
            hang_up.cancel()

    @rule(
        body=st.sampled_from(
            (b"", b"{", b"[]", b"\xff", b'{"prompt": 5}', b'{"prompt": "a", "n": 11}', b"x" * 2**21)
        )
        | st.binary(max_size=40)
        | st.dictionaries(st.sampled_from(("n", "seed", "size", "x")), st.none() | st.text(max_size=3)).map(
            lambda fields: json.dumps(fields).encode()
        )
    )
    def bad_body(self, body: bytes) -> None:
        site.did["bad body"] += 1
        answer = httpx.post(site.url + PATH, content=body, headers={"content-type": "application/json"})
        assert 400 <= answer.status_code < 500
        assert "\n" not in answer.json()["error"]["message"]

    @rule(path=st.sampled_from(("/metrics", "/health", "/v1/models", "/openapi.json")))
    def look(self, path: str) -> None:
        site.did["look"] += 1
        assert httpx.get(site.url + path).status_code == 200

    @precondition(lambda _: site.did["drain"] < RESTARTS)
    @rule(seed=SEEDS)
    def drain(self, seed: int) -> None:
        site.restart(waiting(seed))

    def teardown(self) -> None:
        site.settled()
        site.same(ask(site.url, seed=0))


def waiting(seed: int) -> Crowd:
    """Clients of every kind, more than run at once."""
    stream = {"seed": seed, "stream": True, "partial_images": 2}
    return Crowd(site.url, [{"seed": seed, "n": 5}, stream, {"seed": 0, "n": 2}, stream])


@pytest.fixture(scope="module", autouse=True)
def started(
    checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, measured_cache: str
) -> Iterator[None]:
    global site
    site = Site(checkpoints["gqa-hf"], tmp_path_factory.mktemp("states"), measured_cache)
    yield
    site.server.stop()


@pytest.mark.timeout(7200)
def test_the_server_is_as_it_was_after_any_sequence() -> None:
    site.same(ask(site.url, seed=0))
    run_state_machine_as_test(
        Clients,
        settings=settings(
            max_examples=SEQUENCES, stateful_step_count=8, deadline=None, derandomize=True, database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )  # fmt: skip
    if not site.did["drain"]:  # the machine came to no drain
        site.restart(waiting(1))
        Clients().teardown()
    print(dict(site.did))
    assert {"draw", "stream", "cut", "bad body", "look", "drain"} <= set(site.did)


async def test_a_little_of_the_soak(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"PICTURES": 60, "LINES": 8, "CLIENTS": 8, "GROWTH_MIB": 1 << 20}.items():
        monkeypatch.setattr(soak_server, name, value)
    limits = httpx.Limits(max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=site.url, timeout=120, limits=limits) as http:
        soak = soak_server.Soak(site.server, http)
        await soak.run()
    assert soak.pictures >= 60
    assert len(soak.did) > 3, soak.did
