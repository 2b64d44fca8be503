"""What is compared: cells (a preset at a budget, or a variation of one), and the lists of them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm_kvcompress.eval.online import OnlineRule, parse_baseline
from vllm_kvcompress.policy import PRESETS, number_of

BUDGETS = ("1", "0.5", "0.25", "0.2", "1/6", "1/8")
FULL = "full"


@dataclass(frozen=True)
class Cell:
    """One policy that is measured.

    Parameters
    ----------
    name : str
        Unique; also the name of its files.
    section : dict
        The ``kvcompress`` section of ``--additional-config`` of the server that is meant.
    score : str, optional
        A score of `vllm_kvcompress.eval.scores` that serving does not have; likelihood only.
    per_layer : bool
        Victims per layer instead of per head; likelihood only.
    baseline : str
        What a rule is called that no server has, and which decides in the picture itself; ``online`` is that
        rule, and ``section`` has the budget that it shares out.
    factor : str
        In an ablation: what is varied, the heading under which the cell stands.
    """

    name: str
    section: dict[str, Any] = field(hash=False)
    score: str | None = None
    per_layer: bool = False
    factor: str = ""
    baseline: str = ""
    online: OnlineRule | None = None

    @property
    def preset(self) -> str:
        return self.baseline or str(self.section.get("preset", ""))

    @property
    def budget(self) -> float:
        return float(self.section.get("budget", 1.0))

    @property
    def keeps_all(self) -> bool:
        """Nothing is ever evicted: the full cache's pictures are this cell's too."""
        return self.preset == FULL or self.budget == 1


def parse_budget(text: str) -> float:
    """``"0.2"`` or ``"1/6"`` -> a share in (0, 1]. Raises ValueError."""
    budget = number_of(text)
    if budget is None:
        raise ValueError(f"budget: {text!r} is not a number or a fraction such as 1/6")
    if not 0 < budget <= 1:
        raise ValueError(f"budget: {text} is not in (0, 1]")
    return budget


def grid(presets: Iterable[str], budgets: Iterable[str]) -> list[Cell]:
    """Every preset at every budget; `full`, which has none, once and first."""
    cells = [Cell(FULL, {"preset": FULL, "budget": 1.0})]
    for preset in presets:
        if preset not in PRESETS:
            raise ValueError(f"preset: unknown {preset!r}; one of {', '.join(PRESETS)}")
        if preset != FULL:
            cells += [
                Cell(f"{preset}-{text.replace('/', '_')}", {"preset": preset, "budget": parse_budget(text)})
                for text in budgets
            ]
    return cells


def baselines(names: Iterable[str], budgets: Iterable[str]) -> list[Cell]:
    """Every baseline (`online.parse_baseline`) at every budget."""
    cells = []
    for name in names:
        online = parse_baseline(name)
        for text in budgets:
            file = f"{name}-{text}".translate(str.maketrans("/:=", "___"))
            section = online.section | {"budget": parse_budget(text)}
            cells.append(Cell(file, section, baseline=name, online=online))
    return cells


def ablation(width: int, budgets: Sequence[str]) -> list[Cell]:
    """`decoupled` with one thing changed at a time, at each budget; ``width`` is W.

    The factors are those that docs/design.md leaves to measurement. A variation that a budget has no
    room for is reported as refused.
    """
    cells = []
    for text in budgets:
        budget = parse_budget(text)
        for factor, options in _factors(width).items():
            for name, change in options.items():
                extra = {key: change.pop(key) for key in ("score_function", "per_layer") if key in change}
                section = {"preset": "decoupled", "budget": budget} | change
                cells.append(
                    Cell(
                        f"{factor}={name} @{text}".replace("/", "_"),
                        section,
                        extra.get("score_function"),
                        extra.get("per_layer", False),
                        factor,
                    )
                )
    return cells


def _factors(width: int) -> dict[str, dict[str, dict[str, Any]]]:
    """Factor -> option -> what it changes in the configuration."""
    lines = {f"{n:g} lines": n for n in (1, 1.5, 2, 2.5, 3, 3.5, 4)}
    return {
        "defaults": {"decoupled": {}, "line_ar": {"preset": "line_ar"}, "streaming": {"preset": "streaming"}},
        "spatial tokens": {k: {"spatial_tokens": 4 + int(n * width)} for k, n in lines.items()},
        "anchors": {str(n): {"anchor_tokens": n} for n in (0, 1, 4, 8, width)},
        "recent": {
            f"{share:g} lines": {"recent_tokens": int(share * width)} for share in (0, 0.25, 0.5, 1, 1.5)
        },
        "threshold quantile": {f"{q:g}": {"quantile": q} for q in (0.25, 0.5, 0.75)},
        "neighbourhood": {f"{n} lines": {"neighbourhood": n} for n in (1, 2, 4)},
        "score of line_ar": {
            **{
                name: {"preset": "line_ar", "score_function": name}
                for name in ("sum", "max", "last query", "random")
            },
            "averaged": {"preset": "line_ar", "score": "averaged"},
            "accumulated": {"preset": "line_ar", "score": "accumulated"},
            "value norm": {"preset": "line_ar", "value_norm": True},
            "smooth row": {"preset": "line_ar", "smooth_row": True},
            "columns": {"preset": "line_ar", "stratify": True},
            "all three": {"preset": "line_ar", "value_norm": True, "smooth_row": True, "stratify": True},
        },
        "score of decoupled": {
            "averaged": {"score": "averaged"},
            "accumulated": {"score": "accumulated"},
            "value norm": {"value_norm": True},
            "smooth row": {"smooth_row": True},
            "columns": {"stratify": True},
            "value norm, smooth": {"value_norm": True, "smooth_row": True},
            "all three": {"value_norm": True, "smooth_row": True, "stratify": True},
        },
        "victims": {
            "per head": {"score_function": "sum"},
            "per layer": {"per_layer": True},
        },
    }
