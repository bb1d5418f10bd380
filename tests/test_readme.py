"""Every command and every piece of Python in the README runs, on a small model and a few rows."""

import io
import json
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")

# Commands are set in by four spaces; what stands behind two spaces and a # is a comment.
LINES = [re.sub(r"\s{2,}#.*", "", line[4:]) for line in README.splitlines() if line.startswith("    ")]
COMMANDS = [line for line in LINES if re.match(r"(python|echo|make|pip|head|tail) ", line)]
PYTHON = re.findall(r"```python\n(.*?)```", README, re.S)


@pytest.fixture(scope="module")
def place(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that the README's commands name."""
    folder = tmp_path_factory.mktemp("readme")
    shutil.copytree(tiny_model, folder / "MODEL")
    rows = [{"question": f"What is {n} plus 1?", "answer": f"It is\n#### {n + 1}"} for n in range(24)]
    for name, some in (("train.jsonl", rows[:20]), ("heldout.jsonl", rows[20:])):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in some))
    pairs = [f'"{row["question"]}","{row["answer"].splitlines()[0]}"\n' for row in rows[:20]]
    (folder / "train.csv").write_text("input,output\n" + "".join(pairs))
    (folder / "prompts.txt").write_text("One?\nTwo?\n")
    (folder / "some.txt").write_text("It is a truth universally acknowledged. " * 20)
    return folder


@pytest.fixture
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "cache"))
    monkeypatch.setenv("NO_COLOR", "1")


def run(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run `python scripts/NAME.py ...`, or `echo TEXT | python ...`, as a shell does but in this process."""
    text, _, piped = command.partition(" | ")
    said = shlex.split(text)[1] + "\n" if piped else "Hello\n"
    _, script, *arguments = shlex.split(piped or text)
    monkeypatch.setattr(sys, "stdin", io.StringIO(said))
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as stop:
        assert not stop.code, f"{command} ended with {stop.code}"


def test_there_are_commands_for_every_script_that_people_run() -> None:
    scripts = {found for command in COMMANDS for found in re.findall(r"scripts/(\w+)\.py", command)}
    assert scripts >= {"doctor", "plan", "finetune", "chat", "evaluate", "merge", "report", "quantize"}
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"make ([a-z0-9-]+)", "\n".join(COMMANDS))) <= targets


# In the order of the README: what one command makes, a later one reads.
@pytest.mark.parametrize("command", [line for line in COMMANDS if "python scripts/" in line])
@pytest.mark.usefixtures("here")
def test_the_command_runs(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run(command, monkeypatch)


@pytest.mark.parametrize("code", PYTHON, ids=[code.splitlines()[0][:40] for code in PYTHON])
@pytest.mark.usefixtures("here")
def test_the_python_runs(code: str) -> None:
    import safetensors.torch

    from minqlora import NF4Tensor

    weight = torch.randn(64, 128)
    module = torch.nn.Linear(128, 64, bias=False)
    module.weight = torch.nn.Parameter(NF4Tensor.from_float(weight), requires_grad=False)
    names: dict[str, Any] = dict(F=F, torch=torch, safetensors=safetensors, NF4Tensor=NF4Tensor)
    names |= dict(input_ids=torch.arange(8)[None], dense=weight, x=torch.randn(3, 128))
    names |= dict(buffer=torch.empty(64, 128), module=module, returns=torch.randn(100).numpy() / 50)
    exec(code.replace('"ANOTHER"', '"runs/MODEL-1"'), names)


@pytest.mark.parametrize(
    "row", re.findall(r"\| `(llama-\d+b)` \| (\d+GB) \| ([\d.]+) GiB \| (.*) \|", README)
)
def test_the_recipes_are_what_the_plan_says(
    row: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, card, planned, moments = row
    run(f"python scripts/plan.py {model} --memory {card} --max_seq_length 512 --json", monkeypatch)
    plan = json.loads(capsys.readouterr().out)["plans"]["qlora"]
    assert f"{plan['total'] / 2**30:.1f}" == planned
    on_host = plan["on_host"] / 2**30
    assert moments == (f"{on_host:.1f} GiB in host memory" if on_host else "on the card")
