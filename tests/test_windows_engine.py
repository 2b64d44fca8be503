"""Windows inside vLLM's engine: whatever is drafted, the pictures are those of drawing one by one."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from unittest import mock

import pytest
import torch
from inprocess import Engine, in_process  # noqa: F401
from oracle import write_profile
from vllm import SamplingParams

from vllm_kvcompress.policy import PRESETS
from vllm_kvcompress.policy.raster import Raster
from vllm_kvcompress.scheduler import REPORT
from vllm_kvcompress.windows import drawing
from vllm_kvcompress.windows.choice import WindowChoice

GREEDY = SamplingParams(temperature=0.0)
SMALL = {"max_model_len": 128, "max_num_batched_tokens": 512}
LINE, PICTURE = 8, 64  # tokens, of the tiny checkpoint
TEXTS = [f"{thing} {where}" for thing in ("a red bird", "two boats", "an old clock", "grass")
         for where in ("", "by the sea", "at night, in the rain, under a lamp", "on a table")]  # fmt: skip


def seeded(seed: int, **more: float) -> SamplingParams:
    extra = {"guidance_scale": (1.0, 5.0, 2.5)[seed % 3]}
    return SamplingParams(temperature=1.0, seed=seed, extra_args=extra, **more)


MIXED = [
    GREEDY if n % 3 == 0 else seeded(n) if n % 3 == 1 else seeded(n, top_k=40, top_p=0.9) for n in range(16)
]


@pytest.fixture(scope="module")
def tiny(checkpoints: dict[str, Path]) -> Path:
    return checkpoints["tiny-hf"]


def engine(
    model: Path, window: int | str, cache: str = "full cache", budget: float = 0.3, **section: object
) -> Engine:
    """An engine with windows; ``cache`` is a preset, or vLLM's own attention."""
    if cache == "full cache":
        return Engine.get(model, None, additional_config={"kvcompress": {"window": window}}, **SMALL)
    section = {"window": window, "preset": cache, "budget": budget, **section}
    return Engine.get(model, kvcompress=section, **SMALL)


@contextmanager
def places(*windows: int) -> Iterator[None]:
    """Steps of engines with windows have these many places, in turn."""
    with mock.patch.object(WindowChoice, "choose", side_effect=cycle(windows)):
        yield


def prompts(engine: Engine) -> list[list[int]]:
    return [engine.prompt(text) for text in TEXTS]


def steps(outputs: list) -> list[int]:
    return [out.kv_transfer_params[REPORT]["steps"] for out in outputs]


@pytest.fixture
def drafts(request: pytest.FixtureRequest) -> Iterator[None]:
    """Other drafts than the package makes: ``random`` ids of the whole vocabulary, or ``nothing``."""
    rng = random.Random(0)
    make = {
        "random": lambda self, count: [rng.randrange(600) for _ in range(count)],
        "nothing": lambda self, count: [-1] * count,
        "ours": drawing.Drawing.drafts,
    }
    with mock.patch.object(drawing.Drawing, "drafts", make[request.param]):
        yield


EVICTING = [name for name, preset in PRESETS.items() if preset.evicts]
BUDGETS = {3: 0.2, 8: 1 / 6, 16: 1.0}


@pytest.mark.parametrize(
    ("cache", "windows", "budget"),
    [
        ("full cache", (2, 3, 8, 16), 0.3),
        ("fitted", (2, 3, 8, 16), 0.3),
        *((cache, (3, 16), 0.3) for cache in EVICTING if cache != "fitted"),
        *(
            (cache, (window,), budget)
            for cache in ("fitted", "line_ar")
            for window, budget in BUDGETS.items()
        ),
    ],
)
def test_the_same_pictures(tiny: Path, cache: str, windows: tuple[int, ...], budget: float) -> None:
    """Greedy and seeded, guided and not, top-k and top-p, many at once, then fewer, then one."""
    plain, windowed = engine(tiny, 1, cache, budget), engine(tiny, 16, cache, budget)
    many = slice(16 if len(windows) > 2 else 7)
    asked, params = prompts(plain)[many], MIXED[many]
    wanted = plain.draw(asked, params)
    for window in windows:
        with places(window):
            drawn = windowed.outputs(asked, params)
            assert [list(out.outputs[0].token_ids) for out in drawn] == wanted
            assert min(steps(drawn)) < PICTURE, "some drafts stood"
    with places(*windows):
        assert windowed.draw(asked[:3], params[:3]) == wanted[:3]
        assert windowed.draw(asked[4:5], params[4:5]) == wanted[4:5]


@pytest.mark.parametrize("kernels", ["torch", "cpu"])
def test_grouped_queries_and_both_kernels(checkpoints: dict[str, Path], kernels: str) -> None:
    drawn = []
    for window in (1, 8):
        using = engine(checkpoints["gqa-hf"], window, "fitted", kernels=kernels)
        drawn.append(using.draw([using.prompt(text) for text in TEXTS[:6]], MIXED[:6]))
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize(("model", "backend"), [("small-hf", "kvcompress"), ("small-deepseek", None)])
def test_whole_pictures_of_both_layouts(
    checkpoints: dict[str, Path], tmp_path: Path, model: str, backend: str | None
) -> None:
    """576 of 576 tokens on the published grid, in windows of every length.

    The heads' losses are made up: measuring them on this grid takes ten times as long as the pictures.
    """
    profile = write_profile(tmp_path / "profile.json", [[0, 1, 0, 1]] * 3, Raster(24, 24))
    drawn = []
    for window in (1, 16):
        section = {"window": window, **({"head_profile": str(profile)} if backend else {})}
        settings = {"kvcompress": section} if backend else {"additional_config": {"kvcompress": section}}
        using = Engine.get(
            checkpoints[model], backend, max_model_len=640, kv_cache_memory_bytes=2**27, **settings
        )
        with places(16, 2, 8, 3):
            drawn.append(using.draw([using.prompt(text) for text in TEXTS[:2]], MIXED[:2]))
    assert drawn[0] == drawn[1]
    assert {len(tokens) for tokens in drawn[0]} == {576}


@pytest.mark.parametrize("drafts", ["random", "nothing"], indirect=True)
@pytest.mark.parametrize("cache", ["full cache", "fitted"])
def test_any_draft_is_right(tiny: Path, cache: str, drafts: None) -> None:
    plain, windowed = engine(tiny, 1, cache), engine(tiny, 8, cache)
    assert windowed.draw(prompts(plain), MIXED) == plain.draw(prompts(plain), MIXED)


@pytest.mark.parametrize("window", [2, 3, 8, 16])
@pytest.mark.parametrize("cache", ["full cache", "fitted", "h2o"])
def test_right_drafts_take_the_fewest_steps(tiny: Path, cache: str, window: int) -> None:
    """Cut at every line's end with a compressed cache, at the picture's alone with the full one."""
    plain, windowed = engine(tiny, 1, cache), engine(tiny, 16, cache)
    asked, params = [plain.prompt(TEXTS[1])] * 3, [MIXED[1]] * 3
    (truth,) = plain.draw(asked[:1], params[:1])

    def told(self: drawing.Drawing, count: int) -> list[int]:
        return truth[self.known :][:count]

    with mock.patch.object(drawing.Drawing, "drafts", told), places(window):
        drawn = windowed.outputs(asked, params)
    assert [list(out.outputs[0].token_ids) for out in drawn] == [truth] * 3
    # The prompt's step draws the first token; the last is never fed.
    whole = -(-(PICTURE - 1) // window)
    cut = (PICTURE // LINE - 1) * -(-LINE // window) + -(-(LINE - 1) // window)
    assert steps(drawn) == [1 + (whole if cache == "full cache" else cut)] * 3


@pytest.mark.parametrize("cache", ["full cache", "fitted", "line_ar"])
def test_windows_that_change_from_step_to_step(tiny: Path, cache: str) -> None:
    """In mid-picture, with arrivals, aborts, and prompts between."""
    plain, windowed = engine(tiny, 1, cache), engine(tiny, 16, cache)
    wanted = plain.draw(prompts(plain), MIXED)
    free, rng = windowed.free, random.Random(1)
    with mock.patch.object(
        WindowChoice, "choose", side_effect=lambda rows, others: rng.choice((1, 2, 5, 16))
    ):
        done = {}
        for n, prompt in enumerate(prompts(plain)):
            windowed.add(f"{cache} {n}", prompt, MIXED[n])
            done |= windowed.steps(rng.randrange(4))
            if n in (4, 9):
                windowed.llm.llm_engine.abort_request([f"{cache} {n - 1}"])
        done |= windowed.steps()
    drawn = {int(name.split(":")[0].split()[-1]): out for name, out in done.items()}
    assert {n: list(out.outputs[0].token_ids) for n, out in drawn.items()} == {
        n: tokens for n, tokens in enumerate(wanted) if n not in (3, 8)
    }
    assert windowed.free == free


@pytest.mark.parametrize("cache", EVICTING)
def test_the_pages_after_every_step(tiny: Path, cache: str) -> None:
    """K, V, tokens, scores and victims of all types are those of one-by-one drawing; two pictures at once."""
    plain, windowed = engine(tiny, 1, cache), engine(tiny, 16, cache)
    seen, compared = {}, 0
    for using, window in ((plain, 1), (windowed, 3), (windowed, 16)):
        for n in (0, 1):
            using.add(f"{window} {n}", using.prompt(TEXTS[n]), MIXED[n])
        with places(window):
            while using.llm.llm_engine.has_unfinished_requests():
                using.steps(1)
                for request in using.scheduler.running:
                    picture = request.request_id.split("-")[0].split()[1]
                    at = picture, request.num_computed_tokens
                    held = _pages(using, request.request_id, request.num_computed_tokens)
                    if using is plain:
                        seen[at] = held
                        continue
                    compared += 1
                    for mine, theirs in zip(held, seen[at], strict=True):
                        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    assert len(seen) > 2 * PICTURE - 4
    assert compared > 2 * PICTURE // 8


def _pages(engine: Engine, name: str, computed: int) -> list[torch.Tensor]:
    """Everything that a request's pages hold in slots that are in use, type by type."""
    store, found = engine.model.compressed, []
    blocks = engine.scheduler.kv_cache_manager.get_block_ids(name)
    prefix = engine.scheduler._prefixes[name]
    for kind, ids in enumerate(blocks):
        whole = store._all_layers[kind]
        drawn = max(0, computed - prefix)
        slots = min(computed, prefix) + whole.rule.resident(drawn)
        fields = (
            [whole.pages.kv, whole.pages.score, whole.pages.token] if whole.rule.scores else [whole.pages.kv]
        )
        for field in fields:
            found.append(field[ids].transpose(0, 1).flatten(1, 2)[:, :slots].clone())
        due = whole.rule.victims_due(drawn - drawn % LINE) if whole.rule.scores else 0
        if due:
            found.append(whole.pages.victim[ids].transpose(0, 1).flatten(1, 2)[:, :due].clone())
    return found


def test_a_compiled_models_memory_is_its_own(tiny: Path) -> None:
    """torch.compile puts other results where an operation's arguments were: nobody may look there later."""
    plain, windowed = engine(tiny, 1, "fitted"), engine(tiny, 8, "fitted")
    store = windowed.model.compressed
    attend = type(store).attend

    def overwritten(self: object, *given: torch.Tensor) -> torch.Tensor:
        out = attend(self, *given)
        for argument in given[:3]:
            argument.fill_(torch.nan)
        return out

    with mock.patch.object(type(store), "attend", overwritten), mock.patch.object(store, "_compiled", True):
        drawn = windowed.draw(prompts(plain), MIXED)
    assert drawn == plain.draw(prompts(plain), MIXED)


@pytest.mark.parametrize("cache", ["full cache", "fitted"])
def test_settings_that_have_no_window(tiny: Path, cache: str) -> None:
    """Penalties, biases and min-p are of one place a row; others beside them keep their windows."""
    plain, windowed = engine(tiny, 1, cache), engine(tiny, 8, cache)
    some = windowed.image.text_vocab + 3
    special = [
        SamplingParams(temperature=1.0, seed=1, repetition_penalty=1.3),
        SamplingParams(temperature=1.0, seed=2, logit_bias={some: 4.0}),
        SamplingParams(temperature=1.0, seed=3, min_p=0.2),
        *(GREEDY for _ in range(6)),
    ]
    wanted = plain.draw(prompts(plain)[:9], special)
    drawn = windowed.outputs(prompts(plain)[:9], special)
    assert [list(out.outputs[0].token_ids) for out in drawn] == wanted
    assert steps(drawn)[:3] == [PICTURE] * 3
    assert min(steps(drawn)[3:]) < PICTURE


def test_log_probabilities_and_text(tiny: Path) -> None:
    """Requests that want them, and text, have no windows; pictures beside them keep theirs."""
    plain, windowed = engine(tiny, 1), engine(tiny, 8)
    text = [*plain.llm.get_tokenizer().encode("a bird and a boat")]
    asked = [plain.prompt(TEXTS[0]), text, plain.prompt(TEXTS[1])]
    writes = SamplingParams(temperature=1.0, seed=3, max_tokens=20, ignore_eos=True)
    reports = SamplingParams(temperature=0.0, logprobs=2)
    for params in ([GREEDY, writes, GREEDY], [GREEDY, writes, reports]):
        wanted, drawn = plain.outputs(asked, params), windowed.outputs(asked, params)
        for a, b in zip(wanted, drawn, strict=True):
            assert a.outputs[0].token_ids == b.outputs[0].token_ids
        assert drawn[1].kv_transfer_params is None, "nothing to say of a text"
        assert params[2] is GREEDY or steps(drawn[2:]) == [PICTURE]
    with mock.patch.object(
        drawing.Drawing,
        "drafts",
        lambda self, count: list(wanted[0].outputs[0].token_ids)[self.known :][:count],
    ):
        late = windowed.outputs(asked[:1] * 2, [GREEDY, reports])
    assert steps(late)[0] < PICTURE == steps(late)[1]
    for a, b in zip(wanted[2].outputs[0].logprobs, drawn[2].outputs[0].logprobs, strict=True):
        assert {k: v.logprob for k, v in a.items()} == pytest.approx({k: v.logprob for k, v in b.items()})


@pytest.mark.parametrize("cache", ["full cache", "fitted"])
def test_pictures_that_were_begun(tiny: Path, cache: str) -> None:
    plain, windowed = engine(tiny, 1, cache), engine(tiny, 8, cache)
    whole = plain.draw(prompts(plain)[:5], GREEDY)
    begun = [p + t[:cut] for p, t, cut in zip(prompts(plain), whole, (0, 1, 17, 40, 63), strict=False)]
    assert windowed.draw(begun, GREEDY) == plain.draw(begun, GREEDY)


def test_more_pictures_than_window_rows(tiny: Path) -> None:
    few = Engine.get(tiny, None, additional_config={"kvcompress": {"window": 8, "window_rows": 3}}, **SMALL)
    assert steps(few.outputs(prompts(few)[:4], [GREEDY] * 4)) == [PICTURE] * 4
    assert min(steps(few.outputs(prompts(few)[:3], [GREEDY] * 3))) < PICTURE


def test_windows_leave_a_small_step_to_all(tiny: Path) -> None:
    """vLLM gives a step's tokens out row by row: eight windows of 16 would take twice what there is."""
    plain = engine(tiny, 1)
    small = {**SMALL, "max_num_batched_tokens": 64}
    using = Engine.get(tiny, None, additional_config={"kvcompress": {"window": 16}}, **small)
    wanted = plain.draw(prompts(plain)[:9], GREEDY)
    for n, prompt in enumerate(prompts(plain)[:8]):
        using.add(f"small {n}", prompt, GREEDY)
    done = using.steps(5)
    writes = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    using.add("text", plain.llm.get_tokenizer().encode("a bird and a boat"), writes)
    using.add("small 8", prompts(plain)[8], GREEDY)
    done |= using.steps(12)
    assert "text" in done, "a token in every step, beside its prompt's"
    late = using.scheduler.requests
    assert all(late[name].num_output_tokens > 10 for name in late), "and so had all pictures"
    done |= using.steps()
    drawn = [done[f"small {n}"] for n in range(9)]
    assert [list(out.outputs[0].token_ids) for out in drawn] == wanted
    assert min(steps(drawn)) < PICTURE


def test_preempted_pictures_draw_on(tiny: Path) -> None:
    """All blocks gone in mid-window: the tokens so far are read again, and the rest is the same."""
    plain, windowed = engine(tiny, 1, "fitted"), engine(tiny, 8, "fitted")
    wanted = plain.draw(prompts(plain)[:5], MIXED[:5])
    for n, prompt in enumerate(prompts(plain)[:5]):
        windowed.add(f"preempted {n}", prompt, MIXED[n])
    done = {}
    for count in (5, 7, 4):
        done |= windowed.steps(count)
        windowed.core.reset_prefix_cache(reset_running_requests=True)
    done |= windowed.steps()
    drawn = {
        int(name.split(":")[0].split()[-1]): list(out.outputs[0].token_ids) for name, out in done.items()
    }
    assert drawn == dict(enumerate(wanted))


def test_the_seed_alone_decides(tiny: Path) -> None:
    """Not the row, nor what the row drew before: the noise is of the seed and the token's place."""
    plain = engine(tiny, 1)
    asked = prompts(plain)[:6]
    params = [seeded(4) for _ in asked]
    together = plain.draw(asked, params)
    assert [plain.draw([prompt], params[:1])[0] for prompt in asked] == together
    again = plain.draw([asked[0] + together[0][:30]], params[:1])
    assert again == [together[0][30:]], "a picture that is drawn on is the same picture"
