"""Draw with the full cache and let the judge count: the model card's numbers and its contact sheet.

python examples/shapes/evaluate.py --number 100 --sheet examples/shapes/samples.png
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path

import cv2
import torch
from common import VALID_STREAM, scene_batch
from geometry import MODEL_FOLDER, load_tokenizer
from sampling import GUIDANCE, contact_sheet, draw_codes, to_pictures
from tqdm import tqdm
from transformers import JanusForConditionalGeneration

from vllm_kvcompress.eval.judge import judge
from vllm_kvcompress.eval.prompts import CATEGORIES, prompts
from vllm_kvcompress.eval.scenes import sample_pair

SHOWN = ("correct", "whole", "shapes", "count")
"""Of a verdict, per category."""
BATCH = 50
"""Scenes encoded and decoded at once."""


def round_trip(model: JanusForConditionalGeneration, number: int) -> dict[str, float]:
    """Shares of validation scenes that are judged right, and whole, after encoding and decoding."""
    right: Counter[str] = Counter()
    for first in tqdm(range(0, number, BATCH), desc="round trip"):
        pixels, _ = scene_batch(VALID_STREAM, first, BATCH)
        with torch.inference_mode():
            codes = model.model.vqmodel.encode(pixels.to(model.dtype)).image_tokens.view(len(pixels), -1)
        meanings = [sample_pair((VALID_STREAM, index))[1] for index in range(first, first + BATCH)]
        for picture, meaning in zip(to_pictures(model, codes), meanings, strict=True):
            verdict = judge(picture, meaning)
            right += Counter(correct=verdict.correct, whole=verdict.whole)
    return {key: right[key] / max(1, number) for key in ("correct", "whole")}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=MODEL_FOLDER)
    parser.add_argument("--number", type=int, default=100, help="pictures a category")
    parser.add_argument(
        "--round-trip", type=int, default=200, help=f"validation scenes, a multiple of {BATCH}"
    )
    parser.add_argument("--categories", nargs="+", default=CATEGORIES, choices=CATEGORIES)
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sheet", type=Path, help="PNG to write: ten pictures a category")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    model = JanusForConditionalGeneration.from_pretrained(args.model, dtype=torch.bfloat16)
    tokenizer = load_tokenizer(args.model / "tokenizer.json")
    report = {"round_trip": round_trip(model, args.round_trip)}
    shown = []
    for category in args.categories:
        asked = prompts(category, args.number)
        codes = draw_codes(
            model,
            tokenizer,
            [prompt.text for prompt in asked],
            guidance=args.guidance,
            temperature=args.temperature,
            seed=args.seed,
        )
        pictures = to_pictures(model, codes)
        right: Counter[str] = Counter()
        for picture, prompt in zip(pictures, asked, strict=True):
            verdict = judge(picture, prompt)
            right += Counter({key: getattr(verdict, key) for key in SHOWN})
        report[category] = {key: right[key] / args.number for key in SHOWN}
        print(category, json.dumps(report[category]), flush=True)
        shown.append(pictures[:10])
    print(json.dumps(report))
    if args.sheet:
        sheet = contact_sheet(torch.cat([torch.from_numpy(p) for p in shown]).numpy(), columns=10)
        cv2.imwrite(str(args.sheet), sheet[..., ::-1])


if __name__ == "__main__":
    main()
