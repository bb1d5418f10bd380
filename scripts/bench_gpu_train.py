"""Stages train, memory and decode of `bench.py gpu`: whole models, by speed and peak memory.

train    an 8B-shaped model, rank 64 on all linear layers, rows of 2,048 tokens, 8,192 a step: checkpointed,
         nothing computed again, and with the blocks' inputs in host memory; against transformers + PEFT +
         bitsandbytes and against our own LoRA on 16 bits
memory   the paper's set-up: one row of 512 tokens, rank 64, checkpointed. The peer is the paper's figure,
         which is of adapters in 16 bits; the floor is the plan of minqlora/memory.py
decode   tokens a second of one answer; the floor reads every weight once a token at the copy bandwidth

The contenders of a stage follow one another, because two such models need not fit; each starts on an empty
device, and the peak is of what is allocated after the steps that warm up.
"""

import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import util
from typing import Any, NamedTuple

import torch

from bench_gpu_measure import (
    Line,
    Sizes,
    Timer,
    as_row,
    copy_bandwidth,
    forget_peak,
    peak_gib,
    start_afresh,
    tried,
)
from bench_gpu_models import (
    architecture,
    keep_adapters_in,
    micro_batch,
    model_config,
    new_optimizer,
    our_step,
    peer_model,
    peer_trainer,
    random_examples,
    random_model,
)
from minqlora import add_lora, generate
from minqlora.checkpoint import default_dtype
from minqlora.lora import LoRAConfig
from minqlora.memory import Setup, plan_memory, skeleton
from minqlora.model import CausalLM, compile_blocks, missing_compiler

RANK, ALPHA = 64, 16  # the paper's
WARM_UP = 2  # steps: the first compiles and makes the moments
MODES = {"checkpointed": (True, False), "no recompute": (False, False), "offload": (True, True)}
PEER = ("transformers", "peft", "bitsandbytes")
DECODING_PEER = ("transformers", "bitsandbytes")
SIXTEEN_BITS = "minqlora, 16 bits"
PAPER = "the paper, published"

Switch = Callable[[bool, bool], None]  # to a mode: checkpointing, offload
Step = Callable[[], float]  # trains one, and returns the loss
Answer = Callable[[int], int]  # generates so many tokens, and says how many they were


class Found(NamedTuple):
    """What training in a mode came to."""

    tokens_per_s: float
    gib: float


def missing_of(peer: Sequence[str]) -> list[Line]:
    """Return a line for each package of a peer that is not installed."""
    missing, whole = [name for name in peer if not util.find_spec(name)], " + ".join(peer)
    return [{"skipped": f"{name} is not installed, so {whole} is not measured"} for name in missing]


# ---- train -------------------------------------------------------------------------------------------------


def train(sizes: Sizes, device: torch.device) -> Iterator[Line]:
    """Yield tokens a second and peak memory of each contender in each mode."""
    contenders: dict[str, Callable[[], tuple[Switch, Step]]] = {
        "ours": partial(our_trainer, sizes, device, quantized=True),
        SIXTEEN_BITS: partial(our_trainer, sizes, device, quantized=False),
    }
    missing, peer = missing_of(PEER), " + ".join(PEER)
    yield from missing
    if not missing:
        contenders[peer] = partial(peer_of, sizes, device)
    ours: dict[str, Found | None] = {}
    for name, build in contenders.items():
        start_afresh(device)
        built, reason = tried(build)
        for mode, switches in MODES.items():
            if name == peer and mode == "offload":
                continue
            found, why = None, reason
            if built is not None:
                found, why = tried(partial(in_mode, switches, *built, sizes, device))
            if name == "ours":
                ours[mode] = found
                floor = planned(sizes, mode, device)
                yield from train_rows(mode, found, None, None, floor, why)
            else:
                yield from train_rows(mode, ours[mode], found, name, None, why)
        del built


def train_rows(
    mode: str,
    ours: Found | None,
    theirs: Found | None,
    against: str | None,
    floor: float | None,
    reason: str | None,
) -> Iterator[Line]:
    """Yield the two rows of a mode: ours alone, or beside another's."""
    for metric, unit, i, limit in (("speed", "tokens/s", 0, None), ("peak memory", "GiB", 1, floor)):
        mine, other = (None if found is None else found[i] for found in (ours, theirs))
        yield as_row(mode, metric, unit, mine, other, against=against, floor=limit, reason=reason)


def our_trainer(sizes: Sizes, device: torch.device, *, quantized: bool) -> tuple[Switch, Step]:
    """Return ours: a function that switches modes, and one that trains a step."""
    arch, dtype = architecture(sizes.model), default_dtype(device)
    model = random_model(arch, device, dtype, quantized=quantized)
    add_lora(model, r=RANK, alpha=ALPHA)
    if device.type != "cpu" and missing_compiler(device) is None:  # what finetune.py's --compile auto does
        compile_blocks(model)
    examples = micro_batch(sizes, arch.vocab_size)
    optimizer = new_optimizer(model.train())

    def switch(checkpointing: bool, offload: bool) -> None:
        model.model.gradient_checkpointing, model.model.offload = checkpointing, offload

    return switch, partial(our_step, model, optimizer, examples)


def peer_of(sizes: Sizes, device: torch.device) -> tuple[Switch, Step]:
    """Return the peer, in the same form."""
    examples = micro_batch(sizes, model_config(sizes.model)["vocab_size"])
    checkpoint, step = peer_trainer(sizes.model, RANK, examples, device, default_dtype(device))
    return lambda checkpointing, _offload: checkpoint(checkpointing), step


def in_mode(
    switches: tuple[bool, bool], switch: Switch, step: Step, sizes: Sizes, device: torch.device
) -> Found:
    """Return what training comes to in one mode."""
    switch(*switches)
    return steps_of(step, sizes.micro_batch, sizes.steps, device)


def steps_of(step: Step, tokens: int, count: int, device: torch.device) -> Found:
    """Return speed and peak memory of some steps, after some that warm up."""
    timer = Timer(device)
    for _ in range(WARM_UP):
        loss = step()
    forget_peak(device)
    times = [timer(step) for _ in range(count)]
    assert 0 < loss < 100, f"the loss is {loss}: that is no training"
    return Found(1000 * tokens / statistics.median(times), peak_gib(device))


def planned(sizes: Sizes, mode: str, device: torch.device) -> float:
    """Return the GiB that minqlora/memory.py plans for a mode of `train`."""
    checkpointing, offload = MODES[mode]
    rows = dict(per_device_train_batch_size=sizes.rows, max_seq_length=sizes.length)
    return plan_gib(sizes.model, device, gradient_checkpointing=checkpointing, offload=offload, **rows)


def plan_gib(name: str, device: torch.device, **fields: Any) -> float:
    """Return the GiB planned for a model with one micro-batch a step. fields: others of `Setup`."""
    setup = Setup(
        adapter=LoRAConfig(r=RANK, alpha=ALPHA),
        dtype=default_dtype(device),
        stored_dtype=default_dtype(device),
        gradient_accumulation_steps=1,
        device=device.type,
        **fields,
    )
    return plan_memory(skeleton(architecture(name), setup), setup).total / 2**30


# ---- memory ------------------------------------------------------------------------------------------------


def memory(sizes: Sizes, device: torch.device) -> Iterator[Line]:
    """Yield peak memory and speed of each of the paper's models, then what paging costs on the first."""
    for name in sizes.paper:
        start_afresh(device)
        model, reason = tried(partial(paper_model, name, device))
        if model is None:
            case = f"{name}, its weights"
            yield as_row(case, "peak memory", "GiB", None, sizes.paper[name], against=PAPER, reason=reason)
            continue
        if name == next(iter(sizes.paper)):
            yield from paging(name, model, sizes, device)
        for dtype in (torch.float32, torch.bfloat16):  # in this order: what was rounded stays so
            keep_adapters_in(model, dtype)
            for paged in ("never", "always"):
                yield from memory_rows(name, model, dtype, paged, sizes, device)
        del model


def paper_model(name: str, device: torch.device) -> CausalLM:
    """Return a model in NF4 with an adapter of rank 64 on all linear layers, checkpointed."""
    model = random_model(architecture(name), device, default_dtype(device), quantized=True)
    add_lora(model, r=RANK, alpha=ALPHA)
    model.model.gradient_checkpointing = True
    return model.train()


def memory_rows(
    name: str, model: CausalLM, dtype: torch.dtype, paged: str, sizes: Sizes, device: torch.device
) -> Iterator[Line]:
    """Yield the rows of a model with its adapters in a dtype, and the moments on the device or paged."""
    short, where = str(dtype).removeprefix("torch."), "paged" if paged == "always" else "on the device"
    case = f"{name}, adapters in {short}, moments {where}"
    examples = random_examples(1, sizes.paper_length, model.arch.vocab_size)
    start_afresh(device)

    def steps() -> Found:
        return steps_of(
            partial(our_step, model, new_optimizer(model, paged), examples),
            sizes.paper_length,
            sizes.steps,
            device,
        )

    found, reason = tried(steps)
    fields = dict(max_seq_length=sizes.paper_length, adapter_dtype=dtype, paged=paged)
    floor = plan_gib(name, device, **fields)
    speed, gib = (None, None) if found is None else found
    paper = sizes.paper[name]
    yield as_row(case, "peak memory", "GiB", gib, paper, against=PAPER, floor=floor, reason=reason)
    yield as_row(case, "speed", "tokens/s", speed, reason=reason)


def paging(name: str, model: CausalLM, sizes: Sizes, device: torch.device) -> Iterator[Line]:
    """Yield what a step with many micro-batches takes with the moments paged, beside them on the device."""
    examples = random_examples(1, sizes.paper_length, model.arch.vocab_size)

    def in_turn() -> dict[str, float]:
        optimizers = {paged: new_optimizer(model, paged) for paged in ("always", "never")}
        steps: dict[str, Callable[[], Any]] = {
            paged: partial(our_step, model, optimizer, examples, sizes.accumulated)
            for paged, optimizer in optimizers.items()
        }
        for step in steps.values():
            step()
        return Timer(device).in_turn(steps, sizes.steps)

    times, reason = tried(in_turn)
    paged, resident = (None, None) if times is None else (times["always"], times["never"])
    case = f"{name}, {sizes.accumulated} micro-batches, moments paged"
    yield as_row(case, "step", "ms", paged, resident, against="moments on the device", reason=reason)


# ---- decode ------------------------------------------------------------------------------------------------


def decode(sizes: Sizes, device: torch.device) -> Iterator[Line]:
    """Yield the tokens a second of each contender."""
    contenders: dict[str, Callable[[], tuple[Answer, int]]] = {
        "ours": partial(our_decoder, sizes, device, quantized=True),
        SIXTEEN_BITS: partial(our_decoder, sizes, device, quantized=False),
    }
    missing = missing_of(DECODING_PEER)
    yield from missing
    if not missing:
        contenders[" + ".join(DECODING_PEER)] = partial(peer_decoder, sizes, device)
    bandwidth = copy_bandwidth(device, sizes.copied, sizes.rounds)
    case, ours = f"one answer of {sizes.answer} tokens", None
    for name, build in contenders.items():
        start_afresh(device)
        built, reason = tried(build)
        speed = None
        if built is not None:
            speed, reason = tried(partial(tokens_per_s, built[0], sizes, device))
        if name == "ours":
            ours, floor = speed, None if built is None else 1e9 * bandwidth / built[1]
            yield as_row(case, "speed", "tokens/s", ours, floor=floor, reason=reason)
        else:
            yield as_row(case, "speed", "tokens/s", ours, speed, against=name, reason=reason)
        del built


def tokens_per_s(answer: Answer, sizes: Sizes, device: torch.device) -> float:
    """Return the speed of the tokens after the first, so that reading the prompt does not count."""
    timer = Timer(device)
    for n in (1, sizes.answer + 1):  # which also warms up
        assert (found := answer(n)) == n, f"asked for {n} tokens, got {found}"
    times = [
        timer(partial(answer, sizes.answer + 1)) - timer(partial(answer, 1)) for _ in range(sizes.repeats)
    ]
    return 1000 * sizes.answer / statistics.median(times)


def our_decoder(sizes: Sizes, device: torch.device, *, quantized: bool) -> tuple[Answer, int]:
    """Return ours, and the bytes that a token reads."""
    arch = architecture(sizes.model)
    model = random_model(arch, device, default_dtype(device), quantized=quantized).eval()
    weights = {name: weight for name, weight in model.named_parameters() if "embed_tokens" not in name}
    prompt = random_examples(1, sizes.prompt, arch.vocab_size)[0].input_ids

    def answer(n: int) -> int:
        return sum(1 for _ in generate(model, prompt, max_new_tokens=n))

    return answer, sum(weight.nbytes for weight in weights.values())


def peer_decoder(sizes: Sizes, device: torch.device) -> tuple[Answer, int]:
    """Return transformers + bitsandbytes, and no count of bytes."""
    model = peer_model(sizes.model, device, default_dtype(device)).eval()
    vocab_size = model_config(sizes.model)["vocab_size"]
    prompt = torch.tensor([random_examples(1, sizes.prompt, vocab_size)[0].input_ids], device=device)
    model.generation_config.eos_token_id = None  # so that it goes on

    def answer(n: int) -> int:
        with torch.inference_mode():
            ids = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=n,
                do_sample=False,
                pad_token_id=0,
            )
        return ids.shape[1] - prompt.shape[1]

    return answer, 0
