"""The runner of GPUs, on the CPU, draws what V1 draws: the other families, and Janus with two ranks."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import test_emu3
import test_lumina
from engine_process import V2, EngineProcess, run_here
from inprocess import Engine, in_process  # noqa: F401
from test_llamagen import guided
from test_v2_runner import SETTINGS, Prompts

from vllm_kvcompress.testing.emu3 import make_emu3
from vllm_kvcompress.testing.llamagen import LlamaGenGeometry, make_llamagen
from vllm_kvcompress.testing.lumina import make_lumina

FULL = {"preset": "full"}
COMPRESSED = {"preset": "line_ar", "budget": 0.5}
ARGS = {
    "dtype": "float32", "enforce_eager": True, "max_model_len": 256, "max_num_seqs": 4,
    "max_num_batched_tokens": 48, "kv_cache_memory_bytes": 2**23, "attention_backend": "kvcompress",
}  # fmt: skip


CLASSES = ((3, guided(4.0)), (0, guided(1.0)), (9, guided(2.5, negative=7)))
RANKS = 2
CACHES: dict[str, dict[str, Any] | None] = {"full": None, "compressed": COMPRESSED}


@dataclass
class Family:
    """One case of `families`: what to draw on V2, and V1's tokens."""

    job: dict[str, Any]
    wanted: list[list[int]]


def families(tmp_path: Path) -> dict[str, Family]:
    """Greedily: with a full cache; compressed in windows, of two sizes where the model has them, all blocks
    lost once.
    """
    emu3, lumina = make_emu3(tmp_path / "emu3"), make_lumina(tmp_path / "lumina")
    llamagen = make_llamagen(tmp_path / "llamagen", LlamaGenGeometry(heads=4, grid=6), "bare")

    def sized(module: Any, folder: Path, section: dict[str, Any], number: int, size: str) -> Any:
        """A server of a picture's size alone, its prompt and parameters."""
        engine = module.started(folder, size, **section)
        ids, *rest = (test_emu3.prompts(engine) if module is test_emu3 else own[size])[number]
        return engine, ids, test_emu3.params(*rest)

    def of_class(section: dict[str, Any], wanted: int, setting: Any) -> Any:
        return Engine.get(llamagen, kvcompress=section), [wanted], setting

    own = {size: test_lumina.asked_for("published", size) for size in ("wide", "high")}
    emu3_sizes, lumina_sizes = ([*module.SIZES.values()] for module in (test_emu3, test_lumina))
    cases = {
        "Emu3": (emu3, FULL, {"size": test_emu3.SIZES["high"]}, [
            sized(test_emu3, emu3, FULL, number, "high") for number in (0, 1)
        ]),
        "Emu3 in windows": (emu3, COMPRESSED, {"sizes": emu3_sizes}, [
            sized(test_emu3, emu3, COMPRESSED, *one) for one in ((0, "high"), (1, "wide"))
        ]),
        "Lumina-mGPT in windows": (lumina, COMPRESSED, {"sizes": lumina_sizes}, [
            sized(test_lumina, lumina, COMPRESSED, *one) for one in ((1, "high"), (2, "wide"))
        ]),
        "LlamaGen": (llamagen, FULL, {}, [of_class(FULL, *one) for one in CLASSES]),
        "LlamaGen in windows": (llamagen, COMPRESSED, {}, [of_class(COMPRESSED, *one) for one in CLASSES]),
    }  # fmt: skip
    found = {}
    for name, (folder, section, sizes, requests) in cases.items():
        wanted = [engine.draw([ids], setting)[0] for engine, ids, setting in requests]
        wave = [
            {"ids": ids, "params": {"temperature": 0.0, "extra_args": setting.extra_args}, "at": n}
            for n, (_, ids, setting) in enumerate(requests)
        ]
        config = {"kvcompress": {**section, **sizes, "window": 1 if section is FULL else 4}}
        length = 38 if folder is llamagen else ARGS["max_model_len"]  # its class, its picture
        args = {**ARGS, "model": str(folder), "max_model_len": length, "additional_config": config}
        preempt = [] if section is FULL else [5]
        job = {"name": name, "waves": [wave], "preempt": preempt, "args": args}
        found[name] = Family(job, wanted)
    return found


def in_ranks(model: Path, ranks: int) -> list[dict[str, Any]]:
    """A picture from either cache, a token a step, with as many ranks."""
    wave, found = [{"ids": Prompts(model).picture(6), "params": {"temperature": 0.0}}], []
    for name, section in CACHES.items():
        config = {"kvcompress": {"window": 1, **(section or {})}}
        backend = {} if section is None else {"attention_backend": "kvcompress"}
        args = {**SETTINGS, "model": str(model), "tensor_parallel_size": ranks, "additional_config": config}
        found.append({"name": name, "args": {**args, **backend}, "waves": [wave], "as_ranks": RANKS})
    return found


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Family]:
    return families(tmp_path_factory.mktemp("families"))


@pytest.fixture(scope="module")
def done(
    cases: dict[str, Family], checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """What V2 draws: one process serves all in turn, first those whose ranks it forks."""
    jobs = [*in_ranks(checkpoints["five-gqa-hf"], RANKS), *(case.job for case in cases.values())]
    return EngineProcess(tmp_path_factory.mktemp("v2"), V2, jobs).finish()


def test_the_v2_runner_draws_the_same(cases: dict[str, Family], done: dict[str, dict[str, Any]]) -> None:
    assert {one["runner"] for one in done.values()} == {"vllm.v1.worker.cpu.model_runner"}
    assert {name: done[name]["waves"][0] for name in cases} == {n: case.wanted for n, case in cases.items()}
    windowed = [name for name in cases if "windows" in name]
    assert all(done[name]["preempted"] for name in windowed), "all blocks were lost once"
    for name in windowed:
        steps = [report["kv_cache"]["steps"] for report in done[name]["held"][0]]
        drawn = cases[name].wanted
        assert min(took - len(tokens) for took, tokens in zip(steps, drawn, strict=True)) < 0, name
    drawn_full, drawn_compressed = (cases[name].wanted for name in ("LlamaGen", "LlamaGen in windows"))
    assert drawn_full != drawn_compressed, "what was evicted mattered"


def test_two_ranks_draw_what_one_process_draws(
    checkpoints: dict[str, Path], done: dict[str, dict[str, Any]]
) -> None:
    one = run_here(in_ranks(checkpoints["five-gqa-hf"], 1))
    for name in CACHES:
        [[drawn]] = done[name]["waves"]
        assert len(drawn) == 25, name
        assert done[name]["waves"] == one[name]["waves"], name
    assert one["full"]["waves"] != one["compressed"]["waves"], "what was evicted mattered"
