"""Chapter 19. Generation: one token after another, with everything before remembered.

The prompt goes through the model once and leaves its keys and values in the cache; from then on each step
feeds one token, reads the logits of one position, and chooses the next::

    logits / temperature -> softmax -> the smallest set of tokens with probability top_p -> draw one

At temperature 0 the likeliest token is taken ("greedy"), and the same prompt gives the same answer.

Several prompts at once cost little more than one, because decoding the weights is most of the work. They are
padded on the left, so that all of them end, and go on, in the same column; nobody looks at padding and
positions count from where a prompt begins, so each row gets what it would get alone::

    .  .  7  3 | 9  ...        padding 2
    5  8  2  6 | 1  ...        padding 0

Shapes and dtypes: token ids are Python ints; logits (B, vocab) float32. Cost: one decoding of every 4-bit
weight for each step, which is what bounds the speed.

Source of top-p: "The Curious Case of Neural Text Degeneration", "Nucleus Sampling".

Before: loss. Next: memory.
"""

from collections.abc import Callable, Collection, Iterator, Sequence

import torch
from torch import Tensor

from minqlora.model import CausalLM, KVCache


def generate(
    model: CausalLM,
    prompt: list[int],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    eos_ids: Collection[int] = (),
    seed: int | None = None,
) -> Iterator[int]:
    """Yield the token ids that continue a prompt, one by one, until an end token (which is not yielded) or
    max_new_tokens.

    prompt: token ids, at least one. temperature: 0 is greedy. top_p: in (0, 1]. seed: None draws from torch's
    global generator. Raises ValueError for an empty prompt or options out of range.
    """
    steps = _steps(model, [prompt], max_new_tokens, temperature, top_p, eos_ids, seed)
    return (token for (token,) in steps if token is not None)


def generate_batch(
    model: CausalLM,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    eos_ids: Collection[int] = (),
    seed: int | None = None,
) -> list[list[int]]:
    """Return for each prompt the token ids that continue it, what `generate` yields for it alone.

    Arguments as in `generate`; with a seed, every prompt draws from a generator of its own.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    if not prompts:
        return answers
    for tokens in _steps(model, prompts, max_new_tokens, temperature, top_p, eos_ids, seed):
        for answer, token in zip(answers, tokens, strict=True):
            if token is not None:
                answer.append(token)
    return answers


def _steps(
    model: CausalLM,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    eos_ids: Collection[int],
    seed: int | None,
) -> Iterator[list[int | None]]:
    # Checks at the call, not at the first token.
    if not all(prompts):
        raise ValueError("the prompt is empty: there is nothing to continue")
    if temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(f"expected temperature >= 0 and 0 < top_p <= 1, got {temperature} and {top_p}")
    generators = [None if seed is None else torch.Generator().manual_seed(seed) for _ in prompts]

    def pick(logits: Tensor) -> list[int]:
        return [choose(row, temperature, top_p, draw) for row, draw in zip(logits, generators, strict=True)]

    return _decode(model, prompts, max_new_tokens, frozenset(eos_ids), pick)


def _decode(
    model: CausalLM,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    eos_ids: frozenset[int],
    pick: Callable[[Tensor], list[int]],
) -> Iterator[list[int | None]]:
    # Yields each step's tokens, None for a row that has come to its end.
    width = max(map(len, prompts))
    missing = [width - len(prompt) for prompt in prompts]
    padding = torch.tensor(missing, device=model.device) if any(missing) else None
    cache = KVCache(
        model.arch, len(prompts), width + max_new_tokens, model.compute_dtype, model.device, padding
    )
    # Any id serves as padding, because nothing looks at it.
    rows = [[0] * n + prompt for n, prompt in zip(missing, prompts, strict=True)]
    tokens = torch.tensor(rows, device=model.device)
    alive = [True] * len(prompts)
    for _ in range(max_new_tokens):
        # inference_mode would leak into the caller's code at each yield; it covers one step only.
        with torch.inference_mode():
            hidden = model.model(tokens, cache=cache)
            picked = pick(model.logits(hidden[:, -1]).float())
        alive = [was and token not in eos_ids for was, token in zip(alive, picked, strict=True)]
        if not any(alive):
            return
        yield [token if here else None for token, here in zip(picked, alive, strict=True)]
        tokens = torch.tensor(picked, device=model.device)[:, None]


def choose(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None) -> int:
    """Return one token id for logits (vocab,): the likeliest at temperature 0, else one of the nucleus."""
    if temperature == 0:
        return int(logits.argmax())
    probability, ids = (logits.cpu() / temperature).softmax(0).sort(descending=True)
    before = probability.cumsum(0) - probability  # mass of all likelier tokens: the first one is always kept
    probability[before >= top_p] = 0
    return int(ids[torch.multinomial(probability, 1, generator=generator)])
