"""The random checkpoints: transformers reads one layout, the other holds the same weights."""

import json

import pytest
import torch
from parity import load_reference, transformers_greedy
from safetensors.torch import load_file
from transformers import AutoProcessor, GenerationConfig, JanusForConditionalGeneration

from vllm_kvcompress.models.config import raster_of
from vllm_kvcompress.models.janus_config import MultiModalityConfig
from vllm_kvcompress.models.vq import vq_name
from vllm_kvcompress.models.weights import canonical_name
from vllm_kvcompress.testing import GQA, SMALL_24, TINY, janus_pro_1b
from vllm_kvcompress.testing.checkpoints import main, make_checkpoint
from vllm_kvcompress.testing.configs import transformers_config
from vllm_kvcompress.testing.tokenizer import (
    ADDITIONAL,
    BOI,
    BOS,
    EOI,
    EOS,
    IMAGE,
    PAD,
    ROLES,
    build_tokenizer,
)
from vllm_kvcompress.testing.weights import original_name, original_specs, transformers_specs


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # faster than two for matrices this small
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("hf"), layout="hf")


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("original"), layout="deepseek")


def test_transformers_finds_every_tensor(hf):
    model, info = JanusForConditionalGeneration.from_pretrained(hf, output_loading_info=True)
    assert not any(info.values()), info
    assert sum(p.numel() for p in model.parameters()) < 2_000_000
    # config.json leaves tie_word_embeddings true, as published; the tensors differ.
    assert not torch.equal(model.lm_head.weight, model.model.language_model.embed_tokens.weight)


def test_greedy_pictures_vary(hf):
    special = GenerationConfig.from_pretrained(hf)
    boi = special.generation_kwargs["boi_token_id"]
    prompts = [[special.bos_token_id, *text, boi] for text in ([40, 41, 42], [90, 300, 7, 61, 62])]
    pictures = transformers_greedy(hf, prompts)
    assert [len(codes) for codes in pictures] == [64, 64]
    assert all(len(set(codes)) > 20 for codes in pictures), pictures
    assert pictures[0] != pictures[1]
    assert transformers_greedy(hf, prompts, batched=True) == pictures


def test_reference_refuses_what_transformers_can_not_do(hf):
    with pytest.raises(ValueError, match="above 1"):
        transformers_greedy(hf, [[1, 2]], guidance=1.0)


def test_both_layouts_hold_the_same_weights(hf, original):
    theirs, ours = load_file(original / "model.safetensors"), load_file(hf / "model.safetensors")
    used = set()
    for name, tensor in ours.items():
        stored = theirs[original_name(name)]
        used.add(original_name(name))
        if "qkv" in original_name(name):
            stored = stored.chunk(3)["qkv".index(name.split("self_attn.")[1][0])]
        assert torch.equal(stored.reshape(tensor.shape), tensor), name
    assert all("codebook_used" in name or "attn_pool" in name for name in theirs.keys() - used)
    # The serving code's names agree, though it was written apart.
    first, second = ({vq_name(c) for n in names if (c := canonical_name(n))} for names in (ours, theirs))
    assert first == second


def test_original_names_are_the_published_ones(original):
    """A sample of the published key list (deepseek-ai/Janus, modules of janus/models)."""
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(original / "model.safetensors").items()}
    for name, shape in {
        "language_model.model.layers.0.self_attn.q_proj.weight": (64, 64),
        "language_model.lm_head.weight": (640, 64),
        "gen_embed.weight": (256, 8),
        "gen_aligner.layers.0.weight": (64, 8),
        "gen_aligner.layers.2.bias": (64,),
        "gen_head.output_mlp_projector.weight": (64, 64),
        "gen_head.vision_head.bias": (256,),
        "gen_vision_model.quantize.embedding.weight": (256, 8),
        "gen_vision_model.quantize.codebook_used": (65536,),
        "gen_vision_model.post_quant_conv.weight": (32, 8, 1, 1),
        "gen_vision_model.encoder.conv_blocks.0.downsample.conv.weight": (32, 32, 3, 3),
        "gen_vision_model.decoder.conv_blocks.0.res.1.conv1.weight": (32, 32, 3, 3),
        "gen_vision_model.decoder.conv_blocks.0.attn.1.proj_out.weight": (32, 32, 1, 1),
        "gen_vision_model.decoder.conv_blocks.3.upsample.conv.weight": (32, 32, 3, 3),
        "gen_vision_model.decoder.mid.1.q.weight": (32, 32, 1, 1),
        "vision_model.vision_tower.blocks.0.attn.qkv.weight": (96, 32),
        "vision_model.vision_tower.pos_embed": (1, 64, 32),
        "vision_model.vision_tower.patch_embed.proj.weight": (32, 3, 16, 16),
        "vision_model.vision_tower.attn_pool.latent": (1, 1, 32),
        "aligner.layers.2.weight": (64, 64),
    }.items():
        assert shapes.get(name) == shape, name
    assert not any(name.startswith("model.") for name in shapes)


@pytest.mark.parametrize("layout", ["hf", "deepseek"])
def test_bin_and_safetensors_agree(tmp_path, layout):
    for file_format in ("safetensors", "bin"):
        make_checkpoint(
            tmp_path / file_format, layout=layout, file_format=file_format, seed=3, dtype="bfloat16"
        )
    stored = load_file(tmp_path / "safetensors" / "model.safetensors")
    pickled = torch.load(tmp_path / "bin" / "pytorch_model.bin", weights_only=True)
    assert stored.keys() == pickled.keys()
    assert all(t.dtype == torch.bfloat16 and torch.equal(t, pickled[name]) for name, t in stored.items())


def test_seed_and_lm_head(hf, tmp_path):
    other = load_file(make_checkpoint(tmp_path, seed=1, with_lm_head=False) / "model.safetensors")
    first = load_file(hf / "model.safetensors")
    assert first.keys() - other.keys() == {"lm_head.weight"}
    assert not any(torch.equal(tensor, first[name]) for name, tensor in other.items())
    assert load_reference(tmp_path).lm_head.weight.shape == (TINY.text_vocab, TINY.hidden)  # tied


@pytest.mark.parametrize("geometry", [TINY, GQA, SMALL_24], ids=["tiny", "gqa", "small-24"])
def test_configurations_say_the_same(tmp_path, geometry):
    make_checkpoint(tmp_path, layout="deepseek", geometry=geometry)
    ours = transformers_config(geometry, "float32", image_token_id=1)
    theirs = MultiModalityConfig(**json.loads((tmp_path / "config.json").read_text()))
    assert raster_of(theirs) == raster_of(ours)
    assert (raster_of(ours).tokens, raster_of(ours).pixel_size[0]) == (
        geometry.image_tokens,
        geometry.image_size,
    )
    for name in (
        "hidden_size",
        "num_key_value_heads",
        "vocab_size",
        "rms_norm_eps",
        "rope_parameters",
        "dtype",
    ):
        assert getattr(theirs.text_config, name) == getattr(ours.text_config, name), name
    assert theirs.vq_config.to_dict() == ours.vq_config.to_dict()


def test_full_size_geometry_is_janus_pro_1b():
    """Parameter counts and key count of the published checkpoint."""
    config = transformers_config(janus_pro_1b(24, vision_layers=24), "bfloat16", image_token_id=100581)
    specs = transformers_specs(config)
    count = {spec.name: torch.Size(spec.shape).numel() for spec in specs}
    assert len(specs) == 964
    assert sum(count.values()) == pytest.approx(2076.6e6, rel=1e-4)
    assert sum(n for name, n in count.items() if ".vqmodel.decoder." in name) == pytest.approx(
        42.45e6, rel=1e-3
    )
    assert {spec.name for spec in original_specs(config)} > {"gen_embed.weight"}


def test_tokenizer_ids_at_full_size_are_published_ones():
    tokenizer = build_tokenizer(janus_pro_1b().text_vocab)
    ids = [tokenizer.token_to_id(token) for token in (BOS, EOS, PAD, BOI, EOI, IMAGE, *ROLES)]
    assert ids == [100000, 100001, 100002, 100003, 100580, 100581, 100588, 100589]
    assert tokenizer.get_vocab_size() == 100590


@pytest.mark.parametrize("text", ["A red  cat", "Ünïcödé 猫 🎉\n\t", "".join(map(chr, range(256)))])
def test_tokenizer_covers_every_byte(text):
    tokenizer = build_tokenizer(TINY.text_vocab)
    ids = tokenizer.encode(text).ids
    assert ids[0] == tokenizer.token_to_id(BOS)
    assert tokenizer.decode(ids) == text
    assert max(tokenizer.get_vocab().values()) < TINY.text_vocab
    assert [tokenizer.token_to_id(token) for token in ADDITIONAL] == sorted(
        map(tokenizer.token_to_id, ADDITIONAL)
    )


def test_published_files_are_there(hf, original):
    common = {"config.json", "model.safetensors", "preprocessor_config.json", "processor_config.json",
              "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"}  # fmt: skip
    assert {f.name for f in original.iterdir()} == common
    assert {f.name for f in hf.iterdir()} == common | {"chat_template.jinja", "generation_config.json"}
    processor = AutoProcessor.from_pretrained(hf)
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "text", "text": " a cat "}]}], add_generation_prompt=True
    )
    assert text == "<|User|>: a cat\n\n<|Assistant|>:"
    ids = processor(text=[text], generation_mode="image")["input_ids"][0].tolist()
    assert ids[-1] == processor.tokenizer.convert_tokens_to_ids(BOI)


@pytest.mark.parametrize("wrong", [{"layout": "onnx"}, {"dtype": "int8"}, {"file_format": "gguf"}])
def test_wrong_arguments_are_named(tmp_path, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        make_checkpoint(tmp_path / "out", **wrong)


def test_command(tmp_path, capsys):
    main(
        [
            str(tmp_path / "x"),
            "--layout",
            "deepseek",
            "--format",
            "bin",
            "--layers",
            "1",
            "--dtype",
            "bfloat16",
        ]
    )
    assert capsys.readouterr().out.strip() == str(tmp_path / "x")
    config = json.loads((tmp_path / "x" / "config.json").read_text())
    assert config["language_config"]["num_hidden_layers"] == 1
    assert config["torch_dtype"] == "bfloat16"
