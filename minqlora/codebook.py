"""Chapter 1. The levels: which 16 numbers a 4-bit code can stand for.

Weights of a trained network look normal around zero, so the 16 levels of NF4 (4-bit NormalFloat) are put
where a normal distribution has equal mass between neighbours: close together near 0, where most weights are,
and far apart near the ends. A block of weights is divided by its largest magnitude first, so the levels need
only cover [-1, 1]. (The normal of the formula ends at 1.85 standard deviations, the blocks of 64 normal
weights at 2.6 on average: there an inner code stands for 3.6 to 9.3 % of the weights, not for a sixteenth.)

Four weights, worked by hand::

    weights             0.30    -0.02     0.11    -0.40
    absmax              0.40                                  the block's largest magnitude, its scale
    weights / absmax    0.75    -0.05     0.275   -1.00
    nearest level       0.7230  -0.0911   0.2461  -1.0000
    code                  14        6       10        0
    decoded             0.2892  -0.0364   0.0984  -0.4000     level * absmax

What else the 16 levels could be, for comparison, each as close as it comes to 0.275::

    nf4        normal quantiles, an exact zero          0.2461    equal mass of the normal it is made from
    int4       -7/7, -6/7 ... 7/7, evenly spaced        0.2857    as fine at the ends, where few weights are
    fp4        bitsandbytes' float, 1 + 2 + 1 bits      0.25      0.0052, and then nothing before 0.1667
    fp4_e2m1   the OCP standard's float, 1 + 2 + 1      0.25      ends at 6 = 1.5 * 2 ** 2
    fp4_e3m0   powers of two, 1 + 3 + 0                 0.25      1/64, 1/32 ... 1: nothing between 1/2 and 1
    quantile   the quantiles of the weight              its own   NormalFloat's origin; one codebook a matrix

The scales are numbers too, one for every 64 weights, and Chapter 3 stores each of those in 8 bits with a
second codebook: the *dynamic map*, 256 levels over seven powers of ten, finest, for their size, where the
largest are.

Shapes and dtypes: every codebook here is a 1-D float32 tensor, and a code is a place in it; `levels("nf4")`
has 16 entries, `dynamic_map()` 256. They ascend, but for those of `fp4*`, which stand in the order of their
bits (sign, exponent, mantissa). Cost: 64 and 1,024 bytes, once for a whole model, however many layers use
them.

Differences. The paper describes NF4 by formula; bitsandbytes publishes the resulting constants, and those are
the standard: a checkpoint is only portable if both sides mean the same 16 floats. So the constants are
written down, and `normal_float` derives them again so that a test can compare the two bit for bit. The
paper's dynamic map for scales is bitsandbytes' too, and so is its FP4, which no standard knows. The paper
averages two neighbouring quantiles for a level; `quantile_levels` takes the one in the middle of each share,
which treats both ends alike.

Paper: "4-bit NormalFloat Quantization", "Block-wise k-bit Quantization"; the dynamic map: "8-bit Optimizers
via Block-wise Quantization", "Dynamic Quantization".

Before: the equation, in `minqlora/__init__.py`. Next: reference.
"""

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from scipy.special import ndtri  # the inverse of the normal distribution function
from torch import Tensor

# The published constants (float32, shortest text that reads back to the same bits): 7 negative levels, zero,
# 8 positive.
NF4_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


def normal_float(bits: int = 4) -> np.ndarray:
    """Derive the levels of k-bit NormalFloat from the quantiles of a standard normal.

    Half of the levels are quantiles of the positive side, half (less one) of the negative side, and zero is
    one of them exactly, because padding and pruned weights must survive. The outermost probability is
    `offset`: the mean of the two values that either side would choose alone, so that no level sits at
    infinity.

    Returns a float32 array of 2**bits levels, ascending, from -1 to 1. Raises ValueError unless 2 <= bits <=
    8. Source: the paper, "4-bit NormalFloat Quantization".
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"NormalFloat has 2 to 8 bits, not {bits}")
    n = 2**bits
    # Rounded, because the constants were made from 0.9677083, not from 929/960.
    offset = round(1 - (1 / (2 * n) + 1 / (2 * n - 2)) / 2, 7)
    positive = ndtri(_linspace(offset, 0.5, n // 2 + 1)[:-1].astype(np.float64))
    negative = -ndtri(_linspace(offset, 0.5, n // 2)[:-1].astype(np.float64))
    levels = np.sort(np.concatenate([negative, [0.0], positive]).astype(np.float32))
    return levels / levels.max()


def _linspace(start: float, stop: float, points: int) -> np.ndarray:
    # In float32, walked in from both ends with one rounding a point. The published constants were computed
    # from such probabilities, and float64 misses most of them by an ulp or more. (torch.linspace is the same
    # only where its vectorised loop is: its last bit depends on the CPU.)
    first, last = np.float32(start), np.float32(stop)
    step = np.float64((last - first) / np.float32(points - 1))
    index = np.arange(points)
    from_start = np.float64(first) + step * index
    from_stop = np.float64(last) - step * (points - 1 - index)
    return np.where(index < points / 2, from_start, from_stop).astype(np.float32)


def floating_point(exponent_bits: int, mantissa_bits: int) -> np.ndarray:
    """Return the numbers of a small float in the order of their bits, scaled to end at 1, float32 ascending
    but for the sign.

    A sign, an exponent with bias 2**(exponent_bits - 1) - 1, a mantissa; exponent 0 has no leading one,
    and no pattern is kept for infinity: the OCP standard's E2M1 is `floating_point(2, 1)`. Zero stands
    twice, with either sign. Source: OCP Microscaling Formats, "FP4".
    """
    exponent, mantissa = np.divmod(np.arange(2 ** (exponent_bits + mantissa_bits)), 2**mantissa_bits)
    fraction = mantissa / 2**mantissa_bits + (exponent > 0)
    positive = fraction * 2.0 ** np.maximum(exponent, 1)  # the bias only scales, and so falls out
    return (np.concatenate([positive, -positive]) / positive.max()).astype(np.float32)


def quantile_levels(array: np.ndarray, bits: int = 4, bins: int | None = None) -> np.ndarray:
    """Return the levels that split an array's own numbers into 2**bits equal shares: quantile quantization.

    Each level is the median of its share, so every code will be used as often, which is the most that a
    code of k bits can tell. It is not the least error: few numbers get few levels, and outliers are lost,
    at 10 standard deviations to the outermost level near 2. It costs a sort; with `bins` only a histogram
    of that many bins, and each level is then right to a bin's width, which is the range over `bins` and so
    grows with outliers.

    array: numbers of any shape, finite. Returns float32 (2**bits,), ascending. Raises ValueError for an empty
    array. Source: the paper, "Block-wise k-bit Quantization" and "4-bit NormalFloat Quantization".
    """
    numbers = np.asarray(array, dtype=np.float64).reshape(-1)
    if not numbers.size:
        raise ValueError("quantile levels need at least one number")
    share = (np.arange(2**bits) + 0.5) / 2**bits
    if bins is None:
        return np.quantile(numbers, share, method="hazen").astype(np.float32)
    counts, edges = np.histogram(numbers, bins=bins)
    below = np.concatenate([[0], counts.cumsum()]) / numbers.size  # (bins + 1,): share of numbers under each
    return np.interp(share, below, edges).astype(np.float32)


# bitsandbytes' own 4-bit float, in the order of its bits: sign, two of exponent, one of mantissa, its
# exponents numbered in no standard's order.
FP4_LEVELS = tuple(sign * level / 12 for sign in (1, -1) for level in (0, 0.0625, 8, 12, 4, 6, 2, 3))

INT4_LEVELS = tuple(i / 7 for i in range(-7, 8))  # 15 of them: symmetric, with a zero; code 15 stays unused

# What `quant_type` may be: a name, and its levels. "quantile" has none of its own: they are taken from the
# weight.
QUANT_TYPES: dict[str, Sequence[float] | np.ndarray | None] = {
    "nf4": NF4_LEVELS,
    "fp4": FP4_LEVELS,
    "int4": INT4_LEVELS,
    "fp4_e2m1": floating_point(2, 1),
    "fp4_e3m0": floating_point(3, 0),
    **{f"nf{bits}": normal_float(bits) for bits in (2, 3, 5, 6, 7, 8)},
    "quantile": None,
}


@cache
def levels(quant_type: str, device: torch.device | str = "cpu") -> Tensor:
    """Return the levels of a quant_type, float32 (4 to 256,), on `device`: one shared tensor per device,
    not to be written to.

    Raises ValueError for a name that QUANT_TYPES has not, or has no fixed levels for.
    """
    if QUANT_TYPES.get(quant_type) is None:
        known = ", ".join(name for name, fixed in QUANT_TYPES.items() if fixed is not None)
        raise ValueError(f"quant_type {quant_type!r} has no fixed levels; those that have: {known}")
    return shared(torch.from_numpy(np.array(QUANT_TYPES[quant_type], dtype=np.float32)), device)


@cache
def dynamic_map(device: torch.device | str = "cpu", signed: bool = True) -> Tensor:
    """Return an 8-bit dynamic map, float32 (256,), on `device`: one shared tensor per device, not to be
    written to.

    For each power of ten from 1e-6 to 1 there are 1, 2, 4, ... 64 levels of either sign: the midpoints of
    that many equal bins of [0.1, 1], times the power. With 0 and +1 that makes 127 negative levels, zero
    (index 127), and 128 positive. The unsigned map has twice as many bins instead, and zero at index 0.
    Built without `torch.linspace`, so the bits are the same on every machine.

    Source: bitsandbytes' `create_dynamic_map`; "8-bit Optimizers via Block-wise Quantization", "Dynamic
    Quantization".
    """
    positive = [np.float32(1.0)]
    for i in range(7):
        edges = _linspace(0.1, 1.0, (2**i if signed else 2 ** (i + 1)) + 1)
        means = (edges[:-1] + edges[1:]) / np.float32(2)
        positive.extend(np.float32(10.0 ** (i - 6)) * means)
    # There is no -1: 256 levels, and zero takes its place.
    negative = [-level for level in positive[1:]] if signed else []
    levels = np.sort(np.array([*negative, 0.0, *positive], dtype=np.float32))
    return shared(torch.from_numpy(levels), device)


_SHARED: dict[tuple[bytes, torch.device], Tensor] = {}  # by content and device


def shared(levels: Tensor, device: torch.device | str) -> Tensor:
    """Return the one codebook on `device` that equals `levels`, so that all layers of a model share one."""
    with torch.inference_mode(False):  # an inference tensor could not be saved for a backward pass later
        placed = levels.to(device, copy=True)  # the caller's own may be written to
    if levels.is_meta:
        return placed  # which has no content to be known by
    key = levels.cpu().numpy().tobytes(), placed.device  # the tensor's own device: "cuda" is "cuda:0"
    return _SHARED.setdefault(key, placed)


def thresholds(levels: Tensor) -> Tensor:
    """Return the borders between neighbouring levels, float32 (len(levels) - 1,): their midpoints, rounded to
    float32.

    levels: ascending. A number takes the code that counts the borders *strictly* below it, so a number on a
    border takes the lower code.
    """
    return (levels[:-1] + levels[1:]) / 2
