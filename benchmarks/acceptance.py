"""Steps per picture with windows: by cache, guidance, temperature, window and drafts, beside the entropy.

    python benchmarks/acceptance.py      # the demo model, a quarter of an hour on one core
    python benchmarks/acceptance.py --caches full,0.2 --windows 8 --temperatures 1.5,2,3,4,6
    python benchmarks/acceptance.py --caches full --windows 8,16 --drafts ours,above,left,above-alone

Counts, not times: a busy machine gives the same. What a draft's chance is depends on how sure the model is of
its next token, so every line says how many nats its distributions have, as the pictures were drawn
one token a step; those pictures are also what every window must draw again, token by token.
"""

import itertools
import json
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import torch
import typer
from windows import SHAPES, prompts

FULL = "full"  # vLLM's own attention
OURS = "ours"
ALONE = "-alone"  # of drafts: nothing is kept of the last pass
BACK: dict[str, Callable[[int], int]] = {
    "above": lambda line: line,
    "left": lambda line: 1,
    "two-above": lambda line: 2 * line,
}
DRAFTS = (OURS, *BACK, *(name + ALONE for name in BACK))
app = typer.Typer(add_completion=False)


def start(model: str, cache: str, preset: str, pictures: int) -> Any:
    """An ``LLM`` in this process that draws so many pictures at once, in windows of any length.

    ``cache``: ``full``, vLLM's own, or a budget of ``preset``, as a number or a fraction.
    """
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_OMP_THREADS_BIND="nobind", VLLM_LOGGING_LEVEL="ERROR"
    )
    from fractions import Fraction

    from vllm import LLM

    section: dict[str, Any] = {"window": "auto", "window_rows": pictures}
    if cache != FULL:
        section |= {"preset": preset, "budget": float(Fraction(cache))}
    return LLM(
        model, dtype="float32", enforce_eager=True, max_model_len=640, max_num_seqs=pictures,
        max_num_batched_tokens=4096, kv_cache_memory_bytes=(pictures + 1) * 2**25,
        attention_backend=None if cache == FULL else "kvcompress", additional_config={"kvcompress": section},
    )  # fmt: skip


@contextmanager
def windows_of(places: int, drafts: str = OURS) -> Iterator[None]:
    """Steps of engines here have so many places a row, filled by this kind of drafts."""
    from vllm_kvcompress.windows.choice import WindowChoice
    from vllm_kvcompress.windows.drawing import Drawing

    if drafts not in DRAFTS:
        raise typer.BadParameter(f"no drafts {drafts}; there are {', '.join(DRAFTS)}")
    settle = Drawing.settle

    def forget(self: Any, *args: Any) -> int:
        stands = settle(self, *args)
        self._kept = []
        return stands

    def habit(self: Any, recent: Sequence[int]) -> int:
        back = BACK[drafts.removesuffix(ALONE)](self.line)
        return back if back <= len(recent) else 1  # the first line has nothing above

    with ExitStack() as stack:
        patched = [mock.patch.object(WindowChoice, "choose", return_value=places)]
        if drafts != OURS:
            patched.append(mock.patch.object(Drawing, "_habit", habit))
        if drafts.endswith(ALONE):
            patched.append(mock.patch.object(Drawing, "settle", forget))
        for patch in patched:
            stack.enter_context(patch)
        yield


@contextmanager
def tempered(llm: Any, temperature: float) -> Iterator[list[float]]:
    """Divide logits by what the sampler does not; give the nats of what is drawn from.

    The list grows by the entropy of every distribution: guided, over image tokens, at the whole temperature.
    """
    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    model, found, left = runner.get_model(), [], sampled_at(temperature)
    compute, image = model.compute_logits, model.rows.model

    def watched(*args: Any, **kwargs: Any) -> Any:
        logits = compute(*args, **kwargs).div_(temperature / left)  # in place: it is marked
        codes = logits if logits.shape[-1] == image.choices else image.among(logits)
        found.extend(torch.distributions.Categorical(logits=codes.double() / left).entropy().tolist())
        return logits

    with mock.patch.object(model, "compute_logits", watched):
        yield found


def sampled_at(temperature: float) -> float:
    """What vLLM's sampler is asked for: it takes 2 at most."""
    return min(temperature, 2.0)


def draw(
    llm: Any, asked: Sequence[Sequence[int]], guidance: float, temperature: float
) -> tuple[list[list[int]], list[int]]:
    """Token ids of the pictures, all drawn at once, and the steps that each took."""
    from vllm import SamplingParams

    from vllm_kvcompress.scheduler import REPORT

    params = [
        SamplingParams(
            temperature=sampled_at(temperature),
            seed=n,
            detokenize=False,
            extra_args={"guidance_scale": guidance},
        )
        for n in range(len(asked))
    ]
    done = llm.generate([{"prompt_token_ids": list(ids)} for ids in asked], params, use_tqdm=False)
    tokens = [list(out.outputs[0].token_ids) for out in done]
    return tokens, [out.kv_transfer_params[REPORT]["steps"] for out in done]


def measure(
    llm: Any, asked: Sequence[Sequence[int]], windows: Sequence[int], drafts: Sequence[str],
    guidance: float, temperature: float,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """A record for each window and kind of drafts. RuntimeError if a window draws another picture."""
    with windows_of(1), tempered(llm, temperature) as nats:
        wanted, _ = draw(llm, asked, guidance, temperature)
    if len(nats) != sum(map(len, wanted)):
        raise RuntimeError(f"{len(nats)} distributions for {sum(map(len, wanted))} tokens")
    for kind, window in itertools.product(drafts, windows):
        with windows_of(window, kind), tempered(llm, temperature):
            drawn, steps = draw(llm, asked, guidance, temperature)
        if drawn != wanted:
            raise RuntimeError(f"windows of {window}, drafts {kind}: other pictures than one by one")
        yield {
            "guidance": guidance, "temperature": temperature, "drafts": kind, "window": window,
            "tokens": len(wanted[0]), "steps": steps,
            "nats_mean": statistics.mean(nats), "nats_median": statistics.median(nats),
        }  # fmt: skip


def table(found: Sequence[dict[str, Any]]) -> str:
    """Markdown: a line for each cache, guidance, temperature and kind of drafts, a column for each window."""
    windows = sorted({record["window"] for record in found})
    lines = [
        "| cache | guidance | temperature | drafts | nats a token, mean (median) | "
        + " | ".join(f"window {n}" for n in windows) + " |",
        "| --- " * (5 + len(windows)) + "|",
    ]  # fmt: skip
    keys = ("cache", "guidance", "temperature", "drafts", "nats_mean", "nats_median")
    for key, records in itertools.groupby(found, lambda record: tuple(record[name] for name in keys)):
        cache, guidance, temperature, drafts, mean, median = key
        steps = {record["window"]: sorted(record["steps"]) for record in records}
        cells = [
            f"{statistics.median(steps[n]):.0f} ({steps[n][0]}-{steps[n][-1]})" if n in steps else ""
            for n in windows
        ]
        said = [cache, f"{guidance:g}", f"{temperature:g}", drafts, f"{mean:.2g} ({median:.2g})", *cells]
        lines.append(f"| {' | '.join(said)} |")
    return "\n".join(lines)


def numbers(text: str) -> list[float]:
    """Those in a list with commas."""
    return [float(part) for part in text.split(",")]


@app.command()
def acceptance(
    output: Annotated[Path, typer.Option("-o", help="file of the records")] = Path(
        "out/windows/acceptance.json"
    ),
    model: Annotated[str, typer.Option(help="a checkpoint that draws from sentences")] = str(SHAPES),
    preset: Annotated[str, typer.Option(help="of the caches that compress")] = "fitted",
    caches: Annotated[str, typer.Option(help="full: vLLM's own; else budgets")] = "full,1,0.5,0.2,1/6",
    guidance: str = "1.5,5",
    temperatures: str = "1",
    windows: str = "4,8,16",
    drafts: Annotated[str, typer.Option(help=f"beyond the last pass's samples: {', '.join(DRAFTS)}")] = OURS,
    pictures: Annotated[int, typer.Option(help="at once, of one coloured shape each, seeds from 0")] = 16,
) -> None:
    """Steps a picture, median (least to most)."""
    found: list[dict[str, Any]] = []
    output.parent.mkdir(parents=True, exist_ok=True)
    for cache in caches.split(","):
        llm = start(model, cache, preset, pictures)
        from vllm_kvcompress.eval.engine import asking

        asked = asking(llm, prompts()[:pictures])
        for scale, temperature in itertools.product(numbers(guidance), numbers(temperatures)):
            places = [int(n) for n in windows.split(",")]
            for record in measure(llm, asked, places, drafts.split(","), scale, temperature):
                found.append({"cache": cache, "preset": preset if cache != FULL else "", **record})
                print(json.dumps(found[-1]), flush=True)
            output.write_text(json.dumps(found, indent=1) + "\n")
        del llm
    print(table(found))


if __name__ == "__main__":
    app()
