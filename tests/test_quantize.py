"""Blocks, codes and scales: bit for bit those of bitsandbytes and of the reference, however asked for.

Some 2,000 examples a run are compared with bitsandbytes; the tests that do are skipped where it is missing,
and the reference and brute force remain.
"""

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
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
from torch.utils._python_dispatch import TorchDispatchMode

from minqlora import quantize as module
from minqlora import reference
from minqlora.codebook import QUANT_TYPES, dynamic_map, levels, quantile_levels, thresholds
from minqlora.quantize import (
    byte_table,
    dequantize,
    dequantize_scales,
    empty,
    encode,
    mean_scale,
    quantize,
    quantize_double,
    scale_blocks_,
    scaled_sample,
    scratch,
)

ROOT = Path(__file__).resolve().parents[1]

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
FLOATS = list(DTYPES.values())
GOLDEN = [f"{kind}_{dtype}" for kind in ("randn", "heavy", "odd", "plain", "bs128") for dtype in DTYPES]
GOLDEN += ["ties_f32", "zeroblock_f32"]
BNB_BLOCK_SIZES = [32, 64, 128, 256, 512, 1024, 2048, 4096]  # all that bitsandbytes takes
FIXED = [name for name, fixed in QUANT_TYPES.items() if fixed is not None]
SYMMETRIC = ["int4", "fp4", "fp4_e2m1", "fp4_e3m0"]
TWO_ZEROS = ["fp4", "fp4_e2m1", "fp4_e3m0"]  # of either sign, so that equal numbers can have two codes


@pytest.fixture(scope="module")
def bnb():
    return pytest.importorskip("bitsandbytes.functional")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def codes_of(packed: Tensor, n: int, name: str = "nf4") -> Tensor:
    """The codes of n numbers, read as FORMATS has it: two a byte, the first of a pair in the high nibble."""
    if len(levels(name)) > 16:
        return packed.long()
    return torch.tensor([nibble for byte in packed.tolist() for nibble in (byte // 16, byte % 16)][:n])


def decode(packed: Tensor, absmax: Tensor, shape, block_size: int, dtype=torch.float32, name: str = "nf4"):
    return dequantize(packed, absmax, levels(name), block_size, torch.empty(shape, dtype=dtype))


def decode_double(parts, shape, block_size: int, dtype=torch.float32, name: str = "nf4", nested: int = 256):
    packed, codes, nested_absmax, offset = parts
    absmax = dequantize_scales(codes, nested_absmax, dynamic_map(), offset, nested)
    return decode(packed, absmax, shape, block_size, dtype, name)


def bnb_decode(bnb, parts, shape, block_size: int, dtype=torch.float32, name: str = "nf4"):
    """What bitsandbytes decodes from (packed, absmax) or (packed, codes, nested_absmax, offset)."""
    # As one row of an even number of weights, because bitsandbytes' CPU kernel with AVX-512 finds the wrong
    # scales where blocks cross rows. Its fallback (blocks from 2048 on, with AVX-512) is compiled, which
    # takes seconds, unless forbidden.
    packed, absmax, *double = parts
    state = bnb.QuantState(absmax, (1, 2 * len(packed)), levels(name), block_size, name, dtype)
    if double:
        nested_absmax, state.offset = double
        state.state2 = bnb.QuantState(nested_absmax, None, dynamic_map(), 256, dtype=torch.float32)
        state.nested = True
    with torch.compiler.set_stance("force_eager"):
        decoded = bnb.dequantize_4bit(packed[:, None], state)
    return decoded.flatten()[: np.prod(shape)].view(shape)


def quantize_scales(absmax: Tensor, codebook: Tensor, block_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, nested absmax and offset of scales, by the rule that is the default."""
    offset = absmax.double().mean().float()
    return *module.quantize_scales(absmax, offset, codebook, block_size), offset


def assert_equal(found, expected) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


@st.composite
def weights(draw: st.DrawFn, extremes: bool = False) -> Tensor:
    """A matrix of any float type with what quantizers trip over: outliers, zeros, borders, partial blocks.

    extremes: of any magnitude down to denormals and up to the largest, and sometimes of several large blocks.
    """
    dtype = draw(st.sampled_from(FLOATS))
    columns = st.integers(1, 150)
    rows, columns = draw(st.integers(1, 5)), draw(columns | st.just(2051) if extremes else columns)
    w = randn(rows * columns, seed=draw(st.integers(0, 99)))
    # Within what the dtype holds of 3 * 5 sigma. Where no extreme is asked for, scales and their reciprocals
    # are normal numbers, so that bounds relative to a scale hold.
    least, most = (-24, 11) if dtype == torch.float16 else (-149, 123) if extremes else (-60, 60)
    unit = 2.0 ** draw(st.integers(least, most))
    w *= unit
    kinds = ["outliers", "zeros", "borders", "constant", "faint"]
    for kind in draw(st.lists(st.sampled_from(kinds), max_size=2, unique=True)):
        start = draw(st.integers(0, len(w) - 1))
        part = w[start : start + draw(st.integers(1, 130))]
        if kind == "outliers":
            part *= torch.where(torch.arange(len(part)) % 29 == 0, 3.0, 0.01)
        elif kind == "zeros":
            part.zero_()
        elif kind == "borders":  # and their neighbours, as quotients exactly, with a 1 in every 16 numbers
            borders = thresholds(levels(draw(st.sampled_from(["nf4", "fp4"]))).sort().values)  # (15,)
            near = [borders, *(borders.nextafter(torch.tensor(end)) for end in (-2.0, 2.0))]
            w[start:] = F.pad(torch.stack(near), (1, 0), value=1.0).flatten().repeat(220)[: len(w) - start]
            w[start:] *= unit
        elif kind == "constant":
            part.fill_(-0.75 * unit)
        else:
            part *= 2.0**-20
    return w.view(rows, columns).to(dtype)


# -- codes ---------------------------------------------------------------------------------------------------


def test_worked_example_of_the_docstring():
    packed, absmax = quantize(torch.tensor([[0.30, -0.02, 0.11, -0.40]]), levels("nf4"), 4)
    assert packed.tolist() == [0xE6, 0xA0]
    assert absmax.tolist() == [pytest.approx(0.4)]


def test_first_of_a_pair_sits_in_the_high_nibble():
    packed, _ = quantize(levels("nf4"), levels("nf4"), 16)
    assert packed.tolist() == [0x01, 0x23, 0x45, 0x67, 0x89, 0xAB, 0xCD, 0xEF]


@pytest.mark.parametrize(
    "name, expected", [("nf4", [0xF0, 0xF7]), ("fp4", [0x3B, 0x30]), ("int4", [0xE0, 0xE7])]
)
def test_idle_nibble_of_an_odd_weight_is_the_code_of_zero(name: str, expected: list[int]):
    packed, absmax = quantize(torch.tensor([[1.0, -1.0, 1.0]]), levels(name), 64)
    assert packed.tolist() == expected
    assert absmax.tolist() == [1.0]


def test_codes_of_more_than_4_bits_have_a_byte_each():
    packed, _ = quantize(levels("nf5"), levels("nf5"), 32)
    assert packed.tolist() == list(range(32))


def test_a_number_on_a_border_takes_the_lower_code():
    borders = thresholds(levels("nf4"))
    above = torch.nextafter(borders, torch.tensor(2.0))
    packed, _ = quantize(torch.cat([torch.ones(1), borders, torch.ones(1), above]), levels("nf4"), 16)
    assert codes_of(packed, 32).tolist() == [15, *range(15), 15, *range(1, 16)]


def test_a_full_block_is_multiplied_by_a_reciprocal_and_a_short_one_divided(bnb):
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


@pytest.mark.parametrize("name", ["nf4", "fp4"])
@settings(max_examples=650, deadline=None)
@given(w=weights(extremes=True), block_size=st.sampled_from(BNB_BLOCK_SIZES))
@example(w=torch.tensor([[1e-37] * 64 + [-1e-37, 3e-38]]), block_size=64)
@example(w=torch.tensor([[1e-38] * 64 + [9.999e-39, -1e-44]]), block_size=64)
@example(w=torch.tensor([[3e38] * 63 + [-3.4e38, 1.0]]), block_size=64)
def test_codes_and_scales_are_those_of_bitsandbytes(bnb, name: str, w: Tensor, block_size: int):
    # Scales below 1e-38 too: its CUDA kernels are undefined there, its CPU code clamps them, as here.
    packed, absmax = quantize(w, levels(name), block_size)
    theirs, state = bnb.quantize_4bit(w, blocksize=block_size, quant_type=name)
    assert_equal((packed, absmax), (theirs[:, 0], state.absmax))


@pytest.mark.parametrize("bits", range(2, 9))
@settings(max_examples=60, deadline=None)
@given(w=weights(extremes=True), block_size=st.sampled_from([2, 6, 64, 1000, 4096]))
def test_codes_and_scales_are_those_of_the_reference(bits: int, w: Tensor, block_size: int):
    packed, absmax = quantize(w, levels(f"nf{bits}"), block_size)
    expected = reference.quantize(w.float().numpy(), bits, block_size)
    assert packed.tolist() == (expected.packed if bits <= 4 else expected.codes.reshape(-1)).tolist()
    assert absmax.tolist() == expected.absmax.tolist()
    assert decode(packed, absmax, w.shape, block_size, name=f"nf{bits}").tolist() == (
        reference.dequantize(expected).tolist()
    )


@pytest.mark.parametrize("name", FIXED)
@settings(max_examples=25, deadline=None)
@given(w=weights(), block_size=st.sampled_from([2, 6, 64, 1000]))
def test_every_code_is_of_the_nearest_level(name: str, w: Tensor, block_size: int):
    packed, absmax = quantize(w, levels(name), block_size)
    flat = w.double().flatten().numpy()
    scales = absmax.double().numpy().repeat(block_size)[: len(flat)]
    reachable = levels(name).double().numpy() * scales[:, None]  # (n, n_levels): what each could decode to
    chosen = reachable[np.arange(len(flat)), codes_of(packed, len(flat), name).numpy()]
    # The quotient is rounded twice (reciprocal, product) and a border once: three times 2**-24.
    slack = 3 * 2.0**-24 * scales
    assert (np.abs(chosen - flat) <= np.abs(reachable - flat[:, None]).min(axis=1) + 2 * slack).all()


# -- what holds without an oracle ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", FIXED)
@settings(max_examples=25, deadline=None)
@given(w=weights(), block_size=st.sampled_from([2, 6, 64, 1000]))
def test_no_number_errs_by_more_than_half_the_widest_gap(name: str, w: Tensor, block_size: int):
    packed, absmax = quantize(w, levels(name), block_size)
    error = (decode(packed, absmax, w.shape, block_size, name=name) - w.float()).abs().flatten()
    widest = levels(name).sort().values.diff().max()
    scales = absmax.repeat_interleave(block_size)[: len(error)]
    # Of the scale, half an ulp (2**-24) each: quotient twice, border, decoded product, this bound.
    assert (error <= (widest / 2 + 6 * 2.0**-24) * scales).all()


@pytest.mark.parametrize("name", FIXED)
@settings(max_examples=25, deadline=None)
@given(w=weights(extremes=True), block_size=st.sampled_from([2, 64, 1000]))
def test_the_larger_of_two_numbers_of_a_block_decodes_to_no_less(name: str, w: Tensor, block_size: int):
    packed, absmax = quantize(w, levels(name), block_size)
    decoded = decode(packed, absmax, w.shape, block_size, name=name).flatten()
    for numbers, found in zip(w.flatten().split(block_size), decoded.split(block_size), strict=True):
        assert (found[numbers.argsort()].diff() >= 0).all()


@pytest.mark.parametrize("name", FIXED)
@settings(max_examples=25, deadline=None)
@given(w=weights(), block_size=st.sampled_from([2, 64, 1000]))
def test_quantizing_what_was_decoded_changes_nothing(name: str, w: Tensor, block_size: int):
    packed, absmax = quantize(w, levels(name), block_size)
    decoded = decode(packed, absmax, w.shape, block_size, name=name)
    again, absmax_again = quantize(decoded, levels(name), block_size)
    assert torch.equal(absmax_again, absmax)
    assert torch.equal(decode(again, absmax_again, w.shape, block_size, name=name), decoded)
    assert name in TWO_ZEROS or torch.equal(again, packed)


@pytest.mark.parametrize("name", FIXED)
@pytest.mark.parametrize("shape", [(64, 64), (37, 101)])
def test_codes_survive_a_round_trip_with_double_quantization(name: str, shape):
    parts = quantize_double(randn(*shape), levels(name), dynamic_map(), 64, 16)
    decoded = decode_double(parts, shape, 64, name=name, nested=16)
    assert decoded.abs().max() > 0
    again = quantize_double(decoded, levels(name), dynamic_map(), 64, 16)
    found, expected = (
        levels(name)[codes_of(packed, decoded.numel(), name)] for packed in (again[0], parts[0])
    )
    assert torch.equal(found, expected)
    assert name in TWO_ZEROS or torch.equal(again[0], parts[0])


@pytest.mark.parametrize("name", SYMMETRIC)
@settings(max_examples=40, deadline=None)
@given(w=weights(extremes=True), block_size=st.sampled_from([2, 64, 1000]))
def test_the_negative_weight_decodes_to_the_negative_but_on_borders(name: str, w: Tensor, block_size: int):
    packed, absmax = quantize(w, levels(name), block_size)
    negative, negative_absmax = quantize(-w, levels(name), block_size)
    assert torch.equal(negative_absmax, absmax)
    decoded = decode(packed, absmax, w.shape, block_size, name=name).flatten()
    mirrored = decode(negative, absmax, w.shape, block_size, name=name).flatten()
    # On a border the lower code is taken, which is the farther from zero on one side only.
    quotients = [
        module._scale_down(numbers, scale[None], block_size).clone()
        for numbers, scale in zip(w.float().flatten().split(block_size), absmax, strict=True)
    ]
    scaled = torch.cat(quotients)
    on_border = torch.isin(scaled.abs(), thresholds(levels(name).sort().values))
    assert torch.equal(mirrored[~on_border], -decoded[~on_border])


@pytest.mark.parametrize("name", FIXED)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
def test_exact_zeros_stay_exact_zeros(name: str, double_quant: bool, dtype: torch.dtype):
    w = randn(9, 71)
    w[randn(9, 71, seed=1) > 0.5] = 0.0
    w[randn(9, 71, seed=2) > 0.5] = -0.0
    w[3:6] = 0  # three blocks of nothing else
    if double_quant:
        decoded = decode_double(
            quantize_double(w, levels(name), dynamic_map(), 64, 256), w.shape, 64, dtype, name
        )
    else:
        decoded = decode(*quantize(w, levels(name), 64), w.shape, 64, dtype, name)
    assert (w == 0).sum() > 300
    assert (decoded[w == 0] == 0).all()
    assert (decoded[w != 0] != 0).any()


@pytest.mark.parametrize("name", FIXED)
@settings(max_examples=25, deadline=None)
@given(w=weights(), block_size=st.sampled_from([2, 64, 1000]), power=st.integers(-20, 20))
def test_a_power_of_two_scales_the_scales_and_no_code(name: str, w: Tensor, block_size: int, power: int):
    packed, absmax = quantize(w, levels(name), block_size)
    scaled, scaled_absmax = quantize(w.float() * 2.0**power, levels(name), block_size)
    assert torch.equal(scaled, packed)
    real = absmax > 1.1e-38  # which a short last block of zeros has
    assert torch.equal(scaled_absmax[real], absmax[real] * 2.0**power)


# -- however it is asked for ---------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(
    w=weights(),
    name=st.sampled_from(["nf4", "fp4", "nf8"]),
    block_size=st.sampled_from([2, 6, 64]),
    chunk=st.integers(1, 300),
)
def test_chunks_change_nothing(w: Tensor, name: str, block_size: int, chunk: int):
    whole = quantize(w, levels(name), block_size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK", chunk)
        assert_equal(quantize(w, levels(name), block_size), whole)


@settings(max_examples=80, deadline=None)
@given(
    w=weights(),
    name=st.sampled_from(["nf4", "fp4", "nf8"]),
    block_size=st.sampled_from([2, 6, 64]),
    nested_block_size=st.sampled_from([1, 3, 16, 256]),
    scale_rule=st.sampled_from(module.SCALE_RULES),
    chunk=st.integers(1, 3000),
)
def test_double_quantization_in_chunks_is_that_of_the_whole_in_three_steps(
    w: Tensor, name: str, block_size: int, nested_block_size: int, scale_rule: str, chunk: int
):
    packed, absmax = quantize(w, levels(name), block_size)
    offset = mean_scale(w, block_size)
    assert offset.item() == np.float32(absmax.double().mean().item())
    scales = module.quantize_scales(absmax, offset, dynamic_map(), nested_block_size, scale_rule)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK", chunk)
        found = quantize_double(w, levels(name), dynamic_map(), block_size, nested_block_size, scale_rule)
    assert_equal(found, (packed, *scales, offset))


@pytest.mark.parametrize("name", ["nf4", "int4", "nf8"])
@pytest.mark.parametrize("n", [1, 129, 1000])
@pytest.mark.parametrize("dtype", FLOATS)
def test_decoding_in_runs_changes_nothing(name: str, n: int, dtype: torch.dtype, monkeypatch):
    packed, absmax = quantize(randn(n), levels(name), 6)
    whole = decode(packed, absmax, (n,), 6, dtype, name)
    for run in (2, 34, 128):
        monkeypatch.setattr(module, "RUN", run)
        assert torch.equal(decode(packed, absmax, (n,), 6, dtype, name), whole)


VIEWS: dict[str, Callable[[], Tensor]] = {
    "transposed": lambda: randn(6, 90).T,
    "every second row": lambda: randn(90, 6)[::2],
    "every second column": lambda: randn(45, 12)[:, ::2],
    "one row of every second": lambda: randn(1, 180)[:, ::2],
    "every third number": lambda: randn(300)[::3],
    "expanded rows": lambda: randn(1, 7).expand(45, 7),
    "expanded columns": lambda: randn(45, 1).expand(45, 7),
    "permuted": lambda: randn(3, 10, 7).permute(2, 0, 1),
    "inner transposed": lambda: randn(3, 10, 7).transpose(1, 2),
    "part": lambda: randn(50, 9)[3:48, 1:8],
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("chunk", [8, 100, 2**19])
def test_a_weight_that_is_not_contiguous_is_read_in_row_major_order(view: str, chunk: int, monkeypatch):
    w = VIEWS[view]()
    assert not w.is_contiguous()
    plain = quantize(w.contiguous(), levels("nf4"), 8)
    double = quantize_double(w.contiguous(), levels("nf4"), dynamic_map(), 8, 4)
    monkeypatch.setattr(module, "CHUNK", chunk)
    assert_equal(quantize(w, levels("nf4"), 8), plain)
    assert_equal(quantize_double(w, levels("nf4"), dynamic_map(), 8, 4), double)


class CopiedNumbers(TorchDispatchMode):
    """Counts the numbers that are copied while it is entered."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.clone, torch.ops.aten._to_copy, torch.ops.aten.copy_):
            self.count += result.numel()
        return result


@pytest.mark.parametrize(
    "w",
    [randn(60, 500).T, randn(3, 15_000)[:, :10_000], randn(2, 60, 250).transpose(1, 2)],
    ids=["transposed", "part of wide rows", "stacked and transposed"],
)
def test_a_weight_that_is_not_contiguous_is_copied_once(w: Tensor, monkeypatch):
    # Chunk by chunk, and not all of a wide row, or of one matrix of several, for each chunk within it.
    monkeypatch.setattr(module, "CHUNK", 1000)
    with CopiedNumbers() as contiguous:
        quantize(w.contiguous(), levels("nf4"), 8)
    with CopiedNumbers() as strided:
        quantize(w, levels("nf4"), 8)
    # w.contiguous() is a copy itself; once more for chunks that begin or end within a row.
    assert w.numel() <= strided.count <= contiguous.count + w.numel()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
def test_equal_numbers_of_another_dtype_give_the_same_bits(dtype: torch.dtype, wide: torch.dtype):
    w = randn(37, 101).to(dtype)
    assert_equal(quantize(w.to(wide), levels("nf4"), 64), quantize(w, levels("nf4"), 64))
    found = quantize_double(w.to(wide), levels("nf4"), dynamic_map(), 64, 16)
    assert_equal(found, quantize_double(w, levels("nf4"), dynamic_map(), 64, 16))


def test_quantizing_does_not_touch_the_weight():
    w = randn(3, 70)
    before = w.clone()
    quantize_double(w, levels("nf4"), dynamic_map(), 64, 2)
    quantize(w, levels("nf4"), 64)
    assert torch.equal(w, before)


@pytest.mark.parametrize("first", FIXED)
def test_what_was_quantized_before_does_not_matter(first: str):
    # Scratch and tables live on between calls; a larger weight leaves its numbers behind the smaller one's.
    w, large = randn(5, 33), randn(50, 90, seed=1)
    fresh = [tuple(part.clone() for part in quantize(w, levels(name), 2)) for name in FIXED]
    quantize(large, levels(first), 64)
    for name, expected in zip(FIXED, fresh, strict=True):
        assert_equal(quantize(w, levels(name), 2), expected)


# -- what cannot be quantized --------------------------------------------------------------------------------

QUANTIZERS = {
    "plain": lambda w: quantize(w, levels("nf4"), 4),
    "double": lambda w: quantize_double(w, levels("nf4"), dynamic_map(), 4, 2),
    "mean": lambda w: mean_scale(w, 4),
}


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("chunk", [4, 2**20])
def test_nan_or_infinity_is_refused_with_the_index_of_the_first(quantizer, dtype, bad, chunk, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", chunk)
    w = torch.ones(3, 5, dtype=dtype)
    w[1, 2] = bad
    w[2, 0] = bad
    with pytest.raises(ValueError, match=rf"holds {bad} \(first at index \(1, 2\)\)"):
        QUANTIZERS[quantizer](w)


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_bad_number_in_the_short_last_block_is_found(quantizer):
    w = torch.zeros(1, 5)
    w[0, 4] = float("nan")
    with pytest.raises(ValueError, match=r"holds nan \(first at index \(0, 4\)\)"):
        QUANTIZERS[quantizer](w)


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("view", VIEWS)
def test_bad_number_deep_in_a_weight_that_is_not_contiguous_is_found(quantizer, view: str, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 40)
    w = VIEWS[view]()
    place = tuple(2 * size // 3 for size in w.shape)
    w[place] = float("inf")
    first = tuple(w.isinf().nonzero()[0].tolist())  # an expanded weight has it in several places
    where = ", ".join(map(str, first)) + ("," if len(first) == 1 else "")
    with pytest.raises(ValueError, match=rf"holds inf \(first at index \({where}\)\)"):
        QUANTIZERS[quantizer](w)


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_float64_beyond_float32_is_refused_with_its_index(quantizer):
    w = torch.ones(2, 3, dtype=torch.float64)
    w[1, 1] = -1e300
    with pytest.raises(ValueError, match=r"-1e\+300.*index \(1, 1\)"):
        QUANTIZERS[quantizer](w)


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("shape", [(0, 4), (4, 0)])
def test_an_empty_weight_is_refused(quantizer, shape):
    with pytest.raises(ValueError, match=f"empty weight of shape .{shape[0]}, {shape[1]}."):
        QUANTIZERS[quantizer](torch.empty(shape))


def test_another_scale_rule_is_refused_with_those_that_there_are():
    with pytest.raises(ValueError, match="scale_rule must be one of midpoint, table, not 'nearest'"):
        quantize_double(torch.ones(2, 4), levels("nf4"), dynamic_map(), 4, 2, "nearest")


# -- codes of scaled numbers ---------------------------------------------------------------------------------

CODEBOOKS: dict[str, Callable[[], Tensor]] = {
    **{name: (lambda name=name: levels(name)) for name in FIXED},
    "dynamic map": dynamic_map,
    "two borders in one pattern": lambda: torch.tensor([-1.0, 0.5, 0.5001, 0.5002, 1.0]),
    "borders close to zero": lambda: torch.tensor([-1e-40, 0.0, 1e-40, 1e-20]),
    "without a zero": lambda: torch.tensor([-1.0, -0.25, 0.25, 1.0]),
    "equal levels": lambda: torch.tensor([-1.0, 0.0, 0.0, 0.0, 0.5, 0.5]),
    "not ascending": lambda: levels("nf6")[torch.randperm(64, generator=torch.Generator().manual_seed(0))],
    "of a weight": lambda: torch.from_numpy(quantile_levels(randn(999).numpy())),
}


def expected_codes(scaled: Tensor, codebook: Tensor) -> list[int]:
    ascending, order = codebook.sort(stable=True)
    places = np.searchsorted(thresholds(ascending).numpy(), scaled.numpy())  # borders strictly below
    return order.numpy()[places].tolist()


@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("lower_bits", [0, 1, 0x8000, 0xFFFF])
def test_codes_count_the_borders_below_for_every_pattern_of_upper_bits(codebook: str, lower_bits: int):
    bits = torch.arange(2**16, dtype=torch.int32) << 16 | lower_bits
    scaled = bits.view(torch.float32)
    finite = scaled[scaled.isfinite()]  # both zeros and denormals included
    assert len(finite) == 2**16 - 2 * 2**7
    assert encode(finite, CODEBOOKS[codebook]()).tolist() == expected_codes(finite, CODEBOOKS[codebook]())


@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_codes_change_within_an_ulp_of_each_border(codebook: str):
    levels = CODEBOOKS[codebook]()
    borders = thresholds(levels.sort().values)
    near = torch.cat([borders, *(borders.nextafter(torch.tensor(end)) for end in (-2.0, 2.0))])
    assert encode(near, levels).tolist() == expected_codes(near, levels)


@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_infinities_take_the_codes_of_the_ends(codebook: str):
    levels = CODEBOOKS[codebook]()
    ends = torch.tensor([float("-inf"), float("inf")])
    assert encode(ends, levels).tolist() == expected_codes(ends, levels)


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
def test_offset_is_the_float64_mean_of_the_scales_rounded_to_float32(n: int):
    # Of blocks of 2, over several chunks where there are many.
    w = randn(n, 2, seed=n)
    offset = mean_scale(w, 2)
    assert (offset.shape, offset.dtype) == ((), torch.float32)
    assert offset.item() == np.float32(w.abs().amax(dim=1).numpy().astype(np.float64).mean())


@pytest.mark.parametrize("n_blocks", [1, 7, 1000, 70_000])
def test_offset_is_that_of_bitsandbytes_to_2_ulps(n_blocks: int, bnb):
    # Its mean is a float32 sum in an order that depends on threads and vectors.
    w = randn(n_blocks, 32)
    *_, offset = quantize_double(w, levels("nf4"), dynamic_map(), 32, 256)
    _, state = bnb.quantize_4bit(w, blocksize=32, quant_type="nf4", compress_statistics=True)
    assert abs(offset.item() - state.offset.item()) <= 2 * np.spacing(np.float32(offset.item()))


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
    absmax = randn(n, seed=seed).abs() * scale
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


@pytest.mark.parametrize("toward", [None, -2.0, 2.0])
def test_a_scale_halfway_between_two_levels_takes_the_even_code_and_its_neighbours_the_nearer(toward):
    scales = thresholds(dynamic_map())
    scales = scales if toward is None else scales.nextafter(torch.tensor(toward))
    # With their mirror images and the ends: the mean is 0 and the largest magnitude 1, so that nothing moves.
    mirrored = torch.cat([scales, -scales, torch.tensor([1.0, -1.0])])
    codes, nested_absmax, offset = quantize_scales(mirrored, dynamic_map(), 1024)
    assert (offset.item(), nested_absmax.tolist()) == (0.0, [1.0])
    lower = torch.arange(255)
    expected = {None: lower + lower % 2, -2.0: lower, 2.0: lower + 1}[toward]
    assert torch.equal(codes[:255].long(), expected)


@pytest.mark.parametrize("n", [1, 2, 300])
@pytest.mark.parametrize("scale_rule", module.SCALE_RULES)
def test_equal_scales_survive_exactly(n: int, scale_rule: str):
    absmax, offset = torch.full((n,), 0.3), torch.tensor(0.3)
    codes, nested_absmax = module.quantize_scales(absmax, offset, dynamic_map(), 256, scale_rule)
    assert not codes.any()
    assert not nested_absmax.any()
    assert torch.equal(dequantize_scales(codes, nested_absmax, dynamic_map(), offset, 256), absmax)


@pytest.mark.parametrize("scale_rule", module.SCALE_RULES)
def test_scales_of_which_the_reciprocal_is_infinite_take_the_end_codes(scale_rule: str):
    # Denormal differences: 1 / 1e-39 is beyond float32. bitsandbytes' CPU code clamps the quotient too.
    absmax, offset = torch.tensor([1e-39, 3e-39]), torch.tensor(2e-39)
    codes, _ = module.quantize_scales(absmax, offset, dynamic_map(), 256, scale_rule)
    assert codes.tolist() == [0, 255]


TABLE_STEPS = torch.arange(65536, dtype=torch.float64) * 2 / 65535 - 1


@pytest.mark.parametrize("shift", [0.0, 0.5, -0.5])
def test_table_rule_gives_the_codes_of_bitsandbytes_at_and_between_all_65536_steps(shift: float, bnb):
    steps = (TABLE_STEPS + shift * 2 / 65535).float().clamp(-1, 1)
    # In blocks of 256 that begin with the largest magnitude, 1, so that nothing moves.
    rows = F.pad(steps, (0, -len(steps) % 255)).view(-1, 255)
    scales = F.pad(rows, (1, 0), value=1.0).flatten()
    found = module.quantize_scales(scales, torch.tensor(0.0), dynamic_map(), 256, "table")
    codes, state = bnb.quantize_blockwise(scales, code=dynamic_map(), blocksize=256)
    assert_equal(found, (codes, state.absmax))
    assert len(codes.unique()) > 240  # it never gives seven codes, those nearest to 127


@settings(max_examples=200, deadline=None)
@given(w=weights(), block_size=st.sampled_from(BNB_BLOCK_SIZES[:3]), heavy=st.booleans())
def test_table_rule_gives_the_codes_of_bitsandbytes(bnb, w: Tensor, block_size: int, heavy: bool):
    # As many scales as there are weights. Squared, they are of very different sizes.
    absmax = w.float().abs().flatten()
    absmax = (absmax / absmax.max().clamp(min=1e-30)) ** 2 if heavy else absmax
    offset = absmax.mean()
    found = module.quantize_scales(absmax, offset, dynamic_map(), 256, "table")
    codes, state = bnb.quantize_blockwise(absmax - offset, code=dynamic_map(), blocksize=256)
    assert_equal(found, (codes, state.absmax))


def test_scales_err_no_more_than_those_of_the_table():
    absmax = randn(3000, 64).abs().amax(1)
    offset = absmax.double().mean().float()
    ours, theirs = (
        dequantize_scales(
            *module.quantize_scales(absmax, offset, dynamic_map(), 256, rule), dynamic_map(), offset, 256
        )
        for rule in ("midpoint", "table")
    )
    assert not torch.equal(ours, theirs)  # it does miss some
    rounding = 2 * 2.0**-24 * absmax.max()  # of product and sum
    assert ((ours - absmax).abs() <= (theirs - absmax).abs() + rounding).all()


@settings(max_examples=80, deadline=None)
@given(w=weights(), bits=st.integers(2, 8), block_size=st.sampled_from([2, 6, 64]))
@example(w=torch.zeros(1, 1025), bits=4, block_size=2)  # a short last block of zeros has a scale, of 1e-38
def test_double_quantization_is_that_of_the_reference(w: Tensor, bits: int, block_size: int):
    packed, codes, nested_absmax, offset = quantize_double(
        w, levels(f"nf{bits}"), dynamic_map(), block_size, 256
    )
    expected = reference.quantize(w.float().numpy(), bits, block_size, double_quant=True)
    assert packed.tolist() == (expected.packed if bits <= 4 else expected.codes.reshape(-1)).tolist()
    assert codes.tolist() == expected.absmax_codes.tolist()
    assert nested_absmax.tolist() == expected.nested_absmax.tolist()
    assert offset.item() == expected.offset
    decoded = decode_double((packed, codes, nested_absmax, offset), w.shape, block_size, name=f"nf{bits}")
    assert decoded.tolist() == reference.dequantize(expected).tolist()


@pytest.mark.parametrize("n", [1, 255, 256, 257, 600])
def test_scales_decode_to_the_bits_of_bitsandbytes(n: int, bnb):
    absmax = randn(n, seed=n).abs()
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


@pytest.mark.parametrize("first", [0, 1, 15, 16, 17, 99])
@pytest.mark.parametrize("n", [1, 16, 40])
def test_scales_decode_from_any_one_on_and_into_an_out(first: int, n: int):
    codes, nested_absmax, offset = quantize_scales(randn(150).abs(), dynamic_map(), 16)
    whole = dequantize_scales(codes, nested_absmax, dynamic_map(), offset, 16)
    out = torch.full((n,), -1.0)
    args = codes[first : first + n], nested_absmax, dynamic_map(), offset, 16, first
    found = dequantize_scales(*args, out)
    assert found.data_ptr() == out.data_ptr()
    assert torch.equal(out, whole[first : first + n])
    assert torch.equal(dequantize_scales(*args), out)


# -- decoding ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FIXED)
def test_byte_table_holds_the_levels_of_every_byte_and_nan_where_there_is_none(name: str):
    known = levels(name).tolist() + [float("nan")] * 256
    codes = [[byte // 16, byte % 16] if len(levels(name)) <= 16 else [byte] for byte in range(256)]
    expected = np.array([[known[code] for code in row] for row in codes], dtype=np.float32)
    np.testing.assert_array_equal(byte_table(levels(name)).numpy(), expected)


@pytest.mark.parametrize("name", ["nf4", "fp4"])
@settings(max_examples=150, deadline=None)
@given(
    w=weights(extremes=True),
    block_size=st.sampled_from(BNB_BLOCK_SIZES),
    dtype=st.sampled_from(FLOATS),
    double_quant=st.booleans(),
)
def test_weights_decode_to_the_bits_of_bitsandbytes(
    bnb, name: str, w, block_size: int, dtype, double_quant: bool
):
    if double_quant:
        parts = quantize_double(w, levels(name), dynamic_map(), block_size, 256)
        ours = decode_double(parts, w.shape, block_size, dtype, name)
    else:
        parts = quantize(w, levels(name), block_size)
        ours = decode(*parts, w.shape, block_size, dtype, name)
    theirs = bnb_decode(bnb, parts, tuple(w.shape), block_size, dtype, name)
    if dtype == torch.bfloat16:
        # Where a CPU has an instruction for it, theirs writes zero for every denormal number. What is right
        # there is their own float32, rounded.
        exact = bnb_decode(bnb, parts, tuple(w.shape), block_size, torch.float32, name).to(dtype)
        theirs = torch.where(exact.abs() < 2**-126, exact, theirs)
    assert_equal([ours], [theirs])


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(["nf4", "int4", "nf8"]),
    block_size=st.sampled_from([2, 6, 64]),
    start=st.integers(0, 200),
    n=st.integers(1, 200),
    dtype=st.sampled_from(FLOATS),
    behind=st.integers(0, 1),
)
def test_a_run_from_any_byte_on_decodes_to_its_part_of_the_whole(name, block_size, start, n, dtype, behind):
    packed, absmax = quantize(randn(401), levels(name), block_size)
    whole = decode(packed, absmax, (401,), block_size, dtype, name)
    per_byte = 2 if len(levels(name)) <= 16 else 1
    start -= start % per_byte
    out = torch.zeros(behind + n, dtype=dtype)[behind:]  # begins at any address
    args = packed[start // per_byte :], absmax[start // block_size :], levels(name), block_size
    assert dequantize(*args, out, first=start % block_size) is out
    assert torch.equal(out, whole[start : start + n])


@pytest.mark.parametrize("first", range(0, 14))
@pytest.mark.parametrize("n", [1, 3, 6, 7, 20])
def test_blocks_are_scaled_from_any_number_of_the_first_on(first: int, n: int):
    values, scales = randn(n), randn(9, seed=1)
    expected = values * scales.repeat_interleave(6)[first : first + n]
    scale_blocks_(values, scales[first // 6 :], 6, first % 6)
    assert torch.equal(values, expected)


@pytest.mark.parametrize("n", [1, 63, 64, 65, 130])
def test_decoding_to_float64_adds_no_digits(n: int):
    packed, absmax = quantize(randn(n, seed=n), levels("nf4"), 64)
    exact = decode(packed, absmax, (n,), 64, torch.float64)
    assert torch.equal(exact, decode(packed, absmax, (n,), 64).double())


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_nothing_depends_on_the_default_dtype(default: torch.dtype):
    parts = quantize_double(randn(7, 9), levels("nf4"), dynamic_map(), 4, 4)
    expected = decode_double(parts, (7, 9), 4, torch.bfloat16, nested=4)
    w = randn(7, 9)
    torch.set_default_dtype(default)
    try:
        assert_equal(quantize_double(w, levels("nf4").clone(), dynamic_map(), 4, 4), parts)
        assert torch.equal(decode_double(parts, (7, 9), 4, torch.bfloat16, nested=4), expected)
    finally:
        torch.set_default_dtype(torch.float32)


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
        stored = torch.tensor(facts["offset"], dtype=torch.float32)
        torch.testing.assert_close(mean_scale(tensors["in"], block_size), stored, rtol=2.0**-23, atol=0)
        found = module.quantize_scales(absmax, stored, nested_map, 256, "table")
        assert_equal(found, (tensors["absmax"], tensors["nested_absmax"]))
        absmax = dequantize_scales(tensors["absmax"], tensors["nested_absmax"], nested_map, stored, 256)
    else:
        assert torch.equal(absmax, tensors["absmax"])
    for name, dtype in DTYPES.items():
        assert torch.equal(decode(packed, absmax, shape, block_size, dtype), tensors[f"deq_{name}"])


# -- a sample for quantile levels ----------------------------------------------------------------------------


@pytest.mark.parametrize("view", ["contiguous", "transposed"])
def test_sample_is_scaled_numbers_from_all_over_the_weight(view: str):
    w = torch.arange(1.0, 2**16 + 1).view(256, 256)  # in blocks of 4, so that the quotients tell their place
    w = w.T.contiguous().T if view == "transposed" else w
    sample = scaled_sample(w, 4, n=4096)
    scaled = (w.reshape(-1, 4) / w.reshape(-1, 4)[:, 3:]).view(-1)
    assert (sample.dtype, sample.dim()) == (torch.float32, 1)
    assert 4096 <= len(sample) <= 2 * 4096
    places = torch.searchsorted(scaled[::4].contiguous(), sample[::4] - 1e-7)  # of the blocks: they ascend
    torch.testing.assert_close(scaled.view(-1, 4)[places].view(-1), sample, rtol=2.0**-22, atol=0)
    assert torch.histc(places.float(), 8, 0, len(scaled) / 4).min() > 0  # some from each eighth


def test_sample_of_a_small_weight_is_all_of_it():
    w = randn(9, 71)
    scaled = w.view(-1)[: 9 * 64].view(-1, 64)
    expected = (scaled / scaled.abs().amax(1, keepdim=True)).view(-1)
    sample = scaled_sample(w, 64)
    assert len(sample) == w.numel()
    torch.testing.assert_close(sample[: 9 * 64], expected, rtol=2.0**-22, atol=0)


# -- memory --------------------------------------------------------------------------------------------------

PEAK = """
import resource, sys, torch
from minqlora.codebook import dynamic_map, levels
from minqlora.quantize import quantize, quantize_double

def peak():
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

millions, dtype, layout, double = sys.argv[1:]
generator = torch.Generator().manual_seed(0)
weight = torch.empty(int(millions) * 256, 4096, dtype=getattr(torch, dtype)).normal_(generator=generator)
weight = weight.T if layout == "transposed" else weight
before = peak()
assert before > weight.nbytes
if double == "double":
    parts = quantize_double(weight, levels("nf4"), dynamic_map(), 64, 256)
else:
    parts = quantize(weight, levels("nf4"), 64)
print(peak() - before - sum(part.nbytes for part in parts))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux only")
@pytest.mark.parametrize(
    "millions, dtype, layout, double",
    [
        (16, "float32", "contiguous", "double"),
        (16, "float32", "transposed", "plain"),
        pytest.param(64, "float32", "contiguous", "double", marks=pytest.mark.slow),
        pytest.param(64, "bfloat16", "contiguous", "double", marks=pytest.mark.slow),
        pytest.param(64, "bfloat16", "transposed", "plain", marks=pytest.mark.slow),
    ],
)
def test_quantizing_needs_little_memory_besides_its_result(
    millions: int, dtype: str, layout: str, double: str
):
    # Magnitudes of 16 million numbers are 64 MB already. A chunk needs 11 MiB; the first operators of a
    # process (threads, their stacks and buffers) some more.
    command = [sys.executable, "-c", PEAK, str(millions), dtype, layout, double]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert int(done.stdout) <= 48 * 2**20


def held_by_scratch() -> int:
    return sum(buffer.nbytes for buffer in vars(module._scratch).values())


@pytest.mark.parametrize("name", ["nf4", "nf8"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_scratch_stays_under_16_mib_whatever_the_matrix(name: str, dtype: torch.dtype):
    def decode_a_large_one() -> int:  # of odd width, and thrice as large as 16 MiB
        packed = torch.zeros(12_000_005, dtype=torch.uint8)
        decode(packed, torch.ones(200_000), (3, 4_000_001), 64, dtype, name)
        return held_by_scratch()

    with ThreadPoolExecutor(1) as fresh:  # a thread has a scratch of its own
        held = fresh.submit(decode_a_large_one).result()
    assert 0 < held <= 2**24


def test_scratch_stays_under_16_mib_however_many_scales():
    def decode_many() -> int:  # those of 256 million weights
        codes = torch.zeros(2**22, dtype=torch.uint8)
        dequantize_scales(codes, torch.ones(2**14), dynamic_map(), torch.tensor(0.0), 256)
        return held_by_scratch()

    with ThreadPoolExecutor(1) as fresh:
        assert 0 < fresh.submit(decode_many).result() <= 2**24


def test_quantizing_and_decoding_share_a_scratch_of_16_mib():
    def both() -> int:
        w = randn(3, 500_001)
        packed, absmax = quantize(w, levels("nf4"), 64)
        decode(packed, absmax, w.shape, 64, torch.bfloat16)
        return held_by_scratch()

    with ThreadPoolExecutor(1) as fresh:
        assert 0 < fresh.submit(both).result() <= 2**24


def test_scratch_of_a_name_is_reused_and_grows():
    cpu = torch.device("cpu")
    first = scratch("test", 10, torch.float32, cpu)
    assert (first.shape, first.dtype) == ((10,), torch.float32)
    assert scratch("test", 20, torch.bfloat16, cpu).data_ptr() == first.data_ptr()
    assert scratch("other", 10, torch.float32, cpu).data_ptr() != first.data_ptr()
    assert scratch("test", 11, torch.float32, cpu).shape == (11,)
    del module._scratch.test, module._scratch.other


def test_what_inference_mode_made_serves_outside_of_it():
    # Scratch, codebook's tables: kept, and written to or looked up in by the next call.
    def quantize_and_decode(codebook: Tensor) -> Tensor:
        w = randn(9, 71)
        packed, absmax = quantize(w, codebook, 64)
        return dequantize(packed, absmax, codebook, 64, torch.empty(w.shape, dtype=torch.bfloat16))

    def within_and_outside(codebook: Tensor) -> tuple[Tensor, Tensor]:
        with torch.inference_mode():
            within = quantize_and_decode(codebook)
        return within, quantize_and_decode(codebook)

    for name in ("nf4", "fp4", "nf8"):
        with ThreadPoolExecutor(1) as fresh:
            within, outside = fresh.submit(within_and_outside, levels(name).clone()).result()
        assert torch.equal(within.clone(), outside)


def test_two_threads_at_a_time_do_not_disturb_each_other():
    # The larger chunks take milliseconds, in which PyTorch lets the other thread run.
    jobs = [(randn(700, 401, seed=seed), name) for seed, name in enumerate(["nf4", "fp4"])]

    def quantize_and_decode(w: Tensor, name: str) -> tuple[Tensor, ...]:
        parts = quantize(w, levels(name), 64)
        return *parts, decode(*parts, w.shape, 64, torch.bfloat16, name)

    expected = [quantize_and_decode(*job) for job in jobs]
    with ThreadPoolExecutor(2) as threads:
        for _ in range(10):
            for found, right in zip(
                threads.map(quantize_and_decode, *zip(*jobs, strict=True)), expected, strict=True
            ):
                assert_equal(found, right)


@pytest.mark.parametrize("shape", [(3, 5), (2**20, 1), (7, 300_001), (2, 3, 400_000), (0, 4)])
@pytest.mark.parametrize("dtype", [*FLOATS, torch.uint8])
def test_an_empty_tensor_is_any_tensor_to_write_to(shape, dtype: torch.dtype):
    made = empty(shape, dtype, torch.device("cpu"))
    assert (made.shape, made.dtype, made.is_contiguous()) == (shape, dtype, True)
    made.copy_(torch.arange(made.numel()).view(shape) % 100)
    gc.collect()
    assert torch.equal(made, (torch.arange(made.numel()).view(shape) % 100).to(dtype))


def test_an_allocator_that_keeps_pages_is_asked_for_them(monkeypatch):
    monkeypatch.setattr(module, "_allocator_keeps_pages", lambda: True)
    monkeypatch.setattr(module.mmap, "mmap", None)
    assert module.empty((2**10, 2**11), torch.float32, torch.device("cpu")).shape == (2**10, 2**11)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc")
def test_memory_of_a_large_empty_tensor_is_given_back():
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    size = 64 * 2**20
    before = resident()
    made = empty((size,), torch.uint8, torch.device("cpu")).fill_(1)
    view = made[: size // 2].view(torch.float32)
    del made
    gc.collect()
    held = resident()
    del view
    gc.collect()
    assert held - before > 0.9 * size  # a view keeps it
    assert held - resident() > 0.9 * size


def test_a_kernel_without_huge_pages_gives_ordinary_ones(monkeypatch):
    class Refusing(module.mmap.mmap):
        def madvise(self, *_):
            raise OSError(22, "Invalid argument")  # as Linux does if built without them

    monkeypatch.setattr(module.mmap, "mmap", Refusing)
    made = empty((2**22,), torch.float32, torch.device("cpu"))
    assert made.fill_(1).sum() == 2**22


# -- the other device ----------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", ["nf4", "fp4", "nf8"])
def test_a_gpu_gives_the_same_bytes_and_scales(name: str, dtype: torch.dtype, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 500)
    monkeypatch.setattr(module, "RUN", 500)
    w = randn(37, 101).to(dtype)
    w[5] = 0
    here = quantize_double(w, levels(name), dynamic_map(), 64, 16)
    there = quantize_double(w.cuda(), levels(name, "cuda"), dynamic_map("cuda"), 64, 16)
    assert_equal([part.cpu() for part in there], here)
    packed, codes, nested_absmax, offset = there
    absmax = dequantize_scales(codes, nested_absmax, dynamic_map("cuda"), offset, 16)
    out = torch.empty(w.shape, dtype=dtype, device="cuda")
    decoded = dequantize(packed, absmax, levels(name, "cuda"), 64, out)
    assert torch.equal(decoded.cpu(), decode_double(here, w.shape, 64, dtype, name, nested=16))
