"""Checkpoints made to hurt: each ends in one line, in the process that was started, before an engine is."""

import json
import re
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
from transformers import JanusConfig

from vllm_kvcompress.models.janus_config import MultiModalityConfig

LAYOUTS = ("small-hf", "small-deepseek")
HUGE = 10**12


@pytest.fixture
def broken(checkpoints: dict[str, Path], tmp_path: Path, layout: str) -> Path:
    """A copy of a sound checkpoint, to be spoilt."""
    for file in checkpoints[layout].iterdir():
        if file.suffix == ".safetensors":
            (tmp_path / file.name).symlink_to(file)
        else:
            shutil.copy(file, tmp_path)
    return tmp_path


def refusal(path: Path) -> str:
    from vllm.engine.arg_utils import EngineArgs

    with pytest.raises(Exception) as raised:  # noqa: PT011 - vLLM wraps a ValueError in pydantic's
        EngineArgs(str(path), dtype="float32", max_model_len=700).create_engine_config()
    lines = [line for line in str(raised.value).splitlines() if line]
    # pydantic's own frame around a validator's message: two lines, and a link.
    assert len(lines) <= 4, lines
    return " ".join(lines)


@pytest.fixture(autouse=True)
def without_another_try(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM reads a file that it can't make sense of again, two seconds later."""
    monkeypatch.setattr("vllm.transformers_utils.repo_utils.time.sleep", lambda _: None)


def spoil(path: Path, changes: dict[str, Any]) -> None:
    """Set dotted names of config.json."""
    file = path / "config.json"
    fields = json.loads(file.read_text())
    for name, value in changes.items():
        *sections, last = name.split(".")
        target = fields
        for section in sections:
            target = target.setdefault(section, {})
        target[last] = value
    file.write_text(json.dumps(fields))


VQ = {"small-hf": "vq_config", "small-deepseek": "gen_vision_config.params"}
TEXT = {"small-hf": "text_config", "small-deepseek": "language_config"}
NAMES = {  # of the original layout
    "channel_multiplier": "ch_mult", "num_embeddings": "image_token_size", "embed_dim": "n_embed",
    "latent_channels": "z_channels", "base_channels": "ch",
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("channel_multiplier", [1] * 64),
        ("channel_multiplier", [1, 1, 1, 1, HUGE]),
        ("channel_multiplier", []),
        ("channel_multiplier", [1, 1, 1, 1, -1]),
        ("num_embeddings", HUGE),
        ("num_embeddings", 0),
        ("embed_dim", HUGE),
        ("latent_channels", HUGE),
        ("base_channels", HUGE),
        ("num_res_blocks", HUGE),
    ],
)
def test_hostile_sizes_of_the_picture_decoder(broken: Path, layout: str, name: str, value: Any) -> None:
    own = NAMES.get(name, name) if layout == "small-deepseek" else name
    spoil(broken, {f"{VQ[layout]}.{own}": value})
    told = refusal(broken)
    assert name in told or own in told
    assert "must be" in told


@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize("value", [[1], "x", 5], ids=repr)
@pytest.mark.parametrize(
    "name",
    [
        "language_config", "gen_vision_config", "gen_vision_config.params", "vision_config",
        "vision_config.params", "aligner_config", "aligner_config.params",
    ],
)  # fmt: skip
def test_sections_that_are_none(broken: Path, layout: str, name: str, value: Any) -> None:
    spoil(broken, {name: value})
    assert f"config.json: {name} must be an object, got {value!r}" in refusal(broken)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("section", "name", "value", "said"),
    [
        (VQ, "embed_dim", "x", "'embed_dim'.*expected int, got str"),
        (VQ, "base_channels", None, "'base_channels'.*expected int, got NoneType"),
        (TEXT, "hidden_size", [5], "'hidden_size'.*expected int, got list"),
        (TEXT, "hidden_size", -5, ".*hidden size .-5. is not a multiple"),
        (TEXT, "num_hidden_layers", None, "'num_hidden_layers'.*expected int, got NoneType"),
    ],
)
def test_values_that_are_no_sizes(
    broken: Path, layout: str, section: dict[str, str], name: str, value: Any, said: str
) -> None:
    own = NAMES.get(name, name) if layout == "small-deepseek" else name
    spoil(broken, {f"{section[layout]}.{own}": value})
    assert re.search(f"config.json: {said}.*; correct it, or download the file again", refusal(broken))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_type_that_is_none(broken: Path, layout: str) -> None:
    spoil(broken, {"torch_dtype" if layout == "small-deepseek" else "dtype": "x"})
    assert "config.json: module 'torch' has no attribute 'x'" in refusal(broken)


@pytest.mark.parametrize("layout", LAYOUTS[:1])
@pytest.mark.parametrize("value", [[1], "x", 5], ids=repr)
@pytest.mark.parametrize("name", ["text_config", "vq_config", "vision_config"])
def test_sections_that_are_none_in_transformers_layout(
    broken: Path, layout: str, name: str, value: Any
) -> None:
    spoil(broken, {name: value})
    assert f"config.json: '{name}'" in refusal(broken)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pictures_of_other_colours_than_three(broken: Path, layout: str) -> None:
    spoil(broken, {"vq_config.out_channels": -1})
    if layout == "small-hf":  # the other one says nothing about it
        assert "out_channels must be 3, got -1" in refusal(broken)


TOWER = {
    "small-hf": {"vision_config": ("hidden_size", "num_hidden_layers", "num_attention_heads", "depth")},
    "small-deepseek": {
        "vision_config.params": ("width", "layers", "heads", "patch_size"),
        "aligner_config.params": ("depth",),
    },
}


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        (layout, f"{section}.{name}")
        for layout, sections in TOWER.items()
        for section, names in sections.items()
        for name in names
    ],
)
def test_hostile_sizes_of_the_vision_tower(broken: Path, layout: str, name: str) -> None:
    for value in (HUGE, 0):
        spoil(broken, {name: value})
        told = refusal(broken)
        assert re.search(rf"vision_config: \w+ must be a number from 1 to \d+, got {value};", told), told


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_grid_beyond_reason(broken: Path, layout: str) -> None:
    if layout == "small-hf":
        spoil(broken, {"vq_config.num_patches": 10**6, "vision_config.image_size": 16 * 10**6})
    else:
        spoil(broken, {"vision_config.params.image_size": 16 * 10**6})
    assert "num_patches must be a number from 1 to 128, got 1000000" in refusal(broken)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "name", ["hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size", "num_key_value_heads"]
)
def test_hostile_sizes_of_the_language_model(broken: Path, layout: str, name: str) -> None:
    spoil(broken, {f"{TEXT[layout]}.{name}": HUGE})
    assert name in refusal(broken)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"intermediate_size": 4096}, "config.json asks for"),
        ({"num_hidden_layers": 400}, "lacks tensor"),
        ({"vocab_size": 1 << 20}, "config.json asks for"),
    ],
    ids=str,
)
def test_sizes_that_the_files_do_not_bear_out(broken: Path, layout: str, changes: Any, line: str) -> None:
    """Within reason each, and gigabytes more than there are."""
    spoil(broken, {f"{TEXT[layout]}.{name}": value for name, value in changes.items()})
    assert line in refusal(broken)


def header(path: Path) -> tuple[dict[str, Any], bytes]:
    whole = path.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    return json.loads(whole[8 : 8 + length]), whole[8 + length :]


def write(path: Path, fields: Any, data: bytes, length: int | None = None) -> None:
    text = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    path.unlink()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


@pytest.mark.parametrize("layout", LAYOUTS[:1])
@pytest.mark.parametrize(
    "lie", ["length", "shape", "offsets", "overlap", "cut", "not json", "missing", "unknown", "vq shape"]
)
def test_a_header_that_lies(broken: Path, layout: str, lie: str) -> None:
    file = broken / "model.safetensors"
    fields, data = header(file)
    name = next(name for name in fields if name.endswith("embed_tokens.weight"))
    vq = next(name for name in fields if "vqmodel.decoder.conv_in.weight" in name)
    if lie == "length":
        write(file, fields, data, length=2**62)
    elif lie == "cut":
        write(file, fields, data[: len(data) // 2])
    elif lie == "not json":
        write(file, b"\xff" * 64, data)
    else:
        if lie == "shape":
            fields[name]["shape"] = [HUGE, HUGE]
        elif lie == "offsets":
            fields[name]["data_offsets"] = [0, 2**60]
        elif lie == "overlap":
            fields[name]["data_offsets"] = fields[vq]["data_offsets"]
        elif lie == "missing":  # dropped from the header, its bytes given to nobody
            shutil.copy(file.resolve(), broken / "copy")
            from safetensors.torch import load_file, save_file

            tensors = load_file(broken / "copy")
            del tensors[name]
            (broken / "copy").unlink()
            file.unlink()
            save_file(tensors, file)
            assert "lacks tensor language_model.embed_tokens.weight" in refusal(broken)
            return
        elif lie == "unknown":
            fields["a.new.tensor"] = fields.pop(name)
        else:
            fields[vq]["shape"] = list(reversed(fields[vq]["shape"]))
        write(file, fields, data)
    told = refusal(broken)
    assert "model.safetensors can't be read" in told or "tensor" in told
    assert len(told) < 700


@pytest.mark.parametrize("layout", LAYOUTS[:1])
@pytest.mark.parametrize(
    ("index", "said"),
    [
        ("[]", "model.safetensors.index.json is no index of a checkpoint's files: TypeError"),
        ("{", "model.safetensors.index.json is no index of a checkpoint's files: JSONDecodeError"),
        (
            '{"weight_map": 5}',
            "model.safetensors.index.json is no index of a checkpoint's files: AttributeError",
        ),
        (
            '{"weight_map": {"a": "../../etc/passwd"}}',
            "model.safetensors.index.json names a file outside the checkpoint: '../../etc/passwd'",
        ),
        ('{"weight_map": {"a": "gone.safetensors"}}', "gone.safetensors can't be read (No such file"),
    ],
)
def test_an_index_that_lies(broken: Path, layout: str, index: str, said: str) -> None:
    (broken / "model.safetensors.index.json").write_text(index)
    assert said in refusal(broken)


@pytest.mark.parametrize("layout", LAYOUTS[:1])
def test_pickled_weights_are_too_few(broken: Path, layout: str) -> None:
    (broken / "model.safetensors").rename(broken / "pytorch_model.bin")
    spoil(broken, {f"{TEXT[layout]}.num_hidden_layers": 500})
    assert "billion weights" in refusal(broken)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sound_ones_pass(broken: Path, layout: str) -> None:
    from vllm.engine.arg_utils import EngineArgs

    made = EngineArgs(str(broken), dtype="float32", max_model_len=700).create_engine_config()
    # transformers' tables know it by its class.
    assert type(made.model_config.hf_config) is (JanusConfig if layout == "small-hf" else MultiModalityConfig)


def test_the_demo_model_passes() -> None:
    """Small models have sizes of their own: this one's decoder has no residual blocks in its levels."""
    from vllm.engine.arg_utils import EngineArgs

    shapes = Path(__file__).parents[1] / "examples" / "shapes" / "model"
    EngineArgs(str(shapes), dtype="float32", max_model_len=640).create_engine_config()
