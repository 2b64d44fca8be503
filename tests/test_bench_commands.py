"""The commands of benchmarks/README.md, run as written there, with tiny numbers."""

import contextlib
import json
import re
import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import preloaded
import pytest
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_kvcompress.testing.checkpoints import TINY, make_checkpoint

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from side_by_side import http  # noqa: E402
from side_by_side.contenders import CONTENDERS, OURS, STOCK  # noqa: E402
from side_by_side.plan import HttpGroup  # noqa: E402
from side_by_side.results import Results  # noqa: E402
from side_by_side.runner import Run  # noqa: E402
from side_by_side.workloads import BLOCK, tiny  # noqa: E402

README = BENCHMARKS / "README.md"
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


def test_turns_of_the_side_by_side_benchmark(image_server, checkpoints, tmp_path, monkeypatch):
    """A server at saturation, then in an open loop at a share of that; what is there is not asked again."""
    monkeypatch.setattr(
        http, "subprocess", SimpleNamespace(run=lambda words, cwd, **_: preloaded.run(words, cwd))
    )
    monkeypatch.setattr(http, "serve", lambda group, contender: contextlib.nullcontext(image_server))
    monkeypatch.setattr(type(workload := tiny("tiny-http")), "checkpoint", lambda *_: checkpoints["tiny-hf"])
    group = HttpGroup("http", workload, (STOCK,), 1, 3, 2)
    results = Results.open("tiny", 1, tmp_path / "http.json", fresh=True)
    said = []
    turns = Run(results, time.monotonic() + 300, said.append, copy=object())
    turns.group(group, lambda: None)
    assert (turns.failures, turns.missing(group)) == (0, 0), said
    saturated, open_loop = results.cells
    assert (saturated["completed"], open_loop["completed"]) == (3, 3)
    assert open_loop["rate"] == pytest.approx(0.7 * saturated["request_throughput"], abs=1e-3)
    assert 0 < saturated["p50_e2el_ms"] <= saturated["p95_e2el_ms"] <= saturated["p99_e2el_ms"]


def test_servers_of_the_side_by_side_benchmark(checkpoints, monkeypatch):
    """As vLLM reads their command line: the stock one begins no more than its memory holds."""
    workload = tiny("tiny-http")
    monkeypatch.setattr(type(workload), "checkpoint", lambda *_: checkpoints["tiny-hf"])
    parser = make_arg_parser(FlexibleArgumentParser())
    group = HttpGroup("http", workload, (STOCK, OURS), 1, 3, 2)
    stock, ours = (
        parser.parse_args(http.serve(group, CONTENDERS[name]).command[2:]) for name in group.contenders
    )
    assert (stock.max_num_seqs, stock.block_size, stock.attention_backend) == (2, BLOCK, None)
    assert str(ours.attention_backend).lower().endswith("kvcompress")
    slots = (2 * 19 + 1) * BLOCK  # 32 tokens of prompt and 576 of a picture are 19 blocks
    assert ours.kv_cache_memory_bytes == stock.kv_cache_memory_bytes == slots * workload.token_bytes
