"""A checkpoint folder loads tensor by tensor, and a damaged or foreign one is refused by file and name."""

import json
import math
import os
import re
import resource
import shutil
import subprocess
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
from conftest import write_llama
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from minqlora import NF4Tensor, checkpoint, load_model
from minqlora.checkpoint import default_dtype, find_model, quantized_size
from minqlora.codebook import QUANT_TYPES
from minqlora.files import (
    Checkpoint,
    flatten_state_dict,
    unflatten_state_dict,
    write_atomically,
    write_checkpoint,
)
from minqlora.loss import supervised_loss
from minqlora.nf4 import SHARED_PARTS

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
            rf"{WEIGHT}: holds nan \(first at index \(5, 7\)\)",
        ),
        (
            lambda t: t[WEIGHT].__setitem__((0, 3), -float("inf")),
            rf"{WEIGHT}: holds -inf \(first at index \(0, 3\)\)",
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
            f"holds {WEIGHT}, but {INDEX} does not say so; download it again",
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
        (
            lambda folder: (folder / INDEX).write_text('{"weight_map": {}}'),
            "config.json asks for 2 MLPs, the files hold 0",
        ),
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


# -- 4-bit weights as plain tensors ------------------------------------------------------------------------

STATE = "weight.quant_state.bitsandbytes__nf4"


def random_weight(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def their_layer(weight: Tensor, **options: Any) -> Any:
    """bitsandbytes' layer over the quantized weight."""
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(*reversed(weight.shape), bias=False)
    layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, **options)
    return layer.to("cpu")  # which quantizes


def file_of(tensors: dict[str, Tensor]) -> bytes:
    return safetensors.torch.save(dict(sorted(tensors.items())))


THEIRS = pytest.mark.parametrize(
    ("quant_type", "double_quant"), [("nf4", True), ("nf4", False), ("fp4", True), ("fp4", False)]
)


# Several nested blocks; a short last block; an odd number of weights.
@pytest.mark.parametrize("shape", [(64, 192), (300, 64), (6, 50), (5, 13)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@THEIRS
def test_a_flat_weight_is_byte_for_byte_that_of_bitsandbytes(quant_type, double_quant, dtype, shape) -> None:
    layer = their_layer(
        random_weight(*shape, dtype=dtype), quant_type=quant_type, compress_statistics=double_quant
    )
    theirs = layer.state_dict()
    weight = unflatten_state_dict(theirs)["weight"]
    assert isinstance(weight, NF4Tensor) and (weight.shape, weight.dtype) == (shape, dtype)
    ours = flatten_state_dict({"weight": weight})
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert (ours[key].dtype, ours[key].shape) == (tensor.dtype, tensor.shape)
    assert file_of(ours) == file_of(theirs)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_a_weight_with_plain_scales_is_byte_for_byte_that_of_bitsandbytes(quant_type: str) -> None:
    weight = random_weight(6, 50, dtype=torch.bfloat16)
    ours = NF4Tensor.from_float(weight, quant_type=quant_type, double_quant=False)
    theirs = their_layer(weight.clone(), quant_type=quant_type, compress_statistics=False).state_dict()
    assert file_of(flatten_state_dict({"weight": ours})) == file_of(theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@THEIRS
def test_bitsandbytes_reads_a_flat_weight(quant_type: str, double_quant: bool, dtype: torch.dtype) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    weight = NF4Tensor.from_float(
        random_weight(300, 64, dtype=dtype), quant_type=quant_type, double_quant=double_quant
    )
    flat = safetensors.torch.load(file_of(flatten_state_dict({"weight": weight})))
    packed = flat.pop("weight")
    theirs = bnb.nn.Params4bit.from_prequantized(packed, flat, device="cpu")
    state = theirs.quant_state
    assert (state.quant_type, state.dtype, tuple(state.shape), state.nested) == (
        quant_type,
        dtype,
        (300, 64),
        double_quant,
    )
    assert torch.equal(bnb.functional.dequantize_4bit(theirs.data, state), weight.dequantize())


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16, torch.float32, torch.int8])
def test_codes_stored_as_numbers_of_another_dtype_are_read(storage: torch.dtype) -> None:
    weight = random_weight(8, 64)
    layer = their_layer(weight, quant_type="nf4", quant_storage=storage)
    state_dict = layer.state_dict()
    assert state_dict["weight"].dtype == storage
    expected = their_layer(weight, quant_type="nf4").state_dict()
    assert file_of(flatten_state_dict(unflatten_state_dict(state_dict))) == file_of(expected)


def net(**options: Any) -> nn.Sequential:
    """Three quantized layers, a bias, a norm."""
    layers = [nn.Linear(k, n, bias=n == 8) for k, n in ((12, 8), (8, 10), (10, 6))]
    for i, layer in enumerate(layers):
        weight = NF4Tensor.from_float(random_weight(*layer.weight.shape, seed=i), **options)
        layer.weight = nn.Parameter(weight, requires_grad=False)
    return nn.Sequential(*layers, nn.LayerNorm(6))


@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize(
    "options",
    [{}, {"double_quant": False}, {"quant_type": "fp4"}, {"block_size": 4, "nested_block_size": 3}],
    ids=["nested", "plain", "fp4", "small"],
)
def test_a_module_goes_through_a_file_and_comes_back_bit_for_bit(options: dict, assign: bool) -> None:
    source, target = net(**options), net(**options)
    for parameter in target.parameters():
        parameter.data = torch.empty_like(parameter)
    flat = flatten_state_dict(source.state_dict())
    loaded = safetensors.torch.load(safetensors.torch.save(flat, metadata={"format": "pt"}))
    assert loaded.keys() == flat.keys() and not any(isinstance(t, NF4Tensor) for t in flat.values())
    assert not any(target.load_state_dict(unflatten_state_dict(loaded), assign=assign))
    for name, parameter in source.named_parameters():
        other = target.get_parameter(name)
        assert isinstance(other, nn.Parameter) and type(other) is type(parameter)
        if not isinstance(parameter, NF4Tensor):
            assert torch.equal(parameter, other)
            continue
        assert (parameter.dtype, parameter.format) == (other.dtype, other.format)
        for part, tensor in parameter.parts.items():
            assert torch.equal(tensor, other.parts[part])
            assert part not in SHARED_PARTS or tensor is other.parts[part]


def test_what_is_not_quantized_passes_through() -> None:
    tensors = {
        "weight": NF4Tensor.from_float(random_weight(4, 6)),
        "norm": torch.ones(3),
        "absmax": torch.ones(2),
    }
    flat = flatten_state_dict(tensors)
    back = unflatten_state_dict(flat)
    assert back.keys() == tensors.keys() and len(flat) == 8 and len(tensors) == 3
    assert back["norm"] is flat["norm"] is tensors["norm"] and back["absmax"] is tensors["absmax"]
    assert unflatten_state_dict({"other.absmax": tensors["norm"]}) == {"other.absmax": tensors["norm"]}


def test_rows_that_begin_with_a_nested_block_are_saved_as_a_weight_of_their_own() -> None:
    rows = NF4Tensor.from_float(random_weight(6, 8), block_size=8, nested_block_size=2)[2:5]
    flat = safetensors.torch.load(file_of(flatten_state_dict({"weight": rows})))
    assert torch.equal(unflatten_state_dict(flat)["weight"].dequantize(), rows.dequantize())


@pytest.mark.parametrize("quant_type", [name for name in QUANT_TYPES if name not in ("nf4", "fp4")])
def test_levels_for_comparison_are_not_saved(quant_type: str) -> None:
    weight = NF4Tensor.from_float(random_weight(4, 6), quant_type=quant_type)
    with pytest.raises(
        ValueError, match=f"a.b: {quant_type} is for comparison; only nf4 and fp4 can be saved"
    ):
        flatten_state_dict({"a.b": weight})


@pytest.mark.parametrize("view", [lambda t: t.t(), lambda t: t.view(-1), lambda t: t[1:]])
def test_views_are_not_saved(view: Callable[[Tensor], Tensor]) -> None:
    weight = NF4Tensor.from_float(random_weight(6, 8), block_size=8)
    with pytest.raises(ValueError, match="a.b: save the whole weight, not a view or a part of it"):
        flatten_state_dict({"a.b": view(weight)})


def edit_state(text: Callable[[str], str] | str | bytes) -> Callable[[dict[str, Tensor]], None]:
    """A damage to the JSON: another text, or what is made of the text."""

    def damage(tensors: dict[str, Tensor]) -> None:
        content = text(bytes(tensors[STATE].tolist()).decode()) if callable(text) else text
        content = content.encode() if isinstance(content, str) else content
        tensors[STATE] = torch.tensor(list(content), dtype=torch.uint8)

    return damage


def with_facts(**facts: Any) -> Callable[[dict[str, Tensor]], None]:
    """A damage to the JSON: other facts, or for `...` none."""

    def change(text: str) -> str:
        state = json.loads(text) | facts
        return json.dumps({name: value for name, value in state.items() if value is not ...})

    return edit_state(change)


def with_tensor(key: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    def damage(tensors: dict[str, Tensor]) -> None:
        tensors[key] = change(tensors[key])

    return damage


NOT_A_STATE = f"{STATE}: not a quantization state"
DAMAGES: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "no codes": (lambda t: t.pop("weight"), f"weight: missing, but {STATE} asks for it"),
    "no scales": (lambda t: t.pop("weight.absmax"), f"weight.absmax: missing, but {STATE}"),
    "no levels": (lambda t: t.pop("weight.quant_map"), f"weight.quant_map: missing, but {STATE}"),
    "no nested scales": (lambda t: t.pop("weight.nested_absmax"), "weight.nested_absmax: missing"),
    "no map": (lambda t: t.pop("weight.nested_quant_map"), "weight.nested_quant_map: missing"),
    "a code too few": (with_tensor("weight", lambda t: t[:-1]), "weight: expected 192 .*uint8, got 191"),
    "codes of 32 bits": (with_tensor("weight", lambda t: t.int()), "weight: expected 192 .*uint8, got 768"),
    "one code": (with_tensor("weight", lambda t: t[0, 0]), "weight: expected 192 .*uint8, got 1 "),
    "a scale too few": (with_tensor("weight.absmax", lambda t: t[1:]), "weight.absmax: expected 6 .*, got 5"),
    "plain scales": (
        with_tensor("weight.absmax", lambda t: t.float()),
        "weight.absmax: expected 6 numbers of torch.uint8, got 6 of torch.float32",
    ),
    "8 levels": (with_tensor("weight.quant_map", lambda t: t[:8]), "weight.quant_map: expected 16 .*got 8"),
    "17 levels": (
        with_tensor("weight.quant_map", lambda t: torch.ones(17)),
        "weight.quant_map: .* 16 .*got 17",
    ),
    "half levels": (
        with_tensor("weight.quant_map", lambda t: t.half()),
        "weight.quant_map: expected .*float16",
    ),
    "a nested scale too many": (
        with_tensor("weight.nested_absmax", lambda t: t.repeat(2)),
        "weight.nested_absmax: expected 1 .*got 2",
    ),
    "double nested scales": (
        with_tensor("weight.nested_absmax", lambda t: t.double()),
        "weight.nested_absmax: .*float64",
    ),
    "a short map": (
        with_tensor("weight.nested_quant_map", lambda t: t[1:]),
        "weight.nested_quant_map: .*256.*255",
    ),
    "broken JSON": (edit_state(lambda text: text[:-1]), rf"{NOT_A_STATE} \(JSONDecodeError"),
    "not UTF-8": (edit_state(b"\xff\xfe"), NOT_A_STATE),
    "no JSON": (edit_state(""), NOT_A_STATE),
    "a list": (edit_state("[1]"), NOT_A_STATE),
    "a number": (edit_state("3"), NOT_A_STATE),
    "deep JSON": (edit_state("[" * 100_000), NOT_A_STATE),
    "a state of numbers": (with_tensor(STATE, lambda t: t.float()), NOT_A_STATE),
    "a state of large numbers": (with_tensor(STATE, lambda t: t.int() + 200), NOT_A_STATE),
    "a state of rows": (with_tensor(STATE, lambda t: t[None]), NOT_A_STATE),
    "no shape": (with_facts(shape=...), NOT_A_STATE),
    "a shape of one": (with_facts(shape=[384]), NOT_A_STATE),
    "a shape of three": (with_facts(shape=[2, 3, 64]), NOT_A_STATE),
    "a shape of nothing": (with_facts(shape=[0, 64]), NOT_A_STATE),
    "a negative shape": (with_facts(shape=[-6, -64]), NOT_A_STATE),
    "another shape": (with_facts(shape=[7, 64]), "weight: expected 224 .*got 192"),
    "an endless shape": (with_facts(shape=[6, float("inf")]), NOT_A_STATE),
    "no block size": (with_facts(blocksize=...), NOT_A_STATE),
    "a block size of zero": (with_facts(blocksize=0), NOT_A_STATE),
    "a negative block size": (with_facts(blocksize=-64), NOT_A_STATE),
    "an odd block size": (with_facts(blocksize=65), f"{NOT_A_STATE}|weight.absmax: expected"),
    "an odd block size that fits": (
        lambda t: (with_facts(blocksize=77)(t), with_tensor("weight.absmax", lambda s: s[:5])(t)),
        NOT_A_STATE,
    ),
    "another block size": (with_facts(blocksize=32), "weight.absmax: expected 12 .*got 6"),
    "an endless block size": (with_facts(blocksize=float("inf")), NOT_A_STATE),
    "a nested block size of zero": (with_facts(nested_blocksize=0), NOT_A_STATE),
    "another nested block size": (with_facts(nested_blocksize=2), "weight.nested_absmax: expected 3 .*got 1"),
    "no offset": (with_facts(nested_offset=...), NOT_A_STATE),
    "an offset of text": (with_facts(nested_offset="x"), NOT_A_STATE),
    "an offset that is none": (with_facts(nested_offset=float("nan")), NOT_A_STATE),
    "an endless offset": (with_facts(nested_offset=1e300), NOT_A_STATE),
    "no dtype": (with_facts(dtype=...), NOT_A_STATE),
    "an integer dtype": (with_facts(dtype="int32"), NOT_A_STATE),
    "a dtype that torch has not": (with_facts(dtype="float99"), NOT_A_STATE),
    "a function for a dtype": (with_facts(dtype="add"), NOT_A_STATE),
    "a number for a dtype": (with_facts(dtype=3), NOT_A_STATE),
    "levels that are not saved": (
        lambda t: t.update({"weight.quant_state.bitsandbytes__nf3": t.pop(STATE)}),
        "weight.quant_state.bitsandbytes__nf3: not a quantization state",
    ),
    "two states": (
        lambda t: t.update({"weight.quant_state.bitsandbytes__fp4": t[STATE]}),
        "weight.quant_state.bitsandbytes__(fp4|nf4): ",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_flat_weight_is_refused_by_its_key(damage: Any, message: str) -> None:
    tensors = flatten_state_dict({"weight": NF4Tensor.from_float(random_weight(6, 64))})
    damage(tensors)
    with pytest.raises(ValueError, match=f"^{message}"):
        unflatten_state_dict(tensors)


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


# -- folders in 4 bits, as bitsandbytes writes them --------------------------------------------------------


def their_folder(
    source: Path, out: Path, dtype: torch.dtype, block_size: int = 64, **options: Any
) -> dict[str, Any]:
    """Write a 4-bit copy of a folder with transformers and bitsandbytes; return their quantized weights."""
    bnb = pytest.importorskip("bitsandbytes")
    transformers = pytest.importorskip("transformers")
    options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype} | options
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, **options)
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=dtype, quantization_config=config)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, bnb.nn.Linear4bit)}
    if block_size != 64:  # for which their configuration has no field
        whole = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
        for name, layer in layers.items():
            weight = whole.get_parameter(f"{name}.weight").detach()
            layer.weight = bnb.nn.Params4bit(
                weight, requires_grad=False, blocksize=block_size, quant_type=options["bnb_4bit_quant_type"]
            ).to("cpu")
    model.save_pretrained(out)
    return {f"{name}.weight": layer.weight for name, layer in layers.items()}


def their_logits(folder: Path, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what transformers computes with a folder, after it found every key it wanted and no other."""
    transformers = pytest.importorskip("transformers")
    model, found = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, output_loading_info=True
    )
    assert not any(found.values()), found
    # In eval mode bitsandbytes rounds the scales to bfloat16 on some CPUs.
    with torch.no_grad():
        return model.train()(ids).logits


def require_theirs(ours: Tensor, theirs: Any) -> None:
    """Compare every part of a weight with bitsandbytes' own."""
    state = theirs.quant_state
    assert isinstance(ours, NF4Tensor) and ours.format.shape == tuple(state.shape)
    assert (ours.format.block_size, ours.format.quant_type) == (state.blocksize, state.quant_type)
    pairs = [(ours.packed, theirs.data.view(torch.uint8).flatten()), (ours.codebook, state.code)]
    if state.nested:
        pairs += [(ours.absmax_codes, state.absmax), (ours.nested_absmax, state.state2.absmax)]
        pairs += [(ours.nested_codebook, state.state2.code), (ours.offset, state.offset)]
    else:
        pairs += [(ours.absmax, state.absmax)]
    assert all(torch.equal(one, other) for one, other in pairs)


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "double": {"bnb_4bit_use_double_quant": True},
    "fp4": {"bnb_4bit_quant_type": "fp4"},
    "stored as bfloat16": {"bnb_4bit_quant_storage": torch.bfloat16, "bnb_4bit_use_double_quant": True},
    "stored as float32": {"bnb_4bit_quant_storage": torch.float32},
    "some left out": {"llm_int8_skip_modules": ["o_proj", "layers.1.mlp", "lm_head"]},
    "with the head": {"llm_int8_skip_modules": ["o_proj"]},
    "in blocks of 128": {"block_size": 128},
    "in blocks of 256": {"block_size": 256, "bnb_4bit_quant_type": "fp4"},
}


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def wide(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, torch.dtype]:
    """A model whose rows are whole blocks: on some CPUs bitsandbytes decodes no others rightly."""
    folder = tmp_path_factory.mktemp("wide") / "model"
    return write_llama(folder, dtype=request.param, hidden_size=256, intermediate_size=512), request.param


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_a_folder_of_bitsandbytes_comes_bit_for_bit_and_gives_its_logits(wide, variant, tmp_path) -> None:
    source, dtype = wide
    theirs = their_folder(source, tmp_path / "out", dtype, **variant)
    model = load_model(tmp_path / "out", dtype=dtype, block_size=32)  # of which the folder knows nothing
    ours = {name: p for name, p in model.named_parameters() if isinstance(p, NF4Tensor)}
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        require_theirs(ours[name], weight)
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        assert torch.equal(model(ids), their_logits(tmp_path / "out", ids, dtype))


def test_a_checkpoint_tells_of_4_bit_weights_what_they_stand_for(wide, tmp_path) -> None:
    source, dtype = wide
    their_folder(source, tmp_path / "out", dtype, bnb_4bit_use_double_quant=True)
    held, was = Checkpoint(tmp_path / "out"), Checkpoint(source)
    name = "model.layers.0.mlp.up_proj.weight"
    assert held.names == was.names and held.has_quantized and not was.has_quantized
    assert held.is_quantized(name) and not held.is_quantized("lm_head.weight")
    assert (held.shape(name), held.dtype(name)) == (was.shape(name), was.dtype(name)) == ((512, 256), dtype)
    numbers = 512 * 256
    assert numbers / 2 < held.nbytes(name) < numbers * 0.53 and was.nbytes(name) == numbers * dtype.itemsize
    assert isinstance(held.read(name), NF4Tensor) and held.read(name).dtype == dtype
    assert torch.equal(held.read("lm_head.weight"), was.read("lm_head.weight"))


def test_what_is_in_4_bits_is_not_loaded_in_16(wide, tmp_path) -> None:
    source, dtype = wide
    their_folder(source, tmp_path / "out", dtype)
    with pytest.raises(ValueError, match="out: is in 4 bits; load it so .*--bits 4"):
        load_model(tmp_path / "out", quant_type=None)


@pytest.mark.parametrize(
    ("quantization", "named"),
    [
        ({"load_in_8bit": True, "quant_method": "bitsandbytes"}, "8-bit bitsandbytes"),
        ({"_load_in_8bit": True, "load_in_4bit": False}, "8-bit"),
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq"}, "awq"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
        ({"bits": 3}, "bits"),
        ("int4", "int4"),
        ([1, 2], "1, 2"),
    ],
)
def test_weights_quantized_another_way_are_refused_by_name(
    folder: Path, quantization: Any, named: str
) -> None:
    edit_json(folder / "config.json", lambda config: config.update(quantization_config=quantization))
    with pytest.raises(ValueError, match=f"config.json: .* quantized by .*{named}.*; give the 16-bit model"):
        load_model(folder)


@pytest.mark.parametrize("quantization", [None, {"load_in_4bit": True}, {"quant_method": "bitsandbytes"}])
def test_what_config_says_of_4_bits_does_not_count(folder: Path, quantization: Any) -> None:
    edit_json(folder / "config.json", lambda config: config.update(quantization_config=quantization))
    assert quantized_size(load_model(folder))[0] > 0


# -- quantized embeddings ----------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantized_embeddings_compute_what_the_decoded_ones_do(folder: Path, tied: bool, dtype) -> None:
    edit_json(folder / "config.json", lambda config: config.update(tie_word_embeddings=tied))
    model, dense = (load_model(folder, dtype=dtype, quantize_embeddings=choice) for choice in (True, False))
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    for module in (model.model.embed_tokens, model.lm_head):
        assert isinstance(module.weight, NF4Tensor)
    dense.model.embed_tokens.weight.data = model.model.embed_tokens.weight.dequantize(dtype)
    dense.lm_head.weight = nn.Parameter(model.lm_head.weight.dequantize(dtype))
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(model(ids), dense(ids))
    # And back: the head's product is differentiable in what comes in.
    losses, grads = [], []
    for one in (model, dense):
        hidden = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
        loss = supervised_loss(hidden, ids[:, :5], one.lm_head)
        loss.backward()
        losses.append(loss.item())
        grads.append(hidden.grad)
    assert losses[0] == losses[1] and torch.equal(*grads)


def test_embeddings_are_not_quantized_alone(folder: Path) -> None:
    with pytest.raises(ValueError, match="give a quant_type as well"):
        load_model(folder, quant_type=None, quantize_embeddings=True)


# -- what is found -----------------------------------------------------------------------------------------


@pytest.fixture
def hub(tiny_model: Path, tmp_path: Path) -> Path:
    """A Hugging Face cache with one model in it, laid out as the real ones are, with links."""
    model = tmp_path / "hub" / "models--some-org--tiny.model"
    snapshot = model / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (model / "blobs").mkdir()
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("0123abcd")
    for i, path in enumerate(sorted(tiny_model.iterdir())):
        shutil.copy(path, model / "blobs" / str(i))
        (snapshot / path.name).symlink_to(f"../../blobs/{i}")
    return tmp_path / "hub"


@pytest.mark.parametrize(
    ("variable", "value"),
    [("HF_HUB_CACHE", "hub"), ("HF_HOME", ""), ("XDG_CACHE_HOME", "caches"), ("HOME", "home")],
)
def test_a_name_is_looked_up_in_the_local_cache(hub: Path, monkeypatch, variable: str, value: str) -> None:
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    below = {"XDG_CACHE_HOME": "caches/huggingface/hub", "HOME": "home/.cache/huggingface/hub"}.get(variable)
    if below:
        (hub.parent / below).parent.mkdir(parents=True)
        hub.rename(hub.parent / below)
    monkeypatch.setenv(variable, str(hub.parent / value))
    found = find_model("some-org/tiny.model")
    assert found.name == "0123abcd" and quantized_size(load_model("some-org/tiny.model"))[0] > 0


def test_a_folder_wins_over_a_name(hub: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(hub))
    monkeypatch.chdir(tmp_path)
    assert find_model("some-org/tiny.model") != Path("some-org/tiny.model")
    Path("some-org/tiny.model").mkdir(parents=True)
    assert find_model("some-org/tiny.model") == Path("some-org/tiny.model")


@pytest.mark.parametrize("commit", [None, "", "../../x", "other", b"\xff"])
def test_a_name_that_is_not_there_comes_with_the_command_that_gets_it(hub: Path, monkeypatch, commit) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(hub))
    ref = hub / "models--some-org--tiny.model" / "refs" / "main"
    ref.unlink() if commit is None else ref.write_bytes(
        commit if isinstance(commit, bytes) else commit.encode()
    )
    with pytest.raises(
        ValueError, match="no such model folder: some-org/tiny.model; .*`hf download some-org/tiny"
    ):
        find_model("some-org/tiny.model")


@pytest.mark.parametrize("name", ["model", "/a/b/c", "a/b/c", "../x", "a/.b", "a b/c", "./a", ""])
def test_what_is_no_name_is_only_a_missing_folder(name: str, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path / ".") if name else None
    if name:
        with pytest.raises(ValueError, match=f"^no such model folder: {re.escape(name)}$"):
            find_model(name)


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("pytorch_model.bin", r"only pytorch_model\*.bin, which are pickles.*save_pretrained"),
        ("pytorch_model-00001-of-00002.bin", "pickles"),
        ("model.Q4_K_M.gguf", "only a GGUF file"),
        ("consolidated.00.pth", "maker's own layout"),
        ("consolidated.safetensors", "maker's own layout"),
    ],
)
def test_weights_in_another_format_are_named_with_the_way_out(folder: Path, file: str, said: str) -> None:
    (folder / SINGLE).rename(folder / file)
    with pytest.raises(ValueError, match=f"{folder}: holds neither {SINGLE} nor {INDEX}, .*{said}"):
        load_model(folder)


# -- what fits ---------------------------------------------------------------------------------------------


def test_a_model_that_does_not_fit_is_refused_with_the_plan_before_it_is_read(folder, monkeypatch) -> None:
    monkeypatch.setattr(checkpoint, "free_memory", lambda device: 50_000)
    monkeypatch.setattr(Checkpoint, "read", lambda *_: pytest.fail("read"))
    with pytest.raises(
        ValueError,
        match=r"does not fit cpu: 0.00 GB 4-bit weights \+ 0.00 GB embeddings and head \+ .* = 0.00 GB, "
        r"but 0.00 GB are free; --quantize_embeddings saves",
    ):
        load_model(folder)
    with pytest.raises(ValueError, match="4 bits take a quarter"):
        load_model(folder, quant_type=None)


@pytest.mark.parametrize(
    "options", [{}, {"quantize_embeddings": True}, {"quant_type": None}, {"quant_type": "nf5"}]
)
def test_the_plan_is_what_is_then_held(folder: Path, monkeypatch, options: dict[str, Any]) -> None:
    model = load_model(folder, dtype=torch.float32, **options)
    held = sum(parameter.nbytes for parameter in model.parameters())
    largest = 0 if options.get("quant_type", "") is None else 96 * 64 * 2
    if options.get("quantize_embeddings"):
        largest = model.lm_head.weight.numel() * 2
    monkeypatch.setattr(checkpoint, "free_memory", lambda device: held + largest)
    load_model(folder, dtype=torch.float32, **options)
    monkeypatch.setattr(checkpoint, "free_memory", lambda device: held + largest - 1)
    with pytest.raises(ValueError, match="does not fit"):
        load_model(folder, dtype=torch.float32, **options)


def test_free_memory_is_what_the_tightest_limit_around_the_process_leaves(tmp_path: Path) -> None:
    def write(path: str, text: str) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    write("proc/meminfo", "MemTotal:  9000 kB\nMemAvailable:  5000 kB\n")
    write("proc/self/cgroup", "3:cpu:/x\n2:memory:/old\n0::/a/b\n")
    assert list(checkpoint._free_host_memory(tmp_path)) == [5_120_000]
    for group, limit in {"a/b": "max", "a": "4000000"}.items():
        write(f"sys/fs/cgroup/{group}/memory.max", limit)
        write(f"sys/fs/cgroup/{group}/memory.current", "3000000")
        write(f"sys/fs/cgroup/{group}/memory.stat", "anon 5\ninactive_file 500000\n")
    assert list(checkpoint._free_host_memory(tmp_path)) == [5_120_000, 1_500_000]
    write("sys/fs/cgroup/memory/old/memory.limit_in_bytes", "700000")
    write("sys/fs/cgroup/memory/old/memory.usage_in_bytes", "800000")
    write("sys/fs/cgroup/memory/old/memory.stat", "total_inactive_file 0\n")
    assert min(checkpoint._free_host_memory(tmp_path)) == 0
    assert list(checkpoint._free_host_memory(tmp_path / "none")) == []
    assert checkpoint.free_memory(torch.device("meta")) is None


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux")
def test_loading_takes_the_4_bit_model_and_its_largest_tensor(tmp_path: Path) -> None:
    # 150 million parameters, 300 MB in 16 bits.
    config = LARGE | {"model_type": "llama", "rms_norm_eps": 1e-5}
    d, inner, n = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], d), "model.norm.weight": (d,)}
    for i in range(n):
        shapes |= {f"model.layers.{i}.self_attn.{name}_proj.weight": (d, d) for name in "qkvo"}
        shapes |= {f"model.layers.{i}.mlp.{name}_proj.weight": (inner, d) for name in ("gate", "up")}
        shapes |= {f"model.layers.{i}.mlp.down_proj.weight": (d, inner)}
        shapes |= {f"model.layers.{i}.{name}_layernorm.weight": (d,) for name in ("input", "post_attention")}
    plan = {name: (torch.bfloat16, shape) for name, shape in shapes.items()}
    noise = random_weight(config["vocab_size"], d, dtype=torch.bfloat16).flatten()
    tensors = ((name, noise[: math.prod(shape)].view(shape)) for name, shape in shapes.items())
    files = {"config.json": json.dumps(config).encode()}
    write_checkpoint(tmp_path / "model", plan, tensors, files=files, max_shard_bytes=200_000_000)
    code = (
        "import resource, sys, torch; from minqlora import load_model\n"
        "from minqlora.checkpoint import quantized_size\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "load_model(sys.argv[1], dtype=torch.float32)  # what torch sets up once\n"
        "before = peak(); model = load_model(sys.argv[2], dtype=torch.float32)\n"
        "print(before, peak(), sum(parameter.nbytes for parameter in model.parameters()))"
    )
    small = write_llama(tmp_path / "small")
    command = [sys.executable, "-c", code, str(small), str(tmp_path / "model")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    before, peak, held = map(int, done.stdout.split())
    assert held < 100e6  # against 300 MB
    # 20 MB for the scratch of one chunk and for what the allocator keeps.
    assert peak - before < held + inner * d * 2 + 20e6, (before, peak, held)


LARGE: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "vocab_size": 8192,
    "tie_word_embeddings": True,
}


# -- the cache ---------------------------------------------------------------------------------------------


def require_equal(one: nn.Module, other: nn.Module) -> None:
    """Compare two models, every part of every parameter."""
    ours, theirs = dict(one.named_parameters()), dict(other.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, parameter in ours.items():
        twin = theirs[name]
        assert type(parameter) is type(twin) and parameter.dtype == twin.dtype, name
        if isinstance(parameter, NF4Tensor):
            assert parameter.format == twin.format and parameter.parts.keys() == twin.parts.keys()
            assert all(torch.equal(part, twin.parts[key]) for key, part in parameter.parts.items()), name
        else:
            assert torch.equal(parameter, twin), name


@pytest.mark.parametrize(
    "options",
    [{}, {"quant_type": "fp4", "double_quant": False, "block_size": 32}, {"quantize_embeddings": True}],
)
@pytest.mark.parametrize("first", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_second_start_reads_4_bits_and_gives_the_same_model(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], dtype, first
) -> None:
    # Whatever the compute dtype of the first start was.
    cache = tmp_path / "cache"
    plain = load_model(folder, dtype=dtype, **options)
    require_equal(
        load_model(folder, dtype=first, cache=cache, **options), load_model(folder, dtype=first, **options)
    )
    monkeypatch.setattr(checkpoint.NF4Tensor, "from_float", lambda *_, **__: pytest.fail("quantized again"))
    require_equal(load_model(folder, dtype=dtype, cache=cache, **options), plain)
    (entry,) = cache.iterdir()
    assert [path.name for path in entry.iterdir()] == [SINGLE]


def test_another_source_or_another_setting_has_a_copy_of_its_own(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    load_model(folder, cache=cache)
    for n, options in enumerate(
        [{"block_size": 32}, {"double_quant": False}, {"quantize_embeddings": True}], 2
    ):
        require_equal(load_model(folder, cache=cache, **options), load_model(folder, **options))
        assert len(list(cache.iterdir())) == n
    # The same size and another second.
    edit_tensors(folder, lambda tensors: tensors[WEIGHT].mul_(2))
    os.utime(folder / SINGLE, (1, 1))
    require_equal(load_model(folder, cache=cache), load_model(folder))
    assert len(list(cache.iterdir())) == 5


@pytest.mark.parametrize(
    "damage",
    [
        lambda entry: os.truncate(entry / SINGLE, 1000),
        lambda entry: (entry / SINGLE).unlink(),
        lambda entry: edit_tensors(entry, lambda tensors: tensors.pop(WEIGHT)),
        lambda entry: edit_tensors(
            entry, lambda tensors: tensors[f"{WEIGHT}.nested_absmax"].fill_(float("nan"))
        ),
    ],
    ids=["cut", "empty", "a part missing", "nan"],
)
def test_a_damaged_copy_is_named_dropped_and_made_anew(folder: Path, tmp_path: Path, damage: Any) -> None:
    cache = tmp_path / "cache"
    load_model(folder, cache=cache)
    (entry,) = cache.iterdir()
    damage(entry)
    with pytest.warns(UserWarning, match=f"damaged cache entry dropped and made anew: {entry}"):
        require_equal(load_model(folder, cache=cache), load_model(folder))
    with warnings.catch_warnings(action="error"):
        require_equal(load_model(folder, cache=cache), load_model(folder))


def test_a_cache_that_cannot_be_written_costs_the_cache_and_not_the_model(
    folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.warns(UserWarning, match="the 4-bit copy could not be kept: .*cache"):
        require_equal(load_model(folder, cache=tmp_path / "cache"), load_model(folder))


@pytest.mark.parametrize("quant_type", [None, "nf3", "int4"])
def test_the_cache_keeps_4_bit_weights_only(folder: Path, tmp_path: Path, quant_type: str | None) -> None:
    with pytest.raises(ValueError, match="the cache keeps nf4 and fp4 weights, and nothing else"):
        load_model(folder, quant_type=quant_type, cache=tmp_path / "cache")


# -- whole folders -----------------------------------------------------------------------------------------

TENSORS = {
    "a.weight": torch.arange(12, dtype=torch.uint8).view(12, 1),
    "a.weight.absmax": torch.ones(3),
    "a.weight.state": torch.arange(5, dtype=torch.uint8),
    "b": torch.arange(6.0).view(2, 3).bfloat16(),
    "c": torch.tensor(3.0),
    "d": torch.zeros(0, 4),
    "e": torch.arange(8.0).view(2, 4).T,
    "\u00e9": torch.tensor([True, False]),
}


def plan_of(tensors: dict[str, Tensor]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def test_a_file_written_piece_by_piece_is_the_one_that_safetensors_writes(tmp_path: Path) -> None:
    pieces = reversed(TENSORS.items())  # in any order
    write_checkpoint(tmp_path / "out", plan_of(TENSORS), pieces, files={"config.json": b"{}", "x/y": b"z"})
    whole = {name: tensor.contiguous() for name, tensor in TENSORS.items()}
    expected = safetensors.torch.save(whole, metadata={"format": "pt"})
    assert (tmp_path / "out" / SINGLE).read_bytes() == expected
    assert (tmp_path / "out" / "x" / "y").read_bytes() == b"z"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["config.json", SINGLE, "out", "x", "y"]


def test_shards_have_hugging_faces_names_and_never_part_a_weight(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, plan_of(TENSORS), TENSORS.items(), max_shard_bytes=20)
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in TENSORS.values())
    groups: dict[str, list[str]] = {}
    for name, shard in index["weight_map"].items():
        groups.setdefault(shard, []).append(name)
    # 29 bytes of one weight; 12 and 4; 32, more than a shard; 2.
    assert list(groups.values()) == [
        ["a.weight", "a.weight.absmax", "a.weight.state"],
        ["b", "c", "d"],
        ["e"],
        ["\u00e9"],
    ]
    assert list(groups) == [f"model-0000{i}-of-00004.safetensors" for i in range(1, 5)]
    for shard, names in groups.items():
        held = safetensors.torch.load_file(tmp_path / shard)
        assert held.keys() == set(names) and all(torch.equal(held[name], TENSORS[name]) for name in names)


def test_one_tensor_after_the_other_is_written(tmp_path: Path) -> None:
    plan = plan_of({f"t{i}": torch.zeros(10) for i in range(20)})
    alive: list[weakref.ref] = []
    seen: list[tuple[int, int]] = []

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name in plan:
            assert sum(earlier() is not None for earlier in alive) <= 1  # the one just handed over
            tensor = torch.zeros(10)
            alive.append(weakref.ref(tensor))
            yield name, tensor
            del tensor

    write_checkpoint(tmp_path / "out", plan, tensors(), progress=lambda *at: seen.append(at))
    assert seen == [(40 * i, 800) for i in range(1, 21)]


def test_a_folder_that_holds_something_is_refused_before_work_begins(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("mine")
    for out in (tmp_path, tmp_path / "x"):
        with pytest.raises(ValueError, match=f"^{out}: exists and is not an empty folder; choose another$"):
            write_checkpoint(out, plan_of(TENSORS), (pytest.fail("began") for _ in [1]))
    assert (tmp_path / "x").read_text() == "mine"


def test_a_disk_without_room_is_refused_before_work_begins(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: SimpleNamespace(free=50))
    with pytest.raises(ValueError, match="out: needs 0.00 GB on the disk, but 0.00 GB are free"):
        write_checkpoint(tmp_path / "out", plan_of(TENSORS), (pytest.fail("began") for _ in [1]))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files the way Linux does")
def test_a_disk_that_fills_up_leaves_nothing_behind(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(100), "b": torch.zeros(1000)}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))  # a write beyond it fails, as on a full disk
    try:
        with pytest.raises(OSError, match="File too large; nothing was left behind: '.*out'"):
            write_checkpoint(tmp_path / "out", plan_of(tensors), tensors.items())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("failure", [ValueError("nan"), KeyboardInterrupt()])
def test_a_source_that_fails_leaves_nothing_behind(tmp_path: Path, failure: BaseException) -> None:
    def tensors() -> Iterator[tuple[str, Tensor]]:
        yield "a.weight", TENSORS["a.weight"]
        raise failure

    with pytest.raises(type(failure)):
        write_checkpoint(tmp_path / "out", plan_of(TENSORS), tensors())
    assert list(tmp_path.iterdir()) == []


def test_a_folder_has_its_name_only_when_all_of_it_is_on_the_disk(tmp_path: Path, monkeypatch) -> None:
    synced: list[str] = []
    fsync, rename = os.fsync, os.rename

    def noted_fsync(descriptor: int) -> None:
        synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def noted_rename(source: Path, target: Path) -> None:
        assert not target.exists() and {path.name for path in source.iterdir()} == {SINGLE, "config.json"}
        assert SINGLE in synced and ".config.json.partial" in synced and synced[-1] == source.name
        rename(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "rename", noted_rename)
    write_checkpoint(tmp_path / "out", plan_of(TENSORS), TENSORS.items(), files={"config.json": b"{}"})
    assert synced[-1] == tmp_path.name and [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    "tensors",
    [{"b": TENSORS["b"]}, TENSORS | {"b": TENSORS["b"].float()}, TENSORS | {"x": torch.ones(1)}],
    ids=["missing", "another dtype", "unplanned"],
)
def test_what_was_not_planned_is_a_mistake_of_the_program(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    with pytest.raises(AssertionError, match="planned"):
        write_checkpoint(tmp_path / "out", plan_of(TENSORS), tensors.items())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "offset", [0.0, 1e-38, -1.1754943508222875e-38, 0.49454465508461, 3.4028234663852886e38]
)
def test_a_quantization_state_is_as_long_for_every_offset(offset: float) -> None:
    weight = NF4Tensor.from_float(random_weight(6, 64))
    weight.offset = torch.tensor(offset)
    flat = flatten_state_dict({"weight": weight}, pad=True)
    assert len(flat[STATE]) == len(
        flatten_state_dict({"weight": NF4Tensor.from_float(random_weight(6, 64))}, pad=True)[STATE]
    )
    assert torch.equal(unflatten_state_dict(flat)["weight"].offset, weight.offset)


def test_a_number_that_is_none_is_named_outside_of_linear_layers_too(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors["model.embed_tokens.weight"][3].fill_(float("nan")))
    for options in ({}, {"quant_type": None}):
        with pytest.raises(
            ValueError, match=rf"{SINGLE}: model.embed_tokens.weight: holds nan \(first at index \(3, 0\)\)"
        ):
            load_model(folder, **options)
