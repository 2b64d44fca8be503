"""Emu3 from published-looking files to pictures, against transformers' own ``generate`` and decoder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from dense_emu3 import greedy
from inprocess import KERNELS, Engine, in_process  # noqa: F401
from vllm import SamplingParams

from vllm_kvcompress.testing.emu3 import make_emu3

SIZES = {"wide": "28x16", "high": "12x24"}  # 4 lines of 7 codes, 6 of 3
GRIDS = {"wide": (4, 7), "high": (6, 3)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_emu3(tmp_path_factory.mktemp("emu3"))


def started(folder: Path, size: str, backend: str | None = "kvcompress", **section: Any) -> Engine:
    config = {"kvcompress": {"window": 1, "size": SIZES[size], **section}}
    return Engine.get(folder, backend, additional_config=config, max_model_len=256)


def prompts(engine: Engine) -> list[tuple[list[int], list[int] | None, float]]:
    """Prompt, negative, guidance: the negative longer, shorter, as long, none said, and no guidance."""
    ids = engine.prompt
    return [
        (ids("a cat"), ids("lowres, bad anatomy, blurry"), 3.0),
        (ids("a portrait of a girl with a very long name"), ids("blurry"), 2.0),
        (ids("a dog"), ids("a cat"), 5.0),
        (ids("a bird on a tree"), None, 3.0),
        (ids("a bird on a tree"), None, 1.0),
    ]


def params(negative: Sequence[int] | None, scale: float, **more: Any) -> SamplingParams:
    extra: dict[str, Any] = {"guidance_scale": scale}
    if negative is not None:
        extra["negative_prompt_token_ids"] = list(negative)
    return SamplingParams(temperature=0.0, extra_args=extra, **more)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("backend", [None, "kvcompress"])
def test_greedy_pictures_equal_transformers(folder: Path, size: str, backend: str | None) -> None:
    """Whole pictures that join one another in mid-picture; plain ``vllm serve`` finds the backend itself."""
    engine = started(folder, size, backend, **({"preset": "full"} if backend else {}))
    asked, done = prompts(engine), {}
    for number, (ids, negative, scale) in enumerate(asked):
        engine.add(str(number), ids, params(negative, scale))
        done |= engine.steps(3)
    done |= engine.steps()
    drawn = [list(done[str(n)].outputs[0].token_ids) for n in range(len(asked))]
    own = list(engine.image.negative)
    wanted = [
        greedy(folder, ids, own if negative is None else negative, scale, *GRIDS[size])
        for ids, negative, scale in asked
    ]
    assert drawn == wanted
    lines, columns = GRIDS[size]
    assert all(tokens[columns :: columns + 1] == [engine.image.eol] * lines for tokens in drawn)
    assert all(len(set(tokens)) > lines for tokens in drawn), "pictures are not one code"
    assert len({tuple(tokens) for tokens in drawn}) == len(drawn)
