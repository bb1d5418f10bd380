"""The product: that of the decoded matrix whatever the tiles, with gradients, keeping only what is packed."""

import math
import re
import threading

import pytest
import torch
import torch.nn.functional as F
from test_compile import inductor
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache, run_and_get_code

from minqlora import matmul
from minqlora import quantize as quantization
from minqlora.codebook import QUANT_TYPES, dynamic_map, levels
from minqlora.matmul import (
    ROWS,
    cast_linear,
    cast_linear_backward,
    nf4_dequantize,
    nf4_linear,
    nf4_linear_backward,
    numbers_of_rows,
    product,
)
from minqlora.quantize import codes_per_byte, dequantize_scales, quantize, quantize_scales

N, K = 10, 12  # blocks of 64 run over the ends of rows, and the last one is short
SHAPES = [(10, 12), (7, 9), (3, 128), (5, 1), (1, 5), (65, 2), (9, 100)]
# A tile of one granule, of a few rows, and of the whole weight.
TILES = [1, 800, 2**23]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def pack(
    shape: tuple[int, int], block_size: int = 64, double_quant: bool = True, quant_type: str = "nf4"
) -> tuple:
    """What the operators take after x: packed, scales, codebook, shape, block_size, nested_block_size."""
    packed, absmax = quantize(randn(*shape, seed=math.prod(shape)), levels(quant_type), block_size)
    scales = [absmax]
    if double_quant:
        offset = absmax.mean()
        codes, nested_absmax = quantize_scales(absmax, offset, dynamic_map(), 4)
        scales = [codes, nested_absmax, dynamic_map(), offset]
    return packed, scales, levels(quant_type), shape, block_size, 4


def decoded(parts: tuple, dtype: torch.dtype = torch.float32) -> Tensor:
    return nf4_dequantize(*parts, dtype=dtype)


def decoded_by_hand(parts: tuple) -> Tensor:
    """The weight from the definition: the level of each code times the scale of its block, float32."""
    packed, scales, codebook, shape, block_size, *nested = parts
    absmax = scales[0] if len(scales) == 1 else dequantize_scales(*scales, *nested)
    codes = torch.stack([packed >> 4, packed & 15], 1).flatten() if codes_per_byte(codebook) == 2 else packed
    n = math.prod(shape)
    return (codebook[codes[:n].int()] * absmax.repeat_interleave(block_size)[:n]).view(shape)


def saved_tensors(f, *args) -> list[Tensor]:
    """The tensors that `f(*args)` saves for its backward pass."""
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        f(*args)
    return kept


# -- decoding by tiles ---------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("error")  # torch only warns where an output is too large, and makes it smaller
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block_size", [2, 6, 64])
def test_tiles_decode_to_the_bits_of_the_whole(shape, block_size, tile, monkeypatch):
    parts = pack(shape, block_size)
    expected = decoded_by_hand(parts)
    monkeypatch.setattr(matmul, "TILE", tile)
    assert torch.equal(decoded(parts), expected)
    assert torch.equal(decoded(parts, torch.bfloat16), expected.bfloat16())


@pytest.mark.parametrize("window", [1, 3, 5])
@pytest.mark.parametrize("tile", [1, 30, 2**21])
@pytest.mark.parametrize("double_quant", [True, False])
def test_scales_are_decoded_in_windows_of_any_size(double_quant, tile, window, monkeypatch):
    parts = pack((11, 9), block_size=4, double_quant=double_quant)
    monkeypatch.setattr(matmul, "TILE", tile)
    monkeypatch.setattr(matmul, "WINDOW", window)
    assert torch.equal(decoded(parts), decoded_by_hand(parts))


@pytest.mark.parametrize("run", [2, 6, 64])
@pytest.mark.parametrize("shape", [(11, 9), (5, 1), (3, 128)])
def test_tiles_are_decoded_in_runs_of_any_size(shape, run, monkeypatch):
    parts = pack(shape, block_size=4)
    monkeypatch.setattr(matmul, "TILE", 30 * 4)
    monkeypatch.setattr(quantization, "RUN", run)
    assert torch.equal(decoded(parts), decoded_by_hand(parts))


@pytest.mark.parametrize("tile", [1, 40, 2**21])
@pytest.mark.parametrize("quant_type", [name for name, fixed in QUANT_TYPES.items() if fixed is not None])
def test_codes_of_any_width_decode_and_multiply(quant_type: str, tile: int, monkeypatch):
    monkeypatch.setattr(matmul, "TILE", tile)
    parts = pack((11, 9), block_size=4, quant_type=quant_type)
    w = decoded_by_hand(parts)
    assert torch.equal(decoded(parts), w)
    x, w = randn(3, 9, dtype=torch.float64), w.double()
    torch.testing.assert_close(nf4_linear(x, *parts), x @ w.T, rtol=0, atol=1e-12)


@pytest.mark.parametrize("nested_first", [1, 2, 3])
@pytest.mark.parametrize("tile", [1, 20, 2**21])
def test_scales_may_begin_within_a_nested_block(tile: int, nested_first: int, monkeypatch):
    # Of rows of one block, the last ones: the scales before them are those of the rows left out.
    packed, (codes, nested_absmax, *rest), codebook, shape, *sizes = parts = pack((11, 8), block_size=8)
    expected = decoded_by_hand(parts)[nested_first:]
    some_scales = [codes[nested_first:], nested_absmax, *rest]
    some = (packed[nested_first * 4 :], some_scales, codebook, tuple(expected.shape), *sizes, nested_first)
    monkeypatch.setattr(matmul, "TILE", tile)
    assert torch.equal(decoded(some), expected)
    x, w = randn(3, 8, dtype=torch.float64).requires_grad_(), expected.double()
    y = nf4_linear(x, *some)
    torch.testing.assert_close(y, x @ w.T, rtol=0, atol=1e-12)
    (grad_x,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(grad_x, w.sum(0).expand(3, 8), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoding_writes_to_an_out_that_is_not_contiguous(dtype: torch.dtype, monkeypatch):
    monkeypatch.setattr(matmul, "TILE", 1)
    parts = pack((70, 3))
    out = torch.full((3, 140), float("nan"), dtype=dtype).T[::2]
    assert nf4_dequantize(*parts, dtype=dtype, out=out) is out
    assert torch.equal(out, decoded(parts, dtype))


def test_decoding_leaves_what_lies_beside_an_out_alone():
    parts, frame = pack((7, 9)), torch.full((9, 9), -5.0)
    nf4_dequantize(*parts, dtype=torch.float32, out=frame[1:8])  # begins at an odd place in memory
    assert torch.equal(frame[1:8], decoded(parts))
    assert torch.equal(frame[[0, 8]], torch.full((2, 9), -5.0))


# -- what accelerators are given -----------------------------------------------------------------------------


def fused(parts: tuple, dtype: torch.dtype) -> Tensor:
    """The weight decoded by the function that is compiled to one kernel on an accelerator."""
    packed, scales, codebook, shape, *sizes = parts
    nested_first = sizes[2] if len(sizes) == 3 else 0
    out = matmul.decode_fused(packed, scales, codebook, math.prod(shape), *sizes[:2], nested_first, dtype)
    return out.view(shape)


@pytest.fixture(params=matmul.LOOK_UPS)
def look_up(request, monkeypatch) -> str:
    monkeypatch.setattr(matmul, "fastest_look_up", lambda device: request.param)
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_expression_for_accelerators_decodes_to_the_same_bits(shape, double_quant, dtype, look_up):
    parts = pack(shape, double_quant=double_quant)
    with torch.compiler.set_stance("force_eager"):
        assert torch.equal(fused(parts, dtype), decoded(parts, dtype))


@pytest.mark.parametrize("quant_type", ["nf2", "nf3", "nf8"])
def test_expression_for_accelerators_decodes_codes_of_any_width(quant_type: str, look_up):
    parts = pack((7, 9), quant_type=quant_type)
    with torch.compiler.set_stance("force_eager"):
        assert torch.equal(fused(parts, torch.bfloat16), decoded(parts, torch.bfloat16))


@pytest.mark.parametrize("nested_first", [1, 2, 3])
def test_expression_for_accelerators_may_begin_within_a_nested_block(nested_first: int, look_up):
    packed, (codes, *nested), codebook, _, *sizes = pack((11, 8), block_size=8)
    scales, shape = [codes[nested_first:], *nested], (11 - nested_first, 8)
    parts = packed[4 * nested_first :], scales, codebook, shape, *sizes, nested_first
    with torch.compiler.set_stance("force_eager"):
        assert torch.equal(fused(parts, torch.float32), decoded(parts))


@pytest.mark.parametrize("shape", [(10, 24), (3, 512), (9, 104)])
@pytest.mark.parametrize("double_quant", [True, False])
def test_expression_for_one_token_is_the_product_with_the_decoded_matrix(shape, double_quant, look_up):
    packed, scales, codebook, _, *sizes = parts = pack(shape, double_quant=double_quant)
    x = randn(1, shape[1])
    with torch.compiler.set_stance("force_eager"):
        y = matmul.multiply_fused(x, packed, scales, codebook, *sizes, 0)
        rounded = matmul.multiply_fused(x.bfloat16(), packed, scales, codebook, *sizes, 0)
    torch.testing.assert_close(y, x @ decoded(parts).T, rtol=0, atol=1e-4)
    expected = x.bfloat16().float() @ decoded(parts).T
    torch.testing.assert_close(rounded, expected.bfloat16(), rtol=2**-7, atol=1e-4)  # rounded once


def test_a_cpu_does_not_measure_how_to_look_up(monkeypatch):
    monkeypatch.setattr(matmul, "compiled_decode", None)
    assert matmul.fastest_look_up(torch.device("cpu")) in matmul.LOOK_UPS


@pytest.mark.parametrize(
    ("broken", "left"),
    [
        ({}, {"gather", "pairs", "tree"}),
        ({"pairs": lambda *_: (_ for _ in ()).throw(RuntimeError("no backend"))}, {"gather", "tree"}),
        ({"tree": lambda packed, *_: torch.zeros(len(packed), dtype=torch.int32)}, {"gather", "pairs"}),
    ],
)
def test_a_look_up_that_does_not_compile_or_errs_is_left_out(broken: dict, left: set[str], monkeypatch):
    original = matmul.compiled_decode
    monkeypatch.setattr(matmul, "compiled_decode", lambda *how: broken.get(how[-1]) or original(*how))
    with torch.compiler.set_stance("force_eager"):
        assert set(matmul.time_look_ups(torch.device("cpu"), n=2**15)) == left


@inductor
def test_compiled_decoding_gives_the_bits_of_eager_by_a_graph_for_each_size(look_up):
    # Whole blocks: of a loop that it splits at them, Inductor's C++ leaves out the rest (torch 2.13).
    torch._dynamo.reset()
    matmul.compiled_decode.cache_clear()
    counters["stats"].clear()
    for shape in ((96, 128), (64, 192), (40, 64), (8, 64)):  # of which two are of one size
        parts = pack(shape)
        assert torch.equal(fused(parts, torch.bfloat16), decoded(parts, torch.bfloat16))
    assert counters["stats"]["unique_graphs"] == 3


@inductor
@pytest.mark.parametrize("look_up", matmul.LOOK_UPS)
def test_compiled_decoding_is_one_kernel(look_up: str):
    matmul.compiled_decode.cache_clear()
    torch._dynamo.reset()
    packed, scales, codebook, *_ = pack((96, 128))
    decode = matmul.compiled_decode(len(packed), 64, 4, 0, torch.bfloat16, look_up)
    with fresh_cache():
        _, (code,) = run_and_get_code(decode, packed, scales, matmul.levels_for(look_up, codebook))
    assert code.count("async_compile.cpp_pybinding(") == 1


@inductor
@pytest.mark.parametrize(
    ("look_up", "dtype"),
    [
        ("gather", torch.float32),
        ("gather", torch.float16),
        ("gather", torch.bfloat16),
        ("pairs", torch.bfloat16),
        ("tree", torch.bfloat16),
    ],
    indirect=["look_up"],
)
def test_compiled_product_of_one_token_writes_no_decoded_weight(dtype: torch.dtype, look_up: str):
    packed, scales, codebook, *_ = parts = pack((12, 4096))
    frame = randn(1, 4097).to(dtype)  # x begins where no eight bytes do
    with fresh_cache():
        y, (code,) = run_and_get_code(matmul.multiply_fused, frame[:, 1:], packed, scales, codebook, 64, 4, 0)
    expected = frame[:, 1:].float() @ decoded(parts).T
    torch.testing.assert_close(y, expected.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-3)
    buffers = re.findall(r"empty_strided_cpu\(\(([^)]*)\)", code)
    sizes = [math.prod(int(size) for size in re.findall(r"\d+", buffer)) for buffer in buffers]
    assert sizes and max(sizes) <= 12 * 4096 / 8  # of a word's weights, their sum at most


def test_worked_example_of_the_docstring():
    packed, absmax = quantize(torch.tensor([[0.30, -0.02, 0.11, -0.40]]), levels("nf4"), 4)
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0]], requires_grad=True)
    y = nf4_linear(x, packed, [absmax], levels("nf4"), (1, 4), 4, 256)
    y.backward(torch.ones(1, 1))
    assert round(y.item(), 4) == -1.0883
    assert [round(number, 4) for number in x.grad[0].tolist()] == [0.2892, -0.0364, 0.0984, -0.4]


# -- the product ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_product_and_gradient_are_those_of_the_decoded_matrix(shape, double_quant, tile, monkeypatch):
    monkeypatch.setattr(matmul, "TILE", tile)
    parts = pack(shape, double_quant=double_quant)
    w = decoded(parts, torch.float64)
    x = randn(4, shape[1], dtype=torch.float64).requires_grad_()
    grad_y = randn(4, shape[0], seed=1, dtype=torch.float64)
    y = nf4_linear(x, *parts)
    (grad_x,) = torch.autograd.grad(y, x, grad_y)
    # In float64, where tiles differ from the whole by the order of sums only: a hundred terms of some 1e-16.
    torch.testing.assert_close(y, x @ w.T, rtol=0, atol=1e-12)
    torch.testing.assert_close(grad_x, grad_y @ w, rtol=0, atol=1e-12)


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("n", [0, 1, 56, 63, 224, 300, 479, 480, 512, 991, 992, 1024, 1100, 2100])
def test_product_of_any_number_of_rows(n: int, is_transposed: bool):
    weight = torch.randn(48, 40) if not is_transposed else torch.randn(40, 48).T
    x, base = torch.randn(n, 40), torch.randn(n, 96)
    expected = (x.double() @ weight.double().T).float()
    torch.testing.assert_close(product(x, weight), expected, rtol=1e-5, atol=1e-5)
    out = base.clone()
    product(x, weight, out=out[:, ::2])
    torch.testing.assert_close(out[:, ::2], expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(out[:, 1::2], base[:, 1::2])
    product(x, weight, out=out[:, 1::2], add=True)
    torch.testing.assert_close(out[:, 1::2], expected + base[:, 1::2], rtol=1e-5, atol=1e-5)


def test_rows_are_filled_up_where_few_are_missing():
    for n in range(1, 3000):
        numbers = numbers_of_rows(n)
        assert -32 <= n - sum(numbers) < 56
        assert all(number in ROWS for number in numbers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_tile_gives_the_bits_of_a_dense_layer(dtype: torch.dtype):
    parts = pack((N, K))
    x = randn(5, K, dtype=dtype).requires_grad_()
    theirs = x.detach().clone().requires_grad_()
    y, expected = nf4_linear(x, *parts), F.linear(theirs, decoded(parts, dtype))
    assert y.dtype == dtype
    assert torch.equal(y, expected)
    y.sin().sum().backward()
    expected.sin().sum().backward()
    assert torch.equal(x.grad, theirs.grad)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("shape", SHAPES)
def test_backward_product_alone_is_that_of_the_decoded_matrix(shape, tile, monkeypatch):
    monkeypatch.setattr(matmul, "TILE", tile)
    parts, grad_y = pack(shape), randn(4, shape[0], dtype=torch.float64)
    expected = grad_y @ decoded(parts, torch.float64)
    torch.testing.assert_close(nf4_linear_backward(grad_y, *parts), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("tiles", [1, 4])
def test_tiles_in_bfloat16_round_once_each(tiles: int, monkeypatch):
    monkeypatch.setattr(matmul, "TILE", 192 * 64 * 2 // tiles)
    parts = pack((192, 64))
    w = decoded(parts, torch.bfloat16).double()
    x = randn(8, 64, dtype=torch.bfloat16).requires_grad_()
    grad_y = randn(8, 192, seed=1, dtype=torch.bfloat16)
    y = nf4_linear(x, *parts)
    (grad_x,) = torch.autograd.grad(y, x, grad_y)
    # bfloat16 has 8 bits: a number under 64 is rounded by no more than 1/8. The 1e-3 is for sums in float32.
    assert max((x.double() @ w.T).abs().max(), (grad_y.double() @ w).abs().max()) < 60
    assert (y.double() - x.double() @ w.T).abs().max() <= 1 / 8 + 1e-3
    assert (grad_x.double() - grad_y.double() @ w).abs().max() <= tiles / 8 + 1e-3


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 1, 3), (0,), (2, 0)])
def test_any_number_of_leading_dimensions(lead: tuple[int, ...]):
    parts = pack((N, K))
    x = randn(*lead, K).requires_grad_()
    y = nf4_linear(x, *parts)
    y.square().sum().backward()
    assert y.shape == (*lead, N)
    expected = x.detach().reshape(-1, K) @ decoded(parts).T
    torch.testing.assert_close(y.reshape(-1, N), expected)
    torch.testing.assert_close(x.grad.reshape(-1, K), 2 * expected @ decoded(parts))


def test_inputs_and_gradients_that_are_not_contiguous():
    parts = pack((N, K))
    x = randn(K, 6).T[::2].requires_grad_()
    y = nf4_linear(x, *parts)
    torch.testing.assert_close(y, x @ decoded(parts).T)
    (grad_x,) = torch.autograd.grad(y.sum(), x)  # of ones, expanded from a single number
    torch.testing.assert_close(grad_x, decoded(parts).sum(0).expand(3, K))


def test_an_input_of_another_width_is_refused():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        nf4_linear(randn(3, K + 1), *pack((N, K)))


def test_gradients_are_those_of_finite_differences(monkeypatch):
    monkeypatch.setattr(matmul, "TILE", 1)
    parts = pack((5, 3), block_size=2)
    x = randn(2, 3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: nf4_linear(x, *parts), x)


def test_nothing_uninitialized_reaches_a_result(monkeypatch):
    monkeypatch.setattr(matmul, "TILE", 1)
    parts, weight = pack((65, 2)), randn(65, 2, dtype=torch.float16)
    x = randn(3, 2).requires_grad_()
    torch.use_deterministic_algorithms(True)  # which fills what torch.empty gives with NaN
    try:
        assert torch.empty(1).isnan()
        y = nf4_linear(x, *parts) + cast_linear(x, weight)
        y.sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert y.isfinite().all()
    assert x.grad.isfinite().all()


# -- the scratch ---------------------------------------------------------------------------------------------


def scratch_bytes() -> int:
    """What this thread's buffers hold together."""
    return sum(buffer.nbytes for buffer in vars(quantization._scratch).values())


def test_the_scratch_holds_one_tile(monkeypatch):
    # Of 64 rows of four in tiles of 64 bytes, no more than four rows are ever decoded at a time.
    seen: list[Tensor] = []
    decode = matmul.dequantize

    def watched(packed, absmax, codebook, block_size, out, first=0):
        seen.append(out)
        return decode(packed, absmax, codebook, block_size, out, first)

    monkeypatch.setattr(matmul, "TILE", 64)
    monkeypatch.setattr(matmul, "dequantize", watched)
    x = randn(2, 4).requires_grad_()
    nf4_linear(x, *pack((64, 4), block_size=16)).sum().backward()
    assert [len(tile) for tile in seen] == [4] * 32
    assert len({tile.data_ptr() for tile in seen}) == 1
    assert [len(tile) for _, tile in matmul._cast_tiles(randn(10, 4), torch.float64)] == [2] * 5


def test_a_tile_of_rows_of_odd_width_begins_with_a_byte(monkeypatch):
    # Three numbers would be one row of three, and the second row begins in the middle of a byte.
    seen: list[tuple[int, int]] = []
    decode = matmul.dequantize

    def watched(packed, absmax, codebook, block_size, out, first=0):
        seen.append((len(out), first))
        return decode(packed, absmax, codebook, block_size, out, first)

    monkeypatch.setattr(matmul, "TILE", 3 * 8)
    monkeypatch.setattr(matmul, "dequantize", watched)
    parts = pack((5, 3), block_size=4)
    x = randn(2, 3, dtype=torch.float64)
    torch.testing.assert_close(nf4_linear(x, *parts), x @ decoded(parts, torch.float64).T)
    # Tiles of 6, 6 and 3 numbers; the second begins two numbers into the block of numbers 4 to 7.
    assert seen[:3] == [(2, 0), (2, 2), (1, 0)]


@pytest.mark.parametrize(
    "dtypes",
    [[torch.float32], [torch.bfloat16], [torch.float32, torch.bfloat16]],
    ids=["fp32", "bf16", "both"],
)
@pytest.mark.parametrize("quant_type", ["nf4", "nf8"])
@pytest.mark.parametrize("shape", [(2048, 4096), (1025, 4097), (105, 20001), (2**21, 1)])
def test_the_scratch_of_a_thread_stays_under_16_mib(shape, quant_type, dtypes, monkeypatch):
    monkeypatch.setattr(quantization, "_scratch", threading.local())  # as in a thread that begins
    n, codebook = math.prod(shape), levels(quant_type)
    n_blocks = -(-n // 64)
    packed = torch.zeros(-(-n // codes_per_byte(codebook)), dtype=torch.uint8)
    nested = [torch.ones(-(-n_blocks // 256)), dynamic_map(), torch.zeros(())]
    parts = (packed, [torch.zeros(n_blocks, dtype=torch.uint8), *nested], codebook, shape, 64, 256)
    for dtype in dtypes:
        x = randn(1, shape[1], dtype=dtype).requires_grad_()
        nf4_linear(x, *parts).sum().backward()
    assert 2**21 < scratch_bytes() < 2**24


def test_a_larger_weight_needs_no_larger_scratch(monkeypatch):
    monkeypatch.setattr(quantization, "_scratch", threading.local())
    monkeypatch.setattr(matmul, "TILE", 64)
    monkeypatch.setattr(matmul, "WINDOW", 4)
    few, many = (pack((n_rows, 8), block_size=8) for n_rows in (64, 640))
    vars(quantization._scratch).clear()  # of what quantizing used
    nf4_linear(randn(2, 8), *few)
    held = scratch_bytes()
    nf4_linear(randn(2, 8), *many)
    assert scratch_bytes() == held > 0


def test_threads_do_not_share_a_scratch(monkeypatch):
    # Many small tiles, so that threads would overwrite each other's if there were one buffer for all.
    monkeypatch.setattr(matmul, "TILE", 64)
    problems = [(randn(4, 16, seed=seed), pack((96 + seed, 16), block_size=16)) for seed in range(4)]
    expected = [nf4_linear(x, *parts) for x, parts in problems]
    wrong: list[int] = []

    def work(i: int) -> None:
        x, parts = problems[i]
        for _ in range(30):
            if not torch.equal(nf4_linear(x, *parts), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_product_without_gradients_leaves_a_scratch_that_training_can_use(monkeypatch):
    monkeypatch.setattr(quantization, "_scratch", threading.local())
    parts, x = pack((N, K)), randn(3, K).requires_grad_()
    with torch.inference_mode():
        expected = nf4_linear(randn(3, K), *parts)
    y = nf4_linear(x, *parts)
    y.sum().backward()
    assert torch.equal(y, expected)


@pytest.mark.parametrize("again", ["decoded", "multiplied"])
def test_a_result_is_not_the_scratch_that_the_next_call_overwrites(again: str):
    parts, other = pack((N, K)), pack((N, K), block_size=2)
    w, y = decoded(parts), nf4_linear(randn(3, K), *parts)
    before = w.clone(), y.clone()
    _ = decoded(other) if again == "decoded" else nf4_linear(randn(3, K, seed=5), *other)
    assert torch.equal(w, before[0]) and torch.equal(y, before[1])


# -- the 16-bit weight under another dtype -------------------------------------------------------------------


@pytest.mark.parametrize("tile", [1, 30, 2**21])
@pytest.mark.parametrize("lead", [(), (4,), (2, 3), (0,)])
def test_cast_product_and_gradient_are_those_of_the_cast_matrix(lead, tile, monkeypatch):
    monkeypatch.setattr(matmul, "TILE", tile)
    weight = randn(N, K, dtype=torch.bfloat16)
    x = randn(*lead, K, dtype=torch.float64).requires_grad_()
    grad_y = randn(*lead, N, seed=1, dtype=torch.float64)
    y = cast_linear(x, weight)
    (grad_x,) = torch.autograd.grad(y, x, grad_y)
    torch.testing.assert_close(y, x @ weight.double().T, rtol=0, atol=1e-12)
    torch.testing.assert_close(grad_x, grad_y @ weight.double(), rtol=0, atol=1e-12)
    assert torch.equal(cast_linear_backward(grad_y, weight), grad_x)


def test_cast_product_of_equal_dtypes_is_a_plain_linear():
    weight, x = randn(N, K).requires_grad_(), randn(3, K)
    assert torch.equal(cast_linear(x, weight), F.linear(x, weight))
    assert cast_linear(x, weight).requires_grad
    assert torch.equal(cast_linear_backward(randn(3, N), weight), randn(3, N) @ weight)


def test_cast_product_takes_a_weight_that_is_not_contiguous(monkeypatch):
    monkeypatch.setattr(matmul, "TILE", 100)
    weight = randn(K, N, dtype=torch.bfloat16).T
    torch.testing.assert_close(cast_linear(randn(3, K), weight), randn(3, K) @ weight.float().T)


# -- what is saved -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("double_quant", [True, False])
def test_backward_saves_only_packed_tensors(double_quant: bool):
    parts = pack((N, K), double_quant=double_quant)
    packed, scales, codebook, *_ = parts
    kept = saved_tensors(nf4_linear, randn(3, K).requires_grad_(), *parts)
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in (packed, codebook, *scales)}


def test_backward_of_a_cast_saves_only_the_16_bit_weight():
    weight = randn(N, K, dtype=torch.bfloat16)
    kept = saved_tensors(cast_linear, randn(3, K).requires_grad_(), weight)
    assert [t.data_ptr() for t in kept] == [weight.data_ptr()]


def test_a_dequantized_weight_would_have_been_seen():
    w = decoded(pack((N, K)))
    kept = saved_tensors(F.linear, randn(3, K).requires_grad_(), w)
    assert any(t.data_ptr() == w.data_ptr() for t in kept)


# -- the operators in the eyes of torch ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operators_keep_what_they_promise_the_compiler(dtype: torch.dtype):
    packed, scales, codebook, shape, *sizes = pack((N, K))
    rest = (packed, scales, codebook, *shape, *sizes, 0)
    ops = torch.ops.minqlora
    torch.library.opcheck(ops.nf4_dequantize.default, (*rest, dtype))
    torch.library.opcheck(ops.nf4_linear.default, (randn(3, K, dtype=dtype).requires_grad_(), *rest))
    torch.library.opcheck(ops.nf4_linear_backward.default, (randn(3, N, dtype=dtype), *rest))
    weight = randn(N, K, dtype=torch.float16)
    torch.library.opcheck(ops.cast_linear.default, (randn(3, K, dtype=dtype).requires_grad_(), weight))
    torch.library.opcheck(ops.cast_linear_backward.default, (randn(3, N, dtype=dtype), weight))


# -- the other device ----------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("shape", [(10, 12), (7, 9), (96, 128)])
def test_a_gpu_decodes_to_the_same_bits_and_multiplies_as_well(shape):
    packed, scales, codebook, *rest = parts = pack(shape)
    there = (packed.cuda(), [scale.cuda() for scale in scales], codebook.cuda(), *rest)
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(decoded(there, dtype).cpu(), decoded(parts, dtype))
    x = randn(4, shape[1]).cuda().requires_grad_()
    y = nf4_linear(x, *there)
    y.sum().backward()
    torch.testing.assert_close(y.cpu(), x.detach().cpu() @ decoded(parts).T, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x.grad.cpu(), decoded(parts).sum(0).expand(4, -1), rtol=1e-4, atol=1e-4)


def test_a_trained_weight_of_another_dtype_gets_its_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 8, generator=generator).bfloat16().requires_grad_()
    weight = torch.randn(6, 8, generator=generator).requires_grad_()
    cast_linear(x, weight).float().square().sum().backward()
    y = (x.detach().float() @ weight.detach().bfloat16().float().T).bfloat16().float()
    torch.testing.assert_close(weight.grad, 2 * y.T @ x.detach().float(), rtol=0.02, atol=0.1)
    assert x.grad is not None
