"""``vllm-kvcompress``: head profiles, and what compression costs, from the command line.

Exit status 1: it could not be done, and one line on stderr says why; 2: the command line is wrong.
"""

import os
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from vllm_kvcompress import __version__
from vllm_kvcompress.eval.command import evaluate
from vllm_kvcompress.heads.profile import HeadProfile

if TYPE_CHECKING:
    import numpy as np

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
) -> None:
    """Measure which attention heads of MODEL look far, with a full cache on built-in prompts.

    Without --force a profile that a server or an earlier run left in vLLM's cache directory is taken.
    Serve with it: --additional-config '{"kvcompress": {"head_profile": "profile.json"}}'
    """
    if output.is_dir():
        raise typer.BadParameter(f"{output} is a folder; name a file in it", param_hint="-o")
    existing = next(folder for folder in output.absolute().parents if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise typer.BadParameter(f"cannot write in {existing}", param_hint="-o")
    try:
        profile = _measure(model, dtype, force)
        profile.save(output)
    except Exception as error:
        _fail(error)
    spatial = int(profile.head_types().sum())
    semantic = profile.layers * profile.kv_heads - spatial
    typer.echo(
        f"{output}: {spatial} spatial and {semantic} semantic heads, threshold {profile.threshold:.3f}"
    )


def _measure(model: str, dtype: Any, force: bool) -> HeadProfile:
    """Start an engine as a server would; it calibrates on its way up."""
    # In this process, so that its errors are exceptions rather than another process's traceback.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM

    from vllm_kvcompress.config import BACKEND, KEY

    section = {"preset": "decoupled", "head_profile": "auto", "recalibrate": force}
    llm = LLM(
        model=model,
        dtype=dtype,
        enforce_eager=True,
        attention_backend=BACKEND,
        additional_config={KEY: section},
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
    threshold: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Split heads here instead of at the profile's threshold."),
    ] = None,
) -> None:
    """Show a head profile: heads of each type per layer, and a picture of the scores."""
    try:
        loaded = HeadProfile.load(profile)
        _print(loaded, loaded.threshold if threshold is None else threshold)
        if output is not None:
            _draw(loaded, output, threshold)
    except (ValueError, OSError, ImportError) as error:
        _fail(error)


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


def _draw(profile: HeadProfile, path: Path, threshold: float | None) -> None:
    from vllm_kvcompress.heads.plot import draw_profile

    try:
        draw_profile(profile, path, threshold)
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
