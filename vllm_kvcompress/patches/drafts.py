"""Patch 4: the V1 runner feeds and samples drafts that no speculative decoder of vLLM's has made."""

import functools
from typing import Any

import numpy as np
from vllm.utils.torch_utils import async_tensor_h2d

_MARK = "_kvcompress"


def apply() -> None:
    """Wrap ``GPUModelRunner._prepare_inputs`` (vllm v1/worker/gpu_model_runner.py), called in workers.

    The scheduler has reserved places for a row's drafts, as for any speculative decoder. The ids that stand
    there are replaced by the row's own drafts, and logits are asked for at every place of a window.
    Steps without such places, and engines with a ``speculative_config``, are left as they are.
    """
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    original: Any = GPUModelRunner._prepare_inputs
    if getattr(original, _MARK, False):
        return

    @functools.wraps(original)
    def prepare_inputs(self: Any, scheduler_output: Any, num_scheduled_tokens: Any) -> Any:
        prepared = original(self, scheduler_output, num_scheduled_tokens)
        reserved = scheduler_output.scheduled_spec_decode_tokens
        if not reserved or self.speculative_config is not None:
            return prepared
        from vllm_kvcompress.rows import request_rows

        batch = self.input_batch
        counts = [len(reserved.get(name, ())) for name in batch.req_ids]
        window = request_rows(self.vllm_config).begin_window(counts)
        ends = np.cumsum(num_scheduled_tokens)
        for end, drafts in zip(ends, window.drafts, strict=True):
            if drafts:
                at = slice(int(end) - len(drafts), int(end))
                self.input_ids.gpu[at] = async_tensor_h2d(
                    list(drafts), device=self.device, dtype=self.input_ids.gpu.dtype
                )
        indices = np.concatenate([np.arange(end - 1 - n, end) for end, n in zip(ends, counts, strict=True)])
        return async_tensor_h2d(indices, device=self.device), None, 1 + max(counts)

    setattr(prepare_inputs, _MARK, True)
    GPUModelRunner._prepare_inputs = prepare_inputs  # type: ignore[method-assign]
