"""Settings and combinations that can't work: one line at start-up that names the field and the mend."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from inprocess import Engine, in_process  # noqa: F401

from vllm_kvcompress.attention import kernels
from vllm_kvcompress.config import CompressionConfig, parse_config, unread
from vllm_kvcompress.heads.curves import LossCurves, candidate_types
from vllm_kvcompress.models import vllm_config as vllm_config_module
from vllm_kvcompress.models.compression import plan_cache
from vllm_kvcompress.models.vllm_config import WITHOUT_BACKEND, TransformersCheck, check_conflicts
from vllm_kvcompress.policy import PRESETS
from vllm_kvcompress.policy.raster import Raster
from vllm_kvcompress.windows import settings
from vllm_kvcompress.windows.settings import describe, window_config


def parsed(**section: Any) -> CompressionConfig:
    return parse_config({"kvcompress": section})


def test_every_setting_has_a_default() -> None:
    others = [{name: {"x": 1}} for name in ("another_plugin", "compression", "compress", "kvpress")]
    for nothing in ({}, None, {"kvcompress": {}}, *others):
        config = parse_config(nothing)
        assert (config.preset, config.budget, config.head_profile) == ("fitted", 0.2, "auto")
    assert parsed(preset="line_ar", budget=0.1667, anchor_tokens=24).policy.anchor_tokens == 24
    assert all(parsed(preset=preset).policy.preset == preset for preset in PRESETS)
    assert parsed(budget="auto", tolerance=0.01, max_types=3).policy.budget == "auto"
    # A comparison of presets gives all of them one profile.
    assert all(parsed(preset=preset, head_profile="p.json").preset == preset for preset in PRESETS)
    assert parsed(preset="line_ar", recalibrate=True, threshold=0.5).preset == "line_ar"


@pytest.mark.parametrize(
    ("section", "match"),
    [
        ({"bugdet": 0.2}, r"^additional_config.kvcompress has no setting 'bugdet'; did you mean budget\?$"),
        (
            {"zzz": 1},
            r"no setting 'zzz'; known: preset, .*limits, strict, playground, size, sizes, default_texts$",
        ),
        (
            {"limits": {"prompt_token": 9}},
            r"kvcompress.limits has no setting .*; did you mean prompt_tokens\?$",
        ),
        (
            {"prompt_tokens": 9},
            r'kvcompress has no setting .*; write {"kvcompress": {"limits": {"prompt_tokens": \.\.\.}}}$',
        ),
        ({"limits": {"pictures": 0}}, r"kvcompress.limits.pictures: .*greater than or equal to 1, got 0$"),
        ({"limits": {"body_bytes": "1M"}}, r"kvcompress.limits.body_bytes: .*integer, got '1M'$"),
        ({"limits": {"request_id": 10**9}}, r"kvcompress.limits.request_id: .*less than or equal to 4096"),
        ({"limits": 5}, r"kvcompress.limits: .*valid dictionary.*got 5$"),
        ({"budget": "a fifth"}, r"^additional_config.kvcompress.budget: .*valid number.* got 'a fifth'$"),
        (
            {"budget": "auto", "preset": "ssd"},
            r"^budget: 'auto' is not a share .*, or auto under the preset fitted$",
        ),
        (
            {"spatial_tokens": 48},
            r"^spatial_tokens: preset fitted chooses .*; leave it out, or set preset to",
        ),
        ({"score": "averaged"}, r"^score: preset fitted chooses every head's rule by measured losses"),
        ({"head_types": "semantic"}, r"^head_types: preset fitted chooses"),
        (
            {"head_types": "fitted", "preset": "ssd"},
            r"^head_types: unknown 'fitted'; one of profile, semantic",
        ),
        ({"threshold": 0.5}, r"kvcompress.threshold: preset fitted has no locality threshold"),
        (
            {"recalibrate": True, "head_profile": "p.json"},
            r"kvcompress.recalibrate: the file that head_profile names .*; leave one of the two out$",
        ),
        ({"max_types": 7}, r"kvcompress.max_types: .*less than or equal to 6, got 7$"),
        (
            {"max_types": 2, "preset": "ssd"},
            r"kvcompress.max_types: goes with preset fitted only; leave it out$",
        ),
        ({"tolerance": 0.01}, r"kvcompress.tolerance: goes with budget auto only; leave it out$"),
        ({"budget": 0}, r"^budget: 0.* is not a share of the image; need 0 < budget <= 1$"),
        ({"budget": 1.5}, r"^budget: 1.5 is not a share"),
        ({"budget": float("nan")}, r"^budget: nan is not a share"),
        (
            {"preset": "ful"},
            r"^preset: unknown 'ful'; one of full, streaming, h2o, line_ar, ssd, decoupled, fitted$",
        ),
        ({"score": "sum"}, r"kvcompress.score: .*'inter_line', 'averaged' or 'accumulated'.*got 'sum'$"),
        ({"head_types": "mixed"}, r"kvcompress.head_types: .*got 'mixed'$"),
        (
            {"anchor_tokens": -1, "preset": "ssd"},
            r"^anchor_tokens: -1 is not a number of tokens; need a whole number >= 0$",
        ),
        ({"anchor_tokens": 2.5}, r"kvcompress.anchor_tokens: .*integer, got 2.5$"),
        ({"recent_tokens": True}, r"kvcompress.recent_tokens: .*integer, got True$"),
        ({"stratify": "yes"}, r"kvcompress.stratify: .*boolean, got 'yes'$"),
        ({"recalibrate": 1}, r"kvcompress.recalibrate: .*boolean, got 1$"),
        ({"kernels": "gpu"}, r"kvcompress.kernels: .*got 'gpu'$"),
        ({"threshold": 1.5}, r"threshold: .*less than or equal to 1.*got 1.5$"),
        ({"threshold": -0.1}, r"threshold: .*greater than or equal to 0.*got -0.1$"),
        ({"window": 0}, r"kvcompress.window: .*greater than or equal to 1.*got 0$"),
        ({"window": 17}, r"kvcompress.window: .*less than or equal to 16.*got 17$"),
        ({"window": "Auto"}, r"kvcompress.window: input should be a valid integer or 'auto', got 'Auto'$"),
        ({"window": None}, r"kvcompress.window: .*integer or 'auto', got None$"),
        ({"window": True}, r"kvcompress.window: .*integer or 'auto', got True$"),
        ({"window": "8"}, r"kvcompress.window: .*integer or 'auto', got '8'$"),
        ({"window": 2.5}, r"kvcompress.window: .*integer or 'auto', got 2.5$"),
        ({"window_rows": 0}, r"kvcompress.window_rows: .*greater than or equal to 1, got 0$"),
        ({"preset": "h2o", "spatial_tokens": 48}, r"^spatial_tokens: all heads are semantic, .*set budget$"),
        ({"preset": "streaming", "stratify": True}, r"^stratify: spatial heads neither score nor choose"),
    ],
)
def test_a_bad_setting_is_one_line(section: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        parsed(**section)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (
            {"kvcompres": {"budget": 0.1}},
            r"^additional_config has 'kvcompres' beside .*; did you mean kvcompress\?$",
        ),
        (
            {"budget": 0.1},
            r'^additional_config has .budget. beside kvcompress; write \{"kvcompress": \{"budget"',
        ),
        ({"kvcompress": {}, "preset": "ssd"}, r"^additional_config has 'preset' beside kvcompress; write"),
        (
            {"body_bytes": 9999},
            r'beside kvcompress; write \{"kvcompress": \{"limits": \{"body_bytes": \.\.\.',
        ),
        ({"KV-Compress": {}}, r"did you mean kvcompress\?$"),
        ({"kvcompression": {}}, r"did you mean kvcompress\?$"),
        (
            {"vllm_kvcompress": {"budget": 0.1}},
            r"^additional_config has 'vllm_kvcompress' .* mean kvcompress\?$",
        ),
        ({"vllm-kvcompress": {}}, r"did you mean kvcompress\?$"),
        ({"compress": {"budget": 0.1}}, r"^additional_config has 'compress' .*; did you mean kvcompress\?$"),
        ({"compression": {"Head-Profile": "x"}}, r"did you mean kvcompress\?$"),
        ({"Budget": 0.1}, r'has .Budget. beside kvcompress; write \{"kvcompress": \{"budget": \.\.\.\}\}$'),
        ({"headProfile": "x"}, r'; write \{"kvcompress": \{"head_profile": \.\.\.\}\}$'),
        ({"max-types": 2}, r'; write \{"kvcompress": \{"max_types": \.\.\.\}\}$'),
    ],
)
def test_a_key_in_the_wrong_place_is_one_line(config: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        parse_config(config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("section", "lines"),
    [
        ({"preset": "full", "budget": 0.1}, ["budget is not read: preset full keeps everything"]),
        ({"preset": "full", "budget": 1, "value_norm": False, "score": None}, []),
        (
            {"preset": "full", "anchor_tokens": 0, "recent_tokens": 3, "score": "averaged", "stratify": True},
            [
                f"{name} is not read: preset full keeps everything"
                for name in ("anchor_tokens", "recent_tokens", "score", "stratify")
            ],
        ),
        (
            {"preset": "line_ar", "threshold": 0.5, "recalibrate": True},
            [
                f"{name} is not read: preset line_ar needs no head profile"
                for name in ("threshold", "recalibrate")
            ],
        ),
        ({"preset": "full", "threshold": 0.0}, ["threshold is not read: preset full needs no head profile"]),
        ({"preset": "line_ar", "head_types": "profile", "threshold": 0.5, "recalibrate": True}, []),
        (
            {"preset": "decoupled", "head_types": "semantic", "threshold": 0.5},
            ["threshold is not read: preset decoupled needs no head profile"],
        ),
        ({"preset": "decoupled", "threshold": 0.5, "recalibrate": True, "window_rows": 4}, []),
        ({"preset": "h2o", "head_profile": "p.json"}, ["head_profile is not read: preset h2o needs none"]),
        ({"preset": "h2o", "head_profile": "auto", "recalibrate": False}, []),
        ({"window": 1, "window_rows": 4}, ["window_rows is not read: window 1 draws one token a step"]),
        ({"window": 1, "budget": 0.5}, []),
        ({"window": 2, "window_rows": 4, "budget": "auto", "max_types": 2}, []),
        ({}, []),
    ],
)
def test_settings_without_effect_are_told(section: dict[str, Any], lines: list[str]) -> None:
    assert unread(parsed(**section)) == lines


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the check of the configuration says; vLLM may set up its loggers anew while it is made."""
    lines: list[str] = []
    monkeypatch.setattr(vllm_config_module.logger, "info", lambda text, *args: lines.append(text % args))
    return lines


def test_what_is_not_read_is_in_the_log(checkpoints: dict[str, Path], logged: list[str]) -> None:
    """With either cache."""
    from vllm.engine.arg_utils import EngineArgs

    full = {"preset": "full", "budget": 0.1, "head_profile": "p.json"}
    for backend, section in (("kvcompress", full), (None, {"window": 1, "window_rows": 2})):
        EngineArgs(
            str(checkpoints["tiny-hf"]), dtype="float32", max_model_len=128, attention_backend=backend,
            additional_config={"kvcompress": section},
        ).create_engine_config()  # fmt: skip
    assert [line for line in logged if "is not read" in line] == [
        "head_profile is not read: preset full needs none",
        "budget is not read: preset full keeps everything",
        "window_rows is not read: window 1 draws one token a step",
    ]


def test_transformers_implementation_with_settings_of_ours(
    checkpoints: dict[str, Path], logged: list[str]
) -> None:
    """Which would compress nothing; sections of others are theirs."""
    from vllm.engine.arg_utils import EngineArgs

    def configured(additional: dict[str, Any], backend: str | None = None) -> None:
        EngineArgs(
            str(checkpoints["tiny-hf"]), dtype="float32", max_model_len=128, model_impl="transformers",
            attention_backend=backend, additional_config=additional,
        ).create_engine_config()  # fmt: skip

    with pytest.raises(ValueError, match=WITHOUT_BACKEND):
        configured({"kvcompress": {"budget": 0.1}})
    with pytest.raises(ValueError, match="has no setting 'bugdet'; did you mean budget"):
        configured({"kvcompress": {"bugdet": 0.1}})
    with pytest.raises(ValueError, match="kvcompress does not work with --model-impl transformers: drop one"):
        configured({"kvcompress": {"budget": 0.1}}, "kvcompress")
    for theirs in ({}, {"budget": 0.1, "window": "x"}, {"compress": {"budget": 0.1}}):
        configured(theirs)
    assert not logged
    configured({"kvcompress": {"limits": {"pictures": 2}}, "size": "theirs"})
    assert logged == ["additional_config.kvcompress is not read: --model-impl transformers"]


def test_transformers_implementation_of_other_models_is_left_alone() -> None:
    """Whatever their section looks like."""
    config = vllm_config({"bugdet": 0.1})
    config.model_config.hf_config.architectures = ["LlavaForConditionalGeneration"]
    TransformersCheck.verify_and_update_config(config)
    config.model_config.hf_config.architectures = ["JanusForConditionalGeneration"]
    with pytest.raises(ValueError, match="no setting 'bugdet'"):
        TransformersCheck.verify_and_update_config(config)


@pytest.mark.parametrize(
    "section",
    [{"budget": 0.1}, {"budget": 0.2}, {"preset": "fitted"}, {"kernels": "auto", "window": 1}],
    ids=["another", "default", "preset", "beside"],
)
def test_settings_without_the_backend_are_refused(
    checkpoints: dict[str, Path], section: dict[str, Any]
) -> None:
    """Defaults too: who writes them down does not want the full cache."""
    from vllm.engine.arg_utils import EngineArgs

    with pytest.raises(
        ValueError, match=r"kvcompress goes with --attention-backend kvcompress; add it, or drop"
    ):
        EngineArgs(
            str(checkpoints["tiny-hf"]), dtype="float32", max_model_len=128,
            additional_config={"kvcompress": section},
        ).create_engine_config()  # fmt: skip


def test_limits_go_with_any_backend_and_rust_with_none(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm import envs
    from vllm.engine.arg_utils import EngineArgs

    limits = {"kvcompress": {"limits": {"prompt_tokens": 9}, "strict": True}}
    settings: dict[str, Any] = {"dtype": "float32", "max_model_len": 128, "additional_config": limits}
    EngineArgs(str(checkpoints["tiny-hf"]), **settings).create_engine_config()
    envs.disable_envs_cache()
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    with pytest.raises(
        ValueError, match="VLLM_USE_RUST_FRONTEND: that front end has no images route; unset it"
    ):
        EngineArgs(str(checkpoints["tiny-hf"]), **settings).create_engine_config()


@pytest.mark.parametrize("section", ["small", 3, [1], True])
def test_the_section_must_be_an_object(section: Any) -> None:
    with pytest.raises(ValueError, match=r"^additional_config.kvcompress must be an object of settings, got"):
        parse_config({"kvcompress": section})


GRID = Raster(24, 24)
TEXT = SimpleNamespace(num_key_value_heads=2, num_hidden_layers=2)


def vllm_config(section: dict[str, Any] | None = None, **changes: Any) -> Any:
    """As much of a VllmConfig as the check reads; ``changes`` are dotted as ``parallel__size``."""
    config = SimpleNamespace(
        additional_config={"kvcompress": section or {}},
        model_config=SimpleNamespace(
            hf_config=SimpleNamespace(get_text_config=lambda: TEXT),
            dtype=torch.bfloat16,
            logits_processors=["ours"],
            return_sampling_mask=False,
            enable_trace_replay=False,
        ),
        parallel_config=SimpleNamespace(
            tensor_parallel_size=1,
            pipeline_parallel_size=1,
            decode_context_parallel_size=1,
            prefill_context_parallel_size=1,
        ),
        cache_config=SimpleNamespace(cache_dtype="auto"),
        scheduler_config=SimpleNamespace(
            disable_hybrid_kv_cache_manager=False, async_scheduling=False, max_num_seqs=8, scheduler_cls=None
        ),
        device_config=SimpleNamespace(device_type="cpu"),
        kv_transfer_config=None,
        lora_config=None,
        watermark_config=None,
        use_v2_model_runner=False,
    )
    for name, value in changes.items():
        *path, last = name.split("__")
        target = config
        for part in path:
            target = getattr(target, part)
        setattr(target, last, value)
    return config


@pytest.mark.parametrize("preset", PRESETS)
def test_the_defaults_pass(preset: str) -> None:
    check_conflicts(vllm_config({"preset": preset}), [GRID])
    check_conflicts(vllm_config({"preset": preset}, parallel_config__tensor_parallel_size=2), [GRID])
    for dtype in ("bfloat16", "fp8", "fp8_e4m3"):
        check_conflicts(vllm_config({"preset": preset}, cache_config__cache_dtype=dtype), [GRID])


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ({"window": 1}, "Windows: off, a picture is drawn one token a step."),
        ({"window": 8}, "Windows: 8 tokens a step, with up to 32 pictures at once; scratch 8,000 bytes at"),
        ({}, "Windows: to 16 tokens a step, what pays (auto), with up to 32 pictures at once; scratch 8,000"),
        ({"window_rows": 3}, "what pays (auto), with up to 3 pictures at once; scratch 3,000 bytes at most."),
    ],
)
def test_the_start_up_line_says_what_windows_there_are(section: dict[str, Any], says: str) -> None:
    assert says in describe(vllm_config(section), 1000)


@pytest.mark.parametrize(
    ("changes", "mend"),
    [
        ({"model_config__logits_processors": ["ours", "theirs"]}, "drop --logits-processors"),
        ({"scheduler_config__async_scheduling": True}, "V1 model runner: set --no-async-scheduling"),
        ({"scheduler_config__scheduler_cls": "their.Scheduler"}, "another scheduler: drop --scheduler-cls"),
        ({"model_config__return_sampling_mask": True}, "sampling masks: drop --return-sampling-mask"),
        ({"model_config__enable_trace_replay": True}, "trace replay: drop --enable-trace-replay"),
        ({"watermark_config": object()}, "watermarks: drop --watermark-config"),
    ],
)
def test_windows_that_can_not_be_had(changes: dict[str, Any], mend: str) -> None:
    """By number they are refused, in one line; ``auto`` is off, and so is 1."""
    with pytest.raises(
        ValueError, match=rf"^additional_config.kvcompress.window does not work with .*{mend}$"
    ):
        window_config(vllm_config({"window": 8}, **changes))
    for window in ("auto", 1):
        assert window_config(vllm_config({"window": window}, **changes)).window == 1


def test_windows_beside_other_packages_processors_and_on_the_v2_runner(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """There asynchronous scheduling is well, and nobody has measured what a window costs."""
    new = {"use_v2_model_runner": True, "scheduler_config__async_scheduling": True}
    assert window_config(vllm_config({"window": 8}, **new)).window == 8
    assert window_config(vllm_config({}, **new)).window == 1
    monkeypatch.setattr(settings, "entry_points", lambda group: [group])
    with pytest.raises(ValueError, match="logits processors of other packages"):
        window_config(vllm_config({"window": 8}))


def test_a_budget_that_is_too_small_for_one_of_several_sizes_names_it() -> None:
    small = {"preset": "line_ar", "budget": 0.05}
    check_conflicts(vllm_config(small), [Raster(24, 24, 16)])
    with pytest.raises(ValueError, match=r"^budget: .* at least 0.1\d*, of pictures of 960x160$"):
        check_conflicts(vllm_config(small), [Raster(24, 24, 16), Raster(10, 60, 16)])


def test_gpus_without_e4m3_take_no_8_bit_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    platform = "vllm_kvcompress.models.vllm_config.current_platform"
    monkeypatch.setattr(f"{platform}.is_cuda", lambda: True)
    monkeypatch.setattr(f"{platform}.has_device_capability", lambda capability: capability <= 80)
    check_conflicts(vllm_config(), [GRID])
    with pytest.raises(ValueError, match=r"--kv-cache-dtype fp8 on this GPU.*: set auto$"):
        check_conflicts(vllm_config(cache_config__cache_dtype="fp8"), [GRID])


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (
            {"parallel_config__tensor_parallel_size": 4},
            r"--tensor-parallel-size 4 and 2 KV heads: every rank needs as many; set it to a divisor of 2$",
        ),
        ({"parallel_config__pipeline_parallel_size": 2}, r"parallelism: set --pipeline-parallel-size 1$"),
        ({"parallel_config__decode_context_parallel_size": 2}, r"context parallelism: set both .* to 1$"),
        ({"parallel_config__prefill_context_parallel_size": 2}, r"context parallelism: set both"),
        ({"kv_transfer_config": object()}, r"KV connectors: drop --kv-transfer-config$"),
        (
            {"cache_config__cache_dtype": "fp8_e5m2"},
            r"a KV cache of fp8_e5m2: set --kv-cache-dtype auto or fp8$",
        ),
        (
            {"cache_config__cache_dtype": "float16"},
            r"a KV cache of float16: set --kv-cache-dtype auto or fp8$",
        ),
        ({"lora_config": object()}, r"LoRA: drop --enable-lora$"),
        (
            {"scheduler_config__scheduler_cls": "a.Scheduler"},
            r"another scheduler \(a.Scheduler\): drop --scheduler-cls$",
        ),
        (
            {"scheduler_config__disable_hybrid_kv_cache_manager": True},
            r"a single KV-cache group: drop --disable-hybrid-kv-cache-manager$",
        ),
    ],
)
def test_what_cannot_be_combined_is_refused(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(
        ValueError, match=r"^--attention-backend kvcompress does not work with .*" + match
    ) as caught:
        check_conflicts(vllm_config(**changes), [GRID])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("section", "match"),
    [
        (
            {"budget": 0.03},
            r"^budget: budget 0.03 of 576 tokens is 17 slots per head, .*set budget to",
        ),
        (
            {"preset": "decoupled", "recent_tokens": 400},
            r"^recent_tokens: .*lower recent_tokens or set budget to at least",
        ),
        (
            {"preset": "decoupled", "anchor_tokens": 120},
            r"^anchor_tokens: .*lower anchor_tokens or set budget to at least",
        ),
        (
            {"preset": "decoupled", "spatial_tokens": 10},
            r"^spatial_tokens: 10, a line of 24 beside 0 anchors needs 24$",
        ),
        (
            {"preset": "decoupled", "spatial_tokens": 500, "budget": 0.3},
            r"^spatial_tokens: .*lower spatial_tokens or set budget",
        ),
        ({"preset": "line_ar", "budget": 0.1, "recent_tokens": 48}, r"^recent_tokens: "),
        ({"preset": "streaming", "budget": 0.03}, r"^budget: "),
    ],
)
def test_settings_without_room_for_a_line_of_victims(section: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        check_conflicts(vllm_config(section), [GRID])
    assert "\n" not in str(caught.value)


def test_unusable_kernels_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"cpu kernels can't be used, the cache is on cuda; set auto"):
        kernels.kernels_for("cpu", "cuda")
    monkeypatch.setattr("vllm_kvcompress.attention.kernels.cpu.isa", lambda: None)
    with pytest.raises(ValueError, match="they were not built"):
        kernels.kernels_for("cpu", "cpu")
    assert kernels.kernels_for("auto", "cpu").name == "torch"


def test_the_choice_of_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    isa = "vllm_kvcompress.attention.kernels.cpu.isa"
    monkeypatch.setattr(isa, lambda: "avx2")
    assert [kernels.choose("auto", device) for device in ("cuda", "cpu", "xpu")] == ["triton", "cpu", "torch"]
    assert kernels.choose("torch", "cuda") == "torch"
    with pytest.raises(
        ValueError, match=r"^additional_config.kvcompress.kernels: triton .* TRITON_INTERPRET=1"
    ):
        kernels.kernels_for("triton", "cpu")
    monkeypatch.setattr("vllm_kvcompress.attention.kernels.interpreted", lambda: True)
    assert kernels.choose("triton", "cpu") == "triton"


def test_models_that_the_triton_kernels_cannot_serve_are_refused_at_start_up() -> None:
    found = kernels.kernels_for("auto", "cuda")
    assert found.name == "triton"
    found.check_shape(256, 16)
    for shape in ((512, 1), (128, 32)):
        with pytest.raises(ValueError, match=r"kvcompress.kernels: triton .*; set torch$"):
            found.check_shape(*shape)
    kernels.kernels_for("auto", "cpu").check_shape(512, 32)


def test_an_8_bit_cache_on_a_cpu_is_read_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_kvcompress.attention.kernels.cpu.isa", lambda: "avx2")
    fp8 = torch.float8_e4m3fn
    assert kernels.kernels_for("auto", "cpu", fp8).name == "torch (the CPU kernels read no 8-bit cache)"
    assert kernels.kernels_for("torch", "cpu", fp8).name == "torch"
    assert kernels.choose("auto", "cuda", fp8) == "triton"
    with pytest.raises(ValueError, match=r"kernels: cpu .* no 8-bit cache \(--kv-cache-dtype\); set auto$"):
        kernels.kernels_for("cpu", "cpu", fp8)


def profile_at(path: Path, **changes: Any) -> str:
    fields = {"model": "x", "model_hash": "", "metric": "made up", "prompts_hash": "", "threshold": 0.5}
    sizes = {"layers": 2, "kv_heads": 2, "neighbourhood": 16, "scores": [[0.1, 0.9], [0.2, 0.8]]}
    path.write_text(json.dumps(fields | sizes | changes))
    return str(path)


def model_of(layers: int, kv_heads: int) -> Any:
    """As much of the served model as ``plan_cache`` reads."""
    text = SimpleNamespace(
        num_hidden_layers=layers, num_key_value_heads=kv_heads, head_dim=32, hidden_size=64,
        num_attention_heads=2,
    )  # fmt: skip
    return SimpleNamespace(
        config=SimpleNamespace(get_text_config=lambda: text),
        image=SimpleNamespace(raster=Raster(8, 8), rasters=(Raster(8, 8),)),
        fingerprint="abcd",
        dtype=torch.float32,
    )


def planned(section: dict[str, Any], model: Any) -> Any:
    config = vllm_config(section)
    config.model_config.model = "some/model"
    config.model_config.max_model_len = 128
    layout, _ = plan_cache(config, model)
    return layout


def test_a_profile_decides_the_heads(tmp_path: Path) -> None:
    section = {"preset": "decoupled", "head_profile": profile_at(tmp_path / "p.json")}
    layout = planned(section, model_of(2, 2))
    assert layout.types == ((0, 1, 0, 1), (0, 1, 0, 1))
    layout = planned(section | {"threshold": 0.15}, model_of(2, 2))
    assert layout.types == ((0, 1, 0, 1), (1, 1, 1, 1))


def test_a_profile_without_curves_is_refused_by_the_fit(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"^head_profile: .*format 1.*; calibrate again, or set preset"
    ) as caught:
        planned({"head_profile": profile_at(tmp_path / "p.json")}, model_of(2, 2))
    assert "\n" not in str(caught.value)


def curves_of(lines: int) -> dict[str, Any]:
    """Of a model of 2 layers with 2 KV heads, measured on a square grid."""
    candidates = candidate_types(Raster(lines, lines))
    return LossCurves(candidates, np.zeros((2, 4, len(candidates)))).dump()


def test_a_profile_of_another_grid_is_one_line(tmp_path: Path) -> None:
    path = profile_at(tmp_path / "p.json", format=2, head_size=32, dtype="float32", curves=curves_of(6))
    with pytest.raises(
        ValueError, match=r"^head_profile: measured on lines of 6 in pictures of 36 tokens, .* 8 and 64"
    ):
        planned({"head_profile": path}, model_of(2, 2))


@pytest.mark.parametrize(
    ("changes", "model", "match"),
    [
        ({}, (3, 2), r"^head_profile: layers is 2, the served model's is 3; calibrate this model, or set"),
        ({}, (2, 4), r"^head_profile: kv_heads is 2, the served model's is 4; calibrate this model"),
        (
            {"model_hash": "beef"},
            (2, 2),
            r"^head_profile: model_hash is 'beef', the served .* 'abcd'",
        ),
        ({"scores": [[0.1], [0.2]]}, (2, 2), r"^head_profile: .*p.json: scores: .*; calibrate again$"),
    ],
)
def test_a_profile_of_another_model_is_one_line(
    tmp_path: Path, changes: dict[str, Any], model: tuple[int, int], match: str
) -> None:
    path = profile_at(tmp_path / "p.json", **changes)
    with pytest.raises(ValueError, match=match) as caught:
        planned({"head_profile": path}, model_of(*model))
    assert "\n" not in str(caught.value)


def test_a_missing_profile_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^head_profile: cannot read .*none.json: No such file"):
        planned({"head_profile": str(tmp_path / "none.json")}, model_of(2, 2))


@pytest.mark.parametrize(
    ("section", "engine", "match"),
    [
        ({"bugdet": 0.2}, {}, r"has no setting 'bugdet'; did you mean budget\?"),
        ({"budget": 0.1}, {}, r"budget: budget 0.1 of 64 tokens is 6 slots per head, .*at least 0.125"),
        (
            {},
            {"kv_cache_dtype": "fp8_e5m2"},
            r"does not work with a KV cache of fp8_e5m2: set --kv-cache-dtype auto or fp8",
        ),
        ({}, {"disable_hybrid_kv_cache_manager": True}, r"drop --disable-hybrid-kv-cache-manager"),
        ({}, {"enable_lora": True}, r"does not work with LoRA: drop --enable-lora"),
        (
            {},
            {"scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"},
            r"does not work with another scheduler \(vllm.*sched.scheduler.Scheduler\): drop --scheduler-cls",
        ),
        ({}, {"enable_dbo": True}, r"do not run in micro-batches: drop --enable-dbo and --ubatch-size"),
        (
            {},
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}},
            r"speculative decoding does not work with image models: drop --speculative-config",
        ),
        (
            {},
            {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
            r"does not work with KV connectors: drop --kv-transfer-config",
        ),
    ],
    ids=["typo", "budget", "fp8", "hybrid", "lora", "scheduler", "batches", "speculative", "connector"],
)
def test_an_engine_refuses_to_start(
    checkpoints: dict[str, Path], section: dict[str, Any], engine: dict[str, Any], match: str
) -> None:
    from vllm.engine.arg_utils import EngineArgs

    with pytest.raises(ValueError, match=match):
        EngineArgs(
            str(checkpoints["tiny-hf"]), dtype="float32", max_model_len=128, attention_backend="kvcompress",
            additional_config={"kvcompress": section}, **engine,
        ).create_engine_config()  # fmt: skip


def test_the_full_cache_has_no_pipeline_stages_either(checkpoints: dict[str, Path]) -> None:
    """vLLM's own check, of the model class: it keeps no layers apart (docs/serving.md)."""
    from vllm.engine.arg_utils import EngineArgs

    with pytest.raises(NotImplementedError, match="Pipeline parallelism is not supported for this model"):
        EngineArgs(
            str(checkpoints["tiny-hf"]), dtype="float32", max_model_len=128, pipeline_parallel_size=2
        ).create_engine_config()


def test_an_engine_refuses_more_ranks_than_kv_heads(checkpoints: dict[str, Path]) -> None:
    """vLLM itself would give several ranks the same head, whose scores no rank has whole."""
    with pytest.raises(ValueError, match=r"--tensor-parallel-size 4 and 2 KV heads: .* a divisor of 2"):
        Engine(checkpoints["gqa-hf"], max_model_len=128, tensor_parallel_size=4)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (None, r"^head_profile: cannot read .*p.json: No such file"),
        ({"threshold": 2}, r"^head_profile: .*p.json: threshold: .*; calibrate again$"),
        ({"layers": 1, "scores": [[0.1, 0.9]]}, r"^head_profile: layers is 1, the served model's is 2"),
        ({"kv_heads": 1, "scores": [[0.1]] * 2}, r"^head_profile: kv_heads is 1, the served model's is 2"),
        (
            {"model_hash": "beef"},
            r"^head_profile: model_hash is 'beef', the served model's is '[0-9a-f]{16}'",
        ),
        ({"preset": "fitted"}, r"^head_profile: .*\(format 1\), preset fitted needs loss curves"),
        ({"preset": "fitted", "grid": 6}, r"^head_profile: measured on lines of 6 in pictures of 36 tokens"),
    ],
    ids=["missing", "broken", "layers", "heads", "weights", "format", "grid"],
)
def test_a_profile_is_looked_at_before_the_engine_starts(
    checkpoints: dict[str, Path], tmp_path: Path, changes: dict[str, Any] | None, match: str
) -> None:
    from vllm.engine.arg_utils import EngineArgs

    path, changes = tmp_path / "p.json", dict(changes or {"preset": None})
    preset, grid = changes.pop("preset", "decoupled"), changes.pop("grid", None)
    if grid is not None:
        changes |= {"format": 2, "head_size": 32, "dtype": "float32", "curves": curves_of(grid)}
    if preset is not None:
        profile_at(path, **changes)
    section = {"preset": preset or "decoupled", "head_profile": str(path)}
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - pydantic's, around ours
        EngineArgs(
            str(checkpoints["gqa-hf"]), dtype="float32", max_model_len=128, attention_backend="kvcompress",
            additional_config={"kvcompress": section},
        ).create_engine_config()  # fmt: skip
    told = caught.value.errors()[0]["msg"]
    assert re.search(match, told.removeprefix("Value error, ")), told


def test_memory_for_no_picture_is_refused(checkpoints: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=r"KV cache"):
        Engine(checkpoints["tiny-hf"], max_model_len=128, kv_cache_memory_bytes=20_000)
