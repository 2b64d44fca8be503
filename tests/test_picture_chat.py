"""Pictures in chats: transformers' answers in both layouts and caches, and drawing as without them."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from inprocess import Engine, in_process  # noqa: F401
from parity import transformers_logits
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

from vllm_kvcompress.models.checkpoint import check_files, has_vision
from vllm_kvcompress.models.pictures import image_processor
from vllm_kvcompress.models.vision_sizes import vision_sizes
from vllm_kvcompress.models.weights import CheckpointError
from vllm_kvcompress.scheduler import REPORT
from vllm_kvcompress.testing.checkpoints import TINY, make_checkpoint
from vllm_kvcompress.testing.tokenizer import BOI, EOI, IMAGE

# A picture is 8 x 8 tokens, drawn or seen; the tower has three heads of 16 channels.
SEEING = replace(TINY, vision_hidden=48, vision_layers=2, vision_heads=3)
SETTINGS: dict[str, Any] = {"max_model_len": 640, "kv_cache_memory_bytes": 48 << 20}
# A picture is 66 tokens: none is read in one step, none is in one block.
CHUNKS = {"max_num_batched_tokens": 50, "block_size": 32}
COMPRESSED: dict[str, Any] = {"preset": "decoupled", "budget": 0.3}
DRAWN = ("a red bird", "two boats by the sea", "grass")


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same weights in both."""
    root = tmp_path_factory.mktemp("seeing")
    return {name: make_checkpoint(root / name, layout=name, geometry=SEEING) for name in ("hf", "deepseek")}


@pytest.fixture(scope="module")
def processor(layouts: dict[str, Path]) -> Any:
    """transformers' own."""
    return AutoProcessor.from_pretrained(layouts["hf"])


def full(layouts: dict[str, Path], layout: str = "hf", **more: Any) -> Engine:
    return Engine.get(layouts[layout], None, **SETTINGS, **CHUNKS, **more)


def compressed(layouts: dict[str, Path], layout: str = "deepseek", **more: Any) -> Engine:
    return Engine.get(layouts[layout], kvcompress=COMPRESSED | more, **SETTINGS, **CHUNKS)


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Noise, some of it in blocks, so that a picture turned or cut gives other pixels."""
    random = np.random.default_rng(seed)
    small = random.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    noise = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
    blocks = Image.fromarray(small).resize((width, height), Image.Resampling.NEAREST)
    return Image.blend(blocks, Image.fromarray(noise), 0.3)


PHOTOS = [photo(300, 200, 1), photo(40, 90, 2), photo(128, 128, 3), photo(9, 500, 4)]


def said(*parts: str | Image.Image) -> dict[str, Any]:
    """A prompt of texts and pictures in turns."""
    text = "".join(IMAGE if isinstance(part, Image.Image) else part for part in parts)
    pictures = [part for part in parts if isinstance(part, Image.Image)]
    prompt: dict[str, Any] = {"prompt": f"<|User|>: {text}\n\n<|Assistant|>:"}
    return prompt | ({"multi_modal_data": {"image": pictures}} if pictures else {})


QUESTIONS = [
    said(PHOTOS[0], "\nWhat is it?"),
    said("Look at ", PHOTOS[1], " and ", PHOTOS[2], ": which of them is a cat? ", PHOTOS[1]),
    said("What do you see without a picture?"),
    said(PHOTOS[3], PHOTOS[0]),
]


def greedy(count: int = 12, **more: Any) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, **more)


def worst(processor: Any, path: Path, prompt: dict[str, Any], out: Any) -> float:
    """Largest difference of a log-probability, of prompt and answer, to transformers' on the same tokens."""
    pictures = prompt.get("multi_modal_data", {}).get("image")
    inputs = processor(text=[prompt["prompt"]], images=pictures, return_tensors="pt")
    assert inputs["input_ids"][0].tolist() == out.prompt_token_ids
    answer = list(out.outputs[0].token_ids)
    logits = transformers_logits(path, out.prompt_token_ids, answer, inputs.get("pixel_values"))
    logits[:, processor.tokenizer.convert_tokens_to_ids(BOI)] = -torch.inf  # a text can't begin a picture
    wanted = logits.log_softmax(-1)
    length = len(out.prompt_token_ids)
    assert wanted[length - 1 : -1].argmax(-1).tolist() == answer
    told = [*(out.prompt_logprobs or [None]), *out.outputs[0].logprobs]
    differences = [
        abs(one.logprob - float(wanted[place - 1, token]))
        for place, tokens in enumerate(told, start=length + len(answer) - len(told))
        for token, one in (tokens or {}).items()
        if one.logprob > -torch.inf
    ]
    assert len(differences) >= 5 * len(answer)
    return max(differences)


# ---- what it sees


@pytest.mark.parametrize("layout", ["hf", "deepseek"])
@pytest.mark.parametrize("cache", ["full", "compressed"])
def test_log_probabilities_are_transformers(
    layouts: dict[str, Path], processor: Any, layout: str, cache: str
) -> None:
    """Several pictures a prompt, text between them, prompts in chunks, rows beside each other."""
    engine = full(layouts, layout) if cache == "full" else compressed(layouts, layout)
    free = engine.free
    outs = engine.llm.generate(QUESTIONS, greedy(prompt_logprobs=5, logprobs=5), use_tqdm=False)
    for prompt, out in zip(QUESTIONS, outs, strict=True):
        assert worst(processor, layouts["hf"], prompt, out) < 1e-4
    assert len({tuple(out.outputs[0].token_ids) for out in outs}) == len(outs)
    assert engine.free == free


def test_a_picture_changes_the_answer(layouts: dict[str, Path]) -> None:
    """Else parity would say little."""
    engine = full(layouts)
    prompts = [said(picture, "\nWhat is it?") for picture in (PHOTOS[0], PHOTOS[2])]
    first, second = engine.llm.generate(prompts, greedy(logprobs=5), use_tqdm=False)
    assert first.prompt_token_ids == second.prompt_token_ids
    [ours], [theirs] = (out.outputs[0].logprobs[:1] for out in (first, second))
    shared = ours.keys() & theirs.keys()
    assert not shared or max(abs(ours[t].logprob - theirs[t].logprob) for t in shared) > 1e-2


def test_a_picture_that_comes_embedded_is_the_picture(layouts: dict[str, Path]) -> None:
    """``--enable-mm-embeds``, as vLLM's own multimodal models take them; without a tower too."""
    engine = full(layouts)
    pixels = image_processor(str(layouts["hf"]), None, engine.model.vision.sizes)(
        images=[PHOTOS[0]], return_tensors="pt"
    )["pixel_values"]
    with torch.no_grad():
        [embedded] = engine.model.vision(pixels)
    [wanted] = engine.llm.generate([QUESTIONS[0]], greedy(6), use_tqdm=False)
    blind = full(layouts, limit_mm_per_prompt={"image": 0}, enable_mm_embeds=True)
    assert blind.model.vision is None
    asked = QUESTIONS[0] | {"multi_modal_data": {"image": embedded[None]}}
    [out] = blind.llm.generate([asked], greedy(6), use_tqdm=False)
    assert out.prompt_token_ids == wanted.prompt_token_ids
    assert out.outputs[0].token_ids == wanted.outputs[0].token_ids


def test_memory_is_profiled_with_the_largest_picture(layouts: dict[str, Path]) -> None:
    """vLLM does so on GPUs, before the cache is made."""
    engine = full(layouts)
    calls: list[torch.Size] = []
    vision = engine.model.vision
    hook = vision.register_forward_pre_hook(lambda _, inputs: calls.append(inputs[0].shape))
    engine.core.model_executor.driver_worker.worker.model_runner.profile_run()
    hook.remove()
    engine.core.reset_encoder_cache()  # the runner has emptied its own
    assert calls
    assert all(shape[1:] == (3, SEEING.image_size, SEEING.image_size) for shape in calls)


@pytest.mark.parametrize("layout", ["hf", "deepseek"])
def test_chat_places_pictures(layouts: dict[str, Path], processor: Any, layout: str) -> None:
    """The published prompt: begin-of-sentence once, the role, every picture where its part stands."""
    engine = full(layouts, layout)
    parts = [
        {"type": "image_pil", "image_pil": PHOTOS[0]},
        {"type": "text", "text": "What is it, and this:"},
        {"type": "image_pil", "image_pil": PHOTOS[2]},
    ]
    [out] = engine.llm.chat([[{"role": "user", "content": parts}]], greedy(3), use_tqdm=False)
    one = f"{BOI}{IMAGE * SEEING.image_tokens}{EOI}"
    text = f"<|User|>: {one}\nWhat is it, and this:\n{one}\n\n<|Assistant|>:"
    assert out.prompt_token_ids == processor.tokenizer.encode(text)
    asked = said(PHOTOS[0], "\nWhat is it, and this:\n", PHOTOS[2])
    [wanted] = engine.llm.generate([asked], greedy(3), use_tqdm=False)
    assert out.outputs[0].token_ids == wanted.outputs[0].token_ids
    [plain] = engine.llm.chat([[{"role": "user", "content": "hello"}]], greedy(3), use_tqdm=False)
    text = "<|User|>: hello\n\n<|Assistant|>:"
    assert plain.prompt_token_ids[layout == "deepseek" :] == processor.tokenizer.encode(text)[1:]


def test_prefixes_are_shared_by_the_same_pictures_only(layouts: dict[str, Path], processor: Any) -> None:
    engine = full(layouts)
    engine.core.reset_prefix_cache()
    ends = [said(picture, "\nWhat is it?") for picture in (PHOTOS[0], PHOTOS[2], PHOTOS[0])]
    outs = [engine.llm.generate([end], greedy(8, logprobs=5), use_tqdm=False)[0] for end in ends]
    cached = [out.num_cached_tokens for out in outs]
    assert cached[0] == 0
    assert cached[1] == 0, "its tokens are the same, but not the picture"
    assert cached[2] == 64
    for end, out in zip(ends, outs, strict=True):
        assert worst(processor, layouts["hf"], end, out) < 1e-4
    # Drawing has no part in it: what its blocks hold depends on the negative prompt.
    prompt = engine.prompt(DRAWN[0] * 9)
    drawn = [engine.outputs([prompt], SamplingParams(seed=1))[0] for _ in range(2)]
    assert [out.num_cached_tokens or 0 for out in drawn] == [0, 0]
    assert drawn[0].outputs[0].token_ids == drawn[1].outputs[0].token_ids


# ---- drawing beside it


def draw_requests(engine: Engine) -> tuple[list[dict[str, Any]], list[SamplingParams]]:
    negative = engine.prompt("grass")
    extra = ({"guidance_scale": 3.0}, {}, {"negative_prompt_token_ids": negative})
    prompts = [{"prompt_token_ids": engine.prompt(text)} for text in DRAWN]
    return prompts, [SamplingParams(seed=n, extra_args=more) for n, more in enumerate(extra)]


def drawn_among_chats(engine: Engine) -> tuple[list[list[int]], list[Any]]:
    """Tokens of the pictures, and the chats' outputs, all at once, in turns."""
    prompts, params = draw_requests(engine)
    asked = [one for pair in zip(prompts, QUESTIONS, strict=False) for one in pair]
    how = [one for pair in zip(params, [greedy(30, logprobs=5)] * 3, strict=True) for one in pair]
    outs = engine.llm.generate(asked, how, use_tqdm=False)
    return [list(out.outputs[0].token_ids) for out in outs[::2]], outs[1::2]


@pytest.fixture(scope="module")
def blind(layouts: dict[str, Path]) -> Engine:
    """As before there were pictures in chats."""
    return full(layouts, limit_mm_per_prompt={"image": 0})


@pytest.mark.parametrize("windows", [False, True])
@pytest.mark.parametrize("cache", ["full", "compressed"])
def test_pictures_are_those_of_a_server_that_only_draws(
    layouts: dict[str, Path], processor: Any, blind: Engine, cache: str, windows: bool
) -> None:
    section = {"window": 8} if windows else {}
    if cache == "full":
        alone, engine = blind, full(layouts, **({"kvcompress": section} if windows else {}))
    else:
        limit = {"limit_mm_per_prompt": {"image": 0}}
        alone = Engine.get(layouts["hf"], kvcompress=COMPRESSED, **SETTINGS, **CHUNKS, **limit)
        engine = compressed(layouts, **section)
    assert alone.model.vision is None
    assert engine.model.vision is not None
    prompts, params = draw_requests(alone)
    outs = alone.llm.generate(prompts, params, use_tqdm=False)
    wanted = [list(out.outputs[0].token_ids) for out in outs]
    free = engine.free
    pictures, chats = drawn_among_chats(engine)
    assert pictures == wanted
    assert engine.free == free
    for prompt, out in zip(QUESTIONS, chats, strict=False):
        assert worst(processor, layouts["hf"], prompt, out) < 1e-4
        assert out.kv_transfer_params is None
    again = engine.llm.generate(prompts, params, use_tqdm=False)
    assert [list(out.outputs[0].token_ids) for out in again] == wanted
    if windows:
        assert all(out.kv_transfer_params[REPORT]["steps"] <= SEEING.image_tokens for out in again)
        assert any(out.kv_transfer_params[REPORT]["steps"] < SEEING.image_tokens for out in again)


def test_without_pictures_the_runner_is_a_text_models(blind: Engine) -> None:
    """No tower in memory, no embeddings made outside the model, no encoder budget, no prefix cache."""
    runner = blind.core.model_executor.driver_worker.worker.model_runner
    assert not runner.supports_mm_inputs
    assert not [name for name, _ in blind.model.named_parameters() if name.startswith("vision.")]
    assert blind.scheduler.max_num_encoder_input_tokens == 0
    assert not blind.llm.llm_engine.vllm_config.cache_config.enable_prefix_caching


# ---- what is refused


def refused(engine: Engine, match: str, prompt: Any, params: Any = None) -> None:
    free = engine.free
    with pytest.raises((VLLMValidationError, ValueError), match=match):
        engine.llm.generate([prompt], params or greedy(2), use_tqdm=False)
    assert engine.free == free
    [out] = engine.llm.generate([QUESTIONS[2]], greedy(2), use_tqdm=False)
    assert len(out.outputs[0].token_ids) == 2


def test_what_is_refused_by_name(layouts: dict[str, Path], blind: Engine) -> None:
    engine = full(layouts, limit_mm_per_prompt={"image": 2})
    refused(blind, "not available for text-only", QUESTIONS[0])  # vLLM's; chats are told the limit:
    asked = [{"role": "user", "content": [{"type": "image_pil", "image_pil": PHOTOS[0]}]}]
    with pytest.raises(
        VLLMValidationError, match="this server takes no pictures in chats: --limit-mm-per-prompt"
    ):
        blind.llm.chat([asked], greedy(2), use_tqdm=False)
    refused(engine, r"At most 2 image\(s\) may be provided in one prompt", QUESTIONS[1])
    drawing = {"prompt": f"<|User|>: {IMAGE} as a cat\n\n<|Assistant|>:{BOI}"}
    drawing |= {"multi_modal_data": {"image": [PHOTOS[0]]}}
    refused(engine, "drawn from text alone", drawing, SamplingParams(seed=1))
    sized = QUESTIONS[0] | {"mm_processor_kwargs": {"size": {"height": 32, "width": 32}}}
    refused(engine, "mm_processor_kwargs: this model has none, got size", sized)
    long = said(PHOTOS[0], "cat " * 700)
    refused(engine, "longer than the maximum model length|maximum context length", long)
    # A picture with nothing in the prompt that stands for it.
    lost = {"prompt": "hello", "multi_modal_data": {"image": [PHOTOS[0]]}}
    refused(engine, f"{IMAGE} in the prompt for every picture", lost)


def test_a_checkpoint_without_a_tower_takes_no_pictures(layouts: dict[str, Path], tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(layouts["deepseek"], bare)
    tensors = load_file(bare / "model.safetensors")
    kept = {n: t for n, t in tensors.items() if not n.startswith(("vision_model.", "aligner."))}
    save_file(kept, bare / "model.safetensors", metadata={"format": "pt"})
    engine = Engine.get(bare, None, **SETTINGS, **CHUNKS)
    assert engine.model.vision is None
    asked = [{"role": "user", "content": [{"type": "image_pil", "image_pil": PHOTOS[0]}]}]
    with pytest.raises(VLLMValidationError, match="no vision tower"):
        engine.llm.chat([asked], greedy(2), use_tqdm=False)
    assert engine.draw([engine.prompt("grass")], SamplingParams(seed=1))


# ---- files


def config_of(path: Path) -> Any:
    from vllm.transformers_utils.config import get_config

    from vllm_kvcompress.plugin import register

    register()
    return get_config(path, trust_remote_code=False)


@pytest.mark.parametrize("layout", ["hf", "deepseek"])
def test_a_towers_tensors_are_checked_where_they_are_used(
    layouts: dict[str, Path], tmp_path: Path, layout: str
) -> None:
    config, folder = config_of(layouts[layout]), layouts[layout]
    assert has_vision(folder, config)
    check_files(folder, config, "auto", vision=True)
    tensors = load_file(folder / "model.safetensors")
    name = next(n for n in tensors if n.endswith(("pos_embed", "position_embedding.weight")))

    def stored(**changes: torch.Tensor | None) -> None:
        rest = {n: t for n, t in (tensors | changes).items() if t is not None}
        save_file(rest, tmp_path / "model.safetensors", metadata={"format": "pt"})

    stored(**{name: tensors[name][..., :-1].contiguous()})
    with pytest.raises(CheckpointError, match=rf"tensor {name} has shape.*limit-mm-per-prompt"):
        check_files(tmp_path, config, "auto", vision=True)
    check_files(tmp_path, config, "auto", vision=False)
    stored(**{name: None})
    with pytest.raises(CheckpointError, match=r"lacks tensor vision.*limit-mm-per-prompt"):
        check_files(tmp_path, config, "auto", vision=True)
    stored(**{name.replace("position", "posit").replace("pos_embed", "posed"): tensors[name].clone()})
    with pytest.raises(CheckpointError, match=r"unknown tensor.*limit-mm-per-prompt"):
        check_files(tmp_path, config, "auto", vision=True)


def test_sizes_of_the_published_towers() -> None:
    from transformers import JanusConfig

    from vllm_kvcompress.models.janus_config import MultiModalityConfig
    from vllm_kvcompress.testing.configs import original_config
    from vllm_kvcompress.testing.geometry import janus_pro_1b

    raw = original_config(janus_pro_1b(vision_layers=24), "bfloat16")
    assert set(raw["vision_config"]["params"]) == {
        "image_size", "model_name", "select_feature", "select_layer",
    }, "nothing but what is published"  # fmt: skip
    original, transformers = vision_sizes(MultiModalityConfig(**raw)), vision_sizes(JanusConfig())
    assert original == transformers
    assert (original.tokens, original.layers, original.width) == (576, 24, 1024)
    raw["vision_config"]["params"]["model_name"] = "siglip_base_patch16_224"
    with pytest.raises(ValueError, match=r"vision_config: model_name 'siglip_base_patch16_224'.*image.: 0"):
        vision_sizes(MultiModalityConfig(**raw))


@pytest.mark.parametrize("size", [(300, 200), (40, 90), (9, 500), (128, 128), (1, 1)])
@pytest.mark.parametrize("layout", ["hf", "deepseek"])
def test_pixels_are_transformers(
    layouts: dict[str, Path], processor: Any, layout: str, size: tuple[int, int]
) -> None:
    folder, picture = layouts[layout], photo(*size)
    ours = image_processor(str(folder), None, vision_sizes(config_of(folder)))
    mine = ours(images=[picture], return_tensors="pt")["pixel_values"]
    assert torch.equal(mine, processor.image_processor(images=[picture], return_tensors="pt")["pixel_values"])
    assert mine.shape == (1, 3, SEEING.image_size, SEEING.image_size)
    grey = ours(images=[picture.convert("L")], return_tensors="pt")["pixel_values"]
    assert grey.shape == mine.shape


def write(folder: Path, **constants: Any) -> str:
    (folder / "preprocessor_config.json").write_text(json.dumps(constants))
    return str(folder)


def test_constants_are_the_files(layouts: dict[str, Path], tmp_path: Path) -> None:
    sizes, picture = vision_sizes(config_of(layouts["hf"])), photo(60, 40)

    def pixels(**constants: Any) -> torch.Tensor:
        made = image_processor(write(tmp_path, **constants), None, sizes)
        return made(images=[picture], return_tensors="pt")["pixel_values"]

    usual = pixels()
    assert torch.equal(usual, pixels(image_mean=[0.5] * 3, image_std=[0.5] * 3, image_size=128, min_size=14))
    darker = pixels(image_mean=[0.25] * 3, image_std=[0.5] * 3)
    middle = slice(40, 88)
    assert torch.allclose(darker[..., middle, :], usual[..., middle, :] + 0.5, atol=1e-5)
    assert float(darker[0, 0, 0, 0]) == pytest.approx((int(0.25 * 255) / 255 - 0.25) / 0.5, abs=1e-5)
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(ValueError, match="can't be read"):
        image_processor(str(tmp_path), None, sizes)
    (tmp_path / "preprocessor_config.json").unlink()
    assert torch.equal(
        usual, image_processor(str(tmp_path), None, sizes)(images=[picture], return_tensors="pt")[
            "pixel_values"
        ]
    )  # fmt: skip


@pytest.mark.parametrize(
    ("constants", "named"),
    [
        ({"image_size": 384}, "size must be 128"),
        ({"size": {"height": 128, "width": 64}}, "size must be 128"),
        ({"image_mean": [0.5, "a", 0.5]}, "image_mean must be three numbers"),
        ({"image_std": [0, 0, 0]}, "image_std must be three numbers"),
        ({"rescale_factor": "1/255"}, "rescale_factor must be"),
        ({"min_size": 0}, "min_size must be a number from 1 to 128"),
        ({"do_normalize": 1}, "do_normalize must be true or false"),
    ],
)
def test_constants_of_no_use_are_named(
    layouts: dict[str, Path], tmp_path: Path, constants: dict[str, Any], named: str
) -> None:
    with pytest.raises(ValueError, match=named) as caught:
        image_processor(write(tmp_path, **constants), None, vision_sizes(config_of(layouts["hf"])))
    assert "limit-mm-per-prompt" in str(caught.value)
    assert "\n" not in str(caught.value)
