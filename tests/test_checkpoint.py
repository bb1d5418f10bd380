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
from torch import Tensor, nn

from minqlora import NF4Tensor, checkpoint, load_model
from minqlora.checkpoint import (
    default_dtype,
    flatten_state_dict,
    quantized_size,
    unflatten_state_dict,
    write_atomically,
)
from minqlora.codebook import QUANT_TYPES
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
