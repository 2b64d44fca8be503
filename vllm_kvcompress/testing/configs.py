"""The JSON files of a checkpoint, as published in either layout."""

from typing import Any

from transformers import JanusConfig, JanusVisionConfig, JanusVQVAEConfig, LlamaConfig

from vllm_kvcompress.testing import tokenizer as tok
from vllm_kvcompress.testing.geometry import CheckpointGeometry

# Janus-Pro's format; like the published one it takes a message's content in parts (text, image).
_CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message.role == 'user' %}<|User|>: {% elif message.role == 'assistant' %}<|Assistant|>: {% endif -%}
{%- for part in message.content -%}
{%- if part.type == 'image' %}<image_placeholder>{% else %}{{ part.text | trim }}{% endif -%}
{%- if not loop.last %}{{ '\n' }}{% endif -%}
{%- endfor -%}
{%- if message.role == 'assistant' %}{{ EOS }}{% else %}{{ '\n\n' }}{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}<|Assistant|>:{% endif -%}
""".replace("EOS", repr(tok.EOS))


def transformers_config(g: CheckpointGeometry, dtype: str, image_token_id: int) -> JanusConfig:
    """config.json of the transformers layout.

    ``tie_word_embeddings`` is left at its default, true, although the stored tensors differ: so it is
    in published files, and a loader must not believe it.
    """
    text = LlamaConfig(
        vocab_size=g.text_vocab,
        hidden_size=g.hidden,
        intermediate_size=g.intermediate,
        num_hidden_layers=g.layers,
        num_attention_heads=g.heads,
        num_key_value_heads=g.kv_heads,
        max_position_embeddings=g.max_positions,
        rms_norm_eps=1e-6,
        dtype=dtype,
    )
    vision = JanusVisionConfig(
        hidden_size=g.vision_hidden,
        num_hidden_layers=g.vision_layers,
        num_attention_heads=g.vision_heads,
        image_size=g.image_size,
        patch_size=g.patch,
        num_image_tokens=g.image_tokens,
        projection_dim=g.hidden,
    )
    vq = JanusVQVAEConfig(
        num_embeddings=g.codebook,
        latent_channels=g.vq_latent,
        base_channels=g.vq_channels,
        channel_multiplier=list(g.vq_multipliers),
        num_res_blocks=g.vq_res_blocks,
        num_patches=g.lines,
        projection_dim=g.hidden,
        image_token_embed_dim=g.hidden,
    )
    config = JanusConfig(text_config=text, vision_config=vision, vq_config=vq, image_token_id=image_token_id)
    config.architectures = ["JanusForConditionalGeneration"]
    config.dtype = dtype
    return config


def original_config(g: CheckpointGeometry, dtype: str) -> dict[str, Any]:
    """config.json of deepseek-ai's layout.

    The published one says nothing of the VQ model's and the vision tower's sizes, which the model code fixes;
    where they differ from those (VQ-16, SigLIP-L) they are stated under the names of the code's arguments.
    """
    vq: dict[str, Any] = {"image_token_size": g.codebook, "n_embed": 8}
    if (g.vq_channels, g.vq_multipliers, g.vq_res_blocks, g.vq_latent) != (128, (1, 1, 2, 2, 4), 2, 256):
        vq |= {"z_channels": g.vq_latent, "ch": g.vq_channels}
        vq |= {"ch_mult": list(g.vq_multipliers), "num_res_blocks": g.vq_res_blocks}
    projector = {"depth": 2, "n_embed": g.hidden, "projector_type": "mlp_gelu"}
    vision: dict[str, Any] = {
        "image_size": g.image_size, "model_name": "siglip_large_patch16_384", "select_feature": "same",
    }  # fmt: skip
    if (g.vision_hidden, g.vision_layers, g.vision_heads, g.patch) != (1024, 24, 16, 16):
        vision |= {"width": g.vision_hidden, "layers": g.vision_layers}
        vision |= {"heads": g.vision_heads, "patch_size": g.patch}
    return {
        "architectures": ["MultiModalityCausalLM"],
        "model_type": "multi_modality",
        "torch_dtype": dtype,
        "aligner_config": {
            "cls": "MlpProjector",
            "model_type": "aligner",
            "params": {**projector, "input_dim": g.vision_hidden},
        },
        "gen_aligner_config": {
            "cls": "MlpProjector",
            "model_type": "gen_aligner",
            "params": {**projector, "input_dim": 8},
        },
        "gen_head_config": {
            "cls": "vision_head",
            "model_type": "gen_head",
            "params": {"image_token_embed": g.hidden, "image_token_size": g.codebook, "n_embed": g.hidden},
        },
        "gen_vision_config": {"cls": "VQ-16", "model_type": "gen_vision", "params": vq},
        "language_config": {
            "model_type": "llama",
            "hidden_size": g.hidden,
            "intermediate_size": g.intermediate,
            "max_position_embeddings": g.max_positions,
            "num_attention_heads": g.heads,
            "num_hidden_layers": g.layers,
            "num_key_value_heads": g.kv_heads,
            "torch_dtype": dtype,
            "vocab_size": g.text_vocab,
        },
        "vision_config": {
            "cls": "CLIPVisionTower",
            "model_type": "vision",
            "params": {**vision, "select_layer": -1},
        },
    }


def _preprocessor(g: CheckpointGeometry, image_processor: str, processor: str) -> dict[str, Any]:
    return {
        "background_color": [127, 127, 127],
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": image_processor,
        "image_std": [0.5, 0.5, 0.5],
        "min_size": 14,
        "processor_class": processor,
        "rescale_factor": 1 / 255,
    }


def transformers_files(g: CheckpointGeometry, ids: dict[str, int]) -> dict[str, Any]:
    special = {"bos_token": tok.BOS, "eos_token": tok.EOS, "pad_token": tok.PAD}
    extra = {"boi_token": tok.BOI, "eoi_token": tok.EOI, "image_token": tok.IMAGE}
    size = {"height": g.image_size, "width": g.image_size}
    return {
        "tokenizer_config.json": {
            **special,
            **extra,
            "extra_special_tokens": extra,
            "model_max_length": g.max_positions,
            "padding_side": "left",
            "processor_class": "JanusProcessor",
            "tokenizer_class": "LlamaTokenizer",
        },
        "special_tokens_map.json": {**special, **extra},
        "generation_config.json": {
            "bos_token_id": ids[tok.BOS],
            "eos_token_id": ids[tok.EOS],
            "pad_token_id": ids[tok.PAD],
            "guidance_scale": 5.0,
            "generation_kwargs": {"boi_token_id": ids[tok.BOI]},
        },
        "preprocessor_config.json": {
            **_preprocessor(g, "JanusImageProcessor", "JanusProcessor"), "do_resize": True, "size": size,
        },
        "processor_config.json": {"num_image_tokens": g.image_tokens, "processor_class": "JanusProcessor"},
        "chat_template.jinja": _CHAT_TEMPLATE,
    }  # fmt: skip


def original_files(g: CheckpointGeometry, ids: dict[str, int]) -> dict[str, Any]:
    special = {"bos_token": tok.BOS, "eos_token": tok.EOS}
    additional = [token for token in tok.ADDITIONAL if token in ids]
    return {
        "tokenizer_config.json": {
            **special,
            "add_bos_token": True,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": g.max_positions,
            "pad_token": None,
            "tokenizer_class": "LlamaTokenizer",
            "unk_token": None,
            "use_default_system_prompt": True,
        },
        "special_tokens_map.json": {
            **special,
            "additional_special_tokens": additional,
            "pad_token": tok.PAD,
        },
        "preprocessor_config.json": {
            **_preprocessor(g, "VLMImageProcessor", "VLChatProcessor"), "image_size": g.image_size,
        },
        "processor_config.json": {
            "add_special_token": False,
            "ignore_id": -100,
            "image_tag": tok.IMAGE,
            "mask_prompt": True,
            "num_image_tokens": g.image_tokens,
            "processor_class": "VLChatProcessor",
            "sft_format": "deepseek",
        },
    }  # fmt: skip
