"""Write the trained model in the published transformers layout.

python examples/shapes/export.py --vq out/shapes/vq/vq.pt --lm out/shapes/lm/lm.pt --codes out/shapes/codes.pt
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from common import VALID_STREAM, scene_batch
from geometry import GEOMETRY, MODEL_FOLDER, load_tokenizer
from safetensors.torch import save_file
from sampling import GUIDANCE
from transformers import JanusForConditionalGeneration

from patches import nearest, to_patches
from vllm_kvcompress.eval import held_out
from vllm_kvcompress.testing import tokenizer as janus
from vllm_kvcompress.testing.configs import transformers_config, transformers_files

DTYPE = "bfloat16"
UNTRAINED = ("model.vision_model.", "model.aligner.")
HELD_OUT_FIRST, HELD_OUT_SCENES = 1000, 256
"""Of the validation stream; training looks at its first scenes only."""


def export(vq: dict[str, torch.Tensor], lm: dict[str, torch.Tensor], tokenizer_file: Path, out: Path) -> None:
    """Write config, weights (bfloat16), tokenizer and processor files into the folder `out`.

    The understanding tower, which drawing never uses and nothing has trained, is left out.
    """
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(tokenizer_file)
    specials = janus.special_tokens(GEOMETRY.text_vocab)
    ids = {token: tokenizer.token_to_id(token) for token in specials}
    config = transformers_config(GEOMETRY, DTYPE, ids[janus.IMAGE])
    config.tie_word_embeddings = False
    torch.manual_seed(0)
    model = JanusForConditionalGeneration(config)
    model.model.vqmodel.load_state_dict(vq)
    _, unexpected = model.load_state_dict(lm, strict=False)
    if unexpected:
        raise ValueError(f"tensors that the model lacks: {', '.join(unexpected)}")
    config.save_pretrained(out)
    state = {
        name: tensor.to(torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
        if not name.startswith(UNTRAINED)
    }
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    files = transformers_files(GEOMETRY, ids)
    files["generation_config.json"]["guidance_scale"] = GUIDANCE
    for name, content in files.items():
        text = (
            content if isinstance(content, str) else json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        )
        (out / name).write_text(text, encoding="utf-8")
    tokenizer.save(str(out / "tokenizer.json"))


def export_scenes(centres: torch.Tensor, out: Path) -> None:
    """Write held-out scenes as training would have seen them, for the harness's replay."""
    pixels, captions = scene_batch(VALID_STREAM, HELD_OUT_FIRST, HELD_OUT_SCENES)
    held_out.save(out / held_out.FILE, captions, nearest(to_patches(pixels), centres).numpy())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--vq", type=Path, required=True, help="checkpoint of train_vq.py, or folder of an exported model"
    )
    parser.add_argument("--lm", type=Path, required=True, help="checkpoint of train_lm.py")
    parser.add_argument("--codes", type=Path, required=True, help="patch centres, from train_vq.py")
    parser.add_argument("--out", type=Path, default=MODEL_FOLDER)
    args = parser.parse_args()
    lm = torch.load(args.lm)
    if args.vq.is_dir():
        there = JanusForConditionalGeneration.from_pretrained(args.vq, dtype=torch.float32)
        vq = {"model": there.model.vqmodel.state_dict(), "step": f"as in {args.vq.name}"}
    else:
        vq = torch.load(args.vq)
    export(vq["model"], lm["master"], args.lm.parent / "tokenizer.json", args.out)
    export_scenes(torch.load(args.codes), args.out)
    print(f"{args.out}: tokenizer of step {vq['step']}, language model of step {lm['step']}")


if __name__ == "__main__":
    main()
