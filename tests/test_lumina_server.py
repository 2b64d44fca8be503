"""``vllm serve`` of a converted Lumina-mGPT over HTTP: tokens, pixels, guidance away from a text, streams."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import preloaded
import pytest
import torch
from dense_lumina import DenseLumina, full
from dense_vq import DenseTaming
from images_http import asked, check_draws_alone, picture, pixels, refused, streamed
from typer.testing import CliRunner

from vllm_kvcompress.cli import app
from vllm_kvcompress.testing.lumina import (
    LuminaGeometry,
    build_tokenizer,
    decoder_state,
    vocabulary_of,
    vq_state,
    write_sources,
)
from vllm_kvcompress.testing.server import Server

GEOMETRY = LuminaGeometry()
GRIDS = {"32x16": (4, 8), "16x24": (6, 4)}  # lines and codes a line, of 4 pixels each


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[httpx.Client, Path]]:
    """Converted and served as a user does who names no backend; client and log."""
    root = tmp_path_factory.mktemp("lumina-server")
    model, vq, words = write_sources(root, GEOMETRY)
    command = ["convert", str(model), "-o", str(root / "served"), "--vq", str(vq), "--tokenizer", str(words)]
    assert CliRunner().invoke(app, command).exit_code == 0
    args = (
        "--dtype", "float32", "--kv-cache-memory-bytes", str(2**26), "--enforce-eager",
        "--additional-config", '{"kvcompress": {"sizes": ["32x16", "16x24"]}}',
    )  # fmt: skip
    with (
        Server(root / "served", root / "log", args, name="lumina", start=preloaded.Popen) as server,
        httpx.Client(base_url=server.url, timeout=120) as client,
    ):
        yield client, root / "log"


@pytest.fixture
def http(served: tuple[httpx.Client, Path]) -> httpx.Client:
    return served[0]


def branch(text: str | None, size: str) -> list[int]:
    """A branch's prompt: of a text, or that of no text at all."""
    vocabulary = vocabulary_of(GEOMETRY.codes)
    units = [f"<reserved{8800 + tokens // 2:05d}>" for tokens in GRIDS[size]]
    begin = [vocabulary[token] for token in ("<racm3:break>", *units)]
    if text is None:
        return begin
    words = f"Generate an image of {size} according to the following prompt:\n{text}"
    ids = build_tokenizer(GEOMETRY.codes).encode(words).ids
    return [vocabulary["<s>"], *ids, vocabulary["<reserved08706>"], *begin]


@pytest.mark.parametrize(
    ("fields", "negative", "scale"),
    [
        ({}, None, 4.0),
        ({"negative_prompt": ""}, None, 4.0),
        ({"negative_prompt": "blurry", "guidance_scale": 2.5}, "blurry", 2.5),
        ({"guidance_scale": 1}, None, 1.0),
        ({"size": "16x24", "negative_prompt": "blurry"}, "blurry", 4.0),
    ],
)
def test_a_greedy_picture_is_the_references(
    http: httpx.Client, fields: dict, negative: str | None, scale: float
) -> None:
    """Its own guidance and size where a request says none; an empty negative prompt is none."""
    answer = asked(http, "a small cat", temperature=0, **fields)
    dense, vocabulary = DenseLumina(decoder_state(GEOMETRY), GEOMETRY.heads), vocabulary_of(GEOMETRY.codes)
    size = fields.get("size", "32x16")
    (lines, columns), ids = GRIDS[size], branch("a small cat", size)
    tokens = lines * (columns + 1)
    drawn, lead = dense.draw((ids, branch(negative, size)), scale, GRIDS[size], vocabulary, full(tokens))
    assert lead > 1e-4, "no draw was a matter of rounding"
    first = vocabulary["IMGIMGAZ"]
    codes = [n - first for place, n in enumerate(drawn) if place % (columns + 1) < columns]
    wanted = DenseTaming(vq_state(GEOMETRY)).decode(torch.tensor([codes]), lines)[0]
    wanted = ((wanted.clamp(-1, 1) + 1) / 2 * 255).permute(1, 2, 0)
    shown = pixels(answer["data"][0]["b64_json"])
    assert shown.shape == (4 * lines, 4 * columns, 3)
    assert np.abs(shown - wanted.floor().numpy()).max() <= 1
    assert shown.std() > 20, "a picture, not a flat field"
    assert (answer["usage"]["input_tokens"], answer["usage"]["output_tokens"]) == (len(ids), tokens)
    assert answer["size"] == size


def test_the_models_own_defaults(http: httpx.Client) -> None:
    """Guidance 4 among all codes, of which there are fewer than 2000; no texts of its own."""
    own = picture(http, "a dog", seed=5)
    assert (own == picture(http, "a dog", seed=5, guidance_scale=4, top_k=2000, default_texts=False)).all()
    assert (own != picture(http, "a dog", seed=5, guidance_scale=3)).any()


def test_a_stream_shows_whole_lines_and_ends_in_the_same_picture(http: httpx.Client) -> None:
    *partial, last = streamed(http, "a dog", seed=5, partial_lines=1)
    assert last["type"] == "image_generation.completed"
    assert (pixels(last["b64_json"]) == picture(http, "a dog", seed=5)).all()
    assert partial
    assert {pixels(event["b64_json"]).shape for event in partial} == {(16, 32, 3)}


def test_what_can_not_be_is_a_400_in_one_line(served: tuple[httpx.Client, Path]) -> None:
    http, log = served
    assert refused(http, prompt="a" * 4000)[0] == "prompt"
    assert refused(http, prompt="a cat", negative_prompt="a" * 4000)[0] == "negative_prompt"
    check_draws_alone(http, "lumina")
    said = log.read_text(errors="replace")
    assert "Traceback" not in said
    assert "branches are of unlike length, which vLLM's attention backends can't do" in said
    assert "Image model: 4 x 9 tokens a picture, 32 x 16 pixels" in said
