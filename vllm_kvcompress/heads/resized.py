"""The rules of a model's head types for pictures of another size. No torch, no vLLM.

Head types are measured and fitted at the model's default size. In a picture of another one a head has the
same type: it keeps as large a share of the picture, by that picture's own lines.
"""

from collections.abc import Sequence
from dataclasses import replace
from math import ceil

from vllm_kvcompress.policy import HeadRule, Policy, Raster


def resized(
    rules: Sequence[HeadRule], counts: Sequence[int], policy: Policy, mean_slots: float, raster: Raster
) -> tuple[HeadRule, ...]:
    """The types' rules on another grid.

    Parameters
    ----------
    rules : sequence of HeadRule
        The types' at the default size, each with a head.
    counts : sequence of int
        Cache heads of each.
    policy : Policy
        That they are of. Papers' presets say their two rules for any grid; fitted ones are scaled.
    mean_slots : float
        Image slots per head at the default size, mean over the heads: no more of the other picture is kept.
    raster : Raster
        The other grid.

    Raises
    ------
    ValueError
        One line: the budget leaves no line of this picture.
    """
    if policy.types == "fitted":
        return _scaled(rules, counts, mean_slots / rules[0].image, raster)
    spatial = sum(n for n, rule in zip(counts, rules, strict=True) if rule.ring)
    both = policy.rules(raster, spatial, sum(counts) - spatial)
    return tuple(rule for rule in both if rule is not None)


def _scaled(
    rules: Sequence[HeadRule], counts: Sequence[int], share: float, raster: Raster
) -> tuple[HeadRule, ...]:
    line, image = raster.width, raster.tokens
    wanted = [rule.capacity * image // rule.image if rule.evicts else image for rule in rules]
    fixed = [_fixed(rule, line) for rule in rules]
    least = [
        min(image, sum(kept) + line) if rule.evicts else image
        for rule, kept in zip(rules, fixed, strict=True)
    ]
    slots = [max(pair) for pair in zip(wanted, least, strict=True)]
    # A line that is longer than the default's may have raised the smallest types: the largest make up for it.
    over = sum(n * kept for n, kept in zip(counts, slots, strict=True)) - share * image * sum(counts)
    for kind in sorted(range(len(rules)), key=lambda kind: least[kind] - slots[kind]):
        if over > 1e-6:
            cut = min(slots[kind] - least[kind], ceil((over - 1e-6) / counts[kind]))
            slots[kind], over = slots[kind] - cut, over - cut * counts[kind]
    if over > 1e-6:
        raise ValueError(
            f"budget: {share:.3g} of a picture of {raster.name}, {image} tokens, leaves the heads no line of "
            f"{line}; raise it, or leave that size out"
        )
    return tuple(_on(rule, kept, *ends, raster) for rule, kept, ends in zip(rules, slots, fixed, strict=True))


def _fixed(rule: HeadRule, line: int) -> tuple[int, int]:
    """Anchors, and recent tokens of a head that chooses, in lines of another length."""
    return min(rule.anchors, line // 6), 0 if rule.ring else rule.recent * line // rule.line


def _on(rule: HeadRule, slots: int, anchors: int, recent: int, raster: Raster) -> HeadRule:
    if slots == raster.tokens:  # nothing is evicted
        anchors = recent = 0
    return replace(
        rule,
        capacity=slots,
        line=raster.width,
        image=raster.tokens,
        anchors=anchors,
        recent=slots - anchors if rule.ring else recent,
    )
