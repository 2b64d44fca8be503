"""What a full CUDA graph does to a decode step, without a GPU: the step's operations recorded, then replayed.

Run by tests/test_cuda_graphs.py, on the V2 runner in Triton's interpreter. A recording is made where vLLM
makes a graph, from its dummy batch; from then on a decode step runs no Python of the model, only the recorded
operations on the recorded tensors. Whatever a step decides on the host is frozen, as in a graph, and an
operation that needs the host's answer is an error while recording.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from interpreter import settle
from replaced_drafts import replaced
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SIZE = 4  # rows of the recorded batch: max_num_seqs, and more than run
WAITS = (
    "nonzero", "local_scalar_dense", "item", "masked_select", "equal", "is_nonzero", "unique2", "unique_dim",
    "unique_consecutive",
)  # fmt: skip


def waits(func: Any, args: Any) -> bool:
    """Whether an operation makes the host wait for the device: its result's size or value is needed."""
    name = func._schema.name.split("::")[-1].strip("_")
    indices = [] if "index" not in name else [x for x in tree_leaves(list(args[1:])) if torch.is_tensor(x)]
    return name in WAITS or any(x.dtype in (torch.bool, torch.uint8) for x in indices)


class NoWaiting(TorchDispatchMode):
    """Refuses operations that make the host wait, and remembers the others.

    Attributes
    ----------
    recorded : list of (function, args, kwargs, results)
    """

    def __init__(self) -> None:
        super().__init__()
        self.recorded: list[tuple[Any, Any, Any, list[Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if waits(func, args):
            raise AssertionError(f"{func} makes the host wait for the device in a decode step")
        result = func(*args, **(kwargs or {}))
        self.recorded.append((func, args, kwargs or {}, tree_leaves(result)))
        return result

    def replay(self) -> None:
        """Every operation again; a result lands where the recorded one lies."""
        for func, args, kwargs, results in self.recorded:
            for old, new in zip(results, tree_leaves(func(*args, **kwargs)), strict=True):
                if torch.is_tensor(old) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Recording:
    """A decode step of ``SIZE`` rows, recorded from vLLM's dummy batch as its CUDA graphs are.

    With windows every row has ``runner.decode_query_len`` places.
    """

    def __init__(self, runner: Any, config: Any) -> None:
        from vllm.forward_context import set_forward_context
        from vllm.v1.worker.gpu.cudagraph_utils import prepare_inputs_to_capture

        tokens = SIZE * runner.decode_query_len
        self.context = lambda: set_forward_context(state.attn_metadata, config, num_tokens=tokens)
        buffers, self.replays = runner.input_buffers, 0
        state = prepare_inputs_to_capture(
            SIZE, tokens, runner.model_state, buffers, runner.block_tables, runner.attn_groups,
            runner.kv_cache_config, full_cudagraph=True, max_query_len=runner.decode_query_len,
        )  # fmt: skip
        inputs = {"input_ids": buffers.input_ids[:tokens], "positions": buffers.positions[:tokens]}
        model = runner.model
        model._full_graphs = True
        self.mode = NoWaiting()
        with torch.inference_mode(), self.context(), self.mode:
            self.hidden = model(**inputs)

    def run(self, desc: Any) -> torch.Tensor:
        """In place of ``run_fullgraph``."""
        self.replays += 1
        with self.context():
            self.mode.replay()
        return self.hidden


def poison(runner: Any) -> torch.Tensor:
    """Fill the whole cache with bytes that are NaN in every float format; returns it."""
    model: Any = runner.model
    (kind,) = {id(t.pages.kv.untyped_storage()): t for t in model.compressed._all_layers.values()}.values()
    storage = torch.empty(0, dtype=torch.uint8).set_(kind.pages.kv.untyped_storage())
    return storage.fill_(0xFF)


def watch_host_side(runner: Any, steps: list[int]) -> list[int]:
    """From now on logits and plans of decode steps (``steps`` grows with each) must not wait either.

    Returns the widths of the logits of these steps, as a list that grows.
    """
    from vllm_kvcompress.attention.backend import StepPlanner

    model, widths, seen, places = runner.model, [], [0], runner.decode_query_len
    compute, build = model.compute_logits, StepPlanner.build

    def compute_logits(hidden: torch.Tensor) -> torch.Tensor:
        if len(steps) == seen[0]:
            return compute(hidden)
        seen[0] = len(steps)
        with NoWaiting():
            logits = compute(hidden)
        widths.append(logits.shape[1])
        return logits

    def build_plan(self: Any, prefix: int, common: Any, *args: Any) -> Any:
        if common.max_query_len != places or set(self.rows.places or [1]) != {places}:
            return build(self, prefix, common, *args)
        with NoWaiting():
            return build(self, prefix, common, *args)

    model.compute_logits = compute_logits
    StepPlanner.build = build_plan  # type: ignore[method-assign]
    return widths


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Draw a job's requests, decode steps by replay."""
    from engine_process import draw
    from vllm import LLM
    from vllm.config.compilation import CUDAGraphMode
    from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor

    engine = LLM(**job["args"]).llm_engine
    runner = engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    manager = runner.cudagraph_manager
    recording = Recording(runner, runner.vllm_config)
    cache = poison(runner)
    places = runner.decode_query_len
    full = BatchExecutionDescriptor(CUDAGraphMode.FULL, SIZE * places, SIZE, uniform_token_count=places)
    eager, rows = manager.dispatch, []

    def dispatch(
        num_reqs: int, num_tokens: int, uniform_token_count: int | None, *args: Any, **kw: Any
    ) -> Any:
        if uniform_token_count == places:
            rows.append(num_reqs)
            return full
        return eager(num_reqs, num_tokens, uniform_token_count, *args, **kw)

    manager.dispatch, manager.run_fullgraph = dispatch, recording.run
    widths = watch_host_side(runner, rows)
    held: list[Any] = []
    drawn: list[Any] = []
    for wave, (requests, how) in enumerate(zip(job["waves"], job["drafts"], strict=True)):
        known = drawn[-1] if drawn else [[] for _ in requests]
        truth = {tuple(asked["ids"]): tokens for asked, tokens in zip(requests, known, strict=True)}
        with replaced(how, truth):
            drawn.append(draw(engine, requests, wave, held=held))
    types = runner.model.compressed._all_layers.values()
    fields = [getattr(t.pages, name) for t in types for name in ("kv", "score", "token", "victim")]
    null_block = torch.cat([field[0].contiguous().view(torch.uint8).flatten() for field in fields])
    builders = [group.get_metadata_builder(0) for groups in runner.attn_groups for group in groups]
    support = {type(b).get_cudagraph_support(runner.vllm_config, b.kv_cache_spec).name for b in builders}
    return {
        "waves": drawn,
        "replays": recording.replays,
        "rows": rows,
        "widths": widths,
        "operations": len(recording.mode.recorded),
        "null_block_untouched": bool((null_block == 0xFF).all()),
        "poisoned": int((cache == 0xFF).sum()),
        "support": sorted(support),
        "held": held,
    }


if __name__ == "__main__":
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    settle()
    given = json.loads(Path(sys.argv[1]).read_text())
    found = {job["name"]: run(job) for job in given["engines"]}
    Path(given["out"]).write_text(json.dumps(found))
