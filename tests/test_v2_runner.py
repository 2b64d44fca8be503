"""The V2 model runner, on the CPU through Triton's interpreter: what it draws is what the V1 runner draws.

V2 is what runs on GPUs: requests keep their arrival order in the batch (V1 moves the last one into a gap),
and tell the model about themselves through ``JanusModelState``. Both runners get the same requests at
the same steps, in float32, and must draw the same tokens.
"""

import random
from pathlib import Path
from typing import Any

import pytest
from engine_process import V2, EngineProcess, run_here
from inprocess import in_process  # noqa: F401
from tokenizers import Tokenizer

from vllm_kvcompress.testing.checkpoints import TINY
from vllm_kvcompress.testing.tokenizer import BOI, BOS, IMAGE

GREEDY: dict[str, Any] = {"temperature": 0.0}
ENGINES = (
    "stock", "tight", "full", "decoupled", "torch kernels", "windows", "compressed windows", "torch windows",
)  # fmt: skip
WITHOUT = {"windows": "stock", "compressed windows": "decoupled", "torch windows": "torch kernels"}
PICTURE, LINE, TEXT = 36, 6, 12  # tokens drawn
TEXT_REQUEST, LATE = 5, 7  # the texts come after the pictures, and some engines have a late picture
# K and V of one token, all layers, both branches, float32.
TOKEN_BYTES = 2 * TINY.layers * 2 * TINY.kv_heads * (TINY.hidden // TINY.heads) * 4
SETTINGS: dict[str, Any] = {
    "dtype": "float32", "enforce_eager": True, "max_model_len": 128, "max_num_seqs": 4,
    "max_num_batched_tokens": 24, "kv_cache_memory_bytes": 2**24,
}  # fmt: skip


class Prompts:
    """Random token prompts of a checkpoint that ask for a picture."""

    def __init__(self, model: Path) -> None:
        vocab = Tokenizer.from_file(str(model / "tokenizer.json")).get_vocab()
        self._bos, self._boi, self._image = vocab[BOS], vocab[BOI], vocab[IMAGE]
        self._random = random.Random(0)

    def text(self, tokens: int) -> list[int]:
        """Begin-of-sentence and ``tokens - 1`` others."""
        return [self._bos, *(self._random.randrange(20, 250) for _ in range(tokens - 1))]

    def looking(self, tokens: int, pictures: int = 1) -> list[int]:
        """A text of so many tokens around pictures, each after two of them."""
        ids = self.text(tokens)
        for at in range(pictures):
            ids.insert(3 * at + 2, self._image)
        return ids

    def picture(self, tokens: int) -> list[int]:
        """``tokens`` ids, begin-of-image last."""
        return [*self.text(tokens - 1), self._boi]


def mixed_requests(prompts: Prompts) -> list[dict[str, Any]]:
    """Five greedy pictures, four at once: lengths, guidance, a negative prompt, arrivals, one given up.

    The longest prompts are longer than a step's token budget, so they come in chunks while others draw.
    """

    def request(tokens: int, at: int, **extra: Any) -> dict[str, Any]:
        params = {**GREEDY, "extra_args": extra} if extra else GREEDY
        return {"ids": prompts.picture(tokens), "params": params, "at": at}

    negative = prompts.picture(11)
    return [
        request(5, 0),
        request(30, 0, guidance_scale=1.0),
        request(11, 3, guidance_scale=3.5, negative_prompt_token_ids=negative),
        {**request(8, 4, guidance_scale=2.0), "abort": 8},
        request(40, 5, guidance_scale=7.25),
    ]


def late_request(prompts: Prompts) -> dict[str, Any]:
    """One more, which waits until another is done, and takes its row."""
    return {"ids": prompts.picture(6), "params": GREEDY, "at": 25}


GIVEN_UP = 3
UNDRAFTED = 4  # waves with the package's own drafts, before those with these in their place
DRAFTS: tuple[dict[str, Any], ...] = (
    {"drafts": "wrong", "ids": TINY.text_vocab + TINY.codebook, "places": [5]},
    *({"drafts": "truth", "places": [window]} for window in (2, 3, 8)),
    {"places": [1, 2, 5, 8]},
)
LOOK = (10, 22, 35)  # steps before which the cache is asked what it keeps


def seeded_requests(prompts: Prompts, company: dict[str, Any]) -> list[dict[str, Any]]:
    """Sampled pictures: the last two differ by their seed alone."""

    def request(ids: list[int], seed: int, at: int, **extra: Any) -> dict[str, Any]:
        return {"ids": ids, "params": {"temperature": 1.0, "seed": seed, "extra_args": extra}, "at": at}

    ids = prompts.picture(9)
    return [
        request(prompts.picture(4), 8, 0),
        company,
        request(ids, 9, 4, guidance_scale=3.0),
        request(ids, 7, 6, guidance_scale=3.0),
    ]


def drafted_requests(prompts: Prompts) -> list[dict[str, Any]]:
    """Three pictures that begin in one step, greedy and seeded, each with guidance of its own."""
    params = [
        GREEDY,
        *(
            {"temperature": 1.0, "seed": seed, "extra_args": {"guidance_scale": scale}}
            for seed, scale in ((5, 1.0), (6, 3.0))
        ),
    ]
    return [
        {"ids": prompts.picture(tokens), "params": one, "at": 0}
        for tokens, one in zip((5, 4, 9), params, strict=True)
    ]


def jobs(model: Path) -> list[dict[str, Any]]:
    """What both runners draw."""
    prompts = Prompts(model)
    mixed = mixed_requests(prompts)
    crowd = seeded_requests(prompts, mixed[4])
    alone = [{**crowd[-1], "at": 0}]
    three = drafted_requests(prompts)
    drafted = {"drafts": [*(None for _ in range(UNDRAFTED)), *DRAFTS]}
    text = {"ids": prompts.text(7), "params": {**GREEDY, "max_tokens": TEXT, "ignore_eos": True}, "at": 2}
    chat = {**text, "ids": prompts.looking(7, 2), "at": 4, "photos": [(40, 20), (9, 70)]}
    texts = [text, chat]
    # A second generation makes a wave half as long again: for one engine with a full cache and one without.
    late = [late_request(prompts)]
    # Room for the prompts and a little, not for four pictures.
    tight = {"block_size": 32, "kv_cache_memory_bytes": 5 * 32 * TOKEN_BYTES}

    def engine(name: str, waves: list[list[dict[str, Any]]], **args: Any) -> dict[str, Any]:
        plain = {"additional_config": {"kvcompress": {"window": 1}}}
        return {"name": name, "args": {**SETTINGS, "model": str(model), **plain, **args}, "waves": waves}

    def compressed(name: str, waves: list[list[dict[str, Any]]], **section: Any) -> dict[str, Any]:
        config = {"kvcompress": {"window": 1, **section}}
        made = engine(name, waves, attention_backend="kvcompress", additional_config=config)
        return {**made, "look": LOOK}

    return [
        engine("stock", [[*mixed, *texts, *late], crowd, alone, three]),
        engine("tight", [mixed], **tight),
        compressed("full", [[*mixed, *texts]], preset="full"),
        compressed(
            "decoupled", [[*mixed, *texts, *late], crowd, alone, three], preset="decoupled", budget=0.5
        ),
        compressed("torch kernels", [mixed], preset="line_ar", budget=0.5, kernels="torch"),
        {
            **engine(
                "windows",
                [[*mixed, *texts], crowd, alone, three, *(three for _ in DRAFTS)],
                additional_config={"kvcompress": {"window": 8}},
                max_num_batched_tokens=48,
            ),
            **drafted,
            "ahead": True,
        },
        {
            **compressed(
                "compressed windows",
                [mixed, crowd, alone, three, *(three for _ in DRAFTS)],
                preset="decoupled",
                budget=0.5,
                window=8,
            ),
            **drafted,
        },
        {
            **compressed("torch windows", [mixed], preset="line_ar", budget=0.5, kernels="torch", window=3),
            "ahead": True,
            "preempt": [14],  # while a step is under way, whose tokens are dropped
        },
    ]


@pytest.fixture(scope="module")
def drawn(
    checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, dict[str, Any]]]:
    """By runner, then by engine; both run at once."""
    engines = jobs(checkpoints["six-hf"])
    v2 = EngineProcess(tmp_path_factory.mktemp("v2"), V2, engines)
    # On V1 drafts are replaced by tests/test_windows_engine.py.
    plain = [{**engine, "waves": engine["waves"][:UNDRAFTED], "drafts": []} for engine in engines]
    return {"v1": run_here(plain), "v2": v2.finish()}


Drawn = dict[str, dict[str, dict[str, Any]]]


def test_each_process_ran_its_runner(drawn: Drawn) -> None:
    for runner, module in (
        ("v1", "vllm.v1.worker.cpu_model_runner"),
        ("v2", "vllm.v1.worker.cpu.model_runner"),
    ):
        assert {engine["runner"] for engine in drawn[runner].values()} == {module}
    ahead = {name for name, engine in drawn["v2"].items() if engine["ahead"]}
    assert ahead == {"windows", "torch windows"}, "steps scheduled before the last one's tokens are known"


@pytest.mark.parametrize("engine", ENGINES)
def test_greedy_pictures_are_those_of_the_v1_runner(drawn: Drawn, engine: str) -> None:
    v1, v2 = (drawn[runner][engine]["waves"][0] for runner in ("v1", "v2"))
    for number, tokens in enumerate(v2):
        if number == GIVEN_UP:
            assert tokens is None
        else:
            assert tokens == v1[number], f"request {number}"
            assert len(tokens) == (TEXT if TEXT_REQUEST <= number < LATE else PICTURE)
    pictures = [tuple(tokens) for tokens in v2[:TEXT_REQUEST] + v2[LATE:] if tokens is not None]
    assert len(set(pictures)) == len(pictures)
    assert all(token >= TINY.text_vocab for tokens in pictures for token in tokens)


def steps(engine: dict[str, Any]) -> set[int]:
    """That an engine's finished requests took, with the package's drafts."""
    held = engine["held"][:UNDRAFTED]
    return {report["kv_cache"]["steps"] for wave in held for report in wave if report}


@pytest.mark.parametrize("engine", WITHOUT)
@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_windows_change_steps_not_pictures(drawn: Drawn, runner: str, engine: str) -> None:
    """Greedy and seeded, with text beside them, prompts in chunks, a picture given up in mid-window."""
    windowed, plain = drawn[runner][engine], drawn[runner][WITHOUT[engine]]
    for wave, without in zip(windowed["waves"], plain["waves"], strict=False):
        assert wave == without[: len(wave)]
    assert steps(plain) <= {PICTURE, TEXT}
    assert min(steps(windowed) - {TEXT}) < PICTURE, "some drafts stood"
    assert max(steps(windowed)) <= PICTURE, "tokens that were dropped are of no step"


@pytest.mark.parametrize("engine", ["windows", "compressed windows"])
def test_whatever_is_drafted(drawn: Drawn, engine: str) -> None:
    """Random ids among -1, the truth, and windows whose length changes in mid-picture."""
    windowed = drawn["v2"][engine]
    wanted = drawn["v2"][WITHOUT[engine]]["waves"][UNDRAFTED - 1]
    assert len({tuple(tokens) for tokens in wanted}) == len(wanted)
    waves, held = windowed["waves"][UNDRAFTED:], windowed["held"][UNDRAFTED:]
    for how, wave, reports in zip(DRAFTS, waves, held, strict=True):
        assert wave == wanted, how
        took = [report["kv_cache"]["steps"] for report in reports]
        if how.get("drafts") == "wrong":
            assert min(took) > PICTURE - 3  # a random id may be right
        if how.get("drafts") == "truth":
            # As in tests/test_windows_engine.py: cut at every line's end, or at the picture's alone.
            [window] = how["places"]
            cut = (LINE - 1) * -(-LINE // window) + -(-(LINE - 1) // window)
            whole = -(-(PICTURE - 1) // window)
            assert took == [1 + (whole if engine == "windows" else cut)] * 3, how


@pytest.mark.parametrize("runner", ["v1", "v2"])
@pytest.mark.parametrize("engine", ["stock", "full", "decoupled"])
def test_text_beside_pictures(drawn: Drawn, runner: str, engine: str) -> None:
    text = drawn[runner][engine]["waves"][0][TEXT_REQUEST]
    assert len(text) == TEXT
    assert max(text) < TINY.text_vocab
    assert text == drawn["v1"]["stock"]["waves"][0][TEXT_REQUEST]


def test_full_cache_draws_what_the_stock_backend_draws(drawn: Drawn) -> None:
    stock, full = (drawn["v2"][engine]["waves"][0] for engine in ("stock", "full"))
    assert full == stock[: len(full)]


def test_small_budgets_change_pictures(drawn: Drawn) -> None:
    """Or the equality of the runners would say nothing about eviction."""
    stock = drawn["v2"]["stock"]["waves"][0]
    for engine in ("decoupled", "torch kernels"):
        pictures = drawn["v2"][engine]["waves"][0]
        assert all(pictures[i] != stock[i] for i in range(TEXT_REQUEST) if i != GIVEN_UP), engine


def test_preempted_pictures_go_on_as_they_began(drawn: Drawn) -> None:
    assert drawn["v2"]["torch windows"]["preempted"] > 1  # `test_windows_change_steps_not_pictures`
    assert drawn["v2"]["tight"]["preempted"] > 0
    assert drawn["v2"]["tight"]["waves"][0] == drawn["v2"]["stock"]["waves"][0][:TEXT_REQUEST]


@pytest.mark.parametrize("engine", ["full", "decoupled", "torch kernels", "compressed windows"])
def test_what_is_kept(drawn: Drawn, engine: str) -> None:
    """Of every picture all that has come out is counted, but the last token, which the next step writes."""
    v1, v2 = (
        [(wave, one) for wave, looks in enumerate(drawn[runner][engine]["seen"][:2]) for one in looks]
        for runner in ("v1", "v2")
    )
    looked = 0
    for (wave, one), (_, other) in zip(v1, v2, strict=True):
        greedy = wave == 0  # seeds draw other pictures on the other runner
        for (out, kept), (out_v2, kept_v2) in zip(one, other, strict=True):
            for count, answer in ((out, kept), (out_v2, kept_v2)):
                if answer is None:  # not begun, its first token not written, or done
                    continue
                written, types = answer
                assert written == count - 1
                for name, heads, counts in types:
                    capacity = int(name.split()[1]) if " " in name else PICTURE
                    assert sum(counts) == heads * min(written, capacity)
                    assert not any(counts[written:])
                looked += 1
            if (
                greedy and out == out_v2 and None not in (kept, kept_v2)
            ):  # V1 knows of an ended one for a step more
                assert kept == kept_v2
    assert looked > 8


@pytest.mark.parametrize("engine", [name for name in ENGINES if name not in ("tight", "torch windows")])
def test_nothing_is_preempted_where_memory_suffices(drawn: Drawn, engine: str) -> None:
    assert drawn["v2"][engine]["preempted"] == 0


@pytest.mark.parametrize("engine", ["stock", "decoupled"])
@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_seed_draws_the_same_picture_alone_and_in_company(drawn: Drawn, runner: str, engine: str) -> None:
    """In company its prompt is read in two steps."""
    greedy, crowd, [alone] = drawn[runner][engine]["waves"][:3]
    assert len(alone) == PICTURE
    assert crowd[-1] == alone
    assert crowd[-2] != alone
    # The greedy picture in their midst is the one drawn among greedy pictures.
    assert crowd[1] == greedy[4]
