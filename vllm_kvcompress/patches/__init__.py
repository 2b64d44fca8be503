"""What vLLM 0.32 has no seam for. The ledger (why, how, until when) is patches/README.md."""

from vllm_kvcompress.patches import admission, images_route
from vllm_kvcompress.patches.images_route import serve_images_route

__all__ = ["apply", "serve_images_route"]


def apply() -> None:
    """Install every patch; each does nothing until one of our models is served."""
    admission.apply()
    images_route.apply()
