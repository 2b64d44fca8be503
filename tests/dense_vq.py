"""LlamaGen's and Chameleon's VQ decoders in float64, over the names of their published files."""

from collections.abc import Mapping

from torch import Tensor
from torch.nn import functional as F


class DenseVQ:
    """A VQ model's state dict (tokenizer/tokenizer_image/vq_model.py of FoundationVision/LlamaGen)."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self.w = {name: tensor.double() for name, tensor in state.items()}

    def decode(self, codes: Tensor, grid: int) -> Tensor:
        """``[pictures, grid * grid]`` codes -> ``[pictures, 3, height, width]`` float64, about -1 to 1."""
        entries = F.normalize(self.w["quantize.embedding.weight"], dim=-1)[codes]
        h = self._conv(entries.view(len(codes), grid, grid, -1).permute(0, 3, 1, 2), "post_quant_conv")
        h = self._conv(h, "decoder.conv_in")
        h = self._residual(h, "decoder.mid.0")
        h = self._attention(h, "decoder.mid.1")
        h = self._residual(h, "decoder.mid.2")
        level = 0
        while f"decoder.conv_blocks.{level}.res.0.norm1.weight" in self.w:
            h = self._level(h, f"decoder.conv_blocks.{level}")
            level += 1
        return self._conv(self._swish(h, "decoder.norm_out"), "decoder.conv_out")

    def _level(self, h: Tensor, name: str) -> Tensor:
        block = 0
        while f"{name}.res.{block}.norm1.weight" in self.w:
            h = self._residual(h, f"{name}.res.{block}")
            if f"{name}.attn.{block}.q.weight" in self.w:
                h = self._attention(h, f"{name}.attn.{block}")
            block += 1
        if f"{name}.upsample.conv.weight" in self.w:
            h = self._conv(h.repeat_interleave(2, 2).repeat_interleave(2, 3), f"{name}.upsample.conv")
        return h

    def _conv(self, x: Tensor, name: str) -> Tensor:
        weight = self.w[f"{name}.weight"]
        return F.conv2d(x, weight, self.w[f"{name}.bias"], padding=weight.shape[-1] // 2)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return F.group_norm(x, 32, self.w[f"{name}.weight"], self.w[f"{name}.bias"], 1e-6)

    def _swish(self, x: Tensor, name: str) -> Tensor:
        return F.silu(self._norm(x, name))

    def _residual(self, x: Tensor, name: str) -> Tensor:
        h = self._conv(self._swish(x, f"{name}.norm1"), f"{name}.conv1")
        h = self._conv(self._swish(h, f"{name}.norm2"), f"{name}.conv2")
        return h + (self._conv(x, f"{name}.nin_shortcut") if f"{name}.nin_shortcut.weight" in self.w else x)

    def _attention(self, x: Tensor, name: str) -> Tensor:
        h = self._norm(x, f"{name}.norm")
        q, k, v = (self._conv(h, f"{name}.{part}").flatten(2) for part in "qkv")
        weights = (q.transpose(1, 2) @ k / q.shape[1] ** 0.5).softmax(-1)
        return x + self._conv((v @ weights.transpose(1, 2)).view(x.shape), f"{name}.proj_out")


class DenseTaming(DenseVQ):
    """Chameleon's (CompVis/taming-transformers, taming/models/vqgan.py), the state dict of ``vqgan.ckpt``."""

    def decode(self, codes: Tensor, lines: int) -> Tensor:
        """``[pictures, lines * columns]`` codes -> as `DenseVQ.decode`."""
        entries = self.w["quantize.embedding.weight"][codes]
        h = entries.view(len(codes), lines, -1, entries.shape[-1]).permute(0, 3, 1, 2)
        h = self._conv(self._conv(h, "post_quant_conv"), "decoder.conv_in")
        h = self._attention(self._residual(h, "decoder.mid.block_1"), "decoder.mid.attn_1")
        h = self._residual(h, "decoder.mid.block_2")
        levels = {int(name.split(".")[2]) for name in self.w if name.startswith("decoder.up.")}
        for level in sorted(levels, reverse=True):
            for block in range(sum(f"decoder.up.{level}.block.{n}.norm1.weight" in self.w for n in range(9))):
                h = self._residual(h, f"decoder.up.{level}.block.{block}")
            if level:
                h = h.repeat_interleave(2, 2).repeat_interleave(2, 3)
                h = self._conv(h, f"decoder.up.{level}.upsample.conv")
        return self._conv(self._swish(h, "decoder.norm_out"), "decoder.conv_out")
