"""300 pictures through a small pool, some of them aborted: in the end every block is back.

By hand: ``make soak``, or ``python -m pytest tests/soak/soak_pictures.py``. Not collected otherwise.
"""

import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from inprocess import Engine, in_process  # noqa: F401
from vllm import SamplingParams

from vllm_kvcompress.policy import PRESETS

PICTURES = 300


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("preset", PRESETS)
def test_soak(checkpoints: dict[str, Path], preset: str) -> None:
    rng = random.Random(0)
    engine = Engine(
        checkpoints["tiny-hf"],
        kvcompress={"preset": preset, "budget": 0.3},
        max_model_len=128,
        kv_cache_memory_bytes=1 << 20,
    )
    Engine.started[preset] = engine
    free, pool = engine.free, engine.scheduler.kv_cache_manager.block_pool
    words = ["red", "bird", "sea", "night", "lamp", "old", "clock", "grass"]
    waiting = [f"{preset}-{n}" for n in range(PICTURES)]
    unfinished: set[str] = set()
    finished, aborted, fewest = 0, 0, free
    while waiting or unfinished:
        while waiting and rng.random() < 0.3:
            name = waiting.pop()
            text = " ".join(rng.choices(words, k=rng.randint(1, 12)))
            params = SamplingParams(temperature=rng.choice([0.0, 1.0]), seed=rng.randrange(99))
            engine.add(name, engine.prompt(text), params)
            unfinished.add(name)
        if unfinished and rng.random() < 0.02:
            gone = rng.choice(sorted(unfinished))
            engine.llm.llm_engine.abort_request([gone])
            unfinished.remove(gone)
            aborted += 1
            waiting.append(f"{preset}-again-{aborted}")
        done = engine.steps(1)
        finished += len(done)
        assert all(len(out.outputs[0].token_ids) == 64 for out in done.values())
        unfinished -= set(done)
        fewest = min(fewest, engine.free)
        assert engine.free + sum(block.ref_cnt > 0 and not block.is_null for block in pool.blocks) == free
    engine.steps(3)
    assert finished == PICTURES
    assert aborted
    assert fewest < free
    assert engine.free == free
    assert not engine.scheduler._prefixes
    for manager in engine.scheduler.kv_cache_manager.coordinator.single_type_managers:
        assert not any(manager.req_to_blocks.values())
        assert not manager._prompt_tokens
    print(f"{preset}: {finished} pictures, {aborted} aborted, {fewest} of {free} blocks free at the fullest")
