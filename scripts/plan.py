"""Say what memory a fine-tuning run needs, before a weight is downloaded: QLoRA, LoRA and full side by side.

    python scripts/plan.py llama2-7b --memory 8GB
    python scripts/plan.py MODEL_FOLDER --max_seq_length 2048 --lora_r 16
    python scripts/plan.py llama-65b --memory 48GB --max_seq_length 512 --json

MODEL_FOLDER needs no more than its config.json. The options are those of scripts/finetune.py and mean the
same. With --memory the plan is for a GPU of that size, 24GB being 24e9 bytes and 24GiB 24 * 2**30; without
it, for this machine. Below the figures stands what they are of; minqlora/memory.py says why.
"""

import dataclasses
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, make_dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_type_hints

import torch

import finetune
from finetune import choose_device
from minqlora.architecture import Architecture, architecture_from_config, read_architecture, read_config
from minqlora.checkpoint import default_dtype, find_model, free_memory
from minqlora.loss import CHUNK
from minqlora.memory import (
    Plan,
    Setup,
    block_weights,
    largest_batch,
    longest_row,
    plan_memory,
    saved_by_block,
    skeleton,
    stored_dtype,
)
from minqlora.model import CausalLM
from options import REQUIRED, option, parse, user_errors
from planning import gib, memory_setup

# What config.json says of the models of the paper and of their successors; all are Llamas in 16 bits.
SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)
PRESETS: dict[str, tuple[tuple[int, int, int, int, int], int, int]] = {
    # sizes, vocabulary, longest context
    "llama-7b": ((4096, 11008, 32, 32, 32), 32000, 2048),
    "llama-13b": ((5120, 13824, 40, 40, 40), 32000, 2048),
    "llama-33b": ((6656, 17920, 60, 52, 52), 32000, 2048),
    "llama-65b": ((8192, 22016, 80, 64, 64), 32000, 2048),
    "llama2-7b": ((4096, 11008, 32, 32, 32), 32000, 4096),
    "llama2-13b": ((5120, 13824, 40, 40, 40), 32000, 4096),
    "llama2-70b": ((8192, 28672, 80, 64, 8), 32000, 4096),
    "llama3-8b": ((4096, 14336, 32, 32, 8), 128256, 8192),
    "llama3-70b": ((8192, 28672, 80, 64, 8), 128256, 8192),
}
Method = Literal["qlora", "lora", "full"]
METHODS: dict[Method, str] = {"qlora": "QLoRA", "lora": "LoRA", "full": "full"}

# The options of a run that change what memory it takes; described once, there.
OF_A_RUN = """
    quant_type double_quant block_size quantize_embeddings lora_r lora_target_modules lora_rank_pattern
    layers_to_transform lora_dropout use_dora modules_to_save max_seq_length per_device_train_batch_size
    gradient_accumulation_steps gradient_checkpointing adapter_dtype optim paged page_bytes dtype
""".split()  # noqa: SIM905 (a list of forty quotes)


@dataclass
class OwnConfig:
    """What can be set here alone."""

    model: str = option(
        REQUIRED,
        f"folder with a config.json, a name that the local Hugging Face cache has, or {', '.join(PRESETS)}",
        aliases=["model_name_or_path"],
        positional=True,
    )
    memory: str | None = option(
        None, "of the GPU, as in 24GB or 24GiB (default: the device of this machine, and what is free there)"
    )
    reserve: str = option(
        "0.5GB", "what the driver takes of --memory, and an allocator's gaps; nothing of it is planned"
    )
    json: bool = option(False, "print the plan as JSON instead")


def config_class() -> type:
    """Return `OwnConfig` with the options of a run behind it."""
    hints = get_type_hints(finetune.Config)
    shared: list[Any] = [
        (
            one.name,
            hints[one.name],
            field(default=one.default, metadata=one.metadata)
            if one.default_factory is dataclasses.MISSING
            else field(default_factory=one.default_factory, metadata=one.metadata),
        )
        for one in fields(finetune.Config)
        if one.name in OF_A_RUN
    ]
    return make_dataclass("Config", shared, bases=(OwnConfig,))


# ---- what is planned ---------------------------------------------------------------------------------------


@dataclass
class Request:
    """A model, how it is to be trained, and what for."""

    name: str
    arch: Architecture
    setup: Setup  # of QLoRA
    memory: float | None  # bytes that there are; None: nobody says
    where: str  # whose these are


def read_request(config: Any) -> Request:
    """Return what the options ask for; ValueError for what cannot be."""
    given = {name: getattr(config, name) for name in OF_A_RUN}
    run = finetune.Config(model=Path(config.model), dataset=[Path("any")], **given)  # which checks them
    arch, stored = find_architecture(config.model)
    memory: float | None
    if config.memory is None:
        device = choose_device(None)
        kind, dtype, memory = device.type, default_dtype(device), free_memory(device)
        where = f"{device} of this machine has free"
    else:
        kind, dtype, where = "cuda", torch.bfloat16, f"a GPU of {config.memory} leaves"
        memory = read_bytes("memory", config.memory) - read_bytes("reserve", config.reserve)
        if memory <= 0:
            raise ValueError(f"--memory {config.memory} is no more than --reserve {config.reserve}")
    if run.dtype:
        dtype = getattr(torch, run.dtype)
    setup = memory_setup(run, kind, dtype, stored)
    return Request(config.model, arch, setup, memory, where)


def find_architecture(model: str) -> tuple[Architecture, torch.dtype]:
    """Return the architecture of a preset or of a model's config.json, and the dtype of its weights."""
    preset = PRESETS.get(model.lower())
    if preset is not None and not Path(model).is_dir():
        sizes, vocab_size, context = preset
        config: dict[str, Any] = dict(zip(SIZES, sizes, strict=True))
        config |= {"model_type": "llama", "vocab_size": vocab_size, "max_position_embeddings": context}
        return architecture_from_config(config), torch.bfloat16
    try:
        folder = find_model(model)
    except ValueError as error:
        raise ValueError(f"{error}; without files there are plans for {', '.join(PRESETS)}") from None
    return read_architecture(folder), stored_dtype(read_config(folder))


def read_bytes(name: str, text: str) -> float:
    """Return the bytes that `24GB` or `24GiB` are; ValueError, naming the option, for anything else."""
    match = re.fullmatch(r"(\d+\.?\d*|\.\d+) ?([KMGT])(i?)B", text, re.IGNORECASE)
    if match is None:
        raise ValueError(f"--{name}: expected a size such as 24GB or 24GiB, got {text!r}")
    number, prefix, binary = match.groups()
    return float(number) * (1024 if binary else 1000) ** (" KMGT".index(prefix.upper()))


@dataclass
class Column:
    """The plan of one method."""

    method: Method
    plan: Plan
    trained: int  # parameters
    parameters: int
    fits: bool | None  # None: nobody knows how much there is
    batch: int | None  # most rows of max_seq_length
    length: int | None  # longest row


def make_column(method: Method, request: Request) -> Column:
    """Return the plan of one method, and what would fit."""
    memory, setup = request.memory, replace(request.setup, method=method)
    model = skeleton(request.arch, setup)
    plan = plan_memory(model, setup, memory)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    adapters = 0 if method == "full" else trained
    parameters = sum(parameter.numel() for parameter in model.parameters()) - adapters
    if memory is None:
        return Column(method, plan, trained, parameters, None, None, None)
    rows, length = largest_batch(model, setup, memory), longest_row(model, setup, memory)
    return Column(method, plan, trained, parameters, plan.total <= memory, rows, length)


# ---- the page ----------------------------------------------------------------------------------------------


def page(request: Request, columns: list[Column]) -> Iterator[str]:
    """Yield the lines: the plans as a table, what fits, and how the figures come about."""
    setup, first = request.setup, columns[0]
    checkpointing = "with" if setup.gradient_checkpointing else "without"
    yield f"{request.name}: {first.parameters:,} parameters, computing in {short(setup.dtype)}"
    yield f"{setup.tokens:,} tokens at a time, {rows_of(setup)}, {checkpointing} checkpointing"
    yield ""
    yield f"{'GiB':18}" + "".join(f"{METHODS[column.method]:>10}" for column in columns)
    for name in first.plan.parts:
        yield f"{name:18}" + "".join(cell(column.plan.parts[name] / 2**30) for column in columns)
    yield f"{'in all':18}" + "".join(cell(column.plan.total / 2**30) for column in columns)
    if any(column.plan.host for column in columns):
        yield f"{'in host memory':18}" + "".join(cell(column.plan.host / 2**30) for column in columns)
    yield f"{'bytes a parameter':18}" + "".join(cell(bytes_a_parameter(column, setup)) for column in columns)
    yield ""
    yield from fitting(request, columns)
    yield ""
    yield from accounting(request, first)


def fitting(request: Request, columns: list[Column]) -> Iterator[str]:
    """Yield what fits the memory that there is."""
    if request.memory is None:
        yield "What fits, nobody says here; give the size of a GPU as --memory"
        return
    yield f"What {request.where}, {gib(request.memory)}, holds"
    for column in columns:
        rows, length = column.batch, column.length
        assert rows is not None and length is not None
        what = f"{rows:,} x {request.setup.max_seq_length:,} tokens, or one row of {length:,}"
        if length > request.arch.max_positions:
            what += f" (the model was trained for {request.arch.max_positions:,})"
        yield f"  {METHODS[column.method]:8}" + (what if length else "nothing: the model alone is too large")


def accounting(request: Request, column: Column) -> Iterator[str]:
    """Yield where the figures of the first column come from."""
    arch, setup, plan = request.arch, request.setup, column.plan
    model = skeleton(arch, setup)
    quantized = sum(weight.numel() for weight in block_weights(model))
    yield f"Where QLoRA's figures come from. They are of the fullest instant, {plan.instant}:"
    yield "  " + ", ".join(f"{name} {gib(total)}" for name, total in plan.instants.items())
    notes = {
        "weights": f"{quantized:,} numbers, {plan.weights / quantized:.3g} bytes each",
        "scales": f"one for {setup.quantization.block_size} numbers: "
        f"{8 * plan.scales / quantized:.3f} bits a number",
        "embeddings": f"{arch.vocab_size:,} x {arch.hidden_size:,}, "
        f"{'once' if arch.tie_embeddings else 'twice'}, in {short(setup.stored_dtype)}; and norms",
        "adapters": f"{column.trained:,} numbers of {short(setup.adapter_dtype)}",
        "gradients": "as many, of the same kind",
        "moments": f"two of each, of {setup.moment_bits} bits" + (", in host memory" if plan.host else ""),
        "activations": "what backward wants again"
        + (", the blocks' inputs; the rest is computed again" if setup.gradient_checkpointing else ""),
        "backward": "what one block computes with, in its backward pass",
        "logits": f"{min(CHUNK, setup.tokens)} x {arch.vocab_size:,} at a time; the hidden states",
        "workspace": "decoded weights, pages of moments",
    }
    for name, note in notes.items():
        yield f"  {name:18}{note}"
    yield "In a block a token leaves behind, if nothing is computed again, in KiB"
    for what, size in left_behind(model, setup).items():
        yield f"{size / setup.tokens / 1024:9.2f}  {what}"


def left_behind(model: CausalLM, setup: Setup) -> dict[str, int]:
    """Return the bytes that the last block saves for backward, by the layers that save them."""
    sizes: dict[str, int] = {}
    for saved in saved_by_block(model.model.layers[-1], model.arch.layers[-1], model.arch, setup):
        what = saved.what.partition(":")[0]
        sizes[what] = sizes.get(what, 0) + saved.nbytes
    return sizes


def bytes_a_parameter(column: Column, setup: Setup) -> float:
    """Return what is held whatever the tokens, gradients included, shared out among the parameters."""
    plan, dtype = column.plan, setup.dtype if column.method == "full" else setup.adapter_dtype
    held = plan.weights + plan.scales + plan.embeddings + plan.adapters + plan.moments + plan.host
    return (held + column.trained * dtype.itemsize) / column.parameters


def rows_of(setup: Setup) -> str:
    """Return how many rows there are of how many tokens."""
    rows = setup.per_device_train_batch_size
    return f"{rows} row{'s' * (rows > 1)} of {setup.max_seq_length:,}"


def cell(number: float) -> str:
    """Return a number of the table."""
    return f"{number:10.2f}" if number else f"{'-':>10}"


def short(dtype: torch.dtype) -> str:
    """Return a dtype's name."""
    return str(dtype).removeprefix("torch.")


def document(request: Request, columns: list[Column]) -> dict[str, Any]:
    """Return all of it for machines; sizes in bytes."""
    return {
        "model": request.name,
        "memory": request.memory,
        "tokens": request.setup.tokens,
        "plans": {
            column.method: {
                "parameters": column.parameters,
                "trained": column.trained,
                "total": column.plan.total,
                "parts": column.plan.parts,
                "largest": column.plan.largest,
                "fullest_at": column.plan.instant,
                "at": column.plan.instants,
                "on_host": column.plan.host,
                "fits": column.fits,
                "largest_batch": column.batch,
                "longest_row": column.length,
            }
            for column in columns
        },
    }


def main() -> None:
    """Print the page."""
    config: Any = parse(config_class(), description=__doc__.split("\n\n")[0] if __doc__ else None)
    with user_errors():
        request = read_request(config)
        columns = [make_column(method, request) for method in METHODS]
        if config.json:
            print(json.dumps(document(request, columns)))
            return
        for line in page(request, columns):
            print(line)


if __name__ == "__main__":
    main()
