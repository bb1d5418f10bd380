"""Chapter 15. Generation: one token after another, with everything before remembered.

The prompt goes through the model once and leaves its keys and values in the cache; from then on each step
feeds one token, reads the logits of one position, and chooses the next::

    logits / temperature -> softmax -> the smallest set of tokens with probability top_p -> draw one

At temperature 0 the likeliest token is taken ("greedy"), and the same prompt gives the same answer.

Shapes and dtypes: token ids are Python ints; logits (vocab,) float32. Cost: one decoding of every 4-bit
weight for each token, which is what bounds the speed.

Source of top-p: "The Curious Case of Neural Text Degeneration", "Nucleus Sampling".

Before: loss. Next: run.
"""

from collections.abc import Collection, Iterator

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
    if not prompt:
        raise ValueError("the prompt is empty: there is nothing to continue")
    if temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(f"expected temperature >= 0 and 0 < top_p <= 1, got {temperature} and {top_p}")
    return _generate(model, prompt, max_new_tokens, temperature, top_p, frozenset(eos_ids), seed)


def _generate(model, prompt, max_new_tokens, temperature, top_p, eos_ids, seed) -> Iterator[int]:
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    cache = KVCache(model.arch, 1, len(prompt) + max_new_tokens, model.compute_dtype, model.device)
    tokens = torch.tensor([prompt], device=model.device)
    for _ in range(max_new_tokens):
        # inference_mode would leak into the caller's code at each yield; it covers one step only.
        with torch.inference_mode():
            hidden = model.model(tokens, cache=cache)
            logits = model.logits(hidden[0, -1:]).float()[0]  # (vocab,)
        token = choose(logits, temperature, top_p, generator)
        if token in eos_ids:
            return
        yield token
        tokens = torch.tensor([[token]], device=model.device)


def choose(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None) -> int:
    """Return one token id for logits (vocab,): the likeliest at temperature 0, else one of the nucleus."""
    if temperature == 0:
        return int(logits.argmax())
    probability, ids = (logits.cpu() / temperature).softmax(0).sort(descending=True)
    before = probability.cumsum(0) - probability  # mass of all likelier tokens: the first one is always kept
    probability[before >= top_p] = 0
    return int(ids[torch.multinomial(probability, 1, generator=generator)])
