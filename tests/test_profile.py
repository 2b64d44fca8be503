"""Head profiles: the file, its errors, and who may use it."""

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vllm_kvcompress.heads import provide
from vllm_kvcompress.heads.curves import LossCurves, candidate_types
from vllm_kvcompress.heads.profile import HeadProfile
from vllm_kvcompress.policy import Raster

GOOD: dict[str, Any] = {
    "model": "deepseek-ai/Janus-Pro-1B",
    "model_hash": "abc",
    "metric": "outside",
    "threshold": 0.3,
    "prompts_hash": "def",
    "neighbourhood": 48,
    "layers": 2,
    "kv_heads": 3,
    "scores": [[0.1, 0.3, 0.9], [0.0, 1.0, 0.31]],
}


TRIAL: dict[str, Any] = {
    "budget": 0.2, "types": 6, "slot": 0, "side": 0, "ranks": 1, "tolerance": 0.01, "power": 1,
    "conditional": 2, "divergence": 0.1, "squares": 0.2,
}  # fmt: skip


def test_head_types_are_spatial_up_to_the_threshold(tmp_path: Path) -> None:
    profile = HeadProfile(**GOOD)
    assert profile.head_types().tolist() == [[True, True, False], [True, False, False]]
    assert profile.head_types(0.05).tolist() == [[False] * 3, [True, False, False]]
    assert profile.head_types(1.0).all()
    profile.save(tmp_path / "deep" / "profile.json")
    assert HeadProfile.load(tmp_path / "deep" / "profile.json") == profile
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["profile.json"]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"threshold": 1.5}, r"profile.json: threshold: Input should be less than or equal to 1"),
        ({"threshold": "high"}, r"profile.json: threshold: "),
        ({"neighbourhood": 0}, r"profile.json: neighbourhood: "),
        ({"layers": 3}, r"profile.json: scores: 2 layers of \[3\] heads, but layers is 3 and kv_heads is 3"),
        ({"scores": [[0.1, 0.2, 0.3], [0.1]]}, r"scores: 2 layers of \[1, 3\] heads"),
        ({"scores": [[0.1, 0.2, 7.0], [0, 0, 0]]}, r"scores: layer 0 head 2 is 7.0, not a share"),
        ({"model": None}, r"profile.json: model: "),
        ({"extra": 1}, r"profile.json: extra: "),
        *(
            ({name: value}, rf"profile.json: {name}: Input should be a valid integer")
            for name in ("format", "neighbourhood", "layers", "kv_heads", "head_size")
            for value in (2.0, 2.5, "2", True)
        ),
        ({"threshold": True}, r"profile.json: threshold: Input should be a valid number"),
        ({"scores": [["0.1", 0.2, 0.3]] * 2}, r"scores.0.0: Input should be a valid number"),
        ({"scores": [[True, 0.2, 0.3]] * 2}, r"scores.0.0: Input should be a valid number"),
        ({"pictures": [[1.0] * 64]}, r"pictures.0.0: Input should be a valid integer"),
        ({"prompts": [[True]]}, r"prompts.0.0: Input should be a valid integer"),
        ({"trials": [TRIAL | {"slot": 4.0}]}, r"trials.0.slot: Input should be a valid integer"),
        ({"trials": [TRIAL | {"power": "1"}]}, r"trials.0.power: Input should be a valid number"),
        ({"trials": [TRIAL | {"budget": "0.2"}]}, r"trials.0.budget"),
    ],
)
def test_a_bad_file_is_one_line(tmp_path: Path, change: dict, match: str) -> None:
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(GOOD | change))
    with pytest.raises(ValueError, match=match) as caught:
        HeadProfile.load(path)
    assert str(caught.value).startswith("head_profile: ")
    assert "\n" not in str(caught.value)


def test_whole_numbers_will_do_where_a_share_is_meant(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(GOOD | {"threshold": 1, "scores": [[0, 1, 0]] * 2, "trials": [TRIAL]}))
    profile = HeadProfile.load(path)
    assert (profile.threshold, profile.trials[0].power) == (1.0, 1.0)


CURVES = LossCurves(candidate_types(Raster(8, 8)), np.ones((2, 6, len(candidate_types(Raster(8, 8))))))
FITTED = GOOD | {"format": 2, "head_size": 64, "dtype": "bfloat16", "curves": CURVES.dump()}


def curves_with(name: str, value: Any) -> dict[str, Any]:
    """A profile's curves whose last candidate, which keeps everything, has this in it."""
    curves = CURVES.dump()
    *others, last = curves["candidates"]
    return {"curves": curves | {"candidates": [*others, last | {name: value}]}}


def test_a_profile_with_curves_survives_a_file(tmp_path: Path) -> None:
    profile = HeadProfile(**FITTED)
    profile.save(tmp_path / "profile.json")
    again = HeadProfile.load(tmp_path / "profile.json")
    assert again == profile
    assert again.loss_curves.candidates == CURVES.candidates
    assert (tmp_path / "profile.json").stat().st_mode & 0o777 == 0o600


def test_a_profile_of_format_1_is_read_as_what_it_is() -> None:
    profile = HeadProfile(**GOOD)
    assert profile.format == 1
    with pytest.raises(
        ValueError, match=r"^head_profile: .*\(format 1\).*; calibrate again, or set preset to"
    ):
        profile.loss_curves  # noqa: B018


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"format": 3}, r"format: "),
        ({"curves": None}, r"curves: format 2 needs them, with head_size and dtype"),
        ({"head_size": None}, r"curves: format 2 needs them"),
        ({"kv_heads": 2, "scores": [[0.1, 0.2], [0.3, 0.4]]}, r"curves: of 2 layers with 6 cache heads, but"),
        ({"curves": {"line": 8}}, r"curves: "),
        ({"curves": CURVES.dump() | {"losses": [[[-1.0]]]}}, r"curves: losses \[1, 1, 1\] for"),
        ({"curves": CURVES.dump() | {"losses": [[[10**400]]]}}, r"curves: int too large"),
        ({"curves": CURVES.dump() | {"losses": [[["1.0"]]]}}, r"curves: a loss is no number"),
        ({"curves": CURVES.dump() | {"losses": [[[True]]]}}, r"curves: a loss is no number"),
        ({"curves": CURVES.dump() | {"line": 8.0}}, r"curves: line is 8.0; need a whole number"),
        ({"curves": CURVES.dump() | {"line": True}}, r"curves: line is True; need a whole number"),
        ({"curves": CURVES.dump() | {"image": 64.0}}, r"curves: image is 64.0; need a whole number"),
        *(
            (curves_with(name, value), rf"curves: {name} is {re.escape(repr(value))}; need {needed}")
            for name, value, needed in (
                ("capacity", 9.0, "a whole number"),
                ("capacity", True, "a whole number"),
                ("anchors", 0.5, "a whole number"),
                ("recent", "8", "a whole number"),
                ("ring", "x", "true or false"),
                ("ring", 1, "true or false"),
                ("ring", None, "true or false"),
                ("value_norm", 0, "true or false"),
                ("smooth_row", 0.0, "true or false"),
                ("stratify", [], "true or false"),
                ("decay", True, "a number"),
                ("decay", "0.5", "a number"),
            )
        ),
        (curves_with("line", 8), r"curves: .*multiple values for keyword argument 'line'"),
        (curves_with("unheard", 1.5), r"curves: .*unexpected keyword argument 'unheard'"),
    ],
)
def test_bad_curves_are_one_line(tmp_path: Path, change: dict, match: str) -> None:
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(FITTED | change))
    with pytest.raises(ValueError, match=match) as caught:
        HeadProfile.load(path)
    assert "\n" not in str(caught.value)


def test_a_link_left_in_the_way_is_not_followed(tmp_path: Path) -> None:
    victim, path = tmp_path / "victim", tmp_path / "profile.json"
    victim.write_text("mine")
    path.with_name(f"profile.json.{os.getpid()}.part").symlink_to(victim)
    HeadProfile(**GOOD).save(path)
    assert victim.read_text() == "mine"
    assert HeadProfile.load(path) == HeadProfile(**GOOD)


def test_a_file_that_can_not_be_written_to_its_end_is_not_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is the one before touched. /dev/full takes nothing, as a disk without room."""
    path = tmp_path / "profile.json"
    path.write_text("before")
    opened = os.open

    def onto_a_full_disk(part: Path, *args: Any) -> int:
        os.close(opened(part, *args))
        assert part.exists()
        return opened("/dev/full", os.O_WRONLY)

    monkeypatch.setattr(os, "open", onto_a_full_disk)
    with pytest.raises(OSError, match="No space left"):
        HeadProfile(**GOOD).save(path)
    monkeypatch.undo()
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("profile.json", "before")]
    HeadProfile(**GOOD).save(path)
    assert HeadProfile.load(path) == HeadProfile(**GOOD)


def test_no_file_and_no_json_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^head_profile: cannot read .*none.json: No such file"):
        HeadProfile.load(tmp_path / "none.json")
    (tmp_path / "half.json").write_text('{"model": ')
    with pytest.raises(ValueError, match=r"^head_profile: .*half.json: Invalid JSON"):
        HeadProfile.load(tmp_path / "half.json")


def test_a_profile_of_another_model_is_refused() -> None:
    profile = HeadProfile(**GOOD)
    profile.check_model("deepseek-ai/Janus-Pro-1B", "abc", 2, 3)
    profile.check_model("", "", 2, 3)
    for args, field in (
        (("other", "abc", 2, 3), "model is 'deepseek-ai/Janus-Pro-1B', the served model's is 'other'"),
        (("deepseek-ai/Janus-Pro-1B", "xyz", 2, 3), "model_hash is 'abc'"),
        (("deepseek-ai/Janus-Pro-1B", "abc", 4, 3), "layers is 2"),
        (("deepseek-ai/Janus-Pro-1B", "abc", 2, 16), "kv_heads is 3"),
    ):
        with pytest.raises(ValueError, match=f"^head_profile: {field}"):
            profile.check_model(*args)


@pytest.mark.parametrize(
    "left",
    [
        {"model_hash": "of another model"},
        {"layers": 1, "scores": [[0.1, 0.3, 0.9]]},
        {"kv_heads": 1, "scores": [[0.1], [0.0]]},
        FITTED | {"curves": CURVES.dump() | {"losses": [[[10**400]]]}},
        {"scores": [[10**400] * 3] * 2},
        "[]",
        "",
    ],
    ids=["model", "layers", "heads", "loss", "score", "list", "empty"],
)
def test_a_cached_profile_of_no_use_is_measured_again(
    left: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(provide, "cache_directory", lambda: tmp_path)
    mark = provide.ModelMark("Janus-Pro-1B", "abc", 2, 3)
    path = tmp_path / "Janus-Pro-1B-abc.json"
    path.write_text(left if isinstance(left, str) else json.dumps(GOOD | left))
    measured: list[HeadProfile] = []

    def measure() -> HeadProfile:
        measured.append(HeadProfile(**GOOD | {"threshold": 0.4}))
        return measured[-1]

    warned: list[str] = []
    monkeypatch.setattr(provide.logger, "warning", lambda text, *args: warned.append(text % args))
    assert provide.provide_profile(provide.AUTO, mark, measure) == measured[0]
    assert len(warned) == 1
    assert warned[0].startswith("Cached head profile set aside, the heads are measured again: head_profile: ")
    assert provide.provide_profile(provide.AUTO, mark, measure) == measured[0] == HeadProfile.load(path)
    assert len(measured) == len(warned) == 1
