"""The commands of benchmarks/README.md, run as written there, with tiny numbers."""

import json
import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import preloaded
import pytest

from vllm_kvcompress.testing.checkpoints import TINY, make_checkpoint

README = Path(__file__).parent.parent / "benchmarks" / "README.md"
ENGINE = "--dtype float32 --enforce-eager --kv-cache-memory-bytes 268435456"


def command(name: str, **values: object) -> list[str]:
    """The README's ``vllm bench NAME`` command, with other values for its options."""
    blocks = re.findall(r"```bash\n(.*?)```", README.read_text(), re.DOTALL)
    (found,) = [block for block in blocks if f"vllm bench {name} " in block]
    words = shlex.split(found[found.index("vllm bench") :].replace("\\\n", " "), comments=True)
    for option, value in values.items():
        flag = f"--{option.replace('_', '-')}"
        assert flag in words, f"{flag} is not in the README's command"
        words[words.index(flag) + 1] = str(value)
    return [str(Path(sys.executable).with_name("vllm")), *words[1:]]


def run(words: list[str], cwd: Path) -> str:
    done = preloaded.run(words, cwd)
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """deepseek-ai's layout in a .bin, as published; ids up to 10,000 for vLLM's made-up prompts."""
    geometry = replace(TINY, text_vocab=10_240)
    path = tmp_path_factory.mktemp("bench") / "model"
    return make_checkpoint(path, layout="deepseek", geometry=geometry, file_format="bin")


def test_throughput_draws_pictures(model, tmp_path):
    prompt = "<|User|>: a cat\n\n<|Assistant|>:<begin_of_image>"
    prompts = [{"conversations": [{"value": prompt}, {"value": "a picture"}]}] * 3
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    words = command("throughput", model=model, num_prompts=3, output_len=64)
    out = run([*words, *shlex.split(ENGINE), "--output-json", "out.json"], tmp_path)
    assert "Throughput: " in out
    assert "Total num output tokens:  192" in out
    assert json.loads((tmp_path / "out.json").read_text())["requests_per_second"] > 0


def test_latency(model, tmp_path):
    words = command("latency", model=model, input_len=8, output_len=8, batch_size=2, num_iters=2,
                    num_iters_warmup=1)  # fmt: skip
    out = run([*words, *shlex.split(ENGINE), "--output-json", "out.json"], tmp_path)
    assert "Avg latency: " in out
    assert len(json.loads((tmp_path / "out.json").read_text())["latencies"]) == 2


@pytest.mark.parametrize("stream", [False, True])
def test_serve(image_server, checkpoints, tmp_path, stream):
    words = command("serve", base_url=image_server.url, model=image_server.name, num_prompts=3,
                    tokenizer=checkpoints["tiny-hf"], max_concurrency=2)  # fmt: skip
    extra = ["--extra-body", '{"stream": true, "partial_images": 2}'] if stream else []
    out = run([*words, *extra, "--save-result", "--result-filename", "out.json"], tmp_path)
    result = json.loads((tmp_path / "out.json").read_text())
    assert (result["completed"], result["failed"]) == (3, 0)
    assert result["total_output_tokens"] == 3 * TINY.image_tokens
    assert result["request_throughput"] > 0
    assert "Request throughput (req/s):" in out
    assert 0 < result["mean_ttft_ms"] <= result["mean_e2el_ms"]
    if stream:
        assert result["mean_ttft_ms"] < result["mean_e2el_ms"]
