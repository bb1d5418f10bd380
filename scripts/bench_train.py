"""Measure training against the stack that people use today, on this machine.

    make bench        or        python scripts/bench.py train --output docs/results/train_cpu.json
    python scripts/bench.py train --cases random --rounds 1          # a quick look
    python scripts/bench.py train --cases growth curve

QLoRA steps with adapters of rank 16 on every linear layer, in float32: four examples of GSM8K a step, with
and without checkpointing, and a row of random tokens that are all supervised. Ours and transformers + PEFT +
bitsandbytes train on the same tokens from the same adapter, and ours unquantized on the random ones too. Ours
lays examples end to end, the peer pads them to the longest, as its collator does; padding counts for nobody.
They take turns, each time in a process of its own, because peak memory is a process's and a shared machine
drifts: a ratio is the median over rounds of two runs that were neighbours. Leave the machine otherwise idle.

`growth` is how time and memory grow with the length of a row, with the batch and with the model; `curve` is
the loss of both over 100 steps. The last line of output is the JSON that --output writes.
"""

import json
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch

from bench import ROOT, Allocator, allocators, as_document, data_file, print_document, take_turns
from bench_load import LLAMA_2_7B, make_checkpoint
from demo_assets import fetch_model
from finetune import accumulate_gradients
from minqlora import PagedAdamW, add_lora, load_adapter, load_model, save_adapter
from minqlora.batch import collate, tokenize
from minqlora.data import IGNORE, Example
from minqlora.run import keep_freed_memory, peak_memory_gib
from minqlora.tokenizer import Tokenizer
from options import option, parse, user_errors

MODEL = "smollm2-135m"
# What else is trained, in these shapes with random weights.
SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-360m": {
        "vocab_size": 49152,
        "hidden_size": 960,
        "intermediate_size": 2560,
        "num_hidden_layers": 32,
        "num_attention_heads": 15,
        "num_key_value_heads": 5,
        "tie_word_embeddings": True,
    },
    "tinyllama-1.1b": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_key_value_heads": 4,
    },
}
CONTENDERS = ("minqlora", "minqlora-16bit", "peer")
PEER = ("transformers", "peft", "bitsandbytes")


@dataclass
class Case:
    """What is trained in a case."""

    data: Literal["gsm8k", "random"] = "random"
    batch: int = 1  # examples a step
    tokens: int = 512  # of a random example; of any other at most
    checkpointing: bool = False
    model: str = MODEL
    steps: int | None = None  # timed; None: as many as --steps says
    contenders: Sequence[str] = CONTENDERS
    rounds: int | None = None


GROWTH: dict[str, Any] = dict(steps=2, rounds=1, contenders=("minqlora", "peer"))
CASES = {
    "main": {
        "gsm8k": Case("gsm8k", 4, contenders=("minqlora", "peer")),
        "gsm8k-checkpointed": Case("gsm8k", 4, checkpointing=True, contenders=("minqlora", "peer")),
        "random": Case(),
    },
    "growth": {
        **{f"length-{n}": Case(tokens=n, **GROWTH) for n in (256, 512, 1024, 2048, 4096)},
        **{f"batch-{n}": Case(batch=n, tokens=256, **GROWTH) for n in (2, 4, 8)},
        **{f"model-{name}": Case(model=name, **GROWTH) for name in SHAPES},
    },
    "curve": {
        "curve": Case("gsm8k", 4, steps=100, rounds=1, contenders=("minqlora", "peer")),
    },
}
BY_NAME = {name: case for group in CASES.values() for name, case in group.items()}


@dataclass
class Config:
    """What can be set."""

    cases: list[str] = option(["main"], "cases, or groups of them", choices=[*CASES, *BY_NAME])
    steps: int = option(5, "timed steps a process, after one that warms up")
    rounds: int = option(3, "processes of each contender, in turn")
    allocators: list[Literal["glibc", "tcmalloc"]] = option(
        ["glibc", "tcmalloc"], "memory allocators to measure under; tcmalloc where it is installed"
    )
    dtype: Literal["float32", "bfloat16"] = option("float32", "compute dtype of all contenders")
    device: str = option("cpu", "cpu, cuda, ...")
    data: Path | None = option(
        None,
        "questions and answers (default: gsm8k_train.jsonl in the folder MINQLORA_DATA, else docstrings)",
    )
    output: Path | None = option(None, "write the JSON here as well")
    contender: Literal["all", "minqlora", "minqlora-16bit", "peer"] = option(
        "all", "run this one alone, in this process"
    )
    adapter: Path | None = option(None, "with --contender, the adapter to start from (default: a new one)")


def main(argv: Sequence[str]) -> None:
    """Run one contender, or all in turn, and print what came out."""
    config = parse(Config, argv, description=__doc__.split("\n\n")[0] if __doc__ else None)
    names = [name for chosen in config.cases for name in CASES.get(chosen, [chosen])]
    if config.contender == "all":
        compare(config, names, argv)
        return
    with user_errors():
        case = BY_NAME[names[0]]
        folder = model_folder(case.model)
        batches = make_batches(case, config, folder)
    start = peer if config.contender == "peer" else ours
    step, optimizer = start(folder, case, config)
    print(json.dumps(measure(step, optimizer, batches, torch.device(config.device))))


def model_folder(name: str) -> Path:
    """Return the folder of a model, which is made if it is not there."""
    if name == MODEL:
        return fetch_model(ROOT / "assets")
    folder = ROOT / "assets" / f"bench-{name}"
    make_checkpoint(folder, LLAMA_2_7B | SHAPES[name])
    return folder


def make_batches(case: Case, config: Config, folder: Path) -> list[list[Example]]:
    """Return the examples of each step, one step more than is timed."""
    steps = (case.steps or config.steps) + 1
    if case.data == "random":
        generator = torch.Generator().manual_seed(0)
        rows = [
            torch.randint(0, 32000, (case.tokens,), generator=generator).tolist()
            for _ in range(steps * case.batch)
        ]
        examples: Any = [Example(row, row) for row in rows]
    else:
        examples, _ = tokenize(
            [data_file(config.data)], Tokenizer(folder), case.tokens, ROOT / "assets" / "tokens"
        )
    return [[examples[i * case.batch + j] for j in range(case.batch)] for i in range(steps)]


# ---- the contenders: each a function that runs a step's examples forward and backward, and an optimizer ----

Step = Callable[[Sequence[Example]], float]


def ours(folder: Path, case: Case, config: Config) -> tuple[Step, torch.optim.Optimizer]:
    """Return minqlora, set up as scripts/finetune.py does."""
    keep_freed_memory()
    quant_type = "nf4" if config.contender == "minqlora" else None
    model = load_model(
        folder, quant_type=quant_type, dtype=getattr(torch, config.dtype), device=config.device
    )
    if config.adapter is None:
        add_lora(model, r=16, alpha=32)
    else:
        load_adapter(model, config.adapter)
    model.train()
    model.model.gradient_checkpointing = case.checkpointing

    def step(examples: Sequence[Example]) -> float:
        return accumulate_gradients(model, [collate(examples)])

    return step, PagedAdamW([parameter for parameter in model.parameters() if parameter.requires_grad])


def peer(folder: Path, case: Case, config: Config) -> tuple[Step, torch.optim.Optimizer]:
    """Return transformers + PEFT + bitsandbytes, set up as their documentation does."""
    from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    dtype = getattr(torch, config.dtype)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    base = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, device_map=config.device, quantization_config=quantization
    )
    base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=case.checkpointing)
    if config.adapter is None:
        lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        model: Any = get_peft_model(base, lora)
    else:
        model = PeftModel.from_pretrained(base, str(config.adapter), is_trainable=True)
    model.train()

    def step(examples: Sequence[Example]) -> float:
        longest = max(len(example.input_ids) for example in examples)

        def padded(rows: Iterable[list[int]], value: int) -> torch.Tensor:
            return torch.tensor([row + [value] * (longest - len(row)) for row in rows], device=config.device)

        loss = model(
            input_ids=padded((example.input_ids for example in examples), 0),
            labels=padded((example.labels for example in examples), IGNORE),
            attention_mask=padded(([1] * len(example.input_ids) for example in examples), 0),
        ).loss
        loss.backward()
        return loss.item()

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return step, torch.optim.AdamW(trained, lr=2e-4, weight_decay=0.0)


def measure(
    step: Step, optimizer: torch.optim.Optimizer, batches: Sequence[Sequence[Example]], device: torch.device
) -> dict[str, Any]:
    """Return what training steps took, the first of which is not timed, the peak of memory and the losses."""
    seconds, losses = [], []
    for examples in batches:
        began = time.perf_counter()
        losses.append(step(examples))
        optimizer.step()
        optimizer.zero_grad()
        if device.type != "cpu":
            torch.accelerator.synchronize()
        seconds.append(time.perf_counter() - began)
    timed = [collate(examples) for examples in batches[1:]]
    total = sum(seconds[1:])
    return {
        "tokens_per_s": sum(sum(batch.lengths) for batch in timed) / total,
        "supervised_per_s": sum(batch.supervised for batch in timed) / total,
        "step_s": statistics.median(seconds[1:]),
        "peak_mb": peak_memory_gib(device) * 2**30 / 1e6,
        "losses": losses,
    }


# ---- all in turn -------------------------------------------------------------------------------------------

METRICS = {"tokens_per_s": "tokens/s", "supervised_per_s": "tokens/s", "step_s": "s", "peak_mb": "MB"}
SHOWN = "{name:16}{tokens_per_s:8.1f} tokens/s {peak_mb:8.0f} MB"


def compare(config: Config, names: Sequence[str], argv: Sequence[str]) -> None:
    """Run the contenders of each case in turn, each in a process of its own; print a table and the JSON."""
    skipped = [
        f"{name} is not installed, so the peer is not measured" for name in PEER if not util.find_spec(name)
    ]
    chosen = allocators(config.allocators)
    skipped += [f"{name} is not installed" for name in config.allocators if name not in chosen]
    for reason in skipped:
        print(f"skipped: {reason}")
    rows: list[dict[str, Any]] = []
    with TemporaryDirectory() as folder:
        for name in names:
            adapter = new_adapter(BY_NAME[name].model, Path(folder))
            for allocator in chosen.values():
                rows += compare_case(name, allocator, adapter, config)
    print(f"\n{HEADER}")
    for row in rows:
        if row["metric"] != "losses":
            print(as_text(row))
    command = " ".join(["scripts/bench.py train", *argv])
    document = as_document(command, rows, ("torch", *PEER))
    print_document(document | {"skipped": skipped, "threads": torch.get_num_threads()}, config.output)


def new_adapter(model: str, folder: Path) -> Path:
    """Return a folder with a new adapter for a model, from which all contenders start."""
    path = folder / model
    if not path.is_dir():
        torch.manual_seed(0)
        base = load_model(model_folder(model))
        add_lora(base, r=16, alpha=32)
        save_adapter(base, path)
    return path


def compare_case(name: str, allocator: Allocator, adapter: Path, config: Config) -> list[dict[str, Any]]:
    """Run the contenders of a case in turn; return its rows."""
    case = BY_NAME[name]
    contenders = [one for one in case.contenders if one != "peer" or all(map(util.find_spec, PEER))]
    flags = [
        f"--cases={name}",
        f"--steps={config.steps}",
        f"--dtype={config.dtype}",
        f"--device={config.device}",
    ]
    flags += [f"--adapter={adapter}"] + ([f"--data={config.data}"] if config.data else [])
    print(f"\n{name}, under {allocator.name}", flush=True)
    found, _ = take_turns(
        "train", contenders, flags, case.rounds or config.rounds, SHOWN, allocator.environment
    )
    return as_rows(found, name, allocator.name)


def as_rows(found: dict[str, list[dict[str, Any]]], case: str, allocator: str) -> list[dict[str, Any]]:
    """Return a row for each metric: medians of what each contender found, and ours against the others'."""
    rows = []
    for metric, unit in METRICS.items():
        values = {name: [run[metric] for run in runs] for name, runs in found.items()}
        row: dict[str, Any] = {"stage": "train", "case": case, "allocator": allocator}
        row |= {"metric": metric, "unit": unit, "floor": None}
        for key, name in (("ours", "minqlora"), ("ours_16bit", "minqlora-16bit"), ("peer", "peer")):
            row[key] = statistics.median(values[name]) if name in values else None
        for key, name in (("ratio", "peer"), ("ratio_16bit", "minqlora-16bit")):
            pairs = zip(values["minqlora"], values.get(name, []), strict=False)
            ratios = [mine / theirs for mine, theirs in pairs]
            row[key] = statistics.median(ratios) if ratios else None
        rows.append(row | {"rounds": values})
    losses = {name: runs[0]["losses"] for name, runs in found.items()}
    if "peer" in losses:
        apart = [abs(a / b - 1) for a, b in zip(losses["minqlora"], losses["peer"], strict=True)]
        rows.append({"stage": "train", "case": case, "allocator": allocator, "metric": "losses"} | losses)
        rows[-1] |= {"unit": "nats a token", "largest_relative_difference": max(apart)}
    return rows


HEADER = f"{'case':22}{'allocator':10}{'metric':18}{'ours':>9}{'16 bits':>9}{'peer':>9}{'/peer':>7}{'/16':>6}"


def as_text(row: dict[str, Any]) -> str:
    """Return a row as a line of the table under HEADER."""

    def cell(key: str, width: int, digits: int) -> str:
        return f"{'-' if row[key] is None else format(row[key], f'.{digits}f'):>{width}}"

    digits = 2 if row["unit"] == "s" else 1 if row["unit"] == "tokens/s" else 0
    cells = [cell(key, 9, digits) for key in ("ours", "ours_16bit", "peer")]
    cells += [cell("ratio", 7, 2), cell("ratio_16bit", 6, 2)]
    return f"{row['case']:22}{row['allocator']:10}{row['metric']:18}{''.join(cells)}"
