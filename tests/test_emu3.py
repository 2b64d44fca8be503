"""Emu3 from published-looking files to pictures, against transformers' own ``generate`` and decoder."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from dense_emu3 import dense, greedy
from inprocess import Engine, evaluate_here, evaluation, in_process  # noqa: F401
from safetensors.torch import save
from typer.testing import CliRunner
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import VLLMValidationError

from vllm_kvcompress.cli import app
from vllm_kvcompress.eval.likelihood import Trial, replay_batches
from vllm_kvcompress.heads import memory
from vllm_kvcompress.heads.calibrate import measure
from vllm_kvcompress.heads.curves import candidate_types
from vllm_kvcompress.models.calibration import subject_of
from vllm_kvcompress.models.registry import family_of
from vllm_kvcompress.policy.rule import HeadRule
from vllm_kvcompress.scheduler import REPORT
from vllm_kvcompress.serving.encode import Pixels
from vllm_kvcompress.serving.spare import SpareDecoder
from vllm_kvcompress.testing.emu3 import make_emu3

Asked = Sequence[tuple[list[int], list[int] | None, float]]  # prompts, negative prompts, guidance
Rules = Callable[[int, int], HeadRule]
SIZES = {"wide": "28x16", "high": "12x24"}  # 4 lines of 7 codes, 6 of 3
GRIDS = {"wide": (4, 7), "high": (6, 3)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_emu3(tmp_path_factory.mktemp("emu3"))


def started(
    folder: Path, size: str, backend: str | None = "kvcompress", batch: int = 256, **section: Any
) -> Engine:
    return Engine.sized(folder, backend, batch, size=SIZES[size], **section)


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
    asked = prompts(engine)
    own = list(engine.image.negative)
    wanted = [
        greedy(folder, ids, own if negative is None else negative, scale, *GRIDS[size])
        for ids, negative, scale in asked
    ]
    assert joining(engine, asked) == wanted


def joining(engine: Engine, asked: Asked) -> list[list[int]]:
    """Greedy pictures that join one another in mid-picture: of lines, of many codes, all different."""
    done = {}
    for number, (ids, negative, scale) in enumerate(asked):
        engine.add(str(number), ids, params(negative, scale))
        done |= engine.steps(3)
    done |= engine.steps()
    drawn = [list(done[str(n)].outputs[0].token_ids) for n in range(len(asked))]
    raster = engine.image.raster
    ends = [engine.image.eol] * raster.lines
    assert all(tokens[raster.columns :: raster.width] == ends for tokens in drawn)
    assert all(len(set(tokens)) > raster.lines for tokens in drawn), "pictures are not one code"
    assert len({tuple(tokens) for tokens in drawn}) == len(drawn)
    return drawn


COMPRESSED = [
    ("line_ar", "wide", 0.5, "torch"),
    ("fitted", "high", 0.45, "cpu"),
    ("decoupled", "wide", 0.5, "cpu"),
    ("ssd", "high", 0.45, "torch"),
    ("streaming", "wide", 0.5, "cpu"),
    ("h2o", "high", 0.45, "cpu"),
]


@pytest.mark.parametrize(("preset", "size", "budget", "kernels"), COMPRESSED)
def test_compressed_pictures_equal_the_reference(
    folder: Path, preset: str, size: str, budget: float, kernels: str
) -> None:
    """Every head under its rule, either branch the shorter one; ends of lines are evicted as codes are."""
    short = {"default_texts": False}  # calibration draws with prompts that are no longer than they need be
    engine = started(folder, size, preset=preset, budget=budget, kernels=kernels, **short)
    asked = [(ids, negative, scale) for ids, negative, scale in prompts(engine)[:3] if negative is not None]

    def drawn_by(rules: Rules) -> list[tuple[list[int], float]]:
        return [dense(folder, *one[:2], rules, one[2], GRIDS[size][1]) for one in asked]

    check_compressed(engine, asked, drawn_by, [greedy(folder, *one, *GRIDS[size]) for one in asked])


def check_compressed(
    engine: Engine,
    asked: Asked,
    drawn_by: Callable[[Rules], list[tuple[list[int], float]]],
    whole: list[list[int]],
) -> None:
    """That pictures are the reference's under the same rules, and not those of a full cache, ``whole``."""
    outputs = engine.outputs([ids for ids, *_ in asked], [params(*rest) for _, *rest in asked])
    layout = engine.model.compressed._layout
    wanted = drawn_by(lambda n, h: layout.rules[layout.types[n][h]])
    drawn = [list(out.outputs[0].token_ids) for out in outputs]
    assert drawn == [tokens for tokens, _ in wanted]
    assert min(lead for _, lead in wanted) > 1e-4, "no draw was a matter of rounding"
    assert drawn != whole, "what was evicted mattered"
    reports = [out.kv_transfer_params[REPORT] for out in outputs]
    assert all(report["evicted_spatial"] + report["evicted_semantic"] > 0 for report in reports)


@pytest.mark.parametrize("default_texts", [True, False])
def test_replays_give_what_drawing_gave(folder: Path, default_texts: bool) -> None:
    """Prompts shorter and longer than the model's negative one: the likelihoods of drawing."""
    section = {"preset": "line_ar", "budget": 0.5, "kernels": "cpu", "default_texts": default_texts}
    check_replays(started(folder, "wide", **section), section)


def check_replays(engine: Engine, section: dict[str, Any]) -> None:
    """That two pictures have the likelihoods of drawing when replayed; ``section`` is the engine's."""
    image = engine.image
    asked = [
        image.aligned(engine.prompt(text), len(image.negative)) for text in ("a cat", "a bird on a tree")
    ]
    one = [
        SamplingParams(temperature=1.0, seed=n, logprobs=0, extra_args={"guidance_scale": 1.0})
        for n in range(2)
    ]
    scenes, nll = [], []
    for prompt, out in zip(asked, engine.outputs(asked, one), strict=True):
        tokens = list(out.outputs[0].token_ids)
        codes = [image.code(token) for token in image.raster.cells(tokens)]
        assert image.tokens(codes) == tokens
        scenes.append((prompt, codes))
        of_codes = image.raster.cells(list(zip(tokens, out.outputs[0].logprobs, strict=True)))
        nll.append(-sum(step[token].logprob for token, step in of_codes) / len(codes))
    trials = {
        "paged": Trial(section),
        "torch": Trial(section | {"kernels": "torch"}),
        "dense": Trial(section, score="sum"),
        "full": Trial({"preset": "full", "default_texts": section.get("default_texts", True)}),
    }
    [(_, found)] = replay_batches(engine.llm, scenes, trials, 3.0, batch=2)
    for name in ("paged", "torch", "dense"):
        assert found[name].nll == pytest.approx(nll, abs=2e-5), name
        assert found[name].kl_guided == pytest.approx(found["paged"].kl_guided, rel=1e-3), name
    assert max(found["full"].kl_guided) < 1e-6 < min(found["paged"].kl_guided)


def test_a_whole_budget_is_the_full_cache(folder: Path) -> None:
    full, whole = (started(folder, "wide", preset=name, budget=1.0) for name in ("full", "line_ar"))
    asked = prompts(full)
    ids, settings = [one[0] for one in asked], [params(*one[1:]) for one in asked]
    assert full.draw(ids, settings) == whole.draw(ids, settings)


SAMPLED = [
    SamplingParams(
        temperature=1.0, seed=n, top_k=(0, 40, 3)[n % 3], extra_args={"guidance_scale": 1.0 + n / 2}
    )
    for n in range(6)
]


@pytest.mark.parametrize("preset", ["full", "line_ar"])
def test_windows_chunks_company_and_memory_change_nothing(folder: Path, preset: str) -> None:
    """Seeded pictures alone; joining one another, in windows, their prompts in chunks, wide logits beside."""
    check_company(
        started(folder, "wide", preset=preset, budget=0.5),
        started(folder, "wide", batch=32, preset=preset, budget=0.5, window=5),
        preset,
    )


def check_company(plain: Engine, windowed: Engine, preset: str) -> None:
    """That six seeded pictures are the same in both engines, together, and alone in the first.

    One more is given up in mid-picture, after all have lost their blocks.
    """
    texts = ["a cat", "a dog with a long, long leash", "a bird", "grass", "the sea at night", "a"]
    ids = [plain.prompt(text) for text in texts]
    alone = [plain.draw([one], setting)[0] for one, setting in zip(ids, SAMPLED, strict=True)]
    biased = SamplingParams(temperature=0.0, logit_bias={plain.image.first_code + 3: 1.0})
    for engine in (plain, windowed):
        done, free = {}, engine.free
        for n, one in enumerate(ids):
            engine.add(f"{preset}{n}", one, SAMPLED[n])
            done |= engine.steps(1 + n % 3)
            if n == 2:
                engine.add(f"{preset}wide", ids[0], biased)  # logits of all ids for as long as it draws
                engine.add(f"{preset}given up", ids[1], SAMPLED[1])
            if n == 3:
                engine.core.reset_prefix_cache(reset_running_requests=True)
            if n == 4:
                engine.llm.llm_engine.abort_request([f"{preset}given up"])
        done |= engine.steps()
        assert f"{preset}given up" not in done
        assert engine.free == free
        assert [list(done[f"{preset}{n}"].outputs[0].token_ids) for n in range(len(ids))] == alone
    steps = [done[f"{preset}{n}"].kv_transfer_params[REPORT]["steps"] for n in range(len(ids))]
    assert min(steps) < plain.image.raster.tokens, "the ends of lines, at least, were drafted right"


def test_log_probabilities_of_a_forced_token_are_certain(folder: Path) -> None:
    engine = started(folder, "wide", preset="full")
    [out] = engine.outputs([engine.prompt("a cat")], SamplingParams(temperature=1.0, seed=1, logprobs=0))
    tokens, columns = list(out.outputs[0].token_ids), GRIDS["wide"][1]
    found = [entry[token].logprob for entry, token in zip(out.outputs[0].logprobs, tokens, strict=True)]
    assert [n for n, token in enumerate(tokens) if token == engine.image.eol] == [7, 15, 23, 31]
    assert all(value == 0 for value in found[columns :: columns + 1])
    assert all(value < 0 for n, value in enumerate(found) if n % (columns + 1) != columns)


def test_a_picture_that_was_begun_goes_on(folder: Path) -> None:
    """From any cut, ends of lines included; a code in an end's place is refused."""
    engine = started(folder, "wide", preset="line_ar", budget=0.5)
    ids, negative, scale = prompts(engine)[0]
    whole = engine.draw([ids], params(negative, scale))[0]
    cuts = (1, 7, 8, 20)
    rest = engine.draw([[*ids, *whole[:cut]] for cut in cuts], params(negative, scale))
    assert rest == [whole[cut:] for cut in cuts]
    with pytest.raises(VLLMValidationError, match=r"token 7 has id \d+: every 8th token, and no other"):
        engine.draw([[*ids, *whole[:7], whole[0]]], params(negative, scale))


def test_what_is_not_a_prompt_of_this_server_is_refused_in_one_line(folder: Path) -> None:
    wide, high = (started(folder, size, preset="full") for size in SIZES)
    with pytest.raises(VLLMValidationError, match=r"a size that this server does not draw: .*\(28x16\)"):
        wide.draw([high.prompt("a cat")], params(None, 3.0))
    with pytest.raises(VLLMValidationError, match="this model draws pictures and writes no text"):
        wide.draw([high.prompt("a cat")[:4]], params(None, 3.0))
    with pytest.raises(VLLMValidationError, match="negative_prompt_token_ids must end in the ids"):
        wide.draw([wide.prompt("a cat")], params(high.prompt("blurry"), 3.0))
    with pytest.raises(VLLMValidationError, match="prompt_logprobs is about words"):
        wide.draw([wide.prompt("a cat")], params(None, 3.0, prompt_logprobs=1))
    assert wide.draw([wide.prompt("a cat")], params(None, 1.0)), "and the engine goes on"


def test_several_pictures_of_a_request_and_a_decoder_without_its_engine(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``n`` of one request have seeds of their own; a draining server decodes what its engine would."""
    engine = started(folder, "wide", preset="full")
    setting = SamplingParams(temperature=1.0, seed=3, n=2, extra_args={"guidance_scale": 2.0})
    [out] = engine.outputs([engine.prompt("a cat")], setting)
    pictures = [list(one.token_ids) for one in out.outputs]
    assert pictures[0] != pictures[1]
    vq = engine.model.vq
    state = sorted(vq.state_dict().items(), key=lambda item: item[1].is_floating_point())
    assert not state[0][1].is_floating_point(), "a count comes first, as a file may have it"
    spare = SpareDecoder(engine.model.config, save({name: x.contiguous() for name, x in state}))
    monkeypatch.setattr(safetensors.torch, "load", lambda content: dict(state))
    for tokens in pictures:
        codes = [engine.image.code(token) for token in engine.image.raster.cells(tokens)]
        assert spare.decode(codes) == Pixels(*vq.picture(codes))


def test_commands_say_what_they_need(folder: Path) -> None:
    """A size that fits the context."""
    for size, said in (
        (None, "a picture of 720x720 takes 32580 tokens, but the context holds 1024: set"),
        ("30x16", "30x16 is no multiple of the model's 4 pixels a token"),
        ("30by16", "size: string should match pattern"),
    ):
        section = {} if size is None else {"size": size}
        with pytest.raises(ValueError, match=said):
            EngineArgs(str(folder), additional_config={"kvcompress": section}).create_engine_config()


def test_calibration_does_not_see_the_padding(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Locality and loss curves of the same pictures are the same behind five tokens more of it.

    And whether there is memory for all of them at once or for one.
    """
    engine = started(folder, "high", preset="fitted", budget=0.45, kernels="cpu", default_texts=False)
    model, image, raster = engine.model, engine.image, engine.image.raster
    family, subject = family_of(model.config), subject_of(engine.core.vllm_config, model)
    step = subject.step

    def greedily(ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        logits = step(ids, positions)
        return torch.where(logits == logits.max(-1, keepdim=True).values, 0.0, -torch.inf)

    subject = replace(subject, step=greedily)
    tokenizer, candidates = engine.llm.get_tokenizer(), candidate_types(raster)[:4]
    ids = [family.calibration_ids(tokenizer, image, n) for n in range(5)]
    found, told = [], []
    for more, room in ((0, memory.ON_CPU), (5, 1)):
        monkeypatch.setattr(memory, "ON_CPU", room)
        asked = [image.aligned(one, len(one) + more) for one in ids]
        found.append(measure(subject, asked, 2, candidates, lambda *step: told.append(step)))
        assert told[-1][1] == told[-1][2]
    assert told[-1][2] == 5 * subject.layers, "a pass a picture"
    assert found[0][2][0].ids[:3] == ids[0][:3]
    for one, other in zip(*(measured[:2] + measured[3:] for measured in found), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    assert found[0][0].std() > 0


def test_one_command_evaluates(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Likelihoods of known pictures, and pictures drawn, of a size that is named."""
    evaluate_here(monkeypatch)
    codes = np.random.default_rng(0).integers(0, 16, (2, 28))

    def evaluate(size: str) -> Any:
        drawn = ("--size", size, "--pictures", "1", "--categories", "colors")
        captions = ["a cat", "a bird on a tree"]
        return CliRunner().invoke(app, evaluation(folder, tmp_path / size, codes, captions, *drawn))

    done = evaluate(SIZES["wide"])
    assert done.exit_code == 0, done.output
    full, all_of_it, half = json.loads((tmp_path / SIZES["wide"] / "results.json").read_text())
    assert [max(map(abs, one["kl"])) < 1e-6 for one in (full, all_of_it, half)] == [True, True, False]
    assert len(half["correct"]) == 3
    wrong = evaluate(SIZES["high"])
    assert "scenes: pictures of 28 codes, where one of 12x24 has 18: name the size" in wrong.output
    captions, size = ["a cat", "a cat " * 9000], ("--size", SIZES["wide"])
    endless = CliRunner().invoke(app, evaluation(folder, tmp_path / "endless", codes, captions, *size))
    assert endless.exit_code == 1
    assert re.search(r"scenes: 'a cat a cat.* tokens, a picture leaves room for \d+$", endless.output.strip())
