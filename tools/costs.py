"""Write README.md's table of costs and gains, out of the pages that have the numbers.

``python tools/costs.py``; tests/test_docs.py says when that is due.
"""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PLACE = re.compile(r"(?<=<!-- costs: by tools/costs.py -->\n).*(?=\n<!-- /costs -->)", re.DOTALL)
PAPERS = ("h2o", "line_ar", "ssd")
RIGHT, WHOLE, NATS = 2, 4, 11
"""Columns of those tables."""
EIGHT = "KV memory of 8 full-cache images"
EMPTY = ""


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def rows(text: str, *first: str) -> list[list[str]]:
    """The cells of every table row that begins with these."""
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    return [row for row in found if row[: len(first)] == list(first)]


def quality(preset: str, budget: str, column: int) -> str:
    """The number of a cell of docs/quality.md's first two tables, taken as one, without its interval."""
    text = page("docs/quality.md").split("## `fitted` against the other presets")[1].split("\n## ")[0]
    shares, likelihoods = rows(text, preset, budget)[:2]
    return (shares + likelihoods)[column].split()[0]


def of_presets(column: int) -> list[str]:
    """Full cache, `fitted` at both budgets, and from where to where the papers' presets are at the first."""
    papers = sorted((quality(preset, "0.2", column) for preset in PAPERS), key=float)
    whole = quality("full", "", column)
    fitted = [quality("fitted", budget, column) for budget in ("0.2", "0.167")]
    return [whole, *fitted, f"{papers[0]} to {papers[-1]}"]


def faster(claim: str) -> list[str]:
    """A ratio of the benchmark's, as README.md's generated part has it."""
    [row] = rows(page("README.md"), claim)
    return ["1", EMPTY, row[2].split()[0], EMPTY]


def table() -> str:
    """The table in Markdown."""
    [memory] = rows(page("docs/deploy.md"), "Janus-Pro-1B")
    said = re.search(r"one picture: ([\d.]+) without, ([\d.]+) with `auto`", page("docs/windows.md"))
    assert said is not None
    without, windowed = said.groups()
    stock = "over the stock full cache's"
    lines = [
        ["", "full cache", "`fitted`, 0.2", "`fitted`, 1/6", "`h2o`, `line_ar`, `ssd`, 0.2"],
        ["---"] * 5,
        ["KV of a picture, Janus-Pro-1B", *memory[1:4], "as `fitted`"],
        ["pictures at once in 10 GiB of KV", *memory[4].split(", "), "as `fitted`"],
        ["pictures without a damaged shape, %", *of_presets(WHOLE)],
        ["pictures with all right, %", *of_presets(RIGHT)],
        ["nats an image token, known scenes", *of_presets(NATS)],
        ["image tokens/s, 16 pictures at once", *faster(f"image tokens/s {stock}, 16 images")],
        ["image tokens/s, 64 pictures at once", *faster(f"image tokens/s {stock}, 64 images")],
        ["pictures/s in the memory of 8 full caches", *faster(f"pictures/s {stock}, {EIGHT}")],
        [
            "seconds to a picture of the demo model",
            f"{without}; with windows {windowed}",
            EMPTY,
            EMPTY,
            EMPTY,
        ],
    ]
    return "\n".join(re.sub(r"\| +(?=\|)", "| ", f"| {' | '.join(line)} |") for line in lines)


def main() -> None:
    path = ROOT / "README.md"
    path.write_text(PLACE.sub(lambda _: table(), path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
