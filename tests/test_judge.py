"""The judge on pictures whose truth is known."""

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from vllm_kvcompress.eval import held_out
from vllm_kvcompress.eval.captions import compose
from vllm_kvcompress.eval.judge import judge
from vllm_kvcompress.eval.objects import find_objects
from vllm_kvcompress.eval.scenes import render, sample_pair
from vllm_kvcompress.eval.world import (
    COLOURS,
    GROUND_COLOURS,
    PATTERNS,
    SHAPES,
    SIZES,
    Ground,
    Phrase,
    Scene,
    Thing,
)

GREY = Ground("plain", "grey")
RED_CIRCLE = Thing("circle", "red", "medium", 24.0, 48.0)
BLUE_STAR = Thing("star", "blue", "medium", 72.0, 48.0)
TWO = Scene((RED_CIRCLE, BLUE_STAR), GREY)
MODEL = Path(__file__).parents[1] / "examples/shapes/model"
ANYTHING = compose((Phrase(1, "circle"),))
SAYS_TWO = (Phrase(1, "circle", "red"), Phrase(1, "star", "blue"))


def test_over_99_percent_on_true_scenes() -> None:
    number = 300
    right = whole = 0
    for index in range(number):
        scene, prompt = sample_pair((11, index))
        verdict = judge(render(scene), prompt)
        right += verdict.correct
        whole += verdict.whole
        assert verdict.objects_seen == len(scene.things)
    assert right / number > 0.99
    assert whole / number > 0.99


def test_over_99_percent_are_whole_after_the_tokenizer() -> None:
    """Known pictures of the demo model, codes by nearest patch centre, through its decoder."""
    torch = pytest.importorskip("torch")
    from transformers import JanusForConditionalGeneration

    _, codes = held_out.load(MODEL / held_out.FILE, 256)
    vq = JanusForConditionalGeneration.from_pretrained(MODEL, dtype=torch.float32).model.vqmodel
    whole = 0
    for batch in torch.from_numpy(codes).split(32):
        with torch.inference_mode():
            pixels = ((vq.decode(batch) + 1) / 2 * 255).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
        whole += sum(judge(picture, ANYTHING).whole for picture in pixels.numpy())
    assert whole / len(codes) > 0.99


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_size_colour_and_ground(shape: str, pattern: str) -> None:
    for size in SIZES:
        for index, colour in enumerate(COLOURS):
            ground = Ground(pattern, list(GROUND_COLOURS)[index % len(GROUND_COLOURS)])
            found = find_objects(render(Scene((Thing(shape, colour, size, 44.0, 52.0),), ground)))
            assert [(s.shape, s.colour, s.size) for s in found] == [(shape, colour, size)]
            assert abs(found[0].x - 44) < 2
            assert abs(found[0].y - 52) < 2


def test_survives_blur_and_noise() -> None:
    rng = np.random.default_rng(0)
    right = 0
    for index in range(60):
        scene, prompt = sample_pair((12, index))
        noisy = cv2.GaussianBlur(render(scene), (3, 3), 0) + rng.normal(0, 4, (96, 96, 3))
        right += judge(np.clip(noisy, 0, 255).astype(np.uint8), prompt).correct
    assert right >= 57


def test_empty_ground_has_no_objects() -> None:
    for colour in GROUND_COLOURS:
        for pattern in PATTERNS:
            assert find_objects(render(Scene((), Ground(pattern, colour)))) == []


def test_what_is_right() -> None:
    verdict = judge(render(TWO), compose(SAYS_TWO, "left of"))
    assert verdict.correct
    assert verdict.shapes
    assert verdict.colours
    assert verdict.count
    assert verdict.relation


def test_swapped_colours_fail_binding_but_not_shapes() -> None:
    swapped = Scene((replace(RED_CIRCLE, colour="blue"), replace(BLUE_STAR, colour="red")), GREY)
    verdict = judge(render(swapped), compose(SAYS_TWO))
    assert verdict.shapes
    assert not verdict.colours
    assert not verdict.correct


def test_wrong_relation_fails() -> None:
    verdict = judge(render(TWO), compose(SAYS_TWO, "right of"))
    assert verdict.objects
    assert verdict.relation is False
    assert not verdict.correct


def test_relation_between_indistinguishable_objects_holds_either_way() -> None:
    stars = (Phrase(1, "star", "blue"), Phrase(1, "star", "blue"))
    scene = Scene((replace(BLUE_STAR, x=24.0), BLUE_STAR), GREY)
    for relation in ("left of", "right of"):
        assert judge(render(scene), compose(stars, relation)).correct
    assert not judge(render(scene), compose(stars, "above")).correct


def test_wrong_place_fails() -> None:
    only = Scene((Thing("circle", "red", "small", 12.0, 12.0),), GREY)
    says = (Phrase(1, "circle", "red"),)
    assert judge(render(only), compose(says, place="top left")).correct
    assert judge(render(only), compose(says, place="bottom right")).place is False


def test_one_too_many_fails() -> None:
    verdict = judge(render(TWO), compose((Phrase(1, "circle", "red"),)))
    assert not verdict.count
    assert not verdict.correct


def test_wrong_size_fails() -> None:
    verdict = judge(render(TWO), compose((Phrase(1, "circle", "red", "big"), Phrase(1, "star", "blue"))))
    assert verdict.colours
    assert verdict.size is False
    assert not verdict.correct


def test_touching_objects_of_two_colours_are_told_apart() -> None:
    touching = Scene((replace(RED_CIRCLE, x=36.0), Thing("square", "blue", "medium", 60.0, 48.0)), GREY)
    found = {(s.shape, s.colour) for s in find_objects(render(touching))}
    assert found == {("circle", "red"), ("square", "blue")}


def test_wrong_array_is_refused() -> None:
    with pytest.raises(ValueError, match="expected uint8"):
        find_objects(np.zeros((96, 96, 3), np.float32))


def test_others_beside_what_is_asked_for_are_present_but_not_all_right() -> None:
    """GenEval's rule, except that a number is a number there too."""
    three = render(Scene((RED_CIRCLE, BLUE_STAR, replace(RED_CIRCLE, x=72.0, y=16.0)), GREY))
    two = judge(three, compose(SAYS_TWO, "left of"))
    assert two.present
    assert not two.correct
    assert judge(three, compose((Phrase(2, "circle", "red"),))).present
    assert not judge(three, compose((Phrase(3, "circle", "red"),))).present
    assert judge(three, compose((Phrase(1, "circle", "red"),))).present
    assert not judge(three, compose(SAYS_TWO, "below")).present
    assert not judge(three, compose((Phrase(1, "circle", "blue"), Phrase(1, "star", "red")))).present
    four = render(Scene((RED_CIRCLE, BLUE_STAR, *(replace(RED_CIRCLE, y=y) for y in (16.0, 80.0))), GREY))
    assert not judge(four, compose((Phrase(2, "circle", "red"),))).present


def test_all_right_is_present() -> None:
    for index in range(100):
        scene, prompt = sample_pair((13, index))
        verdict = judge(render(scene), prompt)
        assert verdict.present >= verdict.correct
