"""What may attend in the caches' place: calibration and replays see every query, key and value."""

from typing import Protocol, runtime_checkable

from torch import Tensor


class Recorder(Protocol):
    """Attends instead of the compressed cache, one decoder layer after another."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int, scale: float) -> Tensor:
        """As `CompressedCache.attend`."""


@runtime_checkable
class SeesResidual(Protocol):
    """A recorder that wants the stream after each layer's attention as well."""

    def residual(self, hidden: Tensor) -> None:
        """``[tokens, 2 * hidden]`` of the next layer."""
