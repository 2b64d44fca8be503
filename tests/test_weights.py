"""Checkpoint tensors -> parameters: every one loaded, knowingly skipped, or named in one line."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from parity import load_reference
from safetensors.torch import save_file
from torch import nn
from vllm.model_executor.model_loader.weight_utils import pt_weights_iterator, safetensors_weights_iterator

from vllm_kvcompress.models.checkpoint import INDEX, check_checkpoint
from vllm_kvcompress.models.config import raster_of
from vllm_kvcompress.models.janus_config import MultiModalityConfig
from vllm_kvcompress.models.stored import stored_fingerprint
from vllm_kvcompress.models.vq import VQDecoder
from vllm_kvcompress.models.weights import (
    CheckpointError,
    canonical_name,
    expected_shapes,
    fold_image_embedding,
    load_weights,
)
from vllm_kvcompress.testing.checkpoints import make_checkpoint


class LanguageModel(nn.Module):
    """Keeps what it is given, as vLLM's LlamaModel takes it: a stream of names without the prefix."""

    def __init__(self):
        super().__init__()
        self.tensors = {}

    def load_weights(self, weights):
        self.tensors = dict(weights)
        return set(self.tensors)


class Head(nn.Linear):
    def tie_weights(self, embedding):
        self.tied = True


class Model(nn.Module):
    """What ``load_weights`` needs of the served model, without vLLM's layers and their engine."""

    def __init__(self, config, dtype=torch.float32):
        super().__init__()
        text, vq = config.get_text_config(), config.vq_config
        hidden = text.hidden_size
        self.config, self.dtype = config, dtype
        self.image = SimpleNamespace(codes=vq.num_embeddings)
        self.language_model = LanguageModel()
        self.language_model.embed_tokens = None
        self.lm_head = Head(hidden, text.vocab_size, bias=False, dtype=dtype)
        self.image_embedding = nn.Embedding(vq.num_embeddings, hidden, dtype=dtype)
        self.gen_head_proj = nn.Linear(hidden, hidden, dtype=dtype)
        self.gen_head = nn.Linear(hidden, vq.num_embeddings, dtype=dtype)
        self.vq = VQDecoder(vq, raster_of(config), dtype)
        for parameter in self.parameters():
            parameter.data.fill_(torch.nan)


@pytest.fixture(scope="module", params=["hf", "deepseek"])
def layout(request):
    return request.param


@pytest.fixture(scope="module")
def path(tmp_path_factory, layout) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp(layout), layout=layout)


@pytest.fixture(scope="module")
def config(path):
    return config_of(path)


@pytest.fixture(scope="module")
def stored(path):
    files = [str(path / "model.safetensors")]
    return dict(safetensors_weights_iterator(files, use_tqdm_on_load=False))


def config_of(path: Path):
    from transformers import JanusConfig

    fields = json.loads((path / "config.json").read_text())
    return JanusConfig(**fields) if fields["model_type"] == "janus" else MultiModalityConfig(**fields)


def stored_name(stored, canonical: str) -> str:
    (name,) = [name for name in stored if canonical_name(name) == canonical]
    return name


def refusal(config, tensors) -> str:
    with pytest.raises(CheckpointError) as raised:
        load_weights(Model(config), tensors.items())
    message = str(raised.value)
    assert "\n" not in message
    return message


def test_every_parameter_is_filled(config, stored):
    model = Model(config)
    loaded = load_weights(model, stored.items())
    own = {name for name, _ in model.named_parameters()}
    assert loaded == own | {f"language_model.{name}" for name in model.language_model.tensors}
    assert not any(parameter.isnan().any() for parameter in model.parameters())
    wanted = {name for name in expected_shapes(model.config) if name.startswith("language_model.")}
    assert {f"language_model.{name}" for name in model.language_model.tensors} == wanted


def test_values_are_those_that_transformers_reads(tmp_path_factory, config, stored):
    """Both layouts, against transformers' reading of its own."""
    reference = load_reference(make_checkpoint(tmp_path_factory.mktemp("reference")))
    model = Model(config)
    load_weights(model, stored.items())
    theirs = reference.model
    for name, tensor in model.language_model.tensors.items():
        assert torch.equal(tensor, theirs.language_model.get_parameter(name)), name
    assert torch.equal(model.lm_head.weight, reference.lm_head.weight)
    assert torch.equal(model.gen_head_proj.weight, theirs.generation_head.proj_out.weight)
    assert torch.equal(model.gen_head.bias, theirs.generation_head.vision_head.bias)
    with torch.no_grad():
        codes = torch.arange(config.vq_config.num_embeddings)
        table = theirs.generation_aligner(theirs.generation_embeddings(codes))
    torch.testing.assert_close(model.image_embedding.weight, table)


def test_bin_holds_the_same(tmp_path, layout, config, stored):
    path = make_checkpoint(tmp_path, layout=layout, file_format="bin")
    tensors = dict(pt_weights_iterator([str(path / "pytorch_model.bin")], use_tqdm_on_load=False))
    pickled, safe = Model(config), Model(config)
    assert load_weights(pickled, tensors.items()) == load_weights(safe, stored.items())
    assert pickled.fingerprint == safe.fingerprint
    for (name, ours), theirs in zip(pickled.named_parameters(), safe.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_layouts_have_one_fingerprint_and_other_weights_have_not(tmp_path_factory):
    prints = []
    for layout, change in (("hf", 0.0), ("deepseek", 0.0), ("hf", 1e-4)):
        path = make_checkpoint(tmp_path_factory.mktemp("print"), layout=layout, seed=0)
        model = Model(config_of(path))
        weights = dict(safetensors_weights_iterator([str(path / "model.safetensors")], False))
        [middle] = [name for name in weights if name.endswith("layers.1.mlp.up_proj.weight")]
        weights[middle] = weights[middle] + change
        load_weights(model, weights.items())
        prints.append(model.fingerprint)
    assert prints[0] == prints[1] != prints[2]
    assert len(prints[0]) == 16


def test_files_that_cannot_tell_the_fingerprint_do_not(tmp_path, path, config, stored):
    """Engines of every family compare it with what they have loaded: `inprocess.Engine`."""
    model = Model(config)
    load_weights(model, stored.items())
    assert stored_fingerprint(str(path), None, config) == model.fingerprint
    pickled = make_checkpoint(tmp_path / "bin", file_format="bin")
    assert stored_fingerprint(str(pickled), None, config) == ""
    assert stored_fingerprint("nobody/has-this-model", None, config) == ""
    names, shards = list(stored), ("a.safetensors", "b.safetensors")
    halves = [{name: stored[name] for name in names[n::2]} for n in (0, 1)]
    weight_map = {name: shard for shard, half in zip(shards, halves, strict=True) for name in half}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    for shard, half in zip(shards, halves, strict=True):
        assert stored_fingerprint(str(tmp_path), None, config) == ""
        save_file(half, tmp_path / shard)
    assert stored_fingerprint(str(tmp_path), None, config) == model.fingerprint
    (tmp_path / shards[1]).write_bytes((tmp_path / shards[1]).read_bytes()[:-1])
    assert stored_fingerprint(str(tmp_path), None, config) == ""


def test_what_is_at_hand_of_a_repository_tells_the_fingerprint(tmp_path, monkeypatch, path, config):
    """As the hub's client leaves it; half a download tells nothing."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    kept = tmp_path / "models--some--model"
    shutil.copytree(path, kept / "snapshots" / "abc")
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text("abc")
    expected = stored_fingerprint(str(path), None, config)
    assert expected != ""
    assert stored_fingerprint("some/model", None, config) == expected
    weights = kept / "snapshots" / "abc" / "model.safetensors"
    weights.rename(weights.with_name("model-00001-of-00002.safetensors"))
    assert stored_fingerprint("some/model", None, config) == ""


def test_what_decides_logits_is_in_the_fingerprint(config, stored):
    """Heads of two such checkpoints see other pictures; a text's head is of no matter to them."""
    found = {}
    for part in ("nothing", "gen_head", "gen_head_proj", "gen_embed", "gen_aligner", "lm_head"):
        model = Model(config)
        own = {name: canonical_name(name) or "" for name in stored}
        changed = {name: tensor + 1e-2 * own[name].startswith(f"{part}.") for name, tensor in stored.items()}
        load_weights(model, changed.items())
        found[part] = model.fingerprint
    assert found["lm_head"] == found["nothing"]
    assert len(set(found.values())) == 5


def test_image_embedding_is_folded_before_the_cast(config, stored):
    """In bfloat16 the table is float32's, rounded once: aligning bfloat16 embeddings is not as close."""
    exact = Model(config)
    load_weights(exact, stored.items())
    rounded = Model(config, torch.bfloat16)
    load_weights(rounded, stored.items())
    assert torch.equal(rounded.image_embedding.weight, exact.image_embedding.weight.bfloat16())


def test_fold_takes_tensors_of_any_dtype(config, stored):
    small = {canonical_name(name): tensor.bfloat16() for name, tensor in stored.items()}
    assert fold_image_embedding(small).dtype == torch.float32


@pytest.mark.parametrize("name", ["model.language_model.layers.0.self_attn.q_norm.weight", "extra", "x.y"])
def test_unknown_tensor(config, stored, name):
    message = refusal(config, {**stored, name: torch.zeros(2)})
    assert message == f"unknown tensor {name}: not part of a Janus or Janus-Pro checkpoint"


@pytest.mark.parametrize(
    "canonical",
    ["language_model.norm.weight", "language_model.layers.1.mlp.up_proj.weight", "gen_embed.weight",
     "gen_aligner.2.bias", "gen_head_proj.weight", "gen_head.bias"],
)  # fmt: skip
def test_missing_tensor(config, stored, canonical):
    name = stored_name(stored, canonical)
    message = refusal(config, {n: t for n, t in stored.items() if n != name})
    assert message == f"the checkpoint lacks tensor {canonical}: is a shard missing?"


def test_a_missing_shard_is_counted(config, stored):
    message = refusal(config, {n: t for n, t in stored.items() if ".layers.1." not in n})
    assert message.startswith("the checkpoint lacks tensor language_model.layers.1.")
    assert " and 8 more: is a shard missing?" in message


@pytest.mark.parametrize(
    "canonical",
    ["language_model.embed_tokens.weight", "language_model.layers.0.self_attn.k_proj.weight",
     "lm_head.weight", "gen_embed.weight", "gen_aligner.0.weight", "gen_head.weight"],
)  # fmt: skip
def test_wrong_shape(config, stored, canonical):
    name = stored_name(stored, canonical)
    shape = tuple(stored[name].shape)
    message = refusal(config, {**stored, name: stored[name][:-1]})
    wrong = (shape[0] - 1, *shape[1:])
    assert message == f"tensor {name} has shape {wrong}, but config.json asks for {shape}"


@pytest.mark.parametrize("change", ["drop", "shape", "unknown"])
def test_vq_tensors_are_checked_too(config, stored, change):
    (name,) = [name for name in stored if name.endswith("post_quant_conv.weight")]
    tensors = dict(stored)
    if change == "drop":
        del tensors[name]
    elif change == "shape":
        tensors[name] = tensors[name][:-1]
    else:
        tensors[unknown := name.replace("post_quant_conv", "other_conv")] = tensors[name]
        name = unknown
    with pytest.raises(ValueError, match=r"VQ|config\.json") as raised:
        load_weights(Model(config), tensors.items())
    assert "post_quant_conv.weight" in str(raised.value) or name in str(raised.value)
    assert "\n" not in str(raised.value)


def test_what_drawing_does_not_need_may_be_left_out(config, stored):
    """The understanding tower, the VQ encoder; and old checkpoints' rope tables may be there."""
    small = {name: tensor for name, tensor in stored.items() if canonical_name(name) is not None}
    assert len(small) < len(stored)
    rope = "language_model.model.layers.0.self_attn.rotary_emb.inv_freq"
    model = Model(config)
    load_weights(model, {**small, rope: torch.ones(8)}.items())
    assert rope.removeprefix("language_model.model.") not in model.language_model.tensors


def test_lm_head_left_out(config, stored, layout):
    """transformers ties by its flag, which published configurations leave on; the original has none."""
    name = stored_name(stored, "lm_head.weight")
    tensors = {n: t for n, t in stored.items() if n != name}
    if layout == "hf":
        model = Model(config)
        load_weights(model, tensors.items())
        assert model.lm_head.tied
    else:
        assert refusal(config, tensors).startswith("the checkpoint lacks tensor lm_head.weight")


def test_the_tie_flag_is_not_believed_over_the_file(config, stored):
    model = Model(config)
    load_weights(model, stored.items())
    assert not hasattr(model.lm_head, "tied")
    assert torch.equal(model.lm_head.weight, stored[stored_name(stored, "lm_head.weight")])


@pytest.mark.parametrize("name", ["vision_gen_enc_model.0.weight", "vision_gen_dec_aligner.weight"])
def test_janusflow_weights(config, stored, name):
    message = refusal(config, {**stored, name: torch.zeros(2)})
    assert "JanusFlow" in message
    assert name in message


# ---- config.json


def test_janusflow_configuration():
    fields = {"model_type": "multi_modality", "architectures": ["MultiModalityCausalLM"],
              "language_config": {"vocab_size": 102400}, "vision_gen_enc_config": {}}  # fmt: skip
    with pytest.raises(ValueError, match=r"JanusFlow draws by rectified flow, .* is not supported") as raised:
        MultiModalityConfig(**fields)
    assert "\n" not in str(raised.value)


def test_sound_configurations_pass(config):
    check_checkpoint(config)


def test_unsupported_image_size(path, layout):
    config = config_of(path)
    if layout == "hf":
        config.vision_config.image_size += 16
        with pytest.raises(ValueError, match=r"unsupported image size 144: .* 8 x 8 tokens .* 128 in all"):
            check_checkpoint(config)
        return
    fields = json.loads((path / "config.json").read_text())
    fields["vision_config"]["params"]["image_size"] = 120
    with pytest.raises(ValueError, match="image_size 120 is not a multiple of the VQ decoder's 16 pixels"):
        MultiModalityConfig(**fields)


def test_a_configuration_without_an_image_tokenizer():
    with pytest.raises(ValueError, match="not a Janus checkpoint"):
        check_checkpoint(SimpleNamespace())


@pytest.mark.parametrize("broken", ["janusflow", "size"])
def test_vllm_refuses_before_it_starts_an_engine(tmp_path, path, layout, broken, monkeypatch):
    """The line reaches whoever called ``LLM`` or ``vllm serve``, not only an engine's log."""
    from vllm.engine.arg_utils import EngineArgs

    # vLLM reads a file that it can't make sense of again, two seconds later.
    monkeypatch.setattr("vllm.transformers_utils.repo_utils.time.sleep", lambda _: None)
    for file in path.iterdir():
        (tmp_path / file.name).symlink_to(file)
    fields = json.loads((path / "config.json").read_text())
    if broken == "janusflow":
        for name in ("gen_vision_config", "vq_config"):
            fields.pop(name, None)
        fields["model_type"] = "multi_modality"
        line = "JanusFlow draws by rectified flow"
    elif layout == "hf":
        fields["vision_config"]["image_size"] += 8
        line = "unsupported image size 136"
    else:
        fields["vision_config"]["params"]["image_size"] += 8
        line = "image_size 136 is not a multiple"
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=line):
        EngineArgs(str(tmp_path), dtype="float32").create_engine_config()
