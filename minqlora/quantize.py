"""Chapter 3. Blocks, codes and scales: a weight becomes 4 bits, and its scales become 8.

A weight matrix is read as one flat row of numbers and cut into blocks of 64. Each block keeps its largest
magnitude, `absmax`, and every number in it becomes the 4-bit code of the level nearest to number / absmax.
Two codes share a byte, the first in the high nibble::

    codes     14 6   10 0        (the block of Chapter 1, cut to four numbers)
    packed    0xE6   0xA0        14 * 16 + 6,  10 * 16 + 0

One float32 scale for 64 weights costs 32 / 64 = 0.5 bits a weight. *Double quantization* brings that to
0.127: the scales are all positive and of one size, so their mean (`offset`) is taken off, and what is left is
quantized like a weight, in blocks of 256, to the 8-bit dynamic map::

    absmax             0.40    0.36    0.52    0.44          of four neighbouring blocks
    offset             0.43                                  their mean
    absmax - offset   -0.03   -0.07    0.09    0.01
    nested_absmax      0.09                                  the largest magnitude of up to 256 of these
    absmax_codes        47       15     255     191          nearest in the map to -0.333 -0.778 1 0.111
    decoded absmax     0.4001  0.3596  0.5200  0.4396

Shapes and dtypes, for a weight of n numbers, n_blocks = ceil(n / 64)::

    packed        uint8   (ceil(n / 2),)          4     bits a weight
    absmax_codes  uint8   (n_blocks,)             8 / 64            = 0.125
    nested_absmax float32 (ceil(n_blocks / 256),) 32 / (64 * 256)   = 0.00195
    offset        float32 ()                                        = 0.0000 (4 bytes a matrix)
                                                  4.127 bits a weight in all

How a code is found. Fifteen borders lie between the levels, and the code is how many of them lie below the
number. The upper 16 of a float's 32 bits are nearly enough to tell: of the 65,536 possible patterns, a border
runs through fifteen. One table has the code at the lower end of each pattern, another the border inside it::

    0.75       = 0x3F40 0000     code[0x3F40] = 14, and no border inside
    0.8600     = 0x3F5C 28F6     code[0x3F5C] = 14, border 0.86148: not above it, so 14
    0.8620     = 0x3F5C AC08     the same entries:                  above it,     so 15

Two look-ups and a comparison; only where two borders share their upper 16 bits is the code searched for.
Decoding is one look-up for *two* numbers: a byte holds two codes, and a table of 256 pairs of levels turns
it into two floats at once.

Differences. Packed codes equal bitsandbytes' bit for bit, corners included: a border value takes the lower
code, a block of zeros takes the code of zero, a short last block is divided by its scale where a full one
is multiplied by the reciprocal. Scales are encoded to the *nearest* level (ties to the even code), as
bitsandbytes' CUDA kernels do; its CPU code looks them up in a table of 65,536 steps that misses the
nearest level for 0.2 % of them, which `scale_rule="table"` repeats. The mean is summed in float64, so that
its float32 hardly ever depends on the order; bitsandbytes' float32 mean depends on the number of threads.
The paper subtracts the mean of the scales, as here.

Paper: "Block-wise k-bit Quantization", "Double Quantization".

Before: reference. Next: matmul.
"""

import contextlib
import ctypes
import math
import mmap
import threading
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from minqlora.codebook import thresholds

# Numbers quantized, and look-ups decoded, at a time: so many that an operator's fixed cost is nothing, so few
# that they stay in the caches. Either needs a few MiB besides its result, whatever the size of the matrix.
CHUNK = 2**19
RUN = 2**19

# Smallest number a scale is taken for when dividing by it: 1 / 0 would make NaN of a block of zeros.
TINY = 1e-38

SCALE_RULES = ("midpoint", "table")


# ---- quantizing --------------------------------------------------------------------------------------------


def quantize(weight: Tensor, codebook: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Quantize a weight to one code a number and one scale a block.

    weight: floating point, any shape, n numbers in row-major order. codebook: float32 levels, on the same
    device. block_size: numbers that share a scale; even.

    Returns `packed` uint8 (ceil(n / 2),), or (n,) for more than 16 levels, and `absmax` float32 (n_blocks,).
    Raises ValueError if the weight is empty or holds a NaN or an infinity, naming the first one's index.
    Source: the paper, "Block-wise k-bit Quantization".
    """
    weight, n = weight.detach(), weight.numel()
    _require_numbers(weight)
    per_byte = codes_per_byte(codebook)
    packed = torch.empty(-(-n // per_byte), dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(-(-n // block_size), dtype=torch.float32, device=weight.device)
    step = max(CHUNK // block_size, 1) * block_size  # whole blocks, and so whole bytes
    for start in range(0, n, step):
        numbers = _part(weight, start, start + step).float()
        scales = largest_magnitudes(numbers, block_size)
        scaled = _scale_down(numbers, scales, block_size)
        codes = encode(scaled, codebook, out=scratch("codes", len(scaled), torch.uint8, weight.device))
        _pack(codes, codebook, out=packed[start // per_byte : -(-(start + len(codes)) // per_byte)])
        absmax[start // block_size :][: len(scales)] = scales
    # One look at the scales finds any bad number: amax passes NaN and infinity on.
    if not absmax.isfinite().all():
        _refuse(weight)
    return packed, absmax


def quantize_double(
    weight: Tensor,
    codebook: Tensor,
    nested_codebook: Tensor,
    block_size: int,
    nested_block_size: int,
    scale_rule: str = "midpoint",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Quantize a weight, and its scales to 8 bits: double quantization. Never are all scales in float32 at
    once.

    Arguments as of `quantize` and `quantize_scales`. Returns `packed`, `absmax_codes` uint8 (n_blocks,),
    `nested_absmax` float32 (ceil(n_blocks / nested_block_size),) and `offset` float32 (). Raises as they do.
    Source: the paper, "Double Quantization".
    """
    weight, n = weight.detach(), weight.numel()
    n_blocks, per_byte = -(-n // block_size), codes_per_byte(codebook)
    offset = mean_scale(weight, block_size)
    packed = torch.empty(-(-n // per_byte), dtype=torch.uint8, device=weight.device)
    absmax_codes = torch.empty(n_blocks, dtype=torch.uint8, device=weight.device)
    nested_absmax = torch.empty(-(-n_blocks // nested_block_size), dtype=torch.float32, device=weight.device)
    # Scales at a time: those of a few chunks, so that what is done to them costs little more than the work.
    window = max(8 * CHUNK // (block_size * nested_block_size), 1) * nested_block_size
    for first in range(0, n_blocks, window):
        start = first * block_size
        codes, absmax = quantize(_part(weight, start, start + window * block_size), codebook, block_size)
        packed[start // per_byte :][: len(codes)] = codes
        codes, nested = quantize_scales(absmax, offset, nested_codebook, nested_block_size, scale_rule)
        absmax_codes[first:][: len(codes)] = codes
        nested_absmax[first // nested_block_size :][: len(nested)] = nested
    return packed, absmax_codes, nested_absmax, offset


def quantize_scales(
    absmax: Tensor, offset: Tensor, codebook: Tensor, block_size: int, scale_rule: str = "midpoint"
) -> tuple[Tensor, Tensor]:
    """Quantize scales to 8 bits.

    absmax: float32 (n_blocks,). offset: float32 (), what is taken off first, `mean_scale`. codebook: the
    dynamic map, float32 (256,). block_size: scales that share a second scale, 256. scale_rule: "midpoint"
    gives the nearest level, the even code on a tie; "table" what bitsandbytes' CPU code gives.

    Returns `absmax_codes` uint8 (n_blocks,) and `nested_absmax` float32 (ceil(n_blocks / block_size),).
    Raises ValueError for another rule. Source: the paper, "Double Quantization".
    """
    return quantize_blockwise(absmax - offset, codebook, block_size, scale_rule)


def quantize_blockwise(
    numbers: Tensor, codebook: Tensor, block_size: int, scale_rule: str = "midpoint"
) -> tuple[Tensor, Tensor]:
    """Quantize numbers to 8 bits, in blocks that share a scale: what scales and an optimizer's moments need.

    numbers: float32 (n,). codebook: a dynamic map, float32 (256,). scale_rule: as in `quantize_scales`.

    Returns codes, uint8 (n,), and scales, float32 (ceil(n / block_size),). Raises ValueError for another
    rule. Source: "8-bit Optimizers via Block-wise Quantization".
    """
    if scale_rule not in SCALE_RULES:
        raise ValueError(f"scale_rule must be one of {', '.join(SCALE_RULES)}, not {scale_rule!r}")
    n = numbers.numel()
    # Padded with zeros, which never raise a maximum.
    blocks = F.pad(numbers, (0, -n % block_size)).view(-1, block_size)
    scales = blocks.abs().amax(dim=1)
    scaled = (blocks * (1.0 / scales)[:, None]).view(-1)[:n].clamp_(-1, 1)
    if scale_rule == "table":
        # A number is rounded to one of 65,536 steps over [-1, 1], and what takes a code is the step.
        step = ((scaled + 1) * 0.5 * 65535 + 0.5).floor()
        codes = encode(step * 2 / 65535 - 1, codebook)
    else:
        codes = encode(scaled, codebook)
        # A number on a border has the lower code; the rule is the even one.
        border_above = F.pad(thresholds(codebook), (0, 1), value=math.inf)  # (256,)
        codes += (codes & 1) * (scaled == border_above[codes.int()])
    codes.masked_fill_(scaled.isnan(), 0)  # 0 * inf: numbers that are all zero
    return codes, scales


def mean_scale(weight: Tensor, block_size: int) -> Tensor:
    """Return the mean of a weight's scales, float32 (), summed in float64; raises as `quantize` does."""
    weight, n = weight.detach(), weight.numel()
    _require_numbers(weight)
    step = max(CHUNK // block_size, 1) * block_size
    total = 0.0
    for start in range(0, n, step):
        scales = largest_magnitudes(_part(weight, start, start + step).float(), block_size)
        total += scales.cpu().double().sum().item()  # on the host, because not every device has float64
    if not math.isfinite(total):
        _refuse(weight)
    return torch.tensor(total / -(-n // block_size), dtype=torch.float32, device=weight.device)


def scaled_sample(weight: Tensor, block_size: int, n: int = 2**18) -> Tensor:
    """Return about n of a weight's numbers, from all over it, divided by their scales: float32 on the CPU."""
    _require_numbers(weight)
    run = 64 * block_size
    step = max(weight.numel() // n, 1) * run
    samples = []
    for start in range(0, weight.numel(), step):
        numbers = _part(weight.detach(), start, start + run).float()
        scaled = _scale_down(numbers, largest_magnitudes(numbers, block_size), block_size)
        samples.append(scaled.cpu().clone())
    return torch.cat(samples)


def largest_magnitudes(numbers: Tensor, block_size: int) -> Tensor:
    """Return the scale of each block of float32 numbers (n,): float32 (ceil(n / block_size),).

    That of a short last block is at least 1e-38, as in bitsandbytes.
    """
    full = numbers.numel() // block_size * block_size
    blocks = numbers[:full].view(-1, block_size)
    # Two passes that only read are faster than one that writes magnitudes. The last makes 0 of -0.
    scales = torch.maximum(blocks.amax(dim=1), -blocks.amin(dim=1)).abs_()
    if full < numbers.numel():
        scales = torch.cat([scales, numbers[full:].abs().amax().clamp(min=TINY)[None]])
    return scales


def _scale_down(numbers: Tensor, scales: Tensor, block_size: int) -> Tensor:
    # -> numbers in [-1, 1], float32 (n,) in the scratch.
    full = numbers.numel() // block_size * block_size
    scaled = scratch("numbers", numbers.numel(), torch.float32, numbers.device)
    reciprocal = (1.0 / scales[: full // block_size].clamp(min=TINY))[:, None]
    torch.mul(numbers[:full].view(-1, block_size), reciprocal, out=scaled[:full].view(-1, block_size))
    if full < numbers.numel():  # a short last block is divided
        torch.div(numbers[full:], scales[-1], out=scaled[full:])
    return scaled


def encode(scaled: Tensor, codebook: Tensor, out: Tensor | None = None) -> Tensor:
    """Return the code of the level nearest to each number, of the lower one on a border, uint8 (n,).

    Among ascending levels that is how many borders lie strictly below the number. scaled: float32 (n,).
    codebook: float32 levels; codes are places in it, ascending or not. out: where to write the codes.
    """
    tables, n, device = _encoding_tables(codebook), scaled.numel(), scaled.device
    out = torch.empty(n, dtype=torch.uint8, device=device) if out is None else out
    if tables.lower is None or tables.border_inside is None:
        out.copy_(torch.bucketize(scaled, tables.borders, out_int32=True))
    else:
        border = scratch("tile", n, torch.float32, device)  # in its memory stand the patterns first
        pattern = torch.bitwise_right_shift(scaled.view(torch.int32), 16, out=border.view(torch.int32))
        index = scratch("index", n, torch.int64, device).copy_(pattern).bitwise_and_(0xFFFF)
        look_up(tables.lower, index, out)
        look_up(tables.border_inside, index, border)
        out += torch.gt(scaled, border, out=scratch("above", n, torch.bool, device)).view(torch.uint8)
    return out if tables.order is None else out.copy_(tables.order[out.int()])


class _EncodingTables(NamedTuple):
    """How codes are found: tables over a float's upper 16 bits, None where two borders share these."""

    borders: Tensor  # float32, ascending
    lower: Tensor | None  # uint8 (65536,): the place of the least number with these bits among the borders
    border_inside: Tensor | None  # float32 (65536,): the border between such numbers; infinity if none is
    order: Tensor | None  # uint8: the codes of ascending levels; None if they are 0, 1, 2 ...


@lru_cache(maxsize=8)
def _encoding_tables(codebook: Tensor) -> _EncodingTables:
    order = codebook.argsort(stable=True)
    borders = thresholds(codebook[order])
    ascending = bool((order.diff() == 1).all())
    codes = None if ascending else order.to(torch.uint8)
    patterns = (borders.view(torch.int32) >> 16) & 0xFFFF  # the upper 16 bits of each border
    if len(patterns.unique()) < len(patterns):
        return _EncodingTables(borders, None, None, codes)
    pattern = torch.arange(2**16, dtype=torch.int32, device=codebook.device)
    # Below zero a larger pattern is a smaller number, and the least has all lower bits set.
    lower_bits = ((pattern >= 2**15) & (pattern != 0xFF80)).to(torch.int32) * 0xFFFF  # but -infinity
    least = (pattern << 16 | lower_bits).view(torch.float32)
    lower = torch.bucketize(least, borders).to(torch.uint8)
    border_inside = torch.full((2**16,), math.inf, dtype=torch.float32, device=codebook.device)
    border_inside[patterns.long()] = borders
    return _EncodingTables(borders, lower, border_inside, codes)


def _pack(codes: Tensor, codebook: Tensor, out: Tensor) -> None:
    if codes_per_byte(codebook) == 1:
        out.copy_(codes)
        return
    if codes.numel() % 2:  # the idle low nibble holds the code of 0
        codes = torch.cat([codes, encode(codebook.new_zeros(1), codebook)])
    # A pair as one number of 16 bits, the first in its low byte, because strides of 2 are slow. From there
    # the first goes up into the high nibble, and the second comes down beside it.
    pair = codes.view(torch.int16)
    first = scratch("index", len(pair), torch.int16, codes.device)
    second = scratch("above", len(pair), torch.int16, codes.device)
    torch.bitwise_left_shift(pair, 4, out=first)
    torch.bitwise_right_shift(pair, 8, out=second)
    out.copy_(first.add_(second))


def codes_per_byte(codebook: Tensor) -> int:
    """Return 2 for codes of up to 4 bits, which share a byte, and 1 for wider ones."""
    return 2 if len(codebook) <= 16 else 1


def _part(weight: Tensor, start: int, stop: int) -> Tensor:
    # Numbers start to stop of a weight read in row-major order, (n,): without copying all of a weight that is
    # not contiguous.
    if weight.is_contiguous():
        return weight.view(-1)[start:stop]
    if weight.dim() == 1:
        return weight[start:stop].contiguous()
    width = weight[0].numel()
    first, last = start // width, -(-min(stop, weight.numel()) // width)
    if width > stop - start:  # of stacked matrices, a part of one or two
        ends = [(max(start - i * width, 0), min(stop - i * width, width)) for i in range(first, last)]
        return torch.cat([_part(weight[i], *end) for i, end in zip(range(first, last), ends, strict=True)])
    rows = weight[first:last].reshape(-1)
    return rows[start % width :][: stop - start]


def _require_numbers(weight: Tensor) -> None:
    if weight.numel() == 0:
        raise ValueError(f"cannot quantize an empty weight of shape {tuple(weight.shape)}")


def _refuse(weight: Tensor) -> NoReturn:
    # Raise for the first NaN or infinity of a weight that has one.
    for start in range(0, weight.numel(), CHUNK):
        part = _part(weight, start, start + CHUNK)
        bad = ~part.float().isfinite()  # in float32: 1e300 is finite in float64 only
        if bad.any():
            index = int(bad.nonzero()[0])
            where = tuple(int(i) for i in torch.unravel_index(torch.tensor(start + index), weight.shape))
            raise ValueError(
                f"cannot quantize a weight that holds {part[index].item()} (first at index {where})"
            )
    raise AssertionError("every number is finite")


# ---- dequantizing ------------------------------------------------------------------------------------------


def dequantize(
    packed: Tensor, absmax: Tensor, codebook: Tensor, block_size: int, out: Tensor, first: int = 0
) -> Tensor:
    """Decode a run of numbers into `out`: level times scale, rounded once in float32, then once to out's
    dtype.

    packed: uint8, the bytes of n numbers; the run begins with a byte. absmax: float32, the scales of the
    blocks that the run touches. codebook: float32 levels. out: floating point, contiguous, n numbers in any
    shape; it is written to and returned. first: how many numbers of the first block come before the run.
    """
    flat, n = out.view(-1), out.numel()
    table, per_byte = byte_table(codebook), codes_per_byte(codebook)
    wide = torch.float32 if per_byte == 1 else torch.int64  # two float32 move as one int64: half the look-ups
    # Other dtypes than float32 have their levels in float32 besides, and so half as many at a time.
    step = RUN * per_byte // (1 if out.dtype == torch.float32 else 2)
    for start in range(0, n, step):
        run = flat[start : start + step]
        some_packed = packed[start // per_byte :][: -(-len(run) // per_byte)]
        in_place = out.dtype == torch.float32 and len(run) % per_byte == run.storage_offset() % per_byte == 0
        n_levels = len(some_packed) * per_byte
        levels = run if in_place else scratch("numbers", n_levels, torch.float32, out.device)
        index = scratch("index", len(some_packed), torch.int64, out.device).copy_(some_packed)
        look_up(table.view(wide).view(-1), index, out=levels.view(wide))
        values = levels[: len(run)]
        behind = first + start
        scale_blocks_(values, absmax[behind // block_size :], block_size, behind % block_size)
        if not in_place:
            run.copy_(values)
    return out


def dequantize_scales(
    absmax_codes: Tensor,
    nested_absmax: Tensor,
    nested_codebook: Tensor,
    offset: Tensor,
    block_size: int,
    first: int = 0,
    out: Tensor | None = None,
) -> Tensor:
    """Return the scales that `quantize_scales` encoded, float32 (n_blocks,), or write them to `out`.

    Product and sum are rounded one after the other (no fused multiply-add), which is what makes the result
    the same bits as bitsandbytes'. The map is the one that came with the scales, because old files hold
    slightly different ones. first: how many scales come before these, counted from the block of
    nested_absmax[0].
    """
    scales = dequantize_blockwise(absmax_codes, nested_absmax, nested_codebook, block_size, first, out)
    return scales.add_(offset)


def dequantize_blockwise(
    codes: Tensor,
    scales: Tensor,
    codebook: Tensor,
    block_size: int,
    first: int = 0,
    out: Tensor | None = None,
) -> Tensor:
    """Return the numbers that `quantize_blockwise` encoded, float32 (n,), or write them to `out`.

    first: how many numbers come before these, counted from the block of scales[0].
    """
    n, device = len(codes), codes.device
    numbers = torch.empty(n, dtype=torch.float32, device=device) if out is None else out
    for start in range(0, n, RUN):
        some = codes[start : start + RUN]
        index = scratch("index", len(some), torch.int64, device).copy_(some)
        look_up(codebook, index, out=numbers[start : start + RUN])
    scale_blocks_(numbers, scales[first // block_size :], block_size, first % block_size)
    return numbers


def scale_blocks_(values: Tensor, scales: Tensor, block_size: int, first: int = 0) -> None:
    """Multiply each block of float32 values (n,) by its scale, in place. The first block may have begun, and
    the last may end, beyond them: `first` numbers of scales[0]'s block come before.
    """
    n = values.numel()
    head = min(-first % block_size, n)
    if head:
        values[:head].mul_(scales[0])
        scales = scales[1:]
    full = (n - head) // block_size
    values[head : head + full * block_size].view(full, block_size).mul_(scales[:full, None])
    if head + full * block_size < n:
        values[head + full * block_size :].mul_(scales[full])


@lru_cache(maxsize=64)
def byte_table(codebook: Tensor) -> Tensor:
    """Return the levels that each possible byte stands for, float32 (256, 2), or (256, 1) for wide codes.

    Bytes with a code that the codebook has not decode to NaN. Made once for each codebook, which is not
    written to.
    """
    byte = torch.arange(256, device=codebook.device)
    codes = torch.stack([byte >> 4, byte & 15] if codes_per_byte(codebook) == 2 else [byte], dim=1)
    levels = torch.full((256,), math.nan, dtype=torch.float32, device=codebook.device)
    levels[: len(codebook)] = codebook
    return levels[codes]


# ---- what both need ----------------------------------------------------------------------------------------


def look_up(table: Tensor, index: Tensor, out: Tensor) -> None:
    """Write table[index] to `out`. table: (m,). index: int64 (n,). out: (n,) of table's dtype.

    As rows of one and the same table, because PyTorch looks rows up in parallel, and a single one on one
    core.
    """
    rows = 64
    even = index.numel() // rows * rows
    torch.gather(table.expand(rows, -1), 1, index[:even].view(rows, -1), out=out[:even].view(rows, -1))
    if even < index.numel():
        torch.gather(table, 0, index[even:], out=out[even:])


_scratch = threading.local()


def scratch(name: str, n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return n uninitialised numbers that the next call of that name, in this thread, will overwrite.

    A buffer that lives on is warm: on a CPU a fresh one costs a page fault every 4 KiB, which is most of
    the time of decoding into it. Accelerators have allocators that keep memory.
    """
    if device.type != "cpu":
        return torch.empty(n, dtype=dtype, device=device)
    n_bytes = n * dtype.itemsize
    held = getattr(_scratch, name, None)
    if held is None or len(held) < n_bytes:
        with torch.inference_mode(False):  # such a tensor could not be written to outside of it
            held = empty((n_bytes,), torch.uint8, device)
        setattr(_scratch, name, held)
    return held[:n_bytes].view(dtype)


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return an uninitialised tensor, a large one on huge pages where Linux has them.

    The first touch of a page is a trip to the kernel. In pages of 4 KiB, 64 MiB take 17 ms of them, three
    times as long as decoding a weight into it; in pages of 2 MiB, 2 ms. An allocator that keeps what is freed
    hands out pages that were touched before, and is left to it.
    """
    n_bytes = math.prod(shape) * dtype.itemsize
    large = device.type == "cpu" and n_bytes >= 2**22
    if not large or not hasattr(mmap, "MADV_HUGEPAGE") or _allocator_keeps_pages():
        return torch.empty(shape, dtype=dtype, device=device)
    pages = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype).view(shape)


@cache
def _allocator_keeps_pages() -> bool:
    process = ctypes.CDLL(None)  # what is loaded into it; MADV_HUGEPAGE says that this is Linux
    return hasattr(process, "tc_malloc") or hasattr(process, "mallctl")  # tcmalloc, jemalloc
