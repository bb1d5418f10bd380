"""Chapter 9. The transformer: one decoder-only model, described by an Architecture.

Tokens become vectors, each block adds to them what attention and an MLP have to say, and the last vectors are
compared with every word of the vocabulary::

    x = embed_tokens[input_ids]                              (B, T, D)
    x = x + self_attn(input_layernorm(x))                    in each of n_layers blocks
    x = x + mlp(post_attention_layernorm(x))
    logits = norm(x) @ lm_head.T                             (B, T, vocab)

Parameters carry the names of Hugging Face checkpoints (`model.layers.0.self_attn.q_proj.weight`), so that
loading needs no table of names. Every projection is a plain `nn.Linear`; whether its weight is 4-bit, 16-bit
or carries an adapter is not this chapter's business.

Two things are not as in a textbook. Documents: several examples can stand end to end in one row; `lengths`
says where each ends, attention never crosses the seam, and positions start again at 0. That takes the place
of padding. And memory: RMSNorm and SwiGLU save for backward only what they cannot recompute for next to
nothing.

Shapes and dtypes: input_ids (B, T) int64; the residual stream (B, T, D) in the compute dtype. Norms are taken
in float32. Embeddings and head stay in the checkpoint's dtype and are cast where they are used.

Paper: "Attention Is All You Need"; RMSNorm, "RoFormer" (rotary positions), "GLU Variants Improve Transformer"
(SwiGLU), "GQA".

Before: architecture. Next: checkpoint.
"""

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minqlora.architecture import Architecture
from minqlora.matmul import cast_linear


class KVCache:
    """Keys and values of all positions seen so far, so that a new token costs one token's work.

    Holds (B, n_kv_heads, capacity, Hd) twice a layer, allocated at once. `length` counts the positions
    filled.
    """

    def __init__(
        self, arch: Architecture, batch: int, capacity: int, dtype: torch.dtype, device: torch.device
    ):
        shape = (arch.n_layers, 2, batch, arch.n_kv_heads, capacity, arch.head_dim)
        self.kv = torch.zeros(shape, dtype=dtype, device=device)
        self.length = 0

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


class CausalLM(nn.Module):
    """A decoder-only language model: token ids in, logits out.

    compute_dtype: the dtype of activations. Parameters are created uninitialised wherever torch's default
    device says; `checkpoint.load_model` fills them.
    """

    def __init__(self, arch: Architecture, compute_dtype: torch.dtype = torch.float32):
        super().__init__()
        self.arch = arch
        self.compute_dtype = compute_dtype
        self.model = Trunk(arch, compute_dtype)
        self.lm_head = nn.Linear(arch.hidden_size, arch.vocab_size, bias=False)
        if arch.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.model.norm.weight.device

    def forward(
        self, input_ids: Tensor, lengths: list[int] | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """Return logits (B, T, vocab) for input_ids (B, T); arguments as in `Trunk.forward`."""
        return self.logits(self.model(input_ids, lengths, cache))

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits (..., vocab) for hidden states (..., D) that the trunk has produced."""
        return cast_linear(hidden, self.lm_head.weight)


class Trunk(nn.Module):
    """Everything but the output head: embeddings, blocks, final norm."""

    def __init__(self, arch: Architecture, compute_dtype: torch.dtype):
        super().__init__()
        self.arch = arch
        self.compute_dtype = compute_dtype
        self.gradient_checkpointing = False
        # from_pretrained, because the plain constructor would draw a random table first.
        self.embed_tokens = nn.Embedding.from_pretrained(torch.empty(arch.vocab_size, arch.hidden_size))
        self.layers = nn.ModuleList(Block(arch, i) for i in range(arch.n_layers))
        self.norm = RMSNorm(arch)

    def forward(
        self, input_ids: Tensor, lengths: list[int] | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """Return hidden states (B, T, D), normed, in the compute dtype.

        input_ids: (B, T) int64. lengths: the lengths of the documents that stand end to end in every row,
        summing to T; None is one document. cache: continue after what it holds, and add to it (one document
        only).
        """
        T = input_ids.shape[1]
        if lengths is None:
            lengths = [T]
        elif sum(lengths) != T or cache is not None:
            raise ValueError(f"lengths {lengths} must sum to T = {T}, and cannot be combined with a cache")
        x = F.embedding(input_ids, self.embed_tokens.weight).to(self.compute_dtype)  # (B, T, D)
        rotary = self.rotary_table(lengths, start=cache.length if cache else 0, like=x)
        for block in self.layers:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                # Non-reentrant: the reentrant kind gives no gradients below inputs that need none, here
                # frozen embeddings.
                x = checkpoint(block, x, rotary, lengths, use_reentrant=False)
            else:
                x = block(x, rotary, lengths, cache)
        if cache is not None:
            cache.length += T
        return self.norm(x)

    def rotary_table(self, lengths: list[int], start: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos and sin, (T, Hd) each, of position * theta ** (-2 i / Hd), taken in float32."""
        even = torch.arange(0, self.arch.head_dim, 2, device=like.device, dtype=torch.float32)
        frequency = 1.0 / self.arch.rope_theta ** (even / self.arch.head_dim)  # (Hd / 2,)
        position = torch.cat([torch.arange(start, start + n, device=like.device) for n in lengths])
        angle = position[:, None].float() * frequency  # (T, Hd / 2)
        angle = torch.cat([angle, angle], dim=1)  # the first half of a head turns with the second
        return angle.cos().to(like.dtype), angle.sin().to(like.dtype)


class Block(nn.Module):
    """Attention and MLP, each behind a norm and added to the residual stream."""

    def __init__(self, arch: Architecture, index: int):
        super().__init__()
        self.self_attn = Attention(arch, index)
        self.mlp = MLP(arch)
        self.input_layernorm = RMSNorm(arch)
        self.post_attention_layernorm = RMSNorm(arch)

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], lengths: list[int], cache: KVCache | None = None
    ) -> Tensor:
        """Map the residual stream (B, T, D) to its next state."""
        x = x + self.self_attn(self.input_layernorm(x), rotary, lengths, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Attention(nn.Module):
    """Causal self-attention within each document; groups of query heads share a key and value head."""

    def __init__(self, arch: Architecture, index: int):
        super().__init__()
        self.index = index
        self.head_dim = arch.head_dim
        q_width, kv_width = arch.n_heads * arch.head_dim, arch.n_kv_heads * arch.head_dim
        self.q_proj = nn.Linear(arch.hidden_size, q_width, bias=arch.attention_bias)
        self.k_proj = nn.Linear(arch.hidden_size, kv_width, bias=arch.attention_bias)
        self.v_proj = nn.Linear(arch.hidden_size, kv_width, bias=arch.attention_bias)
        self.o_proj = nn.Linear(q_width, arch.hidden_size, bias=arch.attention_bias)

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], lengths: list[int], cache: KVCache | None = None
    ) -> Tensor:
        """Map (B, T, D) to (B, T, D)."""
        q, k, v = (
            rearrange(proj(x), "B T (H Hd) -> B H T Hd", Hd=self.head_dim)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, *rotary), rotate(k, *rotary)
        if cache is not None:
            k, v = cache.append(self.index, k, v)
            y = attend(q, k, v)
        else:
            documents = zip(*(tensor.split(lengths, dim=2) for tensor in (q, k, v)), strict=True)
            y = torch.cat([attend(*document) for document in documents], dim=2)
        return self.o_proj(rearrange(y, "B H T Hd -> B T (H Hd)"))


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return causal attention (B, H, Tq, Hd).

    q: (B, H, Tq, Hd), the last Tq of the Tk positions. k, v: (B, n_kv_heads, Tk, Hd).
    """
    Tq, Tk = q.shape[2], k.shape[2]
    mask, causal = None, False
    if Tq == Tk > 1:
        causal = True  # a bool, which `Tq == Tk > 1` is not where sizes are symbols of torch.compile
    elif 1 < Tq < Tk:  # query i stands at position Tk - Tq + i
        mask = torch.ones(Tq, Tk, dtype=torch.bool, device=q.device).tril(Tk - Tq)
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (i, i + Hd / 2) of a head by their angles. x: (B, H, T, Hd); cos, sin: (T, Hd)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class MLP(nn.Module):
    """SwiGLU: one projection gates another."""

    def __init__(self, arch: Architecture):
        super().__init__()
        self.gate_proj = nn.Linear(arch.hidden_size, arch.intermediate_size, bias=arch.mlp_bias)
        self.up_proj = nn.Linear(arch.hidden_size, arch.intermediate_size, bias=arch.mlp_bias)
        self.down_proj = nn.Linear(arch.intermediate_size, arch.hidden_size, bias=arch.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, D) to (B, T, D)."""
        return self.down_proj(SiluTimes.apply(self.gate_proj(x), self.up_proj(x)))


class SiluTimes(torch.autograd.Function):
    """silu(gate) * up, elementwise. Saves its two inputs; plain operations would save silu(gate) as well."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        """Return silu(gate) * up."""
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients of both inputs."""
        gate, up = ctx.saved_tensors
        grad_gate = torch.ops.aten.silu_backward(grad * up, gate)
        return grad_gate, F.silu(gate).mul_(grad)


class RMSNorm(nn.Module):
    """x / rms(x) in float32, cast back to the dtype of x, then times the weight (Llama's order)."""

    def __init__(self, arch: Architecture):
        super().__init__()
        self.eps = arch.norm_eps
        self.weight = nn.Parameter(torch.empty(arch.hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., D) to (..., D)."""
        return Normalize.apply(x, self.eps) * self.weight


class Normalize(torch.autograd.Function):
    """x / rms(x) over the last dimension. Saves its output and a number a row; plain operations save more."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        """Return x / sqrt(mean(x ** 2) + eps), computed in float32."""
        x32 = x.float()
        reciprocal_rms = torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
        y = (x32 * reciprocal_rms).to(x.dtype)
        ctx.save_for_backward(y, reciprocal_rms)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Return the gradient of x: grad less its part along y, scaled as x was."""
        y, reciprocal_rms = ctx.saved_tensors
        y32, grad32 = y.float(), grad.float()
        along = (grad32 * y32).mean(-1, keepdim=True)
        return ((grad32 - y32 * along) * reciprocal_rms).to(grad.dtype), None
