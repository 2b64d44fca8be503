"""What finished pictures took: ``usage.kv_cache``, ``usage.steps`` and vLLM's /metrics.

The figures are the scheduler's (``vllm_kvcompress.scheduler``), counted from the blocks that each request
held at its end.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vllm_kvcompress.scheduler import REPORT, CacheReport
from vllm_kvcompress.serving.metrics import PictureMetrics

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient
    from vllm.outputs import RequestOutput


class CacheUsage:
    """Sums what finished pictures report, and counts them in the metrics.

    Parameters
    ----------
    engine_client : EngineClient
        The server's; its metrics are there from now on.
    """

    def __init__(self, engine_client: "EngineClient") -> None:
        self._metrics = PictureMetrics.of(engine_client)

    async def __call__(self, outputs: Sequence["RequestOutput"]) -> dict[str, Any] | None:
        """The report of a request's pictures.

        Returns
        -------
        dict or None
            ``steps`` of the engine, and in ``kv_cache`` ``resident_bytes``, ``full_bytes`` and
            ``evicted_tokens`` (per head of each type), all summed over the pictures; None where the scheduler
            reports nothing (another ``--scheduler-cls``).
        """
        reports = [
            CacheReport(**output.kv_transfer_params[REPORT])
            for output in outputs
            if output.kv_transfer_params and REPORT in output.kv_transfer_params
        ]
        if not reports:
            return None
        for report in reports:
            self._metrics.count(report)
        kv_cache = {
            "resident_bytes": sum(report.resident_bytes for report in reports),
            "full_bytes": sum(report.full_bytes for report in reports),
            "evicted_tokens": {
                "spatial": sum(report.evicted_spatial for report in reports),
                "semantic": sum(report.evicted_semantic for report in reports),
            },
        }
        return {"steps": sum(report.steps for report in reports), "kv_cache": kv_cache}
