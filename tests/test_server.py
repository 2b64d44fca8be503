"""``vllm serve`` with a Janus checkpoint, asked by the official openai client and by hostile ones."""

import asyncio
import base64
import io
import json
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import numpy as np
import openai
import pytest
import torch
from parity import transformers_greedy, transformers_logits, transformers_pixels, two_branches_greedy
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer

from vllm_kvcompress.models.tokenizer import PAD
from vllm_kvcompress.testing.checkpoints import TINY

TOKENS, SIZE = TINY.image_tokens, (TINY.image_size, TINY.image_size)
SHOWN = f"{SIZE[0]}x{SIZE[1]}"
PATH = "/v1/images/generations"


@pytest.fixture(scope="module")
def client(image_server):
    url = f"{image_server.url}/v1"
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=300) as client:
        yield client


@pytest.fixture(scope="module")
def http(image_server):
    with httpx.Client(base_url=image_server.url, timeout=300) as client:
        yield client


BUSY = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")


def opened(b64: str) -> Image.Image:
    picture = Image.open(io.BytesIO(base64.b64decode(b64)))
    picture.load()
    return picture


def rgb(b64: str) -> np.ndarray:
    picture = opened(b64)
    assert (picture.size, picture.mode) == (SIZE, "RGB")
    return np.asarray(picture).astype(int)


def draw(client, prompt="a cat", **fields):
    extra = {name: fields.pop(name) for name in list(fields) if name in EXTRA}
    return client.images.generate(model="janus", prompt=prompt, extra_body=extra, **fields)


EXTRA = {"seed", "guidance_scale", "temperature", "top_k", "top_p", "negative_prompt"}


def png(client, *args, **fields) -> str:
    (picture,) = draw(client, *args, **fields).data
    return picture.b64_json


def metrics(http) -> dict[str, float]:
    """The newest sample of each of vLLM's gauges and counters, labels left out."""
    found = re.findall(r"^vllm:(\w+)(?:\{.*\})? (\S+)$", http.get("/metrics").text, re.MULTILINE)
    return {name: float(value) for name, value in found}


@pytest.fixture(scope="module")
def cat(client):
    """The picture that tells whether the server still draws as it did."""
    return png(client, seed=1)


# ---- pictures


def test_the_route_is_there_without_being_named(http):
    assert PATH in http.get("/openapi.json").json()["paths"]


def test_a_picture_equals_transformers_pixel_for_pixel(client, checkpoints):
    """Prompt, tokenizer, guidance, drawing, decoding, file: all of it."""
    text = "A red bicycle leaning on a white wall"
    answer = draw(client, text, temperature=0, guidance_scale=5)
    path = checkpoints["tiny-hf"]
    prompt = AutoTokenizer.from_pretrained(path).encode(f"<|User|>: {text}\n\n<|Assistant|>:<begin_of_image>")
    expected = transformers_pixels(path, torch.tensor(transformers_greedy(path, [prompt])))[0].numpy()
    assert np.abs(rgb(answer.data[0].b64_json) - expected.astype(int)).max() <= 1
    usage = answer.usage
    assert (usage.input_tokens, usage.output_tokens) == (len(prompt), TOKENS)
    assert usage.total_tokens == len(prompt) + TOKENS
    assert usage.input_tokens_details.text_tokens == len(prompt)
    assert (answer.output_format, answer.size) == ("png", SHOWN)
    assert abs(answer.created - time.time()) < 300


def test_a_negative_prompt_longer_than_the_prompt(client, checkpoints):
    """The prompt gets the padding that its unconditional twin would have; token for token."""
    path = checkpoints["tiny-hf"]
    tokenizer = AutoTokenizer.from_pretrained(path)
    texts = ("a red circle", "blurry, low quality, watermark, two of them")
    prompt, negative = (tokenizer.encode(f"<|User|>: {t}\n\n<|Assistant|>:<begin_of_image>") for t in texts)
    padding = [tokenizer.convert_tokens_to_ids(PAD)] * (len(negative) - len(prompt))
    assert padding
    lengthened = [prompt[0], *padding, *prompt[1:]]
    codes = two_branches_greedy(path, lengthened, negative)
    expected = transformers_pixels(path, torch.tensor([codes]))[0].numpy()
    answer = draw(client, texts[0], temperature=0, guidance_scale=5, negative_prompt=texts[1])
    assert np.abs(rgb(answer.data[0].b64_json) - expected.astype(int)).max() <= 1
    assert answer.usage.input_tokens == len(negative)


def test_n_pictures_are_those_of_the_next_seeds(client, cat):
    answer = draw(client, n=3, seed=0, size=SHOWN, response_format="b64_json", user="someone")
    assert len(answer.data) == 3
    assert len({picture.b64_json for picture in answer.data}) == 3
    assert answer.data[1].b64_json == cat
    assert answer.usage.output_tokens == 3 * TOKENS


def test_without_a_seed_pictures_differ(client):
    first, second = draw(client, n=2).data
    assert first.b64_json != second.b64_json


def test_every_parameter_beyond_openai_matters(client, cat):
    changes = (
        {"guidance_scale": 1}, {"guidance_scale": 2.5}, {"temperature": 0.5}, {"top_k": 10}, {"top_p": 0.5},
        {"negative_prompt": "a"},
    )  # fmt: skip
    drawn = [png(client, seed=1, **change) for change in changes]
    assert len({cat, *drawn}) == 1 + len(changes)
    assert png(client, seed=1, guidance_scale=5, temperature=1, top_k=0, top_p=1) == cat


@pytest.mark.parametrize("output_format", ["jpeg", "webp"])
def test_formats(client, cat, output_format):
    best = png(client, seed=1, output_format=output_format)
    small = png(client, seed=1, output_format=output_format, output_compression=20)
    picture = opened(best)
    assert (picture.format.lower(), picture.size) == (output_format, SIZE)
    assert len(small) < len(best)
    assert np.abs(np.asarray(picture.convert("RGB")).astype(int) - rgb(cat)).mean() < 6


def test_stream_with_partial_pictures(client, cat):
    events = list(draw(client, seed=1, stream=True, partial_images=3))
    *partials, last = events
    assert [event.type for event in partials] == ["image_generation.partial_image"] * len(partials)
    assert [event.partial_image_index for event in partials] == list(range(len(partials)))
    assert 1 <= len(partials) <= 3  # a busy decoder skips some
    assert last.type == "image_generation.completed"
    assert last.b64_json == cat
    assert (last.usage.output_tokens, last.size) == (TOKENS, SHOWN)
    whole, before = rgb(cat), 0
    for event in partials:
        picture = rgb(event.b64_json)
        grey = (picture == 127).all(axis=(1, 2))
        drawn = int(np.argmax(grey))
        assert grey[drawn:].all()
        assert drawn % 16 == 0
        assert before < drawn < SIZE[1]
        before = drawn
        # The decoder sees below a line when the rest is there, so its last lines differ.
        assert np.abs(picture[: drawn // 2] - whole[: drawn // 2]).mean() < 60


# ---- errors: each is OpenAI's, and the server goes on

LONG = "a very long prompt " * 500
REFUSED = (
    ({"prompt": ""}, "prompt"),
    ({"prompt": " \n"}, "prompt"),
    ({"prompt": LONG}, "prompt"),
    ({"n": 0}, "n"),
    ({"n": 11}, "n"),
    ({"size": "big"}, "size"),
    ({"response_format": "file"}, "response_format"),
    ({"stream": True, "n": 2}, "n"),
    ({"partial_images": 1}, "partial_images"),
    ({"guidance_scale": -1}, "guidance_scale"),
    ({"guidance_scale": "high"}, "guidance_scale"),
    ({"temperature": -1}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"seed": -1}, "seed"),
    ({"negative_prompt": LONG}, "negative_prompt"),
    ({"num_inference_steps": 20}, "num_inference_steps"),
)


def checked(error: dict, kind: str, status: int, parameter: str | None) -> None:
    assert error["type"] == kind
    assert error["code"] == status
    assert error["param"] == parameter
    assert error["message"]
    assert "\n" not in error["message"]
    assert "Traceback" not in error["message"]


def test_wrong_requests_are_400s_that_name_the_parameter(client, http, cat):
    for fields, parameter in REFUSED:
        with pytest.raises(openai.BadRequestError) as raised:
            client.images.generate(model="janus", prompt="a cat", extra_body=fields)
        assert raised.value.param == parameter, fields
        checked(raised.value.body, "BadRequestError", 400, parameter)
    assert png(client, seed=1) == cat


def test_wrong_bodies(client, http, cat):
    json_type = {"content-type": "application/json"}
    for body, parameter in (
        (b'{"prompt": "a cat", "guidance_scale": NaN}', "guidance_scale"),
        (b'{"prompt": "a cat", "temperature": Infinity}', "temperature"),
        (b'{"prompt": "a cat"', "body"),
        (b"\xff\xfe", "body"),
        (b"[]", "body"),
        (b"", "body"),
        (b'{"model": "janus"}', "prompt"),
        (b'{"prompt": ["a cat"]}', "prompt"),
        (b'{"prompt": "\\ud800"}', "prompt"),
    ):
        answer = http.post(PATH, content=body, headers=json_type)
        assert answer.status_code == 400, body
        checked(answer.json()["error"], "BadRequestError", 400, parameter)
    assert http.post(PATH, content=b"prompt=a", headers={"content-type": "text/plain"}).status_code == 400
    assert http.get(PATH).status_code == 405
    assert png(client, seed=1) == cat


# ---- many clients


async def test_sixteen_clients_draw_what_each_would_alone(image_server, client):
    texts = ("a cat", "A red bicycle leaning on a white wall", "snow", "Three green apples, one blue cup")
    asked = [
        {"prompt": texts[i % 4], "seed": 100 + i, "guidance_scale": (1, 2.5, 5, 7.5)[i // 4],
         "top_k": (0, 0, 50)[i % 3], "temperature": (1.0, 0.8)[i % 2]}
        for i in range(16)
    ]  # fmt: skip
    async with openai.AsyncOpenAI(
        base_url=f"{image_server.url}/v1", api_key="none", max_retries=0, timeout=300
    ) as crowd:

        async def one(prompt, **extra):
            answer = await crowd.images.generate(model="janus", prompt=prompt, extra_body=extra)
            return answer.data[0].b64_json

        together = await asyncio.gather(*(one(**fields) for fields in asked))
    assert len(set(together)) == 16
    for fields, picture in zip(asked, together, strict=True):
        assert png(client, **fields) == picture, fields


@pytest.mark.parametrize(("calls", "fields"), [(40, {"n": 10}), (150, {"stream": True, "partial_images": 3})])
async def test_a_client_that_leaves_frees_everything(image_server, client, http, cat, calls, fields):
    """Its requests are aborted, its blocks come back, and the server draws on.

    More pictures than run at once: however late the aborts come on a busy machine, most still wait.
    """
    before = metrics(http)
    assert before["num_requests_running"] == before["kv_cache_usage_perc"] == 0
    pictures = calls * fields.get("n", 1)
    async with httpx.AsyncClient(base_url=image_server.url, timeout=300) as leaving:
        body = {"prompt": "a cat", **fields}
        left = [asyncio.create_task(leaving.post(PATH, json=body)) for _ in range(calls)]
        await until(lambda now: all(now[name] for name in BUSY), http)
        for call in left:
            call.cancel()
    now = await until(lambda now: not any(now[name] for name in BUSY), http)
    assert now["generation_tokens_total"] - before["generation_tokens_total"] < TOKENS * pictures
    assert png(client, seed=1) == cat


async def until(true, http, seconds=60) -> dict[str, float]:
    """The first metrics of which ``true`` holds."""
    deadline = time.monotonic() + seconds
    while not true(now := metrics(http)):
        assert time.monotonic() < deadline, now
        await asyncio.sleep(0.1)
    return now


# ---- text from the same server


def test_text_from_the_same_server(client, http):
    completion = client.completions.create(
        model="janus", prompt="The portrait of", max_tokens=30, temperature=0, extra_body={"ignore_eos": True}
    )
    assert completion.usage.completion_tokens == 30
    assert completion.choices[0].text
    assert completion.choices[0].finish_reason == "length"
    chat = client.chat.completions.create(
        model="janus",
        messages=[{"role": "user", "content": "What is a cat?"}],
        max_tokens=200,
        temperature=2,
        seed=0,
        logprobs=True,
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )
    (choice,) = chat.choices
    assert chat.usage.completion_tokens == 200
    ids = choice.token_ids
    assert len(ids) == 200
    assert max(ids) < TINY.text_vocab  # no image token
    assert "<begin_of_image>" not in "".join(step.token for step in choice.logprobs.content)


def look(client, *parts, count=12, **fields):
    """A greedy answer to texts and base64 pictures, with the ids of prompt and answer."""
    content = [
        {"type": "text", "text": part}
        if not part.startswith(("data:", "http", "file:"))
        else {"type": "image_url", "image_url": {"url": part}}
        for part in parts
    ]
    return client.chat.completions.create(
        model="janus", messages=[{"role": "user", "content": content}], temperature=0, max_tokens=count,
        extra_body={"ignore_eos": True, "return_token_ids": True, **fields},
    )  # fmt: skip


def next_by_transformers(path, prompt, picture, answer):
    """What transformers would say after the prompt and after each token of the answer but the last."""
    processor = AutoProcessor.from_pretrained(path)
    pixels = processor.image_processor(images=[picture], return_tensors="pt")["pixel_values"]
    logits = transformers_logits(path, prompt, answer, pixels)[len(prompt) - 1 : -1]
    logits[:, processor.tokenizer.convert_tokens_to_ids("<begin_of_image>")] = -torch.inf
    return logits.argmax(-1).tolist()


def test_a_picture_that_was_drawn_is_looked_at_while_another_is_drawn(client, checkpoints, cat):
    """Through the openai client, as users send it; both are what they are alone."""
    url = f"data:image/png;base64,{cat}"
    with ThreadPoolExecutor(4) as pool:
        pictures = [pool.submit(png, client, seed=seed) for seed in (1, 2)]
        asked = [pool.submit(look, client, "What is this?", url), pool.submit(look, client, url, "And now?")]
        answers = [one.result() for one in asked]
        assert pictures[0].result() == cat
    for answer, text in zip(answers, ("What is this?\n{}", "{}\nAnd now?"), strict=True):
        placed = f"<begin_of_image>{'<image_placeholder>' * TOKENS}<end_of_image>"
        prompt = AutoTokenizer.from_pretrained(checkpoints["tiny-hf"]).encode(
            f"<|User|>: {text.format(placed)}\n\n<|Assistant|>:"
        )
        assert answer.prompt_token_ids == prompt
        assert answer.usage.prompt_tokens == len(prompt)
        ids = answer.choices[0].token_ids
        assert next_by_transformers(checkpoints["tiny-hf"], prompt, opened(cat), ids) == ids


class Gallery(BaseHTTPRequestHandler):
    """A host with one picture."""

    picture = b""

    def do_GET(self):
        found = self.path == "/cat.png"
        self.send_response(200 if found else 404)
        self.end_headers()
        self.wfile.write(self.picture if found else b"")

    def log_message(self, *_):
        pass


def test_a_picture_from_another_host(client, cat):
    """By vLLM's own loader."""
    Gallery.picture = base64.b64decode(cat)
    with ThreadingHTTPServer(("127.0.0.1", 0), Gallery) as host:
        threading.Thread(target=host.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{host.server_port}"
        sent = look(client, f"data:image/png;base64,{cat}", "What is this?")
        fetched = look(client, f"{url}/cat.png", "What is this?")
        assert fetched.choices[0].token_ids == sent.choices[0].token_ids
        with pytest.raises(openai.UnprocessableEntityError, match="404") as raised:  # vLLM's own answer
            look(client, f"{url}/dog.png")
        assert raised.value.body["param"] == "image_url"
        host.shutdown()


@pytest.mark.parametrize(
    ("parts", "parameter", "said"),
    [
        (["data:image/png;base64,AAAA"], "image_url", "cannot identify image file"),
        (["data:image/png;base64,!"], "image_url", "no picture to be had"),
        (["file:///etc/passwd"], "image_url", "--allowed-local-media-path"),
        (["cat " * 2000], "input_tokens", "maximum context length"),
    ],
)
def test_pictures_of_no_use_are_one_clear_400(client, cat, parts, parameter, said):
    with pytest.raises(openai.BadRequestError) as raised:
        look(client, f"data:image/png;base64,{cat}", *parts)
    assert raised.value.body["param"] == parameter
    assert said in raised.value.body["message"]
    assert "\n" not in raised.value.body["message"]
    assert png(client, seed=1) == cat


def test_arguments_that_mean_nothing_in_text_do_no_harm(client, cat):
    client.completions.create(
        model="janus", prompt="a", max_tokens=2, extra_body={"vllm_xargs": {"guidance_scale": 1e300}}
    )
    assert png(client, seed=1) == cat


def test_a_prompt_that_ends_in_begin_of_image_draws_through_completions(client):
    """Token ids for those who decode themselves; guidance through vllm_xargs, checked."""
    prompt = "<|User|>: a cat\n\n<|Assistant|>:<begin_of_image>"
    extra = {"return_token_ids": True, "vllm_xargs": {"guidance_scale": 2}}
    answer = client.completions.create(model="janus", prompt=prompt, extra_body=extra)
    ids = answer.choices[0].token_ids
    assert len(ids) == TOKENS
    assert min(ids) >= TINY.text_vocab
    extra["vllm_xargs"] = {"guidance_scale": 1e300}
    with pytest.raises(openai.BadRequestError, match="guidance_scale must be a number from 0 to 100"):
        client.completions.create(model="janus", prompt=prompt, extra_body=extra)
    for asked, extra, parameter in (
        ({"max_tokens": 3}, {}, "max_tokens"),
        ({"n": 1000}, {}, "n"),
        ({"max_tokens": TOKENS, "n": 4}, {"use_beam_search": True}, "max_tokens"),
        ({}, {"repetition_detection": {"max_pattern_size": 4, "min_count": 4}}, "repetition_detection"),
    ):
        with pytest.raises(openai.BadRequestError) as raised:
            client.completions.create(model="janus", prompt=prompt, extra_body=extra, **asked)
        checked(raised.value.body, "BadRequestError", 400, parameter)
        assert "(parameter=" not in raised.value.body["message"]  # `param` says it


def test_the_log_names_the_model_and_holds_no_tracebacks(image_server, client, cat):
    log = image_server.log.read_text(errors="replace")
    assert "Image model: 8 x 8 tokens a picture, 128 x 128 pixels, image ids from 640." in log
    assert "Traceback" not in log


# ---- other models

OTHER = """
import sys
from vllm.engine.arg_utils import EngineArgs
from vllm.plugins import load_endpoint_plugins, load_general_plugins
load_general_plugins()
config = EngineArgs(sys.argv[1], dtype="float32", skip_tokenizer_init=True).create_engine_config()
assert config.model_config.get_vocab_size() == 128
assert not config.model_config.logits_processors
assert config.scheduler_config.scheduler_cls is None
assert load_endpoint_plugins(("generate",)) == []
parts = ("attention", "cache", "serving", "admission", "guidance", "requests_v1", "heads")
own = [m for m in sys.modules if m.startswith("vllm_kvcompress.") and m.split(".")[1] in parts]
print("HEAVY", own + [m for m in sys.modules if m.startswith("vllm.benchmarks")])
print("PLUGIN", "vllm_kvcompress.plugin" in sys.modules)
"""


def test_other_models_are_left_alone(tmp_path):
    """No route, no scheduler, no logits processor, nothing in the log, nothing heavy imported."""
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64,
              "vocab_size": 128, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
              "max_position_embeddings": 256}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    done = subprocess.run(
        [sys.executable, "-c", OTHER, str(tmp_path)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    *noise, heavy, plugin = done.stdout.splitlines()
    assert (heavy, plugin) == ("HEAVY []", "PLUGIN True")
    log = "\n".join(noise) + done.stderr
    said = [line for line in log.splitlines() if "kvcompress" in line and "plugins/__init__" not in line]
    assert said == []
