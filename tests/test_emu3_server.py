"""``vllm serve`` of an Emu3 folder over HTTP: sizes to choose from, the model's own texts, streams."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import dense_emu3
import httpx
import numpy as np
import preloaded
import pytest
from images_http import asked, check_draws_alone, picture, pixels, refused, streamed
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
        "--additional-config", '{"kvcompress": {"sizes": ["28x16", "12x24", "20x20"]}}',
    )  # fmt: skip
    folder = make_emu3(root / "model", in_memory=True)
    with (
        Server(folder, root / "server.log", args, name="emu3", start=preloaded.Popen) as server,
        httpx.Client(base_url=server.url, timeout=120) as client,
    ):
        yield client, folder, root / "server.log"


@pytest.fixture
def http(served: tuple[httpx.Client, Path, Path]) -> httpx.Client:
    return served[0]


def expected(
    folder: Path, prompt: str, negative: str, scale: float = 3.0, lines: int = LINES, columns: int = COLUMNS
) -> tuple[np.ndarray, int, int]:
    """Pixels of transformers' greedy picture, and tokens of the two prompts, each read in one piece."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids, unwanted = (
        tokenizer.encode(f"<|extra_203|>{text}<|image start|>{lines}*{columns}<|image token|>").ids
        for text in (prompt, negative)
    )
    tokens = dense_emu3.greedy(folder, ids, unwanted, scale, lines, columns)
    return dense_emu3.pixels(folder, tokens, lines, columns).int().numpy(), len(ids), len(unwanted)


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
    assert "Traceback" not in said
    assert "branches are of unlike length, which vLLM's attention backends can't do" in said
    assert "kvcompress: preset full" in said
    assert "Image model: 4 x 8 tokens a picture, 28 x 16 pixels" in said
    assert "Sizes that requests may choose: 28x16, 12x24, 20x20; the first is the default." in said


def test_a_stream_shows_whole_lines_and_ends_in_the_same_picture(http: httpx.Client) -> None:
    *partial, last = streamed(http, "a dog", seed=5, partial_lines=1)
    assert last["type"] == "image_generation.completed"
    assert (pixels(last["b64_json"]) == picture(http, "a dog", seed=5)).all()
    assert partial
    assert {pixels(event["b64_json"]).shape for event in partial} == {(16, 28, 3)}


@pytest.mark.parametrize(("size", "drawn"), [("12x24", "12x24"), ("1024x1024", "20x20"), ("28x16", "28x16")])
def test_a_request_chooses_its_size(served: tuple[httpx.Client, Path, Path], size: str, drawn: str) -> None:
    """One that is listed is drawn; of another the nearest in shape, and the answer says so."""
    http, folder, _ = served
    width, height = map(int, drawn.split("x"))
    wanted, ids, _ = expected(folder, "a small cat", "blurry", 3.0, height // 4, width // 4)
    short = {"temperature": 0, "default_texts": False, "negative_prompt": "blurry"}
    answer = asked(http, "a small cat", size=size, **short)
    found = pixels(answer["data"][0]["b64_json"])
    assert found.shape == (height, width, 3)
    assert np.abs(found - wanted).max() <= 1
    assert answer["size"] == drawn
    assert answer["usage"]["output_tokens"] == height // 4 * (width // 4 + 1)
    assert answer["usage"]["input_tokens"] == ids
    note = f"pictures are 28x16, 12x24, 20x20, of which {drawn} is the nearest in shape"
    assert answer.get("notes") == (None if size == drawn else [f"size {size} is not to be had: {note}"])


def test_a_stream_of_another_size_shows_its_own_lines(http: httpx.Client) -> None:
    """Beside pictures of the other sizes."""
    with ThreadPoolExecutor(3) as pool:
        others = [pool.submit(picture, http, "a dog", seed=5, size=size) for size in ("28x16", "20x20")]
        *partial, last = streamed(http, "a dog", seed=5, size="12x24", partial_lines=1, kept=True)
        shapes = [other.result().shape for other in others]
    assert (last["type"], last["size"]) == ("image_generation.completed", "12x24")
    assert (pixels(last["b64_json"]) == picture(http, "a dog", seed=5, size="12x24")).all()
    assert partial
    assert {(event["size"], pixels(event["b64_json"]).shape) for event in partial} == {("12x24", (24, 12, 3))}
    assert shapes == [(16, 28, 3), (20, 20, 3)]
    kept = [event["kept"] for event in partial if "kept" in event]
    assert kept
    assert {(one["lines"], one["columns"], len(one["types"][0]["percent"])) for one in kept} == {(6, 3, 18)}
    assert all(set(one["types"][0]["percent"][: one["drawn"]]) == {100} for one in kept), (
        "it keeps everything"
    )


def test_a_prompt_in_tokens_says_its_size(served: tuple[httpx.Client, Path, Path]) -> None:
    http, folder, _ = served
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

    def completed(grid: str, **fields: Any) -> httpx.Response:
        ids = tokenizer.encode(f"<|extra_203|>a cat<|image start|>{grid}<|image token|>").ids
        return http.post("/v1/completions", json={"model": "emu3", "prompt": ids, **fields})

    for grid, tokens in (("6*3", 24), ("5*5", 30)):
        answer = completed(grid, max_tokens=tokens)
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["completion_tokens"] == tokens
        short = completed(grid, max_tokens=tokens - 1)
        assert (short.status_code, f"the picture takes {tokens}" in short.text) == (400, True)
    unknown = completed("9*9")
    assert unknown.status_code == 400
    assert all(size in unknown.json()["error"]["message"] for size in ("28x16", "12x24", "20x20"))


def test_what_can_not_be_is_a_400_in_one_line(http: httpx.Client) -> None:
    assert refused(http, prompt="a" * 4000, default_texts=False)[0] == "prompt"
    assert refused(http, prompt="a cat", negative_prompt="a" * 4000)[0] == "negative_prompt"
    check_draws_alone(http, "emu3")
