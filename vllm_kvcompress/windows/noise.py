"""Noise that depends on a picture's seed and the token's place in it, and on nothing else."""

import torch

_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15


def position_seed(seed: int, index: int) -> int:
    """Seed of the noise of one image token, from 0 to 2**63 - 1.

    Parameters
    ----------
    seed : int
        The picture's, any size.
    index : int
        Which of the picture's tokens, counted from 0.
    """
    # SplitMix64 (Steele, Lea, Flood 2014), twice: neighbouring seeds must not share their tokens' noise.
    return _mix(_mix(seed & _MASK) + index) >> 1


def position_generator(seed: int, index: int, device: torch.device | str) -> torch.Generator:
    """A fresh generator for one image token, which vLLM's samplers take like a request's own."""
    return torch.Generator(device).manual_seed(position_seed(seed, index))


def _mix(state: int) -> int:
    z = (state + _GOLDEN) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)
