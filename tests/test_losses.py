"""Loss curves against the definition, worked out by the dense oracle head by head."""

import numpy as np
import pytest
import torch
from oracle import draw, one_thread

from vllm_kvcompress.heads.losses import LossMeter
from vllm_kvcompress.policy import HeadRule

_threads = pytest.fixture(scope="module", autouse=True)(one_thread)

W, IMAGE, SIZE, HIDDEN = 4, 24, 8, 16
CANDIDATES = (
    HeadRule(4, W, IMAGE, recent=4, ring=True),
    HeadRule(9, W, IMAGE, 2, 7, ring=True),
    HeadRule(9, W, IMAGE, 1, 3),
    HeadRule(10, W, IMAGE, 1, 4, decay=0.5),
    HeadRule(11, W, IMAGE, 2, 4, value_norm=True, smooth_row=True),
    HeadRule(9, W, IMAGE, 0, 0, decay=1.0, smooth_row=True),
    HeadRule(IMAGE, W, IMAGE),
)


@pytest.mark.parametrize(("kv_heads", "group"), [(2, 1), (1, 3)])
def test_losses_are_the_definition(kv_heads: int, group: int) -> None:
    gen = torch.Generator().manual_seed(group)
    prefix, heads = [3, 5], 2 * kv_heads
    steps = max(prefix) + IMAGE
    q = torch.randn(2, steps, heads * group, SIZE, generator=gen)
    k, v = (torch.randn(2, steps, heads, SIZE, generator=gen) for _ in range(2))
    weight = torch.randn(HIDDEN, kv_heads * group * SIZE, generator=gen)
    residual = torch.randn(2, steps, 2, HIDDEN, generator=gen)
    meter = LossMeter(CANDIDATES, 2, heads, lambda layer: weight * (1 + layer), guidance=3.0)
    meter.begin(torch.tensor(prefix))
    for layer in (0, 1):
        out = meter.attend(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), layer, 0.3)
        meter.residual(residual.flatten(0, 2))
    assert out.shape == (2 * steps, heads * group, SIZE)

    want, guided = np.zeros((heads, len(CANDIDATES))), np.zeros((kv_heads, len(CANDIDATES)))
    for row, before in enumerate(prefix):
        total = before + IMAGE
        norm = residual[row].double().numpy() ** 2
        errors = np.zeros((heads, len(CANDIDATES), total, HIDDEN))
        for head in range(heads):
            mine = q[row, :total, head * group : (head + 1) * group].double().numpy()
            key, value = (x[row, :total, head].double().numpy() for x in (k, v))
            full = draw(CANDIDATES[-1], before, mine, key, value, 0.3).out
            branch, kv_head = divmod(head, kv_heads)
            columns = weight[:, kv_head * group * SIZE : (kv_head + 1) * group * SIZE].double().numpy()
            for n, rule in enumerate(CANDIDATES):
                apart = (draw(rule, before, mine, key, value, 0.3).out - full).reshape(total, -1) @ columns.T
                share = (apart**2).sum(1)[before:] / norm[before:total, branch].sum(1)
                want[head, n] += share.sum()
                errors[head, n] = apart
        both = ((3 * errors[:kv_heads] - 2 * errors[kv_heads:])[:, :, before:] ** 2).sum(-1)
        guided += (both / norm[before:total].sum(-1).mean(-1)).sum(-1)
    want /= 2 * IMAGE
    guided /= 2 * IMAGE
    found = meter.curves.numpy()
    np.testing.assert_allclose(meter.guided[0], guided, rtol=2e-4, atol=1e-7)
    np.testing.assert_allclose(meter.guided[1], 4 * guided, rtol=2e-4, atol=1e-7)
    np.testing.assert_allclose(found[0], want, rtol=2e-4, atol=1e-7)
    np.testing.assert_allclose(found[1], 4 * want, rtol=2e-4, atol=1e-7)
    assert (found[:, :, -1] == 0).all()
    assert (found[:, :, :-1] > 0).all()


def test_full_attention_comes_out(monkeypatch: pytest.MonkeyPatch) -> None:
    gen = torch.Generator().manual_seed(0)
    meter = LossMeter(CANDIDATES, 1, 2, lambda layer: torch.eye(SIZE))
    meter.begin(torch.tensor([2]))
    q, k, v = (torch.randn(2 + IMAGE, 2, SIZE, generator=gen) for _ in range(3))
    out = meter.attend(q, k, v, 0, 0.5)
    logits = torch.einsum("qhd,khd->hqk", q, k) * 0.5
    hidden = torch.ones_like(logits, dtype=torch.bool).triu(1)
    want = torch.einsum("hqk,khd->qhd", logits.masked_fill(hidden, -torch.inf).softmax(-1), v)
    torch.testing.assert_close(out, want, atol=1e-5, rtol=0)


def test_a_residual_without_its_attention_is_an_error() -> None:
    meter = LossMeter(CANDIDATES, 1, 2, lambda layer: torch.eye(SIZE))
    meter.begin(torch.tensor([2]))
    with pytest.raises(AssertionError, match="without its attention"):
        meter.residual(torch.zeros(4, SIZE))
