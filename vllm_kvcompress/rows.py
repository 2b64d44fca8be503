"""What the model must know of each request beyond its token ids, in batch order.

One request is one row of the batch. ``RequestRows`` holds the little that is known of it: the guidance scale,
the text of the unconditional branch when the user gave one, where the picture begins. vLLM tells it about
requests through a logits processor (V1 runner) or the model state (V2 runner).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.utils.torch_utils import async_tensor_h2d

from vllm_kvcompress.models.config import ImageModel
from vllm_kvcompress.models.registry import image_model
from vllm_kvcompress.sampling import names_ids
from vllm_kvcompress.windows.drawing import Drawing, Window

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.config import VllmConfig

GUIDANCE_SCALE = "guidance_scale"
NEGATIVE_IDS = "negative_prompt_token_ids"
MAX_SCALE = 100.0  # far beyond use; a bound, because an overflow in the engine would end it
NO_IMAGE = 2**30  # a prefix that no sequence reaches


@dataclass(frozen=True)
class GuidanceParams:
    """A request's guidance, from ``SamplingParams.extra_args``.

    Parameters
    ----------
    scale : float
        Guidance scale w of ``u + w * (c - u)``; 1 is the conditional branch alone.
    negative_ids : tuple of int or None
        The unconditional branch's prompt, as long as the prompt itself.
    """

    scale: float
    negative_ids: tuple[int, ...] | None = None

    @classmethod
    def read(cls, extra_args: Mapping[str, Any] | None, default_scale: float) -> "GuidanceParams":
        """Read and check ``extra_args``. Raises ValueError naming the argument."""
        args = extra_args or {}
        scale = args.get(GUIDANCE_SCALE, default_scale)
        if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 <= scale <= MAX_SCALE:
            raise ValueError(f"{GUIDANCE_SCALE} must be a number from 0 to {MAX_SCALE:g}, got {scale!r:.40}")
        negative = args.get(NEGATIVE_IDS)
        if negative is None:
            return cls(float(scale))
        if not isinstance(negative, (list, tuple)) or not all(type(i) is int for i in negative):
            raise ValueError(f"{NEGATIVE_IDS} must be a list of token ids")
        return cls(float(scale), tuple(negative))


@dataclass(frozen=True)
class RequestFacts:
    """What the model must know of a request beyond its token ids.

    Parameters
    ----------
    guidance : GuidanceParams
    prefix : int
        Tokens before the first image token; ``NO_IMAGE`` in a text request.
    names_ids : bool
        Whether sampling it takes logits of the whole vocabulary.
    drawing : Drawing or None
        The picture's tokens and noise, where the host knows them (the V1 runner).
    begins : (int, int)
        How many padding ids each branch's prompt begins with, where the model aligns them.
    size : int
        Which of the model's sizes the picture has.
    """

    guidance: GuidanceParams
    prefix: int
    names_ids: bool = False
    drawing: Drawing | None = field(default=None, compare=False)
    begins: tuple[int, int] = (0, 0)
    size: int = 0

    @property
    def is_text(self) -> bool:
        """Whether its next token is text."""
        return self.prefix == NO_IMAGE

    @classmethod
    def read(
        cls, params: "SamplingParams | None", prompt_ids: Sequence[int] | None, model: ImageModel
    ) -> "RequestFacts":
        """From what the runner is given with a new request."""
        ids = prompt_ids or ()
        end = model.prefix_length(ids)
        size = model.size_of(ids, end)
        if size is None:
            # Admission has not looked at a text request's arguments, and they mean nothing here.
            return cls(GuidanceParams(model.guidance_scale), NO_IMAGE)
        guidance = GuidanceParams.read(getattr(params, "extra_args", None), model.guidance_scale)
        begins = model.padding(ids[:end]), model.padding(guidance.negative_ids or ids[:end])
        return cls(guidance, end, names_ids(params), begins=begins, size=size)


class RequestRows:
    """Facts of the requests in the running batch, one entry a row, in batch order.

    The tensors keep their addresses from `to` on, so that a CUDA graph can read them: ``scale`` (guidance)
    is float32 and ``prefix`` int32, both ``[max_rows]`` on the model's device; ``negative`` int32
    ``[max_rows, context]`` holds the users' own unconditional prompts, of which ``negative_length`` int32
    ``[max_rows]`` says how long they are, 0 in a row without; ``is_text`` is bool ``[max_rows]``;
    ``token_rows`` is int64 ``[max_tokens]``, the row of each of the step's tokens; ``begins`` is int32
    ``[max_rows, 2]``, where each branch's prompt begins, or None where the model's are always as long as each
    other; ``size`` is int32 ``[max_rows]``, which of the model's sizes the row's picture has, or None where
    there is one.
    """

    def __init__(self, max_rows: int, model: ImageModel, context: int = 0, max_tokens: int = 0) -> None:
        self.model = model
        self.scale = torch.full((max_rows,), model.guidance_scale, dtype=torch.float32)
        self.prefix = torch.full((max_rows,), NO_IMAGE, dtype=torch.int32)
        self.negative = torch.zeros(max_rows, context, dtype=torch.int32)
        self.negative_length = torch.zeros(max_rows, dtype=torch.int32)
        self.is_text = torch.zeros(max_rows, dtype=torch.bool)
        self.token_rows = torch.zeros(max_tokens, dtype=torch.int64)
        self.begins = torch.zeros(max_rows, 2, dtype=torch.int32) if model.aligns else None
        self.size = torch.zeros(max_rows, dtype=torch.int32) if model.more_sizes else None
        self._grids = torch.tensor([[raster.width, raster.tokens] for raster in model.rasters])
        self._tokens = torch.arange(max_tokens, dtype=torch.int32)
        self.narrow_allowed = True
        self.replays = False  # whether tokens come outside steps, `token_rows` written by who feeds them
        self.places: list[int] | None = None  # this step's tokens to sample after, by row; None: one each
        self.window: Window | None = None  # their drafts (the V1 runner)
        self.shared_plan: Any = None  # where its rows start, and what the step's head types have in common
        # Of a window step that a CUDA graph may hold: each head type's plan, the rows' places and lengths.
        self.fixed: dict[int, Any] = {}
        self.window_counts = torch.zeros(max_rows, dtype=torch.int32)
        self.window_lengths = torch.zeros(max_rows, dtype=torch.int32)
        self.on_accept: Callable[[Sequence[int] | Tensor], None] | None = (
            None  # a cache that holds drafts back
        )
        self._narrow = False
        self._rows: dict[int, RequestFacts] = {}
        self._written: dict[int, tuple[int, ...]] = {}  # what `negative` holds
        self._dirty = False

    def to(self, device: torch.device | str) -> None:
        """Move the tensors to the model's device."""
        self.scale, self.prefix, self.is_text = (
            x.to(device) for x in (self.scale, self.prefix, self.is_text)
        )
        self.negative, self.negative_length = self.negative.to(device), self.negative_length.to(device)
        self.token_rows, self._tokens = self.token_rows.to(device), self._tokens.to(device)
        self.window_counts = self.window_counts.to(device)
        self.window_lengths = self.window_lengths.to(device)
        self.begins = None if self.begins is None else self.begins.to(device)
        self.size = None if self.size is None else self.size.to(device)
        self._grids = self._grids.to(device)

    def widths(self, rows: Tensor | slice) -> Tensor | int:
        """Tokens of a line in the pictures of ``rows``: int64 of each, or where there is one size of all."""
        return self.model.raster.width if self.size is None else self._grids[self.size[rows], 0]

    def totals(self, rows: Tensor | slice) -> Tensor | int:
        """Tokens of their pictures, as `widths`."""
        return self.model.raster.tokens if self.size is None else self._grids[self.size[rows], 1]

    def place_tokens(self, starts: Tensor, tokens: int | None = None) -> None:
        """Write ``token_rows``, without waiting. Once per step, before the forward.

        Parameters
        ----------
        starts : Tensor
            ``[rows + 1]`` int32: where each row's tokens start, and the end of the last's.
        tokens : int, optional
            How many of ``token_rows`` to write; None writes all. Those past the last row's end are of a row
            that is there, but mean nothing.
        """
        written = self.token_rows[:tokens]
        torch.searchsorted(starts[1:], self._tokens[:tokens], right=True, out=written)
        written.clamp_(max=len(self.scale) - 1)

    def add(self, row: int, facts: RequestFacts) -> None:
        """A request starts in ``row`` (replacing whatever was there)."""
        self._rows[row] = facts
        self._dirty = True

    def remove(self, row: int) -> None:
        """The request in ``row`` has ended."""
        self._rows.pop(row, None)

    def move(self, source: int, target: int, swap: bool) -> None:
        """The request in ``source`` is now in ``target`` (and the other way round on a swap)."""
        moved, other = self._rows.pop(source, None), self._rows.pop(target, None)
        if moved is not None:
            self._rows[target] = moved
        if swap and other is not None:
            self._rows[source] = other
        self._dirty = True

    def replace(self, rows: Mapping[int, RequestFacts]) -> None:
        """The whole batch at once, and ``flush``."""
        if rows != self._rows:
            self._rows = dict(rows)
            self._dirty = True
        self.flush()

    def flush(self) -> None:
        """Bring the tensors up to date with the rows, without waiting. Once per step, before the forward."""
        self.places = self.window = self.shared_plan = None
        rows = self._rows.values()
        self._narrow = self.narrow_allowed and bool(rows) and not any(r.is_text or r.names_ids for r in rows)
        if not self._dirty:
            return
        self._dirty = False
        count = len(self.scale)
        scale, prefix, lengths = [self.model.guidance_scale] * count, [NO_IMAGE] * count, [0] * count
        is_text, begins, size = [False] * count, [(0, 0)] * count, [0] * count
        for row, facts in self._rows.items():
            scale[row], prefix[row], is_text[row] = facts.guidance.scale, facts.prefix, facts.is_text
            begins[row], size[row] = facts.begins, facts.size
            ids = facts.guidance.negative_ids or ()
            lengths[row] = len(ids)
            if ids and self._written.get(row) != ids:
                self._written[row] = ids
                async_tensor_h2d(list(ids), out=self.negative[row, : len(ids)])
        async_tensor_h2d(scale, out=self.scale)
        async_tensor_h2d(prefix, out=self.prefix)
        async_tensor_h2d(lengths, out=self.negative_length)
        async_tensor_h2d(is_text, out=self.is_text)
        if self.begins is not None:
            async_tensor_h2d(begins, out=self.begins)
        if self.size is not None:
            async_tensor_h2d(size, out=self.size)

    def take_narrow(self) -> bool:
        """Whether image codes are all that the step flushed for can draw; asked once, for its sampling.

        Logits that anyone computes beside the steps are those of the whole vocabulary.
        """
        narrow, self._narrow = self._narrow, False
        return narrow

    def begin_window(self, counts: Sequence[int]) -> Window:
        """Drafts for this step, as many as ``counts`` says for each row (the V1 runner)."""
        drawings = self.drawings
        self.window = Window(
            [drawings[row].drafts(count) if count else () for row, count in enumerate(counts)]
        )
        self.places = self.window.counts
        return self.window

    def accept(self, standing: Sequence[int] | Tensor) -> None:
        """So many tokens that the step fed stand in each row; the cache may keep them."""
        if self.on_accept is not None:
            self.on_accept(standing)

    def take_window(self) -> Window | None:
        """This step's drafts, once."""
        window, self.window = self.window, None
        return window

    @property
    def drawings(self) -> dict[int, Drawing]:
        """The pictures being drawn, by row (the V1 runner)."""
        return {row: facts.drawing for row, facts in self._rows.items() if facts.drawing is not None}

    @property
    def text_rows(self) -> set[int]:
        """Rows of requests that want text."""
        return {row for row, facts in self._rows.items() if facts.is_text}

    def prefix_of(self, row: int) -> int:
        """What ``prefix`` holds for a row, from the host's own memory."""
        facts = self._rows.get(row)
        return NO_IMAGE if facts is None else facts.prefix

    def begins_of(self, row: int) -> tuple[int, int]:
        """What ``begins`` holds for a row, from the host's own memory."""
        facts = self._rows.get(row)
        return (0, 0) if facts is None else facts.begins

    def size_of(self, row: int) -> int:
        """What ``size`` holds for a row, from the host's own memory."""
        facts = self._rows.get(row)
        return 0 if facts is None else facts.size

    @property
    def negatives(self) -> bool:
        """Whether any row has an unconditional prompt of its own."""
        return any(facts.guidance.negative_ids for facts in self._rows.values())


_ROWS = "kvcompress.rows"


def request_rows(vllm_config: "VllmConfig") -> RequestRows:
    """The one ``RequestRows`` of an engine's worker.

    The runner makes its logits processors before the model, and neither knows the other: they meet where
    the engine's layers do, in vLLM's ``static_forward_context``.
    """
    shared: dict[str, Any] = vllm_config.compilation_config.static_forward_context
    if _ROWS not in shared:
        model, limits = vllm_config.model_config, vllm_config.scheduler_config
        shared[_ROWS] = RequestRows(
            limits.max_num_seqs, image_model(model), model.max_model_len, limits.max_num_batched_tokens
        )
    rows: RequestRows = shared[_ROWS]
    return rows
