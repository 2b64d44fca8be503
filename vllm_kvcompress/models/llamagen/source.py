"""LlamaGen's published ``.pt`` files, read without trusting them: state dicts, and the sizes they imply."""

import argparse
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vllm_kvcompress.models.weights import CheckpointError

# Heads of 64 channels but for 3B's of 100; nothing in a file tells (autoregressive/models/gpt.py).
HEADS = {768: 12, 1024: 16, 1280: 20, 1536: 24, 2048: 32, 2560: 40, 3200: 32, 4096: 32}
PATCH = 16  # pixels a token in the names of published files: c2i_XL_384.pt has a grid of 24
_WRAPPERS = ("model", "module", "state_dict")  # autoregressive/sample/sample_c2i.py; FSDP's files have none
_VQ_WRAPPERS = ("ema", *_WRAPPERS)  # tokenizer/tokenizer_image/reconstruction_vq_ddp.py
ROPE_TABLE = "freqs_cis"  # computed, and stored by accident
_LAYER = re.compile(r"^layers\.(\d+)\.(.+)$")


def load_state(path: Path, *, vq: bool = False) -> dict[str, Tensor]:
    """The state dict of a ``.pt`` file: wrapped or bare, mapped from disk where the format allows.

    Raises
    ------
    CheckpointError
        One line: not there, not a checkpoint, or one that would have to run code to be read.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is not a file")
    mapped = zipfile.is_zipfile(path)  # torch's format before 1.6 can't be mapped
    try:
        # Training runs leave their command line's arguments in the file: a namespace of plain values.
        with torch.serialization.safe_globals([argparse.Namespace]):
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f" ({found.group(1)})" if found else ""
        raise CheckpointError(
            f"{path.name} holds more than tensors{what} and is not opened: it could run code; "
            "save its state dict alone with torch.save"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path.name} can't be read ({reason:.120}): download it again") from None
    state = _unwrapped(loaded, _VQ_WRAPPERS if vq else _WRAPPERS)
    if state is None:
        raise CheckpointError(
            f"{path.name} holds no state dict: neither bare nor under {', '.join(_WRAPPERS)}"
        )
    return state


def _unwrapped(loaded: Any, wrappers: tuple[str, ...]) -> dict[str, Tensor] | None:
    if not isinstance(loaded, Mapping):
        return None
    for name in wrappers:
        if isinstance(loaded.get(name), Mapping):
            loaded = loaded[name]
            break
    tensors = {name: value for name, value in loaded.items() if isinstance(value, Tensor)}
    return tensors if tensors and len(tensors) == len(loaded) else None


@dataclass(frozen=True)
class DecoderSizes:
    """What a decoder's tensors imply, and the two things that they don't: ``heads`` and ``grid``."""

    hidden: int
    layers: int
    intermediate: int
    classes: int
    codes: int
    heads: int
    grid: int

    @classmethod
    def of(
        cls, state: Mapping[str, Tensor], file: str, grid: int | None, heads: int | None
    ) -> "DecoderSizes":
        """Sizes of a class-conditional decoder.

        Parameters
        ----------
        file : str
            The file's name, which may say the picture's size in pixels.
        grid, heads : int, optional
            What the user says.

        Raises
        ------
        CheckpointError
            One line: no class-conditional LlamaGen, or something that has to be said and was not.
        """
        if any(name.startswith(("cls_embedding.cap_proj.", "cls_embedding.uncond")) for name in state):
            raise CheckpointError(
                f"{file} is a text-conditional LlamaGen (t2i), which is not supported: convert a c2i_*.pt"
            )
        for name in ("cls_embedding.embedding_table.weight", "tok_embeddings.weight", "output.weight"):
            if name not in state:
                raise CheckpointError(
                    f"{file} lacks tensor {name}: not a class-conditional LlamaGen (c2i_*.pt)"
                )
        layers = [int(found.group(1)) for name in state if (found := _LAYER.match(name))]
        gate = state.get("layers.0.feed_forward.w1.weight")
        if gate is None:
            raise CheckpointError(f"{file} lacks tensor layers.0.feed_forward.w1.weight")
        codes, hidden = state["tok_embeddings.weight"].shape
        return cls(
            hidden=hidden,
            layers=max(layers) + 1,
            intermediate=gate.shape[0],
            classes=state["cls_embedding.embedding_table.weight"].shape[0] - 1,
            codes=codes,
            heads=_heads(hidden, heads),
            grid=_grid(file, state.get(ROPE_TABLE), grid),
        )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Published name -> shape of every tensor."""
        d, f = self.hidden, self.intermediate
        layer = {
            "attention.wqkv.weight": (3 * d, d), "attention.wo.weight": (d, d),
            "feed_forward.w1.weight": (f, d), "feed_forward.w3.weight": (f, d),
            "feed_forward.w2.weight": (d, f), "attention_norm.weight": (d,), "ffn_norm.weight": (d,),
        }  # fmt: skip
        shapes: dict[str, tuple[int, ...]] = {
            "cls_embedding.embedding_table.weight": (self.classes + 1, d),
            "tok_embeddings.weight": (self.codes, d),
            "norm.weight": (d,),
            "output.weight": (self.codes, d),
        }
        for number in range(self.layers):
            shapes |= {f"layers.{number}.{name}": shape for name, shape in layer.items()}
        return shapes

    def check(self, state: Mapping[str, Tensor], file: str) -> None:
        """Raise CheckpointError, one line, on a tensor that is unknown, missing or of a wrong shape."""
        wanted = self.shapes()
        for name, tensor in state.items():
            if name == ROPE_TABLE:
                continue
            if name not in wanted:
                raise CheckpointError(f"{file}: unknown tensor {name}, not part of a LlamaGen")
            if tuple(tensor.shape) != wanted[name]:
                raise CheckpointError(
                    f"{file}: tensor {name} has shape {tuple(tensor.shape)}, others ask for {wanted[name]}"
                )
            if not tensor.is_floating_point():
                raise CheckpointError(f"{file}: tensor {name} holds {tensor.dtype}, not floating point")
        if missing := sorted(wanted.keys() - state.keys()):
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise CheckpointError(f"{file} lacks tensor {missing[0]}{more}: download it again")


def _heads(hidden: int, said: int | None) -> int:
    heads = said or HEADS.get(hidden)
    if heads is None:
        raise CheckpointError(f"--heads: the file does not say how many heads a model of width {hidden} has")
    if hidden % heads or (hidden // heads) % 4:
        raise CheckpointError(
            f"--heads {heads}: {hidden} channels in as many heads must give a multiple of 4 each"
        )
    return heads


def _grid(file: str, table: Tensor | None, said: int | None) -> int:
    """Lines of a picture. The RoPE table, where one was stored, and the file's name must not disagree."""
    sources: dict[str, int] = {}
    if said is not None:
        sources["--grid"] = said
    if found := re.search(r"_(256|384|512)(?!\d)", file):
        sources[f"the name {file}"] = int(found.group(1)) // PATCH
    if table is not None:
        cells = table.shape[0] - 1 if table.ndim else -1
        side = round(max(cells, 0) ** 0.5)
        if side * side != cells:
            raise CheckpointError(f"{file}: {ROPE_TABLE} has {cells + 1} rows, no class and square picture")
        sources[ROPE_TABLE] = side
    if not sources:
        raise CheckpointError(
            "--grid: neither the file nor its name (c2i_XL_384.pt) says it; give 16 for 256 pixels, 24 for "
            "384 or 32 for 512"
        )
    if len(set(sources.values())) > 1:
        shown = ", ".join(f"{grid} by {source}" for source, grid in sources.items())
        raise CheckpointError(
            f"--grid: the sources disagree, {shown}; another grid's RoPE breaks all pictures"
        )
    return next(iter(sources.values()))


@dataclass(frozen=True)
class VQSizes:
    """What a VQ model's tensors imply; the fields are those of config.json's ``vq``."""

    codes: int
    embed: int
    z: int
    ch: int
    ch_mult: list[int]
    res_blocks: int

    @classmethod
    def of(cls, state: Mapping[str, Tensor], file: str) -> "VQSizes":
        """Raises CheckpointError, one line, where it is no VQ model of LlamaGen's."""
        try:
            codes, embed = state["quantize.embedding.weight"].shape
            z = state["post_quant_conv.weight"].shape[0]
            levels = 1 + max(int(n.split(".")[2]) for n in state if n.startswith("decoder.conv_blocks."))
            # The decoder goes from the deepest level to the widest picture.
            widths = [
                state[f"decoder.conv_blocks.{n}.res.0.conv1.weight"].shape[0] for n in reversed(range(levels))
            ]
            blocks = sum(
                name.startswith("decoder.conv_blocks.0.res.") and name.endswith(".conv1.weight")
                for name in state
            )
        except (KeyError, ValueError, IndexError) as error:
            raise CheckpointError(
                f"{file} is no VQ model of LlamaGen (vq_ds16_c2i.pt): no {str(error) or 'tensors'!s:.60}"
            ) from None
        return cls(codes, embed, z, widths[0], [width // widths[0] for width in widths], blocks - 1)
