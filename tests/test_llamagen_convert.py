"""``vllm-kvcompress convert``: what it writes, what it refuses, and what an interruption leaves."""

import json
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
from conversions import Converting
from dense_vq import DenseVQ
from safetensors.torch import load_file
from torch import Tensor
from transformers import JanusVQVAE
from typer.testing import CliRunner

from vllm_kvcompress.cli import app
from vllm_kvcompress.models import conversion as module
from vllm_kvcompress.models.llamagen import convert as llamagen_convert
from vllm_kvcompress.models.llamagen.config import LlamaGenConfig
from vllm_kvcompress.models.llamagen.convert import DECODER, VQ, VQ_FILE, VQ_PREFIX, convert
from vllm_kvcompress.models.vq import VQDecoder
from vllm_kvcompress.models.weights import CheckpointError
from vllm_kvcompress.policy.raster import Raster
from vllm_kvcompress.testing.llamagen import LlamaGenGeometry, decoder_state, save_wrapped, vq_state

SIZES = LlamaGenGeometry(codes=64)
STATE, VQ_STATE = decoder_state(SIZES), vq_state(SIZES)
FP8 = torch.float8_e4m3fn
Change = dict[str, Tensor | None]


class Sources(Converting):
    """A decoder's and a VQ model's file, and what is made of them."""

    def __init__(self, folder: Path) -> None:
        self.decoder, self.vq, self.out = folder / "c2i_tiny.pt", folder / VQ_FILE, folder / "served"
        self.write({}, {})

    def write(self, changes: Change, vq_changes: Change, wrapping: str = "model") -> None:
        for path, state, change in ((self.decoder, STATE, changes), (self.vq, VQ_STATE, vq_changes)):
            kept = {name: x for name, x in {**state, **change}.items() if x is not None}
            save_wrapped(path, kept, wrapping)  # type: ignore[arg-type]

    def convert(self, **more: object) -> bool:
        said: dict = {"grid": SIZES.grid, "heads": SIZES.heads, **more}
        return convert(self.decoder, self.out, **said)


@pytest.fixture
def sources(tmp_path: Path) -> Sources:
    return Sources(tmp_path)


@pytest.mark.parametrize("wrapping", ["model", "module", "state_dict", "ema", "bare"])
def test_every_tensor_arrives(sources: Sources, wrapping: str) -> None:
    """Values under the served names, wqkv in its parts; of the VQ model all but what only encodes."""
    sources.write({"freqs_cis": torch.zeros(SIZES.tokens + 1, 16, 2)}, {}, wrapping)
    assert sources.convert()
    served = load_file(sources.out / DECODER)
    for n in range(SIZES.layers):
        parts = [served.pop(f"language_model.layers.{n}.self_attn.{x}_proj.weight") for x in "qkv"]
        assert torch.equal(torch.cat(parts), STATE[f"layers.{n}.attention.wqkv.weight"])
    assert len(served) == len(STATE) - SIZES.layers
    assert torch.equal(served["gen_head.weight"], STATE["output.weight"])
    assert torch.equal(
        served["language_model.layers.1.mlp.up_proj.weight"], STATE["layers.1.feed_forward.w3.weight"]
    )
    vq = {name.removeprefix(VQ_PREFIX): x for name, x in load_file(sources.out / VQ).items()}
    left = VQ_STATE.keys() - vq.keys()
    assert all(torch.equal(x, VQ_STATE[name]) for name, x in vq.items())
    assert all(
        name.startswith(("encoder.", "quant_conv.")) or name == "quantize.codebook_used" for name in left
    )
    assert sorted(file.name for file in sources.out.iterdir()) == [
        "config.json", "generation_config.json", DECODER, "tokenizer.json", "tokenizer_config.json", VQ,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "vq_changes", "said"),
    [
        ({"layers.1.ffn_norm.weight": None}, {}, "c2i_tiny.pt lacks tensor layers.1.ffn_norm.weight"),
        ({"layers.1.ffn_norm.weight": None, "norm.weight": None}, {}, "layers.1.ffn_norm.weight and 1 more"),
        ({"output.weight": None}, {}, "c2i_tiny.pt lacks tensor output.weight"),
        ({"layers.0.attention.bias": torch.zeros(1)}, {}, "unknown tensor layers.0.attention.bias"),
        ({"extra": torch.zeros(1)}, {}, "unknown tensor extra"),
        ({"norm.weight": torch.zeros(7)}, {}, r"tensor norm.weight has shape (7,), others ask for (128,)"),
        ({"norm.weight": torch.zeros(128, dtype=torch.int64)}, {}, "tensor norm.weight holds torch.int64"),
        ({"cls_embedding.uncond_embedding": torch.zeros(1)}, {}, "text-conditional LlamaGen (t2i)"),
        ({}, {"decoder.conv_out.bias": None}, "the checkpoint lacks VQ tensor decoder.conv_out.bias"),
        ({}, {"decoder.more": torch.zeros(1)}, f"{VQ_FILE}: unknown tensor decoder.more"),
        ({}, {"post_quant_conv.weight": None}, f"{VQ_FILE} is no VQ model of LlamaGen"),
        ({}, {"quantize.embedding.weight": torch.zeros(32, 8)}, f"{VQ_FILE} has 32 codes, c2i_tiny.pt 64"),
        ({"freqs_cis": torch.zeros(26, 16, 2)}, {}, "the sources disagree, 4 by --grid, 5 by freqs_cis"),
        ({"freqs_cis": torch.zeros(12, 16, 2)}, {}, "freqs_cis has 12 rows, no class and square picture"),
        ({"tok_embeddings.weight": torch.zeros(64)}, {}, "tok_embeddings.weight has shape (64,), no matrix"),
        ({"cls_embedding.embedding_table.weight": torch.tensor(1.0)}, {}, "table.weight has shape (), no ma"),
        ({"layers.0.feed_forward.w1.weight": torch.tensor(1.0)}, {}, "w1.weight has shape (), no matrix"),
        ({"tok_embeddings.weight": torch.zeros(64, 0)}, {}, "tok_embeddings.weight has shape (64, 0), no m"),
        ({"norm.weight": torch.zeros(128, dtype=FP8)}, {}, "norm.weight holds torch.float8_e4m3fn, not one"),
        ({"norm.weight": torch.zeros(128, device="meta")}, {}, "norm.weight holds no values, not one of"),
        ({"norm.weight": torch.zeros(128).to_sparse()}, {}, "norm.weight holds torch.sparse_coo, not one of"),
        ({"layers.999999.ffn_norm.weight": torch.zeros(128)}, {}, "lacks tensor layers.2.attention.wqkv"),
        ({}, {"decoder.conv_out.bias": torch.zeros(3, dtype=FP8)}, f"{VQ_FILE}: tensor decoder.conv_out.b"),
        ({}, {"quantize.embedding.weight": torch.zeros(8)}, "no quantize.embedding.weight of two dimensions"),
        ({}, {"post_quant_conv.weight": torch.tensor(1.0)}, f"{VQ_FILE} is no VQ model of LlamaGen"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(sources: Sources, changes: Change, vq_changes: Change, said: str) -> None:
    sources.write(changes, vq_changes)
    assert said in sources.refused()


def test_a_grid_that_the_name_contradicts(sources: Sources) -> None:
    sources.decoder = sources.decoder.rename(sources.decoder.with_name("c2i_B_384.pt"))
    message = sources.refused(grid=16)
    assert "16 by --grid, 24 by the name c2i_B_384.pt" in message
    sources.convert(grid=None)
    assert json.loads((sources.out / "config.json").read_text())["grid"] == 24


def test_what_no_file_says_is_asked_for(sources: Sources) -> None:
    assert "--grid: neither the file nor its name" in sources.refused(grid=None)
    assert "--heads: the file does not say" in sources.refused(heads=None)
    sources.vq.unlink()
    assert f"--vq: {sources.vq} is not there" in sources.refused()


def test_a_file_that_would_run_code_is_not_opened(sources: Sources) -> None:
    torch.save({"model": STATE, "more": print}, sources.decoder)
    assert "is not opened: it could run code" in sources.refused()


@pytest.mark.parametrize("text", ["<html>not found</html>", "version https://git-lfs.github.com\n", ""])
def test_what_is_no_checkpoint_is_not_called_dangerous(sources: Sources, text: str) -> None:
    sources.decoder.write_text(text)
    assert sources.refused() == "c2i_tiny.pt is no file that torch.save wrote: download it again"


def test_names_that_are_no_text(sources: Sources) -> None:
    torch.save({"model": {**STATE, 1: torch.zeros(1)}}, sources.decoder)
    assert "c2i_tiny.pt holds no state dict" in sources.refused()


def test_the_dtype_is_the_weights_not_the_rope_tables(sources: Sources) -> None:
    """A stray table comes first in a state dict, and may be complex."""
    weights = {name: x.half() for name, x in STATE.items()}
    rows = SIZES.tokens + 1
    for table in (torch.zeros(rows, 16, 2), torch.zeros(rows, 16, dtype=torch.complex64)):
        save_wrapped(sources.decoder, {"freqs_cis": table, **weights})
        assert sources.convert(overwrite=True)
        assert json.loads((sources.out / "config.json").read_text())["dtype"] == "float16"


def test_the_vq_model_may_be_a_folder(sources: Sources) -> None:
    folder = sources.vq.parent / "vq"
    folder.mkdir()
    sources.vq = sources.vq.rename(folder / VQ_FILE)
    assert sources.convert(vq=folder)


def test_the_other_published_vq_model_is_warned_of(sources: Sources, monkeypatch: pytest.MonkeyPatch) -> None:
    """vq_ds8_c2i.pt has as many codes, which are others."""
    save_wrapped(sources.vq, vq_state(SIZES, multipliers=(1, 2, 2, 4)))
    said = mock.Mock()
    monkeypatch.setattr(llamagen_convert, "logger", said)
    assert sources.convert()
    template, *values = said.warning.call_args.args
    assert "draws 8 pixels a token" in (line := template % tuple(values))
    assert line.endswith("pictures are 32x32")


def test_a_truncated_download_is_one_line(sources: Sources) -> None:
    sources.decoder.write_bytes(sources.decoder.read_bytes()[:-100_000])
    assert "can't be read" in sources.refused()


def test_a_folder_that_is_there_stays_unless_told(sources: Sources) -> None:
    assert sources.convert()
    (sources.out / "note").write_text("mine")
    assert not sources.convert(), "left alone"
    assert (sources.out / "note").exists()
    sources.write({"extra": torch.zeros(1)}, {})
    with pytest.raises(CheckpointError, match="unknown tensor"):
        sources.convert(overwrite=True)
    assert (sources.out / "note").exists(), "the old one survives a failure"
    sources.write({"norm.weight": torch.full((128,), 3.0)}, {})
    assert sources.convert(overwrite=True)
    assert not (sources.out / "note").exists()
    assert load_file(sources.out / DECODER)["language_model.norm.weight"].mean() == 3
    assert {path.name for path in sources.out.parent.iterdir()} == {"c2i_tiny.pt", VQ_FILE, "served"}


def test_a_foreign_folder_is_not_written_into(sources: Sources) -> None:
    sources.out.mkdir()
    with pytest.raises(CheckpointError, match="is no converted model"):
        sources.convert()
    assert not list(sources.out.iterdir())
    (sources.out / "config.json").write_text('{"model_type": "chameleon"}')
    for overwrite in (False, True):
        with pytest.raises(CheckpointError, match="is no converted model"):
            sources.convert(overwrite=overwrite)
    (sources.out / "config.json").unlink()
    assert sources.convert(overwrite=True), "an empty one may go"


@pytest.mark.parametrize("place", ["served", "served.old", "served.part"])
def test_sources_are_not_removed(sources: Sources, place: str) -> None:
    """They lie in what the new folder replaces, or in what makes room for it."""
    sources.convert()
    folder = sources.out.with_name(place)
    folder.mkdir(exist_ok=True)
    sources.decoder = sources.decoder.rename(folder / sources.decoder.name)
    with pytest.raises(CheckpointError, match=f"{place}, which would be removed"):
        sources.convert(vq=sources.vq, overwrite=True)
    assert sources.decoder.exists()


@pytest.mark.parametrize("place", ["served.old", "served.part"])
def test_a_users_folder_is_not_removed(sources: Sources, place: str) -> None:
    folder = sources.out.with_name(place)
    folder.mkdir()
    (folder / "note").write_text("mine")
    assert f"{place} is in the way and no converter's" in sources.refused()
    assert (folder / "note").exists()


class _Interrupted(BaseException):
    """As a KeyboardInterrupt, which pytest would take for its own."""


def after(calls: int, function: Callable) -> Callable:
    """The function; interrupted when it is called once more than that."""
    left = iter(range(calls))

    def wrapped(*args: object, **more: object) -> object:
        if next(left, None) is None:
            raise _Interrupted
        return function(*args, **more)

    return wrapped


PLACES = {  # where, and which files the next run still writes
    "before the first file": (module, "_write", 0, [VQ, DECODER]),
    "within it": (module.tqdm, "update", 3, [VQ, DECODER]),
    "between the files": (module, "_write", 1, [DECODER]),
    "after config.json": (Path, "write_text", 2, []),
    "without a tokenizer": (Path, "write_text", 4, []),
    "whole, not yet in its place": (Path, "replace", 2, [VQ, DECODER]),
}


@pytest.mark.parametrize("place", PLACES)
def test_an_interrupted_run_is_finished_by_the_next(sources: Sources, place: str) -> None:
    """No folder in the place where a server would look; afterwards the files of an undisturbed run."""
    undisturbed = sources.out.with_name("undisturbed")
    convert(sources.decoder, undisturbed, grid=SIZES.grid, heads=SIZES.heads)
    owner, name, calls, left = PLACES[place]
    with mock.patch.object(owner, name, after(calls, getattr(owner, name))), pytest.raises(_Interrupted):
        sources.convert()
    assert not sources.out.exists()
    wrote: list[str] = []
    write = module._write

    def seen(path: Path, *rest: object) -> None:
        wrote.append(path.name)
        write(path, *rest)  # type: ignore[arg-type]

    with mock.patch.object(module, "_write", seen):
        assert sources.convert()
    assert wrote == left
    assert contents(sources.out) == contents(undisturbed)
    assert not list(sources.out.parent.glob("served.*"))


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_what_another_source_left_is_not_taken_over(sources: Sources) -> None:
    with mock.patch.object(module, "_put", after(0, module._put)), pytest.raises(_Interrupted):
        sources.convert()
    sources.write({"norm.weight": torch.full((128,), 3.0)}, {})
    assert sources.convert()
    assert load_file(sources.out / DECODER)["language_model.norm.weight"].mean() == 3


def test_the_vq_decoder_is_llamagens_and_transformers_janus(sources: Sources) -> None:
    """Pixels of the converted file before rounding, against both; every tensor of theirs is in the map."""
    sources.convert()
    config = LlamaGenConfig(**json.loads((sources.out / "config.json").read_text())).vq_config
    ours, theirs = VQDecoder(config, Raster(SIZES.grid, SIZES.grid), torch.float32), JanusVQVAE(config).eval()
    ours.load_weights(load_file(sources.out / VQ).items())
    theirs.load_state_dict({janus_name(n): x for n, x in VQ_STATE.items() if not n.endswith("codebook_used")})
    codes = torch.randint(0, SIZES.codes, (2, SIZES.tokens), generator=torch.Generator().manual_seed(0))
    seen: list[Tensor] = []
    ours.decoder.register_forward_hook(lambda _, __, out: seen.append(out.clone()))
    picture = ours.decode(codes)
    with torch.inference_mode():
        reference = theirs.decode(codes)
    written_out = DenseVQ(VQ_STATE).decode(codes, SIZES.grid)
    assert seen[0].shape == reference.shape == written_out.shape == (2, 3, 64, 64)
    assert (seen[0] - reference).abs().max() < 1e-4
    assert (seen[0] - written_out).abs().max() < 1e-4
    assert reference.std() > 0.1, "a picture, not a flat field"
    pixels = ((written_out + 1) / 2 * 255).clamp(0, 255).permute(0, 2, 3, 1)
    assert (picture - pixels).abs().max() < 1 + 1e-2  # truncated


def janus_name(name: str) -> str:
    """LlamaGen's name of a VQ tensor -> transformers' (its convert_janus_weights_to_hf.py)."""
    half, _, rest = name.partition(".")
    if half in ("encoder", "decoder"):
        levels = "down." if half == "encoder" else "up."
        rest = rest.replace("conv_blocks.", levels).replace(".res.", ".block.")
        for number, block in enumerate(("block_1", "attn_1", "block_2")):
            rest = rest.replace(f"mid.{number}.", f"mid.{block}.")
    return f"{half}.{rest}"


def test_the_command(sources: Sources) -> None:
    """Says what to do next; an error is one line and exit status 1."""
    said = ["convert", str(sources.decoder), "-o", str(sources.out), "--grid", "4"]
    failed = CliRunner().invoke(app, said)
    assert failed.exit_code == 1
    assert "--heads: the file does not say how many heads" in failed.output
    done = CliRunner().invoke(app, [*said, "--heads", "2"])
    assert (done.exit_code, done.stdout) == (0, f"{sources.out}: vllm serve {sources.out}\n")
    again = CliRunner().invoke(app, [*said, "--heads", "2"])
    assert "is there already: left as it is" in again.output


@pytest.mark.parametrize("source", ["missing.pt", "FoundationVision/LlamaGen"])
def test_what_is_not_there_is_said_so(source: str, tmp_path: Path) -> None:
    """A name on the hub too."""
    failed = CliRunner().invoke(app, ["convert", source, "-o", str(tmp_path / "out")])
    assert failed.exit_code == 1
    (line,) = failed.stderr.splitlines()
    assert line.startswith(f"vllm-kvcompress: {source} is not there: download it first")
    assert not (tmp_path / "out").exists()
