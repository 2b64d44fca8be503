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
    if engine.section:
        bad.append(new([1, 50, 51], max_tokens=10**6))  # a text that no pool can hold
    fine = [new(good, seed=1), new(good, seed=1, max_tokens=16), new(good, seed=1, max_tokens=10**6)]
    told = ended(engine, *bad[:4], fine[0], *bad[4:], *fine[1:])
    for request in bad:
        assert told[request.request_id] == (FinishReason.ERROR, 0), request.sampling_params
    for request in fine:
        assert told[request.request_id] == (FinishReason.LENGTH, TOKENS)
    assert engine.free == free
    assert not engine.scheduler.requests
    assert not engine.scheduler._prefixes
    assert not engine.scheduler._texts


def test_embeddings_are_refused(engine: Engine) -> None:
    embeds = torch.zeros(4, 128)
    told = ended(engine, new(None, embeds), new(engine.prompt("a bird"), seed=2))
    assert sorted(told.values()) == sorted([(FinishReason.ERROR, 0), (FinishReason.LENGTH, TOKENS)])
