"""``vllm-kvcompress eval``: what compression costs, in one command."""

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vllm_kvcompress.policy import PRESETS

if TYPE_CHECKING:
    from vllm_kvcompress.eval.run import Evaluation
    from vllm_kvcompress.models.config import ImageModel

ALL = ",".join(PRESETS)
SHEET_COLUMNS = 8
SCENES = 64
KEPT_BUDGET = 0.2


def evaluate(
    model: Annotated[str, typer.Argument(help="Checkpoint folder, or name on the Hugging Face hub.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the results.")] = Path("out/eval"),
    presets: Annotated[str, typer.Option(help="Presets, with commas.")] = ALL,
    budgets: Annotated[
        str, typer.Option(help="Budgets, with commas; 1/6 is one.")
    ] = "1,0.5,0.25,0.2,1/6,1/8",
    baselines: Annotated[
        str, typer.Option(help="Rules that no server has, with commas: headkv_ar, headkv_ar:early=2.")
    ] = "",
    pictures: Annotated[int, typer.Option(min=0, help="Pictures a category and cell; 0 draws none.")] = 40,
    categories: Annotated[str, typer.Option(help="Categories of prompts, with commas.")] = "all",
    scenes: Annotated[
        int | None, typer.Option(min=0, help="Known pictures that are replayed; 64, if there are as many.")
    ] = None,
    scenes_file: Annotated[Path | None, typer.Option(help="Where from (.npz); else the model's own.")] = None,
    ablation: Annotated[bool, typer.Option(help="Also vary one setting of decoupled at a time.")] = False,
    guidance: Annotated[
        float | None, typer.Option(min=0, max=100, help="Guidance scale; else the checkpoint's own.")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0, help="Of the drawing.")] = 1.0,
    seed: int = 0,
    size: Annotated[str | None, typer.Option(help="Of the pictures, of a model that has several.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Pictures drawn at once.")] = 64,
    dtype: Annotated[str, typer.Option(help="As for vllm serve.")] = "auto",
    gpu_memory_utilization: Annotated[
        float | None, typer.Option(min=0, max=1, help="As for vllm serve: to run beside a server, less.")
    ] = None,
    kv_cache_memory_bytes: Annotated[
        int | None, typer.Option(min=1, help="As for vllm serve, instead; on CPUs what the batch takes.")
    ] = None,
) -> None:
    """Measure what presets and budgets cost MODEL in quality: pictures judged, likelihoods, head errors.

    Pictures are of the shapes world, judged by classical vision in GenEval's categories; the replay
    gives the likelihood of known pictures under every policy. Run it again to go on where it stopped.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm_kvcompress.eval import report
    from vllm_kvcompress.eval.cells import ablation as ablation_cells
    from vllm_kvcompress.eval.cells import baselines as baseline_cells
    from vllm_kvcompress.eval.cells import grid
    from vllm_kvcompress.eval.engine import Room
    from vllm_kvcompress.eval.held_out import known
    from vllm_kvcompress.eval.pictures import Asked
    from vllm_kvcompress.eval.prompts import CATEGORIES
    from vllm_kvcompress.eval.run import Evaluation

    image = _check_family(model, pictures, size)
    # Looked at before an engine starts, or a folder is taken for results that never come.
    there = known(model, image, scenes_file, scenes) if scenes != 0 else None
    if scenes is None:
        scenes = min(SCENES, SCENES if there is None else there)
    chosen = CATEGORIES if categories == "all" else tuple(name.strip() for name in categories.split(","))
    unknown = [name for name in chosen if name not in CATEGORIES]
    if unknown:
        raise ValueError(f"categories: unknown {unknown[0]!r}; one of {', '.join(CATEGORIES)}")
    sizes = list(dict.fromkeys(text.strip() for text in budgets.split(",")))
    cells = grid(dict.fromkeys(name.strip() for name in presets.split(",")), sizes)
    cells += baseline_cells([name.strip() for name in baselines.split(",") if name.strip()], sizes)
    if ablation:
        small = [text for text in sizes if text not in ("1", "1.0")]
        cells += ablation_cells(image.raster.width, small)
    scale = _own_guidance(model, image) if guidance is None else guidance
    room = Room(gpu_memory_utilization, kv_cache_memory_bytes)
    asked = Asked(chosen, pictures, seed, scale, temperature, batch, dtype, room, size)
    evaluation = Evaluation(model, output, cells, asked, scenes, scenes_file)
    evaluation.check_folder()

    likelihoods = evaluation.likelihoods() if scenes else {}
    judged = evaluation.pictures() if pictures else {}
    records = report.summarise(cells, likelihoods, judged)
    settings = {"number": pictures, "scenes": scenes}
    command = " ".join(["vllm-kvcompress", *(_shown(argument) for argument in sys.argv[1:])])
    (output / "results.json").write_text(json.dumps(records, indent=1) + "\n")
    (output / "report.md").write_text(report.markdown(records, settings, command))
    written = ["results.json", "report.md", *_draw(evaluation, records, judged)]
    typer.echo((output / "report.md").read_text())
    typer.echo("\n".join(str(output / name) for name in written))


def _shown(argument: str) -> str:
    return (
        argument if argument.replace("/", "").replace(",", "").replace("-", "").isalnum() else repr(argument)
    )


def _check_family(model: str, pictures: int, size: str | None) -> "ImageModel":
    """What is known of the model. Raises ValueError, one line, if it can't be asked for this."""
    from vllm_kvcompress.eval.engine import described
    from vllm_kvcompress.models.registry import family_of

    config, image = described(model, size)
    family = family_of(config)
    if pictures and not family.sentences:
        raise ValueError(
            f"pictures: they are drawn from sentences, which {family.name} does not read; give --pictures 0, "
            "and known pictures whose captions are prompts with --scenes-file"
        )
    return image


def _own_guidance(model: str, image: "ImageModel") -> float:
    """What a server of the model would guide with by default."""
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(model).guidance_scale or image.guidance_scale
    except OSError:
        return image.guidance_scale


def _draw(evaluation: "Evaluation", records: list[dict[str, Any]], judged: dict[str, Any]) -> list[str]:
    """Write the plots that there is something to show for; their file names."""
    import numpy as np

    from vllm_kvcompress.eval.plots import draw_curves, draw_errors, draw_sheet

    folder = evaluation.folder
    written = []
    if draw_curves(records, folder / "quality.png"):
        written.append("quality.png")
    if draw_errors(records, KEPT_BUDGET, folder / "errors.png"):
        written.append("errors.png")
    raws = {cell.name: evaluation.raw(cell) for cell in evaluation.cells if evaluation.raw(cell).exists()}
    if judged and raws:
        prompts = evaluation.asked.prompts()
        at = np.linspace(0, len(prompts) - 1, min(SHEET_COLUMNS, len(prompts))).astype(int)
        rows = {}
        for name, path in raws.items():
            with np.load(path) as file:
                rows[name] = file["pictures"][at]
        draw_sheet(rows, [prompts[n].text for n in at], folder / "sheet.png")
        written.append("sheet.png")
    shown = [
        c for c in evaluation.cells if not (c.factor or c.baseline or c.keeps_all) and c.budget == KEPT_BUDGET
    ]
    refused = {r["name"] for r in records if "refused" in r}
    shown = [cell for cell in shown if cell.name not in refused]
    if evaluation.scenes and shown:
        evaluation.kept(shown, folder / "kept.png")
        written.append("kept.png")
    return written
