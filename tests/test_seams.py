"""Every seam of vLLM that the plugin uses is where it was; a failing test's name says which one moved.

vLLM promises no stability for them, and a renamed hook is worse than a missing one: it is never called,
and nothing fails. Names are read from the package's own imports; hooks are listed here.
"""

import ast
import importlib
import importlib.metadata
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import vllm_kvcompress
from vllm_kvcompress import plugin
from vllm_kvcompress.serving import listening

SOURCES = sorted(Path(vllm_kvcompress.__file__).parent.rglob("*.py"))


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    plugin.register()


def imported_names() -> Iterator[str]:
    """``module:name`` of everything that the package imports from vLLM, for type checking too."""
    for source in SOURCES:
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
                yield from (f"{node.module}:{alias.name}" for alias in node.names)


@pytest.mark.parametrize("name", sorted(set(imported_names())))
def test_imported_name_is_there(name: str) -> None:
    module, attribute = name.split(":")
    loaded = importlib.import_module(module)
    if not hasattr(loaded, attribute):
        importlib.import_module(f"{module}.{attribute}")


# --- Hooks: methods that vLLM calls on our classes ---

HOOKS = {
    "vllm_kvcompress.cache.manager:BoundedManager": (
        "remove_skipped_blocks get_num_skipped_tokens get_num_blocks_to_allocate allocate_new_blocks "
        "pop_blocks_for_free find_longest_cache_hit cache_blocks add_local_computed_blocks "
        "supports_fine_grained_hash_lookup"
    ),
    "vllm_kvcompress.cache.spec:HeadTypeSpec": (
        "prefix_cacheable block_table_token_alignment uses_slot_mapping max_num_blocks_per_req "
        "max_memory_usage_bytes page_size_padded page_size_bytes dcp_sharded is_uniform_with_collection"
    ),
    "vllm_kvcompress.cache.store:HeadTypeCache": "get_attn_backend get_kv_cache_spec bind_kv_cache",
    "vllm_kvcompress.attention.backend:KVCompressBackend": (
        "get_name get_impl_cls get_builder_cls supported_kv_cache_layouts supported_dtypes"
    ),
    "vllm_kvcompress.attention.backend:StepPlanner": (
        "__init__ build build_for_cudagraph_capture get_cudagraph_support"
    ),
    "vllm_kvcompress.scheduler:ImageScheduler": (
        "_free_request add_request schedule update_from_output make_spec_decoding_stats "
        "_update_request_with_output"
    ),
    "vllm_kvcompress.requests_v2:JanusModelState": (
        "__init__ add_request remove_request prepare_attn prepare_inputs custom_sampler"
    ),
    "vllm_kvcompress.requests_v2:ImageSampler": "__call__ _sample_random",
    "vllm_kvcompress.requests_v1:RequestTracker": (
        "__init__ validate_params is_argmax_invariant update_state apply add_request"
    ),
    "vllm_kvcompress.models.pictures:PictureInfo": (
        "get_supported_mm_limits validate_num_items get_mm_max_tokens_per_item get_hf_processor "
        "get_supported_mm_processor_kwargs"
    ),
    "vllm_kvcompress.models.pictures:DummyPictures": "get_dummy_text get_dummy_mm_data",
    "vllm_kvcompress.models.pictures:PictureProcessor": (
        "_postprocess_prompt _maybe_apply_prompt_updates _call_hf_processor _get_mm_fields_config "
        "_get_prompt_updates"
    ),
    "vllm_kvcompress.models.janus:JanusForImageGeneration": (
        "embed_input_ids requires_raw_input_tokens get_placeholder_str embed_multimodal"
    ),
    "vllm_kvcompress.models.vllm_config:JanusConfigCheck": (
        "verify_and_update_config verify_and_update_model_config"
    ),
}


def resolve(path: str) -> Any:
    module, _, name = path.partition(":")
    loaded = importlib.import_module(module)
    return getattr(loaded, name) if name else loaded


def of_vllm(owner: type, name: str) -> Any:
    """What ``owner`` inherits under this name from vLLM; raises AssertionError if there is nothing."""
    for base in owner.__mro__[1:]:
        if base.__module__.startswith("vllm."):
            if name in vars(base):
                return inspect.getattr_static(base, name)
            if name in getattr(base, "__annotations__", {}):
                return None
    raise AssertionError(f"vLLM has no {name} any more for {owner.__name__} to override")


def function(attribute: Any) -> Callable | None:
    """The function behind a method of any kind."""
    return getattr(attribute, "__func__", attribute if inspect.isfunction(attribute) else None)


def assert_callable_like(ours: Callable, theirs: Callable, where: str) -> None:
    """Whatever call ``theirs`` takes, ours takes too."""
    mine, needed = inspect.signature(ours).parameters, inspect.signature(theirs).parameters
    kinds = {parameter.kind for parameter in mine.values()}
    any_keyword, any_position = (
        inspect.Parameter.VAR_KEYWORD in kinds,
        inspect.Parameter.VAR_POSITIONAL in kinds,
    )
    for name, parameter in needed.items():
        if parameter.kind in (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL):
            continue
        assert name in mine or any_keyword or any_position, (
            f"{where} is called with {name}, which ours does not take"
        )
    named = [name for name, p in mine.items() if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    places = [name for name, p in needed.items() if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    for ours_name, theirs_name in zip(named, places, strict=False):
        assert ours_name == theirs_name, f"{where}: {theirs_name} is where ours has {ours_name}"
    assert len(named) >= len(places) or any_position or any_keyword, where
    for name, parameter in mine.items():
        if parameter.default is inspect.Parameter.empty and parameter.kind in (
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
            inspect.Parameter.KEYWORD_ONLY,
        ):
            assert name in needed, f"{where} is not called with {name}, which ours needs"


@pytest.mark.parametrize(
    ("owner", "name"), [(owner, name) for owner, names in HOOKS.items() for name in names.split()]
)
def test_hook_is_still_called_that_way(owner: str, name: str) -> None:
    ours, theirs = resolve(owner), of_vllm(resolve(owner), name)
    mine, needed = function(inspect.getattr_static(ours, name)), function(theirs)
    # Constructors differ: (*args, **kwargs) is what ours leave open.
    if mine is not None and needed is not None and name != "__init__":
        assert_callable_like(mine, needed, f"{owner.split(':')[1]}.{name}")


@pytest.mark.parametrize("owner", HOOKS)
def test_every_override_is_listed(owner: str) -> None:
    """An override that this module does not know of would go unchecked."""
    ours = resolve(owner)
    inherited = {
        name for base in ours.__mro__[1:] if base.__module__.startswith("vllm.") for name in vars(base)
    }
    machinery = {name for name in vars(ours) if name.startswith("__")} | {"_abc_impl", "_is_protocol"}
    assert set(vars(ours)) & inherited - machinery <= set(HOOKS[owner].split())


# --- Attributes that the hooks read ---

FIELDS = {
    "vllm.v1.attention.backend:CommonAttentionMetadata": (
        "num_reqs seq_lens block_table_tensor max_query_len query_start_loc query_start_loc_cpu "
        "seq_lens_cpu_upper_bound"
    ),
    "vllm.v1.worker.gpu.input_batch:InputBatch": "idx_mapping_np query_start_loc num_tokens_after_padding",
    "vllm.v1.core.sched.output:NewRequestData": "req_id sampling_params prompt_token_ids",
    "vllm.v1.sample.logits_processor.interface:BatchUpdate": "removed added moved",
    "vllm.config:VllmConfig": (
        "additional_config attention_config cache_config compilation_config device_config kv_transfer_config "
        "lora_config model_config parallel_config scheduler_config speculative_config use_v2_model_runner "
        "shutdown_timeout load_config watermark_config diffusion_config"
    ),
    "vllm.config:AttentionConfig": "backend",
    "vllm.config:ModelConfig": (
        "model tokenizer tokenizer_mode logits_processors max_model_len dtype return_sampling_mask "
        "enable_trace_replay"
    ),
    "vllm.config:SchedulerConfig": (
        "max_num_seqs scheduler_cls disable_hybrid_kv_cache_manager max_num_scheduled_tokens "
        "max_num_batched_tokens"
    ),
    "vllm.config:CacheConfig": "enable_prefix_caching cache_dtype",
    "vllm.config:CompilationConfig": "static_forward_context cudagraph_mode splitting_ops _attention_ops",
    "vllm.v1.sample.sampler:Sampler": "forward sample",
    "vllm.v1.sample.metadata:SamplingMetadata": "generators top_k",
    "vllm.v1.attention.backends.fa_utils": "get_flash_attn_version is_flash_attn_varlen_func_available",
    "vllm.config:ParallelConfig": (
        "tensor_parallel_size pipeline_parallel_size decode_context_parallel_size use_ubatching"
    ),
    "vllm.forward_context:ForwardContext": "attn_metadata no_compile_layers",
    "vllm.v1.kv_cache_interface:KVCacheConfig": "kv_cache_groups num_blocks",
    "vllm.v1.kv_cache_interface:KVCacheGroupSpec": "kv_cache_spec layer_names",
    "vllm:SamplingParams": (
        "extra_args max_tokens min_tokens ignore_eos stop stop_token_ids detokenize structured_outputs "
        "prompt_logprobs _eos_token_id _all_stop_token_ids logit_bias allowed_token_ids bad_words "
        "frequency_penalty presence_penalty repetition_penalty logprobs logprob_token_ids "
        "repetition_detection thinking_token_budget trace_decode_token_ids skip_reading_prefix_cache"
    ),
    "vllm.v1.engine.core_client:BackgroundResources": "engine_manager output_queue_task engine_dead",
    "vllm.v1.engine.core_client:DPLBAsyncMPClient": "_call_utility_async core_engines",
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner": "input_batch kv_cache_config vllm_config",
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner": "req_states block_tables kv_cache_config vllm_config",
    "vllm.v1.worker.gpu_input_batch:InputBatch": "req_id_to_index num_tokens_no_spec block_table",
    "vllm.v1.worker.gpu.states:RequestState": "req_id_to_index num_computed_tokens",
    "vllm.v1.worker.gpu.block_table:BlockTables": "block_tables",
    "vllm.v1.worker.block_table:BlockTable": "get_numpy_array",
    "vllm.v1.engine:EngineCoreRequest": (
        "prompt_embeds resumable prompt_token_ids sampling_params mm_features"
    ),
    "vllm.v1.request:Request": "get_skip_reading_prefix_cache",
    "vllm.multimodal.media.connector:MediaConnector": "fetch_image fetch_image_async",
    "vllm.renderers.chat_utils:BaseMultiModalItemTracker": "add",
    "vllm.config.multimodal:MultiModalConfig": "get_limit_per_prompt",
}


@pytest.mark.parametrize(
    ("owner", "name"), [(owner, name) for owner, names in FIELDS.items() for name in names.split()]
)
def test_field_is_there(owner: str, name: str) -> None:
    ours = resolve(owner)
    bases = getattr(ours, "__mro__", ())
    declared = {field for base in bases for field in getattr(base, "__annotations__", {})}
    assert (
        name in declared
        or hasattr(ours, name)
        or name in getattr(ours, "__struct_fields__", ())
        or any(name in set_by(base) for base in bases if base.__module__.startswith("vllm."))
    )


def set_by(owner: type) -> set[str]:
    """Attributes that a class's methods set on ``self``."""
    return {
        node.attr
        for node in ast.walk(ast.parse(inspect.getsource(owner)))
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    }


# --- Registration ---


def test_entry_points() -> None:
    from vllm.plugins import DEFAULT_PLUGINS_GROUP

    assert DEFAULT_PLUGINS_GROUP == "vllm.general_plugins"
    points = importlib.metadata.entry_points(group=DEFAULT_PLUGINS_GROUP, name="kvcompress")
    assert [point.load() for point in points] == [plugin.register]


def test_backend_name_parses_and_crosses_processes() -> None:
    import pickle

    from vllm.config import AttentionConfig
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    backend = AttentionConfig(backend="kvcompress").backend
    assert backend is AttentionBackendEnum.CUSTOM
    # The engine process reads its configuration before it loads plugins.
    assert pickle.loads(pickle.dumps(backend)) is backend
    assert b"KVCOMPRESS" not in pickle.dumps(backend)


def test_block_managers_are_registered() -> None:
    from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
    from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

    from vllm_kvcompress.cache import manager, spec

    assert issubclass(manager.BoundedManager, SingleTypeKVCacheManager)
    one = spec.HeadTypeSpec(
        kind=0, scored=True, block_size=16, num_kv_heads=2, head_size=8, dtype=None, capacity=8,
        image_tokens=64, context=128, page_size_padded=4096,
    )  # fmt: skip
    assert KVCacheSpecRegistry.get_manager_class(one) is manager.BoundedManager
    assert one.page_size_bytes == 4096


def test_model_tables() -> None:
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.transformers_utils.config import _CONFIG_REGISTRY

    from vllm_kvcompress.models.vllm_config import JanusConfigCheck

    for architecture in ("MultiModalityCausalLM", "JanusForConditionalGeneration"):
        assert architecture in ModelRegistry.get_supported_archs()
        assert MODELS_CONFIG_MAP[architecture] is JanusConfigCheck
    for kind in ("multi_modality", "janus", "emu3", "llamagen", "lumina_mgpt"):
        assert _CONFIG_REGISTRY[kind].model_type == kind


def test_a_vocabulary_that_is_widened_stays_so() -> None:
    """`JanusConfigCheck` sets it when vLLM has made it for the last time, where `get_vocab_size` looks."""
    from vllm.config import ModelConfig

    made = inspect.getsource(ModelConfig.__post_init__)
    assert made.rindex("get_model_arch_config()") < made.index("_try_verify_and_update_model_config()")
    assert "self.model_arch_config.vocab_size" in inspect.getsource(ModelConfig.get_vocab_size)


def test_chat_template_registry() -> None:
    from vllm.transformers_utils.chat_templates import registry

    path = registry.get_chat_template_fallback_path("multi_modality", "any-name")
    assert path is not None
    assert path.exists()


def test_worker_methods_are_found_by_name() -> None:
    from vllm.v1.worker.worker_base import WorkerBase

    from vllm_kvcompress import worker

    for method in worker.METHODS:
        assert getattr(WorkerBase, method.__name__) is method


# --- Patched functions ---


def test_admission_wraps_the_one_way_in() -> None:
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.engine.llm_engine import LLMEngine

    signature = inspect.signature(InputProcessor.process_inputs)
    assert InputProcessor.process_inputs._kvcompress
    assert list(signature.parameters)[:4] == ["self", "request_id", "prompt", "params"]
    assert "EngineCoreRequest" in str(signature.return_annotation)
    for front_end in (LLMEngine.add_request, AsyncLLM.add_request):
        assert "input_processor.process_inputs(" in inspect.getsource(front_end)


def test_engine_core_request_is_what_admission_changes() -> None:
    from vllm.v1.engine import EngineCoreRequest

    assert {"sampling_params", "prompt_token_ids"} <= set(EngineCoreRequest.__struct_fields__)


def test_cpu_runner_rewinds_generators_it_finds_in_the_batch() -> None:
    from vllm.v1.worker import cpu_model_runner, gpu_model_runner

    from vllm_kvcompress.patches import seeds

    seeds.apply()
    assert cpu_model_runner.CPUModelRunner.sample_tokens._kvcompress
    assert not hasattr(gpu_model_runner.GPUModelRunner.sample_tokens, "_kvcompress")
    rewind = inspect.getsource(gpu_model_runner.GPUModelRunner._bookkeeping_sync)
    assert "self.discard_request_mask.np[:num_reqs]" in rewind
    assert "self.input_batch.generators.get(int(i))" in rewind


def test_route_loader_is_looked_up_when_the_server_starts() -> None:
    import vllm.plugins as plugins
    from vllm.plugins.endpoint_plugins import interface

    assert plugins.load_endpoint_plugins._kvcompress
    assert list(inspect.signature(plugins.load_endpoint_plugins).parameters) == ["supported_tasks"]
    # Imported at its top, that module would hold the function as it was before the patch.
    assert not hasattr(interface, "load_endpoint_plugins")


def test_launcher_asks_who_has_its_port_for_a_command_line() -> None:
    from vllm.entrypoints.launchers import launcher

    source = inspect.getsource(launcher.serve_http)
    assert "process = find_process_using_port(port)" in source
    assert source.count("process.") == source.count("process.cmdline()") == 1
    assert list(inspect.signature(launcher.find_process_using_port).parameters) == ["port"]


def test_images_endpoint_is_an_endpoint_plugin() -> None:
    from vllm.plugins.endpoint_plugins.interface import EndpointPlugin

    from vllm_kvcompress.serving.images import ImagesEndpoint

    assert isinstance(ImagesEndpoint(), EndpointPlugin)
    for name in ("attach_router", "init_state"):
        assert_callable_like(
            getattr(ImagesEndpoint, name), getattr(EndpointPlugin, name), f"EndpointPlugin.{name}"
        )


def test_an_api_process_that_ends_stops_its_client_off_the_loop() -> None:
    """What `Drain` waits in, and where it refuses."""
    from vllm.entrypoints.launchers import launcher
    from vllm.v1.engine.async_llm import AsyncLLM

    ends = inspect.getsource(launcher.serve_http)
    assert re.search(r"run_in_executor\(\s*None, partial\(engine_client\.shutdown, timeout=timeout\)", ends)
    assert "self.check_admission(" in inspect.getsource(AsyncLLM.add_request)
    assert list(inspect.signature(AsyncLLM.shutdown).parameters) == ["self", "timeout"]


def test_who_waits_for_an_answer_can_be_told() -> None:
    """Where `Drain` puts an error in their queues and calls, and how it comes out as a 503."""
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.core_client import AsyncMPClient
    from vllm.v1.engine.output_processor import OutputProcessor
    from vllm.v1.engine.utils import CoreEngineProcManager

    assert "self.output_handler = asyncio.create_task(" in inspect.getsource(AsyncLLM._run_output_handler)
    assert list(inspect.signature(OutputProcessor.propagate_error).parameters) == ["self", "e"]
    assert "self.utility_results[call_id] = future" in inspect.getsource(AsyncMPClient._call_utility_async)
    generate = inspect.getsource(AsyncLLM.generate)
    assert generate.index("GracefulHTTPError") < generate.index("EngineGenerateError() from")
    assert inspect.signature(CoreEngineProcManager.finished_procs).return_annotation == dict[str, int]


def test_api_processes_share_a_socket_and_their_loads() -> None:
    """What `Listening` reads and writes of vLLM's server."""
    from vllm.entrypoints.launchers import launcher
    from vllm.v1.engine.output_processor import OutputProcessor

    assert callable(OutputProcessor.has_unfinished_requests)
    assert launcher._NOT_ACCEPTING == listening._NOT_ACCEPTING
    for method, text in (
        ("startup", "self._track(self._accept(sock))"),
        ("_accept", "self._track(self._connect(loop, conn))"),
        ("_connect", "self._connecting -= 1"),
        ("_publish_load", "loads, index = self.peer_loads"),
    ):
        assert text in inspect.getsource(getattr(launcher.NoSignalServer, method)), method


# --- Runners, model, benchmark client ---


def test_windows_are_drafts_without_a_speculator() -> None:
    """Patch 4 on the V1 runner; on V2 what room a diffusion model's canvas has."""
    from vllm.config import VllmConfig
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    prepares = inspect.unwrap(GPUModelRunner._prepare_inputs)
    assert list(inspect.signature(prepares).parameters) == [
        "self",
        "scheduler_output",
        "num_scheduled_tokens",
    ]
    assert "return (\n            logits_indices,\n            spec_decode_metadata," in inspect.getsource(
        prepares
    )
    places = inspect.getsource(VllmConfig.num_speculative_tokens.fget)  # whatever the model is
    assert "return self.diffusion_config.canvas_length" in places
    assert "is_diffusion" not in places


def test_a_step_gives_its_tokens_out_row_by_row() -> None:
    """So a long window leaves later rows none; ``ImageScheduler`` asks who runs and who waits."""
    from vllm.v1.core.sched.scheduler import Scheduler

    source = inspect.getsource(Scheduler)
    for text in (
        "while req_index < len(self.running) and token_budget > 0",
        "self.waiting = create_request_queue(",
        "self.max_num_running_reqs = ",
    ):
        assert text in source, text


def test_request_tracker_is_a_logits_processor_of_both_runners() -> None:
    from vllm.v1.sample.logits_processor.interface import LogitsProcessor as V1
    from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor as V2

    from vllm_kvcompress.requests_v1 import RequestTracker

    assert issubclass(RequestTracker, V1)
    assert issubclass(RequestTracker, V2)
    assert not inspect.isabstract(RequestTracker)
    assert list(inspect.signature(V1.__init__).parameters) == [
        "self",
        "vllm_config",
        "device",
        "is_pin_memory",
    ]
    assert next(iter(list(inspect.signature(V2.__init__).parameters)[1:])) == "vllm_config"


def test_v2_runner_asks_the_model_for_its_state() -> None:
    from vllm.v1.worker.gpu import model_states

    from vllm_kvcompress.models.janus import JanusForImageGeneration
    from vllm_kvcompress.requests_v2 import JanusModelState

    assert "get_model_state_cls" in inspect.getsource(model_states)
    assert JanusForImageGeneration.get_model_state_cls() is JanusModelState


def test_v2_sampler_has_its_processors_in_a_list() -> None:
    from vllm.v1.worker.gpu.sample.sampler import Sampler

    from vllm_kvcompress.requests_v2 import _HARMLESS

    source = inspect.getsource(Sampler.__init__)
    assert "self.logits_processors: list[LogitsProcessor] = [" in source
    for kind in ("LogitBiasState", "PenaltiesState", "BadWordsState"):
        assert f"{kind}(vllm_config" in source
        assert kind in {known.__name__ for known in _HARMLESS}


def test_attention_layers_are_asked_for_their_backend() -> None:
    """After they were made, which is when ``hear_token_rows`` gives them another."""
    from vllm.model_executor.layers.attention import Attention
    from vllm.v1.worker import gpu_model_runner

    assert "return self.attn_backend" in inspect.getsource(Attention.get_attn_backend)
    assert "layers[layer_name].get_attn_backend()" in inspect.getsource(gpu_model_runner)


def test_metrics_have_vllms_labels() -> None:
    from vllm.v1.engine.core_client import MPClient
    from vllm.v1.metrics.loggers import PrometheusStatLogger

    from vllm_kvcompress.serving.metrics import LABELS

    source = inspect.getsource(PrometheusStatLogger.__init__)
    assert f'labelnames = ["{LABELS[0]}", "{LABELS[1]}"]' in source
    assert "model_name = vllm_config.model_config.served_model_name" in source
    assert "self.engine_ranks_managed" in inspect.getsource(MPClient.__init__)


def test_llama_takes_another_attention() -> None:
    from vllm.model_executor.models.llama import LlamaAttention, LlamaDecoderLayer, LlamaModel

    from vllm_kvcompress.models.branched_llama import BranchedAttention

    assert "attn_layer_type" in inspect.signature(LlamaDecoderLayer.__init__).parameters
    # Its constructor hides behind the decorator for torch.compile.
    assert "layer_type: type" in inspect.getsource(LlamaModel)
    assert_callable_like(BranchedAttention.__init__, LlamaAttention.__init__, "LlamaAttention")
    assert_callable_like(BranchedAttention.forward, LlamaAttention.forward, "LlamaAttention.forward")


def test_benchmark_client_is_a_table() -> None:
    from vllm.benchmarks.lib import endpoint_request_func as client

    assert isinstance(client.ASYNC_REQUEST_FUNCS, dict)
    assert isinstance(client.OPENAI_COMPATIBLE_BACKENDS, list)
    known = client.ASYNC_REQUEST_FUNCS["openai"]
    from vllm_kvcompress.bench import async_request_openai_images

    assert_callable_like(async_request_openai_images, known, "a benchmark client function")


def test_triton_backends_are_entry_points() -> None:
    """How the tests of the V2 runner bring a backend for the CPU (``tests/triton_cpu``)."""
    import triton.backends

    assert 'group="triton.backends"' in inspect.getsource(triton.backends)
