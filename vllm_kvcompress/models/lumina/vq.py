"""Chameleon's picture decoder, which Lumina-mGPT draws with: Janus's blocks in other places.

Source: Alpha-VLLM/Lumina-mGPT, lumina_mgpt/model/chameleon_vae_ori/vqgan.py (CompVis/taming-transformers).
The codebook is not normalised, there is attention in the middle only, and ``decoder.up.0`` is the level of
the widest picture, which Janus counts from the other end.
"""

import re

import torch
from torch import Tensor, nn
from transformers import JanusVQVAEConfig

from vllm_kvcompress.models.vq import VQDecoder, vq_name
from vllm_kvcompress.policy.raster import Raster

_LEVEL = re.compile(r"^decoder\.up\.(\d+)\.")
_TRAINING = "loss."  # the discriminator, in a training run's file


class TamingDecoder(VQDecoder):
    """Draws whole lines of Chameleon's codes; parameters as `VQDecoder` has them."""

    def __init__(self, config: JanusVQVAEConfig, raster: Raster, dtype: torch.dtype | None = None) -> None:
        super().__init__(config, raster, dtype)
        self.decoder.up[0].attn = nn.ModuleList()

    def _latent(self, codes: Tensor) -> Tensor:
        return self._codebook[codes].permute(0, 3, 1, 2)

    def own_name(self, original: str) -> str | None:
        name = vq_name(original)
        if name is None or name.startswith(_TRAINING):
            return None
        last = len(self.decoder.up) - 1
        return _LEVEL.sub(lambda found: f"decoder.up.{last - int(found.group(1))}.", name)
