"""Command line: run, report, claim."""

import json
import os
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)
console = Console()


class Mode(StrEnum):
    """How much is measured."""

    quick = "quick"
    full = "full"
    tiny = "tiny"
    tiny_more = "tiny-more"


@app.command()
def run(
    mode: Annotated[Mode, typer.Argument(help="quick: half an hour on two cores; full: hours; tiny*: tests")],
    only: Annotated[str, typer.Option(help="groups to run, with commas between: bars,memory,http,...")] = "",
    minutes: Annotated[float, typer.Option(help="begin nothing after so many; 0: no limit")] = 0,
    threads: Annotated[int, typer.Option(help="of every contender; 0: all cores")] = 0,
    output: Annotated[Path | None, typer.Option(help="results file")] = None,
    fresh: Annotated[bool, typer.Option(help="do not go on with an unfinished run")] = False,
) -> None:
    """Measure what is missing, then write the report and the plots."""
    threads = threads or os.cpu_count() or 1
    # Before torch is loaded, here and in the contenders' processes.
    from side_by_side.workloads import OUT

    os.environ |= {
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "VLLM_CACHE_ROOT": str(OUT / "cache"),
        "VLLM_NO_USAGE_STATS": "1",
    }
    from side_by_side import plan
    from side_by_side.contenders import CONTENDERS
    from side_by_side.results import Results
    from side_by_side.runner import Run

    all_groups = plan.groups(mode.value)
    wanted = [name for name in only.split(",") if name]
    if unknown := set(wanted) - {group.name for group in all_groups}:
        names = ", ".join(group.name for group in all_groups)
        raise typer.BadParameter(f"no group {', '.join(unknown)}; there are {names}", param_hint="--only")
    chosen = [group for group in all_groups if not wanted or group.name in wanted]
    try:
        results = Results.open(mode.value, threads, output, fresh)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--output") from None
    deadline = time.monotonic() + 60 * minutes if minutes else float("inf")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("checkpoints", total=None)
        for group in chosen:
            for weights in {CONTENDERS[name].weights for name in group.contenders}:
                group.workload.checkpoint(weights)
        measuring = Run(results, deadline, progress.console.print)
        progress.update(bar, total=sum(measuring.missing(group) for group in chosen))
        for group in chosen:
            progress.update(bar, description=group.name)
            measuring.group(group, lambda: progress.advance(bar))
    if not any(measuring.missing(group) for group in all_groups):
        results.finish()
    if results.cells:
        report(results.path)
    if measuring.failures:
        raise typer.Exit(1)


@app.command()
def report(path: Annotated[Path, typer.Argument(help="results file")]) -> None:
    """Write the Markdown and the plots of a results file beside it."""
    from side_by_side import plots
    from side_by_side import report as reports

    data = json.loads(path.read_text())
    written = reports.write(data, path, plots.draw(data, path))
    typer.echo(reports.bars_table(data))
    typer.echo(str(written))


@app.command()
def claim(
    path: Annotated[Path, typer.Argument(help="results file")],
    document: Annotated[Path, typer.Option(help="with <!-- benchmark: FILE --> and <!-- /benchmark -->")],
) -> None:
    """Write a results file's ratios into the marked part of a document."""
    from side_by_side import report as reports

    part = reports.claim(json.loads(path.read_text()), path.name)
    document.write_text(reports.with_claim(document.read_text(), part))
