"""A Janus that draws greedily with a full cache and a visibility mask: float64, one token at a time.

The language model's modules are transformers' own; attention and the line rule are written out here, head
by head. Nothing of the package is used but the numbers of a ``HeadRule``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from vllm_kvcompress.policy.rule import HeadRule


@dataclass
class DenseHead:
    """All K and V that one KV head of one branch has seen, and which image tokens it still may see."""

    rule: HeadRule
    prefix: int
    k: list[np.ndarray] = field(default_factory=list)
    v: list[np.ndarray] = field(default_factory=list)
    seen: list[int] = field(default_factory=list)  # image tokens not evicted
    queue: list[int] = field(default_factory=list)  # victims of this line, in order
    score: dict[int, float] = field(default_factory=dict)
    victims: dict[int, list[int]] = field(default_factory=dict)  # drawn -> tokens chosen then

    def step(self, q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float) -> np.ndarray:
        """q [group, D], k and v [D] of the next token; [group, D] out."""
        rule, token = self.rule, len(self.k) - self.prefix
        self.k.append(k)
        self.v.append(v)
        if token >= 0:
            if len(self.seen) == rule.capacity:
                oldest = min(t for t in self.seen if t >= rule.anchors) if rule.ring else self.queue.pop(0)
                self.seen.remove(oldest)
                del self.score[oldest]
            self.seen.append(token)
            self.score[token] = 0.0
        rows = [*range(min(self.prefix, len(self.k))), *(self.prefix + t for t in self.seen)]
        logits = q @ np.stack([self.k[n] for n in rows]).T * scale
        weight = np.exp(logits - logits.max(-1, keepdims=True))
        weight /= weight.sum(-1, keepdims=True)
        for place, row in enumerate(rows):
            if row >= self.prefix:
                self.score[row - self.prefix] += weight[:, place].sum()
        if token >= 0 and (token + 1) % rule.line == 0:
            self.end_line(token + 1)
        return weight @ np.stack([self.v[n] for n in rows])

    def end_line(self, drawn: int) -> None:
        """Choose who goes in the next line: lowest score first, the older among equals."""
        rule = self.rule
        due = rule.line - (rule.capacity - len(self.seen))
        if not rule.ring and due > 0 and drawn < rule.image:
            free = [t for t in self.seen if rule.anchors <= t < drawn - rule.recent]
            mass = self.refined()
            self.queue = sorted(free, key=lambda t: (mass[t], t))[:due]
            self.victims[drawn] = list(self.queue)
        self.score = {t: mass * rule.decay for t, mass in self.score.items()}

    def refined(self) -> dict[int, float]:
        """Scores as victims are chosen by them: by the value's norm, averaged along the row."""
        rule, mass = self.rule, dict(self.score)
        if rule.value_norm:
            mass = {t: m * float(np.linalg.norm(self.v[self.prefix + t])) for t, m in mass.items()}
        if rule.smooth_row:
            row = {
                t: [n for n in (t - 1, t, t + 1) if n in mass and n // rule.line == t // rule.line]
                for t in mass
            }
            mass = {t: sum(mass[n] for n in near) / len(near) for t, near in row.items()}
        return mass


def draw_dense(
    model: Any,
    prompt: Sequence[int],
    pad: int,
    rule_of: Callable[[int, int], HeadRule],
    image: int,
    guidance: float = 5.0,
    forced: Sequence[int] = (),
) -> tuple[list[int], list[list[DenseHead]]]:
    """Codes drawn greedily, and every head's history ``[layer][branch * kv_heads + head]``.

    Parameters
    ----------
    model : JanusForConditionalGeneration
        Will be made float64.
    prompt : list of int
        Begin-of-sentence to begin-of-image.
    rule_of : callable
        (layer, branch * kv_heads + head) -> its rule.
    forced : list of int
        Codes to take instead of the drawn ones, for the first tokens of the picture.
    """
    model = model.double()
    text = model.model.language_model
    config = text.config
    kv_heads = config.num_key_value_heads
    heads = [
        [DenseHead(rule_of(layer, head), len(prompt)) for head in range(2 * kv_heads)]
        for layer in range(config.num_hidden_layers)
    ]
    uncond = [prompt[0], *[pad] * (len(prompt) - 2), prompt[-1]]
    codes: list[int] = []
    with torch.no_grad():
        for position in range(len(prompt) + image - 1):
            if position < len(prompt):
                x = text.embed_tokens(torch.tensor([prompt[position], uncond[position]]))
            else:
                code = torch.tensor([[codes[-1]]])
                x = model.prepare_embeddings_for_image_generation(code)[0].expand(2, -1)
            hidden = forward(text, x, position, heads)
            if position >= len(prompt) - 1:
                logits = model.model.generation_head(hidden)
                best = int((logits[1] + guidance * (logits[0] - logits[1])).argmax())
                codes.append(forced[len(codes)] if len(codes) < len(forced) else best)
    return codes, heads


def forward(text: Any, x: Tensor, position: int, heads: list[list[DenseHead]]) -> Tensor:
    """``[branches, hidden]`` of one token -> the same after all layers of one of transformers' Llamas."""
    config, branches = text.config, len(x)
    cos, sin = text.rotary_emb(x[None], torch.tensor([[position]]))
    kv_heads, size = config.num_key_value_heads, text.layers[0].self_attn.head_dim
    for layer, mine in zip(text.layers, heads, strict=True):
        attention = layer.self_attn
        y = layer.input_layernorm(x)
        q, k, v = (
            project(y).view(branches, -1, 1, size)
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        q, k, v = q.view(branches, kv_heads, -1, size).numpy(), k[:, :, 0].numpy(), v[:, :, 0].numpy()
        out = np.stack(
            [
                mine[b * kv_heads + h].step(q[b, h], k[b, h], v[b, h], size**-0.5)
                for b in range(branches)
                for h in range(kv_heads)
            ]
        )
        x = x + attention.o_proj(torch.from_numpy(out).reshape(branches, -1))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return text.norm(x)
