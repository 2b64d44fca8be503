"""Emu3 drawing pictures: a plain Llama with grouped queries, both branches of guidance in every row.

Source of the architecture: transformers models/emu3; baaivision/Emu3, emu3/mllm/modeling_emu3.py.
"""

from vllm_kvcompress.models.branched import decoder_named
from vllm_kvcompress.models.one_table import OneTableImageModel


class Emu3ForImageGeneration(OneTableImageModel):
    """Nothing of its own: what differs from other families is in its prompts and its picture decoder."""

    hf_to_vllm_mapper = decoder_named("text_model.model.", "model.text_model.")
