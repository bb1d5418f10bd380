"""Measure minqlora against the stack that people use today, on this machine.

    make bench        or        python scripts/bench.py train --output docs/results/train_cpu.json

One QLoRA training step of the demo model: a row of random tokens, all supervised, and adapters of rank 16 on
every linear layer. Ours, ours unquantized, and transformers + PEFT + bitsandbytes take turns, each time in a
process of its own, because peak memory is a process's and a shared machine drifts: compare the medians. Leave
the machine otherwise idle. The last line of output is the JSON that --output writes.
"""

import json
import os
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from typing import Any, Literal

import torch

from bench import ROOT, as_document, print_document, take_turns
from demo_assets import fetch_model
from minqlora import PagedAdamW, add_lora, load_model
from minqlora.loss import supervised_loss
from options import option, parse, user_errors


@dataclass
class Config:
    """What can be set."""

    tokens: int = option(512, "length of the row of random tokens")
    steps: int = option(5, "timed steps a process, after one that warms up")
    rounds: int = option(3, "processes of each contender, in turn")
    dtype: Literal["float32", "bfloat16"] = option("float32", "compute dtype of all contenders")
    gradient_checkpointing: bool = option(False, "recompute each block in backward")
    output: Path | None = option(None, "write the JSON here as well")
    contender: Literal["all", "minqlora", "minqlora-16bit", "peer"] = option(
        "all", "run this one alone, in this process"
    )


def main(argv: Sequence[str]) -> None:
    """Run one contender, or all in turn, and print what came out."""
    config = parse(Config, argv, description=__doc__.split("\n\n")[0] if __doc__ else None)
    with user_errors():
        folder = fetch_model(ROOT / "assets")
    if config.contender == "peer":
        print(json.dumps(measure(*peer(folder, config), config)))
    elif config.contender != "all":
        print(json.dumps(measure(*ours(folder, config), config)))
    else:
        compare(config)


def ours(
    folder: Path, config: Config
) -> tuple[Callable[[torch.Tensor], torch.Tensor], torch.optim.Optimizer]:
    """Return a function from tokens to loss, and the optimizer, of minqlora."""
    quant_type = "nf4" if config.contender == "minqlora" else None
    model = load_model(folder, quant_type=quant_type, dtype=getattr(torch, config.dtype))
    add_lora(model, r=16, alpha=32)
    model.train()
    model.model.gradient_checkpointing = config.gradient_checkpointing

    def loss(tokens: torch.Tensor) -> torch.Tensor:
        targets = torch.cat([tokens[:, 1:], tokens.new_full((1, 1), -100)], dim=1)
        return supervised_loss(model.model(tokens), targets, model.lm_head) / (tokens.numel() - 1)

    return loss, PagedAdamW([parameter for parameter in model.parameters() if parameter.requires_grad])


def peer(
    folder: Path, config: Config
) -> tuple[Callable[[torch.Tensor], torch.Tensor], torch.optim.Optimizer]:
    """Return the same of transformers + PEFT + bitsandbytes, set up as their documentation does."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    dtype = getattr(torch, config.dtype)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    base = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, device_map="cpu", quantization_config=quantization
    )
    base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=config.gradient_checkpointing)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, lora)
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return lambda tokens: model(input_ids=tokens, labels=tokens).loss, torch.optim.AdamW(trained, lr=2e-4)


def measure(
    loss: Callable[[torch.Tensor], torch.Tensor], optimizer: torch.optim.Optimizer, config: Config
) -> dict[str, float]:
    """Return a training step's median time, tokens a second, the process's peak memory, and the last loss."""
    times = []
    for step in range(config.steps + 1):
        tokens = torch.randint(0, 49152, (1, config.tokens), generator=torch.Generator().manual_seed(step))
        began = time.perf_counter()
        value = loss(tokens)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - began)
    seconds = statistics.median(times[1:])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "step_s": seconds,
        "tokens_per_s": config.tokens / seconds,
        "peak_rss_mb": peak,
        "loss": value.item(),
    }


def compare(config: Config) -> None:
    """Run the contenders in turn, each in a process of its own; print a table and the JSON document."""
    names = ["minqlora", "minqlora-16bit"]
    if all(util.find_spec(name) for name in ("transformers", "peft", "bitsandbytes")):
        names.append("peer")
    else:
        print("transformers, peft or bitsandbytes is not installed: measuring ours alone")
    flags = [f"--tokens={config.tokens}", f"--steps={config.steps}", f"--dtype={config.dtype}"]
    flags += [f"--gradient_checkpointing={str(config.gradient_checkpointing).lower()}"]
    shown = "{name:16}{tokens_per_s:8.1f} tokens/s {peak_rss_mb:8.0f} MB"
    results, medians = take_turns("train", names, flags, config.rounds, shown)
    print(f"\n{'median':16}{'tokens/s':>10}{'step, s':>10}{'peak RSS, MB':>14}")
    for name, row in medians.items():
        print(f"{name:16}{row['tokens_per_s']:10.1f}{row['step_s']:10.3f}{row['peak_rss_mb']:14.0f}")
    command_line = " ".join(["scripts/bench.py train", f"--rounds={config.rounds}", *flags])
    packages = ("torch", "transformers", "peft", "bitsandbytes")
    document = as_document(command_line, as_rows(medians), packages) | {"rounds": results}
    print_document(document, config.output)


def as_rows(medians: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    """Return a row for each metric: the medians, and ours against the peer's."""
    rows = []
    for metric, unit in (("tokens_per_s", "tokens/s"), ("step_s", "s"), ("peak_rss_mb", "MB")):
        mine, theirs = medians["minqlora"][metric], medians.get("peer", {}).get(metric)
        ratio = mine / theirs if theirs else None
        rows.append(
            {"stage": "train", "metric": metric, "unit": unit, "ours": mine, "peer": theirs, "ratio": ratio}
            | {"ours_16bit": medians["minqlora-16bit"][metric]}
        )
    return rows
