"""Pixels without the engine: what a server decodes with while its engine drains.

A draining engine (``--shutdown-timeout``) draws its pictures to the end, but answers no calls, and is gone
when the last one is drawn.
"""

from typing import TYPE_CHECKING

from vllm_kvcompress.serving.encode import Pixels

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from vllm.engine.protocol import EngineClient

    from vllm_kvcompress.models.vq import PictureDecoder

WEIGHTS_METHOD = "kvcompress_decoder_weights"


class SpareDecoder:
    """The served model's picture decoder in this process, on the CPU; built at the first picture.

    Pixels are the worker's on a CPU; a GPU's differ by a few levels.

    Parameters
    ----------
    config : PreTrainedConfig
        The checkpoint's.
    weights : bytes
        The decoder's tensors, as the worker has them: a safetensors file.
    """

    def __init__(self, config: "PreTrainedConfig", weights: bytes) -> None:
        from vllm_kvcompress.models.registry import image_model_of

        self._config, self._weights, self._model = config, weights, image_model_of(config)
        self._vq: PictureDecoder | None = None

    @classmethod
    async def of(cls, engine: "EngineClient") -> "SpareDecoder | None":
        """That of a server that drains; None of one that does not (``--shutdown-timeout 0``).

        The worker is asked, not the checkpoint: the files may be gone by the time, or never have been here.
        """
        if engine.vllm_config.shutdown_timeout == 0:
            return None
        answers = await engine.collective_rpc(WEIGHTS_METHOD)
        (weights,) = [answer for answer in answers if answer is not None][:1]
        return cls(engine.model_config.hf_config, weights)

    def decode(self, codes: list[int], size: int = 0) -> Pixels:
        """Pixels of whole lines of a picture of one of the model's sizes.

        Takes up to seconds: keep it off the event loop, one call at a time.

        Raises ValueError as ``PictureDecoder.decode`` does.
        """
        if self._vq is None:
            self._vq = self._built()
        return Pixels(*self._vq.picture(codes, self._model.sizes[size].raster))

    def _built(self) -> "PictureDecoder":
        from safetensors.torch import load

        from vllm_kvcompress.models.registry import family_of

        state = load(self._weights)
        # Of a batch norm the count is an integer, and tensors come in any order.
        dtype = next(tensor.dtype for tensor in state.values() if tensor.is_floating_point())
        vq = family_of(self._config).decoder(self._config, self._model.raster, dtype)
        vq.load_state_dict(state)
        self._weights = b""
        return vq
