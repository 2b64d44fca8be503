"""make demo: serve a small model on this machine, ask it for pictures, write out/demo.png, stop.

Nothing here is special to the demo: the server is ``vllm serve``, the client is the ``openai`` package.
"""

import base64
import io
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


def main(
    prompt: str = "a big blue star on a striped yellow ground",
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
    log = output.parent / "demo-server.log"
    print(f"Starting vllm serve {model} (log: {log})")
    args = [*SERVER_ARGS, *(("--attention-backend", "kvcompress") if compressed else ())]
    try:
        with Server(model, log, args, name="demo") as server:
            client = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=600)
            began = time.perf_counter()
            answer = client.images.generate(model="demo", prompt=prompt, n=n, extra_body={"seed": seed})
            seconds = time.perf_counter() - began
    except ServerError as error:
        raise SystemExit(str(error)) from None
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
