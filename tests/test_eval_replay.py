"""Teacher-forced replay: what drawing gave, whatever the rule."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from inprocess import Engine, in_process  # noqa: F401
from vllm import SamplingParams

from vllm_kvcompress.eval.likelihood import Likelihood, Trial, replay_batches
from vllm_kvcompress.eval.online import OnlineRule
from vllm_kvcompress.eval.online_drawing import kvcompress_draw_online
from vllm_kvcompress.eval.scores import SCORES
from vllm_kvcompress.policy import PRESETS

SMALL = {"max_model_len": 128, "dtype": "float32"}
TEXTS = ("a red bird by the sea", "boats", "an old clock at night, in the rain")


def drawn(engine: Engine) -> tuple[list[tuple[list[int], list[int]]], list[float]]:
    """(prompt, codes) of pictures drawn without guidance, and their negative log-likelihood as drawn."""
    params = [
        SamplingParams(temperature=1.0, seed=seed, logprobs=0, extra_args={"guidance_scale": 1.0})
        for seed in range(len(TEXTS))
    ]
    prompts = [engine.prompt(text) for text in TEXTS]
    scenes, nll = [], []
    for prompt, out in zip(prompts, engine.outputs(prompts, params), strict=True):
        tokens = list(out.outputs[0].token_ids)
        scenes.append((prompt, [engine.image.code(token) for token in tokens]))
        steps = out.outputs[0].logprobs
        nll.append(-np.mean([step[t].logprob for step, t in zip(steps, tokens, strict=True)]))
    return scenes, nll


def replayed(engine: Engine, scenes: Sequence, trials: dict[str, Trial], batch: int) -> dict[str, Likelihood]:
    found = {name: Likelihood() for name in trials}
    for _, part in replay_batches(engine.llm, scenes, trials, 5.0, batch):
        for name, one in part.items():
            found[name].extend(one)
    return found


@pytest.mark.parametrize("preset", [name for name, preset in PRESETS.items() if preset.evicts])
def test_replay_gives_what_drawing_gave(checkpoints: dict[str, Path], preset: str) -> None:
    section = {"preset": preset, "budget": 0.5}
    engine = Engine.get(checkpoints["gqa-hf"], kvcompress=section, **SMALL)
    scenes, nll = drawn(engine)
    trials = {
        "paged": Trial(section),
        "torch": Trial(section | {"kernels": "torch"}),
        "dense": Trial(section, score="sum"),
        "other": Trial({"preset": "full"}),
    }
    found = replayed(engine, scenes, trials, batch=2)
    for name in ("paged", "torch", "dense"):
        np.testing.assert_allclose(found[name].nll, nll, atol=2e-5, err_msg=name)
    np.testing.assert_allclose(found["dense"].error, found["paged"].error, rtol=1e-3)
    assert np.abs(np.subtract(found["other"].nll, nll)).max() > 1e-4, "eviction makes no difference here"
    assert max(found["other"].kl) < 1e-6 < min(found["paged"].kl) < min(found["paged"].kl_guided)
    assert np.max(found["other"].error) < 1e-5 < np.max(found["paged"].error)
    assert found["paged"].resident == pytest.approx(0.5 * 64, abs=2)


def test_every_score_and_per_layer_victims(checkpoints: dict[str, Path]) -> None:
    section = {"preset": "line_ar", "budget": 0.5}
    engine = Engine.get(checkpoints["gqa-hf"], kvcompress=section, **SMALL)
    scenes, _ = drawn(engine)
    trials = {name: Trial(section, score=name) for name in SCORES}
    trials["per layer"] = Trial(section, per_layer=True)
    found = replayed(engine, scenes, trials, batch=3)
    assert all(min(one.kl) > 1e-6 for one in found.values())
    assert len({tuple(one.kl) for one in found.values()}) == len(trials), "each rule evicts its own tokens"


def test_impossible_policies_are_refused_by_name(checkpoints: dict[str, Path]) -> None:
    engine = Engine.get(checkpoints["gqa-hf"], kvcompress={"preset": "line_ar", "budget": 0.5}, **SMALL)
    scenes, nll = drawn(engine)
    trials = {"small": Trial({"preset": "line_ar", "budget": 0.01}), "fits": Trial({"preset": "full"})}
    found = replayed(engine, scenes, trials, batch=3)
    assert found["small"].refused.startswith("budget:")
    assert not found["small"].nll
    assert len(found["fits"].nll) == len(nll)


EQUAL = OnlineRule(lines=9, ring=False)
"""Everybody has the mean."""


@pytest.mark.parametrize("preset", ["full", "line_ar"])
@pytest.mark.parametrize(("guidance", "temperature"), [(5.0, 1.0), (1.0, 0.7)])
def test_the_dense_loop_draws_what_is_served(
    checkpoints: dict[str, Path], preset: str, guidance: float, temperature: float
) -> None:
    """Ids and all: the same noise at the same places, prompts of unlike length beside one another."""
    section = {"preset": preset, "budget": 0.5}
    engine = Engine.get(checkpoints["gqa-hf"], kvcompress=section, **SMALL)
    seeds = [7, 8, 9]
    params = [
        SamplingParams(temperature=temperature, seed=seed, extra_args={"guidance_scale": guidance})
        for seed in seeds
    ]
    prompts = [engine.prompt(text) for text in TEXTS]
    assert len({len(prompt) for prompt in prompts}) > 1
    served = engine.draw(prompts, params)
    trial = Trial(section, online=EQUAL if preset == "line_ar" else None)
    [drawn] = engine.llm.collective_rpc(
        kvcompress_draw_online, args=(prompts, trial, seeds, guidance, temperature)
    )
    assert drawn == served
    if preset == "line_ar":
        other = Trial(section, online=OnlineRule(early=2, near=1, lines=1))
        [apart] = engine.llm.collective_rpc(
            kvcompress_draw_online, args=(prompts, other, seeds, guidance, temperature)
        )
        early = 2 * engine.image.raster.width
        assert [ids[:early] for ids in apart] == [ids[:early] for ids in served]
        assert apart != served


def test_budgets_of_the_first_lines(checkpoints: dict[str, Path]) -> None:
    section = {"preset": "line_ar", "budget": 0.5}
    engine = Engine.get(checkpoints["gqa-hf"], kvcompress=section, **SMALL)
    scenes, nll = drawn(engine)
    online = OnlineRule(early=2, near=1, lines=1)
    trials = {
        "line_ar": Trial(section, score="sum"),
        "equal": Trial(section, online=EQUAL),
        "unequal": Trial(section, online=online),
        "whole": Trial({"preset": "line_ar", "budget": 1.0}, online=online),
        "small": Trial({"preset": "line_ar", "budget": 0.01}, online=online),
    }
    found = replayed(engine, scenes, trials, batch=2)
    np.testing.assert_allclose(found["equal"].nll, nll, atol=2e-5)
    np.testing.assert_allclose(found["equal"].kl_guided, found["line_ar"].kl_guided, atol=1e-7)
    assert found["unequal"].resident == pytest.approx(found["line_ar"].resident, abs=1)
    assert np.abs(np.subtract(found["unequal"].nll, nll)).max() > 1e-4
    assert max(found["whole"].kl) < 1e-6
    assert found["small"].refused.startswith("budget:")
