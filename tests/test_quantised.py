"""Checkpoints with fewer bytes a weight, as llm-compressor writes them: 8-bit (W8A8) and 4-bit (W4A16)."""

import importlib
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from inprocess import Engine, in_process  # noqa: F401
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig
from vllm import SamplingParams

from vllm_kvcompress.models import weights
from vllm_kvcompress.models.checkpoint import check_files, header
from vllm_kvcompress.models.janus_config import MultiModalityConfig
from vllm_kvcompress.models.packed import quantised_tensors
from vllm_kvcompress.models.registry import ARCHITECTURES, FAMILIES
from vllm_kvcompress.models.vision_sizes import is_vision
from vllm_kvcompress.models.weights import CheckpointError, Ledger
from vllm_kvcompress.testing.checkpoints import GQA, make_checkpoint
from vllm_kvcompress.testing.emu3 import make_emu3
from vllm_kvcompress.testing.quantised import FORMS, quantise

GREEDY = SamplingParams(temperature=0.0, logprobs=0)


def both(source: Path, target: Path, form: str, plain_layer: int | None = None) -> tuple[Path, Path]:
    """(the quantised checkpoint, a plain one of the weights that it stands for)."""
    plain = target / "plain"
    return quantise(source, target / "packed", form, plain_layer=plain_layer, meant=plain), plain


def drawn(model: Path, backend: str | None, **section: Any) -> tuple[list[int], list[float]]:
    """A greedy picture's tokens, and their log-probabilities."""
    engine = started(model, backend, **section)
    (out,) = engine.outputs([engine.prompt("a red bird")], GREEDY)
    steps = out.outputs[0].logprobs
    ids = list(out.outputs[0].token_ids)
    return ids, [step[token].logprob for step, token in zip(steps, ids, strict=True)]


def started(model: Path, backend: str | None, **section: Any) -> Engine:
    return Engine.get(model, backend, dtype="bfloat16", max_model_len=256, kvcompress=section)


def linear_of(engine: Engine, layer: int) -> str:
    """What a layer's matrices are to vLLM."""
    return type(engine.model.language_model.layers[layer].self_attn.qkv_proj.quant_method).__name__


def check_the_same(packed: Path, plain: Path, backend: str | None, **section: Any) -> None:
    """A greedy picture is the same, but for the rounding of activations; guidance is 5."""
    ids, logs = drawn(packed, backend, **section)
    expected_ids, expected = drawn(plain, backend, **section)
    assert len(ids) >= 28
    same = next((n for n, (a, b) in enumerate(zip(ids, expected_ids, strict=True)) if a != b), len(ids))
    assert same > 8
    apart = [abs(a - b) for a, b in zip(logs[:same], expected[:same], strict=True)]
    assert sum(apart) / same < 0.1


@pytest.fixture(scope="module")
def published(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By layout."""
    folder = tmp_path_factory.mktemp("published")
    deepseek = make_checkpoint(folder / "deepseek", layout="deepseek", geometry=GQA, seed=0)
    return {"hf": checkpoints["gqa-hf"], "deepseek": deepseek, "emu3": make_emu3(folder / "emu3")}


@pytest.mark.parametrize(
    ("layout", "form", "plain_layer"), [("hf", "int8", None), ("hf", "int4", 0), ("deepseek", "int8", 0)]
)
def test_quantised_layers_draw_what_their_weights_say(
    published: dict[str, Path], tmp_path: Path, layout: str, form: str, plain_layer: int | None
) -> None:
    """With and without a layer that was left as it was."""
    packed, plain = both(published[layout], tmp_path, form, plain_layer)
    check_the_same(packed, plain, None)
    kinds = [linear_of(started(packed, None), layer) for layer in range(2)]
    assert [("CompressedTensors" in kind) for kind in kinds] == [plain_layer != 0, True]


def test_an_emu3_may_be_quantised_in_part(published: dict[str, Path], tmp_path: Path) -> None:
    packed, plain = both(published["emu3"], tmp_path, "int8", 1)
    """Its first tokens: weights this large soon draw other pictures from rounded activations."""
    section = {"preset": "full", "size": "28x16", "window": 1}
    engines = [started(folder, "kvcompress", **section) for folder in (packed, plain)]
    asked = [engines[0].prompt(text) for text in ("a cat", "a portrait of a girl", "two birds")]
    ours, meant = ([out.outputs[0] for out in engine.outputs(asked, GREEDY)] for engine in engines)
    for one, other in zip(ours, meant, strict=True):
        assert len(one.token_ids) == 4 * 8
        token = one.token_ids[0]
        assert token == other.token_ids[0]
        assert abs(one.logprobs[0][token].logprob - other.logprobs[0][token].logprob) < 0.2
    kinds = [linear_of(engines[0], layer) for layer in range(2)]
    assert [("CompressedTensors" in kind) for kind in kinds] == [True, False]


PUBLISHED = {  # model type and architecture -> what stands in front of "layers"
    ("janus", "JanusForConditionalGeneration"): ["model.language_model.", "language_model.model."],
    ("llamagen", "LlamaGenForImageGeneration"): ["language_model."],
    ("emu3", "Emu3ForConditionalGeneration"): ["text_model.model.", "model.text_model."],
    ("lumina_mgpt", "LuminaMGPTForImageGeneration"): ["model."],
}


@pytest.mark.parametrize("kind", PUBLISHED)
def test_modules_are_named_as_their_tensors(kind: tuple[str, str]) -> None:
    """What a quantiser leaves out by name, in every family's published spelling, and already in ours."""
    family = importlib.import_module(FAMILIES[kind[0]]).FAMILY
    module, _, name = ARCHITECTURES[kind[1]].partition(":")
    mapper = getattr(importlib.import_module(module), name).hf_to_vllm_mapper
    end = "layers.0.mlp.down_proj"
    for prefix in (*PUBLISHED[kind], "language_model."):
        assert (mapper.map_name(prefix + end) if mapper else prefix + end) == f"language_model.{end}"
    for prefix in PUBLISHED[kind]:
        assert family.canonical_name(f"{prefix}{end}.weight") == f"language_model.{end}.weight"


class Online:
    """As vLLM's online modes: one weight, loaded as it was published, and quantised afterwards."""


def test_modes_that_quantise_while_loading_take_plain_checkpoints(checkpoints: dict[str, Path]) -> None:
    """All linear layers are vLLM's to check; nothing beside the published tensors is asked for."""
    folder = checkpoints["tiny-hf"]
    config = AutoConfig.from_pretrained(folder)
    layers = nn.ModuleList()
    for _ in range(config.get_text_config().num_hidden_layers):
        layer = nn.Module()
        for owner, names in (("self_attn", ("qkv_proj", "o_proj")), ("mlp", ("gate_up_proj", "down_proj"))):
            layer.add_module(owner, nn.ModuleDict({name: nn.Linear(1, 1, bias=False) for name in names}))
            for linear in layer.get_submodule(owner).values():
                linear.quant_method = Online()
        layers.append(layer)
    model: Any = SimpleNamespace(language_model=SimpleNamespace(layers=layers))
    packed = quantised_tensors(model)
    assert packed
    assert all(held == {name} for name, held in packed.items())
    tensors = list(header(folder / "model.safetensors"))
    for left_out in (None, "model.language_model.layers.1.mlp.up_proj.weight"):
        ledger = Ledger(config, packed=packed)
        for name, shape in tensors:
            if name != left_out:
                ledger.take(name, shape)
        if left_out is None:
            ledger.close()
    with pytest.raises(CheckpointError, match=r"lacks tensor language_model.layers.1.mlp.up_proj.weight"):
        ledger.close()


@pytest.mark.parametrize("form", FORMS)
def test_the_compressed_cache_serves_them(checkpoints: dict[str, Path], tmp_path: Path, form: str) -> None:
    """Heads are measured through the quantised layers, too."""
    packed, _ = both(checkpoints["gqa-hf"], tmp_path, form)
    ids, _ = drawn(packed, "kvcompress")
    assert len(ids) == 64
    assert len(set(ids)) > 5


def test_a_missing_scale_is_named(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    packed, _ = both(checkpoints["gqa-hf"], tmp_path, "int8")
    tensors = load_file(packed / "model.safetensors")
    gone = next(name for name in tensors if name.endswith("o_proj.weight_scale"))
    del tensors[gone]
    save_file(tensors, packed / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"lacks tensor language_model\..*o_proj.weight_scale: is a shard"
    ):
        drawn(packed, None)


def with_more(packed: Path, config: dict[str, Any], more: dict[str, torch.Tensor]) -> Path:
    """A quantised checkpoint, and more in its configuration and among its tensors."""
    fields = json.loads((packed / "config.json").read_text())
    fields["quantization_config"] |= config
    (packed / "config.json").write_text(json.dumps(fields))
    save_file(load_file(packed / "model.safetensors") | more, packed / "model.safetensors", {"format": "pt"})
    return packed


def test_scales_of_a_cache_are_no_unknown_tensors(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As llm-compressor writes them; the compressed cache draws what it draws without them, and says so."""
    packed, _ = both(checkpoints["gqa-hf"], tmp_path, "int8")
    without = drawn(packed, "kvcompress")
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
    scales = {
        f"model.language_model.layers.{layer}.self_attn.{name}_scale": torch.tensor([0.02])
        for layer in range(GQA.layers) for name in "kv"
    }  # fmt: skip
    shutil.copytree(packed, tmp_path / "scaled")
    scaled = with_more(tmp_path / "scaled", {"kv_cache_scheme": scheme}, scales)
    said: list[str] = []
    monkeypatch.setattr(weights.logger, "info", said.append)
    assert drawn(scaled, "kvcompress") == without
    assert ["scales of an 8-bit KV cache (kv_cache_scheme) are not used" in line for line in said] == [True]


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_biases_that_a_quantiser_adds(checkpoints: dict[str, Path], tmp_path: Path, value: float) -> None:
    """GPTQ's writers give every layer one: zeros are left out, others named."""
    packed, _ = both(checkpoints["gqa-hf"], tmp_path, "int4")
    name = "model.language_model.layers.1.self_attn.q_proj"
    rows = len(load_file(packed / "model.safetensors")[f"{name}.weight_scale"])
    more = with_more(packed, {}, {f"{name}.bias": torch.full((rows,), value)})
    if value:
        with pytest.raises(
            CheckpointError, match=r"q_proj.bias is a bias that is not zero, but by config.json"
        ):
            started(more, None)
    else:
        assert len(drawn(more, None)[0]) == 64


SERVING = (Path(__file__).parents[1] / "docs" / "serving.md").read_text()
LISTS = {  # of docs/serving.md -> fixture's name
    "Janus, transformers' layout": "hf", "Janus, deepseek-ai's layout": "deepseek", "Emu3": "emu3"
}  # fmt: skip
DECODER = re.compile(r"(?:language_model|text_model)\.(?:model\.)?layers\.\d+\.(?:self_attn|mlp)\.\w+_proj$")


def quantisable(model: Path) -> list[str]:
    """Modules of a checkpoint that llm-compressor's target ``Linear`` may mean: those with a matrix."""
    found = [name for name, shape in header(model / "model.safetensors") if len(shape) == 2]
    assert len(found) > 20
    return [name.removesuffix(".weight") for name in found if name.endswith(".weight")]


def is_ignored(module: str, ignore: list[str]) -> bool:
    """As compressed-tensors reads its lists."""
    return any(
        re.match(one.removeprefix("re:"), module) if one.startswith("re:") else one == module
        for one in ignore
    )


@pytest.mark.parametrize("row", LISTS)
def test_the_documented_lists_leave_the_decoder_alone(published: dict[str, Path], row: str) -> None:
    """A table of words has a matrix, and is no linear layer."""
    [listed] = re.findall(rf"^\| {row} \| `(.*)` \|$", SERVING, re.MULTILINE)
    matrices = quantisable(published[LISTS[row]])
    left = {name for name in matrices if not is_ignored(name, json.loads(listed))}
    assert left - {name for name in left if name.endswith("embed_tokens")} == {
        name for name in matrices if DECODER.search(name)
    }


@pytest.mark.parametrize("layout", ["hf", "deepseek", "emu3"])
def test_layers_outside_the_decoder_must_be_left_out(
    published: dict[str, Path], tmp_path: Path, layout: str
) -> None:
    """Whichever of them is quantised is named, with the mend; what is not served may be anything."""
    packed, _ = both(published[layout], tmp_path, "int8")
    fields = json.loads((packed / "config.json").read_text())
    config = MultiModalityConfig(**fields) if layout == "deepseek" else AutoConfig.from_pretrained(packed)
    outside = [name for name in quantisable(published[layout]) if not DECODER.search(name)]
    assert len(outside) > 1
    tensors, seen = load_file(packed / "model.safetensors"), set()
    for module in outside:
        looks, unused = is_vision(f"{module}."), bool(re.search(r"vqmodel\.encoder\.|attn_pool", module))
        scale = {f"{module}.weight_scale": torch.ones(1)}
        save_file(tensors | scale, packed / "model.safetensors", {"format": "pt"})
        if not unused:
            with pytest.raises(CheckpointError, match=r"in the recipe's ignore \(lists: docs") as caught:
                check_files(packed, config, "auto", vision=layout != "emu3")
            assert f"tensor {module}.weight_scale is of a quantised layer" in str(caught.value)
            assert "\n" not in str(caught.value)
            assert looks == ("without pictures in chats" in str(caught.value))
        if unused or looks:
            check_files(packed, config, "auto", vision=False)
        seen.add((looks, unused))
    assert len(seen) > 1


def test_scales_without_a_word_in_the_config_are_unknown(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    packed, plain = both(checkpoints["gqa-hf"], tmp_path, "int8")
    shutil.copy(plain / "config.json", packed / "config.json")
    with pytest.raises(ValueError, match=r"unknown tensor .*weight_scale"):  # before an engine starts
        drawn(packed, None)
