"""How many drafts each running picture gets in a step; the scheduler's side of windows."""

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.request import Request

from vllm_kvcompress.config import MAX_WINDOW, is_compressed
from vllm_kvcompress.models.registry import image_model
from vllm_kvcompress.sampling import names_ids
from vllm_kvcompress.windows.choice import WindowChoice
from vllm_kvcompress.windows.settings import window_config

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_kvcompress.models.config import ImageModel

PLACEHOLDER = -1


class DraftPlaces:
    """Reserves places for drafts behind the last tokens of pictures, and learns what they bring.

    Parameters
    ----------
    model : ImageModel
        Being served.
    choice : WindowChoice
        How many places a row gets.
    most_rows : int
        Pictures at once beyond which there are no drafts.
    cut : bool
        Whether a window ends with its line at the latest: victims are chosen there.
    uniform : bool
        All windows are equally long, and the sampler keeps to the picture's and line's end (the V2 runner:
        the host need not know where a row stands, and captured steps have one shape).
    step_tokens : int
        Of a step at most. vLLM gives them out row by row, so windows must leave the later rows theirs.
    """

    def __init__(
        self,
        model: "ImageModel",
        choice: WindowChoice,
        most_rows: int,
        *,
        cut: bool,
        uniform: bool,
        step_tokens: int,
    ) -> None:
        self._model, self._choice, self._most_rows = model, choice, most_rows
        self._cut, self._uniform, self._step_tokens = cut, uniform, step_tokens
        self._places = 1
        self._begun = self._ended = 0.0
        self._drawing = self._others = 0
        self._steps: dict[int, tuple[int, int, int, float]] = {}

    @classmethod
    def of(cls, vllm_config: "VllmConfig") -> "DraftPlaces | None":
        """Those of an engine; None where it draws one token a step."""
        config = window_config(vllm_config)
        if config.window == 1:
            return None
        choice = WindowChoice() if config.window == "auto" else WindowChoice((config.window,))
        limits = vllm_config.scheduler_config
        return cls(
            image_model(vllm_config.model_config),
            choice,
            config.window_rows,
            cut=is_compressed(vllm_config),
            uniform=vllm_config.use_v2_model_runner,
            step_tokens=limits.max_num_scheduled_tokens or limits.max_num_batched_tokens,
        )

    def reserve(self, running: Sequence[Request], prefixes: Mapping[str, int], *, waiting: bool) -> None:
        """Set ``spec_token_ids`` of every running request, before vLLM schedules the step.

        ``waiting``: whether there are requests whose prompts could be begun.
        """
        self._begun = time.perf_counter()
        rooms = [self._room(request, prefixes) for request in running]
        self._drawing = sum(room is not None for room in rooms)
        decoding = sum(map(_decodes, running))
        self._others = decoding - self._drawing
        self._places = 1
        if 0 < self._drawing <= self._most_rows:
            chosen = self._choice.choose(self._drawing, self._others)
            spare = self._step_tokens - decoding
            if waiting or decoding < len(running):
                spare //= 2  # prompts have the other half
            self._places = self._fitting(chosen, 1 + max(0, spare) // self._drawing)
        for request, room in zip(running, rooms, strict=True):
            request.spec_token_ids = [PLACEHOLDER] * min(room or 0, self._places - 1)

    def scheduled(self, output: SchedulerOutput) -> None:
        """Remember what a step is, until it is done."""
        self._steps[id(output)] = self._places, self._drawing, self._others, self._begun

    def done(self, output: SchedulerOutput, tokens: Sequence[Sequence[int]]) -> None:
        """A step has ended, with these tokens by row."""
        now = time.perf_counter()
        places, drawing, others, begun = self._steps.pop(id(output), (1, 0, 0, now))
        began, self._ended = max(begun, self._ended), now
        rows = len(output.num_scheduled_tokens)
        pure = output.total_num_scheduled_tokens == rows + sum(
            map(len, output.scheduled_spec_decode_tokens.values())
        )
        # The others are texts, and pictures that can have no drafts: one token each.
        if drawing and pure and rows == drawing + others and not output.scheduled_new_reqs and tokens:
            drawn = sum(map(len, tokens)) - others
            self._choice.learn(drawing, places, now - began, drawn / drawing, others)

    def _fitting(self, places: int, most: int) -> int:
        """The window that was chosen, or the longest that fits; of those that are compared, if one does."""
        if places <= most:
            return places
        return max((n for n in self._choice.candidates if n <= most), default=most)

    def _room(self, request: Request, prefixes: Mapping[str, int]) -> int | None:
        """Drafts that a request could use now; None if it never could, or its prompt is still being read."""
        if not _decodes(request):
            return None
        prefix = prefixes[request.request_id]
        size = self._model.size_of(request.prompt_token_ids or (), prefix) if _plain(request) else None
        if size is None:
            return None
        if self._uniform:
            return MAX_WINDOW - 1
        known = request.num_tokens - prefix
        raster = self._model.sizes[size].raster
        room = raster.tokens - known - 1
        if self._cut:
            room = min(room, raster.width - (known - 1) % raster.width - 1)
        return room


def _decodes(request: Request) -> bool:
    """Whether its prompt has been read, and the step brings it its next token."""
    coming = request.num_output_placeholders  # sampled on the device, not yet known here
    due = request.num_tokens + coming - request.num_computed_tokens
    return due == 1 and request.num_output_tokens + coming > 0


def _plain(request: Request) -> bool:
    """Whether its settings are those that every place of a window can have."""
    params = request.sampling_params
    if params is None or names_ids(params) or params.min_p:
        return False
    return params.logprobs is None  # the runner keeps them for one place a row
