"""Pictures of the baselines that no server has: a dense drawing loop, with the server's noise.

Rows draw in lock-step, their prompts' ends on one slot, everything is kept and masked. Under a full cache it
draws what a server on vLLM's V1 runner draws from the same seeds (tests/test_eval_replay.py).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from vllm.forward_context import set_forward_context
from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler

from vllm_kvcompress.attention.pages import BRANCHES
from vllm_kvcompress.eval.engine import asking, start
from vllm_kvcompress.eval.likelihood import Trial, layout_for
from vllm_kvcompress.eval.online import OnlineRule, budgets, outside_of
from vllm_kvcompress.eval.online_replay import OnlineKept
from vllm_kvcompress.eval.pictures import Asked, decoded
from vllm_kvcompress.guidance import LINE_END, pack_scale
from vllm_kvcompress.models.replayed import place
from vllm_kvcompress.policy import HeadRule
from vllm_kvcompress.windows.noise import position_generator

GREEDY = 1e-5  # vLLM's: below this temperature the likeliest token is drawn


def draw_online(model: str, trial: Trial, asked: Asked) -> NDArray[np.uint8]:
    """As `pictures.draw`, of a trial whose rule is online. Run it `in_process`."""
    from tqdm import tqdm

    llm = start(model, {"preset": "full"}, 1, asked.dtype, asked.room, asked.size)
    try:
        prompts = asking(llm, [prompt.text for prompt in asked.prompts()])
        pictures = []
        for first in tqdm(range(0, len(prompts), asked.batch), desc="batches", unit="batch"):
            part = prompts[first : first + asked.batch]
            seeds = [asked.seed + first + n for n in range(len(part))]
            how = (trial, seeds, asked.guidance, asked.temperature)
            [drawn] = llm.collective_rpc(kvcompress_draw_online, args=(part, *how))
            pictures += [decoded(llm, ids) for ids in drawn]
        return np.stack(pictures)
    finally:
        llm.llm_engine.engine_core.shutdown()


@torch.inference_mode()
def kvcompress_draw_online(
    self: Any, prompts: Sequence[Sequence[int]], trial: Trial, seeds: Sequence[int], guidance: float,
    temperature: float,
) -> list[list[int]]:  # fmt: skip
    """Draw a picture for each prompt (a worker method).

    Parameters
    ----------
    prompts : sequence of token ids
        Each asks for a picture.
    trial : Trial
        Its ``online`` rule, None for a full cache, and its section's budget.
    seeds : sequence of int
        As in vLLM's ``SamplingParams``.
    guidance, temperature : float

    Returns
    -------
    list of list of int
        The image tokens' ids.

    Raises ValueError, one line, for a model whose branches may be of unlike length, or a section that it has
    no room for.
    """
    model = self.model_runner.get_model()
    image, device = model.image, next(model.parameters()).device
    if image.aligns:
        raise ValueError("baseline: pictures are drawn of models whose branches begin together alone")
    layout, _ = layout_for(self.vllm_config, model, trial.section)
    words = max(map(len, prompts))
    begins = torch.tensor([words - len(ids) for ids in prompts], device=device)
    padded = torch.tensor([[image.pad] * (words - len(ids)) + list(ids) for ids in prompts], device=device)
    cache = OnlineCache(
        layout.layers, layout.kv_heads, layout.head_size, words, begins, layout.rules[0], trial.online
    )
    sampler = TopKTopPSampler()
    drawn = torch.empty(len(prompts), 0, dtype=torch.int64, device=device)
    ids = padded[:, 0]
    with model.compressed.recording(cache):
        for slot in range(words + image.raster.tokens - 1):
            place(model, len(ids))
            with set_forward_context(None, self.vllm_config, num_tokens=len(ids), skip_compiled=True):
                hidden = model(ids, (slot - begins).clamp(min=0))
            cache.end_step()
            if slot + 1 < words:
                ids = padded[:, slot + 1]
                continue
            token = drawn.shape[1]
            scale = LINE_END if image.raster.is_end(token) else guidance
            column = torch.full((len(ids),), scale, device=device)
            logits = model.compute_logits(torch.cat([hidden[:, :-2], pack_scale(column, hidden.dtype)], -1))
            ids = image.ids(_sample(sampler, image.among(logits), seeds, token, temperature))
            drawn = torch.cat([drawn, ids[:, None]], 1)
    return drawn.tolist()


def _sample(sampler: Any, logits: Tensor, seeds: Sequence[int], token: int, temperature: float) -> Tensor:
    """``[rows, choices]`` -> ``[rows]``, as vLLM's V1 sampler draws with the noise of these places."""
    logits = logits.float()
    if temperature < GREEDY:
        return logits.argmax(-1)
    noise = {row: position_generator(seed, token, logits.device) for row, seed in enumerate(seeds)}
    chosen, _ = sampler(logits / temperature, noise, None, None)
    return chosen.view(-1).long()


class OnlineCache:
    """A `Recorder` of one token a row and step: dense K and V, and what each head still sees.

    Parameters
    ----------
    layers, kv_heads, head_size : int
        KV heads of one branch.
    words : int
        Slots before the first image token's.
    begins : Tensor
        ``[rows]`` int64: the first slot that a row sees; a token before it sees itself.
    rule : HeadRule
        LineAR's, with the mean budget.
    online : OnlineRule or None
        None keeps everything.
    """

    def __init__(
        self, layers: int, kv_heads: int, head_size: int, words: int, begins: Tensor, rule: HeadRule,
        online: OnlineRule | None,
    ) -> None:  # fmt: skip
        self.words, self.begins, self.rule, self.online, self.step = words, begins, rule, online, 0
        rows, heads, device = len(begins), BRANCHES * kv_heads, begins.device
        shape = (layers, rows, heads, words + rule.image, head_size)
        self._k, self._v = torch.zeros(shape, device=device), torch.zeros(shape, device=device)
        strata = online is not None and online.strata
        self.kept = [OnlineKept(rule, rows, heads, device, strata) for _ in range(layers)]
        self.outside = torch.zeros(rows, layers, heads, device=device)

    @property
    def token(self) -> int:
        """The image token of this step; negative in the prompt."""
        return self.step - self.words

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int, scale: float) -> Tensor:
        """``q [rows, 2 * Hq, D]``, k and v alike -> like q."""
        size, token, kept = self.step + 1, self.token, self.kept[layer]
        self._k[layer, :, :, self.step], self._v[layer, :, :, self.step] = k.float(), v.float()
        keys, values = self._k[layer, :, :, :size], self._v[layer, :, :, :size]
        grouped = q.unflatten(1, (k.shape[1], -1)).float() * scale
        logits = grouped @ keys.transpose(2, 3)  # [rows, heads, group, slots]
        slot = torch.arange(size, device=q.device)
        hidden = (slot < self.begins.clamp(max=self.step)[:, None])[:, None].repeat(1, k.shape[1], 1)
        if token >= 0:
            hidden[..., self.words :] = kept.dies[..., : token + 1] <= token
        weights = logits.masked_fill_(hidden[:, :, None], -torch.inf).softmax(-1)
        if token >= 0 and self.online is not None:
            to_image = weights[..., self.words :]
            kept.score[..., : token + 1] += to_image.sum(2)
            if token < self.online.early_tokens(self.rule):
                near = self.online.near_tokens(self.rule)
                self.outside[:, layer] += outside_of(to_image[:, :, :, None], token, near, self.online.prompt)
        return (weights @ values).to(q.dtype).reshape(q.shape)

    def end_step(self) -> None:
        """All layers have seen this step's token."""
        drawn = self.token + 1
        self.step += 1
        if self.online is None or not self.rule.evicts or drawn <= 0 or drawn % self.rule.line:
            return
        if drawn == self.online.early_tokens(self.rule):
            found = budgets(self.outside, self.online, self.rule)
            for layer, kept in enumerate(self.kept):
                kept.settle(found.slots[:, layer], found.ring[:, layer], found.early)
        for kept in self.kept:
            kept.end_line(kept.score[..., :drawn])
            kept.score.mul_(self.rule.decay)
