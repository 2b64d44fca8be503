"""The runner of GPUs, on the CPU, draws what V1 draws with the other families."""

from pathlib import Path
from typing import Any

import test_emu3
import test_lumina
from engine_process import V2, EngineProcess
from inprocess import Engine, in_process  # noqa: F401
from test_llamagen import guided

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


def test_the_v2_runner_draws_the_same(tmp_path: Path) -> None:
    """Greedily: with a full cache; compressed in windows, of two sizes where the model has them, all blocks
    lost once. One process serves all in turn.
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
    jobs, wanted = [], {}
    for name, (folder, section, sizes, requests) in cases.items():
        wanted[name] = [engine.draw([ids], setting)[0] for engine, ids, setting in requests]
        wave = [
            {"ids": ids, "params": {"temperature": 0.0, "extra_args": setting.extra_args}, "at": n}
            for n, (_, ids, setting) in enumerate(requests)
        ]
        config = {"kvcompress": {**section, **sizes, "window": 1 if section is FULL else 4}}
        length = 38 if folder is llamagen else ARGS["max_model_len"]  # its class, its picture
        args = {**ARGS, "model": str(folder), "max_model_len": length, "additional_config": config}
        preempt = [] if section is FULL else [5]
        jobs.append({"name": name, "waves": [wave], "preempt": preempt, "args": args})
    done = EngineProcess(tmp_path, V2, jobs).finish()
    assert {one["runner"] for one in done.values()} == {"vllm.v1.worker.cpu.model_runner"}
    assert {name: one["waves"][0] for name, one in done.items()} == wanted
    windowed = [name for name in cases if "windows" in name]
    assert all(done[name]["preempted"] for name in windowed), "all blocks were lost once"
    for name in windowed:
        steps = [report["kv_cache"]["steps"] for report in done[name]["held"][0]]
        assert min(took - len(tokens) for took, tokens in zip(steps, wanted[name], strict=True)) < 0, name
    assert wanted["LlamaGen"] != wanted["LlamaGen in windows"], "what was evicted mattered"
