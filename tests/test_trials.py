"""Fits tried on calibration's pictures: what a trial says, which fit is served, and where it is kept."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from inprocess import Engine, in_process  # noqa: F401
from numpy.typing import NDArray
from oracle import made_up_curves
from test_calibrate import Lines, log  # noqa: F401
from test_emu3 import SIZES

from vllm_kvcompress.config import parse_config
from vllm_kvcompress.eval.likelihood import Trial as Replayed
from vllm_kvcompress.eval.likelihood import kvcompress_replay
from vllm_kvcompress.heads.curves import SQUARES, WEIGHINGS, LossCurves, Weighing
from vllm_kvcompress.heads.fit import Assignment, fit
from vllm_kvcompress.heads.paged import Pages
from vllm_kvcompress.heads.profile import HeadProfile
from vllm_kvcompress.heads.provide import cache_directory
from vllm_kvcompress.heads.tried import Trial, Wanted, try_fits
from vllm_kvcompress.models import calibration, compression
from vllm_kvcompress.policy import AUTO, Raster
from vllm_kvcompress.testing.emu3 import make_emu3

SMALL = {"max_model_len": 128}
CURVES = made_up_curves(Raster(12, 12), (2, 8))


def costing(costs: Sequence[float]) -> Any:
    """What tries fits and finds these, in the order of the proposals; the rest cost 1."""

    def tried(fits: Sequence[Assignment]) -> NDArray[np.float64]:
        return np.array([*costs, *[1.0] * len(fits)][: len(fits)])

    return tried


def test_squares_come_first_and_no_fit_twice() -> None:
    fits = Wanted(48, pages=Pages(256, 8)).fits(CURVES)
    assert next(iter(fits)) == WEIGHINGS[0] == SQUARES
    assert len(fits) > 3
    every = list(fits.values())
    assert not any(one.same_as(other) for n, one in enumerate(every) for other in every[:n])
    assert all(one.mean_slots <= 48 for one in every)
    free = Wanted(48).fits(CURVES).values()
    assert next(iter(free)).loss == min(one.loss for one in free), "predicted losses are all by squares"


def test_the_fit_that_strays_least_is_served() -> None:
    wanted = Wanted(48)
    third = list(wanted.fits(CURVES))[2]
    trial = try_fits(CURVES, wanted, costing([0.5, 0.7, 0.3]))
    assert (trial.weighing, trial.divergence, trial.squares) == (third, 0.3, 0.5)
    served = wanted.served(CURVES, trial)
    assert served.same_as(fit(CURVES, 48, weighing=third))
    assert served.divergence == 0.3
    assert wanted.served(CURVES, None).same_as(fit(CURVES, 48))
    assert wanted.served(CURVES, None).divergence is None


def test_a_tied_fit_is_served_as_it_was_tried() -> None:
    wanted = Wanted(48, pages=Pages(256, 8))
    fits = wanted.fits(CURVES)
    tied = next(number for number, weighing in enumerate(fits) if weighing.tied)
    trial = try_fits(CURVES, wanted, costing([*[0.5] * tied, 0.3]))
    assert trial.weighing == list(fits)[tied]
    served = wanted.served(CURVES, Trial.model_validate_json(trial.model_dump_json()))
    assert served.same_as(list(fits.values())[tied])
    assert np.array_equal(*np.split(served.types, 2, axis=1))


def test_last_digits_change_no_choice() -> None:
    trial = try_fits(CURVES, Wanted(48), costing([0.5, 0.4999, 0.4998]))
    assert trial.weighing == SQUARES


def test_what_overflows_is_not_served() -> None:
    trial = try_fits(CURVES, Wanted(48), costing([np.nan, np.inf, 0.7, np.nan]))
    assert trial.weighing == list(Wanted(48).fits(CURVES))[2]
    assert Trial.model_validate_json(trial.model_dump_json()) == trial


def test_everything_needs_no_trial() -> None:
    trial = try_fits(CURVES, Wanted(144), None)  # type: ignore[arg-type]
    assert (trial.weighing, trial.divergence) == (SQUARES, 0)


def test_a_planted_weighing_counts_for_nothing() -> None:
    trial = try_fits(CURVES, Wanted(48), costing([]))
    assert trial.of(Wanted(48))
    assert not trial.model_copy(update={"power": 4.0}).of(Wanted(48))
    older = Trial.model_validate(trial.model_dump(exclude={"tied", "later"}))
    assert older.weighing == trial.weighing == SQUARES, "of before fits were tied, or layers weighed"


@pytest.mark.parametrize("power", [1.0, 0.75, 0.5])
def test_a_choice_of_before_stands(power: float) -> None:
    """Branches 8 to 1 are tried no more; profiles that people made may have them."""
    old = try_fits(CURVES, Wanted(48), costing([])).model_copy(update={"power": power, "conditional": 8.0})
    assert old.weighing not in WEIGHINGS
    assert old.of(Wanted(48))
    served = Wanted(48).served(CURVES, old)
    assert served.same_as(fit(CURVES, 48, weighing=Weighing(power, 8.0)))


def test_auto_stays_within_its_tolerance() -> None:
    wanted = Wanted(AUTO, tolerance=0.1)
    fits = wanted.fits(CURVES)
    assert 1 < len(fits) < len(Wanted(fits[SQUARES].mean_slots).fits(CURVES))
    assert all(one.loss <= 0.1 and one.mean_slots <= fits[SQUARES].mean_slots for one in fits.values())
    trial = try_fits(CURVES, wanted, costing([0.5, 0.1]))
    assert wanted.served(CURVES, trial).same_as(list(fits.values())[1])
    assert not trial.of(Wanted(AUTO, tolerance=0.2))


@pytest.mark.parametrize(
    "other",
    [Wanted(47.0), Wanted(48.0, 3), Wanted(48.0, pages=Pages(128, 8)), Wanted(48.0, ranks=2), Wanted(AUTO)],
    ids=["budget", "types", "pages", "ranks", "auto"],
)
def test_a_trial_is_of_one_wish(other: Wanted) -> None:
    wanted = Wanted(48.0)
    trial = try_fits(CURVES, wanted, costing([]))
    assert trial.of(wanted)
    assert Trial.model_validate_json(trial.model_dump_json()).of(wanted)
    assert not trial.of(other)


def test_a_power_of_a_half_adds_errors_up_and_branches_are_weighed() -> None:
    plain, rooted = CURVES.weighted(Weighing(1, 1)), CURVES.weighted(Weighing(0.5, 3))
    conditional = np.tile(np.arange(8) < 4, 2)
    np.testing.assert_allclose(plain, CURVES.losses.reshape(16, -1))
    np.testing.assert_allclose(rooted[conditional], 1.5 * plain[conditional] ** 0.5)
    np.testing.assert_allclose(rooted[~conditional], 0.5 * plain[~conditional] ** 0.5)


@pytest.mark.parametrize("tied", [False, True])
def test_later_layers_count_more_in_even_steps(tied: bool) -> None:
    layers, heads, number = CURVES.losses.shape
    guided = np.random.default_rng(3).random((layers, heads // 2, number))
    for of in (CURVES, replace(CURVES, guided=guided)):
        plain, later = (of.weighted(Weighing(0.5, 3, tied, later)) for later in (1.0, 8.0))
        depths = np.geomspace(8**-0.5, 8**0.5, layers)
        np.testing.assert_allclose(later.reshape(layers, -1), plain.reshape(layers, -1) * depths[:, None])
    one = LossCurves(CURVES.candidates, CURVES.losses[:1])
    np.testing.assert_array_equal(one.weighted(Weighing(later=8.0)), one.weighted(Weighing()))


def started(folder: Path, **section: Any) -> Engine:
    """An engine of the preset `fitted` and its own profile."""
    return Engine.get(folder, kvcompress={"budget": 0.45, **section}, **SMALL)


def wanted_by(engine: Engine) -> Wanted:
    """What its configuration asks of a fit."""
    config = parse_config(engine.core.vllm_config.additional_config)
    pages = compression.pages_of(calibration.shape_of(engine.model), engine.model.dtype)
    return compression.wanted_of(config, engine.image.raster, pages)


def kept_of(engine: Engine, name: str) -> HeadProfile:
    """The profile that it left."""
    return HeadProfile.load(cache_directory() / f"{name}-{engine.model.fingerprint}.json")


def test_a_trial_says_what_the_serving_kernels_do(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """Proposals' divergences, replayed token by token on pages, as a server plans them."""
    engine = started(checkpoints["gqa-hf"])
    profile, config = kept_of(engine, "gqa-hf"), engine.core.vllm_config
    assert profile.pictures is not None
    wanted = wanted_by(engine)
    fits = wanted.fits(profile.loss_curves)
    assert len(fits) > 1
    tried = calibration.trying(config, engine.model, profile)
    assert tried is not None
    some = {*range(0, len(fits), 4), len(fits) - 1}  # the last is tied; all of them take half a minute
    assert list(fits)[-1].tied
    found = tried([one for number, one in enumerate(fits.values()) if number in some])
    sections = {}
    for number, weighing in enumerate(fits):
        if number not in some:
            continue
        trial = try_fits(profile.loss_curves, wanted, costing([1.0] * number + [0.5 if number else 1.0]))
        assert trial.weighing == weighing
        path = tmp_path / f"{number}.json"
        profile.model_copy(update={"trials": [trial]}).save(path)
        sections[path.name] = Replayed({"preset": "fitted", "budget": 0.45, "head_profile": str(path)})
    prompts = calibration.prompts_of(config, engine.model)
    codes = [[engine.image.code(token) for token in one] for one in profile.pictures]
    replayed = engine.llm.collective_rpc(
        kvcompress_replay, args=(prompts, codes, sections, engine.image.guidance_scale)
    )[0]
    served = [np.mean(one["kl_guided"]) for one in replayed.values()]
    np.testing.assert_allclose(found, served, rtol=2e-3)
    assert np.ptp(found) > 0.02 * found.min(), "these fits are all alike"


def test_a_start_tries_once_and_keeps_what_came_of_it(
    checkpoints: dict[str, Path],
    tmp_path: Path,
    log: Lines,  # noqa: F811
) -> None:
    first = started(checkpoints["gqa-hf"])
    log.lines.clear()  # whether the first start tried or another module's had
    profile = kept_of(first, "gqa-hf")
    wanted = wanted_by(first)
    trial = profile.trial(wanted)
    assert trial is not None
    assert trial.divergence <= trial.squares
    layout = first.model.compressed._layout
    assert f"guided KL {trial.divergence:.2g}" in layout.summary
    served = wanted.served(profile.loss_curves, trial)
    assert layout.rules == served.rules
    assert layout.types == tuple(map(tuple, served.types.tolist()))

    def never(*arguments: object) -> None:
        raise AssertionError("tried again")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "divergences", never)
        again = started(checkpoints["gqa-hf"], recalibrate=False)
        path = tmp_path / "named.json"
        profile.save(path)
        named = started(checkpoints["gqa-hf"], head_profile=str(path))
    assert again.model.compressed._layout == named.model.compressed._layout == layout
    assert not log.said("with fits tried")


def test_a_profile_without_pictures_is_fitted_as_predicted(
    checkpoints: dict[str, Path],
    tmp_path: Path,
    log: Lines,  # noqa: F811
) -> None:
    engine = started(checkpoints["gqa-hf"])
    profile = kept_of(engine, "gqa-hf")
    path = tmp_path / "old.json"
    profile.model_copy(update={"pictures": None, "trials": []}).save(path)
    layout = started(checkpoints["gqa-hf"], head_profile=str(path)).model.compressed._layout
    predicted = wanted_by(engine).served(profile.loss_curves, None)
    assert layout.types == tuple(map(tuple, predicted.types.tolist()))
    assert "guided KL" not in layout.summary
    assert len(log.said("Fits are not tried")) == 1


@pytest.mark.parametrize(
    ("pictures", "message"),
    [
        (lambda drawn: [[10**6, *drawn[0][1:]], *drawn[1:]], "are not of this model's tokens"),
        (lambda drawn: [[0, *drawn[0][1:]], *drawn[1:]], "are not of this model's tokens"),
        (lambda drawn: drawn[:-1], "are not of this model's tokens"),
        (lambda drawn: [[10**30, *drawn[0][1:]], *drawn[1:]], "no token's id"),
    ],
    ids=["beyond", "text", "few", "huge"],
)
def test_pictures_of_another_model_are_one_line(
    checkpoints: dict[str, Path], tmp_path: Path, pictures: Any, message: str
) -> None:
    profile = kept_of(started(checkpoints["gqa-hf"]), "gqa-hf")
    path = tmp_path / "planted.json"
    profile.model_copy(update={"pictures": pictures(profile.pictures), "trials": []}).save(path)
    with pytest.raises(ValueError, match=message) as caught:
        Engine(checkpoints["gqa-hf"], kvcompress={"budget": 0.45, "head_profile": str(path)}, **SMALL)
    assert "calibrate again" in str(caught.value)


def test_half_a_picture_is_none(tmp_path: Path) -> None:
    path, short = tmp_path / "short.json", [[0] * 143] * 12
    made = HeadProfile(
        format=2, model="x", model_hash="", metric="x", threshold=0.5, prompts_hash="", neighbourhood=24,
        layers=2, kv_heads=4, scores=[[0.5] * 4] * 2, head_size=64, dtype="float32", curves=CURVES.dump(),
    )  # fmt: skip
    made.model_copy(update={"pictures": short}).save(path)
    with pytest.raises(ValueError, match=r"^head_profile: .*pictures: of \[143\] tokens.*calibrate again$"):
        HeadProfile.load(path)


def test_a_named_profile_says_when_it_lacks_a_trial(
    checkpoints: dict[str, Path],
    tmp_path: Path,
    log: Lines,  # noqa: F811
) -> None:
    engine = started(checkpoints["gqa-hf"])
    profile, path = kept_of(engine, "gqa-hf"), tmp_path / "bare.json"
    profile.model_copy(update={"trials": []}).save(path)
    written = path.read_bytes()
    named = started(checkpoints["gqa-hf"], head_profile=str(path))
    assert named.model.compressed._layout == engine.model.compressed._layout
    (said,) = log.said("has no trial of this budget")
    assert str(path) in said
    assert path.read_bytes() == written


def test_pictures_of_another_model_in_the_cache_are_drawn_again(checkpoints: dict[str, Path]) -> None:
    engine = started(checkpoints["gqa-hf"])
    path = cache_directory() / f"gqa-hf-{engine.model.fingerprint}.json"
    profile = HeadProfile.load(path)
    planted = [[0, *profile.pictures[0][1:]], *profile.pictures[1:]]
    profile.model_copy(update={"pictures": planted, "trials": []}).save(path)
    Engine.started["again"] = Engine(checkpoints["gqa-hf"], kvcompress={"budget": 0.45}, **SMALL)
    assert HeadProfile.load(path).pictures == profile.pictures


def test_branches_of_unlike_length_and_ends_of_lines(tmp_path: Path) -> None:
    """Emu3: what is tried is what the kernels do, where prompts are aligned and lines end with a token."""
    engine = Engine.sized(
        make_emu3(tmp_path / "emu3"), size=SIZES["high"], preset="fitted", budget=0.45, default_texts=False
    )
    profile, config = kept_of(engine, "emu3"), engine.core.vllm_config
    (trial,) = profile.trials
    layout = engine.model.compressed._layout
    prompts = calibration.prompts_of(config, engine.model)
    codes = [
        [engine.image.code(token) for token in engine.image.raster.cells(one)] for one in profile.pictures
    ]
    section = {"all": Replayed({"preset": "fitted", "budget": 0.45, "size": SIZES["high"]})}
    replayed = engine.llm.collective_rpc(
        kvcompress_replay, args=(prompts, codes, section, engine.image.guidance_scale)
    )[0]
    assert trial.divergence == pytest.approx(np.mean(replayed["all"]["kl_guided"]), rel=5e-3)
    assert trial.divergence > 0
    assert len(layout.rules) > 1
    assert calibration.of_this_version(profile, engine.image), "and the next start takes it"
    older = [trial.model_copy(update={"later": None})]
    assert not calibration.of_this_version(profile.model_copy(update={"trials": older}), engine.image)
    wide = replace(engine.image, raster=replace(engine.image.raster, width=engine.image.raster.width + 1))
    assert not calibration.of_this_version(profile, wide)


def test_a_cpu_does_with_few_pictures_of_a_large_model() -> None:
    pictures = [calibration.Picture(20, range(596))] * 12
    cpu, model = torch.device("cpu"), object()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "_weights", lambda model: 10**6)
        assert calibration._stride(model, cpu, pictures, 9) == 1  # type: ignore[arg-type]
        patch.setattr(calibration, "MOST_ON_CPU", 1e10)
        assert calibration._stride(model, cpu, pictures, 9) == 4  # type: ignore[arg-type]
        assert calibration._stride(model, torch.device("cuda"), pictures, 9) == 1  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_loaded_models_matrices_count(checkpoints: dict[str, Path], dtype: str) -> None:
    """vLLM packs them for the CPU, and leaves empty parameters."""
    model = Engine.get(checkpoints["gqa-hf"], kvcompress={"preset": "h2o"}, **{**SMALL, "dtype": dtype}).model
    text = model.config.get_text_config()
    queries = text.num_attention_heads * text.head_dim
    keys = text.num_key_value_heads * text.head_dim
    layer = text.hidden_size * (2 * queries + 2 * keys + 3 * text.intermediate_size)
    assert calibration._weights(model) == text.num_hidden_layers * layer
