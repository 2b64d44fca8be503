"""Draw pictures with a transformers model, in batches, with a KV cache and guidance.

`JanusForConditionalGeneration.generate` gives the same distribution; this loop batches prompts of equal
length and samples from the whole codebook.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from geometry import GEOMETRY, chat_prompt
from lm_data import unconditional
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor
from transformers import JanusForConditionalGeneration

from vllm_kvcompress.testing import tokenizer as janus

GUIDANCE = 3.0
"""The exported files recommend it too; a compressed cache loses less than at Janus-Pro's 5 (decision 144)."""


@torch.inference_mode()
def draw_codes(
    model: JanusForConditionalGeneration,
    tokenizer: Tokenizer,
    captions: Sequence[str],
    *,
    guidance: float = GUIDANCE,
    temperature: float = 1.0,
    seed: int = 0,
    batch: int = 32,
) -> Tensor:
    """Image codes `[len(captions), 576]` int64; deterministic for a seed, batch size and machine."""
    pad = tokenizer.token_to_id(janus.PAD)
    prompts = [tokenizer.encode(chat_prompt(caption)).ids for caption in captions]
    by_length: dict[int, list[int]] = defaultdict(list)
    for index, prompt in enumerate(prompts):
        by_length[len(prompt)].append(index)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.zeros(len(captions), GEOMETRY.image_tokens, dtype=torch.long)
    for same in by_length.values():
        for first in range(0, len(same), batch):
            chosen = same[first : first + batch]
            rows = [prompts[i] for i in chosen]
            ids = torch.tensor(rows + [unconditional(row, pad) for row in rows])
            drawn[chosen] = _draw_batch(model, ids, guidance, temperature, generator)
    return drawn


def _draw_batch(
    model: JanusForConditionalGeneration,
    ids: Tensor,
    guidance: float,
    temperature: float,
    generator: torch.Generator,
) -> Tensor:
    """Prompt ids `[2N, n]`, conditional rows first -> codes `[N, 576]`."""
    inner = model.model
    table = inner.generation_aligner(inner.generation_embeddings.weight)
    embeds = inner.language_model.embed_tokens(ids)
    cache = None
    codes: list[Tensor] = []
    for _ in range(GEOMETRY.image_tokens):
        out = inner.language_model(inputs_embeds=embeds, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        given, free = inner.generation_head(out.last_hidden_state[:, -1]).float().chunk(2)
        logits = free + guidance * (given - free)
        code = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
        codes.append(code)
        embeds = table[code.repeat(2, 1)]
    return torch.cat(codes, 1)


@torch.inference_mode()
def to_pictures(model: JanusForConditionalGeneration, codes: Tensor) -> NDArray[np.uint8]:
    """Codes `[N, 576]` -> pictures `[N, 96, 96, 3]` uint8 RGB, by Janus's own formula (truncation)."""
    pixels = model.model.vqmodel.decode(codes).float()
    return ((pixels + 1) / 2 * 255).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()


def contact_sheet(pictures: NDArray[np.uint8], columns: int, gap: int = 4) -> NDArray[np.uint8]:
    """Pictures `[N, H, W, 3]` on a white sheet, row by row."""
    number, height, width, _ = pictures.shape
    lines = -(-number // columns)
    sheet = np.full((lines * (height + gap) + gap, columns * (width + gap) + gap, 3), 255, np.uint8)
    for index, picture in enumerate(pictures):
        y, x = (
            gap + (size + gap) * i for i, size in zip(divmod(index, columns), (height, width), strict=True)
        )
        sheet[y : y + height, x : x + width] = picture
    return sheet
