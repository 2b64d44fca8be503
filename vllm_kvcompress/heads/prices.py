"""What a budget costs on one model, from its head profile: predicted loss, types, bytes. No torch."""

from collections.abc import Iterable
from dataclasses import dataclass

from vllm_kvcompress.heads.fit import Assignment
from vllm_kvcompress.heads.paged import TYPICAL_PREFIX, Pages, picture_bytes
from vllm_kvcompress.heads.profile import HeadProfile
from vllm_kvcompress.heads.tried import Trial, Wanted
from vllm_kvcompress.policy import AUTO, MAX_TYPES, TOLERANCE, Policy
from vllm_kvcompress.policy.rule import SIDE_BYTES

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "fp8": 1, "fp8_e4m3": 1}
BUDGETS: tuple[float, ...] = (0.5, 1 / 3, 0.25, 0.2, 1 / 6, 1 / 8, 0.1)


@dataclass(frozen=True)
class Served:
    """What a server's settings make of a fit, beside its budget; the defaults are a server's own.

    Parameters
    ----------
    max_types : int
        Head types at most.
    tolerance : float
        With ``auto``.
    dtype : str, optional
        Of the cache, in `ITEM_BYTES`; None: the profile's.
    ranks : int
        Of tensor parallelism.
    """

    max_types: int = MAX_TYPES
    tolerance: float = TOLERANCE
    dtype: str | None = None
    ranks: int = 1


AS_SERVED = Served()


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
        KV bytes of a picture with a 20-token prompt, and with the full cache; of one rank.
    ranks : int
        That share the heads.
    """

    budget: float
    assignment: Assignment
    trial: Trial | None
    resident: int
    full: int
    ranks: int = 1

    @property
    def types(self) -> str:
        """The head types with the heads of a rank, as the start-up log names them."""
        pairs = zip(self.assignment.rules, self.assignment.counts, strict=True)
        return "; ".join(f"{rule.name}: {count // self.ranks}" for rule, count in pairs)

    @property
    def in_a_gib(self) -> int:
        """Pictures at once in a GiB of KV memory."""
        return 2**30 // self.resident


def price(profile: HeadProfile, budget: float | str, served: Served = AS_SERVED) -> Price:
    """Fit one budget (or ``auto``: the smallest within the tolerance). Raises ValueError, one line."""
    curves = profile.loss_curves
    raster = curves.raster
    assert profile.head_size is not None
    slot = 2 * profile.head_size * ITEM_BYTES.get(served.dtype or profile.dtype or "", 2)
    pages = Pages(slot, SIDE_BYTES)
    if budget == AUTO:
        wanted = Wanted(AUTO, served.max_types, pages, served.ranks, served.tolerance)
    else:
        policy = Policy("fitted", float(budget))
        policy.check(raster)
        wanted = Wanted(policy.slots(raster), served.max_types, pages, served.ranks)
    trial = profile.trial(wanted)
    assignment = wanted.served(curves, trial)
    share = assignment.mean_slots / raster.tokens if budget == AUTO else float(budget)
    assert assignment.page_tokens is not None
    slots = [rule.capacity for rule in assignment.rules]
    weights = pages.weights(assignment.rules).tolist()
    counts = assignment.of_rank(0, served.ranks).counts
    resident = picture_bytes(counts, slots, assignment.page_tokens, weights, TYPICAL_PREFIX)
    full = (TYPICAL_PREFIX + raster.tokens) * sum(counts) * slot
    return Price(share, assignment, trial, resident, full, served.ranks)


def prices(
    profile: HeadProfile, served: Served = AS_SERVED, budgets: Iterable[float] = BUDGETS
) -> list[Price]:
    """Every budget that the grid has room for; the whole picture where it has room for none of them."""
    first = profile.loss_curves.candidates[0]
    least = max(first.line, int(profile.loss_curves.slots.min()))
    raster = profile.loss_curves.raster
    there = [budget for budget in budgets if Policy("fitted", budget).slots(raster) >= least]
    return [price(profile, budget, served) for budget in there or [1.0]]
