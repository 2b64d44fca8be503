"""Sizes and tensor names of Janus's understanding half, in both published layouts.

A SigLIP tower and an aligner of linear layers: deepseek-ai/Janus janus/models/clip_encoder.py, siglip_vit.py,
projector.py; transformers models/janus, and its convert_janus_weights_to_hf.py for the names.
"""

import re
from dataclasses import dataclass
from typing import Any

from transformers import SiglipVisionConfig

from vllm_kvcompress.models.janus_config import ORIGINAL_LAYOUT
from vllm_kvcompress.models.sections import section_params

NO_PICTURES = "--limit-mm-per-prompt '{\"image\": 0}'"

# siglip_vit.py's table; config.json of the original layout names a row of it. A smaller tower states its own
# sizes beside the name.
_PUBLISHED = "siglip_large_patch16_384"  # of every Janus
_SIGLIP = {
    _PUBLISHED: {
        "width": 1024,
        "layers": 24,
        "heads": 16,
        "patch_size": 16,
        "mlp_ratio": 4.0,
    },
}
# name -> least, most; an order of magnitude above any tower of the kind
_SIZES = {
    "width": (1, 1 << 14),
    "layers": (1, 256),
    "heads": (1, 256),
    "patch_size": (1, 256),
    "image_size": (1, 1 << 13),
    "aligner_depth": (1, 16),
}

_TOWER = re.compile(r"^(?:model\.)?(?:vision_model|aligner)\.")
_POOL = re.compile(r"^vision_model\.vision_tower\.attn_pool\.")  # stored, never used (ignore_head)
_RENAME = (
    (r"^model\.vision_model\.", "tower."),
    (r"^vision_model\.vision_tower\.", "tower."),
    (r"^(tower\..*\.self_attn)\.projection_layer\.", r"\1.out_proj."),
    (r"^tower\.patch_embed\.proj\.", "tower.embeddings.patch_embedding."),
    (r"^tower\.pos_embed$", "tower.embeddings.position_embedding.weight"),
    (r"^tower\.blocks\.", "tower.encoder.layers."),
    (r"^(tower\..*)\.norm([12])\.", r"\1.layer_norm\2."),
    (r"^(tower\..*)\.attn\.qkv\.", r"\1.self_attn.qkv_proj."),
    (r"^(tower\..*)\.attn\.proj\.", r"\1.self_attn.out_proj."),
    (r"^tower\.norm\.", "tower.post_layernorm."),
    (r"^model\.aligner\.fc1\.", "aligner.0."),
)


@dataclass(frozen=True)
class VisionSizes:
    """Everything that decides a tensor's shape.

    Parameters
    ----------
    width, layers, heads, patch_size, intermediate : int
        The tower's.
    image_size : int
        Side of the square of pixels that it looks at.
    aligner_depth : int
        Linear layers between tower and language model.
    """

    width: int
    layers: int
    heads: int
    patch_size: int
    intermediate: int
    image_size: int
    aligner_depth: int

    @property
    def tokens(self) -> int:
        """Tokens that a picture takes in a prompt, begin- and end-of-image aside."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def siglip(self) -> SiglipVisionConfig:
        """As vLLM's tower wants them: exact GELU and an epsilon of 1e-6 in both layouts."""
        return SiglipVisionConfig(
            hidden_size=self.width,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            image_size=self.image_size,
            patch_size=self.patch_size,
            hidden_act="gelu",
            layer_norm_eps=1e-6,
        )


def described(hf_config: Any) -> bool:
    """Whether config.json has an understanding half at all."""
    if hf_config.model_type == ORIGINAL_LAYOUT:
        return bool(hf_config.vision_config and hf_config.aligner_config)
    return getattr(hf_config, "vision_config", None) is not None


def vision_sizes(hf_config: Any) -> VisionSizes:
    """Sizes of the understanding half of a checkpoint of either layout.

    Raises ValueError, one line naming the field of config.json, where this package can't run it.
    """
    read = _original if hf_config.model_type == ORIGINAL_LAYOUT else _transformers
    sizes, ratio = read(hf_config)
    for name, (least, most) in _SIZES.items():
        value = sizes[name]
        if type(value) is not int or not least <= value <= most:
            raise _unfit(f"{name} must be a number from {least} to {most}, got {value!r:.60}")
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 < ratio <= 64:
        raise _unfit(f"mlp_ratio must be a number up to 64, got {ratio!r:.60}")
    if sizes["width"] % sizes["heads"]:
        raise _unfit(f"width {sizes['width']} must be a multiple of heads {sizes['heads']}")
    if sizes["image_size"] % sizes["patch_size"]:
        raise _unfit(
            f"image_size {sizes['image_size']} must be a multiple of patch_size {sizes['patch_size']}"
        )
    return VisionSizes(**sizes, intermediate=int(sizes["width"] * ratio))


def _unfit(what: str) -> ValueError:
    return ValueError(f"config.json: vision_config: {what}; {NO_PICTURES} serves the model without it")


def _original(hf_config: Any) -> tuple[dict[str, Any], Any]:
    params = section_params(hf_config.vision_config, "vision_config")
    aligner = section_params(hf_config.aligner_config, "aligner_config")
    name = params.get("model_name", _PUBLISHED)
    known = isinstance(name, str) and name in _SIGLIP
    if not known and not {"width", "layers", "heads"} <= params.keys():
        raise _unfit(f"model_name {name!r:.60} is not one of {', '.join(_SIGLIP)}")
    table = _SIGLIP[name if known else _PUBLISHED]
    sizes = {key: params.get(key, value) for key, value in table.items()}
    last = params.get("select_layer", -1)
    if type(last) is not int or type(sizes["layers"]) is not int:
        raise _unfit(f"select_layer must be a number, got {last!r:.60}")
    # The tower is built, and stored, up to the layer whose output is used.
    sizes["layers"] = min(sizes["layers"], sizes["layers"] + last + 1 if last <= 0 else last)
    kind = aligner.get("projector_type", "mlp_gelu")
    if kind != "mlp_gelu":
        raise ValueError(
            f"config.json: aligner_config: projector_type {kind!r:.60} is not mlp_gelu; {NO_PICTURES} serves "
            "the model without it"
        )
    ratio = sizes.pop("mlp_ratio")
    return {
        **sizes,
        "image_size": params.get("image_size", 384),
        "aligner_depth": aligner.get("depth", 2),
    }, ratio


def _transformers(hf_config: Any) -> tuple[dict[str, Any], Any]:
    vision = hf_config.vision_config
    for name, wanted in (
        ("use_qk_norm", False), ("attention_bias", True), ("hidden_act", "gelu"), ("num_channels", 3),
        ("layer_norm_eps", 1e-6),
    ):  # fmt: skip
        if getattr(vision, name, wanted) != wanted:
            raise _unfit(f"{name} must be {wanted}, as in every Janus, got {getattr(vision, name)!r:.60}")
    sizes = {
        "width": vision.hidden_size,
        "layers": vision.num_hidden_layers,
        "heads": vision.num_attention_heads,
        "patch_size": vision.patch_size,
        "image_size": vision.image_size,
        "aligner_depth": vision.depth,
    }
    return sizes, vision.mlp_ratio


def is_vision(name: str) -> bool:
    """Whether a checkpoint's tensor, of either layout, is of the understanding half."""
    return _TOWER.match(name) is not None


def vision_name(name: str) -> str | None:
    """The parameter of ``JanusVision`` that a tensor of the understanding half fills; None if skipped.

    q, k and v of the transformers layout stay apart: ``JanusVision.load_weights`` puts them together.
    """
    if _POOL.match(name):
        return None
    for pattern, new in _RENAME:
        name = re.sub(pattern, new, name)
    if hidden := re.match(r"^model\.aligner\.hidden_layers\.(\d+)\.(\w+)$", name):
        return f"aligner.{int(hidden[1]) + 1}.{hidden[2]}"
    # Every other of the original's layers is the activation.
    if (layer := re.match(r"^aligner\.layers\.(\d+)\.(\w+)$", name)) and not int(layer[1]) % 2:
        return f"aligner.{int(layer[1]) // 2}.{layer[2]}"
    return name


def vision_shapes(hf_config: Any) -> dict[str, tuple[int, ...]]:
    """``vision_name`` -> shape of every tensor that understanding needs, as the layout stores it."""
    sizes, original = vision_sizes(hf_config), hf_config.model_type == ORIGINAL_LAYOUT
    width, wide, hidden = sizes.width, sizes.intermediate, hf_config.get_text_config().hidden_size
    grid = (sizes.tokens, width)
    layer: dict[str, tuple[int, ...]] = {
        "layer_norm1": (width,), "layer_norm2": (width,), "self_attn.out_proj": (width, width),
        "mlp.fc1": (wide, width), "mlp.fc2": (width, wide),
    }  # fmt: skip
    if original:
        layer["self_attn.qkv_proj"] = (3 * width, width)
    else:
        layer |= {f"self_attn.{part}_proj": (width, width) for part in "qkv"}
    modules: dict[str, tuple[int, ...]] = {
        "tower.embeddings.patch_embedding": (width, 3, sizes.patch_size, sizes.patch_size),
        "tower.post_layernorm": (width,),
        **{
            f"tower.encoder.layers.{number}.{name}": shape
            for number in range(sizes.layers)
            for name, shape in layer.items()
        },
        "aligner.0": (hidden, width),
        **{f"aligner.{number}": (hidden, hidden) for number in range(1, sizes.aligner_depth)},
    }
    shapes: dict[str, tuple[int, ...]] = {
        "tower.embeddings.position_embedding.weight": (1, *grid) if original else grid
    }
    for name, shape in modules.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes
