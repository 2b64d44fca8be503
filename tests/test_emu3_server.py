"""``vllm serve`` of an Emu3 folder over HTTP: a size that is set, the model's own texts, streams."""

from collections.abc import Iterator
from pathlib import Path

import dense_emu3
import httpx
import numpy as np
import pytest
from images_http import asked, picture, pixels, refused, streamed
from tokenizers import Tokenizer

from vllm_kvcompress.models.emu3.family import NEGATIVE, SUFFIX
from vllm_kvcompress.testing.emu3 import make_emu3
from vllm_kvcompress.testing.server import Server

LINES, COLUMNS = 4, 7


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[httpx.Client, Path, Path]]:
    """Started as a user does who names no backend; client, folder and log."""
    root = tmp_path_factory.mktemp("emu3-server")
    args = (
        "--dtype", "float32", "--kv-cache-memory-bytes", str(2**26), "--enforce-eager",
        "--additional-config", '{"kvcompress": {"size": "28x16"}}',
    )  # fmt: skip
    folder = make_emu3(root / "model", in_memory=True)
    with (
        Server(folder, root / "server.log", args, name="emu3") as server,
        httpx.Client(base_url=server.url, timeout=120) as client,
    ):
        yield client, folder, root / "server.log"


@pytest.fixture
def http(served: tuple[httpx.Client, Path, Path]) -> httpx.Client:
    return served[0]


def expected(folder: Path, prompt: str, negative: str, scale: float = 3.0) -> tuple[np.ndarray, int, int]:
    """Pixels of transformers' greedy picture, and tokens of the two prompts, each read in one piece."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids, unwanted = (
        tokenizer.encode(f"<|extra_203|>{text}<|image start|>{LINES}*{COLUMNS}<|image token|>").ids
        for text in (prompt, negative)
    )
    tokens = dense_emu3.greedy(folder, ids, unwanted, scale, LINES, COLUMNS)
    return dense_emu3.pixels(folder, tokens, LINES, COLUMNS).int().numpy(), len(ids), len(unwanted)


@pytest.mark.parametrize(
    ("fields", "suffix", "negative"),
    [
        ({}, SUFFIX, NEGATIVE),
        ({"default_texts": False}, "", ""),
        ({"negative_prompt": "blurry"}, SUFFIX, "blurry"),
        ({"negative_prompt": ""}, SUFFIX, ""),
        ({"default_texts": False, "negative_prompt": "blurry"}, "", "blurry"),
    ],
)
def test_a_greedy_picture_is_transformers(
    served: tuple[httpx.Client, Path, Path], fields: dict, suffix: str, negative: str
) -> None:
    """Tokens and pixels, with and without the model's own texts."""
    http, folder, _ = served
    answer = asked(http, "a small cat", temperature=0, **fields)
    drawn, (wanted, ids, unwanted) = (
        pixels(answer["data"][0]["b64_json"]),
        expected(folder, "a small cat" + suffix, negative),
    )
    assert drawn.shape == (16, 28, 3)
    assert np.abs(drawn - wanted).max() <= 1
    assert drawn.std() > 20, "a picture, not a flat field"
    tokens = LINES * (COLUMNS + 1)  # ends of lines are drawn too
    assert (answer["usage"]["input_tokens"], answer["usage"]["output_tokens"]) == (max(ids, unwanted), tokens)
    assert answer["size"] == "28x16"


def test_no_guidance_needs_no_negative_prompt(served: tuple[httpx.Client, Path, Path]) -> None:
    http, folder, _ = served
    wanted, ids, _ = expected(folder, "a small cat", "", 1.0)
    answer = asked(http, "a small cat", temperature=0, guidance_scale=1, default_texts=False)
    assert np.abs(pixels(answer["data"][0]["b64_json"]) - wanted).max() <= 1
    assert answer["usage"]["input_tokens"] == ids


def test_the_log_says_what_was_decided(served: tuple[httpx.Client, Path, Path]) -> None:
    said = served[2].read_text(errors="replace")
    assert "branches are of unlike length, which vLLM's attention backends can't do" in said
    assert "kvcompress: preset full" in said
    assert "Image model: 4 x 8 tokens a picture, 28 x 16 pixels" in said


def test_a_stream_shows_whole_lines_and_ends_in_the_same_picture(http: httpx.Client) -> None:
    *partial, last = streamed(http, "a dog", seed=5, partial_lines=1)
    assert last["type"] == "image_generation.completed"
    assert (pixels(last["b64_json"]) == picture(http, "a dog", seed=5)).all()
    assert partial
    assert {pixels(event["b64_json"]).shape for event in partial} == {(16, 28, 3)}


def test_another_size_is_noted(http: httpx.Client) -> None:
    answer = asked(http, "a dog", size="1024x1024")
    assert answer["notes"] == ["size 1024x1024 is not to be had: pictures are 28x16"]


def test_what_can_not_be_is_a_400_in_one_line(http: httpx.Client) -> None:
    assert refused(http, prompt="a" * 4000, default_texts=False)[0] == "prompt"
    assert refused(http, prompt="a cat", negative_prompt="a" * 4000)[0] == "negative_prompt"
    words = http.post("/v1/completions", json={"model": "emu3", "prompt": "Hello"})
    assert words.status_code == 400
    assert "this model draws pictures and writes no text: ask /v1/images/generations" in words.text
    chat = http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "Hello"}]})
    assert (chat.status_code, "draws pictures and does not chat" in chat.text) == (400, True)
    assert asked(http, "a cat")["data"], "and the server goes on"
