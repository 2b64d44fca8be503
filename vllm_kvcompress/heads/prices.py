"""What a budget costs on one model, from its head profile: predicted loss, types, bytes. No torch."""

from collections.abc import Iterable
from dataclasses import dataclass

from vllm_kvcompress.heads.fit import Assignment
from vllm_kvcompress.heads.paged import TYPICAL_PREFIX, Pages, picture_bytes
from vllm_kvcompress.heads.profile import HeadProfile
from vllm_kvcompress.heads.tried import Trial, Wanted
from vllm_kvcompress.policy import AUTO, MAX_TYPES, Policy
from vllm_kvcompress.policy.rule import SIDE_BYTES

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
BUDGETS: tuple[float, ...] = (0.5, 1 / 3, 0.25, 0.2, 1 / 6, 1 / 8, 0.1)


@dataclass(frozen=True, eq=False)
class Price:
    """One budget.

    Parameters
    ----------
    budget : float
        A share of the picture.
    assignment : Assignment
        What the preset `fitted` would serve.
    trial : Trial or None
        What was tried for it.
    resident, full : int
        KV bytes of a picture with a 20-token prompt, and with the full cache.
    """

    budget: float
    assignment: Assignment
    trial: Trial | None
    resident: int
    full: int

    @property
    def types(self) -> str:
        """The head types with their heads, as the start-up log names them."""
        pairs = zip(self.assignment.rules, self.assignment.counts, strict=True)
        return "; ".join(f"{rule.name}: {count}" for rule, count in pairs)

    @property
    def in_a_gib(self) -> int:
        """Pictures at once in a GiB of KV memory."""
        return 2**30 // self.resident


def price(profile: HeadProfile, budget: float | str, types: int = MAX_TYPES) -> Price:
    """Fit one budget (or ``auto``: the smallest within the tolerance). Raises ValueError, one line."""
    curves = profile.loss_curves
    raster = curves.raster
    assert profile.head_size is not None
    slot = 2 * profile.head_size * ITEM_BYTES.get(profile.dtype or "", 2)
    pages = Pages(slot, SIDE_BYTES)
    if budget == AUTO:
        wanted = Wanted(AUTO, types, pages)
    else:
        policy = Policy("fitted", float(budget))
        policy.check(raster)
        wanted = Wanted(policy.slots(raster), types, pages)
    trial = profile.trial(wanted)
    assignment = wanted.served(curves, trial)
    share = assignment.mean_slots / raster.tokens if budget == AUTO else float(budget)
    assert assignment.page_tokens is not None
    slots = [rule.capacity for rule in assignment.rules]
    weights = pages.weights(assignment.rules).tolist()
    resident = picture_bytes(assignment.counts, slots, assignment.page_tokens, weights, TYPICAL_PREFIX)
    full = (TYPICAL_PREFIX + raster.tokens) * assignment.types.size * slot
    return Price(share, assignment, trial, resident, full)


def prices(profile: HeadProfile, budgets: Iterable[float] = BUDGETS) -> list[Price]:
    """Every budget that the grid has room for."""
    found = []
    for budget in budgets:
        try:
            found.append(price(profile, budget))
        except ValueError:
            continue
    return found
