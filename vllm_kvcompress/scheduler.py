"""vLLM's scheduler, which also says what each request held when it ended."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

from vllm.exceptions import VLLMValidationError
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.kv_cache_interface import AttentionSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from vllm_kvcompress.admission import admit_request
from vllm_kvcompress.cache.manager import BoundedManager
from vllm_kvcompress.cache.spec import HeadTypeSpec, longest_text
from vllm_kvcompress.config import parse_config
from vllm_kvcompress.log import logger_for
from vllm_kvcompress.models.registry import image_model
from vllm_kvcompress.text_room import text_room
from vllm_kvcompress.windows.places import DraftPlaces

logger = logger_for(__name__)

REPORT = "kv_cache"  # key in RequestOutput.kv_transfer_params


@dataclass(frozen=True)
class CacheReport:
    """KV memory of one picture on all ranks, counted from the blocks it held at its end.

    Parameters
    ----------
    resident_bytes : int
        Bytes of those blocks, page rounding and side state included.
    full_bytes : int
        Bytes of K and V of all its tokens, both branches.
    evicted_spatial, evicted_semantic : int
        Image tokens that a head has overwritten, of those with a ring and of those that choose; the mean
        where such heads differ in size.
    steps : int
        Steps of the engine that have given the request tokens: one each, or fewer with windows.
    tokens : int
        Tokens drawn in them.
    engine : int
        Which of the data-parallel engines drew it.
    """

    resident_bytes: int
    full_bytes: int
    evicted_spatial: int = 0
    evicted_semantic: int = 0
    steps: int = 0
    tokens: int = 0
    engine: int = 0


class ImageScheduler(AsyncScheduler):
    """Adds a ``CacheReport`` to a finished picture's outputs; schedules as vLLM does.

    It also tells the block managers where each prompt's text ends: vLLM's own call knows how long a prompt
    is, but not that a picture to continue or to score holds image tokens already. Nor does it know how long a
    text may get.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._image = image_model(self.vllm_config.model_config)
        self._limits = parse_config(self.vllm_config.additional_config).limits
        self._refused: list[Request] = []  # whose clients are yet to be told
        self._prefixes: dict[str, int] = {}
        self._sizes: dict[str, int] = {}  # of pictures
        self._texts: dict[str, int] = {}
        self._windows = DraftPlaces.of(self.vllm_config)
        self._steps: dict[str, int] = {}  # that have given a request tokens; without windows, one each
        managers = self.kv_cache_manager.coordinator.single_type_managers
        bounded = [manager for manager in managers if isinstance(manager, BoundedManager)]
        for manager in bounded:
            manager.prefixes, manager.texts, manager.sizes = self._prefixes, self._texts, self._sizes
        if bounded:
            self._measure([manager.kv_cache_spec for manager in bounded])

    def _measure(self, specs: Sequence[HeadTypeSpec]) -> None:
        """Work out the longest text that the pool holds; what vLLM has is about pictures.

        vLLM sends this number to its front ends when the engine stands: they refuse what never fits.
        """
        room = longest_text(specs, self.kv_cache_config.num_blocks - 1)  # one is vLLM's null block
        self.vllm_config.cache_config.kv_cache_size_tokens = room
        context = self.vllm_config.model_config.max_model_len
        if room < context:
            logger.info(
                "Text requests may have %d tokens, prompt and max_tokens together: the cache holds no more "
                "of the context's %d.", room, context,
            )  # fmt: skip

    def add_request(self, request: Request) -> None:
        self._prefixes[request.request_id] = prefix = self._prefix(request)
        size = self._image.size_of(request.prompt_token_ids or (), prefix)
        if size is not None:
            self._sizes[request.request_id] = size
        super().add_request(request)
        if not self._admitted(request):
            self._refused += self.finish_requests(request.request_id, RequestStatus.FINISHED_ERROR)

    def _admitted(self, request: Request) -> bool:
        """Whether a request may be drawn; front ends other than vLLM's own don't look.

        An exception would end the engine: what is refused ends in error, and the log says why.
        """
        model_config = self.vllm_config.model_config
        try:
            admit_request(
                request,
                self._image,
                model_config.max_model_len,
                room=text_room(self.vllm_config),
                limits=self._limits,
            )
        except VLLMValidationError as error:
            logger.warning("Request %s is refused: %s", request.request_id, error)
            return False
        assert request.sampling_params is not None
        request.max_tokens = request.sampling_params.max_tokens or 1
        request.skip_reading_prefix_cache = request.get_skip_reading_prefix_cache()
        if self._is_text(request):
            self._texts[request.request_id] = min(
                request.num_prompt_tokens + request.max_tokens, model_config.max_model_len
            )
        return True

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        if self._windows is None:
            return super().schedule(throttle_prefills)
        waiting = bool(self.waiting) and len(self.running) < self.max_num_running_reqs
        self._windows.reserve(self.running, self._prefixes, waiting=waiting)
        output = super().schedule(throttle_prefills)
        self._windows.scheduled(output)
        return output

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        if self._windows is not None:
            self._windows.done(scheduler_output, model_runner_output.sampled_token_ids)
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        for request in self._refused:
            of_client = outputs.setdefault(request.client_index, EngineCoreOutputs())
            of_client.outputs.append(
                EngineCoreOutput(request.request_id, [], finish_reason=request.get_finished_reason())
            )
        self._refused.clear()
        return outputs

    def _update_request_with_output(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        # Not called for what was sampled before a request lost its blocks, and is dropped.
        if self._windows is not None:
            self._steps[request.request_id] = self._steps.get(request.request_id, 0) + 1
        return super()._update_request_with_output(request, *args, **kwargs)

    def make_spec_decoding_stats(self, spec_decoding_stats: Any, *args: Any, **kwargs: Any) -> Any:
        # vLLM's have room for as many drafts as a speculative decoder announced; ours are in the reports.
        return spec_decoding_stats

    def _free_request(self, request: Request, delay_free_blocks: bool = False) -> tuple[Any, Any]:
        # Answers of chats and completions hold whatever is reported: texts are as vLLM has them.
        report = None if self._is_text(request) else {REPORT: asdict(self._report(request))}
        self._prefixes.pop(request.request_id, None)
        self._texts.pop(request.request_id, None)
        self._sizes.pop(request.request_id, None)
        self._steps.pop(request.request_id, None)
        kv_params, ec_params = super()._free_request(request, delay_free_blocks)
        return (kv_params if report is None else {**(kv_params or {}), **report}), ec_params

    def _report(self, request: Request) -> CacheReport:
        """What a picture took."""
        config = self.kv_cache_config
        blocks = self.kv_cache_manager.get_block_ids(request.request_id)
        resident = full = 0
        evicted: dict[str, list[tuple[int, int]]] = {"evicted_spatial": [], "evicted_semantic": []}
        # The last token drawn is never fed back, so it never reaches the cache.
        tokens = request.num_tokens - 1
        drawn = tokens - self._prefix(request)
        for group, ids in zip(config.kv_cache_groups, blocks, strict=True):
            spec = cast(AttentionSpec, group.kv_cache_spec)
            layers = len(group.layer_names)
            resident += len(ids) * spec.page_size_bytes * layers
            full += tokens * spec.num_kv_heads * 2 * spec.head_size * spec.dtype.itemsize * layers
            if isinstance(spec, HeadTypeSpec):
                name = "evicted_semantic" if spec.scored else "evicted_spatial"
                capacity, _ = spec.sizes[self._sizes.get(request.request_id, 0)]
                evicted[name].append((spec.num_kv_heads, max(0, drawn - capacity)))
        means = {
            name: round(sum(n * count for n, count in parts) / max(1, sum(n for n, _ in parts)))
            for name, parts in evicted.items()
        }
        parallel = self.vllm_config.parallel_config
        ranks = parallel.tensor_parallel_size  # what one holds, each holds
        return CacheReport(
            ranks * resident,
            ranks * full,
            **means,
            steps=self._steps.get(request.request_id, request.num_output_tokens),
            tokens=request.num_output_tokens,
            engine=parallel.data_parallel_index,
        )

    def _prefix(self, request: Request) -> int:
        """Tokens before the first image token."""
        return self._image.prefix_length(request.prompt_token_ids or [])

    def _is_text(self, request: Request) -> bool:
        """Whether it wants text."""
        return not self._image.is_begun(request.prompt_token_ids or [], self._prefix(request))
