"""HeadKV-AR's idea against a naive oracle: python lists, float64, one head and one token at a time."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import one_thread

from vllm_kvcompress.eval.online import BASELINES, OnlineRule, budgets, parse_baseline
from vllm_kvcompress.eval.online_drawing import OnlineCache
from vllm_kvcompress.eval.online_replay import EarlyLines, OnlineReplay
from vllm_kvcompress.heads.dense import DenseReplay
from vllm_kvcompress.heads.replay import Rows
from vllm_kvcompress.policy import Policy, Raster

_threads = pytest.fixture(scope="module", autouse=True)(one_thread)

W, LINES, SIZE, LAYERS, KV_HEADS, SCALE = 4, 7, 8, 2, 2, 0.4
IMAGE, HEADS = W * LINES, 2 * KV_HEADS
PREFIX = (3, 5)
RASTER = Raster(LINES, W)
RULES = {
    "two sizes": OnlineRule(early=2, near=1, lines=1),
    "nobody rings": OnlineRule(early=3, near=1, lines=1, ring=False),
    "strata": OnlineRule(early=2, near=1, local=0.25, lines=1, strata=True, ring=False),
    "by layer": OnlineRule(early=2, near=1, lines=1, layers=True, halved=True),
    "in proportion": OnlineRule(early=3, near=1, local=0),
    "in proportion, scored": OnlineRule(early=3, near=1, local=0, ring=False, prompt=True, strata=True),
    "more than the budget holds": OnlineRule(early=9, near=9, lines=9),
}


def line_ar(mean: int, halved: bool = False):
    """LineAR's rule of so many slots."""
    policy = Policy("line_ar", mean / IMAGE, score="averaged" if halved else None)
    rule = policy.rules(RASTER, 0, 1)[1]
    assert rule is not None
    assert rule.capacity == mean
    return rule


def world(group: int, seed: int) -> list[torch.Tensor]:
    """Random q, k and v ``[rows, layers, steps, heads, D]`` whose heads look near in unlike measure."""
    gen = torch.Generator().manual_seed(seed)
    steps = max(PREFIX) + IMAGE
    q = torch.randn(len(PREFIX), LAYERS, steps, HEADS * group, SIZE, generator=gen)
    k, v = (torch.randn(len(PREFIX), LAYERS, steps, HEADS, SIZE, generator=gen) for _ in range(2))
    drift = torch.rand(LAYERS, 1, HEADS, generator=gen) * torch.arange(steps)[:, None] / steps
    k[..., 0] += 6 * drift
    q[..., 0] = q[..., 0].abs() + 1
    return [q, k, v]


def rows_of(image: int) -> Rows:
    return Rows(torch.tensor(PREFIX, dtype=torch.int32), image, max(PREFIX) + image)


def replayed(q, k, v, online: OnlineRule, rule):
    """Outputs ``[rows, layers, steps, heads * group, D]`` and budgets, as the harness makes them."""
    rows = rows_of(online.early_tokens(rule))
    early = EarlyLines(rows, online.near_tokens(rule), online.prompt, LAYERS, HEADS)
    for layer in range(LAYERS):
        early.attend(*(x[:, layer, : rows.steps].flatten(0, 1) for x in (q, k, v)), layer, SCALE)
    found = budgets(early.outside, online, rule)
    layout = SimpleNamespace(rules=(rule,), types=((0,) * HEADS,) * LAYERS)
    method = OnlineReplay(rows_of(IMAGE), layout, found, online.strata)  # type: ignore[arg-type]
    out = [method.layer(q[:, layer], k[:, layer], v[:, layer], layer, SCALE) for layer in range(LAYERS)]
    return torch.stack(out, 1), found


def stepped(q, k, v, online: OnlineRule | None, rule):
    """The same outputs, drawn one by one with the prompts' ends together."""
    words = max(PREFIX)
    begins = torch.tensor([words - p for p in PREFIX])
    cache = OnlineCache(LAYERS, KV_HEADS, SIZE, words, begins, rule, online)
    out = torch.zeros_like(q)
    row = torch.arange(len(PREFIX))
    for slot in range(words + IMAGE):
        at = (slot - begins).clamp(min=0)
        for layer in range(LAYERS):
            mine = [x[row, layer, at] for x in (q, k, v)]
            out[row, layer, at] = cache.attend(*mine, layer, SCALE)
        cache.end_step()
    return out


def naive_attention(q, k, v, seen: list[int]):
    """One query ``[group, D]``: output, and the probability of each token seen."""
    logits = np.array([[query @ k[t] * SCALE for t in seen] for query in q])
    weight = np.exp(logits - logits.max(1, keepdims=True))
    weight /= weight.sum(1, keepdims=True)
    return weight @ v[seen], weight


def naive_outside(q, k, v, prefix: int, online: OnlineRule, early: int, near: int) -> float:
    total = 0.0
    for t in range(early):
        _, weight = naive_attention(q[prefix + t], k, v, list(range(prefix + t + 1)))
        for share in weight:
            far = sum(share[prefix + u] for u in range(t + 1) if t - u > near)
            total += far / (1 if online.prompt else share[prefix:].sum()) / len(weight)
    return total


def naive_order(online: OnlineRule, mass: dict[int, float], candidates: list[int]) -> list[int]:
    if not online.strata:
        return sorted(candidates, key=lambda t: (mass[t], t))
    left, order = list(candidates), []
    while left:
        most = max({t // W for t in left}, key=lambda n: (sum(t // W == n for t in left), -n))
        order.append(min((t for t in left if t // W == most), key=lambda t: (mass[t], t)))
        left.remove(order[-1])
    return order


def naive_head(q, k, v, prefix: int, online: OnlineRule, rule, early: int, slots: int, ring: bool):
    """Outputs of a head's image queries, and how many slots it held at each."""
    anchors = min(rule.anchors, (slots - W) // 4)
    recent = min(W, (slots - W - anchors) // 2)
    holds: list[int] = []
    queue: list[int] = []
    mass: dict[int, float] = {}
    out, held = [], []
    for t in range(IMAGE):
        if ring and t >= early:
            while len(holds) >= slots:
                holds.remove(min(u for u in holds if u >= anchors))
        elif t >= early and len(holds) == slots:
            holds.remove(queue.pop(0))
        holds.append(t)
        held.append(len(holds))
        now, weight = naive_attention(q[prefix + t], k, v, [*range(prefix), *(prefix + u for u in holds)])
        out.append(now)
        for n, u in enumerate(holds):
            mass[u] = mass.get(u, 0.0) + weight[:, prefix + n].sum()
        if (t + 1) % W:
            continue
        if t + 1 >= early and t + 1 < IMAGE and not ring:
            assert not queue
            order = naive_order(online, mass, [u for u in holds if anchors <= u < t + 1 - recent])
            for _ in range(len(holds) - slots):
                holds.remove(order.pop(0))
            queue = order[: max(0, W - (slots - len(holds)))]
        mass = {u: m * (0.5 if online.halved else 0) for u, m in mass.items()}
    return np.array(out), held


@pytest.mark.parametrize("mean", [11, 14, 17])
@pytest.mark.parametrize("name", RULES)
def test_heads_keep_what_their_first_lines_say(name: str, mean: int) -> None:
    online, group = RULES[name], 1 + mean % 2
    rule = line_ar(mean, online.halved)
    q, k, v = world(group, seed=mean)
    out, found = replayed(q, k, v, online, rule)
    early = min(online.early, mean // W) * W
    near = min(online.near * W, early // 2)
    assert found.early == early
    total = np.zeros(IMAGE)
    for row, prefix in enumerate(PREFIX):
        outside = np.zeros((LAYERS, HEADS))
        heads = {}
        for layer in range(LAYERS):
            for head in range(HEADS):
                mine = q[row, layer, :, head * group : (head + 1) * group].double().numpy()
                key, value = (x[row, layer, :, head].double().numpy() for x in (k, v))
                heads[layer, head] = mine, key, value
                outside[layer, head] = naive_outside(mine, key, value, prefix, online, early, near)
        for part in [[n] for n in range(LAYERS)] if online.layers else [range(LAYERS)]:
            ranked = sorted((outside[n, h], n, h) for n in part for h in range(HEADS))
            slots = [int(found.slots[row, n, h]) for _, n, h in ranked]
            assert slots == sorted(slots), "who looks further has no less"
            assert mean * len(slots) - len(slots) < sum(slots) <= mean * len(slots)
            if online.local:
                count = round(online.local * len(slots))
                small = min(rule.anchors + online.lines * W, mean)
                assert slots[:count] == [small] * count
                assert len(set(slots[count:])) == 1
        for (layer, head), (mine, key, value) in heads.items():
            slots, ring = int(found.slots[row, layer, head]), bool(found.ring[row, layer, head])
            assert not ring or online.ring
            want, held = naive_head(mine, key, value, prefix, online, rule, early, slots, ring)
            got = out[row, layer, prefix : prefix + IMAGE, head * group : (head + 1) * group]
            np.testing.assert_allclose(got.numpy(), want, atol=1e-5)
            total += held
    assert total.max() <= mean * LAYERS * HEADS * len(PREFIX), "never more memory than a preset has"
    assert len(found.slots.unique()) > 1 or name == "more than the budget holds"
    drawn = stepped(q, k, v, online, rule)
    for row, prefix in enumerate(PREFIX):
        image = slice(prefix, prefix + IMAGE)
        torch.testing.assert_close(drawn[row, :, image], out[row, :, image], atol=1e-5, rtol=0)


@pytest.mark.parametrize("halved", [False, True])
def test_equal_budgets_are_line_ar(halved: bool) -> None:
    rule = line_ar(13, halved)
    online = OnlineRule(early=2, near=1, lines=9, ring=False, halved=halved)
    q, k, v = world(2, seed=1)
    out, found = replayed(q, k, v, online, rule)
    assert (found.slots == 13).all()
    layout = SimpleNamespace(rules=(rule,), types=((0,) * HEADS,) * LAYERS)
    plain = DenseReplay(rows_of(IMAGE), layout.rules, layout.types)
    for layer in range(LAYERS):
        want = plain.layer(q[:, layer], k[:, layer], v[:, layer], layer, SCALE)
        torch.testing.assert_close(out[:, layer], want, atol=0, rtol=0)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("since", [W + 1, 3 * W, 5 * W + 2])
def test_nothing_later_is_known(name: str, since: int) -> None:
    online = RULES[name]
    rule = line_ar(14, online.halved)
    first, other = world(1, seed=3), world(1, seed=4)
    mixed = [x.clone() for x in first]
    for row, prefix in enumerate(PREFIX):
        for x, y in zip(mixed, other, strict=True):
            x[row, :, prefix + since :] = y[row, :, prefix + since :]
    (before, found), (after, changed) = (replayed(*x, online, rule) for x in (first, mixed))
    for row, prefix in enumerate(PREFIX):
        until = prefix + since
        torch.testing.assert_close(before[row, :, :until], after[row, :, :until], atol=1e-6, rtol=0)
        assert (before[row, :, until:] - after[row, :, until:]).abs().max() > 0.1
    if since >= found.early:
        assert (found.slots == changed.slots).all()


@settings(max_examples=60, derandomize=True, deadline=None)
@given(st.data())
def test_the_mean_over_a_pictures_heads_is_the_budget(data: st.DataObject) -> None:
    rule = line_ar(data.draw(st.integers(W, IMAGE - 1)))
    online = OnlineRule(
        local=data.draw(st.sampled_from([0, 0.1, 0.25, 0.5, 0.9])), lines=data.draw(st.integers(1, 8)),
        layers=data.draw(st.booleans()), ring=data.draw(st.booleans()),
    )  # fmt: skip
    shape = (data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4)))
    gen = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    outside = torch.rand(shape, generator=gen) ** data.draw(st.sampled_from([1, 8]))
    outside *= data.draw(st.sampled_from([0.0, 1.0]))
    found = budgets(outside, online, rule)
    sizes = found.slots if online.layers else found.slots.flatten(1)[:, None]
    mean = sizes.double().mean(-1)
    assert (mean <= rule.capacity).all()
    assert (mean > rule.capacity - 1).all()
    assert sum(heads for _, heads in found.types) == pytest.approx(shape[1] * shape[2])
    assert {int(name.split()[1]) for name, _ in found.types} == set(found.slots.flatten().tolist())
    assert found.slots.min() >= W
    assert found.slots.max() <= IMAGE
    assert online.ring or not found.ring.any()


def test_full_keeps_everything_step_by_step() -> None:
    q, k, v = world(2, seed=5)
    rule = replace(line_ar(14), capacity=IMAGE)
    out = stepped(q, k, v, None, rule)
    for row, prefix in enumerate(PREFIX):
        for layer in range(LAYERS):
            for head in range(HEADS):
                mine = q[row, layer, :, head * 2 : head * 2 + 2].double().numpy()
                key, value = (x[row, layer, :, head].double().numpy() for x in (k, v))
                for t in range(prefix + IMAGE):
                    want, _ = naive_attention(mine[t], key, value, list(range(t + 1)))
                    got = out[row, layer, t, head * 2 : head * 2 + 2]
                    np.testing.assert_allclose(got.numpy(), want, atol=1e-5)


def test_names_of_baselines() -> None:
    own = BASELINES["headkv_ar"]
    assert parse_baseline("headkv_ar") == own
    changed = parse_baseline("headkv_ar:early=3:local=0.5:ring=1:halved=0")
    assert changed == replace(own, early=3, local=0.5, ring=True, halved=False)
    for text, complaint in (
        ("quest", "unknown 'quest'"),
        ("headkv_ar:size=3", "has no 'size'"),
        ("headkv_ar:early=x", "'early=x' of headkv_ar is not a number"),
        ("headkv_ar:early=0", "early: 0 lines"),
        ("headkv_ar:local=1", "local: 1.0 of the heads"),
    ):
        with pytest.raises(ValueError, match=complaint):
            parse_baseline(text)
