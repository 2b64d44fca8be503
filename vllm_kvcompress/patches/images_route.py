"""Patch 2: the images route is mounted when, and only when, the served model draws pictures."""

import functools
from typing import Any

_served = False


def serve_images_route() -> None:
    """This process serves an image model (called while its configuration is built)."""
    global _served
    _served = True


def apply() -> None:
    """Wrap ``load_endpoint_plugins`` (vllm plugins/__init__.py)."""
    import vllm.plugins as plugins

    original = plugins.load_endpoint_plugins
    if getattr(original, "_kvcompress", False):
        return

    @functools.wraps(original)
    def load_endpoint_plugins(supported_tasks: tuple[Any, ...] | None = None) -> list[Any]:
        loaded: list[Any] = original(supported_tasks)
        if _served and supported_tasks is not None and "generate" in supported_tasks:
            from vllm_kvcompress.serving.cache_usage import cache_usage
            from vllm_kvcompress.serving.images import ImagesEndpoint

            loaded = [*loaded, ImagesEndpoint(usage_extra=cache_usage)]
        return loaded

    load_endpoint_plugins._kvcompress = True  # type: ignore[attr-defined]
    plugins.load_endpoint_plugins = load_endpoint_plugins
