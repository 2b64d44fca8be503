"""Emu3's files: what they must hold, ids by string, and codes to pixels."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from dense_emu3 import load, pixels
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer
from vllm.engine.arg_utils import EngineArgs

from vllm_kvcompress.config import is_compressed
from vllm_kvcompress.models.checkpoint import check_files
from vllm_kvcompress.models.config import ModelSettings
from vllm_kvcompress.models.emu3.vq import MoVQDecoder
from vllm_kvcompress.models.registry import family_of, serves
from vllm_kvcompress.models.vllm_config import JanusConfigCheck
from vllm_kvcompress.policy import Raster
from vllm_kvcompress.testing.emu3 import make_emu3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_emu3(tmp_path_factory.mktemp("emu3"))


@pytest.mark.parametrize("name", ["hidden_size", "num_hidden_layers"])
def test_a_size_of_another_type_is_named(folder: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"][name] = "x"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"config.json: '{name}': .* expected int, got str .*; correct it"):
        EngineArgs(str(tmp_path), dtype="float32").create_engine_config()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"text_model.lm_head.weight": None}, "lacks tensor lm_head.weight"),
        ({"text_model.model.norm.weight": (32,)}, r"tensor text_model.model.norm.weight has shape \(32,\)"),
        (
            {"text_model.model.norm.bias": (64,)},
            "unknown tensor text_model.model.norm.bias",
        ),
        (
            {"vqmodel.decoder.time_res_stack.0.norm1.running_var": None},
            "lacks VQ tensor decoder.time_res_stack.0.norm1.running_var",
        ),
        (
            {"vqmodel.decoder.time_conv.1.conv.conv.weight": (4, 4, 1, 3, 3)},
            r"has shape \(4, 4, 1, 3, 3\), but config.json asks for \(4, 4, 3, 3, 3\)",
        ),
        ({"vqmodel.decoder.norm_in.weight": (4,)}, "unknown tensor vqmodel.decoder.norm_in.weight"),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_named(
    folder: Path, tmp_path: Path, change: dict[str, tuple[int, ...] | None], said: str
) -> None:
    """Before an engine starts, from the file's header."""
    state = load_file(folder / "model.safetensors")
    for name, shape in change.items():
        if shape is None:
            del state[name]
        else:
            state[name] = torch.zeros(shape)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=said):
        check_files(tmp_path, AutoConfig.from_pretrained(folder), "auto")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"<|extra_200|>": None}, "vocabulary_map has no id for <\\|extra_200\\|> below vocab_size"),
        ({"<|visual token 000007|>": 3}, "gives <\\|visual token 000007\\|> another id than"),
    ],
)
def test_ids_are_found_by_string_or_named(folder: Path, change: dict[str, int | None], said: str) -> None:
    config, tokenizer = AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    for token, number in change.items():
        config.vocabulary_map[token] = number
    with pytest.raises(ValueError, match=said):
        family_of(config).resolve(config, tokenizer, ModelSettings((28, 16)))


def test_the_operator_may_leave_a_checkpoint_to_vllm(folder: Path) -> None:
    """``--model-impl transformers``: Emu3-Chat has the same architecture, and answers questions."""
    config = AutoConfig.from_pretrained(folder)
    ours, theirs = (SimpleNamespace(hf_config=config, model_impl=kind) for kind in ("auto", "transformers"))
    assert (serves(ours), serves(theirs)) == (True, False)
    config.vq_config.codebook_size = -1
    JanusConfigCheck.verify_and_update_model_config(theirs)
    JanusConfigCheck.verify_and_update_config(SimpleNamespace(model_config=theirs))
    with pytest.raises(ValueError, match="codebook_size must be a number from 2"):
        JanusConfigCheck.verify_and_update_model_config(ours)


@pytest.mark.parametrize("grid", [(4, 7), (3, 5)])
def test_pixels_equal_transformers(folder: Path, grid: tuple[int, int]) -> None:
    """One frame in two dimensions against four in three, of which the first is kept: within a level."""
    lines, columns = grid
    model = load(folder)
    decoder = MoVQDecoder(model.config.vq_config, Raster(lines, columns + 1, 4, ends=1), torch.float32)
    state = model.model.vqmodel.state_dict()
    decoder.load_weights((f"vqmodel.{name}", tensor) for name, tensor in state.items())
    codes = torch.randint(0, len(state["quantize.embedding.weight"]), (2, lines * columns))
    mapping, drawn = model.model.vocabulary_mapping, decoder.decode(codes)
    for one, picture in zip(codes, drawn, strict=True):
        tokens = mapping.convert_img2bpe(one.view(lines, columns)).flatten().tolist()
        expected = pixels(folder, tokens, lines, columns)
        assert (picture.int() - expected.int()).abs().max() <= 1
        assert expected.float().std() > 20, "a picture, not a flat field"
    few = decoder.decode(codes[:, : 2 * columns])
    assert few.shape == (2, 2 * 4, columns * 4, 3)


def test_settings_of_its_own_backend_are_not_settings_of_a_compressed_cache(folder: Path) -> None:
    """It runs on our backend anyhow, with the full cache, unless somebody asks for another one."""

    def made(**section: Any) -> Any:
        config = {"kvcompress": {"size": "16x16", **section}}
        return EngineArgs(str(folder), additional_config=config).create_engine_config()

    config = made()
    assert is_compressed(config)
    assert config.additional_config == {"kvcompress": {"size": "16x16", "preset": "full"}}
    with pytest.raises(ValueError, match="kvcompress goes with --attention-backend kvcompress"):
        made(budget=0.2)
