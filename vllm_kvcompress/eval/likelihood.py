"""What a policy costs on pictures that are known: likelihood, next-token distributions, head outputs.

`kvcompress_replay` runs inside a worker of an engine on the kvcompress backend; the driver below starts
that engine once and asks for any number of policies, which need not be the one the engine serves.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.forward_context import set_forward_context

from vllm_kvcompress.attention.kernels import Kernels
from vllm_kvcompress.attention.recorder import Recorder
from vllm_kvcompress.cache.layout import CacheLayout
from vllm_kvcompress.config import KEY, parse_config
from vllm_kvcompress.eval.online import Budgets, OnlineRule, budgets
from vllm_kvcompress.eval.online_replay import EarlyLines, OnlineReplay
from vllm_kvcompress.eval.replay import PagedReplay, Replay
from vllm_kvcompress.eval.scores import SCORES
from vllm_kvcompress.heads.dense import DenseReplay
from vllm_kvcompress.heads.replay import FullReplay, Layered, Rows
from vllm_kvcompress.models.compression import plan_cache
from vllm_kvcompress.models.replayed import divergence, log_probabilities, place, replaying
from vllm_kvcompress.policy import HeadRule


@dataclass(frozen=True)
class Trial:
    """One policy to replay.

    Parameters
    ----------
    section : mapping
        The ``kvcompress`` section of ``--additional-config`` of the server that is meant.
    score : str, optional
        A name in `SCORES`: replayed densely under another score than the section's.
    per_layer : bool
        Victims chosen per layer and head type instead of per head; densely too.
    online : OnlineRule, optional
        Heads get their budgets in each picture's first lines, with the section's as their mean; densely too.
    """

    section: Mapping[str, Any]
    score: str | None = None
    per_layer: bool = False
    online: OnlineRule | None = None


@dataclass
class Likelihood:
    """Of one policy, a list entry per picture; ``error`` per layer and KV head.

    ``nll``: nats per image token, conditional branch. ``kl``, ``kl_guided``: Kullback-Leibler divergence
    from the full cache's next-token distribution, without and with guidance, nats per token.
    ``error``: relative error of the attention output, root mean square. ``spatial``: KV heads whose
    conditional branch has a ring, per layer. ``types``: name and cache heads of each head type. ``resident``:
    mean image slots per head. Of an online rule ``spatial`` is empty, the others are means over a batch.
    """

    nll: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    kl_guided: list[float] = field(default_factory=list)
    error: list[list[float]] = field(default_factory=list)
    spatial: list[list[int]] = field(default_factory=list)
    resident: float = 0.0
    types: list[list[Any]] = field(default_factory=list)
    refused: str = ""

    def extend(self, other: "Likelihood") -> None:
        """Append another batch of pictures; head errors are averaged by number of pictures."""
        mine, theirs = len(self.nll), len(other.nll)
        if self.error and other.error:
            both = mine * np.array(self.error) ** 2 + theirs * np.array(other.error) ** 2
            other.error = np.sqrt(both / max(1, mine + theirs)).tolist()
        for name in ("nll", "kl", "kl_guided"):
            getattr(self, name).extend(getattr(other, name))
        self.error, self.spatial, self.resident = other.error, other.spatial, other.resident
        self.types = other.types
        self.refused = other.refused


def kvcompress_replay(
    self: Any, prompts: Sequence[Sequence[int]], codes: Sequence[Sequence[int]], trials: Mapping[str, Trial],
    guidance: float,
) -> dict[str, dict]:  # fmt: skip
    """Replay pictures under every trial (a worker method).

    Parameters
    ----------
    prompts : sequence of token ids
        Each asks for a picture; of a model whose branches may be of unlike length at least as long as its
        own negative prompt.
    codes : sequence of codebook indices
        One whole picture a prompt.
    trials : mapping
        By name.
    guidance : float
        Scale of the guided distribution that ``kl_guided`` compares.

    Returns
    -------
    dict
        name -> a `Likelihood` as a dict.
    """
    worker = _Worker(self.vllm_config, self.model_runner.get_model(), prompts, codes, guidance)
    return {name: asdict(worker.run(trial)) for name, trial in trials.items()}


def layout_for(vllm_config: Any, model: Any, section: Mapping[str, Any]) -> tuple[CacheLayout, Kernels]:
    """Head types, rules, pages and kernels as a server of this section would plan them. Raises ValueError."""
    config = copy.copy(vllm_config)
    config.additional_config = {KEY: dict(section)}
    parse_config(config.additional_config)
    return plan_cache(config, model)


def replay_rows(
    vllm_config: Any, model: Any, prompts: Any, codes: Any, method: Callable[[Rows], Layered]
) -> None:
    """One forward pass over whole pictures with a method made for their rows; for what it sees."""
    worker = _Worker(vllm_config, model, prompts, codes, guidance=1.0)
    with torch.inference_mode():
        worker.forward(worker.replay(method(worker.rows)))


class _Worker:
    """One batch of pictures in the worker, and the full cache's distributions to compare with."""

    def __init__(self, vllm_config: Any, model: Any, prompts: Any, codes: Any, guidance: float) -> None:
        self.vllm_config, self.model, self.guidance = vllm_config, model, guidance
        image = model.image
        device = next(model.parameters()).device
        lengths = [len(ids) for ids in prompts]
        steps = max(lengths) + image.raster.tokens
        prefix = torch.tensor(lengths, dtype=torch.int32, device=device)
        self.prompts = prompts
        with replaying(model, prompts) as begins:
            self.rows = Rows(prefix, image.raster.tokens, steps, begins)
        padded = [[*ids, *image.tokens(picture)] for ids, picture in zip(prompts, codes, strict=True)]
        self.ids = torch.tensor([row + [image.pad] * (steps - len(row)) for row in padded], device=device)
        self.codes = torch.tensor(codes, device=device)
        self.full: tuple[Tensor, Tensor] | None = None

    @torch.inference_mode()
    def run(self, trial: Trial) -> Likelihood:
        if self.full is None:
            replay = self.replay(FullReplay(self.rows.begins))
            self.full = self.forward(replay)
        try:
            layout, kernels = layout_for(self.vllm_config, self.model, trial.section)
        except ValueError as error:
            return Likelihood(refused=str(error))
        found = None if trial.online is None else self._early_stage(trial.online, layout.rules[0])
        replay = self.replay(self._method(trial, layout, kernels, found))
        plain, guided = self.forward(replay)
        return Likelihood(
            nll=(-plain.gather(2, self.codes[..., None])[..., 0].mean(1)).tolist(),
            kl=_mean(divergence(self.full[0], plain)),
            kl_guided=_mean(divergence(self.full[1], guided)),
            error=replay.relative.tolist(),
            spatial=[
                [head for head in range(layout.kv_heads) if layout.rules[row[head]].ring]
                for row in layout.types
            ],
            resident=layout.mean_slots if found is None else float(found.slots.double().mean()),
            types=[[rule.name, layout.total(kind)] for kind, rule in enumerate(layout.rules)]
            if found is None
            else found.types,
        )

    def _early_stage(self, online: OnlineRule, rule: HeadRule) -> Budgets:
        """What the pictures' first lines, and nothing after them, make of their heads."""
        rows = replace(self.rows, image=online.early_tokens(rule))
        rows.steps -= self.rows.image - rows.image
        seen = EarlyLines(rows, online.near_tokens(rule), online.prompt, *self._heads)
        self._hidden(seen, rows.steps)
        return budgets(seen.outside, online, rule)

    def _method(self, trial: Trial, layout: CacheLayout, kernels: Kernels, found: Budgets | None) -> Layered:
        if trial.online is not None and found is not None:
            return OnlineReplay(self.rows, layout, found, trial.online.strata)
        if trial.score is None and not trial.per_layer:
            return PagedReplay(self.rows, layout, kernels)
        score = SCORES[trial.score or "sum"]
        return DenseReplay(self.rows, layout.rules, layout.types, score, trial.per_layer)

    @property
    def _heads(self) -> tuple[int, int]:
        """Layers, and cache heads of a layer."""
        text = self.model.config.get_text_config()
        return text.num_hidden_layers, 2 * text.num_key_value_heads

    def replay(self, method: Layered) -> Replay:
        return Replay(self.rows, method, *self._heads)

    def forward(self, replay: Replay) -> tuple[Tensor, Tensor]:
        """Log probabilities of the image codes ``[rows, image, codes]``, without and with guidance."""
        hidden = self._hidden(replay, self.ids.shape[1])
        plain, guided = (
            log_probabilities(self.model, hidden, self.rows, scale) for scale in (1.0, self.guidance)
        )
        return plain, guided

    def _hidden(self, recorder: Recorder, steps: int) -> Tensor:
        """What the model makes of each row's first ``steps`` tokens: ``[rows * steps, 2 * hidden + 2]``."""
        ids = self.ids[:, :steps]
        positions = torch.arange(steps, device=ids.device).repeat(len(ids))
        with (
            self.model.compressed.recording(recorder),
            replaying(self.model, self.prompts),
            set_forward_context(None, self.vllm_config, num_tokens=ids.numel()),
        ):
            place(self.model, ids.numel())
            return self.model(ids.flatten(), positions)


def _mean(divergences: Tensor) -> list[float]:
    """``[rows, tokens]`` -> of each row; rounding makes none negative."""
    return divergences.mean(-1).clamp(min=0).tolist()


def replay_batches(
    llm: Any,
    scenes: Sequence[tuple[Sequence[int], Sequence[int]]],
    trials: Mapping[str, Trial],
    guidance: float,
    batch: int,
) -> Iterable[tuple[int, dict[str, Likelihood]]]:
    """Ask an engine for every trial on every scene (prompt ids, codes), ``batch`` scenes at a time.

    Yields the number of scenes done and what the batch gave.
    """
    for first in range(0, len(scenes), batch):
        part = scenes[first : first + batch]
        prompts, codes = [list(ids) for ids, _ in part], [list(picture) for _, picture in part]
        [found] = llm.collective_rpc(kvcompress_replay, args=(prompts, codes, trials, guidance))
        yield first + len(part), {name: Likelihood(**one) for name, one in found.items()}
