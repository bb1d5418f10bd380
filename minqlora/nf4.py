"""Chapter 5. NF4Tensor: 4 bits in memory, an ordinary weight to the rest of PyTorch.

`nn.Linear` should not learn what 4-bit is. So the packed bytes and their scales are put into a tensor
subclass with the shape, dtype and device of the weight it replaces, and a short list of operations,
`F.linear` first, looks inside::

    >>> linear = nn.Linear(1536, 576, bias=False, dtype=torch.bfloat16)
    >>> linear.weight = nn.Parameter(NF4Tensor.from_float(linear.weight), requires_grad=False)
    >>> linear.weight
    NF4Tensor(shape=(576, 1536), dtype=torch.bfloat16, device=cpu, block_size=64, double_quant=True,
              4.127 bits per parameter)
    >>> linear(torch.randn(2, 1536)).dtype          # decoded to the dtype of what it meets
    torch.float32
    >>> (torch.randn(2, 1536) @ linear.weight.t()).shape
    torch.Size([2, 576])
    >>> [part.shape for part in linear.weight.chunk(2)]             # rows, without decoding them
    [torch.Size([288, 1536]), torch.Size([288, 1536])]

What a frozen weight needs it can do: move, be copied, be saved, be multiplied by, be viewed transposed or cut
by rows. Everything else is refused by name: an operation that fell back to decoding would cost the memory
this class exists to save, and nobody would notice.

    a part of four rows of three blocks, cut after the first row, two scales to a nested block

    row                0        1        2        3
    absmax_codes     0 1 2    3 4 5    6 7 8    9 10 11
    nested_absmax    0 0 1    1 2 2    3 3 4    4 5  5          block of each scale
    t[1:]                     its nested_absmax begins with block 1, and its first scale is the second of it:
                              `nested_first` is 1

Shapes and dtypes: (N, K); `dtype` is the dtype of the weight before quantization and the default of
`dequantize()`. The parts are those of Chapter 3. Cost: 4.127 bits per parameter with double quantization, 4.5
without; the two codebooks are shared by all tensors on a device and counted by none.

Differences. bitsandbytes keeps the packed bytes as the parameter, (n / 2, 1), and the rest in a `quant_state`
beside it; moving or copying one without the other is a classic accident. Here all parts travel together.

Paper: "QLoRA Finetuning".

Before: matmul. Next: lora.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._prims_common import canonicalize_dims
from torch.utils._python_dispatch import return_and_correct_aliasing

from minqlora import codebook, matmul, quantize

aten = torch.ops.aten

PARTS = ("packed", "codebook", "absmax", "absmax_codes", "nested_absmax", "nested_codebook", "offset")
SHARED_PARTS = ("codebook", "nested_codebook")  # one object for all tensors on a device


@dataclass(frozen=True)
class Format:
    """How an NF4Tensor's parts are to be read."""

    shape: tuple[int, int]  # (N, K) of the matrix, however it is viewed
    block_size: int = 64  # weights that share a scale
    nested_block_size: int = 256  # scales that share a second scale
    nested_first: int = 0  # of a part of a larger weight: scales of the first nested block before its own
    quant_type: str = "nf4"
    view: Literal["matrix", "transposed", "flat"] = "matrix"  # (N, K), (K, N) or (N K,)

    @property
    def sizes(self) -> tuple[tuple[int, int], int, int, int]:
        """What `matmul`'s functions take last."""
        return self.shape, self.block_size, self.nested_block_size, self.nested_first

    @property
    def n_blocks(self) -> int:
        """How many scales there are."""
        return -(-self.shape[0] * self.shape[1] // self.block_size)

    @property
    def n_nested_blocks(self) -> int:
        """How many scales of scales there are."""
        return -(-(self.nested_first + self.n_blocks) // self.nested_block_size) if self.n_blocks else 0


class NF4Tensor(Tensor):
    """A (N, K) weight quantized to 4-bit NormalFloat. Make one with `NF4Tensor.from_float`.

    Attributes: `packed` uint8 (ceil(N K / 2),); `codebook` float32 (16,); without double quantization
    `absmax` float32 (n_blocks,); with it `absmax` is None and there are `absmax_codes` uint8 (n_blocks,),
    `nested_absmax` float32, `nested_codebook` float32 (256,) and `offset` float32 (). `format` says how
    they are to be read. Other levels than NF4's may stand in `codebook`: two codes a byte for up to 16,
    one for more.
    """

    packed: Tensor
    codebook: Tensor
    absmax: Tensor | None
    absmax_codes: Tensor | None
    nested_absmax: Tensor | None
    nested_codebook: Tensor | None
    offset: Tensor | None
    format: Format

    @staticmethod
    def __new__(cls, parts: dict[str, Tensor], dtype: torch.dtype, format: Format):
        n, k = format.shape
        size, stride = {"matrix": ((n, k), (k, 1)), "transposed": ((k, n), (1, k)), "flat": ((n * k,), (1,))}[
            format.view
        ]
        device = parts["packed"].device
        return Tensor._make_wrapper_subclass(cls, size, strides=stride, dtype=dtype, device=device)

    def __init__(self, parts: dict[str, Tensor], dtype: torch.dtype, format: Format):
        for name in PARTS:
            setattr(self, name, parts.get(name))
        self.format = format

    @classmethod
    def from_float(
        cls,
        weight: Tensor,
        *,
        quant_type: str = "nf4",
        block_size: int = 64,
        nested_block_size: int = 256,
        double_quant: bool = True,
        scale_rule: str = "midpoint",
    ) -> "NF4Tensor":
        """Quantize a weight.

        weight: floating point (N, K). quant_type: a name in `codebook.QUANT_TYPES`; all but "nf4" and
        "fp4" are for comparison. block_size, nested_block_size: numbers (scales) that share a scale, the
        first even. double_quant: store the scales in 8 bits, found by `scale_rule` as in
        `quantize.quantize_scales`.

        Raises ValueError for another quant_type or scale_rule, a weight that is not floating-point (N, K),
        is empty, quantized already, or holds a NaN or infinity, and for a block size that is not positive
        and even.
        """
        if quant_type not in codebook.QUANT_TYPES:
            raise ValueError(
                f"quant_type must be one of {', '.join(codebook.QUANT_TYPES)}, not {quant_type!r}"
            )
        if scale_rule not in quantize.SCALE_RULES:
            raise ValueError(
                f"scale_rule must be one of {', '.join(quantize.SCALE_RULES)}, not {scale_rule!r}"
            )
        if isinstance(weight, NF4Tensor):
            raise ValueError("the weight is quantized already: call .dequantize() to quantize it another way")
        if weight.dim() != 2 or not weight.is_floating_point():
            raise ValueError(
                f"expected a floating-point (N, K) weight, got {weight.dtype} {tuple(weight.shape)}"
            )
        if block_size < 2 or block_size % 2 or nested_block_size < 1:
            raise ValueError(
                f"block_size must be even and both positive, got {block_size} and {nested_block_size}"
            )
        if quant_type == "quantile":
            sample = quantize.scaled_sample(weight, block_size)
            levels = codebook.shared(
                torch.from_numpy(codebook.quantile_levels(sample.numpy())), weight.device
            )
        else:
            levels = codebook.levels(quant_type, weight.device)
        parts = {"codebook": levels}
        if double_quant:
            nested_levels = codebook.dynamic_map(weight.device)
            names = ("packed", "absmax_codes", "nested_absmax", "offset")
            found = quantize.quantize_double(
                weight, levels, nested_levels, block_size, nested_block_size, scale_rule
            )
            parts |= dict(zip(names, found, strict=True), nested_codebook=nested_levels)
        else:
            parts["packed"], parts["absmax"] = quantize.quantize(weight, levels, block_size)
        shape = (weight.shape[0], weight.shape[1])
        return cls(parts, weight.dtype, Format(shape, block_size, nested_block_size, 0, quant_type))

    @property
    def scales(self) -> list[Tensor]:
        """What `matmul` takes: [absmax], or [absmax_codes, nested_absmax, nested_codebook, offset]."""
        if self.absmax is not None:
            return [self.absmax]
        assert self.absmax_codes is not None and self.nested_absmax is not None
        assert self.nested_codebook is not None and self.offset is not None
        return [self.absmax_codes, self.nested_absmax, self.nested_codebook, self.offset]

    @property
    def parts(self) -> dict[str, Tensor]:
        """The tensors this one is made of, by attribute name."""
        return {name: part for name in PARTS if (part := getattr(self, name)) is not None}

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """Bytes held by this tensor alone; the shared codebooks are for whoever counts a whole model."""
        return sum(part.nbytes for name, part in self.parts.items() if name not in SHARED_PARTS)

    @property
    def bits_per_parameter(self) -> float:
        """Storage per weight in bits, from the bytes really held."""
        return 8 * self.nbytes / max(self.numel(), 1)

    def dequantize(self, dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
        """Return the decoded weight, in this tensor's shape, in `dtype` (default: its own), or write it to
        `out`.

        Raises ValueError for an `out` of another shape, on another device, or of another dtype than the one
        asked for.
        """
        if out is not None and out.shape != self.shape:
            raise ValueError(f"out must have the weight's shape {tuple(self.shape)}, got {tuple(out.shape)}")
        if out is not None and (
            out.device != self.device or not out.is_floating_point() or (dtype or out.dtype) != out.dtype
        ):
            wanted = f"{dtype or 'floating point'} on {self.device}"
            raise ValueError(f"out must be {wanted}, got {out.dtype} on {out.device}")
        decoded = matmul.nf4_dequantize(
            self.packed,
            self.scales,
            self.codebook,
            *self.format.sizes,
            dtype=dtype or self.dtype,
            out=None if out is None else _as_matrix(out, self.format),
        )
        if out is not None:
            return out
        return {"matrix": decoded, "transposed": decoded.T, "flat": decoded.view(-1)}[self.format.view]

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        quant_type = "" if self.format.quant_type == "nf4" else f"quant_type={self.format.quant_type!r}, "
        return (
            f"NF4Tensor(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device}, {quant_type}"
            f"block_size={self.format.block_size}, double_quant={self.absmax is None}, "
            f"{self.bits_per_parameter:.3f} bits per parameter)"
        )

    def __reduce_ex__(self, protocol):
        raise NotImplementedError(
            "NF4Tensor is not pickled, and so not torch.save'd: save it with safetensors, as "
            "checkpoint.flatten_state_dict lays it out"
        )

    def share_memory_(self) -> "NF4Tensor":
        """Move every part to memory that other processes can share."""
        for part in self.parts.values():
            part.share_memory_()
        return self

    def is_shared(self) -> bool:
        """Say whether other processes can share it."""
        return all(part.is_shared() for part in self.parts.values())

    def __deepcopy__(self, memo) -> Tensor:
        copied: Tensor = self._rebuild(Tensor.clone)
        if isinstance(self, nn.Parameter):
            copied = nn.Parameter(copied, requires_grad=self.requires_grad)
        return memo.setdefault(id(self), copied)

    def _rebuild(self, change: Callable[[Tensor], Tensor] = lambda part: part, **format: Any) -> "NF4Tensor":
        # The same tensor with every part of its own changed; codebooks stay the shared objects they are.
        parts = {name: part if name in SHARED_PARTS else change(part) for name, part in self.parts.items()}
        return NF4Tensor(parts, self.dtype, replace(self.format, **format))

    def _on(
        self, device: torch.device, dtype: torch.dtype, change: Callable[[Tensor], Tensor]
    ) -> "NF4Tensor":
        # The same with the codebooks of another device.
        if not dtype.is_floating_point:
            raise ValueError(f"an NF4Tensor stands for a floating-point weight and has no {dtype}")
        parts = {name: part for name, part in self.parts.items() if name not in SHARED_PARTS}
        parts = {name: change(part) for name, part in parts.items()}
        for name in self.parts.keys() & set(SHARED_PARTS):
            parts[name] = self._shared_part(name, device)
        return NF4Tensor(parts, dtype, self.format)

    def _shared_part(self, name: str, device: torch.device) -> Tensor:
        part: Tensor = getattr(self, name)
        if part.device.type != "meta" or device.type == "meta":
            return codebook.shared(part, device)
        # A tensor without memory has only the name of its levels.
        return (
            codebook.levels(self.format.quant_type, device)
            if name == "codebook"
            else codebook.dynamic_map(device)
        )

    # ---- what the rest of PyTorch asks for -----------------------------------------------------------------

    def __tensor_flatten__(self):
        return list(self.parts), (self.dtype, self.format)

    def _stable_hash_for_caching(self) -> str:  # what torch.compile keys its cache of graphs by
        return repr((list(self.parts), self.dtype, self.format, self.device, self.requires_grad))

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], context, outer_size, outer_stride) -> "NF4Tensor":
        return NF4Tensor(inner, *context)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        # F.linear is caught here, above autograd, so that the whole layer is one operator with a backward of
        # its own.
        kwargs = kwargs or {}
        if func is F.linear:
            return _linear(*args, **kwargs)
        if func in MATMULS and len(args) == 2:
            # Contiguous, more than two dimensions are folded into one mm; behind a weight, only transposed
            # are.
            a, b = args if func is not Tensor.__rmatmul__ else args[::-1]
            if isinstance(a, NF4Tensor) and b.dim() > 2:
                return (b.mT @ a.mT).mT
            args = (a.contiguous() if isinstance(b, NF4Tensor) and a.dim() > 2 else a, b)
            func = torch.matmul
            if a.dim() == b.dim() == 2 and not kwargs and _is_eager() and not torch.is_grad_enabled():
                return _mm(a, b)
        if func is Tensor.detach and _is_eager() and not torch.is_inference_mode_enabled():
            return args[0]._rebuild()
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[override]
        kwargs = kwargs or {}
        if func in VIEWS:
            if torch.is_inference_mode_enabled() and not args[0].is_inference():
                # A view of an ordinary tensor is one, inside inference_mode too.
                with torch.inference_mode(False):
                    return func(*args, **kwargs)
            return return_and_correct_aliasing(func, args, kwargs, VIEWS[func](*args, **kwargs))
        if func in OPERATIONS:
            return OPERATIONS[func](*args, **kwargs)
        if torch.is_inference_mode_enabled() and func._can_decompose():
            return func.decompose(*args, **kwargs)  # there matmul and to arrive whole
        raise NotImplementedError(
            f"NF4Tensor has no {func}: it is a frozen weight, to multiply by, to move, copy and cut by rows. "
            "Call .dequantize() first for an ordinary tensor."
        )

    # ---- FSDP2, fully_shard: each rank holds some rows, and gathers all of them for a product
    # ---------------

    def fsdp_pre_all_gather(self, mesh, outer_size, outer_stride, module, mp_policy):
        """Return what the ranks exchange: the packed rows and their scales, decoded, because ranks begin
        within different nested blocks. 4.5 bits a weight travel, not 32.
        """
        if outer_size[0] != self.shape[0] * mesh.size():
            raise ValueError(
                f"a {tuple(outer_size)} NF4Tensor cannot be sharded over {mesh.size()} ranks: "
                "its rows do not divide evenly"
            )
        scales = self._decoded_scales()
        # Of one rank alone torch takes the first tensor and forgets the second.
        return (self.packed, scales), (self.codebook, scales if mesh.size() == 1 else None)

    def fsdp_post_all_gather(self, gathered, metadata, param_dtype, *, out=None):
        """Return the whole weight as an NF4Tensor over what was gathered, or fill `out`, which is that
        already."""
        if out is not None:
            return None
        codebook, own_scales = metadata
        packed, absmax = (*gathered, own_scales)[:2]
        n_rows = self.shape[0] * absmax.numel() // self.format.n_blocks
        format = replace(self.format, shape=(n_rows, self.shape[1]), nested_first=0)
        parts = {"packed": packed, "absmax": absmax, "codebook": codebook}
        return NF4Tensor(parts, self.dtype, format), gathered

    def _decoded_scales(self) -> Tensor:
        if self.absmax is not None:
            return self.absmax
        codes, nested_absmax, nested_codebook, offset = self.scales
        nested = self.format.nested_block_size, self.format.nested_first
        return quantize.dequantize_scales(codes, nested_absmax, nested_codebook, offset, *nested)


def _is_eager() -> bool:
    # Then what is not differentiated need not go through the dispatcher. That takes time, and who is the
    # first to go there loads torch.distributed.tensor, for 40 MB.
    return not torch.compiler.is_compiling()


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not isinstance(weight, NF4Tensor) or isinstance(input, NF4Tensor) or isinstance(bias, NF4Tensor):
        raise NotImplementedError(
            "NF4Tensor can only be the weight of F.linear. Call .dequantize() for an ordinary tensor."
        )
    if not input.is_floating_point():
        raise ValueError(f"the input of a linear layer must be floating-point, got {input.dtype}")
    if input.device != weight.device:
        raise ValueError(f"the input is on {input.device}, but the weight on {weight.device}")
    if weight.requires_grad:  # it would silently get none
        raise ValueError("an NF4Tensor is frozen: call .requires_grad_(False) on the weight")
    if weight.format.view != "matrix":
        y = input @ weight.t()
    else:
        y = matmul.nf4_linear(input, weight.packed, weight.scales, weight.codebook, *weight.format.sizes)
    return y if bias is None else y + bias.to(y.dtype)


# ---- operations, below autograd ----------------------------------------------------------------------------


def _mm(a: Tensor, b: Tensor) -> Tensor:
    if isinstance(a, NF4Tensor) and isinstance(b, NF4Tensor):
        raise NotImplementedError("two NF4Tensors are not multiplied: call .dequantize() on one of them")
    if isinstance(a, NF4Tensor):
        return _mm(b.t(), a.t()).t()
    assert isinstance(b, NF4Tensor)
    if b.format.view == "flat" or a.dim() != 2 or a.shape[1] != b.shape[0]:
        raise ValueError(f"shapes {tuple(a.shape)} and {tuple(b.shape)} cannot be multiplied")
    if not a.is_floating_point():
        raise ValueError(f"an NF4Tensor is multiplied by floating-point numbers, got {a.dtype}")
    if a.device != b.device:
        raise ValueError(f"operands are on {a.device} and {b.device}")
    product = matmul.nf4_linear if b.format.view == "transposed" else matmul.nf4_linear_backward
    with torch.no_grad():  # autograd is above
        return product(a.contiguous(), b.packed, b.scales, b.codebook, *b.format.sizes)


def _addmm(input: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    if isinstance(input, NF4Tensor):
        raise NotImplementedError("an NF4Tensor is not added to: call .dequantize() first")
    product = _mm(a, b)
    product = product if alpha == 1 else product * alpha
    return product if beta == 0 else torch.add(product, input.to(product.dtype), alpha=beta)


def _mv(a: Tensor, vector: Tensor) -> Tensor:
    return _mm(a, vector[:, None])[:, 0]


def _to_copy(tensor: NF4Tensor, *, dtype=None, device=None, non_blocking=False, **_: Any) -> NF4Tensor:
    device = torch.device(device or tensor.device)
    return tensor._on(
        device, dtype or tensor.dtype, lambda part: part.to(device, non_blocking=non_blocking, copy=True)
    )


def _copy_(tensor: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    if not isinstance(tensor, NF4Tensor) or not isinstance(source, NF4Tensor):
        raise NotImplementedError(
            "copy_ between an NF4Tensor and an ordinary tensor would quantize or decode: call "
            "NF4Tensor.from_float(weight), or .dequantize(out=tensor)"
        )
    ours, theirs = tensor.format, source.format
    as_ours = replace(theirs, nested_block_size=ours.nested_block_size, nested_first=ours.nested_first)
    begins = theirs.nested_first - ours.nested_first
    if (
        as_ours != ours
        or tensor.parts.keys() != source.parts.keys()
        or theirs.nested_block_size % ours.nested_block_size
        or begins % ours.nested_block_size
    ):
        raise ValueError(f"cannot copy a tensor quantized another way: {source!r} to {tensor!r}")
    if tensor.is_meta:
        return tensor
    for name in SHARED_PARTS:
        part = getattr(tensor, name)
        if part is not None and codebook.shared(getattr(source, name), tensor.device) is not part:
            raise ValueError("cannot copy a tensor with levels of its own: load it with assign=True")
    if tensor.offset is not None and source.offset is not None:
        # The rows of a larger tensor have its offset, and so must what is written over some of them. A
        # blank one (new_zeros) has none yet.
        is_part = tensor.packed.untyped_storage().nbytes() != tensor.packed.nbytes
        if is_part and tensor.offset != 0:
            raise ValueError(
                "cannot copy over some rows of a tensor with double quantization: they share its offset, "
                "and scales of scales, with others"
            )
    for name, part in tensor.parts.items():
        if name in SHARED_PARTS:
            continue
        if name == "nested_absmax":
            assert source.nested_absmax is not None
            times = theirs.nested_block_size // ours.nested_block_size
            nested = source.nested_absmax.repeat_interleave(times)[begins // ours.nested_block_size :]
            part.copy_(nested[: len(part)], non_blocking)
        else:
            part.copy_(getattr(source, name), non_blocking)
    return tensor


def _new_zeros(tensor: NF4Tensor, size, *, dtype=None, device=None, **_: Any) -> NF4Tensor:
    # Scales of zero decode to zeros, whatever the codes. They are those of zero all the same: whoever then
    # copies rows into it, as FSDP does into padding, brings an offset for all of the scales.
    if len(size) != 2:
        raise NotImplementedError(f"an NF4Tensor is (N, K): new_zeros({tuple(size)}) is torch.zeros(...)")
    format = replace(tensor.format, shape=tuple(size), view="matrix", nested_first=0)
    if format.shape != tensor.format.shape:
        # Rows copied into it begin at any multiple of its size, and its nested blocks must be able to, too.
        format = replace(format, nested_block_size=math.gcd(format.nested_block_size, format.n_blocks))
    per_byte = quantize.codes_per_byte(tensor.codebook)
    counts = {"packed": -(-math.prod(size) // per_byte), "absmax": format.n_blocks}
    counts |= {"absmax_codes": format.n_blocks, "nested_absmax": format.n_nested_blocks}
    parts = {
        name: part.new_zeros(counts[name], device=device)
        for name, part in tensor.parts.items()
        if name in counts
    }
    if tensor.offset is not None:
        parts["offset"] = tensor.offset.new_zeros((), device=device)
    for name in tensor.parts.keys() & set(SHARED_PARTS):
        parts[name] = tensor._shared_part(name, parts["packed"].device)
    if not parts["packed"].is_meta:
        zero, _absmax = quantize.quantize(parts["codebook"].new_zeros(per_byte), parts["codebook"], 2)
        parts["packed"].fill_(int(zero[0]))
    return NF4Tensor(parts, dtype or tensor.dtype, format)


def _empty_like(tensor: NF4Tensor, *, dtype=None, device=None, **_: Any) -> NF4Tensor:
    device = torch.device(device or tensor.device)
    return tensor._on(device, dtype or tensor.dtype, lambda part: torch.empty_like(part, device=device))


def _pin_memory(tensor: NF4Tensor, device=None) -> NF4Tensor:
    # Without an accelerator there is nothing to pin memory for.
    return tensor._rebuild(Tensor.pin_memory if torch.accelerator.is_available() else Tensor.detach)


def _is_pinned(tensor: NF4Tensor, device=None) -> bool:
    return all(part.is_pinned() for name, part in tensor.parts.items() if name not in SHARED_PARTS)


def _permuted(tensor: NF4Tensor, dims: Sequence[int]) -> NF4Tensor:
    if sorted(dim % 2 for dim in dims) != [0, 1]:
        raise NotImplementedError("NF4Tensor can only be transposed as a matrix. Call .dequantize() first.")
    return tensor._rebuild() if dims[0] % 2 == 0 else _transposed(tensor)


def _transposed(tensor: NF4Tensor, dim0: int = 0, dim1: int = 1) -> NF4Tensor:
    if tensor.format.view == "flat":
        raise NotImplementedError("NF4Tensor can only be transposed as a matrix. Call .dequantize() first.")
    dims = canonicalize_dims(tensor.dim(), (dim0, dim1))
    if dims[0] == dims[1]:
        return tensor._rebuild()
    return tensor._rebuild(view="matrix" if tensor.format.view == "transposed" else "transposed")


def _viewed(tensor: NF4Tensor, size, *_: Any) -> NF4Tensor:
    known = -math.prod(size) if -1 in size else 1
    size = tuple(tensor.numel() // max(known, 1) if dim == -1 else dim for dim in size)
    if size == tuple(tensor.shape):
        return tensor._rebuild()
    if size == (tensor.numel(),) and tensor.format.view == "matrix":
        return tensor._rebuild(view="flat")
    if size == tensor.format.shape and tensor.format.view == "flat":
        return tensor._rebuild(view="matrix")
    raise NotImplementedError(
        f"NF4Tensor {tuple(tensor.shape)} cannot be viewed as {size}, only in its own shape. "
        "Call .dequantize() first for an ordinary tensor."
    )


def _rows(tensor: NF4Tensor, start: int, stop: int) -> NF4Tensor:
    # Rows start to stop, sharing memory.
    format, width = tensor.format, tensor.format.shape[1]
    if format.view != "matrix":
        raise NotImplementedError("only the rows of an NF4Tensor can be cut: call .t() on the part instead")
    first, last = start * width, stop * width
    if start < stop and first % format.block_size:
        every = format.block_size // math.gcd(width, format.block_size)
        raise ValueError(
            f"a {format.shape} NF4Tensor can be cut at multiples of {every} rows, where a block of "
            f"{format.block_size} begins, but not before row {start}"
        )
    block, end_block = first // format.block_size, -(-last // format.block_size)
    nested = format.nested_first + block
    per_byte = quantize.codes_per_byte(tensor.codebook)
    cut = {
        "packed": slice(first // per_byte, -(-last // per_byte)),
        "absmax": slice(block, end_block),
        "absmax_codes": slice(block, end_block),
        "nested_absmax": slice(
            nested // format.nested_block_size,
            -(-(format.nested_first + end_block) // format.nested_block_size) if start < stop else 0,
        ),
    }
    parts = {name: part[cut[name]] if name in cut else part for name, part in tensor.parts.items()}
    nested_first = nested % format.nested_block_size if tensor.absmax is None else 0
    part_format = replace(format, shape=(stop - start, width), nested_first=nested_first)
    return NF4Tensor(parts, tensor.dtype, part_format)


def _slice(tensor: NF4Tensor, dim: int = 0, start=None, end=None, step: int = 1) -> NF4Tensor:
    if canonicalize_dims(tensor.dim(), (dim,))[0] != 0 or step != 1:
        raise NotImplementedError(
            "only whole rows of an NF4Tensor can be cut, one after the other. Call .dequantize() first."
        )
    start, stop, _ = slice(start, end).indices(tensor.shape[0])
    return _rows(tensor, start, max(start, stop))


def _split(tensor: NF4Tensor, sizes, dim: int = 0) -> list[NF4Tensor]:
    n_rows = tensor.shape[0]
    if isinstance(sizes, int):
        sizes = [min(sizes, n_rows - start) for start in range(0, n_rows, sizes)] if sizes > 0 else []
    if sum(sizes) != n_rows or min(sizes, default=0) < 0:
        raise ValueError(f"{n_rows} rows cannot be split into parts of {list(sizes)}")
    ends = list(itertools.accumulate(sizes))
    return [_slice(tensor, dim, end - size, end) for size, end in zip(sizes, ends, strict=True)]


def _as_strided(tensor: NF4Tensor, size, stride, storage_offset=None) -> NF4Tensor:
    if tuple(size) != tuple(tensor.shape) or tuple(stride) != tensor.stride() or storage_offset:
        raise NotImplementedError("NF4Tensor has no aten.as_strided.default. Call .dequantize() first.")
    return tensor._rebuild()


def _embedding(tensor: Tensor, ids: Tensor, *_: Any) -> Tensor:
    # Rows by number: (N, K) and ids of any shape -> (*ids, K), decoding those asked for.
    if not isinstance(tensor, NF4Tensor) or tensor.format.view != "matrix":
        raise NotImplementedError("only the rows of an NF4Tensor can be looked up: call .t() on the result")
    width = tensor.shape[1]
    some = max(quantize.CHUNK // width, 1)
    rows = [_looked_up(tensor, part) for part in ids.long().flatten().split(some)]
    return torch.cat(rows).view(*ids.shape, width)


def _looked_up(tensor: NF4Tensor, ids: Tensor) -> Tensor:
    # The blocks that ids' rows (n,) lie in, put together to a matrix of whole blocks, and decoded.
    format, per_byte = tensor.format, quantize.codes_per_byte(tensor.codebook)
    width, size = format.shape[1], format.block_size
    start, last = ids * width, ids * width + width - 1  # a row's first and last number
    n_blocks = -(-width // size) + (width % size > 0)  # a row that begins within a block may reach one more
    blocks = (start // size)[:, None] + torch.arange(n_blocks, device=ids.device)
    blocks = blocks.minimum((last // size)[:, None])  # (n, n_blocks); where it does not, the last twice
    places = blocks[..., None] * (size // per_byte) + torch.arange(size // per_byte, device=ids.device)
    places = places.minimum((last // per_byte)[:, None, None])  # the bytes; the last block may be short
    blocks = blocks.flatten()

    # index_select, because it refuses a negative index; one too large leads beyond the last byte.
    parts = {"codebook": tensor.codebook, "packed": tensor.packed.index_select(0, places.flatten())}
    if tensor.absmax is not None:
        parts["absmax"] = tensor.absmax.index_select(0, blocks)
    else:
        assert tensor.absmax_codes is not None and tensor.nested_absmax is not None
        assert tensor.nested_codebook is not None and tensor.offset is not None
        nested = (blocks + format.nested_first) // format.nested_block_size
        parts |= {"absmax_codes": tensor.absmax_codes.index_select(0, blocks), "offset": tensor.offset}
        parts |= {"nested_absmax": tensor.nested_absmax[nested], "nested_codebook": tensor.nested_codebook}
    # Neighbours need no longer share a scale of scales, so each scale has its own.
    shape = (len(ids), n_blocks * size)
    found = replace(format, shape=shape, nested_block_size=1, nested_first=0)
    decoded = NF4Tensor(parts, tensor.dtype, found).dequantize()
    if width % size == 0:
        return decoded
    return decoded.gather(1, (start % size)[:, None] + torch.arange(width, device=ids.device))


def _as_matrix(out: Tensor, format: Format) -> Tensor:
    # `out`, which has the shape of a view, seen as (N, K).
    return out.mT if format.view == "transposed" else out.view(format.shape) if format.view == "flat" else out


MATMULS = {torch.matmul, Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__}

VIEWS: dict[Any, Callable] = {
    aten.detach.default: lambda tensor: tensor._rebuild(),
    aten.alias.default: lambda tensor: tensor._rebuild(),
    aten.t.default: _transposed,
    aten.transpose.int: _transposed,
    aten.permute.default: _permuted,
    aten.view.default: _viewed,
    aten.slice.Tensor: _slice,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split,
    aten.as_strided.default: _as_strided,
}

OPERATIONS: dict[Any, Callable] = {
    aten.mm.default: _mm,
    aten.addmm.default: _addmm,
    aten.mv.default: _mv,
    aten.embedding.default: _embedding,
    aten.clone.default: lambda tensor, memory_format=None: tensor._rebuild(Tensor.clone),
    aten._to_copy.default: _to_copy,
    aten.copy_.default: _copy_,
    aten.new_zeros.default: _new_zeros,
    aten.empty_like.default: _empty_like,
    aten._pin_memory.default: _pin_memory,
    aten.is_pinned.default: _is_pinned,
}
