"""The line rule with everything kept: which tokens a head would still hold, line by line, as a mask.

For measuring rules without a paged cache (`vllm_kvcompress.heads.losses`) and for rules that no server has
(`vllm_kvcompress.eval.dense`). Vectorised over rows and heads.
"""

import torch
from torch import Tensor

from vllm_kvcompress.attention.select import smooth_row
from vllm_kvcompress.policy.rule import HeadRule


class Kept:
    """What heads under one rule hold of their pictures.

    Parameters
    ----------
    rule : HeadRule
        ``stratify`` is not known here.
    rows, heads : int
        Pictures, and heads that each choose for themselves.
    device : torch.device
    """

    def __init__(self, rule: HeadRule, rows: int, heads: int, device: torch.device) -> None:
        self.rule = rule
        size = rule.image
        # The token of a later line that overwrites each token; none yet.
        self.dies = torch.full((rows, heads, size), size, device=device)
        if rule.ring and rule.evicts:
            self.dies[:] = torch.arange(size, device=device) + rule.capacity - rule.anchors
            self.dies[..., : rule.anchors] = size
        self.score = torch.zeros(rows, heads, size, device=device)

    def visible(self, first: int, last: int) -> Tensor:
        """``[rows, heads, W, last]`` bool: which tokens each query of the line ``first`` to ``last`` sees."""
        device = self.dies.device
        query = torch.arange(first, last, device=device)[:, None]
        seen = torch.arange(last, device=device)
        return (seen <= query) & (self.dies[:, :, None, :last] > query)

    def refined(self, score: Tensor, value: Tensor) -> Tensor:
        """``score [rows, heads, drawn]`` as victims are chosen by it; ``value [rows, heads, drawn, D]``."""
        drawn = score.shape[-1]
        if self.rule.value_norm:
            score = score * value.norm(dim=-1)
        if self.rule.smooth_row:
            held = self.dies[..., :drawn] >= self.rule.image
            token = torch.arange(drawn, device=score.device).expand(score.shape)
            score = smooth_row(score.masked_fill(~held, 0), token, held, self.rule)
        return score

    def end_line(self, score: Tensor) -> None:
        """Choose the next line's victims by ``score [rows, heads, drawn]``, lowest first, older first."""
        rule, drawn = self.rule, score.shape[-1]
        due = rule.victims_due(drawn) if rule.scores else 0
        if not due:
            return
        token = torch.arange(drawn, device=score.device)
        held = self.dies[..., :drawn] >= rule.image
        candidate = held & (token >= rule.anchors) & (token < drawn - rule.recent)
        order = score.masked_fill(~candidate, torch.inf).argsort(dim=-1, stable=True)[..., :due]
        # Free slots are used first, so the last `due` tokens of the next line overwrite.
        line = min(rule.line, rule.image - drawn)
        when = drawn + line - due + torch.arange(due, device=score.device)
        self.dies.scatter_(-1, order, when.expand(order.shape))
