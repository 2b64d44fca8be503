"""Checkpoint tensors -> parameters, for both published layouts.

Every tensor is loaded, knowingly skipped, or named in an error; a missing one or a wrong shape is one
clear line. Names: transformers' convert_janus_weights_to_hf.py, read in both directions.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vllm_kvcompress.log import logger_for
from vllm_kvcompress.models.config import head_size
from vllm_kvcompress.models.fingerprint import Fingerprint
from vllm_kvcompress.models.packed import LINEAR, quantised_tensors
from vllm_kvcompress.models.registry import family_of
from vllm_kvcompress.models.vision_sizes import NO_PICTURES, is_vision, vision_name, vision_shapes
from vllm_kvcompress.models.vq import IN_VQ, PictureDecoder, vq_name

if TYPE_CHECKING:
    from vllm_kvcompress.models.branched import BranchedImageModel
    from vllm_kvcompress.models.vision import JanusVision

logger = logger_for(__name__)

_RENAME = (
    (r"^(?:model\.language_model|language_model\.model)\.", "language_model."),
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^model\.generation_embeddings\.|^gen_embed\.", "gen_embed."),
    (r"^model\.generation_aligner\.fc1\.|^gen_aligner\.layers\.0\.", "gen_aligner.0."),
    (r"^model\.generation_aligner\.hidden_layers\.0\.|^gen_aligner\.layers\.2\.", "gen_aligner.2."),
    (r"^model\.generation_head\.proj_out\.|^gen_head\.output_mlp_projector\.", "gen_head_proj."),
    (r"^model\.generation_head\.vision_head\.|^gen_head\.vision_head\.", "gen_head."),
)
_ROPE = re.compile(r"rotary_emb\.inv_freq$")  # tables that old checkpoints carry
_FLOW = re.compile(r"^vision_gen_(?:enc|dec)_")
# Of an 8-bit KV cache (kv_cache_scheme), as quantisers name them.
_CACHE_SCALE = re.compile(r"^language_model\.layers\.\d+\.self_attn\.(?:attn\.|[kv]_proj\.)?[qkv]_scale$")
# What stands beside or for a quantised layer's weight: compressed-tensors', GPTQ's and AWQ's names.
_OF_A_QUANTISER = re.compile(
    r"\.(?:weight_\w+|(?:input|output)_(?:scale|zero_point|global_scale|g_idx)|qweight|qzeros|scales|g_idx)$"
)
_DECODER = re.compile(r"^language_model\.layers\.")  # in canonical names: all that may be quantised
_WITHOUT = f"; {NO_PICTURES} serves the model without pictures in chats"


class CheckpointError(ValueError):
    """A checkpoint that can't be served; the message is one line."""


def canonical_name(name: str) -> str | None:
    """This package's name of a checkpoint tensor of either layout; None if knowingly skipped.

    Names of the VQ model come back as they are (`PictureDecoder.own_name` maps them).
    """
    # Drawing does not need image understanding; `Ledger` looks at it first.
    if is_vision(name) or _ROPE.search(name):
        return None
    if IN_VQ.match(name):
        return name if vq_name(name) is not None else None
    for pattern, new in _RENAME:
        renamed, hit = re.subn(pattern, new, name)
        if hit:
            return renamed
    return name


def expected_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Canonical name -> shape of every tensor that drawing and text need, the VQ decoder's aside.

    ``config`` is the checkpoint's, of either layout.
    """
    text, vq = config.get_text_config(), config.vq_config
    hidden, embed_dim, codes = text.hidden_size, vq.embed_dim, vq.num_embeddings
    return decoder_shapes(text) | {
        "lm_head.weight": (text.vocab_size, hidden),
        "gen_embed.weight": (codes, embed_dim),
        "gen_aligner.0.weight": (hidden, embed_dim),
        "gen_aligner.0.bias": (hidden,),
        "gen_aligner.2.weight": (hidden, hidden),
        "gen_aligner.2.bias": (hidden,),
        "gen_head_proj.weight": (hidden, hidden),
        "gen_head_proj.bias": (hidden,),
        "gen_head.weight": (codes, hidden),
        "gen_head.bias": (codes,),
    }


def decoder_shapes(text: Any) -> dict[str, tuple[int, ...]]:
    """Canonical name -> shape of the tensors of a Llama without its head; ``text`` is its configuration."""
    hidden, head = text.hidden_size, head_size(text)
    q, kv = text.num_attention_heads * head, text.num_key_value_heads * head
    shapes: dict[str, tuple[int, ...]] = {
        "language_model.embed_tokens.weight": (text.vocab_size, hidden),
        "language_model.norm.weight": (hidden,),
    }
    layer = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (q, hidden),
        "self_attn.k_proj.weight": (kv, hidden),
        "self_attn.v_proj.weight": (kv, hidden),
        "self_attn.o_proj.weight": (hidden, q),
        "mlp.gate_proj.weight": (text.intermediate_size, hidden),
        "mlp.up_proj.weight": (text.intermediate_size, hidden),
        "mlp.down_proj.weight": (hidden, text.intermediate_size),
    }
    if getattr(text, "attention_bias", False):
        layer |= {"self_attn.q_proj.bias": (q,), "self_attn.k_proj.bias": (kv,)}
        layer |= {"self_attn.v_proj.bias": (kv,), "self_attn.o_proj.bias": (hidden,)}
    for i in range(text.num_hidden_layers):
        shapes |= {f"language_model.layers.{i}.{name}": shape for name, shape in layer.items()}
    return shapes


class Ledger:
    """What a checkpoint must hold, and has been seen to.

    Parameters
    ----------
    config
        The checkpoint's, of either layout.
    vq : PictureDecoder, optional
        Checks the VQ model's tensors too; without it they are left to ``PictureDecoder.load_weights``.
    packed : mapping, optional
        `quantised_tensors` of the served model. Without it, and if config.json says that layers are
        quantised, the tensors of such layers are left to vLLM's loaders.
    vision : bool
        Whether the understanding half is to be loaded too; else its tensors are knowingly skipped.
    """

    def __init__(
        self,
        config: Any,
        vq: PictureDecoder | None = None,
        packed: Mapping[str, set[str]] | None = None,
        vision: bool = False,
    ) -> None:
        self._family = family_of(config)
        self._shapes, self._vq, self._vision = self._family.shapes(config), vq, vision
        self._quantised = bool(getattr(config, "quantization_config", None))
        self._loose = packed is None and self._quantised
        self.cache_scales = 0  # seen
        self._theirs: set[str] = set().union(*(packed or {}).values())
        linear = packed or ([name for name in self._shapes if LINEAR.match(name)] if self._loose else ())
        self.unchecked = {name: self._shapes.pop(name) for name in linear if name in self._shapes}
        """Canonical name -> shape of those that only vLLM's loaders know as the files hold them."""
        if vision:
            self._shapes |= {f"vision.{name}": shape for name, shape in vision_shapes(config).items()}
        self._tied = bool(getattr(config, "tie_word_embeddings", False))
        self._seen: set[str] = set()
        self._seen_vq: set[str] = set()

    def take(self, original: str, shape: tuple[int, ...], tensor: Tensor | None = None) -> str | None:
        """The canonical name of a checkpoint's tensor, None if knowingly skipped.

        A quantiser's scales of the cache, and biases of zeros (GPTQ's) where there are none, need not be.
        Without the ``tensor`` a bias is taken for one of zeros. Raises CheckpointError if it is unknown or
        of a wrong shape.
        """
        if _FLOW.match(original):
            raise CheckpointError(
                f"tensor {original} belongs to JanusFlow, which draws by rectified flow: not supported; "
                "serve a Janus or Janus-Pro checkpoint"
            )
        if self._vision and is_vision(original):
            seen = vision_name(original)
            name = None if seen is None else f"vision.{seen}"
        else:
            name = self._family.canonical_name(original)
        if name is None:
            return None
        if self._is_outside(name, original):
            raise CheckpointError(
                f"tensor {original} is of a quantised layer outside the decoder, served as published only: "
                "quantise again with that layer in the recipe's ignore (lists: docs/serving.md)"
                f"{_WITHOUT if name.startswith('vision.') else ''}"
            )
        if IN_VQ.match(name):
            if self._vq is not None and (known := self._vq.checked_name(original, shape)) is not None:
                self._seen_vq.add(known)
            return name
        if self._quantised and _CACHE_SCALE.match(name):
            self.cache_scales += 1
            return name  # loaded or left out by vLLM's loader, as its layers have them or not
        if self._quantised and name.endswith(".bias") and LINEAR.match(name) and name not in self._shapes:
            if tensor is not None and tensor.any():
                raise CheckpointError(
                    f"tensor {original} is a bias that is not zero, but by config.json (attention_bias) the "
                    "layer has none: quantise the published model as it is"
                )
            return None
        if name in self._theirs or (self._loose and LINEAR.match(name)):
            self._seen.add(name)
            return name
        mend = _WITHOUT if name.startswith("vision.") else ""
        if name not in self._shapes:
            quantised = ", as config.json says it is quantised" if self._theirs else ""
            raise CheckpointError(
                f"unknown tensor {original}: not part of a {self._family.name} checkpoint{quantised}{mend}"
            )
        if shape != self._shapes[name]:
            raise CheckpointError(
                f"tensor {original} has shape {shape}, but config.json asks for {self._shapes[name]}{mend}"
            )
        self._seen.add(name)
        return name

    def _is_outside(self, name: str, original: str) -> bool:
        """Whether it is what a quantiser made of a layer that is served, but none of the decoder's."""
        if not self._quantised or name in self._shapes or _DECODER.match(name):
            return False
        if not _OF_A_QUANTISER.search(name):
            return False
        return not IN_VQ.match(name) or (self._vq is not None and self._vq.own_name(original) is not None)

    @property
    def ties(self) -> bool:
        """Whether the text head is the embedding: only where the file does not hold one."""
        return self._tied and "lm_head.weight" not in self._seen

    def close(self) -> None:
        """Raise CheckpointError if something has not been seen."""
        needed = self._shapes.keys() | self._theirs
        missing = sorted(needed - self._seen - ({"lm_head.weight"} if self.ties else set()))
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            alone = all(name.startswith("vision.") for name in missing)
            mend = _WITHOUT if alone else ""
            raise CheckpointError(
                f"the checkpoint lacks tensor {missing[0]}{more}: is a shard missing?{mend}"
            )
        if self._vq is not None:
            self._vq.check_missing(self._seen_vq)


def fold_image_embedding(tensors: dict[str, Tensor]) -> Tensor:
    """gen_aligner(gen_embed(code)) of every code: float32 ``[codes, hidden]``.

    Folded before the cast to the served dtype, so rounding happens once.
    """
    x = tensors["gen_embed.weight"].float()
    x = nn.functional.linear(
        x, tensors["gen_aligner.0.weight"].float(), tensors["gen_aligner.0.bias"].float()
    )
    x = nn.functional.gelu(x)
    return nn.functional.linear(
        x, tensors["gen_aligner.2.weight"].float(), tensors["gen_aligner.2.bias"].float()
    )


def load_weights(model: "BranchedImageModel", weights: Iterable[tuple[str, Tensor]]) -> set[str]:
    """Fill ``model`` from checkpoint tensors, of either layout of Janus or as another family has them.

    Returns
    -------
    set of str
        Names of the parameters that were filled.

    Raises
    ------
    CheckpointError
        One line naming the tensor: unknown, missing, or of a wrong shape.
    """
    packed = quantised_tensors(model)
    vision: JanusVision | None = getattr(model, "vision", None)
    ledger = Ledger(model.config, packed=packed, vision=vision is not None)
    small: dict[str, Tensor] = {}  # what is folded or renamed rather than streamed
    vq: list[tuple[str, Tensor]] = []
    pictures: list[tuple[str, Tensor]] = []
    mark = Fingerprint()

    def language() -> Iterator[tuple[str, Tensor]]:
        for original, tensor in weights:
            name = ledger.take(original, tuple(tensor.shape), tensor)
            if name is None:
                continue
            if IN_VQ.match(name):
                vq.append((name, tensor))
            elif name.startswith("vision."):
                pictures.append((name.removeprefix("vision."), tensor))
            elif name.startswith("language_model."):
                mark.add(name, tensor)
                yield name.removeprefix("language_model."), tensor
            else:
                small[name] = tensor

    loaded = {f"language_model.{name}" for name in model.language_model.load_weights(language())}
    if ledger.cache_scales and not any(_CACHE_SCALE.match(name) for name in loaded):
        logger.info(
            "The checkpoint's scales of an 8-bit KV cache (kv_cache_scheme) are not used: the compressed "
            "cache has 8 bits with --kv-cache-dtype fp8 alone, and scale 1."
        )
    if ledger.ties:
        lm_head: Any = model.lm_head
        lm_head.tie_weights(model.language_model.embed_tokens)
    ledger.close()
    for name, tensor in small.items():
        mark.add(name, tensor)

    if "gen_embed.weight" in small:
        # gen_aligner(gen_embed(code)) for every code: one look-up instead of two matrix products.
        small["image_embedding.weight"] = fold_image_embedding(small).to(model.dtype)
    if "lm_head.weight" in small and "gen_head.weight" not in small:  # codes are ids of the vocabulary
        first = model.image.first_code
        small["gen_head.weight"] = small["lm_head.weight"][first : first + model.image.codes]
    parameters = dict(model.named_parameters())
    for name, tensor in small.items():
        if name in parameters:
            loader = getattr(parameters[name], "weight_loader", _copy)
            loader(parameters[name], tensor)
            loaded.add(name)
    if ledger.ties:
        loaded.add("lm_head.weight")
    loaded |= {f"vq.{name}" for name in model.vq.load_weights(vq)}
    if vision is not None:
        loaded |= {f"vision.{name}" for name in vision.load_weights(pictures)}
    model.fingerprint = str(mark)
    return loaded


def _copy(parameter: nn.Parameter, tensor: Tensor) -> None:
    with torch.no_grad():
        parameter.copy_(tensor)
