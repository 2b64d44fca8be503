"""The runner of GPUs, on the CPU, draws what V1 draws with models whose branches are of unlike length."""

from pathlib import Path

import pytest
import test_emu3
import test_lumina
from engine_process import V2, EngineProcess
from inprocess import in_process  # noqa: F401
from vllm import SamplingParams

from vllm_kvcompress.testing.emu3 import make_emu3
from vllm_kvcompress.testing.lumina import make_lumina

SECTIONS = {
    "full": {"preset": "full", "window": 1},
    "windows": {"preset": "line_ar", "budget": 0.5, "window": 4},
}
SIZES = {"emu3": test_emu3.SIZES["high"], "lumina": test_lumina.SIZES["wide"]}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("aligned")
    return {"emu3": make_emu3(root / "emu3"), "lumina": make_lumina(root / "lumina")}


def test_the_v2_runner_draws_the_same(folders: dict[str, Path], tmp_path: Path) -> None:
    """With a full cache, and compressed in windows; one process serves both models in turn."""
    emu3 = test_emu3.started(folders["emu3"], "high", preset="full")
    prompts = {
        "emu3": test_emu3.prompts(emu3)[:2],  # away from a longer text, and from a shorter one
        "lumina": test_lumina.asked_for("published", "wide")[1:3],  # from nothing, and from a text
    }
    asked = {
        name: [
            {
                "ids": ids,
                "params": {"temperature": 0.0, "extra_args": test_emu3.params(*rest).extra_args},
                "at": n,
            }
            for n, (ids, *rest) in enumerate(mine)
        ]
        for name, mine in prompts.items()
    }
    args = {
        "dtype": "float32", "enforce_eager": True, "max_model_len": 256, "max_num_seqs": 4,
        "max_num_batched_tokens": 48, "kv_cache_memory_bytes": 2**23, "attention_backend": "kvcompress",
    }  # fmt: skip
    engines = [
        {
            "name": f"{name} {kind}", "waves": [asked[name]],
            "args": {
                **args, "model": str(folders[name]),
                "additional_config": {"kvcompress": {"size": SIZES[name], **section}},
            },
        }
        for name in prompts
        for kind, section in SECTIONS.items()
    ]  # fmt: skip
    found = EngineProcess(tmp_path, V2, engines).finish()
    assert {one["runner"] for one in found.values()} == {"vllm.v1.worker.cpu.model_runner"}
    for name, started, size in (
        ("emu3", test_emu3.started, "high"),
        ("lumina", test_lumina.started, "wide"),
    ):
        ids = [one["ids"] for one in asked[name]]
        settings = [SamplingParams(**one["params"]) for one in asked[name]]
        for kind, section in SECTIONS.items():
            engine = started(folders[name], size, **{**section, "window": 1})
            assert found[f"{name} {kind}"]["waves"][0] == engine.draw(ids, settings), (name, kind)
