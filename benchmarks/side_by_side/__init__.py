"""The side-by-side benchmark: transformers, vLLM's full cache and the compressed presets, in turns."""
