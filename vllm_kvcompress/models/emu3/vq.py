"""Emu3's picture decoder (MoVQ), of the one frame that is a picture: all of it in two dimensions.

transformers' ``Emu3VQVAE.decode`` takes a picture for a film: temporal convolutions, two temporal
upsamplings, four frames drawn, the first one kept. Every temporal convolution is causal, with two frames of
zeros before the first, and upsampling repeats: the first frame sees the last tap of each, and nothing else.
After that frames have nothing to do with each other. So the other taps are left out here, and three of four
frames are not drawn.
"""

import re

import torch
from torch import Tensor, nn
from transformers import Emu3VQVAEConfig
from transformers.models.emu3.modeling_emu3 import Emu3VQVAEDecoder

from vllm_kvcompress.models.vq import PictureDecoder
from vllm_kvcompress.policy.raster import Raster

_PREFIX = re.compile(r"^(?:model\.)?vqmodel\.")
# The encoder's side, and a count that only training looks at.
_SKIP = re.compile(r"^(?:encoder\.|quant_conv\.)|\.num_batches_tracked$")
_WRAPPED = re.compile(r"^(post_quant_conv|decoder\.time_\w+\.\d+(?:\.conv\d)?)\.conv\.(?:conv\.)?")
_TEMPORAL = re.compile(r"^(?:post_quant_conv|decoder\.time_\w+\.\d+(?:\.conv\d)?)\.weight$")
TAPS = 3  # of a temporal convolution


class _Residual(nn.Module):
    """A temporal residual block's last taps; what it learned of its channels' statistics stays as it is."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(nn.functional.silu(self.norm1(x)))
        return x + self.conv2(nn.functional.silu(self.norm2(y)))


class MoVQDecoder(PictureDecoder):
    """Draws whole lines of Emu3's codes.

    Parameters
    ----------
    config : Emu3VQVAEConfig
        Sizes of the checkpoint's VQ model.
    raster : Raster
        The picture's token grid.
    dtype : torch.dtype, optional
        By default the model's: torch's default while vLLM builds it. On a CPU float16 becomes bfloat16.
    """

    def __init__(self, config: Emu3VQVAEConfig, raster: Raster, dtype: torch.dtype | None = None) -> None:
        super().__init__(raster)
        channels = config.latent_channels
        config = type(config)(**config.to_dict())
        config._attn_implementation = "sdpa"
        self.quantize = nn.ModuleDict({"embedding": nn.Embedding(config.codebook_size, config.embed_dim)})
        self.post_quant_conv = nn.Conv2d(config.embed_dim, channels, 1)
        self.decoder = decoder = Emu3VQVAEDecoder(config)
        decoder.time_res_stack = nn.ModuleList(_Residual(channels) for _ in decoder.time_res_stack)
        decoder.time_conv = nn.ModuleList(
            nn.Conv2d(channels, channels, 3, padding=1) for _ in decoder.time_conv
        )
        self._settle(dtype)

    def _pixels(self, latent: Tensor) -> Tensor:
        decoder = self.decoder
        # The picture, and what every norm is conditioned on.
        x = torch.cat((self.post_quant_conv(latent), latent))
        for block in decoder.time_res_stack:
            x = block(x)
        for conv in decoder.time_conv:
            x = nn.functional.silu(conv(x))
        x, quant = x.chunk(2)
        x = decoder.up_block(decoder.middle_block(decoder.conv_in(x), quant), quant)
        return decoder.conv_out(nn.functional.silu(decoder.norm_out(x, quant)))

    def own_name(self, original: str) -> str | None:
        name = _PREFIX.sub("", original)
        if _SKIP.search(name):
            return None
        return _WRAPPED.sub(r"\1.", name)

    def published_shape(self, name: str, own: tuple[int, ...]) -> tuple[int, ...]:
        return (*own[:2], TAPS, *own[2:]) if _TEMPORAL.match(name) else own

    def own_value(self, name: str, tensor: Tensor) -> Tensor:
        return tensor[:, :, -1] if _TEMPORAL.match(name) else tensor

    def held(self) -> dict[str, Tensor]:
        statistics = {n: x for n, x in self.named_buffers() if not n.endswith("num_batches_tracked")}
        return super().held() | statistics
