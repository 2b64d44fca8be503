"""The sizes of a server: which there are, which is drawn for a wish or a prompt, what heads keep."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import bounded, made_up_fit
from transformers.models.emu3.processing_emu3 import Emu3Processor
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

from vllm_kvcompress.admission import admit_request, align_request
from vllm_kvcompress.config import parse_config
from vllm_kvcompress.heads.resized import resized
from vllm_kvcompress.models.config import ImageModel, ModelSettings, PictureSize
from vllm_kvcompress.models.emu3.family import AREA, FAMILY, RATIOS, usual_grid
from vllm_kvcompress.models.janus_family import FAMILY as JANUS
from vllm_kvcompress.policy import HeadRule, Policy
from vllm_kvcompress.policy.raster import Raster
from vllm_kvcompress.rows import NEGATIVE_IDS, RequestFacts, RequestRows
from vllm_kvcompress.serving.wishes import nearest
from vllm_kvcompress.windows.v2 import next_drafts

EMU3 = SimpleNamespace(vq_config=SimpleNamespace(channel_multiplier=[1, 2, 2, 4]))
USUAL = ["720x720", "832x624", "624x832", "880x584", "584x880", "960x544", "544x960"]
PAD, BOS, EOL, BOI, IMG = 10, 11, 12, 13, 15
MODEL = ImageModel(
    Raster(3, 5, 4, ends=1), text_vocab=300, codes=100, bos=BOS, pad=PAD, boi=BOI, first_code=100, eol=EOL,
    grid_ids=(3, 4, IMG), writes=False, negative=(BOS, 50, BOI, 3, 4, IMG),
    more_sizes=(PictureSize(Raster(2, 3, 4, ends=1), (2, 2, IMG)), PictureSize(Raster(4, 4, 4, 1), (9,))),
)  # fmt: skip


@pytest.mark.parametrize("patch", [4, 8, 16])
@pytest.mark.parametrize("ratio", [*RATIOS, (21, 9), (9, 21), (5, 4), (1, 2)])
def test_a_ratio_is_rounded_as_the_original_does(ratio: tuple[int, int], patch: int) -> None:
    name = "{}:{}".format(*ratio)
    lines, columns = Emu3Processor.calculate_generate_size(None, name, AREA, patch)  # type: ignore[arg-type]
    assert usual_grid(*ratio, patch) == (columns, lines)


def test_the_usual_sizes_are_served_as_long_as_they_fit() -> None:
    def names(**settings: Any) -> list[str]:
        return [raster.name for raster in FAMILY.rasters(EMU3, ModelSettings(**settings))]

    assert names() == names(context=9216) == USUAL
    assert names(context=8250) == ["720x720", "832x624", "880x584", "584x880"], "as long as the default"
    assert names(context=100)[0] == "720x720", "which is refused in its own words"
    assert names(sizes=((960, 544), (512, 512)), context=100) == ["960x544", "512x512"]
    assert names(size=(512, 512)) == ["512x512"]
    for named, said in (
        ({"sizes": ((512, 512), (30, 30))}, "kvcompress.sizes: 30x30 is no multiple of the model's 8 pixels"),
        (
            {"size": (8000, 8000)},
            "kvcompress.size: 8000x8000 takes 1001000 tokens, and a picture has at most",
        ),
    ):
        with pytest.raises(ValueError, match=said):
            names(**named)
    one = SimpleNamespace(vq_config=SimpleNamespace(num_patches=24, channel_multiplier=[1] * 5))
    JANUS.one_size(one, ModelSettings(sizes=((384, 384),)))
    for named, setting in (({"size": (512, 512)}, "size"), ({"sizes": ((384, 384), (512, 512))}, "sizes")):
        with pytest.raises(ValueError, match=f"kvcompress.{setting}: this model draws 384x384 only"):
            JANUS.one_size(one, ModelSettings(**named))


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"sizes": ["720x720"], "size": "720x720"}, "sizes: size draws one size alone: leave one"),
        ({"sizes": ["720x720", "720x720"]}, "sizes: a size is there twice"),
        ({"sizes": []}, "kvcompress.sizes: list should have at least 1 item"),
        ({"sizes": ["720"]}, "kvcompress.sizes: string should match pattern"),
        ({"sizes": "720x720"}, "kvcompress.sizes: input should be a valid list"),
    ],
)
def test_settings_that_make_no_sense_are_refused_in_one_line(section: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said) as raised:
        parse_config({"kvcompress": section})
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("wish", "drawn"),
    [
        ("auto", "720x720"), ("544x960", "544x960"), ("1024x1024", "720x720"), ("1x1", "720x720"),
        ("1792x1024", "960x544"), ("1024x1792", "544x960"), ("1536x1024", "880x584"), ("640x480", "832x624"),
        ("99999x1", "960x544"), ("0x512", "720x720"),
    ],
)  # fmt: skip
def test_a_wish_is_drawn_in_the_nearest_shape(wish: str, drawn: str) -> None:
    assert USUAL[nearest(wish, USUAL)] == drawn


def test_of_sizes_as_near_the_first_is_drawn() -> None:
    assert nearest("512x512", ["400x300", "300x400"]) == 0
    assert nearest("512x512", ["300x400", "400x300"]) == 0
    assert nearest("512x512", ["64x32", "256x256", "768x768"]) == 1
    assert nearest("768x768", ["64x32", "256x256", "768x768"]) == 2


def test_a_prompt_says_its_size() -> None:
    assert MODEL.names == ("16x12", "8x8", "12x16")
    for size, begin in enumerate(MODEL.begins):
        own = MODEL.of(size)
        ids = [BOS, 60, 61, *begin]
        assert (own.raster, own.begin, own.sizes) == (
            MODEL.rasters[size],
            begin,
            MODEL.sizes[size : size + 1],
        )
        assert own.negative == (BOS, 50, *begin)
        assert MODEL.size_of(ids, len(ids)) == size
        assert [other for other in range(3) if MODEL.of(other).is_begun(ids, len(ids))] == [size]
        assert MODEL.draws(torch.tensor(ids)).tolist() == [False] * (len(ids) - 1) + [True]
        asked = request(ids)
        align_request(asked, MODEL)
        assert asked.sampling_params.extra_args[NEGATIVE_IDS] == MODEL.aligned(own.negative, len(ids))
        admit_request(asked, MODEL, 64)
        assert asked.sampling_params.max_tokens == own.raster.tokens
        facts = RequestFacts.read(asked.sampling_params, asked.prompt_token_ids, MODEL)
        assert facts.size == size
    with pytest.raises(ValueError, match="two sizes whose prompts end in the same ids"):
        ImageModel(Raster(2, 2), 9, 9, 0, 0, 0, more_sizes=(PictureSize(Raster(3, 3)),))


def request(ids: list[int], **extra: Any) -> SimpleNamespace:
    params = SamplingParams(temperature=0.0, extra_args={"guidance_scale": 3.0, **extra})
    return SimpleNamespace(
        prompt_token_ids=ids, sampling_params=params, prompt_embeds=None, resumable=False, request_id="r"
    )


SERVED = r"\[13, 3, 4, 15\] \(16x12\), or \[13, 2, 2, 15\] \(8x8\), or \[13, 9\] \(12x16\)"
SECOND = [BOS, *MODEL.begins[1]]


@pytest.mark.parametrize(
    ("ids", "extra", "said"),
    [
        ([BOS, BOI, 5, 5, IMG], {}, rf"ids \[13, 5, 5, 15\] begin .* does not draw: .* {SERVED}"),
        ([BOS, 60], {}, rf"writes no text: .* {SERVED}"),
        (SECOND, {NEGATIVE_IDS: [BOS, *MODEL.begins[0]]}, r"must end in the ids \[13, 2, 2, 15\]"),
        ([*SECOND, 100, 101], {}, "and it is right"),
        ([*SECOND, 100, 101, 102], {}, "the picture's token 2 has id 102: every 3th token"),
        ([*SECOND, 100, 101, EOL, 100, 101, EOL], {}, "holds 6 image tokens of 6"),
    ],
)
def test_what_no_size_has_is_said_in_one_line(ids: list[int], extra: dict, said: str) -> None:
    asked = request(ids, **extra)
    align_request(asked, MODEL)
    if said == "and it is right":
        admit_request(asked, MODEL, 64)
        assert asked.sampling_params.max_tokens == 4
        return
    with pytest.raises(VLLMValidationError, match=said) as raised:
        admit_request(asked, MODEL, 64)
    assert "\n" not in str(raised.value)


def test_rows_know_their_pictures_lines() -> None:
    rows = RequestRows(4, MODEL, context=16)
    sized = [request([BOS, *MODEL.begins[size]]) for size in (2, 0, 1)]
    for row, one in enumerate(sized):
        align_request(one, MODEL)
        rows.add(row, RequestFacts.read(one.sampling_params, one.prompt_token_ids, MODEL))
    rows.flush()
    assert [rows.size_of(row) for row in range(4)] == [2, 0, 1, 0]
    assert rows.widths(slice(4)).tolist() == [4, 5, 3, 5]
    assert rows.totals(torch.tensor([2, 0])).tolist() == [6, 16]
    rows.move(0, 2, swap=True)
    rows.flush()
    assert rows.widths(slice(3)).tolist() == [3, 5, 4]
    coming = torch.tensor([2, 4, 3, -1])
    assert MODEL.ends(coming, rows.widths(slice(4))).tolist() == [True, True, True, False]
    single = RequestRows(2, MODEL.of(1))
    assert (single.size, single.widths(slice(2)), single.totals(slice(2))) == (None, 3, 6)


def test_drafts_are_copied_from_the_rows_own_line_above() -> None:
    """Lines of 5 and of 3, six tokens drawn of each: the end of a line is drafted where each has it."""
    known = torch.tensor(
        [[BOS, 101, 102, 103, 104, EOL, 105, 0, 0], [BOS, 101, 102, EOL, 103, 104, EOL, 0, 0]]
    )
    one, sample = torch.ones(2, dtype=torch.int64), torch.tensor([[106], [106]])
    drafts = next_drafts(sample, one, one, known, 6 * one, one, torch.tensor([5, 3]), 4, EOL)
    assert drafts.tolist() == [[103, 104, EOL, 105], [104, EOL, 106, 106]]


def least_slots(rule: HeadRule, raster: Raster) -> int:
    """Slots that a head of a type needs at least on another grid."""
    recent = 0 if rule.ring else rule.recent * raster.width // rule.line
    kept = min(rule.anchors, raster.width // 6) + recent + raster.width
    return min(kept, raster.tokens) if rule.evicts else raster.tokens


@settings(bounded, max_examples=30)
@given(
    st.integers(2, 14), st.integers(2, 14), st.integers(1, 14), st.integers(1, 14), st.floats(0.1, 1.0),
    st.integers(0, 99),
)  # fmt: skip
def test_fitted_heads_keep_the_same_share_of_another_picture(
    lines: int, width: int, other_lines: int, other_width: int, budget: float, seed: int
) -> None:
    """Within the budget, whole heads whole; and never a rule that finds no victims (it would not be made)."""
    first, other = Raster(lines, width), Raster(other_lines, other_width)
    policy = Policy("fitted", max(budget, 1 / lines + 1e-9))
    found = made_up_fit(first, policy.slots(first) / first.tokens, (1, 6), 4, seed=seed)
    counts, share = found.counts, found.mean_slots / first.tokens
    least = [least_slots(rule, other) for rule in found.rules]
    if np.dot(counts, least) > share * other.tokens * sum(counts) + 1e-6:
        with pytest.raises(ValueError, match=r"^budget: .* no line of \d+; raise it, or leave that size"):
            resized(found.rules, counts, policy, found.mean_slots, other)
        return
    rules = resized(found.rules, counts, policy, found.mean_slots, other)
    assert np.dot(counts, [rule.capacity for rule in rules]) <= share * other.tokens * sum(counts) + 1e-6
    for rule, was in zip(rules, found.rules, strict=True):
        assert (rule.line, rule.image) == (other.width, other.tokens)
        assert (rule.ring, rule.decay) == (was.ring, was.decay)
        assert was.evicts or not rule.evicts
    assert resized(found.rules, counts, policy, found.mean_slots, first) == found.rules


def test_what_a_wide_picture_of_emu3_keeps() -> None:
    """Rings and scored heads of 720x720 at a fifth, on 960x544: as many slots, other lines."""
    square, wide = Raster(90, 91, 8, 1), Raster(68, 121, 8, 1)
    found = made_up_fit(square, 0.2, (4, 8))
    rules = resized(found.rules, found.counts, Policy("fitted", 0.2), found.mean_slots, wide)
    for rule, was in zip(rules, found.rules, strict=True):
        assert abs(rule.capacity - was.capacity * wide.tokens / square.tokens) < 2 or rule.capacity >= 121
    papers = Policy("decoupled", 0.2)
    ring, scored = papers.rules(square, 8, 24)
    assert ring is not None
    assert scored is not None
    assert resized((ring, scored), (8, 24), papers, 0.0, wide) == papers.rules(wide, 8, 24)
