"""The Markdown of a results file, and the part of the README that comes from one."""

import re
from pathlib import Path
from typing import Any

from side_by_side.bars import BARS, Bar
from side_by_side.child import FIT
from side_by_side.contenders import CONTENDERS
from side_by_side.plan import Group, HttpGroup, groups
from side_by_side.summary import (
    Figure,
    Samples,
    drawing_seconds,
    late_step_seconds,
    over_floor,
    pictures_per_second,
    seconds_per_image,
    tokens_per_second,
)
from side_by_side.workloads import Workload

_PARTS = (
    "attention", "linear layers", "image head", "sampling", "scheduler", "inputs and plan", "other",
)  # fmt: skip
_MARKED = re.compile(r"<!-- benchmark: (\S+) -->\n.*?<!-- /benchmark -->", re.DOTALL)
PLACE = "<!-- benchmark -->"  # in a document that has no claim yet
Data = dict[str, Any]
_METHOD = """Medians over repeats, least and most in parentheses; contenders took turns. Speeds of whole \
pictures are **integrated from samples**: every step of the timed lines, straight lines in between. Pictures \
that begin in the middle have random numbers in their cache. transformers attends to its whole StaticCache \
at every step, so its first steps stand for all. *Floor*: bytes of weights and resident keys and \
values over the bandwidth of a copy in the same turn. Attention includes RoPE and cache writes."""


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join([_row(*head), _row(*["---"] * len(head)), *(_row(*row) for row in rows)])


def _group_of(bar: Bar, mode: str) -> Group | None:
    for group in groups(mode):
        if (
            isinstance(group, Group)
            and group.name.startswith(bar.group)
            and bar.batch in map(str, group.batches)
        ):
            return group
    return None


def _measured(data: Data) -> list[tuple[Bar, Workload, Figure]]:
    samples, found = Samples(data["cells"]), []
    for bar in BARS:
        group = _group_of(bar, data["about"]["mode"])
        if group is not None and (figure := bar.measured(samples, group.workload)) is not None:
            found.append((bar, group.workload, figure))
    return found


def bars_table(data: Data) -> str:
    """What was aimed at and what came out, a row per aim that was measured."""
    rows = []
    for bar, workload, figure in _measured(data):
        sign = "at least" if bar.at_least else "at most"
        verdict = "met" if bar.met(figure) else "**not met**"
        rows.append([bar.text, workload.title, figure.text(), f"{sign} {bar.aim:g}", verdict])
    return _table(["ratio", "workload", "median (least-most)", "aim", ""], rows)


def speed_table(samples: Samples, workload: Workload, batch: str) -> str:
    """A row per contender."""
    rows = []
    for name in samples.contenders(workload.name, batch):
        cells = samples.cells(workload.name, name, batch)
        first = cells[min(cells)]
        figures = [
            samples.figure(workload, name, batch, value)
            for value in (tokens_per_second, seconds_per_image, late_step_seconds, over_floor)
        ]
        speed, image, step, floor = (figure for figure in figures if figure is not None)
        step = Figure(step.median * 1e3, step.low * 1e3, step.high * 1e3)
        demo = workload.geometry is None
        rows.append([
            name, str(first["drawn_at_once"]), speed.text(1), image.text(), step.text(1),
            "-" if demo else floor.text(), f"{first['vq_s']:.2f}", f"{first['kv_bytes_per_image'] / 1e6:.1f}",
            f"{min(cell['peak_rss'] for cell in cells.values()) / 1e9:.1f}", str(len(cells)),
        ])  # fmt: skip
    head = [
        "contender", "images at once", "image tokens/s", "s/image", "ms/step, last line", "over its floor",
        "VQ decode, s/image", "KV MB/image", "peak RSS, GB", "repeats",
    ]  # fmt: skip
    return _table(head, rows)


def split_table(samples: Samples, workload: Workload, batch: str) -> str:
    """Milliseconds of a decode step by part; empty if no step was taken apart."""
    rows = []
    for name in samples.contenders(workload.name, batch):
        for cell in samples.cells(workload.name, name, batch).values():
            if parts := cell.get("split"):
                rows.append([name, *(f"{parts.get(part, 0) * 1e3:.1f}" for part in _PARTS)])
    return _table(["contender", *_PARTS], rows) if rows else ""


def memory_table(samples: Samples, workload: Workload) -> str:
    """Pictures at once and a second at a fixed KV memory."""
    rows = []
    for name in samples.contenders(workload.name, FIT):
        cells = samples.cells(workload.name, name, FIT)
        speed = samples.figure(workload, name, FIT, pictures_per_second)
        assert speed is not None
        first = cells[min(cells)]
        rows.append(
            [name, str(first["drawn_at_once"]), f"{first['kv_bytes_per_image'] / 1e6:.1f}", speed.text(3)]
        )
    return _table(["contender", "pictures at once", "KV MB/picture", "pictures/s"], rows)


def whole_table(samples: Samples, workload: Workload, batch: str) -> str:
    """What was integrated from lines against pictures drawn whole; empty if none were."""
    rows = []
    for name in samples.contenders(workload.name, batch):
        cells = [c for c in samples.cells(workload.name, name, batch).values() if "whole_s" in c]
        if cells:
            drawn = Figure.of([cell["whole_s"] for cell in cells])
            integrated = Figure.of([drawing_seconds(cell, workload) for cell in cells])
            off = integrated.median / drawn.median - 1
            rows.append([name, integrated.text(1), drawn.text(1), f"{off:+.1%}"])
    return _table(["contender", "integrated, s", "drawn whole, s", "difference"], rows) if rows else ""


def http_table(data: Data, group: HttpGroup) -> str:
    """Open and closed loop, medians over repeats."""
    rows = []
    cells = [cell for cell in data["cells"] if cell["workload"] == group.workload.name]
    for load in ("saturation", *group.loads):
        for name in CONTENDERS:
            mine = [cell for cell in cells if cell["contender"] == name and cell.get("load") == load]
            if mine:
                speed = Figure.of([cell["request_throughput"] for cell in mine])
                times = [
                    Figure.of([cell[f"p{p}_e2el_ms"] / 1e3 for cell in mine]).text(1) for p in (50, 95, 99)
                ]
                rate = mine[0]["rate"]
                rows.append([name, "all at once" if rate is None else f"{rate:.2f}/s", speed.text(2), *times])
    return _table(["contender", "arrivals", "pictures/s", "p50, s", "p95, s", "p99, s"], rows)


def _about(data: Data) -> str:
    a = data["about"]
    versions = ", ".join(f"{name} {number}" for name, number in a["versions"].items())
    return (
        f"{a['cpu']}, {a['cores']} cores, {a['memory_gb']} GB; {a['threads']} threads, {a['dtype']}, "
        f"guidance {a['guidance_scale']:g}; {versions}; commit {a['commit']}."
    )


def markdown(data: Data, plots: list[str]) -> str:
    """The whole report; ``plots`` are file names beside it."""
    samples = Samples(data["cells"])
    parts = [
        f"# Side by side, {data['about']['mode']} run",
        _about(data),
        _METHOD,
        bars_table(data),
    ]
    for group in groups(data["about"]["mode"]):
        workload = group.workload
        if isinstance(group, HttpGroup):
            if any(cell["workload"] == workload.name for cell in data["cells"]):
                title = f"{workload.title} over HTTP, KV memory of {group.memory_images} full-cache pictures"
                parts += [f"## {title}", http_table(data, group)]
            continue
        batches = [b for b in samples.batches(workload.name) if b in map(str, group.batches)]
        heading = f"## {workload.title}"
        if heading in parts or not batches:
            continue
        parts.append(heading)
        for batch in samples.batches(workload.name):
            if batch == FIT:
                parts.append(memory_table(samples, workload))
            else:
                parts += [f"{batch} {'picture' if batch == '1' else 'pictures'} at once:"]
            parts.append(speed_table(samples, workload, batch))
            if whole := whole_table(samples, workload, batch):
                parts.append(whole)
            if split := split_table(samples, workload, batch):
                parts += ["One step in the middle of the picture, ms, with the parts' calls timed:", split]
    parts += [f"![{name}]({name})" for name in plots]
    return "\n\n".join(parts) + "\n"


def claim(data: Data, name: str) -> str:
    """The README's part, between its markers: the aims, and what this results file says."""
    body = f"{_about(data)}\n\n{bars_table(data)}"
    return f"<!-- benchmark: {name} -->\n{body}\n<!-- /benchmark -->"


def claimed(text: str) -> list[tuple[str, str]]:
    """(results file, marked part) of every marked part of a document."""
    return [(found.group(1), found.group(0)) for found in _MARKED.finditer(text)]


def with_claim(text: str, part: str) -> str:
    """The document with its part of the same file, the mark where one should be, or its only part replaced.

    Raises ValueError if it has none of them.
    """
    (mine,) = (name for name, _ in claimed(part))
    there = claimed(text)
    for name, old in there:
        if name == mine or (len(there) == 1 and PLACE not in text):
            return text.replace(old, part, 1)
    if PLACE not in text:
        raise ValueError(
            f"the document has neither {PLACE} nor one <!-- benchmark: FILE --> part, nor one of {mine}"
        )
    return text.replace(PLACE, part, 1)


def write(data: Data, path: Path, plots: list[str]) -> Path:
    """The report beside the results file."""
    report = path.with_suffix(".md")
    report.write_text(markdown(data, plots))
    return report
