"""What a user runs: ``vllm serve --attention-backend kvcompress`` in its several processes, over HTTP.

The default preset, nothing set: the heads are measured in the worker at the first start, the specs of all
head types are pickled across processes, and what was held is told by answers and metrics.
"""

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest

from vllm_kvcompress.testing.server import Server

ARGS = (
    *("--dtype", "float32", "--max-model-len", "128", "--max-num-seqs", "8", "--enforce-eager"),
    *("--kv-cache-memory-bytes", str(8 << 20), "--attention-backend", "kvcompress"),
)
TOKENS = 64


@pytest.fixture(scope="module")
def server(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("compressed")
    env = {"VLLM_CACHE_ROOT": str(folder / "cache"), "VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
    with Server(checkpoints["gqa-hf"], folder / "server.log", ARGS, env=env) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120) as one:
        yield one


def draw(client: openai.OpenAI, **fields: object) -> openai.types.ImagesResponse:
    seed = fields.pop("seed", 1)
    return client.images.generate(model="janus", prompt="a red bird", extra_body={"seed": seed}, **fields)  # type: ignore[call-overload]


def metric(server: Server, name: str, **labels: str) -> float:
    """Sum of a metric's samples that bear these labels."""
    text = httpx.get(f"{server.url}/metrics").text
    rows = re.findall(rf"^vllm:{name}\{{(.*)\}} (\S+)$", text, re.MULTILINE)
    wanted = [f'{key}="{value}"' for key, value in labels.items()]
    return sum(float(value) for found, value in rows if all(label in found for label in wanted))


def test_the_heads_were_measured_and_the_log_says_what_they_got(server: Server) -> None:
    log = server.log.read_text()
    [line] = [one for one in log.splitlines() if "kvcompress: preset" in one]
    assert "preset fitted, budget 0.2" in line
    assert re.search(r"(ring|scored) \d+: \d+ heads", line)
    assert re.search(
        r"predicted loss \S+; kernels cpu \(\w+\); memory for \d+ pictures at once instead of", line
    )
    assert "Head profile calibrated, kept in" in log


def test_answers_say_what_was_held(client: openai.OpenAI) -> None:
    answer = draw(client, n=3)
    assert len({picture.b64_json for picture in answer.data or []}) == 3
    assert answer.usage is not None
    assert answer.usage.output_tokens == 3 * TOKENS
    held = (answer.usage.model_extra or {})["kv_cache"]
    assert 0 < held["resident_bytes"] < 0.6 * held["full_bytes"]
    evicted = held["evicted_tokens"]
    assert set(evicted) == {"spatial", "semantic"}
    assert max(evicted.values()) > 3 * TOKENS / 2


def test_metrics_add_up(server: Server, client: openai.OpenAI) -> None:
    names = ("image_pictures_total", "image_kv_resident_bytes_total", "image_kv_full_bytes_total")
    before = [metric(server, name, model_name="janus") for name in names]
    answer = draw(client, n=2)
    held = ((answer.usage and answer.usage.model_extra) or {})["kv_cache"]
    after = [metric(server, name, model_name="janus") for name in names]
    assert [b - a for a, b in zip(before, after, strict=True)] == [
        2, held["resident_bytes"], held["full_bytes"]
    ]  # fmt: skip
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        assert metric(server, name) == 0


def test_the_same_seed_draws_the_same_picture_in_any_company(client: openai.OpenAI) -> None:
    alone = draw(client).data
    with ThreadPoolExecutor(12) as pool:  # more than run at once
        crowd = list(pool.map(lambda seed: draw(client, seed=seed).data, [1, *range(2, 12), 1]))
    assert alone is not None
    assert crowd[0][0].b64_json == crowd[-1][0].b64_json == alone[0].b64_json  # type: ignore[index]


def test_text_is_refused_and_the_server_goes_on(server: Server, client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="draws pictures only"):
        client.completions.create(model="janus", prompt="hello", max_tokens=3)
    assert httpx.get(f"{server.url}/health").status_code == 200
    assert draw(client).data


def test_the_profile_is_left_for_the_next_start(server: Server, checkpoints: dict[str, Path]) -> None:
    profiles = list((server.log.parent / "cache" / "kvcompress" / "head_profiles").glob("gqa-hf-*.json"))
    assert len(profiles) == 1
    assert profiles[0].stat().st_mode & 0o777 == 0o600
