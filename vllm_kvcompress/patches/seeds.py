"""Patch 3: on CPUs, a seeded request whose prompt is taken in chunks does not end the engine."""

import functools
from typing import Any


def apply() -> None:
    """Wrap ``CPUModelRunner.sample_tokens`` (vllm v1/worker/cpu_model_runner.py), called in workers on CPUs.

    A step samples for a half-read prompt too and throws the token away; the runner then rewinds the
    request's generator by an offset, which CPU generators do not have. With the generator out of reach
    during such a step nothing is drawn from it, and there is nothing to rewind.
    """
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    original: Any = CPUModelRunner.sample_tokens
    if getattr(original, "_kvcompress", False):
        return

    @functools.wraps(original)
    def sample_tokens(self: Any, *args: Any, **kwargs: Any) -> Any:
        generators = self.input_batch.generators
        unread = self.discard_request_mask.np[: self.input_batch.num_reqs].nonzero()[0].tolist()
        held = {row: generators.pop(row) for row in unread if row in generators}
        try:
            return original(self, *args, **kwargs)
        finally:
            generators.update(held)

    sample_tokens._kvcompress = True  # type: ignore[attr-defined]
    CPUModelRunner.sample_tokens = sample_tokens  # type: ignore[method-assign, assignment]
