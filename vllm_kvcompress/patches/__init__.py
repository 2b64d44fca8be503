"""What vLLM 0.32 has no seam for. The ledger (why, how, until when) is patches/README.md."""

from collections.abc import Callable

from vllm_kvcompress.patches import admission, images_route
from vllm_kvcompress.patches.images_route import serve_images_route

__all__ = ["changes", "serve_images_route"]


def changes() -> list[Callable[[], object]]:
    """What installs the patches of every process; each does nothing until one of our models is served.

    Raises ImportError or AttributeError if vLLM has moved what they wrap.
    """
    return [*admission.changes(), *images_route.changes()]
