"""Stage 2: train the language model on image codes, with classifier-free dropout.

The model is transformers' `JanusForConditionalGeneration`. It computes in bfloat16; the optimizers
keep float32 weights: Muon for the matrices inside the Llama blocks, AdamW for everything else.
The rate warms up, stays constant and falls to zero over the last `--decay` steps, so a run stopped
before its decay is extended by a larger `--steps`. `--start` begins with the weights of an exported model.

The last `--guided` steps take the loss on the guided logits, `u + w (c - u)` with w drawn from 1 to
`MOST_GUIDANCE` for every scene, both branches in one pass: what drawing samples from is what is trained.

A share of the scenes, `--cut`, is cut by a border (`border.py`).

    python examples/shapes/train_lm.py --codes out/shapes/codes.pt --run out/shapes/lm --steps 20000
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import attention
import numpy as np
import torch
import torch.nn.functional as F
from common import TRAIN_STREAM, VALID_STREAM, log_record, plot_curves, save_checkpoint, trapezoid
from geometry import GEOMETRY, load_tokenizer
from lm_data import Batch, make_batch
from tokenizers import Tokenizer
from torch import Tensor, nn
from tqdm import tqdm
from transformers import JanusForConditionalGeneration

from patches import code_vectors
from vllm_kvcompress.eval.scenes import EASY_FAMILIES, FAMILIES, PAIR_FAMILIES
from vllm_kvcompress.testing import tokenizer as janus
from vllm_kvcompress.testing.configs import transformers_config

TEXT_WEIGHT = 0.05
"""Weight of the captions' own next-word loss beside the image loss."""
VALID_BATCH = 32
MOST_GUIDANCE = 5.0
"""Janus-Pro's own scale."""


def build_model(vectors: Tensor, image_token_id: int, seed: int) -> JanusForConditionalGeneration:
    """A fresh float32 model whose code embeddings start from the codes' unit vectors `[K, 8]`."""
    torch.manual_seed(seed)
    config = transformers_config(GEOMETRY, "float32", image_token_id)
    config.tie_word_embeddings = False
    model = JanusForConditionalGeneration(config)
    with torch.no_grad():
        model.model.generation_embeddings.weight.copy_(vectors * vectors.shape[1] ** 0.5)
        residual_scale = (2 * GEOMETRY.layers) ** -0.5
        for layer in model.model.language_model.layers:
            layer.self_attn.o_proj.weight.mul_(residual_scale)
            layer.mlp.down_proj.weight.mul_(residual_scale)
        model.model.language_model.embed_tokens.weight.normal_(0, 0.3)
    return model


PADDED = 608
"""Sequences are padded to one length, so that the blocks are compiled once."""


def compile_for_training(model: JanusForConditionalGeneration) -> None:
    attention.register()
    model.model.language_model.config._attn_implementation = attention.NAME
    for layer in model.model.language_model.layers:
        layer.compile(dynamic=False)


class Trained:
    """The trained parts of a model: computed in bfloat16, updated in float32."""

    def __init__(self, model: JanusForConditionalGeneration, rate: float) -> None:
        self.model = model
        named = {
            name: p
            for name, p in model.named_parameters()
            if not name.startswith(("model.vqmodel.", "model.vision_model.", "model.aligner."))
        }
        self.master = {name: nn.Parameter(p.detach().float().clone()) for name, p in named.items()}
        model.to(torch.bfloat16)
        self.low = {name: p for name, p in model.named_parameters() if name in self.master}
        matrices = [p for name, p in self.master.items() if ".layers." in name and p.ndim == 2]
        others = [p for name, p in self.master.items() if not (".layers." in name and p.ndim == 2)]
        self.optimizers = (
            torch.optim.Muon(matrices, lr=rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.0),
        )

    def step(self, rate: float) -> None:
        """Apply the gradients of the bfloat16 weights and round the result back into them."""
        for name, low in self.low.items():
            self.master[name].grad = low.grad.float()
            low.grad = None
        nn.utils.clip_grad_norm_(self.master.values(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
        self.round()

    @torch.no_grad()
    def round(self) -> None:
        for name, low in self.low.items():
            low.copy_(self.master[name])

    def state(self) -> dict:
        return {"master": self.master, "optimizers": [o.state_dict() for o in self.optimizers]}

    def load(self, state: dict) -> None:
        with torch.no_grad():
            for name, p in self.master.items():
                p.copy_(state["master"][name])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.round()


def hidden_states(model: JanusForConditionalGeneration, ids: Tensor) -> Tensor:
    """`[B, T]` ids of the one id space -> `[B, T, hidden]`."""
    inner = model.model
    codes = inner.generation_aligner(inner.generation_embeddings.weight)
    table = torch.cat([inner.language_model.embed_tokens.weight, codes])
    length = ids.shape[1]
    embeds = F.embedding(F.pad(ids, (0, PADDED - length)), table)
    return inner.language_model(inputs_embeds=embeds, use_cache=False).last_hidden_state[:, :length]


def losses(
    model: JanusForConditionalGeneration, batch: Batch, scales: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Mean cross entropy in nats of the image codes, and of the captions' words.

    With `scales`, `[scenes]` guidance scales, the batch is `Batch.twice` and the codes' logits are guided.
    """
    hidden = hidden_states(model, batch.ids)
    logits = model.model.generation_head(hidden[batch.image]).float()
    if scales is not None:
        given, free = logits.unflatten(0, (2, len(scales), -1))
        logits = (free + scales[:, None, None] * (given - free)).flatten(0, 1)
    each = F.cross_entropy(logits, batch.codes.flatten(), reduction="none")
    counts = batch.counts.flatten()
    image = (each * counts).sum() / counts.sum().clamp(min=1)
    following = batch.ids.roll(-1, 1)[batch.text]
    words = F.cross_entropy(model.lm_head(hidden[batch.text]).float(), following)
    return image, words


def plain_batch(
    centres: Tensor, tokenizer: Tokenizer, first: int, number: int, families: Mapping[str, float], cut: float
) -> Batch:
    """A training batch with some captions blanked, and some scenes cut by a border."""
    return make_batch(centres, tokenizer, TRAIN_STREAM, first, number, families, cut_share=cut)


def guided_batch(
    centres: Tensor, tokenizer: Tokenizer, first: int, number: int, families: Mapping[str, float], cut: float
) -> tuple[Batch, Tensor]:
    """A training batch as both branches, and a guidance scale for each scene."""
    ids = [tokenizer.token_to_id(token) for token in (janus.BOI, janus.PAD)]
    batch = make_batch(
        centres, tokenizer, TRAIN_STREAM, first, number, families, unconditional_share=0.0, cut_share=cut
    )
    scales = np.random.default_rng((TRAIN_STREAM, first)).uniform(1, MOST_GUIDANCE, number)
    return batch.twice(*ids), torch.tensor(scales, dtype=torch.float32)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--codes", type=Path, required=True, help="patch centres, from train_vq.py")
    parser.add_argument("--run", type=Path, required=True, help="folder of all that is written")
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--easy", type=int, default=4000, help="first steps, on scenes of few objects")
    parser.add_argument(
        "--pairs", type=int, default=0, help="steps, after the easy ones, mostly on pairs: up to this one"
    )
    parser.add_argument("--guided", type=int, default=0, help="last steps, with the loss on guided logits")
    parser.add_argument("--cut", type=float, default=0.125, help="share of scenes that a border cuts")
    parser.add_argument("--cut-from", type=int, default=0, help="the first step that has such scenes")
    parser.add_argument("--start", type=Path, help="folder of an exported model to begin with")
    parser.add_argument("--start-step", type=int, default=0, help="the step it was exported at")
    parser.add_argument("--decay", type=int, default=1500, help="last steps, of falling rate")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--save-every", type=int, default=200)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    args.run.mkdir(parents=True, exist_ok=True)
    checkpoint, log = args.run / "lm.pt", args.run / "lm.jsonl"
    tokenizer = load_tokenizer(args.run / "tokenizer.json")
    saved = torch.load(checkpoint) if checkpoint.exists() else None
    centres = torch.load(args.codes)
    model = build_model(code_vectors(centres), tokenizer.token_to_id(janus.IMAGE), args.seed)
    if args.start and not saved:
        there = JanusForConditionalGeneration.from_pretrained(args.start, dtype=torch.float32)
        model.load_state_dict(there.state_dict())
    trained = Trained(model, args.rate)
    compile_for_training(model)
    first = args.start_step
    if saved:
        trained.load(saved)
        first = saved["step"]
    validation = make_batch(centres, tokenizer, VALID_STREAM, 0, VALID_BATCH)

    for step in tqdm(range(first, args.steps), initial=first, total=args.steps):
        families = EASY_FAMILIES if step < args.easy else PAIR_FAMILIES if step < args.pairs else FAMILIES
        cut = args.cut if step >= args.cut_from else 0.0
        scenes = (centres, tokenizer, step * args.batch, args.batch, families, cut)
        guided = step >= args.steps - args.guided
        batch, scales = guided_batch(*scenes) if guided else (plain_batch(*scenes), None)
        image, words = losses(model, batch, scales)
        (image + TEXT_WEIGHT * words).backward()
        at, total = step - args.start_step, args.steps - args.start_step
        trained.step(args.rate * trapezoid(at, 100, total, args.decay))
        done = step + 1
        if done % 20 == 0 or done == args.steps:
            log_record(log, step=done, image_loss=image.item(), text_loss=words.item())
        if done % args.save_every == 0 or done == args.steps:
            with torch.no_grad():
                log_record(log, step=done, valid_image_loss=losses(model, validation)[0].item())
            save_checkpoint(checkpoint, {"step": done, **trained.state()})
            plot_curves(log, args.run / "lm.png", ("image_loss", "valid_image_loss", "text_loss"))


if __name__ == "__main__":
    main()
