"""Quality against budget, one line a preset."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_kvcompress.eval.cells import FULL

COLOURS = {
    "streaming": "#888888",
    "h2o": "#b07aa1",
    "line_ar": "#2f78b4",
    "ssd": "#59a14f",
    "decoupled": "#d8690a",
    "fitted": "#c2185b",
    "headkv_ar": "#c9a400",
}


def draw_curves(records: Sequence[Mapping[str, Any]], path: Path) -> bool:
    """Accuracy and likelihood panels, whichever was measured, with 95% intervals; False if neither was."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [
        (field, label, scale)
        for field, label, scale in (
            ("correct", "pictures with everything right, %", 100),
            ("whole", "pictures without a damaged object, %", 100),
            ("nll_over_full", "NLL over the full cache, nats per token", 1),
        )
        if any(field in r for r in records)
    ]
    if not panels:
        return False
    figure = Figure(figsize=(5.6 * len(panels), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, (field, label, scale) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
    ):
        shown = [r for r in records if field in r and not r["factor"]]
        for preset in dict.fromkeys(r["preset"] for r in shown):
            mine = sorted((r for r in shown if r["preset"] == preset), key=lambda r: r["budget"])
            value, low, high = ([scale * r[field][n] for r in mine] for n in range(3))
            if preset == FULL:
                axis.axhline(value[0], color="black", linestyle="--", label=FULL)
                axis.axhspan(low[0], high[0], color="black", alpha=0.08)
                continue
            budget = [r["budget"] for r in mine]
            below = [v - x for v, x in zip(value, low, strict=True)]
            above = [x - v for v, x in zip(value, high, strict=True)]
            axis.errorbar(
                budget, value, [below, above], label=preset, color=COLOURS.get(preset), marker="o", capsize=3
            )
        axis.set(xlabel="budget (share of the image's tokens)", ylabel=label, xscale="log")
        ticks = sorted({r["budget"] for r in shown if r["preset"] != FULL}) or [1.0]
        axis.set_xticks(ticks, [f"{b:.3g}" for b in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=120)
    return True


def draw_errors(records: Sequence[Mapping[str, Any]], budget: float, path: Path) -> bool:
    """Attention-output error per layer, a line per preset and head type; False without replays."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [r for r in records if "head_error_by_layer" in r and r["budget"] == budget and not r["factor"]]
    if not shown:
        return False
    figure = Figure(figsize=(6.5, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for record in shown:
        for kind, style in (("semantic", "-"), ("spatial", ":")):
            if kind in record["head_error_by_layer"]:
                errors = [float("nan") if e is None else e for e in record["head_error_by_layer"][kind]]
                label, colour = f"{record['preset']}, {kind}", COLOURS.get(record["preset"])
                axis.plot(errors, style, color=colour, marker=".", label=label)
    axis.set(xlabel="layer", ylabel="relative error of the attention output", title=f"budget {budget:g}")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize="x-small", ncols=2)
    figure.savefig(path, dpi=120)
    return True


def draw_sheet(rows: Mapping[str, Any], captions: Sequence[str], path: Path) -> None:
    """The same prompts under every cell: ``rows`` name -> pictures ``[n, H, W, 3]`` uint8."""
    from textwrap import fill

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.45 * len(captions) + 1.4, 1.45 * len(rows) + 0.7), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(rows), len(captions), squeeze=False)
    for line, (name, pictures) in enumerate(rows.items()):
        for axis, picture in zip(axes[line], pictures, strict=True):
            axis.imshow(picture, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
        axes[line][0].set_ylabel(name, fontsize="x-small", rotation=0, ha="right", va="center")
    for axis, caption in zip(axes[0], captions, strict=True):
        axis.set_title(fill(caption, 18), fontsize="xx-small")
    figure.savefig(path, dpi=140)
