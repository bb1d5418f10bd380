"""The reference: bitsandbytes' bits, nearest levels by brute force, and any kind of array.

That the tensors' code gives the same bits is in test_quantize.py.
"""

import doctest

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_quantize import BNB_BLOCK_SIZES, weights
from torch import Tensor

from minqlora import reference
from minqlora.codebook import dynamic_map, normal_float, thresholds
from minqlora.quantize import dequantize_scales, quantize_scales
from minqlora.reference import dequantize, quantize

RANDN = np.random.default_rng(0).standard_normal(90).astype(np.float32)


@pytest.fixture(scope="module")
def bnb():
    return pytest.importorskip("bitsandbytes.functional")


def test_examples_of_the_docstring():
    failed, attempted = doctest.testmod(reference)
    assert attempted >= 5
    assert failed == 0


# -- against bitsandbytes and by brute force -----------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(w=weights(extremes=True), block_size=st.sampled_from(BNB_BLOCK_SIZES))
@example(w=torch.zeros(1, 70), block_size=64)
def test_packed_codes_and_scales_are_those_of_bitsandbytes(bnb, w: Tensor, block_size: int):
    found = quantize(w.float().numpy(), block_size=block_size)
    theirs, state = bnb.quantize_4bit(w, blocksize=block_size, quant_type="nf4")
    assert found.packed.dtype == np.uint8
    assert found.packed.tolist() == theirs[:, 0].tolist()
    assert found.absmax.tolist() == state.absmax.tolist()


@settings(max_examples=80, deadline=None)
@given(w=weights(), block_size=st.sampled_from([1, 2, 7, 64]))
@example(w=torch.ones(1, 600), block_size=2)
@example(w=torch.zeros(1, 1025), block_size=2)  # a short last block of zeros has a scale, of 1e-38
def test_double_quantization_is_that_of_the_tensors(w: Tensor, block_size: int):
    plain = quantize(w.float().numpy(), block_size=block_size)
    found = quantize(w.float().numpy(), block_size=block_size, double_quant=True)
    offset = torch.tensor(plain.absmax).double().mean().float()
    codes, nested_absmax = quantize_scales(torch.tensor(plain.absmax), offset, dynamic_map(), 256)
    assert found.codes.tolist() == plain.codes.tolist()
    assert found.offset.dtype == np.float32
    assert found.offset == offset.item()
    assert found.absmax_codes.tolist() == codes.tolist()
    assert found.nested_absmax.tolist() == nested_absmax.tolist()
    decoded = dequantize_scales(codes, nested_absmax, dynamic_map(), offset, 256)
    assert found.absmax.tolist() == decoded.tolist()


def test_a_scale_halfway_between_two_levels_takes_the_even_code():
    borders = thresholds(dynamic_map()).numpy()
    # Around 1, in blocks of one number: the mean is 1 and what is farthest from it 1 away, so that nothing
    # moves where 1 + border is exact.
    exact = (1 + borders - 1 == borders) & (1 - borders - 1 == -borders)
    scales = np.concatenate([1 + borders[exact], 1 - borders[exact], [np.float32(0), np.float32(2)]])
    found = quantize(scales, block_size=1, double_quant=True)
    assert (found.offset, found.nested_absmax.tolist()) == (1, [1])
    lower = np.flatnonzero(exact)
    assert set(lower % 2) == {0, 1}
    assert found.absmax_codes[: len(lower)].tolist() == (lower + lower % 2).tolist()


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("absmax", [None, 0.5, 5.0])
def test_every_code_is_of_the_nearest_level_at_any_width(bits: int, absmax: float | None):
    found = quantize(RANDN, bits=bits, block_size=32, absmax=absmax)
    scales = found.absmax.astype(np.float64).repeat(32)[: RANDN.size]
    reachable = normal_float(bits).astype(np.float64) * scales[:, None]  # (n, 2**bits)
    distance = np.abs(reachable - RANDN[:, None])
    chosen = distance[np.arange(RANDN.size), found.codes]
    # The quotient is rounded twice (reciprocal, product), in relation to its own size, which a fixed absmax
    # does not bound, and a border once: three times 2**-24, on either side of a border.
    slack = 2 * 3 * 2.0**-24 * np.maximum(scales, np.abs(RANDN))
    assert (chosen <= distance.min(axis=1) + slack).all()
    assert found.levels.tolist() == normal_float(bits).tolist()


# -- any array -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "array",
    [
        RANDN.astype(np.float64),
        RANDN.astype(np.float16).reshape(9, 10),
        np.asfortranarray(RANDN.reshape(9, 10)),
        RANDN.reshape(9, 10)[::2, ::-3],
        np.arange(-30, 30).reshape(3, 4, 5),
        np.arange(7, dtype=np.uint8),
        [[1, 2.5], [-3, 0]],
        [True, False],
        -2.5,
    ],
    ids=["float64", "float16", "fortran", "strided", "3d_ints", "uint8", "lists", "bools", "scalar"],
)
@pytest.mark.parametrize("double_quant", [False, True])
def test_any_array_is_read_in_row_major_order_as_float32_and_keeps_its_shape(array, double_quant: bool):
    row = np.array([float(number) for number in np.asarray(array).flat], dtype=np.float32)
    found = quantize(array, block_size=3, double_quant=double_quant)
    expected = quantize(row, block_size=3, double_quant=double_quant)
    assert found.codes.dtype == np.uint8
    assert found.codes.shape == dequantize(found).shape == np.shape(array)
    assert found.codes.reshape(-1).tolist() == expected.codes.tolist()
    assert found.absmax.tolist() == expected.absmax.tolist()


def test_quantizing_does_not_touch_the_array():
    array = RANDN.copy()
    quantize(array, block_size=7, double_quant=True)
    assert array.tolist() == RANDN.tolist()


@pytest.mark.parametrize("block_size", [1, 7, 89, 90, 91, None])
def test_each_block_has_its_largest_magnitude_for_a_scale(block_size: int | None):
    found = quantize(RANDN, block_size=block_size)
    size = block_size or RANDN.size
    blocks = [RANDN[i : i + size] for i in range(0, RANDN.size, size)]
    assert found.absmax.tolist() == [np.abs(block).max() for block in blocks]
    assert found.block_size == size
    alone = [quantize(block, block_size=size) for block in blocks]  # a block knows nothing of its neighbours
    assert found.codes.tolist() == np.concatenate([block.codes for block in alone]).tolist()


@pytest.mark.parametrize("block_size", [1, 7, None])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_decoding_multiplies_each_level_by_the_scale_of_its_block(block_size: int | None, bits: int):
    found = quantize(RANDN.reshape(9, 10), bits=bits, block_size=block_size)
    size = block_size or RANDN.size
    expected = [
        found.levels[code] * found.absmax[i // size] for i, code in enumerate(found.codes.reshape(-1))
    ]
    assert dequantize(found).dtype == np.float32
    assert dequantize(found).tolist() == np.array(expected, dtype=np.float32).reshape(9, 10).tolist()


# -- a fixed scale -------------------------------------------------------------------------------------------


def test_under_a_fixed_absmax_a_number_has_the_same_code_in_any_array():
    together = quantize(RANDN, absmax=0.8)
    for block_size in (1, 7, 64, None):
        assert quantize(RANDN, block_size=block_size, absmax=0.8).codes.tolist() == together.codes.tolist()
    assert [quantize(number, absmax=0.8).codes.item() for number in RANDN] == together.codes.tolist()


def test_under_a_fixed_absmax_a_number_has_the_same_code_in_a_short_last_block():
    # To multiply by the reciprocal and to divide: on this number, beside a border, they disagree.
    found = quantize([0.6955773830413818] * 3, block_size=2, absmax=0.8074228167533875)
    assert len(set(found.codes.tolist())) == 1


def test_a_fixed_absmax_for_each_block_scales_that_block():
    scales = np.linspace(0.25, 4, 13, dtype=np.float32)
    found = quantize(RANDN, block_size=7, absmax=scales)
    each = [quantize(RANDN[7 * i : 7 * i + 7], absmax=scale).codes for i, scale in enumerate(scales)]
    assert found.absmax.tolist() == scales.tolist()
    assert found.codes.tolist() == np.concatenate(each).tolist()


def test_numbers_beyond_a_fixed_absmax_take_the_end_codes_and_are_counted():
    found = quantize([0.5, 0.5000001, -0.5, -0.5000001, 3.0, -3e38, 0.0], absmax=0.5)
    assert found.codes.tolist() == [15, 15, 0, 0, 15, 0, 7]
    assert found.clipped == 4
    assert dequantize(found).tolist() == [0.5, 0.5, -0.5, -0.5, 0.5, -0.5, 0.0]


def test_clipped_numbers_are_counted_against_the_scale_of_their_block():
    numbers, scales = RANDN[:88].reshape(11, 8), np.linspace(0.1, 2, 11, dtype=np.float32)
    found = quantize(numbers, block_size=8, absmax=scales)
    assert found.clipped == (np.abs(numbers) > scales[:, None]).sum() > 0


@pytest.mark.parametrize("options", [{}, {"block_size": 7}, {"double_quant": True}, {"absmax": 1000.0}])
def test_nothing_is_clipped_by_a_scale_that_is_large_enough(options: dict):
    assert quantize(RANDN, **options).clipped == 0


# -- packing -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits, zero", [(2, 1), (3, 3), (4, 7)])
@pytest.mark.parametrize("n", [1, 2, 7, 90])
def test_codes_of_up_to_4_bits_share_a_byte_the_idle_nibble_being_zeros_code(bits: int, zero: int, n: int):
    found = quantize(RANDN[:n], bits=bits, block_size=4)
    codes = [*found.codes.tolist(), zero]
    assert found.packed.dtype == np.uint8
    assert found.packed.tolist() == [16 * codes[i] + codes[i + 1] for i in range(0, n, 2)]


def test_wider_codes_are_not_packed():
    with pytest.raises(ValueError, match="codes of 32 levels do not fit two a byte"):
        _ = quantize(RANDN, bits=5).packed


# -- what cannot be quantized --------------------------------------------------------------------------------


@pytest.mark.parametrize("empty", [[], np.empty((3, 0))])
def test_an_empty_array_is_refused(empty):
    with pytest.raises(ValueError, match="cannot quantize an empty array"):
        quantize(empty)


@pytest.mark.parametrize(
    "array, message",
    [
        ([[1, 2], [float("nan"), float("inf")]], r"holds nan \(first at index \(1, 0\)\)"),
        ([1, 2, float("-inf")], r"holds -inf \(first at index \(2,\)\)"),
        ([1e300], r"holds inf \(first at index \(0,\)\)"),  # as float32 has it
        (float("nan"), r"holds nan \(first at index \(\)\)"),
    ],
)
def test_nan_or_infinity_is_refused_with_the_index_of_the_first(array, message: str):
    with pytest.raises(ValueError, match=message):
        quantize(array)


@pytest.mark.parametrize("bits", [1, 9])
def test_another_number_of_bits_is_refused(bits: int):
    with pytest.raises(ValueError, match=f"2 to 8 bits, not {bits}"):
        quantize(RANDN, bits=bits)


@pytest.mark.parametrize("block_size", [0, -64])
def test_a_block_size_below_one_is_refused(block_size: int):
    with pytest.raises(ValueError, match=f"block_size must be at least 1, got {block_size}"):
        quantize(RANDN, block_size=block_size)


@pytest.mark.filterwarnings("error")  # the message is all there is to say
@pytest.mark.parametrize("absmax", [0, -1.0, float("nan"), float("inf"), 1e39, 1e-50, [1, 1, 0]])
def test_an_absmax_that_is_not_positive_and_finite_is_refused(absmax):
    with pytest.raises(ValueError, match="absmax must be positive and finite, got "):
        quantize(RANDN, block_size=30, absmax=absmax)


@pytest.mark.parametrize("absmax", [[1.0, 2.0], [1.0] * 4, [[1.0] * 3] * 2, []])
def test_an_absmax_that_is_not_one_a_block_is_refused(absmax):
    with pytest.raises(ValueError, match="absmax"):
        quantize(RANDN, block_size=30, absmax=absmax)


def test_a_fixed_absmax_is_not_quantized():
    with pytest.raises(ValueError, match="absmax and double_quant exclude each other"):
        quantize(RANDN, absmax=1.0, double_quant=True)
