"""Which weights a model has: profiles of its heads are kept and looked up by it."""

import hashlib

import torch
from torch import Tensor

_SAMPLED = 4096  # numbers of a tensor that are looked at, to twice as many


class Fingerprint:
    """Of the tensors that decide what is drawn, by their canonical names, in whatever order they come."""

    def __init__(self) -> None:
        self._digests: dict[str, bytes] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        """A tensor of any shape and dtype. A fine-tune that changes it changes some of what is sampled."""
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // _SAMPLED)][: 2 * _SAMPLED]
        # In bfloat16, so that a checkpoint stored in float32 is still the same model.
        numbers = sample.to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy()
        self._digests[name] = hashlib.sha256(numbers.tobytes()).digest()

    def __str__(self) -> str:
        """16 hexadecimal digits."""
        parts = (name.encode() + digest for name, digest in sorted(self._digests.items()))
        return hashlib.sha256(b"".join(parts)).hexdigest()[:16]
