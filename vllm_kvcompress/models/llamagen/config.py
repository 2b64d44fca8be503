"""config.json of a converted LlamaGen: model type ``llamagen``, written by ``vllm-kvcompress convert``.

LlamaGen (FoundationVision/LlamaGen, arXiv 2406.06525) is published as bare ``.pt`` files without any
configuration. Class-conditional models only: a prompt is one class.
"""

from typing import Any, ClassVar

from transformers import JanusVQVAEConfig, LlamaConfig, PreTrainedConfig

from vllm_kvcompress.models.config import head_size
from vllm_kvcompress.models.sections import reading

MODEL_TYPE = "llamagen"
ARCHITECTURE = "LlamaGenForImageGeneration"
CLASS_CONDITIONAL = "c2i"
PREFIX = 1  # tokens before the picture: the class
# Head sizes in the KV cache are a multiple, as attention kernels want (3B's 100 is 112), and at least what
# vLLM's kernels for CPUs take.
HEAD_SIZES, LEAST_HEAD_SIZE = 16, 32
_VQ_KEYS = ("codes", "embed", "z", "ch", "ch_mult", "res_blocks")


class LlamaGenConfig(PreTrainedConfig):
    """Sizes of a class-conditional LlamaGen and of its VQ decoder.

    Beside Llama's own keys (``hidden_size``, ``intermediate_size``, ``num_hidden_layers``,
    ``num_attention_heads``, ``rms_norm_eps``, ``rope_theta``) the file says ``condition`` (``c2i``),
    ``num_classes`` (the null class is one more), ``grid`` (lines of the picture, and tokens a line) and
    ``vq`` (``codes``, ``embed``, ``z``, ``ch``, ``ch_mult``, ``res_blocks``). Token ids are classes, the null
    class, then codes.
    """

    model_type = MODEL_TYPE
    sub_configs: ClassVar[dict[str, Any]] = {"text_config": LlamaConfig, "vq_config": JanusVQVAEConfig}

    @reading()
    def __init__(self, **kwargs: Any) -> None:
        for name in ("text_config", "vq_config"):  # derived below; present when read back from disk
            kwargs.pop(name, None)
        given = bool(kwargs)  # transformers makes empty ones to compare with
        self.condition = kwargs.pop("condition", CLASS_CONDITIONAL)
        if self.condition != CLASS_CONDITIONAL:
            raise ValueError(
                f"config.json: condition {self.condition!r:.40} is not supported, only {CLASS_CONDITIONAL} "
                "(class-conditional LlamaGen)"
            )
        self.num_classes = _number(kwargs.pop("num_classes", 1000), "num_classes", 1 << 20)
        self.grid = _number(kwargs.pop("grid", None if given else 24), "grid", 128)
        self.rope_theta = kwargs.pop("rope_theta", 10000.0)
        if isinstance(self.rope_theta, bool) or not isinstance(self.rope_theta, (int, float)):
            raise ValueError(f"config.json: rope_theta must be a number, got {self.rope_theta!r:.60}")
        self.vq = kwargs.pop("vq", None) or {}
        if given and (
            not isinstance(self.vq, dict) or (missing := [k for k in _VQ_KEYS if k not in self.vq])
        ):
            lacks = f"lacks {missing[0]}" if isinstance(self.vq, dict) else "must be an object"
            raise ValueError(f"config.json: vq {lacks}: convert the checkpoint again")
        language = {name: kwargs.pop(name) for name in _LANGUAGE if name in kwargs}
        dtype = kwargs.pop("torch_dtype", None) or kwargs.pop("dtype", None)
        self.text_config = LlamaConfig(
            **{"rms_norm_eps": 1e-5, **language},
            vocab_size=self.num_classes + 1,
            # A class and the picture; one more, because vLLM samples after a whole picture that is scored.
            max_position_embeddings=PREFIX + self.grid**2 + 1,
            tie_word_embeddings=False,
            dtype=dtype,
        )
        self.text_config.grid, self.text_config.grid_rope_theta = self.grid, float(self.rope_theta)
        cached = -(-head_size(self.text_config) // HEAD_SIZES) * HEAD_SIZES
        self.text_config.cached_head_size = max(LEAST_HEAD_SIZE, cached)
        multipliers = self.vq.get("ch_mult", [1, 1, 2, 2, 4])
        if not isinstance(multipliers, list) or not 1 <= len(multipliers) <= 8:
            raise ValueError(
                f"config.json: vq.ch_mult must be a list of 1 to 8 numbers, got {multipliers!s:.60}"
            )
        hidden = self.text_config.hidden_size
        self.vq_config = JanusVQVAEConfig(
            num_embeddings=self.vq.get("codes", 16384),
            embed_dim=self.vq.get("embed", 8),
            latent_channels=self.vq.get("z", 256),
            base_channels=self.vq.get("ch", 128),
            channel_multiplier=multipliers,
            num_res_blocks=self.vq.get("res_blocks", 2),
            num_patches=self.grid,
            projection_dim=hidden,
            image_token_embed_dim=hidden,
        )
        kwargs["tie_word_embeddings"] = False
        super().__init__(dtype=dtype, **kwargs)


_LANGUAGE = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "rms_norm_eps", "head_dim",
)  # fmt: skip


def _number(value: Any, name: str, most: int) -> int:
    if type(value) is not int or not 1 <= value <= most:
        raise ValueError(f"config.json: {name} must be a number from 1 to {most}, got {value!r:.60}")
    return value
