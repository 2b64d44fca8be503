"""A head profile as a picture: what each head gets at a budget, or its locality."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vllm_kvcompress.heads.prices import Price
from vllm_kvcompress.heads.profile import HeadProfile
from vllm_kvcompress.policy import HeadRule

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SPATIAL, SEMANTIC = "spatial", "semantic"
_MAPS = {SPATIAL: "Blues", SEMANTIC: "Oranges"}
_COLOURS = {SPATIAL: "#2f78b4", SEMANTIC: "#d8690a"}
_SHADES = (0.30, 0.85)  # of a colour map: pale for heads at the threshold, deep at the far end
_LABELLED = 20  # ticks an axis has room for


def draw_fit(profile: HeadProfile, shown: Price, curve: Sequence[Price], path: str | Path) -> None:
    """Write a picture: layers x heads of both branches coloured by rule and size, and what budgets cost.

    Parameters
    ----------
    shown : Price
        The budget whose heads are drawn.
    curve : sequence of Price
        For predicted loss and bytes over budgets.
    path : str or Path
        Its ending names the format: png, svg, pdf.

    Raises
    ------
    ImportError, ValueError, OSError
        As `draw_profile`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    assignment, heads = shown.assignment, profile.kv_heads
    colours = np.array([_colour(rule) for rule in assignment.rules])
    cell = 0.3  # inches
    width = max(6.0, 2 * cell * heads + 2.0)
    height = min(max(4.2, cell * profile.layers + 2.2), 14.0)
    figure = Figure(figsize=(width + 5.0, height), layout="constrained")
    FigureCanvasAgg(figure)
    left, right, cost = figure.subplots(1, 3, width_ratios=[width / 2, width / 2, 5.0])
    for axes, name, part in (
        (left, "conditional branch", assignment.types[:, :heads]),
        (right, "unconditional branch", assignment.types[:, heads:]),
    ):
        axes.imshow(colours[part], interpolation="nearest", aspect="auto")
        _cells(axes, heads, profile.layers)
        axes.set(xlabel="KV head", ylabel="layer")
        axes.set_title(name, fontsize="small", color="dimgray")
    pairs = zip(assignment.rules, assignment.counts, colours, strict=True)
    keys = [Patch(color=colour, label=f"{rule.name}: {count} heads") for rule, count, colour in pairs]
    figure.legend(handles=keys, loc="outside lower left", ncols=3, frameon=False, fontsize="small")
    cost.plot(
        [one.budget for one in curve], [one.assignment.loss or 0 for one in curve], "o-", color="#404040"
    )
    cost.axvline(shown.budget, color="#b0b0b0", linestyle="--")
    for one in curve:
        cost.annotate(
            f"{one.full / one.resident:.1f}x",
            (one.budget, one.assignment.loss or 0),
            textcoords="offset points",
            xytext=(5, 5),
            fontsize="x-small",
        )
    cost.set(xlabel="budget, a share of the picture", ylabel="predicted loss", yscale="log")
    cost.set_title("what budgets cost; labels: times smaller", fontsize="small", color="dimgray")
    cost.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"Head types of {profile.model or 'an unnamed model'} at budget {shown.budget:.3g}", fontweight="bold"
    )
    figure.savefig(path, dpi=150)


def _colour(rule: HeadRule) -> tuple[float, ...]:
    """Blue for rings, orange for scored heads, deeper the more slots; black for heads that keep all."""
    from matplotlib import colormaps

    if not rule.evicts:
        return (0.1, 0.1, 0.1, 1.0)
    share = (
        np.log(rule.capacity / rule.line) / np.log(rule.image / rule.line) if rule.line < rule.image else 1
    )
    shade = 0.2 + 0.75 * min(1.0, max(0.0, float(share)))
    return colormaps[_MAPS[SPATIAL if rule.ring else SEMANTIC]](shade)


def _cells(axes: "Axes", columns: int, rows: int) -> None:
    """White lines between cells, few enough ticks."""
    for axis, count in ((axes.xaxis, columns), (axes.yaxis, rows)):
        axis.set_ticks(range(0, count, -(-count // _LABELLED)))
        axis.set_ticks(np.arange(count + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)


def draw_profile(profile: HeadProfile, path: str | Path, threshold: float | None = None) -> None:
    """Write a picture: layers x heads coloured by type and shaded by score, and the scores' histogram.

    Parameters
    ----------
    path : str or Path
        Its ending names the format: png, svg, pdf.
    threshold : float, optional
        Instead of the profile's own.

    Raises
    ------
    ImportError
        matplotlib is not installed.
    ValueError
        A format that matplotlib does not write.
    OSError
        The file can't be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    threshold = profile.threshold if threshold is None else threshold
    cell = 0.3  # inches
    width = max(5.0, cell * profile.kv_heads + 1.5)
    height = min(max(3.6, cell * profile.layers + 1.6), 14.0)
    figure = Figure(figsize=(width + 4.6, height), layout="constrained")
    FigureCanvasAgg(figure)
    grid, bars = figure.subplots(1, 2, width_ratios=[width, 4.6])
    _draw_heads(grid, profile, threshold)
    _draw_histogram(bars, profile, threshold)
    figure.suptitle(f"Attention heads of {profile.model or 'an unnamed model'}", fontweight="bold")
    figure.savefig(path, dpi=150)


def _draw_heads(axes: "Axes", profile: HeadProfile, threshold: float) -> None:
    from matplotlib import colormaps

    scores, spatial = np.array(profile.scores), profile.head_types(threshold)
    pixels = np.empty((*scores.shape, 4))
    for name, mine in ((SPATIAL, spatial), (SEMANTIC, ~spatial)):
        distance = np.abs(scores - threshold)
        far = distance[mine].max(initial=0) or 1.0
        shade = _SHADES[0] + (_SHADES[1] - _SHADES[0]) * distance / far
        pixels[mine] = colormaps[_MAPS[name]](shade)[mine]
    axes.imshow(pixels, interpolation="nearest", aspect="auto")
    _cells(axes, profile.kv_heads, profile.layers)
    axes.set(xlabel="KV head", ylabel="layer")
    axes.set_title(
        f"blue {SPATIAL}, orange {SEMANTIC}; deeper is farther from the threshold",
        fontsize="small", color="dimgray", wrap=True,
    )  # fmt: skip


def _draw_histogram(axes: "Axes", profile: HeadProfile, threshold: float) -> None:
    from matplotlib.ticker import MaxNLocator

    scores, spatial = np.array(profile.scores), profile.head_types(threshold)
    low, high = min(scores.min(), threshold), max(scores.max(), threshold)
    margin = 0.03 * (high - low) or 0.01
    # The threshold is an edge: no bar holds heads of both types.
    step = (high - low + 2 * margin) / min(30, max(8, scores.size // 4))
    below = int(np.ceil((threshold - low + margin) / step))
    above = int(np.ceil((high + margin - threshold) / step))
    edges = np.unique(np.clip(threshold + step * np.arange(-below, above + 1), 0, 1))
    for name, mine in ((SPATIAL, spatial), (SEMANTIC, ~spatial)):
        label = f"{name}: {int(mine.sum())} of {scores.size} heads"
        # A score equal to the threshold is spatial, hence the step to the left.
        values = np.where(spatial, np.minimum(scores, threshold - 1e-6 * step), scores)[mine]
        axes.hist(values, edges.tolist(), color=_COLOURS[name], edgecolor="white", linewidth=0.8, label=label)
    axes.axvline(threshold, color="black", linestyle="--", label=f"threshold {threshold:.3f}")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.set(ylabel="heads", xlabel=f"score: {profile.metric}\n(the {profile.neighbourhood} tokens before)")
    axes.legend(frameon=False, fontsize="small", loc="lower left", bbox_to_anchor=(0, 1))
