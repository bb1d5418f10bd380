"""Greedy generation writes what transformers' does; sampling keeps to its nucleus, its seed and its end."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minqlora import generate, load_model
from minqlora.generate import choose, generate_batch
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
    options: dict[str, Any] = dict(max_new_tokens=10, temperature=temperature, eos_ids=[2], seed=3)
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


def frequencies(logits: Tensor, temperature: float, top_p: float, draws: int = 4000) -> dict[int, float]:
    generator = torch.Generator().manual_seed(0)
    counts = Counter(choose(logits, temperature, top_p, generator) for _ in range(draws))
    return {token: count / draws for token, count in counts.items()}


@pytest.mark.parametrize(
    ("top_p", "expected"),
    [
        (0.01, {1: 1.0}),
        (0.5, {1: 1.0}),
        (0.51, {1: 2 / 3, 3: 1 / 3}),
        (0.75, {1: 2 / 3, 3: 1 / 3}),
        (1.0, {0: 0.125, 1: 0.5, 2: 0.125, 3: 0.25}),
    ],
)
def test_top_p_keeps_the_smallest_set_that_has_that_much(top_p: float, expected: dict[int, float]) -> None:
    drawn = frequencies(LOGITS, 1.0, top_p)
    assert drawn.keys() == expected.keys()
    for token, probability in expected.items():  # four standard deviations of 4000 draws: 0.03 at most
        assert abs(drawn[token] - probability) <= 4 * (probability * (1 - probability) / 4000) ** 0.5


def test_temperature_raises_probabilities_to_its_inverse() -> None:
    # At 0.5 they are squared: 1/64, 16/64, 1/64, 4/64 of 22/64.
    drawn = frequencies(LOGITS, 0.5, 1.0)
    for token, share in {0: 1, 1: 16, 2: 1, 3: 4}.items():
        probability = share / 22
        assert abs(drawn[token] - probability) <= 4 * (probability * (1 - probability) / 4000) ** 0.5


def test_greedy_takes_the_first_of_equals() -> None:
    assert choose(torch.tensor([0.0, 2.0, 2.0, 1.0]), 0.0, 1.0, None) == 1


def test_the_nucleus_is_what_transformers_keeps() -> None:
    from transformers import TopPLogitsWarper

    logits = torch.randn(50, generator=torch.Generator().manual_seed(0))
    kept = TopPLogitsWarper(0.6)(torch.tensor([[0]]), logits[None])[0].isfinite().nonzero().flatten()
    assert 2 < len(kept) < 25 and set(frequencies(logits, 1.0, 0.6)) == set(kept.tolist())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature >= 0 .* got -0.1"),
        ({"top_p": 0.0}, r"0 < top_p <= 1, got 0.0 and 0.0"),
        ({"top_p": 1.1}, r"got 0.0 and 1.1"),
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


def test_the_last_token_fits_into_the_cache(tiny: CausalLM) -> None:
    assert len(list(generate(tiny, [1], max_new_tokens=1))) == 1
    assert list(generate(tiny, [1], max_new_tokens=0)) == []
