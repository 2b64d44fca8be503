"""Files that a checkpoint brings beside its weights."""

from contextlib import suppress
from pathlib import Path

from vllm_kvcompress.log import logger_for

logger = logger_for(__name__)


def beside_weights(model: str, revision: str | None, name: str, most: int) -> bytes | None:
    """What stands in a file of a checkpoint's folder, or of its repository; None where there is none.

    Where the hub can't be asked, that is so as well. One of more than ``most`` bytes is neither read nor
    fetched: a warning.
    """
    folder = Path(model)
    try:
        path = folder / name if folder.is_dir() else _of_hub(model, revision, name, most)
        if path is None or not path.is_file():
            return None
        _check_size(path.stat().st_size, most)
        return path.read_bytes()
    except Exception as error:  # of the hub's client, whatever it is: the model runs without
        logger.warning("%s of %s could not be read: %s", name, model, error)
        return None


def _of_hub(model: str, revision: str | None, name: str, most: int) -> Path | None:
    """A repository's file where the hub's client keeps it, fetched if need be; None where there is none."""
    from huggingface_hub import errors, get_hf_file_metadata, hf_hub_download, hf_hub_url
    from vllm.transformers_utils.repo_utils import try_get_local_file

    known = try_get_local_file(model, name, revision)
    if known is not None:  # or the client's mark of one that is not there
        return known if isinstance(known, Path) else None
    size = None
    with suppress(Exception):  # what is wrong the fetching says, or takes for no file
        size = get_hf_file_metadata(hf_hub_url(model, name, revision=revision)).size
    _check_size(size or 0, most)
    try:
        return Path(hf_hub_download(model, name, revision=revision))
    except (
        errors.EntryNotFoundError,
        errors.OfflineModeIsEnabled,
        errors.RepositoryNotFoundError,
        errors.RevisionNotFoundError,
    ):
        return None  # as vLLM takes them


def _check_size(size: int, most: int) -> None:
    if size > most:
        raise ValueError(f"it has {size} bytes; {most} at most")
