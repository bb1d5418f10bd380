"""Say what this machine can do, and whether a model folder has all that a run needs.

    python scripts/doctor.py                  # the machine: Python, torch, device, memory, packages
    python scripts/doctor.py MODEL_FOLDER     # and the model: family, sizes, what is there and what is not

A line begins with [x] where all is well and with [ ] where something can be done, which it then says; other
lines only tell. Of the weights only the headers of the files are read, so a 70B model takes a second, too.
The exit code is 1 if the model cannot be used as it is.
"""

import math
import os
import platform
import shutil
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch

from finetune import choose_device
from minqlora.architecture import Architecture, read_architecture, read_config
from minqlora.checkpoint import (
    Quantization,
    default_dtype,
    find_model,
    free_memory,
    linear_weights,
    open_model,
    quantized_plan,
)
from minqlora.files import Checkpoint
from minqlora.matmul import fastest_look_up
from minqlora.model import missing_compiler
from minqlora.tokenizer import Tokenizer
from options import option, parse, user_errors

NEEDED = "torch safetensors tokenizers sentencepiece numpy scipy einops jinja2 pyyaml tqdm".split()  # noqa: SIM905
OPTIONAL = {"matplotlib": "draws the loss curves", "gguf": "reads the demo's model"}


@dataclass
class Config:
    """What can be set."""

    model: Path | None = option(
        None,
        "folder of a model, or a name that the local Hugging Face cache has (default: none is looked at)",
        aliases=["model_name_or_path"],
        positional=True,
    )
    device: str | None = option(None, "cpu, cuda, ... (default: an accelerator if there is one)")


class Line(NamedTuple):
    """One line of the page. fine: True for all is well, False for something to do, None for just a fact."""

    name: str
    text: str
    fine: bool | None = None
    needed: bool = False  # not fine means that the model cannot be used


# ---- the machine -------------------------------------------------------------------------------------------


def machine(device: torch.device) -> Iterator[Line]:
    """Yield what there is to say of the machine."""
    yield Line("python", f"{platform.python_version()} on {platform.platform()}", True)
    backend = f", CUDA {torch.version.cuda}" if torch.version.cuda else ""
    backend = f", ROCm {torch.version.hip}" if torch.version.hip else backend
    yield Line("torch", f"{torch.__version__}{backend}, {torch.get_num_threads()} threads", True)
    yield Line("device", f"{device}: {describe(device)}", True)
    yield Line("compute dtype", compute_dtype(device))
    yield compiler(device)
    yield from memory(device)
    if device.type == "cpu":
        yield allocator()
    yield from packages()


def describe(device: torch.device) -> str:
    """Return a device's name and what of it matters here."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"{torch.cuda.get_device_name(device)}, compute capability {major}.{minor}"
    if device.type != "cpu":
        return platform.machine()
    able = torch.cpu.get_capabilities()
    found = [name.upper() for name in ("avx2", "avx512_f", "avx512_bf16", "amx_bf16") if able.get(name)]
    return ", ".join([platform.machine(), f"{os.cpu_count()} cores", *found])


def compute_dtype(device: torch.device) -> str:
    """Return the dtype that runs compute in here, and the reason."""
    dtype = default_dtype(device)
    if dtype == torch.bfloat16:
        why = f"this {'CPU' if device.type == 'cpu' else 'GPU'} multiplies it natively"
    elif device.type == "cpu":
        why = "without AVX512-BF16 or AMX a bfloat16 product is emulated, and several times slower"
    else:
        why = f"bfloat16 is not native on this {device.type} device"
    return f"{str(dtype).removeprefix('torch.')}: {why}; --dtype overrides it"


def compiler(device: torch.device) -> Line:
    """Say whether torch.compile works: on an accelerator it decodes the 4-bit weights."""
    missing = missing_compiler(device)
    if device.type == "cpu":
        found = f"not available: {missing}" if missing else "available"
        return Line("torch.compile", f"{found}; nothing here needs it on a CPU")
    if missing is None and (look_up := fastest_look_up(device)):
        return Line("torch.compile", f"works; it decodes the 4-bit weights, fastest by {look_up}", True)
    why = f"{missing}: pip install triton" if missing else "compiles no decoding that gives the right bits"
    return Line("torch.compile", f"{why}; plain operations decode the 4-bit weights, more slowly", False)


def memory(device: torch.device) -> Iterator[Line]:
    """Yield the memory that is there and free, of the machine and of an accelerator."""
    devices = [torch.device("cpu"), device] if device.type != "cpu" else [device]
    for place in devices:
        total, free = total_memory(place), free_memory(place)
        texts = [f"{gb(total)} in all"] if total else []
        texts += [f"{gb(free)} free"] if free is not None else []
        yield Line(f"memory of {place.type}", ", ".join(texts) or "nobody says")


def total_memory(device: torch.device) -> int | None:
    """Return the bytes that a device has, None where nobody says."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type != "cpu" or not hasattr(os, "sysconf"):
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def allocator() -> Line:
    """Say whether an allocator is loaded that keeps large pieces of memory for the next request."""
    maps = Path("/proc/self/maps")
    loaded = maps.read_text(encoding="utf-8", errors="replace") if maps.is_file() else ""
    for name in ("tcmalloc", "jemalloc"):
        if name in loaded:
            return Line("allocator", name, True)
    return Line(
        "allocator",
        "the system's, which gets large pieces of memory zeroed anew each time; training on a CPU can be "
        "faster with LD_PRELOAD=libtcmalloc_minimal.so.4 (in Debian's package libtcmalloc-minimal4)",
        None if not loaded else False,
    )


def packages() -> Iterator[Line]:
    """Yield the versions of packages, and what is missing."""
    found = {name: version(name) for name in [*NEEDED, *OPTIONAL]}
    lacking = [name for name in NEEDED if found[name] is None]
    versions = ", ".join(f"{name} {found[name]}" for name in found if found[name])
    yield Line("packages", versions, True)
    if lacking:
        yield Line("packages", f"missing: pip install {' '.join(lacking)}", False)
    for name, use in OPTIONAL.items():
        if found[name] is None:
            yield Line("packages", f"{name} is not there; it {use}")


def version(package: str) -> str | None:
    """Return the version of an installed package, None of one that is not."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


# ---- the model ---------------------------------------------------------------------------------------------


def look_at_model(folder: Path, device: torch.device) -> Iterator[Line]:
    """Yield what there is to say of a model folder, whatever is wrong with it."""
    arch = None
    try:
        arch = read_architecture(folder)
        yield Line("config", describe_architecture(arch, read_config(folder)["model_type"]), True)
    except (ValueError, OSError) as error:
        yield Line("config", str(error), False, needed=True)
    yield from weights(folder, device)
    yield from look_at_tokenizer(folder, arch)
    there = (folder / "generation_config.json").is_file()
    missing = "no generation_config.json; answers end at the tokens that tokenizer and config.json name"
    yield Line("generation", "generation_config.json" if there else missing, True if there else None)


def describe_architecture(arch: Architecture, name: str) -> str:
    """Return a model's family and shape."""
    heads = f"{arch.n_heads} heads of {arch.head_dim}, {arch.n_kv_heads} for keys and values"
    shape = f"{arch.n_layers} layers of width {arch.hidden_size:,}, {heads}"
    return f"family {name}: {shape}; {arch.vocab_size:,} tokens, context {arch.max_positions:,}"


def weights(folder: Path, device: torch.device) -> Iterator[Line]:
    """Yield whether all weights are there, how many, and their size in 16 and in 4 bits."""
    try:
        checkpoint = Checkpoint(folder)
    except (ValueError, OSError) as error:
        yield Line("weights", str(error), False, needed=True)
        return
    count = sum(math.prod(checkpoint.shape(name)) for name in checkpoint.names)
    files = f"{len(checkpoint.files)} file{'s' * (len(checkpoint.files) > 1)}"
    try:
        model, checkpoint = open_model(folder)
    except (ValueError, OSError) as error:
        yield Line("weights", f"{count:,} parameters in {files}, but {error}", False, needed=True)
        return
    yield Line("weights", f"{count:,} parameters in {files}, all that config.json asks for", True)
    if checkpoint.has_quantized:
        held = sum(map(checkpoint.nbytes, checkpoint.names))
        yield fitting("size", f"{gb(held)}, in 4 bits already; {gb(2 * count)} in 16", held, device)
        return
    quantized = set(linear_weights(model)).intersection(checkpoint.names)
    plan = quantized_plan(checkpoint, checkpoint.names, quantized, Quantization())
    held = sum(math.prod(shape) * dtype.itemsize for dtype, shape in plan.values())
    text = f"{gb(2 * count)} in 16 bits; {gb(held)} in 4 (NF4 the linear layers of blocks, the rest as it is)"
    yield fitting("size", text, held, device)


def fitting(name: str, text: str, size: int, device: torch.device) -> Line:
    """Say whether a model fits what is free; training takes more, by the adapters and what passes through."""
    free = free_memory(device)
    if free is not None and size > free:
        short = f"{device} has {gb(free)} free: take a smaller model or another device"
        return Line(name, f"{text}; {short}", False)
    return Line(name, text, True)


def look_at_tokenizer(folder: Path, arch: Architecture | None) -> Iterator[Line]:
    """Yield whether a folder has a tokenizer that its model understands, and a chat template that works."""
    try:
        tokenizer = Tokenizer(folder)
    except (ValueError, OSError) as error:
        yield Line("tokenizer", str(error), False, needed=True)
        return
    end = tokenizer.token(tokenizer.eos_ids[0])
    text = f"{tokenizer.vocab_size:,} tokens; {end!r} ends an answer"
    if arch and tokenizer.vocab_size > arch.vocab_size:
        text += f"; but config.json says {arch.vocab_size:,}: the files are of different models"
        yield Line("tokenizer", text, False, needed=True)
    else:
        yield Line("tokenizer", text, True)
    if tokenizer.chat_template is None:
        yield Line(
            "chat template",
            "none, as base models come: prompt and completion are plain text; for conversations put a "
            "chat_template.jinja into the folder",
        )
        return
    names = ", ".join(sorted(tokenizer.templates))
    try:
        tokenizer.render([{"role": "user", "content": "Hi"}], add_generation_prompt=True)
    except ValueError as error:
        yield Line("chat template", f"{names}; {error}", False, needed=True)
    else:
        yield Line("chat template", names, True)


# ---- the page ----------------------------------------------------------------------------------------------


def gb(size: int) -> str:
    """Return bytes as text."""
    return f"{size / 1e9:.2f} GB"


def show(line: Line) -> None:
    """Print a line, wrapped under its text."""
    box = {True: "[x]", False: "[ ]", None: "   "}[line.fine]
    head = f"{box} {line.name:18}"
    width = max(shutil.get_terminal_size().columns, 60)
    wrapped = textwrap.wrap(line.text, width - len(head), break_long_words=False, break_on_hyphens=False)
    print(head + ("\n" + " " * len(head)).join(wrapped))


def main() -> None:
    """Print the page."""
    config = parse(Config, description=__doc__.split("\n\n")[0] if __doc__ else None)
    with user_errors():
        device = choose_device(config.device)
        folder = find_model(config.model) if config.model else None
    for line in machine(device):
        show(line)
    if folder is None:
        return
    print(f"\n{folder}")
    missing = False
    for line in look_at_model(folder, device):
        show(line)
        missing |= line.needed
    if missing:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
