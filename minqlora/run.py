"""Chapter 17. The run folder: what a training run leaves behind, readable at any moment.

    runs/demo-1/
      config.yaml              the configuration as it was run
      environment.json         versions, device, dtype
      metrics.jsonl            one line a logged step or evaluation
      adapter_model.safetensors, adapter_config.json      the result
      completed                written last: its presence says the run came to its end

A folder belongs to one run. Nothing is ever written over another run's results: a folder that holds anything
is refused.

Every file appears whole or not at all; metrics.jsonl only ever grows by whole lines.

Before: generate.
"""

import json
import math
import platform
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


def require_unused(folder: Path) -> None:
    """Raise ValueError unless `folder` does not exist yet or is empty."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: is a file; choose another --output_dir")
    holds = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    if holds:
        what = "another run" if "config.yaml" in holds else f"other files ({holds[0]}, ...)"
        raise ValueError(f"{folder}: holds {what}; choose another --output_dir, or move it away")


def next_run_folder(parent: Path, name: str) -> Path:
    """Return the path `parent/name-K` with the smallest K above all that are there; it is not made yet."""
    names = [path.name for path in parent.iterdir()] if parent.is_dir() else []
    taken = [other.removeprefix(f"{name}-") for other in names if other.startswith(f"{name}-")]
    return parent / f"{name}-{max((int(number) for number in taken if number.isdecimal()), default=0) + 1}"


class MetricsLog:
    """`metrics.jsonl`: append one JSON object a line, in the file as soon as it is written.

    The file must be new, so that of two runs started at once only one gets a folder.
    """

    def __init__(self, folder: Path):
        self._file = open(folder / "metrics.jsonl", "x", encoding="utf-8", buffering=1)  # noqa: SIM115 (open for a run)

    def write(self, row: Mapping[str, Any]) -> None:
        """Append a row; numbers that JSON cannot hold (NaN, infinity) are written as null."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        self._file.write(json.dumps(finite) + "\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def environment(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Return what a run depended on besides its configuration: versions, platform, device, compute dtype."""
    packages = ("minqlora", "torch", "safetensors", "tokenizers", "numpy")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "compute_dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "versions": {name: _version(name) for name in packages},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # run from a source tree that was never installed
        return None


def peak_memory_gib(device: torch.device) -> float:
    """Return the peak memory so far in GiB: torch's allocator's on a GPU, else the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource
    except ImportError:  # Windows has no such module
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20  # bytes there, KiB elsewhere
