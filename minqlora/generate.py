"""Chapter 20. Generation: one token after another, with everything before remembered.

The prompt goes through the model once and leaves its keys and values in the cache; from then on each step
feeds one token, reads the logits of one position, and chooses the next::

    logits -> less of what was said -> / temperature -> the top_k likeliest -> the nucleus top_p -> draw one

Four tokens, of which the last was said before, with a penalty of 2, temperature 0.5, top_k 3, top_p 0.9::

    logits         2.0     1.0     0.0     3.0
    penalty                                1.5
    temperature    4.0     2.0     0.0     3.0
    top_k          4.0     2.0      -      3.0
    softmax        0.665   0.090    -      0.245
    top_p          4.0      -       -      3.0          0.665 + 0.245 is 0.9 already
    drawn with     0.731    -       -      0.269

At temperature 0 the likeliest token is taken ("greedy"), and the same prompt gives the same answer.

Several prompts at once cost little more than one, because decoding the weights is most of the work. They are
padded on the left, so that all of them end, and go on, in the same column; nobody looks at padding and
positions count from where a prompt begins, so each row gets what it would get alone::

    .  .  7  3 | 9  ...        padding 2
    5  8  2  6 | 1  ...        padding 0

A conversation is the same prompt again and again, a little longer each time. `PrefixCache` keeps the keys and
values from one call to the next, and only what is new goes through the model.

A GPU finishes a kernel before Python has asked for the next one. There the steps of a long answer are
compiled, recorded once, on memory that stays where it is, and replayed (`RecordedStep`).

Shapes and dtypes: token ids are Python ints; logits (B, vocab) float32. Cost: one decoding of every 4-bit
weight for each step, which is what bounds the speed.

Source of top-p: "The Curious Case of Neural Text Degeneration", "Nucleus Sampling"; of top-k: "Hierarchical
Neural Story Generation"; of the penalty: "CTRL", "Sampling". Their order is that of transformers.

Before: loss. Next: memory.
"""

import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from minqlora.attention import KVCache, StepCache
from minqlora.model import CausalLM, compile_steps, leave_steps_eager, missing_compiler


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    temperature: what logits are divided by; 0 is greedy. top_k: draw from so many of the likeliest tokens; 0
    from all. top_p: draw from the likeliest that have this much probability together. repetition_penalty:
    what the logits of tokens that stand in the prompt or the answer are divided by, or multiplied by where
    they are negative. Raises ValueError for values out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name, expected, holds in (
            ("temperature", "at least 0", self.temperature >= 0),
            ("top_k", "a whole number, at least 0", self.top_k >= 0 and self.top_k == int(self.top_k)),
            ("top_p", "above 0 and at most 1", 0 < self.top_p <= 1),
            ("repetition_penalty", "above 0", self.repetition_penalty > 0),
        ):
            if not holds:
                raise ValueError(f"{name} must be {expected}, got {getattr(self, name)}")

    def warp(self, logits: Tensor, seen: Tensor) -> Tensor:
        """Return the logits to draw from, -inf for tokens that are left out.

        logits: (B, vocab) float32. seen: (B, vocab) bool, the tokens that the penalty is for.
        """
        if self.repetition_penalty != 1:
            penalty = self.repetition_penalty
            penalized = torch.where(logits < 0, logits * penalty, logits / penalty)
            logits = torch.where(seen, penalized, logits)
        if self.temperature == 0:
            return logits
        logits = logits / self.temperature
        if 0 < self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k).values[:, -1:]  # (B, 1)
            logits = logits.masked_fill(logits < least, -torch.inf)
        if self.top_p < 1:
            probability, ids = logits.softmax(-1).sort(descending=True)  # (B, vocab) each
            before = probability.cumsum(-1) - probability  # of all likelier tokens: the first always stays
            left_out = torch.empty_like(seen).scatter_(-1, ids, before >= self.top_p)
            logits = logits.masked_fill(left_out, -torch.inf)
        return logits

    def choose(self, logits: Tensor, seen: Tensor, generators: Sequence[torch.Generator | None]) -> list[int]:
        """Return a token id for each row of logits (B, vocab); each draws from its generator, of the CPU."""
        logits = self.warp(logits, seen)
        if self.temperature == 0:
            return logits.argmax(-1).tolist()
        rows = zip(logits.softmax(-1).cpu(), generators, strict=True)
        return [int(torch.multinomial(row, 1, generator=generator)) for row, generator in rows]


class PrefixCache:
    """Keys and values of the last prompt and its answer, for the next prompt that begins as they did.

    `clear` it when the model is another one, which it also is with another adapter.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.ids: list[int] = []  # the tokens that the cache holds
        self.cache: KVCache | None = None

    def open(self, model: CausalLM, prompt: list[int], capacity: int) -> KVCache:
        """Return a cache that holds what is known of a prompt, with room for `capacity` positions in all.

        The prompt's last token is never known: it has to be read again for its logits.
        """
        length = self._shared(model, prompt)
        if self.cache is None or self.cache.capacity < capacity:
            larger = KVCache(model.arch, 1, capacity, model.compute_dtype, model.device)
            if self.cache is not None:
                larger.kv[..., :length, :] = self.cache.kv[..., :length, :]
            self.cache = larger
        self.cache.length = length
        del self.ids[length:]
        return self.cache

    def _shared(self, model: CausalLM, prompt: list[int]) -> int:
        # An interrupted step may have left one of the two ahead of the other.
        known = 0 if self.cache is None else min(self.cache.length, len(self.ids))
        # Some rotaries turn all positions otherwise once one is beyond a length: then nothing is the same.
        lengths = [rotary.original_length for rotary in model.arch.rotaries]
        if any(length is not None and max(known, len(prompt)) > length for length in lengths):
            return 0
        pairs = zip(self.ids[:known], prompt[:-1], strict=False)
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def generate(
    model: CausalLM,
    prompt: list[int],
    *,
    max_new_tokens: int = 256,
    eos_ids: Collection[int] = (),
    seed: int | None = None,
    prefix: PrefixCache | None = None,
    **sampling: Any,
) -> Iterator[int]:
    """Yield the token ids that continue a prompt, one by one, until an end token (which is not yielded) or
    max_new_tokens.

    prompt: token ids, at least one. seed: None draws from torch's global generator. prefix: what it knows of
    the prompt is not read again; it then knows prompt and answer. sampling: the fields of `Sampling`, such as
    temperature=0.7, top_p=0.9. Raises ValueError for an empty prompt or options out of range.
    """
    steps = _steps(model, [prompt], [[]], max_new_tokens, eos_ids, seed, Sampling(**sampling), prefix=prefix)
    return (token for (token,) in steps if token is not None)


def generate_batch(
    model: CausalLM,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int = 256,
    eos_ids: Collection[int] = (),
    seed: int | None = None,
    ends: Callable[[list[int]], bool] | None = None,
    **sampling: Any,
) -> list[list[int]]:
    """Return for each prompt the token ids that continue it, what `generate` yields for it alone.

    ends: asked after each token about a prompt's answer so far, and True ends it there. Other arguments as in
    `generate`; with a seed, every prompt draws from a generator of its own.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    if prompts:
        for _ in _steps(
            model, prompts, answers, max_new_tokens, eos_ids, seed, Sampling(**sampling), ends=ends
        ):
            pass
    return answers


def _steps(
    model: CausalLM,
    prompts: Sequence[list[int]],
    answers: list[list[int]],
    max_new_tokens: int,
    eos_ids: Collection[int],
    seed: int | None,
    sampling: Sampling,
    *,
    ends: Callable[[list[int]], bool] | None = None,
    prefix: PrefixCache | None = None,
) -> Iterator[list[int | None]]:
    # Checks at the call, not at the first token.
    if not all(prompts):
        raise ValueError("the prompt is empty: there is nothing to continue")
    generators = [None if seed is None else torch.Generator().manual_seed(seed) for _ in prompts]
    seen = torch.zeros(len(prompts), model.arch.vocab_size, dtype=torch.bool, device=model.device)
    for row, prompt in zip(seen, prompts, strict=True):
        row[prompt] = True

    def pick(logits: Tensor) -> list[int]:
        picked = sampling.choose(logits, seen, generators)
        if sampling.repetition_penalty != 1:  # or nobody asks, and a GPU would wait for the host
            seen[range(len(picked)), picked] = True
        return picked

    def is_over(answer: list[int]) -> bool:
        return ends is not None and ends(answer)

    return _decode(model, prompts, answers, max_new_tokens, frozenset(eos_ids), pick, is_over, prefix)


def _decode(
    model: CausalLM,
    prompts: Sequence[list[int]],
    answers: list[list[int]],
    max_new_tokens: int,
    eos_ids: frozenset[int],
    pick: Callable[[Tensor], list[int]],
    is_over: Callable[[list[int]], bool],
    prefix: PrefixCache | None,
) -> Iterator[list[int | None]]:
    # Adds each step's tokens to the answers and yields them, None for a row that has come to its end.
    width = max(map(len, prompts))
    missing = [width - len(prompt) for prompt in prompts]
    if prefix is None:
        padding = torch.tensor(missing, device=model.device) if any(missing) else None
        size = len(prompts), width + max_new_tokens
        cache = KVCache(model.arch, *size, model.compute_dtype, model.device, padding)
    else:
        cache = prefix.open(model, prompts[0], width + max_new_tokens)
    # Any id serves as padding, because nothing looks at it.
    rows = [[0] * n + prompt for n, prompt in zip(missing, prompts, strict=True)]
    tokens = torch.tensor(rows, device=model.device)[:, cache.length :]
    alive = [True] * len(prompts)
    step: Callable[[Tensor], Tensor] = partial(_read, model, cache)
    for number in range(max_new_tokens):
        # inference_mode would leak into the caller's code at each yield; it covers one step only.
        with torch.inference_mode():
            if number == 1 and can_record(model, cache, max_new_tokens):
                step = RecordedStep(model, cache)
            picked = pick(step(tokens))
        if prefix is not None:
            prefix.ids += tokens[0].tolist()
        alive = [was and token not in eos_ids for was, token in zip(alive, picked, strict=True)]
        if not any(alive):
            return
        for answer, token, here in zip(answers, picked, alive, strict=True):
            if here:
                answer.append(token)
        yield [token if here else None for token, here in zip(picked, alive, strict=True)]
        alive = [here and not is_over(answer) for here, answer in zip(alive, answers, strict=True)]
        if not any(alive):
            return
        tokens = torch.tensor(picked, device=model.device)[:, None]


def _read(model: CausalLM, cache: KVCache, tokens: Tensor) -> Tensor:
    # The logits (B, vocab), float32, that follow tokens (B, T).
    return model.logits(model.model(tokens, cache=cache)[:, -1]).float()


# ---- steps that a GPU replays ------------------------------------------------------------------------------

WORTH_RECORDING = 32  # tokens; to record takes about as long as a few steps that are not


def can_record(model: CausalLM, cache: KVCache, max_new_tokens: int) -> bool:
    """Whether steps can be recorded, and so many are to come that it is worth it."""
    suits = StepCache.suits(model.arch, cache.capacity)
    return _records(model.device) and max_new_tokens >= WORTH_RECORDING and suits


def _records(device: torch.device) -> bool:
    return device.type == "cuda"


class RecordedStep:
    """One token through the model, which a GPU records as a graph and then replays.

    A step launches hundreds of kernels, each shorter than Python takes to ask for it; a graph is asked for
    once. It is replayed on the same memory, so tokens are copied to where it reads and logits, (B, vocab)
    float32, stand where it writes until the next step.
    """

    def __init__(self, model: CausalLM, cache: KVCache):
        self.model, self.cache = model, cache
        self.fixed = StepCache(cache, model.arch)
        self.tokens = torch.zeros(cache.kv.shape[2], 1, dtype=torch.int64, device=model.device)
        self.graph: torch.cuda.CUDAGraph | None = None
        if _records(model.device):
            # What no compiler takes, or no graph, is slower and right all the same.
            if missing_compiler(model.device) is None:
                compile_steps(model)
                self._try_to_record("compiled")
            if self.graph is None:
                leave_steps_eager(model)
                self._try_to_record("recorded")

    def __call__(self, tokens: Tensor) -> Tensor:
        """Return the logits that follow tokens (B, 1), and count them in the cache."""
        if self.cache.length >= self.cache.capacity:
            raise ValueError(f"the KV cache has room for {self.cache.capacity} positions, and is full")
        self.tokens.copy_(tokens)
        self.fixed.position.fill_(self.cache.length)
        if self.graph is None:
            self.logits = _read(self.model, self.fixed, self.tokens)
        else:
            self.graph.replay()
        self.cache.length += 1
        return self.logits

    def _try_to_record(self, wanted: str) -> None:
        try:
            self._record()
        except RuntimeError as error:
            warnings.warn(f"steps are not {wanted}: {str(error).splitlines()[0]}", stacklevel=4)

    def _record(self) -> None:
        # What is compiled or measured at first use must be done before. These runs write keys of token 0 to a
        # place that the first step overwrites.
        side = torch.cuda.Stream(self.model.device)
        side.wait_stream(torch.cuda.current_stream(self.model.device))
        with torch.cuda.stream(side):
            for _ in range(2):
                _read(self.model, self.fixed, self.tokens)
        torch.cuda.current_stream(self.model.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.logits = _read(self.model, self.fixed, self.tokens)
        self.graph = graph
