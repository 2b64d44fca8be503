"""Counters of finished pictures on vLLM's ``/metrics``, with vLLM's labels.

They are there, at 0, from the server's start, or Prometheus' ``rate()`` would lose the first picture; and
only where pictures are served.
"""

from collections.abc import Iterator, Sequence
from functools import cache
from typing import TYPE_CHECKING

from prometheus_client import REGISTRY, Counter, Metric
from prometheus_client.registry import Collector

from vllm_kvcompress.scheduler import CacheReport

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
    engines : sequence of int
        Indices of the front end's engines, whose counters begin at 0.
    """

    def __init__(self, model_name: str, engines: Sequence[int]) -> None:
        self._model_name = model_name
        for engine in engines:
            self._add(CacheReport(0, 0, engine=engine), 0)

    @classmethod
    def of(cls, engine_client: "EngineClient") -> "PictureMetrics":
        """Those of a server's engines."""
        core = getattr(engine_client, "engine_core", None)
        engines = getattr(core, "engine_ranks_managed", [0])
        return cls(str(engine_client.model_config.served_model_name), engines)

    def count(self, report: CacheReport) -> None:
        """Add a finished picture, to the engine that drew it."""
        self._add(report, 1)

    def _add(self, report: CacheReport, pictures: int) -> None:
        counters, labels = _counters(), (self._model_name, str(report.engine))
        for counter, amount in (
            (counters.pictures, pictures),
            (counters.resident, report.resident_bytes),
            (counters.full, report.full_bytes),
            (counters.steps, report.steps),
            (counters.steps_tokens, report.tokens),
        ):
            counter.labels(*labels).inc(amount)
        for head_type, tokens in zip(
            HEAD_TYPES, (report.evicted_spatial, report.evicted_semantic), strict=True
        ):
            counters.evicted.labels(*labels, head_type).inc(tokens)
