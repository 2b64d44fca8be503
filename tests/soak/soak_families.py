"""What a user does with a model of any family: calibrate, inspect, serve with that profile, draw.

By hand: ``make soak``, or ``python -m pytest tests/soak/soak_families.py``. The commands in their own
processes and a server over HTTP, on small random checkpoints; every run of the suite has the parts.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from test_cli import calibrate, invoke

from vllm_kvcompress.heads.profile import HeadProfile
from vllm_kvcompress.testing.checkpoints import GQA, make_checkpoint
from vllm_kvcompress.testing.emu3 import make_emu3
from vllm_kvcompress.testing.llamagen import LlamaGenGeometry, make_llamagen
from vllm_kvcompress.testing.lumina import make_lumina
from vllm_kvcompress.testing.server import Server, ServerError

CLASSES = LlamaGenGeometry(classes=1000, grid=6)
# By family: how a checkpoint is made, the size to ask for, a prompt.
FAMILIES: dict[str, tuple[Callable[[Path], Path], str | None, str]] = {
    "Janus": (lambda path: make_checkpoint(path, layout="deepseek", geometry=GQA), None, "a red bird"),
    "Emu3": (make_emu3, "28x24", "a red bird"),
    "Lumina-mGPT": (make_lumina, "24x24", "a red bird"),
    "LlamaGen": (lambda path: make_llamagen(path, CLASSES), None, "golden retriever"),
}


@pytest.fixture(scope="module")
def profiles() -> dict[str, Path]:
    """Of the families that came before."""
    return {}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("family", FAMILIES)
def test_calibrate_inspect_serve_draw(tmp_path: Path, profiles: dict[str, Path], family: str) -> None:
    make, size, prompt = FAMILIES[family]
    folder, profile = make(tmp_path / "model"), tmp_path / "profile.json"
    sized = ("--size", size) if size else ()
    done = calibrate(folder, "-o", profile, "--dtype", "float32", "--budgets", "0.5", *sized)
    assert done.returncode == 0, done.stderr
    shown = invoke("inspect", profile, "-o", tmp_path / "heads.png")
    assert shown.exit_code == 0, shown.output
    assert "predicted loss" in shown.stdout
    assert "tried at 0.5: guided KL" in shown.stdout

    def arguments(which: Path) -> list[str]:
        section = {"budget": 0.5, "head_profile": str(which), **({"size": size} if size else {})}
        return [
            "--dtype", "float32", "--kv-cache-memory-bytes", str(2**26), "--enforce-eager",
            "--attention-backend", "kvcompress", "--additional-config", json.dumps({"kvcompress": section}),
        ]  # fmt: skip

    log = tmp_path / "server.log"
    with (
        Server(folder, log, arguments(profile), name="model") as server,
        httpx.Client(base_url=server.url, timeout=120) as http,
    ):
        body = {"model": "model", "prompt": prompt, "seed": 3}
        first, again = (http.post("/v1/images/generations", json=body).json() for _ in range(2))
        assert first["data"][0]["b64_json"] == again["data"][0]["b64_json"]
        held = first["usage"]["kv_cache"]
        assert held["resident_bytes"] < held["full_bytes"]
    (line,) = [line for line in log.read_text().splitlines() if "kvcompress: preset fitted" in line]
    divergence = HeadProfile.load(profile).trials[0].divergence
    assert f"guided KL {divergence:.2g}" in line
    assert "Calibrating" not in log.read_text()
    for other in list(profiles.values())[:1]:
        with (
            pytest.raises(ServerError, match="did not start"),
            Server(folder, log, arguments(other), name="model"),
        ):
            pass
        last = log.read_text().splitlines()[-1]
        assert "head_profile: " in last
        assert "Loading safetensors" not in log.read_text(), "said before the engine starts"
    profiles[family] = profile
    print(f"{family}: {line[line.index('preset') :]}")
