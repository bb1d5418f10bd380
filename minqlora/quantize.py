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

Differences. Packed codes equal bitsandbytes' bit for bit, corners included: a border value takes the lower
code, a block of zeros is all code 7, a short last block is divided by its scale where a full one is
multiplied by the reciprocal. Scales are encoded to the *nearest* level (ties to the even code), as
bitsandbytes' CUDA kernels do; its CPU code looks them up in a table that misses the nearest level for 0.2 %
of them. The paper subtracts the mean of the scales, as here.

Paper: "Block-wise k-bit Quantization", "Double Quantization".

Before: codebook. Next: matmul.
"""

import torch
from torch import Tensor

from minqlora.codebook import thresholds

# Numbers quantized at a time: 4 MiB of float32 stays in cache through fifteen passes, and bounds the extra
# memory.
CHUNK = 2**20


def quantize(weight: Tensor, codebook: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Quantize a weight to 4-bit codes with one scale a block.

    weight: floating point, any shape, n numbers in row-major order. codebook: float32 (16,) ascending, on the
    same device. block_size: numbers that share a scale; even.

    Returns `packed` uint8 (ceil(n / 2),) and `absmax` float32 (n_blocks,). Raises ValueError if the weight is
    empty or holds a NaN or an infinity, naming the first one's index. Source: the paper, "Block-wise k-bit
    Quantization".
    """
    flat = weight.detach().reshape(-1)
    n = flat.numel()
    if n == 0:
        raise ValueError(f"cannot quantize an empty weight of shape {tuple(weight.shape)}")
    packed = torch.empty((n + 1) // 2, dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(-(-n // block_size), dtype=torch.float32, device=flat.device)
    borders = thresholds(codebook).tolist()
    step = max(CHUNK // block_size, 1) * block_size  # whole blocks, and so whole bytes
    for start in range(0, n, step):
        chunk = flat[start : start + step].float()
        scaled, scales = _scale_blocks(chunk, block_size)
        packed[start // 2 : start // 2 + (chunk.numel() + 1) // 2] = _pack(_encode(scaled, borders))
        absmax[start // block_size : start // block_size + scales.numel()] = scales
    # One look at the scales finds any bad number: amax passes NaN and infinity on.
    if not torch.isfinite(absmax).all():
        index = int(torch.nonzero(~torch.isfinite(flat.float()))[0])  # float: 1e300 is finite in float64 only
        where = tuple(int(i) for i in torch.unravel_index(torch.tensor(index), weight.shape))
        raise ValueError(f"cannot quantize a weight that holds {flat[index].item()} (first at index {where})")
    return packed, absmax


def _scale_blocks(chunk: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    # -> numbers in [-1, 1] (n,) and the scales (n_blocks,). `chunk` is float32, and all of its blocks but the
    # last are full.
    full = chunk.numel() // block_size * block_size
    blocks = chunk[:full].view(-1, block_size)  # (n_blocks, block_size)
    absmax = blocks.abs().amax(dim=1)
    # The clamp keeps 1 / 0 out: a block of zeros stays zeros, and takes the code of the level 0.
    scaled = (blocks * (1.0 / absmax.clamp(min=1e-38))[:, None]).view(-1)
    if (
        full < chunk.numel()
    ):  # a short last block: division, and the clamped scale is the one stored, as in bitsandbytes
        tail = chunk[full:]
        tail_absmax = tail.abs().amax().clamp(min=1e-38)
        absmax = torch.cat([absmax, tail_absmax[None]])
        scaled = torch.cat([scaled, tail / tail_absmax])
    return scaled, absmax


def _encode(scaled: Tensor, borders: list[float]) -> Tensor:
    # code = how many borders lie strictly below: fifteen compare-and-add passes over a warm chunk take half
    # the time of torch.bucketize, which branches for every number.
    codes = torch.zeros(scaled.shape, dtype=torch.uint8, device=scaled.device)
    above = torch.empty(scaled.shape, dtype=torch.bool, device=scaled.device)
    for border in borders:
        codes += torch.gt(scaled, border, out=above).view(torch.uint8)
    return codes


def _pack(codes: Tensor) -> Tensor:
    if codes.numel() % 2:  # the idle low nibble holds 7, the code of 0
        codes = torch.cat([codes, codes.new_full((1,), 7)])
    pairs = codes.view(-1, 2)
    return pairs[:, 0] << 4 | pairs[:, 1]  # first of a pair in the high nibble


def quantize_scales(absmax: Tensor, codebook: Tensor, block_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize the scales themselves to 8 bits: double quantization.

    absmax: float32 (n_blocks,). codebook: the dynamic map, float32 (256,). block_size: scales that share a
    second scale, 256.

    Returns `absmax_codes` uint8 (n_blocks,), `nested_absmax` float32 (ceil(n_blocks / block_size),) and
    `offset` float32 (). Source: the paper, "Double Quantization".
    """
    # The mean in float64, on the CPU: the only sum here, and so the only result that could depend on the
    # machine.
    offset = absmax.cpu().double().mean().float().to(absmax.device)
    centred = absmax - offset
    n = centred.numel()
    blocks = torch.nn.functional.pad(centred, (0, -n % block_size)).view(
        -1, block_size
    )  # zeros never raise a maximum
    nested_absmax = blocks.abs().amax(dim=1)
    scaled = (blocks * (1.0 / nested_absmax)[:, None]).view(-1)[
        :n
    ]  # a block of zeros: 0 * inf = NaN, code 0 below
    borders = thresholds(codebook)
    codes = torch.bucketize(scaled, borders, out_int32=True)
    # bucketize gives a number on a border the lower code; the rule is the even one.
    on_border = scaled == borders[codes.clamp(max=len(borders) - 1)]
    codes += on_border & (codes % 2 == 1)
    return torch.where(scaled.isnan(), 0, codes).to(torch.uint8), nested_absmax, offset


def dequantize_scales(
    absmax_codes: Tensor, nested_absmax: Tensor, nested_codebook: Tensor, offset: Tensor, block_size: int
) -> Tensor:
    """Return the scales that `quantize_scales` encoded, float32 (n_blocks,).

    Product and sum are rounded one after the other (no fused multiply-add), which is what makes the result
    the same bits as bitsandbytes'. The map is the one that came with the scales, because old files hold
    slightly different ones.
    """
    n = absmax_codes.numel()
    scales = nested_codebook[absmax_codes.int()]
    full = n // block_size * block_size
    scales[:full].view(-1, block_size).mul_(nested_absmax[: n // block_size, None])
    if full < n:
        scales[full:].mul_(nested_absmax[-1])
    return scales.add_(offset)


def pair_table(codebook: Tensor) -> Tensor:
    """Return the levels of every possible byte, float32 (256, 2): one look-up then decodes two weights."""
    byte = torch.arange(256, device=codebook.device, dtype=torch.int32)
    return torch.stack([codebook[byte >> 4], codebook[byte & 15]], dim=1)


def dequantize(packed: Tensor, absmax: Tensor, pairs: Tensor, block_size: int, out: Tensor) -> Tensor:
    """Decode a run of whole blocks into `out`: level times scale, rounded once in float32, then once to out's
    dtype.

    packed: uint8 (ceil(n / 2),), the bytes of n numbers. absmax: float32, their blocks' scales. pairs:
    `pair_table` of the codebook. out: floating point, contiguous, n numbers in any shape; it is written to
    and returned.
    """
    n = out.numel()
    in_place = out.dtype == torch.float32 and n % 2 == 0
    levels = (
        out.view(-1, 2)
        if in_place
        else torch.empty(packed.numel(), 2, dtype=torch.float32, device=out.device)
    )
    # A pair of float32 moves as one int64, found by an int32 index: half the traffic of gathering single
    # levels by int64.
    torch.index_select(
        pairs.view(torch.int64).view(-1), 0, packed.int(), out=levels.view(torch.int64).view(-1)
    )
    values = levels.view(-1)[:n]
    full = n // block_size * block_size
    values[:full].view(-1, block_size).mul_(absmax[: n // block_size, None])
    if full < n:
        values[full:].mul_(absmax[-1])
    return out if in_place else out.copy_(values.view(out.shape))
