"""Small random checkpoints, for tests and benchmarks without a download."""

from vllm_kvcompress.testing.geometry import GQA, PRESETS, SMALL_24, TINY, CheckpointGeometry, janus_pro_1b

__all__ = ["GQA", "PRESETS", "SMALL_24", "TINY", "CheckpointGeometry", "janus_pro_1b"]
