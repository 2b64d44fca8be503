"""docs/models.md: its table of sizes says what the code computes."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Emu3TextConfig

from vllm_kvcompress.cache.layout import TYPICAL_PREFIX, CacheLayout, footprint
from vllm_kvcompress.cache.plan import ModelShape, plan_layout, split_pages
from vllm_kvcompress.heads.fit import by_threshold
from vllm_kvcompress.models.llamagen.config import PREFIX, LlamaGenConfig
from vllm_kvcompress.models.llamagen.source import HEADS
from vllm_kvcompress.policy import Policy, Raster

DOCUMENT = (Path(__file__).parents[1] / "docs" / "models.md").read_text(encoding="utf-8")
VQ = {"codes": 16384, "embed": 8, "z": 256, "ch": 128, "ch_mult": [1, 1, 2, 2, 4], "res_blocks": 2}
C2I = {"B": (768, 12), "L": (1024, 24), "XL": (1280, 36), "XXL": (1536, 48), "3B": (3200, 24)}
JANUS = {"Janus-Pro-1B": (24, 16), "Janus-Pro-7B": (30, 32)}  # layers, heads of 128
EMU3 = "Emu3-Gen-hf"
LUMINA = {"Lumina-mGPT-7B-768": 768, "Lumina-mGPT-7B-1024": 1024}  # pixels
ROWS = re.findall(r"^\| `?(?:c2i_)?([^|`]+?)(?:\.pt)?`? \|(.+)\|$", DOCUMENT, re.MULTILINE)
SIZES = {name: [cell.strip() for cell in cells.split("|")] for name, cells in ROWS if "MiB" in cells}


def geometry(name: str) -> tuple[ModelShape, Raster, int]:
    if name == EMU3:
        text, grid = Emu3TextConfig(), Raster(90, 91, 8, ends=1)
        head = text.hidden_size // text.num_attention_heads
        return ModelShape(text.num_hidden_layers, text.num_key_value_heads, head), grid, 80
    if name in LUMINA:
        lines = LUMINA[name] // 16
        return ModelShape(32, 32, 128), Raster(lines, lines + 1, ends=1), 45
    if name in JANUS:
        layers, heads = JANUS[name]
        return ModelShape(layers, heads, 128), Raster(24, 24), TYPICAL_PREFIX
    size, pixels = name.split("_")
    hidden, layers = C2I[size]
    config = LlamaGenConfig(
        grid=int(pixels) // 16, hidden_size=hidden, num_hidden_layers=layers, intermediate_size=256,
        num_attention_heads=HEADS[hidden], vq=VQ,
    )  # fmt: skip
    shape = ModelShape(layers, HEADS[hidden], config.text_config.cached_head_size)
    return shape, Raster(config.grid, config.grid), PREFIX


def test_every_model_has_its_sizes() -> None:
    published = ["B_256", "B_384", "L_256", "L_384", "XL_384", "XXL_384", "3B_384"]
    assert list(SIZES) == [*JANUS, *published, EMU3, *LUMINA]


@pytest.mark.parametrize("name", SIZES)
def test_the_table_of_sizes(name: str) -> None:
    shape, raster, prefix = geometry(name)
    size = footprint(layout(shape, raster, 1 / 6), prefix)
    tokens, a_token, whole, kept = SIZES[name][-4:]
    said = f"{size.full / 2**20:.1f} MiB", f"{size.resident / 2**20:.1f} MiB"
    per_token = size.full // (prefix + raster.tokens) / 2**10
    assert (tokens, a_token, (whole, kept)) == (str(raster.tokens), f"{per_token:.0f} KiB", said)


def test_the_readmes_table_is_an_excerpt() -> None:
    """Parameters, tokens and bytes of its models, found by the checkpoint's name."""
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    section = readme.split("\n## Models\n")[1].split("\n## ")[0]
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if "MiB" in line
    ]
    assert len(rows) == 6
    for _, checkpoint, parameters, tokens, kept, _ in rows:
        [name] = [name for name in SIZES if re.search(rf"[/_]{name}\b", checkpoint)]
        cells = SIZES[name]
        assert (parameters, tokens, kept) == (cells[0], cells[2], f"{cells[4]}, {cells[5]}"), name


def test_an_eighth_of_the_longest_pictures() -> None:
    shape, raster, prefix = geometry("Lumina-mGPT-7B-1024")
    size = footprint(layout(shape, raster, 1 / 8), prefix)
    assert f"at an eighth {size.resident / 1e9:.2f} GB instead of {size.full / 1e9:.2f}" in DOCUMENT


def layout(shape: ModelShape, raster: Raster, budget: float) -> CacheLayout:
    """Of ``line_ar``, whose heads are of one type."""
    heads = (shape.layers, shape.kv_heads)
    semantic, margin = np.zeros(heads, bool), np.zeros(heads)
    assignment = by_threshold(Policy("line_ar", budget), raster, semantic, margin, split_pages, 1)
    return plan_layout(assignment, shape, torch.bfloat16)
