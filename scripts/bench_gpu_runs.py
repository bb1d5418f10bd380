"""Stages tests and demo of `bench.py gpu`: what runs in processes of its own, as a user would start it.

tests   the tests that need a GPU (`pytest -m gpu`), by how they ended
demo    scripts/finetune.py on the demo's model and data: its 40 steps beside those of a CPU, committed in
        docs/results/demo_metrics.jsonl, then 200
"""

import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from importlib import util
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from bench import ROOT
from bench_gpu_measure import Line, Sizes, as_row, tried
from demo_assets import DATASET_NAME, MODEL_NAME, build_dataset

CPU_RUN = ROOT / "docs" / "results" / "demo_metrics.jsonl"
CPU = "the demo on a CPU, committed"
OUTCOMES = ("passed", "failed", "skipped")


# ---- tests -------------------------------------------------------------------------------------------------


def tests(sizes: Sizes, device: torch.device) -> Iterator[Line]:
    """Yield how many of the tests marked `gpu` passed, failed and were skipped, with the names of the latter
    two."""
    if not util.find_spec("pytest"):
        yield {"skipped": "pytest is not installed"}
        return
    with TemporaryDirectory() as folder:
        report = Path(folder) / "tests.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
        done = subprocess.run(
            [*command, f"--junitxml={report}", sizes.tests], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        if done.returncode:
            print(done.stdout, file=sys.stderr)
        ended = outcomes(report)
    for outcome in OUTCOMES:
        more: dict[str, Any] = {} if outcome == "passed" else {"tests": ended[outcome]}
        if outcome == "failed" and ended["failed"]:
            more["reason"] = "these tests failed: " + ", ".join(ended["failed"])
        yield as_row("tests marked gpu", outcome, "tests", len(ended[outcome]), **more)


def outcomes(report: Path) -> dict[str, list[str]]:
    """Return the names of the tests of a JUnit report, by how they ended."""
    ended: dict[str, list[str]] = {outcome: [] for outcome in OUTCOMES}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        file = case.get("classname", "").rpartition(".")[2]
        ended[outcome].append(f"{file}.{case.get('name')}")
    return ended


# ---- demo --------------------------------------------------------------------------------------------------


def demo(sizes: Sizes, device: torch.device) -> Iterator[Line]:
    """Yield the losses of the demo's model, trained on the device."""
    assets = ROOT / "assets"
    if not (assets / MODEL_NAME / "config.json").is_file():  # no download while the clock runs
        yield {"skipped": f"{assets / MODEL_NAME} is not there: make demo fetches it"}
        return
    # Data that are there stay, though another Python made them: the CPU's run was of the same, perhaps.
    if not (assets / DATASET_NAME / "heldout.jsonl").is_file():
        build_dataset(assets)
    theirs = read_metrics(CPU_RUN)
    steps = min(40, sizes.demo_steps)
    # The schedule falls over a run's steps: only a run of as many is to be compared.
    ours, reason = tried(lambda: finetune(steps, device))
    yield from beside_cpu(ours, theirs, steps) if ours else [losses_row("40 steps", reason)]
    ours, reason = tried(lambda: finetune(sizes.demo_steps, device))
    name = f"{sizes.demo_steps} steps"
    if not ours:
        yield losses_row(name, reason)
        return
    held_out = [row["eval_loss"] for row in ours if "eval_loss" in row]
    yield as_row(name, "held-out loss", "nats a token", held_out[-1], before=held_out[0])
    yield as_row(name, "loss of the last step", "nats a token", losses(ours)[-1], losses=losses(ours))


def losses_row(name: str, reason: str | None) -> Line:
    """Return the row of a run that came to nothing."""
    return as_row(name, "held-out loss", "nats a token", None, reason=reason)


def beside_cpu(ours: list[Line], theirs: list[Line], steps: int) -> Iterator[Line]:
    """Yield the losses beside the CPU's, or alone if that learned from other data or took other steps.

    The data are this Python's own docstrings; another version has others, which the token counts show.
    """
    name = f"{steps} steps"

    def tokens(rows: list[Line]) -> list[tuple[int, int]]:
        return [(row["num_tokens"], row["supervised_tokens"]) for row in rows if "loss" in row]

    same = tokens(ours) == tokens(theirs)
    more: Line = {"against": CPU} if same else {"note": "the CPU's run was of other data, or other steps"}
    for metric, of in (("held-out loss", held_out_loss), ("loss of the last step", last_loss)):
        yield as_row(name, metric, "nats a token", of(ours), of(theirs) if same else None, **more)
    if same:
        pairs = zip(losses(ours), losses(theirs), strict=True)
        apart = max(abs(mine / other - 1) for mine, other in pairs)
        yield as_row(name, "largest relative difference of a step's loss", "", apart, **more)


def losses(rows: list[Line]) -> list[float]:
    """Return the loss of each step."""
    return [row["loss"] for row in rows if "loss" in row]


def last_loss(rows: list[Line]) -> float:
    """Return the loss of the last step."""
    return losses(rows)[-1]


def held_out_loss(rows: list[Line]) -> float:
    """Return the last loss on what is held out."""
    return [row["eval_loss"] for row in rows if "eval_loss" in row][-1]


def finetune(steps: int, device: torch.device) -> list[Line]:
    """Run scripts/finetune.py as scripts/demo.py does; return its metrics."""
    with TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [sys.executable, "scripts/finetune.py", "--config", "scripts/configs/demo.yaml"]
        # Eager, as the CPU's run that it is set beside was.
        flags = ["--max_steps", str(steps), "--device", str(device), "--output_dir", str(run)]
        flags += ["--compile", "off"]
        done = subprocess.run([*command, *flags], cwd=ROOT, stdout=subprocess.DEVNULL)
        if done.returncode:
            raise RuntimeError(f"finetune.py ended with code {done.returncode}")
        return read_metrics(run / "metrics.jsonl")


def read_metrics(path: Path) -> list[Line]:
    """Return the rows of a run's metrics."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
