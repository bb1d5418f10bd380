"""NF4Tensor: an ordinary weight to nn.Linear, one object to whoever moves it, and nothing else to anybody."""

import copy
import doctest
import multiprocessing
import pickle
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minqlora import nf4 as module
from minqlora.codebook import QUANT_TYPES, dynamic_map, levels
from minqlora.nf4 import SHARED_PARTS, Format, NF4Tensor

N, K = 6, 11
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
# Blocks that cross rows, and nested blocks that cross both.
SMALL = dict(block_size=4, nested_block_size=5)

BOTH_SCALES = pytest.mark.parametrize("double_quant", [True, False])


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


def nf4_in_rows(n_rows: int = 6, **options) -> NF4Tensor:
    """A weight that can be cut before every row: a row is three blocks."""
    return nf4_of(n_rows, 12, **(SMALL | options))


def memory(tensor: Tensor) -> set[int]:
    """Where the parts that are this tensor's own lie."""
    assert isinstance(tensor, NF4Tensor)
    own = tensor.parts.keys() - set(SHARED_PARTS)
    return {tensor.parts[name].untyped_storage().data_ptr() for name in own}


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


def test_repr_names_another_quant_type():
    assert repr(nf4_of(4, 16, quant_type="nf8", block_size=16)) == (
        "NF4Tensor(shape=(4, 16), dtype=torch.float32, device=cpu, quant_type='nf8', block_size=16, "
        "double_quant=True, 9.500 bits per parameter)"
    )


def test_repr_of_a_parameter_is_that_of_the_tensor():
    tensor = nf4_of(N, K)
    assert repr(nn.Parameter(tensor, requires_grad=False)) == repr(tensor) == str(tensor)


def test_example_of_the_docstring():
    names = dict(torch=torch, nn=nn, NF4Tensor=NF4Tensor)
    options = doctest.NORMALIZE_WHITESPACE | doctest.FAIL_FAST
    example = doctest.DocTestParser().get_doctest(module.__doc__, names, "nf4", None, 0)
    assert len(example.examples) == 6
    assert doctest.DocTestRunner(optionflags=options).run(example).failed == 0


# -- quantizing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "weight, options, message",
    [
        (randn(4, 4), {"quant_type": "nf9"}, "quant_type must be one of nf4, fp4, .* quantile, not 'nf9'"),
        (randn(4, 4), {"scale_rule": "lut"}, "scale_rule must be one of midpoint, table, not 'lut'"),
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


@pytest.mark.parametrize("double_quant", [True, False])
def test_an_nf4_tensor_is_not_quantized_again(double_quant: bool):
    with pytest.raises((NotImplementedError, ValueError), match="dequantize"):
        NF4Tensor.from_float(nf4_of(N, K), double_quant=double_quant)


def test_the_rule_for_scales_changes_their_codes_by_one_and_nothing_else():
    weight = randn(128, 64)
    nearest = NF4Tensor.from_float(weight, block_size=2, scale_rule="midpoint")
    table = NF4Tensor.from_float(weight, block_size=2, scale_rule="table")
    assert_same(nearest, NF4Tensor.from_float(weight, block_size=2))
    difference = (nearest.absmax_codes.int() - table.absmax_codes.int()).abs()
    assert difference.max() == 1 and difference.float().mean() < 0.01  # some 2 in 1,000
    for name in nearest.parts.keys() - {"absmax_codes"}:
        assert torch.equal(nearest.parts[name], table.parts[name])


@BOTH_SCALES
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_every_quant_type_is_a_weight(quant_type: str, double_quant: bool):
    tensor = nf4_of(N, K, quant_type=quant_type, double_quant=double_quant, **SMALL)
    w = tensor.dequantize()
    assert (w - randn(N, K)).abs().max() < 2  # of numbers up to 2.6: levels not much further apart than 1
    x, grad_y = randn(3, K, seed=1).requires_grad_(), randn(3, N, seed=2)
    y = F.linear(x, tensor)
    torch.testing.assert_close(y, x @ w.T, rtol=1e-5, atol=1e-5)
    (grad_x,) = torch.autograd.grad(y, x, grad_y)
    torch.testing.assert_close(grad_x, grad_y @ w, rtol=1e-5, atol=1e-5)
    assert torch.equal(tensor[4:].dequantize(), w[4:])
    assert_same(copy.deepcopy(tensor), tensor)


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
    bnb = pytest.importorskip("bitsandbytes.functional")
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


VIEWED = {"matrix": lambda t: t, "transposed": lambda t: t.t(), "flat": lambda t: t.view(-1)}


@BOTH_SCALES
@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
@pytest.mark.parametrize("view", VIEWED)
def test_dequantize_writes_to_out(view: str, dtype: torch.dtype, contiguous: bool, double_quant: bool):
    tensor = VIEWED[view](nf4_of(N, K, double_quant=double_quant, **SMALL))
    frame = torch.full((*tensor.shape, 1 if contiguous else 2), float("nan"), dtype=dtype)
    assert tensor.dequantize(out=frame[..., 0]).data_ptr() == frame.data_ptr()
    assert torch.equal(frame[..., 0], tensor.dequantize(dtype))
    assert contiguous or frame[..., 1].isnan().all()


def test_dequantize_returns_the_out_that_it_was_given():
    out = torch.empty(N, K)
    assert nf4_of(N, K).dequantize(out=out) is out
    assert nf4_of(N, K).dequantize(torch.float32, out=out) is out


@pytest.mark.parametrize(
    "dtype, out, message",
    [
        (None, torch.empty(K, N), rf"shape \({N}, {K}\), got \({K}, {N}\)"),
        (None, torch.empty(N * K), rf"shape \({N}, {K}\), got \({N * K},\)"),
        (None, torch.empty(N + 1, K), rf"shape \({N}, {K}\), got \({N + 1}, {K}\)"),
        (None, torch.empty(N, K, device="meta"), "floating point on cpu, got torch.float32 on meta"),
        (None, torch.empty(N, K, dtype=torch.int32), "floating point on cpu, got torch.int32 on cpu"),
        (torch.float16, torch.empty(N, K), "torch.float16 on cpu, got torch.float32 on cpu"),
    ],
)
def test_an_out_that_does_not_fit_is_refused(dtype: torch.dtype | None, out: Tensor, message: str):
    with pytest.raises(ValueError, match=f"out must .*{message}"):
        nf4_of(N, K).dequantize(dtype, out=out)


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


def test_a_weight_that_asks_for_a_gradient_is_refused_before_it_silently_gets_none():
    weight = nn.Parameter(nf4_of(N, K))
    with pytest.raises(ValueError, match=r"frozen: call \.requires_grad_\(False\)"):
        F.linear(randn(2, K), weight)


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


def test_linear_refuses_an_input_of_integers():
    with pytest.raises(ValueError, match="must be floating-point, got torch.int64"):
        F.linear(torch.ones(2, K, dtype=torch.int64), nf4_of(N, K))


@pytest.mark.parametrize("product", [F.linear, lambda x, w: x @ w.t()])
@pytest.mark.parametrize("x_device, w_device", [("cpu", "meta"), ("meta", "cpu")])
def test_operands_on_two_devices_are_refused(x_device: str, w_device: str, product: Callable):
    # A weight without memory would give numbers that nobody wrote.
    with pytest.raises((ValueError, RuntimeError), match="cpu.*meta|meta.*cpu"):
        product(randn(2, K).to(x_device), nf4_of(N, K).to(w_device))


# -- in products ---------------------------------------------------------------------------------------------

# Name: the product of a weight (N, K) with others, and their shapes.
PRODUCTS: dict[str, tuple[Callable, list[tuple[int, ...]]]] = {
    "x @ w.t()": (lambda w, x: x @ w.t(), [(3, K)]),
    "x @ w.T, one row": (lambda w, x: x @ w.T, [(1, K)]),
    "x @ w.T, no rows": (lambda w, x: x @ w.T, [(0, K)]),
    "x @ w": (lambda w, x: x @ w, [(3, N)]),
    "w @ x": (lambda w, x: w @ x, [(K, 3)]),
    "w.mT @ x": (lambda w, x: w.mT @ x, [(N, 3)]),
    "w @ vector": (lambda w, x: w @ x, [(K,)]),
    "vector @ w": (lambda w, x: x @ w, [(N,)]),
    "vector @ w.t()": (lambda w, x: x @ w.t(), [(K,)]),
    "3-D @ w.t()": (lambda w, x: x @ w.t(), [(2, 3, K)]),
    "3-D @ w": (lambda w, x: x @ w, [(2, 3, N)]),
    "4-D @ w.t()": (lambda w, x: x @ w.t(), [(2, 1, 3, K)]),
    "turned 3-D @ w.t()": (lambda w, x: x.transpose(0, 1) @ w.t(), [(3, 2, K)]),
    "transposed 3-D @ w.t()": (lambda w, x: x.mT @ w.t(), [(2, K, 3)]),
    "w @ 3-D": (lambda w, x: w @ x, [(2, K, 3)]),
    "transposed x @ w.t()": (lambda w, x: x.t() @ w.t(), [(K, 3)]),
    "torch.matmul": (lambda w, x: torch.matmul(x, w.t()), [(2, 3, K)]),
    "Tensor.matmul": (lambda w, x: x.matmul(w.t()), [(3, K)]),
    "torch.mm": (lambda w, x: torch.mm(x, w.t()), [(3, K)]),
    "Tensor.mm": (lambda w, x: w.mm(x), [(K, 3)]),
    "torch.mv": (lambda w, x: torch.mv(w, x), [(K,)]),
    "F.linear of w.t()": (lambda w, x: F.linear(x, w.t()), [(2, 3, N)]),
    "F.linear of w.t() with bias": (lambda w, x, b: F.linear(x, w.t(), b), [(3, N), (K,)]),
    "addmm": (lambda w, b, x: torch.addmm(b, x, w.t()), [(N,), (3, K)]),
    "addmm, w first": (lambda w, b, x: torch.addmm(b, w, x), [(N, 3), (K, 3)]),
    "addmm of a row": (lambda w, b, x: torch.addmm(b, x, w), [(1, K), (3, N)]),
    "addmm, beta and alpha": (
        lambda w, b, x: torch.addmm(b, x, w.t(), beta=0.5, alpha=-2),
        [(3, N), (3, K)],
    ),
    "addmm, beta 0": (lambda w, b, x: torch.addmm(b, x, w.t(), beta=0), [(3, N), (3, K)]),
    "addmm, alpha 0": (lambda w, b, x: torch.addmm(b, x, w.t(), alpha=0), [(3, N), (3, K)]),
    "Tensor.addmm": (lambda w, b, x: b.addmm(x, w), [(3, K), (3, N)]),
}


def product_and_gradients(f: Callable, w: Tensor, shapes: list[tuple[int, ...]], dtype: torch.dtype):
    """f(w, operands of the shapes), and their gradients for some gradient of it."""
    operands = [randn(*shape, seed=i, dtype=dtype).requires_grad_() for i, shape in enumerate(shapes)]
    y = f(w, *operands)
    return y.detach(), *torch.autograd.grad(y, operands, randn(*y.shape, seed=9, dtype=dtype))


@BOTH_SCALES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", PRODUCTS)
def test_products_and_gradients_are_those_of_the_dense_matrix(name, dtype, double_quant):
    f, shapes = PRODUCTS[name]
    tensor = nf4_of(N, K, double_quant=double_quant, **SMALL)
    ours = product_and_gradients(f, tensor, shapes, dtype)
    theirs = product_and_gradients(f, tensor.dequantize(dtype), shapes, dtype)
    for a, b in zip(ours, theirs, strict=True):
        assert type(a) is Tensor and (a.shape, a.dtype) == (b.shape, b.dtype)
        # The same products: sums in another order, and where something is added one rounding more.
        size = b.abs().max().item() if b.numel() else 0.0
        torch.testing.assert_close(a, b, rtol=0, atol=4 * torch.finfo(dtype).eps * size)


@BOTH_SCALES
@pytest.mark.parametrize("name", ["x @ w.t()", "3-D @ w.t()", "w @ x", "addmm", "F.linear of w.t()"])
def test_backward_of_a_product_saves_only_packed_tensors(name: str, double_quant: bool):
    f, shapes = PRODUCTS[name]
    tensor = nf4_of(N, K, double_quant=double_quant, **SMALL)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        f(tensor, *(randn(*shape).requires_grad_() for shape in shapes))
    parts = [part for t in kept for part in (t.parts.values() if isinstance(t, NF4Tensor) else [t])]
    assert parts
    assert {part.data_ptr() for part in parts} <= {part.data_ptr() for part in tensor.parts.values()}


def test_a_product_with_a_weight_saved_for_backward_survives_its_end():
    x = randn(3, K).requires_grad_()
    tensor = nf4_of(N, K, **SMALL)
    expected = tensor.dequantize().sum(0).expand(3, K)
    y = x @ tensor.t()
    del tensor
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], expected)


@pytest.mark.parametrize(
    "product, message",
    [
        (lambda w: F.linear(randn(3, N), w), r"3x6 and 11x6|\(3, 6\)"),
        (lambda w: randn(3, K) @ w, r"\(3, 11\) and \(6, 11\)"),
        (lambda w: w @ randn(N, 3), r"\(3, 6\) and \(11, 6\)|\(6, 11\) and \(6, 3\)"),
        (lambda w: w @ randn(N), r"\(1, 6\) and \(11, 6\)|\(6, 11\) and \(6,\)"),
        (lambda w: torch.addmm(randn(3), randn(3, N), w.t()), r"\(3, 6\) and \(11, 6\)"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(product: Callable, message: str):
    with pytest.raises(
        (ValueError, RuntimeError), match=f"({message}).*cannot be multiplied|cannot be mul.*({message})"
    ):
        product(nf4_of(N, K))


@pytest.mark.parametrize(
    "product",
    [
        lambda w, x: x @ w.t(),
        lambda w, x: w @ x.t(),
        lambda w, x: w @ x[0],
        lambda w, x: torch.addmm(randn(N), x, w.t()),
    ],
)
def test_products_with_integers_are_refused(product: Callable):
    with pytest.raises(ValueError, match="multiplied by floating-point numbers, got torch.int64"):
        product(nf4_of(N, K), torch.ones(2, K, dtype=torch.int64))


@pytest.mark.parametrize(
    "product",
    [
        lambda w: w @ w.t(),
        lambda w: torch.mm(w.t(), w),
        lambda w: torch.addmm(randn(N), w, w.t()),
        lambda w: F.linear(w, w),
        lambda w: torch.addmm(w, randn(N, 2), randn(2, K)),
    ],
)
def test_two_quantized_operands_are_refused(product: Callable):
    with pytest.raises(NotImplementedError, match=r"dequantize\(\)"):
        product(nf4_of(N, K))


# -- moving and copying --------------------------------------------------------------------------------------


def test_detach_shares_every_part():
    tensor = nf4_of(N, K)
    for other in (tensor.detach(), tensor.data, nn.Parameter(tensor, requires_grad=False)):
        assert_same(other, tensor)
        assert other.packed is tensor.packed


COPIES = {
    "clone": torch.clone,
    "deepcopy": copy.deepcopy,
    "to a copy": lambda t: t.to("cpu", copy=True),
    "to a copy of its dtype": lambda t: t.to(t.dtype, copy=True),
    "non-blocking": lambda t: t.to("cpu", non_blocking=True, copy=True),
}


@pytest.mark.parametrize("cut", [lambda t: t, lambda t: t[1:3], lambda t: t.t(), lambda t: t.view(-1)])
@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
@BOTH_SCALES
def test_copies_share_the_codebooks_and_nothing_else(duplicate: Callable, cut: Callable, double_quant: bool):
    tensor = cut(nf4_in_rows(double_quant=double_quant))
    other = duplicate(tensor)
    assert_same(other, tensor)
    assert torch.equal(other.dequantize(), tensor.dequantize())
    assert not memory(other) & memory(tensor)


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


@BOTH_SCALES
@pytest.mark.parametrize("cast", [lambda t: t.to(torch.bfloat16), lambda t: t.bfloat16()])
def test_to_another_dtype_changes_the_dtype_and_no_byte(cast: Callable, double_quant: bool):
    tensor = nf4_of(N, K, double_quant=double_quant)
    other = cast(tensor)
    assert other.dtype == torch.bfloat16
    assert_same(other.to(torch.float32), tensor)
    own = tensor.parts.keys() - {"packed", "absmax_codes"}
    assert {other.parts[name].dtype for name in own} == {torch.float32}
    assert torch.equal(other.dequantize(), tensor.dequantize(torch.bfloat16))


def test_to_where_it_is_already_gives_itself():
    tensor = nf4_of(N, K)
    assert tensor.to("cpu") is tensor.to(torch.float32) is tensor.cpu() is tensor.float() is tensor
    assert tensor.to("cpu", non_blocking=True) is tensor.to(randn(1)) is tensor


@BOTH_SCALES
def test_to_another_device_takes_every_part_along(double_quant: bool):
    tensor = nf4_of(N, K, double_quant=double_quant)
    other = tensor.to("meta")
    assert (other.shape, other.dtype, other.device) == (tensor.shape, tensor.dtype, torch.device("meta"))
    assert {part.device for part in other.parts.values()} == {torch.device("meta")}
    assert other.parts.keys() == tensor.parts.keys()
    assert other.bits_per_parameter == tensor.bits_per_parameter
    assert other.codebook is nf4_of(3, 5).to("meta").codebook


@BOTH_SCALES
@pytest.mark.parametrize(
    "do",
    [
        lambda t: t.clone(),
        lambda t: copy.deepcopy(t),
        lambda t: t.to("meta", copy=True),
        lambda t: t.to(torch.bfloat16).to(torch.float32),
        lambda t: torch.empty_like(t),
        lambda t: t.new_zeros(6, 12),
        lambda t: t.clone().copy_(t),
        lambda t: t.t().t(),
        lambda t: t.split([0, 6])[1],
    ],
)
def test_without_memory_it_does_what_it_does_with_memory(do: Callable, double_quant: bool):
    tensor = nf4_in_rows(double_quant=double_quant)
    other, expected = do(tensor.to("meta")), do(tensor)
    assert (other.shape, other.dtype, other.format) == (expected.shape, expected.dtype, expected.format)
    assert other.device == torch.device("meta")
    sizes = {name: part.shape for name, part in other.parts.items()}
    assert sizes == {name: part.shape for name, part in expected.parts.items()}


def test_without_memory_it_has_no_values_to_move():
    with pytest.raises(NotImplementedError, match="meta tensor; no data"):
        nf4_of(N, K).to("meta").to("cpu")


def test_to_a_dtype_that_no_weight_has_is_refused():
    with pytest.raises(ValueError, match="floating-point weight and has no torch.int64"):
        nf4_of(N, K).to(torch.int64)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is memory to pin")
@BOTH_SCALES
def test_without_an_accelerator_there_is_nothing_to_pin(double_quant: bool):
    tensor = nf4_of(N, K, double_quant=double_quant)
    assert_same(tensor.pin_memory(), tensor)
    assert not tensor.pin_memory().is_pinned()


def share(tensor: Tensor) -> None:
    try:
        tensor.share_memory_()
    except NotImplementedError:
        return
    assert tensor.is_shared()


@pytest.mark.skipif(sys.platform != "linux", reason="forks the way Linux does")
def test_sharing_memory_with_other_processes_does_not_crash():
    process = multiprocessing.get_context("fork").Process(target=share, args=(nf4_of(N, K),))
    process.start()
    process.join()
    assert process.exitcode == 0


# -- copy_ ---------------------------------------------------------------------------------------------------


@BOTH_SCALES
@pytest.mark.parametrize("view", VIEWED)
def test_copy_takes_over_every_part(view: str, double_quant: bool):
    target = nf4_of(N, K, double_quant=double_quant, **SMALL)
    source = NF4Tensor.from_float(randn(N, K, seed=4) * 3, double_quant=double_quant, **SMALL)
    held = memory(target)
    viewed = VIEWED[view](target)
    assert viewed.copy_(VIEWED[view](source)) is viewed
    assert_same(target, source)
    assert memory(target) == held and not held & memory(source)


def test_copy_keeps_the_dtype_of_what_is_written_to():
    target, source = nf4_of(N, K), NF4Tensor.from_float(randn(N, K, seed=4, dtype=torch.bfloat16))
    target.copy_(source)
    assert target.dtype == torch.float32
    assert torch.equal(target.dequantize(), source.dequantize(torch.float32))


@pytest.mark.parametrize("write", [lambda t: t, lambda t: t.detach(), lambda t: t.data, lambda t: t.t()])
@pytest.mark.parametrize("quant_type", ["nf4", "nf8", "quantile"])
def test_a_copy_into_a_view_is_seen_in_the_whole_or_refused(quant_type: str, write: Callable):
    target = nf4_of(8, 12, quant_type=quant_type)
    source = NF4Tensor.from_float(randn(8, 12, seed=4).abs(), quant_type=quant_type)
    before = target.dequantize()
    viewed = write(target)
    try:
        viewed.copy_(source.t() if viewed.shape != source.shape else source)
    except ValueError as error:
        assert "levels" in str(error)
        assert torch.equal(target.dequantize(), before)
    else:
        assert torch.equal(target.dequantize(), source.dequantize())


@pytest.mark.parametrize("target, source", [(nf4_of(N, K), randn(N, K)), (randn(N, K), nf4_of(N, K))])
def test_copies_from_and_to_an_ordinary_tensor_are_refused(target: Tensor, source: Tensor):
    with pytest.raises(NotImplementedError, match=r"copy_ .*from_float\(weight\), or \.dequantize\(out="):
        target.copy_(source)


@pytest.mark.parametrize(
    "other",
    [
        nf4_in_rows(block_size=6),
        nf4_in_rows(nested_block_size=4),
        nf4_in_rows(double_quant=False),
        nf4_in_rows(quant_type="fp4"),
        nf4_in_rows(5),
        nf4_in_rows()[1:],
        nf4_of(12, 6, **SMALL).t(),
        nf4_in_rows().view(-1),
    ],
)
def test_copies_between_formats_are_refused(other: NF4Tensor):
    tensor = nf4_in_rows()
    before = tensor.dequantize()
    with pytest.raises(ValueError, match="quantized another way: NF4Tensor.* to NF4Tensor"):
        tensor.copy_(other)
    assert torch.equal(tensor.dequantize(), before)


def test_rows_with_another_offset_are_not_copied_over_a_part():
    # The offset is one for all of a weight, and the rows beside the part would change.
    tensor, other = nf4_in_rows(), NF4Tensor.from_float(randn(6, 12, seed=4) * 3, **SMALL)
    with pytest.raises(ValueError, match="part of a tensor whose scales|share.* offset"):
        tensor[1:3].copy_(other[1:3])
    assert_same(tensor, nf4_in_rows())


@pytest.mark.parametrize("nested_block_size", [1, 2, 5, 256])
@pytest.mark.parametrize("first", range(5))
def test_copies_over_a_part_leave_the_rows_beside_it_alone(first: int, nested_block_size: int):
    # Of the same offset: rows of the same weight. Nested blocks run on into the rows beside the part.
    tensor, source = (nf4_in_rows(12, nested_block_size=nested_block_size) for _ in range(2))
    before = tensor.dequantize()
    for other in range(12):
        try:
            tensor[first : first + 1].copy_(source[other : other + 1])
        except ValueError:
            continue
        after = tensor.dequantize()
        assert torch.equal(after[first], before[other])
        beside = [row for row in range(12) if row != first]
        assert torch.equal(after[beside], before[beside])


@BOTH_SCALES
def test_rows_can_be_written_into_a_blank_weight(double_quant: bool):
    rows = nf4_in_rows(double_quant=double_quant)
    blank = rows.new_zeros(9, 12)
    blank[:2].copy_(rows[:2])
    assert torch.equal(blank.dequantize()[:2], rows.dequantize()[:2])
    assert not blank.dequantize()[2:].any()


# -- transposed and flat -------------------------------------------------------------------------------------

TRANSPOSES: dict[str, Callable] = {
    "t": lambda t: t.t(),
    "T": lambda t: t.T,
    "mT": lambda t: t.mT,
    "transpose": lambda t: t.transpose(0, 1),
    "transpose from the end": lambda t: t.transpose(-2, -1),
    "swapaxes": lambda t: t.swapaxes(1, 0),
    "permute": lambda t: t.permute(1, 0),
    "permute from the end": lambda t: t.permute((-1, -2)),
    "movedim": lambda t: t.movedim(0, 1),
}


@BOTH_SCALES
@pytest.mark.parametrize("transpose", TRANSPOSES.values(), ids=TRANSPOSES)
def test_transposed_it_is_the_transposed_weight_over_the_same_memory(transpose: Callable, double_quant: bool):
    tensor = nf4_of(N, K, double_quant=double_quant, **SMALL)
    dense = tensor.dequantize()
    other = transpose(tensor)
    assert (other.shape, other.stride()) == (transpose(dense).shape, transpose(dense).stride())
    assert torch.equal(other.dequantize(), dense.t())
    assert memory(other) == memory(tensor)
    assert_same(transpose(other), tensor)


@pytest.mark.parametrize("first", [lambda t: t, lambda t: t.t()])
@pytest.mark.parametrize(
    "keep",
    [
        lambda t: t.permute(0, 1),
        lambda t: t.permute(-2, -1),
        lambda t: t.transpose(0, 0),
        lambda t: t.transpose(1, -1),
        lambda t: t.movedim(1, 1),
    ],
)
def test_dimensions_left_in_their_order_are_left(keep: Callable, first: Callable):
    tensor = first(nf4_of(N, K, **SMALL))
    assert keep(tensor).shape == keep(tensor.dequantize()).shape
    assert torch.equal(keep(tensor).dequantize(), tensor.dequantize())


@pytest.mark.parametrize(
    "do",
    [
        lambda t: t.transpose(0, 2),
        lambda t: t.split(2, 2),
        lambda t: t.split(2, -3),
        lambda t: t.narrow(2, 0, 1),
    ],
)
def test_dimensions_that_it_has_not_are_refused(do: Callable):
    with pytest.raises(IndexError, match="out of range"):
        do(nf4_in_rows())


OWN_SHAPE: dict[str, Callable] = {
    "view": lambda t: t.view(N, K),
    "view(-1, K)": lambda t: t.view(-1, K),
    "view(N, -1)": lambda t: t.view((N, -1)),
    "view_as": lambda t: t.view_as(randn(N, K)),
    "reshape": lambda t: t.reshape(N, K),
    "reshape(-1, K)": lambda t: t.reshape(-1, K),
    "flat and back": lambda t: t.view(-1).view(N, K),
    "flatten and unflatten": lambda t: t.flatten().unflatten(0, (N, K)),
    "flat twice and back": lambda t: t.view(-1).view(N * K).view(N, -1),
    "contiguous": lambda t: t.contiguous(),
    "[...]": lambda t: t[...],
}


@BOTH_SCALES
@pytest.mark.parametrize("view", OWN_SHAPE.values(), ids=OWN_SHAPE)
def test_viewed_in_its_own_shape_it_is_itself(view: Callable, double_quant: bool):
    tensor = nf4_of(N, K, double_quant=double_quant, **SMALL)
    assert_same(view(tensor), tensor)
    assert memory(view(tensor)) == memory(tensor)


@BOTH_SCALES
@pytest.mark.parametrize(
    "view", [lambda t: t.view(-1), lambda t: t.view(N * K), lambda t: t.flatten(), lambda t: t.reshape(-1)]
)
def test_flat_it_is_the_flat_weight_over_the_same_memory(view: Callable, double_quant: bool):
    tensor = nf4_of(N, K, double_quant=double_quant, **SMALL)
    assert (view(tensor).shape, view(tensor).stride()) == ((N * K,), (1,))
    assert torch.equal(view(tensor).dequantize(), tensor.dequantize().view(-1))
    assert memory(view(tensor)) == memory(tensor)


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t.view(K, N),
        lambda t: t.reshape(K, N),
        lambda t: t.view(1, N, K),
        lambda t: t.view(2, 3, K),
        lambda t: t.view(3, -1),
        lambda t: t.view(-1).view(K, N),
        lambda t: t.t().view(-1),
        lambda t: t.t().reshape(-1),
        lambda t: t.t().view(N, K),
        lambda t: t.view(-1).t(),
        lambda t: t.unsqueeze(0),
        lambda t: t.as_strided((K, N), (N, 1)),
        lambda t: t.as_strided((N, K), (K, 1), 1),
    ],
)
def test_other_views_are_refused(view: Callable):
    with pytest.raises(NotImplementedError, match=r"\.dequantize\(\)"):
        view(nf4_of(N, K))


# -- rows ----------------------------------------------------------------------------------------------------

# How to cut six rows: the same of the quantized weight and of the dense one.
CUTS: dict[str, Callable] = {
    "[1:4]": lambda t: [t[1:4]],
    "[-2:]": lambda t: [t[-2:]],
    "[:100]": lambda t: [t[:100]],
    "[2:4, :]": lambda t: [t[2:4, :]],
    "narrow": lambda t: [t.narrow(0, 1, 2), t.narrow(0, -3, 2)],
    "split": lambda t: t.split(4),
    "split from the end": lambda t: t.split(2, -2),
    "split by sizes": lambda t: t.split([1, 2, 3]),
    "split_with_sizes": lambda t: t.split_with_sizes([2, 0, 4]),
    "chunk": lambda t: t.chunk(4),
    "chunk into more than there are": lambda t: t.chunk(9),
    "tensor_split": lambda t: t.tensor_split(4),
    "tensor_split before rows": lambda t: torch.tensor_split(t, [1, 1, 4]),
    "tensor_split into more than there are": lambda t: t.tensor_split(8),
    "vsplit": lambda t: t.vsplit(3),
    "part of a part": lambda t: [t[1:][1:4], t[2:][:2]],
    "part of a part of a part": lambda t: [t[1:][1:][1:], t[1:].chunk(2)[1][1:]],
    "nothing": lambda t: [t[3:3], t[6:], t[4:2], t[1:][2:2]],
}


@BOTH_SCALES
@pytest.mark.parametrize("nested_block_size", [2, 5, 256])
@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
def test_parts_are_the_same_rows_over_the_same_memory(
    cut: Callable, nested_block_size: int, double_quant: bool
):
    tensor = nf4_in_rows(nested_block_size=nested_block_size, double_quant=double_quant)
    parts, rows = cut(tensor), cut(tensor.dequantize())
    assert len(parts) == len(rows) > 0
    for part, dense in zip(parts, rows, strict=True):
        assert (part.shape, part.stride(), part.dtype) == (dense.shape, dense.stride(), dense.dtype)
        assert torch.equal(part.dequantize(), dense)
        assert torch.equal(part.t().dequantize(torch.bfloat16), dense.t().bfloat16())
        assert memory(part) <= memory(tensor)
        assert part.codebook is tensor.codebook


@BOTH_SCALES
@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
def test_parts_multiply_as_their_rows_do(cut: Callable, double_quant: bool):
    tensor = nf4_in_rows(double_quant=double_quant)
    for part, dense in zip(cut(tensor), cut(tensor.dequantize()), strict=True):
        x = randn(2, 12).requires_grad_()
        y = F.linear(x, part)
        torch.testing.assert_close(y, x @ dense.t(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], dense.sum(0).expand(2, 12))


@BOTH_SCALES
def test_parts_hold_no_more_than_their_rows(double_quant: bool):
    tensor = nf4_in_rows(10, double_quant=double_quant, nested_block_size=3)  # a nested block a row
    assert sum(part.nbytes for part in tensor.chunk(5)) == tensor.nbytes + (4 * 4 if double_quant else 0)


def test_a_part_that_begins_within_a_nested_block_remembers_where():
    tensor = nf4_in_rows()  # three scales a row, five to a nested block
    assert [part.format.nested_first for part in tensor.split(1)] == [0, 3, 1, 4, 2, 0]
    assert tensor[1:][1:].format.nested_first == 1
    assert nf4_in_rows(double_quant=False)[1:].format.nested_first == 0


@BOTH_SCALES
@pytest.mark.parametrize("start, stop", [(0, 3), (2, 5), (4, 7), (6, 7), (2, 7)])
def test_last_rows_end_with_the_short_last_block(start: int, stop: int, double_quant: bool):
    tensor = nf4_of(7, 10, double_quant=double_quant, **SMALL)  # 17 blocks and a half
    part = tensor[start:stop]
    assert torch.equal(part.dequantize(), tensor.dequantize()[start:stop])
    x = randn(2, 10)
    torch.testing.assert_close(F.linear(x, part), x @ part.dequantize().t(), rtol=1e-5, atol=1e-5)


@BOTH_SCALES
@pytest.mark.parametrize("width, every", [(11, 4), (10, 2), (12, 1), (7, 4), (6, 2)])
def test_it_is_cut_before_rows_where_a_block_begins_and_nowhere_else(width, every, double_quant):
    tensor = nf4_of(9, width, double_quant=double_quant, **SMALL)
    for row in range(9):
        if row % every == 0:
            assert torch.equal(tensor[row:].dequantize(), tensor.dequantize()[row:])
        else:
            message = rf"\(9, {width}\).* multiples of {every} rows, where a block of 4 begins.* row {row}"
            with pytest.raises(ValueError, match=message):
                tensor[row:]


@pytest.mark.parametrize(
    "sizes", [[1, 2], [4, 4], [-1, 7], [], 0, -1], ids=["too few", "too many", "negative", "none", "0", "-1"]
)
def test_rows_cannot_be_split_into_more_or_fewer(sizes: list[int] | int):
    with pytest.raises((ValueError, RuntimeError)):
        nf4_in_rows().split(sizes)


@pytest.mark.parametrize(
    "cut",
    [
        lambda t: t[:, 1:],
        lambda t: t[::2],
        lambda t: t.chunk(2, dim=1),
        lambda t: t.narrow(-1, 0, 4),
        lambda t: t.hsplit(2),
        lambda t: t.t()[1:],
        lambda t: t.t().chunk(2),
        lambda t: t.view(-1)[12:],
    ],
)
def test_other_cuts_are_refused(cut: Callable):
    with pytest.raises(NotImplementedError, match=r"rows of an NF4Tensor .*(dequantize\(\)|call \.t\(\))"):
        cut(nf4_in_rows())


# -- looking rows up -----------------------------------------------------------------------------------------


# Rows of whole blocks; of one and a half; shorter than one; that begin anywhere in one, the last one short.
@pytest.mark.parametrize(
    ("shape", "block_size"), [((40, 64), 32), ((9, 96), 64), ((11, 10), 64), ((7, 13), 4)]
)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "nf6"])
@BOTH_SCALES
def test_rows_looked_up_are_those_of_the_decoded_weight(
    double_quant: bool, quant_type: str, shape: tuple[int, int], block_size: int
):
    tensor = nf4_of(
        *shape, double_quant=double_quant, quant_type=quant_type, block_size=block_size, nested_block_size=4
    )
    ids = torch.randint(shape[0], (3, 20), generator=torch.Generator().manual_seed(0))
    ids[0, :2] = torch.tensor([0, shape[0] - 1])
    assert torch.equal(F.embedding(ids, tensor), tensor.dequantize()[ids])
    assert F.embedding(ids[:0], tensor).shape == (0, 20, shape[1])


def test_rows_of_a_part_of_a_weight_are_looked_up_there():
    part = nf4_of(40, 64, nested_block_size=7)[3:30]
    ids = torch.arange(27)
    assert part.format.nested_first and torch.equal(F.embedding(ids, part), part.dequantize())


@pytest.mark.parametrize("row", [-1, 9, 10**12])
@pytest.mark.parametrize("width", [64, 96, 10])
def test_a_row_that_is_not_there_is_refused(width: int, row: int):
    with pytest.raises((IndexError, RuntimeError), match="index"):
        F.embedding(torch.tensor([0, row]), nf4_of(9, width))


def test_only_the_rows_asked_for_are_decoded(monkeypatch: pytest.MonkeyPatch):
    decode, decoded = module.matmul.nf4_dequantize, []

    def watched(*args, **options):
        decoded.append(decode(*args, **options))
        return decoded[-1]

    tensor = nf4_of(1000, 64)
    monkeypatch.setattr(module.matmul, "nf4_dequantize", watched)
    F.embedding(torch.tensor([[5, 900, 5]]), tensor)
    assert [rows.shape for rows in decoded] == [(3, 64)]


def test_an_embedding_is_compiled_in_one_graph():
    embedding = nn.Embedding.from_pretrained(torch.empty(30, 64))
    embedding.weight = nn.Parameter(nf4_of(30, 64), requires_grad=False)
    ids = torch.tensor([[3, 29]])
    compiled = torch.compile(embedding, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(ids), embedding(ids))
    with torch.inference_mode():
        assert torch.equal(embedding(ids), embedding.weight.dequantize()[ids])


# -- blank ---------------------------------------------------------------------------------------------------


@BOTH_SCALES
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_new_zeros_are_zeros_of_the_same_kind(quant_type: str, double_quant: bool):
    tensor = nf4_in_rows(double_quant=double_quant, quant_type=quant_type)
    zeros = tensor.new_zeros(3, 5)
    assert isinstance(zeros, NF4Tensor)
    assert (zeros.shape, zeros.dtype, zeros.device) == ((3, 5), tensor.dtype, tensor.device)
    assert torch.equal(zeros.dequantize(), torch.zeros(3, 5))
    assert zeros.parts.keys() == tensor.parts.keys()
    assert not memory(zeros) & memory(tensor)
    assert zeros.codebook is tensor.codebook


def test_new_zeros_take_a_dtype_and_a_device():
    zeros = nf4_of(N, K).new_zeros((3, 5), dtype=torch.bfloat16, device="meta")
    assert (zeros.shape, zeros.dtype, zeros.device) == ((3, 5), torch.bfloat16, torch.device("meta"))
    assert {part.device for part in zeros.parts.values()} == {torch.device("meta")}


@pytest.mark.parametrize("size", [(5,), (2, 3, 4), ()])
def test_new_zeros_of_another_number_of_dimensions_are_refused(size: tuple[int, ...]):
    with pytest.raises(NotImplementedError, match=r"is \(N, K\): .*torch.zeros"):
        nf4_of(N, K).new_zeros(size)


@BOTH_SCALES
@pytest.mark.parametrize("nested_block_size", [1, 2, 5, 6, 256])
@pytest.mark.parametrize("n_parts", [1, 2, 3, 6])
def test_new_zeros_take_any_equal_part_of_the_weight(
    n_parts: int, nested_block_size: int, double_quant: bool
):
    # As FSDP puts the rows of each rank into zeros of that size. A part may begin within a nested block.
    tensor = nf4_in_rows(nested_block_size=nested_block_size, double_quant=double_quant)
    for part in tensor.chunk(n_parts):
        zeros = tensor.new_zeros(part.shape)
        zeros.narrow(0, 0, len(part)).copy_(part)
        assert torch.equal(zeros.dequantize(), part.dequantize())


@BOTH_SCALES
@pytest.mark.parametrize("quant_type", [name for name in QUANT_TYPES if name != "quantile"])
def test_empty_like_is_the_same_but_for_its_memory(quant_type: str, double_quant: bool):
    tensor = nf4_of(N, K, quant_type=quant_type, double_quant=double_quant)
    for other in (torch.empty_like(tensor), torch.empty_like(tensor.to("meta"), device="cpu")):
        assert (other.shape, other.dtype, other.format) == (tensor.shape, tensor.dtype, tensor.format)
        assert other.codebook is tensor.codebook and other.nested_codebook is tensor.nested_codebook
        assert not memory(other) & memory(tensor)
        assert_same(other.copy_(tensor), tensor)
    assert torch.empty_like(tensor, device="meta", dtype=torch.float16).dtype == torch.float16


def test_levels_of_a_weights_own_do_not_come_back_from_the_meta_device():
    with pytest.raises(ValueError, match="'quantile' has no fixed levels"):
        torch.empty_like(nf4_of(N, K, quant_type="quantile").to("meta"), device="cpu")


# -- in modules ----------------------------------------------------------------------------------------------


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
    assert linear.state_dict(keep_vars=True)["weight"] is linear.weight


@BOTH_SCALES
@pytest.mark.parametrize("assign", [True, False])
def test_a_module_loads_it_from_a_state_dict(assign: bool, double_quant: bool):
    source = nf4_of(N, K, dtype=torch.bfloat16, double_quant=double_quant, **SMALL)
    linear = nn.Linear(K, N, bias=False)
    blank = NF4Tensor.from_float(torch.zeros(N, K), double_quant=double_quant, **SMALL)
    linear.weight = nn.Parameter(blank, requires_grad=False)
    before = linear.weight
    assert not linear.load_state_dict({"weight": source}, assign=assign).missing_keys
    assert isinstance(linear.weight, nn.Parameter) and not linear.weight.requires_grad
    assert torch.equal(linear.weight.dequantize(torch.float32), source.dequantize(torch.float32))
    assert (linear.weight is before) == (not assign)
    assert linear.weight.dtype == (torch.bfloat16 if assign else torch.float32)


@BOTH_SCALES
def test_a_module_comes_to_life_from_the_meta_device(double_quant: bool):
    source = nf4_of(N, K, double_quant=double_quant)
    linear = nn.Linear(K, N, bias=False)
    linear.weight = nn.Parameter(source.clone(), requires_grad=False)
    linear.to("meta")
    assert linear.weight.is_meta
    linear.to_empty(device="cpu").load_state_dict({"weight": source})
    assert_same(linear.weight, source)


@pytest.mark.parametrize("quantized", [True, False])
def test_a_module_with_one_kind_of_weight_does_not_load_the_other(quantized: bool):
    ordinary, tensor = nn.Linear(K, N, bias=False), nf4_linear_layer(bias=False)
    module, other = (tensor, ordinary) if quantized else (ordinary, tensor)
    with pytest.raises(RuntimeError, match="copy_ between an NF4Tensor and an ordinary tensor"):
        module.load_state_dict(other.state_dict())


# -- without gradients ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(
    "do",
    [
        lambda t: t.detach(),
        lambda t: t.clone(),
        lambda t: t.to(torch.bfloat16),
        lambda t: t.t(),
        lambda t: t[1:],
        lambda t: t.chunk(2)[1],
        lambda t: t.view(-1).view(6, 12),
        lambda t: nn.Parameter(t, requires_grad=False),
        lambda t: copy.deepcopy(t),
    ],
)
def test_a_weight_made_before_is_moved_and_cut_without_gradients(do: Callable, mode: Callable):
    tensor = nf4_in_rows()
    with mode():
        other = do(tensor)
    assert_same(other, do(tensor))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", PRODUCTS)
def test_a_weight_made_before_is_multiplied_without_gradients(name: str, mode: Callable):
    f, shapes = PRODUCTS[name]
    tensor, operands = nf4_of(N, K, **SMALL), [randn(*shape, seed=i) for i, shape in enumerate(shapes)]
    with mode():
        y = f(tensor, *operands)
    torch.testing.assert_close(y, f(tensor.dequantize(), *operands), rtol=1e-5, atol=1e-5)


def test_state_dict_without_gradients():
    linear = nf4_linear_layer()
    with torch.inference_mode():
        assert_same(linear.state_dict()["weight"], linear.weight)


# -- for the compiler ----------------------------------------------------------------------------------------


@BOTH_SCALES
@pytest.mark.parametrize("change", [lambda t: t, lambda t: t.t(), lambda t: t.view(-1), lambda t: t[1:]])
def test_flattened_for_the_compiler_and_back_it_is_the_same(change: Callable, double_quant: bool):
    tensor = change(nf4_in_rows(dtype=torch.bfloat16, double_quant=double_quant))
    names, context = tensor.__tensor_flatten__()
    inner = {name: getattr(tensor, name) for name in names}
    other = NF4Tensor.__tensor_unflatten__(inner, context, tensor.shape, tensor.stride())
    assert_same(other, tensor)
    assert other.stride() == tensor.stride()


def test_the_compilers_cache_tells_weights_apart_that_need_other_code():
    def frozen(tensor: Tensor) -> Tensor:
        return nn.Parameter(tensor, requires_grad=False)

    weights = {
        "frozen": frozen(nf4_in_rows()),
        "trained": nn.Parameter(nf4_in_rows()),
        "bfloat16": frozen(nf4_in_rows(dtype=torch.bfloat16)),
        "elsewhere": frozen(nf4_in_rows().to("meta")),
        "larger": frozen(nf4_in_rows(7)),
        "scales in float32": frozen(nf4_in_rows(double_quant=False)),
        "other blocks": frozen(nf4_in_rows(block_size=6)),
        "other nested blocks": frozen(nf4_in_rows(nested_block_size=4)),
        "other levels": frozen(nf4_in_rows(quant_type="nf8")),
        "part": frozen(nf4_in_rows(7)[1:]),
        "transposed": frozen(nf4_in_rows().t()),
    }
    hashes = {name: weight._stable_hash_for_caching() for name, weight in weights.items()}
    assert hashes["frozen"] == frozen(nf4_in_rows().clone())._stable_hash_for_caching()
    same = [(a, b) for a in hashes for b in hashes if a < b and hashes[a] == hashes[b]]
    assert not same


# -- what is refused -----------------------------------------------------------------------------------------

OPERATIONS: dict[str, Callable] = {
    "aten.add.Tensor": lambda t: t + 1,
    "aten.sub.Tensor": lambda t: randn(N, K) - t,
    "aten.mul.Tensor": lambda t: 2 * t,
    "aten.div.Tensor": lambda t: t / t,
    "aten.neg.default": lambda t: -t,
    "aten.abs.default": lambda t: t.abs(),
    "aten.sum.default": lambda t: t.sum(),
    "aten.mean.dim": lambda t: t.mean(dim=0),
    "aten.amax.default": lambda t: t.amax(dim=1),
    "aten.std.correction": lambda t: t.std(),
    "aten.linalg_vector_norm.default": lambda t: t.norm(),
    "aten.sort.default": lambda t: t.sort(),
    "aten.bmm.default": lambda t: torch.bmm(t, t),
    "aten.addmv.default": lambda t: torch.addmv(randn(N), t, randn(K)),
    "aten.addmm_.default": lambda t: randn(2, N).addmm_(randn(2, K), t.t()),
    "aten.mm.out": lambda t: torch.mm(randn(2, N), t, out=torch.empty(2, K)),
    "aten.select.int": lambda t: t[0],
    "aten.unbind.int": lambda t: list(t),
    "aten.index.Tensor": lambda t: t[torch.tensor([1])],
    "aten.index_select.default": lambda t: t.index_select(0, torch.tensor([1])),
    "aten.diagonal.default": lambda t: t.diagonal(),
    "aten.unsqueeze.default": lambda t: t.unsqueeze(0),
    "aten.squeeze.default": lambda t: t.squeeze(),
    "aten.expand.default": lambda t: t.expand(2, N, K),
    "aten.repeat.default": lambda t: t.repeat(2, 1),
    "aten.cat.default": lambda t: torch.cat([t, t]),
    "aten.view.dtype": lambda t: t.view(torch.int32),
    "aten.triu.default": lambda t: t.triu(),
    "aten.masked_fill.Scalar": lambda t: t.masked_fill(randn(N, K) > 0, 0.0),
    "aten.mul_.Tensor": lambda t: t.mul_(2),
    "aten.add_.Tensor": lambda t: t.add_(1),
    "aten.zero_.default": lambda t: nn.init.zeros_(t),
    "aten.fill_.Scalar": lambda t: t.fill_(1.0),
    "aten.normal_.default": lambda t: nn.init.normal_(t),
    "aten.resize_.default": lambda t: t.resize_(K, N),
    "aten.eq.Tensor": lambda t: t == t,
    "aten.equal.default": lambda t: torch.equal(t, t),
    "aten.isnan.default": lambda t: t.isnan(),
    "aten.ones_like.default": lambda t: torch.ones_like(t),
    "aten.rand_like.default": lambda t: torch.rand_like(t),
    "aten.new_ones.default": lambda t: t.new_ones(2, 2),
}


@BOTH_SCALES
@pytest.mark.parametrize("name", OPERATIONS)
def test_every_other_operation_is_refused_by_name(name: str, double_quant: bool):
    tensor = nf4_of(N, K, double_quant=double_quant)
    before = tensor.dequantize()
    with pytest.raises(NotImplementedError, match=rf"no {name}: .*Call \.dequantize\(\)"):
        OPERATIONS[name](tensor)
    assert torch.equal(tensor.dequantize(), before)


@pytest.mark.parametrize(
    "pickled", [lambda t: t, lambda t: nn.Parameter(t, requires_grad=False), lambda t: [t]]
)
def test_pickling_is_refused_with_the_way_out(pickled: Callable, tmp_path):
    value = pickled(nf4_of(N, K))
    for save in (pickle.dumps, lambda v: torch.save(v, tmp_path / "weight.pt")):
        with pytest.raises(NotImplementedError, match="not pickled.*safetensors.*flatten_state_dict"):
            save(value)


def test_copy_copy_is_refused_like_pickling():
    with pytest.raises(NotImplementedError, match="safetensors"):
        copy.copy(nf4_of(N, K))


@pytest.mark.parametrize("convert", [lambda t: t.numpy(), lambda t: t.tolist()])
def test_it_is_not_taken_for_its_packed_bytes(convert: Callable):
    with pytest.raises(RuntimeError, match="not supported for tensor subclasses"):
        convert(nf4_of(N, K))


# -- on several processes ------------------------------------------------------------------------------------


class Adapted(nn.Module):
    """A frozen weight and what is trained beside it."""

    def __init__(self, k: int, n: int, seed: int, **options: Any):
        super().__init__()
        frozen = NF4Tensor.from_float(randn(n, k, seed=seed) / k**0.5, **(SMALL | options))
        self.weight = nn.Parameter(frozen, requires_grad=False)
        self.lora_A = nn.Parameter(randn(2, k, seed=seed + 1))
        self.lora_B = nn.Parameter(randn(n, 2, seed=seed + 2))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) + F.linear(F.linear(x, self.lora_A), self.lora_B)


def adapted_net(**options: Any) -> nn.Sequential:
    return nn.Sequential(*(Adapted(k, n, seed=k, **options) for k, n in ((12, 8), (8, 16), (16, 4))))


WORLD = 2
INPUTS = [randn(3, 12, seed=rank) for rank in range(WORLD)]


def step(net: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The output, and the gradients of the input and of what is trained."""
    x = x.clone().requires_grad_()
    y = net(x)
    y.square().sum().backward()
    grads = [p.grad for p in net.parameters() if p.requires_grad]
    grads = [grad.full_tensor() if hasattr(grad, "full_tensor") else grad for grad in grads]
    net.zero_grad()
    return y.detach(), x.grad, [grad.clone() for grad in grads]


def alone(rank: int, **options: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    """What `step` gives a rank, in one process: gradients of parameters are the mean over the ranks."""
    steps = [step(adapted_net(**options), x) for x in INPUTS]
    means = [torch.stack(grads).mean(0) for grads in zip(*(grads for *_, grads in steps), strict=True)]
    return *steps[rank][:2], means


def fully_sharded(net: nn.Sequential, mesh: Any) -> nn.Sequential:
    from torch.distributed.fsdp import fully_shard

    errors: list[ValueError | None] = [None] * WORLD
    error = None
    try:
        for layer in (*net, net):
            fully_shard(layer, mesh=mesh)
    except ValueError as caught:
        error = caught
    torch.distributed.all_gather_object(errors, error)
    for error in filter(None, errors):  # on every rank, or the others would wait for that one
        raise error
    return net


def multiply_some_rows(rank: int, mesh: Any) -> Any:
    whole = nf4_of(16, 12, **SMALL)
    rows = nn.Parameter(whole.chunk(WORLD)[rank], requires_grad=False)
    x = INPUTS[0].clone().requires_grad_()
    y = F.linear(x, rows)
    y.sum().backward()
    gathered = [torch.empty_like(y) for _ in range(WORLD)]
    torch.distributed.all_gather(gathered, y.detach())
    torch.distributed.all_reduce(x.grad)
    return torch.cat(gathered, dim=1), x.grad


def train_sharded(rank: int, mesh: Any, **options: Any) -> Any:
    net = fully_sharded(adapted_net(**options), mesh)
    held = net[0].weight.to_local()
    steps = [step(net, INPUTS[rank]) for _ in range(2)]  # of which the second reuses what was gathered
    return steps, held.dequantize(), held.nbytes


def train_on_one_rank(rank: int, mesh: Any) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (WORLD, 1), mesh_dim_names=("replicated", "sharded"))
    return [step(fully_sharded(adapted_net(), mesh), INPUTS[rank])]


def load_sharded_from_meta(rank: int, mesh: Any) -> Any:
    net = fully_sharded(adapted_net().to("meta"), mesh)
    net.to_empty(device="cpu").load_state_dict(fully_sharded(adapted_net(), mesh).state_dict())
    return [step(net, INPUTS[rank])]


def shard_seven_rows(rank: int, mesh: Any) -> Any:
    step(fully_sharded(nn.Sequential(Adapted(12, 7, seed=0)), mesh), INPUTS[rank])


def shard_within_a_block(rank: int, mesh: Any) -> Any:
    fully_sharded(nn.Sequential(Adapted(11, 6, seed=0)), mesh)


SHARDED: dict[str, Callable] = {
    "rows": multiply_some_rows,
    "double_quant": lambda *a: train_sharded(*a),
    "nested blocks of two layers": lambda *a: train_sharded(*a, nested_block_size=4),
    "nested blocks beyond a rank": lambda *a: train_sharded(*a, nested_block_size=256),
    "scales in float32": lambda *a: train_sharded(*a, double_quant=False),
    "bytes": lambda *a: train_sharded(*a, quant_type="nf8"),
    "one rank": train_on_one_rank,
    "from meta": load_sharded_from_meta,
    "seven rows": shard_seven_rows,
    "within a block": shard_within_a_block,
}


def on_each_rank(rank: int, folder: str) -> None:
    """Do all of SHARDED in a process of WORLD, and leave what came of it in `folder`."""
    from torch.distributed.device_mesh import init_device_mesh

    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/rendezvous"
    torch.distributed.init_process_group(
        "gloo", init_method=rendezvous, rank=rank, world_size=WORLD, timeout=timedelta(seconds=30)
    )
    try:
        mesh, results = init_device_mesh("cpu", (WORLD,)), {}
        for name, do in SHARDED.items():
            try:
                results[name] = do(rank, mesh)
            except Exception as error:
                results[name] = f"{type(error).__name__}: {error}"
            torch.distributed.barrier()
        torch.save(results, f"{folder}/{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What came of SHARDED on each rank: a result, or the text of an error."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(on_each_rank, args=(str(folder),), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


def assert_steps_near(steps: list[tuple], expected: tuple) -> None:
    for y, grad_x, grads in steps:
        for a, b in zip([y, grad_x, *grads], [*expected[:2], *expected[2]], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * b.abs().max().item())


def test_each_process_multiplies_its_rows_and_all_have_the_product(ranks: list[dict[str, Any]]):
    w = nf4_of(16, 12, **SMALL).dequantize()
    for rank in range(WORLD):
        y, grad_x = ranks[rank]["rows"]
        torch.testing.assert_close(y, INPUTS[0] @ w.t(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(grad_x, w.sum(0).expand(3, 12), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "name, options",
    [
        ("double_quant", {}),
        ("nested blocks of two layers", {"nested_block_size": 4}),
        ("nested blocks beyond a rank", {"nested_block_size": 256}),
        ("scales in float32", {"double_quant": False}),
        ("bytes", {"quant_type": "nf8"}),
    ],
)
def test_fully_sharded_layers_train_as_whole_ones_do(name: str, options: dict, ranks: list[dict[str, Any]]):
    whole = adapted_net(**options)[0].weight
    for rank in range(WORLD):
        assert not isinstance(ranks[rank][name], str), ranks[rank][name]
        steps, rows, n_bytes = ranks[rank][name]
        assert torch.equal(rows, whole.dequantize().chunk(WORLD)[rank])
        assert n_bytes < whole.nbytes
        assert_steps_near(steps, alone(rank, **options))


@pytest.mark.parametrize("name", ["one rank", "from meta"])
def test_fully_sharded_layers_train_wherever_they_come_from(name: str, ranks: list[dict[str, Any]]):
    for rank in range(WORLD):
        assert not isinstance(ranks[rank][name], str), ranks[rank][name]
        assert_steps_near(ranks[rank][name], alone(rank))


@pytest.mark.parametrize(
    "name, message",
    [
        ("seven rows", "a (7, 12) NF4Tensor cannot be sharded over 2 ranks: its rows do not divide evenly"),
        ("within a block", "where a block of 4 begins, but not before row 3"),
    ],
)
def test_rows_that_cannot_be_shared_out_are_refused_on_every_rank(name, message, ranks):
    for rank in range(WORLD):
        assert ranks[rank][name].startswith("ValueError: ") and message in ranks[rank][name]


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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@BOTH_SCALES
def test_it_moves_to_a_gpu_through_pinned_memory(double_quant: bool):
    tensor = nf4_in_rows(double_quant=double_quant)
    pinned = tensor.pin_memory()
    assert pinned.is_pinned() and not tensor.is_pinned()
    assert_same(pinned, tensor)
    there = pinned.to("cuda", non_blocking=True)
    assert {part.device.type for part in there.parts.values()} == {"cuda"}
    assert there.codebook is levels("nf4", "cuda:0")
    assert_same(there.cpu(), tensor)
    linear = nn.Linear(12, 6, bias=False)
    linear.weight = nn.Parameter(tensor, requires_grad=False)
    assert linear.cuda().weight.is_cuda


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", PRODUCTS)
def test_products_on_a_gpu_are_those_of_the_dense_matrix(name: str):
    f, shapes = PRODUCTS[name]
    tensor = nf4_of(N, K, **SMALL).cuda()
    on_gpu = [randn(*shape, seed=i).cuda() for i, shape in enumerate(shapes)]
    torch.testing.assert_close(f(tensor, *on_gpu), f(tensor.dequantize(), *on_gpu), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_matmul_by_keywords_is_matmul_and_out_is_refused(mode: Any) -> None:
    w, x, out = nf4_of(64, 64), randn(3, 64), torch.zeros(3, 64)
    with mode():
        torch.testing.assert_close(torch.matmul(input=x, other=w), x @ w.dequantize())
        with pytest.raises(NotImplementedError, match="mm.out"):
            torch.matmul(x, w, out=out)
