"""What is drawn: models, grids, and the memory that a picture's keys and values take."""

import hashlib
import json
import math
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from vllm_kvcompress.heads.curves import LossCurves, candidate_types
from vllm_kvcompress.heads.profile import HeadProfile
from vllm_kvcompress.policy.raster import Raster
from vllm_kvcompress.testing.checkpoints import SMALL_24, CheckpointGeometry, janus_pro_1b, make_checkpoint
from vllm_kvcompress.testing.quantised import quantise

ROOT = Path(__file__).resolve().parents[2]
SHAPES = ROOT / "examples" / "shapes" / "model"
OUT = ROOT / "out" / "bench"
PROMPT = "a red apple on a wooden table next to an old clock"
BYTES = 2  # of a number in bfloat16, which every contender runs in
BLOCK = 32  # tokens of vLLM's blocks where memory is fixed: its default of 128 would waste 7% of it

_SLACK = 1.12  # pages are rounded up, and hold side state
_MARGIN = 64  # tokens: the prompt, and the rounding of a page


@dataclass(frozen=True)
class Workload:
    """One model and the pictures it draws.

    Parameters
    ----------
    name, title : str
        In files; in tables.
    geometry : CheckpointGeometry or None
        Of the random weights; None for the shapes demo model.
    lines, width : int
        The picture's token grid.
    heads, head_size, layers : int
        KV heads and their size, of one branch.
    sampled : tuple of int
        Lines that are timed, first to last; whole pictures are integrated between them.
    memory_images : int
        If not 0: KV memory is that of so many full-cache pictures, and as many are drawn at once as fit.
    """

    name: str
    title: str
    geometry: CheckpointGeometry | None
    lines: int
    width: int
    heads: int
    head_size: int
    layers: int
    sampled: tuple[int, ...]
    memory_images: int = 0

    @property
    def tokens(self) -> int:
        """Image tokens of a picture."""
        return self.lines * self.width

    @property
    def token_bytes(self) -> int:
        """K and V of one token, both branches, all layers."""
        return 2 * 2 * self.heads * self.head_size * BYTES * self.layers

    def kv_memory(self, batch: int, budget: float) -> int:
        """Bytes in which ``batch`` pictures fit, each with ``budget`` of its tokens resident."""
        resident = _MARGIN + math.ceil(self.tokens * budget)
        return int(_SLACK * (batch + 1) * resident * self.token_bytes)

    def fixed_memory(self, prefix: int) -> int | None:
        """Bytes in which ``memory_images`` full-cache pictures fit, and vLLM's one null block."""
        if not self.memory_images:
            return None
        blocks = self.memory_images * -(-(prefix + self.tokens) // BLOCK) + 1
        return blocks * BLOCK * self.token_bytes

    @property
    def folder(self) -> Path:
        """Where the checkpoint is, or will be."""
        if self.geometry is None:
            return SHAPES
        mark = hashlib.sha256(json.dumps(asdict(self.geometry)).encode()).hexdigest()[:12]
        return OUT / "models" / f"janus-{mark}"

    def checkpoint(self, weights: str | None = None) -> Path:
        """The checkpoint's folder, written first if it isn't there.

        ``weights`` is the form of the decoder's linear layers, one of the quantised forms, made of the same
        numbers; None leaves them in bfloat16. ValueError for a form of the demo model's.
        """
        if self.geometry is None:
            if weights is not None:
                raise ValueError(f"the {self.title} has no {weights} weights")
            return self.folder
        folder = self.folder if weights is None else self.folder.with_name(f"{self.folder.name}-{weights}")
        if not (folder / "complete").exists():
            if weights is None:
                make_checkpoint(folder, geometry=self.geometry, dtype="bfloat16")
            else:
                shutil.rmtree(folder, ignore_errors=True)  # a copy that was interrupted
                quantise(self.checkpoint(), folder, weights)
            (folder / "complete").touch()
        return folder

    def settings(self, section: dict[str, Any]) -> dict[str, Any]:
        """A contender's ``kvcompress`` settings, with a head profile for random weights.

        Those have no local heads to find: half of the heads, drawn at random, are spatial, and loss curves
        are made up, of heads that need very different amounts. The demo model's profile is its own, measured
        when it is first served.
        """
        g = self.geometry
        if g is None:
            return section
        path = OUT / "profiles" / f"{g.layers}x{g.kv_heads}-{self.lines}x{self.width}.json"
        if not path.exists():
            draw = random.Random(0)
            path.parent.mkdir(parents=True, exist_ok=True)
            HeadProfile(
                format=2,
                head_size=self.head_size,
                dtype="bfloat16",
                curves=_curves(Raster(self.lines, self.width), g.layers, 2 * g.kv_heads).dump(),
                model="",
                model_hash="",
                metric="drawn at random",
                threshold=0.5,
                prompts_hash="",
                neighbourhood=2 * self.width,
                layers=g.layers,
                kv_heads=g.kv_heads,
                scores=_halves(draw, g.layers, g.kv_heads),
            ).save(path)
        return section | {"head_profile": str(path)}

    @contextmanager
    def grid(self) -> Iterator[None]:
        """The geometry override: in here, checkpoints draw ``lines`` lines of ``width`` tokens.

        Published Janus grids are square and their checkpoints state one number. A line that ends in an
        end-of-line token makes a grid with one more column than lines.
        """

        def raster(hf_config: object) -> Raster:
            return Raster(self.lines, self.width)

        if self.lines == self.width:
            yield
        else:
            with mock.patch("vllm_kvcompress.models.janus_family.raster_of", raster):
                yield


def _halves(draw: random.Random, layers: int, heads: int) -> list[list[float]]:
    """Scores of which half are above and half below a half, in random places."""
    scores = [(i + 0.5) / (layers * heads) for i in range(layers * heads)]
    draw.shuffle(scores)
    return [scores[layer * heads : (layer + 1) * heads] for layer in range(layers)]


def _curves(raster: Raster, layers: int, heads: int) -> LossCurves:
    """Losses that fall with a head's slots, each head's in its own way; some heads are better off scored."""
    candidates, draw = candidate_types(raster), np.random.default_rng(0)
    slots = np.array([rule.capacity for rule in candidates])
    need = draw.lognormal(-6, 2, (layers, heads, 1))
    reach = draw.uniform(0.8, 5, (layers, heads, 1)) * raster.width
    scored = draw.uniform(0.5, 1.6, (layers, heads, 1))
    losses = need * np.where([rule.ring for rule in candidates], 1.0, scored) * np.exp(-slots / reach)
    losses[..., [not rule.evicts for rule in candidates]] = 0
    return LossCurves(candidates, losses)


def janus(name: str, layers: int, sampled: tuple[int, ...], memory_images: int = 0) -> Workload:
    """Janus-Pro-1B's geometry, random weights."""
    title = f"Janus-Pro-1B, {'all 24' if layers == 24 else f'{layers} of 24'} layers"
    if memory_images:
        title += f", KV memory of {memory_images} full-cache pictures"
    return Workload(name, title, janus_pro_1b(layers), 24, 24, 16, 128, layers, sampled, memory_images)


def long_image(name: str, layers: int, sampled: tuple[int, ...]) -> Workload:
    """Janus-Pro-1B's layers drawing Lumina-mGPT-1024's grid: 64 lines of 64 tokens and an end of line."""
    title = f"Janus-Pro-1B, {layers} of 24 layers, 64 x 65 tokens as Lumina-mGPT-1024"
    return Workload(name, title, janus_pro_1b(layers), 64, 65, 16, 128, layers, sampled)


def lumina_1024(name: str, layers: int, sampled: tuple[int, ...]) -> Workload:
    """Lumina-mGPT-1024's layers (7B) and grid: 64 lines of 64 tokens and an end of line."""
    return _long(
        name, "Lumina-mGPT-1024", layers, sampled, kv_heads=32, intermediate=11008, codebook=8192, lines=64,
        max_positions=4608,
    )  # fmt: skip


def emu3(name: str, layers: int, sampled: tuple[int, ...]) -> Workload:
    """Emu3-Gen's layers (8B, four query heads a KV head) and grid: 90 lines of 90 tokens and a line end."""
    return _long(
        name, "Emu3", layers, sampled, kv_heads=8, intermediate=14336, codebook=32768, lines=90,
        max_positions=9216,
    )  # fmt: skip


def _long(name: str, model: str, layers: int, sampled: tuple[int, ...], **sizes: int) -> Workload:
    """A Llama of 32 heads of 128 that draws square pictures whose lines end in a token."""
    g = replace(janus_pro_1b(layers), hidden=4096, heads=32, text_vocab=16384, **sizes)
    width = g.lines + 1
    title = f"{model}'s geometry, {layers} of 32 layers, {g.lines} x {width} tokens"
    return Workload(name, title, g, g.lines, width, g.kv_heads, 128, layers, sampled)


def shapes(name: str, sampled: tuple[int, ...]) -> Workload:
    """The demo model."""
    return Workload(name, "shapes demo model", None, 24, 24, 4, 64, 6, sampled)


def tiny(name: str, memory_images: int = 0) -> Workload:
    """What the tests run: a published grid, and next to no layers."""
    g = SMALL_24
    return Workload(
        name, "tiny", g, 24, 24, g.heads, g.hidden // g.heads, g.layers, (0, 4, 23), memory_images
    )
