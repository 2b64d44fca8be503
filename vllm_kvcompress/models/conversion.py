"""What every converter does: read published files without trusting them, write one folder for ``vllm serve``.

The folder appears when it is whole. What an interrupted run has finished is taken over by the next one from
the same files.
"""

import argparse
import json
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from vllm_kvcompress.models.vq import PictureDecoder
from vllm_kvcompress.models.weights import CheckpointError

WRAPPERS = ("model", "module", "state_dict", "ema")  # keys that published files have around a state dict
_MARK = "sources.json"
_CHUNK = 1 << 24  # bytes written at a time
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}
SERVED = {"llamagen", "lumina_mgpt"}  # model types that converters write


def load_state(path: Path, wrappers: tuple[str, ...] = WRAPPERS) -> dict[str, Tensor]:
    """The state dict of a pickled file: wrapped or bare, mapped from disk where the format allows.

    Raises
    ------
    CheckpointError
        One line: not there, not a checkpoint, or one that would have to run code to be read.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is not a file")
    mapped = zipfile.is_zipfile(path)  # torch's format before 1.6 can't be mapped
    if not _is_saved(path):  # a page that says "not found", a pointer of Git LFS
        raise CheckpointError(f"{path.name} is no file that torch.save wrote: download it again")
    try:
        # Training runs leave their command line's arguments in the file: a namespace of plain values.
        with torch.serialization.safe_globals([argparse.Namespace]):
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f" ({found.group(1)})" if found else ""
        raise CheckpointError(
            f"{path.name} holds more than tensors{what} and is not opened: it could run code; "
            "save its state dict alone with torch.save"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path.name} can't be read ({reason:.120}): download it again") from None
    state = _unwrapped(loaded, wrappers)
    if state is None:
        raise CheckpointError(
            f"{path.name} holds no state dict: neither bare nor under {', '.join(WRAPPERS)}"
        )
    return state


def _is_saved(path: Path) -> bool:
    """Whether a file begins as those of ``torch.save``, cut off or not; torch says if it can't be read."""
    try:
        with path.open("rb") as file:
            return file.read(2).startswith((b"PK", pickle.PROTO))
    except OSError:
        return True


def _unwrapped(loaded: Any, wrappers: tuple[str, ...]) -> dict[str, Tensor] | None:
    if not isinstance(loaded, Mapping):
        return None
    for name in wrappers:
        if isinstance(loaded.get(name), Mapping):
            loaded = loaded[name]
            break
    tensors = {n: value for n, value in loaded.items() if isinstance(value, Tensor) and isinstance(n, str)}
    return tensors if tensors and len(tensors) == len(loaded) else None


@dataclass(frozen=True)
class VQSizes:
    """What the tensors of a VQ model of Janus's kind imply."""

    codes: int
    embed: int
    z: int
    ch: int
    ch_mult: list[int]
    res_blocks: int

    @classmethod
    def of(cls, state: Mapping[str, Tensor], *, levels: str, widest_first: bool) -> "VQSizes":
        """Of the decoder's tensors.

        Parameters
        ----------
        levels : str
            The decoder's name of the blocks of level ``{}``.
        widest_first : bool
            Whether level 0 is that of the widest picture.

        Raises
        ------
        KeyError, ValueError, IndexError
            Such a decoder's tensors are not there, or of no such sizes.
        """
        before = levels.partition("{")[0]
        codebook = "quantize.embedding.weight"
        if state[codebook].ndim != 2:
            raise ValueError(f"{codebook} of two dimensions")
        codes, embed = state[codebook].shape
        z = state["post_quant_conv.weight"].shape[0]
        count = 1 + max(int(name[len(before) :].split(".")[0]) for name in state if name.startswith(before))
        widths = [state[f"{levels.format(n)}.0.conv1.weight"].shape[0] for n in range(count)]
        widths = widths if widest_first else widths[::-1]
        if not widths[0]:
            raise ValueError(f"channels in {levels.format(0 if widest_first else count - 1)}")
        block = levels.format(0)
        blocks = sum(name.startswith(f"{block}.") and name.endswith(".conv1.weight") for name in state)
        return cls(codes, embed, z, widths[0], [width // widths[0] for width in widths], blocks - 1)


def decoder_tensors(
    state: Mapping[str, Tensor], vq: PictureDecoder, prefix: str, file: str
) -> dict[str, Tensor]:
    """What of a VQ model's file the picture decoder holds, under its published names behind ``prefix``.

    Raises CheckpointError, one line, for a tensor that is unknown, missing or of a wrong shape.
    """
    try:
        used = {name: known for name, x in state.items() if (known := vq.checked_name(name, tuple(x.shape)))}
        vq.check_missing(set(used.values()))
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from None
    for name in used:
        check_values(name, state[name], file)
    return {prefix + name: state[name] for name in used}


def check_values(name: str, tensor: Tensor, file: str) -> None:
    """Raise CheckpointError, one line, for a tensor that is not written as it is: sparse, integers, fp8."""
    if tensor.dtype not in _DTYPES or tensor.layout is not torch.strided or tensor.is_meta:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
        kind: Any = tensor.dtype if tensor.layout is torch.strided else tensor.layout
        kind = "no values" if tensor.is_meta else kind
        raise CheckpointError(f"{file}: tensor {name} holds {kind}, not one of {known}")


def is_written(folder: Path, overwrite: bool) -> bool:
    """Whether a converted model is there, and to be left alone. CheckpointError for anything else there."""
    if not folder.exists() or (overwrite and _is_empty(folder)):
        return False
    if not _is_converted(folder):
        mend = ", or --overwrite, as it is empty" if _is_empty(folder) else ""
        raise CheckpointError(f"-o: {folder} exists and is no converted model: name another{mend}")
    return not overwrite


def _is_converted(folder: Path) -> bool:
    try:
        return json.loads((folder / "config.json").read_text("utf-8"))["model_type"] in SERVED
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and not any(folder.iterdir())


def _check_place(folder: Path, sources: Sequence[Path]) -> None:
    """Raise CheckpointError, one line, if what gives way to the new folder is not a converter's to remove."""
    part, old = _part(folder), _old(folder)
    for place in (folder, part, old):
        for file in sources:
            # A link as such is lost too, and a file that is reached by one.
            if place.resolve() in (*file.absolute().parents, *file.resolve().parents):
                raise CheckpointError(
                    f"-o: {file} lies in {place}, which would be removed: name another folder"
                )
    for place in (part, old):
        if place.exists() and not (_is_empty(place) or _is_converted(place) or (place / _MARK).is_file()):
            raise CheckpointError(
                f"-o: {place} is in the way and no converter's: move it, or name another folder"
            )


def _part(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.part")


def _old(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.old")


def write_folder(
    folder: Path,
    sources: Sequence[Path],
    texts: Mapping[str, Any],
    tensors: Mapping[str, Mapping[str, Tensor]],
    copies: Mapping[str, Path] | None = None,
) -> None:
    """Write ``folder``, in the place of what may be there, with a bar that counts bytes.

    Parameters
    ----------
    sources : sequence of Path
        All files that it is made of, by whose size and time a later run knows them.
    texts : mapping
        Name -> text, or what becomes JSON; ``config.json`` among them.
    tensors : mapping
        Name -> the tensors of a safetensors file.
    copies : mapping
        Name -> a file that goes in as it is: linked where the disk allows, else copied.

    Raises
    ------
    CheckpointError
        One line: the place is not a converter's, or a source lies in it.
    """
    folder = Path(os.path.abspath(folder))  # "." has no name to put another beside
    _check_place(folder, sources)
    part = _part(folder)
    stats = ((file.resolve(), file.stat()) for file in sources)
    mark = {str(n): [str(file), stat.st_size, stat.st_mtime_ns] for n, (file, stat) in enumerate(stats)}
    _continue(part, {"files": mark, "config": texts["config.json"]})
    waiting = {name: parts for name, parts in tensors.items() if not (part / name).is_file()}
    taken = {name: file for name, file in (copies or {}).items() if not (part / name).is_file()}
    total = sum(x.nbytes for parts in waiting.values() for x in parts.values())
    total += sum(file.stat().st_size for file in taken.values())
    with tqdm(desc="Converting", total=total, unit="B", unit_scale=True, leave=False) as bar:
        for name, file in taken.items():
            _take(file, part / name, bar)
        for name, parts in waiting.items():
            _write(part / name, parts, bar)
    for name, content in texts.items():
        if not isinstance(content, str):
            content = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (part / name).write_text(content, encoding="utf-8")
    _put(part, folder)


def _continue(part: Path, mark: dict[str, Any]) -> None:
    """Keep what an interrupted run from the same files has left; else begin anew."""
    path = part / _MARK
    if path.is_file() and path.read_text() == json.dumps(mark):
        return
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    path.write_text(json.dumps(mark))


def _take(source: Path, target: Path, bar: tqdm) -> None:
    """A second name of the same file; on another disk a copy."""
    source = source.resolve()  # caches of the hub hold links
    try:
        os.link(source, target)
        bar.update(source.stat().st_size)
        return
    except OSError:
        pass
    unfinished = target.with_suffix(".tmp")
    with source.open("rb") as old, unfinished.open("wb") as new:
        while piece := old.read(_CHUNK):
            new.write(piece)
            bar.update(len(piece))
    unfinished.replace(target)


def _write(path: Path, tensors: Mapping[str, Tensor], bar: tqdm) -> None:
    """A safetensors file, a piece of a tensor at a time: sources are larger than memory may be.

    Format: https://huggingface.co/docs/safetensors (header size as u64, JSON header, data).
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end],
        }  # fmt: skip
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    unfinished = path.with_suffix(".tmp")
    with unfinished.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            flat = tensor.detach().reshape(-1) if prod(tensor.shape) else tensor.new_empty(0)
            for piece in flat.split(_CHUNK // tensor.element_size()):
                file.write(piece.contiguous().view(torch.uint8).numpy().data)
                bar.update(piece.nbytes)
    unfinished.replace(path)


def _put(part: Path, folder: Path) -> None:
    """The finished folder in its place; one that was there goes only when the new one can come."""
    (part / _MARK).unlink()
    old = _old(folder)
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.replace(old)
    part.replace(folder)
    shutil.rmtree(old, ignore_errors=True)
