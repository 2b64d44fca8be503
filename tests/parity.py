"""What transformers' own Janus draws: the reference of the parity tests, nothing of it written here."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import JanusForConditionalGeneration


def load_reference(path: str | Path) -> JanusForConditionalGeneration:
    """The model in float32 from a checkpoint of the transformers layout.

    The original layout can't be read by transformers; its twin of the same seed holds the same weights.
    """
    return JanusForConditionalGeneration.from_pretrained(path, dtype=torch.float32).eval()


def transformers_greedy(
    path: str | Path, prompts: Sequence[Sequence[int]], guidance: float = 5.0, batched: bool = False
) -> list[list[int]]:
    """Codes that ``generate(generation_mode="image")`` draws greedily, in float32.

    Parameters
    ----------
    path
        A checkpoint of the transformers layout.
    prompts : list of list of int
        Prompt ids, begin-of-sentence to begin-of-image.
    guidance : float
        More than 1: at 1 and below, transformers 5.19 drops the guidance processor but keeps both
        branches' rows, and fails.
    batched : bool
        All prompts in one left-padded batch instead of one by one.

    Returns
    -------
    list of list of int
        Codebook indices, a whole picture each.
    """
    if guidance <= 1:
        raise ValueError(f"transformers draws with guidance above 1 only, got {guidance}")
    model = load_reference(path)
    batches = [list(prompts)] if batched else [[prompt] for prompt in prompts]
    return [codes for batch in batches for codes in _generate(model, batch, guidance).tolist()]


def _generate(model: JanusForConditionalGeneration, batch: list[Sequence[int]], guidance: float) -> Tensor:
    longest = max(map(len, batch))
    pad = model.generation_config.pad_token_id
    ids = torch.tensor([[pad] * (longest - len(prompt)) + list(prompt) for prompt in batch])
    # Without a mask generate() raises AttributeError; it can't be told from the ids, since pads within
    # a prompt are attended.
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in batch])
    return model.generate(
        ids,
        attention_mask=mask,
        generation_mode="image",
        do_sample=False,  # then the default top_k of 50 has no part in it
        guidance_scale=guidance,
        # The size of its static cache; None, the default, is compared with a number and fails.
        max_length=longest + model.model.vision_model.config.num_image_tokens,
    )


def two_branches_greedy(
    path: str | Path, conditional: Sequence[int], unconditional: Sequence[int], guidance: float = 5.0
) -> list[int]:
    """Codes of a picture whose two prompts are both given; as long as each other. No cache: whole sequences.

    ``generate`` makes the unconditional prompt by itself, so the loop is written out here, of transformers'
    modules.
    """
    model = load_reference(path)
    inner, codes = model.model, list[int]()
    with torch.no_grad():
        prompts = inner.get_input_embeddings()(torch.tensor([list(conditional), list(unconditional)]))
        while len(codes) < inner.vision_model.config.num_image_tokens:
            drawn = [model.prepare_embeddings_for_image_generation(torch.tensor([[c], [c]])) for c in codes]
            hidden = inner.language_model(inputs_embeds=torch.cat([prompts, *drawn], 1)).last_hidden_state
            with_text, without = inner.generation_head(hidden[:, -1])
            codes.append(int((without + guidance * (with_text - without)).argmax()))
    return codes


def transformers_logits(
    path: str | Path, prompt: Sequence[int], answer: Sequence[int], pixels: Tensor | None
) -> Tensor:
    """Text logits ``[tokens, vocabulary]`` of a prompt with pictures, and an answer to it, in float32.

    ``pixels`` go to the prompt's placeholders; random weights also answer with such ids.
    """
    model = load_reference(path)
    embed = model.get_input_embeddings()
    with torch.no_grad():
        asked = torch.tensor([list(prompt)])
        embeds = embed(asked)
        if pixels is not None:
            seen = model.model.get_image_features(pixels, return_dict=True).pooler_output
            places = model.model.get_placeholder_mask(asked, embeds, seen)
            embeds = embeds.masked_scatter(places, seen)
        embeds = torch.cat([embeds, embed(torch.tensor([list(answer)], dtype=torch.int64))], 1)
        mask = torch.ones(embeds.shape[:2], dtype=torch.int64)
        return model(inputs_embeds=embeds, attention_mask=mask).logits[0]


def transformers_pixels(path: str | Path, codes: Tensor) -> Tensor:
    """uint8 ``[B, H, W, 3]`` of whole pictures' codes ``[B, tokens]``, decoded in float32."""
    return pixels(load_reference(path), codes)


def pixels(model: JanusForConditionalGeneration, codes: Tensor) -> Tensor:
    """``transformers_pixels`` of a model already loaded.

    transformers' ``postprocess`` is broken in 5.19, so the formula is deepseek-ai/Janus'
    (generation_inference.py:95-100), in numpy as there.
    """
    with torch.no_grad():
        decoded = model.decode_image_tokens(codes).numpy()
    return torch.from_numpy(((decoded + 1) / 2 * 255).clip(0, 255).astype("uint8"))
