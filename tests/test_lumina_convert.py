"""Lumina-mGPT's scattered files: what ``convert`` makes of them, what it refuses; codes to pixels."""

import json
import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from conversions import Converting
from dense_vq import DenseTaming
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner
from vllm.transformers_utils.config import get_config

from vllm_kvcompress import last_word
from vllm_kvcompress.cli import app
from vllm_kvcompress.models.conversion import _take
from vllm_kvcompress.models.lumina import convert as lumina_convert
from vllm_kvcompress.models.lumina import unconverted
from vllm_kvcompress.models.lumina.config import LuminaConfig
from vllm_kvcompress.models.lumina.convert import VQ, VQ_PREFIX, convert
from vllm_kvcompress.models.lumina.family import FAMILY
from vllm_kvcompress.models.lumina.vq import TamingDecoder
from vllm_kvcompress.models.weights import CheckpointError
from vllm_kvcompress.policy.raster import Raster
from vllm_kvcompress.testing.lumina import LuminaGeometry, decoder_state, vq_state, write_sources

SIZES = LuminaGeometry(hidden=32, layers=1, heads=2, intermediate=32, codes=40)
STATE, VQ_STATE = decoder_state(SIZES), vq_state(SIZES)
Change = dict[str, Tensor | None]


class Sources(Converting):
    """A model's folder, a VQ model's file and a tokenizer's folder; and what is made of them."""

    def __init__(self, folder: Path, geometry: LuminaGeometry = SIZES) -> None:
        self.model, self.vq, self.words = write_sources(folder, geometry)
        self.out = folder / "served"

    def configure(self, **changes: Any) -> None:
        path = self.model / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    def change(self, changes: Change) -> None:
        """Of the first weights' file."""
        path = self.model / "model-00001-of-00002.safetensors"
        state = {name: x for name, x in {**load_file(path), **changes}.items() if x is not None}
        save_file(state, path, {"format": "pt"})

    def change_vq(self, changes: Change) -> None:
        state = {name: x for name, x in {**VQ_STATE, **changes}.items() if x is not None}
        torch.save({"state_dict": state}, self.vq)

    def convert(self, **more: Any) -> bool:
        return convert(self.model, self.out, **{"vq": self.vq, "tokenizer": self.words, **more})


@pytest.fixture
def sources(tmp_path: Path) -> Sources:
    return Sources(tmp_path)


def test_every_tensor_arrives(sources: Sources) -> None:
    """The weights' files themselves, on the same disk; of the VQ model what decodes."""
    assert sources.convert()
    shards = sorted(sources.model.glob("*.safetensors"))
    assert all((sources.out / file.name).samefile(file) for file in shards)
    vq = {name.removeprefix(VQ_PREFIX): x for name, x in load_file(sources.out / VQ).items()}
    assert all(torch.equal(x, VQ_STATE[name]) for name, x in vq.items())
    left = VQ_STATE.keys() - vq.keys()
    assert left
    assert all(name.startswith(("encoder.", "quant_conv.", "loss.")) for name in left)
    assert sorted(file.name for file in sources.out.iterdir()) == [
        "config.json", "generation_config.json", *(file.name for file in shards), "tokenizer.json",
        "tokenizer_config.json", VQ,
    ]  # fmt: skip
    said = json.loads((sources.out / "generation_config.json").read_text())
    assert said == {"do_sample": True, "guidance_scale": 4.0, "top_k": 2000}
    assert not sources.convert(), "left alone"
    sources.change({"model.norm.weight": torch.full((32,), 3.0)})
    assert sources.convert(overwrite=True)


def test_the_dtype_is_the_files_where_config_json_says_none(sources: Sources) -> None:
    sources.configure(torch_dtype=None)
    for file in sources.model.glob("*.safetensors"):
        save_file({name: x.bfloat16() for name, x in load_file(file).items()}, file, {"format": "pt"})
    assert sources.convert()
    assert json.loads((sources.out / "config.json").read_text())["dtype"] == "bfloat16"


def test_on_another_disk_files_are_copied(tmp_path: Path) -> None:
    """A copy that was cut off is no file; the next one begins it anew."""
    source, target = tmp_path / "model.safetensors", tmp_path / "new.safetensors"
    source.write_bytes(os.urandom(1 << 25))
    bar = mock.Mock()
    with mock.patch("os.link", side_effect=OSError("cross-device")):
        bar.update.side_effect = [None, KeyboardInterrupt]
        with pytest.raises(KeyboardInterrupt):
            _take(source, target, bar)
        assert not target.exists()
        bar.update = mock.Mock()
        _take(source, target, bar)
    assert target.read_bytes() == source.read_bytes()
    assert target.stat().st_ino != source.stat().st_ino
    assert sum(call.args[0] for call in bar.update.call_args_list) == 1 << 25


NORM = "model.layers.0.self_attn.k_norm.weight"


@pytest.mark.parametrize(
    ("changes", "vq_changes", "said"),
    [
        ({"model.embed_tokens.weight": None}, {}, "lacks tensor language_model.embed_tokens.weight"),
        ({"extra": torch.zeros(1)}, {}, "unknown tensor extra: not part of a Lumina-mGPT checkpoint"),
        ({"model.norm.weight": torch.zeros(7)}, {}, r"tensor model.norm.weight has shape (7,)"),
        ({NORM: torch.zeros(2, 16)}, {}, "norms of queries and keys must have one shape in"),
        ({"model.vqmodel.encoder.conv_in.bias": torch.zeros(1)}, {}, "a Chameleon or an Anole, with its own"),
        ({}, {"decoder.conv_out.bias": None}, "lacks VQ tensor decoder.conv_out.bias"),
        ({}, {"decoder.up.1.attn.0.q.bias": torch.zeros(1)}, "unknown tensor decoder.up.1.attn.0.q.bias"),
        ({}, {"decoder.up.0.block.0.conv1.weight": None}, "vqgan.ckpt is no VQ model of Chameleon"),
        ({}, {"quantize.embedding.weight": torch.zeros(41, 8)}, "the tokenizer has no id for IMGIMGEAZ"),
        ({}, {"decoder.up.2.upsample.conv.weight": torch.zeros(1)}, "decoder.up.2.upsample.conv.weight has"),
        ({}, {"quantize.embedding.weight": torch.zeros(8)}, "vqgan.ckpt is no VQ model of Chameleon (vqgan"),
        ({}, {"post_quant_conv.weight": torch.zeros(1 << 17, 1)}, "vqgan.ckpt: latent_channels must be a n"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(sources: Sources, changes: Change, vq_changes: Change, said: str) -> None:
    sources.change(changes)
    sources.change_vq(vq_changes)
    assert said in sources.refused()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"swin_norm": True}, "of Chameleon's 34B kind (swin_norm), as Lumina-mGPT-34B is: not supported"),
        ({"vocab_size": 171520}, "is Lumina-mGPT-2.0, another architecture: not supported"),
        ({"model_type": "llama"}, "has model_type 'llama', where Lumina-mGPT's has chameleon"),
        ({"num_hidden_layers": "one"}, "num_hidden_layers"),
        ({"num_attention_heads": 4}, "qk_norm_shape must be [8], or [rows, 8] with a divisor of 2 rows"),
    ],
)
def test_relatives_and_wrong_configurations_are_refused(sources: Sources, changes: dict, said: str) -> None:
    sources.configure(**changes)
    assert said in sources.refused()


def test_what_is_elsewhere_is_asked_for(sources: Sources) -> None:
    assert "--vq: no vqgan.ckpt in " in sources.refused(vq=None)
    assert "--tokenizer: no tokenizer.json or text_tokenizer.json in " in sources.refused(tokenizer=None)
    empty = sources.model.parent / "empty"
    empty.mkdir()
    (empty / "config.json").write_text((sources.model / "config.json").read_text())
    with pytest.raises(CheckpointError, match="holds no safetensors files"):
        convert(empty, sources.out, vq=sources.vq, tokenizer=sources.words)
    sources.model = sources.model.rename(sources.model.with_name("lumina"))
    assert "--size: neither the option nor the folder's name" in sources.refused()
    assert "--size: 30 is no multiple of 8 pixels" in sources.refused(size=30)
    sources.convert(size=64)
    assert json.loads((sources.out / "config.json").read_text())["size"] == 64


def test_a_size_unlike_the_names_is_taken_and_said(sources: Sources, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(lumina_convert.logger, "warning", lambda text, *args: said.append(text % args))
    sources.convert(size=64)
    assert json.loads((sources.out / "config.json").read_text())["size"] == 64
    assert said == ["--size: pictures of 64 pixels, where the folder's name says 32"]


def test_the_source_is_not_written_over(sources: Sources) -> None:
    before = {file.name for file in sources.model.iterdir()}
    with pytest.raises(CheckpointError, match=r"-o: .* is the source itself"):
        convert(sources.model, sources.model, vq=sources.vq, tokenizer=sources.words, overwrite=True)
    assert {file.name for file in sources.model.iterdir()} == before


def test_the_hubs_cache_names_the_model_above_a_hash(sources: Sources) -> None:
    """Its files are links; the picture must fit the positions that config.json has."""
    hashed = sources.model.parent / "models--Alpha-VLLM--Lumina-mGPT-7B-64" / "snapshots" / "0123abcd"
    hashed.mkdir(parents=True)
    for file in sources.model.iterdir():
        (hashed / file.name).symlink_to(file)
    sources.model = hashed
    sources.configure(max_position_embeddings=64)
    sources.convert()
    config = json.loads((sources.out / "config.json").read_text())
    assert (config["size"], config["text_config"]["max_position_embeddings"]) == (64, 16 * 17 + 1024)
    assert not any(file.is_symlink() for file in sources.out.iterdir())


def test_a_tokenizer_of_another_model_is_not_taken(sources: Sources) -> None:
    path = sources.words / "tokenizer.json"
    sources.configure(vocabulary_map={"Ġa": 3})
    assert "tokenizer.json gives 'Ġa' the id" in sources.refused()
    path.write_text(path.read_text().replace("<reserved08799>", "<reserved18799>"))
    sources.configure(vocabulary_map={})
    assert "the tokenizer has no id for <reserved08799> below vocab_size" in sources.refused()
    path.write_text("{}")
    assert "tokenizer.json is no tokenizer" in sources.refused()


def test_codes_must_follow_one_another(sources: Sources) -> None:
    """In a tokenizer whose names have leading zeros, as in one whose names have none."""
    path = sources.words / "tokenizer.json"
    plain = path.read_text()
    padded = plain
    for digit in "ABCDEFGHIJ":
        padded = padded.replace(f'"IMGIMG{digit}Z"', f'"IMGIMGA{digit}Z"')
    path.write_text(padded)
    sources.configure(vocabulary_map={})
    sources.convert()
    other = (
        plain.replace('"IMGIMGHZ"', '"x"').replace('"IMGIMGIZ"', '"IMGIMGHZ"').replace('"x"', '"IMGIMGIZ"')
    )
    path.write_text(other)
    with pytest.raises(CheckpointError, match="the tokenizer gives IMGIMGHZ another id than"):
        sources.convert(overwrite=True)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"text_config": None}, "text_config must be an object: convert the checkpoint again"),
        ({"vq_config": [1]}, "vq_config must be an object"),
        ({"size": "wide"}, "size must be a number from 1 to 16384, got 'wide'"),
        (
            {"qk_norm_shape": [3, 16]},
            r"qk_norm_shape must be \[16\], or \[rows, 16\] with a divisor of 2 rows",
        ),
        ({"qk_norm_shape": None}, r"qk_norm_shape must be \[16\]"),
    ],
)
def test_a_config_that_was_changed_is_refused(sources: Sources, changes: dict, said: str) -> None:
    sources.convert()
    config = json.loads((sources.out / "config.json").read_text())
    FAMILY.check(LuminaConfig(**config))
    with pytest.raises(ValueError, match=said):
        FAMILY.check(LuminaConfig(**{**config, **changes}))


def test_a_server_of_unconverted_files_is_told(
    sources: Sources, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Configured as vLLM does it; a Chameleon, whose files hold a VQ model, is left alone."""
    last: list[str] = []
    monkeypatch.setattr(last_word, "suspect", last.append)
    monkeypatch.setattr(unconverted.logger, "propagate", False)
    monkeypatch.setattr(unconverted.logger, "handlers", [caplog.handler])

    def made() -> Any:
        config = get_config(str(sources.model), trust_remote_code=False)
        return unconverted.ChameleonArchConvertor(config, config.get_text_config()).convert()

    assert made().architectures == ["ChameleonForConditionalGeneration"]
    assert f"{sources.model} looks like a Lumina-mGPT" in last[0]
    assert caplog.messages == last
    sources.change({"model.vqmodel.quantize.embedding.weight": torch.zeros(1)})
    made()
    assert len(last) == 1
    assert unconverted.is_lumina("Alpha-VLLM/Lumina-mGPT-7B-768")
    assert not unconverted.is_lumina("facebook/chameleon-7b")


def test_the_command(sources: Sources) -> None:
    """Finds the family by the files; the VQ model may be safetensors, in a folder, of either spelling."""
    folder = sources.vq.parent / "vq"
    folder.mkdir()
    save_file({f"{VQ_PREFIX}{name}": x for name, x in VQ_STATE.items()}, folder / "model.safetensors")
    said = ["convert", str(sources.model), "-o", str(sources.out), "--vq", str(folder)]
    wrong = CliRunner().invoke(app, [*said, "--grid", "16"])
    assert (wrong.exit_code, "Invalid value for --grid" in wrong.output) == (2, True)
    failed = CliRunner().invoke(app, said)
    assert (failed.exit_code, failed.output.count("\n")) == (1, 1)
    assert "vllm-kvcompress: --tokenizer: no tokenizer.json or text_tokenizer.json" in failed.output
    done = CliRunner().invoke(app, [*said, "--tokenizer", str(sources.words / "tokenizer.json")])
    assert (done.exit_code, done.stdout) == (0, f"{sources.out}: vllm serve {sources.out}\n")
    assert torch.equal(
        load_file(sources.out / VQ)[f"{VQ_PREFIX}decoder.conv_in.weight"], VQ_STATE["decoder.conv_in.weight"]
    )
    assert "is there already: left as it is" in CliRunner().invoke(app, said).output


@pytest.mark.parametrize(("lines", "columns"), [(4, 6), (6, 2)])
def test_pixels_equal_the_reference(sources: Sources, lines: int, columns: int) -> None:
    """Before rounding, and of a picture's first lines; what is loaded is the converted file."""
    sources.convert()
    config = LuminaConfig(**json.loads((sources.out / "config.json").read_text()))
    FAMILY.check(config)
    decoder = FAMILY.decoder(config, Raster(lines, columns + 1, 4, ends=1), torch.float32)
    assert isinstance(decoder, TamingDecoder)
    decoder.load_weights(load_file(sources.out / VQ).items())
    codes = torch.randint(0, SIZES.codes, (2, lines * columns), generator=torch.Generator().manual_seed(0))
    seen: list[Tensor] = []
    decoder.decoder.register_forward_hook(lambda _, __, out: seen.append(out.clone()))
    for some in (codes, codes[:, : 2 * columns]):
        drawn = decoder.decode(some)
        reference = DenseTaming(VQ_STATE).decode(some, some.shape[1] // columns)
        assert seen[-1].shape == reference.shape == (2, 3, 4 * some.shape[1] // columns, 4 * columns)
        assert (seen[-1] - reference).abs().max() < 1e-4
        assert reference.std() > 0.1, "a picture, not a flat field"
        pixels = ((reference.clamp(-1, 1) + 1) / 2 * 255).permute(0, 2, 3, 1)
        assert (drawn - pixels).abs().max() < 1 + 1e-2  # truncated
