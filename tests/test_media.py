"""Where the server fetches a chat's pictures from: vLLM's loader, with vLLM's own options."""

from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from PIL import Image
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.media.connector import MediaConnector

from vllm_kvcompress.patches import media


@pytest.fixture
def host(tmp_path: Path) -> Iterator[str]:
    """The address of a host that has one picture."""
    Image.new("RGB", (3, 2), "red").save(tmp_path / "cat.png")

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            served.append(self.path)

    served: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path)))
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    assert served == ["/cat.png"], "nobody else was asked"


def test_only_named_hosts_are_asked(host: str) -> None:
    media.apply()
    loader = MediaConnector(allowed_media_domains=["127.0.0.1"])
    assert loader.fetch_image(f"http://{host}/cat.png").media.size == (3, 2)
    for other in (f"http://localhost:{host.split(':')[1]}/cat.png", "http://127.0.0.1@localhost/cat.png"):
        with pytest.raises(VLLMValidationError, match="must be from one of the allowed domains") as raised:
            loader.fetch_image(other)
        assert raised.value.parameter == "image_url"
    for file in ("file:///etc/passwd", "ftp://127.0.0.1/cat.png"):
        with pytest.raises(VLLMValidationError):
            loader.fetch_image(file)
