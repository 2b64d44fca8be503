"""The runner of GPUs, on the CPU, draws what V1 draws with models whose branches are of unlike length."""

from pathlib import Path
from typing import Any

import test_emu3
import test_lumina
from engine_process import V2, EngineProcess
from inprocess import in_process  # noqa: F401

from vllm_kvcompress.testing.emu3 import make_emu3
from vllm_kvcompress.testing.lumina import make_lumina

FULL = {"preset": "full"}
COMPRESSED = {"preset": "line_ar", "budget": 0.5}
ARGS = {
    "dtype": "float32", "enforce_eager": True, "max_model_len": 256, "max_num_seqs": 4,
    "max_num_batched_tokens": 48, "kv_cache_memory_bytes": 2**23, "attention_backend": "kvcompress",
}  # fmt: skip


def test_the_v2_runner_draws_the_same(tmp_path: Path) -> None:
    """With a full cache; pictures of two sizes compressed in windows. One process serves all in turn."""
    emu3, lumina = make_emu3(tmp_path / "emu3"), make_lumina(tmp_path / "lumina")

    def drawn(module: Any, folder: Path, section: dict[str, Any], number: int, size: str) -> Any:
        """A request, as the process takes it, and what a server of its size alone draws for it."""
        engine = module.started(folder, size, **section)
        ids, *rest = (test_emu3.prompts(engine) if module is test_emu3 else own[size])[number]
        setting = test_emu3.params(*rest)
        asked = {"ids": ids, "params": {"temperature": 0.0, "extra_args": setting.extra_args}}
        return asked, engine.draw([ids], setting)[0]

    own = {size: test_lumina.asked_for("published", size) for size in ("wide", "high")}
    cases = {
        "Emu3": (test_emu3, emu3, FULL, {"size": test_emu3.SIZES["high"]}, ((0, "high"), (1, "high"))),
        "Emu3 in windows": (
            test_emu3, emu3, COMPRESSED, {"sizes": [*test_emu3.SIZES.values()]}, ((0, "high"), (1, "wide")),
        ),
        "Lumina-mGPT in windows": (
            test_lumina, lumina, COMPRESSED, {"sizes": [*test_lumina.SIZES.values()]},
            ((1, "high"), (2, "wide")),
        ),
    }  # fmt: skip
    jobs, wanted = [], {}
    for name, (module, folder, section, sizes, requests) in cases.items():
        found = [drawn(module, folder, section, *request) for request in requests]
        wave = [{**asked, "at": n} for n, (asked, _) in enumerate(found)]
        wanted[name] = [tokens for _, tokens in found]
        config = {"kvcompress": {**section, **sizes, "window": 1 if section is FULL else 4}}
        args = {**ARGS, "model": str(folder), "additional_config": config}
        preempt = [] if section is FULL else [5]
        jobs.append({"name": name, "waves": [wave], "preempt": preempt, "args": args})
    done = EngineProcess(tmp_path, V2, jobs).finish()
    assert {one["runner"] for one in done.values()} == {"vllm.v1.worker.cpu.model_runner"}
    assert {name: one["waves"][0] for name, one in done.items()} == wanted
    assert all(done[name]["preempted"] for name in [*cases][1:]), "all blocks were lost once"
