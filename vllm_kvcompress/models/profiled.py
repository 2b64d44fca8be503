"""What a step takes beside the model's activations, while vLLM measures what is left for the cache."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from vllm.forward_context import get_forward_context

if TYPE_CHECKING:
    from vllm_kvcompress.models.branched import BranchedImageModel

MEASURED = ("cuda",)  # devices whose memory vLLM measures; of a CPU's the operator says how much there is


@contextmanager
def measured(model: "BranchedImageModel", tokens: int) -> Iterator[None]:
    """Around a forward: in the one that vLLM measures, scratch beside it, and a picture decoded after it.

    Which it is can be told by its tokens, as many as a step may have, and by its having no metadata. Pictures
    are decoded between steps and one after the other, so that memory and the step's are never wanted at once.
    """
    if not _is_measured(model, tokens):
        yield
        return
    model.measured = True
    raster = max(
        (size.raster for size in model.image.sizes), key=lambda raster: raster.lines * raster.columns
    )
    device = next(model.parameters()).device
    wanted = 0 if model.compressed is None else model.compressed.scratch_bytes(model.image.aligns)
    scratch = torch.empty(wanted, dtype=torch.uint8, device=device)
    yield
    del scratch
    model.vq.decode(torch.zeros(1, raster.lines * raster.columns, dtype=torch.int64, device=device), raster)


def _is_measured(model: "BranchedImageModel", tokens: int) -> bool:
    if model.measured or tokens < model.most_tokens or get_forward_context().attn_metadata:
        return False
    known = model.rows.replays or (model.compressed is not None and model.compressed.is_recorded)
    return not known and next(model.parameters()).device.type in MEASURED
