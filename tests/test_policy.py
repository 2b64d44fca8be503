"""Presets, budgets and the arithmetic of the line rule."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracle import bounded

from vllm_kvcompress.cache.paging import plan_two
from vllm_kvcompress.policy import PRESETS, REFINEMENTS, Policy
from vllm_kvcompress.policy.raster import Raster
from vllm_kvcompress.policy.rule import HeadRule

JANUS = Raster(24, 24)


def heads(preset: str) -> tuple[int, int]:
    """A number of spatial and semantic heads that fits the preset."""
    return {"profile": (40, 60), "semantic": (0, 100), "spatial": (100, 0)}[PRESETS[preset].head_types]


TWO_RULES = [name for name, preset in PRESETS.items() if preset.head_types != "fitted"]


@bounded
@given(st.data())
def test_capacities_keep_the_budget_and_waste_none(data: st.DataObject) -> None:
    raster = Raster(data.draw(st.integers(1, 30)), data.draw(st.integers(1, 30)))
    preset = data.draw(st.sampled_from(TWO_RULES))
    slots = data.draw(st.integers(raster.width, raster.tokens))
    spatial, semantic = heads(preset)
    if PRESETS[preset].head_types == "profile":
        spatial, semantic = data.draw(st.integers(0, 100)), data.draw(st.integers(1, 100))
    policy = Policy(preset, slots / raster.tokens)
    rules = policy.rules(raster, spatial, semantic)
    assert [rule is None for rule in rules] == [not spatial, not semantic]
    assert policy.slots(raster) == (raster.tokens if preset == "full" else slots)
    used = sum(n * rule.capacity for n, rule in zip((spatial, semantic), rules, strict=True) if rule)
    total = policy.slots(raster) * (spatial + semantic)
    assert total - max(spatial, semantic) < used <= total
    if slots == raster.tokens:
        assert not any(rule.evicts for rule in rules if rule)


@pytest.mark.parametrize("preset", TWO_RULES)
def test_presets_work_from_one_line_up(preset: str) -> None:
    for raster in (Raster(4, 4), Raster(8, 8), Raster(3, 7), JANUS):
        for slots in range(raster.width, raster.tokens + 1):
            rule = Policy(preset, slots / raster.tokens).rules(raster, *heads(preset))[1]
            if rule is not None and rule.capacity >= 2 * raster.width:
                assert rule.capacity - rule.anchors - rule.recent > raster.width, "the score has no choice"


def test_defaults_on_the_janus_grid() -> None:
    def shape(policy: Policy) -> list:
        rules = policy.rules(JANUS, *heads(policy.preset))
        return [(rule.capacity, rule.anchors, rule.recent) if rule else None for rule in rules]

    assert shape(Policy("full", 0.2)) == [None, (576, 0, 24)]
    assert shape(Policy("streaming", 0.2)) == [(115, 4, 111), None]
    assert shape(Policy("h2o", 0.2)) == [None, (115, 0, 24)]
    assert shape(Policy("line_ar", 1 / 6)) == [None, (96, 4, 24)]
    assert shape(Policy("line_ar", 1 / 8)) == [None, (72, 4, 22)]
    assert shape(Policy("ssd", 0.2)) == [(72, 0, 72), (143, 0, 24)]
    assert shape(Policy("decoupled", 0.2)) == [(76, 4, 72), (141, 4, 24)]
    assert shape(Policy("decoupled", 1 / 8)) == [(72, 4, 68), (72, 4, 22)]
    assert shape(Policy("decoupled", 1.0)) == [(576, 4, 572), (576, 4, 24)]


def test_what_the_user_sets_is_taken_as_it_is() -> None:
    policy = Policy("decoupled", 0.2, spatial_tokens=72, anchor_tokens=24, recent_tokens=30)
    spatial, semantic = policy.rules(JANUS, 50, 50)
    assert spatial == HeadRule(72, 24, 576, 24, 48, ring=True)
    assert semantic == HeadRule(158, 24, 576, 24, 30)
    rule = Policy("line_ar", 0.2, score="accumulated", smooth_row=True).rules(JANUS, 0, 8)[1]
    assert rule is not None
    assert (rule.decay, rule.smooth_row, rule.value_norm, rule.stratify) == (1, True, False, False)
    assert Policy("decoupled", 0.2, head_types="spatial").rules(JANUS, 8, 0)[1] is None
    assert Policy("decoupled", 1.0, spatial_tokens=48).rules(JANUS, 1, 1)[0].capacity == 48  # type: ignore
    only = Policy("decoupled", 0.2, spatial_tokens=48).rules(JANUS, 9, 0)[0]
    assert only is not None
    assert only.capacity == 48


def test_presets_that_carry_a_papers_name_refine_nothing() -> None:
    for name in ("streaming", "h2o", "line_ar", "ssd"):
        preset = PRESETS[name]
        assert not any(getattr(preset, refinement) for refinement in REFINEMENTS)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"preset": "best"}, "^preset: unknown 'best'; one of full, streaming, h2o"),
        ({"preset": "fitted", "smooth_row": True}, "^smooth_row: preset fitted chooses every head's rule"),
        (
            {"preset": "decoupled", "budget": "auto"},
            "^budget: 'auto' is not a share.*auto under the preset fitted",
        ),
        ({"budget": 0}, "^budget: 0 is not a share"),
        ({"budget": -0.1}, "^budget: -0.1"),
        ({"budget": 1.01}, "^budget: 1.01"),
        ({"budget": math.nan}, "^budget: nan"),
        ({"budget": math.inf}, "^budget: inf"),
        ({"budget": "0.2"}, "^budget: '0.2'"),
        ({"budget": True}, "^budget: True"),
        ({"preset": "decoupled", "anchor_tokens": -1}, "^anchor_tokens: -1"),
        ({"recent_tokens": 2.5}, "^recent_tokens: 2.5"),
        ({"spatial_tokens": "2"}, "^spatial_tokens: '2'"),
        ({"score": "mean"}, "^score: unknown 'mean'; one of inter_line, averaged, accumulated"),
        ({"head_types": "both"}, "^head_types: unknown 'both'; one of profile, semantic, spatial"),
        ({"smooth_row": "yes"}, "^smooth_row: unknown 'yes'; one of False, True"),
        ({"preset": "h2o", "spatial_tokens": 48}, "^spatial_tokens: all heads are semantic"),
        ({"preset": "streaming", "recent_tokens": 48}, "^recent_tokens: spatial heads"),
        ({"preset": "streaming", "stratify": True}, "^stratify: spatial heads"),
    ],
)
def test_a_bad_field_is_one_line(fields: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        Policy(**fields)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"budget": 0.03}, "budget"),
        ({"budget": 0.2, "recent_tokens": 200}, "recent_tokens"),
        ({"budget": 0.2, "anchor_tokens": 110}, "anchor_tokens"),
        ({"budget": 0.2, "anchor_tokens": 500}, "anchor_tokens"),
        ({"budget": 0.2, "spatial_tokens": 300}, "spatial_tokens"),
        ({"preset": "line_ar", "budget": 0.2, "recent_tokens": 80, "anchor_tokens": 12}, "recent_tokens"),
        ({"preset": "streaming", "budget": 0.1, "anchor_tokens": 40}, "anchor_tokens"),
    ],
)
def test_an_impossible_budget_says_the_smallest_that_works(fields: dict, field: str) -> None:
    policy = Policy(**({"preset": "decoupled"} | fields))
    with pytest.raises(ValueError, match=rf"^{field}: budget .* slots per head") as caught:
        policy.rules(JANUS, *heads(policy.preset))
    assert "\n" not in str(caught.value)
    works = float(re.findall(r"at least ([\d.]+)$", str(caught.value))[0])
    Policy(**{"preset": "decoupled", **fields, "budget": works}).rules(JANUS, *heads(policy.preset))
    with pytest.raises(ValueError, match="slots per head"):
        Policy(**{"preset": "decoupled", **fields, "budget": works - 1 / 576}).rules(
            JANUS, *heads(policy.preset)
        )


@pytest.mark.parametrize(
    ("fields", "counts", "match"),
    [
        ({"anchor_tokens": 577}, (1, 1), "^anchor_tokens: 577; need at most the image's 576"),
        ({"recent_tokens": 600}, (1, 1), "^recent_tokens: 600; need at most"),
        ({"spatial_tokens": 577}, (1, 1), "^spatial_tokens: 577; need at most"),
        ({"spatial_tokens": 30, "anchor_tokens": 8}, (1, 1), "^spatial_tokens: 30, a line of 24 .* needs 32"),
        ({"preset": "h2o"}, (1, 1), "^head_types: all semantic, got 1 spatial"),
        ({"preset": "streaming"}, (1, 1), "^head_types: all spatial, got 1 spatial, 1 semantic"),
        ({}, (0, 0), "^head_types: 0 spatial, 0 semantic; need a head"),
        ({}, (-1, 2), "^head_types: -1 spatial"),
    ],
)
def test_what_does_not_fit_the_grid_is_one_line(fields: dict, counts: tuple[int, int], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Policy(**({"preset": "decoupled"} | fields)).rules(JANUS, *counts)


@pytest.mark.parametrize(
    ("numbers", "match"),
    [
        ({"capacity": 5, "line": 3, "image": 10}, "^image: 10"),
        ({"capacity": 5, "line": 1, "image": 40000}, "at most 32767"),
        ({"capacity": 0, "line": 2, "image": 10}, "^capacity: 0"),
        ({"capacity": 12, "line": 2, "image": 10}, "^capacity: 12"),
        ({"capacity": 4, "line": 2, "image": 10, "anchors": 5}, "^anchors: 5"),
        ({"capacity": 4, "line": 2, "image": 10, "anchors": 1, "recent": 2}, "need at least 5$"),
        ({"capacity": 4, "line": 2, "image": 10, "anchors": 3, "ring": True}, "need at least 5$"),
    ],
)
def test_a_rule_refuses_what_it_cannot_do(numbers: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        HeadRule(**numbers)


@bounded
@given(st.data())
def test_rule_arithmetic_is_what_filling_slots_gives(data: st.DataObject) -> None:
    lines, line = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6))
    capacity = data.draw(st.integers(line, lines * line))
    anchors = data.draw(st.integers(0, capacity - line))
    ring = HeadRule(capacity, line, lines * line, anchors, ring=True)
    rule = HeadRule(capacity, line, lines * line, anchors, ring=False)
    slots: list[int] = []
    for token in range(lines * line):
        assert ring.free(token) == capacity - len(slots)
        if len(slots) < capacity:
            slots.append(token)
            assert ring.slot(token) == rule.slot(token) == len(slots) - 1
        else:
            oldest = slots.index(min(t for t in slots if t >= anchors))
            assert ring.slot(token) == oldest
            slots[oldest] = token
            with pytest.raises(ValueError, match="goes into a victim"):
                rule.slot(token)
        drawn = token + 1
        assert ring.resident(drawn) == len(slots)
        coming = [t for t in range(drawn, min(drawn + line, lines * line)) if t >= capacity]
        assert rule.victims_due(drawn) == (len(coming) if drawn % line == 0 else 0)


PINS = json.loads((Path(__file__).parent / "pins" / "presets.json").read_text())


@pytest.mark.parametrize("preset", TWO_RULES)
def test_presets_keep_the_rules_and_splits_that_they_had(preset: str) -> None:
    """What the six presets decided before head types became any number; the oracle ties tokens to rules."""
    mine = [pin for pin in PINS if pin[3] == preset]
    assert len(mine) > 10
    for layers, kv_heads, lines, _, budget, share, *want in mine:
        raster, policy, heads = Raster(lines, 24), Policy(preset, budget), 2 * layers * kv_heads

        def slots(a: int, b: int, policy: Policy = policy, raster: Raster = raster) -> tuple[int, ...]:
            return tuple(rule.capacity if rule else 0 for rule in policy.rules(raster, a, b))

        spatial = 2 * round(share * layers * kv_heads)
        if isinstance(want[0], str):
            with pytest.raises(ValueError, match=f"^{want[0]}:"):
                plan_two(spatial, heads - spatial, slots, step=2)
            continue
        split = plan_two(spatial, heads - spatial, slots, step=2)
        rules = policy.rules(raster, *split.heads)
        fields = ("capacity", "anchors", "recent", "ring", "decay")
        assert [split.moved, [rule and [getattr(rule, name) for name in fields] for rule in rules]] == want


def test_a_fitted_budget_below_a_line_says_the_smallest_that_works() -> None:
    with pytest.raises(
        ValueError, match=r"^budget: budget 0.03 of 576 tokens is 17 slots .* at least 0.0417$"
    ):
        Policy("fitted", 0.03).check(JANUS)
    Policy("fitted", 0.0417).check(JANUS)
    Policy("fitted", "auto").check(JANUS)


def test_the_policy_needs_neither_torch_nor_vllm() -> None:
    code = "import sys, vllm_kvcompress.policy; sys.exit(any(m in sys.modules for m in ('torch', 'vllm')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
