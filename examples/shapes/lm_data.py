"""Sequences for the language model: a prompt, then 576 image codes, all in one id space."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from border import cut_pair, lines_until_known
from common import as_batch
from geometry import GEOMETRY, chat_prompt
from tokenizers import Tokenizer
from torch import Tensor

from patches import nearest, to_patches
from vllm_kvcompress.eval.scenes import FAMILIES, sample_pair
from vllm_kvcompress.testing import tokenizer as janus

UNCONDITIONAL = 0.1
"""Share of the training sequences whose caption is blanked, for classifier-free guidance."""


@dataclass(frozen=True)
class Batch:
    """`ids [B, T]` int64, image codes offset by the text vocabulary, padded on the right (causal
    attention never looks there); `codes [B, 576]`; `image [B, T]` and `text [B, T]` bool: where the
    next id is an image code, and where it is a caption's word; `counts [B, 576]` bool: the codes that are
    trained."""

    ids: Tensor
    codes: Tensor
    image: Tensor
    text: Tensor
    counts: Tensor

    def twice(self, boi: int, pad: int) -> Batch:
        """Every scene as both guidance branches: its rows with captions, then the same without them."""
        blank = self.ids.clone()
        words = (self.ids != boi).cumprod(1).bool()
        words[:, 0] = False  # BOS stays
        blank[words] = pad
        unsaid = torch.zeros_like(self.text)
        ids, text = torch.cat([self.ids, blank]), torch.cat([self.text, unsaid])
        return Batch(ids, self.codes, self.image.repeat(2, 1), text, self.counts)


def unconditional(prompt: list[int], pad: int) -> list[int]:
    """The prompt of the guidance branch: every id but BOS and begin-of-image becomes the pad id."""
    return [prompt[0], *[pad] * (len(prompt) - 2), prompt[-1]]


def make_batch(
    centres: Tensor,
    tokenizer: Tokenizer,
    stream: int,
    first: int,
    number: int,
    families: Mapping[str, float] = FAMILIES,
    unconditional_share: float = UNCONDITIONAL,
    cut_share: float = 0.0,
) -> Batch:
    """Scenes `first .. first + number` of a stream as one padded batch; deterministic.

    A share of them is cut by a border, and not trained up to where the object shows (`border`).
    """
    cut = np.random.default_rng((stream, first, number, 1)).random(number) < cut_share
    pairs = [
        cut_pair((stream, first + row)) if cut[row] else sample_pair((stream, first + row), families)
        for row in range(number)
    ]
    pixels, captions = as_batch(pairs)
    codes = nearest(to_patches(pixels), centres)
    counts = torch.ones_like(codes, dtype=torch.bool)
    for row in cut.nonzero()[0]:
        counts[row, : lines_until_known(pairs[row][0]) * GEOMETRY.lines] = False
    pad = tokenizer.token_to_id(janus.PAD)
    prompts = [tokenizer.encode(chat_prompt(caption)).ids for caption in captions]
    blank = np.random.default_rng((stream, first, number)).random(number) < unconditional_share
    length = max(map(len, prompts)) + GEOMETRY.image_tokens - 1
    ids = torch.full((number, length), pad)
    image = torch.zeros(number, length, dtype=torch.bool)
    text = torch.zeros(number, length, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        end = len(prompt)
        ids[row, :end] = torch.tensor(unconditional(prompt, pad) if blank[row] else prompt)
        ids[row, end : end + GEOMETRY.image_tokens - 1] = codes[row, :-1] + GEOMETRY.text_vocab
        image[row, end - 1 : end - 1 + GEOMETRY.image_tokens] = True
        text[row, : end - 1] = not blank[row]
    return Batch(ids, codes, image, text, counts)
