"""LlamaGen from published-looking files to pictures, against a dense float64 reference of its own."""

from pathlib import Path

import pytest
from dense_llamagen import DenseLlamaGen, full
from inprocess import Engine, in_process  # noqa: F401
from vllm import SamplingParams

from vllm_kvcompress.testing.llamagen import LlamaGenGeometry, decoder_state, make_llamagen

GEOMETRIES = {
    "wrapped": LlamaGenGeometry(),
    "bare": LlamaGenGeometry(heads=4, grid=6, layers=3),
    "odd heads": LlamaGenGeometry(hidden=200, heads=2, grid=5),  # 3B's heads of 100 channels
}
GREEDY = SamplingParams(temperature=0.0)


def guided(scale: float, negative: int | None = None) -> SamplingParams:
    extra: dict = {"guidance_scale": scale}
    if negative is not None:
        extra["negative_prompt_token_ids"] = [negative]
    return SamplingParams(temperature=0.0, extra_args=extra)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("llamagen")
    return {
        name: make_llamagen(root / name, geometry, "bare" if name == "bare" else "model")
        for name, geometry in GEOMETRIES.items()
    }


def reference(name: str) -> DenseLlamaGen:
    g = GEOMETRIES[name]
    return DenseLlamaGen(decoder_state(g), g.heads, g.grid)


def codes(engine: Engine, drawn: list[list[int]]) -> list[list[int]]:
    return [[engine.image.code(token) for token in tokens] for tokens in drawn]


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("backend", [None, "kvcompress"])
def test_greedy_pictures_equal_the_reference(
    folders: dict[str, Path], name: str, backend: str | None
) -> None:
    """Whole pictures, guided, unguided and away from a class, joining one another in mid-picture."""
    section = {"kvcompress": {"preset": "full"}} if backend else {}
    engine = Engine.get(folders[name], backend, **section)
    asked = [(3, guided(4.0)), (0, guided(1.0)), (9, guided(2.5, negative=7)), (3, GREEDY)]
    done = {}
    for number, (wanted, params) in enumerate(asked):
        engine.add(str(number), [wanted], params)
        done |= engine.steps(3)
    done |= engine.steps()
    drawn = codes(engine, [list(done[str(n)].outputs[0].token_ids) for n in range(len(asked))])
    dense, keep = reference(name), full(GEOMETRIES[name].tokens)
    wanted = [
        dense.draw(3, 4.0, keep), dense.draw(0, 1.0, keep), dense.draw(9, 2.5, keep, negative=7),
        dense.draw(3, 4.0, keep),
    ]  # fmt: skip
    assert drawn == [picture for picture, _ in wanted]
    assert min(lead for _, lead in wanted) > 1e-4, "no draw was a matter of rounding"
    assert all(len(set(picture)) > GEOMETRIES[name].grid for picture in drawn), "pictures are not one code"
