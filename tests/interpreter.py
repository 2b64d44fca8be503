"""Processes of tests' own, and Triton's interpreter in them: without what they would do again and again."""

import gc
import os
from typing import Any


def settle() -> None:
    """Spare a process that ends with its test vLLM's collections of garbage, and an interpreter's patches.

    vLLM collects garbage a dozen times at every start and end of an engine, each time looking through all
    that was imported and patched: a second a time in an interpreter. What is garbage goes with the process.
    """
    gc.collect = lambda *_: 0
    inspect_here()
    fork_if_asked()
    if os.environ.get("TRITON_INTERPRET") == "1":
        patch_once()


def inspect_here() -> None:
    """Let vLLM look at a model class without a process for it, eight seconds each; no CUDA is at stake."""
    from vllm.model_executor.models import registry

    registry._run_in_subprocess = lambda function: function()


def fork_if_asked() -> None:
    """Let engines and workers of this process be forked, as vLLM does on GPUs, where the environment says so.

    On CPUs vLLM spawns them whatever it says: each would import everything again.
    """
    if os.environ.get("VLLM_WORKER_MULTIPROC_METHOD") == "fork":
        from vllm.utils import system_utils

        system_utils._maybe_force_spawn = lambda: os.environ.update(VLLM_WORKER_MULTIPROC_METHOD="fork")


def patch_once() -> None:
    """Let the patches that Triton's interpreter makes in ``triton.language`` stay.

    ``triton/runtime/interpreter.py`` looks through all of ``triton.language`` for what to replace, at every
    launch and at every call of a device function, and takes it back after a launch: half of what an
    interpreted step costs. A process that compiles no kernel may keep them.
    """
    from triton.runtime import interpreter

    original, kept = interpreter._patch_lang, {}

    def patch(function: Any) -> Any:
        names = function.__globals__
        if id(names) not in kept:
            original(function)  # its scope is dropped: nothing is restored
            kept[id(names)] = names
        return interpreter._LangPatchScope()

    interpreter._patch_lang = patch
