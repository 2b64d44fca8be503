"""The models that gpu.py measures, their head types, and caches full of random numbers."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_kvcompress.attention.pages import HeadType, Plan, page_bytes, pages_from_bytes
from vllm_kvcompress.policy import Policy
from vllm_kvcompress.policy.raster import Raster
from vllm_kvcompress.policy.rule import HeadRule

PREFIX = 20


@dataclass(frozen=True)
class Geometry:
    """A language model; heads are those of one branch."""

    name: str
    layers: int
    hidden: int
    heads: int
    mlp: int
    codes: int = 16384
    head_size: int = 128
    lines: int = 24
    width: int = 24
    anchors: int = 4
    fitted: tuple[int, ...] = (28, 52, 76, 100, 148)  # slots of four rings and of scored heads

    @property
    def image(self) -> int:
        return self.lines * self.width


JANUS_1B = Geometry("Janus-Pro-1B", 24, 2048, 16, 5632)
JANUS_7B = Geometry("Janus-Pro-7B", 30, 4096, 32, 11008)
TINY = Geometry("tiny", 2, 64, 2, 96, 32, 16, 4, 3, 1, (4, 5, 6, 7, 8))


@dataclass(frozen=True)
class Layout:
    """Head types, and ``kinds`` [layers, 2 * heads]: the type of every cache head."""

    rules: list[HeadRule]
    kinds: Tensor

    @property
    def slots(self) -> float:
        """Image slots per head, mean over the heads."""
        return float(torch.tensor([float(rule.capacity) for rule in self.rules])[self.kinds].mean())


def layouts(shape: Geometry, budget: float) -> dict[str, Layout]:
    """``decoupled``: two types, half of the heads each. ``fitted``: six types.

    A fit spreads its types unevenly over layers and branches; here they are drawn by lot. The five smaller
    types have fixed shares, and as many heads keep all as bring the mean to the budget. There is none where
    the budget is below the mean of the five, or the whole picture.
    """
    per_layer, line, image = 2 * shape.heads, shape.width, shape.image
    pair = Policy("decoupled", budget).rules(Raster(shape.lines, line), 1, 1)
    alternating = (torch.arange(per_layer) % 2).expand(shape.layers, -1)
    found = {"decoupled": Layout([rule for rule in pair if rule], alternating)}
    *rings, scored = shape.fitted
    share = torch.tensor([7, 5, 5, 5, 8]) / 30
    mean = float((share * torch.tensor(shape.fitted)).sum())
    if budget >= 1 or budget * image < 0.98 * mean:
        return found
    rules = [HeadRule(n, line, image, shape.anchors, n - shape.anchors, ring=True) for n in rings]
    kept = shape.anchors, (scored - line - shape.anchors) // 2
    rules.append(HeadRule(scored, line, image, *kept, value_norm=True, smooth_row=True))
    rules.append(HeadRule(image, line, image))
    heads = shape.layers * per_layer
    whole = max(1, math.floor(heads * (budget * image - mean) / (image - mean)))
    ends = ((heads - whole) * share.cumsum(0)).round().long()
    kinds = torch.bucketize(torch.arange(heads), ends, right=True)
    lot = torch.randperm(heads, generator=torch.Generator().manual_seed(0))
    return found | {"fitted": Layout(rules, kinds[lot].view(shape.layers, per_layer))}


class Caches:
    """The pages of all layers in a steady state, in the middle of line ``line`` of the picture."""

    def __init__(
        self, shape: Geometry, images: int, layout: Layout, dtype: torch.dtype, device: str, line: int
    ) -> None:
        self.layers: list[list[HeadType]] = [[] for _ in range(shape.layers)]
        self.together: list[HeadType] = []
        self.kv_bytes = 0  # of all layers: K and V of resident slots, read once
        self.score_bytes = 0  # of all layers: read and written
        drawn = line * shape.width + shape.width // 2
        for kind, rule in enumerate(layout.rules):
            mine = [(layer == kind).nonzero().flatten().int().to(device) for layer in layout.kinds]
            page, owned = 4, sum(map(len, mine))
            if not owned:
                continue
            per_row = math.ceil((PREFIX + rule.capacity) / page)
            size = -(-page_bytes(owned, page, shape.head_size, dtype, rule.scores) // 64) * 64
            raw = torch.zeros(images * per_row, size, dtype=torch.uint8, device=device)
            pages = pages_from_bytes(raw, owned, page, shape.head_size, dtype, rule.scores)
            for block in pages.kv.split(64):  # in pieces: random numbers are made in the cache's dtype
                block.normal_()
            table = torch.randperm(images * per_row, device=device).view(images, per_row).int()
            if rule.scores:
                pages.score.uniform_()
                pages.victim.copy_(torch.randint(0, rule.capacity, pages.victim.shape, device=device))
                held = torch.arange(per_row * page, device=device) - PREFIX  # slot s holds token s
                held = held.clamp(-1, drawn - 1).short().view(per_row, 1, page)
                pages.token[table.long()] = held.expand(per_row, owned, page)
            self.together.append(HeadType(pages, rule, torch.cat(mine), table))
            first = 0
            for types, index in zip(self.layers, mine, strict=True):
                if len(index):
                    types.append(HeadType(pages.layer(first, first + len(index)), rule, index, table))
                first += len(index)
            slots = images * owned * (PREFIX + min(drawn, rule.capacity))
            self.kv_bytes += slots * 2 * shape.head_size * dtype.itemsize
            self.score_bytes += slots * 8 if rule.scores else 0
        prefix = torch.full((images,), PREFIX, dtype=torch.int32, device=device)
        self.plan = Plan(prefix, prefix + drawn)
        self.line_end = Plan(prefix, prefix + drawn // shape.width * shape.width)
