"""A checkpoint folder loads tensor by tensor, and a damaged or foreign one is refused by file and name."""

import json
import os
import resource
import shutil
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from minqlora import NF4Tensor, checkpoint, load_model
from minqlora.checkpoint import default_dtype, quantized_size, write_atomically

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model to change."""
    return shutil.copytree(tiny_model, tmp_path / "model")


@pytest.fixture
def sharded(folder: Path) -> Path:
    """The tiny model in several files, as transformers cuts it."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    (folder / SINGLE).unlink()
    model.save_pretrained(folder, max_shard_size="60KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2 and (folder / INDEX).is_file()
    return folder


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = safetensors.torch.load_file(folder / SINGLE)
    change(tensors)
    safetensors.torch.save_file(tensors, folder / SINGLE, metadata={"format": "pt"})


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def parameters(folder: Path, **options: Any) -> dict[str, Tensor]:
    return dict(load_model(folder, dtype=torch.float32, **options).named_parameters())


# -- what is loaded ----------------------------------------------------------------------------------------


def test_the_demos_quantized_layers_take_4_127_bits_a_parameter(demo_model: Path) -> None:
    model = load_model(demo_model, dtype=torch.float32)
    count, held = quantized_size(model)
    linears = [p for p in model.parameters() if isinstance(p, NF4Tensor)]
    assert len(linears) == 210 and count == 106_168_320
    # By hand: 4 bits, a byte for 64 weights, 4 bytes for 64 * 256, a mean a matrix, two codebooks once.
    by_hand = sum(
        n // 2 + n // 64 + 4 * -(-n // (64 * 256)) + 4 for n in (weight.numel() for weight in linears)
    )
    assert held == by_hand + 4 * 16 + 4 * 256
    assert f"{8 * held / count:.3f}" == "4.127"
    # And in memory there is no more than that.
    parts = {id(part): part for weight in linears for part in weight.parts.values()}
    assert sum(part.untyped_storage().nbytes() for part in parts.values()) == held


def test_without_double_quantization_it_is_half_a_bit_for_the_scales(demo_model: Path) -> None:
    count, held = quantized_size(load_model(demo_model, dtype=torch.float32, double_quant=False))
    assert f"{8 * held / count:.3f}" == "4.500"


def test_each_weight_is_dropped_before_the_next_is_quantized(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize, read = NF4Tensor.from_float, []

    def watched(weight: Tensor, **options: Any) -> NF4Tensor:
        assert all(earlier() is None for earlier in read)
        read.append(weakref.ref(weight))
        return quantize(weight, **options)

    monkeypatch.setattr(checkpoint.NF4Tensor, "from_float", watched)
    load_model(tiny_model)
    assert len(read) == 14


def test_weights_keep_the_dtypes_that_the_chapter_promises(tiny_model: Path) -> None:
    model = load_model(tiny_model, dtype=torch.float32)
    assert model.compute_dtype == torch.float32 and not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.model.embed_tokens.weight.dtype == model.lm_head.weight.dtype == torch.bfloat16
    assert model.model.norm.weight.dtype == torch.float32
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16  # NF4, of a bfloat16 weight


def test_without_quantization_the_weights_are_those_of_the_file(tiny_model: Path) -> None:
    held = safetensors.torch.load_file(tiny_model / SINGLE)
    loaded = parameters(tiny_model, quant_type=None)
    assert loaded.keys() == held.keys()
    assert all(torch.equal(loaded[name].float(), held[name].float()) for name in held)


def test_quantized_weights_are_those_of_the_file_quantized(tiny_model: Path) -> None:
    held = safetensors.torch.load_file(tiny_model / SINGLE)
    name = "model.layers.1.mlp.down_proj.weight"
    for options in ({}, {"double_quant": False}, {"block_size": 32}):
        expected = NF4Tensor.from_float(held[name], **options).dequantize()
        assert torch.equal(parameters(tiny_model, **options)[name].dequantize(), expected)


def test_shards_load_as_the_single_file_does(tiny_model: Path, sharded: Path) -> None:
    one, many = parameters(tiny_model), parameters(sharded)
    assert one.keys() == many.keys()
    for name, weight in one.items():
        quantized = isinstance(weight, NF4Tensor)
        other = many[name].dequantize() if quantized else many[name]
        assert torch.equal(weight.dequantize() if quantized else weight, other), name


def test_progress_ends_at_the_bytes_of_all_tensors(sharded: Path) -> None:
    seen: list[tuple[int, int]] = []
    load_model(sharded, progress=lambda read, total: seen.append((read, total)))
    reads = [read for read, _ in seen]
    assert reads == sorted(reads) and len({total for _, total in seen}) == 1
    assert 0.9 < reads[-1] / seen[0][1] <= 1.0  # files are a little more than their tensors


def test_what_old_exporters_left_behind_is_passed_over(folder: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_tensors(folder, lambda tensors: tensors.update({name: torch.ones(8)}))
    assert name not in parameters(folder)


def test_a_head_stored_beside_tied_embeddings_is_passed_over(folder: Path) -> None:
    edit_json(folder / "config.json", lambda config: config.update(tie_word_embeddings=True))
    model = load_model(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_the_hardware_decides_the_compute_dtype() -> None:
    able = torch.cpu.get_capabilities()
    fast = able.get("avx512_bf16") or able.get("amx_bf16")
    assert default_dtype("cpu") == (torch.bfloat16 if fast else torch.float32)
    assert default_dtype("meta") == torch.float32


# -- what is refused ---------------------------------------------------------------------------------------


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / SINGLE).unlink()
    with pytest.raises(ValueError, match=f"{folder}: holds neither {SINGLE} nor {INDEX}"):
        load_model(folder)


@settings(max_examples=60, deadline=None)
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_file_cut_off_anywhere_is_refused_by_name(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory, share: float
) -> None:
    folder = tmp_path_factory.mktemp("cut")
    shutil.copy(tiny_model / "config.json", folder)
    whole = (tiny_model / SINGLE).read_bytes()
    length = int(share * len(whole))
    (folder / SINGLE).write_bytes(whole[:length])
    with pytest.raises(ValueError, match=rf"{SINGLE}: damaged or cut off \({length:,} bytes"):
        load_model(folder)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(place=st.floats(0, 1, exclude_max=True), byte=st.integers(0, 255))
def test_a_damaged_header_is_never_more_than_a_value_error(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory, place: float, byte: int
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    shutil.copy(tiny_model / "config.json", folder)
    content = bytearray((tiny_model / SINGLE).read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    content[int(place * header)] = byte
    (folder / SINGLE).write_bytes(content)
    try:
        model = load_model(folder)
    except ValueError as error:
        assert str(folder) in str(error)
    else:
        assert len(list(model.parameters())) == 21


WEIGHT = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(WEIGHT), f"1 of 21 tensors missing, the first is {WEIGHT}"),
        (lambda t: t.pop("lm_head.weight"), "1 of 21 tensors missing, the first is lm_head.weight"),
        (
            lambda t: t.update({WEIGHT: t[WEIGHT].T.contiguous()}),
            rf"{WEIGHT} has shape \(64, 96\), but config.json asks for \(96, 64\)",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(65)}),
            r"model.norm.weight has shape \(65,\), but config.json asks for \(64,\)",
        ),
        (
            lambda t: t.update({WEIGHT: t[WEIGHT].int()}),
            f"{WEIGHT} is torch.int32; expected float32, float16 or bfloat16",
        ),
        (
            lambda t: t[WEIGHT].__setitem__((5, 7), float("nan")),
            rf"{WEIGHT}: cannot quantize a weight that holds nan \(first at index \(5, 7\)\)",
        ),
        (
            lambda t: t[WEIGHT].__setitem__((0, 3), -float("inf")),
            rf"{WEIGHT}: cannot quantize a weight that holds -inf \(first at index \(0, 3\)\)",
        ),
        (
            lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}),
            "no place in this model, the first is model.layers.0.self_attn.q_proj.bias",
        ),
        (
            lambda t: t.update({"model.layers.2.input_layernorm.weight": torch.ones(64)}),
            "no place in this model, the first is model.layers.2.input_layernorm.weight",
        ),
    ],
    ids=[
        "missing",
        "head-missing",
        "transposed",
        "norm-shape",
        "integer",
        "nan",
        "inf",
        "unwanted-bias",
        "third-layer",
    ],
)
def test_a_tensor_that_does_not_fit_is_refused_by_name(folder: Path, change: Any, message: str) -> None:
    edit_tensors(folder, change)
    with pytest.raises(ValueError, match=message) as refusal:
        load_model(folder)
    assert str(folder) in str(refusal.value)


def test_a_float8_weight_is_refused(folder: Path) -> None:
    edit_tensors(folder, lambda t: t.update({WEIGHT: t[WEIGHT].to(torch.float8_e4m3fn)}))
    with pytest.raises(ValueError, match=f"{WEIGHT} is torch.float8_e4m3fn; expected float32"):
        load_model(folder)


def first_shard(folder: Path) -> Path:
    return sorted(folder.glob("model-*.safetensors"))[0]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda folder: first_shard(folder).unlink(),
            rf"model-00001-of-\d+.safetensors: shard not found, but {INDEX} names it",
        ),
        (
            lambda folder: os.truncate(first_shard(folder), first_shard(folder).stat().st_size - 1),
            r"model-00001-of-\d+.safetensors: damaged or cut off",
        ),
        (
            lambda folder: edit_json(
                folder / INDEX, lambda index: index["weight_map"].update({WEIGHT: first_shard(folder).name})
            ),
            rf"model-00001-of-\d+.safetensors: tensor {WEIGHT} not found, but {INDEX} says it is here",
        ),
        (
            lambda folder: edit_json(folder / INDEX, lambda index: index["weight_map"].pop(WEIGHT)),
            f"1 of 21 tensors missing, the first is {WEIGHT}",
        ),
        (lambda folder: (folder / INDEX).write_text('{"weight_map": {'), f"{INDEX}: not an index of shards"),
        (lambda folder: (folder / INDEX).write_bytes(b"\xff\xfe"), f"{INDEX}: not an index of shards"),
        (lambda folder: (folder / INDEX).write_text("{}"), f"{INDEX}: not an index of shards"),
        (lambda folder: (folder / INDEX).write_text("[1]"), f"{INDEX}: not an index of shards"),
        (
            lambda folder: (folder / INDEX).write_text('{"weight_map": []}'),
            f"{INDEX}: not an index of shards",
        ),
        (
            lambda folder: (folder / INDEX).write_text('{"weight_map": {"a": 1}}'),
            f"{INDEX}: not an index of shards",
        ),
        (lambda folder: (folder / INDEX).write_text('{"weight_map": {}}'), "21 of 21 tensors missing"),
    ],
    ids=[
        "missing",
        "cut",
        "wrong-shard",
        "not-listed",
        "broken-json",
        "not-utf8",
        "no-map",
        "list",
        "map-list",
        "number",
        "empty",
    ],
)
def test_broken_shards_are_refused_by_name(sharded: Path, damage: Any, message: str) -> None:
    damage(sharded)
    with pytest.raises(ValueError, match=message) as refusal:
        load_model(sharded)
    assert str(sharded) in str(refusal.value)


@pytest.mark.parametrize(
    "shard", ["../other.safetensors", "/{}/other.safetensors", "sub/x.safetensors", "..", ""]
)
def test_an_index_may_not_name_a_file_outside_the_folder(sharded: Path, shard: str) -> None:
    shutil.copy(first_shard(sharded), sharded.parent / "other.safetensors")
    shard = shard.format(str(sharded.parent).lstrip("/"))
    edit_json(sharded / INDEX, lambda index: index["weight_map"].update({WEIGHT: shard}))
    with pytest.raises(ValueError, match=f"{INDEX}: names a shard outside the folder"):
        load_model(sharded)


# -- writing -----------------------------------------------------------------------------------------------


def test_a_written_file_is_the_one_that_safetensors_writes(tmp_path: Path) -> None:
    tensors = {"b": torch.arange(6.0).view(2, 3), "a": torch.ones(2, dtype=torch.bfloat16)}
    write_atomically(tmp_path / "ours", tensors | {"c": torch.arange(4).view(2, 2).T})
    safetensors.torch.save_file(
        tensors | {"c": torch.tensor([[0, 2], [1, 3]])}, tmp_path / "theirs", metadata={"format": "pt"}
    )
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_a_file_reaches_the_disk_before_its_name_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(descriptor: int) -> None:
        kind = "folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file"
        events.append(f"fsync {kind}")
        fsync(descriptor)

    def noted_replace(source: Path, target: Path) -> None:
        events.append("replace")
        assert source.parent == target.parent and not target.exists()
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    write_atomically(tmp_path / "result", b"whole")
    assert events == ["fsync file", "replace", "fsync folder"]
    assert [path.name for path in tmp_path.iterdir()] == ["result"]


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files the way Linux does")
def test_a_full_disk_leaves_the_old_file_whole_and_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "result"
    write_atomically(path, b"old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))  # a write beyond it fails, as on a full disk
    try:
        with pytest.raises(OSError, match="File too large"):
            write_atomically(path, b"new" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_rename_that_fails_leaves_the_old_file_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError("no")

    path = tmp_path / "result"
    write_atomically(path, b"old")
    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="no"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
