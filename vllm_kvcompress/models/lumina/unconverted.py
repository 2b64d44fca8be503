"""A Lumina-mGPT that was not converted: its files say ``chameleon``, which this package leaves to vLLM."""

from functools import cache
from pathlib import Path
from typing import Any

from vllm.transformers_utils.model_arch_config_convertor import ModelArchConfigConvertorBase

from vllm_kvcompress import last_word
from vllm_kvcompress.log import logger_for
from vllm_kvcompress.models.checkpoint import header, weight_files
from vllm_kvcompress.models.weights import CheckpointError

MODEL_TYPE = "chameleon"
HINT = (
    "%s looks like a Lumina-mGPT as it was published, without a picture decoder: to draw with it, serve "
    "what `vllm-kvcompress convert` makes of it (docs/models.md)."
)

logger = logger_for(__name__)


class ChameleonArchConvertor(ModelArchConfigConvertorBase):
    """vLLM's own, and a line in the log: vLLM ends over a norm's shape, which tells nobody what to do."""

    def __init__(self, hf_config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(hf_config, *args, **kwargs)
        model = str(getattr(hf_config, "name_or_path", ""))
        if is_lumina(model):
            _warn(model)


@cache
def _warn(model: str) -> None:
    """Once, however often vLLM looks at the configuration."""
    logger.warning(HINT, model)
    last_word.suspect(HINT % model)


def is_lumina(model: str) -> bool:
    """Whether a folder's files are a Chameleon's without its VQ model, or a name on the hub says so."""
    folder = Path(model)
    if not folder.is_dir():
        return "lumina-mgpt" in model.casefold()
    try:
        names = [name for file in weight_files(folder) for name, _ in header(file)]
    except CheckpointError:
        return False
    return bool(names) and not any(name.startswith("model.vqmodel.") for name in names)
