"""Which window an engine can have: the setting, and what else is configured."""

from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from vllm.v1.sample.logits_processor import LOGITSPROCS_GROUP

from vllm_kvcompress.config import KEY, MAX_WINDOW, SCHEDULER, CompressionConfig, parse_config
from vllm_kvcompress.policy import AUTO

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def window_config(vllm_config: "VllmConfig") -> CompressionConfig:
    """The settings with the window that the engine will have: 1 where ``auto`` can't have one.

    Raises
    ------
    ValueError
        One line, if a window is asked for by number and can't be had.
    """
    config = parse_config(vllm_config.additional_config)
    if config.window == 1:
        return config
    reasons = [reason for clash, reason in _clashes(vllm_config) if clash]
    if reasons and config.window != AUTO:
        raise ValueError(f"additional_config.{KEY}.window does not work with {reasons[0]}")
    # On GPUs nobody has measured yet what a window costs; by number they can be had there.
    unmeasured = config.window == AUTO and vllm_config.use_v2_model_runner
    return config.model_copy(update={"window": 1}) if reasons or unmeasured else config


def describe(vllm_config: "VllmConfig", bytes_per_row: int = 0) -> str:
    """The start-up line.

    Parameters
    ----------
    bytes_per_row : int
        What one picture's longest window needs beside the cache until its tokens stand.
    """
    config = window_config(vllm_config)
    if config.window == 1:
        return "Windows: off, a picture is drawn one token a step."
    places = longest(config)
    how = (
        f"to {places} tokens a step, what pays (auto)" if config.window == AUTO else f"{places} tokens a step"
    )
    rows = most_rows(config, vllm_config)
    return (
        f"Windows: {how}, with up to {config.window_rows} pictures at once; "
        f"scratch {rows * bytes_per_row:,} bytes at most."
    )


def most_rows(config: CompressionConfig, vllm_config: "VllmConfig") -> int:
    """Pictures that may have windows at once."""
    return min(config.window_rows, vllm_config.scheduler_config.max_num_seqs)


def longest(config: CompressionConfig) -> int:
    """Places of the longest window."""
    return MAX_WINDOW if config.window == "auto" else config.window


def reserve_places(vllm_config: "VllmConfig") -> None:
    """Have the V2 runner make room for drafts; before it is made. Raises as `window_config`."""
    from vllm.config.diffusion import DiffusionConfig

    places = longest(window_config(vllm_config))
    if places > 1 and vllm_config.use_v2_model_runner:
        vllm_config.diffusion_config = DiffusionConfig(canvas_length=places - 1)


def _clashes(vllm_config: "VllmConfig") -> tuple[tuple[bool, str], ...]:
    model, scheduler = vllm_config.model_config, vllm_config.scheduler_config
    listed = len(model.logits_processors or ())
    foreign = scheduler.scheduler_cls not in (None, SCHEDULER)
    return (
        (foreign and not vllm_config.use_v2_model_runner, "another scheduler: drop --scheduler-cls"),
        (
            listed > 1 or bool(entry_points(group=LOGITSPROCS_GROUP)),
            "logits processors of other packages, which see one place a row: drop --logits-processors",
        ),
        (
            bool(scheduler.async_scheduling) and not vllm_config.use_v2_model_runner,
            "asynchronous scheduling on the V1 model runner: set --no-async-scheduling",
        ),
        # With these, where vLLM has them, the V2 runner's sampler stays vLLM's (`ImageSampler.adopt`), which
        # takes a row's last place for its only one.
        (getattr(model, "return_sampling_mask", False), "sampling masks: drop --return-sampling-mask"),
        (getattr(model, "enable_trace_replay", False), "trace replay: drop --enable-trace-replay"),
        (getattr(vllm_config, "watermark_config", None) is not None, "watermarks: drop --watermark-config"),
    )
