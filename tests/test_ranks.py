"""Head types for tensor parallelism: as many of each on every rank, at little loss."""

import numpy as np
import pytest
import torch
from oracle import made_up_curves
from test_fit import GEOMETRIES, GRID, made_up

from vllm_kvcompress.cache.paging import MAX_WASTE
from vllm_kvcompress.cache.plan import ModelShape, plan_layout, split_pages
from vllm_kvcompress.heads.fit import by_threshold, fit, smallest_budget
from vllm_kvcompress.heads.paged import Pages
from vllm_kvcompress.heads.ranks import own_heads, rank_of_heads
from vllm_kvcompress.policy import Policy, Raster


def counts(types: np.ndarray, ranks: int, kinds: int) -> list[list[int]]:
    """Heads of each type on each rank."""
    return [np.bincount(own_heads(types, r, ranks).ravel(), minlength=kinds).tolist() for r in range(ranks)]


def test_a_rank_has_its_heads_of_both_branches() -> None:
    types = np.arange(16).reshape(2, 8)  # two layers, two branches of four KV heads
    assert own_heads(types, 1, 2).tolist() == [[2, 3, 6, 7], [10, 11, 14, 15]]
    assert rank_of_heads(2, 8, 2).tolist() == [0, 0, 1, 1, 0, 0, 1, 1] * 2
    assert own_heads(types, 0, 1) is not None
    with pytest.raises(ValueError, match="4 KV heads can't be shared out evenly among 3 ranks"):
        rank_of_heads(2, 8, 3)


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("budget", [0.2, 1 / 6])
def test_every_rank_gets_as_many_heads_of_every_type(ranks: int, budget: float) -> None:
    layers, heads, slot = GEOMETRIES["1B"]
    curves, mean = made_up("1B"), np.floor(budget * GRID.tokens)
    free = fit(curves, mean, pages=Pages(slot, 8))
    found = fit(curves, mean, pages=Pages(slot, 8), ranks=ranks)
    mine = counts(found.types, ranks, len(found.rules))
    assert mine == [mine[0]] * ranks
    assert min(mine[0]) > 0
    assert found.mean_slots <= mean + 1e-9
    assert free.loss is not None
    assert found.loss is not None
    assert found.loss <= 1.2 * free.loss, "what equal counts cost"
    shape = ModelShape(layers, heads // 2 // ranks, 128)
    layouts = [plan_layout(found.of_rank(r, ranks), shape, torch.bfloat16) for r in range(ranks)]
    assert len({(one.page_bytes, one.paging.tokens, *one.counts) for one in layouts}) == 1
    assert layouts[0].paging.waste <= MAX_WASTE


def test_one_rank_is_the_plain_fit() -> None:
    curves = made_up("1B", 1)
    plain, one = (fit(curves, 96, pages=Pages(512, 8), **more) for more in ({}, {"ranks": 1}))
    assert plain.rules == one.rules
    assert np.array_equal(plain.types, one.types)
    assert plain.loss == one.loss


def test_ranks_that_are_alike_lose_nothing() -> None:
    """Each rank's heads a copy of the other's: what is best for one is best for both."""
    half = made_up_curves(Raster(8, 8), (4, 4))
    twice = np.repeat(half.losses.reshape(4, 2, 1, 2, -1), 2, 2).reshape(4, 8, -1)
    both = type(half)(half.candidates, twice)
    alone, found = fit(half, 24), fit(both, 24, ranks=2)
    assert found.loss == pytest.approx(alone.loss)
    assert found.rules == alone.rules


def test_auto_budget_keeps_its_tolerance() -> None:
    curves = made_up_curves(Raster(8, 8), (3, 8))
    found = smallest_budget(curves, 0.05, pages=Pages(64, 8), ranks=2)
    assert found.loss is not None
    assert found.loss <= 0.05
    mine = counts(found.types, 2, len(found.rules))
    assert mine[0] == mine[1]


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("share", [0.02, 0.25, 0.5, 0.97])
def test_a_threshold_splits_every_rank_alike(ranks: int, share: float) -> None:
    random = np.random.default_rng(0)
    scores = random.random((24, 16)) ** 2
    scores[:, :4] *= 0.3  # the first rank's heads are the local ones
    threshold = np.quantile(scores, share)
    policy = Policy("decoupled", 0.2)
    found = by_threshold(policy, GRID, scores <= threshold, scores - threshold, split_pages, ranks)
    mine = counts(found.types, ranks, len(found.rules))
    assert mine == [mine[0]] * ranks
    assert len(found.rules) == 2
    assert abs(mine[0][0] / sum(mine[0]) - share) < 0.05
    for rank in range(ranks):  # the most local of each rank
        own = own_heads(found.types, rank, ranks)[:, : 16 // ranks]
        of_rank = scores[:, rank * 16 // ranks : (rank + 1) * 16 // ranks]
        assert of_rank[own == 0].max() <= of_rank[own == 1].min()
