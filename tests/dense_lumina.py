"""Lumina-mGPT written out in float64 from its published description, and transformers' Chameleon by hand.

Neither shares code with the package, but for the numbers of a ``HeadRule`` in `dense_janus.DenseHead`. Both
take the long form: a branch is a sequence of its own with positions from 0, logits are of the whole
vocabulary, and what may not be drawn is masked, by the place in the line. Names and shapes are the published
files'.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from dense_janus import DenseHead
from torch import Tensor
from transformers import ChameleonConfig, ChameleonModel, DynamicCache

from vllm_kvcompress.policy.rule import HeadRule

Step = Callable[[int, list[int]], np.ndarray]  # branch, its ids -> logits of the whole vocabulary


def image_ids(vocabulary: Mapping[str, int]) -> tuple[list[int], int]:
    """Ids of codes, and of the end of a line."""
    return [n for token, n in vocabulary.items() if token.startswith("IMGIMG")], vocabulary["<reserved08799>"]


def draw(
    step: Step, branches: Sequence[Sequence[int]], scale: float, grid: tuple[int, int], vocabulary: Mapping
) -> tuple[list[int], float]:
    """Ids of a greedy picture, ends of lines included, and the least lead of a code over the next.

    ``branches`` are the conditional one's prompt and the unconditional one's; the latter is not asked at
    ``scale`` 1.
    """
    lines, columns = grid
    codes, eol = image_ids(vocabulary)
    sequences = [list(ids) for ids in branches[: 1 if scale == 1 else 2]]
    drawn: list[int] = []
    lead = np.inf
    while len(drawn) < lines * (columns + 1):
        logits = [step(branch, ids) for branch, ids in enumerate(sequences)]
        guided = logits[0] if scale == 1 else scale * (logits[0] - logits[1]) + logits[1]
        allowed = [eol] if (len(drawn) + 1) % (columns + 1) == 0 else codes
        masked = np.full_like(guided, -np.inf)
        masked[allowed] = guided[allowed]
        if len(allowed) > 1:
            second, first = np.sort(masked)[-2:]
            lead = min(lead, float(first - second))
        drawn.append(int(masked.argmax()))
        for ids in sequences:
            ids.append(drawn[-1])
    return drawn, lead


@dataclass
class DenseLumina:
    """A state dict, and the numbers that it does not hold."""

    state: Mapping[str, Tensor]
    heads: int
    theta: float = 10000.0
    eps: float = 1e-5

    def __post_init__(self) -> None:
        self.w = {name: tensor.double().numpy() for name, tensor in self.state.items()}
        self.layers = 1 + max(int(name.split(".")[2]) for name in self.w if name.startswith("model.layers."))
        self.size = len(self.w["model.norm.weight"]) // self.heads

    def draw(
        self,
        branches: Sequence[Sequence[int]],
        scale: float,
        grid: tuple[int, int],
        vocabulary: Mapping[str, int],
        rule_of: Callable[[int, int], HeadRule],
    ) -> tuple[list[int], float]:
        """As the module's; ``rule_of(layer, branch * heads + head)`` is a head's rule."""
        held = [
            [
                [DenseHead(rule_of(n, b * self.heads + h), len(ids)) for h in range(self.heads)]
                for n in range(self.layers)
            ]
            for b, ids in enumerate(branches)
        ]

        def step(branch: int, ids: list[int]) -> np.ndarray:
            mine = held[branch]
            for position in range(len(mine[0][0].k), len(ids)):
                hidden = self.token(ids[position], position, mine)
            return self.w["lm_head.weight"] @ hidden

        return draw(step, branches, scale, grid, vocabulary)

    def token(self, number: int, position: int, held: list[list[DenseHead]]) -> np.ndarray:
        """One token of one branch -> its last hidden state ``[hidden]``."""
        x = self.w["model.embed_tokens.weight"][number]
        for n in range(self.layers):
            layer = f"model.layers.{n}."
            y = self.rms(x, layer + "input_layernorm.weight")
            q, k, v = (
                (self.w[f"{layer}self_attn.{one}_proj.weight"] @ y).reshape(self.heads, -1) for one in "qkv"
            )
            q, k = (
                self.rotated(self.normed(x, f"{layer}self_attn.{one}_norm."), position)
                for one, x in (("q", q), ("k", k))
            )
            out = [head.step(q[h : h + 1], k[h], v[h], self.size**-0.5)[0] for h, head in enumerate(held[n])]
            x = x + self.w[layer + "self_attn.o_proj.weight"] @ np.concatenate(out)
            y = self.rms(x, layer + "post_attention_layernorm.weight")
            gate, up = (self.w[f"{layer}mlp.{one}_proj.weight"] @ y for one in ("gate", "up"))
            x = x + self.w[layer + "mlp.down_proj.weight"] @ (gate / (1 + np.exp(-gate)) * up)
        return self.rms(x, "model.norm.weight")

    def rms(self, x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x * x).mean() + self.eps) * self.w[name]

    def normed(self, x: np.ndarray, name: str) -> np.ndarray:
        """``[heads, size]``: each head to mean 0 and variance 1, then its shard's weights and biases."""
        weight, bias = (self.w[name + kind].reshape(-1, self.size) for kind in ("weight", "bias"))
        out = np.empty_like(x)
        for head, channels in enumerate(x):
            shard = head * len(weight) // self.heads
            plain = (channels - channels.mean()) / np.sqrt(channels.var() + 1e-5)
            out[head] = plain * weight[shard] + bias[shard]
        return out

    def rotated(self, x: np.ndarray, position: int) -> np.ndarray:
        """``[heads, size]``: channel m with channel m + size / 2."""
        half = self.size // 2
        angle = position * self.theta ** (-2 * np.arange(half) / self.size)
        a, b = x[:, :half], x[:, half:]
        return np.concatenate(
            [a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], 1
        )


def full(tokens: int) -> Callable[[int, int], HeadRule]:
    """Every head keeps everything."""
    rule = HeadRule(tokens, tokens, tokens)
    return lambda layer, head: rule


class Chameleon:
    """transformers' ``ChameleonModel`` in float32, its head by hand: as it comes it masks all codes.

    Norms of queries and keys are repeated to ``[heads, size]``, the one shape that transformers has.
    """

    def __init__(self, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
        small = {"base_channels": 32, "channel_multiplier": [1], "num_res_blocks": 0, "num_embeddings": 4}
        chameleon = ChameleonConfig.from_dict({**config, "vq_config": small})
        self.model = ChameleonModel(chameleon).eval()
        heads, size = chameleon.num_attention_heads, chameleon.hidden_size // chameleon.num_attention_heads
        for name, tensor in state.items():
            if name == "lm_head.weight":
                self.head = tensor
                continue
            own = self.model.get_parameter(name.removeprefix("model."))
            if "_norm." in name and "self_attn" in name:
                rows = tensor.view(-1, size)
                tensor = rows.repeat_interleave(heads // len(rows), 0)
            own.data.copy_(tensor)

    def draw(
        self, branches: Sequence[Sequence[int]], scale: float, grid: tuple[int, int], vocabulary: Mapping
    ) -> list[int]:
        """As the module's, each branch with a cache of its own."""
        caches = [DynamicCache(config=self.model.config) for _ in branches]

        def step(branch: int, ids: list[int]) -> np.ndarray:
            cache = caches[branch]
            new = torch.tensor([ids[cache.get_seq_length() :]])
            hidden = self.model(new, past_key_values=cache, use_cache=True).last_hidden_state
            return (self.head @ hidden[0, -1]).numpy()

        with torch.no_grad():
            return draw(step, branches, scale, grid, vocabulary)[0]
