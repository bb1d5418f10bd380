"""Measure minqlora on a GPU: single weights, whole models, memory, tests, and the demo, in under 9 minutes.

    python scripts/bench.py gpu                                 # all stages, into docs/results/gpu_STAGE.json
    python scripts/bench.py gpu --stage dequantize linear
    python scripts/bench.py gpu --tiny --output_dir runs/tiny   # every stage at toy size, on a CPU too

    dequantize   quantizing and dequantizing, against bitsandbytes, torchao and the copy bandwidth
    linear       a frozen layer forward and backward, against bitsandbytes and the dense layer
    train        an 8B-shaped model, against transformers + PEFT + bitsandbytes and our LoRA on 16 bits
    memory       7B to 65B in the paper's set-up, against its figures and our plan; and what paging costs
    decode       tokens a second of the 8B-shaped model, against transformers + bitsandbytes and 16 bits
    tests        the tests that need a GPU
    demo         the demo's model trained for 200 steps, its loss beside the CPU's

Weights are random and made on the device; nothing is downloaded. Peers that are not installed are named and
left out. Each stage runs in a process of its own, for so long at most as LIMITS says, and leaves its JSON as
it ends, whatever came of it: rows of `stage, case, metric, unit, ours, peer, against, floor, ratio,
floor_ratio`. What did not fit the GPU is a row that says so; any other error makes the exit code 1, and the
other stages run all the same. Leave the GPU otherwise idle.
"""

import importlib
import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from bench import DOOR, ROOT, as_document, print_document
from bench_gpu_measure import OUT_OF_MEMORY, TINY, Line, Sizes
from finetune import choose_device
from options import option, parse, user_errors

# Each is a function of that name in a module beside this one, and the seconds that it may take: 9 minutes.
Stage = Literal["dequantize", "linear", "train", "memory", "decode", "tests", "demo"]
MODULES: dict[Stage, str] = {
    "dequantize": "bench_gpu_kernels",
    "linear": "bench_gpu_kernels",
    "train": "bench_gpu_train",
    "memory": "bench_gpu_train",
    "decode": "bench_gpu_train",
    "tests": "bench_gpu_runs",
    "demo": "bench_gpu_runs",
}
LIMITS: dict[Stage, int] = {
    "dequantize": 50,
    "linear": 25,
    "train": 170,
    "memory": 80,
    "decode": 90,
    "tests": 80,
    "demo": 45,
}
IN_STAGE = "MINQLORA_BENCH_STAGE"  # set in the process of a stage, to its name
PACKAGES = ("torch", "triton", "bitsandbytes", "torchao", "transformers", "peft")
NOTES = (
    "ratio is ours / peer, floor_ratio ours / floor: of speeds above 1 is better, of ms and GiB below 1",
    "speeds and times are medians; peak memory is what was allocated, on a CPU the process's resident set",
    "GB/s count a weight in its dtype and in its 4.127 bits, each moved once",
)


@dataclass
class Config:
    """What can be set."""

    stage: list[Stage] = option([*MODULES], "what to measure")
    device: str | None = option(
        None, "cuda, cuda:1, ... (default: the GPU; with --tiny a CPU if there is none)"
    )
    tiny: bool = option(False, "every stage at toy size: to see that all runs, not how fast")
    output_dir: Path = option(ROOT / "docs" / "results", "folder for gpu_STAGE.json")

    def __post_init__(self) -> None:
        if choose_device(self.device).type == "cpu" and not self.tiny:
            raise ValueError("there is no GPU to measure; --tiny runs every stage at toy size on a CPU")


def main(argv: Sequence[str]) -> None:
    """Measure a stage in this process if it was started for that, else each in one of its own."""
    config = parse(Config, argv, description=__doc__.split("\n\n")[0] if __doc__ else None)
    if stage := os.environ.get(IN_STAGE):
        for line in lines_of(stage, config):  # type: ignore[arg-type]
            print(json.dumps(line), flush=True)
        return
    with user_errors():
        config.output_dir.mkdir(parents=True, exist_ok=True)  # now, not after minutes of measuring
    print(HEADER, flush=True)
    failed = [stage for stage in config.stage if not run(stage, config, argv)]
    if failed:
        print(f"error: something went wrong in {', '.join(failed)}; the rows say what", file=sys.stderr)
        raise SystemExit(1)


def lines_of(stage: Stage, config: Config) -> Iterator[Line]:
    """Yield what the device is, then the rows of a stage as they are measured."""
    device = choose_device(config.device)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # whose streams and events are meant where none is named
    yield {"device": describe(device)}
    measure = getattr(importlib.import_module(MODULES[stage]), stage)
    for line in measure(TINY if config.tiny else Sizes(), device):
        yield line if "skipped" in line else {"stage": stage} | line


def describe(device: torch.device) -> dict[str, Any]:
    """Return what a number depends on besides packages: the device, its driver, Python."""
    facts: dict[str, Any] = {"type": device.type, "python": platform.python_version()}
    if device.type != "cuda":
        return facts | {"name": platform.machine()}
    properties = torch.cuda.get_device_properties(device)
    facts |= {"name": properties.name, "memory_gib": properties.total_memory / 2**30}
    facts |= {"capability": f"{properties.major}.{properties.minor}", "cuda": torch.version.cuda}
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        asked = subprocess.run(command, capture_output=True, text=True)
        facts["driver"] = next(iter(asked.stdout.split()), None)
    return facts


# ---- a stage in a process of its own -----------------------------------------------------------------------


@dataclass
class Result:
    """What came of a stage."""

    rows: list[Line] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    device: dict[str, Any] = field(default_factory=dict)
    failed: str | None = None  # what ended it before its time

    @property
    def errors(self) -> list[str]:
        """What went wrong, except that memory ran out, which is a finding."""
        reasons = [row["reason"] for row in self.rows if "reason" in row]
        wrong = [reason for reason in reasons if not reason.startswith(OUT_OF_MEMORY)]
        return wrong + ([self.failed] if self.failed else [])


def run(stage: Stage, config: Config, argv: Sequence[str]) -> bool:
    """Run a stage, print its rows as they come, write its JSON; return whether all went well."""
    print(f"\n{stage}", flush=True)
    environment = dict(os.environ) | {IN_STAGE: stage, "HF_HUB_OFFLINE": "1"}
    result = collect([sys.executable, str(DOOR), "gpu", *argv], environment, LIMITS[stage])
    for error in result.errors:
        print(f"failed: {error}", flush=True)
    command = shlex.join(["scripts/bench.py", "gpu", *argv])
    document = as_document(command, result.rows, PACKAGES) | {"device": result.device}
    document |= {"skipped": result.skipped, "failed": result.failed, "notes": NOTES}
    print_document(document, config.output_dir / f"gpu_{stage}.json")
    return not result.errors


def collect(command: Sequence[str], environment: Mapping[str, str], limit: float) -> Result:
    """Return what a process, and those that it starts, print as JSON in so many seconds; then end them."""
    result, late = Result(), threading.Event()
    with subprocess.Popen(
        command, env=dict(environment), stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:

        def end() -> None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

        def stop() -> None:
            late.set()
            end()

        timer = threading.Timer(limit, stop)
        timer.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("{"):  # a peer may have something to say as it is imported
                    take(json.loads(line), result)
            process.wait()
        except BaseException:  # Ctrl-C is for them as well
            end()
            raise
        finally:
            timer.cancel()
    if late.is_set():
        result.failed = f"stopped after {limit:g} seconds"
    elif process.returncode:
        result.failed = f"ended with code {process.returncode}"
    return result


def take(line: Line, result: Result) -> None:
    """Note a line of a stage's process, and show it."""
    if "device" in line:
        result.device = line["device"]
    elif "skipped" not in line:
        result.rows.append(line)
        print(as_text(line), flush=True)
    elif line["skipped"] not in result.skipped:
        result.skipped.append(line["skipped"])
        print(f"skipped: {line['skipped']}", flush=True)


HEADER = (
    f"{'case':56}{'metric':20}{'unit':>13}"
    + f"{'ours':>11}{'peer':>11}{'floor':>11}{'/peer':>7}{'/floor':>7}  against"
)


def as_text(row: Line) -> str:
    """Return a row as a line of the table under HEADER."""

    def cell(key: str, width: int, digits: int) -> str:
        return f"{'-' if row[key] is None else format(row[key], f',.{digits}f'):>{width}}"

    digits = 0 if row["unit"] == "tests" else 3 if row["unit"] in ("ms", "nats a token", "") else 2
    numbers = "".join(cell(key, 11, digits) for key in ("ours", "peer", "floor"))
    ratios = cell("ratio", 7, 2) + cell("floor_ratio", 7, 2)
    against = row.get("reason") or row["against"] or ""
    return f"{row['case']:56}{row['metric']:20}{row['unit']:>13}{numbers}{ratios}  {against}"
