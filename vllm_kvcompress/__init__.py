"""Compressed KV caches for autoregressive image models in vLLM."""

__version__ = "0.1.0"  # the one place; pyproject.toml reads it here
