"""What transformers' own Emu3 draws, and what it would draw if heads forgot as a ``HeadRule`` says.

The first is ``generate`` with its guidance and constraint. The second is float64, a branch and a token at a
time: a branch is its own prompt, its own positions from 0, its own heads (`dense_janus.DenseHead`); nothing
is filled up.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import cache
from pathlib import Path

import torch
from dense_janus import DenseHead, forward
from torch import Tensor
from transformers import Emu3ForConditionalGeneration

from vllm_kvcompress.policy.rule import HeadRule


@cache
def load(path: Path) -> Emu3ForConditionalGeneration:
    """The model in float32."""
    return Emu3ForConditionalGeneration.from_pretrained(path, dtype=torch.float32).eval()


def greedy(
    path: Path, prompt: Sequence[int], negative: Sequence[int] | None, scale: float, lines: int, columns: int
) -> list[int]:
    """Token ids of a picture, ends of lines included, constrained as Emu3's script does by the offset.

    Each branch has its own cache and its own positions from 0; ``scale`` 1 has no unconditional branch.
    """
    model = load(path)
    mapping = model.model.vocabulary_mapping
    width = columns + 1

    def allowed(_: int, ids: Tensor) -> list[int]:
        offset = len(ids) - len(prompt) + 1  # of the token to come, counted from 1
        return [mapping.eol_token_id] if offset % width == 0 else mapping.image_tokens

    guided = {} if scale == 1 else {"negative_prompt_ids": torch.tensor([list(negative or ())])}
    with torch.no_grad():
        ids = model.generate(
            torch.tensor([list(prompt)]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False, max_new_tokens=lines * width, min_new_tokens=lines * width,
            prefix_allowed_tokens_fn=allowed, guidance_scale=scale, eos_token_id=None, **guided,
        )  # fmt: skip
    return ids[0, len(prompt) :].tolist()


def pixels(path: Path, tokens: Sequence[int], lines: int, columns: int) -> Tensor:
    """uint8 ``[height, width, 3]`` of a picture's token ids, by transformers' ``decode_image_tokens``."""
    whole = torch.tensor([[*tokens, 0, 0, 0]])  # it drops end of frame, of picture and of text
    with torch.no_grad():
        image = load(path).model.decode_image_tokens(whole, lines, columns)[0]
    return ((image + 1) / 2 * 255).clamp(0, 255).to(torch.uint8).permute(1, 2, 0)


@cache
def _double(path: Path) -> Emu3ForConditionalGeneration:
    return deepcopy(load(path)).double()


def dense(
    path: Path, prompt: Sequence[int], negative: Sequence[int], rule_of: Callable[[int, int], HeadRule],
    scale: float, columns: int,
) -> tuple[list[int], float]:  # fmt: skip
    """Token ids of a greedy picture, and the least lead of a code over the next.

    ``rule_of(layer, branch * kv_heads + head)`` is a head's rule.
    """
    model = _double(path)
    text, mapping = model.model.text_model, model.model.vocabulary_mapping
    kv_heads, layers = text.config.num_key_value_heads, text.config.num_hidden_layers
    codes = mapping.image_tokens
    branches = [list(prompt), list(negative)]
    heads = [
        [
            [DenseHead(rule_of(layer, branch * kv_heads + h), len(ids)) for h in range(kv_heads)]
            for layer in range(layers)
        ]
        for branch, ids in enumerate(branches)
    ]
    image = rule_of(0, 0).image
    tokens: list[int] = []
    lead = torch.inf
    with torch.no_grad():
        while len(tokens) < image:
            logits = []
            for ids, mine in zip(branches, heads, strict=True):
                for position in range(len(mine[0][0].k), len(ids)):
                    x = text.embed_tokens(torch.tensor([ids[position]]))
                    hidden = forward(text, x, position, mine)
                logits.append(model.lm_head(hidden)[0, codes])
            best, second = (logits[1] + scale * (logits[0] - logits[1])).topk(2).values.tolist()
            if len(tokens) % (columns + 1) == columns:
                tokens.append(mapping.eol_token_id)
            else:
                lead = min(lead, best - second)
                tokens.append(codes[int((logits[1] + scale * (logits[0] - logits[1])).argmax())])
            for ids in branches:
                ids.append(tokens[-1])
    return tokens, lead
