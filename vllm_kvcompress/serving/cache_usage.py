"""What the KV cache held for finished pictures: ``usage.kv_cache`` and vLLM's /metrics.

The figures are the scheduler's (``vllm_kvcompress.scheduler``), counted from the blocks that each request
held at its end.
"""

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from prometheus_client import Counter

from vllm_kvcompress.scheduler import REPORT, CacheReport

if TYPE_CHECKING:
    from vllm.outputs import RequestOutput


@cache
def _counters() -> dict[str, Counter]:
    """Made when the first picture is done, so that other servers never show them."""
    return {
        "pictures": Counter("vllm:image_pictures", "Finished pictures."),
        "resident": Counter(
            "vllm:image_kv_resident_bytes", "KV bytes held by finished pictures, each at its end."
        ),
        "full": Counter("vllm:image_kv_full_bytes", "KV bytes that a full cache would have held for them."),
        "evicted": Counter(
            "vllm:image_kv_evicted_tokens", "Image tokens overwritten in each head of a type.", ["head_type"]
        ),
    }


async def cache_usage(outputs: Sequence["RequestOutput"]) -> dict[str, Any] | None:
    """Sum the reports of a request's pictures, and count them in the metrics.

    Returns
    -------
    dict or None
        ``resident_bytes``, ``full_bytes`` and ``evicted_tokens`` (per head of each type), summed over the
        pictures; None where the scheduler reports nothing (another ``--scheduler-cls``).
    """
    reports = [
        CacheReport(**output.kv_transfer_params[REPORT])
        for output in outputs
        if output.kv_transfer_params and REPORT in output.kv_transfer_params
    ]
    if not reports:
        return None
    resident = sum(report.resident_bytes for report in reports)
    full = sum(report.full_bytes for report in reports)
    evicted = {
        "spatial": sum(report.evicted_spatial for report in reports),
        "semantic": sum(report.evicted_semantic for report in reports),
    }
    counters = _counters()
    counters["pictures"].inc(len(reports))
    counters["resident"].inc(resident)
    counters["full"].inc(full)
    for head_type, tokens in evicted.items():
        counters["evicted"].labels(head_type).inc(tokens)
    return {"resident_bytes": resident, "full_bytes": full, "evicted_tokens": evicted}
