"""Tensor parallelism: as many heads of every type on each rank. No torch, no vLLM.

vLLM gives all ranks pages of one size and one block table, so a type must have equally many heads on each.
Heads are therefore fitted in groups of one from each rank that share a type, those together that by
themselves would take about as many slots; afterwards every rank's heads change places among its own types.
"""

import numpy as np
from numpy.typing import NDArray

from vllm_kvcompress.heads.paged import within

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def rank_of_heads(layers: int, cache_heads: int, ranks: int) -> Ints:
    """``[layers * cache_heads]``: the rank that each cache head lies on, branch * kv_heads + KV head.

    Raises ValueError, one line, where the KV heads of a branch can't be shared out evenly.
    """
    kv_heads = cache_heads // 2
    if kv_heads % ranks:
        raise ValueError(f"{kv_heads} KV heads can't be shared out evenly among {ranks} ranks")
    return np.tile(np.arange(cache_heads) % kv_heads // (kv_heads // ranks), layers)


def grouped(losses: Floats, slots: Ints, price: float, rank: Ints) -> Ints:
    """``[groups, ranks]``: heads that are to share a type, one of each rank.

    Parameters
    ----------
    losses : array
        ``[heads, candidates]``.
    slots : array
        ``[candidates]`` image slots.
    price : float
        Loss that a slot is worth: each head's own choice at this price orders it among its rank's.
    rank : array
        ``[heads]``, as `rank_of_heads`.
    """
    own = (losses + price * slots).argmin(1)
    order = np.lexsort((np.arange(len(own)), own, slots[own]))  # by slots, then by candidate
    return np.stack([order[rank[order] == r] for r in range(rank.max() + 1)], 1)


def resettled(losses: Floats, choice: Ints, groups: Ints) -> Ints:
    """The least costly types of all heads, of those that have as many of each type on every rank.

    Parameters
    ----------
    losses : array
        ``[heads, types]``.
    choice : array
        ``[groups]``: the type of each group's heads, from which each rank's counts are taken.
    groups : array
        ``[groups, ranks]``.

    Returns
    -------
    array
        ``[heads]``.
    """
    settled = np.empty(len(losses), np.int64)
    counts = np.bincount(choice, minlength=losses.shape[1])
    for mine in groups.T:
        found = within(losses[mine], losses[mine].argmin(1), counts)
        settled[mine] = choice if found is None else found
    return settled


def least_of_each(margin: Floats, share: int, ranks: int) -> NDArray[np.bool_]:
    """``[layers, kv_heads]`` bool: the ``share`` heads of least ``margin`` of each rank; ties: the first."""
    layers, heads = margin.shape
    mine = margin.reshape(layers, ranks, heads // ranks).swapaxes(0, 1).reshape(ranks, -1)
    chosen = np.zeros(mine.shape, np.bool_)
    np.put_along_axis(chosen, mine.argsort(1, kind="stable")[:, :share], True, 1)
    return chosen.reshape(ranks, layers, heads // ranks).swapaxes(0, 1).reshape(layers, heads)


def own_heads(types: Ints, rank: int, ranks: int) -> Ints:
    """``[layers, 2 * kv_heads]`` -> ``[layers, 2 * kv_heads / ranks]``: one rank's heads of both branches."""
    layers, heads = types.shape
    return types.reshape(layers, 2, ranks, heads // 2 // ranks)[:, :, rank].reshape(layers, -1)
