"""Servers over HTTP: ``vllm serve`` asked by ``vllm bench serve``, at a fixed KV memory.

Saturation is all requests at once; an open loop is a Poisson process of arrivals that does not wait for
answers.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from side_by_side.child import ContenderError
from side_by_side.contenders import CONTENDERS, STOCK, Contender
from side_by_side.plan import HttpGroup
from side_by_side.workloads import BLOCK, OUT
from vllm_kvcompress.testing.server import Server, ServerError

SATURATION = "saturation"
_PROMPT = 16  # tokens of the made-up prompts
_ALLOWANCE = 16  # that the format adds
_FIGURES = ("completed", "failed", "request_throughput", "p50_e2el_ms", "p95_e2el_ms", "p99_e2el_ms")


def serve(group: HttpGroup, contender: Contender) -> Server:
    """A server of the contender; its log is below ``out/bench``."""
    workload = group.workload
    blocks = group.memory_images * -(-(_PROMPT + _ALLOWANCE + workload.tokens) // BLOCK) + 1
    arguments = [
        "--dtype", "bfloat16", "--enforce-eager", "--max-model-len", str(64 + workload.tokens),
        "--kv-cache-memory-bytes", str(blocks * BLOCK * workload.token_bytes),
    ]  # fmt: skip
    section = {"window": 1} | ({} if contender.section is None else workload.settings(contender.section))
    arguments += ["--additional-config", json.dumps({"kvcompress": section})]
    if contender.section is None:
        # More at once than fit would be preempted and drawn again: the full cache is at its best like this.
        arguments += ["--block-size", str(BLOCK), "--max-num-seqs", str(group.memory_images)]
    else:
        arguments += ["--attention-backend", "kvcompress"]
        arguments += ["--max-num-seqs", "64"]
    log = OUT / "logs" / f"{workload.name}-{re.sub(r'[^a-z0-9]+', '_', contender.name)}-server.log"
    # Both cores for the model: by default vLLM leaves one of two to the front end.
    environment = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    return Server(workload.checkpoint(contender.weights), log, arguments, env=environment)


def ask(server: Server, group: HttpGroup, rate: float, repeat: int) -> dict[str, Any]:
    """One run of ``vllm bench serve``.

    Parameters
    ----------
    rate : float
        Arrivals a second; infinite is saturation.

    Raises
    ------
    ContenderError
        The command failed, or not every picture came.
    """
    name = f"{group.workload.name}-{os.getpid()}.json"
    command = [
        str(Path(sys.executable).with_name("vllm")), "bench", "serve",
        "--backend", "openai-images", "--endpoint", "/v1/images/generations", "--base-url", server.url,
        "--model", server.name, "--tokenizer", str(group.workload.checkpoint()),
        "--dataset-name", "random", "--input-len", str(_PROMPT), "--output-len", str(group.workload.tokens),
        "--num-prompts", str(group.pictures), "--request-rate", str(rate), "--seed", str(repeat),
        "--percentile-metrics", "e2el", "--metric-percentiles", "50,95,99",
        "--save-result", "--result-dir", str(OUT), "--result-filename", name,
    ]  # fmt: skip
    done = subprocess.run(command, cwd=OUT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ContenderError(done.stdout[-1000:] + done.stderr[-3000:])
    path = OUT / name
    result = json.loads(path.read_text())
    path.unlink()
    if result["failed"]:
        raise ContenderError(f"{result['failed']} of {group.pictures} pictures failed")
    return {figure: round(result[figure], 5) for figure in _FIGURES}


def stock_saturation(cells: list[dict[str, Any]], group: HttpGroup) -> float | None:
    """Pictures/s of the stock server at saturation, the first time it was measured."""
    for cell in cells:
        if (cell["workload"], cell["contender"], cell.get("load")) == (
            group.workload.name,
            STOCK,
            SATURATION,
        ):
            return cell["request_throughput"]
    return None


def turns(group: HttpGroup) -> list[tuple[int, Contender]]:
    """Servers in the order in which they are started; the stock server is the first."""
    return [(repeat, CONTENDERS[name]) for repeat in range(group.repeats) for name in group.contenders]


__all__ = ["SATURATION", "ServerError", "ask", "serve", "stock_saturation", "turns"]
