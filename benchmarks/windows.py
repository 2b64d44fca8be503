"""What windows bring to the demo model over HTTP, and what a window step costs at Janus-Pro-1B's size.

    python benchmarks/windows.py served --pictures 1,8,32 -o out/windows      # both caches, half an hour
    python benchmarks/windows.py steps -o out/windows                         # four of 24 layers, minutes

Servers of all windows run at once, asked in turns, forwards and backwards: whatever else the machine
does meets all alike, and ratios are of the same turn. Acceptance at random weights means nothing:
``steps`` tells time only.
"""

import contextlib
import json
import os
import signal
import statistics
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import typer

SHAPES = Path(__file__).resolve().parent.parent / "examples" / "shapes" / "model"
WINDOWS = (1, 4, 8, 16, "auto")
app = typer.Typer(add_completion=False)


def prompts() -> list[str]:
    """Coloured shapes on grounds, in an order that mixes them."""
    colours = ["red", "green", "blue", "yellow", "orange", "purple", "white", "black"]
    every = [
        f"a {colour} {shape} on a {ground} ground"
        for colour in colours
        for shape in ("circle", "square", "triangle", "star")
        for ground in colours
        if ground != colour
    ]
    return [every[37 * i % len(every)] for i in range(len(every))]


def draw(url: str, number: int, seed: int) -> tuple[int, str]:
    """Steps of a picture, and the picture."""
    body = {"model": "shapes", "prompt": prompts()[number % 224], "seed": seed}
    request = urllib.request.Request(
        f"{url}/v1/images/generations", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    answer = json.load(urllib.request.urlopen(request, timeout=900))
    return answer["usage"]["steps"], answer["data"][0]["b64_json"]


@app.command()
def served(
    output: Annotated[Path, typer.Option("-o", help="folder for served.json")] = Path("out/windows"),
    pictures: Annotated[str, typer.Option(help="pictures at once, comma separated")] = "1,2,4,8,16,32",
    caches: Annotated[str, typer.Option(help="full, compressed")] = "full,compressed",
    repeats: int = 3,
) -> None:
    """Seconds, steps and ratios of the demo model over HTTP."""
    from vllm_kvcompress.testing.server import Server

    found: list[dict[str, Any]] = []
    output.mkdir(parents=True, exist_ok=True)
    for cache in caches.split(","):
        with contextlib.ExitStack() as stack:
            servers = {}
            for window in WINDOWS:
                args = [
                    "--dtype", "float32", "--max-model-len", "640", "--max-num-seqs", "32", "--enforce-eager",
                    "--kv-cache-memory-bytes", str(2**29),
                    "--additional-config", json.dumps({"kvcompress": {"window": window}}),
                    *(("--attention-backend", "kvcompress") if cache == "compressed" else ()),
                ]  # fmt: skip
                env = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(os.cpu_count() or 1)}
                server = Server(SHAPES, output / f"{cache}-{window}.log", args, name="shapes", env=env)
                servers[window] = stack.enter_context(server)
                draw(server.url, 0, 0)
                pause(server)
                stack.callback(pause, server, signal.SIGCONT)
            for count in map(int, pictures.split(",")):
                found += turns(cache, servers, count, repeats)
                (output / "served.json").write_text(json.dumps(found, indent=1))


def pause(server: Any, how: signal.Signals = signal.SIGSTOP) -> None:
    """Stop a server's processes, or let them go on: vLLM's workers spin while they wait."""
    os.killpg(server.process.pid, how)


def turns(cache: str, servers: dict[Any, Any], count: int, repeats: int) -> list[dict[str, Any]]:
    """All windows, in turns, with so many pictures at once."""
    urls = {window: server.url for window, server in servers.items()}
    seconds: dict[Any, list[float]] = {window: [] for window in urls}
    steps: dict[Any, list[int]] = {window: [] for window in urls}
    drawn: dict[Any, list[str]] = {window: [] for window in urls}
    for turn in range(repeats):
        for window in list(urls)[:: 1 if turn % 2 else -1]:
            pause(servers[window], signal.SIGCONT)
            began = time.perf_counter()
            with ThreadPoolExecutor(count) as pool:
                answers = list(pool.map(lambda n: draw(urls[window], n, 100 * turn + n), range(count)))  # noqa: B023
            seconds[window].append(time.perf_counter() - began)
            pause(servers[window])
            steps[window] += [answer[0] for answer in answers]
            drawn[window] += [answer[1] for answer in answers]
    rows = []
    for window in urls:
        ratios = sorted(a / b for a, b in zip(seconds[1], seconds[window], strict=True))
        row = {
            "cache": cache, "pictures": count, "window": window,
            "seconds": statistics.median(seconds[window]),
            "steps": statistics.median(steps[window]), "ratio": statistics.median(ratios),
            "least": ratios[0], "most": ratios[-1], "same": drawn[window] == drawn[1],
        }  # fmt: skip
        print(
            f"{cache:10} {count:2} pictures, window {window!s:4}: {row['seconds']:6.2f} s, "
            f"{count / row['seconds']:5.2f} pictures/s, {row['steps']:3.0f} steps, x{row['ratio']:.2f} "
            f"({row['least']:.2f}-{row['most']:.2f}), same pictures: {row['same']}",
            flush=True,
        )
        rows.append(row)
    return rows


@app.command()
def steps(
    output: Annotated[Path, typer.Option("-o", help="folder for steps.json")] = Path("out/windows"),
    model: Annotated[Path | None, typer.Option(help="another checkpoint")] = None,
    layers: int = 4,
    preset: Annotated[str, typer.Option(help="of the compressed cache")] = "fitted",
    pictures: str = "1,4,8",
    warm: Annotated[int, typer.Option(help="steps of one token before")] = 60,
    count: Annotated[int, typer.Option(help="steps timed, in each of three turns")] = 12,
) -> None:
    """Seconds of a step with windows, over those of a step without, at Janus-Pro-1B's sizes in bfloat16."""
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_OMP_THREADS_BIND="nobind", VLLM_LOGGING_LEVEL="ERROR"
    )
    from side_by_side.workloads import janus
    from vllm import LLM, SamplingParams

    from vllm_kvcompress.models.prompt import image_prompt_ids
    from vllm_kvcompress.models.registry import image_model
    from vllm_kvcompress.testing.checkpoints import make_checkpoint
    from vllm_kvcompress.testing.geometry import janus_pro_1b
    from vllm_kvcompress.windows.choice import WindowChoice

    output.mkdir(parents=True, exist_ok=True)
    compressed: dict[str, Any] = {"preset": preset, "budget": 0.2}
    if model is None:  # random weights: a made-up head profile, as the other benchmarks have
        compressed = janus("steps", layers, ()).settings(compressed)
        model = output / f"janus-1b-{layers}-layers"
    if not (model / "config.json").exists():
        make_checkpoint(model, layout="hf", geometry=janus_pro_1b(layers), seed=0)
    found, chosen = [], [1]
    WindowChoice.choose = lambda self, rows, others=0: chosen[0]  # type: ignore[method-assign]
    for backend in (None, "kvcompress"):
        section = {"window": "auto"} | (compressed if backend else {})
        llm = LLM(
            str(model), dtype="bfloat16", enforce_eager=True, max_model_len=640, max_num_seqs=8,
            kv_cache_memory_bytes=2**30, attention_backend=backend, additional_config={"kvcompress": section},
        )  # fmt: skip
        engine, image = llm.llm_engine, image_model(llm.llm_engine.model_config)
        prompt = image_prompt_ids(llm.get_tokenizer(), image, "a red bird by the sea")
        for rows in map(int, pictures.split(",")):
            names = [f"{backend} {rows} {n}" for n in range(rows)]
            for n, name in enumerate(names):
                params = SamplingParams(temperature=1.0, seed=n, detokenize=False)
                engine.add_request(name, {"prompt_token_ids": prompt}, params)
            for _ in range(warm):
                engine.step()
            taken: dict[int, list[float]] = {window: [] for window in (1, 4, 8, 16)}
            for turn in range(3):
                for window in list(taken)[:: 1 if turn % 2 else -1]:
                    chosen[0] = window
                    engine.step()
                    spent = []
                    for _ in range(count):
                        began = time.perf_counter()
                        engine.step()
                        spent.append(time.perf_counter() - began)
                    taken[window].append(statistics.median(spent))
            if engine.get_num_unfinished_requests() != rows:
                raise RuntimeError("pictures ended before their steps were timed: take fewer")
            engine.abort_request(names)
            engine.step()
            for window, spent in taken.items():
                ratios = sorted(a / b for a, b in zip(spent, taken[1], strict=True))
                row = {
                    "cache": backend or "full", "pictures": rows, "window": window, "layers": layers,
                    "ms": 1000 * statistics.median(spent), "ratio": statistics.median(ratios),
                    "least": ratios[0], "most": ratios[-1],
                }  # fmt: skip
                found.append(row)
                print(
                    f"{row['cache']:10} {rows} pictures, window {window:2}: {row['ms']:6.1f} ms, "
                    f"x{row['ratio']:.2f} ({row['least']:.2f}-{row['most']:.2f})",
                    flush=True,
                )
        (output / "steps.json").write_text(json.dumps(found, indent=1))
        del engine, llm


if __name__ == "__main__":
    app()
