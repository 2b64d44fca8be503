"""What the runners' samplers are told: which logits they get, without an engine."""

from importlib.metadata import EntryPoint
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.worker.gpu.sample.bad_words import BadWordsState
from vllm.v1.worker.gpu.sample.logit_bias import LogitBiasState
from vllm.v1.worker.gpu.sample.penalties import PenaltiesState
from vllm.v1.worker.gpu.sample.sampler import Sampler

from vllm_kvcompress import requests_v1
from vllm_kvcompress.models.config import ImageModel
from vllm_kvcompress.models.vllm_config import REQUEST_TRACKER
from vllm_kvcompress.policy.raster import Raster
from vllm_kvcompress.requests_v1 import RequestTracker
from vllm_kvcompress.requests_v2 import ImageSampler, JanusModelState
from vllm_kvcompress.rows import RequestRows

MODEL = ImageModel(Raster(lines=6, width=5), text_vocab=300, codes=200, bos=1, pad=2, boi=3)


class Foreign(BadWordsState):
    """Another package's, which is not what it extends."""


def made(kind: type) -> Any:
    return kind.__new__(kind)


def v2_rows(*others: type) -> RequestRows:
    """The rows, once the V2 runner has shown its sampler to the model state."""
    sampler = made(Sampler)
    sampler.return_sampling_mask, sampler.trace_replay_state = False, None
    sampler.logits_processors = [
        made(kind) for kind in (LogitBiasState, PenaltiesState, BadWordsState, *others)
    ]
    state = made(JanusModelState)
    state.rows = RequestRows(4, MODEL)
    custom = state.custom_sampler(sampler)
    assert custom is not None
    assert isinstance(custom[0], ImageSampler)  # rows that draw are sampled from the codes in any case
    return state.rows


def test_v2_logits_are_of_codes_where_all_processors_are_known() -> None:
    assert v2_rows(RequestTracker).narrow_allowed
    assert v2_rows().narrow_allowed


@pytest.mark.parametrize("others", [(RequestTracker, Foreign), (Foreign, RequestTracker), (Foreign,)])
def test_v2_logits_are_whole_where_another_package_looks_at_them(others: tuple[type, ...]) -> None:
    assert not v2_rows(*others).narrow_allowed


class Subclass(Sampler):
    """A platform's, or vLLM's for watermarks."""


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        (Sampler, {"return_sampling_mask": True}),
        (Sampler, {"trace_replay_state": object()}),
        (Subclass, {}),
    ],
    ids=["mask", "trace", "subclass"],
)
def test_v2_samplers_that_stay_as_they_are_have_no_windows(kind: type, more: dict[str, Any]) -> None:
    """vLLM's own would take one place of a row for all of them; without drafts it is right."""
    sampler, state = made(kind), made(JanusModelState)
    plain = {"return_sampling_mask": False, "trace_replay_state": None, "num_speculative_tokens": 1}
    vars(sampler).update(plain | more)
    state.rows = RequestRows(4, MODEL)
    assert state.custom_sampler(sampler) is None
    assert not state.rows.narrow_allowed
    sampler.num_speculative_tokens = 8
    with pytest.raises(ValueError, match=r"^additional_config.kvcompress.window does not work .* to 1$"):
        state.custom_sampler(sampler)


@pytest.mark.parametrize(
    ("listed", "installed", "allowed"),
    [
        ([REQUEST_TRACKER], [], True),
        ([REQUEST_TRACKER, "other:Processor"], [], False),
        ([REQUEST_TRACKER], [EntryPoint("other", "other:Processor", "vllm.logits_processors")], False),
    ],
    ids=["alone", "listed", "installed"],
)
def test_v1_logits_are_whole_where_another_package_looks_at_them(
    monkeypatch: pytest.MonkeyPatch, listed: list[str], installed: list[EntryPoint], allowed: bool
) -> None:
    def entry_points(group: str) -> list[EntryPoint]:
        return [point for point in installed if point.group == group]

    rows = RequestRows(4, MODEL)
    monkeypatch.setattr(requests_v1, "entry_points", entry_points)
    monkeypatch.setattr(requests_v1, "request_rows", lambda config: rows)
    config = SimpleNamespace(
        model_config=SimpleNamespace(logits_processors=listed),
        device_config=SimpleNamespace(device_type="cuda"),
    )
    RequestTracker(config)
    assert rows.narrow_allowed is allowed


@pytest.mark.parametrize("columns", [MODEL.codes, MODEL.vocab], ids=["narrow", "wide"])
@pytest.mark.parametrize("how", [(False,), (False, False), (True, False)], ids=["0.32", "0.33", "0.33 top-p"])
def test_top_k_beyond_the_codes_is_a_row_with_top_p_alone(
    monkeypatch: pytest.MonkeyPatch, columns: int, how: tuple[bool, ...]
) -> None:
    """vLLM 0.33 skips top-p where it reckons that no row has it without top-k: among all ids."""
    calls = []

    def sample_random(self: Sampler, logits: torch.Tensor, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append((logits.shape[1], *args))
        return torch.zeros(len(logits), dtype=torch.int64), logits

    monkeypatch.setattr(Sampler, "_sample_random", sample_random)
    sampler = made(ImageSampler)
    sampler.rows = RequestRows(2, MODEL)
    top_k, top_p, where = torch.tensor([5, 250]), torch.tensor([0.5, 0.5]), ("rows", "slots", "positions")
    sampler._sample_random(torch.zeros(2, columns), *where, top_k, top_p, *how)
    among_codes = calls.pop(0)
    assert among_codes[:4] == (MODEL.codes, *where)
    assert among_codes[4].tolist() == [5, 200]
    assert among_codes[6:] == (*([True] if len(how) > 1 else []), how[-1])
    whole = [(MODEL.vocab, *where, top_k, top_p, *how)] if columns == MODEL.vocab else []
    assert calls == whole
    sampler._sample_random(torch.zeros(2, columns), *where, None, top_p, *how)
    assert calls[-1][6:] == how
