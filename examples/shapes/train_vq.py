"""Stage 1: the image tokenizer, 96x96 pixels to a 24x24 grid of codes and back.

The codes are k-means centres of 4x4 patches (patches.py). The networks are transformers' `JanusVQVAE`:
the decoder learns to draw a scene from its codes, on the path that serving runs (l2-normalised look-up,
`post_quant_conv`, decoder), and the encoder learns to point at the codes.

    python examples/shapes/train_vq.py --run out/shapes --steps 3000
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from common import (
    TRAIN_STREAM,
    VALID_STREAM,
    log_record,
    plot_curves,
    save_checkpoint,
    scene_batch,
    to_pixels,
    trapezoid,
)
from geometry import GEOMETRY
from torch import Tensor, nn
from tqdm import tqdm
from transformers.models.janus.modeling_janus import JanusVQVAE

from patches import code_vectors, fit_centres, nearest, to_patches
from vllm_kvcompress.eval.scenes import render, sample_pair
from vllm_kvcompress.eval.world import IMAGE_SIZE, PIXELS_PER_TOKEN
from vllm_kvcompress.testing.configs import transformers_config

CROP = 32
"""Side in pixels of the windows around an object that most steps train on."""
TEMPERATURE = 0.02
"""Of the encoder's cosine logits."""
OFFSET = 2.0
"""See `keep_levels`."""


@torch.no_grad()
def keep_levels(vq: JanusVQVAE) -> None:
    """Start every GroupNorm near the identity.

    With 64 channels in 32 groups a norm sees two channels at a time and removes their common level,
    which is the picture's colour. Opposite constant offsets in the two channels dominate the statistics
    that are divided out, and the norm's own weight and bias then restore the input.
    """
    for name, module in vq.named_modules():
        if isinstance(module, nn.Conv2d):
            module.reset_parameters()
            sign = 1.0 - 2.0 * (torch.arange(module.out_channels) % 2)
            if name.endswith(("conv_in", "conv1", "sample.conv")):
                module.bias.copy_(OFFSET * sign)
            if name.endswith("sample.conv"):  # its input already carries the offsets
                module.bias.sub_(module.weight.sum((2, 3)) @ sign * OFFSET)
            if name.endswith(("conv2", "proj_out")):
                module.weight.mul_(0.3)
        elif isinstance(module, nn.GroupNorm):
            sign = 1.0 - 2.0 * (torch.arange(module.num_channels) % 2)
            module.weight.fill_(OFFSET)
            module.bias.copy_(-OFFSET * sign)


def crop_batch(first: int, number: int) -> Tensor:
    """Windows `[number, 3, CROP, CROP]` in [-1, 1] on the token lattice, each with an object in view."""
    crops = []
    for index in range(first, first + number):
        scene, _ = sample_pair((TRAIN_STREAM, index))
        rng = np.random.default_rng((TRAIN_STREAM, index, CROP))
        thing = scene.things[rng.integers(len(scene.things))]
        centre = np.array([thing.y, thing.x]) + rng.integers(-4, 5, 2) * PIXELS_PER_TOKEN
        top, left = np.clip((centre - CROP // 2).astype(int), 0, IMAGE_SIZE - CROP)
        crops.append(render(scene)[top : top + CROP, left : left + CROP])
    return to_pixels(np.stack(crops))


def picture_loss(out: Tensor, target: Tensor) -> Tensor:
    """Absolute and squared error, and squared error of neighbours' differences; `[B, 3, H, W]` -> scalar."""
    error = out - target
    edges = sum(error.diff(dim=dim).square().mean() for dim in (2, 3))
    return error.abs().mean() + 2 * error.square().mean() + edges


def encode(vq: JanusVQVAE, pixels: Tensor) -> Tensor:
    """Pixels `[B, 3, H, W]` -> unit vectors `[B, H/4 * W/4, 8]` float32, raster order."""
    z = vq.quant_conv(vq.encoder(pixels)).float()
    return F.normalize(z.flatten(2).transpose(1, 2), dim=-1)


def decode(vq: JanusVQVAE, codes: Tensor) -> Tensor:
    """Codes `[B, side**2]` -> pixels float32; `JanusVQVAE.decode` for grids of any side."""
    side = int(codes.shape[1] ** 0.5)
    vectors = F.normalize(vq.quantize.embedding(codes), dim=-1)
    grid = vectors.transpose(1, 2).unflatten(2, (side, side))
    return vq.decoder(vq.post_quant_conv(grid)).float()


@torch.no_grad()
def validate(vq: JanusVQVAE, centres: Tensor, number: int = 32) -> dict[str, float]:
    """On whole validation scenes, through the classes that serve: error in grey levels, agreement."""
    pixels, _ = scene_batch(VALID_STREAM, 0, number)
    codes = nearest(to_patches(pixels), centres)
    out = vq.decode(codes).clamp(-1, 1)
    encoded = vq.encode(pixels).image_tokens.view(number, -1)
    return {
        "valid_error": float((out - pixels).abs().mean() * 127.5),
        "encoder_agreement": float((encoded == codes).float().mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True, help="folder of all that is written")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--decay", type=int, default=600, help="last steps, of falling rate")
    parser.add_argument("--whole", type=int, default=300, help="last steps, on whole scenes instead of crops")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--save-every", type=int, default=100)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.run.mkdir(parents=True, exist_ok=True)
    codes_file, checkpoint, log = args.run / "codes.pt", args.run / "vq.pt", args.run / "vq.jsonl"
    if not codes_file.exists():
        save_checkpoint(codes_file, fit_centres(args.seed))
    centres = torch.load(codes_file)
    vq = JanusVQVAE(transformers_config(GEOMETRY, "float32", image_token_id=0).vq_config)
    keep_levels(vq)
    vectors = vq.quantize.embedding.weight.requires_grad_(False)
    vectors.copy_(code_vectors(centres))
    parameters = [p for p in vq.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.rate, betas=(0.9, 0.98), weight_decay=1e-4)
    first = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint)
        vq.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["step"]

    for step in tqdm(range(first, args.steps), initial=first, total=args.steps):
        if step < args.steps - args.whole:
            pixels = crop_batch(step * args.batch, args.batch)
        else:
            pixels, _ = scene_batch(TRAIN_STREAM, step * args.batch, args.batch)
        codes = nearest(to_patches(pixels), centres)
        for group in optimizer.param_groups:
            group["lr"] = args.rate * trapezoid(step, 30, args.steps, args.decay)
        with torch.autocast("cpu", torch.bfloat16):
            z = encode(vq, pixels)
            out = decode(vq, codes)
        drawing = picture_loss(out, pixels)
        pointing = F.cross_entropy((z @ vectors.T / TEMPERATURE).flatten(0, 1), codes.flatten())
        optimizer.zero_grad()
        (drawing + 0.1 * pointing).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        done = step + 1
        if done % 10 == 0 or done == args.steps:
            log_record(log, step=done, drawing_loss=drawing.item(), pointing_loss=pointing.item())
        if done % args.save_every == 0 or done == args.steps:
            log_record(log, step=done, **validate(vq, centres))
            state = {"step": done, "model": vq.state_dict(), "optimizer": optimizer.state_dict()}
            save_checkpoint(checkpoint, state)
            plot_curves(log, args.run / "vq.png", ("drawing_loss", "valid_error", "encoder_agreement"))


if __name__ == "__main__":
    main()
