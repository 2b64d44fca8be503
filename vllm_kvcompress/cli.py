"""``vllm-kvcompress``: head profiles, and what compression costs, from the command line.

Exit status 1: it could not be done, and one line on stderr says why; 2: the command line is wrong.
"""

import os
from collections.abc import Iterator
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer

from vllm_kvcompress import __version__
from vllm_kvcompress.config import CompressionConfig
from vllm_kvcompress.eval.command import evaluate
from vllm_kvcompress.heads.inspected import budget_of, print_fit, print_locality
from vllm_kvcompress.heads.prices import ITEM_BYTES, Served
from vllm_kvcompress.heads.profile import HeadProfile
from vllm_kvcompress.models.convert import convert
from vllm_kvcompress.policy import AUTO, MAX_TYPES, TOLERANCE, Policy

FEWEST_PROMPTS, MOST_PROMPTS = 4, 1024  # of calibrate --prompts

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
        int | None, typer.Option(min=1, help="As for vllm serve, instead; 1 GiB if neither is given.")
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(help="WIDTHxHEIGHT, for models that draw more than one, as the server's."),
    ] = None,
    budgets: Annotated[
        str | None,
        typer.Option(
            help="Budgets whose fits are tried: shares such as 0.2 or 1/6, or auto, by commas; else 0.2, or "
            "a line where that is more."
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="Text file of your own prompts, one a line, such as the model will be asked."),
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(min=0, max=100, help="Guidance scale of your requests; else the model's own."),
    ] = None,
) -> None:
    """Measure what each attention head of MODEL needs, with a full cache on prompts: built-in ones, or yours.

    Then several fits for each of the budgets are tried on the pictures that were drawn; a server does that
    for its own budget at its first start.

    Without --force or --prompts a profile that the model brings, or that a server or an earlier run left in
    vLLM's cache directory, is taken.
    Serve with it: --additional-config '{"kvcompress": {"head_profile": "profile.json"}}', or leave it beside
    the model's weights as head_profile.json: whoever serves the model gets it.
    """
    if output.is_dir():
        raise typer.BadParameter(f"{output} is a folder; name a file in it", param_hint="-o")
    existing = next(folder for folder in output.absolute().parents if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise typer.BadParameter(f"cannot write in {existing}", param_hint="-o")
    try:
        wanted = None if budgets is None else [budget_of(one) for one in budgets.split(",") if one.strip()]
        for one in wanted or ():
            Policy("fitted", one)  # raises on what is out of range
        own = None if prompts is None else _lines_of(prompts)
        room = (gpu_memory_utilization, kv_cache_memory_bytes)
        for profile in _measure(model, dtype, force, room, size, wanted, own, guidance, output):
            profile.save(output)  # what is measured stays, if a budget can't be had
    except Exception as error:
        _fail(error)
    spatial = int(profile.head_types().sum())
    heads = profile.layers * profile.kv_heads
    typer.echo(
        f"{output}: curves of {2 * heads} cache heads; by locality {spatial} spatial and {heads - spatial} "
        f"semantic heads, threshold {profile.threshold:.3f}. vllm-kvcompress inspect {output} shows what "
        "budgets cost"
    )


def _lines_of(path: Path) -> list[str]:
    """The prompts of a text file. Raises ValueError, one line, where it has too few or too many."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"prompts: cannot read {path}: {error}") from error
    if not FEWEST_PROMPTS <= len(lines) <= MOST_PROMPTS:
        raise ValueError(f"prompts: {path} has {len(lines)}, give {FEWEST_PROMPTS} to {MOST_PROMPTS}")
    return lines


def _measure(
    model: str, dtype: Any, force: bool, room: tuple[float | None, int | None], size: str | None,
    budgets: list[float | Literal["auto"]] | None, prompts: list[str] | None, guidance: float | None,
    output: Path,
) -> Iterator[HeadProfile]:  # fmt: skip
    """Start an engine as a server would; it calibrates on its way up. Then again, with fits tried.

    With own prompts it has no head to tell from another on its way up, and measures then.
    """
    # In this process, so that its errors are exceptions rather than another process's traceback.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM

    from vllm_kvcompress.config import BACKEND, KEY
    from vllm_kvcompress.room import sharing

    budget = _least_budget(model, size)
    section: dict[str, Any] = {"preset": "line_ar", "budget": budget, "size": size}
    if prompts is None:
        section |= {"preset": "decoupled", "recalibrate": force}
    utilization, memory = room
    options: dict[str, Any] = {}
    if utilization is not None:
        options["gpu_memory_utilization"] = utilization
    if memory is not None or utilization is None:
        options["kv_cache_memory_bytes"] = memory or 2**30  # nothing is served: fits are tried in the rest
    if guidance is not None:
        options["override_generation_config"] = {"guidance_scale": guidance}
    llm = LLM(
        model=model,
        dtype=dtype,
        enforce_eager=True,
        attention_backend=BACKEND,
        additional_config={KEY: section},
        limit_mm_per_prompt={"image": 0},  # no chats here: the vision tower is not needed
        **sharing(options),
    )
    source = "" if prompts is None else str(output.absolute())  # where the first is saved before the second
    try:
        if prompts is None:
            [profile] = llm.collective_rpc("kvcompress_head_profile")
        else:
            [profile] = llm.collective_rpc("kvcompress_calibrate", args=(prompts,))
        yield HeadProfile.model_validate_json(profile)
        wanted = [budget] if budgets is None else budgets
        if wanted:
            [profile] = llm.collective_rpc("kvcompress_head_profile", args=(wanted, source))
            yield HeadProfile.model_validate_json(profile)
    finally:
        llm.llm_engine.engine_core.shutdown()


def _least_budget(model: str, size: str | None) -> float:
    """A server's default budget, or a line of pictures that have fewer than five: of a folder's model.

    No published model has so few, and the hub need not be asked.
    """
    from vllm_kvcompress.eval.engine import described

    default = CompressionConfig().budget
    assert default != AUTO
    if not Path(model).is_dir():
        return default
    try:
        return max(default, 1 / described(model, size)[1].raster.lines)
    except Exception:  # the engine says what is wrong with the model
        return default


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
    max_types: Annotated[
        int, typer.Option(min=1, max=MAX_TYPES, help="Head types at most, as the server's max_types.")
    ] = MAX_TYPES,
    tolerance: Annotated[
        float | None, typer.Option(help="With --budget auto, as the server's tolerance.")
    ] = None,
    kv_cache_dtype: Annotated[
        str | None, typer.Option(help=f"As for vllm serve: {', '.join(ITEM_BYTES)}; else the profile's.")
    ] = None,
    tensor_parallel_size: Annotated[
        int, typer.Option(min=1, help="As for vllm serve; bytes and pictures are then one rank's.")
    ] = 1,
) -> None:
    """Show what budgets cost on a model, and what each head gets; or its heads' locality.

    A table of budgets: predicted loss, KV bytes of a picture, pictures in a GiB; and what fits that were
    tried cost. The picture shows layers and heads coloured by rule and size. Profiles without loss curves
    (format 1), and --threshold, show locality. Other settings than a server's defaults are to be named: they
    are part of a fit, and of what was tried.
    """
    if output is not None and output.is_dir():
        raise typer.BadParameter(f"{output} is a folder; name a file in it", param_hint="-o")
    if budget is not None and threshold is not None:
        raise typer.BadParameter(
            "goes with the fit, --threshold with locality: give one", param_hint="--budget"
        )
    if tolerance is not None and (budget or "").strip() != AUTO:
        raise typer.BadParameter("goes with --budget auto only", param_hint="--tolerance")
    if tolerance is not None and not 0 < tolerance < float("inf"):
        raise typer.BadParameter(f"{tolerance}; need a number above 0", param_hint="--tolerance")
    if kv_cache_dtype not in (None, AUTO, *ITEM_BYTES):
        raise typer.BadParameter(
            f"{kv_cache_dtype!r}; one of {AUTO}, {', '.join(ITEM_BYTES)}", param_hint="--kv-cache-dtype"
        )
    served = Served(
        max_types,
        TOLERANCE if tolerance is None else tolerance,
        None if kv_cache_dtype == AUTO else kv_cache_dtype,
        tensor_parallel_size,
    )
    try:
        loaded = HeadProfile.load(profile)
        if loaded.curves is None or threshold is not None:
            if budget is not None:
                loaded.loss_curves  # noqa: B018 - raises: there are none
            print_locality(loaded, threshold, output)
        else:
            print_fit(loaded, budget, output, served)
    except (ValueError, OSError, ImportError) as error:
        _fail(error)


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
