"""What the served configuration makes of a model's heads: profile, assignment, layout, kernels, words.

The parts know nothing of one another or of the model; here they are put together.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from vllm_kvcompress import last_word
from vllm_kvcompress.attention.kernels import Kernels, kernels_for
from vllm_kvcompress.attention.pages import slot_bytes
from vllm_kvcompress.attention.recorder import Recorder, SeesResidual
from vllm_kvcompress.cache.layout import CacheLayout
from vllm_kvcompress.cache.plan import ModelShape, describe, plan_layout, split_pages
from vllm_kvcompress.config import FP8, CompressionConfig, parse_config
from vllm_kvcompress.heads.calibrate import PROMPTS, Subject, measure
from vllm_kvcompress.heads.curves import LossCurves, candidate_types
from vllm_kvcompress.heads.fit import Assignment, by_threshold, fit, smallest_budget
from vllm_kvcompress.heads.paged import Pages
from vllm_kvcompress.heads.profile import HeadProfile
from vllm_kvcompress.heads.provide import ModelMark, provide_profile
from vllm_kvcompress.heads.resized import resized
from vllm_kvcompress.log import logger_for
from vllm_kvcompress.models.config import cached_head_size
from vllm_kvcompress.models.ranks import Ranks
from vllm_kvcompress.models.registry import family_of
from vllm_kvcompress.models.replayed import place, replaying
from vllm_kvcompress.policy import AUTO, Raster

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_kvcompress.models.branched import BranchedImageModel

logger = logger_for(__name__)

METRIC = "attention mass outside the neighbourhood"
NEIGHBOURHOOD_LINES = 2  # docs/quality.md: one to four lines cost the same
SPATIAL_SHARE = 1 / 4  # docs/quality.md: with a third or half of the heads spatial, objects are drawn twice


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

    def profile() -> HeadProfile:
        return profile_of(config, vllm_config, model)

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


def shape_of(model: "BranchedImageModel") -> ModelShape:
    """The model's geometry."""
    text = model.config.get_text_config()
    return ModelShape(text.num_hidden_layers, text.num_key_value_heads, cached_head_size(text))


def assign(
    config: CompressionConfig,
    raster: Raster,
    shape: ModelShape,
    dtype: torch.dtype,
    profile: Callable[[], HeadProfile],
    ranks: int = 1,
) -> Assignment:
    """A head type for every cache head of all ranks, as many of each on every rank.

    ``profile`` is asked for one where the preset needs it.
    """
    policy = config.policy
    if policy.types == "fitted":
        curves = profile().loss_curves
        curves.check_grid(raster)
        if policy.budget == AUTO:
            return smallest_budget(curves, config.tolerance, config.max_types, pages_of(shape, dtype), ranks)
        return fit(curves, policy.slots(raster), config.max_types, pages_of(shape, dtype), ranks)
    heads = (shape.layers, shape.kv_heads)
    if policy.types == "profile":
        measured = profile()
        threshold = measured.threshold if config.threshold is None else config.threshold
        spatial, margin = measured.head_types(config.threshold), np.array(measured.scores) - threshold
    else:
        spatial, margin = np.full(heads, policy.types == "spatial"), np.zeros(heads)
    return by_threshold(policy, raster, spatial, margin, split_pages, ranks)


def profile_of(
    config: CompressionConfig, vllm_config: "VllmConfig", model: "BranchedImageModel"
) -> HeadProfile:
    """The head profile that the configuration names."""
    shape = shape_of(model)
    name = Path(vllm_config.model_config.model).name
    mark = ModelMark(name, model.fingerprint, shape.layers, shape.kv_heads)
    ranks = Ranks.of_engine()
    return provide_profile(
        config.head_profile, mark, lambda: calibrate(vllm_config, model), _of_this_version,
        config.recalibrate, ranks.agree, ranks.first,
    )  # fmt: skip


def _of_this_version(profile: HeadProfile) -> bool:
    """Whether a cached profile has what this version measures; other settings are the configuration's."""
    if profile.format < 2:
        return False
    curves = profile.loss_curves
    same_candidates = curves.candidates == candidate_types(curves.raster)
    same_prompts = profile.prompts_hash == _prompts_hash()
    same_threshold = abs(profile.threshold - default_threshold(profile.scores)) < 1e-5
    return same_candidates and same_prompts and same_threshold


def default_threshold(scores: Any) -> float:
    """The score up to which heads are spatial: SSD does not publish one, so a fixed share of them is."""
    return float(torch.as_tensor(scores, dtype=torch.float64).flatten().quantile(SPATIAL_SHARE).clamp(0, 1))


def _prompts_hash() -> str:
    return hashlib.sha256("\n".join(PROMPTS).encode()).hexdigest()[:16]


def calibrate(
    vllm_config: "VllmConfig", model: "BranchedImageModel", lines: int = NEIGHBOURHOOD_LINES
) -> HeadProfile:
    """Draw the built-in prompts with a full cache and measure the heads; near is ``lines`` lines."""
    from vllm.tokenizers import cached_tokenizer_from_config

    tokenizer = cached_tokenizer_from_config(vllm_config.model_config)
    family = family_of(model.config)
    raster, shape, ranks = model.image.raster, shape_of(model), Ranks.of_engine()
    candidates = candidate_types(raster)
    with _Bar(ranks.first) as bar:
        scores, losses = measure(
            subject_of(vllm_config, model),
            [family.calibration_ids(tokenizer, model.image, number) for number in range(len(PROMPTS))],
            lines,
            candidates,
            bar,
        )
    # [ranks, layers, heads of the rank] and [ranks, layers, 2, heads of the rank, candidates]: all heads.
    scores = ranks.gather(scores).transpose(0, 1).flatten(1)
    losses = ranks.gather(losses.unflatten(1, (2, -1))).permute(1, 2, 0, 3, 4).flatten(1, 3)
    return HeadProfile(
        format=2,
        model=Path(vllm_config.model_config.model).name,
        model_hash=model.fingerprint,
        metric=METRIC,
        threshold=default_threshold(scores),
        prompts_hash=_prompts_hash(),
        neighbourhood=lines * raster.width,
        layers=shape.layers,
        kv_heads=shape.kv_heads,
        scores=scores.clamp(0, 1).tolist(),
        head_size=shape.head_size,
        dtype=str(model.dtype).removeprefix("torch."),
        curves=LossCurves(candidates, losses.numpy()).dump(),
    )


class _Bar:
    """A progress bar over drawing, then measuring; its clock starts with the first step that is done."""

    def __init__(self, shown: bool = True) -> None:
        self._shown = shown

    def __enter__(self) -> "_Bar":
        self._bar: tqdm | None = None
        self._what = ""
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, what: str, done: int, total: int) -> None:
        if what != self._what:
            self.__exit__()
            self._what = what
            label = {"drawing": "Calibrating: drawing", "measuring": "Calibrating: measuring heads"}[what]
            self._bar = tqdm(
                desc=label, total=total, initial=done, unit="step", leave=False, disable=not self._shown
            )
            return
        assert self._bar is not None
        self._bar.update(done - self._bar.n)


def subject_of(vllm_config: "VllmConfig", model: "BranchedImageModel") -> Subject:
    """The model as calibration sees it; its forward runs as written, not compiled."""
    from vllm.forward_context import set_forward_context

    shape, ranks = shape_of(model), Ranks.of_engine()
    device = next(model.parameters()).device
    layers: Any = model.language_model.layers

    def forward(ids: Tensor, positions: Tensor) -> None:
        run(ids, positions)

    def run(ids: Tensor, positions: Tensor) -> Tensor:
        place(model, len(ids))
        with set_forward_context(None, vllm_config, num_tokens=len(ids), skip_compiled=True):
            return model(ids, positions)

    @contextmanager
    def recording(recorder: Recorder) -> Iterator[None]:
        assert model.compressed is not None
        with ExitStack() as until_then:
            until_then.enter_context(model.compressed.recording(recorder))
            if isinstance(recorder, SeesResidual):
                see = recorder.residual
                for layer in layers:
                    hook = layer.post_attention_layernorm.register_forward_pre_hook(
                        lambda _, inputs: see(inputs[0] + inputs[1])
                    )
                    until_then.callback(hook.remove)
            yield

    return Subject(
        layers=shape.layers,
        kv_heads=shape.kv_heads // ranks.number,
        head_size=shape.head_size,
        raster=model.image.raster,
        dtype=model.dtype,
        device=device,
        step=lambda ids, positions: model.compute_logits(run(ids, positions)),
        forward=forward,
        recording=recording,
        output_weight=lambda layer: _output_weight(layers[layer].self_attn, model.dtype, device),
        agree=ranks.agree_on,
        rows=lambda prompts: replaying(model, prompts),
    )


def _output_weight(attention: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``[hidden, query heads * head size of the cache]``: what comes of a head's channels in the cache."""
    weight = _weight_of(attention.o_proj, dtype, device).unflatten(-1, (-1, attention.head_size))
    return torch.nn.functional.pad(weight, (0, attention.padding)).flatten(1)


def _weight_of(linear: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``[out, in]`` of a vLLM layer, this rank's: what it makes of the unit vectors.

    The parameter itself may be packed for the device, or quantised.
    """
    units = torch.eye(linear.input_size_per_partition, dtype=dtype, device=device)
    return linear.quant_method.apply(linear, units, None).T


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
    loss = "" if assignment.loss is None else f"; predicted loss {assignment.loss:.2g}"
    shown = budget if isinstance(budget, str) else f"{budget:g}"
    each = f"on each of {ranks.number} ranks " if ranks.number > 1 else ""
    return (
        f"kvcompress: preset {config.preset}, budget {shown}; {each}{describe(layout)}{fits}{loss}; "
        f"kernels {kernels.name}"
    )
