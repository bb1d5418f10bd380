"""Measure quantizing, dequantizing and the NF4 linear layer on this CPU, against bitsandbytes and torchao.

    python scripts/bench.py quant --output docs/results/quant_cpu.json       # a few minutes on 2 cores
    python scripts/bench.py quant --shapes 4096x4096 --tokens 512 --linear_dtypes float32 bfloat16

    quantize         a normal weight to NF4: blocks of 64, scales in 8 bits in blocks of 256
    dequantize       back to the weight's dtype, as a fresh tensor
    dequantize_out   the same into memory that was touched before, `dequantize(out=...)`
    linear_forward   tokens times a frozen weight, no gradient asked for
    linear_train     the same, then the gradient of the tokens

The contenders take turns, call by call, because a shared machine drifts: compare the medians, and trust
ratios (our time / theirs: below 1 we are faster) before times. A result is let go within its time. A
contender whose calls take long leaves the later rounds to the others.

The floor is what it would take to move as much without decoding: for a weight, copying one of its shape and
dtype into touched memory; for a linear layer, the dense one in the same dtype. GB/s count what must be read
and written once: the weight in its dtype and in its 4.127 bits, not what is moved in between.

Fresh memory has a price of its own, and it is the allocator's: glibc hands large blocks back to the system
and pays for their pages again, tcmalloc keeps them. So all is measured in a process under each. The peers
cannot decode into memory that is given to them (bitsandbytes' `out=` is not implemented for CPUs, torchao has
none); bitsandbytes' fresh call under tcmalloc, which hands out next what was freed last, stands for it.
A virtual machine may have a price too: one that reports its free pages to the host (virtio balloon) does so
in pieces of 2 MiB, and has to get them back. Ours, whose fresh results are on huge pages, pays most of it.

Leave the machine otherwise idle. The last line of output is the JSON that --output writes.
"""

import json
import math
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import util
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import DOOR, Allocator, allocators, as_document, parse_shape, print_document
from minqlora import NF4Tensor, quantize
from options import option, parse

ALLOCATOR = "MINQLORA_BENCH_ALLOCATOR"  # set in the processes that measure, to the one they run under
NOTES = (
    "times are medians, ms a call; a ratio is our time / theirs",
    "floor: copying a weight of that shape and dtype into touched memory; of a linear layer, the dense one",
    "gb_per_s: the weight in its dtype and its 4-bit form, each read or written once",
    "dequantize_out: bitsandbytes has no out= on a CPU; its fresh call under tcmalloc stands for it",
    "scratch_mb: what minqlora keeps of this case for its next call",
)

Dtype = Literal["float32", "bfloat16"]


@dataclass
class Config:
    """What can be set."""

    shapes: list[str] = option(["576x1536", "4096x4096", "4096x14336"], "weights to quantize and dequantize")
    dtypes: list[Dtype] = option(["float32", "bfloat16"], "their dtypes, before and after")
    linear_shape: str = option("4096x4096", "frozen weight of the linear layer")
    linear_dtypes: list[Dtype] = option(["float32"], "dtypes of the linear layer, its tokens and its weight")
    tokens: list[int] = option([1, 16, 512, 4096], "rows of x that the linear layer is given")
    rounds: int = option(25, "timed calls of each contender, in turn, after one that warms up")
    seconds: float = option(2.0, "a contender leaves a case after about so long, but not before two calls")
    allocators: list[Literal["glibc", "tcmalloc"]] = option(
        ["glibc", "tcmalloc"], "memory allocators to measure under; tcmalloc where it is installed"
    )
    quick: bool = option(False, "tiny shapes and two rounds, whatever else is said: to see that all runs")
    output: Path | None = option(None, "write the JSON here as well")

    def __post_init__(self) -> None:
        if self.quick:
            self.shapes, self.linear_shape = ["72x192", "128x128"], "128x128"
            self.tokens, self.rounds = [3], 2
        for shape in (*self.shapes, self.linear_shape):
            parse_shape(shape)
        if min(self.rounds, *self.tokens) < 1:
            raise ValueError("rounds and tokens must be positive")


def main(argv: Sequence[str]) -> None:
    """Measure in this process if it was started for that, else in one for each allocator."""
    config = parse(Config, argv, description=__doc__.split("\n\n")[0] if __doc__ else None)
    if allocator := os.environ.get(ALLOCATOR):
        require_allocator(allocator)
        for line in measure_all(config, allocator):
            print(json.dumps(line), flush=True)
    else:
        compare(config, argv)


# ---- the contenders ----------------------------------------------------------------------------------------


class Contender(NamedTuple):
    """The three things that are timed, as one library does them."""

    quantize: Callable[[Tensor], Any]
    dequantize: Callable[[Any], Tensor]
    linear: Callable[[Tensor], Callable[[Tensor], Tensor]]  # of a weight: the layer


def ours() -> Contender:
    """Return minqlora."""

    def linear(weight: Tensor) -> Callable[[Tensor], Tensor]:
        quantized = NF4Tensor.from_float(weight)
        return lambda x: F.linear(x, quantized)

    return Contender(NF4Tensor.from_float, NF4Tensor.dequantize, linear)


def bitsandbytes() -> Contender:
    """Return bitsandbytes, in training mode: in eval mode it repacks the weight for inference."""
    from bitsandbytes import functional
    from bitsandbytes.nn import Linear4bit, Params4bit

    options: dict[str, Any] = {"compress_statistics": True, "quant_type": "nf4"}

    def linear(weight: Tensor) -> Callable[[Tensor], Tensor]:
        n, k = weight.shape
        layer = Linear4bit(k, n, bias=False, compute_dtype=weight.dtype, **options)
        layer.weight = Params4bit(weight, requires_grad=False, **options)
        return layer.to(weight.device).train()  # .to() is where it quantizes

    return Contender(
        lambda weight: functional.quantize_4bit(weight, **options),
        lambda quantized: functional.dequantize_4bit(*quantized),
        linear,
    )


def torchao() -> Contender:
    """Return torchao's NF4Tensor."""
    from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import NF4Tensor, linear_nf4, to_nf4

    def linear(weight: Tensor) -> Callable[[Tensor], Tensor]:
        quantized = to_nf4(weight)
        return lambda x: linear_nf4(x, quantized)

    return Contender(to_nf4, NF4Tensor.get_original_weight, linear)


PEERS = {"bitsandbytes": bitsandbytes, "torchao": torchao}


# ---- the cases ---------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """What is measured together, and what is known about it."""

    stage: str
    shape: str  # of the weight
    dtype: str
    tokens: int | None
    n_bytes: int | None  # read and written
    calls: Mapping[str, Callable[[], Any]]  # by contender; the floor is one of them


def measure_all(config: Config, allocator: str) -> Iterator[dict[str, Any]]:
    """Measure every case; yield a row for each, and `{"skipped": ...}` for what a peer cannot take."""
    contenders = {"ours": ours()}
    contenders |= {name: make() for name, make in PEERS.items() if util.find_spec(name)}
    for shape in config.shapes:
        if "torchao" in contenders and not torchao_takes(shape):
            yield {"skipped": f"torchao cannot take {shape}: no whole number of nested blocks, 64 * 256"}
        for dtype in config.dtypes:
            for case in weight_cases(contenders, shape, dtype, allocator):
                yield measure(case, config, allocator)
    for dtype in config.linear_dtypes:
        for case in linear_cases(contenders, config, dtype):
            yield measure(case, config, allocator)


def torchao_takes(shape: str) -> bool:
    """Return whether torchao can quantize a weight of this shape: it pads nothing."""
    return math.prod(parse_shape(shape)) % (64 * 256) == 0


def weight_cases(contenders: dict[str, Contender], shape: str, dtype: str, allocator: str) -> Iterator[Case]:
    """Yield the cases of one weight: quantize, dequantize, dequantize_out."""
    if not torchao_takes(shape):
        contenders = {name: contender for name, contender in contenders.items() if name != "torchao"}
    weight = normal(parse_shape(shape), dtype)
    floor = {"floor": partial(torch.empty_like(weight).copy_, weight)}
    calls = {name: partial(contender.quantize, weight) for name, contender in contenders.items()}
    quantized = {name: call() for name, call in calls.items()}
    n_bytes = weight.nbytes + quantized["ours"].nbytes
    yield Case("quantize", shape, dtype, None, n_bytes, calls | floor)
    calls = {name: partial(contender.dequantize, quantized[name]) for name, contender in contenders.items()}
    yield Case("dequantize", shape, dtype, None, n_bytes, calls | floor)
    kept = ("bitsandbytes",) if allocator == "tcmalloc" else ()
    peers = {name: call for name, call in calls.items() if name in kept}
    into = partial(quantized["ours"].dequantize, out=torch.empty_like(weight))
    yield Case("dequantize_out", shape, dtype, None, n_bytes, {"ours": into} | peers | floor)


def linear_cases(contenders: dict[str, Contender], config: Config, dtype: str) -> Iterator[Case]:
    """Yield the cases of one frozen linear layer for each number of tokens: linear_forward, linear_train."""
    shape = config.linear_shape
    n, k = parse_shape(shape)
    weight = normal((n, k), dtype) * k**-0.5  # y is then about as large as x
    layers: dict[str, Callable[[Tensor], Tensor]] = {
        name: contender.linear(weight)
        for name, contender in contenders.items()
        if name != "torchao" or torchao_takes(shape)
    }
    layers["floor"] = lambda x: F.linear(x, weight)
    for tokens in config.tokens:
        x, grad_y = normal((tokens, k), dtype), normal((tokens, n), dtype)
        calls = {name: partial(layer, x) for name, layer in layers.items()}
        yield Case("linear_forward", shape, dtype, tokens, None, calls)
        x = x.clone().requires_grad_()
        calls = {name: partial(forward_backward, layer, x, grad_y) for name, layer in layers.items()}
        yield Case("linear_train", shape, dtype, tokens, None, calls)


def forward_backward(layer: Callable[[Tensor], Tensor], x: Tensor, grad_y: Tensor) -> Tensor:
    """Return the gradient of x."""
    (grad_x,) = torch.autograd.grad(layer(x), x, grad_y)
    return grad_x


def normal(shape: tuple[int, int], dtype: str) -> Tensor:
    """Return normal numbers, the same on every call. Zeros would be cheaper to move than real weights are."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(getattr(torch, dtype))


# ---- measuring ---------------------------------------------------------------------------------------------


def measure(case: Case, config: Config, allocator: str) -> dict[str, Any]:
    """Time a case's contenders, in turn; return the row."""
    held = vars(quantize._scratch)  # what minqlora keeps between calls, by name
    held.clear()
    for name in case.calls:
        warm_up(case, name)
    times: dict[str, list[float]] = {name: [] for name in case.calls}
    for _ in range(config.rounds):
        for name, call in case.calls.items():
            if len(times[name]) < 2 or sum(times[name]) < 1000 * config.seconds:
                began = time.perf_counter()
                call()
                times[name].append(1000 * (time.perf_counter() - began))
    medians = {name: statistics.median(some) for name, some in times.items()}
    others = (*PEERS, "floor")
    row: dict[str, Any] = {
        "stage": case.stage,
        "case": f"{case.shape} {case.dtype}" + (f", {case.tokens} tokens" if case.tokens else ""),
        "shape": case.shape,
        "dtype": case.dtype,
        "tokens": case.tokens,
        "allocator": allocator,
        "metric": "time",
        "unit": "ms",
    }
    row |= {name: medians.get(name) for name in ("ours", *others)}
    row |= {f"ratio_{name}": medians["ours"] / medians[name] if name in medians else None for name in others}
    row["gb_per_s"] = case.n_bytes / medians["ours"] / 1e6 if case.n_bytes else None
    row["scratch_mb"] = sum(buffer.nbytes for buffer in held.values()) / 1e6
    row["calls"] = {name: len(some) for name, some in times.items()}
    return row


def warm_up(case: Case, name: str) -> None:
    """Call a contender once, and see that its result is right."""
    result = case.calls[name]()
    if case.stage != "quantize":
        # The floor's result is the exact one. NF4 errs by 9 % on normal weights, and so does a linear layer.
        exact = case.calls["floor"]()
        error = ((result - exact).float().norm() / exact.float().norm()).item()
        assert error < 0.2, f"{name}, {case.stage} of {case.shape} {case.dtype}: wrong by {error:.0%}"


def require_allocator(name: str) -> None:
    """Stop if this process does not run under the allocator that it is to measure."""
    maps = Path("/proc/self/maps")
    loaded = "tcmalloc" in maps.read_text() if maps.exists() else False
    if loaded != (name == "tcmalloc"):
        found = "loaded" if loaded else "not loaded"
        print(f"error: tcmalloc is {found} in the process for {name}", file=sys.stderr)
        raise SystemExit(1)


# ---- a process for each allocator --------------------------------------------------------------------------


def compare(config: Config, argv: Sequence[str]) -> None:
    """Measure in a process for each allocator; print their rows as they come, and the JSON document."""
    found = allocators(config.allocators)
    skipped = [f"{name} is not installed" for name in PEERS if not util.find_spec(name)]
    skipped += [f"{name} is not installed" for name in config.allocators if name not in found]
    for reason in skipped:
        print(f"skipped: {reason}")
    rows: list[dict[str, Any]] = []
    for allocator in found.values():
        print(f"\nunder {allocator.library}\n{HEADER}", flush=True)
        for line in run_under(allocator, argv):
            if "skipped" not in line:
                rows.append(line)
                print(as_text(line), flush=True)
            elif line["skipped"] not in skipped:
                skipped.append(line["skipped"])
                print(f"skipped: {line['skipped']}", flush=True)
    print()
    command = shlex.join(["scripts/bench.py", "quant", *argv])
    document = as_document(command, rows, ("torch", *PEERS))
    libraries = {name: allocator.library for name, allocator in found.items()}
    kept = {"allocators": libraries, "threads": torch.get_num_threads(), "skipped": skipped, "notes": NOTES}
    print_document(document | kept, config.output)


def run_under(allocator: Allocator, argv: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Measure in a process of its own under an allocator; yield what it prints, line by line."""
    environment = allocator.environment | {ALLOCATOR: allocator.name}
    command = [sys.executable, str(DOOR), "quant", *argv]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):  # a peer may have something to say as it is imported
                yield json.loads(line)
    if process.returncode:
        print(
            f"error: the process under {allocator.name} ended with code {process.returncode}", file=sys.stderr
        )
        raise SystemExit(1)


HEADER = (
    f"{'ms a call':15}{'':32}{'ours':>8}{'bnb':>9}{'torchao':>9}{'floor':>9}"
    f"{'/bnb':>7}{'/ao':>6}{'/floor':>7}{'GB/s':>6}"
)


def as_text(row: dict[str, Any]) -> str:
    """Return a row as a line of the table under HEADER."""

    def cell(key: str, width: int, digits: int) -> str:
        return f"{'-' if row[key] is None else format(row[key], f'.{digits}f'):>{width}}"

    times = cell("ours", 8, 2) + cell("bitsandbytes", 9, 2) + cell("torchao", 9, 2) + cell("floor", 9, 2)
    ratios = cell("ratio_bitsandbytes", 7, 2) + cell("ratio_torchao", 6, 2) + cell("ratio_floor", 7, 2)
    return f"{row['stage']:15}{row['case']:32}{times}{ratios}{cell('gb_per_s', 6, 1)}"
