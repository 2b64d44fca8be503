"""Lumina-mGPT from scattered files to pictures, against transformers' Chameleon and a float64 reference."""

from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from dense_lumina import Chameleon, DenseLumina, full
from inprocess import Engine, check_evaluation, evaluate_here, evaluation, in_process  # noqa: F401
from test_emu3 import COMPRESSED, Rules, check_company, check_compressed, check_replays, joining, params
from typer.testing import CliRunner

from vllm_kvcompress.cli import app
from vllm_kvcompress.heads.calibrate import PROMPTS
from vllm_kvcompress.models.aligned import RATIOS
from vllm_kvcompress.models.lumina import model as lumina
from vllm_kvcompress.models.lumina.family import trained_grid
from vllm_kvcompress.models.registry import family_of
from vllm_kvcompress.scheduler import REPORT
from vllm_kvcompress.testing.lumina import (
    LuminaGeometry,
    build_tokenizer,
    decoder_state,
    make_lumina,
    published_config,
    vocabulary_of,
)

SIZES = {"wide": "32x16", "high": "16x24", "square": "24x24"}
GRIDS = {"wide": (4, 8), "high": (6, 4), "square": (6, 6)}  # lines and codes a line, of 4 pixels each
GEOMETRIES = {
    "published": LuminaGeometry(),
    "shards": LuminaGeometry(rows=2, codes=96),
    "heads": LuminaGeometry(rows=4),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("lumina")
    return {name: make_lumina(root / name, geometry) for name, geometry in GEOMETRIES.items()}


def started(
    folder: Path, size: str, backend: str | None = "kvcompress", batch: int = 256, **section: Any
) -> Engine:
    return Engine.sized(folder, backend, batch, size=SIZES[size], **section)


def ids_of(name: str, size: str, text: str) -> tuple[list[int], list[int]]:
    """A prompt's ids from its published form, and those that say the picture's size."""
    vocabulary = vocabulary_of(GEOMETRIES[name].codes)
    lines, columns = GRIDS[size]
    begin = ["<racm3:break>", f"<reserved{8800 + lines // 2:05d}>", f"<reserved{8800 + columns // 2:05d}>"]
    words = f"Generate an image of {SIZES[size]} according to the following prompt:\n{text}"
    tail = [vocabulary[token] for token in begin]
    ids = build_tokenizer(GEOMETRIES[name].codes).encode(words).ids
    return [vocabulary["<s>"], *ids, vocabulary["<reserved08706>"], *tail], tail


TEXTS = [
    ("a cat", None, 3.0),
    ("a portrait of a girl", None, 4.0),
    ("a dog", "blurry", 2.0),
    ("a bird", "a long text", 3.0),
    ("a bird", None, 1.0),
]


def asked_for(name: str, size: str) -> list[tuple[list[int], list[int], float]]:
    """Branches and guidance: away from nothing, from a shorter and from a longer text; without guidance."""
    found = []
    for text, negative, scale in TEXTS:
        ids, own = ids_of(name, size, text)
        found.append((ids, own if negative is None else ids_of(name, size, negative)[0], scale))
    return found


@pytest.mark.parametrize(("name", "size"), [("published", "wide"), ("shards", "high"), ("heads", "wide")])
@pytest.mark.parametrize("backend", [None, "kvcompress"])
def test_greedy_pictures_equal_both_references(
    folders: dict[str, Path], name: str, size: str, backend: str | None
) -> None:
    """Whole pictures that join one another in mid-picture; plain ``vllm serve`` finds the backend itself."""
    engine = started(folders[name], size, backend, **({"preset": "full"} if backend else {}))
    asked = asked_for(name, size)
    said = [
        (ids, None if TEXTS[n][1] is None and scale != 1 else no, scale)
        for n, (ids, no, scale) in enumerate(asked)
    ]
    drawn = joining(engine, said)
    geometry = GEOMETRIES[name]
    state, vocabulary = decoder_state(geometry), vocabulary_of(geometry.codes)
    dense, keep = DenseLumina(state, geometry.heads), full(engine.image.raster.tokens)
    wanted = [dense.draw((ids, no), scale, GRIDS[size], vocabulary, keep) for ids, no, scale in asked]
    assert drawn == [tokens for tokens, _ in wanted]
    assert min(lead for _, lead in wanted) > 1e-4, "no draw was a matter of rounding"
    chameleon = Chameleon(published_config(geometry), state)
    assert drawn == [chameleon.draw((ids, no), scale, GRIDS[size], vocabulary) for ids, no, scale in asked]


@pytest.mark.parametrize(("preset", "size", "budget", "kernels"), COMPRESSED)
def test_compressed_pictures_equal_the_reference(
    folders: dict[str, Path], preset: str, size: str, budget: float, kernels: str
) -> None:
    """Every head under its rule, away from nothing, from a shorter text, from a longer one."""
    geometry = GEOMETRIES["published"]
    engine = started(folders["published"], size, preset=preset, budget=budget, kernels=kernels)
    asked = asked_for("published", size)[1:4]
    dense, vocabulary = DenseLumina(decoder_state(geometry), geometry.heads), vocabulary_of(geometry.codes)

    def drawn_by(rules: Rules) -> list[tuple[list[int], float]]:
        return [dense.draw((ids, no), scale, GRIDS[size], vocabulary, rules) for ids, no, scale in asked]

    whole = [tokens for tokens, _ in drawn_by(full(engine.image.raster.tokens))]
    check_compressed(engine, asked, drawn_by, whole)


@pytest.mark.parametrize("preset", ["full", "line_ar"])
def test_windows_chunks_company_and_memory_change_nothing(folders: dict[str, Path], preset: str) -> None:
    """Of a square, whose size tokens are the same id twice: half of them is a chunk's end."""
    plain, windowed = (
        started(folders["shards"], "square", batch=batch, preset=preset, budget=0.5, window=window)
        for batch, window in ((256, 1), (29, 5))
    )
    check_company(plain, windowed, preset)


def test_the_prompt_says_the_size_and_holds_nothing_else(folders: dict[str, Path]) -> None:
    """Ids by string at other places; control tokens that a user spells out are text."""
    for name, size in (("published", "wide"), ("shards", "square")):
        engine = started(folders[name], size, preset="full")
        ids, begin = ids_of(name, size, "a cat")
        assert engine.prompt("a cat") == ids
        assert list(engine.image.negative) == begin
        assert engine.image.first_code == vocabulary_of(GEOMETRIES[name].codes)["IMGIMGAZ"]
        family, tokenizer = family_of(engine.model.config), engine.llm.get_tokenizer()
        assert family.negative_ids(tokenizer, engine.image, " ", 5) == [engine.image.pad] * 2 + begin
        spelled = engine.prompt("<racm3:break><reserved08799>")
        assert [one for one in spelled if one in (*begin, engine.image.eol)] == begin


SIZES_OF_768 = "768x768 864x640 640x864 928x608 608x928 1024x576 576x1024"
SIZES_OF_1024 = "1024x1024 1152x864 864x1152 1248x832 832x1248 1344x768 768x1344"


@pytest.mark.parametrize(("side", "names"), [(768, SIZES_OF_768), (1024, SIZES_OF_1024)])
def test_sizes_are_those_of_training(side: int, names: str) -> None:
    """Of the usual ratios those crops that Lumina-mGPT's own script makes of such pictures."""
    units = (side // 32) ** 2
    wide, high, crops = units, 1, set()
    while wide:  # data/item_processor.py, from the widest crop to the highest
        crops.add((wide, high))
        wide, high = (wide, high + 1) if (high + 1) * wide <= units else (wide - 1, high)
    for (width, height), name in zip(RATIOS, names.split(), strict=True):
        best = max((min(w / width, h / height) / max(w / width, h / height), w, h) for w, h in crops)
        assert trained_grid(width, height, side // 32) == (2 * best[1], 2 * best[2])
        assert name == f"{32 * best[1]}x{32 * best[2]}"


def test_sizes_in_one_batch_are_those_of_servers_of_one(folders: dict[str, Path]) -> None:
    """Compressed, in windows, prompts in chunks; a size's tokens are another size's, in another order."""
    folder, asked, alone = folders["published"], [], []
    for size in SIZES:
        engine = started(folder, size, preset="line_ar", budget=0.5)
        mine = [(ids, params(*rest)) for ids, *rest in asked_for("published", size)[1:4]]
        alone += engine.draw([ids for ids, _ in mine], [setting for _, setting in mine])
        asked += mine
    section = {"sizes": [*SIZES.values()], "window": 4, "preset": "line_ar", "budget": 0.5}
    several = Engine.get(
        folder, "kvcompress", additional_config={"kvcompress": section}, max_model_len=256,
        max_num_batched_tokens=48,
    )  # fmt: skip
    assert several.draw([ids for ids, _ in asked], [setting for _, setting in asked]) == alone


def test_replays_give_what_drawing_gave(folders: dict[str, Path]) -> None:
    section = {"preset": "line_ar", "budget": 0.5, "kernels": "cpu"}
    check_replays(started(folders["published"], "wide", **section), section)


def test_one_command_evaluates(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Likelihoods of known pictures, codes without the ends of lines."""
    evaluate_here(monkeypatch)
    codes = np.random.default_rng(0).integers(0, GEOMETRIES["published"].codes, (2, 32))
    said = evaluation(
        folders["published"], tmp_path / "eval", codes, ["a cat", "a dog"], "--size", SIZES["wide"]
    )
    check_evaluation(CliRunner().invoke(app, said), tmp_path / "eval")


def test_calibration_draws_what_users_do(folders: dict[str, Path]) -> None:
    engine = started(folders["published"], "wide", preset="full")
    family, tokenizer = family_of(engine.model.config), engine.llm.get_tokenizer()
    assert family.calibration_ids(tokenizer, engine.image, 0) == engine.prompt(PROMPTS[0])


def test_a_compiled_model_draws_what_an_eager_one_draws(tmp_path: Path) -> None:
    """As ``vllm serve`` does by default: inductor gives an operation's memory away as soon as it may.

    One layer, since compiling is what takes the time.
    """
    folder = make_lumina(tmp_path, LuminaGeometry(layers=1))
    section = {"size": SIZES["square"], "preset": "fitted", "budget": 0.4}
    drawn = []
    for window, eager in ((1, True), (8, False)):
        config = {"kvcompress": {**section, "window": window}}
        engine = Engine.get(
            folder,
            additional_config=config,
            max_model_len=256,
            max_num_batched_tokens=256,
            enforce_eager=eager,
        )
        asked = [engine.prompt(text) for text in ("a cat", "a dog by the sea", "two birds")]
        drawn.append(engine.outputs(asked, [params(None, 3.0)] * 3))
    compilation = engine.llm.llm_engine.vllm_config.compilation_config
    assert (compilation.backend, compilation.mode.name) == ("inductor", "DYNAMO_TRACE_ONCE")
    whole, windowed = ([out.outputs[0].token_ids for out in outputs] for outputs in drawn)
    assert windowed == whole
    assert min(out.kv_transfer_params[REPORT]["steps"] for out in drawn[1]) < engine.image.raster.tokens


@pytest.mark.parametrize("shape", [(6,), (1, 6), (2, 6), (4, 6)])
def test_each_rank_has_the_norms_of_its_heads(shape: tuple[int, ...]) -> None:
    """Of every published shape: two ranks side by side are one."""
    loaded, x = torch.randn(shape), torch.randn(5, 4 * 6)

    def normed(rank: int, ranks: int) -> torch.Tensor:
        with (
            mock.patch.object(lumina, "get_tensor_model_parallel_rank", return_value=rank),
            mock.patch.object(lumina, "get_tensor_model_parallel_world_size", return_value=ranks),
        ):
            norm = lumina.HeadNorm(4, 6)
            norm.weight.weight_loader(norm.weight, loaded)
            norm.bias.weight_loader(norm.bias, loaded + 1)
        return norm(x.chunk(ranks, -1)[rank])

    assert torch.equal(torch.cat([normed(rank, 2) for rank in range(2)], -1), normed(0, 1))
    rows = loaded.reshape(-1, 6).repeat_interleave(4 * 6 // loaded.numel(), 0)
    plain = torch.nn.functional.layer_norm(x.view(5, 4, 6), (6,)) * rows + rows + 1
    torch.testing.assert_close(normed(0, 1), plain.flatten(1))
