"""Chapter 4. The product: X @ dequantize(W).T, and nothing dequantized outlives it.

A linear layer with a 4-bit weight multiplies by a matrix that does not exist: it is decoded for the product
and dropped again. The backward pass decodes it a second time. That is the bargain of QLoRA: two decodings a
step for 3.9 times less memory than 16 bits take::

    forward     Y  = X  @ W.T    (T, K) @ (K, N) -> (T, N)       W = dequantize(packed, scales), (N, K)
    backward    dX = dY @ W      (T, N) @ (N, K) -> (T, K)       the frozen weight itself gets no gradient

The four weights of Chapter 1, as a matrix of one row::

    X                  1.0      2.0      3.0      4.0
    W, decoded         0.2892  -0.0364   0.0984  -0.4000
    Y = X @ W.T       -1.0883                               of the weights before they were quantized: -1.0100
    dX = dY @ W        0.2892  -0.0364   0.0984  -0.4000    for dY = 1

On a CPU the matrix is decoded in tiles of rows: four rows of a 6 x 4 weight, multiplied into four columns of
Y, then the other two. The scratch holds one tile, stays in cache, and is what the product reads next. On a
GPU one compiled kernel decodes the whole matrix and the vendor's matmul follows; for a single token the
weights are multiplied as they are decoded, and never written to memory.

The same two products serve a 16-bit weight under activations of another dtype, an output head kept in
bfloat16 say: there "decoding" is a cast, tile by tile, and the head never exists in float32 as a whole.

Why custom operators. Written in plain operations under `torch.compile`, forward and backward would be traced
together, the two decodings recognised as one, and the *decoded* weight saved in between: 14 GB for an 8B
model, QLoRA undone without a word. An operator is opaque to that, and forward and backward are two different
ones so that neither stands in for the other. Where nothing is compiled the same two functions are an
ordinary autograd function, and the compiler is not even loaded.

Shapes and dtypes: X (..., K) and Y (..., N) in the compute dtype, which is also that of the decoded tile; the
rest as in Chapter 3. Cost: 2 T N K FLOPs each way, as for any linear; for decoding, one look-up for two
weights and one multiply a weight. Saved for backward: the packed weight and its scales, which live anyway.

Differences. bitsandbytes does the same with compiled kernels, and on a CPU decodes the whole matrix; its
backward decodes through the weight's old dtype, ours straight to the compute dtype.

Paper: "QLoRA Finetuning", the equation with doubleDequant.

Before: quantize. Next: nf4.
"""

import math
import time
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from minqlora.quantize import byte_table, codes_per_byte, dequantize, dequantize_scales, empty, scratch

# Bytes in a tile of decoded weights: about a core's share of the last cache. With what decoding needs,
# the scratch of a thread stays under 16 MiB, whatever the matrix.
TILE = 2**23
TOKENS = 256  # rows of X or dY in a product of 16 bits that is added to others
ROWS = (1024, 512, 256, 64)  # the numbers of rows that oneDNN is given
WINDOW = 2**18  # scales decoded at a time: 1 MiB of float32

# Rows of the weight, and the same rows decoded: (rows, K) in the compute dtype.
Tiles = Iterator[tuple[slice, Tensor]]


def nf4_linear(
    x: Tensor,
    packed: Tensor,
    scales: list[Tensor],
    codebook: Tensor,
    shape: tuple[int, int],
    block_size: int,
    nested_block_size: int,
    nested_first: int = 0,
) -> Tensor:
    """Return x @ W.T for a W stored in 4 bits; differentiable in x.

    x: (..., K). packed: uint8, codebook: float32 (4 to 256,). scales: [absmax], or with double quantization
    [absmax_codes, nested_absmax, nested_codebook, offset]. shape: (N, K) of W. nested_first: how many scales
    of the first nested block come before these (of a part of a larger weight). Returns (..., N) in x's dtype.
    """
    sizes = (*shape, block_size, nested_block_size, nested_first)
    forward = EagerNF4Linear.apply if _is_eager(x) else _nf4_forward
    y = forward(x.reshape(-1, x.shape[-1]), packed, scales, codebook, *sizes)
    return y.view(*x.shape[:-1], shape[0])


def nf4_linear_backward(
    grad_y: Tensor,
    packed: Tensor,
    scales: list[Tensor],
    codebook: Tensor,
    shape: tuple[int, int],
    block_size: int,
    nested_block_size: int,
    nested_first: int = 0,
) -> Tensor:
    """Return grad_y @ W, (T, N) -> (T, K): the gradient of `nf4_linear`'s x, whose other arguments these
    are."""
    sizes = (*shape, block_size, nested_block_size, nested_first)
    backward = _nf4_backward_now if _is_plain(grad_y) else _nf4_backward
    return backward(grad_y, packed, scales, codebook, *sizes)


def _is_eager(x: Tensor) -> bool:
    # Nobody compiles or traces what follows: the way through an operator would only cost time, and the first
    # to take it loads the compiler, for 30 MB.
    is_ordinary = type(x) in (Tensor, nn.Parameter) and x.device.type != "meta"
    return is_ordinary and not torch.compiler.is_compiling()


def _is_plain(grad: Tensor) -> bool:
    # Nor is it differentiated: what these operators have no formula for, and plain operations on tiles that
    # the next one overwrites would have a wrong one.
    return _is_eager(grad) and not torch.is_grad_enabled()


def cast_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return x @ weight.T for a weight (N, K) and x (..., K) of another dtype; differentiable in x.

    A weight that is trained gets its gradient too, and is cast as a whole for it.
    """
    if weight.dtype == x.dtype or weight.requires_grad:
        return F.linear(x, weight.to(x.dtype))
    forward = EagerCastLinear.apply if _is_eager(x) else _cast_forward
    y = forward(x.reshape(-1, x.shape[-1]), weight)
    return y.view(*x.shape[:-1], weight.shape[0])


def cast_linear_backward(grad_y: Tensor, weight: Tensor) -> Tensor:
    """Return grad_y @ weight, (..., N) -> (..., K): the gradient of `cast_linear`'s x."""
    if weight.dtype == grad_y.dtype:
        return grad_y @ weight
    backward = _cast_backward_now if _is_plain(grad_y) else _cast_backward
    grad_x = backward(grad_y.reshape(-1, grad_y.shape[-1]), weight)
    return grad_x.view(*grad_y.shape[:-1], weight.shape[1])


def nf4_dequantize(
    packed: Tensor,
    scales: list[Tensor],
    codebook: Tensor,
    shape: tuple[int, int],
    block_size: int,
    nested_block_size: int,
    nested_first: int = 0,
    *,
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    """Return the decoded weight (N, K) in `dtype`, or write it to `out` (N, K), any floating dtype."""
    sizes = (*shape, block_size, nested_block_size, nested_first)
    if out is None:
        decode = _nf4_decoded_now if _is_eager(packed) else _nf4_decoded
        return decode(packed, scales, codebook, *sizes, dtype)
    _decode_into(out, packed, scales, codebook, sizes)
    return out


# ---- tiles -------------------------------------------------------------------------------------------------


def _nf4_tiles(
    packed: Tensor,
    scales: list[Tensor],
    codebook: Tensor,
    n_rows: int,
    n_columns: int,
    block_size: int,
    nested_block_size: int,
    nested_first: int,
    dtype: torch.dtype,
    out: Tensor | None = None,
    tile: int | None = None,
) -> Tiles:
    # Decoded into the rows of `out` where it is given, else into a scratch that each next tile overwrites.
    per_byte = codes_per_byte(codebook)
    n_blocks = -(-n_rows * n_columns // block_size)
    if packed.device.type != "cpu" and fastest_look_up(packed.device):
        nested = nested_block_size, nested_first
        decoded = decode_fused(packed, scales, codebook, n_rows * n_columns, block_size, *nested, dtype)
        decoded = decoded.view(n_rows, n_columns)
        yield slice(0, n_rows), decoded if out is None else out.copy_(decoded)
        return
    # A tile begins with a byte: of rows of odd width, every other one does.
    granule = per_byte if n_columns % per_byte else 1
    step = max((tile or TILE) // (n_columns * dtype.itemsize) // granule, 1) * granule
    window = slice(0, 0)  # the blocks whose scales are decoded, those of many tiles at a time
    for start in range(0, n_rows, step):
        rows = slice(start, min(start + step, n_rows))
        first, last = rows.start * n_columns, rows.stop * n_columns
        first_block, last_block = first // block_size, -(-last // block_size)
        if last_block > window.stop:
            window = slice(first_block, min(max(first_block + WINDOW, last_block), n_blocks))
            absmax = _absmax(scales, window.start, window.stop, nested_block_size, nested_first)
        if out is None:
            decoded = scratch("tile", last - first, dtype, packed.device).view(-1, n_columns)
        else:
            decoded = out[rows]
        some_packed = packed[first // per_byte : -(-last // per_byte)]
        some_absmax = absmax[first_block - window.start :]
        yield rows, dequantize(some_packed, some_absmax, codebook, block_size, decoded, first % block_size)


def _decode_into(
    out: Tensor,
    packed: Tensor,
    scales: list[Tensor],
    codebook: Tensor,
    sizes: tuple[int, int, int, int, int],
) -> None:
    into = out if out.is_contiguous() else None
    for rows, tile in _nf4_tiles(packed, scales, codebook, *sizes, out.dtype, into):
        if into is None:
            out[rows] = tile


def _absmax(scales: list[Tensor], first: int, last: int, nested_block_size: int, nested_first: int) -> Tensor:
    # The scales of blocks `first` to `last`, float32.
    if len(scales) == 1:
        return scales[0][first:last]
    absmax_codes, nested_absmax, nested_codebook, offset = scales
    some_codes, nested_first = absmax_codes[first:last], nested_first + first
    out = scratch("scales", last - first, torch.float32, absmax_codes.device)
    return dequantize_scales(
        some_codes, nested_absmax, nested_codebook, offset, nested_block_size, nested_first, out
    )


def _cast_tiles(weight: Tensor, dtype: torch.dtype) -> Tiles:
    n_columns = weight.shape[1]
    step = max(TILE // (n_columns * dtype.itemsize), 1)
    for start in range(0, len(weight), step):
        rows = slice(start, min(start + step, len(weight)))
        tile = scratch("tile", (rows.stop - rows.start) * n_columns, dtype, weight.device)
        yield rows, tile.view(-1, n_columns).copy_(weight[rows])


# ---- compiled kernels, for accelerators --------------------------------------------------------------------

# Products and sums are rounded one by one, as eager operations round them: fused multiply-add would give
# other scales than bitsandbytes'. The name says casts; Inductor turns fusion off in Triton by it, too.
# Indices are checked by nobody: they are those of bytes in tables of 256.
EXACT: dict[str, Any] = {"emulate_precision_casts": True, "assert_indirect_indexing": False}
# A code's level is read from a table of 16, with another's from one of 256 pairs, or chosen in 15 steps.
LOOK_UPS = ("gather", "pairs", "tree")
_INTEGERS = {16: torch.int16, 32: torch.int32}  # as wide as the numbers that they hold the bits of


def decode_fused(
    packed: Tensor,
    scales: list[Tensor],
    codebook: Tensor,
    n: int,
    block_size: int,
    nested_block_size: int,
    nested_first: int,
    dtype: torch.dtype,
) -> Tensor:
    """Return the first n numbers, decoded to `dtype` by one compiled kernel, with the bits of
    `quantize.dequantize`: half a byte and a sixty-fourth are read for each, and it is written."""
    if dtype.itemsize > 4:
        sizes = n, block_size, nested_block_size, nested_first
        return decode_fused(packed, scales, codebook, *sizes, torch.float32).to(dtype)
    look_up = _look_up_for(codebook)
    sizes = len(packed), block_size, nested_block_size, nested_first
    decode = compiled_decode(*sizes, dtype, look_up)
    with torch.no_grad():  # another state of autograd would be another compilation
        return decode(packed, scales, levels_for(look_up, codebook)).view(dtype)[:n]


def multiply_fused(
    x: Tensor,
    packed: Tensor,
    scales: list[Tensor],
    codebook: Tensor,
    block_size: int,
    nested_block_size: int,
    nested_first: int,
) -> Tensor:
    """Return x @ W.T for one token, (1, K) -> (1, N), by two compiled kernels, neither of which writes a
    weight: one leaves up to 32 sums of each row, one adds them up.

    K and the block size must be multiples of 8, and two codes stand in a byte. The weights are not rounded to
    the dtype of x, and sums are taken in float32.
    """
    look_up = _look_up_for(codebook)
    shape = 2 * len(packed) // x.shape[1], x.shape[1]
    multiply = compiled_multiply(shape, block_size, nested_block_size, nested_first, x.dtype, look_up)
    row = x[0].contiguous()
    if row.storage_offset() * row.itemsize % 8:  # it is read eight bytes at a time
        row = row.clone()
    eights, words = row.view(torch.int64), packed.view(torch.int32)
    with torch.no_grad():
        return multiply(eights, words, scales, levels_for(look_up, codebook))[None]


def _look_up_for(codebook: Tensor) -> str:
    # Of other widths than 4 bits, whole bytes are looked up.
    return fastest_look_up(codebook.device) or "pairs" if len(codebook) == 16 else "pairs"


@cache
def compiled_decode(
    n_bytes: int,
    block_size: int,
    nested_block_size: int,
    nested_first: int,
    dtype: torch.dtype,
    look_up: str,
):
    """Return a compiled function from (packed, scales, levels) to all numbers: two in an integer twice as
    wide as `dtype`, (n_bytes,), or one in `dtype` where a code takes a byte. levels: of `levels_for`.

    A thread takes bytes, not numbers: both numbers of a byte share its scale, and are written at once as one
    integer. Indices are the compiler's own: `arange` is written as 64 bits and compiled to 32, but for a
    weight that needs more. Each size is compiled by itself, and a model has few: of a size that it knows the
    compiler sees that no thread reaches beyond, and only then are eight bytes read, and their scale found, at
    once.
    """

    def decode(packed: Tensor, scales: list[Tensor], levels: Tensor) -> Tensor:
        numbers = _numbers(packed, levels, look_up)
        sizes = block_size // len(numbers), nested_block_size, nested_first
        absmax = _scales_of(n_bytes, scales, *sizes)
        numbers = [(number * absmax).to(dtype) for number in numbers]
        return numbers[0] if len(numbers) == 1 else _joined(*numbers)

    return _compiled(decode, EXACT)


@cache
def compiled_multiply(
    shape: tuple[int, int],
    block_size: int,
    nested_block_size: int,
    nested_first: int,
    dtype: torch.dtype,
    look_up: str,
):
    """Return a compiled function from (eights, words, scales, levels) to x @ W.T, (N,) in `dtype`, for a W of
    shape (N, K).

    eights: the bytes of x (K,) as int64; words: the packed weight as int32, (N K / 8,); levels: of
    `levels_for`.

    A thread takes a word, not a byte: eight weights share a scale and the work of finding it, and what they
    are multiplied by is read in eight bytes at a time. It goes down its column of a row's words, which stand
    beside one another as the threads do, so that everything a thread knows is laid out alike and nothing is
    exchanged until the columns are summed. Each shape is compiled by itself.
    """
    width = math.gcd(shape[1] // 8, 32)  # the threads beside one another

    def multiply(eights: Tensor, words: Tensor, scales: list[Tensor], levels: Tensor) -> Tensor:
        """Return x @ W.T."""
        absmax = _scales_of(len(words), scales, block_size // 8, nested_block_size, nested_first)
        words, absmax = (of_words.view(shape[0], -1, width) for of_words in (words, absmax))
        eights = eights.view(-1, width, dtype.itemsize)  # by the word that they meet
        numbers = [number for some in eights.unbind(-1) for number in _apart(some, dtype)]
        products = torch.zeros_like(absmax)
        for i in range(4):
            first, second = _numbers((words >> (8 * i)) & 255, levels, look_up)
            products = products + first * numbers[2 * i] + second * numbers[2 * i + 1]
        return (products * absmax).sum(dim=1).sum(dim=1).to(dtype)

    # Sums of few numbers too are left to be sums: unrolled, what they are of would be written first.
    options = {"assert_indirect_indexing": False, "unroll_reductions_threshold": 1}
    return _compiled(multiply, options)


def _compiled(function: Any, options: dict[str, Any]):
    # With a code object of its own: by that torch.compile counts, of all functions made of the same lines.
    function.__code__ = function.__code__.replace()
    return torch.compile(function, options=options, dynamic=False)


def levels_for(look_up: str, codebook: Tensor) -> Tensor:
    """Return the levels as a look-up wants them: for "pairs" of each byte, (256,), two in an int64 or one in
    float32; for the others the codebook, (16,)."""
    if look_up != "pairs":
        return codebook
    table = byte_table(codebook)
    return (table if table.shape[1] == 1 else table.view(torch.int64)).view(-1)


def _numbers(byte: Tensor, levels: Tensor, look_up: str) -> list[Tensor]:
    # -> the levels of the first, and of two the second, code of each byte: float32, in the shape of `byte`.
    if look_up == "pairs":
        found = levels[byte.int()]
        return [found] if found.dtype == torch.float32 else _apart(found, torch.float32)
    codes = byte >> 4, byte & 15
    return [levels[code.int()] if look_up == "gather" else _select(levels, code) for code in codes]


def _scales_of(
    n: int, scales: list[Tensor], per_block: int, nested_block_size: int, nested_first: int
) -> Tensor:
    # -> the scale of each of n bytes or words, of which a block has so many: float32 (n,).
    block = torch.arange(n, device=scales[0].device) // per_block
    if len(scales) == 1:
        return scales[0][block]
    codes, nested_absmax, nested_codebook, offset = scales
    nested = nested_absmax[(block + nested_first) // nested_block_size]
    return nested_codebook[codes[block].int()] * nested + offset


def _select(levels: Tensor, code: Tensor) -> Tensor:
    # levels[code] by 15 choices between two, for which nothing is read from memory.
    numbers = list(levels.unbind())
    bit = 1
    while len(numbers) > 1:
        is_set = (code & bit) != 0
        numbers = [
            torch.where(is_set, odd, even) for even, odd in zip(numbers[::2], numbers[1::2], strict=True)
        ]
        bit *= 2
    return numbers[0]


def _joined(first: Tensor, second: Tensor) -> Tensor:
    # Two numbers as one integer of their width together, the first at the lower address.
    bits = 8 * first.dtype.itemsize
    wide = {16: torch.int32, 32: torch.int64}[bits]
    low, high = (number.view(_INTEGERS[bits]).to(wide) for number in (first, second))
    return (low & (2**bits - 1)) | (high << bits)


def _apart(eights: Tensor, dtype: torch.dtype) -> list[Tensor]:
    # The numbers of which an int64 holds two or four, from the lowest address up: float32.
    bits = 8 * dtype.itemsize
    parts = [(eights >> shift).to(_INTEGERS[bits]) for shift in range(0, 64, bits)]
    return [part.view(dtype).float() for part in parts]


@cache
def fastest_look_up(device: torch.device) -> str | None:
    """Return the one of LOOK_UPS that decodes fastest on a device: measured once, at first use. None if none
    can be compiled for it; then plain operations decode, tile by tile, as on a CPU.

    Which one it is depends on what a device does better: reading from near memory, where the small table is
    one line of the cache and the large one sixteen, or choosing.
    """
    if device.type == "cpu":
        return LOOK_UPS[0]
    times = time_look_ups(device)
    return min(times, key=times.__getitem__, default=None)


def time_look_ups(device: torch.device, n: int = 2**24) -> dict[str, float]:
    """Return the seconds that 20 decodings of n numbers take with each of LOOK_UPS, but for those that do not
    compile for the device, or do not give the bits that plain operations give."""
    # Drawn evenly, as codes of a real weight nearly are: in order they would meet in the same memory banks.
    generator = torch.Generator(device).manual_seed(0)
    packed = torch.randint(256, (n // 2,), dtype=torch.uint8, device=device, generator=generator)
    codes, codebook = packed[: n // 64], torch.linspace(-1, 1, 16, device=device)
    nested = torch.linspace(1, 2, -(-len(codes) // 256), device=device)
    nested_codebook, offset = torch.linspace(-1, 1, 256, device=device), nested.mean()
    scales = [codes, nested, nested_codebook, offset]
    absmax = dequantize_scales(codes, nested, nested_codebook, offset, 256)
    expected = torch.empty(n, dtype=torch.bfloat16, device=device)
    dequantize(packed, absmax, codebook, 64, expected)
    times = {}
    for look_up in LOOK_UPS:
        decode = compiled_decode(n // 2, 64, 256, 0, torch.bfloat16, look_up)
        levels = levels_for(look_up, codebook)
        try:
            decoded = decode(packed, scales, levels)
        except Exception:  # no compiler, or one that cannot: of each back end an error of its own
            continue
        if not torch.equal(decoded.view(torch.bfloat16), expected):
            continue
        for rounds in (3, 20):  # the first to warm up
            wait_for(device)
            began = time.perf_counter()
            for _ in range(rounds):
                decode(packed, scales, levels)
            wait_for(device)
            times[look_up] = time.perf_counter() - began
    return times


def returned(y: Tensor) -> Tensor:
    """Return what an autograd function's forward may return for a y that it changed in place, or cast to the
    dtype that it had.

    Compiled by torch 2.11, y itself has gradients of zero, without a word; a view of it has the right ones.
    """
    return y.view_as(y) if torch.compiler.is_compiling() else y


def wait_for(device: torch.device) -> None:
    """Return when a device has done all that it was given, as a clock needs it."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


# ---- the two products, for any tiles -----------------------------------------------------------------------


def product(x: Tensor, weight: Tensor, out: Tensor | None = None, add: bool = False) -> Tensor:
    """Return x @ weight.T: (T, K) @ (K, N) -> (T, N); or write it to `out`, of any strides, or add it.

    Float32 on a CPU goes to oneDNN, which is a tenth faster than what PyTorch calls for `mm`, for a few rows
    by more.
    """
    is_float32 = x.dtype == torch.float32 and x.device.type == "cpu"
    numbers = numbers_of_rows(len(x)) if is_float32 and _has_onednn() else []
    if out is None:
        if len(numbers) == 1 and numbers[0] >= len(x):
            return _by_onednn(x, weight, numbers[0])
        out = x.new_empty(len(x), len(weight))
    done = 0
    for number in numbers:
        y = _by_onednn(x[done : done + number], weight, number)
        y_out = out[done : done + number]
        y_out.add_(y) if add else y_out.copy_(y)
        done += len(y)
    if done < len(x) and add:
        out[done:].addmm_(x[done:], weight.T)
    elif done < len(x):
        torch.mm(x[done:], weight.T, out=out[done:])
    return out


def _by_onednn(x: Tensor, weight: Tensor, number: int) -> Tensor:
    # As rows of a product of `number` rows.
    filled = x if len(x) == number else F.pad(x, (0, 0, 0, number - len(x)))
    return torch.ops.mkldnn._linear_pointwise(filled, weight, None, "none", [], "")[: len(x)]


def numbers_of_rows(n: int) -> list[int]:
    """Return the numbers of rows that oneDNN is given one after the other for n of them.

    It prepares itself for each new number, which takes time and memory that is kept. So it gets the same few
    always: where up to 32 rows are missing, an eighth at most, rows of zeros fill up. What is left is `mm`'s.
    """
    numbers = []
    for size in ROWS:
        while n >= size - min(size // 8, 32):
            numbers.append(size)
            n -= size
    return numbers


@cache
def _has_onednn() -> bool:
    # What torch.compile calls for linear layers on a CPU.
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _multiply(x: Tensor, n_rows: int, tiles: Tiles) -> Tensor:
    # Logits, say, are more than an allocator keeps: then on huge pages.
    is_large = len(x) * n_rows * x.itemsize > 2**25
    y = None
    for rows, tile in tiles:
        if len(tile) == n_rows and not is_large and not _is_single(x):  # the whole weight
            return product(x, tile)
        if y is None:
            y = empty((len(x), n_rows), x.dtype, x.device) if is_large else x.new_empty(len(x), n_rows)
        if _is_single(x):
            # A core multiplies the rows that it has decoded. In mm cores read one another's, and where they
            # share no cache that takes three times as long as all the rest.
            torch.sum(tile.mul_(x), dim=1, out=y[0, rows])  # (rows, K) -> (rows,)
        else:
            product(x, tile, out=y[:, rows])  # (T, K) @ (K, rows) -> (T, rows)
    return x.new_empty(len(x), n_rows) if y is None else y


def _is_single(x: Tensor) -> bool:
    # One token on a CPU, as in generation. (Of 16 bits the products would be rounded before they are summed.)
    return len(x) == 1 and x.dtype == torch.float32 and x.device.type == "cpu"


def _is_read_by_words(packed: Tensor, codebook: Tensor, n_columns: int, block_size: int) -> bool:
    # By an accelerator with a compiler: eight codes of a row and of a block are a word, where words begin.
    is_whole = codes_per_byte(codebook) == 2 and n_columns % 8 == block_size % 8 == 0
    is_whole = is_whole and packed.storage_offset() % 4 == 0
    return packed.device.type != "cpu" and is_whole and fastest_look_up(packed.device) is not None


def _multiply_transposed(grad_y: Tensor, n_columns: int, tiles: Tiles) -> Tensor:
    n_tokens, n_rows = grad_y.shape
    narrow = grad_y.element_size() < 4
    grad_x = None
    for rows, tile in tiles:
        if len(tile) == n_rows:  # the whole weight: nothing to sum
            return product(grad_y, tile.T)  # (T, N) @ (N, K) -> (T, K)
        if grad_x is None:
            # In float32, because rounding the sum to 16 bits at every tile would triple the error.
            dtype = torch.float32 if narrow else grad_y.dtype
            grad_x = empty((n_tokens, n_columns), dtype, grad_y.device)
            grad_x = grad_x.zero_() if narrow else grad_x
        if narrow:  # a few tokens at a time, so that a product is still in the cache when it is added
            for start in range(0, n_tokens, TOKENS):
                some = slice(start, start + TOKENS)
                grad_x[some].add_(grad_y[some, rows] @ tile)
        else:
            product(grad_y[:, rows], tile.T, out=grad_x, add=rows.start > 0)
    if grad_x is None:  # a weight of no rows
        return grad_y.new_zeros(n_tokens, n_columns)
    return grad_x.to(grad_y.dtype)


# ---- the operators -----------------------------------------------------------------------------------------


def _nf4_forward_now(
    x: Tensor,
    packed: Tensor,
    scales: list[Tensor],
    codebook: Tensor,
    n_rows: int,
    n_columns: int,
    block_size: int,
    nested_block_size: int,
    nested_first: int,
) -> Tensor:
    if len(x) == 1 and x.itemsize <= 4 and _is_read_by_words(packed, codebook, n_columns, block_size):
        return multiply_fused(x, packed, scales, codebook, block_size, nested_block_size, nested_first)
    sizes = (n_rows, n_columns, block_size, nested_block_size, nested_first)
    tile = TILE // 2 if _is_single(x) else TILE  # decoded in one run, by the cores that will read it
    return _multiply(x, n_rows, _nf4_tiles(packed, scales, codebook, *sizes, x.dtype, tile=tile))


def _nf4_backward_now(
    grad_y: Tensor,
    packed: Tensor,
    scales: list[Tensor],
    codebook: Tensor,
    n_rows: int,
    n_columns: int,
    block_size: int,
    nested_block_size: int,
    nested_first: int,
) -> Tensor:
    sizes = (n_rows, n_columns, block_size, nested_block_size, nested_first)
    return _multiply_transposed(grad_y, n_columns, _nf4_tiles(packed, scales, codebook, *sizes, grad_y.dtype))


def _nf4_decoded_now(
    packed: Tensor,
    scales: list[Tensor],
    codebook: Tensor,
    n_rows: int,
    n_columns: int,
    block_size: int,
    nested_block_size: int,
    nested_first: int,
    dtype: torch.dtype,
) -> Tensor:
    sizes = (n_rows, n_columns, block_size, nested_block_size, nested_first)
    if packed.device.type != "cpu":  # one tile, which is a tensor of its own
        [(_, decoded)] = _nf4_tiles(packed, scales, codebook, *sizes, dtype)
        return decoded
    out = empty((n_rows, n_columns), dtype, packed.device)
    _decode_into(out, packed, scales, codebook, sizes)
    return out


def _cast_forward_now(x: Tensor, weight: Tensor) -> Tensor:
    return _multiply(x, len(weight), _cast_tiles(weight, x.dtype))


def _cast_backward_now(grad_y: Tensor, weight: Tensor) -> Tensor:
    return _multiply_transposed(grad_y, weight.shape[1], _cast_tiles(weight, grad_y.dtype))


_nf4_decoded = torch.library.custom_op("minqlora::nf4_dequantize", _nf4_decoded_now, mutates_args=())
_nf4_forward = torch.library.custom_op("minqlora::nf4_linear", _nf4_forward_now, mutates_args=())
_nf4_backward = torch.library.custom_op("minqlora::nf4_linear_backward", _nf4_backward_now, mutates_args=())
_cast_forward = torch.library.custom_op("minqlora::cast_linear", _cast_forward_now, mutates_args=())
_cast_backward = torch.library.custom_op(
    "minqlora::cast_linear_backward", _cast_backward_now, mutates_args=()
)
_nf4_forward.register_fake(lambda x, packed, scales, codebook, n_rows, *_: x.new_empty(x.shape[0], n_rows))
_nf4_backward.register_fake(
    lambda g, packed, scales, codebook, n_rows, n_columns, *_: g.new_empty(g.shape[0], n_columns)
)
_nf4_decoded.register_fake(
    lambda packed, scales, codebook, n_rows, n_columns, block_size, nested_block_size, nested_first, dtype: (
        packed.new_empty(n_rows, n_columns, dtype=dtype)
    )
)
_cast_forward.register_fake(lambda x, weight: x.new_empty(x.shape[0], weight.shape[0]))
_cast_backward.register_fake(lambda g, weight: g.new_empty(g.shape[0], weight.shape[1]))


def _save_nf4(ctx, inputs, output) -> None:
    _, packed, scales, codebook, *ctx.sizes = inputs
    ctx.save_for_backward(packed, codebook, *scales)


def _differentiate_nf4(ctx, grad_y):
    packed, codebook, *scales = ctx.saved_tensors
    n_rows, n_columns, *sizes = ctx.sizes
    shape = n_rows, n_columns
    grad_x = nf4_linear_backward(grad_y.contiguous(), packed, scales, codebook, shape, *sizes)
    return grad_x, None, [None] * len(scales), *[None] * 6


def _save_cast(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[1])


def _differentiate_cast(ctx, grad_y):
    return cast_linear_backward(grad_y.contiguous(), *ctx.saved_tensors), None


_nf4_forward.register_autograd(_differentiate_nf4, setup_context=_save_nf4)
_cast_forward.register_autograd(_differentiate_cast, setup_context=_save_cast)


class EagerNF4Linear(torch.autograd.Function):
    """The operator nf4_linear where nothing is compiled."""

    forward = staticmethod(_nf4_forward_now)
    setup_context = staticmethod(_save_nf4)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of x."""
        return _differentiate_nf4(ctx, grad_y)[0], *[None] * 8  # an operator's list counts one by one


class EagerCastLinear(torch.autograd.Function):
    """The operator cast_linear where nothing is compiled."""

    forward = staticmethod(_cast_forward_now)
    setup_context = staticmethod(_save_cast)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of x."""
        return _differentiate_cast(ctx, grad_y)
