"""The whole decode step of a Janus-Pro language model with random weights: the second half of gpu.py.

A bare model in torch, without vLLM: both branches of a row, rotary attention over the compressed cache or
over a full one through the best attention installed, the image head, guidance, sampling. What vLLM adds to
a step (its own kernels, its scheduler) is in neither side of the comparison.
"""

import torch
import torch.nn.functional as F
from gpu_caches import PREFIX, Caches, Geometry, layouts
from gpu_clock import fits, seconds
from gpu_full_cache import Attend, attends, best
from torch import Tensor

BATCHES = (64, 128)


class Model:
    """Random weights of the language model and its image head, bfloat16; a step as one function."""

    def __init__(self, shape: Geometry, images: int, device: str) -> None:
        def weight(out: int, into: int) -> Tensor:
            return torch.randn(out, into, device=device, dtype=torch.bfloat16).mul_(into**-0.5)

        self.shape, hidden = shape, shape.hidden
        self.inner = inner = shape.heads * shape.head_size
        sizes = ((3 * inner, hidden), (hidden, inner), (2 * shape.mlp, hidden), (hidden, shape.mlp))
        self.layers = [[weight(*size) for size in sizes] for _ in range(shape.layers)]
        self.embed = weight(shape.codes, hidden)
        self.head = [weight(hidden, hidden), weight(shape.codes, hidden)]
        self.codes = torch.zeros(images, dtype=torch.int64, device=device)
        turn = torch.rand(images * 2, 1, shape.head_size // 2, device=device)
        self.cos, self.sin = turn.cos().bfloat16(), turn.sin().bfloat16()

    @property
    def weights(self) -> int:
        """Numbers that a step reads; the embedding only looks up rows."""
        return sum(w.numel() for layer in [*self.layers, self.head] for w in layer)

    def rope(self, x: Tensor) -> Tensor:
        low, high = x.chunk(2, -1)
        return torch.cat((low * self.cos - high * self.sin, high * self.cos + low * self.sin), -1)

    def step(self, attend: Attend) -> None:
        """One token for every image: both branches are neighbouring rows."""
        shape = self.shape
        x = self.embed[self.codes].repeat_interleave(2, 0)
        for n, (qkv, o, gate_up, down) in enumerate(self.layers):
            q, k, v = F.linear(F.rms_norm(x, x.shape[-1:]), qkv).view(len(x), 3, shape.heads, -1).unbind(1)
            x = x + F.linear(attend(n, self.rope(q), self.rope(k), v).reshape(len(x), self.inner), o)
            gate, up = F.linear(F.rms_norm(x, x.shape[-1:]), gate_up).chunk(2, -1)
            x = x + F.linear(F.silu(gate) * up, down)
        x = F.gelu(F.linear(F.rms_norm(x, x.shape[-1:]), self.head[0]))
        with_text, without = F.linear(x, self.head[1]).float().view(-1, 2, shape.codes).unbind(1)
        chance = (without + 5.0 * (with_text - without)).softmax(-1)
        self.codes.copy_((chance / torch.empty_like(chance).exponential_()).argmax(-1))


def compressed(caches: Caches, shape: Geometry, images: int) -> Attend:
    """Attention over the pages, as the plugin calls it: one row per image holds both branches' heads."""
    from vllm_kvcompress.attention import triton_decode, triton_select

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.reshape(images, 2 * shape.heads, -1) for x in (q, k, v))
        out = torch.empty_like(q)
        triton_decode.decode(q, k, v, caches.layers[layer], caches.plan, shape.head_size**-0.5, out)
        if layer == shape.layers - 1:
            triton_select.select_all(caches.together, caches.plan)
        return out

    return attend


def full(shape: Geometry, images: int, tokens: int, device: str, name: str) -> Attend:
    """Attention over all ``tokens`` so far, by one of the implementations in gpu_full_cache.py."""
    return attends(shape.layers, images * 2, shape.heads, tokens, shape.head_size, device)[name]


def matmul_rate() -> float:
    """Floating-point operations per second of a large bfloat16 product."""
    a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16).unbind()
    return 2 * 8192**3 / seconds(lambda: torch.mm(a, b))


def steps(shapes: list[Geometry], device: str, bandwidth: float) -> list[dict]:
    """(b) and (c) in the middle of a picture: a row per model, batch and cache; nothing timed on the CPU."""
    rows = []
    rate = 1.0 if device == "cpu" else matmul_rate()
    for shape in shapes:
        kernel, passed = best(shape.heads, shape.head_size, device)
        for other, reason in passed.items():
            print(f"full cache: {other} passed over, {reason}")
        line = shape.lines // 2
        tokens = PREFIX + line * shape.width + shape.width // 2
        for images in (1,) if device == "cpu" else BATCHES:
            model = Model(shape, images, device)
            budgets = (0.5,) if device == "cpu" else (1 / 6, 0.2)
            held = [(budget, *entry) for budget in budgets for entry in layouts(shape, budget).items()]
            for budget, kept, layout in [*held, (1.0, "full", None)]:
                name = f"full, {kernel}" if layout is None else f"{kept}, budget {budget:.3g}"
                row = {"model": shape.name, "images": images, "cache": name}
                rows.append(row)
                if device != "cpu" and not fits(shape, images, budget):
                    row["note"] = "does not fit"
                    continue
                if layout is None:
                    attend = full(shape, images, tokens, device, kernel)
                    moved = shape.layers * images * 4 * shape.heads * tokens * shape.head_size * 2
                else:
                    caches = Caches(shape, images, layout, torch.bfloat16, device, line)
                    attend = compressed(caches, shape, images)
                    moved = caches.kv_bytes + caches.score_bytes
                if device == "cpu":
                    model.step(attend)
                    continue
                flop = 2 * 2 * images * model.weights + moved  # two for each number of two bytes in the cache
                floor = max((2 * model.weights + moved) / bandwidth, flop / rate)
                taken = seconds(lambda model=model, attend=attend: model.step(attend))
                row |= {"ms": taken * 1e3, "floor_ms": floor * 1e3, "ratio": taken / floor}
                row["tokens_per_s"] = images / taken
                attend = caches = None  # free this cache before the next
    return rows
