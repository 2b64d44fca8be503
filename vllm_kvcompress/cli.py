"""``vllm-kvcompress``: head profiles, and what compression costs, from the command line.

Exit status 1: it could not be done, and one line on stderr says why; 2: the command line is wrong.
"""

import os
from collections.abc import Callable
from fractions import Fraction
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from vllm_kvcompress import __version__
from vllm_kvcompress.eval.command import evaluate
from vllm_kvcompress.heads.profile import HeadProfile
from vllm_kvcompress.models.convert import convert

if TYPE_CHECKING:
    import numpy as np

    from vllm_kvcompress.heads.prices import Price

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"vllm-kvcompress {__version__}")
        raise typer.Exit


@app.callback()
def _about(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show it and exit.")
    ] = False,
) -> None:
    """Compressed KV caches for image models on vLLM: measure attention heads, and look at them."""


@app.command()
def calibrate(
    model: Annotated[str, typer.Argument(help="Checkpoint folder, or name on the Hugging Face hub.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Profile to write (JSON).")],
    dtype: Annotated[str, typer.Option(help="As for vllm serve: auto, bfloat16, float16, float32.")] = "auto",
    force: Annotated[
        bool, typer.Option("--force", help="Measure again, even if this was done before.")
    ] = False,
    gpu_memory_utilization: Annotated[
        float | None, typer.Option(min=0, max=1, help="As for vllm serve: to run beside a server, less.")
    ] = None,
    kv_cache_memory_bytes: Annotated[
        int | None, typer.Option(min=1, help="As for vllm serve, instead; on CPUs 1 GiB if neither is given.")
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(help="WIDTHxHEIGHT, for models that draw more than one, as the server's."),
    ] = None,
) -> None:
    """Measure what each attention head of MODEL needs, with a full cache on built-in prompts.

    Without --force a profile that a server or an earlier run left in vLLM's cache directory is taken.
    Serve with it: --additional-config '{"kvcompress": {"head_profile": "profile.json"}}'
    """
    if output.is_dir():
        raise typer.BadParameter(f"{output} is a folder; name a file in it", param_hint="-o")
    existing = next(folder for folder in output.absolute().parents if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise typer.BadParameter(f"cannot write in {existing}", param_hint="-o")
    try:
        profile = _measure(model, dtype, force, gpu_memory_utilization, kv_cache_memory_bytes, size)
        profile.save(output)
    except Exception as error:
        _fail(error)
    spatial = int(profile.head_types().sum())
    heads = profile.layers * profile.kv_heads
    typer.echo(
        f"{output}: curves of {2 * heads} cache heads; by locality {spatial} spatial and {heads - spatial} "
        f"semantic heads, threshold {profile.threshold:.3f}. vllm-kvcompress inspect {output} shows what "
        "budgets cost"
    )


def _measure(
    model: str, dtype: Any, force: bool, utilization: float | None, memory: int | None, size: str | None
) -> HeadProfile:
    """Start an engine as a server would; it calibrates on its way up."""
    # In this process, so that its errors are exceptions rather than another process's traceback.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    import torch
    from vllm import LLM

    from vllm_kvcompress.config import BACKEND, KEY

    section = {"preset": "decoupled", "head_profile": "auto", "recalibrate": force, "size": size}
    room: dict[str, Any] = {}
    if utilization is not None:
        room["gpu_memory_utilization"] = utilization
    if memory is not None or (utilization is None and not torch.cuda.is_available()):
        room["kv_cache_memory_bytes"] = memory or 2**30
    llm = LLM(
        model=model,
        dtype=dtype,
        enforce_eager=True,
        attention_backend=BACKEND,
        additional_config={KEY: section},
        limit_mm_per_prompt={"image": 0},  # no chats here: the vision tower is not needed
        **room,
    )
    try:
        [profile] = llm.collective_rpc("kvcompress_head_profile")
    finally:
        llm.llm_engine.engine_core.shutdown()
    return HeadProfile.model_validate_json(profile)


@app.command()
def inspect(
    profile: Annotated[Path, typer.Argument(help="A head profile (JSON).")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Picture to write: .png, .svg or .pdf.")
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="One budget in full: a share such as 0.15 or 1/6, or auto.")
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Show locality instead: heads split here, not at the profile's."),
    ] = None,
) -> None:
    """Show what budgets cost on a model, and what each head gets; or its heads' locality.

    A table of budgets: predicted loss, KV bytes of a picture, pictures in a GiB. The picture shows layers and
    heads coloured by rule and size. Profiles without loss curves (format 1), and --threshold, show locality.
    """
    if budget is not None and threshold is not None:
        raise typer.BadParameter(
            "goes with the fit, --threshold with locality: give one", param_hint="--budget"
        )
    try:
        loaded = HeadProfile.load(profile)
        if loaded.curves is None or threshold is not None:
            if budget is not None:
                loaded.loss_curves  # noqa: B018 - raises: there are none
            _print(loaded, loaded.threshold if threshold is None else threshold)
            if output is not None:
                _draw(lambda: _plot().draw_profile(loaded, output, threshold), output)
            return
        _print_fit(loaded, budget, output)
    except (ValueError, OSError, ImportError) as error:
        _fail(error)


def _print_fit(profile: HeadProfile, budget: str | None, output: Path | None) -> None:
    from vllm_kvcompress.heads.prices import price, prices
    from vllm_kvcompress.policy import AUTO

    console = Console(highlight=False)
    if budget is None:
        shown = prices(profile)
    else:
        shown = [price(profile, AUTO if budget == AUTO else _share(budget))]
    console.print(f"{profile.model or 'an unnamed model'}: preset fitted", markup=False)
    table = Table("budget", "predicted loss", "MiB a picture", "smaller", "pictures in a GiB")
    for column in table.columns:
        column.justify = "right"
    for one in shown:
        table.add_row(
            f"{one.budget:.3g}",
            f"{one.assignment.loss:.2g}",
            f"{one.resident / 2**20:.2f}",
            f"{one.full / one.resident:.1f}x",
            f"{one.in_a_gib}",
        )
    console.print(table)
    drawn = shown[0] if budget is not None else min(shown, key=lambda one: abs(one.budget - 0.2))
    console.print(f"at {drawn.budget:.3g}: {drawn.types}", markup=False, soft_wrap=True)
    if budget is not None:
        _print_heads(drawn, profile.kv_heads, console)
    if output is not None:
        curve = shown if budget is None else prices(profile)
        _draw(lambda: _plot().draw_fit(profile, drawn, curve, output), output)


def _print_heads(shown: "Price", kv_heads: int, console: Console) -> None:
    """Layers and heads, a letter for each type."""
    letters = "abcdef"
    table = Table("layer", "conditional", "unconditional")
    for layer, row in enumerate(shown.assignment.types):
        text = "".join(letters[kind] for kind in row)
        table.add_row(str(layer), text[:kv_heads], text[kv_heads:])
    console.print(table)
    rules = zip(letters, shown.assignment.rules, strict=False)
    console.print("; ".join(f"{letter} {rule.name}" for letter, rule in rules), markup=False)


def _share(text: str) -> float:
    """``"0.15"`` or ``"1/6"``. Raises ValueError, one line."""
    try:
        return float(Fraction(text.strip()))
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"budget: {text!r} is neither a share such as 0.15 or 1/6, nor auto") from None


def _plot() -> Any:
    from vllm_kvcompress.heads import plot

    return plot


def _print(profile: HeadProfile, threshold: float) -> None:
    import numpy as np

    spatial, scores = profile.head_types(threshold), np.array(profile.scores)
    table = Table("layer", "spatial", "semantic", "mean score", "heads: █ semantic, · spatial")
    for column in table.columns[:4]:
        column.justify = "right"
    table.columns[4].no_wrap = True
    for layer, row in enumerate(spatial):
        table.add_row(
            str(layer),
            *_counts(row),
            f"{scores[layer].mean():.3f}",
            "".join("█·"[s] for s in row.astype(int)),
        )
    table.add_section()
    table.add_row("all", *_counts(spatial), f"{scores.mean():.3f}", "")
    console = Console(highlight=False)
    for line in (
        f"{profile.model or 'an unnamed model'}: {profile.metric}",
        f"neighbourhood: the {profile.neighbourhood} image tokens before",
        f"threshold: {threshold:.3f}, semantic above; scores {scores.min():.3f} to {scores.max():.3f}",
    ):
        console.print(line, markup=False)
    console.print(table)


def _counts(spatial: "np.ndarray") -> tuple[str, str]:
    return str(int(spatial.sum())), str(int((~spatial).sum()))


def _draw(draw: Callable[[], None], path: Path) -> None:
    try:
        draw()
    except ImportError as error:
        if (error.name or "").split(".")[0] != "matplotlib":
            raise
        raise ImportError("a picture needs matplotlib: pip install 'vllm-kvcompress[plot]'") from None
    typer.echo(f"picture: {path}")


@wraps(evaluate)
def _evaluate(**arguments: Any) -> None:
    try:
        evaluate(**arguments)
    except ImportError as error:
        if (error.name or "").split(".")[0] not in ("cv2", "matplotlib"):
            raise
        _fail(ImportError("eval needs OpenCV and matplotlib: pip install 'vllm-kvcompress[eval]'"))
    except (ValueError, OSError) as error:
        _fail(error)


app.command("eval")(_evaluate)


@wraps(convert)
def _convert(**arguments: Any) -> None:
    try:
        convert(**arguments)
    except (ValueError, OSError) as error:
        _fail(error)


app.command("convert")(_convert)


@app.command()
def doctor() -> None:
    """Say what would run on this machine, and what would not. Put it into a bug report."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm_kvcompress.doctor import report

    typer.echo("\n".join(report()))


def _fail(error: Exception) -> NoReturn:
    """One line on stderr, exit status 1."""
    details = getattr(error, "errors", None)  # pydantic's: the message proper is inside
    message = details()[0]["msg"].removeprefix("Value error, ") if callable(details) else str(error)
    first = next((line.strip() for line in message.splitlines() if line.strip()), type(error).__name__)
    typer.echo(f"vllm-kvcompress: {first}", err=True)
    raise typer.Exit(1)


def main() -> None:
    """Entry point of the ``vllm-kvcompress`` command."""
    app()
