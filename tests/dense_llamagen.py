"""LlamaGen written out in float64 from its published description: full cache, masks and whole matrices.

Of the package it uses the numbers of a ``HeadRule`` alone, through `dense_janus.DenseHead`; names and shapes
are those of the published ``.pt`` files.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from dense_janus import DenseHead
from torch import Tensor

from vllm_kvcompress.policy.rule import HeadRule


@dataclass
class DenseLlamaGen:
    """A state dict, and the two numbers that it does not hold."""

    state: Mapping[str, Tensor]
    heads: int
    grid: int
    eps: float = 1e-5
    theta: float = 10000.0

    def __post_init__(self) -> None:
        self.w = {name: tensor.double().numpy() for name, tensor in self.state.items()}
        self.layers = 1 + max(int(name.split(".")[1]) for name in self.w if name.startswith("layers."))
        self.null = len(self.w["cls_embedding.embedding_table.weight"]) - 1
        self.size = self.w["norm.weight"].shape[0] // self.heads

    def rotated(self, x: np.ndarray, cell: int) -> np.ndarray:
        """``[heads, size]``: pairs of neighbours, the first half of them by row, the others by column.

        Cell -1 is the class, which is rotated by a table row of zeros: nothing of it is left.
        """
        if cell < 0:
            return np.zeros_like(x)
        row, column = divmod(cell, self.grid)
        out = np.empty_like(x)
        quarter = self.size // 4
        for pair in range(self.size // 2):
            at, m = (row, pair) if pair < quarter else (column, pair - quarter)
            angle = at * self.theta ** (-2 * m / (self.size / 2))
            a, b = x[:, 2 * pair], x[:, 2 * pair + 1]
            out[:, 2 * pair] = a * np.cos(angle) - b * np.sin(angle)
            out[:, 2 * pair + 1] = b * np.cos(angle) + a * np.sin(angle)
        return out

    def norm(self, x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x * x).mean() + self.eps) * self.w[name]

    def step(self, x: np.ndarray, cell: int, attend: Callable[..., np.ndarray]) -> np.ndarray:
        """``[hidden]`` of one token of one branch -> its logits ``[codes]``.

        ``attend(layer, q, k, v)``, each ``[heads, size]``, gives the same.
        """
        width = len(x)
        for n in range(self.layers):
            y = self.w[f"layers.{n}.attention.wqkv.weight"] @ self.norm(
                x, f"layers.{n}.attention_norm.weight"
            )
            q, k, v = (y[i * width : (i + 1) * width].reshape(self.heads, -1) for i in range(3))
            out = attend(n, self.rotated(q, cell), self.rotated(k, cell), v)
            x = x + self.w[f"layers.{n}.attention.wo.weight"] @ out.reshape(-1)
            y = self.norm(x, f"layers.{n}.ffn_norm.weight")
            gate = self.w[f"layers.{n}.feed_forward.w1.weight"] @ y
            up = self.w[f"layers.{n}.feed_forward.w3.weight"] @ y
            x = x + self.w[f"layers.{n}.feed_forward.w2.weight"] @ (gate / (1 + np.exp(-gate)) * up)
        return self.w["output.weight"] @ self.norm(x, "norm.weight")

    def draw(
        self,
        wanted: int,
        guidance: float,
        rule_of: Callable[[int, int], HeadRule],
        negative: int | None = None,
        forced: Sequence[int] = (),
    ) -> tuple[list[int], float]:
        """Codes of a greedy picture, and the least lead of a drawn code over the next.

        Parameters
        ----------
        wanted, negative : int
            Classes of the branches; the unconditional one's is the null class by default.
        rule_of : callable
            (layer, branch * heads + head) -> its rule.
        """
        held = [[DenseHead(rule_of(n, h), 1) for h in range(2 * self.heads)] for n in range(self.layers)]
        classes = self.w["cls_embedding.embedding_table.weight"]
        branches = [classes[wanted], classes[self.null if negative is None else negative]]
        codes: list[int] = []
        lead = np.inf
        for cell in range(-1, self.grid**2 - 1):
            logits = []
            for branch, x in enumerate(branches):

                def attend(
                    n: int, q: np.ndarray, k: np.ndarray, v: np.ndarray, branch: int = branch
                ) -> np.ndarray:
                    mine = held[n][branch * self.heads : (branch + 1) * self.heads]
                    return np.stack(
                        [
                            head.step(q[h : h + 1], k[h], v[h], self.size**-0.5)[0]
                            for h, head in enumerate(mine)
                        ]
                    )

                logits.append(self.step(x, cell, attend))
            cond, uncond = logits
            blended = uncond + guidance * (cond - uncond) if guidance != 1 else cond
            second, first = np.sort(blended)[-2:]
            lead = min(lead, float(first - second))
            codes.append(forced[len(codes)] if len(codes) < len(forced) else int(blended.argmax()))
            branches = [self.w["tok_embeddings.weight"][codes[-1]]] * 2
        return codes, lead


def full(tokens: int) -> Callable[[int, int], HeadRule]:
    """Every head keeps everything."""
    rule = HeadRule(tokens, tokens, tokens)
    return lambda layer, head: rule


def read(path: str) -> Mapping[str, Tensor]:
    """The state dict of a ``.pt`` of ours, wrapped or bare."""
    loaded = torch.load(path, weights_only=True)
    return loaded.get("model", loaded)
