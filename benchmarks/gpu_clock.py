"""What a card takes, moves and holds, for the GPU benchmarks."""

import statistics
from collections.abc import Callable

import torch
from gpu_caches import PREFIX, Geometry


def seconds(run: Callable[[], None], repeats: int = 20) -> float:
    """Median time of ``run`` in a CUDA graph."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run()
        run()  # compiled, and the allocator is warm
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def copy_bandwidth() -> float:
    """Bytes per second that a plain copy reads and writes, 2 GiB each way."""
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds(lambda: target.copy_(source))


def fits(shape: Geometry, images: int, budget: float) -> bool:
    """Whether the caches of all layers, and some room, fit the card."""
    slots = images * (PREFIX + budget * shape.image + 4) * 2 * shape.heads * shape.layers
    free, _ = torch.cuda.mem_get_info()
    return slots * (4 * shape.head_size + 8) * 1.1 + 2**31 < free
