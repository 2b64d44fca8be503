"""Sampling over image codes alone: the same ids, seeds and log-probabilities as over the whole vocabulary.

On the V1 runner; tests/test_v2_runner.py compares the V2 runner with it, text beside pictures included.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from inprocess import Engine, in_process  # noqa: F401
from vllm import SamplingParams
from vllm.v1.sample.sampler import Sampler

GREEDY: dict[str, Any] = {"temperature": 0.0}
SEEDED: dict[str, Any] = {"temperature": 1.0, "seed": 5, "top_k": 40}


@pytest.fixture(scope="module")
def engine(checkpoints: dict[str, Path]) -> Engine:
    return Engine.get(checkpoints["tiny-hf"], backend=None, max_model_len=128)


@pytest.fixture
def widths(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Columns of the logits of every sampling."""
    seen: list[int] = []
    forward = Sampler.forward

    def watched(self: Any, logits: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(logits.shape[1])
        return forward(self, logits, *args, **kwargs)

    monkeypatch.setattr(Sampler, "forward", watched)
    return seen


@pytest.fixture
def wide(engine: Engine) -> Iterator[None]:
    engine.model.rows.narrow_allowed = False
    yield
    engine.model.rows.narrow_allowed = True


def draw(engine: Engine, *requests: dict[str, Any], text: int = 0) -> list[Any]:
    """Completions of as many different pictures, and of ``text`` text requests that sample too."""
    prompts = [engine.prompt(f"picture {n}") for n in range(len(requests))]
    params = [SamplingParams(detokenize=False, **request) for request in requests]
    written = [engine.prompt("some words")[:-1]] * text
    params += [SamplingParams(temperature=1.0, seed=n, max_tokens=40, ignore_eos=True) for n in range(text)]
    return [out.outputs[0] for out in engine.outputs(prompts + written, params)]


def ids(completions: list[Any]) -> list[list[int]]:
    return [list(completion.token_ids) for completion in completions]


def test_pictures_alone_need_codes_alone(engine: Engine, widths: list[int]) -> None:
    for tokens in ids(draw(engine, GREEDY, SEEDED)):
        assert len(tokens) == engine.image.raster.tokens
        assert all(engine.image.text_vocab <= token < engine.image.vocab for token in tokens)
    assert set(widths) == {engine.image.codes}


@pytest.mark.parametrize("settings", [GREEDY, SEEDED, SEEDED | {"top_k": 0, "top_p": 0.9, "min_p": 0.01}])
def test_tokens_and_log_probabilities_of_the_whole_vocabulary(
    engine: Engine, widths: list[int], request: pytest.FixtureRequest, settings: dict[str, Any]
) -> None:
    narrow = draw(engine, settings | {"logprobs": 3})[0]
    assert set(widths) == {engine.image.codes}
    widths.clear()
    request.getfixturevalue("wide")
    whole = draw(engine, settings | {"logprobs": 3})[0]
    assert set(widths) == {engine.image.vocab}
    assert narrow.token_ids == whole.token_ids
    for mine, theirs in zip(narrow.logprobs, whole.logprobs, strict=True):
        assert mine.keys() == theirs.keys()
        assert all(mine[i].rank == theirs[i].rank for i in mine)
        assert [mine[i].logprob for i in mine] == pytest.approx([theirs[i].logprob for i in mine], abs=1e-5)


def test_a_seed_draws_the_same_picture_beside_text(engine: Engine, widths: list[int]) -> None:
    alone = ids(draw(engine, SEEDED))[0]
    widths.clear()
    beside = ids(draw(engine, SEEDED, GREEDY, text=2))
    assert set(widths) == {engine.image.vocab, engine.image.codes}  # the text ends first
    assert beside[0] == alone
    assert beside[2] == ids(draw(engine, text=2))[0]
    assert max(beside[2] + beside[3]) < engine.image.text_vocab


def test_a_seed_draws_the_same_picture_beside_settings_that_name_ids(
    engine: Engine, widths: list[int]
) -> None:
    alone = ids(draw(engine, SEEDED))[0]
    widths.clear()
    token = engine.image.text_vocab + 7
    named = GREEDY | {"logit_bias": {token: 100.0}}
    beside = ids(draw(engine, SEEDED, named))
    assert set(widths) == {engine.image.vocab}
    assert beside[0] == alone
    assert set(beside[1]) == {token}


def test_scoring_a_prompt_takes_the_whole_vocabulary(engine: Engine, widths: list[int]) -> None:
    prompt = engine.prompt("picture 0")
    params = SamplingParams(temperature=0.0, prompt_logprobs=0, detokenize=False)
    scored = engine.outputs([prompt], params)[0]
    assert set(widths) == {engine.image.vocab}
    assert list(scored.outputs[0].token_ids) == ids(draw(engine, GREEDY))[0]
    assert len(scored.prompt_logprobs) == len(prompt)


FOREIGN = """
import torch
from vllm.v1.sample.logits_processor.interface import LogitsProcessor

class Foreign(LogitsProcessor):
    def __init__(self, *args):
        pass

    def is_argmax_invariant(self):
        return False

    def update_state(self, batch_update):
        pass

    def apply(self, logits):
        logits[:, TOKEN] += 1e6
        return logits
"""


@pytest.fixture(scope="module")
def foreign(
    checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, engine: Engine
) -> Iterator[tuple[Engine, int]]:
    """An engine beside an installed package whose processor wants one id, and that id."""
    folder = tmp_path_factory.mktemp("foreign")
    token = engine.image.text_vocab + 7
    package = folder / "foreign-1.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: foreign\nVersion: 1\n")
    (package / "entry_points.txt").write_text(
        "[vllm.logits_processors]\nforeign = foreign_of_tests:Foreign\n"
    )
    (folder / "foreign_of_tests.py").write_text(FOREIGN.replace("TOKEN", str(token)))
    with pytest.MonkeyPatch.context() as installed:
        installed.syspath_prepend(folder)
        other = Engine.get(checkpoints["tiny-hf"], backend=None, max_model_len=96)
    yield other, token
    sys.modules.pop("foreign_of_tests")


def test_another_packages_processor_gets_the_ids_that_it_knows(
    foreign: tuple[Engine, int], widths: list[int]
) -> None:
    """vLLM loads it because it is installed; nobody has asked for it."""
    engine, token = foreign
    [tokens] = ids(draw(engine, GREEDY))
    assert set(widths) == {engine.image.vocab}
    assert tokens == [token] * engine.image.raster.tokens
