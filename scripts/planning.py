"""What a run of finetune.py will need of memory: its options, told to the plan of `minqlora.memory`.

Used before training, where memory has run out, and by plan.py.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from minqlora.architecture import read_architecture, read_config
from minqlora.checkpoint import Quantization, free_memory
from minqlora.lora import LoRAConfig
from minqlora.memory import Plan, Setup, plan_memory, skeleton, stored_dtype

if TYPE_CHECKING:
    from finetune import Config


def prepare_memory(
    config: "Config", source: Path, device: torch.device, dtype: torch.dtype, new_tokens: list[int]
) -> Plan:
    """Say what memory the run will take and return the plan; ValueError if there surely is not enough."""
    free = free_memory(device)
    plan = plan_of(config, source, device, dtype, new_tokens, free)
    largest = f"the largest part is {plan.largest}, {gib(plan.parts[plan.largest])}"
    print(f"memory    about {gib(plan.total)}: {largest}" + (f"; {gib(free)} are free" if free else ""))
    if free is None or plan.total <= free:
        return plan
    advice = ", ".join(what_saves_memory(config, source, device, dtype))
    if plan.least > free:  # with rows however short
        raise ValueError(
            f"{config.model}: training does not fit {device}: it takes {gib(plan.least)} before the first "
            f"token, but {gib(free)} are free; try {advice}, or another device"
        )
    print(f"warning   that is more than what is free; if memory runs out, try {advice}", file=sys.stderr)
    return plan


def plan_of(
    config: "Config",
    source: Path,
    device: torch.device,
    dtype: torch.dtype,
    new_tokens: list[int],
    free: int | None = None,
) -> Plan:
    """Return the memory plan of a run, for a device with so many bytes free."""
    setup = memory_setup(config, device.type, dtype, stored_dtype(read_config(source)), new_tokens)
    return plan_memory(skeleton(read_architecture(source), setup), setup, free)


def memory_setup(
    config: "Config",
    device: str,
    dtype: torch.dtype,
    stored: torch.dtype,
    new_tokens: list[int] | None = None,
) -> Setup:
    """Return what the memory plan is to know of a run. stored: the dtype of the model's files."""
    options = config.lora_options()
    if new_tokens:
        options["trainable_token_indices"] = dict.fromkeys(("embed_tokens", "lm_head"), new_tokens)
    return Setup(
        method="qlora" if config.bits == 4 else "lora",
        adapter=LoRAConfig(**options),
        quantization=Quantization(config.quant_type, config.double_quant, config.block_size),
        quantize_embeddings=config.quantize_embeddings,
        dtype=dtype,
        stored_dtype=stored,
        adapter_dtype=getattr(torch, config.adapter_dtype),
        gradient_checkpointing=config.gradient_checkpointing != "false",
        offload=config.gradient_checkpointing == "offload",
        per_device_train_batch_size=config.per_device_train_batch_size,
        max_seq_length=config.max_seq_length,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        moment_bits=8 if config.optim == "paged_adamw_8bit" else 32,
        paged=config.paged,
        page_bytes=config.page_bytes,
        device=device,
    )


def what_saves_memory(config: "Config", source: Path, device: torch.device, dtype: torch.dtype) -> list[str]:
    """Return the three changes of the configuration that save most memory, the best one first."""
    ways: dict[str, dict[str, Any]] = {
        "--bits 4": {"bits": 4},
        "--quantize_embeddings": {"quantize_embeddings": config.bits == 4},
        "--gradient_checkpointing true": {"gradient_checkpointing": "true"},
        "--gradient_checkpointing offload": {"gradient_checkpointing": "offload"},
        "--adapter_dtype bfloat16": {"adapter_dtype": "bfloat16"},
        "--optim paged_adamw_8bit": {"optim": "paged_adamw_8bit"},
        "--paged always": {"paged": "always" if device.type != "cpu" else config.paged},
        "a smaller --per_device_train_batch_size": {
            "per_device_train_batch_size": max(config.per_device_train_batch_size // 2, 1)
        },
        "a smaller --max_seq_length": {"max_seq_length": max(config.max_seq_length // 2, 2)},
        "a smaller --lora_r": {"lora_r": max(config.lora_r // 2, 1)},
    }
    needed = plan_of(config, source, device, dtype, []).total
    saves = {
        way: needed - plan_of(replace(config, **changes), source, device, dtype, []).total
        for way, changes in ways.items()
    }
    worth_it = [way for way, saved in saves.items() if saved > needed / 100]
    return sorted(worth_it, key=saves.__getitem__, reverse=True)[:3]


def gib(size: float) -> str:
    """Return bytes as text."""
    return f"{size / 2**30:.2f} GiB"
