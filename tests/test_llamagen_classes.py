"""What a user may call a class of LlamaGen's."""

import pytest
from transformers import PreTrainedTokenizerFast

from vllm_kvcompress.models.llamagen.tokenizer import build_tokenizer, class_names, class_of


@pytest.fixture(scope="module")
def imagenet() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=build_tokenizer(class_names(1000), 4))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("golden retriever", 207), ("Golden  Retriever ", 207), ("207", 207), ("0", 0), ("999", 999),
     ("crane bird", 134), ("CRANE", 517), ("cardigan (474)", 474), ("golden_retriever", 207),
     ("golden retriever (207)", 207)],
)  # fmt: skip
def test_a_class_has_a_name_and_a_number(imagenet: PreTrainedTokenizerFast, text: str, wanted: int) -> None:
    assert class_of(imagenet, 1000, text) == wanted


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("golden retreiver", "the model has no class 'golden retreiver'"),
        ("golden retreiver", "near: golden retriever (207)"),
        ("retriever", "golden retriever (207)"),
        ("cardigan", "near: Cardigan (264), cardigan (474)"),
        ("Labrador", "near: Labrador retriever (208)"),
        ("schnauzer", "near: giant schnauzer (197), standard schnauzer (198), miniature schnauzer (196)"),
        ("cat", "near: tiger cat (282), Persian cat (283)"),
        ("tench, Tinca tinca", "near: tench (0)"),
        ("golden retriever (208)", "near: golden retriever (207)"),
        ("1000", "there is no class 1000: classes are 0 to 999"),
        ("9" * 4000, "there is no class 99999999999999999999: classes"),
        ("-1", "the model has no class '-1': say one of its 1000 classes by name or number"),
        ("x" * 4000, f"the model has no class '{'x' * 60}...'"),
        ("<no class>", "the model has no class '<no class>'"),
        ("<code 3>", "the model has no class '<code 3>'"),
    ],
)
def test_an_unknown_class_is_one_line_with_near_matches(
    imagenet: PreTrainedTokenizerFast, text: str, said: str
) -> None:
    with pytest.raises(ValueError, match="class") as caught:
        class_of(imagenet, 1000, text)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_class_is_found_by_its_own_name(imagenet: PreTrainedTokenizerFast) -> None:
    names = class_names(1000)
    assert [class_of(imagenet, 1000, name) for name in names] == list(range(1000))
    assert [imagenet.encode(name) for name in names] == [[n] for n in range(1000)]
