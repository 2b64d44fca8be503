"""Asking a server for pictures over HTTP, and reading what it answers."""

import base64
import io
import json
from typing import Any

import httpx
import numpy as np
from PIL import Image

PATH = "/v1/images/generations"


def asked(http: httpx.Client, prompt: str, **fields: Any) -> dict[str, Any]:
    """The answer to a request that must succeed."""
    answer = http.post(PATH, json={"prompt": prompt, **fields})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def pixels(b64: str) -> np.ndarray:
    """int ``[height, width, 3]`` of an encoded file."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(b64))).convert("RGB")).astype(int)


def picture(http: httpx.Client, prompt: str, **fields: Any) -> np.ndarray:
    """The pixels of the one picture asked for."""
    return pixels(asked(http, prompt, **fields)["data"][0]["b64_json"])


def refused(http: httpx.Client, **fields: Any) -> tuple[str, str]:
    """Parameter and message of a 400."""
    answer = http.post(PATH, json=fields)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, 400), answer.text
    return error["param"], error["message"]


def check_draws_alone(http: httpx.Client, model: str) -> None:
    """Of a server that writes no text: completions and chats are a 400 that says so, and it goes on."""
    words = http.post("/v1/completions", json={"model": model, "prompt": "Hello"})
    assert words.status_code == 400
    assert "this model draws pictures and writes no text: ask /v1/images/generations" in words.text
    for text, said in (("Hello", "and does not chat"), ("warmup", "and writes no text")):  # vLLM's trial
        chat = http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": text}]})
        assert (chat.status_code, f"draws pictures {said}" in chat.text) == (400, True), chat.text
    assert asked(http, "a cat")["data"], "and the server goes on"


def streamed(http: httpx.Client, prompt: str, **fields: Any) -> list[dict[str, Any]]:
    """The events of a stream."""
    with http.stream("POST", PATH, json={"prompt": prompt, "stream": True, **fields}) as answer:
        assert answer.status_code == 200
        lines = [line[5:] for line in answer.iter_lines() if line.startswith("data:")]
    return [json.loads(line) for line in lines if line.strip() != "[DONE]"]
