"""Janus's understanding half: what a picture in a chat is turned into before the language model reads it.

The tower is vLLM's own SigLIP. Drawing needs none of it.
"""

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.siglip import SiglipVisionModel
from vllm.model_executor.models.utils import maybe_prefix

from vllm_kvcompress.models.vision_sizes import VisionSizes


class JanusVision(nn.Module):
    """Tower and aligner.

    Parameters
    ----------
    sizes : VisionSizes
    hidden : int
        Channels of the language model.
    prefix : str
        Of the parameters' names in the served model.
    """

    def __init__(self, sizes: VisionSizes, hidden: int, prefix: str = "") -> None:
        super().__init__()
        self.sizes = sizes
        self.tower = SiglipVisionModel(sizes.siglip, prefix=maybe_prefix(prefix, "tower")).vision_model
        # The same on every rank: it is small, and the tower's output is whole on each.
        self.aligner = nn.ModuleList(
            ReplicatedLinear(hidden if number else sizes.width, hidden, return_bias=False)
            for number in range(sizes.aligner_depth)
        )

    def forward(self, pixels: Tensor) -> Tensor:
        """``[pictures, 3, side, side]``, normalised -> ``[pictures, tokens, hidden]``."""
        x = self.tower(pixels)
        for number, layer in enumerate(self.aligner):
            if number:
                x = nn.functional.gelu(x)
            x = layer(x)
        return x

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load tensors named by ``vision_name``, shapes checked; returns the parameters' names."""
        parameters, loaded = dict(self.named_parameters()), set[str]()
        for name, tensor in weights:
            part = re.search(r"\.self_attn\.([qkv])_proj\.", name)
            shard = () if part is None else (part[1],)
            if part is not None:
                name = name.replace(part[0], ".self_attn.qkv_proj.")
            if name.endswith("position_embedding.weight"):
                tensor = tensor.flatten(0, -2)  # the original layout has a batch in front
            parameter = parameters[name]
            getattr(parameter, "weight_loader", default_weight_loader)(parameter, tensor, *shard)
            loaded.add(name)
        return loaded


def pixels_of(images: Any, sizes: VisionSizes) -> Tensor:
    """A batch from what vLLM's processor made of pictures: ``[pictures, 3, side, side]``."""
    batch = torch.stack(list(images)) if isinstance(images, (list, tuple)) else images
    return batch.reshape(-1, 3, sizes.image_size, sizes.image_size)
