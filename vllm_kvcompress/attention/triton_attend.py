"""Triton: one query group over the resident slots of one cache head, and the scores that this leaves.

Logits are in base 2: ``scale`` is the caller's times log2(e). Slots that a tile must not read (beyond the
visible ones, or the new token's own) are never loaded: they may hold anything, a NaN too.
"""

import triton
import triton.language as tl

# Triton's interpreter multiplies the bit patterns of bfloat16 numbers in a matrix product.
WIDEN = tl.constexpr(bool(triton.knobs.runtime.interpret))
LOW = tl.constexpr(-1e38)  # below any logit; finite, so that LOW - LOW is 0


@triton.jit
def to_cache(x, cache: tl.constexpr):
    """``x`` in the cache's dtype; 8-bit numbers (e4m3) saturate at 448, as torch's and vLLM's do."""
    if cache == tl.float8e4nv:
        x = tl.minimum(tl.maximum(x.to(tl.float32), -448.0), 448.0)
        if WIDEN:  # the interpreter truncates: round to four significant bits, or steps of 2**-9, beforehand
            bits = x.to(tl.int32, bitcast=True)
            coarse = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
            small = (tl.abs(x) + 24576.0) - 24576.0
            x = tl.where(tl.abs(x) < 0.015625, tl.where(x < 0, -small, small), coarse)
    return x.to(cache)


@triton.jit
def attend_single(
    query, key, value, pages, kv_block, table, page, per_slot, begin, visible, own, prefix, logits, scale,
    scores, DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A single query head, on the vector units: every place of a tile is an online softmax of its own.

    Nothing else crosses warps before the places are merged at the end, so without scores the loop has no
    barrier, and each warp keeps its own loads in flight. At one multiply per loaded number the arithmetic
    is about a quarter of what the card could do in the time the bytes take.

    Parameters
    ----------
    query, key, value : [WIDTH]
        ``key`` and ``value`` are the new token's, in the cache's dtype.
    pages
        Pointer to K of this cache head in page 0; ``kv_block`` is the step to the next page.
    table, page, per_slot
        Pointer to the row's block table; slots per page, and 1 / page as in `KindArgs`.
    begin, visible, own, prefix
        First slot that is seen; resident slots; logical slot of the new token; prompt tokens.
    logits
        Pointer to scratch for logical slot 0; [capacity] float32 from the prefix's end on, written if
        ``scores``.

    Returns
    -------
    mixed [1, WIDTH], top [1], total [1], own_logit [1], all float32
        Sum of values weighted with exp2(logit - top); total of these weights; the new token's logit.
    """
    place, dim = tl.arange(0, BLOCK), tl.arange(0, WIDTH)
    query = query.to(tl.float32) * scale
    key, value = key.to(tl.float32), value.to(tl.float32)
    top = tl.full([BLOCK], LOW, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    mixed = tl.zeros([BLOCK, WIDTH], tl.float32)
    # The page numbers of a tile are loaded one tile ahead: K and V need not wait for them.
    nth = ((begin + place + 0.5) * per_slot).to(tl.int32)
    block = tl.load(table + nth, mask=begin + place < visible, other=0)
    for start in tl.range(begin, visible, BLOCK, num_stages=STAGES):
        slot = start + place
        use = (slot < visible) & (slot != own)
        nth = ((slot + 0.5) * per_slot).to(tl.int32)
        cell = pages + (block.to(tl.int64) * kv_block + (slot - nth * page) * (2 * DIM))
        at, mask = cell[:, None] + dim[None, :], use[:, None] & (dim < DIM)[None, :]
        old_key = tl.load(at, mask=mask, other=0.0, eviction_policy="evict_first")
        old_value = tl.load(at + DIM, mask=mask, other=0.0, eviction_policy="evict_first")
        after = slot + BLOCK
        nth = ((after + 0.5) * per_slot).to(tl.int32)
        block = tl.load(table + nth, mask=after < visible, other=0)
        logit = tl.where(use, tl.sum(old_key.to(tl.float32) * query[None, :], 1), LOW)
        if scores:  # the only step for which warps meet
            tl.store(logits + slot, logit, mask=use & (slot >= prefix))
        higher = tl.maximum(top, logit)
        fade = tl.exp2(top - higher)
        weight = tl.where(use, tl.exp2(logit - higher), 0.0)
        total = total * fade + weight
        mixed = mixed * fade[:, None] + weight[:, None] * old_value.to(tl.float32)
        top = higher
    own_logit = tl.sum(query * key, 0)
    best = tl.maximum(tl.max(top, 0), own_logit)
    share, own_weight = tl.exp2(top - best), tl.exp2(own_logit - best)
    whole = tl.sum(total * share, 0) + own_weight
    merged = tl.sum(mixed * share[:, None], 0) + own_weight * value
    one = tl.zeros([1], tl.float32)
    return merged[None, :], one + best, one + whole, one + own_logit


@triton.jit
def product(a, b, onto):
    """``onto`` + a b, in float32."""
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, onto, input_precision="tf32x3")


@triton.jit
def attend_group(
    query, key, value, pages, kv_block, table, page, per_slot, begin, visible, own, prefix, logits,
    logits_group, scale, scores, GROUP: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    LANES: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Several query heads of one KV head, on the matrix units; arguments as in `attend_single`.

    ``query`` is [LANES, WIDTH] with zeros past GROUP, ``logits`` [GROUP, capacity], and what is returned
    has LANES rows. Products are of numbers of the query's dtype. Probabilities go into them as the sum of two
    such numbers, which keeps them to about twice its precision, as good as float32 beside the rounding of
    the output.
    """
    place, dim, group = tl.arange(0, BLOCK), tl.arange(0, WIDTH), tl.arange(0, LANES)
    own_logit = tl.sum(query.to(tl.float32) * key.to(tl.float32)[None, :], 1) * scale
    top = own_logit
    total = tl.full([LANES], 1.0, tl.float32)
    mixed = tl.zeros([LANES, WIDTH], tl.float32) + value.to(tl.float32)[None, :]
    since = tl.where(scores, prefix, visible)  # a branch would cost registers, and save no barrier here
    for start in tl.range(begin, visible, BLOCK, num_stages=STAGES):
        slot = start + place
        use = (slot < visible) & (slot != own)
        nth = ((slot + 0.5) * per_slot).to(tl.int32)
        block = tl.load(table + nth, mask=slot < visible, other=0)
        cell = pages + (block.to(tl.int64) * kv_block + (slot - nth * page) * (2 * DIM))
        at, mask = cell[:, None] + dim[None, :], use[:, None] & (dim < DIM)[None, :]
        old_key = tl.load(at, mask=mask, other=0.0, eviction_policy="evict_first")
        old_value = tl.load(at + DIM, mask=mask, other=0.0, eviction_policy="evict_first")
        old_key, old_value = old_key.to(query.dtype), old_value.to(query.dtype)
        logit = product(query, tl.trans(old_key), tl.zeros([LANES, BLOCK], tl.float32)) * scale
        to = logits + group[:, None] * logits_group + slot[None, :]
        tl.store(to, logit, mask=(group < GROUP)[:, None] & (use & (slot >= since))[None, :])
        logit = tl.where(use[None, :], logit, LOW)
        higher = tl.maximum(top, tl.max(logit, 1))
        fade = tl.exp2(top - higher)
        weight = tl.exp2(logit - higher[:, None])  # 0 where LOW: `higher` is at least the new token's logit
        total = total * fade + tl.sum(weight, 1)
        coarse = weight.to(old_value.dtype)
        mixed = product(coarse, old_value, mixed * fade[:, None])
        if old_value.dtype != tl.float32:
            fine = (weight - coarse.to(tl.float32)).to(old_value.dtype)
            mixed = product(fine, old_value, mixed)
        top = higher
    return mixed, top, total, own_logit


@triton.jit
def add_scores(
    score, score_block, table, page, per_slot, visible, own, prefix, logits, logits_group, top, total,
    GROUP: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Add each image slot's probability, summed over the group, to its score; not the new token's own.

    ``score`` points to the cache head's scores in page 0; ``logits`` [GROUP, capacity], ``top`` and
    ``total`` [LANES] are what the first pass left.
    """
    TILE: tl.constexpr = 128
    tl.debug_barrier()  # the logits were written by other threads of this program
    place, group = tl.arange(0, TILE), tl.arange(0, LANES)
    for start in tl.range(prefix, visible, TILE):
        slot = start + place
        use = (slot < visible) & (slot != own)
        nth = ((slot + 0.5) * per_slot).to(tl.int32)
        block = tl.load(table + nth, mask=use, other=0)
        at = score + (block.to(tl.int64) * score_block + (slot - nth * page))
        before = tl.load(at, mask=use, other=0.0)
        from_ = logits + group[:, None] * logits_group + slot[None, :]
        logit = tl.load(from_, mask=(group < GROUP)[:, None] & use[None, :], other=LOW)
        mass = tl.sum(tl.exp2(logit - top[:, None]) / total[:, None], 0)
        tl.store(at, before + mass, mask=use)
