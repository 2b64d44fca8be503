"""Profiles of a user's own prompts, and profiles that a model brings beside its weights."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
from inprocess import Engine, in_process  # noqa: F401
from test_calibrate import SMALL, Lines, log  # noqa: F401
from test_cli import calibrate, invoke, one_line

from vllm_kvcompress.heads import provide
from vllm_kvcompress.heads.profile import HeadProfile
from vllm_kvcompress.heads.provide import MOST_BYTES, OWN, cache_directory
from vllm_kvcompress.models import compression
from vllm_kvcompress.models.calibration import _prompts_hash
from vllm_kvcompress.models.files import beside_weights

PROMPTS = ["a red bird", "grass at night by the sea", "two cups", "", "a house", "snow"]
WRITTEN = [prompt for prompt in PROMPTS if prompt]


@pytest.fixture(scope="module")
def brought(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a profile of its own, made by the command on prompts of ours."""
    folder = tmp_path_factory.mktemp("brought") / "painter"
    shutil.copytree(checkpoints["gqa-hf"], folder)
    asked = folder.parent / "prompts.txt"
    asked.write_text("\n".join(PROMPTS))
    done = calibrate(
        folder, "-o", folder / OWN, "--dtype", "float32", "--prompts", asked, "--budgets", "0.45"
    )
    assert done.returncode == 0, done.stderr
    return folder


def started(folder: Path, **section: object) -> Engine:
    return Engine.get(folder, kvcompress=section, **SMALL)


def test_heads_are_measured_on_the_prompts_of_the_file(brought: Path) -> None:
    profile = HeadProfile.load(brought / OWN)
    assert profile.prompts is not None
    assert profile.pictures is not None
    assert len(profile.prompts) == len(profile.pictures) == len(WRITTEN)
    engine = started(brought, budget=0.45)
    assert profile.prompts == [engine.prompt(text) for text in WRITTEN]
    assert profile.model_hash == engine.model.fingerprint
    assert [trial.budget for trial in profile.trials] == [28]
    assert profile.prompts_hash != _prompts_hash()


def test_what_a_model_brings_is_served(brought: Path, log: Lines) -> None:  # noqa: F811
    engine = started(brought, budget=0.45, max_types=6)  # another than above, which was before this log
    assert log.said(f"Head profile: the model's own {OWN}")
    assert not log.said("calibrated")
    assert not log.said("tried")
    profile = HeadProfile.load(brought / OWN)
    assert f"guided KL {profile.trials[0].divergence:.2g}" in engine.model.compressed._layout.summary


def test_another_budget_is_tried_on_its_pictures_and_kept_beside(
    brought: Path,
    log: Lines,  # noqa: F811
) -> None:
    written = (brought / OWN).read_bytes()
    first = started(brought, budget=0.6)
    assert log.said("with fits tried")
    (kept,) = cache_directory().glob(f"painter-{first.model.fingerprint}-*.json")
    assert HeadProfile.load(kept).pictures == HeadProfile.load(brought / OWN).pictures
    log.lines.clear()
    again = Engine(brought, kvcompress={"budget": 0.6}, **SMALL)
    Engine.started["again"] = again
    assert again.model.compressed._layout == first.model.compressed._layout
    assert log.said(f"Head profile: {kept}")
    assert not log.said("tried")
    assert (brought / OWN).read_bytes() == written


def test_what_is_measured_anew_is_not_what_it_brings(brought: Path) -> None:
    """``calibrate --force``."""
    engine = Engine.get(brought, kvcompress={"budget": 0.45, "recalibrate": True}, **SMALL)
    (text,) = engine.llm.collective_rpc("kvcompress_head_profile", args=([0.45, 0.45],))
    profile = HeadProfile.model_validate_json(text)
    assert profile.prompts is None
    assert profile.prompts_hash == _prompts_hash()
    assert [trial.budget for trial in profile.trials] == [28]
    with pytest.raises(ValueError, match=r"^budget: 0 slots per head"):
        engine.llm.collective_rpc("kvcompress_head_profile", args=([0.3, 0.01],))


def test_a_cache_that_keeps_nothing_is_no_reason_to_measure_twice(
    checkpoints: dict[str, Path],
    log: Lines,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(provide, "cache_directory", lambda: Path("/proc/none"))
    engine = Engine(checkpoints["tiny-hf"], kvcompress={"budget": 0.45}, **SMALL)
    Engine.started["kept nowhere"] = engine
    assert len(log.said("Head profile calibrated; not kept")) == 1

    def never(*arguments: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(compression, "calibrate", never)
    assert engine.llm.collective_rpc("kvcompress_head_profile", args=([0.45],))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_hash": "of others"}, "model_hash is 'of others'"),
        ({"layers": 3}, "but layers is 3"),
        ({"prompts": [[1]]}, "prompts: 1, but pictures of other than these"),
        ({"prompts": [[], *[[1]] * 4]}, "prompts: one is empty"),
        ({"prompts": [[2**40], *[[1]] * 4]}, "no token's id"),
        ({"prompts": [[10**6], *[[1]] * 4], "trials": []}, "prompts are not of this model's tokens"),
        ({"pictures": [[0] * 64] * 5, "trials": []}, "pictures are not of this model's tokens"),
        ({"format": 1, "curves": None, "pictures": None, "prompts": None}, "format 1"),
        ({"guidance": 1.5}, "measured at guidance 1.5, this server's default is 5, where they need other"),
    ],
)
def test_what_is_wrong_with_it_is_a_warning(
    brought: Path,
    tmp_path: Path,
    log: Lines,  # noqa: F811
    change: dict,
    said: str,
) -> None:
    folder = tmp_path / "painter"
    shutil.copytree(brought, folder)
    fields = json.loads((folder / OWN).read_text()) | change
    (folder / OWN).write_text(json.dumps(fields))
    Engine.started[str(folder)] = Engine(folder, kvcompress={"budget": 0.45}, **SMALL)
    (warned,) = log.said("The model's own head profile is set aside")
    assert said in warned


def test_one_of_a_size_beyond_reason_is_not_read(
    brought: Path,
    tmp_path: Path,
    log: Lines,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A file with a hole takes no room on a disk, and all of the memory once it is read."""
    folder = tmp_path / "hollow"
    shutil.copytree(brought, folder)
    with (folder / OWN).open("r+b") as file:
        file.truncate(MOST_BYTES + 1)
    monkeypatch.setattr(Path, "read_bytes", lambda path: pytest.fail(f"{path} was read"))
    assert beside_weights(str(folder), None, OWN, MOST_BYTES) is None
    [line] = log.said(f"{OWN} of {folder} could not be read")
    assert f"{MOST_BYTES + 1} bytes; {MOST_BYTES} at most" in line
    monkeypatch.undo()
    Engine.started[str(folder)] = Engine(folder, kvcompress={"budget": 0.45}, **SMALL)
    assert len(log.said(f"{MOST_BYTES} at most")) == 2
    assert log.said("Head profile calibrated")
    (folder / OWN).write_bytes(b"{}")
    assert beside_weights(str(folder), None, OWN, 2) == b"{}"
    assert beside_weights(str(folder), None, OWN, 1) is None


class Hub:
    """The hub's client, which says a size, and then fetches a file or does not."""

    def __init__(self, file: Path | None, said: int | None, error: Exception | None = None) -> None:
        self.file, self.said, self.error, self.fetched = file, said, error, 0

    def metadata(self, url: str) -> SimpleNamespace:
        assert url.endswith(f"/some/painter/resolve/main/{OWN}")
        if self.said is None:
            raise OSError("no network")
        return SimpleNamespace(size=self.said)

    def fetch(self, model: str, name: str, revision: str | None) -> str:
        self.fetched += 1
        if self.error is not None:
            raise self.error
        return str(self.file)


@pytest.mark.parametrize(
    ("size", "said", "error", "fetched", "warned"),
    [
        (2, 2, None, 1, None),
        (2, None, None, 1, None),  # the size is not to be had, the file is
        (2, 10**11, None, 0, "it has 100000000000 bytes; 9 at most"),
        (10, 2, None, 1, "it has 10 bytes; 9 at most"),
        (2, None, LocalEntryNotFoundError("none"), 1, None),
        (2, None, OfflineModeIsEnabled("offline"), 1, None),
        (2, 2, ValueError("broken"), 1, "broken"),
    ],
    ids=["small", "unsaid", "large", "lie", "missing", "offline", "broken"],
)
def test_one_on_the_hub_is_weighed_before_it_is_fetched(
    tmp_path: Path,
    log: Lines,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    size: int,
    said: int | None,
    error: Exception | None,
    fetched: int,
    warned: str | None,
) -> None:
    (tmp_path / OWN).write_bytes(b"x" * size)
    hub = Hub(tmp_path / OWN, said, error)
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", hub.metadata)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", hub.fetch)
    content = beside_weights("some/painter", None, OWN, 9)
    assert content == (b"xx" if error is None and warned is None else None)
    assert hub.fetched == fetched
    lines = log.said("could not be read")
    assert [line.split(": ", 1)[1] for line in lines] == ([] if warned is None else [warned])


def test_prompts_beyond_the_model_are_one_line(brought: Path, tmp_path: Path) -> None:
    fields = json.loads((brought / OWN).read_text()) | {"trials": []}
    fields["prompts"][0] = [10**6]
    path = tmp_path / "planted.json"
    path.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=r"^head_profile: prompts are not of this model's tokens"):
        Engine(brought, kvcompress={"budget": 0.45, "head_profile": str(path)}, **SMALL)


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"one\ntwo\n\n", "has 2, give 4 to 1024"), (b"\xff\xfe", "cannot read"), (None, "cannot read")],
)
def test_a_file_of_no_use_is_one_line(
    checkpoints: dict[str, Path], tmp_path: Path, content: bytes | None, said: str
) -> None:
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    line = one_line(invoke("calibrate", checkpoints["tiny-hf"], "-o", tmp_path / "x.json", "--prompts", path))
    assert line.startswith("vllm-kvcompress: prompts: ")
    assert said in line


def test_heads_are_measured_at_the_guidance_that_pictures_are_drawn_with(
    checkpoints: dict[str, Path],
    tmp_path: Path,
    log: Lines,  # noqa: F811
) -> None:
    """``--override-generation-config``: the default of requests, and of calibration; each scale is kept."""
    model, path = checkpoints["gqa-hf"], tmp_path / "own.json"
    at_two: dict = {"override_generation_config": {"guidance_scale": 2}, **SMALL}
    usual = Engine.get(model, kvcompress={"budget": 0.45}, **SMALL)
    other = Engine.get(model, kvcompress={"budget": 0.45}, **at_two)
    assert (usual.image.guidance_scale, other.image.guidance_scale) == (5, 2)
    (text,) = other.llm.collective_rpc("kvcompress_head_profile", args=([0.45],))
    profile = HeadProfile.model_validate_json(text)
    assert profile.guidance == 2
    mark = usual.model.fingerprint
    kept = HeadProfile.load(cache_directory() / f"{model.name}-{mark}-guidance-2.json")
    assert kept == profile
    first = HeadProfile.load(cache_directory() / f"{model.name}-{mark}.json")
    assert first.guidance == 5
    assert first.pictures != profile.pictures
    profile.save(path)
    Engine.get(model, kvcompress={"budget": 0.45, "head_profile": str(path)}, **SMALL)
    assert log.said(f"{path}: its heads were measured at guidance 2, this server's default is 5")
    log.lines.clear()
    Engine(model, kvcompress={"budget": 0.45, "head_profile": str(path)}, **at_two)
    assert not log.said("measured at guidance")
    done = calibrate(model, "-o", path, "--dtype", "float32", "--guidance", "2", "--budgets", "0.45")
    assert done.returncode == 0, done.stderr
    assert HeadProfile.load(path) == profile
