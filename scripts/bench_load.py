"""Measure how long a large checkpoint takes to load into 4 bits, and how much memory.

    python scripts/bench.py load --output docs/results/load_cpu.json
    python scripts/bench.py load --layers 4 --rounds 1        # a quick look

A checkpoint in the shape of Llama 2 7B, random bfloat16 weights in shards, 13.5 GB, is made once (--folder).
It is loaded into NF4 by minqlora (first start: quantizing, and leaving a 4-bit copy in a cache; second start:
from that copy), by transformers + bitsandbytes, and an adapter is merged into it, each in a process of its
own: peak memory is the process's. Leave the machine otherwise idle.
"""

import json
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from bench import ROOT, as_document, print_document, take_turns
from minqlora import add_lora, load_model, save_adapter
from minqlora.architecture import architecture_from_config
from minqlora.model import CausalLM
from options import option, parse, user_errors

LLAMA_2_7B: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
LAYERS_IN_A_SHARD = 8


@dataclass
class Config:
    """What can be set."""

    layers: int = option(32, "blocks of the model; 32 make 13.5 GB on disk")
    folder: Path = option(ROOT / "assets" / "bench-7b", "where the checkpoint is made, and kept")
    rounds: int = option(3, "processes of each contender, in turn")
    dtype: Literal["float32", "bfloat16"] = option("bfloat16", "compute dtype of all contenders")
    output: Path | None = option(None, "write the JSON here as well")
    contender: Literal["all", "first", "second", "peer", "merge"] = option(
        "all", "run this one alone, in this process"
    )


def main(argv: Sequence[str]) -> None:
    """Make the checkpoint, then run one contender, or all in turn, and print what came out."""
    config = parse(Config, argv, description=__doc__.split("\n\n")[0] if __doc__ else None)
    folder = config.folder / f"{config.layers}-layers"
    if config.contender == "all":
        with user_errors():
            make_checkpoint(folder, LLAMA_2_7B | {"num_hidden_layers": config.layers})
        compare(config)
        return
    began = time.perf_counter()
    CONTENDERS[config.contender](folder, getattr(torch, config.dtype))
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"seconds": seconds, "peak_rss_gb": peak * 2**30 / 1e9}))


# ---- the checkpoint ----------------------------------------------------------------------------------------


def make_checkpoint(folder: Path, config: dict[str, Any]) -> None:
    """Write a random checkpoint unless it is there; the index, written last, says that it is whole."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in CausalLM(architecture_from_config(config)).named_parameters()}
    weight_map: dict[str, str] = {}
    torch.manual_seed(0)
    shards = list(shards_of(list(shapes)))
    for number, names in enumerate(tqdm(shards, desc="making the checkpoint", unit="shard", disable=None)):
        file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        save_file({name: random_weight(shapes[name]) for name in names}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    (folder / "config.json").write_text(json.dumps(config))
    size = 2 * sum(shape.numel() for shape in shapes.values())
    index.write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}))


def shards_of(names: list[str]) -> Iterator[list[str]]:
    """Yield the names that stand in each file: some blocks, and at last everything else."""
    blocks: dict[int, list[str]] = {}
    others = []
    for name in names:
        part = name.split(".")
        if "layers" in part:
            blocks.setdefault(int(part[2]) // LAYERS_IN_A_SHARD, []).append(name)
        else:
            others.append(name)
    yield from blocks.values()
    yield others


def random_weight(shape: torch.Size) -> torch.Tensor:
    """Return normal numbers of a weight's usual size in bfloat16; ones for a norm."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02)


# ---- the contenders ----------------------------------------------------------------------------------------


def first_start(folder: Path, dtype: torch.dtype) -> None:
    """Quantize as the shards are read, and leave a 4-bit copy in a cache that was empty."""
    shutil.rmtree(folder / "cache", ignore_errors=True)
    second_start(folder, dtype)


def second_start(folder: Path, dtype: torch.dtype) -> None:
    """Read the 4-bit copy."""
    model = load_model(folder, dtype=dtype, cache=folder / "cache")
    assert model.get_parameter("model.layers.0.self_attn.q_proj.weight").shape == (4096, 4096)


def peer(folder: Path, dtype: torch.dtype) -> None:
    """Do the same with transformers + bitsandbytes, as their documentation does."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, device_map="cpu", quantization_config=quantization
    )


def merge(folder: Path, dtype: torch.dtype) -> None:
    """Merge an adapter of rank 16 on all linear layers into the 16-bit base, as scripts/merge.py does."""
    from merge import main as merge_main

    shutil.rmtree(folder / "merged", ignore_errors=True)
    flags = ["--adapter", folder / "adapter", "--base", folder, "--output_dir", folder / "merged"]
    sys.argv = ["merge.py", *map(str, flags)]
    merge_main()
    shutil.rmtree(folder / "merged")


def make_adapter(folder: Path) -> None:
    """Write a PEFT adapter for the model, its second matrix not zero, unless it is there."""
    if (folder / "adapter" / "adapter_config.json").is_file():
        return
    config = json.loads((folder / "config.json").read_text())
    with torch.device("meta"):
        model = CausalLM(architecture_from_config(config))
    add_lora(model, r=16, alpha=32)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parent, _, child = name.rpartition(".")
            drawn = torch.nn.Parameter(torch.empty(parameter.shape).normal_(std=0.02))
            setattr(model.get_submodule(parent), child, drawn)
    save_adapter(model, folder / "adapter")


CONTENDERS: dict[str, Callable[[Path, torch.dtype], None]] = {
    "first": first_start,
    "second": second_start,
    "peer": peer,
    "merge": merge,
}


# ---- the comparison ----------------------------------------------------------------------------------------


def compare(config: Config) -> None:
    """Run the contenders in turn, each in a process of its own; print a table and the JSON document."""
    make_adapter(config.folder / f"{config.layers}-layers")
    names = ["first", "second", "merge"]
    if all(util.find_spec(name) for name in ("transformers", "bitsandbytes")):
        names.insert(2, "peer")
    else:
        print("transformers or bitsandbytes is not installed: measuring ours alone")
    flags = [f"--layers={config.layers}", f"--folder={config.folder}", f"--dtype={config.dtype}"]
    shown = "{name:8}{seconds:8.1f} s {peak_rss_gb:8.2f} GB"
    results, medians = take_turns("load", names, flags, config.rounds, shown)
    print(f"\n{'median':8}{'seconds':>10}{'peak RSS, GB':>14}")
    for name, row in medians.items():
        print(f"{name:8}{row['seconds']:10.1f}{row['peak_rss_gb']:14.2f}")
    peers = medians.get("peer", {})
    rows = [
        {"stage": name, "metric": metric, "unit": unit, "ours": row[metric], "peer": peers.get(metric)}
        | {"ratio": row[metric] / peers[metric] if peers else None}
        for name, row in medians.items()
        if name != "peer"
        for metric, unit in (("seconds", "s"), ("peak_rss_gb", "GB"))
    ]
    command_line = (
        f"scripts/bench.py load --layers={config.layers} --rounds={config.rounds} --dtype={config.dtype}"
    )
    document = as_document(command_line, rows, ("torch", "transformers", "bitsandbytes"))
    print_document(document | {"rounds": results}, config.output)
