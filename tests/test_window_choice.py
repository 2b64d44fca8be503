"""What windows are made of, without an engine: noise, drafts, and the choice of a window by what pays."""

import random
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_kvcompress.windows.choice import CANDIDATES, WindowChoice
from vllm_kvcompress.windows.drawing import Drawing
from vllm_kvcompress.windows.noise import position_generator, position_seed
from vllm_kvcompress.windows.v2 import Places, next_drafts, standing

PICTURE = 576


def test_noise_is_of_the_seed_and_the_place_alone() -> None:
    seeds = [*range(-3, 200), 2**31, 2**62, 2**63, -(2**62)]
    made = {position_seed(seed, index) for seed in seeds for index in range(576)}
    assert len(made) == len(seeds) * 576
    assert all(0 <= seed < 2**63 for seed in made)
    one, same, other = (position_generator(7, index, "cpu") for index in (3, 3, 4))
    a, b, c = (torch.rand(1000, generator=generator) for generator in (one, same, other))
    assert torch.equal(a, b)
    assert abs(torch.corrcoef(torch.stack([a, c]))[0, 1]) < 0.1


def drawing(given: list[int], outputs: list[int], line: int = 4) -> Drawing:
    return Drawing(0, line, given, outputs)


def test_drafts_are_what_would_have_been_right() -> None:
    assert drawing([], [1]).drafts(3) == [1, 1, 1], "nothing but the left neighbour is known"
    assert drawing([1, 2], [3]).drafts(3) == [3, 3, 3]
    assert drawing([1, 2, 3, 4], [1, 2]).drafts(4) == [3, 4, 1, 2], "columns: the tokens above"
    assert drawing([1, 1, 1, 1], [2, 2, 2]).drafts(3) == [2, 2, 2], "rows: the left neighbour"
    assert drawing([1, 9, 7, 3, 4, 4, 5, 8], [1, 9, 7, 3, 4]).drafts(3) == [4, 5, 8], "every other line"
    assert drawing([1, 2, 1, 2], [1]).drafts(7) == [2, 1, 2, 1, 2, 1, 2], "a window longer than the line"


def test_samples_that_do_not_stand_are_the_next_drafts() -> None:
    mine = drawing([], [1, 2, 3, 4, 5])
    assert mine.settle([2, 3, 9, 8], [2, 3, 7]) == 3
    mine.outputs += [2, 3, 9]
    assert mine.drafts(1) == [8]
    assert mine.drafts(3)[0] == 8
    assert mine.settle([1, 1], [2]) == 1
    assert mine.settle([2, 1], [2]) == 2


@given(st.data())
def test_both_runners_accept_alike(data: st.DataObject) -> None:
    """The V2 runner's tensors against the V1 runner's lists."""
    rows = data.draw(st.integers(1, 4))
    known = [[data.draw(st.integers(0, 2)) for _ in range(data.draw(st.integers(5, 9)))] for _ in range(rows)]
    counts = [data.draw(st.integers(1, 4)) for _ in range(rows)]
    drafts = [[data.draw(st.integers(0, 2)) for _ in range(n - 1)] for n in counts]
    samples = [[data.draw(st.integers(0, 2)) for _ in range(n)] for n in counts]
    starts = torch.tensor([sum(counts[:n]) for n in range(rows)])
    places = Places(torch.tensor(counts), starts, max(counts))
    flat = torch.tensor([token for row in samples for token in row])
    inputs = torch.tensor(
        [token for row, mine in zip(known, drafts, strict=True) for token in (row[-1], *mine)]
    )
    table, fed = places.table(flat), places.table(inputs)
    stands = standing(table, fed, places.counts, torch.full((rows,), 99))
    line = 5
    memory = torch.zeros(rows, 20, dtype=torch.int64)
    for n, row in enumerate(known):
        memory[n, : len(row)] = torch.tensor(row)
    last = torch.tensor([len(row) - 1 for row in known])
    following = next_drafts(table, places.counts, stands, memory, last, torch.zeros(rows).long(), line, 3)
    for n in range(rows):
        mine = Drawing(0, line, [], list(known[n]))
        assert stands[n] == mine.settle(samples[n], drafts[n])
        mine.outputs += samples[n][: int(stands[n])]
        kept = counts[n] - int(stands[n])
        assert following[n, :kept].tolist() == mine.drafts(kept)
        # Further ones are copies; the V2 runner's of the token above.
        above = mine.known + kept - line
        if kept < 3 and 0 <= above < len(known[n]):
            assert following[n, kept] == known[n][above]


def seconds(fixed: float, slope: float) -> Callable[[int, int], float]:
    return lambda rows, places: fixed + slope * rows * places


def drawn(
    cost: Callable[[int, int], float], tokens: dict[int, float], rows: int, pictures: int, seed: int = 0
):
    """Seconds for pictures one after another, with a choice that starts knowing nothing and without one."""
    rng, choice, spent = random.Random(seed), WindowChoice(), 0.0
    for _ in range(pictures):
        known = 1.0
        while known < PICTURE:
            n = choice.choose(rows)
            took = cost(rows, n) * rng.uniform(0.9, 1.1) * (4 if rng.random() < 0.1 else 1)
            got = 1.0 if n == 1 else max(1.0, min(n, rng.expovariate(1 / tokens[n])))
            choice.learn(rows, n, took, got)
            spent += cost(rows, n)
            known += got
    return spent, pictures * PICTURE * cost(rows, 1)


@pytest.mark.parametrize("rows", [1, 2, 5, 8, 16, 32])
@pytest.mark.parametrize("seed", range(3))
def test_costs_little_where_windows_do_not_pay(rows: int, seed: int) -> None:
    """From the first picture on: no draft ever stands, and places cost as much as rows."""
    spent, plain = drawn(seconds(0.2, 1.0), {4: 1.0, 8: 1.0, 16: 1.0}, rows, 2, seed)
    assert spent < plain * 1.03


@pytest.mark.parametrize(
    ("cost", "tokens", "best"),
    [
        (seconds(10.0, 0.1), {4: 3.0, 8: 5.0, 16: 8.0}, 16),
        (seconds(4.0, 0.5), {4: 2.5, 8: 4.0, 16: 4.5}, 8),
        (seconds(1.0, 0.5), {4: 2.9, 8: 3.2, 16: 3.3}, 4),
        (seconds(0.5, 1.0), {4: 1.5, 8: 1.6, 16: 1.6}, 1),
    ],
)
def test_finds_the_window_that_pays(cost: Callable, tokens: dict[int, float], best: int) -> None:
    spent, plain = drawn(cost, tokens, 1, 10)
    rate = {n: (tokens[n] if n > 1 else 1.0) / cost(1, n) for n in CANDIDATES}
    assert best == max(rate, key=rate.get)
    assert plain / spent > 0.75 * rate[best] / rate[1]


def test_what_nearly_all_stands_is_soon_tried_longer() -> None:
    """The first lines of a picture are its worst: nothing is above them to copy."""
    choice, tried = WindowChoice(), []
    for step in range(60):
        n = choice.choose(1)
        tried.append(n)
        choice.learn(1, n, 1.0 + 0.05 * n, {1: 1.0, 4: 4.0, 8: 1.5 if step < 20 else 8.0}.get(n, 16.0))
    assert tried[:12] == [1] * 4 + [4] * 4 + [8] * 4
    assert 4 in tried[12:20], "eight were the worse"
    assert 16 in tried[:45]
    assert tried[-1] == 16


def beside(others: int, cost: Callable[[int], float], steps: int = 2000) -> tuple[float, WindowChoice]:
    """Mean length, in plain steps, of the steps of one picture beside texts; most drafts stand."""
    rng, choice, spent = random.Random(0), WindowChoice(), 0.0
    for _ in range(steps):
        n = choice.choose(1, others)
        took = cost(n + others)
        choice.learn(1, n, took * rng.uniform(0.97, 1.03), max(1.0, 0.9 * n), others)
        spent += took
    return spent / steps / cost(1 + others), choice


@pytest.mark.parametrize("others", [1, 3, 16])
def test_texts_are_not_slowed(others: int) -> None:
    """A step is as long as it has rows: whatever windows bring the picture, a text waits for them."""
    longer, _ = beside(others, lambda rows: float(rows))
    assert longer < 1.03


def test_windows_that_cost_texts_nothing_are_used() -> None:
    """A step is as long as the weights are: as many as 16 places more are a tenth of it at most."""
    longer, choice = beside(16, lambda rows: 100.0 + 0.5 * rows)
    assert longer < 1.1
    assert choice.choose(1, 16) == 16


def test_steps_beside_texts_are_not_taken_for_others() -> None:
    """A picture beside texts has its window back when they are gone."""
    _, choice = beside(16, lambda rows: float(rows), 200)
    for _ in range(200):
        choice.learn(1, n := choice.choose(1), 10.0 + 0.1 * n, max(1.0, 0.9 * n))
    assert choice.choose(1) == 16
    assert choice.choose(1, 16) == 1


def test_a_number_is_what_it_says() -> None:
    choice = WindowChoice((8,))
    for _ in range(600):
        assert choice.choose(3) == 8
        choice.learn(3, 8, 1.0, 1.0)
    choice.learn(3, 4, 1.0, 4.0)  # a step of another window, from before: no harm
