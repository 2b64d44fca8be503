"""Sizes in config.json that no tensor bears out by its shape: positions, pickled decoders, packed layers."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from test_checkpoint_bounds import (  # noqa: F401
    LAYOUTS,
    NAMES,
    TEXT,
    VQ,
    broken,
    refusal,
    spoil,
    without_another_try,
)

from vllm_kvcompress.models.checkpoint import MOST_POSITIONS, check_files
from vllm_kvcompress.testing.quantised import quantise

LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}


def rope(**changes: Any) -> dict[str, Any]:
    return {"rope_parameters": LINEAR | changes}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"max_position_embeddings": 1 << 24},
            f"max_position_embeddings must be a number from 1 to {1 << 19},",
        ),
        (rope(factor=1e6), "rope_parameters.factor must be a number from 1 to"),
        (
            rope(rope_type="yarn", original_max_position_embeddings=64, factor=1e6),
            "factor must be a number from",
        ),
        (rope(rope_type="ntk", factor=1e9), "rope_parameters.factor must be a number from 1 to 524288"),
        (rope(rope_dim=1 << 40), "rope_parameters.rope_dim must be a number from 1 to"),
        (
            rope(rope_type="yarn", original_max_position_embeddings=1 << 40),
            "rope_parameters.original_max_position_embeddings must be a number from 1 to 524288",
        ),
        (rope(rope_type="openpangu"), "rope_type must be one of default, linear, .*, got 'openpangu'"),
    ],
    ids=str,
)
def test_positions_beyond_reason(broken: Path, layout: str, changes: dict[str, Any], said: str) -> None:  # noqa: F811
    """vLLM makes a table of them all."""
    spoil(broken, {f"{TEXT[layout]}.{name}": value for name, value in changes.items()})
    told = refusal(broken)
    assert re.search(said, told), told


@pytest.mark.parametrize("layout", LAYOUTS)
def test_positions_within_reason(broken: Path, layout: str) -> None:  # noqa: F811
    from vllm.engine.arg_utils import EngineArgs

    spoil(broken, {f"{TEXT[layout]}.{name}": value for name, value in rope().items()})
    made = EngineArgs(str(broken), dtype="float32", max_model_len=700).create_engine_config()
    text = made.model_config.hf_config.get_text_config()
    assert text.rope_parameters["factor"] == 2
    assert text.max_position_embeddings * 2 < MOST_POSITIONS


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pickled_weights_of_a_picture_decoder_are_too_few(broken: Path, layout: str) -> None:  # noqa: F811
    (broken / "model.safetensors").rename(broken / "pytorch_model.bin")
    for name, value in (("base_channels", 1024), ("channel_multiplier", [64] * 5)):
        own = NAMES.get(name, name) if layout == "small-deepseek" else name
        spoil(broken, {f"{VQ[layout]}.{own}": value})
    assert "billion weights" in refusal(broken)


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_quantised_layers_have_bytes_enough(checkpoints: dict[str, Path], tmp_path: Path, form: str) -> None:
    """What they hold is vLLM's matter, but not how much is allocated for it."""
    packed = quantise(checkpoints["gqa-hf"], tmp_path / "packed", form)
    assert refusal_of_files(packed, tmp_path, {}) is None
    for changes in ({"intermediate_size": 262144}, {"head_dim": 65536}, {"num_hidden_layers": 3}):
        told = refusal_of_files(packed, tmp_path, changes)
        assert told is not None
        assert "\n" not in told
        if "num_hidden_layers" not in changes:  # of a layer too many the norms are missing
            assert "config.json gives language_model.layers.0 " in told
            assert "million quantised weights, the files hold" in told


def refusal_of_files(model: Path, folder: Path, changes: dict[str, Any]) -> str | None:
    from transformers import AutoConfig

    copy = folder / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(model, copy)
    spoil(copy, {f"text_config.{name}": value for name, value in changes.items()})
    try:
        check_files(copy, AutoConfig.from_pretrained(copy), "auto")
    except ValueError as error:
        return str(error)
    return None
