"""Counters of finished pictures on vLLM's ``/metrics``, with vLLM's labels.

They are there, at 0, from the server's start, or Prometheus' ``rate()`` would lose the first picture; and
only where pictures are served.
"""

from collections.abc import Iterator, Mapping
from functools import cache
from typing import TYPE_CHECKING

from prometheus_client import REGISTRY, Counter, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient

LABELS = ("model_name", "engine")
HEAD_TYPES = ("spatial", "semantic")


class _Counters(Collector):
    """All counters as one collector.

    A second engine of the process unregisters every collector that bears a name of vLLM's; this has none.
    """

    def __init__(self) -> None:
        def counter(name: str, words: str, *labels: str) -> Counter:
            return Counter(f"vllm:image_{name}", words, (*LABELS, *labels), registry=None)

        self.pictures = counter("pictures", "Finished pictures.")
        self.resident = counter("kv_resident_bytes", "KV bytes held by finished pictures, each at its end.")
        self.full = counter("kv_full_bytes", "KV bytes that a full cache would have held for them.")
        self.evicted = counter(
            "kv_evicted_tokens", "Image tokens overwritten in each head of a type.", "head_type"
        )
        self.steps = counter(
            "steps", "Steps that have given finished pictures tokens, each picture's counted."
        )
        self.steps_tokens = counter("steps_tokens", "Image tokens that those steps have given.")

    def collect(self) -> Iterator[Metric]:
        every = self.pictures, self.resident, self.full, self.evicted, self.steps, self.steps_tokens
        for counter in every:
            yield from counter.collect()


@cache
def _counters() -> _Counters:
    """This process's; Prometheus takes a name once."""
    counters = _Counters()
    REGISTRY.register(counters)
    return counters


class PictureMetrics:
    """The counters of one server.

    Parameters
    ----------
    model_name : str
        The name that vLLM's own metrics have.
    engine : str
        Index of the engine; ``all`` where a front end has several, as outputs do not say whose they are.
    """

    def __init__(self, model_name: str, engine: str) -> None:
        counters, labels = _counters(), (model_name, engine)
        self._pictures = counters.pictures.labels(*labels)
        self._resident = counters.resident.labels(*labels)
        self._full = counters.full.labels(*labels)
        self._steps = counters.steps.labels(*labels)
        self._steps_tokens = counters.steps_tokens.labels(*labels)
        self._evicted = {name: counters.evicted.labels(*labels, name) for name in HEAD_TYPES}

    @classmethod
    def of(cls, engine_client: "EngineClient") -> "PictureMetrics":
        """Those of a server's engine."""
        core = getattr(engine_client, "engine_core", None)
        engines = getattr(core, "engine_ranks_managed", [0])
        name = engine_client.model_config.served_model_name
        return cls(str(name), str(engines[0]) if len(engines) == 1 else "all")

    def count(self, pictures: int, resident: int, full: int, evicted: Mapping[str, int]) -> None:
        """Add finished pictures: their number, KV bytes, and evicted tokens by head type."""
        self._pictures.inc(pictures)
        self._resident.inc(resident)
        self._full.inc(full)
        for head_type, tokens in evicted.items():
            self._evicted[head_type].inc(tokens)

    def count_steps(self, steps: int, tokens: int) -> None:
        """Add what finished pictures took, and what it brought: with windows, less steps than tokens."""
        self._steps.inc(steps)
        self._steps_tokens.inc(tokens)
