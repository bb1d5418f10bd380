"""The levels: published constants, their derivations, and the map for scales, each to the bit."""

import hashlib
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.stats import norm

from minqlora import codebook as module
from minqlora.codebook import (
    INT4_LEVELS,
    NF4_LEVELS,
    QUANT_TYPES,
    dynamic_map,
    floating_point,
    levels,
    normal_float,
    quantile_levels,
    shared,
    thresholds,
)

FIXED = [name for name, fixed in QUANT_TYPES.items() if fixed is not None]
ASCENDING = ["nf2", "nf3", "nf4", "nf5", "nf6", "nf7", "nf8", "int4"]

# Of the 256 float32 in little-endian order, as bitsandbytes' map has them.
DYNAMIC_MAP_SHA256 = {
    True: "e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c",
    False: "305f002cc11278fb769d13b25b9fd0c7c83c8402c40a878fe086f4039fde6398",
}

# The borders that bitsandbytes' kernels compare with.
NF4_BORDERS = [
    *(-0.8480963706970215, -0.6106328964233398, -0.4599952697753906, -0.33967941999435425),
    *(-0.23460739850997925, -0.13791173696517944, -0.045525018125772476, 0.03979014977812767),
    *(0.120255246758461, 0.2035212516784668, 0.2920137643814087, 0.3893125355243683),
    *(0.5016634464263916, 0.6427869200706482, 0.8614784479141235),
]


@pytest.fixture(scope="module")
def bnb():
    return pytest.importorskip("bitsandbytes.functional")


# -- NF4 -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_constants_are_those_of_bitsandbytes(name: str, bnb):
    assert torch.equal(levels(name), bnb.get_4bit_type(name, device="cpu"))


def test_constants_are_those_of_the_golden_vectors(shared_data: Path):
    assert torch.equal(levels("nf4"), load_file(shared_data / "golden_bnb.safetensors")["nf4"])


def test_constants_read_back_to_the_same_float32():
    assert levels("nf4").dtype == torch.float32
    assert levels("nf4").tolist() == list(NF4_LEVELS)


def test_constants_follow_from_the_quantiles_of_a_normal():
    assert normal_float(4).dtype == np.float32
    assert normal_float(4).tolist() == list(NF4_LEVELS)


@pytest.mark.parametrize("bits", range(2, 9))
def test_normal_float_of_any_width_holds_both_ends_and_zero(bits: int):
    levels = normal_float(bits)
    assert len(levels) == 2**bits
    assert (np.diff(levels) > 0).all()
    assert (levels[0], levels[2 ** (bits - 1) - 1], levels[-1]) == (-1, 0, 1)


@pytest.mark.parametrize("bits", range(2, 9))
def test_neighbouring_levels_of_one_side_have_equal_mass_between_them(bits: int):
    # On its own scale a side is n equal steps of probability from 1/2 outwards. The outermost probability is
    # the mean of (1 - 1 / 2n) and (1 - 1 / (2n - 2)), rounded to 7 digits: hence the tolerance.
    levels = normal_float(bits).astype(np.float64)
    n = 2**bits
    end = norm.ppf(1 - (1 / (2 * n) + 1 / (2 * n - 2)) / 2)
    for side in (levels[levels >= 0], levels[levels <= 0]):
        mass = np.diff(norm.cdf(side * end))
        np.testing.assert_allclose(mass, mass.mean(), atol=2e-7)


@pytest.mark.parametrize("bits", [-1, 0, 1, 9])
def test_normal_float_has_2_to_8_bits(bits: int):
    with pytest.raises(ValueError, match=f"2 to 8 bits, not {bits}"):
        normal_float(bits)


# -- small floats --------------------------------------------------------------------------------------------


def assert_same_floats(found: np.ndarray, expected: np.ndarray) -> None:
    """Equal in value and in sign, that of zero included."""
    assert found.dtype == np.float32
    assert found.tolist() == expected.astype(np.float32).tolist()
    assert np.signbit(found).tolist() == np.signbit(expected).tolist()


@pytest.mark.parametrize(
    "bits, positive",
    [
        ((2, 1), [0, 0.5, 1, 1.5, 2, 3, 4, 6]),  # FP4 of the OCP standard, in its own units
        ((3, 0), [0, 1, 2, 4, 8, 16, 32, 64]),
        ((1, 2), [0, 1, 2, 3, 4, 5, 6, 7]),  # one exponent bit is none: the numbers lie evenly
    ],
)
def test_small_floats_stand_in_the_order_of_their_bits_with_the_sign_first(bits, positive):
    numbers = np.array(positive, dtype=np.float64)
    assert_same_floats(floating_point(*bits), np.concatenate([numbers, -numbers]) / numbers.max())


@pytest.mark.parametrize(
    "bits, dtype", [((4, 3), torch.float8_e4m3fn), ((5, 2), torch.float8_e5m2), ((5, 10), torch.float16)]
)
def test_small_floats_are_the_finite_ones_of_torch(bits, dtype: torch.dtype):
    # Theirs keep the highest patterns for NaN or infinity; here these too are numbers, and the last one is 1.
    n = 2 ** (1 + sum(bits))
    patterns = torch.arange(n, dtype=torch.int32).to(torch.uint16 if n > 256 else torch.uint8)
    theirs = patterns.view(dtype).double().numpy()
    bias = 2 ** (bits[0] - 1) - 1
    largest = (2 - 0.5 ** bits[1]) * 2.0 ** (2 ** bits[0] - 1 - bias)
    finite = np.isfinite(theirs)
    assert 0.9 * n < finite.sum() < n
    assert_same_floats(floating_point(*bits)[finite], theirs[finite] / largest)
    assert np.abs(floating_point(*bits)).max() == floating_point(*bits)[n // 2 - 1] == 1


# -- levels by name ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FIXED)
def test_levels_of_every_name_reach_one_and_hold_an_exact_zero(name: str):
    found = levels(name)
    assert (found.dtype, found.dim()) == (torch.float32, 1)
    assert 2 <= len(found) <= 256
    assert (found.min(), found.max()) == (-1, 1)
    assert (found == 0).any()


@pytest.mark.parametrize("bits", range(2, 9))
def test_levels_named_nf_are_normal_floats_of_that_width(bits: int):
    assert levels(f"nf{bits}").tolist() == normal_float(bits).tolist()


def test_int4_is_15_levels_evenly_spaced_around_zero():
    assert len(INT4_LEVELS) == 15
    np.testing.assert_allclose(
        7 * levels("int4").double(), np.arange(-7, 8), atol=7 * 2.0**-25
    )  # one rounding
    assert torch.equal(levels("int4"), -levels("int4").flip(0))


@pytest.mark.parametrize("name", ["nf9", "NF4", "quantile", ""])
def test_a_name_without_fixed_levels_is_refused_with_those_that_have_some(name: str):
    known = "nf4, fp4, int4, fp4_e2m1, fp4_e3m0, nf2, nf3, nf5, nf6, nf7, nf8"
    with pytest.raises(
        ValueError, match=f"quant_type {name!r} has no fixed levels; those that have: {known}$"
    ):
        levels(name)


# -- quantiles of the numbers themselves ---------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("share", [1, 2, 7])
def test_quantile_levels_are_the_medians_of_equal_shares(bits: int, share: int):
    numbers = np.random.default_rng(0).standard_cauchy(share * 2**bits)
    medians = np.median(np.sort(numbers).reshape(2**bits, share), axis=1)
    found = quantile_levels(numbers, bits)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, medians, rtol=2.0**-23)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("bins", [None, 4096])
def test_every_quantile_code_is_used_equally_often(bits: int, bins: int | None):
    # Of numbers that lie evenly, 16 to a code; with bins, those nearest a border may fall to its other side.
    numbers = np.random.default_rng(0).permutation(16 * 2**bits).reshape(2**bits, 16)
    borders = thresholds(torch.from_numpy(quantile_levels(numbers, bits, bins))).numpy()
    counts = np.bincount(np.searchsorted(borders, numbers.reshape(-1)), minlength=2**bits)
    assert (np.abs(counts - 16) <= (0 if bins is None else 2)).all()


def test_quantile_codes_of_normal_numbers_are_used_nearly_equally_often():
    # The nearest level decides, and in a tail the midpoint of two medians is not the border of their shares:
    # the outer code gets the mass below (q(1/32) + q(3/32)) / 2, which is 0.0559 and not 1/16, 10.6 % less.
    numbers = norm.ppf((np.arange(16_000) + 0.5) / 16_000)
    borders = thresholds(torch.from_numpy(quantile_levels(numbers))).numpy()
    counts = np.bincount(np.searchsorted(borders, numbers), minlength=16)
    assert (np.abs(counts / 1000 - 1) <= 0.11).all()


@pytest.mark.parametrize("draw", ["standard_normal", "standard_cauchy", "random"])
@pytest.mark.parametrize("bins", [16, 1000])
def test_quantile_levels_by_histogram_are_right_to_a_bins_width(draw: str, bins: int):
    numbers = getattr(np.random.default_rng(0), draw)(3001)
    width = np.ptp(numbers) / bins * (1 + 1e-6)  # the result is rounded to float32
    for level, share in zip(quantile_levels(numbers, 4, bins), (np.arange(16) + 0.5) / 16, strict=True):
        assert (numbers < level - width).mean() <= share <= (numbers < level + width).mean()


@pytest.mark.parametrize("bins", [None, 100])
def test_quantile_levels_of_few_or_equal_numbers_are_these_numbers(bins: int | None):
    for numbers in (np.full((3, 5), 0.25), [0.25]):
        found = quantile_levels(numbers, 4, bins)
        np.testing.assert_allclose(
            found, 0.25, atol=0 if bins is None else 1 / 100
        )  # numpy's range is 1 wide


def test_quantile_levels_of_nothing_are_refused():
    with pytest.raises(ValueError, match="quantile levels need at least one number"):
        quantile_levels(np.empty((0, 3)))


# -- the dynamic map -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("signed", [True, False])
def test_dynamic_map_has_the_published_bits(signed: bool):
    levels = dynamic_map(signed=signed)
    assert levels.dtype == torch.float32
    assert hashlib.sha256(levels.numpy().astype("<f4").tobytes()).hexdigest() == DYNAMIC_MAP_SHA256[signed]


def test_dynamic_map_is_that_of_bitsandbytes(bnb):
    # Theirs comes from torch.linspace, whose last bits depend on the CPU: two roundings of 2**-24 apart.
    torch.testing.assert_close(dynamic_map(), bnb.create_dynamic_map(), rtol=2 * 2**-23, atol=0)


def test_dynamic_map_is_that_of_the_golden_vectors(shared_data: Path):
    assert torch.equal(dynamic_map(), load_file(shared_data / "golden_bnb.safetensors")["dynamic_map_signed"])


def test_dynamic_map_has_zero_at_127_and_no_minus_one():
    levels = dynamic_map()
    assert (levels[1:] > levels[:-1]).all()
    assert levels.shape == (256,)
    assert levels[127] == 0
    assert levels[0] > -1
    assert levels[255] == 1
    assert torch.equal(levels[:127], -levels[128:255].flip(0))


def test_dynamic_map_doubles_its_levels_with_every_power_of_ten():
    positive = dynamic_map()[128:]
    edges = [0.0, *(10.0**i for i in range(-6, 1)), 2.0]
    counts = torch.histogram(positive.double(), torch.tensor(edges, dtype=torch.float64)).hist.tolist()
    assert counts == [1, 2, 4, 8, 16, 32, 64, 1]  # the last one is 1.0 itself


# -- borders -------------------------------------------------------------------------------------------------


def test_thresholds_are_the_borders_of_bitsandbytes():
    assert thresholds(levels("nf4")).tolist() == NF4_BORDERS


@pytest.mark.parametrize("codebook", [*(partial(levels, name) for name in ASCENDING), dynamic_map])
def test_thresholds_are_the_midpoints_rounded_once(codebook):
    found = codebook().numpy()
    midpoints = (found[:-1].astype(np.float64) + found[1:]) / 2
    assert thresholds(codebook()).numpy().tolist() == midpoints.astype(np.float32).tolist()


def test_worked_example_of_the_docstring():
    weights = torch.tensor([0.30, -0.02, 0.11, -0.40])
    scaled = weights / weights.abs().max()
    codes = torch.bucketize(scaled, thresholds(levels("nf4")))
    assert codes.tolist() == [14, 6, 10, 0]
    assert [round(level, 4) for level in levels("nf4")[codes].tolist()] == [0.7230, -0.0911, 0.2461, -1.0]
    assert [round(w, 4) for w in (levels("nf4")[codes] * 0.40).tolist()] == [0.2892, -0.0364, 0.0984, -0.4]


@pytest.mark.parametrize("name", ["nf4", "int4", "fp4", "fp4_e2m1", "fp4_e3m0"])
def test_comparison_in_the_docstring_names_the_level_nearest_to_0275(name: str):
    written = re.search(rf"^    {name}  .*?  (0\.\d+)  ", module.__doc__, re.MULTILINE)[1]
    nearest = min(levels(name).tolist(), key=lambda level: abs(level - 0.275))
    assert float(written) == round(nearest, 4)


# -- one codebook for all ------------------------------------------------------------------------------------


@pytest.mark.parametrize("codebook", [*(partial(levels, name) for name in FIXED), dynamic_map])
def test_a_device_has_one_codebook_however_it_is_named(codebook):
    assert codebook() is codebook("cpu") is codebook(torch.device("cpu"))
    assert codebook("meta").device == torch.device("meta")


@pytest.mark.parametrize("place", [0, 255])
def test_equal_levels_are_one_object_and_others_are_not(place: int):
    old = dynamic_map().clone()
    old[place] *= 1.007  # to -1 at place 0, nearly as files of old versions of bitsandbytes hold it
    assert shared(dynamic_map().clone(), "cpu") is dynamic_map()
    assert shared(old, "cpu") is not dynamic_map()
    assert shared(old.clone(), "cpu") is shared(old, "cpu")


@pytest.mark.parametrize("codebook", [partial(levels.__wrapped__, "nf4"), dynamic_map.__wrapped__])
def test_codebooks_first_asked_for_in_inference_mode_serve_training_later(codebook, monkeypatch):
    # They are kept for all of the process, and a tensor of inference mode cannot be saved for backward.
    monkeypatch.setattr(module, "_SHARED", {})
    with torch.inference_mode():
        found = codebook()
    assert not found.is_inference()


@pytest.mark.parametrize("codebook", [partial(levels.__wrapped__, "nf4"), dynamic_map.__wrapped__])
def test_codebooks_do_not_depend_on_the_default_device(codebook, monkeypatch):
    monkeypatch.setattr(module, "_SHARED", {})
    with torch.device("meta"):  # as when a model is built before its weights are there
        found = codebook()
    assert torch.equal(found, codebook("cpu"))
