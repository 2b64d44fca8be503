"""How many drafts each running picture gets in a step; the scheduler's side of windows."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from vllm.v1.request import Request

from vllm_kvcompress.config import is_compressed, parse_config
from vllm_kvcompress.models.registry import image_model
from vllm_kvcompress.sampling import names_ids

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_kvcompress.models.config import ImageModel

PLACEHOLDER = -1


class DraftPlaces:
    """Reserves places for drafts behind the last tokens of pictures.

    Parameters
    ----------
    model : ImageModel
        Being served.
    window : int
        Most places of a row, its last token included.
    most_rows : int
        Pictures at once beyond which there are no drafts.
    cut : bool
        Whether a window ends with its line at the latest: victims are chosen there.
    """

    def __init__(self, model: "ImageModel", window: int, most_rows: int, *, cut: bool) -> None:
        self._model, self._window, self._most_rows, self._cut = model, window, most_rows, cut

    @classmethod
    def of(cls, vllm_config: "VllmConfig") -> "DraftPlaces | None":
        """Those of an engine; None where it draws one token a step."""
        config = parse_config(vllm_config.additional_config)
        window = 16 if config.window == "auto" else config.window
        if window == 1:
            return None
        return cls(
            image_model(vllm_config.model_config), window, config.window_rows, cut=is_compressed(vllm_config)
        )

    def reserve(self, running: Sequence[Request], prefixes: Mapping[str, int]) -> None:
        """Set ``spec_token_ids`` of every running request, before vLLM schedules the step."""
        rows = sum(request.num_output_tokens > 0 for request in running)
        room = 0 if rows > self._most_rows or any(map(_reports, running)) else self._window - 1
        for request in running:
            count = min(room, self._room(request, prefixes)) if room else 0
            request.spec_token_ids = [PLACEHOLDER] * count

    def _room(self, request: Request, prefixes: Mapping[str, int]) -> int:
        """Drafts that a request could use."""
        if request.num_tokens - request.num_computed_tokens != 1 or not request.num_output_tokens:
            return 0  # its prompt is being read
        if not _plain(request) or not self._draws(request, prefixes):
            return 0
        known = request.num_tokens - prefixes[request.request_id]
        room = self._model.raster.tokens - known - 1
        if self._cut:
            width = self._model.raster.width
            room = min(room, width - (known - 1) % width - 1)
        return room

    def _draws(self, request: Request, prefixes: Mapping[str, int]) -> bool:
        ids = request.prompt_token_ids or ()
        end = prefixes[request.request_id]
        return bool(end) and ids[end - 1] == self._model.boi


def _plain(request: Request) -> bool:
    """Whether its settings are those that every place of a window can have."""
    params = request.sampling_params
    return params is not None and not names_ids(params) and not params.min_p and not params.repetition_detection


def _reports(request: Request) -> bool:
    """Whether log-probabilities are wanted, which the runner keeps for one place a row."""
    params = request.sampling_params
    return params is not None and (params.logprobs is not None or params.prompt_logprobs is not None)
