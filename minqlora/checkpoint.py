"""Chapter 12. Checkpoints: from a Hugging Face folder to a 4-bit model, one tensor at a time.

A 7B checkpoint is 13.5 GB in 16 bits and 3.4 GB in NF4. The first figure must never be in memory: each tensor
is read from disk, quantized, and dropped before the next one is read::

    model.layers.0.mlp.down_proj.weight   (576, 1536) bfloat16, 1.77 MB  ->  NF4Tensor, 0.46 MB
    model.layers.0.input_layernorm.weight (576,)      bfloat16           ->  the compute dtype
    model.embed_tokens.weight             (49152, 576) bfloat16, 57 MB   ->  as it is; cast where it is used

The model is built first, without memory ("on the meta device"), and so says itself which tensors it wants and
in which shape; what the folder holds is compared with that list, and what the model will take with the memory
that is free, before anything is read. A tensor missing, of another shape, or left over is an error that names
it: nothing is initialised at random in silence.

A folder may be in 4 bits already, and is then taken as it is, bit for bit. A 16-bit one can leave a 4-bit
copy of itself in a cache, and the next start reads a quarter.

Shapes and dtypes: weights of linear layers inside blocks (N, K) become NF4Tensor; all else keeps its shape.
Cost: peak memory is the quantized model plus the largest tensor; time is about that of reading the files and
15 passes over each weight.

Paper: none. Format: Hugging Face's folders and hub cache.

Before: files. Next: adapter.
"""

import hashlib
import json
import math
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minqlora.architecture import both_spellings, read_architecture, read_config
from minqlora.codebook import QUANT_TYPES
from minqlora.files import (
    PART_NAMES,
    SAVED_QUANT_TYPES,
    STATE,
    Checkpoint,
    Plan,
    flatten_state_dict,
    one_line,
    parts_of,
    state_text,
    write_checkpoint,
)
from minqlora.model import CausalLM
from minqlora.nf4 import SHARED_PARTS, Format, NF4Tensor
from minqlora.optim import device_memory

# What old exporters left in the files and no model reads.
_IGNORED_SUFFIXES = ("rotary_emb.inv_freq",)

_EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")


@dataclass(frozen=True)
class Quantization:
    """How weights are to be quantized: what `NF4Tensor.from_float` is told."""

    quant_type: str = "nf4"
    double_quant: bool = True
    block_size: int = 64

    def __call__(self, weight: Tensor) -> NF4Tensor:
        """Return the weight quantized."""
        return NF4Tensor.from_float(
            weight, quant_type=self.quant_type, block_size=self.block_size, double_quant=self.double_quant
        )


# ---- loading -----------------------------------------------------------------------------------------------


def load_model(
    folder: Path | str,
    *,
    quant_type: str | None = "nf4",
    double_quant: bool = True,
    block_size: int = 64,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    progress: Callable[[int, int], None] | None = None,
    quantize_embeddings: bool = False,
    cache: Path | str | None = None,
) -> CausalLM:
    """Load a Hugging Face checkpoint, quantizing the linear layers of its blocks as they arrive.

    folder: of the checkpoint, or a name such as `org/model` that the local Hugging Face cache has.
    quant_type, double_quant, block_size: as in `NF4Tensor.from_float`; a quant_type of None is no
    quantization, and linear layers are then in the compute dtype. device: where the model goes; None is the
    CPU. dtype: the compute dtype; None asks `default_dtype`. progress: called after each tensor with the
    bytes read so far and in all. quantize_embeddings: embeddings and head in 4 bits too. cache: a folder that
    keeps the quantized weights, so that the next load of the same files with the same settings reads 4 bits.

    A folder in 4 bits comes as it is: its weights keep their own levels and block sizes, whatever is asked
    for here, and layers that it has in 16 bits stay there. To ask for no quantization is then an error.

    Returns the model in eval mode with every parameter frozen. Raises ValueError, naming file and key, for a
    folder that is incomplete, damaged or not understood, and for a model that does not fit.
    """
    device = torch.device(device or "cpu")
    dtype = dtype or default_dtype(device)
    model, checkpoint = open_model(folder, dtype)
    if quant_type is None and checkpoint.has_quantized:
        raise ValueError(
            f"{checkpoint.folder}: is in 4 bits; load it so (--bits 4), or give the model it was made from"
        )
    quantization = quant_type and Quantization(quant_type, double_quant, block_size)
    loading = _Loading(model, dtype, device, quantization or None, quantize_embeddings, progress)
    loading.require_memory(checkpoint)
    if cache is None or checkpoint.has_quantized:
        loading.fill(checkpoint)
    else:
        loading.fill_through_cache(checkpoint, Path(cache))
    if model.arch.tie_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model


def open_model(folder: Path | str, dtype: torch.dtype = torch.float32) -> tuple[CausalLM, Checkpoint]:
    """Return a model without memory, frozen and in eval mode, and the checkpoint that has a tensor for each
    of its parameters and no other. Nothing but headers is read.

    dtype: the compute dtype. Raises as `load_model` does.
    """
    folder = find_model(folder)
    arch = read_architecture(folder)
    _require_understood_quantization(folder)
    checkpoint = Checkpoint(folder)
    n_mlps = sum(1 if layer.experts is None else layer.experts.count for layer in arch.layers)
    if n_mlps > len(checkpoint.names):  # said before millions of modules are made in vain
        n_tensors = len(checkpoint.names)
        raise ValueError(
            f"{folder}: config.json asks for {n_mlps:,} MLPs, the files hold {n_tensors:,} tensors"
        )
    try:
        with torch.device("meta"):
            model = CausalLM(arch, compute_dtype=dtype)
    except RuntimeError as error:
        problem = one_line(error)
        raise ValueError(f"{folder / 'config.json'}: sizes that no tensor can have ({problem})") from None
    _require_fitting(checkpoint, model)
    return model.requires_grad_(False).eval(), checkpoint


def linear_weights(model: CausalLM) -> list[str]:
    """Return the names of the weights that are quantized: those of the linear layers inside blocks."""
    modules = model.model.named_modules(prefix="model")
    return [f"{name}.weight" for name, module in modules if isinstance(module, nn.Linear)]


def replace_parameter(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Put a frozen tensor in the place of a module's parameter, whatever that was."""
    parent, _, child = name.rpartition(".")
    setattr(module.get_submodule(parent), child, nn.Parameter(tensor, requires_grad=False))


class _Loading:
    """One model on its way from files to a device."""

    def __init__(
        self,
        model: CausalLM,
        dtype: torch.dtype,
        device: torch.device,
        quantization: Quantization | None,
        quantize_embeddings: bool,
        progress: Callable[[int, int], None] | None,
    ):
        if quantize_embeddings and quantization is None:
            raise ValueError("embeddings are quantized as linear layers are: give a quant_type as well")
        self.model, self.dtype, self.device, self.progress = model, dtype, device, progress
        self.names = list(dict(model.named_parameters()))  # tied ones once, under the embedding's name
        self.linear = set(linear_weights(model))
        self.quantization, self.quantize_embeddings = quantization, quantize_embeddings

    def is_to_quantize(self, checkpoint: Checkpoint, name: str) -> bool:
        """Say whether a weight is in 16 bits there and has to be in 4 here."""
        if self.quantization is None or checkpoint.is_quantized(name):
            return False
        if name in _EMBEDDINGS:
            return self.quantize_embeddings
        return name in self.linear and not checkpoint.has_quantized

    def fill(self, checkpoint: Checkpoint) -> None:
        """Read every tensor, quantize it or cast it, and put it in its place."""
        total, read = sum(map(checkpoint.nbytes, self.names)), 0
        for name in checkpoint.in_file_order(self.names):
            read += checkpoint.nbytes(name)
            replace_parameter(self.model, name, self._converted(checkpoint, name))
            if self.progress is not None:
                self.progress(read, total)

    def _converted(self, checkpoint: Checkpoint, name: str) -> Tensor:
        tensor = checkpoint.read(name).to(self.device)
        if self.is_to_quantize(checkpoint, name):
            assert self.quantization is not None
            tensor = self.quantization(tensor)
        # In a linear layer the dtype of an NF4Tensor tells what it was made from, and its product is in the
        # dtype of what it meets. The head's product is only where both are equal; a look-up gives the dtype.
        if (name in _EMBEDDINGS) == isinstance(tensor, NF4Tensor):
            return tensor.to(self.dtype)
        return tensor

    def require_memory(self, checkpoint: Checkpoint) -> None:
        """Raise ValueError with the plan if the device has not the memory that the model will take."""
        held = {"4-bit weights": 0, "embeddings and head": 0, "the rest": 0}
        passing = 0  # the largest tensor that is held beside what becomes of it
        for name in self.names:
            size = checkpoint.nbytes(name)
            if self.is_to_quantize(checkpoint, name):
                assert self.quantization is not None
                passing = max(passing, size)
                size = sum(quantized_bytes(checkpoint.shape(name), self.quantization))
            elif not checkpoint.is_quantized(name) and name not in _EMBEDDINGS:
                size = math.prod(checkpoint.shape(name)) * self.dtype.itemsize
            in_4_bits = checkpoint.is_quantized(name) or self.is_to_quantize(checkpoint, name)
            kind = "4-bit weights" if in_4_bits and name in self.linear else "the rest"
            held["embeddings and head" if name in _EMBEDDINGS else kind] += size
        held["a tensor on its way"] = passing
        free, total = free_memory(self.device), sum(held.values())
        if free is not None and total > free:
            plan = " + ".join(f"{size / 1e9:.2f} GB {what}" for what, size in held.items() if size)
            advice = "4 bits take a quarter (--bits 4)" if self.quantization is None else "take a smaller one"
            if held["embeddings and head"] > total / 4 and self.quantization and not self.quantize_embeddings:
                advice = "--quantize_embeddings saves most of the embeddings"
            raise ValueError(
                f"{checkpoint.folder}: does not fit {self.device}: {plan} = {total / 1e9:.2f} GB, but "
                f"{free / 1e9:.2f} GB are free; {advice}, or choose another device"
            )

    def fill_through_cache(self, source: Checkpoint, cache: Path) -> None:
        """As `fill`, from the 4-bit copy in the cache; made first, after loading, if it is not there."""
        if self.quantization is None or self.quantization.quant_type not in SAVED_QUANT_TYPES:
            raise ValueError(f"the cache keeps {' and '.join(SAVED_QUANT_TYPES)} weights, and nothing else")
        entry = cache / self._cache_key(source)
        if entry.exists():
            try:
                kept = Checkpoint(entry)
                _require_fitting(kept, self.model)
                self.fill(kept)
                return
            except ValueError as error:
                warnings.warn(f"damaged cache entry dropped and made anew: {error}", stacklevel=3)
                shutil.rmtree(entry)
        quantized = {name for name in self.names if self.is_to_quantize(source, name)}
        self.fill(source)

        def as_in_source() -> Iterator[tuple[str, Tensor]]:
            # In the model some have the compute dtype instead. What is not quantized is read again.
            for name in self.names:
                held = self.model.get_parameter(name).detach()
                yield name, held.to(source.dtype(name)) if name in quantized else source.read(name)

        try:
            cache.mkdir(parents=True, exist_ok=True)
            plan = quantized_plan(source, self.names, quantized, self.quantization)
            write_checkpoint(entry, plan, flat_tensors(as_in_source()))
        except (OSError, ValueError) as error:
            if not entry.exists():  # another process came first, and its copy is as good
                warnings.warn(f"the 4-bit copy could not be kept: {error}", stacklevel=3)

    def _cache_key(self, source: Checkpoint) -> str:
        # Whatever changes a bit of the copy changes its name.
        files = [source.folder / "config.json", *source.files]
        stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        facts = [1, str(source.folder.resolve()), stats, repr(self.quantization), self.quantize_embeddings]
        digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
        return f"{source.folder.resolve().name}-{digest[:16]}"


def default_dtype(device: torch.device | str) -> torch.dtype:
    """Return the compute dtype that the hardware does well: bfloat16 where it multiplies bfloat16 natively,
    else float32.

    On a CPU without AVX512-BF16 or AMX a bfloat16 product runs seven times slower than a float32 one.
    """
    device = torch.device(device)
    if device.type == "cpu":
        able = torch.cpu.get_capabilities()
        return torch.bfloat16 if able.get("avx512_bf16") or able.get("amx_bf16") else torch.float32
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float32
    return torch.bfloat16 if device.type in ("cuda", "xpu") else torch.float32


def quantized_size(model: nn.Module) -> tuple[int, int]:
    """Return how many parameters are held in 4 bits, and their bytes, shared codebooks counted once."""
    quantized = [parameter for parameter in model.parameters() if isinstance(parameter, NF4Tensor)]
    shared = {
        id(part): part.nbytes
        for tensor in quantized
        for name, part in tensor.parts.items()
        if name in SHARED_PARTS
    }
    count = sum(tensor.numel() for tensor in quantized)
    return count, sum(tensor.nbytes for tensor in quantized) + sum(shared.values())


def free_memory(device: torch.device) -> int | None:
    """Return the bytes that can still be taken on a device, None where nobody says."""
    if device.type == "cpu":
        return min(_free_host_memory(Path("/")), default=None)
    memory = device_memory(device)
    return None if memory is None else memory[0]


def _free_host_memory(root: Path) -> Iterator[int]:
    # What Linux says the machine has left, and what each control group around this process has.
    try:
        table = dict(line.split(":", 1) for line in (root / "proc/meminfo").read_text().splitlines())
        yield int(table["MemAvailable"].split()[0]) * 1024
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except (OSError, KeyError):
        return
    for line in groups:
        _number, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        top = root / "sys/fs/cgroup" / controllers
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        limit, used, reclaimable = names if controllers else ("memory.max", "memory.current", "inactive_file")
        group = top / path.lstrip("/")
        for folder in (group, *group.parents[: len(group.parts) - len(top.parts)]):
            try:
                pages = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                taken = int((folder / used).read_text()) - int(pages[reclaimable])  # cached files make way
                yield max(int((folder / limit).read_text()) - taken, 0)
            except (OSError, ValueError, KeyError):  # no limit is the word "max", and a root has no files
                continue


# ---- finding -----------------------------------------------------------------------------------------------


def find_model(name_or_path: Path | str) -> Path:
    """Return the folder of a model: the path itself, or for a name such as `org/model` the snapshot that the
    local Hugging Face cache has of it.

    Raises ValueError with the command that downloads it if there is neither.
    """
    folder, name = Path(name_or_path), str(name_or_path)
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        raise ValueError(f"no such model folder: {name}")
    cache = _hub_cache()
    model = cache / f"models--{name.replace('/', '--')}"
    try:
        commit = (model / "refs" / "main").read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        commit = ""
    snapshot = model / "snapshots" / commit
    if re.fullmatch(r"[0-9a-f]+", commit) and snapshot.is_dir():
        return snapshot
    raise ValueError(
        f"no such model folder: {name}; nor is it in the local Hugging Face cache, {cache}; if it is a name "
        f"on the hub, download it with `hf download {name}`"
    )


def _hub_cache() -> Path:
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if os.environ.get(variable):
            return Path(os.environ[variable]).expanduser()
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return Path(home).expanduser() / "hub"


def _require_understood_quantization(folder: Path) -> None:
    quantization = read_config(folder).get("quantization_config")
    if quantization is None:
        return
    facts = quantization if isinstance(quantization, dict) else {}
    in_4_bits = facts.get("load_in_4bit") or facts.get("_load_in_4bit")
    method = facts.get("quant_method", "bitsandbytes" if in_4_bits else quantization)
    in_8_bits = facts.get("load_in_8bit") or facts.get("_load_in_8bit")
    if method != "bitsandbytes" or in_8_bits:
        raise ValueError(
            f"{folder / 'config.json'}: the weights are quantized by {'8-bit ' * bool(in_8_bits)}"
            f"{one_line(method):.60}, which is not supported; give the 16-bit model that they were made "
            "from, or a 4-bit one of bitsandbytes"
        )


def _require_fitting(checkpoint: Checkpoint, model: CausalLM) -> None:
    # Every tensor that the model has, in its shape, and none besides.
    folder, wanted = checkpoint.folder, dict(model.named_parameters())
    missing = sorted(set(wanted) - set(checkpoint.names))
    if missing:
        raise ValueError(
            f"{folder}: {len(missing)} of {len(wanted)} tensors missing, the first is {missing[0]}"
        )
    ignored = {name for name in checkpoint.names if name.endswith(_IGNORED_SUFFIXES)}
    if model.arch.tie_embeddings:
        ignored.add("lm_head.weight")
    left_over = sorted(set(checkpoint.names) - set(wanted) - ignored)
    if left_over:
        raise ValueError(
            f"{folder}: {len(left_over)} tensors have no place in this model, the first is {left_over[0]}"
        )
    for name, parameter in wanted.items():
        found = checkpoint.shape(name)
        if found != tuple(parameter.shape):
            raise ValueError(
                f"{checkpoint.path(name)}: {name} has shape {found}, but config.json asks for "
                f"{tuple(parameter.shape)}"
            )


# ---- 4-bit folders -----------------------------------------------------------------------------------------


def quantized_plan(
    source: Checkpoint, names: Iterable[str], quantized: set[str], quantization: Quantization
) -> Plan:
    """Return the plan for `write_checkpoint` of a checkpoint of which some weights are quantized, laid out as
    `flat_tensors` does."""
    plan: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name in names:
        dtype, shape = source.dtype(name), source.shape(name)
        if name not in quantized:
            plan[name] = dtype, shape
            continue
        format, nested = _format_of(shape, quantization), quantization.double_quant
        parts = parts_of(format, nested)
        plan[name] = torch.uint8, (parts.pop("packed")[1], 1)
        for part, (part_dtype, count) in parts.items():
            plan[f"{name}.{PART_NAMES[part]}"] = part_dtype, (count,)
        width = len(state_text(format, dtype, 0.0 if nested else None, pad=True))
        plan[f"{name}{STATE}{format.quant_type}"] = torch.uint8, (width,)
    return plan


def flat_tensors(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors as `quantized_plan` has them, from tensors of which some are NF4Tensors."""
    for name, tensor in tensors:
        yield from flatten_state_dict({name: tensor}, pad=True).items()


def quantized_config(
    config: Mapping[str, Any],
    quantization: Quantization,
    dtype: torch.dtype,
    skipped: Sequence[str] = (),
) -> dict[str, Any]:
    """Return the `config.json` of a 4-bit folder.

    config: that of the source. dtype: of its weights, which bitsandbytes is to compute in. skipped: modules
    that bitsandbytes might take for quantized and that are not; the head goes without saying.
    """
    return both_spellings(config) | {
        "quantization_config": {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": quantization.quant_type,
            "bnb_4bit_use_double_quant": quantization.double_quant,
            "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_enable_fp32_cpu_offload": False,
            "llm_int8_has_fp16_weight": False,
            # With a list of its own, transformers leaves out no head by itself.
            "llm_int8_skip_modules": ["lm_head", *skipped] if skipped else None,
            "llm_int8_threshold": 6.0,
        }
    }


def quantized_bytes(shape: tuple[int, ...], quantization: Quantization) -> tuple[int, int]:
    """Return the bytes of a quantized weight's codes and of its scales; codebooks are shared, and aside."""
    sizes = {
        part: count * dtype.itemsize
        for part, (dtype, count) in parts_of(
            _format_of(shape, quantization), quantization.double_quant
        ).items()
        if part not in SHARED_PARTS
    }
    codes = sizes.pop("packed")
    fixed = QUANT_TYPES[quantization.quant_type]
    if fixed is not None and len(fixed) > 16:  # a byte a code, of those that are not saved either
        codes = math.prod(shape)
    return codes, sum(sizes.values()) + (4 if quantization.double_quant else 0)  # the offset


def _format_of(shape: tuple[int, ...], quantization: Quantization) -> Format:
    n_rows, n_columns = shape
    return Format((n_rows, n_columns), quantization.block_size, quant_type=quantization.quant_type)
