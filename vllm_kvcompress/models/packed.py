"""Linear layers of a decoder whose weights a checkpoint holds quantised."""

import re
from typing import TYPE_CHECKING

from vllm.model_executor.layers.linear import UnquantizedLinearMethod

if TYPE_CHECKING:
    from vllm_kvcompress.models.branched import BranchedImageModel

LINEAR = re.compile(r"^(?P<layer>language_model\.layers\.\d+)\.(?:self_attn|mlp)\.\w+_proj\.")
"""In canonical names; the group is the layer."""
# vLLM's layers of a decoder layer, and the checkpoint's that each holds.
_FUSED = {
    "self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "self_attn.o_proj": ("o_proj",),
    "mlp.gate_up_proj": ("gate_proj", "up_proj"),
    "mlp.down_proj": ("down_proj",),
}


def quantised_tensors(model: "BranchedImageModel") -> dict[str, set[str]]:
    """Canonical name of a weight that the served layers hold quantised -> its tensors' names instead.

    What they are called and how they are shaped is vLLM's matter: its own loaders check them.
    """
    found: dict[str, set[str]] = {}
    for number, layer in enumerate(getattr(model.language_model, "layers", ())):
        for path, parts in _FUSED.items():
            linear = layer.get_submodule(path)
            if isinstance(linear.quant_method, UnquantizedLinearMethod):
                continue
            owner = path.rpartition(".")[0]
            held = [name for name, _ in linear.named_parameters(recurse=False) if name != "bias"]
            for part in parts:
                whole = f"language_model.layers.{number}.{owner}.{part}"
                found[f"{whole}.weight"] = {f"{whole}.{name}" for name in held}
    return found
