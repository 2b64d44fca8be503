"""make demo: serve a small model on this machine, ask it for pictures, write out/demo.png, stop.

Nothing here is special to the demo: the server is ``vllm serve``, the client is the ``openai`` package.
"""

import base64
import io
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Annotated

import typer
from openai import OpenAI
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
SHAPES = ROOT / "examples" / "shapes" / "model"
START_LIMIT_S = 240


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(model: Path, port: int, log: Path, extra: list[str]) -> subprocess.Popen:
    """``vllm serve`` in a process group of its own, its output in ``log``."""
    command = [
        str(Path(sys.executable).with_name("vllm")), "serve", str(model),
        "--served-model-name", "demo", "--host", "127.0.0.1", "--port", str(port),
        "--max-model-len", "1024", "--max-num-seqs", "16", "--kv-cache-memory-bytes", str(2**30),
        "--enforce-eager", *extra,
    ]  # fmt: skip
    with log.open("w") as out:
        return subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)


def wait(server: subprocess.Popen, port: int, log: Path) -> None:
    """Until the server answers; exits with the end of its log if it does not."""
    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline and server.poll() is None:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.3)
    tail = "\n".join(log.read_text().splitlines()[-25:])
    raise SystemExit(f"{tail}\n\nThe server did not start; its whole log is {log}.")


def stop(server: subprocess.Popen) -> None:
    """The server and every process it started."""
    for sign in (signal.SIGINT, signal.SIGKILL):
        try:
            os.killpg(server.pid, sign)
            server.wait(30)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue
        return


def contact_sheet(pictures: list[Image.Image]) -> Image.Image:
    """The pictures side by side."""
    width, height = pictures[0].size
    sheet = Image.new("RGB", (width * len(pictures), height))
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i * width, 0))
    return sheet


def main(
    prompt: str = "a big red circle left of a small blue square on a striped yellow ground",
    seed: int = 0,
    n: int = 1,
    model: Path = SHAPES,
    output: Path = ROOT / "out" / "demo.png",
    compressed: Annotated[bool, typer.Option(help="serve with --attention-backend kvcompress")] = False,
) -> None:
    """Draw PROMPT with a server started for the purpose."""
    output.parent.mkdir(parents=True, exist_ok=True)
    if not (model / "config.json").exists():
        from vllm_kvcompress.testing.checkpoints import SMALL_24, make_checkpoint

        print(f"{model} is not there: drawing with random weights, which is noise")
        model = make_checkpoint(output.parent / "random-model", layout="hf", geometry=SMALL_24, seed=0)
    port, log = free_port(), output.parent / "demo-server.log"
    print(f"Starting vllm serve {model} (log: {log})")
    server = start(model, port, log, ["--attention-backend", "kvcompress"] if compressed else [])
    try:
        wait(server, port, log)
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        began = time.perf_counter()
        answer = client.images.generate(model="demo", prompt=prompt, n=n, extra_body={"seed": seed}, timeout=600)
        seconds = time.perf_counter() - began
    finally:
        stop(server)
    pictures = [Image.open(io.BytesIO(base64.b64decode(item.b64_json or ""))) for item in answer.data or []]
    sheet = contact_sheet(pictures)
    # The demo model's pixels are few; shown as they are, they are a stamp.
    scale = max(1, 384 // sheet.height)
    sheet.resize((sheet.width * scale, sheet.height * scale), Image.Resampling.NEAREST).save(output)
    usage = answer.usage
    assert usage is not None
    cache = (usage.model_extra or {}).get("kv_cache") or {}
    print(f"prompt                     {prompt}")
    print(f"pictures                   {len(pictures)} of {pictures[0].width} x {pictures[0].height} pixels")
    print(f"seconds                    {seconds:.2f}")
    print(f"image tokens per second    {usage.output_tokens / seconds:.0f}")
    if cache:
        print(f"KV bytes per image         {cache['resident_bytes'] / len(pictures):,.0f}")
    print(f"written to                 {output}")


if __name__ == "__main__":
    typer.run(main)
