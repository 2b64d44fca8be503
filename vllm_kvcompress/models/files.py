"""Files that a checkpoint brings beside its weights."""

from pathlib import Path

from vllm_kvcompress.log import logger_for

logger = logger_for(__name__)


def beside_weights(model: str, revision: str | None, name: str) -> bytes | None:
    """What stands in a file of a checkpoint's folder, or of its repository; None where there is none.

    Where the hub can't be asked, that is so as well.
    """
    folder = Path(model)
    try:
        if folder.is_dir():
            path = folder / name
            return path.read_bytes() if path.is_file() else None
        from vllm.transformers_utils.repo_utils import get_hf_file_bytes

        return get_hf_file_bytes(name, model, revision)
    except Exception as error:  # of the hub's client, whatever it is: the model runs without
        logger.warning("%s of %s could not be read: %s", name, model, error)
        return None
