"""Chapter 11. Tensors in files: safetensors folders, read and written one tensor at a time.

A safetensors file is a header, JSON that says of each tensor its dtype, its shape and where it stands, and
then the numbers. So one tensor can be read without the others, and nothing in a file is ever executed::

    8 bytes    length of the header
    header     {"a": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}, ...}
    numbers    12 bytes of a, ...

A large model stands in several files ("shards") and an index that says which tensor is where. Whatever the
header or the index says is checked: a file comes from somebody else, or was cut off on its way.

A 4-bit weight is half a dozen tensors, told by a name that ends in `.quant_state.bitsandbytes__nf4`; they are
read as one NF4Tensor and written as bitsandbytes writes them, bit for bit.

Going out, sizes are known before numbers are: the header of each file is written first, each tensor goes to
its place in it as it comes, and a folder gets its name when all of it is on the disk.

Cost: in memory one tensor; on disk, while a folder is written, nothing beyond it.

Paper: none. Format: safetensors, and Hugging Face's `model.safetensors.index.json`; bitsandbytes' parts of a
4-bit weight.

Before: model. Next: checkpoint.
"""

import json
import math
import os
import re
import secrets
import shutil
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minqlora.codebook import shared
from minqlora.nf4 import SHARED_PARTS, Format, NF4Tensor

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"

# What safetensors calls the dtypes of tensors, in the order in which it sorts a file, last first.
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
}
_WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


# ---- reading -----------------------------------------------------------------------------------------------


class Checkpoint:
    """The tensors of a checkpoint folder, to be read one at a time, by position: nothing is memory-mapped,
    because mapped pages would count as this process's memory.

    names: of all tensors, sorted; the parts of a 4-bit weight are one, under the weight's name. files: the
    safetensors files. has_quantized: whether any weight is in 4 bits. Raises ValueError, naming the file, if
    there is no safetensors file, one is damaged or missing, or the index does not say what the files hold.
    """

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        self._shards = _open_shards(self.folder)
        self._where = {key: path for path, file in self._shards.items() for key in file.keys()}  # noqa: SIM118
        self._states: dict[str, str] = {}  # of each 4-bit weight the key of its quantization state
        for key in filter(lambda key: STATE in key, sorted(self._where)):
            name = key.partition(STATE)[0]
            if name in self._states:
                raise ValueError(f"{self._where[key]}: {key}: a second quantization state of {name}")
            self._states[name] = key
        parts = {key for name in self._states for key in self._keys(name)} - set(self._states)
        self.names = sorted((self._where.keys() | self._states.keys()) - parts)
        self.files = sorted(self._shards)
        self.has_quantized = bool(self._states)
        self._formats: dict[str, tuple[Format, torch.dtype, float | None]] = {}

    def path(self, name: str) -> Path:
        """Return the file that holds a tensor, of a 4-bit weight its quantization state."""
        return self._where[self._states.get(name, name)]

    def is_quantized(self, name: str) -> bool:
        """Say whether a weight is in 4 bits."""
        return name in self._states

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor, of a 4-bit weight that of the matrix it stands for."""
        if self.is_quantized(name):
            return self._format(name)[0].shape
        return self._header(name)[1]

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor, of a 4-bit weight the one it had before."""
        return self._format(name)[1] if self.is_quantized(name) else self._header(name)[0]

    def nbytes(self, name: str) -> int:
        """Return the bytes that a tensor takes in the files, all parts together."""
        headers = [self._header(key) for key in self._keys(name)]
        return sum(math.prod(shape) * dtype.itemsize for dtype, shape in headers)

    def read(self, name: str) -> Tensor:
        """Return a tensor on the CPU, in the dtype of the file; a 4-bit weight as an NF4Tensor.

        Raises ValueError, naming file and tensor, for a dtype that no weight has, for NaN and infinity, and
        for parts of a 4-bit weight that are missing or do not fit together.
        """
        if self.is_quantized(name):
            tensors = {key: self._read(key) for key in self._keys(name)}
            try:
                return _unflatten(name, self._states[name].partition(STATE)[2], tensors)
            except ValueError as error:
                raise ValueError(f"{self.path(name)}: {error}") from None
        dtype = self._header(name)[0]
        if dtype not in _WEIGHT_DTYPES:
            raise ValueError(f"{self.path(name)}: {name} is {dtype}; expected float32, float16 or bfloat16")
        tensor = self._read(name)
        _require_finite(tensor, f"{self.path(name)}: {name}")
        return tensor

    def in_file_order(self, names: Iterable[str]) -> list[str]:
        """Return the names so that each file is read once, from its beginning."""
        return sorted(names, key=lambda name: (self.path(name), name))

    def _keys(self, name: str) -> list[str]:
        # The tensors in the files that make up one.
        if name not in self._states:
            return [name]
        suffixes = ("", *sorted({f".{suffix}" for suffix in PART_NAMES.values()}))
        return [self._states[name], *(name + suffix for suffix in suffixes if name + suffix in self._where)]

    def _header(self, key: str) -> tuple[torch.dtype, tuple[int, ...]]:
        part = self._shards[self._where[key]].get_slice(key)
        if part.get_dtype() not in _DTYPES:
            raise ValueError(f"{self._where[key]}: {key} is {part.get_dtype()}, which no model here has")
        return _DTYPES[part.get_dtype()], tuple(part.get_shape())

    def _format(self, name: str) -> tuple[Format, torch.dtype, float | None]:
        key = self._states[name]
        if name not in self._formats:
            try:
                self._formats[name] = _parse_state(key, self._read(key))
            except ValueError as error:
                raise ValueError(f"{self._where[key]}: {error}") from None
        return self._formats[name]

    def _read(self, key: str) -> Tensor:
        path = self._where[key]
        try:
            return self._shards[path].get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: {key} cannot be read ({one_line(error)})") from None


def _open_shards(folder: Path) -> dict[Path, Any]:
    # Every file of a checkpoint, opened, each tensor in one of them.
    single, index = folder / SINGLE_FILE, folder / INDEX_FILE
    shards: dict[Path, set[str] | None]
    if single.exists():
        shards = {single: None}
    elif index.exists():
        shards = dict(_read_index(index))
    else:
        raise ValueError(_no_safetensors(folder))
    files = {}
    for path, listed in shards.items():
        files[path] = open_safetensors(path)
        held = set(files[path].keys())
        odd = sorted(key for key in held if not key.isprintable())
        if odd:
            raise ValueError(f"{path}: {odd[0]!a:.80} is no name of a tensor")
        if listed is None:
            continue
        for key in sorted(listed - held):
            raise ValueError(f"{path}: tensor {key} not found, but {INDEX_FILE} says it is here")
        for key in sorted(held - listed):
            raise ValueError(f"{path}: holds {key}, but {INDEX_FILE} does not say so; download it again")
    return files


def _no_safetensors(folder: Path) -> str:
    # What is to be said of a folder without weights that can be read.
    lacks = f"{folder}: holds neither {SINGLE_FILE} nor {INDEX_FILE}"
    if any(folder.glob("pytorch_model*.bin")):
        return (
            f"{lacks}, only pytorch_model*.bin, which are pickles: reading one can run any code. Convert it "
            'where you trust it: python -c "from transformers import AutoModelForCausalLM as M; '
            "M.from_pretrained('IN', dtype='auto').save_pretrained('OUT')\""
        )
    if any(folder.glob("*.gguf")):
        return f"{lacks}, only a GGUF file, made for llama.cpp; get the model's Hugging Face folder"
    if any(folder.glob("consolidated.*")):
        return f"{lacks}, only consolidated.* in its maker's own layout; get the model's Hugging Face folder"
    return lacks


def _read_index(path: Path) -> dict[Path, set[str]]:
    # The shards, and which tensors each is said to hold. They are in the folder: links may lead out of it, as
    # in the Hugging Face cache, names may not.
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_repeats)
        pairs = [(str(name), str(shard)) for name, shard in weight_map["weight_map"].items()]
        if not all(isinstance(shard, str) for shard in weight_map["weight_map"].values()):
            raise TypeError("a shard is no text")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path}: not an index of shards ({type(error).__name__}: {one_line(error)})"
        ) from None
    shards: dict[Path, set[str]] = {}
    for name, shard in pairs:
        if not name.isprintable() or not shard.isprintable():
            raise ValueError(f"{path}: {name!a:.80} in {shard!a:.80} is no tensor in a file")
        if not re.fullmatch(r"[^/\\:]+", shard) or shard in (".", ".."):
            raise ValueError(f"{path}: names a shard outside the folder: {shard}")
        shards.setdefault(path.with_name(shard), set()).add(name)
    for shard_path in shards:
        if not os.path.isfile(shard_path):  # which says no, and raises nothing, for a name that none can have
            raise ValueError(
                f"{shard_path}: shard not found, but {path.name} names it; download the folder again"
            )
    return shards


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a name stands there twice")
    return dict(pairs)


def open_safetensors(path: Path):
    """Open a safetensors file for reading single tensors; a context manager.

    Read by position and not memory-mapped: mapped pages would count as this process's memory, the whole file
    of them. Raises ValueError, naming the file, if it is not whole.
    """
    try:
        return safe_open(path, framework="pt", backend="pread")
    except (SafetensorError, OSError) as error:
        size = path.stat().st_size if path.exists() else 0
        problem = one_line(error)
        raise ValueError(
            f"{path}: damaged or cut off ({size:,} bytes; {problem}); download it again"
        ) from None


def one_line(value: object) -> str:
    """Return a value as text for a message: what came out of a file may hold anything, ends of lines too."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(value)).split())[:300]


def _require_finite(tensor: Tensor, name: str) -> None:
    # The extremes are found without a copy, and are NaN where any number is.
    if tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
        first = (~tensor.isfinite()).nonzero()[0].tolist()
        raise ValueError(f"{name}: holds {tensor[tuple(first)].item()} (first at index {tuple(first)})")


# ---- 4-bit weights as plain tensors ------------------------------------------------------------------------

SAVED_QUANT_TYPES = ("nf4", "fp4")  # those that bitsandbytes' format has
STATE = ".quant_state.bitsandbytes__"

# What the format calls the parts of an NF4Tensor. Packed codes have the weight's own name.
PART_NAMES = {
    "codebook": "quant_map",
    "absmax": "absmax",
    "absmax_codes": "absmax",
    "nested_absmax": "nested_absmax",
    "nested_codebook": "nested_quant_map",
}


def flatten_state_dict(state_dict: Mapping[str, Tensor], *, pad: bool = False) -> dict[str, Tensor]:
    """Return a state dict with every NF4Tensor laid out as plain tensors, in bitsandbytes' format, so that
    safetensors can write it and bitsandbytes' users can read it.

    `name` becomes `name` (packed, (n / 2, 1) uint8), `name.absmax`, `name.quant_map`, with double
    quantization `name.nested_absmax` and `name.nested_quant_map`, and
    `name.quant_state.bitsandbytes__nf4`, which is JSON in uint8: shape, dtype, block sizes, offset. pad: that
    JSON is as long for one offset as for another.

    Raises ValueError for what the format has no place for: other levels than NF4 and FP4, and a part of a
    larger tensor that begins within a nested block.
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
        for part, suffix in PART_NAMES.items():
            if part in tensor.parts:  # a codebook that all tensors share is written once for each
                shared_by_all = part in SHARED_PARTS
                flat[f"{name}.{suffix}"] = tensor.parts[part].clone() if shared_by_all else tensor.parts[part]
        offset = None if tensor.offset is None else tensor.offset.item()
        text = state_text(format, tensor.dtype, offset, pad)
        flat[f"{name}{STATE}{format.quant_type}"] = torch.tensor(list(text), dtype=torch.uint8)
    return flat


def state_text(format: Format, dtype: torch.dtype, offset: float | None, pad: bool) -> bytes:
    """Return the JSON of a quantization state, as bitsandbytes spells it; an offset says double quantization.
    Padded, it has blanks at its end where a longer offset would have digits."""
    state: dict[str, Any] = {
        "quant_type": format.quant_type,
        "blocksize": format.block_size,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(format.shape),
    }
    if offset is not None:
        state |= {"nested_blocksize": format.nested_block_size, "nested_dtype": "float32"}
        state["nested_offset"] = offset
    text = json.dumps(state)
    return (text.ljust(len(text) - len(repr(offset)) + 24) if pad and offset is not None else text).encode()


def unflatten_state_dict(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict with NF4Tensors in it, from the plain tensors of `flatten_state_dict` or
    bitsandbytes.

    Weights decode by the codebooks that stand beside them. Raises ValueError, naming the key, where a part is
    missing or not what the others ask for.
    """
    state_dict = dict(tensors)
    for key in [key for key in tensors if STATE in key]:
        name, _, quant_type = key.partition(STATE)
        own = {key: state_dict.pop(key)}
        if isinstance(state_dict.get(name), NF4Tensor):
            raise ValueError(f"{key}: a second quantization state of {name}")
        for suffix in ("", *(f".{suffix}" for suffix in PART_NAMES.values())):
            if name + suffix in state_dict:
                own[name + suffix] = state_dict.pop(name + suffix)
        state_dict[name] = _unflatten(name, quant_type, own)
    return state_dict


def _unflatten(name: str, quant_type: str, tensors: Mapping[str, Tensor]) -> NF4Tensor:
    key = f"{name}{STATE}{quant_type}"
    format, dtype, offset = _parse_state(key, tensors[key])
    parts = {}
    for part, (part_dtype, count) in parts_of(format, nested=offset is not None).items():
        part_key = name if part == "packed" else f"{name}.{PART_NAMES[part]}"
        if part_key not in tensors:
            raise ValueError(f"{part_key}: missing, but {key} asks for it")
        tensor = tensors[part_key].flatten()
        if part == "packed":
            tensor = tensor.view(torch.uint8)  # the bytes may be stored as numbers of any dtype
        if tensor.dtype != part_dtype or tensor.numel() != count:
            found = f"{tensor.numel()} of {tensor.dtype}"
            raise ValueError(f"{part_key}: expected {count} numbers of {part_dtype}, got {found}")
        if part_dtype.is_floating_point:
            _require_finite(tensor, part_key)
        parts[part] = shared(tensor, tensor.device) if part in SHARED_PARTS else tensor
    if offset is not None:
        parts["offset"] = torch.tensor(offset, dtype=torch.float32, device=parts["packed"].device)
    return NF4Tensor(parts, dtype, format)


def _parse_state(key: str, text: Tensor) -> tuple[Format, torch.dtype, float | None]:
    # Format, dtype before quantization, and offset, None without double quantization.
    quant_type = key.partition(STATE)[2]
    try:
        state = json.loads(bytes(text.tolist()))
        n_rows, n_columns = state["shape"]
        format = Format((n_rows, n_columns), state["blocksize"], quant_type=quant_type)
        if "nested_blocksize" in state:
            format = replace(format, nested_block_size=state["nested_blocksize"])
        numbers = [*format.shape, format.block_size, format.nested_block_size]
        dtype = {str(dtype): dtype for dtype in _WEIGHT_DTYPES}[f"torch.{state['dtype']}"]
        offset = float(state["nested_offset"]) if "nested_blocksize" in state else None
        sound = (
            all(type(number) is int and 0 < number < 2**31 for number in numbers)
            and format.block_size % 2 == 0
            and (offset is None or abs(offset) <= torch.finfo(torch.float32).max)
            and state.get("quant_type") == quant_type
        )
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(
            f"{key}: not a quantization state ({type(error).__name__}: {one_line(error)})"
        ) from None
    if not sound or quant_type not in SAVED_QUANT_TYPES:
        raise ValueError(f"{key}: not a quantization state ({state!a:.300})")
    return format, dtype, offset


def parts_of(format: Format, nested: bool) -> dict[str, tuple[torch.dtype, int]]:
    """Return the dtype of each part of a weight in this format, and how many numbers it has."""
    parts = {
        "packed": (torch.uint8, -(-math.prod(format.shape) // 2)),
        "codebook": (torch.float32, 16),
    }
    if not nested:
        return parts | {"absmax": (torch.float32, format.n_blocks)}
    return parts | {
        "absmax_codes": (torch.uint8, format.n_blocks),
        "nested_codebook": (torch.float32, 256),
        "nested_absmax": (torch.float32, format.n_nested_blocks),
    }


# ---- writing -----------------------------------------------------------------------------------------------

Plan = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]  # of each tensor dtype and shape

# What goes with the weights into a folder made from another: whatever tells how to use them.
COMPANIONS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "additional_chat_templates/*.jinja",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)


def write_checkpoint(
    folder: Path | str,
    plan: Plan,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    files: Mapping[str, bytes] | None = None,
    max_shard_bytes: int = 5_000_000_000,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write a checkpoint folder, one tensor in memory at a time; it exists whole or not at all.

    folder: new or empty. plan: what will come. tensors: in any order, each as planned. files: what else goes
    into the folder, by name. max_shard_bytes: a larger checkpoint is cut into several files, in the order of
    the plan; `name.part` stays with `name`. progress: called after each tensor with the bytes written so far
    and in all.

    Raises ValueError, before anything is written, for a folder that holds something and for a disk without
    room, and OSError for what happens to the disk later; nothing is then left behind.
    """
    folder = Path(os.path.realpath(folder))
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: exists and is not an empty folder; choose another")
    folder.parent.mkdir(parents=True, exist_ok=True)
    total, free = sum(map(_bytes_of, plan.values())), shutil.disk_usage(folder.parent).free
    if total > free:
        raise ValueError(
            f"{folder}: needs {total / 1e9:.2f} GB on the disk, but {free / 1e9:.2f} GB are free"
        )
    partial = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.partial")
    partial.mkdir()
    try:
        _write_shards(partial, _shards_of(plan, max_shard_bytes), tensors, total, progress)
        for name, content in (files or {}).items():
            (partial / name).parent.mkdir(exist_ok=True)
            write_atomically(partial / name, content)
        if folder.exists():
            folder.rmdir()
        os.rename(partial, folder)
        fsync_folder(folder.parent)
    except OSError as error:
        problem = f"{error.strerror or error}; nothing was left behind"
        raise OSError(error.errno, problem, str(folder)) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _bytes_of(planned: tuple[torch.dtype, tuple[int, ...]]) -> int:
    return math.prod(planned[1]) * planned[0].itemsize


def _shards_of(plan: Plan, max_bytes: int) -> list[Plan]:
    # The plan cut where a file would grow too large, never inside a weight of several parts: readers want
    # them together.
    shards: list[dict[str, tuple[torch.dtype, tuple[int, ...]]]] = [{}]
    weights: dict[str, list[str]] = {}
    whole = ""
    for key in plan:
        whole = whole if whole and key.startswith(f"{whole}.") else key
        weights.setdefault(whole, []).append(key)
    size = 0
    for keys in weights.values():
        needed = sum(_bytes_of(plan[key]) for key in keys)
        if shards[-1] and size + needed > max_bytes:
            shards.append({})
            size = 0
        shards[-1] |= {key: plan[key] for key in keys}
        size += needed
    return list(shards)


def _write_shards(
    folder: Path,
    shards: list[Plan],
    tensors: Iterable[tuple[str, Tensor]],
    total: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    n = len(shards)
    names = [SINGLE_FILE] if n == 1 else [f"model-{i:05}-of-{n:05}.safetensors" for i in range(1, n + 1)]
    places: dict[str, tuple[Path, int]] = {}  # of each tensor its file, and where it begins there
    for name, shard in zip(names, shards, strict=True):
        header, starts = _header(shard)
        (folder / name).write_bytes(header)
        places |= {key: (folder / name, start) for key, start in starts.items()}
    index = {
        "metadata": {"total_size": total},
        "weight_map": {key: path.name for key, (path, _) in sorted(places.items())},
    }
    planned = {key: facts for shard in shards for key, facts in shard.items()}
    written = 0
    for key, tensor in tensors:
        came = (tensor.dtype, tuple(tensor.shape))
        assert planned.pop(key, None) == came, f"{key}: {came} is not what was planned"
        path, start = places[key]
        with open(path, "r+b") as file:
            file.seek(start)
            file.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        written += tensor.nbytes
        if progress is not None:
            progress(written, total)
    assert not planned, f"planned, and never came: {', '.join(planned)}"
    for name in names:
        with open(folder / name, "r+b") as file:
            os.fsync(file.fileno())
    if n > 1:
        write_atomically(folder / INDEX_FILE, (json.dumps(index, indent=2) + "\n").encode())
    fsync_folder(folder)


def _header(shard: Plan) -> tuple[bytes, dict[str, int]]:
    # What a safetensors file begins with, and where in it each tensor does. Wide numbers come first, so that
    # all are aligned.
    order = {dtype: i for i, dtype in enumerate(_DTYPES.values())}
    names = dict(zip(_DTYPES.values(), _DTYPES, strict=True))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key, (dtype, shape) in sorted(shard.items(), key=lambda item: (-order[item[1][0]], item[0])):
        start, end = end, end + _bytes_of((dtype, shape))
        header[key] = {"dtype": names[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    starts = {key: 8 + len(text) + header[key]["data_offsets"][0] for key in shard}
    return struct.pack("<Q", len(text)) + text, starts


def companions(folder: Path) -> dict[str, bytes]:
    """Return the files that go with a model's weights wherever they go: tokenizer, chat template, generation
    settings, licence."""
    paths = {path for pattern in COMPANIONS for path in folder.glob(pattern) if path.is_file()}
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(paths)}


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
    fsync_folder(path.parent)


def fsync_folder(folder: Path) -> None:
    """Make sure that the names in a folder, and a rename that made one, have reached the disk."""
    # Windows cannot open folders, and orders this by itself.
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
