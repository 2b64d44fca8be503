"""Pictures of a results file."""

import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from side_by_side.contenders import CONTENDERS
from side_by_side.plan import Group, groups
from side_by_side.summary import Figure, Samples, line_seconds, tokens_per_second
from side_by_side.workloads import Workload


def _colour(contender: str) -> Any:
    return plt.get_cmap("tab20")(list(CONTENDERS).index(contender))


def _growth(axes: Axes, samples: Samples, workload: Workload, batch: str) -> None:
    """Step time against the line of the picture: median, least and most."""
    for name in samples.contenders(workload.name, batch):
        cells = [line_seconds(cell) for cell in samples.cells(workload.name, name, batch).values()]
        lines = sorted(set.intersection(*(set(cell) for cell in cells)))
        figures = [Figure.of([cell[line] * 1e3 for cell in cells]) for line in lines]
        middle = [figure.median for figure in figures]
        axes.plot(lines, middle, marker="o", color=_colour(name), label=name)
        axes.fill_between(
            lines, [f.low for f in figures], [f.high for f in figures], color=_colour(name), alpha=0.15
        )
    axes.set(title=f"{workload.title}, {batch} pictures", xlabel="line of the picture", ylabel="ms per step")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=7)


def _speed(axes: Axes, samples: Samples, workload: Workload) -> None:
    batches = [b for b in samples.batches(workload.name) if b.isdigit()]
    names = [n for n in CONTENDERS if any(samples.cells(workload.name, n, b) for b in batches)]
    width = 0.8 / max(1, len(names))
    for i, name in enumerate(names):
        for at, batch in enumerate(batches):
            figure = samples.figure(workload, name, batch, tokens_per_second)
            if figure is not None:
                error = [[figure.median - figure.low], [figure.high - figure.median]]
                axes.bar(
                    at + i * width, figure.median, width, yerr=error, color=_colour(name),
                    label=name if at == 0 else None,
                )  # fmt: skip
    axes.set_xticks([i + 0.4 - width / 2 for i in range(len(batches))], batches)
    axes.set(title=workload.title, xlabel="pictures at once", ylabel="image tokens/s")
    axes.legend(fontsize=7)


def _split(axes: Axes, samples: Samples, workload: Workload, batch: str) -> None:
    names = samples.contenders(workload.name, batch)
    splits = {}
    for name in names:
        taken = [c["split"] for c in samples.cells(workload.name, name, batch).values() if "split" in c]
        if taken:
            parts = {part for split in taken for part in split}
            splits[name] = {p: statistics.median([s.get(p, 0.0) for s in taken]) * 1e3 for p in parts}
    parts_seen = sorted({part for split in splits.values() for part in split})
    left = [0.0] * len(splits)
    for i, part in enumerate(parts_seen):
        values = [split.get(part, 0.0) for split in splits.values()]
        axes.barh(list(splits), values, left=left, label=part, color=plt.get_cmap("tab10")(i))
        left = [a + b for a, b in zip(left, values, strict=True)]
    axes.set(title=f"one step, {workload.title}, {batch} pictures", xlabel="ms")
    axes.legend(fontsize=7)


def draw(data: dict[str, Any], path: Path) -> list[str]:
    """Write the plots beside the results file; their names.

    Step time along the picture for every workload (its largest batch), speed by batch, and a step's parts.
    """
    samples, written = Samples(data["cells"]), []
    seen: set[str] = set()
    for group in groups(data["about"]["mode"]):
        workload = group.workload
        batches = [b for b in samples.batches(workload.name) if b.isdigit()]
        if not isinstance(group, Group) or workload.name in seen or not batches:
            continue
        seen.add(workload.name)
        # Where most lines were timed; of those the largest batch.
        most = max(batches, key=lambda b: (_lines_timed(samples, workload, b), int(b)))
        figure, axes = plt.subplots(1, 3, figsize=(19, 5))
        _growth(axes[0], samples, workload, most)
        _speed(axes[1], samples, workload)
        _split(axes[2], samples, workload, batches[-1])
        figure.tight_layout()
        file = path.with_name(f"{path.stem}-{workload.name}.png")
        figure.savefig(file, dpi=80)
        plt.close(figure)
        written.append(file.name)
    return written


def _lines_timed(samples: Samples, workload: Workload, batch: str) -> int:
    return max(
        len(cell["lines"])
        for name in samples.contenders(workload.name, batch)
        for cell in samples.cells(workload.name, name, batch).values()
    )
