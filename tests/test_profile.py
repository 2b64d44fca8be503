"""Head profiles: the file, its errors, and who may use it."""

import json
from pathlib import Path
from typing import Any

import pytest

from vllm_kvcompress.heads.profile import HeadProfile

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
    ],
)
def test_a_bad_file_is_one_line(tmp_path: Path, change: dict, match: str) -> None:
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(GOOD | change))
    with pytest.raises(ValueError, match=match) as caught:
        HeadProfile.load(path)
    assert str(caught.value).startswith("head_profile: ")
    assert "\n" not in str(caught.value)


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
