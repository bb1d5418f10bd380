"""Blocks, codes and scales: bit for bit those of bitsandbytes, and the nearest levels by brute force."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from minqlora import quantize as module
from minqlora.codebook import dynamic_map, levels, thresholds
from minqlora.quantize import byte_table, dequantize, dequantize_scales, quantize

bnb = pytest.importorskip("bitsandbytes.functional")

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
FLOATS = list(DTYPES.values())
GOLDEN = [f"{kind}_{dtype}" for kind in ("randn", "heavy", "odd", "plain", "bs128") for dtype in DTYPES]
GOLDEN += ["ties_f32", "zeroblock_f32"]


def codes_of(packed: Tensor, n: int) -> Tensor:
    """The codes that n numbers were packed as, read as FORMATS has it: first of a pair in the high nibble."""
    return torch.tensor([nibble for byte in packed.tolist() for nibble in (byte // 16, byte % 16)][:n])


def decode(packed: Tensor, absmax: Tensor, shape: tuple[int, ...], block_size: int, dtype=torch.float32):
    return dequantize(packed, absmax, levels("nf4"), block_size, torch.empty(shape, dtype=dtype))


def bnb_decode(packed: Tensor, absmax: Tensor, shape: tuple[int, ...], block_size: int, dtype=torch.float32):
    # As one row of an even number of weights, because bitsandbytes' CPU kernel with AVX-512 finds the wrong
    # scales where blocks cross rows, and its fallback for an odd row is compiled, which takes seconds.
    n = 2 * packed.numel()
    state = bnb.QuantState(absmax, (1, n), levels("nf4"), block_size, quant_type="nf4", dtype=dtype)
    return bnb.dequantize_4bit(packed[:, None], state).flatten()[: np.prod(shape)].view(shape)


def quantize_scales(absmax: Tensor, codebook: Tensor, block_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, nested absmax and offset of scales, by the rule that is the default."""
    offset = absmax.double().mean().float()
    return *module.quantize_scales(absmax, offset, codebook, block_size), offset


@st.composite
def weights(draw: st.DrawFn) -> Tensor:
    """A matrix of any float type with what quantizers trip over: outliers, zeros, borders, partial blocks."""
    dtype = draw(st.sampled_from(FLOATS))
    rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 150))
    w = torch.randn(rows * columns, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    w *= 2.0 ** draw(st.integers(-12, 10))  # float16 holds all of it, and no scale is near 1e-38
    for kind in draw(st.lists(st.sampled_from(["outliers", "zeros", "borders", "constant"]), max_size=2)):
        start = draw(st.integers(0, len(w) - 1))
        part = w[start : start + draw(st.integers(1, 130))]
        if kind == "outliers":
            part *= torch.where(torch.arange(len(part)) % 29 == 0, 3.0, 0.01)
        elif kind == "zeros":
            part.zero_()
        elif kind == "borders":  # times a power of two, so that the quotient is a border exactly
            borders = torch.cat([torch.ones(1), thresholds(levels("nf4")), levels("nf4")])
            part.copy_(borders.repeat(5)[: len(part)] * 0.25)
        else:
            part.fill_(-0.75)
    return w.view(rows, columns).to(dtype)


# -- codes ---------------------------------------------------------------------------------------------------


def test_worked_example_of_the_docstring():
    packed, absmax = quantize(torch.tensor([[0.30, -0.02, 0.11, -0.40]]), levels("nf4"), 4)
    assert packed.tolist() == [0xE6, 0xA0]
    assert absmax.tolist() == [pytest.approx(0.4)]


def test_first_of_a_pair_sits_in_the_high_nibble():
    packed, _ = quantize(levels("nf4"), levels("nf4"), 16)
    assert packed.tolist() == [0x01, 0x23, 0x45, 0x67, 0x89, 0xAB, 0xCD, 0xEF]


def test_idle_nibble_of_an_odd_weight_is_the_code_of_zero():
    packed, absmax = quantize(torch.tensor([[1.0, -1.0, 1.0]]), levels("nf4"), 64)
    assert packed.tolist() == [0xF0, 0xF7]
    assert absmax.tolist() == [1.0]


def test_a_number_on_a_border_takes_the_lower_code():
    borders = thresholds(levels("nf4"))
    above = torch.nextafter(borders, torch.tensor(2.0))
    packed, _ = quantize(torch.cat([torch.ones(1), borders, torch.ones(1), above]), levels("nf4"), 16)
    assert codes_of(packed, 32).tolist() == [15, *range(15), 15, *range(1, 16)]


def test_a_full_block_is_multiplied_by_a_reciprocal_and_a_short_one_divided():
    # 0.6956 / 0.8074 is the last border to half an ulp: the two ways to divide fall on its two sides.
    pair = torch.tensor([0.8074228167533875, 0.6955773830413818])
    for padded, code in ((F.pad(pair, (0, 62)), 0xFE), (F.pad(pair, (64, 0)), 0xFF)):
        packed, _ = quantize(padded, levels("nf4"), 64)
        theirs, _ = bnb.quantize_4bit(padded, blocksize=64, quant_type="nf4")
        assert set(packed.tolist()) == {0x77, code}
        assert torch.equal(packed, theirs[:, 0])


@pytest.mark.parametrize("n", [64, 70, 6, 7])
def test_a_block_of_zeros_is_all_code_7_and_decodes_to_zeros(n: int):
    packed, absmax = quantize(torch.zeros(1, n), levels("nf4"), 64)
    assert packed.tolist() == [0x77] * ((n + 1) // 2)
    assert absmax.tolist()[: n // 64] == [0.0] * (n // 64)
    assert torch.equal(decode(packed, absmax, (1, n), 64), torch.zeros(1, n))


def test_blocks_run_on_over_the_ends_of_rows():
    w = torch.arange(1.0, 13).view(3, 4)
    _, absmax = quantize(w, levels("nf4"), 6)
    assert absmax.tolist() == [6.0, 12.0]


def test_a_weight_that_is_not_contiguous_is_read_in_row_major_order():
    w = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    for got, expected in zip(quantize(w.T, levels("nf4"), 8), quantize(w.T.contiguous(), levels("nf4"), 8), strict=True):
        assert torch.equal(got, expected)


def test_quantizing_does_not_touch_the_weight():
    w = torch.randn(3, 70, generator=torch.Generator().manual_seed(0))
    before = w.clone()
    quantize(w, levels("nf4"), 64)
    assert torch.equal(w, before)


@settings(max_examples=120, deadline=None)
@given(weights(), st.sampled_from([32, 64, 128]))
@example(torch.tensor([[1e-37] * 64 + [-1e-37, 3e-38]]), 64)
@example(torch.tensor([[3e38] * 63 + [-3.4e38, 1.0]]), 64)
def test_codes_and_scales_are_those_of_bitsandbytes(w: Tensor, block_size: int):
    packed, absmax = quantize(w, levels("nf4"), block_size)
    theirs, state = bnb.quantize_4bit(w, blocksize=block_size, quant_type="nf4")
    assert torch.equal(packed, theirs[:, 0])
    assert torch.equal(absmax, state.absmax)


@settings(max_examples=80, deadline=None)
@given(weights(), st.sampled_from([2, 6, 64, 1000]))
def test_every_code_is_of_the_nearest_level(w: Tensor, block_size: int):
    packed, absmax = quantize(w, levels("nf4"), block_size)
    flat = w.double().flatten().numpy()
    scales = absmax.double().numpy().repeat(block_size)[: len(flat)]
    reachable = levels("nf4").double().numpy() * scales[:, None]  # (n, 16): the values that each could decode to
    chosen = reachable[np.arange(len(flat)), codes_of(packed, len(flat)).numpy()]
    # The quotient is rounded twice (reciprocal, product) and a border once: three times 2**-24.
    slack = 3 * 2.0**-24 * scales
    assert (np.abs(chosen - flat) <= np.abs(reachable - flat[:, None]).min(axis=1) + 2 * slack).all()


@settings(max_examples=40, deadline=None)
@given(weights(), st.sampled_from([2, 6, 64]), st.integers(1, 300))
def test_chunks_change_nothing(w: Tensor, block_size: int, chunk: int):
    whole = quantize(w, levels("nf4"), block_size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK", chunk)
        in_chunks = quantize(w, levels("nf4"), block_size)
    assert all(torch.equal(a, b) for a, b in zip(whole, in_chunks, strict=True))


# -- what cannot be quantized --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("chunk", [4, 2**20])
def test_nan_or_infinity_is_refused_with_the_index_of_the_first(dtype, bad, chunk, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", chunk)
    w = torch.ones(3, 5, dtype=dtype)
    w[1, 2] = bad
    w[2, 0] = bad
    with pytest.raises(ValueError, match=rf"holds {bad} \(first at index \(1, 2\)\)"):
        quantize(w, levels("nf4"), 4)


def test_bad_number_in_the_short_last_block_is_found():
    w = torch.zeros(1, 5)
    w[0, 4] = float("nan")
    with pytest.raises(ValueError, match=r"holds nan \(first at index \(0, 4\)\)"):
        quantize(w, levels("nf4"), 4)


def test_float64_beyond_float32_is_refused_with_its_index():
    w = torch.ones(2, 3, dtype=torch.float64)
    w[1, 1] = -1e300
    with pytest.raises(ValueError, match=r"-1e\+300.*index \(1, 1\)"):
        quantize(w, levels("nf4"), 4)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0)])
def test_an_empty_weight_is_refused(shape):
    with pytest.raises(ValueError, match=f"empty weight of shape .{shape[0]}, {shape[1]}."):
        quantize(torch.empty(shape), levels("nf4"), 64)


# -- scales --------------------------------------------------------------------------------------------------


def test_worked_example_of_the_docstring_for_scales():
    absmax = torch.tensor([0.40, 0.36, 0.52, 0.44])
    codes, nested_absmax, offset = quantize_scales(absmax, dynamic_map(), 256)
    assert offset.item() == pytest.approx(0.43)
    assert nested_absmax.tolist() == [pytest.approx(0.09)]
    assert codes.tolist() == [47, 15, 255, 191]
    decoded = dequantize_scales(codes, nested_absmax, dynamic_map(), offset, 256)
    assert [round(scale, 4) for scale in decoded.tolist()] == [0.4001, 0.3596, 0.5200, 0.4396]


@pytest.mark.parametrize("n", [1, 5, 1000, 2**17 + 1])
def test_offset_is_the_float64_mean_rounded_to_float32(n: int):
    absmax = torch.rand(n, generator=torch.Generator().manual_seed(n)) + 0.5
    _, _, offset = quantize_scales(absmax, dynamic_map(), 256)
    assert offset.shape == ()
    assert offset.item() == np.float32(absmax.numpy().astype(np.float64).mean())


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 700),
    st.integers(0, 99),
    st.sampled_from([1, 3, 7, 256]),
    st.sampled_from([1e-6, 1.0, 1e4]),
    st.booleans(),
)
def test_every_scale_takes_the_nearest_level(n: int, seed: int, block_size: int, scale: float, heavy: bool):
    # Brute force over all 256 levels in float64, from the quotient as float32 has it.
    absmax = torch.randn(n, generator=torch.Generator().manual_seed(seed)).abs() * scale
    absmax = absmax**3 if heavy else absmax
    codes, nested_absmax, offset = quantize_scales(absmax, dynamic_map(), block_size)
    centred = (absmax - offset).numpy()
    pad = np.pad(centred, (0, -n % block_size)).reshape(-1, block_size)
    assert nested_absmax.numpy().tolist() == np.abs(pad).max(axis=1).tolist()
    scales = nested_absmax.numpy().repeat(block_size)[:n]
    quotient = centred[scales > 0] * (np.float32(1) / scales[scales > 0])
    nearest = np.abs(quotient.astype(np.float64)[:, None] - dynamic_map().double().numpy()).argmin(axis=1)
    off_border = ~np.isin(quotient, thresholds(dynamic_map()).numpy())  # on one, the even code: see below
    assert (codes.numpy()[scales > 0] == nearest)[off_border].all()
    assert (codes.numpy()[scales == 0] == 0).all()


def test_a_scale_halfway_between_two_levels_takes_the_even_code():
    borders = thresholds(dynamic_map())
    # With their mirror images and the ends: the mean is 0 and the largest magnitude 1, so that nothing moves.
    scales = torch.cat([borders, -borders, torch.tensor([1.0, -1.0])])
    codes, nested_absmax, offset = quantize_scales(scales, dynamic_map(), 1024)
    assert (offset.item(), nested_absmax.tolist()) == (0.0, [1.0])
    lower = torch.arange(255)
    assert torch.equal(codes[:255].long(), lower + lower % 2)


def test_neighbours_of_a_halfway_scale_take_the_nearer_code():
    borders = thresholds(dynamic_map())
    for toward, expected in ((-2.0, torch.arange(255)), (2.0, torch.arange(1, 256))):
        near = torch.nextafter(borders, torch.tensor(toward))
        scales = torch.cat([near, -near, torch.tensor([1.0, -1.0])])
        codes, nested_absmax, offset = quantize_scales(scales, dynamic_map(), 1024)
        assert (offset.item(), nested_absmax.tolist()) == (0.0, [1.0])
        assert torch.equal(codes[:255].long(), expected)


@pytest.mark.parametrize("n", [1, 2, 300])
def test_equal_scales_survive_exactly(n: int):
    absmax = torch.full((n,), 0.3)
    codes, nested_absmax, offset = quantize_scales(absmax, dynamic_map(), 256)
    assert not codes.any()
    assert not nested_absmax.any()
    assert torch.equal(dequantize_scales(codes, nested_absmax, dynamic_map(), offset, 256), absmax)


def test_scales_err_no_more_than_those_of_bitsandbytes():
    absmax = torch.randn(3000, 64, generator=torch.Generator().manual_seed(0)).abs().amax(1)
    parts = quantize_scales(absmax, dynamic_map(), 256)
    codes, state = bnb.quantize_blockwise(absmax - parts[2], blocksize=256)  # by its look-up table
    theirs = dequantize_scales(codes, state.absmax, state.code, parts[2], 256)
    ours = dequantize_scales(*parts[:2], dynamic_map(), parts[2], 256)
    assert torch.equal(parts[1], state.absmax)
    assert not torch.equal(ours, theirs)  # it does miss some
    rounding = 2 * 2.0**-24 * absmax.max()  # of product and sum
    assert ((ours - absmax).abs() <= (theirs - absmax).abs() + rounding).all()


@pytest.mark.parametrize("n", [1, 255, 256, 257, 600])
def test_scales_decode_to_the_bits_of_bitsandbytes(n: int):
    absmax = torch.randn(n, generator=torch.Generator().manual_seed(n)).abs()
    codes, nested_absmax, offset = quantize_scales(absmax, dynamic_map(), 256)
    state = bnb.QuantState(absmax=nested_absmax, code=dynamic_map(), blocksize=256, dtype=torch.float32)
    theirs = bnb.dequantize_blockwise(codes, state) + offset
    assert torch.equal(dequantize_scales(codes, nested_absmax, dynamic_map(), offset, 256), theirs)


def test_scales_decode_by_the_map_that_came_with_them():
    old = dynamic_map().clone()
    old[0] = -1.0
    codes = torch.tensor([0, 255], dtype=torch.uint8)
    decoded = dequantize_scales(codes, torch.tensor([0.5]), old, torch.tensor(2.0), 256)
    assert decoded.tolist() == [1.5, 2.5]


# -- decoding ------------------------------------------------------------------------------------------------


def test_byte_table_holds_both_nibbles_of_every_byte():
    table = byte_table(levels("nf4"))
    assert table.shape == (256, 2)
    assert table.dtype == torch.float32
    for byte in range(256):
        assert table[byte].tolist() == [levels("nf4")[byte // 16], levels("nf4")[byte % 16]]


@settings(max_examples=80, deadline=None)
@given(weights(), st.sampled_from([32, 64, 128]), st.sampled_from(FLOATS))
def test_weights_decode_to_the_bits_of_bitsandbytes(w: Tensor, block_size: int, dtype: torch.dtype):
    packed, absmax = quantize(w, levels("nf4"), block_size)
    ours = decode(packed, absmax, tuple(w.shape), block_size, dtype)
    assert torch.equal(ours, bnb_decode(packed, absmax, tuple(w.shape), block_size, dtype))


@pytest.mark.parametrize("n", [1, 63, 64, 65, 130])
def test_decoding_to_float64_adds_no_digits(n: int):
    packed, absmax = quantize(torch.randn(n, generator=torch.Generator().manual_seed(n)), levels("nf4"), 64)
    exact = decode(packed, absmax, (n,), 64, torch.float64)
    assert torch.equal(exact, decode(packed, absmax, (n,), 64).double())


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_decoding_does_not_depend_on_the_default_dtype(default: torch.dtype):
    packed, absmax = quantize(torch.randn(7, 9, generator=torch.Generator().manual_seed(0)), levels("nf4"), 64)
    expected = decode(packed, absmax, (7, 9), 64, torch.bfloat16)
    torch.set_default_dtype(default)
    try:
        assert torch.equal(decode(packed, absmax, (7, 9), 64, torch.bfloat16), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_quantizing_what_was_decoded_gives_the_same_bytes():
    w = torch.randn(9, 70, generator=torch.Generator().manual_seed(0))
    packed, absmax = quantize(w, levels("nf4"), 64)
    again, absmax_again = quantize(decode(packed, absmax, (9, 70), 64), levels("nf4"), 64)
    assert torch.equal(again, packed)
    assert torch.equal(absmax_again, absmax)


# -- golden vectors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", GOLDEN)
def test_golden_vectors_encode_and_decode_to_their_bits(case: str, shared_data: Path):
    path = shared_data / "golden_bnb.safetensors"
    with safe_open(path, "pt") as file:
        facts = json.loads(file.metadata()[case])
    every = load_file(path)
    nested_map = every["dynamic_map_signed"]
    tensors = {key.removeprefix(case + "."): t for key, t in every.items() if key.startswith(case + ".")}
    shape, block_size = tuple(facts["shape"]), facts["blocksize"]
    packed, absmax = quantize(tensors["in"], levels("nf4"), block_size)
    assert torch.equal(packed, tensors["packed"][:, 0])
    if facts["double"]:
        # The codes of scales are from a table that misses some levels, so they are decoded and not compared.
        _, nested_absmax, offset = quantize_scales(absmax, nested_map, 256)
        torch.testing.assert_close(offset.item(), facts["offset"], rtol=2.0**-23, atol=0)
        torch.testing.assert_close(nested_absmax, tensors["nested_absmax"], rtol=1e-6, atol=0)
        stored = torch.tensor(facts["offset"], dtype=torch.float32)
        absmax = dequantize_scales(tensors["absmax"], tensors["nested_absmax"], nested_map, stored, 256)
    else:
        assert torch.equal(absmax, tensors["absmax"])
    for name, dtype in DTYPES.items():
        assert torch.equal(decode(packed, absmax, shape, block_size, dtype), tensors[f"deq_{name}"])


# -- the other device ----------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_gpu_gives_the_same_bytes_and_scales(dtype: torch.dtype, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 500)
    w = torch.randn(37, 101, generator=torch.Generator().manual_seed(0)).to(dtype)
    w[5] = 0
    packed, absmax = quantize(w, levels("nf4"), 64)
    there = quantize(w.cuda(), levels("nf4", "cuda"), 64)
    scales = quantize_scales(absmax, dynamic_map(), 16)
    scales_there = quantize_scales(absmax.cuda(), dynamic_map("cuda"), 16)
    for here, gpu in zip((packed, absmax, *scales), (*there, *scales_there), strict=True):
        assert torch.equal(here, gpu.cpu())
