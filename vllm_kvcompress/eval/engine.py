"""Engines of the harness, one at a time, each in a process of its own that gives its memory back."""

import multiprocessing as mp
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from vllm_kvcompress.models.config import ImageModel

PROMPT_ROOM = 256
"""Prompt tokens that a picture's memory is reckoned with."""


@dataclass(frozen=True)
class Room:
    """Memory of an engine, vLLM's options: to run beside a server, less than vLLM's own share of a GPU.

    Parameters
    ----------
    gpu_memory_utilization : float, optional
        Share of the device's memory.
    kv_cache_memory_bytes : int, optional
        Of the cache alone, instead. On CPUs, if neither is given: what the pictures take.
    """

    gpu_memory_utilization: float | None = None
    kv_cache_memory_bytes: int | None = None

    def settings(self) -> dict[str, Any]:
        """Those that are given, as ``LLM`` takes them."""
        given = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {name: value for name, value in given.items() if value is not None}


def in_process(task: Callable, *args: Any) -> Any:
    """Call ``task(*args)`` in a fresh process; vLLM is imported once for all of them."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["vllm.entrypoints.llm"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(task, *args).result()


def described(model: str, size: str | None = None) -> "tuple[PreTrainedConfig, ImageModel]":
    """A checkpoint's configuration, and what its family makes of it, before an engine starts.

    ``size``: as in ``additional_config.kvcompress``. Raises ValueError, one line, for a model that is none of
    ours or has no such size.
    """
    from vllm.tokenizers import get_tokenizer
    from vllm.transformers_utils.config import get_config

    from vllm_kvcompress.config import KEY, parse_config
    from vllm_kvcompress.models.config import ModelSettings
    from vllm_kvcompress.models.registry import family_of
    from vllm_kvcompress.plugin import register

    register()
    settings = parse_config({KEY: {"size": size}})
    config = get_config(model, trust_remote_code=False)
    try:
        family = family_of(config)
    except RuntimeError as error:
        raise ValueError(str(error)) from None
    family.resolve(config, get_tokenizer(model), ModelSettings(settings.pixels))
    return config, family.describe(config, {})


def asking(llm: Any, texts: Iterable[str]) -> list[list[int]]:
    """The ids of prompts as the images route makes them, the model's own texts included."""
    from vllm_kvcompress.models.registry import family_of, image_model

    image, family = image_model(llm.model_config), family_of(llm.model_config.hf_config)
    tokenizer = llm.get_tokenizer()
    ids = (family.prompt_ids(tokenizer, image, text + image.suffix) for text in texts)
    return [image.aligned(one, len(image.negative)) for one in ids]


def start(
    model: str,
    section: dict[str, Any],
    pictures: int,
    dtype: str = "auto",
    room: Room | None = None,
    size: str | None = None,
) -> Any:
    """An ``LLM`` on the kvcompress backend, in this process, that draws ``pictures`` pictures at once."""
    # In this process, so that its errors are exceptions rather than another process's traceback.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    import torch
    from vllm import LLM

    from vllm_kvcompress.config import BACKEND, KEY
    from vllm_kvcompress.room import sharing

    length, token = sizes(model, size)
    settings: dict[str, Any] = {"model": model, "dtype": dtype, "max_num_seqs": pictures}
    settings |= {"max_model_len": length, "limit_mm_per_prompt": {"image": 0}}
    if not torch.cuda.is_available():
        settings["enforce_eager"] = True
        if not (room or Room()).settings():
            # A CPU would otherwise give vLLM most of the machine's memory.
            settings["kv_cache_memory_bytes"] = (pictures + 1) * length * token
    settings |= sharing((room or Room()).settings())
    return LLM(attention_backend=BACKEND, additional_config={KEY: {**section, "size": size}}, **settings)


def sizes(model: str, size: str | None = None, prompt: int = PROMPT_ROOM) -> tuple[int, int]:
    """Tokens of a request with a prompt of so many, and the full cache's bytes a token in float32.

    Those are enough for any dtype. Raises as `described`.
    """
    from vllm_kvcompress.attention.pages import BRANCHES
    from vllm_kvcompress.models.config import cached_head_size

    config, image = described(model, size)
    text = config.get_text_config()
    length = min(prompt + len(image.negative) + image.raster.tokens, text.max_position_embeddings)
    return length, text.num_hidden_layers * BRANCHES * text.num_key_value_heads * 2 * cached_head_size(
        text
    ) * 4
