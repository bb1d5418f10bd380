"""Chapter 5. NF4Tensor: 4 bits in memory, an ordinary weight to the rest of PyTorch.

`nn.Linear` should not learn what 4-bit is. So the packed bytes and their scales are put into a tensor
subclass with the shape, dtype and device of the weight it replaces, and `F.linear` is the one operation that
looks inside::

    >>> linear = nn.Linear(1536, 576, bias=False, dtype=torch.bfloat16)
    >>> linear.weight = nn.Parameter(NF4Tensor.from_float(linear.weight), requires_grad=False)
    >>> linear.weight
    NF4Tensor(shape=(576, 1536), dtype=torch.bfloat16, device=cpu, block_size=64, double_quant=True,
              4.127 bits per parameter)
    >>> linear(torch.randn(2, 1536)).dtype          # decoded to the dtype of what it meets
    torch.float32

Everything a weight never needs is refused by name: an operation that fell back to decoding would cost the
memory this class exists to save, and nobody would notice.

Shapes and dtypes: (N, K); `dtype` is the dtype of the weight before quantization and the default of
`dequantize()`. The parts are those of Chapter 3. Cost: 4.127 bits per parameter with double quantization, 4.5
without; the two codebooks are shared by all tensors on a device and counted by none.

Differences. bitsandbytes keeps the packed bytes as the parameter, (n / 2, 1), and the rest in a `quant_state`
beside it; moving or copying one without the other is a classic accident. Here all parts travel together.

Paper: "QLoRA Finetuning".

Before: matmul. Next: lora.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import return_and_correct_aliasing

from minqlora import codebook, matmul, quantize

aten = torch.ops.aten

PARTS = ("packed", "codebook", "absmax", "absmax_codes", "nested_absmax", "nested_codebook", "offset")
SHARED_PARTS = ("codebook", "nested_codebook")  # one object for all tensors on a device


class NF4Tensor(Tensor):
    """A (N, K) weight quantized to 4-bit NormalFloat. Make one with `NF4Tensor.from_float`.

    Attributes: `packed` uint8 (ceil(N K / 2),); `codebook` float32 (16,); without double quantization
    `absmax` float32 (n_blocks,); with it `absmax` is None and there are `absmax_codes` uint8 (n_blocks,),
    `nested_absmax` float32, `nested_codebook` float32 (256,) and `offset` float32 ().
    """

    packed: Tensor
    codebook: Tensor
    absmax: Tensor | None
    absmax_codes: Tensor | None
    nested_absmax: Tensor | None
    nested_codebook: Tensor | None
    offset: Tensor | None
    block_size: int
    nested_block_size: int

    @staticmethod
    def __new__(
        cls, parts: dict[str, Tensor], shape, dtype: torch.dtype, block_size: int, nested_block_size: int
    ):
        return Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=dtype, device=parts["packed"].device)

    def __init__(
        self, parts: dict[str, Tensor], shape, dtype: torch.dtype, block_size: int, nested_block_size: int
    ):
        for name in PARTS:
            setattr(self, name, parts.get(name))
        self.block_size = block_size
        self.nested_block_size = nested_block_size

    @classmethod
    def from_float(
        cls,
        weight: Tensor,
        *,
        quant_type: str = "nf4",
        block_size: int = 64,
        nested_block_size: int = 256,
        double_quant: bool = True,
    ) -> "NF4Tensor":
        """Quantize a weight.

        weight: floating point (N, K). block_size, nested_block_size: numbers (scales) that share a scale,
        even. double_quant: store the scales in 8 bits. Raises ValueError for another quant_type, a shape that
        is not (N, K), an odd or non-positive block size, and a weight with NaN or infinity.
        """
        if quant_type != "nf4":
            raise ValueError(f"quant_type must be 'nf4', not {quant_type!r}")
        if weight.dim() != 2 or not weight.is_floating_point():
            raise ValueError(
                f"expected a floating-point (N, K) weight, got {weight.dtype} {tuple(weight.shape)}"
            )
        if block_size < 2 or block_size % 2 or nested_block_size < 1:
            raise ValueError(
                f"block_size must be even and both positive, got {block_size} and {nested_block_size}"
            )
        levels = codebook.nf4(weight.device)
        packed, absmax = quantize.quantize(weight, levels, block_size)
        parts = {"packed": packed, "codebook": levels, "absmax": absmax}
        if double_quant:
            nested_levels = codebook.dynamic_map(weight.device)
            codes, nested_absmax, offset = quantize.quantize_scales(
                parts.pop("absmax"), nested_levels, nested_block_size
            )
            parts |= dict(
                absmax_codes=codes, nested_absmax=nested_absmax, nested_codebook=nested_levels, offset=offset
            )
        return cls(parts, weight.shape, weight.dtype, block_size, nested_block_size)

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
        return 8 * self.nbytes / self.numel()

    def dequantize(self, dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
        """Return the decoded weight, (N, K), in `dtype` (default: this tensor's), or write it to `out`."""
        if out is None:
            out = torch.empty(self.shape, dtype=dtype or self.dtype, device=self.device)
        elif out.shape != self.shape:
            raise ValueError(f"out must have the weight's shape {tuple(self.shape)}, got {tuple(out.shape)}")
        return matmul.nf4_dequantize(
            self.packed, self.scales, self.codebook, out, self.block_size, self.nested_block_size
        )

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return (
            f"NF4Tensor(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device}, "
            f"block_size={self.block_size}, double_quant={self.absmax is None}, "
            f"{self.bits_per_parameter:.3f} bits per parameter)"
        )

    def __reduce_ex__(self, protocol):
        raise NotImplementedError(
            "NF4Tensor is not pickled, and so not torch.save'd: save its parts with safetensors"
        )

    def __deepcopy__(self, memo) -> Tensor:
        copied: Tensor = self._rebuild(Tensor.clone)
        if isinstance(self, nn.Parameter):
            copied = nn.Parameter(copied, requires_grad=self.requires_grad)
        return memo.setdefault(id(self), copied)

    def _rebuild(self, change: Callable[[Tensor], Tensor], dtype: torch.dtype | None = None) -> "NF4Tensor":
        # The same tensor with every part of its own changed; codebooks stay the shared objects they are.
        parts = {name: part if name in SHARED_PARTS else change(part) for name, part in self.parts.items()}
        return NF4Tensor(parts, self.shape, dtype or self.dtype, self.block_size, self.nested_block_size)

    def _moved_to(self, device: torch.device, dtype: torch.dtype, non_blocking: bool = False) -> "NF4Tensor":
        if not dtype.is_floating_point:
            raise ValueError(f"an NF4Tensor stands for a floating-point weight and has no {dtype}")
        parts = {
            name: codebook.shared(part, device)
            if name in SHARED_PARTS
            else part.to(device, non_blocking=non_blocking, copy=True)
            for name, part in self.parts.items()
        }
        return NF4Tensor(parts, self.shape, dtype, self.block_size, self.nested_block_size)

    # ---- what the rest of PyTorch asks for -----------------------------------------------------------------

    def __tensor_flatten__(self):
        return list(self.parts), (self.dtype, self.block_size, self.nested_block_size)

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], context, outer_size, outer_stride) -> "NF4Tensor":
        return NF4Tensor(inner, outer_size, *context)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        # F.linear is caught here, above autograd, so that the whole layer is one operator with a backward of
        # its own.
        kwargs = kwargs or {}
        if func is F.linear:
            return _linear(*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[override]
        kwargs = kwargs or {}
        if func in (aten.detach.default, aten.alias.default):
            return return_and_correct_aliasing(func, args, kwargs, args[0]._rebuild(lambda part: part))
        if func is aten.clone.default:
            return args[0]._rebuild(Tensor.clone)
        if func is aten._to_copy.default:
            self = args[0]
            device, dtype = kwargs.get("device") or self.device, kwargs.get("dtype") or self.dtype
            return self._moved_to(torch.device(device), dtype, kwargs.get("non_blocking", False))
        raise NotImplementedError(
            f"NF4Tensor has no {func}: it is a frozen weight for F.linear. "
            "Call .dequantize() first for an ordinary tensor."
        )


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not isinstance(weight, NF4Tensor):
        raise NotImplementedError(
            "NF4Tensor can only be the weight of F.linear. Call .dequantize() for an ordinary tensor."
        )
    if not input.is_floating_point():
        raise ValueError(f"the input of a linear layer must be floating-point, got {input.dtype}")
    shape = (weight.shape[0], weight.shape[1])
    y = matmul.nf4_linear(
        input,
        weight.packed,
        weight.scales,
        weight.codebook,
        shape,
        weight.block_size,
        weight.nested_block_size,
    )
    return y if bias is None else y + bias.to(y.dtype)
