"""LlamaGen's published ``.pt`` files: the sizes that their tensors imply."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from vllm_kvcompress.models.conversion import WRAPPERS, VQSizes, check_values
from vllm_kvcompress.models.weights import CheckpointError

# Heads of 64 channels but for 3B's of 100; nothing in a file tells (autoregressive/models/gpt.py).
HEADS = {768: 12, 1024: 16, 1280: 20, 1536: 24, 2048: 32, 2560: 40, 3200: 32, 4096: 32}
PATCH = 16  # pixels a token in the names of published files: c2i_XL_384.pt has a grid of 24
# autoregressive/sample/sample_c2i.py wraps as others do, FSDP's files are bare;
# tokenizer/tokenizer_image/reconstruction_vq_ddp.py:
VQ_WRAPPERS = ("ema", *WRAPPERS)
ROPE_TABLE = "freqs_cis"  # computed, and stored by accident
_TELLING = (  # whose shapes are sizes
    "cls_embedding.embedding_table.weight", "tok_embeddings.weight", "layers.0.feed_forward.w1.weight",
)  # fmt: skip
_LAYER = re.compile(r"^layers\.(\d{1,6})\.(.+)$")


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
        classes, codes, gate = (_matrix(state, name, file) for name in _TELLING)
        layers = {int(found.group(1)) for name in state if (found := _LAYER.match(name))}
        absent = next(n for n in range(len(layers) + 1) if n not in layers)
        if absent < len(layers):
            raise CheckpointError(f"{file} lacks tensor layers.{absent}.attention.wqkv.weight")
        hidden = codes.shape[1]
        return cls(
            hidden=hidden,
            layers=len(layers),
            intermediate=gate.shape[0],
            classes=classes.shape[0] - 1,
            codes=codes.shape[0],
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
            check_values(name, tensor, file)
        if missing := sorted(wanted.keys() - state.keys()):
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise CheckpointError(f"{file} lacks tensor {missing[0]}{more}: download it again")


def _matrix(state: Mapping[str, Tensor], name: str, file: str) -> Tensor:
    if name not in state:
        raise CheckpointError(f"{file} lacks tensor {name}: not a class-conditional LlamaGen (c2i_*.pt)")
    if state[name].ndim != 2 or not state[name].numel():
        raise CheckpointError(f"{file}: tensor {name} has shape {tuple(state[name].shape)}, no matrix's")
    return state[name]


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


def vq_sizes(state: Mapping[str, Tensor], file: str) -> VQSizes:
    """Sizes of a VQ model. Raises CheckpointError, one line, where it is none of LlamaGen's."""
    try:
        return VQSizes.of(state, levels="decoder.conv_blocks.{}.res", widest_first=False)
    except (KeyError, ValueError, IndexError) as error:
        raise CheckpointError(
            f"{file} is no VQ model of LlamaGen (vq_ds16_c2i.pt): no {str(error) or 'tensors'!s:.60}"
        ) from None
