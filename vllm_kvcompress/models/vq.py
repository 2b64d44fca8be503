"""Image codes -> pixels: what all picture decoders have in common, and Janus-Pro's (VQ-16 of LlamaGen).

The latter's modules are transformers' own (models/janus/modeling_janus.py, ``JanusVQVAE``), without the
encoder: 42.6 M parameters instead of 72 M.
"""

import re
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from transformers import JanusVQVAEConfig
from transformers.models.janus.modeling_janus import JanusVQVAEDecoder

from vllm_kvcompress.policy.raster import Raster

IN_VQ = re.compile(r"^(?:model\.vqmodel|gen_vision_model)\.")
"""What the VQ model's tensors begin with, in transformers' layout and in the original one."""
# The encoder's side, and a training statistic that only the original layout stores.
_SKIP = re.compile(r"^(?:encoder\.|quant_conv\.|quantize\.codebook_used$)")
_RENAME = (
    (re.compile(r"^decoder\.conv_blocks\."), "decoder.up."),
    (re.compile(r"^(decoder\.up\.\d+)\.res\."), r"\1.block."),
    (re.compile(r"^decoder\.mid\.0\."), "decoder.mid.block_1."),
    (re.compile(r"^decoder\.mid\.1\."), "decoder.mid.attn_1."),
    (re.compile(r"^decoder\.mid\.2\."), "decoder.mid.block_2."),
)


def vq_name(name: str) -> str | None:
    """transformers' name within ``JanusVQVAE`` of a VQ tensor of either layout; None if knowingly skipped.

    ``model.vqmodel.`` (transformers) or ``gen_vision_model.`` (original) in front is dropped. Unknown
    names come back unmapped, for ``load_weights`` to name in an error.
    """
    name = IN_VQ.sub("", name)
    if _SKIP.search(name):
        return None
    for pattern, new in _RENAME:
        name = pattern.sub(new, name)
    return name


class PictureDecoder(nn.Module):
    """Draws whole lines of image codes; a model's own is a subclass, its codebook ``quantize.embedding``.

    Weights are laid out channels last, which on a CPU, in bfloat16, decodes in a quarter of the time
    that float32 in the default layout takes.

    Parameters
    ----------
    raster : Raster
        The picture's token grid; the default one, where there are several.
    """

    def __init__(self, raster: Raster) -> None:
        super().__init__()
        self.raster = raster

    def _settle(self, dtype: torch.dtype | None) -> None:
        """At the end of construction: ``dtype`` as a subclass says of its own."""
        dtype = dtype or torch.get_default_dtype()
        if dtype == torch.float16 and self._codebook.device.type == "cpu":
            dtype = torch.bfloat16
        self.to(dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.requires_grad_(False)
        self.eval()

    @property
    def _codebook(self) -> Tensor:
        return self.get_parameter("quantize.embedding.weight")

    def _latent(self, codes: Tensor) -> Tensor:
        """``[B, lines, columns]`` codes -> ``[B, channels, lines, columns]``."""
        return self._codebook[codes].permute(0, 3, 1, 2)

    def _pixels(self, latent: Tensor) -> Tensor:
        """``[B, channels, lines, columns]`` -> ``[B, 3, height, width]``, -1 to 1."""
        raise NotImplementedError

    @torch.inference_mode()
    def picture(self, codes: list[int], raster: Raster | None = None) -> tuple[int, int, bytes]:
        """Width, height and RGB bytes, row by row, of one picture's first lines; raises as `decode`."""
        pixels = self.decode(torch.tensor([codes], dtype=torch.int64), raster)[0].cpu().contiguous()
        height, width, _ = pixels.shape
        return width, height, pixels.numpy().tobytes()

    def decode(self, codes: Tensor, raster: Raster | None = None) -> Tensor:
        """Pixels of the first lines of pictures.

        ``clip((x + 1) / 2 * 255, 0, 255)`` in float32, truncated (generation_inference.py:95-100).

        Parameters
        ----------
        codes : Tensor
            int64 ``[B, lines * columns]``, on any device; ``lines`` may be fewer than a picture has.
        raster : Raster, optional
            The pictures' grid, by default the decoder's.

        Returns
        -------
        Tensor
            uint8 ``[B, lines * patch, columns * patch, 3]``, RGB, on the decoder's device.

        Raises
        ------
        ValueError
            Not whole lines, more than a picture, or a code outside the codebook.
        """
        raster = raster or self.raster
        columns, size = raster.columns, len(self._codebook)
        if codes.ndim != 2 or codes.shape[1] % columns or not 0 < codes.shape[1] <= columns * raster.lines:
            raise ValueError(
                f"codes must be [pictures, tokens] with 1 to {raster.lines} whole lines of {columns} "
                f"tokens, got {list(codes.shape)}"
            )
        if len(codes) and not 0 <= int(codes.min()) <= int(codes.max()) < size:
            raise ValueError(
                f"image codes must be in 0..{size - 1}, got {int(codes.min())}..{int(codes.max())}"
            )
        grid = codes.to(self._codebook.device).view(len(codes), -1, columns)
        pixels = self._pixels(self._latent(grid))
        pixels = ((pixels.float() + 1) / 2 * 255).clamp_(0, 255)
        return pixels.to(torch.uint8).permute(0, 2, 3, 1).contiguous()

    def held(self) -> dict[str, Tensor]:
        """What a checkpoint fills, by this module's names."""
        return dict(self.named_parameters())

    def own_name(self, original: str) -> str | None:
        """This module's name of a checkpoint's VQ tensor; None if knowingly skipped, anything if unknown."""
        raise NotImplementedError

    def published_shape(self, name: str, own: tuple[int, ...]) -> tuple[int, ...]:
        """The shape that a checkpoint has of what is ``name`` here, in the shape ``own``."""
        return own

    def own_value(self, name: str, tensor: Tensor) -> Tensor:
        """What is held of a checkpoint's tensor."""
        return tensor

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load the VQ tensors of any published layout, any dtype.

        Parameters
        ----------
        weights
            (name, tensor) pairs, named as in the checkpoint; the encoder's are passed over.

        Returns
        -------
        set of str
            The parameters' names.

        Raises
        ------
        ValueError
            One line naming a tensor that is unknown, missing, or of the wrong shape.
        """
        held = self.held()
        loaded: set[str] = set()
        for original, tensor in weights:
            name = self.checked_name(original, tuple(tensor.shape))
            if name is not None:
                held[name].data.copy_(self.own_value(name, tensor))
                loaded.add(name)
        self.check_missing(loaded)
        return loaded

    def checked_name(self, original: str, shape: tuple[int, ...]) -> str | None:
        """This module's name of a checkpoint's VQ tensor, None if knowingly skipped.

        Raises ValueError if it is unknown or of a wrong shape.
        """
        name = self.own_name(original)
        if name is None:
            return None
        own = self.held().get(name)
        if own is None:
            raise ValueError(f"unknown tensor {original}: the VQ decoder has no such parameter")
        published = self.published_shape(name, tuple(own.shape))
        if shape != published:
            raise ValueError(f"tensor {original} has shape {shape}, but config.json asks for {published}")
        return name

    def check_missing(self, loaded: set[str]) -> None:
        """Raise ValueError if something that is held is not among what was loaded."""
        if missing := sorted(self.held().keys() - loaded):
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise ValueError(f"the checkpoint lacks VQ tensor {missing[0]}{more}: is a shard missing?")


class VQDecoder(PictureDecoder):
    """Janus-Pro's and LlamaGen's.

    Parameters
    ----------
    config : JanusVQVAEConfig
        Sizes of the checkpoint's VQ model.
    raster : Raster
        The picture's token grid.
    dtype : torch.dtype, optional
        By default the model's: torch's default while vLLM builds it. On a CPU float16 becomes bfloat16.
    """

    def __init__(self, config: JanusVQVAEConfig, raster: Raster, dtype: torch.dtype | None = None) -> None:
        super().__init__(raster)
        self.quantize = nn.ModuleDict({"embedding": nn.Embedding(config.num_embeddings, config.embed_dim)})
        self.post_quant_conv = nn.Conv2d(config.embed_dim, config.latent_channels, 1)
        self.decoder = JanusVQVAEDecoder(config)
        self._settle(dtype)

    def _latent(self, codes: Tensor) -> Tensor:
        return nn.functional.normalize(self._codebook[codes], dim=-1).permute(0, 3, 1, 2)

    def _pixels(self, latent: Tensor) -> Tensor:
        pixels: Tensor = self.decoder(self.post_quant_conv(latent))
        return pixels

    def own_name(self, original: str) -> str | None:
        return vq_name(original)
