"""Pictures of several sizes from one server, in one batch: each is what a server of its size draws."""

import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_emu3 import dense, greedy
from inprocess import KERNELS, Engine, in_process  # noqa: F401
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.forward_context import set_forward_context
from vllm.utils.math_utils import cdiv

from vllm_kvcompress.cache.kept import kept_tokens
from vllm_kvcompress.eval.likelihood import Trial, replay_batches
from vllm_kvcompress.models import profiled
from vllm_kvcompress.models.registry import family_of
from vllm_kvcompress.rows import NEGATIVE_IDS
from vllm_kvcompress.scheduler import REPORT
from vllm_kvcompress.testing.emu3 import make_emu3

SIZES = ["28x16", "12x24", "20x20"]
GRIDS = [(4, 7), (6, 3), (5, 5)]  # lines and codes a line: 32, 24 and 30 tokens
TEXTS = ["a cat", "a portrait of a girl with a very long name", "a dog", "a bird on a tree", "grass"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_emu3(tmp_path_factory.mktemp("emu3"))


def started(folder: Path, sizes: Sequence[str] = SIZES, batch: int = 256, **section: Any) -> Engine:
    config = {"kvcompress": {"window": 1, "sizes": list(sizes), **section}}
    return Engine.get(
        folder, "kvcompress", additional_config=config, max_model_len=256, max_num_batched_tokens=batch
    )


def prompt(engine: Engine, text: str, size: int) -> list[int]:
    """As the images route makes it for a size."""
    family = family_of(engine.llm.llm_engine.model_config.hf_config)
    return family.prompt_ids(engine.llm.get_tokenizer(), engine.image.of(size), text)


Asked = tuple[list[int], list[int] | None, float, int]


def asked(engine: Engine) -> list[Asked]:
    """Prompt, negative, guidance and size: every size, the negative longer, shorter, and the model's own."""
    negatives = ["lowres, bad anatomy, blurry", "blurry", None, "a cat", None]
    scales, sizes = [3.0, 2.0, 5.0, 3.0, 1.0], [1, 0, 2, 0, 1]
    return [
        (prompt(engine, text, n), None if unwanted is None else prompt(engine, unwanted, n), scale, n)
        for text, unwanted, scale, n in zip(TEXTS, negatives, scales, sizes, strict=True)
    ]


def params(negative: list[int] | None, scale: float, **more: Any) -> SamplingParams:
    extra: dict[str, Any] = {"guidance_scale": scale}
    if negative is not None:
        extra[NEGATIVE_IDS] = negative
    return SamplingParams(**{"temperature": 0.0, **more}, extra_args=extra)


def joining(engine: Engine, every: Sequence[Asked], steps: int = 3) -> list[Any]:
    """What comes of requests that join one another in mid-picture; all blocks come back."""
    done, free = {}, engine.free
    for number, (ids, negative, scale, _) in enumerate(every):
        engine.add(str(number), ids, params(negative, scale))
        done |= engine.steps(steps)
    done |= engine.steps()
    assert engine.free == free
    return [done[str(number)] for number in range(len(every))]


def tokens(outputs: Sequence[Any]) -> list[list[int]]:
    return [list(out.outputs[0].token_ids) for out in outputs]


def reference(folder: Path, engine: Engine, one: Asked) -> list[int]:
    """transformers' picture."""
    ids, negative, scale, size = one
    own = list(engine.image.of(size).negative)
    return greedy(folder, ids, own if negative is None else negative, scale, *GRIDS[size])


def test_greedy_pictures_of_all_sizes_equal_transformers(folder: Path) -> None:
    engine = started(folder, preset="full")
    every = asked(engine)
    drawn = tokens(joining(engine, every))
    assert drawn == [reference(folder, engine, one) for one in every]
    assert [len(one) for one in drawn] == [24, 32, 30, 32, 24]
    assert all(len(set(one)) > 6 for one in drawn), "pictures are not one code"


@pytest.mark.parametrize(("preset", "budget"), [("line_ar", 0.5), ("fitted", 0.5), ("decoupled", 0.6)])
@pytest.mark.parametrize("kernels", KERNELS)
def test_compressed_pictures_equal_the_reference(
    folder: Path, preset: str, budget: float, kernels: str
) -> None:
    """Every head under its own rule for the picture's size."""
    engine = started(folder, preset=preset, budget=budget, kernels=kernels, default_texts=False)
    every = [one for one in asked(engine) if one[1] is not None]
    outputs, layout = joining(engine, every), engine.model.compressed._layout
    rules = [(layout.rules, *layout.others)[size] for *_, size in every]
    wanted = [
        dense(folder, ids, negative or (), lambda n, h, mine=mine: mine[layout.types[n][h]], scale, columns)
        for (ids, negative, scale, _), mine, columns in zip(
            every, rules, (GRIDS[size][1] for *_, size in every), strict=True
        )
    ]
    assert tokens(outputs) == [drawn for drawn, _ in wanted]
    assert min(lead for _, lead in wanted) > 1e-4, "no draw was a matter of rounding"
    assert tokens(outputs) != [reference(folder, engine, one) for one in every], "what was evicted mattered"
    for out, mine, (*_, size) in zip(outputs, rules, every, strict=True):
        report, image = out.kv_transfer_params[REPORT], engine.image.rasters[size].tokens
        heads = [layout.total(kind) for kind in range(len(mine))]
        share = sum(n * rule.capacity for n, rule in zip(heads, mine, strict=True)) / sum(heads) / image
        assert share <= budget + 1e-9
        assert report["evicted_spatial"] + report["evicted_semantic"] > 0


@pytest.mark.parametrize("preset", ["line_ar", "streaming", "h2o"])
def test_a_picture_is_that_of_a_server_of_its_size_alone(folder: Path, preset: str) -> None:
    """Seeded, in windows, with prompts in chunks, beside other sizes and whole logits, all blocks lost."""
    windowed = started(folder, batch=32, preset=preset, budget=0.5, window=5)
    alone = [
        started(folder, [size], preset=preset, budget=0.5) if preset == "line_ar" else None for size in SIZES
    ]
    plain = started(folder, preset=preset, budget=0.5)
    jobs = [(prompt(plain, text, n % 3), n % 3) for n, text in enumerate(TEXTS)]
    settings = [
        params(None, 1.0 + n / 2, temperature=1.0, seed=n, top_k=(0, 40, 3)[n % 3]) for n in range(len(jobs))
    ]
    wanted = [
        (alone[size] or plain).draw([ids], setting)[0]
        for (ids, size), setting in zip(jobs, settings, strict=True)
    ]
    done, free = {}, windowed.free
    for n, (ids, _) in enumerate(jobs):
        windowed.add(f"{n}", ids, settings[n])
        done |= windowed.steps(1 + n % 3)
        if n == 2:
            wide = SamplingParams(temperature=0.0, logit_bias={plain.image.first_code + 3: 1.0})
            windowed.add("wide", jobs[1][0], wide)
    windowed.core.reset_prefix_cache(reset_running_requests=True)
    assert windowed.free == free
    done |= windowed.steps()
    assert tokens([done[f"{n}"] for n in range(len(jobs))]) == wanted
    assert len(done["wide"].outputs[0].token_ids) == 24
    assert windowed.free == free
    steps = [done[f"{n}"].kv_transfer_params[REPORT]["steps"] for n in range(len(jobs))]
    assert all(n < len(one) for n, one in zip(steps, wanted, strict=True)), "ends of lines, at least, stood"


def test_a_picture_that_was_begun_goes_on(folder: Path) -> None:
    """From any cut of any size; a code where this size's lines end is refused."""
    engine = started(folder, preset="line_ar", budget=0.5)
    for ids, negative, scale, size in asked(engine)[:3]:
        whole = engine.draw([ids], params(negative, scale))[0]
        width = engine.image.rasters[size].width
        cuts = (1, width - 1, width, 2 * width + 1)
        rest = engine.draw([[*ids, *whole[:cut]] for cut in cuts], params(negative, scale))
        assert rest == [whole[cut:] for cut in cuts]
        said = f"token {width - 1} has id .*: every {width}th token"
        with pytest.raises(VLLMValidationError, match=said):
            engine.draw([[*ids, *whole[: width - 1], whole[0]]], params(negative, scale))


def test_a_picture_takes_the_blocks_of_its_own_size(folder: Path) -> None:
    """No more, and all of them at once: nothing that is admitted waits for more."""
    engine = started(folder, preset="line_ar", budget=0.5)
    specs = [group.kv_cache_spec for group in engine.core.scheduler.kv_cache_config.kv_cache_groups]
    layout, free, taken = engine.model.compressed._layout, engine.free, 0
    for number, (ids, negative, scale, size) in enumerate(asked(engine)):
        engine.add(str(number), ids, params(negative, scale))
        engine.steps(1)
        request = engine.scheduler.requests[next(n for n in engine.scheduler.requests if n[0] == str(number))]
        rules = (layout.rules, *layout.others)[size]
        taken += sum(
            cdiv(request.num_prompt_tokens + rule.capacity, spec.block_size)
            for rule, spec in zip(rules, specs, strict=True)
        )
        assert engine.free == free - taken
    engine.steps()
    assert engine.free == free
    assert len({spec.sizes for spec in specs}) == len(specs) == len(layout.rules)
    assert all(len(spec.sizes) == len(SIZES) for spec in specs)


def test_what_is_kept_is_told_by_the_pictures_own_lines(folder: Path) -> None:
    engine = started(folder, preset="line_ar", budget=0.5)
    every = asked(engine)[:3]
    for number, (ids, negative, scale, _) in enumerate(every):
        engine.add(f"kept{number}", ids, params(negative, scale))
    engine.steps(21)
    runner = engine.core.model_executor.driver_worker.worker.model_runner
    for number, (*_, size) in enumerate(every):
        request = next(
            one for name, one in engine.scheduler.requests.items() if name.startswith(f"kept{number}")
        )
        drawn, kept = kept_tokens(runner, f"kept{number}", request.num_prompt_tokens, size) or (0, [])
        rule = engine.model.compressed.whole(0).of(size).rule
        assert drawn == 20
        assert [len(one.counts) for one in kept] == [engine.image.rasters[size].tokens]
        assert sum(kept[0].counts) == kept[0].heads * rule.capacity
        assert kept[0].counts[drawn - 1] == kept[0].heads
    engine.steps()


def test_what_is_no_prompt_of_this_server_is_refused_in_one_line(folder: Path) -> None:
    """A size that is not served, with those that are; a length or a negative prompt of another size."""
    engine, other = started(folder, preset="full"), started(folder, ["16x16"], preset="full")
    wide, high = prompt(engine, "a cat", 0), prompt(engine, "a cat", 1)
    for ids, setting, said in (
        (prompt(other, "a cat", 0), params(None, 3.0), r"does not draw: .*\(28x16\).*\(12x24\).*\(20x20\)"),
        (wide, params(None, 3.0, max_tokens=24), "max_tokens is 24, but the picture takes 32"),
        (wide, params(high, 3.0), "negative_prompt_token_ids must end in the ids"),
    ):
        with pytest.raises(VLLMValidationError, match=said) as raised:
            engine.draw([ids], setting)
        assert "\n" not in str(raised.value)
    assert len(engine.draw([high], params(None, 1.0, max_tokens=24))[0]) == 24, "and the engine goes on"


def test_an_evaluation_replays_the_default_size(folder: Path) -> None:
    """The likelihoods of drawing, whatever other sizes the server has."""
    section = {"preset": "line_ar", "budget": 0.5}
    engine = started(folder, **section)
    image = engine.image
    ids = image.aligned(prompt(engine, "a cat", 0), len(image.negative))
    [out] = engine.outputs([ids], params(None, 1.0, temperature=1.0, seed=1, logprobs=0))
    drawn = list(zip(out.outputs[0].token_ids, out.outputs[0].logprobs, strict=True))
    cells = image.raster.cells(drawn)
    wanted = -sum(step[token].logprob for token, step in cells) / len(cells)
    scenes = [(ids, [image.code(token) for token, _ in cells])]
    [(_, found)] = replay_batches(engine.llm, scenes, {"paged": Trial(section)}, 3.0, batch=1)
    assert found["paged"].nll == pytest.approx([wanted], abs=2e-5)


def test_vllm_measures_what_a_step_takes_beside_activations(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once, in the forward of a whole step without metadata: scratch, and a picture of the largest size."""
    engine = started(folder, preset="line_ar", budget=0.5, window=8)
    model, config = engine.model, engine.core.vllm_config
    scratch = model.compressed.scratch_bytes(model.image.aligns)
    seen: list[Any] = []
    empty, decode = torch.empty, model.vq.decode

    def allocated(*args: Any, **more: Any) -> torch.Tensor:
        made = empty(*args, **more)
        if made.dtype == torch.uint8 and made.numel() == scratch:
            seen.append(weakref.ref(made))
        return made

    def decoded(codes: torch.Tensor, raster: Any) -> torch.Tensor:
        assert seen[0]() is None, "given back before"
        seen.append(codes.shape)
        return decode(codes, raster)

    def attended(*args: Any) -> torch.Tensor:
        held.extend(one() is not None for one in seen[:1])
        return attend(*args)

    held: list[bool] = []
    attend = model.compressed.attend
    monkeypatch.setattr(torch, "empty", allocated)
    monkeypatch.setattr(model.vq, "decode", decoded)
    monkeypatch.setattr(model.compressed, "attend", attended)

    def run(tokens: int) -> None:
        with set_forward_context(None, config, num_tokens=tokens), torch.inference_mode():
            model(torch.zeros(tokens, dtype=torch.int64), torch.arange(tokens))

    run(256)
    assert not seen, "not on a CPU"
    monkeypatch.setattr(profiled, "MEASURED", ("cpu",))
    run(32)
    assert not seen, "a smaller step is another's"
    run(256)
    assert seen[1:] == [(1, 4 * 7)]
    assert held == [True, True], "beside both layers' activations"
    run(256)
    assert len(seen) == 2
    vectors = 8 * 2 * 2 * 2 * 2 * 16 * 4  # K and V of a window: places, branches, layers, heads, numbers
    slots = 8 * (2 * 2 * 2) * (16 + 8) * 4  # a query's probability of each, in the heads of line_ar
    assert scratch >= config.scheduler_config.max_num_seqs * (vectors + slots)
