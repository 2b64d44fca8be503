"""One of our models is going to be served: what no other model's server needs, or is to see."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.config import VllmConfig

TESTED = ((0, 32), (0, 33))  # minor versions of vLLM; what pyproject.toml asks for
REQUIREMENT = "vllm>=0.32,<0.34"
BACKEND_PATH = "vllm_kvcompress.attention.backend.KVCompressBackend"


def prepare(vllm_config: "VllmConfig") -> None:
    """The engine's configuration is being made."""
    from vllm_kvcompress.config import is_compressed
    from vllm_kvcompress.log import logger_for

    if (message := untested()) is not None:
        logger_for(__name__).warning(message)
    if is_compressed(vllm_config):
        from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

        # The placeholder belongs to whoever is served with it: another package's stays in other servers.
        register_backend(AttentionBackendEnum.CUSTOM, BACKEND_PATH)


def prepare_cpu() -> None:
    """One of our models is being built, in this process, for a CPU.

    vLLM's CPU attention uses AMX tiles, which the kernel grants a process on request only, and not to the
    programs it starts. Without the request the process dies with SIGILL at the first attention call.
    """
    import torch

    if torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()


def untested() -> str | None:
    """What to say of a vLLM whose minor version was not tested; None of one that was."""
    import vllm

    if vllm.__version_tuple__[:2] in TESTED:
        return None
    return f"vllm-kvcompress was not tested with vLLM {vllm.__version__}: if it fails, install {REQUIREMENT}"
