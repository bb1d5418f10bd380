"""Chapter 1. The levels: which 16 numbers a 4-bit code can stand for.

Weights of a trained network look normal around zero, so the 16 levels of NF4 (4-bit NormalFloat) are put
where a normal distribution has equal mass between neighbours: close together near 0, where most weights are,
and far apart near the ends. A block of weights is divided by its largest magnitude first, so the levels need
only cover [-1, 1].

Four weights, worked by hand::

    weights             0.30    -0.02     0.11    -0.40
    absmax              0.40                                  the block's largest magnitude, its scale
    weights / absmax    0.75    -0.05     0.275   -1.00
    nearest level       0.7230  -0.0911   0.2461  -1.0000
    code                  14        6       10        0
    decoded             0.2892  -0.0364   0.0984  -0.4000     level * absmax

The scales are numbers too, one for every 64 weights, and Chapter 3 stores each of those in 8 bits with a
second codebook: the *dynamic map*, 256 levels over seven powers of ten, finest for the largest numbers.

Shapes and dtypes: every codebook here is a 1-D float32 tensor in ascending order; `nf4()` has 16 entries,
`dynamic_map()` 256. Cost: 64 and 1,024 bytes, once for a whole model, however many layers use them.

Differences. The paper describes NF4 by formula; bitsandbytes publishes the resulting constants, and those are
the standard: a checkpoint is only portable if both sides mean the same 16 floats. So the constants are
written down, and `normal_float` derives them again so that a test can compare the two bit for bit. The
paper's dynamic map for scales is bitsandbytes' too.

Paper: "4-bit NormalFloat Quantization"; the dynamic map: "8-bit Optimizers via Block-wise Quantization",
"Dynamic Quantization".

Before: the equation, in `minqlora/__init__.py`. Next: quantize.
"""

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
    offset = round(
        1 - (1 / (2 * n) + 1 / (2 * n - 2)) / 2, 7
    )  # the constants were made from 0.9677083, not 929/960
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


@cache
def nf4(device: torch.device | str = "cpu") -> Tensor:
    """Return the 16 NF4 levels, float32, on `device`: one shared tensor per device, not to be written to."""
    return shared(torch.tensor(NF4_LEVELS, dtype=torch.float32), device)


@cache
def dynamic_map(device: torch.device | str = "cpu") -> Tensor:
    """Return the signed 8-bit dynamic map, float32 (256,), on `device`: one shared tensor per device, not to
    be written to.

    For each power of ten from 1e-6 to 1 there are 1, 2, 4, ... 64 levels of either sign: the midpoints of
    that many equal bins of [0.1, 1], times the power. With 0 and +1 that makes 127 negative levels, zero
    (index 127), and 128 positive. Built without `torch.linspace`, so the bits are the same on every machine.

    Source: bitsandbytes' `create_dynamic_map`; "8-bit Optimizers via Block-wise Quantization", "Dynamic
    Quantization".
    """
    positive = [np.float32(1.0)]
    for i in range(7):
        edges = _linspace(0.1, 1.0, 2**i + 1)
        means = (edges[:-1] + edges[1:]) / np.float32(2)
        positive.extend(np.float32(10.0 ** (i - 6)) * means)
    negative = [-level for level in positive[1:]]  # there is no -1: 256 levels, and zero takes its place
    levels = np.sort(np.array([*negative, 0.0, *positive], dtype=np.float32))
    return shared(torch.from_numpy(levels), device)


_SHARED: dict[tuple[bytes, torch.device], Tensor] = {}  # by content and device


def shared(levels: Tensor, device: torch.device | str) -> Tensor:
    """Return the one codebook on `device` that equals `levels`, so that all layers of a model share one."""
    placed = levels.to(device)
    key = levels.cpu().numpy().tobytes(), placed.device  # the tensor's own device: "cuda" is "cuda:0"
    return _SHARED.setdefault(key, placed)


def thresholds(levels: Tensor) -> Tensor:
    """Return the borders between neighbouring levels, float32 (len(levels) - 1,): their midpoints, rounded to
    float32.

    A number takes the code that counts the borders *strictly* below it, so a number on a border takes the
    lower code.
    """
    return (levels[:-1] + levels[1:]) / 2
