"""Chapter 22. The run folder: what a training run leaves behind, readable at any moment.

    runs/demo-1/
      config.yaml              the configuration as it was run
      environment.json         versions, device, dtype
      metrics.jsonl            one line a logged step or evaluation
      samples.jsonl            what the model answered to the same prompts as it went, if that was asked for
      checkpoint-40/           the run after step 40: the adapter, the optimizer's moments, state.json
      adapter_model.safetensors, adapter_config.json      the result
      sanity.json              whether the adapter does something, seen at the end
      completed                its presence says the run came to its end
      report.html, loss.png    all of this to look at

A folder belongs to one run. Nothing is ever written over another run's results: a folder that holds anything
is refused, unless the run goes on from one of its checkpoints.

Every file appears whole or not at all; metrics.jsonl only ever grows by whole lines. A checkpoint is written
beside its place and renamed into it when all of it is on disk, and its `SHA256SUMS` holds the checksum of
every file (`sha256sum -c` reads it too). So a run can be killed at any instant, in the middle of a save too,
and what is found afterwards either is a checkpoint or says which of its files is damaged::

    .checkpoint-40.partial/  ->  fsync of every file  ->  rename  ->  checkpoint-40/

From a checkpoint a run goes on to the same bits as if it had never stopped: the order of the data is decided
by seed and step, and every random generator's state is kept.

Before: memory. Next: report.
"""

import base64
import ctypes
import hashlib
import importlib.util
import json
import math
import os
import platform
import random
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch

from minqlora.files import fsync_folder, write_atomically


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
    """`metrics.jsonl`, or a log of another name: append one JSON object a line, in the file as soon as it is
    written.

    The file must be new, so that of two runs started at once only one gets a folder. resumed_from: the step
    that a run goes on from; rows of later steps, which will be written again, are taken out first.
    """

    def __init__(self, folder: Path, resumed_from: int | None = None, name: str = "metrics.jsonl"):
        path = folder / name
        self.trackers: list[Tracker] = []  # others who get each row
        if resumed_from is not None and path.exists():
            write_atomically(path, b"".join(_rows_until(path, resumed_from)))
        mode = "x" if resumed_from is None else "a"
        self._file = open(path, mode, encoding="utf-8", buffering=1)  # noqa: SIM115 (open for a run)

    def write(self, row: Mapping[str, Any]) -> None:
        """Append a row; numbers that JSON cannot hold (NaN, infinity) are written as null."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        self._file.write(json.dumps(finite) + "\n")
        for tracker in list(self.trackers):
            try:
                tracker.write(row)
            except Exception as error:  # theirs, of any kind: the run is worth more than its picture
                print(f"warning   {type(tracker).__name__}: {error}; going on without it", file=sys.stderr)
                self.trackers.remove(tracker)

    def close(self) -> None:
        """Close the file, and let the trackers finish."""
        self._file.close()
        for tracker in self.trackers:
            tracker.close()
        self.trackers = []


def _rows_until(path: Path, step: int) -> Iterator[bytes]:
    # A last line that a kill cut short is not a row.
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            row = json.loads(line)
        except ValueError:
            return
        if line.endswith(b"\n") and row.get("step", 0) <= step:
            yield line


# ---- others who show metrics -------------------------------------------------------------------------------


class TensorBoard:
    """The rows of metrics as TensorBoard's scalars, in the folder `tensorboard` of a run."""

    def __init__(self, folder: Path, config: Mapping[str, Any], resumed_from: int | None):
        from torch.utils.tensorboard import SummaryWriter

        # What an earlier session wrote of later steps is hidden: they will come again.
        purged = None if resumed_from is None else resumed_from + 1
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=purged, flush_secs=10)
        self._writer.add_text("config", "\n".join(f"    {name}: {value}" for name, value in config.items()))

    def write(self, row: Mapping[str, Any]) -> None:
        """Write the numbers of a row under their own names."""
        for name, value in row.items():
            if name != "step":
                self._writer.add_scalar(name, value, row["step"])

    def close(self) -> None:
        """Write what is still held back."""
        self._writer.close()


class WeightsAndBiases:
    """The rows of metrics as a run of Weights & Biases, in the folder `wandb` of a run.

    Offline, unless the environment variable WANDB_MODE says otherwise: `wandb sync` uploads it later. A run
    that goes on keeps its id.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], resumed_from: int | None):
        mode: Any = os.environ.get("WANDB_MODE", "offline")
        if mode == "offline":
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # it would speak to a server of its own
        import wandb

        earlier = sorted((folder / "wandb").glob("*run-*-*")) if resumed_from is not None else []
        try:
            self._run = wandb.init(
                project="minqlora",
                name=folder.resolve().name,
                dir=str(folder),
                config={
                    name: str(value) if isinstance(value, Path) else value for name, value in config.items()
                },
                id=earlier[-1].name.rpartition("-")[2] if earlier else None,
                resume="allow" if earlier else None,
                mode=mode,
                settings=wandb.Settings(console="off", quiet=True),
            )
        except Exception as error:  # its own kinds of errors, and those of its network
            why = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(
                f"--report_to wandb: it does not start ({why}); WANDB_MODE=offline needs no account"
            ) from None
        # By our own count of steps: those that are done again after a kill would be refused by wandb's.
        self._run.define_metric("*", step_metric="step")

    def write(self, row: Mapping[str, Any]) -> None:
        """Log a row."""
        self._run.log(dict(row))

    def close(self) -> None:
        """End the run."""
        self._run.finish()


Tracker = TensorBoard | WeightsAndBiases
# By the name of the package that each needs.
TRACKERS: dict[str, type[Tracker]] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}


def require_packages(names: Sequence[str]) -> None:
    """Raise ValueError unless these packages are installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"--report_to {name}: the package is not installed; pip install '.[{name}]'")


# ---- checkpoints -------------------------------------------------------------------------------------------

STATE_FILE = "state.json"
SUMS_FILE = "SHA256SUMS"
_PREFIX = "checkpoint-"


def save_checkpoint(run: Path, step: int, write: Callable[[Path], None], state: Mapping[str, Any]) -> Path:
    """Write `checkpoint-STEP` in a run folder, whole or not at all; return its path.

    write: called with a folder, to write files into it. state: what else is to be kept, as JSON; the step,
    the states of the random generators and the checksums of the files are added. Raises OSError if the disk
    is full, and leaves nothing half-written then.
    """
    final = run / f"{_PREFIX}{step}"
    partial = run / f".{final.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)  # of a save that was killed
    partial.mkdir()
    try:
        write(partial)
        content = {"step": step, **state, "rng": rng_state()}
        write_atomically(partial / STATE_FILE, (json.dumps(content) + "\n").encode())
        sums = [f"{_sha256(path)}  {path.name}\n" for path in sorted(partial.iterdir())]
        write_atomically(partial / SUMS_FILE, "".join(sums).encode())
        if final.exists():
            _discard(final)
        os.replace(partial, final)
        fsync_folder(run)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return final


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Return the state of a checkpoint, every file of which has been compared with its checksum.

    Raises ValueError, naming the file that is missing or damaged.
    """
    sums = path / SUMS_FILE
    try:
        rows = [line.split("  ", 1) for line in sums.read_text(encoding="ascii").splitlines()]
    except FileNotFoundError:
        raise ValueError(f"{sums}: not found, so this is no checkpoint") from None
    except UnicodeDecodeError:
        raise ValueError(f"{sums}: damaged") from None
    checksums = {row[-1]: row[0] for row in rows}
    held = {file.name for file in path.iterdir() if file.is_file()}
    for name in sorted({*checksums, STATE_FILE}):
        if name not in held:
            raise ValueError(f"{path}/{name}: not found, but {SUMS_FILE} lists it")
        if _sha256(path / name) != checksums.get(name):
            raise ValueError(f"{path}/{name}: damaged, its checksum is not the one in {SUMS_FILE}")
    state = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
    if path.name != f"{_PREFIX}{state['step']}":
        raise ValueError(f"{path / STATE_FILE}: is of step {state['step']}, and so of another checkpoint")
    return state


def checkpoints(run: Path) -> list[Path]:
    """Return the checkpoint folders of a run, the newest first."""
    found = [path for path in run.glob(f"{_PREFIX}*") if path.name.removeprefix(_PREFIX).isdecimal()]
    return sorted(found, key=_step, reverse=True)


def newest_checkpoint(run: Path) -> tuple[Path, dict[str, Any], list[str]]:
    """Return the newest checkpoint of a run that is whole, its state, and what is wrong with newer ones.

    Raises ValueError if there is none.
    """
    problems: list[str] = []
    for path in checkpoints(run):
        try:
            return path, read_checkpoint(path), problems
        except ValueError as error:
            problems.append(str(error))
    what = "; ".join(problems) if problems else "it has none; start without --resume_from_checkpoint"
    raise ValueError(f"{run}: no checkpoint to go on from: {what}")


def prune_checkpoints(run: Path, keep: int, also: Path | None = None) -> None:
    """Delete all but the newest `keep` checkpoints of a run, and `also`, the best one, say."""
    for path in checkpoints(run)[keep:]:
        if path != also:
            _discard(path)


def discard_after(run: Path, step: int) -> None:
    """Delete the checkpoints of steps after `step`, from which a run goes on another time.

    They are damaged, or another future than the one to come; and they would count among the newest.
    """
    for path in checkpoints(run):
        if _step(path) > step:
            _discard(path)


def _discard(path: Path) -> None:
    # A checkpoint leaves its name before its files go: a folder of that name is always whole.
    doomed = path.with_name(f".{path.name}.deleted")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(path, doomed)
    shutil.rmtree(doomed)


def _step(path: Path) -> int:
    return int(path.name.removeprefix(_PREFIX))


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def rng_state() -> dict[str, Any]:
    """Return the states of all random generators, as JSON: Python's, NumPy's, PyTorch's on every device."""
    numpy: Any = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [numpy[0], numpy[1].tolist(), *numpy[2:]],
        "torch": _as_text(torch.get_rng_state()),
        "accelerator": [_as_text(state) for state in _device_states()],
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Put all random generators where `rng_state` found them."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(_from_text(state["torch"]))
    for index, text in enumerate(state["accelerator"]):
        torch.get_device_module().set_rng_state(_from_text(text), index)


def _device_states() -> list[torch.Tensor]:
    module = torch.get_device_module()
    if not torch.accelerator.is_available() or not hasattr(module, "get_rng_state"):
        return []
    return [module.get_rng_state(index) for index in range(torch.accelerator.device_count())]


def _as_text(state: torch.Tensor) -> str:
    return base64.b64encode(state.cpu().numpy().tobytes()).decode()


def _from_text(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


# ---- being told to stop ------------------------------------------------------------------------------------


class StopRequest:
    """What a signal has asked for: `number` is that of SIGINT or SIGTERM once one has come, else None."""

    number: int | None = None

    @property
    def exit_code(self) -> int:
        """What a shell expects of a program that a signal has ended: 130 or 143."""
        return 128 + (self.number or 0)


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Within this context the first SIGINT or SIGTERM is only noted, so that a step can be finished and
    saved; the second ends the process at once.
    """
    request = StopRequest()

    def note(number: int, frame: FrameType | None) -> None:
        """Handle a signal."""
        if request.number is not None:
            os._exit(128 + number)
        request.number = number
        print(
            "\nstopping after this step; once more stops at once, and loses it", file=sys.stderr, flush=True
        )

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---- what a run was ----------------------------------------------------------------------------------------


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
        "versions": {name: version_of(name) for name in packages},
    }


def version_of(package: str) -> str | None:
    """Return the version of a package that is installed, None of one that was put on the path by hand."""
    if package == "torch":
        return torch.__version__  # which tells the build too, for CUDA or for a CPU
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def keep_freed_memory() -> None:
    """Tell the C library to keep for this process what is freed, instead of giving it back to the system.

    A training step allocates what the step before has freed, and glibc otherwise fetches those pages from the
    kernel every time, zeroed one by one: a sixth of a step on a CPU. Other allocators are left alone.
    """
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        mallopt(_M_MMAP_THRESHOLD, 2**25)  # the most that it takes: larger blocks come and go
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


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


def memory_in_use(device: torch.device) -> int:
    """Return the bytes in use now, of what `peak_memory_gib` tells the peak of."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        resident = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:  # not Linux; the peak so far is the next best
        peak = peak_memory_gib(device)
        return 0 if math.isnan(peak) else int(peak * 2**30)
    return resident * os.sysconf("SC_PAGE_SIZE")
