"""Requests that come past vLLM's Python front end: the engine itself refuses them, and goes on."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from inprocess import Engine, in_process  # noqa: F401
from vllm import SamplingParams
from vllm.sampling_params import RepetitionDetectionParams
from vllm.v1.engine import EngineCoreRequest, FinishReason

TOKENS = 64


@pytest.fixture(scope="module", params=["kvcompress", None], ids=["compressed", "full"])
def engine(checkpoints: dict[str, Path], request: pytest.FixtureRequest) -> Iterator[Engine]:
    section = {"preset": "line_ar", "budget": 0.3, "limits": {"prompt_tokens": 40, "pictures": 2}}
    settings: dict[str, Any] = {"max_model_len": 160, "kv_cache_memory_bytes": 4 << 20}
    if request.param is None:
        settings["additional_config"] = {"kvcompress": {"limits": section["limits"]}}
    else:
        settings["kvcompress"] = section
    return Engine.get(checkpoints["gqa-hf"], request.param, **settings)


def asked(prompt: list[int] | None, embeds: torch.Tensor | None = None, **fields: Any) -> EngineCoreRequest:
    """As a front end that checks nothing would send it."""
    fields.setdefault("max_tokens", TOKENS)
    return EngineCoreRequest(
        request_id=f"r{len(sent)}",
        prompt_token_ids=prompt,
        mm_features=None,
        sampling_params=SamplingParams(ignore_eos=True, **fields),
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
        prompt_embeds=embeds,
    )


sent: list[EngineCoreRequest] = []


def ended(engine: Engine, *requests: EngineCoreRequest) -> dict[str, tuple[FinishReason, int]]:
    """How each ended, and after how many tokens."""
    core, tokens, reasons = engine.core, {one.request_id: 0 for one in requests}, {}
    for request in requests:
        core.add_request(*core.preprocess_add_request(request))
    while core.scheduler.has_requests() or core.batch_queue:
        for outputs in (core.step_fn()[0] or {}).values():
            for output in outputs.outputs:
                tokens[output.request_id] += len(output.new_token_ids)
                if output.finish_reason is not None:
                    assert output.request_id not in reasons
                    reasons[output.request_id] = output.finish_reason
    assert set(reasons) == set(tokens)
    return {name: (reasons[name], tokens[name]) for name in tokens}


def new(*args: Any, **fields: Any) -> EngineCoreRequest:
    sent.append(asked(*args, **fields))
    return sent[-1]


def test_what_no_front_end_has_looked_at(engine: Engine) -> None:
    free = engine.free
    good, image = engine.prompt("a red bird"), engine.image.text_vocab
    repeats = RepetitionDetectionParams(max_pattern_size=2, min_pattern_size=1, min_count=2)
    bad = [
        new(good, max_tokens=1, logprobs=2),
        new(good, repetition_detection=repeats),
        new(good, extra_args={"guidance_scale": "high"}),
        new(good, extra_args={"negative_prompt_token_ids": [1, 2]}),
        new([*good[:-1], image, engine.image.boi]),
        new([1, *([50] * 60), engine.image.boi]),
        new(good, n=3),
        new([*good, *([image] * TOKENS)]),
        new(good, stop_token_ids=list(range(image, image + 200))),
        new([1, 50, engine.image.vocab]),
        new([1, -5, 50]),
    ]
    fine = [new(good, seed=1), new(good, seed=1, max_tokens=16), new(good, seed=1, max_tokens=10**6)]
    told = ended(engine, *bad[:4], fine[0], *bad[4:], *fine[1:])
    for request in bad:
        assert told[request.request_id] == (FinishReason.ERROR, 0), request.sampling_params
    for request in fine:
        assert told[request.request_id] == (FinishReason.LENGTH, TOKENS)
    assert_as_before(engine, free)


def assert_as_before(engine: Engine, free: int) -> None:
    assert engine.free == free
    assert not engine.scheduler.requests
    assert not engine.scheduler._prefixes
    assert not engine.scheduler._texts


CONTEXT = 100


@pytest.fixture(scope="module", params=["kvcompress", None], ids=["compressed", "full"])
def short(checkpoints: dict[str, Path], request: pytest.FixtureRequest) -> Engine:
    """Whose context is shorter than what its pool holds, and than prompts that the limits let in."""
    section = {"kvcompress": {"preset": "line_ar", "budget": 0.3}} if request.param else {}
    return Engine.get(checkpoints["gqa-hf"], request.param, max_model_len=CONTEXT, **section)


def test_what_is_longer_than_the_context(short: Engine) -> None:
    """vLLM's own front end refuses it: a token is drawn after any prompt, also where it is only scored."""
    free, image = short.free, short.image.text_vocab
    pool = short.llm.llm_engine.vllm_config.cache_config.kv_cache_size_tokens
    if short.section:
        assert pool is not None
        assert pool > 4 * CONTEXT

    def text(length: int, **fields: Any) -> EngineCoreRequest:
        return new([1, *([50] * (length - 1))], **fields)

    def scored(length: int) -> EngineCoreRequest:
        prompt = [1, *([50] * (length - TOKENS - 2)), short.image.boi]
        return new([*prompt, *([image] * TOKENS)], prompt_logprobs=0)

    bad = [
        new([]), text(CONTEXT), text(CONTEXT + 1, max_tokens=1), text(4 * CONTEXT), text(50 * CONTEXT),
        text(CONTEXT + 1, prompt_logprobs=0), scored(CONTEXT), scored(CONTEXT + 1), scored(2 * CONTEXT),
    ]  # fmt: skip
    fine = [
        text(CONTEXT - 1), text(CONTEXT - 1, max_tokens=10**6), scored(CONTEXT - 1),
        text(3, max_tokens=10**6),  # which the context ends
    ]  # fmt: skip
    told = ended(short, *bad[:3], *fine, *bad[3:])
    for request in bad:
        assert told[request.request_id] == (FinishReason.ERROR, 0), len(request.prompt_token_ids or ())
    for request in fine:
        drawn = CONTEXT - len(request.prompt_token_ids or ())
        assert told[request.request_id] == (FinishReason.LENGTH, drawn)
    assert_as_before(short, free)


def test_a_text_that_the_pool_can_not_hold(checkpoints: dict[str, Path]) -> None:
    """It would wait for ever, and whoever comes after it."""
    section = {"preset": "line_ar", "budget": 0.3, "limits": {"prompt_tokens": 40}}
    settings: dict[str, Any] = {"max_model_len": 2000, "kv_cache_memory_bytes": 1 << 20}
    tight = Engine.get(checkpoints["gqa-hf"], kvcompress=section, **settings)
    room = tight.llm.llm_engine.vllm_config.cache_config.kv_cache_size_tokens
    assert room is not None
    assert 3 < room < 2000
    free, bad = tight.free, [new([1, 50, 51], max_tokens=room - 2), new([1, 50, 51], max_tokens=10**6)]
    fine = new([1, 50, 51], max_tokens=4)
    told = ended(tight, *bad, fine)
    assert [told[request.request_id] for request in bad] == [(FinishReason.ERROR, 0)] * 2
    assert told[fine.request_id] == (FinishReason.LENGTH, 4)
    assert_as_before(tight, free)


def test_embeddings_are_refused(engine: Engine) -> None:
    embeds = torch.zeros(4, 128)
    told = ended(engine, new(None, embeds), new(engine.prompt("a bird"), seed=2))
    assert sorted(told.values()) == sorted([(FinishReason.ERROR, 0), (FinishReason.LENGTH, TOKENS)])
