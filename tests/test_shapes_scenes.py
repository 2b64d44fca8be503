"""The shapes world: scenes are deterministic, captions are true, held-out combinations stay out."""

import runpy
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from vllm_kvcompress.eval.captions import compose
from vllm_kvcompress.eval.prompts import CATEGORIES, all_prompts, prompts
from vllm_kvcompress.eval.scenes import TRAIN_KINDS, outline, relation_holds, render, sample_pair
from vllm_kvcompress.eval.world import (
    HELD_OUT_KINDS,
    IMAGE_SIZE,
    PIXELS_PER_TOKEN,
    PLACES,
    SHAPES,
    SIZES,
    Ground,
    Phrase,
    Scene,
    Thing,
    pair_is_held_out,
)

BORDER = runpy.run_path(str(Path(__file__).parents[1] / "examples/shapes/border.py"))
PAIRS = [sample_pair((7, index)) for index in range(400)]


def test_the_same_seed_gives_the_same_picture_and_caption() -> None:
    scene, prompt = sample_pair((3, 5))
    again, prompt_again = sample_pair((3, 5))
    assert (scene, prompt) == (again, prompt_again)
    assert np.array_equal(render(scene), render(again))
    assert sample_pair((3, 6))[0] != scene


def test_render_is_96_pixels_rgb() -> None:
    image = render(PAIRS[0][0])
    assert image.shape == (IMAGE_SIZE, IMAGE_SIZE, 3)
    assert image.dtype == np.uint8


def test_objects_lie_inside_apart_and_on_the_token_lattice() -> None:
    for scene, _ in PAIRS:
        for thing in scene.things:
            reach = 1.08 * thing.radius
            assert reach <= thing.x <= IMAGE_SIZE - reach
            assert reach <= thing.y <= IMAGE_SIZE - reach
            assert thing.x % PIXELS_PER_TOKEN == thing.y % PIXELS_PER_TOKEN == 0
        for a, b in combinations(scene.things, 2):
            assert max(abs(a.x - b.x), abs(a.y - b.y)) > a.radius + b.radius


def test_captions_are_true_of_their_scenes() -> None:
    for scene, prompt in PAIRS:
        things = list(scene.things)
        groups = [[things.pop(0) for _ in range(phrase.count)] for phrase in prompt.phrases]
        assert not things
        for phrase, group in zip(prompt.phrases, groups, strict=True):
            assert all(phrase.describes(t.shape, t.colour, t.size) for t in group)
            assert phrase.shape in prompt.text
            assert phrase.colour is None or phrase.colour in prompt.text
        if prompt.relation:
            assert all(
                relation_holds(prompt.relation, (a.x, a.y), (b.x, b.y)) for a in groups[0] for b in groups[1]
            )
        if prompt.ground:
            assert prompt.ground == scene.ground.colour
            assert prompt.ground in prompt.text


def test_training_never_sees_what_is_held_out() -> None:
    for scene, _ in PAIRS:
        kinds = {thing.kind for thing in scene.things}
        assert not kinds & HELD_OUT_KINDS
        assert not any(pair_is_held_out(a, b) for a, b in combinations(kinds, 2))


def test_about_one_pair_in_eight_is_held_out_in_either_order() -> None:
    held = [pair_is_held_out(a, b) for a, b in combinations(TRAIN_KINDS, 2)]
    assert 0.09 < np.mean(held) < 0.16
    assert all(pair_is_held_out(a, b) == pair_is_held_out(b, a) for a, b in combinations(TRAIN_KINDS, 2))


def test_plain_captions() -> None:
    red = Phrase(2, "circle", "red")
    blue = Phrase(1, "triangle", "blue", "big")
    prompt = compose((red, blue), "left of", pattern="striped", ground="yellow")
    assert prompt.text == "two red circles left of a big blue triangle on a striped yellow ground"
    assert compose((Phrase(3, "cross", "orange"),)).text == "three orange crosses"
    assert compose((Phrase(1, "star", "orange"),), place="top left").text == "an orange star in the top left"


@pytest.mark.parametrize("shape", SHAPES)
def test_outlines_are_centred_and_of_their_radius(shape: str) -> None:
    points = outline(shape, 10.0)
    assert 8.5 <= np.abs(points).max() <= 11
    assert np.abs(points[:, 0].max() + points[:, 0].min()) < 1e-6


def test_wrong_words_say_what_to_use() -> None:
    with pytest.raises(ValueError, match="use one of circle"):
        outline("heart", 10.0)
    with pytest.raises(ValueError, match="use one of plain"):
        render(Scene((), Ground("spotted", "grey")))
    with pytest.raises(ValueError, match="use one of single_object"):
        all_prompts("texture")


@pytest.mark.parametrize("category", CATEGORIES)
def test_prompt_sets_are_deterministic_and_use_every_prompt_before_repeating(category: str) -> None:
    every = all_prompts(category)
    chosen = prompts(category, len(every))
    assert chosen == prompts(category, len(every))
    assert {prompt.text for prompt in chosen} == {prompt.text for prompt in every}
    assert all(prompt.category == category for prompt in chosen)


def test_held_out_prompts_are_held_out_and_the_others_are_not() -> None:
    for category in CATEGORIES:
        for prompt in all_prompts(category):
            kinds = [(p.colour, p.shape) for p in prompt.phrases if p.colour]
            unseen = any(kind in HELD_OUT_KINDS for kind in kinds)
            unseen_pair = any(pair_is_held_out(a, b) for a, b in combinations(kinds, 2))
            assert unseen == (category == "held_out_kind")
            assert unseen_pair == (category == "held_out_pair")


def test_places_cover_the_picture() -> None:
    assert len(set(PLACES.values())) == 9
    thing = Thing("circle", "red", "small", 48.0, 48.0)
    assert thing.kind == ("red", "circle")


def test_scenes_that_a_border_cuts() -> None:
    """They show a part of one object, and are known from the line after that on."""
    right = 0
    for index in range(300):
        scene, prompt = BORDER["cut_pair"]((5, index))
        [thing] = scene.things
        assert prompt.place is None
        assert prompt.phrases[0].describes(thing.shape, thing.colour, thing.size)
        shows = (render(scene) != render(Scene((), scene.ground))).any(-1)
        columns, lines = shows.any(0), shows.any(1)
        assert columns[0] != columns[-1]
        right += columns[-1]
        inwards = IMAGE_SIZE - thing.x if columns[-1] else thing.x
        radius = thing.radius if prompt.phrases[0].size else SIZES["small"]
        assert inwards < radius
        assert inwards % PIXELS_PER_TOKEN == 0
        known = BORDER["lines_until_known"](scene) * PIXELS_PER_TOKEN
        assert lines[known - PIXELS_PER_TOKEN : known].any()
        assert not lines[: known - PIXELS_PER_TOKEN].any()
    assert 200 < right < 250
