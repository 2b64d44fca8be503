"""The VQ decoder against transformers' JanusVQVAE, from both layouts' files."""

import pytest
import torch
from parity import load_reference, pixels
from safetensors.torch import load_file

from vllm_kvcompress.models.config import raster_of
from vllm_kvcompress.models.vq import VQDecoder, vq_name
from vllm_kvcompress.policy.raster import Raster
from vllm_kvcompress.testing.checkpoints import make_checkpoint

TOKENS = 64


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # faster than two for pictures this small
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return {
        layout: make_checkpoint(tmp_path_factory.mktemp(layout), layout=layout)
        for layout in ("hf", "deepseek")
    }


@pytest.fixture(scope="module")
def reference(checkpoints):
    return load_reference(checkpoints["hf"])


@pytest.fixture(scope="module")
def codes():
    return torch.randint(0, 256, (2, TOKENS), generator=torch.Generator().manual_seed(0))


def is_vq(name: str) -> bool:
    return name.startswith(("model.vqmodel.", "gen_vision_model."))


def weights(path):
    return {name: t for name, t in load_file(path / "model.safetensors").items() if is_vq(name)}


def decoder(reference, dtype=torch.float32) -> VQDecoder:
    return VQDecoder(reference.config.vq_config, raster_of(reference.config), dtype)


@pytest.mark.parametrize("layout", ["hf", "deepseek"])
def test_equals_transformers(checkpoints, reference, codes, layout):
    vq = decoder(reference)
    loaded = vq.load_weights(weights(checkpoints[layout]).items())
    assert loaded == {name for name, _ in vq.named_parameters()}
    ours, theirs = vq.decode(codes), pixels(reference, codes)
    assert ours.shape == (2, 128, 128, 3)
    assert ours.dtype == torch.uint8
    assert (ours.int() - theirs.int()).abs().max() <= 1
    assert (ours != theirs).float().mean() < 1e-3  # where rounding straddles a truncation
    assert theirs.float().std() > 20  # a picture, not a flat field


def test_names_are_those_of_transformers(reference):
    own = {name for name, _ in decoder(reference).named_parameters()}
    theirs = {name for name, _ in reference.model.vqmodel.named_parameters()}
    assert own == {name for name in theirs if not name.startswith(("encoder.", "quant_conv."))}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.vqmodel.post_quant_conv.bias", "post_quant_conv.bias"),
        ("gen_vision_model.post_quant_conv.bias", "post_quant_conv.bias"),
        ("gen_vision_model.quant_conv.bias", None),
        ("model.vqmodel.quant_conv.weight", None),
        ("gen_vision_model.quantize.codebook_used", None),
        ("gen_vision_model.quantize.embedding.weight", "quantize.embedding.weight"),
        ("gen_vision_model.encoder.mid.0.conv1.weight", None),
        ("gen_vision_model.decoder.mid.0.conv1.weight", "decoder.mid.block_1.conv1.weight"),
        ("gen_vision_model.decoder.mid.1.q.bias", "decoder.mid.attn_1.q.bias"),
        (
            "gen_vision_model.decoder.conv_blocks.2.res.0.nin_shortcut.bias",
            "decoder.up.2.block.0.nin_shortcut.bias",
        ),
        ("gen_vision_model.decoder.conv_blocks.0.attn.2.norm.bias", "decoder.up.0.attn.2.norm.bias"),
        ("gen_vision_model.surprise", "surprise"),
    ],
)
def test_vq_name(name, expected):
    assert vq_name(name) == expected


def test_first_lines_are_what_transformers_makes_of_a_lower_grid(checkpoints, codes):
    """Partial pictures: transformers decodes any grid once its hard-wired one is replaced."""
    model = load_reference(checkpoints["hf"])
    vq = decoder(model)
    vq.load_weights(weights(checkpoints["hf"]).items())
    model.model.vqmodel.quantize.quant_state_dims = [3, 8]
    ours, theirs = vq.decode(codes[:, :24]), pixels(model, codes[:, :24])
    assert ours.shape == (2, 48, 128, 3)
    assert (ours.int() - theirs.int()).abs().max() <= 1


def test_bfloat16_is_close(checkpoints, reference, codes):
    exact, fast = decoder(reference), decoder(reference, torch.bfloat16)
    for vq in (exact, fast):
        vq.load_weights(weights(checkpoints["deepseek"]).items())
    assert fast.post_quant_conv.weight.dtype == torch.bfloat16
    assert fast.decoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    difference = (exact.decode(codes).float() - fast.decode(codes).float()).abs()
    assert 0 < difference.mean() < 3


def test_dtype_follows_the_model(reference):
    for default, expected in [(torch.float32, torch.float32), (torch.float16, torch.bfloat16)]:
        before = torch.get_default_dtype()
        torch.set_default_dtype(default)
        try:
            assert decoder(reference, None).post_quant_conv.weight.dtype == expected
        finally:
            torch.set_default_dtype(before)


def test_a_wide_grid_is_not_taken_for_a_square(reference):
    vq = VQDecoder(reference.config.vq_config, Raster(2, 5))
    assert vq.decode(torch.zeros(1, 5, dtype=torch.int64)).shape == (1, 16, 80, 3)


@pytest.mark.parametrize("shape", [(1, 7), (1, 0), (1, 72), (64,)])
def test_whole_lines_only(reference, shape):
    with pytest.raises(ValueError, match="1 to 8 whole lines of 8"):
        decoder(reference).decode(torch.zeros(shape, dtype=torch.int64))


@pytest.mark.parametrize("code", [-1, 256])
def test_codes_outside_the_codebook(reference, code):
    with pytest.raises(ValueError, match=r"must be in 0\.\.255"):
        decoder(reference).decode(torch.full((1, 8), code))


def test_every_tensor_is_accounted_for(checkpoints, reference):
    stored = weights(checkpoints["deepseek"])
    name = "gen_vision_model.decoder.conv_in.weight"
    for change, message in [
        ({name: None}, r"lacks VQ tensor decoder\.conv_in\.weight: is a shard missing"),
        (
            {name: torch.zeros(3)},
            rf"tensor {name} has shape \(3,\), but config.json asks for \(32, 32, 3, 3\)",
        ),
        ({"gen_vision_model.more": torch.zeros(1)}, r"unknown tensor gen_vision_model\.more"),
    ]:
        changed = {n: t for n, t in (stored | change).items() if t is not None}
        with pytest.raises(ValueError, match=message) as caught:
            decoder(reference).load_weights(changed.items())
        assert "\n" not in str(caught.value)
