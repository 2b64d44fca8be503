"""What ``vllm-kvcompress inspect`` shows of a head profile."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from vllm_kvcompress.heads.prices import AS_SERVED, Price, Served, price, prices
from vllm_kvcompress.heads.profile import HeadProfile
from vllm_kvcompress.policy import AUTO, number_of


def print_fit(
    profile: HeadProfile, budget: str | None, output: Path | None, served: Served = AS_SERVED
) -> None:
    """What budgets cost, or one, and a picture of it. Raises ValueError, one line, on what is no budget."""
    console = Console(highlight=False)
    shown = prices(profile, served) if budget is None else [price(profile, budget_of(budget), served)]
    at = "" if profile.guidance is None else f", measured at guidance {profile.guidance:g}"
    console.print(f"{profile.model or 'an unnamed model'}: preset fitted{at}", markup=False)
    table = Table("budget", "predicted loss", "MiB a picture", "smaller", "pictures in a GiB")
    for column in table.columns:
        column.justify = "right"
    for one in shown:
        table.add_row(
            f"{one.budget:.3g}",
            f"{one.assignment.loss:.2g}",
            _mebibytes(one.resident),
            f"{one.full / one.resident:.1f}x",
            f"{one.in_a_gib}",
        )
    console.print(table)
    for one in shown:
        if one.trial is not None:
            console.print(
                f"tried at {one.budget:.3g}: guided KL {one.trial.divergence:.2g} nats a token, "
                f"{one.trial.squares:.2g} by predicted loss alone"
            )
    drawn = shown[0] if budget is not None else min(shown, key=lambda one: abs(one.budget - 0.2))
    each = f" on each of {served.ranks} ranks, whose bytes these are" if served.ranks > 1 else ""
    console.print(f"at {drawn.budget:.3g}{each}: {drawn.types}", markup=False, soft_wrap=True)
    if budget is not None:
        _print_heads(drawn, profile.kv_heads, console)
    if output is not None:
        curve = shown if budget is None else prices(profile, served)
        _draw(lambda path: _plot().draw_fit(profile, drawn, curve, path), output)


def _mebibytes(number: int) -> str:
    """With two decimals, or three digits of what a small model's picture takes."""
    return f"{number / 2**20:.2f}" if number >= 2**20 else f"{number / 2**20:.3g}"


def _print_heads(shown: Price, kv_heads: int, console: Console) -> None:
    """Layers and heads, a letter for each type."""
    letters = "abcdef"
    table = Table("layer", "conditional", "unconditional")
    for layer, row in enumerate(shown.assignment.types):
        text = "".join(letters[kind] for kind in row)
        table.add_row(str(layer), text[:kv_heads], text[kv_heads:])
    console.print(table)
    rules = zip(letters, shown.assignment.rules, strict=False)
    console.print("; ".join(f"{letter} {rule.name}" for letter, rule in rules), markup=False)


def budget_of(text: str) -> float | Literal["auto"]:
    """``"0.15"``, ``"1/6"`` or ``"auto"``. Raises ValueError, one line."""
    if text.strip() == AUTO:
        return AUTO
    if (share := number_of(text)) is None:
        raise ValueError(f"budget: {text!r} is neither a share such as 0.15 or 1/6, nor auto")
    return share


def _plot() -> Any:
    from vllm_kvcompress.heads import plot

    return plot


def print_locality(profile: HeadProfile, threshold: float | None, output: Path | None) -> None:
    """The heads' locality; which of them are spatial at the threshold, by default the profile's own."""
    shown, threshold = threshold, profile.threshold if threshold is None else threshold
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
    if output is not None:
        _draw(lambda path: _plot().draw_profile(profile, path, shown), output)


def _counts(spatial: np.ndarray) -> tuple[str, str]:
    return str(int(spatial.sum())), str(int((~spatial).sum()))


def _draw(draw: Callable[[Path], None], path: Path) -> None:
    if not path.suffix:  # matplotlib would write another file than the one that is named below
        path = path.with_name(f"{path.name}.png")
    try:
        draw(path)
    except ImportError as error:
        if (error.name or "").split(".")[0] != "matplotlib":
            raise
        raise ImportError("a picture needs matplotlib: pip install 'vllm-kvcompress[plot]'") from None
    typer.echo(f"picture: {path}")
