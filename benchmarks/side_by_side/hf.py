"""transformers: ``JanusForConditionalGeneration.generate``, stopped after some steps and timed.

Its StaticCache is as long as the whole picture from the first step on and attended to in full at every
step, so a step costs the same wherever in the picture it is: the first ones stand for all.
"""

import contextlib
import time
from itertools import pairwise
from typing import Any

import torch
from transformers import AutoTokenizer, JanusForConditionalGeneration, LogitsProcessorList, StaticCache

from side_by_side.contenders import Contender
from side_by_side.sample import LineSample
from side_by_side.stopwatch import Stopwatch, modules_named
from side_by_side.workloads import PROMPT, Workload

_STEPS = 8
_WARM = 2  # steps after the prompt that are not counted
_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_ATTENTION = ("sdpa", "eager")


class _Enough(Exception):
    """Raised out of generate when all wanted steps have been timed."""


class Transformers:
    """``generate`` with guidance 5 on a StaticCache, with the faster of its attention functions."""

    def __init__(self, contender: Contender, workload: Workload, batch: int) -> None:
        self.contender, self.workload, self.limit = contender, workload, batch
        folder = workload.checkpoint(contender.weights)
        self.model = JanusForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16).eval()
        generation = self.model.generation_config
        tokenizer = AutoTokenizer.from_pretrained(folder)
        text = f"<|User|>: {PROMPT}\n\n<|Assistant|>:"
        body = tokenizer(text, add_special_tokens=False)["input_ids"]
        boi = generation.generation_kwargs["boi_token_id"]
        self.prompt = [generation.bos_token_id, *body, boi]
        self._best: dict[int, str] = {}

    @property
    def prefix(self) -> int:
        """Prompt tokens of a picture."""
        return len(self.prompt)

    @property
    def setting(self) -> dict[int, str]:
        """The attention function that was faster, by batch."""
        return self._best

    def _cache(self, batch: int) -> StaticCache:
        """The cache that generate would make. Its reset writes zeros: memory that was never written to is one
        shared page, which reads at the speed of a cache.
        """
        text = self.model.config.text_config
        cache = StaticCache(config=text, max_cache_len=self.prefix + self.workload.tokens)
        head_size = text.head_dim or text.hidden_size // text.num_attention_heads
        cache.early_initialization(
            2 * batch, text.num_key_value_heads, head_size, torch.bfloat16, torch.device("cpu")
        )
        return cache

    def _generate(self, cache: StaticCache, batch: int, steps: int, at_step: Any = None) -> list[float]:
        """Seconds of the prompt's step and of each of ``steps`` more; ``at_step(n)`` is called after each."""
        moments: list[float] = []

        def probe(_: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            moments.append(time.perf_counter())
            if at_step is not None:
                at_step(len(moments) - 2)
            if len(moments) == steps + 2:
                raise _Enough
            return scores

        cache.reset()
        ids = torch.tensor([self.prompt] * batch)
        moments.append(time.perf_counter())
        with contextlib.suppress(_Enough):
            self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                logits_processor=LogitsProcessorList([probe]),
                generation_mode="image",
                do_sample=True,
                guidance_scale=5.0,
                past_key_values=cache,
            )
        return [after - before for before, after in pairwise(moments)]

    def _choose(self, cache: StaticCache, batch: int) -> None:
        """Take the faster attention function for this batch, once."""
        if batch not in self._best:
            taken = {}
            for name in _ATTENTION:
                self.model.model.language_model.set_attn_implementation(name)
                taken[name] = min(self._generate(cache, batch, 4)[2:])
            self._best[batch] = min(taken, key=lambda name: taken[name])
        self.model.model.language_model.set_attn_implementation(self._best[batch])

    def line(self, batch: int, line: int) -> LineSample:
        """Some steps of ``batch`` pictures, good for any line."""
        cache = self._cache(batch)
        self._choose(cache, batch)
        first, *steps = self._generate(cache, batch, _WARM + min(_STEPS, self.workload.tokens - 3))
        layers: list[Any] = cache.layers
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
        return LineSample(line, first, steps[_WARM:], held / batch)

    def whole(self, batch: int) -> float:
        """Seconds in which ``batch`` whole pictures are drawn, prompts included."""
        cache = self._cache(batch)
        self._choose(cache, batch)
        return sum(self._generate(cache, batch, self.workload.tokens - 1))

    def split(self, batch: int, line: int) -> dict[str, float]:
        """Seconds per step and part, with the parts' calls wrapped."""
        watch, model, steps = Stopwatch(), self.model.model, 4
        targets: list[tuple[Any, str, str]] = [
            *((m, "forward", "linear layers") for m in modules_named(model.language_model, *_LINEAR)),
            *((m, "forward", "attention") for m in modules_named(model.language_model, "self_attn")),
            (model.generation_head, "forward", "image head"),
            (torch, "softmax", "sampling"),
            (torch, "multinomial", "sampling"),
        ]
        cache = self._cache(batch)
        self._choose(cache, batch)
        taken = []

        def at_step(step: int) -> None:
            if step == _WARM:
                watch.seconds.clear()

        with watch.methods(targets):
            taken = self._generate(cache, batch, _WARM + steps, at_step)
        return watch.shares(sum(taken[-steps:]), steps)

    def decode_picture(self) -> float:
        """Seconds that one picture takes from codes to pixels."""
        codes = torch.randint(self.model.config.vq_config.num_embeddings, (1, self.workload.tokens))
        with torch.inference_mode():
            self.model.decode_image_tokens(codes)  # warms up
            start = time.perf_counter()
            self.model.decode_image_tokens(codes)
        return time.perf_counter() - start
