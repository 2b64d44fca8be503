"""Patch 2: the images route is mounted when, and only when, the served model draws pictures."""

import functools
from collections.abc import Callable
from typing import Any

_served = False


def serve_images_route() -> None:
    """This process serves an image model (called while its configuration is built)."""
    global _served
    _served = True


def changes() -> list[Callable[[], object]]:
    """What wraps ``load_endpoint_plugins`` (vllm plugins/__init__.py), once."""
    import vllm.plugins as plugins

    original: Any = plugins.load_endpoint_plugins
    if getattr(original, "_kvcompress", False):
        return []

    @functools.wraps(original)
    def load_endpoint_plugins(*args: Any, **kwargs: Any) -> list[Any]:
        loaded: list[Any] = original(*args, **kwargs)
        supported_tasks = args[0] if args else kwargs.get("supported_tasks")
        if _served and supported_tasks is not None and "generate" in supported_tasks:
            from vllm_kvcompress.patches import port_user
            from vllm_kvcompress.serving.cache_usage import CacheUsage
            from vllm_kvcompress.serving.images import ImagesEndpoint

            port_user.apply()
            loaded = [*loaded, ImagesEndpoint(usage_extra=CacheUsage)]
        return loaded

    load_endpoint_plugins._kvcompress = True  # type: ignore[attr-defined]
    return [functools.partial(setattr, plugins, "load_endpoint_plugins", load_endpoint_plugins)]
