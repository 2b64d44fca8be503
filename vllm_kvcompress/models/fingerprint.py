"""Which weights a model has: profiles of its heads are kept and looked up by it."""

import hashlib

import torch
from torch import Tensor

_SAMPLED = 4096  # numbers of a tensor that are looked at, to twice as many
_TEXTS, _CODES = "lm_head.weight", "gen_head.weight"  # where codes have a head, a text's draws nothing


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
        drawing = sorted(self._digests.keys() - ({_TEXTS} if _CODES in self._digests else set()))
        parts = (name.encode() + self._digests[name] for name in drawing)
        return hashlib.sha256(b"".join(parts)).hexdigest()[:16]
