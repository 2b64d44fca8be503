"""Prompt ids: the published format, begin-of-sentence once, users' control tokens as plain text."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast
from vllm.tokenizers import get_tokenizer, maybe_make_thread_pool

from vllm_kvcompress.models.config import ImageModel
from vllm_kvcompress.models.prompt import image_prompt_ids, lengthened, negative_ids, resolve_special_ids
from vllm_kvcompress.models.tokenizer import BOI, BOS, PAD
from vllm_kvcompress.policy.raster import Raster
from vllm_kvcompress.testing import TINY
from vllm_kvcompress.testing.checkpoints import make_checkpoint
from vllm_kvcompress.testing.tokenizer import build_tokenizer, special_tokens


def wrapped(pro_roles: bool = True) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=build_tokenizer(TINY.text_vocab, pro_roles))


def model_of(tokenizer) -> ImageModel:
    bos, pad, boi = resolve_special_ids(tokenizer)
    return ImageModel(Raster(8, 8), TINY.text_vocab, TINY.codebook, bos=bos, pad=pad, boi=boi)


TOKENIZER = wrapped()
MODEL = model_of(TOKENIZER)


def prompt(text: str) -> list[int]:
    return image_prompt_ids(TOKENIZER, MODEL, text)


@pytest.mark.parametrize(
    "text", ["A red cat", "  padded \n", "two\n\nparagraphs: 猫, a 2nd é", "<not a token>"]
)
def test_same_ids_as_the_published_string(text):
    """Tokenized as one string, which deepseek-ai's code does."""
    published = f"<|User|>: {text.strip()}\n\n<|Assistant|>:<begin_of_image>"
    assert prompt(text) == TOKENIZER.encode(published)


def test_janus_1_3b_has_words_for_roles():
    tokenizer = wrapped(pro_roles=False)
    ids = image_prompt_ids(tokenizer, model_of(tokenizer), "A red cat")
    assert ids == tokenizer.encode("User: A red cat\n\nAssistant:<begin_of_image>")
    assert tokenizer.convert_ids_to_tokens(ids)[1] == "User"


def test_empty_text_is_published_too():
    assert prompt(" ") == TOKENIZER.encode("<|User|>:<|Assistant|>:<begin_of_image>")


@pytest.mark.parametrize("token", special_tokens(TINY.text_vocab))
@pytest.mark.parametrize("pro_roles", [True, False])
def test_control_tokens_in_the_text_are_text(token, pro_roles):
    tokenizer = wrapped(pro_roles)
    model = model_of(tokenizer)
    text = f"a{token}{token} b {token}"
    plain, spelled = (image_prompt_ids(tokenizer, model, t) for t in ("a b", text))
    control = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    assert [i for i in spelled if i in control] == [i for i in plain if i in control]
    assert text in tokenizer.decode(spelled)
    # The tokenizer itself, which other requests share, still splits them.
    assert tokenizer.encode(BOI)[-1] == model.boi


CHARACTERS = st.characters(codec="utf-8")
PIECES = st.text(CHARACTERS, max_size=8) | st.sampled_from(special_tokens(TINY.text_vocab))


@settings(max_examples=200, deadline=None)
@given(st.lists(PIECES, max_size=8).map("".join))
def test_any_text_keeps_the_frame(text):
    ids = prompt(text)
    assert (ids[0], ids.count(MODEL.bos), ids[-1], ids.count(MODEL.boi)) == (MODEL.bos, 1, MODEL.boi, 1)
    assert max(ids) < MODEL.text_vocab
    assert text.strip() in TOKENIZER.decode(ids)


def test_tokens_not_marked_special_are_control_and_letters_are_not():
    """DeepSeek's files mark few of their added tokens, and have letters among them."""
    tokenizer = wrapped()
    tokenizer.backend_tokenizer.add_tokens([AddedToken("<|System|>"), AddedToken("ö")])
    ids = image_prompt_ids(tokenizer, MODEL, "<|System|> schön")
    system, letter = tokenizer.convert_tokens_to_ids(["<|System|>", "ö"])
    assert system not in ids
    assert letter in ids


def test_vllms_tokenizer_from_many_threads(tmp_path):
    tokenizer = maybe_make_thread_pool(get_tokenizer(str(make_checkpoint(tmp_path))), copies=1)
    texts = [f"{i} {BOI} cats" for i in range(64)]
    with ThreadPoolExecutor(8) as pool:
        drawn = list(pool.map(lambda text: image_prompt_ids(tokenizer, MODEL, text), texts))
    assert drawn == [prompt(text) for text in texts]


def test_lone_surrogates_are_refused():
    with pytest.raises(ValueError, match="not valid Unicode at character 4"):
        prompt("bad \ud800")


def test_slow_tokenizers_are_refused():
    class Slow:
        def convert_tokens_to_ids(self, token):
            return None

    with pytest.raises(ValueError, match="need a fast tokenizer, got Slow"):
        image_prompt_ids(Slow(), MODEL, "a")


def test_negative_prompt_is_padded_after_bos():
    positive, negative = prompt("A red bicycle leaning on a white wall"), prompt("blurry")
    ids = negative_ids(TOKENIZER, MODEL, "blurry", len(positive))
    assert len(ids) == len(positive)
    padding = len(positive) - len(negative)
    assert ids == [MODEL.bos, *[MODEL.pad] * padding, *negative[1:]]
    assert negative_ids(TOKENIZER, MODEL, "blurry", len(negative)) == negative


def test_negative_prompt_that_does_not_fit():
    needed = len(prompt("blurry, low quality"))
    with pytest.raises(
        ValueError, match=rf"has {needed} tokens, more than the prompt's {needed - 1}:"
    ) as caught:
        negative_ids(TOKENIZER, MODEL, "blurry, low quality", needed - 1)
    assert "\n" not in str(caught.value)


def test_a_prompt_is_lengthened_where_its_unconditional_twin_is_padded():
    ids = prompt("a cat")
    assert lengthened(MODEL, ids, len(ids) + 3) == [ids[0], *[MODEL.pad] * 3, *ids[1:]]
    assert lengthened(MODEL, ids, len(ids)) == lengthened(MODEL, ids, 1) == ids


def test_special_tokens_by_name():
    assert TOKENIZER.convert_ids_to_tokens(list(resolve_special_ids(TOKENIZER))) == [BOS, PAD, BOI]
