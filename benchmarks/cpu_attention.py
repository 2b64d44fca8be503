"""Decode attention on the CPU: bandwidth of each implementation against a plain multi-threaded copy.

The cache is as large as that of a whole model and every layer is cold when its turn comes. Copies and
implementations take turns layer by layer, so that whatever else the machine does falls on all of them.

    python benchmarks/cpu_attention.py --spatial 8 --huge-pages
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_kvcompress.attention import cpu, reference
from vllm_kvcompress.attention.pages import HeadType, Plan, page_bytes, pages_from_bytes
from vllm_kvcompress.policy.rule import HeadRule

GIB = 2**30
DRAWN = 300  # image tokens drawn so far: mid-line, far past the capacity


@dataclass
class Model:
    """The caches of all layers, as the backend would hold them."""

    layers: list[list[HeadType]]
    together: list[HeadType]  # per head type: all layers at once
    plan: Plan
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    layer_bytes: int  # K and V that one layer's step reads
    scale: float

    def run(self, decode: Callable[..., None], layer: int) -> None:
        decode(self.q, self.k, self.v, self.layers[layer], self.plan, self.scale, self.out)


def build(args: argparse.Namespace) -> Model:
    """A steady state: all rows past their capacity; every slot holds a token, every victim is valid."""
    torch.manual_seed(0)
    dtype, line = getattr(torch, args.dtype), args.line
    image = 24 * line
    anchors = 4
    rules = {
        "spatial": HeadRule(args.slots, line, image, anchors, args.slots - anchors, ring=True),
        "semantic": HeadRule(args.slots, line, image, anchors, line),
    }
    heads = {"spatial": list(range(args.spatial)), "semantic": list(range(args.spatial, args.heads))}
    layers: list[list[HeadType]] = [[] for _ in range(args.layers)]
    together = []
    for name, rule in rules.items():
        if not heads[name]:
            continue
        both = heads[name] + [args.heads + head for head in heads[name]]
        n, per_row = len(both) * args.layers, -(-(args.prefix + args.slots) // args.page)
        size = page_bytes(n, args.page, args.head_size, dtype)
        raw = torch.zeros(args.rows * per_row + 1, -(-size // 512) * 512, dtype=torch.uint8)
        if args.huge_pages and not cpu.use_huge_pages(raw, collapse=True):
            raise SystemExit("--huge-pages: this kernel does not give them (transparent_hugepage, Linux 6.1)")
        pages = pages_from_bytes(raw, n, args.page, args.head_size, dtype)
        pages.kv.copy_(torch.randn(1, n, args.page, 2 * args.head_size).to(dtype))
        pages.token.copy_(torch.randint(0, DRAWN, pages.token.shape, dtype=torch.int16))
        pages.victim.copy_(torch.randint(0, args.slots, pages.victim.shape, dtype=torch.int16))
        pages.score.uniform_()
        table = torch.randperm(args.rows * per_row).view(args.rows, per_row).int()
        index = torch.tensor(both, dtype=torch.int32)
        together.append(HeadType(pages, rule, index, table))
        for i, types in enumerate(layers):
            types.append(HeadType(pages.layer(i * len(both), (i + 1) * len(both)), rule, index, table))
    q = torch.randn(args.rows, 2 * args.heads * args.group, args.head_size).to(dtype)
    k, v = torch.randn(2, args.rows, 2 * args.heads, args.head_size).to(dtype).unbind()
    prefix = torch.full((args.rows,), args.prefix, dtype=torch.int32)
    resident = args.rows * 2 * args.heads * (args.prefix + args.slots)
    return Model(
        layers,
        together,
        Plan(prefix, prefix + DRAWN),
        *(q, k, v, torch.empty_like(q)),
        layer_bytes=resident * 2 * args.head_size * dtype.itemsize,
        scale=args.head_size**-0.5,
    )


def torch_ops(
    q: Tensor, k: Tensor, v: Tensor, types: list[HeadType], plan: Plan, scale: float, out: Tensor
) -> None:
    """The best that torch operations gave: gather whole pages, batched products in the cache's dtype.

    Knows that all rows are in the same steady phase, which the real thing must not.
    """
    rows, group = len(q), q.shape[1] // k.shape[1]
    for kind in types:
        pages, rule, heads = kind.pages, kind.rule, kind.head_index.long()
        prefix = int(plan.prefix[0])
        resident = prefix + rule.capacity
        table = kind.block_table.long()
        slot = prefix + reference.slot_of(kind, kind.block_table, plan.length.long() - 1 - plan.prefix)
        block, place = table.gather(1, slot // pages.page), slot % pages.page
        head = torch.arange(len(heads))
        pages.kv[block, head, place] = torch.cat((k[:, heads], v[:, heads]), -1)
        pages.token[block, head, place] = (plan.length - 1 - plan.prefix).short()[:, None]
        pages.score[block, head, place] = 0
        kv = (
            pages.kv[table].permute(0, 2, 1, 3, 4).flatten(2, 3)[:, :, :resident]
        )  # a copy of what is resident
        key, value = kv.chunk(2, -1)
        query = q.unflatten(1, (-1, group))[:, heads]
        weight = ((query @ key.transpose(2, 3)).float() * scale).softmax(-1)
        out.unflatten(1, (-1, group))[:, heads] = weight.to(value.dtype) @ value
        if rule.scores:
            mass = torch.zeros(rows, len(heads), table.shape[1] * pages.page)
            mass[..., prefix:resident] = weight.sum(2)[..., prefix:]
            pages.score[table] += mass.unflatten(2, (-1, pages.page)).transpose(1, 2)


class Stock:
    """vLLM's own CPU kernel on a full cache: what a decode step costs without compression."""

    def __init__(self, model: Model, args: argparse.Namespace, tokens: int, layers: int = 4, block: int = 32):
        from vllm import _custom_ops as ops
        from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

        torch.cpu._init_amx()  # the AMX kernel dies without it
        rows, heads, dim, dtype = args.rows, 2 * args.heads, args.head_size, model.q.dtype
        per_row = -(-tokens // block)
        self.caches = [torch.zeros(rows * per_row, heads, 2 * block, dim, dtype=dtype) for _ in range(layers)]
        self.table = torch.randperm(rows * per_row).view(rows, per_row).int()
        self.lengths = torch.full((rows,), tokens, dtype=torch.int32)
        self.starts = torch.arange(rows + 1, dtype=torch.int32)
        kind = _get_attn_isa(dtype, block, dim)
        self.metadata = ops.cpu_attn_get_scheduler_metadata(
            *(rows, heads * args.group, heads, dim, self.lengths, dtype, self.starts, True, -1, kind, True)
        )
        self.attend, self.turn = ops.cpu_attention_with_kv_cache, 0
        self.layer_bytes = rows * heads * tokens * 2 * dim * dtype.itemsize

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, types: list[HeadType], plan: Plan, scale: float, out: Tensor
    ) -> None:
        self.turn = (self.turn + 1) % len(self.caches)
        key, value = self.caches[self.turn].chunk(2, dim=2)
        self.attend(
            *(q, key, value, out, self.starts, self.lengths, scale, True, None, -1, self.table, 0.0),
            *(self.metadata, None),
        )


def quantiles(values: list[float]) -> list[float]:
    return [statistics.quantiles(values, n=20)[i] for i in (0, 9, 18)] if len(values) > 1 else values * 3


def measure(model: Model, candidates: dict[str, Callable[..., None]], args: argparse.Namespace) -> list[dict]:
    """Take turns, layer by layer: copy, then one candidate. Returns a row per candidate.

    ``ratio``: each sample against the copy just before it (p5, median, p95). ``quiet``: the 95th percentile
    of the speeds against that of the copies, the number to trust on a machine that others use too.
    """
    size = model.layer_bytes // 2 // 4096 * 4096  # copied bytes are read and written: the same traffic
    source = torch.ones(max(GIB, 2 * size), dtype=torch.uint8)
    target = torch.zeros_like(source)
    places, at = source.numel() // size, 0
    names, layers = list(candidates), len(model.layers)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    ratio: dict[str, list[float]] = {name: [] for name in names}
    copies: list[float] = []
    traffic = {name: getattr(candidates[name], "layer_bytes", model.layer_bytes) for name in names}
    for name in names:  # compiles, starts threads
        model.run(candidates[name], 0)
    for turn in range(args.repeats * layers * len(names)):
        name = names[turn % len(names)]
        at = (at + 1) % places
        start = time.perf_counter()
        target[at * size : (at + 1) * size].copy_(source[at * size : (at + 1) * size])
        copied = time.perf_counter() - start
        source[at * size : (at + 1) * size].view(torch.int64).sum()  # the copy's dirty lines leave the caches
        start = time.perf_counter()
        model.run(candidates[name], (turn // len(names) * 7 + turn) % layers)
        done = time.perf_counter()
        copies.append(2 * size / copied / 1e9)
        seconds[name].append(done - start)
        ratio[name].append(traffic[name] / (done - start) / (2 * size / copied))
    base = quantiles(copies)
    rows = [{"name": "copy", "gb_s": base, "ratio": [1.0] * 3, "quiet": 1.0, "ms_per_layer": None}]
    for name in names:
        speed = [traffic[name] / t / 1e9 for t in seconds[name]]
        ms = statistics.median(seconds[name]) * 1e3
        row = {"name": name, "gb_s": quantiles(speed), "ratio": quantiles(ratio[name]), "ms_per_layer": ms}
        rows.append(row | {"quiet": row["gb_s"][2] / base[2]})
    return rows


def boundary(model: Model, args: argparse.Namespace, ms_per_layer: float) -> dict:
    """Victims for all rows and layers at once, as a share of the attention of the line before it."""
    plan = Plan(model.plan.prefix, model.plan.prefix + DRAWN // args.line * args.line)
    times = []
    for _ in range(max(5, args.repeats)):
        for layer in range(len(model.layers)):
            model.run(cpu.decode, layer)  # scores to choose by, and a cold cache
        start = time.perf_counter()
        for kind in model.together:
            cpu.select_victims(kind, plan)
        times.append((time.perf_counter() - start) * 1e3)
    line = ms_per_layer * len(model.layers) * args.line
    return {
        "ms": statistics.median(times),
        "line_attention_ms": line,
        "share": statistics.median(times) / line,
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--rows", type=int, default=32, help="requests; each has two branches")
    add("--layers", type=int, default=24)
    add("--heads", type=int, default=16, help="KV heads of one branch")
    add("--spatial", type=int, default=0, help="how many of them are spatial")
    add("--group", type=int, default=1, help="query heads per KV head")
    add("--head-size", type=int, default=128)
    add("--slots", type=int, default=116, help="resident image slots")
    add("--prefix", type=int, default=0, help="prompt tokens")
    add("--line", type=int, default=24)
    add("--page", type=int, default=4)
    add("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    add("--threads", type=int, default=torch.get_num_threads())
    add("--repeats", type=int, default=3, help="samples of each candidate: repeats x layers")
    add("--only", default="", help="comma-separated candidates")
    add("--huge-pages", action="store_true", help="back the cache with 2 MiB pages")
    add("--stock", type=int, default=0, metavar="TOKENS", help="also vLLM's kernel on a full cache")
    add("--json", help="write the result to this file")
    return parser.parse_args()


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    candidates: dict[str, Callable[..., None]] = {}
    for isa in cpu.ISAS[::-1] if cpu.isa() else ():

        def native(*inputs, isa: str = isa) -> None:
            cpu.set_isa(isa)
            cpu.decode(*inputs)

        if cpu.set_isa(isa) == isa:
            candidates[f"c++ {isa}"] = native
    try:
        from cpu_attention_numba import numba_decode

        candidates["numba"] = numba_decode(args.threads)
    except ImportError:
        print("numba is not installed: left out")
    candidates["torch"] = torch_ops
    candidates["reference"] = reference.decode
    if args.only:
        candidates = {name: candidates[name] for name in args.only.split(",")}
    model = build(args)
    if args.stock:
        candidates["vllm full"] = Stock(model, args, args.stock)
    rows = measure(model, candidates, args)
    cpu.set_isa(cpu.ISAS[-1])
    first = next(row for row in rows if row["ms_per_layer"])
    result = {"args": vars(args), "layer_bytes": model.layer_bytes, "rows": rows}
    result["boundary"] = boundary(model, args, first["ms_per_layer"])
    print(
        f"{model.layer_bytes * args.layers / GIB:.2f} GiB of K and V in {args.layers} layers; p5, median, p95"
    )
    print(f"{'':14}{'GB/s':>20}{'of the copy':>22}{'quiet':>8}{'ms/layer':>10}")
    for row in rows:
        speed = " ".join(f"{x:6.1f}" for x in row["gb_s"])
        share = " ".join(f"{x:6.2f}" for x in row["ratio"])
        print(f"{row['name']:14}{speed}  {share} {row['quiet']:7.2f} {row['ms_per_layer'] or 0:9.2f}")
    edge = result["boundary"]
    print(f"line boundary, all rows: {edge['ms']:.1f} ms, {edge['share']:.2%} of the line's attention")
    if args.json:
        with open(args.json, "w") as file:
            json.dump(result, file, indent=1)


if __name__ == "__main__":
    main()
