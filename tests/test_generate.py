"""Greedy generation writes what transformers' does; sampling keeps to its nucleus, its seed and its end."""

import sys
from collections import Counter
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minqlora import generate, load_model
from minqlora.attention import KVCache
from minqlora.generate import PrefixCache, RecordedStep, Sampling, can_record, generate_batch
from minqlora.model import CausalLM
from minqlora.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tiny(tiny_model: Path) -> CausalLM:
    return load_model(tiny_model, dtype=torch.float32)


PROMPT = [1, 60, 61, 62]


def test_greedy_generation_is_that_of_transformers(
    demo_model: Path, demo_fp32: CausalLM, demo_theirs: Any
) -> None:
    tokenizer = Tokenizer(demo_model)
    messages = [{"role": "user", "content": "Tell me about the sea."}]
    prompt = tokenizer.encode(tokenizer.render(messages, add_generation_prompt=True))
    theirs = demo_theirs.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False)
    ours = list(generate(demo_fp32, prompt, max_new_tokens=24, eos_ids=tokenizer.eos_ids))
    assert len(ours) == 24 and ours == theirs[0, len(prompt) :].tolist()


def test_an_answer_ends_where_transformers_ends_it(
    demo_model: Path, demo_fp32: CausalLM, demo_theirs: Any
) -> None:
    tokenizer = Tokenizer(demo_model)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.encode(tokenizer.render(messages, add_generation_prompt=True))
    theirs = demo_theirs.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False)[
        0, len(prompt) :
    ]
    ours = list(generate(demo_fp32, prompt, max_new_tokens=24, eos_ids=tokenizer.eos_ids))
    assert len(ours) < 24 and [*ours, 2] == theirs.tolist()
    assert "Paris" in tokenizer.decode(ours)


# -- several prompts at once -------------------------------------------------------------------------------

QUESTIONS = [
    "What is the capital of France?",
    "Hi",
    "Explain in one sentence why the sky is blue during the day and red in the evening.",
]


@pytest.fixture(scope="module")
def prompts(demo_model: Path) -> list[list[int]]:
    tokenizer = Tokenizer(demo_model)
    rows = [[{"role": "user", "content": question}] for question in QUESTIONS]
    return [tokenizer.encode(tokenizer.render(row, add_generation_prompt=True)) for row in rows]


def test_a_batch_padded_on_the_left_is_that_of_transformers(
    demo_model: Path, demo_fp32: CausalLM, demo_theirs: Any, prompts: list[list[int]]
) -> None:
    width = max(map(len, prompts))
    rows = torch.tensor([[2] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    theirs = demo_theirs.generate(
        rows, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=2
    )
    ours = generate_batch(demo_fp32, prompts, max_new_tokens=12, eos_ids=[2])
    ends = [answer + [2] * (12 - len(answer)) for answer in ours]
    assert ends == [row[:12] + [2] * (12 - len(row)) for row in theirs[:, width:].tolist()]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_each_row_of_a_batch_gets_what_it_gets_alone(
    demo_fp32: CausalLM, prompts: list[list[int]], temperature: float
) -> None:
    options: dict[str, Any] = dict(max_new_tokens=12, temperature=temperature, eos_ids=[2], seed=1)
    alone = [list(generate(demo_fp32, prompt, **options)) for prompt in prompts]
    assert len({len(answer) for answer in alone}) > 1  # one of them ends before the others
    assert generate_batch(demo_fp32, prompts, **options) == alone


def test_a_batch_of_none_is_none_and_an_empty_prompt_in_one_is_refused(tiny: CausalLM) -> None:
    assert generate_batch(tiny, []) == []
    with pytest.raises(ValueError, match="the prompt is empty"):
        generate_batch(tiny, [PROMPT, []])


# -- where it ends, and what leads there -------------------------------------------------------------------


def test_generation_stops_at_any_end_token_and_does_not_yield_it(tiny: CausalLM) -> None:
    free = list(generate(tiny, PROMPT, max_new_tokens=12))
    assert len(free) == 12
    for end in {free[0], free[5], free[11]}:
        place = free.index(end)
        assert list(generate(tiny, PROMPT, max_new_tokens=12, eos_ids={end, 10**6})) == free[:place]


def test_every_token_is_the_likeliest_of_a_whole_forward(tiny: CausalLM) -> None:
    ids = list(PROMPT)
    for token in generate(tiny, PROMPT, max_new_tokens=8):
        with torch.no_grad():
            assert token == int(tiny(torch.tensor([ids]))[0, -1].argmax())
        ids.append(token)


def test_tokens_come_one_by_one_and_leave_autograd_as_it_was(tiny: CausalLM) -> None:
    tokens = generate(tiny, PROMPT, max_new_tokens=3)
    next(tokens)
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    assert len(list(tokens)) == 2


def test_the_same_seed_writes_the_same_and_another_something_else(tiny: CausalLM) -> None:
    def write(seed: int | None) -> list[int]:
        return list(generate(tiny, PROMPT, max_new_tokens=20, temperature=1.0, seed=seed))

    assert write(1) == write(1) != write(2)
    torch.manual_seed(1)
    global_state = torch.get_rng_state()
    write(1)
    assert torch.equal(torch.get_rng_state(), global_state)  # a seed draws from a generator of its own
    first = write(None)
    torch.manual_seed(1)
    assert write(None) == first  # without one, torch's global generator decides


def test_at_a_tiny_temperature_sampling_is_greedy(tiny: CausalLM) -> None:
    greedy = list(generate(tiny, PROMPT, max_new_tokens=12))
    assert list(generate(tiny, PROMPT, max_new_tokens=12, temperature=1e-4, seed=0)) == greedy
    assert list(generate(tiny, PROMPT, max_new_tokens=12, temperature=5.0, top_p=1e-6, seed=0)) == greedy


# Of four tokens, in no order: 0.125, 0.5, 0.125, 0.25. Powers of two, whose sums are exact.
LOGITS = torch.tensor([0.125, 0.5, 0.125, 0.25]).log()


def frequencies(logits: Tensor, draws: int = 4000, **sampling: Any) -> dict[int, float]:
    generator = torch.Generator().manual_seed(0)
    none_seen = torch.zeros(1, len(logits), dtype=torch.bool)
    options = Sampling(**({"temperature": 1.0} | sampling))
    counts = Counter(options.choose(logits[None], none_seen, [generator])[0] for _ in range(draws))
    return {token: count / draws for token, count in counts.items()}


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        ({"top_p": 0.01}, {1: 1.0}),
        ({"top_p": 0.5}, {1: 1.0}),
        ({"top_p": 0.51}, {1: 2 / 3, 3: 1 / 3}),
        ({"top_p": 0.75}, {1: 2 / 3, 3: 1 / 3}),
        ({"top_p": 1.0}, {0: 0.125, 1: 0.5, 2: 0.125, 3: 0.25}),
        ({"top_k": 1}, {1: 1.0}),
        ({"top_k": 2}, {1: 2 / 3, 3: 1 / 3}),
        ({"top_k": 9}, {0: 0.125, 1: 0.5, 2: 0.125, 3: 0.25}),
        ({"top_k": 2, "top_p": 0.6}, {1: 1.0}),  # of the two that are left, the first has 2 / 3
    ],
    ids=str,
)
def test_tokens_are_drawn_as_often_as_they_should(
    sampling: dict[str, float], expected: dict[int, float]
) -> None:
    drawn = frequencies(LOGITS, **sampling)
    assert drawn.keys() == expected.keys()
    for token, probability in expected.items():  # four standard deviations of 4000 draws: 0.03 at most
        assert abs(drawn[token] - probability) <= 4 * (probability * (1 - probability) / 4000) ** 0.5


def test_temperature_raises_probabilities_to_its_inverse() -> None:
    # At 0.5 they are squared: 1/64, 16/64, 1/64, 4/64 of 22/64.
    drawn = frequencies(LOGITS, temperature=0.5)
    for token, share in {0: 1, 1: 16, 2: 1, 3: 4}.items():
        probability = share / 22
        assert abs(drawn[token] - probability) <= 4 * (probability * (1 - probability) / 4000) ** 0.5


def test_greedy_takes_the_first_of_equals() -> None:
    seen = torch.zeros(1, 4, dtype=torch.bool)
    assert Sampling().choose(torch.tensor([[0.0, 2.0, 2.0, 1.0]]), seen, [None]) == [1]


def test_the_chapters_four_tokens() -> None:
    logits, seen = torch.tensor([[2.0, 1.0, 0.0, 3.0]]), torch.tensor([[False, False, False, True]])
    warped = Sampling(temperature=0.5, top_k=3, top_p=0.9, repetition_penalty=2.0).warp(logits, seen)
    assert warped.tolist() == [[4.0, -float("inf"), -float("inf"), 3.0]]


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.7},
        {"top_k": 5},
        {"top_p": 0.6},
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 0.8, "temperature": 1.5, "top_k": 20, "top_p": 0.9},
        {"repetition_penalty": 1.3, "temperature": 0.5, "top_k": 12, "top_p": 0.8},
    ],
    ids=str,
)
def test_what_is_drawn_from_is_what_transformers_draws_from(
    tiny_model: Path, tiny: CausalLM, sampling: dict[str, float]
) -> None:
    from transformers import LlamaForCausalLM

    theirs = LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    off: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
    torch.manual_seed(0)
    out = theirs.generate(
        torch.tensor([PROMPT]),
        do_sample=True,
        max_new_tokens=6,
        output_scores=True,
        output_logits=True,
        return_dict_in_generate=True,
        **(off | sampling),
    )
    options = Sampling(**({"temperature": 1.0} | sampling))  # type: ignore[arg-type]
    assert len(out.logits) == len(out.scores) > 1
    for step, (logits, scores) in enumerate(zip(out.logits, out.scores, strict=True)):
        seen = torch.zeros_like(logits, dtype=torch.bool)
        seen[0, out.sequences[0, : len(PROMPT) + step]] = True
        torch.testing.assert_close(options.warp(logits, seen), scores, rtol=1e-6, atol=1e-6)
        assert bool(scores.isinf().any()) == ("top_k" in sampling or "top_p" in sampling)


def test_greedy_generation_with_a_penalty_is_that_of_transformers(
    demo_fp32: CausalLM, demo_theirs: Any, prompts: list[list[int]]
) -> None:
    options: dict[str, Any] = dict(max_new_tokens=16, repetition_penalty=1.3)
    theirs = demo_theirs.generate(torch.tensor(prompts[2:]), do_sample=False, **options)
    plain = list(generate(demo_fp32, prompts[2], max_new_tokens=16, eos_ids=[2]))
    ours = list(generate(demo_fp32, prompts[2], eos_ids=[2], **options))
    assert ours == theirs[0, len(prompts[2]) :].tolist() != plain


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature must be at least 0, got -0.1"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        ({"top_p": 1.1}, "top_p must be above 0 and at most 1, got 1.1"),
        ({"top_k": -1}, "top_k must be a whole number, at least 0, got -1"),
        ({"top_k": 1.5}, "top_k must be a whole number, at least 0, got 1.5"),
        ({"repetition_penalty": 0}, "repetition_penalty must be above 0, got 0"),
        ({"prompt": []}, "the prompt is empty"),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused_at_once(
    tiny: CausalLM, options: dict[str, Any], message: str
) -> None:
    prompt = options.pop("prompt", PROMPT)
    with pytest.raises(ValueError, match=message):
        generate(tiny, prompt, **options)  # at the call, not at the first token


# -- a conversation, which begins as it did ----------------------------------------------------------------


def read_lengths(monkeypatch: pytest.MonkeyPatch, model: CausalLM) -> list[int]:
    """How many tokens each later call of the trunk reads."""
    lengths: list[int] = []
    real = model.model.forward

    def forward(input_ids: Tensor, *args: Any, **options: Any) -> Tensor:
        lengths.append(input_ids.shape[1])
        return real(input_ids, *args, **options)

    monkeypatch.setattr(model.model, "forward", forward)
    return lengths


def test_turns_that_share_a_cache_are_those_of_fresh_ones(
    demo_fp32: CausalLM, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Longer, the same again, cut back, something else, and the beginning of that.
    first = prompts[2]
    turns = [first, [*first, 28, 2, 198, 1, 4093, 198], first, first[:9], prompts[0], prompts[0][:-4]]
    options: dict[str, Any] = dict(max_new_tokens=6, temperature=0.8, repetition_penalty=1.2, seed=1)
    fresh = [list(generate(demo_fp32, turn, **options)) for turn in turns]
    prefix = PrefixCache()
    lengths = read_lengths(monkeypatch, demo_fp32)
    assert [list(generate(demo_fp32, turn, prefix=prefix, **options)) for turn in turns] == fresh
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, prompts[0], strict=False)))
    read = [length for length in lengths if length > 1]
    assert read == [len(first), 6, len(prompts[0]) - min(shared, 9)]  # of the others only the last token


def test_a_cleared_cache_knows_nothing(tiny: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    prefix, lengths = PrefixCache(), read_lengths(monkeypatch, tiny)
    list(generate(tiny, PROMPT, max_new_tokens=2, prefix=prefix))
    assert len(prefix.ids) == prefix.cache.length == len(PROMPT) + 1  # type: ignore[union-attr]
    prefix.clear()
    list(generate(tiny, PROMPT, max_new_tokens=2, prefix=prefix))
    assert lengths == [len(PROMPT), 1] * 2


def test_an_interrupted_step_leaves_a_cache_that_can_be_used(
    tiny: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = list(generate(tiny, PROMPT, max_new_tokens=8))
    prefix = PrefixCache()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        tokens = generate(tiny, PROMPT, max_new_tokens=8, prefix=prefix)
        assert [next(tokens) for _ in range(3)] == expected[:3]
        patch.setattr(tiny.model.norm, "forward", interrupt)  # at the end of a step
        next(tokens)
    longer = [*PROMPT, *expected[:5]]
    assert list(generate(tiny, longer, max_new_tokens=3, prefix=prefix)) == expected[5:]


def interrupt(*_: Any) -> Tensor:
    raise KeyboardInterrupt


def test_where_a_long_text_turns_all_positions_nothing_is_kept(
    tiny: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = [PROMPT, [*PROMPT, 7, 8]]  # the second is beyond 5 tokens
    layers = [
        replace(layer, rotary=replace(layer.rotary, original_length=5, long_frequencies=(0.5,) * 8))
        for layer in tiny.arch.layers
        if layer.rotary
    ]
    monkeypatch.setattr(tiny, "arch", replace(tiny.arch, layers=tuple(layers)))
    prefix, lengths = PrefixCache(), read_lengths(monkeypatch, tiny)
    for turn in turns:
        list(generate(tiny, turn, max_new_tokens=1, prefix=prefix))
    assert lengths == [4, 6]


# -- an end that the caller sees ---------------------------------------------------------------------------


def test_each_row_of_a_batch_ends_where_it_is_told(tiny: CausalLM) -> None:
    prompts = [PROMPT, [1, 70, 71], [5]]
    free = generate_batch(tiny, prompts, max_new_tokens=10)
    until = [answer[:place] for answer, place in zip(free, (3, 10, 1), strict=True)]
    assert generate_batch(tiny, prompts, max_new_tokens=10, ends=lambda answer: answer in until) == until


def test_the_last_token_fits_into_the_cache(tiny: CausalLM) -> None:
    assert len(list(generate(tiny, [1], max_new_tokens=1))) == 1
    assert list(generate(tiny, [1], max_new_tokens=0)) == []


def test_recorded_steps_say_what_others_say(tiny: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [[5, 6, 7], [9]]
    expected = generate_batch(tiny, prompts, max_new_tokens=12)
    made: list[RecordedStep] = []
    chapter = sys.modules[RecordedStep.__module__]  # whose name in the package is the function's

    class Spied(RecordedStep):
        def __init__(self, *arguments: Any):
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr(chapter, "can_record", lambda *_: True)
    monkeypatch.setattr(chapter, "RecordedStep", Spied)
    assert generate_batch(tiny, prompts, max_new_tokens=12) == expected
    prefix = PrefixCache()
    for prompt in ([5, 6, 7], [5, 6, 7, *expected[0], 4]):  # a second turn, on what the first one left
        fresh = list(generate(tiny, prompt, max_new_tokens=12))
        assert list(generate(tiny, prompt, max_new_tokens=12, prefix=prefix)) == fresh
    assert len(made) == 5


def test_steps_that_cannot_be_recorded_are_taken_one_by_one(
    tiny: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = generate_batch(tiny, [[5, 6, 7]], max_new_tokens=32)
    chapter = sys.modules[RecordedStep.__module__]
    monkeypatch.setattr(chapter, "_records", lambda device: True)
    reasons = iter(["no kernel for this\nand more", "no graph\nand more"])

    def fail(step: RecordedStep) -> None:
        raise RuntimeError(next(reasons))

    monkeypatch.setattr(RecordedStep, "_record", fail)
    with pytest.warns(UserWarning) as said:
        assert generate_batch(tiny, [[5, 6, 7]], max_new_tokens=32) == expected
    texts = [str(warning.message) for warning in said]
    assert texts == ["steps are not compiled: no kernel for this", "steps are not recorded: no graph"]


def test_a_cpu_records_nothing(tiny: CausalLM) -> None:
    cache = KVCache(tiny.arch, 1, 64, torch.float32, torch.device("cpu"))
    assert not can_record(tiny, cache, 64)
