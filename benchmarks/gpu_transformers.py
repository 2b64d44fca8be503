"""transformers' own Janus drawing the same batch, for part (d) of gpu.py; random weights.

``generate(generation_mode="image")`` has a static cache of the whole picture from the start, so a step costs
the same at any time: two stretches are timed and the difference is divided.
"""

import time
from dataclasses import replace

import torch
from gpu_caches import PREFIX, Geometry

BOS, PAD, BOI = 1, 2, 3


def tokens_per_second(shape: Geometry, images: int, device: str, stretches: tuple[int, int]) -> dict:
    """Image tokens a second of ``images`` pictures drawn at once, both branches, bfloat16.

    ``stretches``: tokens of the shorter and of the longer run. On the CPU nothing is timed.
    """
    import transformers
    from transformers import JanusForConditionalGeneration

    from vllm_kvcompress.testing.configs import transformers_config
    from vllm_kvcompress.testing.geometry import TINY, janus_pro_1b

    sizes = janus_pro_1b() if shape.head_size == 128 else replace(TINY, lines=shape.lines)
    sizes = replace(
        sizes, hidden=shape.hidden, layers=shape.layers, heads=shape.heads, kv_heads=shape.heads,
        intermediate=shape.mlp, codebook=shape.codes,
    )  # fmt: skip
    config = transformers_config(sizes, "bfloat16", image_token_id=4)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = JanusForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(before)
    settings = model.generation_config
    settings.bos_token_id, settings.pad_token_id, settings.eos_token_id = BOS, PAD, PAD
    settings.generation_kwargs = {"boi_token_id": BOI}
    ids = torch.full((images, PREFIX), 7, device=device)
    ids[:, 0], ids[:, -1] = BOS, BOI

    def draw(count: int) -> float:
        model.model.vision_model.config.num_image_tokens = count
        start = time.perf_counter()
        drawn = model.generate(
            ids, attention_mask=torch.ones_like(ids), generation_mode="image", do_sample=True,
            guidance_scale=5.0, max_length=PREFIX + shape.image,
        )  # fmt: skip
        assert drawn.shape == (images, count)
        if device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    row: dict = {"model": shape.name, "images": images, "transformers": transformers.__version__}
    with torch.inference_mode():
        draw(stretches[0])  # warm
        if device == "cpu":
            return row
        short, long = draw(stretches[0]), draw(stretches[1])
    taken = (long - short) / (stretches[1] - stretches[0])
    return row | {"ms": taken * 1e3, "tokens_per_s": images / taken}
