"""The aims that the benchmark holds the package to, and what a run says about each."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from side_by_side.child import FIT
from side_by_side.contenders import EARLIER, LONG, OURS, OURS_INT8, STOCK, STOCK_INT8, TRANSFORMERS
from side_by_side.summary import (
    Figure,
    Samples,
    growth,
    pictures_per_second,
    tokens_per_second,
)
from side_by_side.workloads import Workload


@dataclass(frozen=True)
class Bar:
    """One aim: a ratio between two contenders, or of one contender's late to its early steps."""

    text: str
    group: str
    batch: str
    value: Callable[[Any, Workload], float]
    under: str | None
    aim: float
    at_least: bool = True
    contender: str = OURS

    def measured(self, samples: Samples, workload: Workload) -> Figure | None:
        """What the run gave; None if it has not been measured. Runs of before are about whom they were."""
        for contender in (self.contender, *((EARLIER,) if self.contender == OURS else ())):
            if self.under is None:
                found = samples.figure(workload, contender, self.batch, self.value)
            else:
                found = samples.ratio(workload, self.batch, contender, self.under, self.value)
            if found is not None:
                return found
        return None

    def met(self, figure: Figure) -> bool:
        """Whether the median is on the right side of the aim."""
        return figure.median >= self.aim if self.at_least else figure.median <= self.aim


BARS = (
    Bar("image tokens/s over transformers', 16 images", "bars", "16", tokens_per_second, TRANSFORMERS, 2.5),
    Bar("image tokens/s over the stock full cache's, 16 images", "bars", "16", tokens_per_second, STOCK, 1.2),
    Bar("image tokens/s over the stock full cache's, 64 images", "bars", "64", tokens_per_second, STOCK, 1.5),
    Bar(
        "pictures/s over the stock full cache's, KV memory of 8 full-cache images",
        "memory", FIT, pictures_per_second, STOCK, 2.0,
    ),
    Bar("image tokens/s over the stock full cache's, 1 image", "bars", "1", tokens_per_second, STOCK, 0.97),
    Bar(
        "last line's step over the first line's past the budget, 16 images",
        "bars", "16", growth, None, 1.05, at_least=False,
    ),
    Bar("the same for the stock full cache (grows)", "bars", "16", growth, None, 1.05, contender=STOCK),
    # Both forms in one run: what fewer bytes of weights give, and what they make of the first bar.
    Bar("int8 weights: image tokens/s over transformers' bfloat16, 16 images",
        "weights", "16", tokens_per_second, TRANSFORMERS, 2.5, contender=OURS_INT8),
    Bar("bfloat16 weights, in the same run: image tokens/s over transformers', 16 images",
        "weights", "16", tokens_per_second, TRANSFORMERS, 2.5),
    Bar("int8 over bfloat16 weights, compressed cache, 16 images",
        "weights", "16", tokens_per_second, OURS, 1.0, contender=OURS_INT8),
    Bar("int8 over bfloat16 weights, stock full cache, 16 images",
        "weights", "16", tokens_per_second, STOCK, 1.0, contender=STOCK_INT8),
    *(
        Bar(f"image tokens/s over the stock full cache's, {batch} {of}, budget 1/8",
            group, batch, tokens_per_second, STOCK, aim, contender=LONG)
        for group, of in (("lumina", "of Lumina-mGPT-1024's"), ("emu3", "of Emu3's"))
        for batch, aim in (("4", 2.0), ("1", 1.5))
    ),
    *(
        Bar(f"last line's step over the first line's past the budget, 4 {of}",
            group, "4", growth, None, 1.05, at_least=False, contender=LONG)
        for group, of in (("lumina", "of Lumina-mGPT-1024's"), ("emu3", "of Emu3's"))
    ),
)  # fmt: skip
