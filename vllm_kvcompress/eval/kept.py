"""Which image tokens a policy keeps: a picture of the raster per head type and preset."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_kvcompress.eval.likelihood import Trial, layout_for, replay_rows
from vllm_kvcompress.eval.replay import PagedReplay


def kvcompress_kept(
    self: Any, prompts: Sequence[Sequence[int]], codes: Sequence[Sequence[int]], trial: Trial
) -> dict[str, list]:
    """Share of the heads of each type that hold each image token at each line's end (a worker method).

    Returns
    -------
    dict
        head type -> ``[lines][tokens]``, mean over layers, heads, branches and pictures.
    """
    model = self.model_runner.get_model()
    raster = model.image.raster
    layout, kernels = layout_for(self.vllm_config, model, trial.section)
    lines = raster.tokens // raster.width
    kinds = len(layout.rules)
    count = np.zeros((kinds, lines, raster.tokens))
    heads = np.zeros((kinds, lines))

    def look(kind: int, line: int, held: Any) -> None:
        tokens = held.cpu().numpy()
        np.add.at(count[kind, line], tokens.ravel(), 1)
        heads[kind, line] += len(tokens)

    replay_rows(
        self.vllm_config, model, prompts, codes, lambda rows: PagedReplay(rows, layout, kernels, look)
    )
    share = count / np.maximum(heads, 1)[..., None]
    return {rule.name: share[kind].tolist() for kind, rule in enumerate(layout.rules)}


def draw_kept(kept: Mapping[str, Mapping[str, Any]], width: int, path: Path, lines: Sequence[int]) -> None:
    """A row of rasters per preset and head type, one at the end of each of ``lines`` (from 1).

    Parameters
    ----------
    kept : mapping
        Cell name -> what `kvcompress_kept` gave.
    width : int
        W.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [(name, kind, shares) for name, kinds in kept.items() for kind, shares in kinds.items()]
    figure = Figure(figsize=(2.0 * len(lines) + 1.5, 2.1 * len(rows) + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(rows), len(lines), squeeze=False)
    for row, (name, kind, shares) in zip(axes, rows, strict=True):
        for axis, line in zip(row, lines, strict=True):
            raster: NDArray[np.float64] = np.array(shares[line - 1]).reshape(-1, width)
            shown = np.ma.masked_array(raster, np.arange(raster.size).reshape(raster.shape) >= line * width)
            image = axis.imshow(shown, vmin=0, vmax=1, cmap="viridis")
            axis.set(xticks=[], yticks=[], title=f"after line {line}")
            axis.title.set_fontsize("small")
        row[0].set_ylabel(f"{name}\n{kind}", fontsize="small")
    figure.colorbar(image, ax=axes, shrink=0.5, label="share of heads that hold the token")
    figure.savefig(path, dpi=110)
