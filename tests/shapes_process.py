"""The scripts of examples/shapes one after another, as their README's "Repeat" runs them, on a tiny model.

Run by tests/test_examples.py with a folder to write into. Each script's own ``main`` reads its own command
line; what makes it quick are smaller constants, one step a stage, and no torch.compile.
"""

import importlib
import os
import sys
from dataclasses import replace
from pathlib import Path

SHAPES = Path(__file__).parents[1] / "examples" / "shapes"
EVALUATE = ("evaluate", "--number", 1, "--round-trip", 1, "--categories", "colors")
SCRIPTS = ("train_vq", "train_lm", "export", "to_deepseek", "evaluate")


def main(folder: Path) -> None:
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    sys.path.insert(0, str(SHAPES))
    # The first two are read when the scripts are imported: in this order.
    geometry = importlib.import_module("geometry")
    geometry.GEOMETRY = replace(
        geometry.GEOMETRY, hidden=32, layers=1, heads=2, kv_heads=2, intermediate=32, vq_channels=32,
        vq_latent=32, codebook=64,
    )  # fmt: skip
    geometry.MODEL_FOLDER = folder / "model"
    geometry.CAPTIONS = 200
    patches = importlib.import_module("patches")
    patches.SCENES, patches.ITERATIONS = 100, 2
    export = importlib.import_module("export")
    export.HELD_OUT_SCENES = 2
    importlib.import_module("train_lm").VALID_BATCH = 2
    importlib.import_module("train_vq").validate.__defaults__ = (2,)
    codes, vq, lm = folder / "vq" / "codes.pt", folder / "vq" / "vq.pt", folder / "lm"
    importlib.import_module("evaluate").BATCH = 1
    for words in (
        ["train_vq", "--run", vq.parent, "--steps", 2, "--decay", 1, "--whole", 1, "--batch", 1],
        ["train_lm", "--codes", codes, "--run", lm, "--steps", 1, "--easy", 1, "--batch", 1],
        ["train_lm", "--codes", codes, "--run", lm, "--steps", 2, "--guided", 1, "--batch", 1],
        ["export", "--vq", vq, "--lm", lm / "lm.pt", "--codes", codes],
        ["to_deepseek", folder / "model", folder / "original"],
        [*EVALUATE, "--sheet", folder / "sheet.png"],
    ):
        script, *sys.argv[1:] = map(str, words)
        if script in ("train_vq", "train_lm", "evaluate"):
            sys.argv += ["--threads", "1"]
        assert script in SCRIPTS
        importlib.import_module(script).main()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
