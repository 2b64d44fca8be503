"""A loaded model as calibration and trials see it: its heads measured, its fits tried."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm
from vllm.model_executor.layers.linear import LinearBase

from vllm_kvcompress.attention.pages import BRANCHES
from vllm_kvcompress.attention.recorder import Recorder, SeesResidual
from vllm_kvcompress.cache.plan import ModelShape
from vllm_kvcompress.heads.calibrate import PROMPTS, measure
from vllm_kvcompress.heads.curves import WEIGHINGS, LossCurves, candidate_types
from vllm_kvcompress.heads.fit import Assignment
from vllm_kvcompress.heads.known import Picture
from vllm_kvcompress.heads.profile import HeadProfile
from vllm_kvcompress.heads.subject import Subject
from vllm_kvcompress.heads.trials import divergences
from vllm_kvcompress.log import logger_for
from vllm_kvcompress.models.config import cached_head_size
from vllm_kvcompress.models.ranks import Ranks
from vllm_kvcompress.models.registry import family_of
from vllm_kvcompress.models.replayed import apart, place, replaying

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_kvcompress.models.branched import BranchedImageModel
    from vllm_kvcompress.models.config import ImageModel

logger = logger_for(__name__)

METRIC = "attention mass outside the neighbourhood"
NEIGHBOURHOOD_LINES = 2  # docs/quality.md: one to four lines cost the same
MOST_ON_CPU = 1e14  # FLOP of trying fits: minutes on a few cores
TOO_MUCH_ON_CPU = 1e15  # even with the fewest pictures
FEWEST = 3  # pictures that fits are tried on
SPATIAL_SHARE = 1 / 4  # docs/quality.md: with a third or half of the heads spatial, objects are drawn twice


def shape_of(model: "BranchedImageModel") -> ModelShape:
    """The model's geometry."""
    text = model.config.get_text_config()
    return ModelShape(text.num_hidden_layers, text.num_key_value_heads, cached_head_size(text))


def of_this_version(profile: HeadProfile, image: "ImageModel") -> bool:
    """Whether a cached profile has what this version measures; other settings are the configuration's."""
    if profile.format < 2 or profile.pictures is None or not profile.is_of_guidance(image.guidance_scale):
        return False
    curves = profile.loss_curves
    if (curves.raster.lines, curves.raster.width) != (image.raster.lines, image.raster.width):
        return False
    same_trials = all(one.later is not None for one in profile.trials)
    same_curves = curves.candidates == candidate_types(curves.raster) and curves.guided is not None
    same_prompts = profile.prompts_hash == _prompts_hash()
    same_threshold = abs(profile.threshold - default_threshold(profile.scores)) < 1e-5
    same = same_trials and same_curves and same_prompts and same_threshold
    return same and _are_pictures(profile.pictures, image)


def default_threshold(scores: Any) -> float:
    """The score up to which heads are spatial: SSD does not publish one, so a fixed share of them is."""
    return float(torch.as_tensor(scores, dtype=torch.float64).flatten().quantile(SPATIAL_SHARE).clamp(0, 1))


def _prompts_hash(prompts: Sequence[str] = PROMPTS) -> str:
    return hashlib.sha256("\n".join(prompts).encode()).hexdigest()[:16]


def calibrate(
    vllm_config: "VllmConfig",
    model: "BranchedImageModel",
    lines: int = NEIGHBOURHOOD_LINES,
    own: Sequence[str] | None = None,
) -> HeadProfile:
    """Draw prompts with a full cache and measure the heads.

    Parameters
    ----------
    lines : int
        Lines that count as near in the locality scores.
    own : sequence of str, optional
        The user's prompts instead of the built-in ones.

    Raises
    ------
    ValueError
        One line: a prompt that this model can't draw.
    """
    raster, shape, ranks = model.image.raster, shape_of(model), Ranks.of_engine()
    candidates = candidate_types(raster)
    prompts = prompts_of(vllm_config, model, own)
    with _Bar(ranks.first) as bar:
        found = measure(subject_of(vllm_config, model), prompts, lines, candidates, bar)
    scores, losses, pictures, guided = found
    # [ranks, layers, heads of the rank, ...], [ranks, layers, 2, heads of the rank, candidates]: all heads.
    scores, guided = (ranks.gather(one).transpose(0, 1).flatten(1, 2) for one in (scores, guided))
    losses = ranks.gather(losses.unflatten(1, (2, -1))).permute(1, 2, 0, 3, 4).flatten(1, 3)
    return HeadProfile(
        format=2,
        model=Path(vllm_config.model_config.model).name,
        model_hash=model.fingerprint,
        metric=METRIC,
        threshold=default_threshold(scores),
        prompts_hash=_prompts_hash(own or PROMPTS),
        neighbourhood=lines * raster.width,
        layers=shape.layers,
        kv_heads=shape.kv_heads,
        scores=scores.clamp(0, 1).tolist(),
        head_size=shape.head_size,
        dtype=str(model.dtype).removeprefix("torch."),
        guidance=model.image.guidance_scale,
        curves=LossCurves(candidates, losses.numpy(), guided.numpy()).dump(),
        prompts=None if own is None else prompts,
        pictures=[list(one.ids[one.prefix :]) for one in pictures],
    )


def prompts_of(
    vllm_config: "VllmConfig", model: "BranchedImageModel", own: Sequence[str] | None = None
) -> list[list[int]]:
    """Ids of the user's prompts, or of the built-in ones, as the model's family asks for them.

    Raises ValueError, one line, for one that the model can't draw or that leaves no room for a picture.
    """
    from vllm.tokenizers import cached_tokenizer_from_config

    tokenizer = cached_tokenizer_from_config(vllm_config.model_config)
    family = family_of(model.config)
    asked = range(len(PROMPTS)) if own is None else own
    found = [family.calibration_ids(tokenizer, model.image, one) for one in asked]
    room = _room(model)
    for one, ids in zip(asked, found, strict=True):
        if len(ids) > room:
            raise ValueError(f"prompts: {one!r:.60} has {len(ids)} tokens, a picture leaves room for {room}")
    return found


def _room(model: "BranchedImageModel") -> int:
    """Tokens of a prompt beside a picture, by the model's positions."""
    return model.config.get_text_config().max_position_embeddings - model.image.raster.tokens


def trying(
    vllm_config: "VllmConfig", model: "BranchedImageModel", profile: HeadProfile
) -> Callable[[Sequence[Assignment]], NDArray[np.float64]] | None:
    """What tries whole fits on the pictures of a profile; None where it has none that this version can use.

    Raises ValueError, one line, where they are no pictures of this model.
    """
    are_known = profile.prompts is not None or profile.prompts_hash == _prompts_hash()
    if profile.pictures is None or not are_known:
        _not_tried("head_profile holds no pictures of this version's calibration; calibrate again")
        return None
    check_pictures(profile, model)
    ranks, prompts = Ranks.of_engine(), profile.prompts or prompts_of(vllm_config, model)
    known = [Picture(len(ids), [*ids, *one]) for ids, one in zip(prompts, profile.pictures, strict=True)]
    subject = subject_of(vllm_config, model)
    if subject.device.type == "cpu" and _work(model, known[:FEWEST], len(WEIGHINGS)) > TOO_MUCH_ON_CPU:
        _not_tried("it would take hours on a CPU; make the head profile on a GPU (vllm-kvcompress calibrate)")
        return None

    def tried(assignments: Sequence[Assignment]) -> NDArray[np.float64]:
        mine = [one.of_rank(ranks.mine, ranks.number) for one in assignments]
        pictures = known[:: _stride(model, subject.device, known, len(mine))]
        if ranks.first:
            logger.info("Trying %d fits on %d pictures", len(mine), len(pictures))
        with _Bar(ranks.first) as bar:
            found = divergences(subject, pictures, mine, lambda done, total: bar("trying", done, total))
        return ranks.agree(found)

    return tried


def _stride(model: "BranchedImageModel", device: torch.device, pictures: Sequence[Picture], fits: int) -> int:
    """Every how many-th picture is replayed: a CPU may have to do with three of a large model."""
    if device.type != "cpu":
        return 1
    return min(len(pictures) // FEWEST, max(1, round(_work(model, pictures, fits) / MOST_ON_CPU)))


def _work(model: "BranchedImageModel", pictures: Sequence[Picture], fits: int) -> int:
    """FLOP of trying so many fits, but for attention."""
    return 2 * _weights(model) * BRANCHES * sum(len(one.ids) for one in pictures) * (fits + 1)


def _weights(model: "BranchedImageModel") -> int:
    """Numbers in the decoder's matrices, by their layers' sizes: a CPU's packed ones are no parameters."""
    layers: list[Any] = [one for one in model.language_model.modules() if isinstance(one, LinearBase)]
    return sum(one.input_size_per_partition * one.output_size_per_partition for one in layers)


def check_pictures(profile: HeadProfile, model: "BranchedImageModel") -> None:
    """Raise ValueError, one line, unless a profile's curves, pictures and prompts are of this model."""
    profile.loss_curves.check_grid(model.image.raster)
    number = len(PROMPTS) if profile.prompts is None else len(profile.prompts)
    if profile.pictures is not None and not _are_pictures(profile.pictures, model.image, number):
        raise ValueError("head_profile: pictures are not of this model's tokens; calibrate again")
    for one in profile.prompts or ():
        if len(one) > _room(model) or max(one) >= model.image.text_vocab:
            raise ValueError("head_profile: prompts are not of this model's tokens; calibrate again")


def _are_pictures(pictures: Sequence[Sequence[int]], image: "ImageModel", number: int = len(PROMPTS)) -> bool:
    """Whether these are so many of the model's pictures."""
    drawn, ends = torch.tensor(pictures), image.ends(torch.arange(image.raster.tokens))
    right = torch.where(ends, drawn == image.eol, image.is_drawn(drawn) & (drawn != image.eol))
    return len(drawn) == number and bool(right.all())


def _not_tried(reason: str) -> None:
    if Ranks.of_engine().first:
        logger.warning("Fits are not tried, the one of least predicted loss is served: %s", reason)


_DOING = {
    "drawing": "Calibrating: drawing",
    "measuring": "Calibrating: measuring heads",
    "trying": "Trying fits",
}


class _Bar:
    """A progress bar over what is being done; its clock starts with the first step that is done."""

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
            label = _DOING[what]
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

    def forward(ids: Tensor, positions: Tensor) -> Tensor:
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
        step=lambda ids, positions: model.compute_logits(forward(ids, positions)),
        forward=forward,
        apart=lambda full, other, rows: apart(model, full, other, rows, model.image.guidance_scale),
        recording=recording,
        output_weight=lambda layer: _output_weight(layers[layer].self_attn, model.dtype, device),
        guidance=model.image.guidance_scale,
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
