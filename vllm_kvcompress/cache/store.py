"""The compressed cache of one engine: head types, pages, and what every decoder layer does with them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from vllm.config import CompilationMode
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

from vllm_kvcompress.attention.backend import KVCompressBackend, StepPlan
from vllm_kvcompress.attention.cpu import use_huge_pages
from vllm_kvcompress.attention.kernels import Kernels
from vllm_kvcompress.attention.layer import CACHES
from vllm_kvcompress.attention.pages import HeadType, pages_from_bytes
from vllm_kvcompress.attention.prefill import prefill
from vllm_kvcompress.attention.recorder import Recorder
from vllm_kvcompress.cache.layout import CacheLayout, at_once
from vllm_kvcompress.cache.scratch import Prompts, decode_bytes, prefill_bytes, window_bytes
from vllm_kvcompress.cache.spec import HeadTypeSpec
from vllm_kvcompress.cache.window_steps import WindowSteps
from vllm_kvcompress.config import MAX_WINDOW as LANES
from vllm_kvcompress.log import logger_for
from vllm_kvcompress.windows.settings import describe, longest, most_rows, window_config

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logger_for(__name__)


class HeadTypeCache(nn.Module, AttentionLayerBase):
    """One head type's pages, as vLLM's "attention layer" that owns a KV-cache group."""

    def __init__(self, name: str, kind: int, store: "CompressedCache", vllm_config: "VllmConfig") -> None:
        super().__init__()
        self._held = [store]  # in a list, so that nn.Module does not make it a submodule
        self.name, self.kind = name, kind
        self.kv_cache = torch.tensor([])
        vllm_config.compilation_config.static_forward_context[name] = self

    @property
    def store(self) -> "CompressedCache":
        """The cache that this is a part of."""
        return self._held[0]

    @property
    def kv_cache(self) -> Tensor:
        """The memory that vLLM has bound; an empty tensor lets go of it: so vLLM frees a trial's."""
        return self._kv_cache

    @kv_cache.setter
    def kv_cache(self, memory: Tensor) -> None:
        self._kv_cache = memory
        if not memory.numel():
            self.store.unbind(self.kind)

    def get_attn_backend(self) -> type[KVCompressBackend]:
        return KVCompressBackend

    def get_kv_cache_spec(self, vllm_config: "VllmConfig") -> HeadTypeSpec | None:
        layout = self.store.layout(vllm_config)
        if self.kind >= len(layout.rules):
            return None  # there are fewer head types than names
        rule = layout.rules[self.kind]
        return HeadTypeSpec(
            kind=self.kind,
            scored=not rule.ring,
            block_size=layout.page_tokens(self.kind),
            num_kv_heads=layout.total(self.kind),
            head_size=layout.head_size,
            dtype=layout.dtype,
            page_size_padded=layout.page_bytes,
            capacity=rule.capacity,
            image_tokens=rule.image,
            others=tuple((other.capacity, other.image) for other in layout.sized(self.kind)[1:]),
            context=vllm_config.model_config.max_model_len,
        )

    def bind_kv_cache(self, kv_cache: Tensor) -> None:
        super().bind_kv_cache(kv_cache)
        self.store.bind(self.kind, kv_cache)


class CompressedCache(nn.Module):
    """All head types' caches, and the attention of every decoder layer over them."""

    def __init__(self, vllm_config: "VllmConfig", make_layout: Any) -> None:
        super().__init__()
        self._make_layout = make_layout
        self._layout: CacheLayout | None = None
        self.kernels: Kernels | None = None  # chosen with the layout
        self._types: dict[int, list[HeadType]] = {}
        self._all_layers: dict[int, HeadType] = {}
        self._step: tuple[StepPlan, ...] = ()
        self._windows = WindowSteps(vllm_config, self._types, self._all_layers)
        self.caches = nn.ModuleList(
            HeadTypeCache(name, kind, self, vllm_config) for kind, name in enumerate(CACHES)
        )
        self._vllm_config = vllm_config
        self._compiled = vllm_config.compilation_config.mode != CompilationMode.NONE
        self._recorder: Recorder | None = None

    def layout(self, vllm_config: "VllmConfig") -> CacheLayout:
        """Decided once, when vLLM first asks for the cache's specs: weights are loaded by then."""
        if self._layout is None:
            self._layout, self.kernels = self._make_layout(vllm_config)
        return self._layout

    def bind(self, kind: int, kv_cache: Tensor) -> None:
        """The pages of a head type have been allocated."""
        layout = self._layout
        assert layout is not None
        raw = torch.as_strided(
            _bytes_of(kv_cache),
            (kv_cache.shape[0], layout.page_bytes),
            (kv_cache.stride(0) * kv_cache.element_size(), 1),
            kv_cache.storage_offset() * kv_cache.element_size(),
        )
        if raw.is_cpu:
            use_huge_pages(_bytes_of(kv_cache))
        pages = pages_from_bytes(
            raw, layout.total(kind), layout.page_tokens(kind), layout.head_size, layout.dtype,
            layout.scores(kind),
        )  # fmt: skip
        rule, sized = layout.rules[kind], layout.sized(kind)
        empty = torch.zeros(0, 0, dtype=torch.int32, device=kv_cache.device)
        every: list[int] = []
        types, first = [], 0
        for layer in range(layout.layers):
            index = layout.heads(kind, layer)
            head_index = torch.tensor(index, dtype=torch.int32, device=kv_cache.device)
            part = pages.layer(first, first + len(index))
            types.append(HeadType(part, rule, head_index, empty, sized))
            first += len(index)
            every += index
        self._types[kind] = types
        all_index = torch.tensor(every, dtype=torch.int32, device=kv_cache.device)
        self._all_layers[kind] = HeadType(pages, rule, all_index, empty, sized)
        self._step = ()
        if len(self._types) == len(layout.rules):
            self._say(kv_cache.shape[0])

    def whole(self, kind: int) -> HeadType:
        """A head type's pages of all layers."""
        return self._all_layers[kind]

    def unbind(self, kind: int) -> None:
        """Forget a head type's pages, so that their memory can go."""
        self._types.pop(kind, None)
        self._all_layers.pop(kind, None)
        self._step = ()
        self._windows.forget()

    def _say(self, blocks: int) -> None:
        """The start-up lines; not of the small cache that vLLM captures its trial graphs with.

        Its blocks are not yet those of the configuration (v1/worker/gpu/cudagraph_utils.py,
        ``_init_minimal_kv_cache_for_profiling``; v1/worker/gpu_worker.py, ``initialize_from_config``).
        """
        assert self._layout is not None
        if self._layout.summary and self._vllm_config.cache_config.num_gpu_blocks is not None:
            logger.info("%s; %s", self._layout.summary, at_once(self._layout, blocks))
            logger.info("%s", describe(self._vllm_config, self._window_bytes()))

    def _window_bytes(self) -> int:
        """Scratch of the longest window of one picture."""
        assert self._layout is not None
        places = longest(window_config(self._vllm_config))
        if self._vllm_config.device_config.device_type != "cpu":
            return window_bytes(self._layout, LANES, LANES * self._group)
        return window_bytes(self._layout, places, places)

    def scratch_bytes(self, unlike: bool) -> int:
        """What a step of as many pictures as there may be takes beside pages and activations, at most.

        Its prompts are read before pictures are drawn; a window's scratch stays until the step's end.

        Parameters
        ----------
        unlike : bool
            Whether a row's branches may begin apart.
        """
        assert self._layout is not None
        scheduler, model = self._vllm_config.scheduler_config, self._vllm_config.model_config
        assert isinstance(model.dtype, torch.dtype)
        config, pictures = window_config(self._vllm_config), scheduler.max_num_seqs
        windows = 0 if config.window == 1 else most_rows(config, self._vllm_config)
        prompts = Prompts(scheduler.max_num_batched_tokens, pictures, model.max_model_len, unlike)
        read = prefill_bytes(self._layout, self._group, model.dtype, prompts)
        drawn = pictures * decode_bytes(self._layout, self._group)
        return max(drawn, read) + windows * self._window_bytes()

    @property
    def _group(self) -> int:
        """Query heads per KV head."""
        text = self._vllm_config.model_config.hf_config.get_text_config()
        return text.num_attention_heads // text.num_key_value_heads

    def _plans(self) -> dict[int, StepPlan]:
        """This step's plans, with block tables handed to the head types once per step."""
        metadata: Any = get_forward_context().attn_metadata
        if not isinstance(metadata, dict):
            return {}
        plans: dict[int, StepPlan] = {kind: metadata[n] for kind, n in enumerate(CACHES) if n in metadata}
        step = tuple(plans.values())
        if len(step) != len(self._step) or any(a is not b for a, b in zip(step, self._step, strict=True)):
            self._step = step
            for kind, plan in plans.items():
                rows = plan.decode_rows
                table = plan.block_table if rows is None else plan.block_table[rows]
                for held in (*self._types[kind], self._all_layers[kind]):
                    held.block_table = table
            self._windows.begin(plans)
        return plans

    @property
    def is_recorded(self) -> bool:
        """Whether a recorder attends in the pages' place."""
        return self._recorder is not None

    @contextmanager
    def recording(self, recorder: Recorder) -> Iterator[None]:
        """While it lasts, ``recorder`` attends, and no page is read or written."""
        self._recorder = recorder
        try:
            yield
        finally:
            self._recorder = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int, scale: float) -> Tensor:
        """One decoder layer: write K and V, attend, add to scores; after the last layer, choose victims.

        Parameters
        ----------
        q : Tensor
            ``[tokens, 2 * Hq, D]``; k and v: ``[tokens, 2 * Hkv, D]``, keys after RoPE.

        Returns
        -------
        Tensor
            Like q.
        """
        if self._recorder is not None:
            return self._recorder.attend(q, k, v, layer, scale)
        out = torch.empty_like(q)
        plans = self._plans()
        if not plans or not self._types:
            return out.zero_()  # memory profiling: no cache yet
        kernels = self.kernels
        assert kernels is not None
        plan = next(iter(plans.values()))
        types = [t for kind in plans if len((t := self._types[kind][layer]).head_index)]
        if plan.decode_rows is None:
            tokens = len(plan.decode.length)
            kernels.decode(q[:tokens], k[:tokens], v[:tokens], types, plan.decode, scale, out[:tokens])
            out[tokens:].zero_()
        else:
            self._mixed(q, k, v, types, plans, layer, scale, out)
        if layer == self._layout.layers - 1 and len(plan.decode.length):  # type: ignore[union-attr]
            kernels.select_all([self._all_layers[kind] for kind in plans], plan.decode)
        return out

    def _mixed(
        self, q: Tensor, k: Tensor, v: Tensor, types: list[HeadType], plans: dict[int, StepPlan], layer: int,
        scale: float, out: Tensor,
    ) -> None:  # fmt: skip
        kernels = self.kernels
        assert kernels is not None
        plan = next(iter(plans.values()))
        at = plan.decode_tokens
        assert at is not None
        out.zero_()  # the batch may be filled up
        if plan.prefill is not None:
            whole = self._windows.with_tables(layer, {kind: plan.block_table for kind, plan in plans.items()})
            prefill(q, k, v, whole, plan.prefill, scale, out)
        if len(at):
            part = torch.empty_like(q[at])
            kernels.decode(q[at], k[at], v[at], types, plan.decode, scale, part)
            out[at] = part
        if plan.window is not None:
            self._windows.attend(q, k, v, layer, kernels, scale, out, self._compiled)

    def commit(self, standing: Sequence[int] | Tensor) -> None:
        """As `WindowSteps.commit`."""
        if self.kernels is not None:
            self._windows.commit(standing, self.kernels)


def _bytes_of(tensor: Tensor) -> Tensor:
    """The storage of ``tensor`` as int8, from its beginning."""
    return torch.empty(0, dtype=torch.int8, device=tensor.device).set_(tensor.untyped_storage())
