"""The Triton kernels on a GPU: correct first, then how far from what the card's memory allows.

Needs torch, triton and this package; vLLM is not imported.

    python benchmarks/gpu.py --json result.json

1. Checks against float64 on fresh random inputs: outputs, scores and victims. A failure ends the run.
2. (a) Decode attention of one layer, as all layers of a model run it one after the other in a CUDA graph,
   against its floor: the bytes that must move at the bandwidth of a plain copy on the same card. With the
   two head types of preset decoupled, and with six as a fit picks them, at one budget.
3. (b) The whole decode step, random weights, in a CUDA graph, against max(bytes, FLOP); (c) the same step
   with the full cache through the best attention installed (gpu_step.py, gpu_full_cache.py).
4. (d) transformers' own Janus at the same batch, where transformers is installed (gpu_transformers.py).
"""

import argparse
import json
import math
import os
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from gpu_caches import JANUS_1B, JANUS_7B, PREFIX, TINY, Caches, Geometry, layouts
from gpu_clock import copy_bandwidth, fits, seconds

BATCHES = (16, 64, 128, 256, 512)  # images
BUDGETS = (1.0, 0.5, 0.2, 1 / 6, 1 / 8)
LIMIT = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def attend64(q: Tensor, kind, row: int, head: int, length: int, scale: float) -> tuple[Tensor, Tensor]:
    """Output and probabilities of one query in float64, from the pages as they are after the step."""
    pages, visible = kind.pages, min(length, PREFIX + kind.rule.capacity)
    slot = torch.arange(visible, device=q.device)
    cell = kind.block_table[row].long()[slot // pages.page], head, slot % pages.page
    key, value = pages.kv[cell].double().chunk(2, -1)
    weight = (key @ q.double() * scale).softmax(0)
    return weight @ value, weight


def verify(dtype: torch.dtype, device: str, shape: Geometry, name: str) -> dict:
    """Worst relative errors of fresh random inputs; raises AssertionError where a limit is passed."""
    from vllm_kvcompress.attention import select, triton_decode, triton_select

    caches = Caches(shape, 3, layouts(shape, 0.5)[name], dtype, device, shape.lines - 2)
    heads, size = 2 * shape.heads, shape.head_size
    q, k, v = (torch.randn(3, heads, size, device=device).to(dtype) for _ in range(3))
    scale, worst, score_worst = size**-0.5, 0.0, 0.0
    caches.plan.length[1] = 0  # a padding row
    checked = []
    for types in caches.layers:
        out, before = torch.full_like(q, torch.nan), [kind.pages.score.clone() for kind in types]
        triton_decode.decode(q, k, v, types, caches.plan, scale, out)
        assert not out[1].any(), "a padding row's output is zero"
        checked += [(kind, old, out) for kind, old in zip(types, before, strict=True)]
    for kind, old, out in checked:
        for row, head in ((0, 0), (2, len(kind.head_index) - 1)):
            at, length = int(kind.head_index[head]), int(caches.plan.length[row])
            want, weight = attend64(q[row, at], kind, row, head, length, scale)
            worst = max(worst, float((out[row, at].double() - want).norm() / want.norm()))
            if kind.rule.scores:
                slot = torch.arange(PREFIX, len(weight), device=device)
                cell = kind.block_table[row].long()[slot // kind.pages.page], head, slot % kind.pages.page
                now, was = kind.pages.score[cell].double(), old[cell].double()
                held = kind.pages.token[cell] != length - 1 - PREFIX  # the new token's score began at zero
                gap = (now - was.where(held, 0) - weight[PREFIX:]).abs().max()
                score_worst = max(score_worst, float(gap))
    assert worst < LIMIT[dtype], f"{dtype}: outputs differ by {worst:.1e}"
    assert score_worst < 1e-5, f"{dtype}: scores differ by {score_worst:.1e}"
    scored = [kind for kind in caches.together if kind.rule.scores]
    scores = [kind.pages.score.clone() for kind in scored]
    for kind in scored:
        value = kind.pages.kv[..., size:]  # of norms that any order of summation gives exactly
        value.zero_()
        value[..., 0] = torch.randint(1, 8, value.shape[:-1], device=device).to(dtype)
        kind.pages.victim.fill_(-1)
        select.select_victims(kind, caches.line_end)
    wanted = [kind.pages.victim.clone() for kind in scored]
    for kind, score in zip(scored, scores, strict=True):
        kind.pages.score.copy_(score)
        kind.pages.victim.fill_(-1)
    triton_select.select_all(caches.together, caches.line_end)
    for kind, victims in zip(scored, wanted, strict=True):
        assert (victims >= 0).any(), "no victims were chosen"
        assert torch.equal(kind.pages.victim, victims), "other victims"
    return {"dtype": str(dtype), "layout": name, "output": worst, "score": score_worst}


def attention(shape: Geometry, images: int, budget: float, name: str, device: str, bandwidth: float) -> dict:
    """(a) Decode attention of a layer against its floor; victims of a line's end of all rows at once."""
    from vllm_kvcompress.attention import triton_decode, triton_select

    layout = layouts(shape, budget)[name]
    caches = Caches(shape, images, layout, torch.bfloat16, device, shape.lines - 1)
    q, k, v = (torch.randn(images, 2 * shape.heads, shape.head_size, device=device).bfloat16() for _ in "qkv")
    out = torch.empty_like(q)

    def layers() -> None:
        for types in caches.layers:
            triton_decode.decode(q, k, v, types, caches.plan, shape.head_size**-0.5, out)

    def victims() -> None:
        triton_select.select_all(caches.together, caches.line_end)

    # q, k, v, out, and the new K and V
    moved = (caches.kv_bytes + caches.score_bytes) / shape.layers + 6 * q.nbytes
    row = {"model": shape.name, "images": images, "budget": budget, "layout": name}
    row |= {"slots": layout.slots, "bytes": round(moved)}
    if device == "cpu":  # the dry run
        layers()
        victims()
        return row
    taken, floor = seconds(layers) / shape.layers, moved / bandwidth
    row |= {"us": taken * 1e6, "floor_us": floor * 1e6, "ratio": taken / floor}
    evicts = any(kind.rule.scores for kind in caches.together)
    return row | ({"victims_us": seconds(victims) * 1e6} if evicts else {})


def table(rows: list[dict]) -> str:
    """Columns as wide as they need; numbers to three digits."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    values = [[row.get(name, "") for name in names] for row in rows]
    lines = [names] + [[f"{x:.3g}" if isinstance(x, float) else str(x) for x in line] for line in values]
    width = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(c.rjust(w) for c, w in zip(line, width, strict=True)) for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--skip-step", action="store_true", help="only the checks and (a)")
    parser.add_argument(
        "--dry-run", action="store_true", help="tiny shapes on the CPU in Triton's interpreter, nothing timed"
    )
    args = parser.parse_args()
    if not args.dry_run and not torch.cuda.is_available():
        parser.exit(2, "benchmarks/gpu.py: needs a CUDA device and torch built for it; or --dry-run\n")
    if args.dry_run:  # before Triton is imported, hence the imports inside functions
        os.environ["TRITON_INTERPRET"] = "1"
    device = "cpu" if args.dry_run else "cuda"
    shape = TINY if args.dry_run else JANUS_1B
    card = "none: dry run" if args.dry_run else torch.cuda.get_device_name()
    result: dict = {"card": card, "torch": torch.__version__}
    result["limits"] = {str(dtype): limit for dtype, limit in LIMIT.items()}
    result["checks"] = [verify(dtype, device, shape, name) for dtype in LIMIT for name in layouts(shape, 0.5)]
    print(f"card: {card}\n{table(result['checks'])}")
    bandwidth = math.nan if args.dry_run else copy_bandwidth()
    result["copy_bytes_per_second"] = None if args.dry_run else bandwidth
    batches = (1,) if args.dry_run else BATCHES
    result["attention"] = [
        attention(shape, images, budget, name, device, bandwidth)
        for budget in (BUDGETS[:2] if args.dry_run else BUDGETS)
        for images in batches
        for name in layouts(shape, budget)
        if args.dry_run or fits(shape, images, budget)
    ]
    print(f"copy: {bandwidth / 1e9:.0f} GB/s; (a) decode attention of a layer\n{table(result['attention'])}")
    if not args.skip_step:
        from gpu_step import steps

        result["step"] = steps([TINY] if args.dry_run else [JANUS_1B, JANUS_7B], device, bandwidth)
        print(f"(b), (c) the whole decode step\n{table(result['step'])}")
        from gpu_transformers import tokens_per_second

        stretches, images = ((2, 4), 1) if args.dry_run else ((24, 72), 128)
        result["transformers"] = [tokens_per_second(shape, images, device, stretches)]
        print(f"(d) transformers, a step of all images\n{table(result['transformers'])}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
