"""Chapter 9. Attention: what a token sees of those before it.

Each token asks (a query), and all up to itself answer with what they are (keys) and what they say (values)::

    Y = softmax(scale * Q @ K.T + mask) @ V              for each head; the mask is -inf where nothing is seen

Several documents stand end to end in a row, and none sees another; positions start again with each. In a row
of two documents, a of two tokens and b of one::

    token       a0   a1   b0               sees   a0   a1   b0
    position     0    1    0               a0     x
                                           a1     x    x
                                           b0               x

Where a token stands is told by turning: the numbers of a query's and a key's head are taken as pairs, and
each pair is turned by position times a frequency, so that their product knows how far apart the two are.
Groups of query heads share a key and a value head. A window lets a token see the last few only, a cap bends
scores into a range. What has been read is not read again: keys and values of all positions are remembered
(`KVCache`), so that a new token costs one token's work.

Attention itself is PyTorch's. Documents are attended to one after the other, a kernel each; on GPUs one
kernel that knows where documents end can do all at once, and does where it is found to be right and faster
(`is_one_kernel_better`).

Shapes and dtypes: queries (B, H, T, Hd), keys and values (B, n_kv_heads, T, Hd), in the compute dtype; angles
are found in float32. Cost: 4 T^2 H Hd FLOPs for a document of T tokens, half of them masked and mostly left
out. Saved for backward: all three, the result, and a number for each query and head; never the scores.

Differences. transformers pads a batch to its longest and masks what it has padded with; rows here have no
padding but in generation.

Paper: "Attention Is All You Need"; "RoFormer" (rotary positions), "GQA", "Mistral 7B" (windows), "Gemma 2"
(caps), "FlashAttention".

Before: architecture. Next: model.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from inspect import signature
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from minqlora.architecture import Architecture, Rotary
from minqlora.lora import made_by
from minqlora.matmul import returned, wait_for

# cos and sin of every position's angles, (T, Rd) each or (B, 1, T, Rd), for each rotary of the model; Rd
# numbers of a head are turned.
RotaryTables = dict[Rotary, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Documents:
    """The documents that stand end to end in every row of a batch.

    lengths: of each, summing to T. ends: where they begin and end in the rows laid end to end, int32
    (B * n_documents + 1,), for one kernel that attends to all; None: a kernel for each.
    """

    lengths: Sequence[int]
    ends: Tensor | None = None

    @staticmethod
    def of(lengths: Sequence[int], like: Tensor, arch: Architecture) -> "Documents":
        """Return the documents of a batch, to be attended to as is best for the residual stream `like`
        (B, T, D)."""
        # What is found by a clock may be found otherwise when a run goes on.
        is_fixed = torch.are_deterministic_algorithms_enabled() or torch.compiler.is_compiling()
        is_special = arch.attention_softcap is not None or arch.attention_dropout > 0
        if len(lengths) == 1 or is_special or is_fixed:
            return Documents(lengths)
        heads = arch.n_heads, arch.n_kv_heads, arch.head_dim
        windowed = {layer.window is not None for layer in arch.layers}
        if not all(is_one_kernel_better(like.device, like.dtype, *heads, some) for some in windowed):
            return Documents(lengths)
        with torch.inference_mode(False):  # autograd could not save what is made there
            ends = torch.tensor([0, *accumulate(list(lengths) * like.shape[0])], dtype=torch.int32)
            return Documents(lengths, ends.to(like.device))


class KVCache:
    """Keys and values of all positions seen so far, so that a new token costs one token's work.

    Holds (B, n_kv_heads, capacity, Hd) twice a layer, allocated at once. `length` counts the positions
    filled. padding: (B,) int64, how many of a row's first positions are padding: nothing attends to them,
    and the row's own positions count from there; None: no row has any.
    """

    def __init__(
        self,
        arch: Architecture,
        batch: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
        padding: Tensor | None = None,
    ):
        shape = (arch.n_layers, 2, batch, arch.n_kv_heads, capacity, arch.head_dim)
        self.kv = torch.zeros(shape, dtype=dtype, device=device)
        self.length = 0
        self.padding = padding

    @property
    def capacity(self) -> int:
        """The number of positions there is room for."""
        return self.kv.shape[4]

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store a layer's new keys and values (B, n_kv_heads, T, Hd); return all that it has."""
        end = self.length + k.shape[2]
        if end > self.capacity:
            raise ValueError(f"the KV cache has room for {self.capacity} positions, not {end}")
        keys, values = self.kv[layer]
        keys[:, :, self.length : end] = k
        values[:, :, self.length : end] = v
        return keys[:, :, :end], values[:, :, :end]

    def mask(self, window: int | None) -> Tensor | None:
        """Return which places are seen, None where `attend` can tell by itself."""
        return None


class StepCache(KVCache):
    """A KVCache as steps of one token see it whose shapes never change: all of its capacity, and a mask over
    what is not filled. Kernels can then be recorded once and replayed, which a slice that grows forbids.

    `position`, (1,) int64 on the device, is where the next token goes; whoever steps sets it.
    """

    def __init__(self, cache: KVCache, arch: Architecture):
        self.kv, self.padding, self.length = cache.kv, cache.padding, cache.length
        device = cache.kv.device
        self.position = torch.full((1,), cache.length, device=device)
        self.masks: dict[int | None, Tensor] = {}  # of a step, by window
        self.positions = torch.arange(cache.capacity, device=device)
        like = cache.kv.new_empty(0)
        self.tables = {rotary: rotary_table(rotary, [self.positions], like) for rotary in arch.rotaries}

    @staticmethod
    def suits(arch: Architecture, capacity: int) -> bool:
        """Return whether steps can have fixed shapes: not where a token chooses experts, nor where a rotary
        turns all positions otherwise once one is beyond a length."""
        lengths = [rotary.original_length for rotary in arch.rotaries]
        is_mixture = any(layer.experts is not None for layer in arch.layers)
        return not is_mixture and all(length is None or capacity <= length for length in lengths)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store a token's keys and values (B, n_kv_heads, 1, Hd) at `position`; return all places'."""
        keys, values = self.kv[layer]
        return keys.index_copy_(2, self.position, k), values.index_copy_(2, self.position, v)

    def rotary_tables(self) -> RotaryTables:
        """Begin a step: return cos and sin of its token's angles, (1, Rd) each, or (B, 1, 1, Rd) where rows
        are padded."""
        self.masks = {}
        index = self.position
        if self.padding is not None:
            index = (self.position - self.padding[:, None, None]).clamp(min=0)
        return {rotary: (cos[index], sin[index]) for rotary, (cos, sin) in self.tables.items()}

    def mask(self, window: int | None) -> Tensor:
        """Return which places the token sees, bool (1, capacity) or (B, 1, 1, capacity)."""
        if window not in self.masks:
            seen = self.positions <= self.position
            if window is not None:
                seen = seen & (self.positions > self.position - window)
            if self.padding is not None:
                seen = seen & (self.positions >= self.padding[:, None, None, None])
            self.masks[window] = seen if self.padding is not None else seen[None]
        return self.masks[window]


def rotary_table(rotary: Rotary, positions: list[Tensor], like: Tensor) -> tuple[Tensor, Tensor]:
    """Return cos and sin (..., T, Rd) of position * frequency, taken in float32, in the dtype of `like`.

    positions: (..., T) int64 for each document of a row, the last one its largest.
    """

    def frequencies(numbers: tuple[float, ...]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.float32, device=like.device)  # (Rd / 2,)

    angles = []
    for position in positions:
        frequency = frequencies(rotary.frequencies)
        if rotary.original_length is not None:
            is_long = position[..., -1:, None] >= rotary.original_length  # (..., 1, 1)
            frequency = torch.where(is_long, frequencies(rotary.long_frequencies), frequency)
        angles.append(position[..., None].float() * frequency)  # (..., T, Rd / 2)
    angle = torch.cat(angles, dim=-2)
    angle = torch.cat([angle, angle], dim=-1)  # the first half of a head turns with the second
    return (angle.cos() * rotary.scale).to(like.dtype), (angle.sin() * rotary.scale).to(like.dtype)


def join_heads(*documents: Tensor) -> Tensor:
    """Return (B, T, H Hd) for the heads (B, H, T, Hd) of documents that stand end to end."""
    return rearrange(
        torch.cat(documents, dim=2) if len(documents) > 1 else documents[0], "B H T Hd -> B T (H Hd)"
    )


def attend_to_documents(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Documents,
    *,
    scale: float | None = None,
    window: int | None = None,
    cap: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Return causal attention inside each document, (B, T, H Hd); the rest as of `attend`."""
    if documents.ends is not None:
        return _attend_at_once(q, k, v, documents.ends, max(documents.lengths), scale, window)
    how: dict[str, Any] = dict(scale=scale, window=window, cap=cap, dropout=dropout)
    each = zip(*(tensor.split(list(documents.lengths), dim=2) for tensor in (q, k, v)), strict=True)
    parts = [attend(*document, **how) for document in each]
    return made_by(join_heads(*parts), join_heads, *parts)


def _attend_at_once(
    q: Tensor, k: Tensor, v: Tensor, ends: Tensor, longest: int, scale: float | None, window: int | None
) -> Tensor:
    from torch.nn.attention import varlen  # which loads torch's compiler

    # As the kernel takes them, with the rows of a batch end to end: (B T, heads, Hd).
    flat_q, flat_k, flat_v = (rearrange(tensor, "B H T Hd -> (B T) H Hd") for tensor in (q, k, v))
    seen = (-1 if window is None else window - 1, 0)  # before the query and behind it; -1: all
    how: dict[str, Any] = dict(scale=scale, window_size=seen)
    # Earlier releases share keys and values among queries without being told to.
    if q.shape[1] != k.shape[1] and "enable_gqa" in signature(varlen.varlen_attn).parameters:
        how["enable_gqa"] = True
    y: Any = varlen.varlen_attn(flat_q, flat_k, flat_v, ends, ends, longest, longest, **how)
    return rearrange(y, "(B T) H Hd -> B T (H Hd)", B=q.shape[0])


@cache
def is_one_kernel_better(
    device: torch.device, dtype: torch.dtype, n_heads: int, n_kv_heads: int, head_dim: int, windowed: bool
) -> bool:
    """Return whether one kernel attends to many documents faster than a kernel for each, with the same
    result: tried once. No for float32 and on CPUs, for which there is none."""
    if device.type == "cpu" or dtype not in (torch.float16, torch.bfloat16):
        return False
    return try_one_kernel(device, dtype, n_heads, n_kv_heads, head_dim, windowed)


def try_one_kernel(
    device: torch.device,
    dtype: torch.dtype,
    n_heads: int,
    n_kv_heads: int,
    head_dim: int,
    windowed: bool,
    n_documents: int = 16,
    length: int = 128,
) -> bool:
    """Return whether one kernel is there, right and faster, forward and backward, and looks back on a window
    if that is asked of it."""
    window = length // 2 if windowed else None
    generator, T = torch.Generator().manual_seed(0), n_documents * length
    with torch.inference_mode(False), torch.enable_grad():
        q, k, v = (
            torch.randn(1, T, heads, head_dim, generator=generator).to(device, dtype).transpose(1, 2)
            for heads in (n_heads, n_kv_heads, n_kv_heads)
        )
        inputs = tuple(tensor.requires_grad_() for tensor in (q, k, v))
        grad = torch.randn(1, T, n_heads * head_dim, generator=generator).to(device, dtype)

        def seconds(documents: Documents) -> tuple[float, list[Tensor]]:
            """Return what ten times take, and the result with its gradients."""
            for rounds in (2, 10):  # the first to warm up
                wait_for(device)
                began = time.perf_counter()
                for _ in range(rounds):
                    y = attend_to_documents(q, k, v, documents, window=window)
                    found = [y, *torch.autograd.grad(y, inputs, grad)]
                wait_for(device)
            return time.perf_counter() - began, found

        ends = torch.arange(0, T + 1, length, dtype=torch.int32, device=device)
        lengths = [length] * n_documents
        try:
            at_once, ours = seconds(Documents(lengths, ends))
        except Exception:  # no such kernel: of each device, head size and release an error of its own
            return False
        one_by_one, theirs = seconds(Documents(lengths))
        is_right = all((a - b).norm() <= 0.02 * b.norm() for a, b in zip(ours, theirs, strict=True))
        return is_right and at_once < one_by_one


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    cap: float | None = None,
    padding: Tensor | None = None,
    mask: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Return causal attention (B, H, Tq, Hd).

    q: (B, H, Tq, Hd), the last Tq of the Tk positions. k, v: (B, n_kv_heads, Tk, Hd). scale: what scores are
    multiplied by; None is 1 / sqrt(Hd). window: positions looked back on, the query's own included. cap:
    scores are capped smoothly. padding: (B,), each row's first positions that nobody looks at. mask: bool, to
    broadcast to (B, H, Tq, Tk), which keys a query sees, instead of what window and padding say. dropout:
    share of the attention weights that are zeroed.
    """
    Tq = q.shape[2]
    if mask is None and window is not None and Tq == 1 and padding is None:
        k, v = k[:, :, -window:], v[:, :, -window:]  # the only query sees the end of the keys
    Tk = k.shape[2]
    causal = False
    if mask is None:
        if padding is not None or (window is not None and Tk > window and Tq > 1) or 1 < Tq < Tk:
            mask = _visible(Tq, Tk, window, padding, q.device)
        elif Tq == Tk > 1:
            causal = True  # a bool, which `Tq == Tk > 1` is not where sizes are symbols of torch.compile
    if cap is not None:
        return _attend_capped(q, k, v, mask, causal, scale, cap, dropout)
    shape, grouped = q.shape, q.shape[1] != k.shape[1]
    if grouped and Tq == 1:
        # The heads of a group see the same keys: as so many queries of one head, which every kernel takes.
        q, grouped = q.reshape(shape[0], k.shape[1], -1, shape[3]), False
    y = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scale, enable_gqa=grouped
    )
    return y.reshape(shape)


def _visible(Tq: int, Tk: int, window: int | None, padding: Tensor | None, device: torch.device) -> Tensor:
    # -> (Tq, Tk) or (B, 1, Tq, Tk) bool: which keys a query sees. Query i stands at position Tk - Tq + i.
    mask = torch.ones(Tq, Tk, dtype=torch.bool, device=device).tril(Tk - Tq)
    if window is not None:
        mask = mask.triu(Tk - Tq - window + 1)
    if padding is not None:
        position = torch.arange(Tk, device=device)
        mask = mask & (position >= padding[:, None, None, None])
        # A query in the padding sees itself alone: seeing nothing would make it NaN.
        mask = mask | (position == position[Tk - Tq :, None])
    return mask


def _attend_capped(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float | None,
    cap: float,
    dropout: float,
) -> Tensor:
    # In plain operations, because the fused ones have no cap: all scores exist at once, (B, H, Tq, Tk).
    Tq, Tk, Hd = q.shape[2], k.shape[2], q.shape[3]
    k, v = (part.repeat_interleave(q.shape[1] // part.shape[1], dim=1) for part in (k, v))
    scores = softcap(q @ k.mT * (Hd**-0.5 if scale is None else scale), cap)
    if causal:
        mask = _visible(Tq, Tk, None, None, q.device)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(q.dtype)
    return F.dropout(weights, dropout) @ v


def softcap(x: Tensor, cap: float) -> Tensor:
    """Return x bent smoothly into (-cap, cap)."""
    return cap * torch.tanh(x / cap)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (i, i + Rd / 2) of a head by their angles. x: (B, H, T, Hd); cos, sin: (..., T, Rd).

    The last Hd - Rd numbers of a head stay as they are.
    """
    return Rotate.apply(x, cos, sin)


class Rotate(torch.autograd.Function):
    """`rotate` in fewer passes over its numbers than plain operations make, and nothing saved but angles."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Return x turned."""
        ctx.save_for_backward(cos, sin)
        return returned(_turn(x, cos, sin))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient turned back."""
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, -sin), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    Rd = cos.shape[-1]
    half = Rd // 2
    first, second = x[..., :half], x[..., half:Rd]
    y = x * cos if x.shape[-1] == Rd else torch.cat([x[..., :Rd] * cos, x[..., Rd:]], dim=-1)
    # Each product rounded by itself, as in other implementations; it matters in 16 bits.
    y[..., :half].sub_(second * sin[..., :half])
    y[..., half:Rd].add_(first * sin[..., half:])
    return y
