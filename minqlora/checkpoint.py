"""Chapter 10. Checkpoints: from a Hugging Face folder to a 4-bit model, one tensor at a time.

A 7B checkpoint is 13.5 GB in 16 bits and 3.4 GB in NF4. The first figure must never be in memory: each tensor
is read from disk, quantized, and dropped before the next one is read::

    model.layers.0.mlp.down_proj.weight   (576, 1536) bfloat16, 1.77 MB  ->  NF4Tensor, 0.46 MB
    model.layers.0.input_layernorm.weight (576,)      bfloat16           ->  the compute dtype
    model.embed_tokens.weight             (49152, 576) bfloat16, 57 MB   ->  as it is; cast where it is used

The model is built first, without memory ("on the meta device"), and so says itself which tensors it wants and
in which shape; what the folder holds is compared with that list before anything is read. A tensor missing, of
another shape, or left over is an error that names it: nothing is initialised at random in silence.

Shapes and dtypes: weights of linear layers inside blocks (N, K) become NF4Tensor; all else keeps its shape.
Cost: peak memory is the quantized model plus the largest tensor; time is about that of reading the files and
15 passes over each weight.

Paper: none. Format: safetensors, and Hugging Face's `model.safetensors.index.json` for a model in several
files ("shards").

Before: model. Next: adapter.
"""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from minqlora.architecture import read_architecture
from minqlora.codebook import shared
from minqlora.model import CausalLM
from minqlora.nf4 import SHARED_PARTS, Format, NF4Tensor

# What old exporters left in the files and no model reads.
_IGNORED_SUFFIXES = ("rotary_emb.inv_freq",)


def load_model(
    folder: Path | str,
    *,
    quant_type: str | None = "nf4",
    double_quant: bool = True,
    block_size: int = 64,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> CausalLM:
    """Load a Hugging Face checkpoint folder, quantizing the linear layers of its blocks as they arrive.

    quant_type, double_quant, block_size: as in `NF4Tensor.from_float`; a quant_type of None is no
    quantization, and linear layers are then in the compute dtype. device: where the model goes; None is the
    CPU. dtype: the compute dtype; None asks `default_dtype`. progress: called after each tensor with the
    bytes read so far and in all.

    Returns the model in eval mode with every parameter frozen. Raises ValueError, naming file and key, for a
    folder that is incomplete, damaged or not understood.
    """
    device = torch.device(device or "cpu")
    dtype = dtype or default_dtype(device)
    arch = read_architecture(folder)
    with torch.device("meta"):
        model = CausalLM(arch, compute_dtype=dtype)
    model.requires_grad_(False).eval()
    shards = find_tensors(Path(folder))
    wanted = dict(model.named_parameters())  # tied parameters are listed once, under the embedding's name
    _require_same_names(Path(folder), wanted, shards, tied_head=arch.tie_embeddings)
    modules = model.model.named_modules(prefix="model")
    linear_weights = {f"{name}.weight" for name, module in modules if isinstance(module, nn.Linear)}
    embeddings = ("model.embed_tokens.weight", "lm_head.weight")
    total = sum(path.stat().st_size for path in set(shards.values()))
    read = 0
    for path in sorted(set(shards.values())):
        with open_safetensors(path) as file:
            for name in sorted(name for name in wanted if shards[name] == path):
                tensor = _read_tensor(file, path, name, wanted[name].shape)
                read += tensor.nbytes
                tensor = tensor.to(device)
                if name in linear_weights and quant_type is not None:
                    try:
                        tensor = NF4Tensor.from_float(
                            tensor, quant_type=quant_type, block_size=block_size, double_quant=double_quant
                        )
                    except ValueError as error:
                        raise ValueError(f"{path}: {name}: {error}") from None
                elif name not in embeddings:
                    tensor = tensor.to(dtype)
                _replace_parameter(model, name, nn.Parameter(tensor, requires_grad=False))
                if progress is not None:
                    progress(read, total)
    if arch.tie_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model


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


# ---- reading -----------------------------------------------------------------------------------------------


def find_tensors(folder: Path) -> dict[str, Path]:
    """Return the file that holds each tensor of a checkpoint folder, from the index or from the single file's
    header.

    Raises ValueError if there is no safetensors file, or the index is broken, names a file outside the
    folder, or one missing.
    """
    index_path = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if single.exists():
        with open_safetensors(single) as file:
            return dict.fromkeys(file.keys(), single)
    if not index_path.exists():
        raise ValueError(f"{folder}: holds neither model.safetensors nor model.safetensors.index.json")
    try:
        weight_map = json.loads(index_path.read_text(encoding="utf-8"))["weight_map"]
        shards = {name: folder / shard for name, shard in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index_path}: not an index of shards ({type(error).__name__}: {error})") from None
    held: dict[Path, set[str]] = {}
    for path in sorted(set(shards.values())):
        if path.parent != folder or path.name in ("", ".", ".."):
            raise ValueError(f"{index_path}: names a shard outside the folder: {path}")
        if not path.is_file():
            raise ValueError(
                f"{path}: shard not found, but {index_path.name} names it; download the folder again"
            )
        with open_safetensors(path) as file:
            held[path] = set(file.keys())
    for name, path in shards.items():
        if name not in held[path]:
            raise ValueError(f"{path}: tensor {name} not found, but {index_path.name} says it is here")
    return shards


def open_safetensors(path: Path):
    """Open a safetensors file for reading single tensors; a context manager.

    Read by position and not memory-mapped: mapped pages would count as this process's memory, the whole file
    of them. Raises ValueError, naming the file, if it is not whole.
    """
    try:
        return safe_open(path, framework="pt", backend="pread")
    except (SafetensorError, OSError) as error:
        size = path.stat().st_size if path.exists() else 0
        raise ValueError(f"{path}: damaged or cut off ({size:,} bytes; {error}); download it again") from None


def _read_tensor(file, path: Path, name: str, shape: torch.Size) -> Tensor:
    found = tuple(file.get_slice(name).get_shape())
    if found != tuple(shape):
        raise ValueError(f"{path}: {name} has shape {found}, but config.json asks for {tuple(shape)}")
    tensor = file.get_tensor(name)
    if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"{path}: {name} is {tensor.dtype}; expected float32, float16 or bfloat16")
    return tensor


def _require_same_names(folder: Path, wanted: dict, shards: dict[str, Path], tied_head: bool) -> None:
    missing = sorted(set(wanted) - set(shards))
    if missing:
        raise ValueError(
            f"{folder}: {len(missing)} of {len(wanted)} tensors missing, the first is {missing[0]}"
        )
    ignored = {name for name in shards if name.endswith(_IGNORED_SUFFIXES)}
    if tied_head:
        ignored.add("lm_head.weight")
    left_over = sorted(set(shards) - set(wanted) - ignored)
    if left_over:
        raise ValueError(
            f"{folder}: {len(left_over)} tensors have no place in this model, the first is {left_over[0]}"
        )


def _replace_parameter(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, parameter)


# ---- 4-bit weights as plain tensors ------------------------------------------------------------------------

SAVED_QUANT_TYPES = ("nf4", "fp4")  # those that bitsandbytes' format has
_STATE = ".quant_state.bitsandbytes__"

# What the format calls the parts of an NF4Tensor, and their dtypes. Packed codes have the weight's own name.
_PART_NAMES = {
    "codebook": "quant_map",
    "absmax": "absmax",
    "absmax_codes": "absmax",
    "nested_absmax": "nested_absmax",
    "nested_codebook": "nested_quant_map",
}


def flatten_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict with every NF4Tensor laid out as plain tensors, in bitsandbytes' format, so that
    safetensors can write it and bitsandbytes' users can read it.

    `name` becomes `name` (packed, (n / 2, 1) uint8), `name.absmax`, `name.quant_map`, with double
    quantization `name.nested_absmax` and `name.nested_quant_map`, and
    `name.quant_state.bitsandbytes__nf4`, which is JSON in uint8: shape, dtype, block sizes, offset. Raises
    ValueError for what the format has no place for: other levels than NF4 and FP4, and a part of a larger
    tensor that begins within a nested block.
    """
    flat: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        if not isinstance(tensor, NF4Tensor):
            flat[name] = tensor
            continue
        format = tensor.format
        if format.quant_type not in SAVED_QUANT_TYPES:
            raise ValueError(f"{name}: {format.quant_type} is for comparison; only nf4 and fp4 can be saved")
        if format.view != "matrix" or format.nested_first:
            raise ValueError(f"{name}: save the whole weight, not a view or a part of it")
        flat[name] = tensor.packed[:, None]
        for part, suffix in _PART_NAMES.items():
            if part in tensor.parts:  # a codebook that all tensors share is written once for each
                shared_by_all = part in SHARED_PARTS
                flat[f"{name}.{suffix}"] = tensor.parts[part].clone() if shared_by_all else tensor.parts[part]
        state: dict[str, Any] = {
            "quant_type": format.quant_type,
            "blocksize": format.block_size,
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": list(format.shape),
        }
        if tensor.offset is not None:
            state |= {"nested_blocksize": format.nested_block_size, "nested_dtype": "float32"}
            state["nested_offset"] = tensor.offset.item()
        text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
        flat[f"{name}{_STATE}{format.quant_type}"] = text
    return flat


def unflatten_state_dict(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict with NF4Tensors in it, from the plain tensors of `flatten_state_dict` or
    bitsandbytes.

    Weights decode by the codebooks that stand beside them. Raises ValueError, naming the key, where a part is
    missing or not what the others ask for.
    """
    state_dict = dict(tensors)
    for key in [key for key in tensors if _STATE in key]:
        name, _, quant_type = key.partition(_STATE)
        own = {key: state_dict.pop(key)}
        if isinstance(state_dict.get(name), NF4Tensor):
            raise ValueError(f"{key}: a second quantization state of {name}")
        for suffix in ("", *(f".{suffix}" for suffix in _PART_NAMES.values())):
            if name + suffix in state_dict:
                own[name + suffix] = state_dict.pop(name + suffix)
        state_dict[name] = _unflatten(name, quant_type, own)
    return state_dict


def _unflatten(name: str, quant_type: str, tensors: Mapping[str, Tensor]) -> NF4Tensor:
    key = f"{name}{_STATE}{quant_type}"
    try:
        state = json.loads(bytes(tensors[key].tolist()))
        n_rows, n_columns = (int(size) for size in state["shape"])
        dtype = getattr(torch, state["dtype"])
        format = Format((n_rows, n_columns), int(state["blocksize"]), quant_type=quant_type)
        if "nested_blocksize" in state:
            format = replace(format, nested_block_size=int(state["nested_blocksize"]))
            offset = torch.tensor(float(state["nested_offset"]), dtype=torch.float32)
        sound = (
            dtype.is_floating_point
            and min(*format.shape, format.block_size, format.nested_block_size) > 0
            and format.block_size % 2 == 0
            and ("nested_blocksize" not in state or bool(offset.isfinite()))
            and state.get("quant_type") == quant_type
        )
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{key}: not a quantization state ({type(error).__name__}: {error})") from None
    if not sound or quant_type not in SAVED_QUANT_TYPES:
        raise ValueError(f"{key}: not a quantization state ({state})")
    nested = "nested_blocksize" in state
    wanted = {  # part: dtype, numbers
        "packed": (torch.uint8, -(-n_rows * n_columns // 2)),
        "codebook": (torch.float32, 16),
    }
    if nested:
        wanted |= {"absmax_codes": (torch.uint8, format.n_blocks), "nested_codebook": (torch.float32, 256)}
        wanted["nested_absmax"] = (torch.float32, format.n_nested_blocks)
    else:
        wanted["absmax"] = (torch.float32, format.n_blocks)
    parts = {}
    for part, (part_dtype, count) in wanted.items():
        part_key = name if part == "packed" else f"{name}.{_PART_NAMES[part]}"
        if part_key not in tensors:
            raise ValueError(f"{part_key}: missing, but {key} asks for it")
        tensor = tensors[part_key].flatten()
        if part == "packed":
            tensor = tensor.view(torch.uint8)  # the bytes may be stored as numbers of any dtype
        if tensor.dtype != part_dtype or tensor.numel() != count:
            found = f"{tensor.numel()} of {tensor.dtype}"
            raise ValueError(f"{part_key}: expected {count} numbers of {part_dtype}, got {found}")
        parts[part] = shared(tensor, tensor.device) if part in SHARED_PARTS else tensor
    if nested:
        parts["offset"] = offset.to(parts["packed"].device)
    return NF4Tensor(parts, dtype, format)


# ---- writing -----------------------------------------------------------------------------------------------


def write_atomically(path: Path, content: bytes | dict[str, Tensor]) -> None:
    """Write a file so that it exists whole or not at all: temporary name beside it, fsync, rename, fsync of
    the folder.

    content: bytes, or named tensors for a safetensors file (copied to the CPU first).
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            if isinstance(content, bytes):
                file.write(content)
            else:
                tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in content.items()}
                file.write(safetensors.torch.save(tensors, metadata={"format": "pt"}))
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    _fsync_folder(path.parent)


def _fsync_folder(folder: Path) -> None:
    # The rename itself must reach the disk too. Windows cannot open folders, and orders this by itself.
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
