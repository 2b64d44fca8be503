"""The head profile of the served model: from the file asked for, from the cache, or by calibration."""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm
from vllm import envs

from vllm_kvcompress.heads.calibrate import PROMPTS, locality_scores
from vllm_kvcompress.heads.profile import HeadProfile
from vllm_kvcompress.log import logger_for

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_kvcompress.config import CompressionConfig
    from vllm_kvcompress.models.janus import JanusForImageGeneration

logger = logger_for(__name__)

METRIC = "attention mass outside the neighbourhood"
AUTO = "auto"
_NEIGHBOURHOOD_LINES = 2  # docs/quality.md: one to four lines cost the same
_SPATIAL_SHARE = 1 / 4  # docs/quality.md: with a third or half of the heads spatial, objects are drawn twice


def cache_directory() -> Path:
    """Where profiles made at start-up are kept, below vLLM's own cache directory."""
    return Path(envs.VLLM_CACHE_ROOT) / "kvcompress" / "head_profiles"


def provide_profile(
    config: "CompressionConfig", vllm_config: "VllmConfig", model: "JanusForImageGeneration"
) -> HeadProfile:
    """The profile to split heads by.

    Raises
    ------
    ValueError
        One line: a file that can't be read or was made for another model.
    """
    text = model.config.get_text_config()
    name = Path(vllm_config.model_config.model).name
    mark = model.fingerprint
    geometry = (text.num_hidden_layers, text.num_key_value_heads)
    if config.head_profile != AUTO:
        profile = HeadProfile.load(config.head_profile)
        profile.check_model("", mark, *geometry)
        return profile
    path = cache_directory() / f"{name}-{mark}.json"
    if path.exists() and not config.recalibrate:
        profile = HeadProfile.load(path)
        profile.check_model("", mark, *geometry)
        # A version with another default left it here; a threshold of one's own is set in the configuration.
        if abs(profile.threshold - default_threshold(torch.tensor(profile.scores))) < 1e-5:
            logger.info("Head profile: %s", path)
            return profile
    profile = calibrate(vllm_config, model, name, mark)
    profile.save(path)
    logger.info("Head profile calibrated on %d prompts, kept in %s", len(PROMPTS), path)
    return profile


def default_threshold(scores: torch.Tensor) -> float:
    """The score up to which heads are spatial: SSD does not publish one, so a fixed share of them is."""
    return float(scores.flatten().quantile(_SPATIAL_SHARE).clamp(0, 1))


def calibrate(
    vllm_config: "VllmConfig",
    model: "JanusForImageGeneration",
    name: str,
    mark: str,
    lines: int = _NEIGHBOURHOOD_LINES,
) -> HeadProfile:
    """Draw the built-in prompts with a full cache and measure the heads; near is ``lines`` lines."""
    from vllm.forward_context import set_forward_context
    from vllm.tokenizers import cached_tokenizer_from_config

    from vllm_kvcompress.models.prompt import image_prompt_ids

    tokenizer = cached_tokenizer_from_config(vllm_config.model_config)
    prompts = [image_prompt_ids(tokenizer, model.image, text) for text in PROMPTS]
    neighbourhood = lines * model.image.raster.width
    bar = tqdm(desc="Calibrating attention heads", unit="step", leave=False)

    def progress(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)

    with bar, set_forward_context(None, vllm_config, num_tokens=len(prompts)):
        scores = locality_scores(model, prompts, neighbourhood, progress=progress)
    text = model.config.get_text_config()
    return HeadProfile(
        model=name,
        model_hash=mark,
        metric=METRIC,
        threshold=default_threshold(scores),
        prompts_hash=hashlib.sha256("\n".join(PROMPTS).encode()).hexdigest()[:16],
        neighbourhood=neighbourhood,
        layers=text.num_hidden_layers,
        kv_heads=text.num_key_value_heads,
        scores=scores.clamp(0, 1).tolist(),
    )
