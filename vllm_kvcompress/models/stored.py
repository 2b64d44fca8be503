"""The fingerprint of weights as they lie on the disk: which model it is, before an engine starts."""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from vllm_kvcompress.models.checkpoint import INDEX, weight_files
from vllm_kvcompress.models.fingerprint import Fingerprint
from vllm_kvcompress.models.vq import IN_VQ
from vllm_kvcompress.models.weights import CheckpointError, Ledger


def stored_fingerprint(model: str, revision: str | None, hf_config: Any) -> str:
    """What ``model.fingerprint`` will be once the weights are loaded.

    Empty where that can't be told yet: a model that is still to be downloaded, pickled weights, which must
    not be opened before they are loaded, or files that can't be read, which is `check_files`' matter.

    Parameters
    ----------
    model : str
        A folder, or a repository's name.
    """
    folder = _folder(model, revision)
    try:
        files = [] if folder is None else list(weight_files(folder))
        if not files or not all(file.is_file() for file in files):
            return ""
        return _fingerprint(files, hf_config)
    except (CheckpointError, SafetensorError, OSError):
        return ""


def _folder(model: str, revision: str | None) -> Path | None:
    """Where the files are, if they are here."""
    if (folder := Path(model)).is_dir():
        return folder
    from huggingface_hub import snapshot_download

    try:
        kept = Path(snapshot_download(model, revision=revision, local_files_only=True))
    except Exception:  # of the hub's client, whatever it is: nothing of it is here
        return None
    # One file of several might be what an interrupted download has left.
    return kept if (kept / INDEX).is_file() or (kept / "model.safetensors").is_file() else None


def _fingerprint(files: list[Path], hf_config: Any) -> str:
    ledger, mark = Ledger(hf_config), Fingerprint()
    for file in files:
        with safe_open(file, framework="pt") as opened:  # maps the file: what is sampled is read
            for original in opened.keys():  # noqa: SIM118 - not a mapping
                tensor = opened.get_tensor(original)
                name = ledger.take(original, tuple(tensor.shape), tensor)
                if name is not None and not IN_VQ.match(name):
                    mark.add(name, tensor)
    return str(mark)
