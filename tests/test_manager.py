"""Block managers against a model: vLLM's own pool and coordinator, requests that come and go at random."""

from math import ceil, lcm
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from vllm import SamplingParams
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request, RequestStatus

from vllm_kvcompress.cache.manager import BoundedManager
from vllm_kvcompress.cache.spec import HeadTypeSpec, longest_text
from vllm_kvcompress.policy import MAX_TYPES

IMAGE = 64
CONTEXT = 120


def spec(kind: int, page: int, capacity: int, *others: int) -> HeadTypeSpec:
    return HeadTypeSpec(
        kind=kind,
        scored=bool(kind % 2),
        block_size=page,
        num_kv_heads=4,
        head_size=8,
        dtype=torch.float32,
        page_size_padded=1 << 14,
        capacity=capacity,
        image_tokens=IMAGE,
        context=CONTEXT,
        others=tuple((slots, IMAGE // 2) for slots in others),
    )


@pytest.mark.parametrize(("limits", "prompt"), [({}, 40), ({"limits": {"prompt_tokens": 12}}, 12)])
def test_the_least_memory_is_a_picture_with_the_longest_prompt_let_in(limits: dict, prompt: int) -> None:
    """Not a text of the whole context: those that find no room are refused one by one."""
    config = SimpleNamespace(
        additional_config={"kvcompress": limits}, model_config=SimpleNamespace(max_model_len=40 + IMAGE)
    )
    least = spec(0, 5, 20).max_memory_usage_bytes(config)  # type: ignore[arg-type]
    assert least == -(-(prompt + 20) // 5) * (1 << 14)
    several = spec(0, 5, 20, 60).max_memory_usage_bytes(config)  # type: ignore[arg-type]
    longer = prompt if limits else 40 + IMAGE // 2  # before a picture of half the tokens
    most = min(longer + 60, CONTEXT)
    assert several == -(-most // 5) * (1 << 14)


def manager_of(specs: list[HeadTypeSpec], blocks: int) -> KVCacheManager:
    groups = [KVCacheGroupSpec([f"kvcompress.{n}"], one) for n, one in enumerate(specs)]
    size = lcm(*(one.block_size for one in specs))
    return KVCacheManager(
        KVCacheConfig(num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=groups),
        max_model_len=CONTEXT,
        scheduler_block_size=size,
        hash_block_size=size,
        enable_caching=False,
    )


def request_of(name: str, prompt: int) -> Request:
    return Request(name, [5] * prompt, SamplingParams(max_tokens=IMAGE), None)


def needed(specs: list[HeadTypeSpec], prompt: int, answer: int = 0, size: int | None = None) -> list[int]:
    """Blocks of each type; of a text request if there is an answer, else of a picture of a size or any."""
    kept = [max(n for n, _ in one.sizes) if size is None else one.sizes[size][0] for one in specs]
    return [ceil((prompt + (answer or n)) / one.block_size) for one, n in zip(specs, kept, strict=True)]


class Pool(RuleBasedStateMachine):
    """Admit, step, finish, abort and preempt; the machine checks who owns what after each."""

    @initialize(
        types=st.lists(
            st.tuples(st.integers(1, 16), st.integers(8, IMAGE), st.integers(4, IMAGE // 2)),
            min_size=1,
            max_size=MAX_TYPES,
        ),
        images=st.floats(1.0, 5.0),
    )
    def start(self, types: list[tuple[int, int, int]], images: float) -> None:
        self.specs = [spec(kind, *pages_slots) for kind, pages_slots in enumerate(types)]
        blocks = 1 + int(images * sum(needed(self.specs, CONTEXT - IMAGE)))  # one is vLLM's null block
        self.manager = manager_of(self.specs, blocks)
        self.start_free = self.free
        self.texts: dict[str, int] = {}
        self.sizes: dict[str, int] = {}
        for one in self.manager.coordinator.single_type_managers:
            one.texts, one.sizes = self.texts, self.sizes
        self.running: dict[str, Request] = {}
        self.held: dict[str, tuple[list[int], ...]] = {}
        self.waiting: list[Request] = []
        self.count = 0

    @property
    def free(self) -> int:
        return self.manager.block_pool.get_num_free_blocks()

    def allocate(self, request: Request, tokens: int, gate: bool = False) -> bool:
        """What the scheduler does for a request that is about to run ``tokens`` more."""
        self.manager.new_step_starts()
        got = self.manager.allocate_slots(
            request, tokens, full_sequence_must_fit=gate, has_scheduled_reqs=bool(self.running)
        )
        if got is None:
            return False
        request.num_computed_tokens += tokens
        if request.num_computed_tokens == request.num_tokens and request.num_output_tokens < IMAGE:
            request.append_output_token_ids(7)
        return True

    def admit(self, request: Request, chunk: int, gate: bool) -> None:
        before, need = self.free, sum(self.need(request))
        tokens = min(chunk, request.num_tokens)
        admitted = self.allocate(request, tokens, gate)
        assert admitted == (need <= before), "admitted exactly when the whole request fits"
        assert self.free == before - need * admitted, "all blocks at once, or none"
        if admitted:
            request.status = RequestStatus.RUNNING
            self.running[request.request_id] = request
            self.held[request.request_id] = self.manager.get_block_ids(request.request_id)
        else:
            self.waiting.append(request)

    def need(self, request: Request) -> list[int]:
        prompt, name = request.num_prompt_tokens, request.request_id
        return needed(self.specs, prompt, self.texts.get(name, prompt) - prompt, self.sizes.get(name))

    @rule(
        prompt=st.integers(1, CONTEXT - IMAGE), chunk=st.integers(1, CONTEXT), gate=st.booleans(),
        text=st.booleans(), size=st.sampled_from([None, 0, 1]),
    )  # fmt: skip
    def arrive(self, prompt: int, chunk: int, gate: bool, text: bool, size: int | None) -> None:
        self.count += 1
        request = request_of(f"r{self.count}", prompt)
        if text:
            self.texts[request.request_id] = prompt + IMAGE
        elif size is not None:
            self.sizes[request.request_id] = size
        self.admit(request, chunk, gate)

    @precondition(lambda self: self.waiting)
    @rule(chunk=st.integers(1, CONTEXT), gate=st.booleans())
    def try_again(self, chunk: int, gate: bool) -> None:
        self.admit(self.waiting.pop(0), chunk, gate)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), tokens=st.integers(1, 40))
    def step(self, data: st.DataObject, tokens: int) -> None:
        """A chunk of the prompt, or one drawn token; nothing more is ever taken."""
        request, before = self.pick(data), self.free
        assert self.allocate(request, min(tokens, request.num_tokens - request.num_computed_tokens))
        assert self.free == before

    def pick(self, data: st.DataObject) -> Request:
        return self.running[data.draw(st.sampled_from(sorted(self.running)))]

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def draw_to_the_end(self, data: st.DataObject) -> None:
        request, before = self.pick(data), self.free
        while request.num_output_tokens < IMAGE:
            assert self.allocate(request, request.num_tokens - request.num_computed_tokens)
        assert self.free == before
        self.leave(request)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.leave(self.pick(data))

    @precondition(lambda self: self.waiting)
    @rule()
    def abort_waiting(self) -> None:
        before = self.free
        self.manager.free(self.waiting.pop())
        assert self.free == before

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def free_twice(self, data: st.DataObject) -> None:
        """An abort that races with the end of a request must not give its blocks back again."""
        request = self.pick(data)
        self.leave(request)
        before = self.free
        self.manager.free(request)
        assert self.free == before

    def leave(self, request: Request) -> None:
        before = self.free
        blocks = self.held.pop(request.request_id)
        del self.running[request.request_id]
        self.manager.free(request)
        assert self.free == before + sum(map(len, blocks))

    @invariant()
    def every_block_has_one_owner(self) -> None:
        if not hasattr(self, "manager"):
            return
        pool = self.manager.block_pool
        owned = [block for groups in self.held.values() for ids in groups for block in ids]
        free = [block.block_id for block in pool.free_block_queue.get_all_free_blocks()]
        assert len(set(owned)) == len(owned), "a block has two owners"
        assert len(free) == len(set(free)) == self.free
        assert sorted(owned + free) == sorted(set(range(len(pool.blocks))) - {pool.null_block.block_id})
        assert all(pool.blocks[block].ref_cnt == 1 for block in owned)
        assert all(pool.blocks[block].ref_cnt == 0 for block in free)

    @invariant()
    def a_request_keeps_what_it_got(self) -> None:
        for name, request in getattr(self, "running", {}).items():
            assert self.manager.get_block_ids(name) == self.held[name]
            assert [len(ids) for ids in self.held[name]] == self.need(request)

    def teardown(self) -> None:
        if not hasattr(self, "manager"):
            return
        for request in [*self.running.values()]:
            self.leave(request)
        for request in self.waiting:
            self.manager.free(request)
        assert self.free == self.start_free
        for one in self.manager.coordinator.single_type_managers:
            assert isinstance(one, BoundedManager)
            assert not any(one.req_to_blocks.values())
            assert not one._prompt_tokens, "nothing is remembered of requests that left"


TestPool = Pool.TestCase
TestPool.settings = settings(
    max_examples=40,
    stateful_step_count=30,
    derandomize=True,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)

BOTH = [spec(0, 16, 24), spec(1, 5, 40)]


def test_a_full_pool_queues_and_later_serves() -> None:
    manager = manager_of(BOTH, 1 + 2 * sum(needed(BOTH, 10)))
    first, second, third = (request_of(name, 10) for name in "abc")
    for request in (first, second):
        assert manager.allocate_slots(request, 10) is not None
        request.num_computed_tokens = 10
    assert manager.block_pool.get_num_free_blocks() == 0
    assert manager.allocate_slots(third, 10, full_sequence_must_fit=True) is None
    assert manager.allocate_slots(third, 10) is None
    for _ in range(IMAGE):  # those that run need nothing from the empty pool
        first.append_output_token_ids(7)
        assert manager.allocate_slots(first, 1) is not None
        first.num_computed_tokens += 1
    manager.free(first)
    assert manager.allocate_slots(third, 10, full_sequence_must_fit=True) is not None
    assert manager.block_pool.get_num_free_blocks() == 0


def test_chunks_of_a_prompt_take_everything_with_the_first() -> None:
    manager = manager_of(BOTH, 100)
    request = request_of("a", 50)
    manager.allocate_slots(request, 3)
    taken = manager.get_block_ids("a")
    assert [len(ids) for ids in taken] == needed(BOTH, 50)
    for chunk in (20, 20, 7):
        request.num_computed_tokens += chunk
        manager.allocate_slots(request, chunk)
        assert manager.get_block_ids("a") == taken


def test_types_of_equal_pages_stay_groups_of_their_own() -> None:
    """vLLM merges specs that it takes for the same; each head type needs its own block table."""
    from vllm.v1.core.kv_cache_utils import is_kv_cache_spec_uniform
    from vllm.v1.kv_cache_interface import UniformTypeKVCacheSpecs

    specs = {f"kvcompress.{kind}": spec(kind, 8, 30) for kind in range(3)}
    assert not is_kv_cache_spec_uniform(specs)
    assert UniformTypeKVCacheSpecs.from_specs(specs) is None
    one = {"kvcompress.0": specs["kvcompress.0"]}
    assert is_kv_cache_spec_uniform(one)


@given(pages=st.lists(st.integers(1, 16), min_size=1, max_size=MAX_TYPES), blocks=st.integers(0, 400))
def test_the_longest_text_just_fits(pages: list[int], blocks: int) -> None:
    specs = [spec(kind, page, 20) for kind, page in enumerate(pages)]
    most = longest_text(specs, blocks)
    assert sum(ceil(most / page) for page in pages) <= blocks
    assert sum(ceil((most + 1) / page) for page in pages) > blocks
    if most <= CONTEXT:
        assert sum(one.blocks_for_text(most) for one in specs) <= blocks


def test_no_request_holds_more_than_the_context() -> None:
    one = spec(0, 8, 30)
    assert one.blocks_for(CONTEXT) == one.blocks_for_text(9 * CONTEXT) == CONTEXT // 8
    assert one.blocks_for(20) == ceil(50 / 8)
    assert not one.prefix_cacheable
    assert not one.uses_slot_mapping
    assert one.page_size_bytes == 1 << 14


def test_blocks_are_never_shared_between_equal_prompts() -> None:
    manager = manager_of(BOTH, 100)
    for name in "ab":
        manager.allocate_slots(request_of(name, 30), 30)
    a, b = (manager.get_block_ids(name) for name in "ab")
    assert not {x for ids in a for x in ids} & {x for ids in b for x in ids}
    assert manager.get_computed_blocks(request_of("c", 30))[1] == 0
