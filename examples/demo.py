"""make demo: serve a small model on this machine, ask it for pictures, write out/demo.png, stop.

Nothing here is special to the demo: the server is ``vllm serve``, the client is the ``openai`` package.
"""

import base64
import io
import json
import time
from pathlib import Path
from typing import Annotated

import typer
from openai import OpenAI
from PIL import Image

from vllm_kvcompress.testing.server import Server, ServerError

GAP = 2  # pixels between pictures
ROOT = Path(__file__).resolve().parent.parent
SHAPES = ROOT / "examples" / "shapes" / "model"
SERVER_ARGS = (
    "--dtype", "float32", "--max-model-len", "1024", "--max-num-seqs", "16",
    "--kv-cache-memory-bytes", str(2**30), "--enforce-eager",
)  # fmt: skip


def contact_sheet(pictures: list[Image.Image]) -> Image.Image:
    """The pictures side by side, a little apart."""
    width, height = pictures[0].size
    step = width + GAP
    sheet = Image.new("RGB", (step * len(pictures) - GAP, height), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i * step, 0))
    return sheet


def stacked(rows: list[Image.Image]) -> Image.Image:
    """Rows of pictures under one another, a little apart."""
    width, height = rows[0].size
    sheet = Image.new("RGB", (width, (height + GAP) * len(rows) - GAP), "white")
    for i, row in enumerate(rows):
        sheet.paste(row, (0, i * (height + GAP)))
    return sheet


def draw(
    model: Path, log: Path, prompt: str, n: int, seed: int, compressed: bool, window: str = "auto"
) -> tuple[Image.Image, str]:
    """The pictures that a server draws, side by side, and what there is to say of them."""
    args = [*SERVER_ARGS, *(("--attention-backend", "kvcompress") if compressed else ())]
    if window != "auto":
        section = {"window": int(window) if window.isdigit() else window}
        args += ["--additional-config", json.dumps({"kvcompress": section})]
    print(f"Starting vllm serve {model} {' '.join(args[len(SERVER_ARGS) :])} (log: {log})", flush=True)
    try:
        with Server(model, log, args, name="demo") as server:
            client = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=600)
            began = time.perf_counter()
            answer = client.images.generate(model="demo", prompt=prompt, n=n, extra_body={"seed": seed})
            seconds = time.perf_counter() - began
    except ServerError as error:
        raise SystemExit(str(error)) from None
    pictures = [Image.open(io.BytesIO(base64.b64decode(item.b64_json or ""))) for item in answer.data or []]
    usage = answer.usage
    assert usage is not None
    cache = (usage.model_extra or {}).get("kv_cache") or {}
    lines = [
        f"pictures                   {len(pictures)} of {pictures[0].width} x {pictures[0].height} pixels",
        f"seconds                    {seconds:.2f}",
        f"image tokens per second    {usage.output_tokens / seconds:.0f}",
    ]
    if steps := (usage.model_extra or {}).get("steps"):
        lines.append(f"steps                      {steps} for {usage.output_tokens} image tokens")
    if cache:
        lines.append(f"KV bytes per image         {cache['resident_bytes'] / len(pictures):,.0f}")
    return contact_sheet(pictures), "\n".join(lines)


def main(
    prompt: str = "a big blue star on a striped yellow ground",
    seed: int = 0,
    n: int = 1,
    model: Path = SHAPES,
    output: Path = ROOT / "out" / "demo.png",
    compressed: Annotated[bool, typer.Option(help="serve with --attention-backend kvcompress")] = False,
    both: Annotated[bool, typer.Option(help="the full cache's row above the compressed one's")] = False,
    window: Annotated[str, typer.Option(help="tokens a step, 1 to 16; auto: what pays")] = "auto",
) -> None:
    """Draw PROMPT with a server started for the purpose."""
    output.parent.mkdir(parents=True, exist_ok=True)
    if not (model / "config.json").exists():
        from vllm_kvcompress.testing.checkpoints import SMALL_24, make_checkpoint

        print(f"{model} is not there: drawing with random weights, which is noise")
        model = make_checkpoint(output.parent / "random-model", layout="hf", geometry=SMALL_24, seed=0)
    print(f"prompt                     {prompt}")
    rows = []
    for with_backend in (False, True) if both else (compressed,):
        log = output.parent / f"demo-server{'-compressed' if with_backend else ''}.log"
        row, told = draw(model, log, prompt, n, seed, with_backend, window)
        print(told)
        rows.append(row)
    sheet = stacked(rows)
    # The demo model's pixels are few; shown as they are, they are a stamp.
    scale = max(1, 384 // rows[0].height)
    sheet.resize((sheet.width * scale, sheet.height * scale), Image.Resampling.NEAREST).save(output)
    print(f"written to                 {output}")


if __name__ == "__main__":
    typer.run(main)
