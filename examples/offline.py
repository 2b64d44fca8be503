"""A picture without a server: LLM.generate, then pixels.

python examples/offline.py MODEL "a red circle" -o picture.png     # of LlamaGen, a class: "golden retriever"
"""

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from PIL import Image
from vllm import LLM, SamplingParams

from vllm_kvcompress.config import Limits
from vllm_kvcompress.eval.engine import sizes
from vllm_kvcompress.models.registry import family_of, image_model
from vllm_kvcompress.room import sharing

BLOCK = 256  # tokens of a block of vLLM's cache, and more than that: one is never given to a request


def main(
    model: Annotated[str, typer.Argument(help="checkpoint folder or hub name")],
    prompt: Annotated[str, typer.Argument(help="what to draw")],
    output: Annotated[Path, typer.Option("-o", help="PNG to write")] = Path("out/offline.png"),
    seed: int = 0,
    guidance_scale: Annotated[float | None, typer.Option(help="else the model's own")] = None,
    compressed: Annotated[bool, typer.Option(help="with --attention-backend kvcompress")] = False,
    gpu_memory_utilization: Annotated[
        float | None, typer.Option(help="as for vllm serve: to run beside a server, less")
    ] = None,
    kv_cache_memory_bytes: Annotated[
        int | None,
        typer.Option(help="as for vllm serve, instead; on CPUs what a picture takes, 1 GiB at least"),
    ] = None,
) -> None:
    """Draw PROMPT with MODEL."""
    # One picture with the longest prompt that is let in: vLLM wants memory for the whole context, and
    # published ones are long.
    length, token = None, 0
    try:
        if Path(model).exists() or "/" in model:
            length, token = sizes(model, prompt=Limits().prompt_tokens)
    except (ValueError, OSError) as error:
        if Path(model).exists():
            raise typer.BadParameter(str(error), param_hint="model") from None
        # What is wrong with a repository or the hub, vLLM says.
    room: dict[str, Any] = {"kv_cache_memory_bytes": kv_cache_memory_bytes}
    if gpu_memory_utilization is not None:
        room["gpu_memory_utilization"] = gpu_memory_utilization
    elif kv_cache_memory_bytes is None and not torch.cuda.is_available():
        # vLLM would take most of the machine's memory.
        room["kv_cache_memory_bytes"] = max(2**30, ((length or 0) + BLOCK) * token)
    llm = LLM(
        model,
        attention_backend="kvcompress" if compressed else None,
        enforce_eager=True,
        max_num_seqs=1,
        max_model_len=length,
        **sharing(room),
    )
    image = image_model(llm.model_config)
    try:
        ids = family_of(llm.model_config.hf_config).prompt_ids(
            llm.get_tokenizer(), image, prompt + image.suffix
        )
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="prompt") from None
    scale = image.guidance_scale if guidance_scale is None else guidance_scale
    params = SamplingParams(seed=seed, top_k=image.top_k, extra_args={"guidance_scale": scale})
    drawn = llm.generate({"prompt_token_ids": ids}, params)[0].outputs[0].token_ids
    codes = [image.code(token) for token in image.raster.cells(drawn)]  # ends of lines are no codes
    width, height, pixels = llm.collective_rpc("kvcompress_decode_image", args=(codes,))[0]
    output.parent.mkdir(parents=True, exist_ok=True)
    Image.frombytes("RGB", (width, height), pixels).save(output)
    print(f"{len(codes)} image tokens -> {output}")


if __name__ == "__main__":
    typer.run(main)
