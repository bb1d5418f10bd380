"""What the stages of `bench.py gpu` measure with: sizes, one timer, rows, and what becomes of an error.

A row compares ours with one peer, or with nothing. `ratio` is ours / peer and `floor_ratio` ours / floor: of
speeds above 1 is better, of times and memory below 1. Where there is no number, `reason` says why.
"""

import gc
import statistics
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from minqlora.run import peak_memory_gib

OUT_OF_MEMORY = "out of memory"
# Bytes written between timed calls: more than a second-level cache holds, and as long as it takes the host to
# launch what is timed. What is measured is then the device's time.
FLUSHED = 2**31

Line = dict[str, Any]  # a row, or {"skipped": what was not measured, and why}
T = TypeVar("T")


@dataclass(frozen=True)
class Sizes:
    """What is measured, and how often."""

    weights: tuple[tuple[int, int], ...] = ((4096, 4096), (4096, 14336))  # quantized and dequantized
    linear: tuple[int, int] = (4096, 4096)
    tokens: tuple[int, ...] = (512, 2048, 4096, 8192)  # rows of x that the linear layer is given
    copied: int = 2**30  # bytes, to find the copy bandwidth
    rounds: int = 25  # timed calls of each contender

    model: str = "llama3-8b"  # trained, and decoding
    rows: int = 4
    length: int = 2048  # of a row; all rows are one micro-batch
    steps: int = 3  # timed, after two that warm up

    # As published, in GiB: one row of 512 tokens, rank 64 on all linear layers, adapters in 16 bits.
    paper: Mapping[str, float | None] = field(
        default_factory=lambda: {"llama-7b": 6.9, "llama-13b": 11.3, "llama-33b": 24.7, "llama-65b": 45.0}
    )
    paper_length: int = 512
    accumulated: int = 16  # micro-batches of the steps that paging is timed in

    prompt: int = 32
    answer: int = 128  # tokens
    repeats: int = 3

    tests: str = "tests"  # what pytest is given, with `-m gpu`
    demo_steps: int = 200

    @property
    def micro_batch(self) -> int:
        """The tokens of a micro-batch."""
        return self.rows * self.length


TINY = Sizes(
    weights=((128, 128), (128, 192)),
    linear=(128, 128),
    tokens=(4,),
    copied=2**20,
    rounds=2,
    model="tiny",
    rows=2,
    length=16,
    steps=1,
    paper={"tiny": None},
    paper_length=16,
    accumulated=2,
    prompt=4,
    answer=8,
    repeats=1,
    tests="tests/test_optim.py",
    demo_steps=2,
)


class Timer:
    """Milliseconds that a call takes on a device: by CUDA's own clock there, by the host's elsewhere.

    flush: empty a GPU's cache before each call, which also lets the host run ahead of the device. It takes
    memory of the device, so not where that is measured.
    """

    def __init__(self, device: torch.device, *, flush: bool = False):
        self.device = device
        flushed = flush and device.type == "cuda"
        self.flushed = torch.empty(FLUSHED, dtype=torch.uint8, device=device) if flushed else None

    def __call__(self, call: Callable[[], Any]) -> float:
        """Time a call."""
        if self.device.type != "cuda":
            synchronize(self.device)
            start = time.perf_counter()
            call()
            synchronize(self.device)
            return 1000 * (time.perf_counter() - start)
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        if self.flushed is not None:
            self.flushed.zero_()
        began.record()
        call()
        ended.record()
        torch.cuda.synchronize(self.device)
        return began.elapsed_time(ended)

    def in_turn(self, calls: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
        """Return each call's median over rounds, in which they take turns."""
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(rounds):
            for name, call in calls.items():
                times[name].append(self(call))
        return {name: statistics.median(some) for name, some in times.items()}


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def copy_bandwidth(device: torch.device, n_bytes: int, rounds: int) -> float:
    """Return the GB/s that copying so many bytes moves, each of them read and written."""
    source = torch.randint(256, (n_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    ms = Timer(device, flush=True).in_turn({"copy": lambda: target.copy_(source)}, rounds)["copy"]
    return 2 * n_bytes / ms / 1e6


def start_afresh(device: torch.device) -> None:
    """Give back what nobody holds any more: the next contender is to find an empty device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def forget_peak(device: torch.device) -> None:
    """Look for the peak of memory from here on. What the next step will reuse stays where it is."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)


def peak_gib(device: torch.device) -> float:
    """Return the peak of what was allocated since `forget_peak`; on a CPU the process's, since it began."""
    synchronize(device)
    return peak_memory_gib(device)


def tried(measure: Callable[[], T]) -> tuple[T | None, str | None]:
    """Return what a measurement found, or None and the reason. The next one is not to suffer from it."""
    try:
        return measure(), None
    except torch.OutOfMemoryError as error:
        reason = f"{OUT_OF_MEMORY}: {first_line(error)}"
    except Exception as error:  # whatever a peer may raise on a machine that nobody has seen
        traceback.print_exc()
        reason = f"{type(error).__name__}: {first_line(error)}"
    gc.collect()
    return None, reason


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message."""
    return next(iter(str(error).splitlines()), "")


def as_row(
    case: str,
    metric: str,
    unit: str,
    ours: float | None,
    peer: float | None = None,
    *,
    against: str | None = None,
    floor: float | None = None,
    reason: str | None = None,
    **more: Any,
) -> Line:
    """Return a row, but for the stage's name. against: whose number `peer` is."""
    row: Line = {"case": case, "metric": metric, "unit": unit, "ours": ours, "peer": peer, "floor": floor}
    row["ratio"] = ours / peer if ours is not None and peer else None
    row["floor_ratio"] = ours / floor if ours is not None and floor else None
    return row | {"against": against} | ({"reason": reason} if reason else {}) | more
