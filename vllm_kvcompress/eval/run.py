"""One evaluation: likelihoods, pictures, report; resumable, in one folder.

A folder belongs to its settings: what is there already is kept, what is missing is measured, and other
settings are refused rather than mixed in.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from vllm_kvcompress.eval import held_out
from vllm_kvcompress.eval.cells import Cell
from vllm_kvcompress.eval.engine import asking, in_process, start
from vllm_kvcompress.eval.judge import Verdict
from vllm_kvcompress.eval.kept import draw_kept, kvcompress_kept
from vllm_kvcompress.eval.likelihood import Likelihood, Trial, replay_batches
from vllm_kvcompress.eval.online_drawing import draw_online
from vllm_kvcompress.eval.pictures import Asked, draw, judge_all, true_scenes
from vllm_kvcompress.heads.profile import HeadProfile
from vllm_kvcompress.heads.provide import OWN
from vllm_kvcompress.models.registry import image_model_of

KEPT_SCENES = 4
_LOOKED_AT = 1 << 20  # bytes at either end of a file
_RESULTS = ("likelihood.json", "pictures", "judged", "profiles")
GROUP = 8
"""Cells replayed between two savings."""


@dataclass(frozen=True)
class Evaluation:
    """What is measured, and where it goes.

    Parameters
    ----------
    model : str
        Checkpoint folder or hub name.
    folder : Path
    cells : sequence of Cell
    asked : Asked
        The pictures to draw.
    scenes : int
        Known pictures that are replayed.
    scenes_file : Path, optional
        Where from, see `vllm_kvcompress.eval.held_out`.
    replay_batch : int
        Of them at once.
    """

    model: str
    folder: Path
    cells: Sequence[Cell]
    asked: Asked
    scenes: int = 64
    scenes_file: Path | None = None
    replay_batch: int = 16

    def check_folder(self) -> None:
        """Create the folder, or refuse one whose results have other settings: ValueError, one line.

        One that was begun and has no results yet, since an engine did not start, is anybody's.
        """
        mine = {"model": Path(self.model).name, **asdict(self.asked), "scenes": self.scenes}
        mine["categories"] = list(self.asked.categories)
        mine["scenes_file"] = self.scenes_file and str(self.scenes_file.resolve())
        mine["files"] = _digest(Path(self.model), self.scenes_file)
        for unimportant in ("batch", "room"):
            mine.pop(unimportant)
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "settings.json"
        if not any((self.folder / name).exists() for name in _RESULTS) or not path.exists():
            _write(path, mine)
            return
        there = json.loads(path.read_text())
        there.setdefault("files", mine["files"])  # of a folder from before they were looked at
        for name, value in mine.items():
            if there.get(name) != value:
                raise ValueError(
                    f"{self.folder} holds results with {name} {there.get(name)!r}, not {value!r}; "
                    "name another folder or remove it"
                )

    def likelihoods(self) -> dict[str, Likelihood]:
        """Replay every cell that has not been; of each cell by name."""
        path = self.folder / "likelihood.json"
        done = json.loads(path.read_text()) if path.exists() else {}
        missing = [
            cell for cell in self.cells if done.get(cell.name, {"refused": "never tried"}).get("refused")
        ]
        if missing:
            in_process(_replay, self, missing, path)
            done = json.loads(path.read_text())
        return {cell.name: Likelihood(**done[cell.name]) for cell in self.cells}

    def pictures(self) -> dict[str, dict[str, Any]]:
        """Draw and judge every cell that has not been; verdicts by name.

        A cell that keeps all has the full cache's pictures, token for token, and is not drawn again;
        neither is one whose rule only the replay has.
        """
        truth = None
        found: dict[str, dict[str, Any]] = {}
        drawn = [c for c in self.cells if c.score is None and not c.per_layer]
        same = next((c for c in drawn if c.keeps_all), None)
        for cell in tqdm(drawn, desc="cells", unit="cell"):
            if cell.keeps_all and cell is not same:
                continue
            judged = self.folder / "judged" / f"{cell.name}.json"
            if not _judged_by_this_judge(judged):
                raw = self.raw(cell)
                if not raw.exists():
                    try:
                        pixels = in_process(*self._drawing(cell))
                    except ValueError as error:
                        _write(judged, {"refused": str(error).splitlines()[0], "verdicts": []})
                        continue
                    raw.parent.mkdir(exist_ok=True)
                    part = raw.with_suffix(".part.npz")  # a reader never sees half a file
                    np.savez_compressed(part, pictures=pixels)
                    part.replace(raw)
                truth = truth or _truth()
                with np.load(raw) as file:
                    _write(judged, judge_all(file["pictures"], self.asked, truth))
            found[cell.name] = json.loads(judged.read_text())
        for cell in drawn:
            if cell.keeps_all and same is not None and cell is not same:
                found[cell.name] = found[same.name] | {"same_as": same.name}
        return found

    def _drawing(self, cell: Cell) -> tuple[Any, ...]:
        """What draws a cell, and what it is called with."""
        if cell.online is None:
            return draw, self.model, cell.section, self.asked
        return draw_online, self.model, Trial(cell.section, online=cell.online), self.asked

    def kept(self, cells: Sequence[Cell], path: Path) -> None:
        """Draw which image tokens these cells' heads hold, as a picture; again where it is of other cells."""
        names, drawn = [cell.name for cell in cells], path.with_suffix(".json")
        if not cells or (path.exists() and drawn.exists() and json.loads(drawn.read_text()) == names):
            return
        in_process(_look, self, cells, path)
        _write(drawn, names)

    def raw(self, cell: Cell) -> Path:
        """Where a cell's pictures are."""
        return self.folder / "pictures" / f"{cell.name}.npz"


def _judged_by_this_judge(path: Path) -> bool:
    """Whether verdicts are there, and have all that a verdict has now. What was refused is tried again."""
    if not path.exists():
        return False
    verdicts = json.loads(path.read_text())["verdicts"]
    return bool(verdicts) and all(field.name in one for one in verdicts for field in fields(Verdict))


def _digest(model: Path, scenes: Path | None) -> str:
    """Of what results hang on: the weights by their sizes and ends, the model's own profile, the scenes."""
    found = hashlib.sha256()
    files = [*model.glob("*.safetensors"), *model.glob("*.bin"), *model.glob(OWN), *model.glob(held_out.FILE)]
    for path in [*sorted(files), *([scenes] if scenes is not None and scenes.is_file() else [])]:
        size = path.stat().st_size
        with path.open("rb") as file:
            ends = file.read(_LOOKED_AT)
            file.seek(max(0, size - _LOOKED_AT))
            found.update(f"{path.name} {size}".encode() + ends + file.read(_LOOKED_AT))
    return found.hexdigest()[:16]


def _truth() -> Any:
    from vllm_kvcompress.eval.features import Frechet

    return Frechet.of(true_scenes())


def _replay(evaluation: Evaluation, cells: Sequence[Cell], path: Path) -> None:
    asked = evaluation.asked
    llm = start(evaluation.model, {"preset": "full"}, 1, asked.dtype, asked.room, asked.size)
    try:
        scenes = _scenes(evaluation, llm, evaluation.scenes)
        resolve = Profiles(llm, evaluation.folder / "profiles")
        bar = tqdm(total=len(cells) * len(scenes), desc="replay", unit="picture")
        for first in range(0, len(cells), GROUP):
            group = cells[first : first + GROUP]
            trials = {c.name: Trial(resolve(c.section), c.score, c.per_layer, c.online) for c in group}
            found = {name: Likelihood() for name in trials}
            batches = replay_batches(llm, scenes, trials, evaluation.asked.guidance, evaluation.replay_batch)
            before = 0
            for done, part in batches:
                for name, one in part.items():
                    found[name].extend(one)
                bar.update(len(group) * (done - before))
                before = done
            held = json.loads(path.read_text()) if path.exists() else {}
            _write(path, held | {name: asdict(one) for name, one in found.items()})
        bar.close()
    finally:
        llm.llm_engine.engine_core.shutdown()


def _scenes(evaluation: Evaluation, llm: Any, number: int) -> list[tuple[list[int], list[int]]]:
    """(prompt ids, codes) of held-out pictures."""
    captions, codes = held_out.scenes_for(evaluation.model, number, evaluation.scenes_file)
    image = image_model_of(llm.model_config.hf_config)
    held_out.check(codes, image)
    prompts = asking(llm, captions)
    room = llm.model_config.hf_config.get_text_config().max_position_embeddings - image.raster.tokens
    for caption, ids in zip(captions, prompts, strict=True):
        if len(ids) > room:
            raise ValueError(
                f"scenes: {caption!r:.60} has {len(ids)} tokens, a picture leaves room for {room}"
            )
    return list(zip(prompts, codes.tolist(), strict=True))


def _look(evaluation: Evaluation, cells: Sequence[Cell], path: Path) -> None:
    asked = evaluation.asked
    llm = start(evaluation.model, {"preset": "full"}, 1, asked.dtype, asked.room, asked.size)
    try:
        scenes = _scenes(evaluation, llm, min(KEPT_SCENES, evaluation.scenes))
        prompts, codes = [ids for ids, _ in scenes], [picture for _, picture in scenes]
        kept = {}
        for cell in tqdm(cells, desc="kept tokens", unit="cell"):
            [kept[cell.name]] = llm.collective_rpc(
                kvcompress_kept, args=(prompts, codes, Trial(cell.section))
            )
        raster = image_model_of(llm.model_config.hf_config).raster
        lines = [raster.lines * n // 4 for n in (1, 2, 3)] + [raster.lines - 1]
        draw_kept(kept, raster.width, path, sorted({line for line in lines if line}))
    finally:
        llm.llm_engine.engine_core.shutdown()


class Profiles:
    """Turns the harness's own settings ``quantile`` and ``neighbourhood`` into a server's.

    ``neighbourhood`` (lines): head scores measured with it; ``quantile``: the threshold at that quantile
    of the scores, so that this share of the heads is spatial.
    """

    def __init__(self, llm: Any, folder: Path) -> None:
        self.llm, self.folder = llm, folder

    def __call__(self, section: dict[str, Any]) -> dict[str, Any]:
        section = dict(section)
        quantile, lines = section.pop("quantile", None), section.pop("neighbourhood", None)
        if quantile is None and lines is None:
            return section
        path = self.folder / f"lines-{lines or 2}.json"
        if not path.exists():
            [text] = self.llm.collective_rpc("kvcompress_calibrate", args=(None, lines or 0))
            HeadProfile.model_validate_json(text).save(path)
        section["head_profile"] = str(path)
        if quantile is not None:
            section["threshold"] = float(np.quantile(HeadProfile.load(path).scores, quantile))
        return section


def _write(path: Path, content: Any) -> None:
    """JSON; a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.replace(path)
