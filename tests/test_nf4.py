"""NF4Tensor: an ordinary weight to nn.Linear, one object to whoever moves it, and nothing else to anybody."""

import copy
import doctest
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minqlora import nf4 as module
from minqlora.codebook import dynamic_map, levels
from minqlora.nf4 import SHARED_PARTS, Format, NF4Tensor

bnb = pytest.importorskip("bitsandbytes.functional")

N, K = 6, 11
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def nf4_of(*shape: int, dtype: torch.dtype = torch.float32, **options) -> NF4Tensor:
    return NF4Tensor.from_float(randn(*shape, dtype=dtype), **options)


def nf4_linear_layer(bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    linear = nn.Linear(K, N, bias=bias, dtype=dtype)
    linear.weight = nn.Parameter(nf4_of(N, K, dtype=dtype), requires_grad=False)
    if bias:
        linear.bias.data.copy_(randn(N, seed=2))
    return linear


def assert_same(a: Tensor, b: Tensor) -> None:
    """Both are NF4Tensors with equal parts and facts, and the codebooks are one object."""
    assert isinstance(a, NF4Tensor) and isinstance(b, NF4Tensor)
    assert (a.shape, a.dtype, a.device, a.format) == (b.shape, b.dtype, b.device, b.format)
    assert a.parts.keys() == b.parts.keys()
    for name, part in a.parts.items():
        assert torch.equal(part, b.parts[name])
        assert name not in SHARED_PARTS or part is b.parts[name]


# -- bits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("double_quant, bits", [(True, 4.127), (False, 4.5)])
def test_bits_per_parameter_are_those_of_the_bytes_really_held(double_quant: bool, bits: float):
    tensor = nf4_of(576, 1536, double_quant=double_quant)
    held = {name: part.untyped_storage().nbytes() for name, part in tensor.parts.items()}
    codebooks = {name: held.pop(name) for name in SHARED_PARTS if name in held}
    assert sum(codebooks.values()) == (1088 if double_quant else 64)
    assert tensor.nbytes == sum(held.values())
    assert tensor.bits_per_parameter == 8 * sum(held.values()) / (576 * 1536)
    assert round(tensor.bits_per_parameter, 3) == bits


def test_all_tensors_of_a_device_share_their_codebooks():
    for tensor in (nf4_of(3, 5), nf4_of(4, 4, dtype=torch.bfloat16)):
        assert tensor.codebook is levels("nf4")
        assert tensor.nested_codebook is dynamic_map()


def test_it_looks_like_the_weight_it_replaces():
    w = randn(N, K, dtype=torch.float16)
    tensor = NF4Tensor.from_float(w)
    assert (tensor.shape, tensor.dtype, tensor.device) == (w.shape, w.dtype, w.device)
    assert (tensor.numel(), tensor.dim(), tensor.stride()) == (w.numel(), 2, w.stride())
    assert tensor.is_floating_point()
    assert not tensor.requires_grad


def test_repr_tells_shape_and_bits_per_parameter():
    assert repr(nf4_of(64, 64, dtype=torch.bfloat16, block_size=32, double_quant=False)) == (
        "NF4Tensor(shape=(64, 64), dtype=torch.bfloat16, device=cpu, block_size=32, double_quant=False, "
        "5.000 bits per parameter)"
    )


def test_repr_of_a_parameter_is_that_of_the_tensor():
    tensor = nf4_of(N, K)
    assert repr(nn.Parameter(tensor, requires_grad=False)) == repr(tensor) == str(tensor)


def test_example_of_the_docstring():
    names = dict(torch=torch, nn=nn, NF4Tensor=NF4Tensor)
    options = doctest.NORMALIZE_WHITESPACE | doctest.FAIL_FAST
    example = doctest.DocTestParser().get_doctest(module.__doc__, names, "nf4", None, 0)
    assert len(example.examples) == 4
    assert doctest.DocTestRunner(optionflags=options).run(example).failed == 0


# -- quantizing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "weight, options, message",
    [
        (randn(4, 4), {"quant_type": "fp4"}, "quant_type must be 'nf4', not 'fp4'"),
        (randn(16), {}, r"floating-point \(N, K\) weight, got torch.float32 \(16,\)"),
        (randn(2, 2, 4), {}, r"floating-point \(N, K\) weight, got torch.float32 \(2, 2, 4\)"),
        (
            torch.ones(4, 4, dtype=torch.int32),
            {},
            r"floating-point \(N, K\) weight, got torch.int32 \(4, 4\)",
        ),
        (randn(4, 4), {"block_size": 63}, "got 63 and 256"),
        (randn(4, 4), {"block_size": 0}, "got 0 and 256"),
        (randn(4, 4), {"block_size": -64}, "got -64 and 256"),
        (randn(4, 4), {"nested_block_size": 0}, "got 64 and 0"),
        (torch.empty(0, 4), {}, r"empty weight of shape \(0, 4\)"),
        (torch.tensor([[1.0, float("nan")]]), {}, r"holds nan \(first at index \(0, 1\)\)"),
        (torch.tensor([[1.0], [-float("inf")]]), {}, r"holds -inf \(first at index \(1, 0\)\)"),
    ],
)
def test_what_cannot_be_quantized_is_refused(weight: Tensor, options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        NF4Tensor.from_float(weight, **options)


def test_an_nf4_tensor_is_not_quantized_again():
    with pytest.raises(NotImplementedError, match="dequantize"):
        NF4Tensor.from_float(nf4_of(N, K))


def test_quantizing_a_parameter_keeps_no_graph_and_no_memory_of_it():
    weight = nn.Parameter(randn(N, K))
    tensor = NF4Tensor.from_float(weight)
    assert not tensor.requires_grad
    assert all(not part.requires_grad for part in tensor.parts.values())
    before = tensor.dequantize()
    with torch.no_grad():
        weight.zero_()
    assert torch.equal(tensor.dequantize(), before)


# -- decoding ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(8, 64), (300, 64), (17, 31), (1, 3)])
def test_parts_made_by_bitsandbytes_decode_to_its_bits(shape: tuple[int, int], dtype: torch.dtype):
    packed, state = bnb.quantize_4bit(randn(*shape, dtype=dtype), compress_statistics=True, quant_type="nf4")
    parts = dict(
        packed=packed[:, 0],
        codebook=state.code,
        absmax_codes=state.absmax,
        nested_absmax=state.state2.absmax,
        nested_codebook=state.state2.code,
        offset=state.offset,
    )
    tensor = NF4Tensor(parts, dtype, Format(shape, state.blocksize, state.state2.blocksize))
    # One row of an even number, for the sake of bitsandbytes: test_quantize.py says why.
    state.shape = torch.Size((1, 2 * packed.numel()))
    theirs = bnb.dequantize_4bit(packed, state).flatten()[: tensor.numel()].view(shape)
    assert torch.equal(tensor.dequantize(), theirs)


@pytest.mark.parametrize("dtype", FLOATS)
def test_dequantize_gives_the_dtype_asked_for(dtype: torch.dtype):
    tensor = nf4_of(N, K, dtype=torch.bfloat16)
    assert tensor.dequantize().dtype == torch.bfloat16
    exact = tensor.dequantize(torch.float32)
    assert torch.equal(tensor.dequantize(dtype), exact.to(dtype))  # rounded once, from float32
    assert type(exact) is Tensor


def test_dequantize_writes_to_out():
    tensor, out = nf4_of(N, K), torch.empty(N, K, dtype=torch.float16)
    assert tensor.dequantize(out=out) is out
    assert torch.equal(out, tensor.dequantize(torch.float16))


def test_decoded_weight_is_near_the_weight():
    # No number is further off than half of the widest gap between levels (-1 to -0.696), times its scale, and
    # the scale itself may be off by some percent.
    w = randn(64, 64)
    error = (NF4Tensor.from_float(w).dequantize() - w).abs().view(-1, 64).amax(1)
    assert (error <= 1.1 * 0.152 * w.abs().view(-1, 64).amax(1)).all()


# -- as a weight ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_linear_and_its_gradient_equal_the_dense_layer(weight_dtype, dtype, lead, bias, double_quant):
    tensor = nf4_of(N, K, dtype=weight_dtype, double_quant=double_quant)
    b = randn(N, seed=2, dtype=dtype) if bias else None
    x = randn(*lead, K, seed=1, dtype=dtype).requires_grad_()
    dense_x = x.detach().clone().requires_grad_()
    y, dense = F.linear(x, tensor, b), F.linear(dense_x, tensor.dequantize(dtype), b)
    assert (y.shape, y.dtype) == ((*lead, N), dtype)
    # The same products; the dense layer may round sum and bias once where this one rounds twice.
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(y, dense, rtol=eps, atol=4 * eps)
    grad_y = randn(*y.shape, seed=3, dtype=dtype)
    y.backward(grad_y)
    dense.backward(grad_y)
    torch.testing.assert_close(x.grad, dense_x.grad, rtol=eps, atol=4 * eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_module_takes_it_as_its_weight(dtype: torch.dtype):
    linear = nf4_linear_layer()
    x = randn(2, 3, K, seed=1, dtype=dtype)
    assert torch.equal(linear(x), F.linear(x, linear.weight, linear.bias))
    assert linear(x).dtype == dtype  # whatever that of weight and bias
    assert isinstance(linear.weight, nn.Parameter)
    assert [name for name, _ in linear.named_parameters()] == ["weight", "bias"]
    assert "in_features=11, out_features=6" in repr(linear)


def test_bias_gets_its_gradient():
    linear = nf4_linear_layer()
    linear(randn(3, K)).sum().backward()
    assert torch.equal(linear.bias.grad, torch.full((N,), 3.0))
    assert linear.weight.grad is None


def test_linear_takes_its_arguments_by_name():
    tensor, x, b = nf4_of(N, K), randn(2, K), randn(N)
    assert torch.equal(F.linear(input=x, weight=tensor, bias=b), F.linear(x, tensor, b))


def test_linear_without_gradients():
    tensor, x = nf4_of(N, K), randn(2, K)
    with torch.no_grad():
        y = F.linear(x, tensor)
    with torch.inference_mode():
        assert torch.equal(F.linear(x, tensor), y)


@pytest.mark.parametrize("args", ["input", "bias"])
def test_it_is_neither_input_nor_bias_of_a_linear(args: str):
    tensor, dense = nf4_of(N, K), randn(4, K)
    with pytest.raises(NotImplementedError, match="only be the weight of F.linear.*dequantize"):
        F.linear(tensor, dense) if args == "input" else F.linear(dense, dense, tensor)


def test_backward_of_a_layer_saves_only_packed_tensors():
    tensor, x = nf4_of(64, 32), randn(2, 32).requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        F.linear(x, tensor)
    assert {t.data_ptr() for t in kept} == {part.data_ptr() for part in tensor.parts.values()}


# -- moving and copying --------------------------------------------------------------------------------------


def test_detach_shares_every_part():
    tensor = nf4_of(N, K)
    for other in (tensor.detach(), tensor.data, nn.Parameter(tensor, requires_grad=False)):
        assert_same(other, tensor)
        assert other.packed is tensor.packed


@pytest.mark.parametrize("duplicate", [torch.clone, copy.deepcopy, lambda t: t.to(t.dtype, copy=True)])
@pytest.mark.parametrize("double_quant", [True, False])
def test_copies_share_the_codebooks_and_nothing_else(duplicate: Callable, double_quant: bool):
    tensor = nf4_of(N, K, double_quant=double_quant, block_size=32, nested_block_size=2)
    other = duplicate(tensor)
    assert_same(other, tensor)
    for name in tensor.parts.keys() - set(SHARED_PARTS):
        assert other.parts[name].data_ptr() != tensor.parts[name].data_ptr()


def test_deepcopy_keeps_a_weight_that_two_layers_share():
    one = nf4_linear_layer()
    two = nn.Linear(K, N)
    two.weight = one.weight
    copied = copy.deepcopy(nn.ModuleList([one, two]))
    assert copied[0].weight is copied[1].weight
    assert_same(copied[0].weight, one.weight)


def test_deepcopy_of_a_parameter_is_a_parameter():
    linear = copy.deepcopy(nf4_linear_layer())
    assert isinstance(linear.weight, nn.Parameter)
    assert not linear.weight.requires_grad


@pytest.mark.parametrize("cast", [lambda t: t.to(torch.bfloat16), lambda t: t.bfloat16()])
def test_to_another_dtype_changes_the_dtype_and_no_byte(cast: Callable):
    tensor = nf4_of(N, K)
    other = cast(tensor)
    assert other.dtype == torch.bfloat16
    assert_same(other.to(torch.float32), tensor)
    assert other.offset.dtype == other.nested_absmax.dtype == torch.float32
    assert torch.equal(other.dequantize(), tensor.dequantize(torch.bfloat16))


def test_to_where_it_is_already_gives_itself():
    tensor = nf4_of(N, K)
    assert tensor.to("cpu") is tensor.to(torch.float32) is tensor.cpu() is tensor.float() is tensor


def test_to_another_device_takes_every_part_along():
    tensor, other = nf4_of(N, K), nf4_of(N, K).to("meta")
    assert (other.shape, other.dtype, other.device) == (tensor.shape, tensor.dtype, torch.device("meta"))
    assert {part.device for part in other.parts.values()} == {torch.device("meta")}
    assert other.parts.keys() == tensor.parts.keys()
    assert other.bits_per_parameter == tensor.bits_per_parameter
    assert other.codebook is nf4_of(3, 5).to("meta").codebook


def test_to_a_dtype_that_no_weight_has_is_refused():
    with pytest.raises(ValueError, match="floating-point weight and has no torch.int64"):
        nf4_of(N, K).to(torch.int64)


@pytest.mark.parametrize("move", [lambda m: m.to(torch.bfloat16), nn.Module.bfloat16, lambda m: m.to("cpu")])
def test_module_moves_with_its_weight(move: Callable):
    linear = nf4_linear_layer()
    before = linear.weight.detach().clone()
    moved = move(linear)
    assert moved is linear
    assert isinstance(linear.weight, nn.Parameter)
    assert not linear.weight.requires_grad
    assert linear.weight.dtype == linear.bias.dtype
    assert_same(linear.weight.to(torch.float32), before)
    assert linear(randn(2, K, dtype=linear.bias.dtype)).dtype == linear.bias.dtype


def test_state_dict_holds_it_as_it_is():
    linear = nf4_linear_layer()
    assert_same(linear.state_dict()["weight"], linear.weight)


@pytest.mark.parametrize("double_quant", [True, False])
def test_flattened_for_the_compiler_and_back_it_is_the_same(double_quant: bool):
    tensor = nf4_of(N, K, dtype=torch.bfloat16, block_size=32, nested_block_size=4, double_quant=double_quant)
    names, context = tensor.__tensor_flatten__()
    inner = {name: getattr(tensor, name) for name in names}
    assert_same(NF4Tensor.__tensor_unflatten__(inner, context, tensor.shape, tensor.stride()), tensor)


# -- what is refused -----------------------------------------------------------------------------------------

OPERATIONS = {
    "aten.add.Tensor": lambda t: t + 1,
    "aten.mul.Tensor": lambda t: 2 * t,
    "aten.neg.default": lambda t: -t,
    "aten.mm.default": lambda t: randn(2, N) @ t,
    "aten.addmm.default": lambda t: torch.addmm(randn(N), t, randn(K, N)),
    "aten.t.default": lambda t: t.t(),
    "aten.permute.default": lambda t: t.T,
    "aten.transpose.int": lambda t: t.transpose(0, 1),
    "aten.sum.default": lambda t: t.sum(),
    "aten.linalg_vector_norm.default": lambda t: t.norm(),
    "aten.view.default": lambda t: t.view(-1),
    "aten.select.int": lambda t: t[0],
    "aten.slice.Tensor": lambda t: t[1:],
    "aten.unbind.int": lambda t: list(t),
    "aten.cat.default": lambda t: torch.cat([t, t]),
    "aten.copy_.default": lambda t: t.copy_(randn(N, K)),
    "aten.mul_.Tensor": lambda t: t.mul_(2),
    "aten.zero_.default": lambda t: nn.init.zeros_(t),
    "aten.eq.Tensor": lambda t: t == t,
    "aten.equal.default": lambda t: torch.equal(t, t),
    "aten.isnan.default": lambda t: t.isnan(),
    "aten.zeros_like.default": lambda t: torch.zeros_like(t),
    "aten.embedding.default": lambda t: F.embedding(torch.tensor([1]), t),
    "aten.is_pinned.default": lambda t: t.pin_memory(),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_other_operation_is_refused_by_name(name: str):
    tensor = nf4_of(N, K)
    before = tensor.dequantize()
    with pytest.raises(NotImplementedError, match=rf"no {name}: .*Call \.dequantize\(\)"):
        OPERATIONS[name](tensor)
    assert torch.equal(tensor.dequantize(), before)


def test_another_tensor_does_not_take_its_values():
    with pytest.raises(NotImplementedError, match=r"copy_.*dequantize\(\)"):
        randn(N, K).copy_(nf4_of(N, K))


@pytest.mark.parametrize(
    "pickled", [lambda t: t, lambda t: nn.Parameter(t, requires_grad=False), lambda t: [t]]
)
def test_pickling_is_refused_with_the_way_out(pickled: Callable, tmp_path):
    value = pickled(nf4_of(N, K))
    for save in (pickle.dumps, lambda v: torch.save(v, tmp_path / "weight.pt")):
        with pytest.raises(NotImplementedError, match="not pickled.*safetensors"):
            save(value)


def test_copy_copy_is_refused_like_pickling():
    with pytest.raises(NotImplementedError, match="safetensors"):
        copy.copy(nf4_of(N, K))


@pytest.mark.parametrize("shape", [(K, N), (N * K,), (2, 3), (N + 1, K)])
def test_dequantize_refuses_an_out_of_another_shape(shape: tuple[int, ...]):
    with pytest.raises(ValueError, match=rf"\({N}, {K}\)"):
        nf4_of(N, K).dequantize(out=torch.empty(shape))


def test_linear_refuses_an_input_of_integers():
    with pytest.raises(ValueError, match="must be floating-point, got torch.int64"):
        F.linear(torch.ones(2, K, dtype=torch.int64), nf4_of(N, K))


# -- the other device ----------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_quantizes_and_decodes_to_the_same_bits():
    w = randn(37, 101, dtype=torch.bfloat16)
    here, there = NF4Tensor.from_float(w), NF4Tensor.from_float(w.cuda())
    assert_same(there.cpu(), here)
    assert_same(here.cuda().cpu(), here)
    for dtype in FLOATS:
        assert torch.equal(there.dequantize(dtype).cpu(), here.dequantize(dtype))
