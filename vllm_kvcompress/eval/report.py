"""Results of an evaluation as JSON, a Markdown table, and numbers for the plots."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from vllm_kvcompress.eval.cells import FULL, Cell
from vllm_kvcompress.eval.features import EXTRACTOR
from vllm_kvcompress.eval.likelihood import Likelihood
from vllm_kvcompress.eval.prompts import GENEVAL
from vllm_kvcompress.eval.stats import Estimate, mean, share

RULES = {"correct": "all right", "whole": "whole", "present": "there"}
"""Of `judge.Verdict`, and what the tables call them: nothing but what is asked for; no object damaged, asked
for or not; what is asked for, and maybe more (GenEval's)."""

Judged = Mapping[str, Mapping[str, Any]]


def summarise(
    cells: Sequence[Cell], likelihoods: Mapping[str, Likelihood], judged: Judged
) -> list[dict[str, Any]]:
    """One record a cell, in order; estimates are ``[value, low, high]`` with 95% intervals.

    ``correct``, ``whole`` and ``present`` are the judge's rules, ``categories``, ``categories_whole`` and
    ``categories_present`` the same by category; ``objects`` is the mean number of objects found in a picture.
    ``nll_over_full``, ``correct_over_full`` and so on are means of paired differences: same pictures, same
    prompts and seeds.
    """
    full_nll = likelihoods[FULL].nll if FULL in likelihoods else None
    full_right_by = {rule: _right(judged.get(FULL), rule) for rule in RULES}
    records = []
    for cell in cells:
        record: dict[str, Any] = {"name": cell.name, "preset": cell.preset, "budget": cell.budget}
        record |= {"factor": cell.factor, "section": cell.section}
        if cell.online is not None:
            record["online"] = asdict(cell.online)
        one, verdicts = likelihoods.get(cell.name), judged.get(cell.name)
        refused = (one and one.refused) or (verdicts or {}).get("refused")
        if refused:
            records.append(record | {"refused": refused})
            continue
        if one is not None:
            record |= {name: _list(mean(getattr(one, name))) for name in ("nll", "kl", "kl_guided")}
            if full_nll is not None:
                record["nll_over_full"] = _list(mean(np.subtract(one.nll, full_nll).tolist()))
            record["resident"] = one.resident
            record["head_error"], record["head_error_by_layer"] = _head_errors(one)
        if verdicts is not None:
            for rule, full_right in full_right_by.items():
                right = _right(verdicts, rule)
                record[rule] = _list(share(sum(right), len(right)))
                if full_right and len(full_right) == len(right):
                    record[f"{rule}_over_full"] = _list(mean(np.subtract(right, full_right).tolist()))
            record["objects"] = _list(mean([v["objects_seen"] for v in verdicts["verdicts"]]))
            record["categories"] = _by_category(verdicts, "correct")
            record["categories_whole"] = _by_category(verdicts, "whole")
            record["categories_present"] = _by_category(verdicts, "present")
            record["geneval"] = _geneval(record["categories_present"])
            record["frechet"] = verdicts["frechet"]
            if "same_as" in verdicts:
                record["same_as"] = verdicts["same_as"]
        records.append(record)
    return records


def _right(verdicts: Mapping[str, Any] | None, rule: str) -> list[int]:
    return [int(v[rule]) for v in verdicts["verdicts"]] if verdicts else []


def _by_category(verdicts: Mapping[str, Any], rule: str) -> dict[str, list[float]]:
    names = list(dict.fromkeys(v["category"] for v in verdicts["verdicts"]))
    by = {name: [int(v[rule]) for v in verdicts["verdicts"] if v["category"] == name] for name in names}
    return {name: _list(share(sum(right), len(right))) for name, right in by.items()}


def _geneval(categories: Mapping[str, Sequence[float]]) -> float | None:
    """Mean over GenEval's categories that were drawn, its overall score."""
    mine = [categories[name][0] for name in GENEVAL if name in categories]
    return float(np.mean(mine)) if mine else None


def _head_errors(one: Likelihood) -> tuple[dict[str, float], dict[str, list[float | None]]]:
    """Root mean square relative error of the attention output per head type: of all, and per layer."""
    squared = np.array(one.error) ** 2
    is_spatial = np.array([[h in heads for h in range(squared.shape[1])] for heads in one.spatial])
    kinds = {"spatial": is_spatial, "semantic": ~is_spatial}
    overall = {name: float(np.sqrt(squared[m].mean())) for name, m in kinds.items() if m.any()}
    layers = {
        name: [
            float(np.sqrt(row[m].mean())) if m.any() else None for row, m in zip(squared, mine, strict=True)
        ]
        for name, mine in kinds.items()
        if mine.any()
    }
    return overall, layers


def _list(estimate: Estimate) -> list[float]:
    return list(asdict(estimate).values())


def markdown(records: Sequence[Mapping[str, Any]], settings: Mapping[str, Any], command: str) -> str:
    """The tables that docs/quality.md quotes."""
    grid = [r for r in records if not r["factor"]]
    trials = [r for r in records if r["factor"]]
    parts = [f"Made by `{command}`.\n"]
    if any("correct" in r for r in grid):
        parts.append(_pictures_table(grid, settings))
    if any("nll" in r for r in grid):
        parts.append(_likelihood_table(grid, settings))
    for factor in dict.fromkeys(r["factor"] for r in trials):
        parts.append(_factor_table(factor, [r for r in trials if r["factor"] == factor]))
    refused = [r for r in records if "refused" in r]
    if refused:
        parts.append(
            "Refused by the policy:\n\n" + "\n".join(f"- {r['name']}: {r['refused']}" for r in refused)
        )
    return "\n".join(parts)


def _pictures_table(records: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> str:
    shown = [r for r in records if "correct" in r]
    categories = list(shown[0]["categories"])
    totals_head = [name for rule in RULES.values() for name in (rule, "less than full")]
    head = ["preset", "budget", *totals_head, "objects", *categories, "Fréchet"]
    rows = []
    for r in shown:
        totals = []
        for rule in RULES:
            over = r.get(f"{rule}_over_full") if r["name"] != FULL else None
            totals += [Estimate(*r[rule]).text(1, 100), Estimate(*over).text(1, 100) if over else ""]
        by_category = [r["categories"], r["categories_whole"], r["categories_present"]]
        rows.append(
            [
                r["preset"],
                _budget(r),
                *totals,
                f"{r['objects'][0]:.2f}",
                *(" / ".join(f"{100 * by[c][0]:.0f}" for by in by_category) for c in categories),
                f"{r['frechet']:.2f}" if r["frechet"] is not None else "",
            ]
        )
    note = (
        f"Percent of pictures, {settings['number']} a category, 95% intervals; differences to the full cache "
        "are paired (same prompts, same seeds). All right: what the prompt asks for and nothing else. Whole: "
        "every object is an undamaged shape, asked for or not. There: GenEval's milder rule, what the prompt "
        "asks for, maybe more. Objects: how many a picture has, on average. Categories: all right / whole / "
        f"there. Fréchet: {EXTRACTOR}."
    )
    return f"### Pictures\n\n{note}\n\n{_table(head, rows)}\n"


def _likelihood_table(records: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> str:
    head = ["preset", "budget", "NLL", "over full", "KL", "KL, guided", "spatial heads' error", "semantic"]
    rows = []
    for r in records:
        if "nll" not in r:
            continue
        error = r["head_error"]
        rows.append(
            [
                r["preset"],
                _budget(r),
                f"{r['nll'][0]:.4f}",
                Estimate(*r["nll_over_full"]).text(4) if "nll_over_full" in r else "",
                f"{r['kl'][0]:.4f}",
                f"{r['kl_guided'][0]:.4f}",
                *(f"{error[kind]:.3f}" if kind in error else "" for kind in ("spatial", "semantic")),
            ]
        )
    note = (
        f"{settings['scenes']} held-out scenes, teacher-forced; nats per image token, 95% intervals of the "
        "paired difference; KL from the full cache's next-token distribution; relative error of attention "
        "outputs, root mean square over heads."
    )
    return f"### Likelihood\n\n{note}\n\n{_table(head, rows)}\n"


def _factor_table(factor: str, records: Sequence[Mapping[str, Any]]) -> str:
    """Options down, budgets across: NLL over full."""
    budgets = list(dict.fromkeys(r["budget"] for r in records))
    options = list(dict.fromkeys(r["name"].split("=", 1)[1].split(" @")[0] for r in records))
    rows = []
    for option in options:
        row = [option]
        for budget in budgets:
            [one] = [r for r in records if r["budget"] == budget and f"={option} @" in r["name"]]
            row.append("refused" if "refused" in one else Estimate(*one["nll_over_full"]).text(4))
        rows.append(row)
    head = [factor, *(f"budget {budget:.3g}" for budget in budgets)]
    note = "NLL over the full cache's, nats per image token."
    return f"### Ablation: {factor}\n\n{note}\n\n{_table(head, rows)}\n"


def _budget(record: Mapping[str, Any]) -> str:
    return "" if record["preset"] == FULL else f"{record['budget']:.3g}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
