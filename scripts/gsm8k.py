"""GSM8K in one command: split, fine-tune, and let base and tuned model answer what was held out.

    make gsm8k DATA=gsm8k_train.jsonl        or        python scripts/gsm8k.py gsm8k_train.jsonl

DATA is GSM8K's train.jsonl as its authors publish it, a question and an answer that ends in `#### N` a line.
The last 150 questions are held out, the rest is learned from (scripts/configs/gsm8k.yaml says how), and
evaluate.py sets base and adapter side by side: exact match, with Wilson's intervals. Everything stays in
runs/gsm8k-1 (-2, ...), the two parts of the data beside it; --output keeps the figures apart, with the loss
on held-out answers before and after.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demo_assets import fetch_model
from finetune import as_json
from minqlora.files import write_atomically
from minqlora.run import next_run_folder, require_unused
from options import REQUIRED, option, parse, user_errors

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Config:
    """What can be set; the rest stands in scripts/configs/gsm8k.yaml."""

    data: Path = option(REQUIRED, "GSM8K's train.jsonl", positional=True)
    model: Path | None = option(None, "folder of the base model (default: the demo's, SmolLM2-135M-Instruct)")
    output_dir: Path | None = option(None, "folder for the run (default: runs/gsm8k-1, -2, ...)")
    held_out: int = option(150, "questions at the end of the file to be held out and answered")
    max_steps: int = option(48, "optimizer steps of 1,024 tokens")
    max_new_tokens: int = option(200, "longest answer in tokens; nine in ten of the file's are shorter")
    batch_size: int = option(75, "questions that are answered at once")
    output: Path | None = option(None, "JSON file for the figures, without the answers")

    def __post_init__(self) -> None:
        """Refuse values that cannot mean anything."""
        if self.held_out < 1:
            raise ValueError(f"--held_out must be at least 1, got {self.held_out}")
        if self.output is not None and not self.output.resolve().parent.is_dir():
            raise ValueError(f"--output {self.output}: there is no such folder")


def split(data: Path, n_held_out: int, folder: Path) -> tuple[Path, Path]:
    """Write the first and the last lines of a file as two files, and return these: to learn, to answer."""
    if not data.is_file():
        raise ValueError(
            f"{data}: no such file; DATA is GSM8K's train.jsonl, from github.com/openai/grade-school-math "
            "(grade_school_math/data/train.jsonl)"
        )
    lines = data.read_bytes().splitlines(keepends=True)
    if len(lines) <= n_held_out:
        raise ValueError(f"{data}: {len(lines)} lines, of which --held_out {n_held_out} leave none to learn")
    folder.mkdir(parents=True, exist_ok=True)
    parts = (("train", lines[:-n_held_out]), ("heldout", lines[-n_held_out:]))
    for name, part in parts:
        write_atomically(folder / f"gsm8k_{name}.jsonl", b"".join(part))
    return folder / "gsm8k_train.jsonl", folder / "gsm8k_heldout.jsonl"


def figures(run: Path, results: Path) -> dict[str, Any]:
    """Return what evaluate.py found, the answers left out, beside the held-out loss before and after."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [row["eval_loss"] for row in rows if "eval_loss" in row]
    document = json.loads(results.read_text(encoding="utf-8"))
    del document["answers"]
    return {
        "command": "make gsm8k",
        "steps": rows[-1]["step"],
        "num_tokens": max(row.get("num_tokens", 0) for row in rows),
        "held_out_loss": {"before": losses[0], "after": losses[-1]},
    } | document


def main() -> int:
    """Split, train and evaluate, the latter two in processes of their own. Returns the exit code."""
    config = parse(Config, description=__doc__.split("\n\n")[0] if __doc__ else None)
    run = (config.output_dir or next_run_folder(ROOT / "runs", "gsm8k")).resolve()
    with user_errors():
        require_unused(run)
        train, held_out = split(config.data, config.held_out, run.with_name(f"{run.name}-data"))
        model = (config.model or fetch_model(ROOT / "assets")).resolve()
    results = run / "gsm8k.json"
    commands: list[list[Any]] = [
        ["finetune.py", "--config", ROOT / "scripts" / "configs" / "gsm8k.yaml", "--model", model]
        + ["--dataset", train, "--eval_dataset", held_out, "--output_dir", run]
        + ["--max_steps", config.max_steps],
        ["evaluate.py", "--adapter", run, "--questions", held_out, "--output", results, "--dtype", "float32"]
        + ["--max_new_tokens", config.max_new_tokens, "--batch_size", config.batch_size],
    ]
    for script, *arguments in commands:
        code = subprocess.run([sys.executable, ROOT / "scripts" / script, *map(str, arguments)]).returncode
        if code:
            return code
    if config.output is not None:
        write_atomically(config.output, as_json(figures(run, results)))
    print(f"Talk to it:  .venv/bin/python scripts/chat.py --adapter {run}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
