"""Engines in a process of their own, for tests that compare engines started differently.

``python tests/engine_process.py JOB.json`` reads a job and writes what was drawn to the job's ``out``;
``EngineProcess`` does that from a test, and ``run_here`` runs a job in the test's own process. Requests enter
at given steps of the engine, so that batches are the same in every run.
"""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any
from unittest import mock

import preloaded
from interpreter import settle
from replaced_drafts import replaced

HERE = Path(__file__).parent
LIMIT_S = 580
# One thread wherever there is room: processes that run at once must not be bound to the same core.
# Ranks are forked (interpreter.fork_if_asked), whatever an engine in the test's own process has set.
_ALONE = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1", "VLLM_WORKER_MULTIPROC_METHOD": "fork"
}  # fmt: skip
V1 = {**_ALONE, "VLLM_USE_V2_MODEL_RUNNER": "0"}
# vLLM's V2 model runner on the CPU, its Triton kernels in Triton's interpreter.
V2 = {
    **_ALONE,
    "VLLM_USE_V2_MODEL_RUNNER": "1",
    "TRITON_INTERPRET": "1",
    "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE / "triton_cpu"), os.environ.get("PYTHONPATH")])),
}


class EngineProcess:
    """A process that starts engines one after another and draws with them.

    Parameters
    ----------
    folder : Path
        For the job, its answer and its log.
    env : mapping
        Environment variables beside this process's own.
    engines : sequence of mapping
        Each: ``name``; ``args`` of ``vllm.LLM``; ``waves``, lists of requests, each wave drawn to its end
        before the next; ``preempt``, steps of a wave at which all running requests lose their blocks;
        ``look``, steps before which is asked what is kept; ``drafts``, for each wave what
        `replaced_drafts.replaced` takes, its truth being what the same prompts drew before; ``as_ranks``, the
        number of ranks that one process plans its heads for; ``ahead``, whether the V2 runner's next step is
        scheduled before the last one's tokens are known, as on GPUs. A request: ``ids`` (prompt), ``params``
        (of ``SamplingParams``), ``at`` (step of the wave at which it enters, default 0), ``abort`` (step at
        which it is given up, default never), ``photos`` (width and height of pictures of noise in a prompt).
    script : str
        What the process runs, beside this file.
    """

    def __init__(
        self,
        folder: Path,
        env: Mapping[str, str],
        engines: Sequence[Mapping[str, Any]],
        script: str = Path(__file__).name,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._out, self._log = folder / "out.json", folder / "log.txt"
        job = folder / "job.json"
        job.write_text(json.dumps({"engines": list(engines), "out": str(self._out)}))
        with self._log.open("wb") as stream:
            self._process = preloaded.Popen(
                [sys.executable, str(HERE / script), str(job)],
                stdout=stream, env={**os.environ, **env},
            )  # fmt: skip

    def finish(self) -> dict[str, dict[str, Any]]:
        """Wait for the answer.

        Returns
        -------
        dict
            By engine: ``waves``, for each a list of token ids per request (None if given up); ``runner``,
            the module of its model runner; ``preempted``, how often a request lost its blocks; ``ahead``,
            whether steps were scheduled ahead; ``held``, for each wave what its requests' ends reported;
            ``seen``, for each wave, see `draw`.
        """
        try:
            code = self._process.wait(LIMIT_S)
        finally:
            self._process.kill()
        if code:
            tail = "\n".join(self.log.splitlines()[-40:])
            raise AssertionError(f"the engines' process ended with {code}:\n{tail}")
        return json.loads(self._out.read_text())

    @property
    def log(self) -> str:
        """What the process has printed."""
        return self._log.read_text(errors="replace")


def draw(
    engine: Any,
    requests: Sequence[Mapping[str, Any]],
    wave: int,
    preempt: Sequence[int] = (),
    held: list[Any] | None = None,
    look: Sequence[int] = (),
    seen: list[Any] | None = None,
) -> list[list[int] | None]:
    """Feed the requests to a running engine, step it until all are done.

    ``held`` gets their reports; ``seen``, before the steps of ``look``, how many tokens of each picture have
    come out, and what the cache says it keeps of it.
    """
    from vllm import SamplingParams

    drawn: dict[str, list[int]] = {}
    reports: dict[str, Any] = {}
    names = [f"{wave}-{number}" for number in range(len(requests))]
    step, entered, out = 0, set(), dict.fromkeys(names, 0)
    while len(entered) < len(requests) or engine.has_unfinished_requests():
        if step in preempt:
            engine.engine_core.engine_core.reset_prefix_cache(reset_running_requests=True)
        if seen is not None and step in look:
            pictures = [
                (name, len(request["ids"]))
                for name, request in zip(names, requests, strict=True)
                if "max_tokens" not in request["params"]
            ]
            kept = [engine.collective_rpc("kvcompress_kept", args=args)[0] for args in pictures]
            seen.append([(out[name], one) for (name, _), one in zip(pictures, kept, strict=True)])
        for name, request in zip(names, requests, strict=True):
            if name not in entered and request.get("at", 0) <= step:
                entered.add(name)
                params = SamplingParams(detokenize=False, **request["params"])
                prompt: dict[str, Any] = {"prompt_token_ids": request["ids"]}
                if "photos" in request:
                    prompt["multi_modal_data"] = {"image": [_photo(*size) for size in request["photos"]]}
                engine.add_request(name, prompt, params)
            if request.get("abort") == step:
                engine.abort_request([name])
        for output in engine.step():
            out[output.request_id] = len(output.outputs[0].token_ids)
            if output.finished:
                drawn[output.request_id] = list(output.outputs[0].token_ids)
                reports[output.request_id] = output.kv_transfer_params
        step += 1
    if held is not None:
        held.append([reports.get(name) for name in names])
    return [drawn.get(name) for name in names]


def _photo(width: int, height: int) -> Any:
    import numpy as np
    from PIL import Image

    noise = np.random.default_rng(width * height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def run(engines: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """All engines of a job, in this process."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    answers = {}
    for job in engines:
        held: list[Any] = []
        seen: list[list[Any]] = []
        with _planned_for(job.get("as_ranks")), _ahead(job.get("ahead", False)):
            engine = LLM(**job["args"]).llm_engine
        scheduler = engine.engine_core.engine_core.scheduler
        preempted = _count(scheduler, "_preempt_request")
        waves: list[list[list[int] | None]] = []
        truth: dict[tuple[int, ...], list[int]] = {}
        for wave, (requests, how) in enumerate(zip_longest(job["waves"], job.get("drafts", ()))):
            seen.append([])
            with replaced(how, truth):
                waves.append(
                    draw(engine, requests, wave, job.get("preempt", ()), held, job.get("look", ()), seen[-1])
                )
            truth |= {
                tuple(asked["ids"]): tokens
                for asked, tokens in zip(requests, waves[-1], strict=True)
                if tokens is not None
            }
        answers[job["name"]] = {
            "waves": waves,
            "runner": engine.collective_rpc(_runner)[0],
            "preempted": len(preempted),
            "ahead": engine.engine_core.engine_core.batch_queue is not None,
            "held": held,
            "seen": seen,
        }
        engine.engine_core.shutdown()
        del engine, scheduler
        cleanup_dist_env_and_memory()
    return answers


def run_here(engines: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The same on the V1 runner, in the tests' own process, which has imported vLLM already.

    Modules that use it import ``inprocess.in_process``.
    """
    with mock.patch.dict(os.environ, V1), mock.patch("gc.collect", return_value=0):
        answers: dict[str, dict[str, Any]] = json.loads(json.dumps(run(engines)))  # as from a process
        return answers


def _planned_for(ranks: int | None) -> Any:
    """While engines start: head types as that many ranks would have them."""
    from vllm_kvcompress.models import compression

    assign = compression.assign if ranks is None else lambda *args: original(*args[:-1], ranks)
    original = compression.assign
    return mock.patch.object(compression, "assign", assign)


def _ahead(asked: bool) -> Any:
    """While engines start: asynchronous scheduling, which vLLM has on GPUs; on CPUs it takes it away."""
    from vllm.platforms.cpu import CpuPlatform

    original = CpuPlatform.check_and_update_config.__func__  # type: ignore[attr-defined]

    def checked(cls: Any, vllm_config: Any) -> None:
        original(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = asked and vllm_config.use_v2_model_runner

    return mock.patch.object(CpuPlatform, "check_and_update_config", classmethod(checked))


def _count(owner: Any, method: str) -> list[None]:
    """A list that grows with every call of ``owner.method``."""
    calls: list[None] = []
    original = getattr(owner, method)

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        return original(*args, **kwargs)

    setattr(owner, method, counted)
    return calls


def _runner(worker: Any) -> str:
    return type(worker.model_runner).__module__


if __name__ == "__main__":
    settle()
    given = json.loads(Path(sys.argv[1]).read_text())
    Path(given["out"]).write_text(json.dumps(run(given["engines"])))
