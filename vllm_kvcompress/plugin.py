"""Registration only: what vLLM calls in every process, more than once, whatever it serves.

Everything here is a table entry or a thin wrapper that does nothing for models that are not ours. All of
it is looked up before any of it is set: vLLM calls this function unguarded, so where a name has moved in
another version the plugin says so in one line and leaves vLLM as it is. The model itself is imported when
such a model is served.
"""

import operator
from collections.abc import Callable
from functools import partial

from vllm_kvcompress import last_word
from vllm_kvcompress.served import REQUIREMENT

Change = Callable[[], object]

_registered = False


def register() -> None:
    """Entry point of group ``vllm.general_plugins``. Raises nothing: a line in the log says what is wrong."""
    global _registered
    if _registered:
        return
    try:
        for change in _changes():
            change()
        if last_word.is_heard():
            last_word.hear_logs()
    except Exception as error:
        import logging

        # Not through vllm_kvcompress.log: vLLM's logging may be what has moved.
        logging.getLogger("vllm.kvcompress.plugin").warning("vllm-kvcompress %s", _says(error))
        return
    _registered = True


def problem() -> str | None:
    """Why registration would fail in this vLLM, in one line; None if it fits. Changes nothing."""
    try:
        _changes()
    except Exception as error:
        return _says(error)
    return None


def _says(error: Exception) -> str:
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return (
        "does not fit this vLLM and stays out of it, image models can't be served: "
        f"{reason}. Install {REQUIREMENT}."
    )


def _changes() -> list[Change]:
    """What registration sets, everything looked up and nothing set yet.

    Raises ImportError or AttributeError where vLLM or transformers have moved a name.
    """
    from vllm_kvcompress import bench, patches
    from vllm_kvcompress.models.tokenizer import tokenizer_fix

    return [
        *_models(),
        tokenizer_fix(),
        *_backend_name(),
        *_worker_methods(),
        *patches.changes(),
        *bench.changes_if_benchmarking(),
    ]


def _models() -> list[Change]:
    from transformers import Emu3Config, JanusConfig
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.transformers_utils.chat_templates.registry import register_chat_template_fallback_path
    from vllm.transformers_utils.config import _CONFIG_REGISTRY
    from vllm.transformers_utils.model_arch_config_convertor import MODEL_ARCH_CONFIG_CONVERTORS

    from vllm_kvcompress.models.janus_config import MultiModalityConfig
    from vllm_kvcompress.models.llamagen.config import LlamaGenConfig
    from vllm_kvcompress.models.lumina import unconverted
    from vllm_kvcompress.models.lumina.config import LuminaConfig
    from vllm_kvcompress.models.registry import ARCHITECTURES, CHAT_TEMPLATES
    from vllm_kvcompress.models.sections import heard_class
    from vllm_kvcompress.models.vllm_config import JanusConfigCheck, TransformersCheck

    set_item = operator.setitem
    kinds = (
        MultiModalityConfig,
        LlamaGenConfig,
        LuminaConfig,
        heard_class(JanusConfig),
        heard_class(Emu3Config),
    )
    # vLLM warns of a name that is taken, in servers of other models too.
    taken = [name for name in ARCHITECTURES if name in ModelRegistry.models]
    return [
        # The calls come first: they could fail, entries of a table can't.
        *(partial(register_chat_template_fallback_path, kind, path) for kind, path in CHAT_TEMPLATES.items()),
        *(partial(ModelRegistry.models.pop, name) for name in taken),
        *(partial(ModelRegistry.register_model, name, path) for name, path in ARCHITECTURES.items()),
        *(partial(set_item, MODELS_CONFIG_MAP, name, JanusConfigCheck) for name in ARCHITECTURES),
        # What vLLM calls a model of ours under --model-impl transformers.
        partial(MODELS_CONFIG_MAP.setdefault, "TransformersMultiModalForCausalLM", TransformersCheck),
        *(partial(set_item, _CONFIG_REGISTRY, kind.model_type, kind) for kind in kinds),
        partial(
            MODEL_ARCH_CONFIG_CONVERTORS.setdefault,
            unconverted.MODEL_TYPE,
            unconverted.ChameleonArchConvertor,
        ),
    ]


def _backend_name() -> list[Change]:
    """``--attention-backend kvcompress``.

    A member of its own would not unpickle in the engine process, which reads its configuration before
    it loads plugins; a second name for vLLM's placeholder does.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    names = AttentionBackendEnum._member_map_
    return [partial(names.setdefault, "KVCOMPRESS", AttentionBackendEnum.CUSTOM)]


def _worker_methods() -> list[Change]:
    from vllm.v1.worker.worker_base import WorkerBase

    from vllm_kvcompress import worker

    return [partial(setattr, WorkerBase, method.__name__, method) for method in worker.METHODS]
