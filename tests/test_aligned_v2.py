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
    """With a full cache, and compressed in windows; one process serves both models in turn."""
    emu3, lumina = make_emu3(tmp_path / "emu3"), make_lumina(tmp_path / "lumina")
    own = test_lumina.asked_for("published", "wide")[1:3]
    cases = {
        "Emu3": (test_emu3, emu3, "high", FULL, 1, None),
        "Emu3 in windows": (test_emu3, emu3, "high", COMPRESSED, 4, None),
        "Lumina-mGPT in windows": (test_lumina, lumina, "wide", COMPRESSED, 4, own),
    }
    jobs, wanted = [], {}
    for name, (module, folder, size, section, window, prompts) in cases.items():
        engine = module.started(folder, size, **section)
        asked = [(ids, test_emu3.params(*rest)) for ids, *rest in prompts or test_emu3.prompts(engine)[:2]]
        wanted[name] = engine.draw([ids for ids, _ in asked], [setting for _, setting in asked])
        wave: list[dict[str, Any]] = [
            {"ids": ids, "params": {"temperature": 0.0, "extra_args": setting.extra_args}, "at": n}
            for n, (ids, setting) in enumerate(asked)
        ]
        config = {"kvcompress": {"size": module.SIZES[size], "window": window, **section}}
        args = {**ARGS, "model": str(folder), "additional_config": config}
        jobs.append({"name": name, "waves": [wave], "args": args})
    found = EngineProcess(tmp_path, V2, jobs).finish()
    assert {one["runner"] for one in found.values()} == {"vllm.v1.worker.cpu.model_runner"}
    assert {name: one["waves"][0] for name, one in found.items()} == wanted
