"""The whole story in one command: fetch a model and data, fine-tune, look at what changed.

    make demo        or        python scripts/demo.py

It trains SmolLM2-135M-Instruct, quantized to NF4 with double quantization, to sum up a Python function in one
line. The data are the docstrings of the Python that runs it, with whole modules held out. Options are passed
on to finetune.py, and win over scripts/configs/demo.yaml: python scripts/demo.py --max_steps 20
"""

import itertools
import json
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import torch

from chat import reply
from demo_assets import build_dataset, fetch_model
from minqlora import load_adapter, load_model
from minqlora.lora import adapters_disabled
from minqlora.model import CausalLM
from minqlora.run import next_run_folder
from minqlora.tokenizer import Tokenizer
from options import user_errors

ROOT = Path(__file__).resolve().parent.parent
SHOWN = 3  # held-out prompts to answer before and after


def main() -> int:
    """Prepare, train in a process of its own, compare. Returns the exit code."""
    with user_errors():
        model_folder = fetch_model(ROOT / "assets")
        _, held_out = build_dataset(ROOT / "assets")
    run = next_run_folder(ROOT / "runs", "demo")
    shown_run = run.relative_to(ROOT)
    command = [sys.executable, "scripts/finetune.py", "--config", "scripts/configs/demo.yaml"]
    code = subprocess.run([*command, "--output_dir", str(shown_run), *sys.argv[1:]], cwd=ROOT).returncode
    if code:
        return code
    print_improvement(run)
    model = load_model(model_folder, dtype=torch.float32)  # as demo.yaml trains it
    load_adapter(model, run)
    print_answers(model.eval(), Tokenizer(model_folder), held_out)
    print(f"\nTalk to it:  .venv/bin/python scripts/chat.py --adapter {shown_run}")
    return 0


def print_improvement(folder: Path) -> None:
    """Print held-out loss and perplexity before and after, and the peak memory of training."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    evaluations = [row for row in rows if "eval_loss" in row]
    first, last = evaluations[0], evaluations[-1]
    change = last["eval_loss"] / first["eval_loss"] - 1
    print(f"\n{'':20}{'before':>10}{'after':>10}")
    print(f"{'held-out loss':20}{first['eval_loss']:10.3f}{last['eval_loss']:10.3f}   {change:+.0%}")
    print(f"{'held-out perplexity':20}{first['eval_perplexity']:10.2f}{last['eval_perplexity']:10.2f}")
    peak = max(row["peak_memory_gib"] for row in rows if "peak_memory_gib" in row)
    print(f"peak memory of the training process: {peak * 2**30 / 1e9:.2f} GB")


def print_answers(model: CausalLM, tokenizer: Tokenizer, held_out: Path) -> None:
    """Print what base and tuned model answer to prompts that neither was trained on."""
    with open(held_out, encoding="utf-8") as file:
        rows = [json.loads(line) for line in itertools.islice(file, SHOWN)]
    for row in rows:
        messages = [{"role": "user", "content": row["prompt"]}]
        with adapters_disabled(model):
            base = one_line(reply(model, tokenizer, messages, max_new_tokens=32))
        tuned = one_line(reply(model, tokenizer, messages, max_new_tokens=32))
        print(f"\n{textwrap.indent(row['prompt'], '  | ')}")
        for name, answer in (("base", base), ("tuned", tuned), ("written by people", row["completion"])):
            print(textwrap.fill(answer, 110, initial_indent=f"  {name:>18}: ", subsequent_indent=" " * 22))


def one_line(pieces: Iterator[str]) -> str:
    """Return generated text on one line."""
    return " ".join("".join(pieces).split())


if __name__ == "__main__":
    sys.exit(main())
