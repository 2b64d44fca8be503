"""The served model end to end, in float32 on vLLM's own attention, against transformers' own Janus.

Where whole pictures prove no more than their last lines, a request's prompt already holds the rest. The
engines run in this process; test_examples has an ``LLM`` with processes of its own, and so have all servers.
"""

from pathlib import Path

import pytest
import torch
from inprocess import Engine, in_process  # noqa: F401
from parity import load_reference, pixels, transformers_greedy
from vllm import LLM, SamplingParams
from vllm.exceptions import VLLMValidationError

from vllm_kvcompress.models.prompt import image_prompt_ids, negative_ids
from vllm_kvcompress.models.registry import image_model
from vllm_kvcompress.serving.decoder import DECODE_METHOD
from vllm_kvcompress.serving.encode import Pixels
from vllm_kvcompress.serving.spare import WEIGHTS_METHOD, SpareDecoder

TEXTS = (
    "a cat",
    "A red bicycle leaning on a white wall, in the soft light of the morning.",
    "Three green apples and one blue cup on the table; a still life with strong shadows, 35 mm film, grainy.",
    "snow",
    "A city at night, seen from above",
)
GREEDY = SamplingParams(temperature=0.0)
TOKENS = 576


def start(path: Path) -> LLM:
    """As ``LLM`` is without this package's settings: windows and all."""
    settings = {"max_model_len": 1024, "max_num_batched_tokens": 1024, "kv_cache_memory_bytes": 2**29}
    return Engine.get(path, None, additional_config={}, **settings).llm


@pytest.fixture(scope="module")
def llm(checkpoints):
    return start(checkpoints["small-hf"])


@pytest.fixture(scope="module")
def original(checkpoints):
    return start(checkpoints["small-deepseek"])


@pytest.fixture(scope="module")
def model(llm):
    return image_model(llm.model_config)


@pytest.fixture(scope="module")
def prompts(llm, model):
    ids = [image_prompt_ids(llm.get_tokenizer(), model, text) for text in TEXTS]
    assert len({len(prompt) for prompt in ids}) == len(ids)
    return ids


@pytest.fixture(scope="module")
def reference(checkpoints):
    return load_reference(checkpoints["small-hf"])


@pytest.fixture(scope="module")
def greedy(checkpoints, prompts):
    """transformers' pictures of all prompts, guidance 5."""
    return transformers_greedy(checkpoints["small-hf"], prompts, batched=True)


def draw(llm, prompts, params=GREEDY):
    """Token ids of each prompt's first output."""
    requests = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
    return [out.outputs[0].token_ids for out in llm.generate(requests, params, use_tqdm=False)]


def codes(llm, ids):
    model = image_model(llm.model_config)
    return [model.code(token) for token in ids]


def guided(scale=5.0, negative=None, **fields):
    extra_args = {"guidance_scale": scale}
    if negative is not None:
        extra_args["negative_prompt_token_ids"] = negative
    return SamplingParams(**{"temperature": 0.0, **fields}, extra_args=extra_args)


def default_negative(prompt, model):
    return [prompt[0], *[model.pad] * (len(prompt) - 2), model.boi]


# ---- the same tokens, the same pixels


def test_greedy_pictures_through_continuous_batching(llm, prompts, greedy):
    """Requests join while others are in mid-picture, and leave before them."""
    engine = llm.llm_engine
    waiting, done = list(range(len(prompts))), {}
    steps = 0
    while waiting or engine.has_unfinished_requests():
        if waiting and steps % 37 == 0:
            index = waiting.pop(0)
            engine.add_request(str(index), {"prompt_token_ids": prompts[index]}, GREEDY)
        for output in engine.step():
            if output.finished:
                done[int(output.request_id)] = output.outputs[0].token_ids
        steps += 1
    drawn = [codes(llm, done[index]) for index in range(len(prompts))]
    assert [len(picture) for picture in drawn] == [TOKENS] * len(prompts)
    assert drawn == greedy
    assert all(len(set(picture)) > 50 for picture in drawn)  # pictures, not one repeated token


def test_pixels_equal_transformers(llm, reference, greedy):
    """The served decoder, in the served dtype (float32 here; bfloat16's distance is in test_vq.py)."""
    theirs = pixels(reference, torch.tensor(greedy[:2]))
    for picture, expected in zip(greedy[:2], theirs, strict=True):
        width, height, rgb = llm.collective_rpc("kvcompress_decode_image", args=(picture,))[0]
        assert (width, height) == (384, 384)
        ours = torch.frombuffer(bytearray(rgb), dtype=torch.uint8).view(height, width, 3)
        assert (ours.int() - expected.int()).abs().max() <= 1
        assert (ours != expected).float().mean() < 1e-3  # where rounding straddles a truncation
        assert expected.float().std() > 20


@pytest.mark.parametrize("layout", ["llm", "original"])
def test_a_decoder_without_its_engine_has_the_same_pixels(request, layout, model):
    """What a draining server decodes with, whole pictures and lines of them."""
    llm = request.getfixturevalue(layout)
    [weights] = llm.collective_rpc(WEIGHTS_METHOD)
    spare = SpareDecoder(llm.model_config.hf_config, weights)
    picture = torch.randint(0, model.codes, (TOKENS,), generator=torch.Generator().manual_seed(7)).tolist()
    for part in (picture, picture[: 5 * model.raster.width]):
        [[decoded]] = llm.collective_rpc(DECODE_METHOD, args=([(part, 0)],))
        assert spare.decode(part) == Pixels(*decoded)
        assert len(set(decoded[2])) > 100  # a picture, not one repeated value


def test_a_resumed_picture_goes_on_as_if_drawn_in_one_go(llm, prompts, greedy, model):
    """Many image tokens in one forward, as after a preemption."""
    whole = [model.text_vocab + code for code in greedy[1]]
    held = (1, 24, 300, 575)
    rest = draw(llm, [prompts[1] + whole[:count] for count in held])
    assert rest == [whole[count:] for count in held]


# ---- when it stops


def test_a_picture_stops_by_itself_after_the_last_token(llm, prompts, greedy, model):
    """After more tokens than the least limit here; from its beginning with the default one, as above."""
    held, left = prompts[0] + [model.text_vocab + code for code in greedy[0][:-48]], 48
    asked = [
        SamplingParams(),
        SamplingParams(max_tokens=TOKENS),
        SamplingParams(max_tokens=1000),
        SamplingParams(max_tokens=None),
        SamplingParams(stop_token_ids=list(range(model.text_vocab))),
        SamplingParams(stop=["e"], ignore_eos=False),
        SamplingParams(n=2, seed=1),
        SamplingParams(logprobs=2, min_p=0.01, repetition_penalty=1.1, presence_penalty=0.5),
        SamplingParams(logit_bias={5: 100.0, model.boi: 100.0}),
    ]
    requests = [{"prompt_token_ids": held} for _ in asked]
    results = llm.generate(requests, asked, use_tqdm=False)
    for params, result in zip(asked, results, strict=True):
        assert len(result.outputs) == params.n
        for output in result.outputs:
            assert len(output.token_ids) == left, params
            assert model.text_vocab <= min(output.token_ids), params
            assert max(output.token_ids) < model.vocab, params
            assert (output.finish_reason, output.stop_reason, output.text) == ("length", None, "")
    first, second = results[6].outputs
    assert first.token_ids != second.token_ids
    assert [p.max_tokens for p in asked[:4]] == [16, TOKENS, 1000, None]  # the caller's are not touched


# ---- guidance


@torch.no_grad()
def branch_alone(reference, prompt):
    """A greedy picture from one branch, by transformers' parts: no guidance, no second branch."""
    model = reference.model
    embeds = model.language_model.embed_tokens(torch.tensor([prompt]))
    cache, drawn = None, []
    for _ in range(TOKENS):
        out = model.language_model(inputs_embeds=embeds, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        token = model.generation_head(out.last_hidden_state[:, -1]).argmax(-1)
        drawn.append(token.item())
        embeds = model.generation_aligner(model.generation_embeddings(token))[None]
    return drawn


def test_every_request_has_its_own_guidance(llm, checkpoints, reference, prompts, greedy, model):
    """One batch: no guidance, the branches alone, two scales; each as drawn by transformers."""
    prompt = prompts[0]
    params = [GREEDY, guided(5), guided(1), guided(0), guided(2.5)]
    drawn = [codes(llm, ids) for ids in draw(llm, [prompt] * 5, params)]
    assert drawn[0] == drawn[1] == greedy[0]
    assert drawn[2] == branch_alone(reference, prompt)
    assert drawn[3] == branch_alone(reference, default_negative(prompt, model))
    assert [drawn[4]] == transformers_greedy(checkpoints["small-hf"], [prompt], guidance=2.5)
    assert len({tuple(picture) for picture in drawn}) == 4


def test_negative_prompt(llm, prompts, greedy, model):
    prompt = prompts[1]
    whole = [model.text_vocab + code for code in greedy[1]]
    held = prompt + whole[:480]
    other = negative_ids(llm.get_tokenizer(), model, "blurry", len(prompt))
    params = [guided(), guided(negative=default_negative(prompt, model)), guided(negative=other)]
    plain, default, changed = draw(llm, [held] * 3, params)
    assert plain == default == whole[480:]
    assert changed != plain
    assert changed == draw(llm, [held], guided(negative=other))[0]  # alone as in the batch


def test_the_unconditional_prompt_has_no_say_at_guidance_one(llm, prompts, greedy, model):
    """Not in the tokens, nor in a bit of their log-probabilities (drawn alone: equal shapes, equal bits)."""
    prompt = prompts[1]
    held = prompt + [model.text_vocab + code for code in greedy[1][:500]]
    tokenizer = llm.get_tokenizer()
    negatives = [None, *(negative_ids(tokenizer, model, text, len(prompt)) for text in ("blurry", "rain"))]
    first, *others = (
        llm.generate({"prompt_token_ids": held}, guided(1, negative, logprobs=20), use_tqdm=False)[0].outputs[
            0
        ]
        for negative in negatives
    )
    for other in others:
        assert other.token_ids == first.token_ids
        assert [{k: v.logprob for k, v in step.items()} for step in other.logprobs] == [
            {k: v.logprob for k, v in step.items()} for step in first.logprobs
        ]


def hidden_rows(llm, prompt, params):
    """What the model hands to ``compute_logits`` for each token: ``[tokens, 2 * hidden + 2]``."""

    def watch(worker):
        model = worker.model_runner.get_model()
        model.seen, compute = [], type(model).compute_logits

        def compute_logits(hidden):
            model.seen.append(hidden.clone())
            return compute(model, hidden)

        model.compute_logits = compute_logits

    def seen(worker):
        import torch

        model = worker.model_runner.get_model()
        del model.compute_logits
        return torch.cat(model.seen).tolist()

    llm.collective_rpc(watch)
    llm.generate({"prompt_token_ids": prompt}, params, use_tqdm=False)
    return torch.tensor(llm.collective_rpc(seen)[0])


@torch.no_grad()
def test_the_branches_never_mix(llm, reference, prompts, greedy, model):
    """Hidden rows of a whole picture at guidance 5: each branch is what transformers computes for it."""
    prompt, hidden = prompts[1], reference.config.text_config.hidden_size
    picture = [model.text_vocab + code for code in greedy[1]]
    other = negative_ids(llm.get_tokenizer(), model, "blurry", len(prompt))
    branches = {}
    for name, negative in (("default", None), ("other", other)):
        params = guided(negative=negative, prompt_logprobs=0, detokenize=False)
        rows = hidden_rows(llm, prompt + picture, params)
        assert len(rows) == len(prompt) + TOKENS
        branches[name] = rows[:, :hidden], rows[:, hidden : 2 * hidden]
    assert torch.equal(branches["default"][0], branches["other"][0])
    assert not torch.isclose(branches["default"][1], branches["other"][1]).all(-1)[len(prompt) :].any()

    parts = reference.model
    drawn = parts.generation_aligner(parts.generation_embeddings(torch.tensor([greedy[1]])))
    for ids, ours in (
        (prompt, branches["default"][0]),
        (default_negative(prompt, model), branches["default"][1]),
        (other, branches["other"][1]),
    ):
        text = parts.language_model.embed_tokens(torch.tensor([ids]))
        theirs = parts.language_model(inputs_embeds=torch.cat([text, drawn], 1)).last_hidden_state[0]
        # vLLM computes the log-probabilities of the prompt's tokens after the last row.
        last, before = ours[:1], ours[1:]
        if not torch.allclose(last, theirs[-1:], atol=1e-3):
            before, last = ours[:-1], ours[-1:]
        torch.testing.assert_close(torch.cat([before, last]), theirs, atol=1e-4, rtol=1e-4)


BAD_ARGUMENTS = (
    ("guidance_scale", "high"),
    ("guidance_scale", float("nan")),
    ("guidance_scale", -1),
    ("guidance_scale", 1e300),
    ("negative_prompt_token_ids", 7),
    ("negative_prompt_token_ids", ["x"]),
    ("negative_prompt_token_ids", [1, 2, 3]),
    ("negative_prompt_token_ids", [10**9] * 20),
)


@pytest.mark.parametrize(("name", "value"), BAD_ARGUMENTS)
def test_wrong_arguments_are_named(llm, prompts, name, value):
    with pytest.raises(VLLMValidationError, match=name) as raised:
        draw(llm, [prompts[1]], SamplingParams(extra_args={name: value}))
    assert raised.value.parameter == name
    assert "\n" not in str(raised.value)


def test_the_engine_has_survived_wrong_arguments(llm, prompts, greedy, model):
    """Also where they mean nothing: in text requests, which nobody checks."""
    for name, value in BAD_ARGUMENTS:
        params = SamplingParams(max_tokens=2, ignore_eos=True, extra_args={name: value})
        assert len(llm.generate("Hello", params, use_tqdm=False)[0].outputs[0].token_ids) == 2
    whole = [model.text_vocab + code for code in greedy[0]]
    assert draw(llm, [prompts[0] + whole[:560]]) == [whole[560:]]


# ---- seeds


SAMPLING = (
    {"seed": 1},
    {"seed": 2},
    {"seed": 1, "top_k": 20},
    {"seed": 1, "top_p": 0.8},
    {"seed": 3, "top_k": 50, "top_p": 0.9, "temperature": 0.7},
    {"seed": 4, "scale": 1.5},
    {"seed": 1},
)


def sampled(seed, scale=5.0, temperature=1.0, **fields):
    return guided(scale, seed=seed, temperature=temperature, **fields)


def test_a_seed_draws_the_same_picture_in_any_company(llm, prompts, greedy, model):
    """Its last six lines."""
    held = [
        ids + [model.text_vocab + code for code in codes[:432]]
        for ids, codes in zip(prompts, greedy, strict=True)
    ]
    params = [sampled(**fields) for fields in SAMPLING]
    crowd = draw(llm, [held[i % len(held)] for i in range(len(params) - 1)] + [held[0]], params)
    assert crowd[0] == crowd[-1]
    assert len({tuple(ids) for ids in crowd}) == len(crowd) - 1
    for index in (0, 2, 3, 4):
        alone = draw(llm, [held[index]], params[index])[0]
        assert alone == crowd[index], SAMPLING[index]


def test_pictures_without_a_seed_differ(llm, prompts, greedy, model):
    held = prompts[0] + [model.text_vocab + code for code in greedy[0][:552]]
    first, second = draw(llm, [held, held], SamplingParams())
    assert first != second


def test_top_k_keeps_to_the_likeliest_codes(llm, prompts, greedy, model):
    """Of the guided distribution: at k = 1 that is the greedy picture."""
    held = prompts[2] + [model.text_vocab + code for code in greedy[2][:540]]
    assert codes(llm, draw(llm, [held], SamplingParams(top_k=1))[0]) == greedy[2][540:]


# ---- text


@torch.no_grad()
def text_alone(reference, ids, count, forbidden):
    """Greedy text by transformers' language model and ``lm_head``."""
    ids = list(ids)
    for _ in range(count):
        hidden = reference.model.language_model(torch.tensor([ids])).last_hidden_state[:, -1]
        logits = reference.lm_head(hidden)[0]
        logits[forbidden] = -torch.inf
        ids.append(int(logits.argmax()))
    return ids[-count:]


@pytest.mark.parametrize("layout", ["llm", "original"])
def test_text_beside_pictures(request, layout, reference, prompts, greedy, model):
    """Text and pictures in one batch; transformers' text, transformers' picture."""
    engine = request.getfixturevalue(layout)
    tokenizer = engine.get_tokenizer()
    asked = [tokenizer.encode(text) for text in ("Hello, what is", "The portrait of an old sailor with")]
    count = 24
    whole = [model.text_vocab + code for code in greedy[0]]
    params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)
    drawn = draw(engine, [asked[0], prompts[0] + whole[:530], asked[1]], [params, GREEDY, params])
    assert drawn[1] == whole[530:]
    for ids, answer in zip(asked, (drawn[0], drawn[2]), strict=True):
        assert answer == text_alone(reference, ids, count, model.boi)


@pytest.mark.parametrize("layout", ["llm", "original"])
def test_chat_answers_with_text(request, layout, model):
    engine = request.getfixturevalue(layout)
    params = SamplingParams(temperature=2.0, seed=0, max_tokens=300, ignore_eos=True, n=4)
    messages = [{"role": "user", "content": "Say <begin_of_image> and draw a cat"}]
    (answer,) = engine.chat(messages, params, use_tqdm=False)
    tokenizer = engine.get_tokenizer()
    if layout == "original":  # the package's own template; the other layout brings one
        assert answer.prompt_token_ids[0] == model.bos
        assert model.bos not in answer.prompt_token_ids[1:]
    asked = tokenizer.decode(answer.prompt_token_ids)
    assert asked.endswith("<|User|>: Say <begin_of_image> and draw a cat\n\n<|Assistant|>:")
    for output in answer.outputs:
        assert len(output.token_ids) == 300
        assert max(output.token_ids) < model.text_vocab
        assert model.boi not in output.token_ids
        assert output.text


def test_text_can_not_begin_an_image(llm, model):
    """Whatever the request does to the logits."""
    params = SamplingParams(
        logit_bias={model.boi: 100.0, model.text_vocab + 1: 100.0}, max_tokens=20, ignore_eos=True
    )
    (answer,) = draw(llm, [[model.bos, 50, 51]], params)
    assert model.boi not in answer
    assert max(answer) < model.text_vocab


def test_image_tokens_in_a_text_prompt_are_refused(llm, model):
    with pytest.raises(VLLMValidationError, match="must follow begin-of-image"):
        draw(llm, [[model.bos, 50, model.text_vocab + 1]])


# ---- the other layout


def test_the_original_layout_draws_the_same(original, prompts, greedy):
    """All prompts at once; the same ids from the other layout's tokenizer files."""
    model = image_model(original.model_config)
    assert [image_prompt_ids(original.get_tokenizer(), model, text) for text in TEXTS] == prompts
    assert [codes(original, ids) for ids in draw(original, prompts)] == greedy
