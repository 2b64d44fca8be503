"""Clients of a real server, each in its thread: what every one of them was told, and when."""

import json
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import httpx

PATH = "/v1/images/generations"


@dataclass
class Told:
    """What one client heard.

    ``status`` is None where the connection broke before an answer. ``pictures`` are whole ones, base64;
    ``error`` is the message of an answer or of an event.
    """

    asked: dict[str, Any]
    status: int | None = None
    pictures: list[str] = field(default_factory=list)
    partials: int = 0
    error: str | None = None
    broke: str | None = None
    sent: bool = False
    ended: float = 0.0

    @property
    def whole(self) -> bool:
        """Whether it got what it asked for."""
        return self.status == 200 and len(self.pictures) == self.asked.get("n", 1) and self.error is None

    @property
    def clean(self) -> bool:
        """Whether it got that, or a message that says why not."""
        return self.whole or (self.broke is None and bool(self.error) and "\n" not in (self.error or ""))


def ask(
    url: str,
    limit_s: float = 60,
    told: Told | None = None,
    client: httpx.Client | None = None,
    **fields: Any,
) -> Told:
    """One request, to its end; ``told`` is filled on the way. A client is slow to make on a busy machine."""
    told = told or Told(fields)

    def trace(event: str, info: Any) -> None:
        told.sent |= event.endswith("send_request_body.complete")

    try:
        with (
            client or httpx.Client(verify=False, timeout=limit_s) as client,
            client.stream(
                "POST", url + PATH, json={"prompt": "a red bird", **fields}, extensions={"trace": trace}
            ) as answer,
        ):
            told.status = answer.status_code
            if answer.status_code == 200 and fields.get("stream"):
                for line in answer.iter_lines():
                    if line.startswith("data: "):
                        _hear(told, json.loads(line.removeprefix("data: ")))
            else:
                body = json.loads(answer.read())
                told.pictures = [picture["b64_json"] for picture in body.get("data", ())]
                told.error = body["error"]["message"] if "error" in body else None
    except (httpx.HTTPError, json.JSONDecodeError) as error:
        told.broke = f"{type(error).__name__}: {error}"
    told.ended = time.monotonic()
    return told


def _hear(told: Told, event: dict[str, Any]) -> None:
    if event["type"] == "error":
        told.error = event["error"]["message"]
    elif event["type"] == "image_generation.completed":
        told.pictures.append(event["b64_json"])
    else:
        told.partials += 1


class Crowd:
    """Requests that run beside each other; ``told`` is in their order, complete after ``wait``."""

    def __init__(self, url: str, requests: list[dict[str, Any]], limit_s: float = 60) -> None:
        self.told = [Told(fields) for fields in requests]
        # Made first: on a busy machine a server answers faster than clients are made.
        clients = [httpx.Client(verify=False, timeout=limit_s) for _ in requests]
        self._threads = [
            threading.Thread(target=ask, args=(url, limit_s, told, client), kwargs=told.asked, daemon=True)
            for told, client in zip(self.told, clients, strict=True)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def unanswered(self) -> int:
        """Clients that still wait."""
        return sum(told.ended == 0 for told in self.told)

    def wait_sent(self) -> None:
        """Until all requests have left."""
        while not all(told.sent or told.ended for told in self.told):
            time.sleep(0.01)

    def wait_heard(self) -> None:
        """Until somebody has heard something: an answer or a partial picture."""
        while not any(told.partials or told.ended for told in self.told):
            time.sleep(0.01)

    def wait(self) -> list[Told]:
        """What all were told."""
        for thread in self._threads:
            thread.join()
        return self.told


def wait_taken(url: str) -> None:
    """Until a server's one front end has read all that was sent to it before, in turn, and let it in."""
    httpx.get(f"{url}/health", timeout=60)
    time.sleep(0.2)


MIXED = [
    {"seed": 1},
    {"seed": 1, "n": 2},
    {"seed": 5, "stream": True},
    {"seed": 6, "stream": True, "partial_images": 3},
    {"seed": 7, "n": 10},
    {"seed": 8, "n": 10},
    {"seed": 2, "stream": True, "partial_images": 2},
    {"seed": 9, "stream": True, "partial_lines": 1, "kept": True},
]


WORDS = 60


class Writer:
    """A client that waits for a text of `WORDS` tokens; it has asked when this is made."""

    def __init__(self, url: str, limit_s: float = 60) -> None:
        sent = threading.Event()
        self._answer: dict[str, Any] = {}
        self._thread = threading.Thread(target=self._ask, args=(url, limit_s, sent), daemon=True)
        self._thread.start()
        assert sent.wait(limit_s)

    def _ask(self, url: str, limit_s: float, sent: threading.Event) -> None:
        asked = {"model": "janus", "prompt": "a bird", "max_tokens": WORDS, "ignore_eos": True}
        told = {"trace": lambda event, _: event.endswith("send_request_body.complete") and sent.set()}
        with httpx.Client(timeout=limit_s) as client:
            self._answer = client.post(f"{url}/v1/completions", json=asked, extensions=told).json()

    def hear(self) -> dict[str, Any]:
        """The whole answer."""
        self._thread.join()
        return self._answer

    def wait(self) -> int:
        """Tokens that it was answered with."""
        self._thread.join()
        assert "usage" in self._answer, self._answer
        return int(self._answer["usage"]["completion_tokens"])
