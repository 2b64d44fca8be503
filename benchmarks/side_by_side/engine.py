"""vLLM in this process: pictures that begin at any line, stepped and timed one engine step at a time."""

import os
import time
from typing import Any

import torch

from side_by_side.contenders import Contender
from side_by_side.sample import LineSample
from side_by_side.stopwatch import Stopwatch, modules_named
from side_by_side.workloads import BLOCK, PROMPT, Workload

_LINEAR = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")


class Engine:
    """An ``LLM`` with its engine core in this process.

    Parameters
    ----------
    batch : int
        Most pictures drawn at once.
    """

    def __init__(self, contender: Contender, workload: Workload, batch: int) -> None:
        os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        from vllm import LLM

        from vllm_kvcompress.models.prompt import image_prompt_ids
        from vllm_kvcompress.models.registry import image_model

        self.contender, self.workload = contender, workload
        threads, set_threads = torch.get_num_threads(), torch.set_num_threads
        # Caches are compared one token a step; windows have a benchmark of their own (benchmarks/windows.py).
        extra: dict[str, Any] = {"additional_config": {"kvcompress": {"window": 1}}}
        if contender.section is not None:
            extra["attention_backend"] = "kvcompress"
            extra["additional_config"]["kvcompress"] |= workload.settings(contender.section)
        elif workload.memory_images:
            extra["block_size"] = BLOCK
        length = 64 + workload.tokens
        self.llm = LLM(
            str(workload.checkpoint(contender.weights)),
            dtype="bfloat16",
            seed=0,
            enforce_eager=True,
            max_num_seqs=batch,
            max_model_len=length,
            max_num_batched_tokens=max(2048, length),
            limit_mm_per_prompt={"image": 0},
            kv_cache_memory_bytes=workload.fixed_memory(_prompt_tokens(workload))
            or workload.kv_memory(batch, contender.budget),
            **extra,
        )
        torch.set_num_threads = set_threads  # vLLM's CPU worker replaces it by one that does nothing
        torch.set_num_threads(threads)
        self.image = image_model(self.llm.llm_engine.model_config)
        self.prompt = image_prompt_ids(self.llm.get_tokenizer(), self.image, PROMPT)
        self.limit = batch
        self._added = 0
        self._fill()

    def _fill(self) -> None:
        """Random numbers in the whole cache.

        Memory that was never written is one shared page of zeros, which reads at the speed of a cache.
        """
        if self.contender.section is None:
            tensors = list(self.runner.kv_caches)
        else:
            tensors = [held.pages.kv for held in self.model.compressed._all_layers.values()]
        for tensor in tensors:
            numbers = torch.randn(tensor[0].shape).to(tensor.dtype)
            for block in tensor:
                block.copy_(numbers)

    def _clear_side_state(self) -> None:
        """Zeros in scores, tokens and victims.

        All head types draw from one pool: one's K and V lie where another's victims will be read, and a
        picture that is begun in the middle reads victims that nobody chose.
        """
        if self.contender.section is None:
            return
        for held in self.model.compressed._all_layers.values():
            if held.rule.scores:
                for part in (held.pages.victim, held.pages.token, held.pages.score):
                    part.zero_()

    @property
    def core(self) -> Any:
        """vLLM's EngineCore."""
        client: Any = self.llm.llm_engine.engine_core
        return client.engine_core

    @property
    def scheduler(self) -> Any:
        return self.core.scheduler

    @property
    def runner(self) -> Any:
        return self.core.model_executor.driver_worker.worker.model_runner

    @property
    def model(self) -> Any:
        return self.runner.get_model()

    @property
    def prefix(self) -> int:
        """Prompt tokens of a picture."""
        return len(self.prompt)

    def begin(self, batch: int, line: int) -> float:
        """Add ``batch`` pictures of which ``line`` lines are drawn, all but a token; seconds of a first step.

        Their cache is taken as it is: random numbers, which take as long to attend to as others. The first
        step computes one token of the line before. Pictures from line 0 begin with their prompts, as always.
        """
        self._clear_side_state()
        from vllm import SamplingParams

        generator = torch.Generator().manual_seed(line)
        for _ in range(batch):
            drawn = max(0, line * self.workload.width - 1)
            codes = torch.randint(self.image.codes, (drawn,), generator=generator)
            ids = self.prompt + (codes + self.image.text_vocab).tolist()
            self._added += 1
            params = SamplingParams(temperature=1.0, seed=self._added, extra_args={"guidance_scale": 5.0})
            self.llm.llm_engine.add_request(str(self._added), {"prompt_token_ids": ids}, params)
        if line:
            for request in self.scheduler.waiting:
                request.num_computed_tokens = len(request.prompt_token_ids) - 1
        taken = self._step()
        while any(
            request.num_computed_tokens < request.num_prompt_tokens for request in self.scheduler.running
        ):
            taken += self._step()
        return taken

    def end(self) -> None:
        """Abort every picture and let the engine notice."""
        engine = self.llm.llm_engine
        engine.abort_request(list(self.scheduler.requests), internal=True)
        while engine.has_unfinished_requests():
            engine.step()

    def _step(self) -> float:
        start = time.perf_counter()
        self.llm.llm_engine.step()
        return time.perf_counter() - start

    def fit(self) -> int:
        """Pictures that are drawn at once, at their last line, when ``limit`` are asked for."""
        self.begin(self.limit, self.workload.lines - 1)
        for _ in range(self.workload.width - 1):
            self._step()
        count = len(self.scheduler.running)
        self.end()
        return count

    def line(self, batch: int, line: int) -> LineSample:
        """Draw one line, its end included, of ``batch`` pictures. RuntimeError if not all fit."""
        first = self.begin(batch, line)
        width = self.workload.width
        # The step that draws a picture's last token also frees its blocks: count before.
        steps = [self._step() for _ in range(width - 1)]
        running = len(self.scheduler.running)
        if running != batch:
            raise RuntimeError(f"{running} pictures are drawn at once instead of {batch}")
        held = self._kv_bytes() / batch
        steps.append(self._step())
        self.end()
        return LineSample(line, first, steps, held)

    def whole(self, batch: int) -> float:
        """Seconds in which ``batch`` whole pictures are drawn, prompts included."""
        taken = self.begin(batch, 0)
        while self.llm.llm_engine.has_unfinished_requests():
            taken += self._step()
        return taken

    def _kv_bytes(self) -> int:
        """Bytes of the blocks that the pictures being drawn hold, counted."""
        scheduler = self.scheduler
        total = 0
        for request in scheduler.running:
            blocks = scheduler.kv_cache_manager.get_block_ids(request.request_id)
            for group, held in zip(scheduler.kv_cache_config.kv_cache_groups, blocks, strict=True):
                total += len(held) * group.kv_cache_spec.page_size_bytes * len(group.layer_names)
        return total

    def split(self, batch: int, line: int) -> dict[str, float]:
        """Seconds per step and part, over a line, with the parts' calls wrapped."""
        watch, model, runner, steps = Stopwatch(), self.model, self.runner, self.workload.width
        targets: list[tuple[Any, str, str]] = [
            *((layer, "forward", "linear layers") for layer in modules_named(model, *_LINEAR)),
            *((layer, "forward", "attention") for layer in modules_named(model, "self_attn")),
            (model, "compute_logits", "image head"),
            (self.scheduler, "schedule", "scheduler"),
            (self.scheduler, "update_from_output", "scheduler"),
            (runner, "_prepare_inputs", "inputs and plan"),
            (runner, "_update_states", "inputs and plan"),
            (runner, "_build_attention_metadata", "inputs and plan"),
            (runner, "_sample", "sampling"),
        ]
        self.begin(batch, line)
        with watch.methods([target for target in targets if hasattr(*target[:2])]):
            parts = watch.per_step(self._step, steps)
        self.end()
        return parts

    def decode_picture(self) -> float:
        """Seconds that one picture takes from codes to pixels, as it is served."""
        codes = torch.randint(self.image.codes, (self.workload.tokens,)).tolist()
        self.llm.collective_rpc("kvcompress_decode_image", args=(codes,))  # warms up
        start = time.perf_counter()
        self.llm.collective_rpc("kvcompress_decode_image", args=(codes,))
        return time.perf_counter() - start


def _prompt_tokens(workload: Workload) -> int:
    """Tokens of the benchmark's prompt, before there is an engine to ask."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(workload.checkpoint())
    text = f"<|User|>: {PROMPT}\n\n<|Assistant|>:"
    return 2 + len(tokenizer(text, add_special_tokens=False)["input_ids"])  # begin-of-sentence and -image
