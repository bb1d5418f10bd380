"""A checkpoint with anything in it changed is refused in one line, or loads as what its bytes say.

Hypothesis damages three small real checkpoints: one file in 16 bits, several, and one in 4 bits. Whatever it
does, loading ends in a ValueError of one line that names the folder, or in a model whose tensors are those of
the undamaged one, but for the tensors whose own bytes were changed: nothing in a file tells a weight from
another weight.
"""

import copy
import json
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from minqlora import NF4Tensor, load_model
from minqlora.checkpoint import Quantization
from minqlora.files import INDEX_FILE, SINGLE_FILE, Checkpoint, write_checkpoint
from quantize import quantize_checkpoint

KINDS = ("single", "sharded", "4-bit")


@pytest.fixture(scope="module")
def originals(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The checkpoints to be damaged, without their tokenizers."""
    parent = tmp_path_factory.mktemp("originals")
    folders = {kind: parent / kind for kind in KINDS}
    held = Checkpoint(tiny_model)
    plan = {name: (held.dtype(name), held.shape(name)) for name in held.names}
    files = {"config.json": (tiny_model / "config.json").read_bytes()}
    for kind, size in {"single": 10**9, "sharded": 60_000}.items():
        tensors = ((name, held.read(name)) for name in held.names)
        write_checkpoint(folders[kind], plan, tensors, files=files, max_shard_bytes=size)
    quantize_checkpoint(tiny_model, folders["4-bit"], Quantization(block_size=32))
    return folders


class Whole(dict[str, dict[str, Tensor]]):
    """What each of them loads as; not printed in full for each failure."""

    __repr__ = object.__repr__


@pytest.fixture(scope="module")
def whole(originals: dict[str, Path]) -> Whole:
    """What each of them loads as."""
    return Whole((kind, tensors_of(load(folder))) for kind, folder in originals.items())


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where damaged copies are made, one after the other."""
    return tmp_path_factory.mktemp("damaged")


def load(folder: Path) -> torch.nn.Module:
    return load_model(folder, dtype=torch.float32, quant_type="nf4")


def tensors_of(model: torch.nn.Module) -> dict[str, Tensor]:
    """Every number of a model, by the name of its parameter and part."""
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        parts = parameter.parts if isinstance(parameter, NF4Tensor) else {"": parameter.detach()}
        found |= {f"{name} {part}": tensor for part, tensor in parts.items()}
    return found


def copy_of(folder: Path, workshop: Path) -> Path:
    shutil.rmtree(workshop / folder.name, ignore_errors=True)
    return shutil.copytree(folder, workshop / folder.name)


def require_refused_or_whole(folder: Path, whole: dict[str, Tensor], changed: tuple[str, ...] = ()) -> bool:
    """Load a damaged folder; return whether it was refused. changed: parameters that may be others."""
    try:
        loaded = tensors_of(load(folder))
    except ValueError as error:
        assert str(folder) in str(error) and len(str(error).splitlines()) == 1, str(error)
        return True
    assert loaded.keys() == whole.keys()
    for name, tensor in loaded.items():
        assert name.startswith(changed or ("-",)) or torch.equal(tensor, whole[name]), name
    return False


def header_end(path: Path) -> int:
    return 8 + struct.unpack("<Q", path.read_bytes()[:8])[0]


def files_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


many = settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
kinds = pytest.mark.parametrize("kind", KINDS)
share = st.floats(0, 1, exclude_max=True)


@kinds
@many
@given(data=st.data())
def test_a_file_cut_or_grown_at_any_byte_is_refused(kind, originals, workshop, data) -> None:
    folder = copy_of(originals[kind], workshop)
    path = data.draw(st.sampled_from(files_of(folder)))
    content = path.read_bytes()
    place = int(data.draw(share) * len(content))
    changed = data.draw(
        st.sampled_from([content[:place], content[:place] + b"\0" + content[place:], content * 2])
    )
    path.write_bytes(changed)
    assert require_refused_or_whole(folder, {})


@kinds
@many
@given(data=st.data())
def test_a_changed_byte_of_a_header_is_refused_or_changes_nothing(
    kind, originals, whole, workshop, data
) -> None:
    folder = copy_of(originals[kind], workshop)
    path = data.draw(st.sampled_from(files_of(folder)))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        place = int(data.draw(share) * header_end(path))
        content[place] = data.draw(st.sampled_from([*b'0123456789,:{}[]"\\ FUBI\n\0'] + [128, 255]))
    path.write_bytes(content)
    require_refused_or_whole(folder, whole[kind])


@kinds
@many
@given(data=st.data())
def test_a_changed_byte_of_a_tensor_is_refused_or_changes_that_tensor(
    kind, originals, whole, workshop, data
) -> None:
    folder = copy_of(originals[kind], workshop)
    path = data.draw(st.sampled_from(files_of(folder)))
    header = json.loads(path.read_bytes()[8 : header_end(path)])
    name = data.draw(st.sampled_from(sorted(header.keys() - {"__metadata__"})))
    start, end = header[name]["data_offsets"]
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 2))):
        place = header_end(path) + start + int(data.draw(share) * (end - start))
        content[place] = data.draw(st.integers(0, 255) | st.sampled_from([*b'0123456789,:{}[]" ']))
    path.write_bytes(content)
    require_refused_or_whole(folder, whole[kind], changed=(name.partition(".weight")[0] + ".weight ",))


# -- JSON ----------------------------------------------------------------------------------------------------

values = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, -1, 1, 2, 3, 7, 64, 128, 10_000, 2**31 - 1, 2**31, 2**63, 10**30, 0.5, 1e300, -0.0]),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(
        ["..", "/", "../x", "a/b", "model.safetensors", "config.json", "\0", "x\ny", "nul", "\ud800"]
    ),
    st.lists(st.integers(-2, 100), max_size=4),
    st.dictionaries(st.text(max_size=5), st.integers(), max_size=3),
)


def places_in(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Yield the path of every value inside a JSON value."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inside in pairs:
        yield (*path, key)
        yield from places_in(inside, (*path, key))


def edited(content: Any, data: st.DataObject) -> Any:
    """Return a JSON value with something in it changed, taken out, renamed or put elsewhere."""
    content = copy.deepcopy(content)
    for _ in range(data.draw(st.integers(1, 2))):
        places = list(places_in(content))
        *way, key = data.draw(st.sampled_from(places))
        parent = content
        for step in way:
            parent = parent[step]
        edit = data.draw(st.sampled_from(["change", "take out", "rename", "swap"]))
        if edit == "change":
            parent[key] = data.draw(values)
        elif edit == "take out" or not isinstance(parent, dict):
            del parent[key]
        elif edit == "rename":
            name = data.draw(st.text(max_size=30) | st.sampled_from(sorted(parent)))
            parent[name] = parent.pop(key)
        else:
            other = data.draw(st.sampled_from(sorted(parent)))
            parent[key], parent[other] = parent[other], parent[key]
        if not list(places_in(content)):
            break
    return content


@kinds
@many
@given(data=st.data())
def test_an_edited_header_is_refused_or_changes_nothing(kind, originals, whole, workshop, data) -> None:
    folder = copy_of(originals[kind], workshop)
    path = data.draw(st.sampled_from(files_of(folder)))
    content, end = path.read_bytes(), header_end(path)
    header = json.loads(content[8:end])
    changed = edited(header, data)
    text = json.dumps(changed).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[end:])
    # Two names that have changed places, or two that stand for the other's bytes, make another sound file.
    touched = {name for name in changed.keys() | header.keys() if changed.get(name) != header.get(name)}
    names = tuple(name.partition(".weight")[0] + ".weight " for name in touched)
    require_refused_or_whole(folder, whole[kind], changed=names)


@many
@given(data=st.data())
def test_an_edited_index_is_refused_or_changes_nothing(originals, whole, workshop, data) -> None:
    folder = copy_of(originals["sharded"], workshop)
    index = edited(json.loads((folder / INDEX_FILE).read_text()), data)
    (folder / INDEX_FILE).write_text(json.dumps(index))
    require_refused_or_whole(folder, whole["sharded"])


@kinds
@many
@given(data=st.data())
def test_an_edited_config_is_refused_or_leaves_every_tensor_as_it_is(
    kind, originals, whole, workshop, data
) -> None:
    folder = copy_of(originals[kind], workshop)
    config = edited(json.loads((folder / "config.json").read_text()), data)
    (folder / "config.json").write_text(json.dumps(config))
    if config.get("tie_word_embeddings") is True:  # then the head that the file has is passed over
        tensors = {name: tensor for name, tensor in whole[kind].items() if not name.startswith("lm_head")}
        require_refused_or_whole(folder, tensors)
    else:
        require_refused_or_whole(folder, whole[kind])


@many
@given(data=st.data())
def test_an_edited_quantization_state_is_refused_or_changes_that_weight(
    originals, whole, workshop, data
) -> None:
    folder = copy_of(originals["4-bit"], workshop)
    held = Checkpoint(folder)
    path = folder / SINGLE_FILE
    content, end = path.read_bytes(), header_end(path)
    header = json.loads(content[8:end])
    name = data.draw(st.sampled_from([name for name in held.names if held.is_quantized(name)]))
    start, stop = header[f"{name}.quant_state.bitsandbytes__nf4"]["data_offsets"]
    state = json.loads(content[end + start : end + stop])
    text = json.dumps(edited(state, data)).encode()[: stop - start].ljust(stop - start)
    path.write_bytes(content[: end + start] + text + content[end + stop :])
    require_refused_or_whole(folder, whole["4-bit"], changed=(f"{name} ",))
