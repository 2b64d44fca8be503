"""Spaces and begin-of-sentence, through transformers and through vLLM, with and without the fix."""

import json

import pytest
from transformers import AutoTokenizer
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES
from vllm.tokenizers import get_tokenizer

from vllm_kvcompress.models.tokenizer import (
    BOI,
    BOS,
    PAD,
    check_tokenizer,
    resolve_special_ids,
    token_id,
    tokenizer_fix,
)
from vllm_kvcompress.testing import TINY
from vllm_kvcompress.testing.checkpoints import make_checkpoint
from vllm_kvcompress.testing.tokenizer import build_tokenizer

TEXT = "A red  bicycle,\n leaning on 2 walls"
LOADERS = pytest.mark.parametrize(
    "load", [AutoTokenizer.from_pretrained, get_tokenizer], ids=["auto", "vllm"]
)


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    return str(make_checkpoint(tmp_path_factory.mktemp("hf"), layout="hf"))


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return str(make_checkpoint(tmp_path_factory.mktemp("original"), layout="deepseek"))


@pytest.fixture
def fix():
    before = TOKENIZER_MAPPING_NAMES.get("multi_modality")
    tokenizer_fix()()
    yield
    restore(before)


@pytest.fixture
def no_fix():
    before = TOKENIZER_MAPPING_NAMES.pop("multi_modality", None)
    yield
    restore(before)


def restore(entry):
    TOKENIZER_MAPPING_NAMES.pop("multi_modality", None)
    if entry is not None:
        TOKENIZER_MAPPING_NAMES["multi_modality"] = entry


def round_trip(tokenizer) -> str:
    return tokenizer.decode(tokenizer.encode(TEXT), skip_special_tokens=True)


@LOADERS
def test_original_layout_with_the_fix(original, fix, load):
    tokenizer = load(original)
    check_tokenizer(tokenizer)
    assert round_trip(tokenizer) == TEXT
    assert tokenizer.encode(TEXT) == build_tokenizer(TINY.text_vocab).encode(TEXT).ids
    assert tokenizer.encode(TEXT).count(token_id(tokenizer, BOS)) == 1


@LOADERS
def test_original_layout_without_the_fix_loses_spaces(original, no_fix, load):
    tokenizer = load(original)
    assert round_trip(tokenizer) == TEXT.replace(" ", "").replace("\n", ""), (
        "transformers may be fixed: drop ours"
    )
    with pytest.raises(ValueError, match=r"reads 'a cat on 2 mats' as 'acaton2mats'.*VLLM_PLUGINS") as caught:
        check_tokenizer(tokenizer)
    assert "\n" not in str(caught.value)


@LOADERS
@pytest.mark.parametrize("state", ["fix", "no_fix"])
def test_transformers_layout_is_right_either_way(hf, load, state, request):
    request.getfixturevalue(state)
    tokenizer = load(hf)
    check_tokenizer(tokenizer)
    assert round_trip(tokenizer) == TEXT


def test_fix_touches_one_model_type_and_is_idempotent(no_fix):
    before = dict(TOKENIZER_MAPPING_NAMES)
    tokenizer_fix()()
    once = dict(TOKENIZER_MAPPING_NAMES)
    tokenizer_fix()()
    assert dict(TOKENIZER_MAPPING_NAMES) == once
    assert once.items() - before.items() == {("multi_modality", "TokenizersBackend")}


def test_special_ids_come_from_the_tokenizer(hf):
    tokenizer = AutoTokenizer.from_pretrained(hf)
    bos, pad, boi = resolve_special_ids(tokenizer)
    assert tokenizer.convert_ids_to_tokens([bos, pad, boi]) == [BOS, PAD, BOI]
    assert token_id(tokenizer, "<no such token>") is None


@pytest.mark.parametrize("token", [BOS, PAD, BOI])
def test_a_missing_token_is_named(original, tmp_path, fix, token):
    tokenizer = _edited(original, tmp_path, lambda text: text.replace(token, "<else>"))
    with pytest.raises(ValueError, match="no token") as caught:
        check_tokenizer(tokenizer)
    assert token in str(caught.value)


def test_a_file_that_does_not_add_bos_is_served_with_a_warning(original, tmp_path, fix, caplog):
    def drop(text: str) -> str:
        return json.dumps(json.loads(text) | {"post_processor": None})

    tokenizer = _edited(original, tmp_path, drop)
    check_tokenizer(tokenizer)
    assert BOS in caplog.text


def _edited(original, path, edit):
    from pathlib import Path

    for file in Path(original).glob("*.json"):
        text = file.read_text()
        (path / file.name).write_text(edit(text) if file.name == "tokenizer.json" else text)
    # A token that tokenizer_config.json names is added back by transformers.
    config = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": config["tokenizer_class"]}))
    (path / "special_tokens_map.json").unlink()
    return AutoTokenizer.from_pretrained(path)
