"""From configuration and head profile to the cache's layout, and the line that says what was decided."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from vllm.utils.math_utils import cdiv

from vllm_kvcompress.attention import kernels
from vllm_kvcompress.cache.paging import plan_paging
from vllm_kvcompress.cache.store import BRANCHES, CacheLayout
from vllm_kvcompress.config import CompressionConfig, parse_config
from vllm_kvcompress.heads.provide import provide_profile
from vllm_kvcompress.log import logger_for

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_kvcompress.models.janus import JanusForImageGeneration

logger = logger_for(__name__)

TYPICAL_PREFIX = 20  # tokens of a short prompt, for the figures in the log


@dataclass(frozen=True)
class Footprint:
    """KV bytes of one picture.

    Parameters
    ----------
    resident : int
        Bytes of the pages that a request holds, rounding and side state included.
    full : int
        Bytes of K and V of all its tokens.
    """

    resident: int
    full: int

    @property
    def ratio(self) -> float:
        """How many times smaller."""
        return self.full / self.resident


def footprint(layout: CacheLayout, prefix: int) -> Footprint:
    """Bytes of a picture with ``prefix`` prompt tokens."""
    pages = sum(
        cdiv(prefix + rule.capacity, layout.page_tokens(kind))
        for kind, rule in enumerate(layout.rules)
        if rule is not None
    )
    image = next(rule for rule in layout.rules if rule is not None).image
    heads = layout.total(0) + layout.total(1)
    full = (prefix + image) * heads * 2 * layout.head_size * layout.dtype.itemsize
    return Footprint(pages * layout.page_bytes, full)


def plan_layout(vllm_config: "VllmConfig", model: "JanusForImageGeneration") -> CacheLayout:
    """Decide head types, rules and pages, and log them in one line. Raises ValueError, one line."""
    config = parse_config(vllm_config.additional_config)
    text = model.config.get_text_config()
    layers, kv_heads = text.num_hidden_layers, text.num_key_value_heads
    types, scores = _head_types(config, vllm_config, model, layers, kv_heads)
    policy, raster = config.policy, model.image.raster

    def rules(spatial: int) -> tuple:
        return policy.rules(raster, BRANCHES * spatial, BRANCHES * (layers * kv_heads - spatial))

    spatial_heads = int(types.sum())
    ring, select = rules(spatial_heads)
    paging = plan_paging(
        BRANCHES * spatial_heads,
        BRANCHES * (layers * kv_heads - spatial_heads),
        ring.capacity if ring else 0,
        select.capacity if select else 0,
        step=BRANCHES,
    )
    if paging.moved:
        _move(types, scores, paging.moved // BRANCHES)
        ring, select = rules(int(types.sum()))
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    layout = CacheLayout(
        spatial=tuple(tuple(np.flatnonzero(row).tolist()) for row in types),
        kv_heads=kv_heads,
        head_size=head_size,
        rules=(ring, select),
        paging=paging,
        dtype=model.dtype,
    )
    used = kernels.use(config.kernels, vllm_config.device_config.device_type)
    _log(config, layout, used)
    return layout


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


def _log(config: CompressionConfig, layout: CacheLayout, used: str) -> None:
    parts = []
    for kind, name in enumerate(("spatial", "semantic")):
        rule = layout.rules[kind]
        if rule is not None:
            parts.append(
                f"{layout.total(kind) // BRANCHES} {name} heads of {rule.capacity} slots, "
                f"{layout.page_tokens(kind)} tokens a page"
            )
    size = footprint(layout, TYPICAL_PREFIX)
    moved = f", {abs(layout.paging.moved) // BRANCHES} heads moved to fit" if layout.paging.moved else ""
    logger.info(
        "kvcompress: preset %s, budget %g; %s; page waste %.1f%%%s; KV of a picture with a %d-token prompt "
        "%.2f MiB instead of %.2f, so %.2fx the pictures at once; kernels %s",
        config.preset,
        config.budget,
        "; ".join(parts),
        100 * layout.paging.waste,
        moved,
        TYPICAL_PREFIX,
        size.resident / 2**20,
        size.full / 2**20,
        size.ratio,
        used,
    )
