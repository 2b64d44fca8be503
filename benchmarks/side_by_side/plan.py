"""What a run consists of, most wanted first: groups of contenders that take turns on a workload."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from side_by_side.child import FIT
from side_by_side.contenders import (
    CONTENDERS,
    LONG,
    OURS,
    OURS_INT8,
    PRESETS,
    STOCK,
    STOCK_INT8,
    TRANSFORMERS,
)
from side_by_side.workloads import Workload, emu3, janus, long_image, lumina_1024, shapes, tiny

MODES = ("quick", "full", "tiny", "tiny-more")


@dataclass(frozen=True)
class Cell:
    """One contender, one batch, one repeat: what is measured and written at a time."""

    workload: Workload
    contender: str
    batch: int | str
    repeat: int
    lines: tuple[int, ...]
    split: int | None
    whole: bool
    limit: int  # largest batch that the contender's process will be asked for

    @property
    def key(self) -> tuple[str, str, str, int]:
        return self.workload.name, self.contender, str(self.batch), self.repeat


@dataclass(frozen=True)
class Group:
    """Contenders that take turns: A B C A B C, batch by batch.

    Parameters
    ----------
    name : str
        For ``--only``.
    lines : pairs of int and tuple of int
        Lines that are timed at a batch, instead of the workload's.
    whole : bool
        Whether pictures are also drawn whole: what the figures integrated from lines are checked against.
    """

    name: str
    workload: Workload
    contenders: tuple[str, ...]
    batches: tuple[int | str, ...]
    repeats: int
    most: int = 0
    lines: tuple[tuple[int, tuple[int, ...]], ...] = ()
    whole: bool = False

    def cells(self) -> Iterator[Cell]:
        limit = self.most or max(batch for batch in self.batches if isinstance(batch, int))
        lines = dict(self.lines)
        for repeat in range(self.repeats):
            for batch in self.batches:
                at = (
                    lines.get(batch, self.workload.sampled)
                    if isinstance(batch, int)
                    else self.workload.sampled
                )
                split = at[len(at) // 2] if repeat == 0 else None
                for contender in self.contenders:
                    yield Cell(self.workload, contender, batch, repeat, at, split, self.whole, limit)


@dataclass(frozen=True)
class HttpGroup:
    """Servers asked over HTTP by ``vllm bench serve``, at a fixed KV memory.

    Parameters
    ----------
    memory_images : int
        Full-cache pictures that the memory holds.
    loads : tuple of float
        Arrival rates of the open loop, as shares of the stock server's pictures/s at saturation.
    """

    name: str
    workload: Workload
    contenders: tuple[str, ...]
    repeats: int
    pictures: int
    memory_images: int = 8
    loads: tuple[float, ...] = (0.7,)


_ALL = tuple(name for name, one in CONTENDERS.items() if name != LONG and one.weights is None)
_SIXTHS = tuple(f"{preset} 1/6" for preset in PRESETS)
_MAIN = (TRANSFORMERS, STOCK, OURS)
_TYPES = tuple(f"{preset} {budget}" for budget in ("1/5", "1/6") for preset in ("decoupled", "fitted"))
_WEIGHTS = (TRANSFORMERS, STOCK, STOCK_INT8, OURS, OURS_INT8)
_OTHERS = tuple(name for name in _ALL if name not in _MAIN)


def groups(mode: str) -> list[Group | HttpGroup]:
    """The run's parts, in the order in which they are done."""
    if mode == "full":
        return [
            Group("bars", janus("janus-1b", 24, (0, 2, 4, 8, 12, 16, 20, 23)), _MAIN, (1, 4, 16), 5),
            # 64 pictures of all layers have 15 GB of full cache, beside the weights.
            Group("bars-64", janus("janus-1b-64", 12, (0, 4, 12, 23)), _MAIN, (64,), 5),
            Group(
                "memory", janus("janus-1b-memory", 24, (0, 4, 12, 23), 8), (STOCK, *_SIXTHS), (FIT,), 5, 64
            ),
            HttpGroup(
                "http", shapes("shapes-http", ()), (STOCK, "fitted 1/5", OURS), 3, 96, 8, (0.5, 0.7, 0.9)
            ),
            HttpGroup("http-1b", janus("janus-1b-http", 24, ()), (STOCK, OURS), 1, 24, 8, (0.7,)),
            Group(
                "long",
                long_image("long", 12, (0, 6, 12, 24, 36, 48, 63)),
                (STOCK, OURS, "line_ar 1/6"),
                (4,),
                3,
            ),
            Group("lumina", lumina_1024("lumina", 4, (0, 6, 11, 24, 36, 48, 63)), (STOCK, LONG), (1, 4), 3),
            Group("emu3", emu3("emu3", 4, (0, 8, 15, 34, 51, 68, 89)), (STOCK, LONG), (1, 4), 3),
            Group("types", janus("janus-1b-types", 24, (0, 4, 12, 23)), _TYPES, (16,), 5),
            Group("weights", janus("janus-1b-weights", 24, (0, 4, 12, 23)), _WEIGHTS, (16,), 5),
            Group("presets", janus("janus-1b", 24, (0, 4, 12, 23)), _OTHERS, (1, 4, 16), 3),
            Group("presets-64", janus("janus-1b-64", 12, (0, 4, 23)), _OTHERS, (64,), 3),
            Group("whole", janus("janus-1b-whole", 24, (0, 4, 12, 23)), _MAIN, (4,), 3, whole=True),
            Group("shapes", shapes("shapes", (0, 4, 12, 23)), _ALL, (1, 4, 16, 64), 5),
        ]
    if mode == "quick":
        model = janus("janus-1b", 6, (0, 4, 12, 23))
        return [
            Group("bars", model, _MAIN, (1, 4, 16, 64), 3, lines=((64, (0, 4, 23)),)),
            Group("memory", janus("janus-1b-memory", 6, (0, 4, 23), 8), (STOCK, OURS), (FIT,), 3, 64),
            HttpGroup("http", shapes("shapes-http", ()), (STOCK, OURS), 2, 32),
            Group("long", long_image("long", 4, (0, 11, 32, 63)), (STOCK, OURS), (4,), 2),
            Group("lumina", lumina_1024("lumina", 6, (0, 11, 32, 63)), (STOCK, LONG), (1, 4), 3),
            Group("emu3", emu3("emu3", 2, (0, 15, 45, 89)), (STOCK, LONG), (1, 4), 3),
            Group(
                "types",
                janus("janus-1b-types", 6, (0, 4, 12, 23)),
                _TYPES,
                (16, 64),
                3,
                lines=((16, (4, 12, 23)), (64, (12, 23))),
            ),
            Group("weights", janus("janus-1b-weights", 6, (0, 4, 12, 23)), _WEIGHTS, (16,), 3),
            Group("presets", model, _OTHERS, (16,), 2),
            Group("whole", janus("janus-1b-whole", 6, (0, 4, 23)), _MAIN, (4,), 1, whole=True),
            Group("shapes", shapes("shapes", (0, 4, 23)), (TRANSFORMERS, STOCK, *_SIXTHS), (1, 16), 2),
        ]
    if mode == "tiny":
        return [Group("bars", tiny("tiny"), _MAIN, (1, 2), 2)]
    if mode == "tiny-more":  # engines of their own: tests/soak
        return [
            HttpGroup("http", tiny("tiny-http"), (STOCK,), 1, 3, 2),
            Group("memory", tiny("tiny-memory", 2), (STOCK, OURS), (FIT,), 1, 12),
            Group("weights", tiny("tiny-weights"), _WEIGHTS, (2,), 1),
            Group("whole", replace(tiny("tiny-wide"), width=25), (STOCK, OURS), (2,), 1, whole=True),
        ]
    raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
