"""Measure minqlora on this machine, against what people use today.

    make bench                                  # python scripts/bench.py train
    make bench ARGS="quant --output docs/results/quant_cpu.json"
    python scripts/bench.py error --help

train    a QLoRA training step: speed and peak memory, against transformers + PEFT + bitsandbytes
quant    quantizing, dequantizing and the NF4 linear layer: speed, against bitsandbytes and torchao
error    what each 4-bit code loses, on normal numbers and on a real model
data     a dataset of 2 million rows: time to prepare it, and memory to train on it
load     a 7B-shaped checkpoint into 4 bits: time and peak memory, against transformers + bitsandbytes
gpu      all that only a GPU can tell, in stages: kernels, training, memory, decoding, tests, the demo

Each prints a table for people and, as the last line of output, the JSON document that --output writes too.
"""

import ctypes.util
import importlib
import json
import os
import platform
import re
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from typing import Any

import torch

from demo_assets import build_dataset
from minqlora.files import write_atomically
from minqlora.run import version_of
from options import user_errors

DOOR = Path(__file__).resolve()  # what a benchmark starts to have a process of its own
ROOT = DOOR.parent.parent
# Each is the module bench_NAME beside this one.
BENCHMARKS = ("train", "quant", "error", "load", "data", "gpu")


def main() -> None:
    """Hand the command line to the benchmark that its first word names."""
    name, *argv = sys.argv[1:] or [""]
    if name in ("--help", "-h"):
        print(__doc__)
        return
    if name not in BENCHMARKS:
        wrong = f"there is no benchmark {name!r}" if name else "no benchmark named"
        print(f"error: {wrong}; the first word is one of {', '.join(BENCHMARKS)}", file=sys.stderr)
        raise SystemExit(2)
    sys.argv[0] += f" {name}"  # what its --help shows as the command
    # Imported here, because each imports this file for what is below, and takes its time to load.
    importlib.import_module(f"bench_{name}").main(argv)


# ---- what the benchmarks share -----------------------------------------------------------------------------


def as_document(command: str, rows: Sequence[dict[str, Any]], packages: Sequence[str]) -> dict[str, Any]:
    """Return what is kept of a benchmark: machine, versions of the packages that are installed, command,
    rows."""
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}",
        "versions": {name: version_of(name) for name in packages if util.find_spec(name)},
        "command": command,
        "rows": rows,
    }


@dataclass
class Allocator:
    """What hands out memory to a process that measures, and the environment that makes it do so."""

    name: str
    library: str
    environment: dict[str, str]


def allocators(wanted: Sequence[str]) -> dict[str, Allocator]:
    """Return those of the allocators wanted, glibc and tcmalloc, that are installed."""
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    environment["HF_HUB_OFFLINE"] = "1"  # the peers as installed, no kernel fetched
    libc = " ".join(platform.libc_ver()).strip() or "the system's"
    found = {"glibc": Allocator("glibc", libc, environment)}
    if sys.platform == "linux":  # LD_PRELOAD is Linux's
        library = ctypes.util.find_library("tcmalloc_minimal") or ctypes.util.find_library("tcmalloc")
        if library is not None:
            found["tcmalloc"] = Allocator("tcmalloc", library, environment | {"LD_PRELOAD": library})
    return {name: found[name] for name in wanted if name in found}


def take_turns(
    benchmark: str,
    names: Sequence[str],
    flags: Sequence[str],
    rounds: int,
    shown: str,
    environment: dict[str, str] | None = None,
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, dict[str, float]]]:
    """Run a benchmark's contenders in turn, each time in a process of its own, whose last line of output is
    JSON; return what each found in each round, and the medians of the numbers.

    shown: the format of the line that is printed of a round, with the keys of that JSON and `name`.
    environment: of the processes; None: this one's.
    """
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in names:
            command = [sys.executable, str(DOOR), benchmark, *flags, "--contender", name]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"round {turn + 1}  " + shown.format(name=name, **found[name][-1]), flush=True)
    medians = {
        name: {
            key: statistics.median(run[key] for run in runs)
            for key, value in runs[0].items()
            if isinstance(value, int | float)
        }
        for name, runs in found.items()
    }
    return found, medians


def data_file(named: Path | None) -> Path:
    """Return the file named, or GSM8K where MINQLORA_DATA says that it is, or else the demo's data."""
    shared = Path(os.environ.get("MINQLORA_DATA", "")) / "gsm8k_train.jsonl"
    return named or (shared if shared.is_file() else build_dataset(ROOT / "assets")[0])


def print_document(document: dict[str, Any], output: Path | None) -> None:
    """Print a document as the last line, and write it to `output`. Printed first: what took minutes to
    measure must not be lost to a folder that cannot be written to."""
    print(json.dumps(document), flush=True)
    if output is not None:
        with user_errors():
            output.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(output, (json.dumps(document, indent=1) + "\n").encode())


def parse_shape(text: str) -> tuple[int, int]:
    """Return the rows and columns of `576x1536`; raises ValueError for anything else."""
    match = re.fullmatch(r"([1-9][0-9]*)x([1-9][0-9]*)", text)
    if match is None:
        raise ValueError(f"expected a shape, rows x columns, as in 576x1536; got {text!r}")
    return int(match[1]), int(match[2])


if __name__ == "__main__":
    main()
