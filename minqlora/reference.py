"""Chapter 2. The reference: all of blockwise NormalFloat quantization, in NumPy, to be read and to be
trusted.

Nothing here is fast, and nothing here is about weights: an array of any kind goes in, and what comes out
is a code for each number and a scale for each block. Chapter 3 does the same on tensors, quickly; its
tests hold it to this one bit for bit::

    >>> q = quantize(np.array([0.30, -0.02, 0.11, -0.40]))
    >>> q.codes.tolist(), q.absmax.tolist(), q.packed.tolist()
    ([14, 6, 10, 0], [0.4000000059604645], [230, 160])
    >>> print(dequantize(q).round(4))
    [ 0.2892 -0.0364  0.0984 -0.4   ]

The scale is a choice, too. Daily returns of a share, coded in blocks with their own largest magnitudes, have
codes that cannot be compared: code 12 is 1.1 % in a calm week and 5 % in a wild one. A fixed `absmax` makes
a code mean the same every day; what lies beyond it is cut off at the ends and counted::

    >>> q = quantize(np.array([0.004, -0.011, 0.093]), absmax=0.05)
    >>> q.codes.tolist(), q.clipped
    ([8, 5, 15], 1)

Shapes and dtypes: numbers are read as float32; `codes` is uint8 in the array's shape, `absmax` float32
(n_blocks,). Cost: k bits a number and 32 a block; with double quantization 8 a block and 32 for 256 blocks.

Differences. This is the paper's method with the rounding of bitsandbytes' CPU code, corner by corner: a
number on a border takes the lower code; full blocks are multiplied by a reciprocal and a short last block is
divided; a scale halfway between two levels takes the even code.

Paper: "Block-wise k-bit Quantization", "4-bit NormalFloat Quantization", "Double Quantization".

Before: codebook. Next: quantize.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from minqlora.codebook import dynamic_map, normal_float

NESTED_BLOCK_SIZE = 256  # scales that share a second scale
TINY = np.float32(1e-38)  # the smallest scale divided by: 1 / 0 would make NaN of a block of zeros


@dataclass(frozen=True)
class Quantized:
    """What `quantize` returns. `absmax` is as it decodes: with double quantization, from its own codes."""

    codes: np.ndarray  # uint8, in the array's shape
    absmax: np.ndarray  # float32 (n_blocks,)
    levels: np.ndarray  # float32 (2**bits,)
    block_size: int
    clipped: int  # numbers beyond a fixed absmax, coded as if they lay on it
    absmax_codes: np.ndarray | None = None  # with double quantization: uint8 (n_blocks,),
    nested_absmax: np.ndarray | None = None  # float32 (ceil(n_blocks / 256),),
    offset: np.float32 | None = None  # and the mean that was taken off

    @property
    def packed(self) -> np.ndarray:
        """The codes of at most 4 bits, two a byte, the first in the high nibble: uint8 (ceil(n / 2),)."""
        if len(self.levels) > 16:
            raise ValueError(f"codes of {len(self.levels)} levels do not fit two a byte")
        codes = self.codes.reshape(-1)
        zero = np.argmin(np.abs(self.levels))  # fills the idle nibble of an odd array
        pairs = np.append(codes, np.full(codes.size % 2, zero, np.uint8)).reshape(-1, 2)
        return pairs[:, 0] << 4 | pairs[:, 1]


# What is beyond float32 becomes infinite without a warning: it is then refused, or cut off at the ends.
_QUIET = np.errstate(over="ignore", divide="ignore", invalid="ignore")


@_QUIET
def quantize(
    array: ArrayLike,
    bits: int = 4,
    block_size: int | None = None,
    absmax: ArrayLike | None = None,
    double_quant: bool = False,
) -> Quantized:
    """Quantize an array to k-bit NormalFloat with one scale a block.

    array: numbers of any shape, read in row-major order as float32. bits: 2 to 8. block_size: numbers that
    share a scale; None is all of them. absmax: the scale, positive, or one for each block; None takes each
    block's largest magnitude. double_quant: store the scales in 8 bits.

    Raises ValueError for an empty array, a NaN or infinity (with the first one's index), another number of
    bits, a block size below 1, and an absmax that is not positive, not one a block, or to be quantized
    itself. Source: the paper, "Block-wise k-bit Quantization".
    """
    numbers = np.asarray(array).astype(np.float32)
    flat = numbers.reshape(-1)
    levels = normal_float(bits)
    if not flat.size:
        raise ValueError("cannot quantize an empty array")
    if not np.isfinite(flat).all():
        index = np.unravel_index(np.argmin(np.isfinite(flat)), numbers.shape)
        where = tuple(int(i) for i in index)
        raise ValueError(f"cannot quantize an array that holds {numbers[index]} (first at index {where})")
    block_size = flat.size if block_size is None else block_size
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")
    block = np.arange(flat.size) // block_size  # (n,): the block each number is in
    n_full = flat.size // block_size
    if absmax is None:
        scales = np.maximum.reduceat(np.abs(flat), np.arange(0, flat.size, block_size))  # (n_blocks,)
        scales[n_full:] = np.maximum(scales[n_full:], TINY)
    elif double_quant:
        raise ValueError("a fixed absmax is kept as it is: absmax and double_quant exclude each other")
    else:
        given = np.asarray(absmax).astype(np.float32)
        n_blocks = block[-1] + 1
        if given.shape not in ((), (n_blocks,)):
            raise ValueError(
                f"absmax must be one number or one for each of {n_blocks} blocks, got {given.shape}"
            )
        scales = np.broadcast_to(given, n_blocks).copy()
        n_full = n_blocks  # always by the reciprocal, so that a number has one code wherever it stands
        if not (np.isfinite(scales) & (scales > 0)).all():
            raise ValueError(f"absmax must be positive and finite, got {absmax}")
    reciprocal = np.float32(1) / np.maximum(scales, TINY)
    scaled = np.where(block < n_full, flat * reciprocal[block], flat / np.maximum(scales, TINY)[block])
    codes = np.searchsorted((levels[:-1] + levels[1:]) / 2, scaled)  # how many borders lie strictly below
    quantized = Quantized(
        codes=codes.astype(np.uint8).reshape(numbers.shape),
        absmax=scales,
        levels=levels,
        block_size=block_size,
        clipped=int((np.abs(flat) > scales[block]).sum()),
    )
    return _quantize_scales(quantized) if double_quant else quantized


@_QUIET
def _quantize_scales(quantized: Quantized) -> Quantized:
    # Double quantization: the scales less their mean, in blocks of 256, to the nearest level of the 8-bit
    # map.
    scales, levels = quantized.absmax, dynamic_map().numpy()
    block = np.arange(scales.size) // NESTED_BLOCK_SIZE
    offset = np.float32(scales.mean(dtype=np.float64))
    centred = scales - offset
    nested = np.maximum.reduceat(np.abs(centred), np.arange(0, scales.size, NESTED_BLOCK_SIZE))
    scaled = np.clip(centred * (np.float32(1) / nested)[block], -1, 1)
    borders = (levels[:-1] + levels[1:]) / 2
    codes = np.searchsorted(borders, scaled)
    on_border = scaled == borders[np.minimum(codes, 254)]
    codes = codes + (on_border & (codes % 2 == 1))  # the even code of the two
    codes[np.isnan(scaled)] = 0  # 0 * inf: scales that are all equal, and any code decodes to the offset
    return Quantized(
        codes=quantized.codes,
        absmax=levels[codes] * nested[block] + offset,
        levels=quantized.levels,
        block_size=quantized.block_size,
        clipped=quantized.clipped,
        absmax_codes=codes.astype(np.uint8),
        nested_absmax=nested,
        offset=offset,
    )


def dequantize(quantized: Quantized) -> np.ndarray:
    """Return the decoded array, float32, in its shape: the level of each code times its block's scale."""
    block = np.arange(quantized.codes.size) // quantized.block_size
    decoded = quantized.levels[quantized.codes.reshape(-1)] * quantized.absmax[block]
    return decoded.reshape(quantized.codes.shape)
