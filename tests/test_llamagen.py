"""LlamaGen from published-looking files to pictures, against a dense float64 reference of its own."""

import importlib.util
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import typer
from dense_llamagen import DenseLlamaGen, full
from inprocess import KERNELS, Engine, check_evaluation, evaluate_here, evaluation, in_process  # noqa: F401
from PIL import Image
from typer.testing import CliRunner
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs

from vllm_kvcompress.cli import app
from vllm_kvcompress.eval.held_out import scenes_for
from vllm_kvcompress.policy.rule import HeadRule
from vllm_kvcompress.scheduler import REPORT
from vllm_kvcompress.testing.llamagen import LlamaGenGeometry, decoder_state, make_llamagen

GEOMETRIES = {
    "wrapped": LlamaGenGeometry(),
    "bare": LlamaGenGeometry(heads=4, grid=6, layers=3),
    "odd heads": LlamaGenGeometry(hidden=200, heads=2, grid=5),  # 3B's heads of 100 channels
    "small heads": LlamaGenGeometry(hidden=32, heads=2, layers=1, grid=3),  # of 16, which vLLM's kernels lack
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


def test_a_context_that_holds_no_picture_is_refused_at_the_start(folders: dict[str, Path]) -> None:
    """A class and the picture are all that a request holds."""
    for length, fits in ((16, False), (17, True)):
        args = EngineArgs(str(folders["wrapped"]), dtype="float32", max_model_len=length)
        said = f"a picture of 64x64 takes 16 tokens, but the context holds {length}: raise --max-model-len"
        with nullcontext() if fits else pytest.raises(ValueError, match=said):
            args.create_engine_config()


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
    assert all(len(set(picture)) >= GEOMETRIES[name].grid for picture in drawn), "pictures are not one code"


COMPRESSED = [(preset, "bare", 0.4) for preset in ("decoupled", "fitted", "line_ar")] + [
    (preset, "odd heads", 0.45) for preset in ("ssd", "streaming", "h2o")
]
MIXED = [
    GREEDY
    if n % 3 == 0
    else SamplingParams(
        temperature=1.0, seed=n, top_k=(0, 40)[n % 2], extra_args={"guidance_scale": 1.0 + n / 2}
    )
    for n in range(10)
]


def compressed(folders: dict[str, Path], name: str, **section: object) -> Engine:
    return Engine.get(folders[name], kvcompress=section)


def held_rules(engine: Engine) -> Callable[[int, int], HeadRule]:
    """(layer, cache head) -> the rule in use."""
    layout = engine.model.compressed._layout
    return lambda layer, head: layout.rules[layout.types[layer][head]]


def evicted(report: dict[str, object]) -> int:
    return sum(int(report[f"evicted_{kind}"]) for kind in ("spatial", "semantic"))  # type: ignore[call-overload]


@pytest.mark.parametrize(("preset", "name", "budget"), COMPRESSED)
@pytest.mark.parametrize("kernels", KERNELS)
def test_compressed_pictures_equal_the_reference(
    folders: dict[str, Path], preset: str, name: str, budget: float, kernels: str
) -> None:
    """Each head under the rule that calibration on the family's classes gave it, in both kernels."""
    engine = compressed(folders, name, preset=preset, budget=budget, kernels=kernels)
    outputs = engine.outputs([[3], [9]], [guided(4.0), guided(2.5, negative=7)])
    dense, rules = reference(name), held_rules(engine)
    wanted = [dense.draw(3, 4.0, rules), dense.draw(9, 2.5, rules, negative=7)]
    assert codes(engine, [list(out.outputs[0].token_ids) for out in outputs]) == [p for p, _ in wanted]
    assert min(lead for _, lead in wanted) > 1e-4, "no draw was a matter of rounding"
    assert all(evicted(out.kv_transfer_params[REPORT]) > 0 for out in outputs)
    whole = [dense.draw(3, 4.0, full(GEOMETRIES[name].tokens))[0]]
    assert [wanted[0][0]] != whole, "what was evicted mattered"


@pytest.mark.parametrize("preset", ["decoupled", "fitted", "line_ar"])
def test_batches_windows_and_single_pictures_draw_the_same(folders: dict[str, Path], preset: str) -> None:
    """Ten classes that enter at different steps, greedy and seeded; one by one; by windows.

    One more is given up in mid-picture, after all have lost their blocks.
    """
    plain = compressed(folders, "bare", preset=preset, budget=0.4, kernels="auto")
    alone = [plain.draw([[n]], MIXED[n])[0] for n in range(10)]
    windowed = compressed(folders, "bare", preset=preset, budget=0.4, kernels="auto", window=4)
    for engine in (plain, windowed):
        done, free = {}, engine.free
        for n in range(10):
            engine.add(f"{preset} {n}", [n], MIXED[n])
            done |= engine.steps(1 + n % 3)
            if n == 4:
                engine.add(f"{preset} given up", [n], MIXED[1])
            if n == 6:
                engine.core.reset_prefix_cache(reset_running_requests=True)
            if n == 7:
                engine.llm.llm_engine.abort_request([f"{preset} given up"])
        done |= engine.steps()
        assert f"{preset} given up" not in done
        assert engine.free == free
        assert [list(done[f"{preset} {n}"].outputs[0].token_ids) for n in range(10)] == alone
    steps = [done[f"{preset} {n}"].kv_transfer_params[REPORT]["steps"] for n in range(10)]
    assert min(steps) < GEOMETRIES["bare"].tokens, "windows drew several tokens a step"
    assert all(len(tokens) == GEOMETRIES["bare"].tokens for tokens in alone)


def test_an_evaluation_says_what_it_needs(folders: dict[str, Path], tmp_path: Path) -> None:
    """Sentences, or known pictures: a Janus with random weights must not stand in for the model."""
    result = CliRunner().invoke(app, ["eval", str(folders["bare"]), "-o", str(tmp_path / "eval")])
    assert result.exit_code == 1
    assert "they are drawn from sentences, which LlamaGen does not read; give --pictures 0" in result.output
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    result = CliRunner().invoke(app, ["eval", str(tmp_path), "-o", str(tmp_path / "eval")])
    assert (result.exit_code, "serves no model of type 'llama'" in result.output) == (1, True)
    with pytest.raises(ValueError, match=r"name a file with --scenes-file \(its model_type is 'llamagen'\)"):
        scenes_for(str(folders["bare"]), 1)


def test_one_command_evaluates(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Likelihoods of known pictures of classes, by name and by number."""
    evaluate_here(monkeypatch)
    codes = np.random.default_rng(0).integers(0, GEOMETRIES["bare"].codes, (2, GEOMETRIES["bare"].tokens))
    said = evaluation(folders["bare"], tmp_path / "eval", codes, ["class 3", "7"])
    check_evaluation(CliRunner().invoke(app, said), tmp_path / "eval")


def test_the_offline_example(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    path = Path(__file__).parent.parent / "examples" / "offline.py"
    spec = importlib.util.spec_from_file_location("offline", path)
    assert spec is not None
    assert spec.loader is not None
    offline = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(offline)
    engine = compressed(folders, "bare", preset="line_ar", budget=0.4, kernels="auto")
    monkeypatch.setattr(offline, "LLM", lambda *args, **options: engine.llm)
    offline.main("model", "class 3", tmp_path / "three.png", seed=3)
    assert Image.open(tmp_path / "three.png").size == (96, 96)
    assert "36 image tokens" in capsys.readouterr().out
    with pytest.raises(typer.BadParameter, match="no class 'a cat': say one of its 10 classes"):
        offline.main("model", "a cat", tmp_path / "cat.png")
