"""Clients as they are, asking a served model: what each sends unless told otherwise, and they themselves."""

import base64
import io
import json
import re
import shutil
import subprocess
from pathlib import Path

import httpx
import openai
import pytest
from PIL import Image

from vllm_kvcompress.testing.checkpoints import TINY

PATH = "/v1/images/generations"
HERE = Path(__file__).parent / "clients"
INSTALLED = Path(__file__).parents[1] / "out" / "clients"
RECORDED = json.loads((HERE / "bodies.json").read_text())
SIZE = f"{TINY.image_size}x{TINY.image_size}"


@pytest.fixture(scope="module")
def http(image_server):
    with httpx.Client(base_url=image_server.url, timeout=120) as client:
        yield client


def picture(text: str) -> Image.Image:
    """The file in a field that clients read: base64, or a data: URL."""
    file = re.sub("^data:image/png;base64,", "", text)
    opened = Image.open(io.BytesIO(base64.b64decode(file, validate=True)))
    opened.load()
    assert (opened.format, opened.size) == ("PNG", (TINY.image_size, TINY.image_size))
    return opened


@pytest.mark.parametrize("recorded", RECORDED, ids=lambda recorded: recorded["client"])
def test_what_clients_send_by_default_draws(http, recorded):
    answer = http.post(PATH, json=recorded["body"])
    assert answer.status_code == 200, answer.text
    told = answer.json()
    [drawn] = told["data"]
    assert list(drawn) == [recorded["reads"]]
    picture(drawn[recorded["reads"]])
    assert drawn.get("url", "data:image/png;base64,").startswith("data:image/png;base64,")
    assert (told["size"], told["output_format"], told["background"]) == (SIZE, "png", "opaque")
    noted = {note.split()[0] for note in told.get("notes", [])}
    own = {"model": "janus", "size": "auto", "style": None}
    asked = {name for name in own if recorded["body"].get(name, own[name]) != own[name]}
    assert noted == asked


def test_openai_python(image_server):
    with openai.OpenAI(base_url=f"{image_server.url}/v1", api_key="none", max_retries=0) as client:
        answer = client.images.generate(
            model="dall-e-3", prompt="a red apple", size="1792x1024", quality="hd", style="natural",
            response_format="b64_json", user="me", extra_body={"seed": 3},
        )  # fmt: skip
        picture(answer.data[0].b64_json)
        assert answer.data[0].url is None
        assert answer.notes == [  # type: ignore[attr-defined]
            f"size 1792x1024 is not to be had: pictures are {SIZE}",
            "quality 'hd' is not to be had: the model has one quality",
            "style has no effect: describe the style in the prompt",
            "model 'dall-e-3' is not served here: janus drew this",
        ]
        as_it_is = client.images.generate(model="janus", prompt="a red apple", extra_body={"seed": 3})
        assert as_it_is.data[0].b64_json == answer.data[0].b64_json
        assert not hasattr(as_it_is, "notes")
        for ask in (
            lambda: client.images.edit(image=b"x" * 5_000_000, prompt="a cat"),
            lambda: client.images.create_variation(image=b"x"),
        ):
            with pytest.raises(openai.BadRequestError, match="takes no picture to start from") as raised:
                ask()
            assert raised.value.param == "image"


def answers(command: list[str]) -> dict:
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_litellm_and_langchain_in_python(image_server):
    python = INSTALLED / "venv" / "bin" / "python"
    if not python.exists():
        pytest.skip("LITELLM AND LANGCHAIN WERE NOT RUN: tools/setup_clients.sh installs them")
    told = answers([str(python), str(HERE / "ask.py"), f"{image_server.url}/v1"])
    picture(told["b64_json"])
    picture(told["url"])
    picture(told["langchain"])
    assert "n must be less than or equal to 10, got 11" in told["refused"]


def test_openai_and_langchain_in_node(image_server):
    node = shutil.which("node")
    if node is None or not (INSTALLED / "node_modules" / "openai").exists():
        pytest.skip("THE NODE CLIENTS WERE NOT RUN: they take node and tools/setup_clients.sh")
    told = answers([node, str(HERE / "ask.mjs"), str(INSTALLED), f"{image_server.url}/v1"])
    picture(told["b64_json"])
    assert told["notes"] == ["model 'gpt-image-1' is not served here: janus drew this"]
    assert told["events"][-1] == "image_generation.completed"
    picture(told["last"])
    picture(told["url"])
    assert told["refused"] == ["BadRequestError", 400, "n"]
