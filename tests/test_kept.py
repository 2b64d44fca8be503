"""What the cache says it keeps, against pages that were filled by hand."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_kvcompress.attention.pages import HeadPages, HeadType
from vllm_kvcompress.cache.kept import held_by
from vllm_kvcompress.policy.rule import HeadRule

LINE, IMAGE = 4, 24


@given(
    heads=st.integers(1, 3), page=st.integers(1, 5), prefix=st.integers(0, 7), drawn=st.integers(1, IMAGE),
    capacity=st.integers(2 * LINE, IMAGE), ring=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_counts_are_those_of_the_pages(heads, page, prefix, drawn, capacity, ring, seed):
    rule = HeadRule(capacity=capacity, line=LINE, image=IMAGE, anchors=2, recent=0 if ring else 2, ring=ring)
    random = torch.Generator().manual_seed(seed)
    blocks = -(-(prefix + capacity) // page)
    table = torch.randperm(blocks + 3, generator=random)[:blocks].int()
    token = torch.full((blocks + 3, heads, page if rule.scores else 0), -1, dtype=torch.int16)
    expected = torch.zeros(IMAGE, dtype=torch.int64)
    for head in range(heads):
        if rule.scores:  # any tokens: which ones is the scores' affair
            held = torch.randperm(drawn, generator=random)[: rule.resident(drawn)].tolist()
        else:  # the anchors, and the last ones
            held = [t for t in range(drawn) if t < rule.anchors or t >= drawn - (capacity - rule.anchors)]
            held = held if rule.evicts else list(range(drawn))
        for slot, index in enumerate(held):
            expected[index] += 1
            if rule.scores:
                at = prefix + slot
                token[table[at // page], head, at % page] = index
    none = torch.empty(0)
    kind = HeadType(
        HeadPages(torch.empty(blocks + 3, heads, page, 2), none, token, none), rule, torch.zeros(heads), none
    )
    assert held_by(kind, table, prefix, drawn).tolist() == expected.tolist()
