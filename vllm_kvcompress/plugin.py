"""Registration only: what vLLM calls in every process, more than once.

Everything here is a table entry or a thin wrapper that does nothing for models that are not ours;
modules with weight (torch, transformers, the model) are imported when such a model is served.
"""

_registered = False


def register() -> None:
    """Entry point of group ``vllm.general_plugins``."""
    global _registered
    if _registered:
        return
    _registered = True

    from vllm_kvcompress import bench, patches
    from vllm_kvcompress.models.tokenizer import register_tokenizer_fix

    _register_models()
    register_tokenizer_fix()
    _register_backend()
    _register_worker_methods()
    _prepare_cpu()
    patches.apply()
    bench.register_if_benchmarking()


def _register_models() -> None:
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.transformers_utils.chat_templates.registry import register_chat_template_fallback_path
    from vllm.transformers_utils.config import _CONFIG_REGISTRY
    from vllm.transformers_utils.model_arch_config_convertor import MODEL_ARCH_CONFIG_CONVERTORS

    from vllm_kvcompress.models.config import ORIGINAL_LAYOUT, TRANSFORMERS_LAYOUT, MultiModalityConfig
    from vllm_kvcompress.models.registry import ARCHITECTURES, CHAT_TEMPLATE
    from vllm_kvcompress.models.vllm_config import JanusArchConvertor, JanusConfigCheck

    for architecture, model_class in ARCHITECTURES.items():
        ModelRegistry.register_model(architecture, model_class)
        MODELS_CONFIG_MAP[architecture] = JanusConfigCheck
    _CONFIG_REGISTRY[ORIGINAL_LAYOUT] = MultiModalityConfig
    for model_type in (ORIGINAL_LAYOUT, TRANSFORMERS_LAYOUT):
        MODEL_ARCH_CONFIG_CONVERTORS[model_type] = JanusArchConvertor
    register_chat_template_fallback_path(ORIGINAL_LAYOUT, CHAT_TEMPLATE)


def _register_backend() -> None:
    """``--attention-backend kvcompress``, and the managers of its cache groups.

    A member of its own would not unpickle in the engine process, which reads its configuration before
    it loads plugins; a second name for vLLM's placeholder does.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    names = AttentionBackendEnum._member_map_
    names.setdefault("KVCOMPRESS", AttentionBackendEnum.CUSTOM)
    register_backend(AttentionBackendEnum.CUSTOM, "vllm_kvcompress.attention.backend.KVCompressBackend")


def _register_worker_methods() -> None:
    from vllm.v1.worker.worker_base import WorkerBase

    from vllm_kvcompress import worker

    for method in worker.METHODS:
        setattr(WorkerBase, method.__name__, method)


def _prepare_cpu() -> None:
    """vLLM's CPU attention uses AMX tiles, which the kernel grants a process on request only.

    Without the request the process dies with SIGILL at the first attention call.
    """
    import torch

    if torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()
