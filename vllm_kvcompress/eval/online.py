"""HeadKV-AR's idea as a baseline: a picture finds the types of its heads in its own first lines.

HeadKV-AR (Liang et al., arXiv 2605.20600, no code) gives heads that look near them a smaller budget and the
others a larger one, tells them apart in the early stage of the picture that is drawn, without calibration,
and evicts by a "Stratified Token Eviction" that is to keep what is far away. What "near" is, how long the
early stage lasts, how budgets follow and what the strata are we do not know: `OnlineRule` has choices.

Budgets belong to a picture and its heads, so what equals a preset's memory is the mean over the heads of each
picture. No server of ours could have it: block tables are planned by head type before there are pictures.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from vllm_kvcompress.policy.rule import HeadRule


@dataclass(frozen=True)
class OnlineRule:
    """How the first lines decide what a head keeps.

    Parameters
    ----------
    early : int
        Lines of the early stage, in which every head keeps all; at most those that the budget holds.
    near : int
        Lines before a query that count as near; at most half of the early stage.
    local : float
        Share of the heads, those of least attention beyond what is near, that get the small budget; 0 for
        budgets in proportion to that attention instead, beside a line that everyone has.
    lines : int
        Lines of a local head beside its anchors.
    ring : bool
        Local heads keep the last tokens; otherwise they choose by score as the broad ones do.
    strata : bool
        Every victim is from the line of which most is held, so that a head keeps something of each; otherwise
        the lowest scores go, wherever they are (LineAR).
    layers : bool
        Heads are compared within their layer, and every layer has the same memory; otherwise within the
        picture.
    prompt : bool
        Attention to the prompt counts as near; otherwise it does not count at all, as in head profiles.
    halved : bool
        Scores are `averaged` over lines; otherwise those of the last line.

    Raises ValueError, one line, for anything out of range.
    """

    early: int = 4
    near: int = 2
    local: float = 0.5
    lines: int = 2
    ring: bool = True
    strata: bool = False
    layers: bool = False
    prompt: bool = False
    halved: bool = False

    def __post_init__(self) -> None:
        for name in ("early", "near", "lines"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} lines; need at least 1")
        if not 0 <= self.local < 1:
            raise ValueError(f"local: {self.local} of the heads; need 0 <= local < 1")

    @property
    def section(self) -> dict[str, str]:
        """The preset whose rule broad heads follow."""
        return {"preset": "line_ar", **({"score": "averaged"} if self.halved else {})}

    def early_tokens(self, rule: HeadRule) -> int:
        """Image tokens of the early stage, under a mean budget of ``rule.capacity``."""
        return min(self.early, rule.capacity // rule.line) * rule.line

    def near_tokens(self, rule: HeadRule) -> int:
        """Image tokens before a query that count as near."""
        return min(self.near * rule.line, self.early_tokens(rule) // 2)


BASELINES: dict[str, OnlineRule] = {
    "headkv_ar": OnlineRule(near=1, local=0.25, lines=3, ring=False, halved=True)
}
"""Each at its best of what docs/quality.md says was tried."""


def parse_baseline(text: str) -> OnlineRule:
    """``"headkv_ar"``, or one that differs: ``"headkv_ar:early=2:ring=0"``. Raises ValueError, one line."""
    name, *changes = text.split(":")
    if name not in BASELINES:
        raise ValueError(f"baseline: unknown {name!r}; one of {', '.join(BASELINES)}")
    settings: dict[str, Any] = asdict(BASELINES[name])
    for change in changes:
        key, _, value = change.partition("=")
        if key not in settings:
            raise ValueError(f"baseline: {name} has no {key!r}; one of {', '.join(settings)}")
        kind = type(settings[key])
        try:
            settings[key] = kind(float(value)) if kind is float else kind(int(value))
        except ValueError:
            raise ValueError(f"baseline: {change!r} of {name} is not a number") from None
    return OnlineRule(**settings)


@dataclass
class Budgets:
    """What each head of each picture keeps from the early stage's end on.

    ``slots`` ``[rows, layers, heads]`` int64 image slots, the line being written included; ``ring``, alike,
    bool; ``early`` image tokens of the early stage.
    """

    slots: Tensor
    ring: Tensor
    early: int

    @property
    def types(self) -> list[list[Any]]:
        """What heads are, as `HeadRule.name` has it, and how many of each, mean over the pictures."""
        heads = torch.stack([self.ring.long(), self.slots], -1).flatten(0, 2)
        found, counts = heads.unique(dim=0, return_counts=True)
        names = [f"{'ring' if ring else 'scored'} {slots}" for ring, slots in found.tolist()]
        return [[name, count / len(self.slots)] for name, count in zip(names, counts.tolist(), strict=True)]


def budgets(outside: Tensor, online: OnlineRule, rule: HeadRule) -> Budgets:
    """Budgets whose mean over the heads of a picture is at most ``rule.capacity`` slots.

    Two sizes: a local head gets its lines and anchors, at most the mean, and the broad heads share what is
    left in equal parts; where those keep the whole picture, the local ones get what they leave. In
    proportion: a line and its anchors for each, and what is left by ``outside``, at most the whole picture.

    Parameters
    ----------
    outside : Tensor
        ``[rows, layers, heads]`` attention beyond what is near, of the early stage.
    online : OnlineRule
    rule : HeadRule
        LineAR's, with the mean as its capacity.
    """
    shape, mean, image = outside.shape, rule.capacity, rule.image
    scored = (outside if online.layers else outside.flatten(1)[:, None]).double()  # [rows, parts, heads]
    heads = scored.shape[-1]
    if online.local:
        count = min(heads - 1, round(online.local * heads))
        small = min(rule.anchors + online.lines * rule.line, mean)
        large = min(image, (heads * mean - count * small) // (heads - count))
        if large == image and count:
            small = (heads * mean - (heads - count) * image) // count
        is_local = scored.argsort(dim=-1, stable=True).argsort(-1) < count
        slots = torch.where(is_local, small, large)
    else:
        least = min(mean, rule.anchors + rule.line)
        slots = _in_proportion(scored, least, mean, image)
        is_local = slots < mean
    slots, is_local = slots.view(shape), is_local.view(shape)
    return Budgets(slots, is_local & online.ring, online.early_tokens(rule))


def _in_proportion(weight: Tensor, least: int, mean: int, most: int) -> Tensor:
    """``min(most, least + x * weight)`` with the x that makes the mean over the last axis ``mean``; whole."""
    weight = weight.clamp(min=1e-9)
    low = torch.zeros_like(weight[..., :1])
    high = torch.full_like(low, most) / weight.amin(-1, keepdim=True)
    for _ in range(100):
        x = (low + high) / 2
        over = (least + x * weight).clamp(max=most).mean(-1, keepdim=True) > mean
        low, high = torch.where(over, low, x), torch.where(over, x, high)
    return (least + low * weight).clamp(max=most).floor().long()


def outside_of(probability: Tensor, first: int, near: int, prompt: bool) -> Tensor:
    """What queries give to image tokens further back than ``near``, summed over them: ``[rows, heads]``.

    Parameters
    ----------
    probability : Tensor
        ``[rows, heads, group, queries, tokens]`` of image tokens; a row's sum is below one by what the
        prompt gets.
    first : int
        The image token that the first query is.
    near : int
    prompt : bool
        Of all that they give; otherwise of what they give to image tokens.
    """
    query = first + torch.arange(probability.shape[3], device=probability.device)[:, None]
    token = torch.arange(probability.shape[4], device=probability.device)
    far = (probability * (token < query - near)).sum(-1)
    if not prompt:
        far = far / probability.sum(-1).clamp(min=1e-20)
    return far.mean(2).sum(-1)
