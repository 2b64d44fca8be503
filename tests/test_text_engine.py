"""Text on a compressed cache: what the full cache answers, word for word, with pictures beside it."""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from inprocess import KERNELS, Engine, in_process  # noqa: F401
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

from vllm_kvcompress.scheduler import REPORT

CONTEXT = 160
SETTINGS: dict[str, Any] = {"max_model_len": CONTEXT, "kv_cache_memory_bytes": 12 << 20}
SECTION = {"preset": "decoupled", "budget": 0.3}
PICTURES = ["a red bird", "two boats by the sea", "an old clock at night, in the rain", "grass"]


def greedy(count: int = 60, **more: Any) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, **more)


def seeded(seed: int, count: int = 60, **more: Any) -> SamplingParams:
    return SamplingParams(temperature=1.0, seed=seed, max_tokens=count, ignore_eos=True, **more)


def words(engine: Engine, count: int, first: int = 0) -> list[int]:
    """A text prompt of ``count`` ids."""
    ids = range(first, first + count - 1)
    return [engine.image.bos, *(100 + 7 * n % (engine.image.text_vocab - 100) for n in ids)]


@pytest.fixture(scope="module", params=["tiny-hf", "gqa-hf"])
def model(checkpoints: dict[str, Path], request: pytest.FixtureRequest) -> Path:
    return checkpoints[request.param]


@pytest.fixture(scope="module")
def full(model: Path) -> Engine:
    return Engine.get(model, None, **SETTINGS)


@pytest.fixture(scope="module")
def engine(model: Path) -> Engine:
    return Engine.get(model, kvcompress=SECTION, **SETTINGS)


def asked(engine: Engine) -> tuple[list[list[int]], list[SamplingParams]]:
    """Texts and pictures in turns; the pictures' lines end and rings wrap while text is written."""
    texts = [words(engine, n, n) for n in (1, 2, 9, 40, 70, 100)]
    how = [greedy(), seeded(1), seeded(2, top_k=30), greedy(), seeded(3, top_p=0.8), greedy(CONTEXT - 100)]
    pictures = [engine.prompt(text) for text in PICTURES]
    scaled = [SamplingParams(seed=n, extra_args={"guidance_scale": n}) for n in (2, 3, 4)]
    drawn = [SamplingParams(temperature=0.0), *scaled]
    prompts, params = [], []
    for n, (prompt, one) in enumerate(zip(texts, how, strict=True)):
        prompts.append(prompt)
        params.append(one)
        if n < len(pictures):
            prompts.append(pictures[n])
            params.append(drawn[n])
    return prompts, params


@pytest.fixture(scope="module")
def wanted(full: Engine) -> list[list[int]]:
    """What the full cache answers, all at once."""
    return full.draw(*asked(full))


def is_text(engine: Engine, prompt: list[int]) -> bool:
    return prompt[-1] != engine.image.boi


def assert_as_wanted(engine: Engine, drawn: list[list[int]], wanted: list[list[int]]) -> None:
    prompts, params = asked(engine)
    for prompt, one, mine, theirs in zip(prompts, params, drawn, wanted, strict=True):
        if is_text(engine, prompt):
            assert len(mine) == one.max_tokens
            assert mine == theirs
        else:
            assert len(mine) == engine.image.raster.tokens


@pytest.fixture(scope="module")
def pictures(engine: Engine) -> list[list[int]]:
    """The pictures of `asked` without any text beside them."""
    prompts, params = asked(engine)
    alone = [(p, one) for p, one in zip(prompts, params, strict=True) if not is_text(engine, p)]
    return engine.draw(*map(list, zip(*alone, strict=True)))


@pytest.mark.parametrize("kernel", KERNELS)
def test_text_is_the_full_caches_and_pictures_are_what_they_were(
    model: Path, wanted: list[list[int]], pictures: list[list[int]], kernel: str
) -> None:
    section = SECTION if kernel == "cpu" else SECTION | {"kernels": kernel}
    engine = Engine.get(model, kvcompress=section, **SETTINGS)
    free = engine.free
    prompts, params = asked(engine)
    drawn = engine.draw(prompts, params)
    assert_as_wanted(engine, drawn, wanted)
    assert [row for row, p in zip(drawn, prompts, strict=True) if not is_text(engine, p)] == pictures
    assert pictures != [row for row, p in zip(wanted, prompts, strict=True) if not is_text(engine, p)], (
        "evicted"
    )
    assert len({tuple(row[-20:]) for row in drawn}) == len(drawn), "each of them its own"
    assert engine.free == free


@pytest.mark.parametrize("tokens", [16, 40])
def test_prompts_in_chunks(
    model: Path, wanted: list[list[int]], pictures: list[list[int]], tokens: int
) -> None:
    """Prompts longer than a step has room for, cut anywhere, while others write and draw."""
    chunked = Engine.get(model, kvcompress=SECTION, **SETTINGS, max_num_batched_tokens=tokens)
    drawn = chunked.draw(*asked(chunked))
    assert_as_wanted(chunked, drawn, wanted)
    assert [
        row for row, p in zip(drawn, asked(chunked)[0], strict=True) if not is_text(chunked, p)
    ] == pictures


def test_a_text_alone_is_the_one_in_company(engine: Engine, wanted: list[list[int]]) -> None:
    prompts, params = asked(engine)
    for row in (0, 4, 9):
        assert engine.draw([prompts[row]], [params[row]]) == [wanted[row]]


def test_what_is_told_of_a_text(engine: Engine, full: Engine) -> None:
    """Log-probabilities, those of the prompt too, stop strings, the reason of the end, and what was held."""
    how = [
        greedy(20, logprobs=3, prompt_logprobs=2),
        SamplingParams(seed=5, max_tokens=80, stop=["e", "a"]),
        SamplingParams(seed=6, temperature=2.0, max_tokens=80, stop_token_ids=[*range(0, 300, 2)]),
        SamplingParams(seed=7, n=2, max_tokens=12, presence_penalty=1.5, logit_bias={60: 4.0}),
    ]
    prompts = [words(engine, n, n) for n in (30, 5, 6, 7)]
    for mine, theirs in zip(engine.outputs(prompts, how), full.outputs(prompts, how), strict=True):
        for ours, other in zip(mine.outputs, theirs.outputs, strict=True):
            assert ours.token_ids == other.token_ids
            assert (ours.text, ours.finish_reason, ours.stop_reason) == (
                other.text, other.finish_reason, other.stop_reason
            )  # fmt: skip
            assert_close(ours.logprobs, other.logprobs)
        assert_close(mine.prompt_logprobs, theirs.prompt_logprobs)
        assert mine.kv_transfer_params is theirs.kv_transfer_params is None, "reports are of pictures"
    assert {out.outputs[0].finish_reason for out in engine.outputs(prompts[1:3], how[1:3])} == {"stop"}


def assert_close(mine: Any, theirs: Any) -> None:
    """Log-probabilities of tokens, position by position."""
    assert bool(mine) == bool(theirs)
    for ours, other in zip(mine or (), theirs or (), strict=True):
        assert (ours is None) == (other is None)
        if ours is not None:
            assert set(ours) == set(other)
            for token in ours:
                assert ours[token].logprob == pytest.approx(other[token].logprob, abs=1e-4)


def test_aborted_and_restarted_texts(engine: Engine, wanted: list[list[int]]) -> None:
    free = engine.free
    prompts, params = asked(engine)
    for n in range(30):  # some of them wait
        engine.add(f"gone-{n}", prompts[n % len(prompts)], params[n % len(prompts)])
    engine.steps(15)
    engine.llm.llm_engine.abort_request([f"gone-{n}" for n in range(0, 30, 2)])
    engine.steps(3)
    engine.llm.llm_engine.abort_request([f"gone-{n}" for n in range(1, 30, 2)])
    assert not engine.steps()
    assert engine.free == free
    assert not engine.scheduler._texts
    for n, prompt in enumerate(prompts):
        engine.add(f"again-{n}", prompt, params[n])
    done = engine.steps(17)
    engine.core.reset_prefix_cache(reset_running_requests=True)  # all give their blocks back and begin anew
    assert engine.free == free
    done |= engine.steps()
    by_name = {int(name.split(":")[0].split("-")[1]): out for name, out in done.items()}
    assert_as_wanted(
        engine, [list(by_name[n].outputs[0].token_ids) for n in range(len(prompts))], wanted
    )  # fmt: skip
    assert engine.free == free


def small(model: Path, engine: Engine, tokens: int) -> Engine:
    """An engine whose pool just holds a text of so many tokens."""
    specs = [group.kv_cache_spec for group in engine.scheduler.kv_cache_config.kv_cache_groups]
    blocks = 1 + sum(spec.blocks_for_text(tokens) for spec in specs)
    size = {**SETTINGS, "kv_cache_memory_bytes": blocks * specs[0].page_size_bytes}
    return Engine.get(model, kvcompress=SECTION, **size)


def test_a_full_pool_queues_and_nothing_that_runs_is_preempted(
    model: Path, engine: Engine, wanted: list[list[int]], pictures: list[list[int]]
) -> None:
    full = small(model, engine, CONTEXT)
    preempted: list[str] = []
    full.scheduler._preempt_request = lambda request, *args, **kwargs: preempted.append(request.request_id)
    free, most, fewest = full.free, 0, full.free
    prompts, params = asked(full)
    for n, prompt in enumerate(prompts):
        full.add(str(n), prompt, params[n])
    done = {}
    while full.llm.llm_engine.has_unfinished_requests():
        done |= full.steps(1)
        most, fewest = max(most, len(full.scheduler.running)), min(fewest, full.free)
    drawn = {int(name.split(":")[0]): list(out.outputs[0].token_ids) for name, out in done.items()}
    assert_as_wanted(full, [drawn[n] for n in range(len(prompts))], wanted)
    assert [drawn[n] for n, p in enumerate(prompts) if not is_text(full, p)] == pictures
    assert 2 <= most < len(prompts), "some had to wait"
    assert fewest < free // 2
    assert not preempted
    assert full.free == free


def test_a_text_that_never_fits_is_refused(model: Path, engine: Engine) -> None:
    tight = small(model, engine, 120)
    room = tight.llm.llm_engine.vllm_config.cache_config.kv_cache_size_tokens
    assert 120 <= room < CONTEXT
    [longest] = tight.outputs([words(tight, 30)], greedy(room - 30))
    assert len(longest.outputs[0].token_ids) == room - 30
    with pytest.raises(
        VLLMValidationError, match=f"set max_tokens to {room - 30} or less, or give the cache more"
    ):
        tight.outputs([words(tight, 30)], greedy(room - 29))
    with pytest.raises(VLLMValidationError, match=f"holds {room} tokens of a text request"):
        tight.outputs([words(tight, 30)], SamplingParams(max_tokens=None))
    with pytest.raises(VLLMValidationError, match="shorten it, or give the cache more memory"):
        tight.outputs([words(tight, room)], greedy(1))
    assert tight.draw([tight.prompt("grass")], SamplingParams(temperature=0.0))
    assert engine.llm.llm_engine.vllm_config.cache_config.kv_cache_size_tokens >= CONTEXT


def test_windows_are_what_they_were(
    model: Path, engine: Engine, wanted: list[list[int]], pictures: list[list[int]]
) -> None:
    """Drafts of the pictures beside texts; texts take one token a step."""
    windowed = Engine.get(model, kvcompress=SECTION | {"window": 8}, **SETTINGS)
    prompts, params = asked(windowed)
    freed, free = [], windowed.scheduler._free_request

    def free_counted(request: Any, *args: Any) -> Any:
        freed.append((request, windowed.scheduler._steps[request.request_id]))
        return free(request, *args)

    with mock.patch.object(windowed.scheduler, "_free_request", free_counted):
        outs = windowed.outputs(prompts, params)
    assert len(freed) == len(prompts)
    drawn = [list(out.outputs[0].token_ids) for out in outs]
    assert_as_wanted(windowed, drawn, wanted)
    assert [row for row, p in zip(drawn, prompts, strict=True) if not is_text(windowed, p)] == pictures
    assert [is_text(windowed, p) for p in prompts] == [out.kv_transfer_params is None for out in outs]
    alone = [n for n, prompt in enumerate(prompts) if not is_text(windowed, prompt)]
    again = windowed.outputs([prompts[n] for n in alone], [params[n] for n in alone])
    steps = [out.kv_transfer_params[REPORT]["steps"] for out in again]
    assert steps == [outs[n].kv_transfer_params[REPORT]["steps"] for n in alone]
    assert min(steps) < windowed.image.raster.tokens
    for request, taken in freed:
        if is_text(windowed, request.prompt_token_ids):
            assert taken == request.num_output_tokens
