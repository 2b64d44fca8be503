"""How much of a compressed cache one text request can have, and what could never have it."""

from typing import TYPE_CHECKING

from vllm_kvcompress.config import is_compressed
from vllm_kvcompress.refusal import BadParameter

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def text_room(vllm_config: "VllmConfig") -> int | None:
    """``room`` of `admission.admit` for the engine behind a front end; None where vLLM's own cache serves.

    The scheduler has worked it out (`scheduler.ImageScheduler`), and vLLM has told its front ends.
    """
    if not is_compressed(vllm_config):
        return None
    return vllm_config.cache_config.kv_cache_size_tokens or vllm_config.model_config.max_model_len


def check_room(length: int, max_tokens: int, room: int) -> None:
    """Raise BadParameter where ``room`` could never hold a prompt of ``length`` tokens and its answer.

    ``max_tokens``: what the answer may have, no more than the context leaves.
    """
    if length + max_tokens <= room:
        return
    more = "or give the cache more memory (--kv-cache-memory-bytes, --gpu-memory-utilization)"
    if length >= room:
        raise BadParameter(
            "prompt",
            f"the prompt has {length} tokens, and the cache holds {room} of a text request, the answer "
            f"included: shorten it, {more}",
        )
    raise BadParameter(
        "max_tokens",
        f"max_tokens is {max_tokens} (left out, it is what the context leaves), but the cache holds {room} "
        f"tokens of a text request, {length} of them the prompt's: set max_tokens to {room - length} or "
        f"less, {more}",
    )
