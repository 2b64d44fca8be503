"""What the package does to a vLLM process: all of it or nothing, and nothing to servers of other models.

In processes of their own: a registration can't be taken back.
"""

import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import preloaded
import pytest
import torch
from transformers import AutoConfig

from vllm_kvcompress import served, worker

# Everything that registration sets, as text.
STATE = """
import json, logging, sys
import vllm, vllm.plugins
vllm.plugins.plugins_loaded = True  # nothing is registered but what this script asks for
from vllm import ModelRegistry
from vllm.model_executor.models.config import MODELS_CONFIG_MAP
from vllm.transformers_utils import config as configs
from vllm.transformers_utils.chat_templates import registry as templates
from vllm.transformers_utils.model_arch_config_convertor import MODEL_ARCH_CONFIG_CONVERTORS
from vllm.v1.attention.backends.registry import _ATTN_OVERRIDES, AttentionBackendEnum, register_backend
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.worker.worker_base import WorkerBase
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES
from vllm_kvcompress import plugin, served, worker

TABLE = configs._CONFIG_REGISTRY
lines = []
class Kept(logging.Handler):
    def emit(self, record):
        lines.append(record.getMessage())
logging.getLogger("vllm").addHandler(Kept())

def state():
    return {
        "architectures": [name for name in ModelRegistry.models if ModelRegistry.models[name].module_name.startswith("vllm_kvcompress")],
        "checks": [name for name, check in MODELS_CONFIG_MAP.items() if check.__module__.startswith("vllm_kvcompress")],
        "config": {"multi_modality", "llamagen"} <= TABLE.keys(),
        "convertors": [name for name, made in MODEL_ARCH_CONFIG_CONVERTORS.items() if made.__module__.startswith("vllm_kvcompress")],
        "template": {"multi_modality", "llamagen"} <= templates._MODEL_TYPE_TO_CHAT_TEMPLATE_FALLBACK.keys(),
        "tokenizer": "multi_modality" in TOKENIZER_MAPPING_NAMES,
        "backend": "KVCOMPRESS" in AttentionBackendEnum.__members__,
        "custom": _ATTN_OVERRIDES.get(AttentionBackendEnum.CUSTOM),
        "methods": [m.__name__ for m in worker.METHODS if hasattr(WorkerBase, m.__name__)],
        "admission": hasattr(InputProcessor.process_inputs, "_kvcompress"),
        "route": hasattr(vllm.plugins.load_endpoint_plugins, "_kvcompress"),
    }
"""  # noqa: E501
MODELS = [
    "MultiModalityCausalLM", "JanusForConditionalGeneration", "LlamaGenForImageGeneration",
    "Emu3ForConditionalGeneration", "LuminaMGPTForImageGeneration",
]  # fmt: skip
CHECKS = [*MODELS, "TransformersMultiModalForCausalLM"]
NOTHING: dict[str, Any] = {
    "architectures": [], "checks": [], "config": False, "convertors": [], "template": False,
    "tokenizer": False, "backend": False, "custom": None, "methods": [], "admission": False, "route": False,
}  # fmt: skip
REGISTERED: dict[str, Any] = {
    "architectures": MODELS, "checks": CHECKS, "config": True, "convertors": ["chameleon"], "template": True,
    "tokenizer": True, "backend": True, "custom": None, "admission": True, "route": True,
}  # fmt: skip


def run(script: str, *arguments: object) -> Any:
    """The JSON that a script prints last."""
    done = preloaded.run([sys.executable, "-c", STATE + script, *map(str, arguments)])
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def without_methods(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in state.items() if name != "methods"}


@pytest.mark.parametrize(
    ("remove", "restore", "name"),
    [
        ("del configs._CONFIG_REGISTRY", "configs._CONFIG_REGISTRY = TABLE", "_CONFIG_REGISTRY"),
        (
            "method = InputProcessor.process_inputs; del InputProcessor.process_inputs",
            "InputProcessor.process_inputs = method",
            "process_inputs",
        ),
        # The last thing that is looked up, and one that is no import.
        (
            "loader = vllm.plugins.load_endpoint_plugins; del vllm.plugins.load_endpoint_plugins",
            "vllm.plugins.load_endpoint_plugins = loader",
            "load_endpoint_plugins",
        ),
    ],
    ids=lambda value: None if " " in value else value,
)
def test_a_moved_name_is_one_line_and_no_change(remove: str, restore: str, name: str) -> None:
    """And once the name is there, the next call registers everything."""
    seen = run(f"""
{remove}
plugin.register()
said = list(lines)
{restore}
between = state()
plugin.register()
plugin.register()
print(json.dumps([said, between, state(), lines]))
""")
    said, between, after, lines = seen
    [line] = said
    assert "image models can't be served" in line
    assert name in line
    assert served.REQUIREMENT in line
    assert between == NOTHING
    assert without_methods(after) == REGISTERED
    assert after["methods"] == [method.__name__ for method in worker.METHODS]
    assert lines == said


def test_another_packages_backend_stays_where_no_image_model_is_served(checkpoints: dict[str, Path]) -> None:
    """The placeholder is ours while a model of ours is served with it, and only then."""
    seen = run(
        """
from vllm.engine.arg_utils import EngineArgs
register_backend(AttentionBackendEnum.CUSTOM, "other.package.Backend")
plugin.register()
seen = [AttentionBackendEnum.CUSTOM.get_path()]
for backend in (None, "kvcompress"):
    EngineArgs(model=sys.argv[1], max_model_len=128, attention_backend=backend).create_engine_config()
    seen.append(AttentionBackendEnum.CUSTOM.get_path())
print(json.dumps(seen))
""",
        checkpoints["tiny-hf"],
    )
    assert seen == ["other.package.Backend", "other.package.Backend", served.BACKEND_PATH]


def test_requirement_is_the_packages_own() -> None:
    import tomllib

    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert served.REQUIREMENT in project["dependencies"]


def test_an_untested_vllm_is_named_where_an_image_model_is_served(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import vllm

    assert served.untested() is None
    monkeypatch.setattr(vllm, "__version_tuple__", (0, 34, 0))
    monkeypatch.setattr(vllm, "__version__", "0.34.0")
    said = served.untested()
    assert said is not None
    assert "vLLM 0.34.0" in said
    assert served.REQUIREMENT in said
    monkeypatch.setattr("vllm_kvcompress.config.is_compressed", lambda config: False)
    logger = logging.getLogger("vllm.kvcompress.served")
    monkeypatch.setattr(logger, "propagate", False)  # whatever earlier tests made of vLLM's loggers
    monkeypatch.setattr(logger, "handlers", [caplog.handler])
    served.prepare(None)  # type: ignore[arg-type]
    assert caplog.messages == [said]


@pytest.mark.parametrize("supported", [True, False], ids=["AMX", "none"])
def test_amx_is_asked_for_where_there_is_any(monkeypatch: pytest.MonkeyPatch, supported: bool) -> None:
    """Without the request such a machine's first attention call ends the process; others grant nothing."""
    asked: list[int] = []
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: supported)
    monkeypatch.setattr(torch.cpu, "_init_amx", lambda: asked.append(1))
    served.prepare_cpu()
    assert asked == [1] * supported


def test_any_machine_can_be_prepared() -> None:
    """With torch's own two functions, more than once: a process may build several models."""
    served.prepare_cpu()
    served.prepare_cpu()


@pytest.mark.parametrize(("implementation", "vocabulary"), [("auto", 640 + 256), ("transformers", 640)])
def test_image_ids_are_of_our_models_alone(
    checkpoints: dict[str, Path], implementation: str, vocabulary: int
) -> None:
    """What vLLM's own implementation has no embedding for must not become an id that requests may hold."""
    from vllm.transformers_utils.model_arch_config_convertor import MODEL_ARCH_CONFIG_CONVERTORS as convertors
    from vllm.transformers_utils.model_arch_config_convertor import ModelArchConfigConvertorBase

    from vllm_kvcompress.models.vllm_config import JanusConfigCheck

    config = AutoConfig.from_pretrained(checkpoints["tiny-hf"])
    convertor = convertors.get(config.model_type, ModelArchConfigConvertorBase)
    arch = convertor(config, config.get_text_config()).convert()
    model = SimpleNamespace(hf_config=config, model_impl=implementation, model_arch_config=arch)
    JanusConfigCheck.verify_and_update_model_config(model)  # type: ignore[arg-type]
    assert model.model_arch_config.vocab_size == vocabulary
