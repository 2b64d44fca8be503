"""What would run on this machine, and what would not and why, in ten lines: ``vllm-kvcompress doctor``.

Nothing is started, and no model is needed.
"""

import os
import platform
from collections.abc import Callable
from pathlib import Path

# What --attention-backend kvcompress refuses on every machine; models/vllm_config.py says it at start-up.
REFUSED = {
    "pipeline parallelism": "victims of all layers are chosen after the last one",
    "context parallelism": "a head chooses among all of its slots",
    "KV connectors": "they move whole caches, not what a head keeps",
    "LoRA": "both branches share a row, adapters know one",
    "speculative decoding": "a rejected draft would have overwritten a slot; windows do it (docs/windows.md)",
    "another scheduler": "it would not know how much a text needs",
}


def report() -> list[str]:
    """One line a subject, ``subject: finding``; a subject that can't be looked into says why."""
    lines = []
    for subject, find in _SUBJECTS.items():
        try:
            findings = find()
        except Exception as error:
            first = next(iter(str(error).strip().splitlines()), "")
            findings = f"not to be found out ({type(error).__name__}: {first})"
        lines.append(f"{subject}: {findings}")
    return lines


def _package() -> str:
    from vllm_kvcompress import __version__

    return f"{__version__}, in {Path(__file__).parent}, Python {platform.python_version()}"


def _vllm() -> str:
    import vllm

    from vllm_kvcompress.served import untested

    return untested() or f"{vllm.__version__}, tested"


def _plugin() -> str:
    from importlib.metadata import entry_points

    from vllm import envs

    from vllm_kvcompress.plugin import problem

    if not entry_points(group="vllm.general_plugins", name="kvcompress"):
        return "vLLM can't find it: install the package, it is not enough to have it on the path"
    if envs.VLLM_PLUGINS is not None and "kvcompress" not in envs.VLLM_PLUGINS:
        return f"left out by VLLM_PLUGINS={','.join(envs.VLLM_PLUGINS)}: add kvcompress"
    return problem() or "fits this vLLM"


def _device_type() -> str:
    from vllm.platforms import current_platform

    return current_platform.device_type


def _device() -> str:
    from vllm.platforms import current_platform

    if not current_platform.is_cuda_alike():
        return f"{_device_type() or 'none'}, {platform.machine()}, {os.cpu_count()} processors"
    name, capability = current_platform.get_device_name(), current_platform.get_device_capability()
    shown = "" if capability is None else f", compute capability {capability.as_version_str()}"
    return f"{_device_type()}, {name}{shown}"


def _runner() -> str:
    from vllm import envs
    from vllm.triton_utils import HAS_TRITON

    if envs.VLLM_USE_V2_MODEL_RUNNER is not None:
        return f"V{1 + envs.VLLM_USE_V2_MODEL_RUNNER}, set by VLLM_USE_V2_MODEL_RUNNER"
    return "V2, unless a setting needs V1" if HAS_TRITON else "V1: Triton does not run on this device"


def _kernels() -> str:
    from vllm_kvcompress.attention import cpu, cpu_library, kernels

    name = kernels.choose("auto", _device_type())
    if name != "torch":
        return f"cpu ({cpu.isa()})" if name == "cpu" else name
    library = cpu_library.LIBRARY
    why = "is of another version, or can't be loaded here" if library.exists() else "was not built"
    mend = f"{library.name} {why}: install a C++ compiler and reinstall the package"
    return f"torch, the reference, many times slower; {mend}"


def _logits() -> str:
    from importlib.metadata import entry_points

    from vllm.v1.sample.logits_processor import LOGITSPROCS_GROUP

    others = sorted(point.name for point in entry_points(group=LOGITSPROCS_GROUP))
    if others:
        return f"of the whole vocabulary, slower: {', '.join(others)} of another package may look at any id"
    return "of image codes alone, while all requests draw"


def _refused() -> str:
    from vllm.platforms import current_platform

    from vllm_kvcompress.attention import kernels

    reasons = "; ".join(f"{name} ({why})" for name, why in REFUSED.items())
    found = [f"with --attention-backend kvcompress: {reasons}"]
    for name in ("cpu", "triton"):
        try:
            kernels.choose(name, _device_type())
        except ValueError as error:
            found.append(f"on this machine: {error}")
    if current_platform.is_cuda() and not current_platform.has_device_capability(89):
        found.append(
            "on this machine: --kv-cache-dtype fp8, for this GPU lacks e4m3 (compute capability 8.9)"
        )
    return "; ".join(found)


def _profiles() -> str:
    from vllm_kvcompress.heads import provide

    folder = provide.cache_directory()
    existing = next(place for place in (folder, *folder.parents) if place.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        return f"{folder} is not writable, heads are measured at every start: set VLLM_CACHE_ROOT"
    if existing == folder:
        try:
            provide.check_private(folder)
        except ValueError as error:
            return f"neither read nor kept, heads are measured at every start: {error}"
    return f"kept in {folder}, writable"


_SUBJECTS: dict[str, Callable[[], str]] = {
    "vllm-kvcompress": _package,
    "vLLM": _vllm,
    "plugin": _plugin,
    "device": _device,
    "model runner": _runner,
    "kernels": _kernels,
    "logits": _logits,
    "head profiles": _profiles,
    "refused": _refused,
}
