"""What transformers' own Emu3 draws: ``generate`` with its guidance and constraint, whole pictures."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from transformers import Emu3ForConditionalGeneration


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
