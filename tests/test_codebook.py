"""The levels: the published constants, their derivation, and the map for scales, each to the bit."""

import hashlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.stats import norm

from minqlora.codebook import NF4_LEVELS, dynamic_map, levels, normal_float, shared, thresholds

bnb = pytest.importorskip("bitsandbytes.functional")

# Of the 256 float32 in little-endian order, as bitsandbytes' map has them.
DYNAMIC_MAP_SHA256 = "e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c"

# The borders that bitsandbytes' kernels compare with.
NF4_BORDERS = [
    *(-0.8480963706970215, -0.6106328964233398, -0.4599952697753906, -0.33967941999435425),
    *(-0.23460739850997925, -0.13791173696517944, -0.045525018125772476, 0.03979014977812767),
    *(0.120255246758461, 0.2035212516784668, 0.2920137643814087, 0.3893125355243683),
    *(0.5016634464263916, 0.6427869200706482, 0.8614784479141235),
]


# -- NF4 -----------------------------------------------------------------------------------------------------


def test_constants_are_those_of_bitsandbytes():
    assert torch.equal(levels("nf4"), bnb.get_4bit_type("nf4", device="cpu"))


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


# -- the dynamic map -----------------------------------------------------------------------------------------


def test_dynamic_map_has_the_published_bits():
    levels = dynamic_map()
    assert levels.dtype == torch.float32
    assert hashlib.sha256(levels.numpy().astype("<f4").tobytes()).hexdigest() == DYNAMIC_MAP_SHA256


def test_dynamic_map_is_that_of_bitsandbytes():
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


@pytest.mark.parametrize("codebook", [partial(levels, "nf4"), dynamic_map])
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


# -- one codebook for all ------------------------------------------------------------------------------------


@pytest.mark.parametrize("codebook", [partial(levels, "nf4"), dynamic_map])
def test_a_device_has_one_codebook_however_it_is_named(codebook):
    assert codebook() is codebook("cpu") is codebook(torch.device("cpu"))
    assert codebook("meta").device == torch.device("meta")


def test_equal_levels_are_one_object_and_others_are_not():
    old = dynamic_map().clone()
    old[0] = -1.0  # as files of old versions of bitsandbytes hold it
    assert shared(dynamic_map().clone(), "cpu") is dynamic_map()
    assert shared(old, "cpu") is not dynamic_map()
    assert shared(old.clone(), "cpu") is shared(old, "cpu")
