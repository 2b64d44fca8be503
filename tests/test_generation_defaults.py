"""What a checkpoint's generation_config.json says about guidance is the server's default."""

import json
import shutil
from pathlib import Path

import pytest
from inprocess import Engine, in_process  # noqa: F401
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

SMALL = {"max_model_len": 128, "kvcompress": {"preset": "full"}}
"""A preset without head types: calibration draws at the checkpoint's own guidance too."""


def with_guidance(model: Path, folder: Path, scale: object) -> Path:
    """A copy of a checkpoint whose own guidance scale is ``scale``."""
    shutil.copytree(model, folder)
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"guidance_scale": scale}))
    return folder


def test_the_checkpoints_guidance_is_the_default(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    usual = Engine.get(checkpoints["tiny-hf"], **SMALL)
    own = Engine.get(with_guidance(checkpoints["tiny-hf"], tmp_path / "own", 1.5), **SMALL)
    prompts = [usual.prompt("a red bird by the sea")]

    def draw(engine: Engine, **extra: float) -> list[list[int]]:
        return engine.draw(prompts, SamplingParams(temperature=0.0, extra_args=extra))

    assert draw(own) == draw(usual, guidance_scale=1.5)
    assert draw(own, guidance_scale=5.0) == draw(usual)
    assert draw(own) != draw(usual)


def test_an_override_goes_before_the_checkpoints(checkpoints: dict[str, Path]) -> None:
    override = {"override_generation_config": {"guidance_scale": 1.5, "top_k": 3}}
    engine = Engine.get(checkpoints["tiny-hf"], **SMALL, **override)
    assert (engine.image.guidance_scale, engine.image.top_k) == (1.5, 3)
    with pytest.raises(
        ValueError, match=r"override_generation_config: guidance_scale 'much' is not a number"
    ):
        Engine(checkpoints["tiny-hf"], **SMALL, override_generation_config={"guidance_scale": "much"})


@pytest.mark.parametrize("scale", [-1.0, 1e300, True])
def test_a_scale_out_of_range_is_refused(checkpoints: dict[str, Path], tmp_path: Path, scale: object) -> None:
    model = with_guidance(checkpoints["tiny-hf"], tmp_path / "own", scale)
    with pytest.raises(ValueError, match=r"generation_config\.json: guidance_scale"):
        Engine(model, **SMALL)


def test_the_servers_limit_of_texts_is_none_of_pictures(checkpoints: dict[str, Path]) -> None:
    """vLLM's routes fill it in, or lower a request's own to it: who says that number gets the picture."""
    limited = {**SMALL, "override_generation_config": {"max_new_tokens": 9}}
    engine = Engine.get(checkpoints["tiny-hf"], **limited)
    prompt = engine.prompt("a red bird")
    (picture,) = engine.draw([prompt], SamplingParams(temperature=0.0, max_tokens=9))
    assert len(picture) == engine.image.raster.tokens > 9
    with pytest.raises(VLLMValidationError, match="max_tokens is 8, but the picture takes"):
        engine.draw([prompt], SamplingParams(temperature=0.0, max_tokens=8))
    (text,) = engine.draw([prompt[:-1]], SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True))
    assert len(text) == 9
