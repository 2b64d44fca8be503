"""What a user runs: ``vllm serve --attention-backend kvcompress`` in its several processes, over HTTP.

The default preset, nothing set: the heads are measured in the worker at the first start, the specs of all
head types are pickled across processes, and what was held is told by answers and metrics.
"""

import base64
import io
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from parity import load_reference, transformers_logits
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer

from vllm_kvcompress.testing.geometry import GQA
from vllm_kvcompress.testing.server import Server

ARGS = (
    *("--dtype", "float32", "--max-model-len", "128", "--max-num-seqs", "8", "--enforce-eager"),
    *("--kv-cache-memory-bytes", str(8 << 20), "--attention-backend", "kvcompress"),
)
TOKENS = 64


@pytest.fixture(scope="module")
def server(
    checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, own_cache: str
) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("compressed")
    env = {"VLLM_CACHE_ROOT": own_cache, "VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
    with Server(checkpoints["gqa-hf"], folder / "server.log", ARGS, env=env) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120) as one:
        yield one


def draw(client: openai.OpenAI, **fields: object) -> openai.types.ImagesResponse:
    seed = fields.pop("seed", 1)
    extra = {name: fields.pop(name) for name in ("partial_lines", "kept") if name in fields}
    return client.images.generate(
        model="janus", prompt="a red bird", extra_body={"seed": seed, **extra}, **fields
    )  # type: ignore[call-overload]


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
    assert re.search(
        r"Windows: to 16 tokens a step, what pays \(auto\), with up to 32 pictures at once; scratch [\d,]+ b",
        log,
    )


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


def test_a_stream_says_what_each_head_type_keeps(server: Server, client: openai.OpenAI) -> None:
    events = [*draw(client, stream=True, partial_lines=1, kept=True)]
    *partial, whole = events
    assert whole.type == "image_generation.completed"
    kept = [event.kept for event in partial if event.kept]
    assert len(kept) > 1
    sizes = {name: int(name.split()[1]) for name in (one["name"] for one in kept[0]["types"])}
    assert {name.split()[0] for name in sizes} == {"ring", "scored"}
    for now in kept:
        for one in now["types"]:
            held = sum(one["percent"]) / 100
            assert abs(held - min(now["drawn"], sizes[one["name"]])) <= 0.005 * now["drawn"]
            assert not any(one["percent"][now["drawn"] :])
    heads = sum(one["heads"] for one in kept[0]["types"])
    assert heads == 2 * GQA.layers * GQA.kv_heads
    assert whole.b64_json == draw(client).data[0].b64_json  # looking on changes nothing


def test_metrics_add_up(server: Server, client: openai.OpenAI) -> None:
    names = (
        "image_pictures_total", "image_kv_resident_bytes_total", "image_kv_full_bytes_total",
        "image_steps_total", "image_steps_tokens_total",
    )  # fmt: skip
    before = [metric(server, name, model_name="janus") for name in names]
    answer = draw(client, n=2)
    usage = (answer.usage and answer.usage.model_extra) or {}
    held, steps = usage["kv_cache"], usage["steps"]
    assert 2 < steps <= 2 * TOKENS
    after = [metric(server, name, model_name="janus") for name in names]
    assert [b - a for a, b in zip(before, after, strict=True)] == [
        2, held["resident_bytes"], held["full_bytes"], steps, 2 * TOKENS
    ]  # fmt: skip
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        assert metric(server, name) == 0


def test_the_same_seed_draws_the_same_picture_in_any_company(client: openai.OpenAI) -> None:
    alone = draw(client).data
    with ThreadPoolExecutor(12) as pool:  # more than run at once
        crowd = list(pool.map(lambda seed: draw(client, seed=seed).data, [1, *range(2, 12), 1]))
    assert alone is not None
    assert crowd[0][0].b64_json == crowd[-1][0].b64_json == alone[0].b64_json  # type: ignore[index]


CHAT: list[Any] = [{"role": "user", "content": "What is on the table, and what is not?"}]


def chat(client: openai.OpenAI, **fields: Any) -> Any:
    """A greedy answer, of 40 tokens unless ``fields`` say otherwise, with the ids of prompt and answer."""
    extra = {"return_token_ids": True, "ignore_eos": True}
    asked = {"messages": CHAT, "max_tokens": 40} | fields
    return client.chat.completions.create(model="janus", temperature=0, extra_body=extra, **asked)


@torch.no_grad()
def written(model: Path, ids: list[int], count: int, forbidden: int) -> list[int]:
    """Greedy text of transformers' Janus, which sees everything."""
    reference, ids = load_reference(model), list(ids)
    for _ in range(count):
        hidden = reference.model.language_model(torch.tensor([ids])).last_hidden_state[:, -1]
        logits = reference.lm_head(hidden)[0]
        logits[forbidden] = -torch.inf
        ids.append(int(logits.argmax()))
    return ids[-count:]


def test_chat_beside_pictures_answers_what_transformers_answers(
    server: Server, client: openai.OpenAI, checkpoints: dict[str, Path]
) -> None:
    """Whole and streamed, alone and while pictures are drawn; the pictures are what they are without."""
    alone = draw(client, seed=4).data
    with ThreadPoolExecutor(8) as pool:
        pictures = [pool.submit(draw, client, seed=seed) for seed in (4, 5, 6)]
        answers = [pool.submit(chat, client) for _ in range(2)]
        streamed = [*chat(client, stream=True, stream_options={"include_usage": True})]
        whole = [answer.result() for answer in answers]
        beside = pictures[0].result().data
    assert beside[0].b64_json == alone[0].b64_json  # type: ignore[index]
    [choice] = whole[0].choices
    ids, prompt = choice.token_ids, whole[0].prompt_token_ids
    boi = AutoTokenizer.from_pretrained(checkpoints["gqa-hf"]).convert_tokens_to_ids("<begin_of_image>")
    assert ids == written(checkpoints["gqa-hf"], prompt, 40, boi)
    assert whole[1].choices[0].token_ids == chat(client).choices[0].token_ids == ids
    assert choice.finish_reason == "length"
    pieces = [chunk.choices[0] for chunk in streamed if chunk.choices]
    assert "".join(piece.delta.content or "" for piece in pieces) == choice.message.content
    assert [i for piece in pieces for i in getattr(piece, "token_ids", None) or ()] == ids
    assert streamed[-1].usage == whole[0].usage
    assert whole[0].usage.completion_tokens == 40
    assert metric(server, "num_preemptions_total") == 0
    assert metric(server, "kv_cache_usage_perc") == 0


def test_a_picture_in_a_chat_is_answered_as_transformers_does(
    client: openai.OpenAI, checkpoints: dict[str, Path]
) -> None:
    """An ``image_url`` part, a ``data:`` URL, in several processes, while a picture is drawn."""
    path, file = checkpoints["gqa-hf"], io.BytesIO()
    photo = Image.effect_mandelbrot((90, 60), (-2, -1, 1, 1), 50).convert("RGB")
    photo.save(file, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is it?"}]
    with ThreadPoolExecutor(1) as pool:
        picture = pool.submit(draw, client, seed=4)
        told = chat(client, messages=[{"role": "user", "content": parts}], max_tokens=8)
        assert picture.result().data
    ids, answer = told.prompt_token_ids, told.choices[0].token_ids
    processor = AutoProcessor.from_pretrained(path)
    pixels = processor.image_processor(photo, return_tensors="pt")["pixel_values"]
    logits = transformers_logits(path, ids, answer, pixels)
    logits[:, processor.tokenizer.convert_tokens_to_ids("<begin_of_image>")] = -torch.inf
    assert logits[len(ids) - 1 : -1].argmax(-1).tolist() == answer
    assert len(ids) > TOKENS
    assert told.usage.prompt_tokens == len(ids)


def test_texts_take_what_the_cache_holds(server: Server, client: openai.OpenAI) -> None:
    """The front end knows what fits, from the engine's process; a stop string ends a text."""
    [labels] = re.findall(r"^vllm:cache_config_info\{(.*)\} ", httpx.get(f"{server.url}/metrics").text, re.M)
    told = dict(re.findall(r'(\w+)="([^"]*)"', labels))
    [pages] = re.findall(r"tokens a page ([\d, ]+);", server.log.read_text())
    blocks, sizes = int(told["num_gpu_blocks"]) - 1, [int(page) for page in pages.split(",")]
    most = max(n for n in range(blocks * 16) if sum(-(-n // size) for size in sizes) <= blocks)
    assert int(told["kv_cache_size_tokens"]) == most
    text = (
        client.completions.create(model="janus", prompt="hello", max_tokens=30, temperature=0).choices[0].text
    )
    stop = text[len(text) // 2 : len(text) // 2 + 2]
    ended = client.completions.create(model="janus", prompt="hello", max_tokens=30, temperature=0, stop=stop)
    assert ended.choices[0].finish_reason == "stop"
    assert ended.choices[0].text == text[: text.index(stop)]
    with pytest.raises(openai.BadRequestError, match="greater than max_model_len"):
        client.completions.create(model="janus", prompt="hello", max_tokens=500)
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_the_profile_is_left_for_the_next_start(
    server: Server, checkpoints: dict[str, Path], own_cache: str
) -> None:
    profiles = list((Path(own_cache) / "kvcompress" / "head_profiles").glob("gqa-hf-*.json"))
    assert len(profiles) == 1
    assert profiles[0].stat().st_mode & 0o777 == 0o600
