"""From configuration and head profile to the cache's layout, and the words that say what was decided."""

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from vllm_kvcompress.attention import kernels
from vllm_kvcompress.cache.layout import BRANCHES, TYPICAL_PREFIX, CacheLayout, footprint
from vllm_kvcompress.cache.paging import plan_paging
from vllm_kvcompress.config import FP8, CompressionConfig, parse_config
from vllm_kvcompress.heads.provide import provide_profile

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_kvcompress.models.janus import JanusForImageGeneration


def plan_layout(vllm_config: "VllmConfig", model: "JanusForImageGeneration") -> CacheLayout:
    """Decide head types, rules and pages. Raises ValueError, one line."""
    config = parse_config(vllm_config.additional_config)
    text = model.config.get_text_config()
    layers, kv_heads = text.num_hidden_layers, text.num_key_value_heads
    types, scores = _head_types(config, vllm_config, model, layers, kv_heads)
    policy, raster = config.policy, model.image.raster

    def capacities(spatial: int, semantic: int) -> tuple[int, int]:
        ring, select = policy.rules(raster, spatial, semantic)
        return ring.capacity if ring else 0, select.capacity if select else 0

    spatial = BRANCHES * int(types.sum())
    paging = plan_paging(spatial, BRANCHES * types.size - spatial, capacities, step=BRANCHES)
    _move(types, scores, paging.moved // BRANCHES)
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    layout = CacheLayout(
        spatial=tuple(tuple(np.flatnonzero(row).tolist()) for row in types),
        kv_heads=kv_heads,
        head_size=head_size,
        rules=policy.rules(raster, paging.spatial_heads, paging.semantic_heads),
        paging=paging,
        dtype=torch.float8_e4m3fn if vllm_config.cache_config.cache_dtype in FP8 else model.dtype,
    )
    used = kernels.use(config.kernels, vllm_config.device_config.device_type, layout.dtype)
    kernels.check_shape(head_size, text.num_attention_heads // kv_heads)
    return replace(layout, summary=_summary(config, layout, used))


def _head_types(
    config: CompressionConfig,
    vllm_config: "VllmConfig",
    model: "JanusForImageGeneration",
    layers: int,
    heads: int,
) -> tuple[np.ndarray, np.ndarray]:
    """(``[layers, kv_heads]`` bool, True for spatial; the scores behind it, distance to the threshold)."""
    if config.policy.types != "profile":
        return np.full((layers, heads), config.policy.types == "spatial"), np.zeros((layers, heads))
    profile = provide_profile(config, vllm_config, model)
    threshold = profile.threshold if config.threshold is None else config.threshold
    return profile.head_types(config.threshold), np.array(profile.scores) - threshold


def _move(types: np.ndarray, margin: np.ndarray, heads: int) -> None:
    """Change the type of the ``heads`` least decided heads, in place: positive to semantic."""
    candidates = np.flatnonzero(types.ravel() if heads > 0 else ~types.ravel())
    nearest = candidates[np.argsort(np.abs(margin.ravel()[candidates]), kind="stable")][: abs(heads)]
    types.ravel()[nearest] = heads < 0


def _summary(config: CompressionConfig, layout: CacheLayout, used: str) -> str:
    parts = []
    for kind, name in enumerate(("spatial", "semantic")):
        rule = layout.rules[kind]
        if rule is not None:
            parts.append(
                f"{layout.total(kind) // BRANCHES} {name} heads of {rule.capacity} slots, "
                f"{layout.page_tokens(kind)} tokens a page"
            )
    size = footprint(layout, TYPICAL_PREFIX)
    moved = layout.paging.moved // BRANCHES
    fit = f", {abs(moved)} heads made {'semantic' if moved > 0 else 'spatial'} to fit" if moved else ""
    return (
        f"kvcompress: preset {config.preset}, budget {config.budget:g}; {'; '.join(parts)}; page waste "
        f"{layout.paging.waste:.1%}{fit}; kernels {used}; KV of a picture with a {TYPICAL_PREFIX}-token "
        f"prompt {size.resident / 2**20:.2f} MiB instead of {size.full / 2**20:.2f}"
    )
