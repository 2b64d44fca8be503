"""Engines inside the test's own process: they start in about a second, and their insides are at hand."""

import gc
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from interpreter import inspect_here

KERNELS = ("torch", "cpu")
MEMORY = 8 << 20
SET_NUM_THREADS = torch.set_num_threads  # vLLM's CPU worker replaces it by one that does nothing
# vLLM collects garbage at every start and end, a second each time where many engines have run.
NO_COLLECTION = mock.patch("gc.collect", return_value=0)
SETTINGS: dict[str, Any] = {"dtype": "float32", "enforce_eager": True, "max_num_seqs": 16, "seed": 0}


@pytest.fixture(scope="module", autouse=True)
def in_process() -> Iterator[None]:
    """No engine processes in this module."""
    with engines_here():
        yield


@contextmanager
def engines_here() -> Iterator[None]:
    """No engine processes, one thread, and vLLM's view of the environment as it was."""
    from vllm import envs

    threads = torch.get_num_threads()
    inspect_here()
    inside = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    envs.disable_envs_cache()
    with mock.patch.dict(os.environ, inside):
        yield
    Engine.stop_all()
    gc.unfreeze()
    gc.collect()
    envs.disable_envs_cache()
    torch.set_num_threads = SET_NUM_THREADS
    torch.set_num_threads(threads)


class Engine:
    """An ``LLM`` with the engine core within reach."""

    started: dict[Any, "Engine"] = {}  # noqa: RUF012

    @classmethod
    def get(cls, model: Path, backend: str | None = "kvcompress", **settings: Any) -> "Engine":
        """An engine of these settings, started once a module; ``kvcompress`` holds its section."""
        key = repr((model, backend, sorted(settings.items())))
        if key not in cls.started:
            cls.started[key] = cls(model, backend, **settings)
        return cls.started[key]

    @classmethod
    def sized(
        cls, model: Path, backend: str | None = "kvcompress", batch: int = 256, **section: Any
    ) -> "Engine":
        """One of a model of several sizes, small pictures and a step of ``batch`` tokens; a step a token."""
        config = {"kvcompress": {"window": 1, **section}}
        return cls.get(
            model, backend, additional_config=config, max_model_len=256, max_num_batched_tokens=batch
        )

    @classmethod
    def stop_all(cls) -> None:
        """Stop every engine of the module."""
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        with NO_COLLECTION:
            for engine in cls.started.values():
                engine.core.model_executor.shutdown()
            cls.started.clear()
            cleanup_dist_env_and_memory()

    def __init__(self, model: Path, backend: str | None = "kvcompress", **settings: Any) -> None:
        from vllm import LLM

        from vllm_kvcompress.models.registry import image_model

        self.section = settings.pop("kvcompress", {})
        settings = {"kv_cache_memory_bytes": MEMORY, **SETTINGS, **settings}
        # One token a step unless a test wants windows: what it counts are steps.
        settings.setdefault("additional_config", {"kvcompress": {"window": 1, **self.section}})
        with NO_COLLECTION:
            self.llm = LLM(str(model), attention_backend=backend, **settings)
        torch.set_num_threads = SET_NUM_THREADS
        torch.set_num_threads(1)
        # One engine's end would take the process groups of all; they end together, in stop_all.
        self.llm.llm_engine.engine_core._finalizer.detach()
        self.image = image_model(self.llm.llm_engine.model_config)
        self._check_files()

    def _check_files(self) -> None:
        """What the files say of the weights before an engine starts is what was loaded, of every model."""
        from vllm_kvcompress.models.stored import stored_fingerprint

        served = self.llm.llm_engine.model_config
        if list(Path(served.model).glob("*.safetensors")):
            mark = stored_fingerprint(served.model, None, served.hf_config)
            assert mark == self.model.fingerprint, "checked before the start, and wrongly"

    @property
    def core(self) -> Any:
        """vLLM's EngineCore."""
        return self.llm.llm_engine.engine_core.engine_core

    @property
    def scheduler(self) -> Any:
        return self.core.scheduler

    @property
    def model(self) -> Any:
        """The served model."""
        return self.core.model_executor.driver_worker.worker.model_runner.get_model()

    @property
    def free(self) -> int:
        return self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()

    def prompt(self, text: str) -> list[int]:
        from vllm_kvcompress.models.registry import family_of

        family = family_of(self.llm.llm_engine.model_config.hf_config)
        return family.prompt_ids(self.llm.get_tokenizer(), self.image, text)

    def outputs(self, prompts: Sequence[Sequence[int]], params: Any) -> list[Any]:
        """Finished ``RequestOutput``s of prompts given as ids."""
        asked = [{"prompt_token_ids": list(ids)} for ids in prompts]
        return self.llm.generate(asked, params, use_tqdm=False)

    def draw(self, prompts: Sequence[Sequence[int]], params: Any) -> list[list[int]]:
        """Token ids drawn for each prompt."""
        return [list(out.outputs[0].token_ids) for out in self.outputs(prompts, params)]

    def add(self, name: str, prompt: Sequence[int], params: Any) -> None:
        self.llm.llm_engine.add_request(name, {"prompt_token_ids": list(prompt)}, params)

    def steps(self, limit: int | None = None) -> dict[str, Any]:
        """Step until nothing is left to do, or ``limit`` times; what finished, by name."""
        done, engine = {}, self.llm.llm_engine
        while engine.has_unfinished_requests() and limit != 0:
            done |= {out.request_id: out for out in engine.step() if out.finished}
            limit = None if limit is None else limit - 1
        return done


def evaluate_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``vllm-kvcompress eval`` use this module's engines; test_eval has its processes."""
    from vllm_kvcompress.eval import engine, pictures, run

    def start(model: str, section: dict[str, Any], *rest: Any) -> Any:
        size = rest[-1]
        config = {"kvcompress": {**section, **({"size": size} if size else {})}}
        length, _ = engine.sizes(model, size)
        using = Engine.get(Path(model), additional_config=config, max_model_len=length).llm
        monkeypatch.setattr(using.llm_engine.engine_core, "shutdown", lambda: None)
        return using

    for module in (run, pictures):
        monkeypatch.setattr(module, "start", start)
    monkeypatch.setattr(run, "in_process", lambda task, *args: task(*args))


def evaluation(folder: Path, out: Path, codes: Any, captions: Sequence[str], *more: str) -> list[str]:
    """A command's arguments: likelihoods of known pictures under ``full`` and ``line_ar``, no others drawn.

    ``codes`` ``[pictures, tokens]``, written beside ``out`` with their captions.
    """
    import numpy as np

    scenes = out.with_suffix(".npz")
    np.savez(scenes, captions=np.array(captions), codes=codes)
    return [
        "eval", str(folder), "-o", str(out), "--presets", "full,line_ar", "--budgets", "1,0.5",
        "--pictures", "0", "--scenes", str(len(captions)), "--scenes-file", str(scenes), "--dtype", "float32",
        *more,
    ]  # fmt: skip


def check_evaluation(done: Any, out: Path) -> None:
    """That such a command has ended well: what keeps all is the full cache, what does not is not."""
    assert done.exit_code == 0, done.output
    full, whole, half = json.loads((out / "results.json").read_text())
    assert max(map(abs, [*full["kl"], *whole["kl"]])) < 1e-6 < min(map(abs, half["kl"]))
    assert all(0 < nll < 20 for nll in full["nll"])
