"""A head profile as a picture."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vllm_kvcompress.heads.profile import HeadProfile

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SPATIAL, SEMANTIC = "spatial", "semantic"
_MAPS = {SPATIAL: "Blues", SEMANTIC: "Oranges"}
_COLOURS = {SPATIAL: "#2f78b4", SEMANTIC: "#d8690a"}
_SHADES = (0.30, 0.85)  # of a colour map: pale for heads at the threshold, deep at the far end
_LABELLED = 20  # ticks an axis has room for


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
    for axis, count in ((axes.xaxis, profile.kv_heads), (axes.yaxis, profile.layers)):
        axis.set_ticks(range(0, count, -(-count // _LABELLED)))
        axis.set_ticks(np.arange(count + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
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
