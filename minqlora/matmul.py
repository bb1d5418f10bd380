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
GPU one compiled kernel decodes the whole matrix and the vendor's matmul follows.

The same two products serve a 16-bit weight under activations of another dtype, an output head kept in
bfloat16 say: there "decoding" is a cast, tile by tile, and the head never exists in float32 as a whole.

Why custom operators. Written in plain operations under `torch.compile`, forward and backward would be traced
together, the two decodings recognised as one, and the *decoded* weight saved in between: 14 GB for an 8B
model, QLoRA undone without a word. An operator is opaque to that, and forward and backward are two different
ones so that neither stands in for the other.

Shapes and dtypes: X (..., K) and Y (..., N) in the compute dtype, which is also that of the decoded tile; the
rest as in Chapter 3. Cost: 2 T N K FLOPs each way, as for any linear; for decoding, one look-up for two
weights and one multiply a weight. Saved for backward: the packed weight and its scales, which live anyway.

Differences. bitsandbytes does the same with compiled kernels, and on a CPU decodes the whole matrix; its
backward decodes through the weight's old dtype, ours straight to the compute dtype.

Paper: "QLoRA Finetuning", the equation with doubleDequant.

Before: quantize. Next: nf4.
"""

from collections.abc import Iterator
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from minqlora.quantize import byte_table, codes_per_byte, dequantize, dequantize_scales, empty, scratch

# Bytes in a tile of decoded weights: about a core's share of the last cache. With what decoding needs,
# the scratch of a thread stays under 16 MiB, whatever the matrix.
TILE = 2**23
TOKENS = 256  # rows of X or dY in a product
ROWS = (TOKENS, TOKENS // 4)  # the numbers of rows that oneDNN is given
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
    forward = _nf4_forward_now if _is_plain(x) else _nf4_forward
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


def _is_plain(x: Tensor) -> bool:
    # Nobody differentiates or compiles what follows: the way through an operator would only cost time.
    return not torch.is_grad_enabled() and not torch.compiler.is_compiling() and type(x) is Tensor


def cast_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return x @ weight.T for a weight (N, K) and x (..., K) of another dtype; differentiable in x.

    A weight that is trained gets its gradient too, and is cast as a whole for it.
    """
    if weight.dtype == x.dtype or weight.requires_grad:
        return F.linear(x, weight.to(x.dtype))
    y = _cast_forward(x.reshape(-1, x.shape[-1]), weight)
    return y.view(*x.shape[:-1], weight.shape[0])


def cast_linear_backward(grad_y: Tensor, weight: Tensor) -> Tensor:
    """Return grad_y @ weight, (..., N) -> (..., K): the gradient of `cast_linear`'s x."""
    if weight.dtype == grad_y.dtype:
        return grad_y @ weight
    return _cast_backward(grad_y.reshape(-1, grad_y.shape[-1]), weight).view(
        *grad_y.shape[:-1], weight.shape[1]
    )


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
        return _nf4_decoded(packed, scales, codebook, *sizes, dtype)
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
    if packed.device.type != "cpu":
        absmax = _absmax(scales, 0, n_blocks, nested_block_size, nested_first)
        decode = compiled_decode(block_size, dtype)
        decoded = decode(packed, absmax, byte_table(codebook), n_rows * n_columns).view(n_rows, n_columns)
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


@cache
def compiled_decode(block_size: int, dtype: torch.dtype):
    """Return the decoding of a whole weight as one compiled kernel, for accelerators.

    The function maps (packed, absmax, table, n) to n decoded numbers. Sizes are symbols in it, so that one
    compilation serves all layers: after eight recompilations torch.compile runs the function uncompiled.
    """

    def decode(packed: Tensor, absmax: Tensor, table: Tensor, n: int) -> Tensor:
        levels = table[packed.int()].view(-1)[:n]
        block = torch.arange(n, device=packed.device, dtype=torch.int32) // block_size
        return (levels * absmax[block]).to(dtype)

    return torch.compile(decode, dynamic=True)


# ---- the two products, for any tiles -----------------------------------------------------------------------


def product(x: Tensor, weight: Tensor, out: Tensor, add: bool = False) -> None:
    """Write x @ weight.T to `out`, or add it: (T, K) @ (K, N) -> (T, N), of any strides.

    Float32 on a CPU goes to oneDNN, which is a tenth faster than what PyTorch calls for `mm`. It prepares
    itself for each new number of rows, which takes time and memory that is kept; so it gets the same few
    numbers always, and `mm` the rest.
    """
    done = 0
    if x.dtype == torch.float32 and x.device.type == "cpu" and _has_onednn():
        for size in ROWS:
            while done + size <= len(x):
                some = slice(done, done + size)
                y = torch.ops.mkldnn._linear_pointwise(x[some], weight, None, "none", [], "")
                out[some].add_(y) if add else out[some].copy_(y)
                done += size
    if done == len(x):
        return
    if add:
        out[done:].addmm_(x[done:], weight.T)
    else:
        torch.mm(x[done:], weight.T, out=out[done:])


@cache
def _has_onednn() -> bool:
    # What torch.compile calls for linear layers on a CPU.
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _multiply(x: Tensor, n_rows: int, tiles: Tiles) -> Tensor:
    # Logits, say, are more than an allocator keeps: then on huge pages.
    is_large = len(x) * n_rows * x.itemsize > 2**25
    y = empty((len(x), n_rows), x.dtype, x.device) if is_large else x.new_empty(len(x), n_rows)  # (T, N)
    for rows, tile in tiles:
        if _is_single(x):
            # A core multiplies the rows that it has decoded. In mm cores read one another's, and where they
            # share no cache that takes three times as long as all the rest.
            torch.sum(tile.mul_(x), dim=1, out=y[0, rows])  # (rows, K) -> (rows,)
        else:
            product(x, tile, out=y[:, rows])  # (T, K) @ (K, rows) -> (T, rows)
    return y


def _is_single(x: Tensor) -> bool:
    # One token on a CPU, as in generation. (Of 16 bits the products would be rounded before they are summed.)
    return len(x) == 1 and x.dtype == torch.float32 and x.device.type == "cpu"


def _multiply_transposed(grad_y: Tensor, n_columns: int, tiles: Tiles) -> Tensor:
    n_tokens, n_rows = grad_y.shape
    narrow = grad_y.element_size() < 4
    grad_x = None
    for rows, tile in tiles:
        if len(tile) == n_rows:  # the whole weight: nothing to sum
            grad_x = grad_y.new_empty(n_tokens, n_columns)
            product(grad_y, tile.T, out=grad_x)  # (T, N) @ (N, K) -> (T, K)
            return grad_x
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


@torch.library.custom_op("minqlora::nf4_dequantize", mutates_args=())
def _nf4_decoded(
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


@torch.library.custom_op("minqlora::cast_linear", mutates_args=())
def _cast_forward(x: Tensor, weight: Tensor) -> Tensor:
    return _multiply(x, len(weight), _cast_tiles(weight, x.dtype))


@torch.library.custom_op("minqlora::cast_linear_backward", mutates_args=())
def _cast_backward(grad_y: Tensor, weight: Tensor) -> Tensor:
    return _multiply_transposed(grad_y, weight.shape[1], _cast_tiles(weight, grad_y.dtype))


_nf4_forward = torch.library.custom_op("minqlora::nf4_linear", _nf4_forward_now, mutates_args=())
_nf4_backward = torch.library.custom_op("minqlora::nf4_linear_backward", _nf4_backward_now, mutates_args=())
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
    grad_x = _nf4_backward(grad_y.contiguous(), packed, scales, codebook, *ctx.sizes)
    return grad_x, None, [None] * len(scales), *[None] * 6


def _save_cast(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[1])


def _differentiate_cast(ctx, grad_y):
    return _cast_backward(grad_y.contiguous(), *ctx.saved_tensors), None


_nf4_forward.register_autograd(_differentiate_nf4, setup_context=_save_nf4)
_cast_forward.register_autograd(_differentiate_cast, setup_context=_save_cast)
