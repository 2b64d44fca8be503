"""``vllm serve`` of a converted LlamaGen: classes by name and number over HTTP."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import preloaded
import pytest
import torch
from dense_llamagen import DenseLlamaGen, full
from dense_vq import DenseVQ
from images_http import asked, picture, pixels, refused, streamed

from vllm_kvcompress.testing.llamagen import LlamaGenGeometry, decoder_state, make_llamagen, vq_state
from vllm_kvcompress.testing.server import Server

GEOMETRY = LlamaGenGeometry(classes=1000, grid=6)
RETRIEVER, GOLDFISH = 207, 1


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llamagen(tmp_path_factory.mktemp("llamagen") / "model", GEOMETRY)


@pytest.fixture(scope="module")
def http(served: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    root = tmp_path_factory.mktemp("llamagen-server")
    args = ("--dtype", "float32", "--kv-cache-memory-bytes", str(2**26), "--enforce-eager")
    with (
        Server(served, root / "server.log", args, name="llamagen", start=preloaded.Popen) as server,
        httpx.Client(base_url=server.url, timeout=120) as client,
    ):
        yield client


@pytest.mark.parametrize("negative", [None, "goldfish"])
def test_a_greedy_picture_is_the_references(http: httpx.Client, negative: str | None) -> None:
    """A name, guidance away from no class or from a class, tokens, pixels: all of it, within a level."""
    more = {} if negative is None else {"negative_prompt": negative}
    answer = asked(http, "golden retriever", temperature=0, guidance_scale=3, **more)
    dense = DenseLlamaGen(decoder_state(GEOMETRY), GEOMETRY.heads, GEOMETRY.grid)
    codes, lead = dense.draw(
        RETRIEVER, 3.0, full(GEOMETRY.tokens), negative=None if negative is None else GOLDFISH
    )
    assert lead > 1e-4, "no draw was a matter of rounding"
    expected = DenseVQ(vq_state(GEOMETRY)).decode(torch.tensor([codes]), GEOMETRY.grid)[0]
    expected = ((expected + 1) / 2 * 255).clamp(0, 255).permute(1, 2, 0)
    drawn = pixels(answer["data"][0]["b64_json"])
    assert drawn.shape == (96, 96, 3)
    assert np.abs(drawn - expected.floor().numpy()).max() <= 1
    assert drawn.std() > 20, "a picture, not a flat field"
    assert (answer["usage"]["input_tokens"], answer["usage"]["output_tokens"]) == (1, GEOMETRY.tokens)
    assert answer["size"] == "96x96"


def test_a_class_by_name_and_by_number_is_one_picture(http: httpx.Client) -> None:
    named, numbered = (picture(http, prompt, seed=5) for prompt in ("Golden retriever", "207"))
    assert (named == numbered).all()
    assert (named != picture(http, "208", seed=5)).any()
    assert (named != picture(http, "207", seed=6)).any()


def test_the_models_own_defaults(http: httpx.Client) -> None:
    """generation_config.json's guidance where a request says none."""
    assert (picture(http, "207", seed=5) == picture(http, "207", seed=5, guidance_scale=4)).all()
    assert (picture(http, "207", seed=5) != picture(http, "207", seed=5, guidance_scale=1)).any()


def test_an_unknown_class_is_a_400_with_near_matches(http: httpx.Client) -> None:
    parameter, message = refused(http, prompt="golden retreiver")
    assert parameter == "prompt"
    assert message.startswith("the model has no class 'golden retreiver'")
    assert "near: golden retriever (207)" in message
    assert refused(http, prompt="1000") == ("prompt", "there is no class 1000: classes are 0 to 999")
    parameter, message = refused(http, prompt="207", negative_prompt="gold fish")
    assert (parameter, "near: goldfish (1)" in message) == ("negative_prompt", True)
    parameter, message = refused(http, prompt="a golden retriever on a beach", stream=True)
    assert (parameter, "golden retriever (207)" in message) == ("prompt", True)


def test_a_stream_ends_in_the_same_picture(http: httpx.Client) -> None:
    events = streamed(http, "207", seed=5, partial_images=2)
    *partial, last = events
    assert last["type"] == "image_generation.completed"
    assert {event["type"] for event in partial} <= {"image_generation.partial_image"}
    assert (pixels(last["b64_json"]) == picture(http, "207", seed=5)).all()


def test_text_is_refused_in_one_line(http: httpx.Client) -> None:
    """The other routes: a class by its exact name draws, anything else says what to ask."""
    chat = http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "Hello"}]})
    assert chat.status_code == 400, chat.text
    assert "draws pictures and does not chat: ask /v1/images/generations" in chat.text
    url = "data:image/png;base64,iVBORw0KGgo="
    asked = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]
    shown = http.post("/v1/chat/completions", json={"messages": asked})
    assert (shown.status_code, shown.json()["error"]["param"]) == (400, "image_url")
    assert "is not a multimodal model" in shown.text
    words = http.post("/v1/completions", json={"prompt": "Hello"})
    assert words.status_code == 400, words.text
    assert "the prompt must be one class" in words.text
    drawn = http.post("/v1/completions", json={"prompt": "golden retriever"})
    assert drawn.json()["usage"]["completion_tokens"] == GEOMETRY.tokens


def test_the_benchmark_client_asks_for_classes(http: httpx.Client, served: Path, tmp_path: Path) -> None:
    """As docs/models.md says: a data set whose prompts are classes."""
    prompts = ["golden retriever", "1", "goldfish"]
    (tmp_path / "classes.jsonl").write_text("".join(json.dumps({"prompt": one}) + "\n" for one in prompts))
    done = preloaded.run(
        [
            str(Path(sys.executable).with_name("vllm")), "bench", "serve", "--backend", "openai-images",
            "--endpoint", "/v1/images/generations", "--base-url", str(http.base_url), "--model", "llamagen",
            "--tokenizer", str(served), "--dataset-name", "custom", "--dataset-path", "classes.jsonl",
            "--skip-chat-template", "--num-prompts", "3", "--save-result", "--result-filename", "out.json",
        ],
        tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    result = json.loads((tmp_path / "out.json").read_text())
    assert (result["completed"], result["failed"]) == (3, 0)
    assert result["total_output_tokens"] == 3 * GEOMETRY.tokens
