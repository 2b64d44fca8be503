"""What the served configuration makes of a model's heads: profile, assignment, layout, kernels, words.

The parts know nothing of one another or of the model; here they are put together.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from vllm_kvcompress import last_word
from vllm_kvcompress.attention.kernels import Kernels, kernels_for
from vllm_kvcompress.attention.pages import slot_bytes
from vllm_kvcompress.cache.layout import CacheLayout
from vllm_kvcompress.cache.plan import ModelShape, describe, plan_layout, split_pages
from vllm_kvcompress.config import FP8, CompressionConfig, parse_config
from vllm_kvcompress.heads.fit import Assignment, by_threshold
from vllm_kvcompress.heads.paged import Pages
from vllm_kvcompress.heads.profile import HeadProfile
from vllm_kvcompress.heads.provide import (
    AUTO,
    MOST_BYTES,
    OWN,
    ModelMark,
    keep,
    own_profile,
    provide_profile,
)
from vllm_kvcompress.heads.resized import resized
from vllm_kvcompress.heads.tried import Trial, Wanted, try_fits
from vllm_kvcompress.log import logger_for
from vllm_kvcompress.models.calibration import calibrate, check_pictures, of_this_version, shape_of, trying
from vllm_kvcompress.models.files import beside_weights
from vllm_kvcompress.models.ranks import Ranks
from vllm_kvcompress.policy import PRESETS, Raster
from vllm_kvcompress.rows import GUIDANCE_SCALE

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_kvcompress.models.branched import BranchedImageModel

logger = logger_for(__name__)


@last_word.heard()
def plan_cache(vllm_config: "VllmConfig", model: "BranchedImageModel") -> tuple[CacheLayout, Kernels]:
    """Decide head types, rules, pages and kernels of this rank's heads. Raises ValueError, one line."""
    config, ranks = parse_config(vllm_config.additional_config), Ranks.of_engine()
    shape = shape_of(model)
    text = model.config.get_text_config()
    narrow = vllm_config.cache_config.cache_dtype in FP8
    dtype = torch.float8_e4m3fn if narrow else model.dtype
    kernels = kernels_for(config.kernels, vllm_config.device_config.device_type, dtype)
    kernels.check_shape(shape.head_size, text.num_attention_heads // text.num_key_value_heads)

    def profile(wanted: Sequence[Wanted]) -> HeadProfile:
        return profile_of(config, vllm_config, model, wanted)

    assignment = assign(config, model.image.raster, shape, dtype, profile, ranks.number)
    own = replace(shape, kv_heads=shape.kv_heads // ranks.number)
    mine = assignment.of_rank(ranks.mine, ranks.number)
    others = tuple(
        resized(mine.rules, mine.counts, config.policy, mine.mean_slots, raster)
        for raster in model.image.rasters[1:]
    )
    layout = plan_layout(mine, own, dtype, others)
    if ranks.first:
        layout = replace(layout, summary=_summary(config, assignment, layout, kernels, ranks))
    return layout, kernels


def assign(
    config: CompressionConfig,
    raster: Raster,
    shape: ModelShape,
    dtype: torch.dtype,
    profile: Callable[[Sequence[Wanted]], HeadProfile],
    ranks: int = 1,
) -> Assignment:
    """A head type for every cache head of all ranks, as many of each on every rank.

    ``profile`` is asked for one where the preset needs it; what is to be fitted has been tried in it, where
    that can be.
    """
    policy = config.policy
    if policy.types == "fitted":
        wanted = wanted_of(config, raster, pages_of(shape, dtype), ranks)
        measured = profile([wanted])
        return wanted.served(measured.loss_curves, measured.trial(wanted))
    heads = (shape.layers, shape.kv_heads)
    if policy.types == "profile":
        measured = profile(())
        threshold = measured.threshold if config.threshold is None else config.threshold
        spatial, margin = measured.head_types(config.threshold), np.array(measured.scores) - threshold
    else:
        spatial, margin = np.full(heads, policy.types == "spatial"), np.zeros(heads)
    return by_threshold(policy, raster, spatial, margin, split_pages, ranks)


def profile_of(
    config: CompressionConfig,
    vllm_config: "VllmConfig",
    model: "BranchedImageModel",
    wanted: Sequence[Wanted] = (),
    brought: bool = True,
) -> HeadProfile:
    """The head profile that the configuration names; fits for what is wanted are tried, where none were.

    ``brought``: whether one that the model brings will do. All ranks call it together. Raises ValueError, one
    line: a profile that can't be used, or a wish that no fit meets, before anything is tried.
    """
    shape = shape_of(model)
    name = Path(vllm_config.model_config.model).name
    mark, own = ModelMark(name, model.fingerprint, shape.layers, shape.kv_heads), None
    ranks = Ranks.of_engine()
    if config.head_profile == AUTO and GUIDANCE_SCALE in vllm_config.model_config.override_generation_config:
        # Servers of one model at several scales share the cache.
        mark = replace(mark, variant=f"guidance-{model.image.guidance_scale:g}")
    if config.head_profile == AUTO and brought and not config.recalibrate:
        own, mark = ranks.agree(_own_profile(vllm_config, model, mark) if ranks.first else (None, mark))

    def measured() -> HeadProfile:
        # Where the cache can't keep it, an evaluation would measure again for each of its cells.
        if model.head_profile is None or config.recalibrate:
            model.head_profile = calibrate(vllm_config, model)
        return model.head_profile

    profile = provide_profile(
        config.head_profile, mark, measured,
        lambda cached: own is not None or of_this_version(cached, model.image), config.recalibrate,
        ranks.agree, ranks.first, own,
    )  # fmt: skip
    if ranks.first and (other := _other_guidance(profile, model)):
        logger.warning("%s: %s", config.head_profile, other)
    if wanted:
        profile.loss_curves.check_grid(model.image.raster)
    missing = [one for one in dict.fromkeys(wanted) if profile.trial(one) is None]
    for one in missing:
        one.check(profile.loss_curves)
    if not missing:
        return profile
    memory: dict[tuple[Wanted, str], Trial] = getattr(model, "trials", {})
    curves = _of_curves(profile)
    unknown = [one for one in missing if (one, curves) not in memory]
    tried = trying(vllm_config, model, profile) if unknown else None
    if tried is not None:
        memory |= {(one, curves): try_fits(profile.loss_curves, one, tried) for one in unknown}
    found = [memory[one, curves] for one in missing if (one, curves) in memory]
    profile = profile.model_copy(update={"trials": [*profile.trials, *found]})
    if tried is not None and ranks.first:
        if config.head_profile == AUTO:
            keep(profile, mark, "with fits tried")
        else:
            logger.info(
                "%s has no trial of this budget, types, dtype and ranks; this start tried fits for itself. "
                "vllm-kvcompress calibrate %s -o FILE --budgets ... makes a profile that has",
                config.head_profile,
                vllm_config.model_config.model,
            )
    return profile


def _own_profile(
    vllm_config: "VllmConfig", model: "BranchedImageModel", mark: ModelMark
) -> tuple[HeadProfile | None, ModelMark]:
    """What the checkpoint brings, if it is of these weights and this grid."""
    served = vllm_config.model_config

    def check(own: HeadProfile) -> None:
        check_pictures(own, model)
        if other := _other_guidance(own, model):
            raise ValueError(f"head_profile: {other}")

    return own_profile(beside_weights(served.model, served.revision, OWN, MOST_BYTES), mark, check)


def _other_guidance(profile: HeadProfile, model: "BranchedImageModel") -> str:
    """What is to be said where heads were measured at another guidance than the server's; else nothing."""
    if profile.guidance is None or profile.is_of_guidance(scale := model.image.guidance_scale):
        return ""
    return (
        f"its heads were measured at guidance {profile.guidance:g}, this server's default is {scale:g}, "
        f"where they need other caches; calibrate with --guidance {scale:g}, or serve with "
        f"--override-generation-config '{{\"guidance_scale\": {profile.guidance:g}}}'"
    )


def _of_curves(profile: HeadProfile) -> str:
    """Which curves and pictures a trial is of."""
    measured = f"{profile.curves}{profile.pictures}"
    return hashlib.sha256(measured.encode()).hexdigest()


def wanted_of(config: CompressionConfig, raster: Raster, pages: Pages, ranks: int = 1) -> Wanted:
    """What the preset `fitted` of a configuration asks of a fit."""
    budget = AUTO if config.policy.budget == AUTO else config.policy.slots(raster)
    return Wanted(budget, config.max_types, pages, ranks, config.tolerance)


def pages_of(shape: ModelShape, dtype: torch.dtype) -> Pages:
    """Bytes of a slot, for the fit."""
    plain = slot_bytes(shape.head_size, dtype, scores=False)
    return Pages(plain, slot_bytes(shape.head_size, dtype, scores=True) - plain)


def _summary(
    config: CompressionConfig, assignment: Assignment, layout: CacheLayout, kernels: Kernels, ranks: Ranks
) -> str:
    moved = assignment.moved
    fits = f"; {abs(moved)} heads made {'semantic' if moved > 0 else 'spatial'} to fit" if moved else ""
    budget = (
        f"{layout.mean_slots / layout.rules[0].image:.3g} (auto)" if config.budget == AUTO else config.budget
    )
    tried = "" if assignment.divergence is None else f"; guided KL {assignment.divergence:.2g}"
    loss = "" if assignment.loss is None else f"{tried}; predicted loss {assignment.loss:.2g}"
    if not PRESETS[config.preset].evicts:
        budget = 1.0  # whatever was set
    shown = budget if isinstance(budget, str) else f"{budget:g}"
    each = f"on each of {ranks.number} ranks " if ranks.number > 1 else ""
    return (
        f"kvcompress: preset {config.preset}, budget {shown}; {each}{describe(layout)}{fits}{loss}; "
        f"kernels {kernels.name}"
    )
