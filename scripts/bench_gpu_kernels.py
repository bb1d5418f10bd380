"""Stages dequantize and linear of `bench.py gpu`: single weights, against bitsandbytes and torchao.

dequantize   quantizing and dequantizing, in GB/s: a weight in 16 bits and in its 4.127, each moved once,
             which is 2.516 bytes a parameter. The floor is what copying moves, measured here.
linear       forward and backward of a frozen layer, in ms. The floor is the dense layer in the same dtype.

The second-level cache is emptied before each call, and the contenders take turns.
"""

from collections.abc import Callable, Iterator
from functools import partial
from importlib import util
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench_gpu_measure import Line, Sizes, Timer, as_row, copy_bandwidth, tried
from bench_quant import PEERS, Case, Contender, forward_backward, ours, torchao_takes, warm_up
from minqlora.checkpoint import Quantization, default_dtype, quantized_bytes


def contenders_for(shape: str) -> tuple[dict[str, Contender], list[str]]:
    """Return who can take a weight of this shape, ours first, and of the others why not."""
    found, missing = {"ours": ours()}, []
    for name, make in PEERS.items():
        if not util.find_spec(name):
            missing.append(f"{name} is not installed")
        elif name == "torchao" and not torchao_takes(shape):
            missing.append(f"torchao cannot take {shape}: no whole number of nested blocks, 64 * 256")
        else:
            made, reason = tried(make)
            if made is None:
                missing.append(f"{name} cannot be used: {reason}")
            else:
                found[name] = made
    return found, missing


def dequantize(sizes: Sizes, device: torch.device) -> Iterator[Line]:
    """Yield the speed of quantizing and dequantizing each weight."""
    dtype, timer = default_dtype(device), Timer(device, flush=True)
    bandwidth = copy_bandwidth(device, sizes.copied, sizes.rounds)
    yield as_row(f"copy {sizes.copied / 2**20:g} MiB", "speed", "GB/s", None, floor=bandwidth)
    for shape in sizes.weights:
        text = f"{shape[0]}x{shape[1]}"
        contenders, missing = contenders_for(text)
        yield from ({"skipped": reason} for reason in missing)
        weight = normal(shape, dtype, device)
        calls: dict[str, Callable[[], Any]] = {
            name: partial(contender.quantize, weight) for name, contender in contenders.items()
        }
        quantized, reasons = {}, {}
        for name, call in calls.items():
            quantized[name], reasons[name] = tried(call)
        n_bytes = weight.nbytes + sum(quantized_bytes(shape, Quantization()))
        floor = {"floor": partial(torch.empty_like(weight).copy_, weight)}
        for stage in ("quantize", "dequantize"):
            if stage == "dequantize":
                calls = {name: partial(contenders[name].dequantize, quantized[name]) for name in calls}
            case = Case(stage, text, str(dtype), None, n_bytes, calls | floor)
            times, reasons = time_all(case, timer, sizes.rounds, reasons)
            speeds = {name: n_bytes / ms / 1e6 for name, ms in times.items()}
            name = f"{stage} {text} {short(dtype)}"
            yield from compare(name, "speed", "GB/s", speeds, reasons, bandwidth, ms=times)


def linear(sizes: Sizes, device: torch.device) -> Iterator[Line]:
    """Yield the time of a linear layer's forward and backward, for each number of tokens."""
    dtype, timer, (n, k) = default_dtype(device), Timer(device, flush=True), sizes.linear
    contenders, missing = contenders_for(f"{n}x{k}")
    yield from ({"skipped": reason} for reason in missing)
    weight = normal((n, k), dtype, device) * k**-0.5  # y is then about as large as x
    layers, reasons = {}, {}
    for name, contender in contenders.items():
        layers[name], reasons[name] = tried(partial(contender.linear, weight))
    layers["floor"] = partial(F.linear, weight=weight)
    for tokens in sizes.tokens:
        x, grad_y = normal((tokens, k), dtype, device), normal((tokens, n), dtype, device)
        x.requires_grad_()
        calls = {
            name: partial(forward_backward, layer, x, grad_y)
            for name, layer in layers.items()
            if layer is not None
        }
        case = Case("linear_train", f"{n}x{k}", str(dtype), tokens, None, calls)
        times, found = time_all(case, timer, sizes.rounds, reasons)
        name = f"{n}x{k} {short(dtype)}, {tokens} tokens"
        yield from compare(name, "forward and backward", "ms", times, found, times.get("floor"))


def time_all(
    case: Case, timer: Timer, rounds: int, reasons: dict[str, str | None]
) -> tuple[dict[str, float], dict[str, str | None]]:
    """Return the median ms of each contender whose result is right, and of the others the reason."""
    reasons = {name: reason for name, reason in reasons.items() if reason is not None}
    for name in case.calls:
        if name not in reasons:
            reasons[name] = tried(partial(warm_up, case, name))[1]
    timed = {name: call for name, call in case.calls.items() if reasons[name] is None}
    return timer.in_turn(timed, rounds), reasons


def compare(
    case: str,
    metric: str,
    unit: str,
    found: dict[str, float],
    reasons: dict[str, str | None],
    floor: float | None,
    **more: Any,
) -> Iterator[Line]:
    """Yield a row for each peer that was tried; one without, if there was none."""
    peers: list[str | None] = [name for name in reasons if name not in ("ours", "floor")]
    for peer in peers or [None]:
        theirs = None if peer is None else found.get(peer)
        reason = reasons.get("ours") or (None if peer is None else reasons[peer])
        mine = found.get("ours")
        yield as_row(case, metric, unit, mine, theirs, against=peer, floor=floor, reason=reason, **more)


def normal(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return normal numbers, the same on every call. Zeros would be cheaper to move than real weights are."""
    generator = torch.Generator(device).manual_seed(0)
    return torch.randn(shape, generator=generator, device=device).to(dtype)


def short(dtype: torch.dtype) -> str:
    """Return a dtype's name."""
    return str(dtype).removeprefix("torch.")
