"""An engine that has died: the process ends, unless its operator wants to look at it."""

import asyncio
import threading
from types import SimpleNamespace

import pytest
from starlette.datastructures import State
from vllm import envs

from vllm_kvcompress.serving import alive


@pytest.mark.parametrize("keep", [False, True])
async def test_a_process_that_is_to_outlive_its_engine(keep: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    envs.disable_envs_cache()
    monkeypatch.setattr(alive, "LOOK_S", 0.001)
    monkeypatch.setenv("VLLM_KEEP_ALIVE_ON_ENGINE_DEATH", str(int(keep)))
    manager = SimpleNamespace(failed_proc_name=None, manager_stopped=threading.Event())
    core = SimpleNamespace(resources=SimpleNamespace(engine_manager=manager, output_queue_task=None))
    watch = alive.EngineWatch(SimpleNamespace(engine_core=core), State())  # type: ignore[arg-type]
    ended: list[bool] = []

    async def answers_have_left() -> None:  # and then the process ends
        ended.append(True)
        await asyncio.Event().wait()

    monkeypatch.setattr(watch, "_answers_have_left", answers_have_left)
    await asyncio.sleep(0.02)
    assert not ended
    manager.failed_proc_name = "EngineCore_0"
    await asyncio.sleep(0.05)
    assert bool(ended) != keep
    manager.failed_proc_name = None
    watch._task.cancel()
    await asyncio.gather(watch._task, return_exceptions=True)


async def test_a_crash_that_somebody_else_has_seen_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an engine that was told to end, which vLLM's own look at its process leaves out."""
    monkeypatch.setattr(alive, "LOOK_S", 0.001)
    manager = SimpleNamespace(failed_proc_name=None, manager_stopped=threading.Event())
    manager.manager_stopped.set()
    core = SimpleNamespace(resources=SimpleNamespace(engine_manager=manager, output_queue_task=None))
    watch = alive.EngineWatch(SimpleNamespace(engine_core=core), State())  # type: ignore[arg-type]
    ended = asyncio.Event()

    async def answers_have_left() -> None:
        ended.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(watch, "_answers_have_left", answers_have_left)
    await asyncio.to_thread(watch.crashed)
    watch._listener_ended(asyncio.get_running_loop().create_future())  # which is stopped with the engine
    await asyncio.wait_for(ended.wait(), 1)
    watch._said_so = False
    watch._task.cancel()
    await asyncio.gather(watch._task, return_exceptions=True)
