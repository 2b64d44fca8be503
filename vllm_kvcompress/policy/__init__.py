"""What each attention head keeps of a picture: the line rule, and the presets. No torch, no vLLM.

The method is docs/design.md, "The method".
"""

from vllm_kvcompress.policy.presets import (
    AUTO,
    DECAY,
    PRESETS,
    REFINEMENTS,
    TOLERANCE,
    HeadTypes,
    Policy,
    Preset,
    Score,
    number_of,
)
from vllm_kvcompress.policy.raster import Raster
from vllm_kvcompress.policy.rule import MAX_TYPES, HeadRule

__all__ = [
    "AUTO",
    "DECAY",
    "MAX_TYPES",
    "PRESETS",
    "REFINEMENTS",
    "TOLERANCE",
    "HeadRule",
    "HeadTypes",
    "Policy",
    "Preset",
    "Raster",
    "Score",
    "number_of",
]
