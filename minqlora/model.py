"""Chapter 9. The transformer: one decoder-only model, described by an Architecture.

Tokens become vectors, each block adds to them what attention and an MLP have to say, and the last vectors are
compared with every word of the vocabulary::

    x = embed_tokens[input_ids]                              (B, T, D)
    x = x + self_attn(input_layernorm(x))                    in each of n_layers blocks
    x = x + mlp(post_attention_layernorm(x))
    logits = norm(x) @ lm_head.T                             (B, T, vocab)

That is Llama. Other families put norms elsewhere, cap scores and logits, look back on a window, or send each
token through a few of many MLPs; all of it is told by the record of Chapter 8, and no family is named here.

Parameters carry the names of Hugging Face checkpoints (`model.layers.0.self_attn.q_proj.weight`), so that
loading needs no table of names. Every projection is a plain `nn.Linear`; whether its weight is 4-bit, 16-bit
or carries an adapter is not this chapter's business.

Two things are not as in a textbook. Documents: several examples can stand end to end in one row; `lengths`
says where each ends, attention never crosses the seam, and positions start again at 0. That takes the place
of padding. And memory: RMSNorm and SwiGLU save for backward only what they cannot recompute for next to
nothing, and adapters make their inputs again of that (`made_by`). A block's input can be all that stays of
it (`gradient_checkpointing`), and that can wait in host memory (`HostInputs`). On accelerators all of a block
but attention is compiled for training (`compile_blocks`).

Shapes and dtypes: input_ids (B, T) int64; the residual stream (B, T, D) in the compute dtype. Norms are taken
in float32. Embeddings and head stay in the checkpoint's dtype and are cast where they are used.

Paper: "Attention Is All You Need"; RMSNorm, "RoFormer" (rotary positions), "GLU Variants Improve Transformer"
(SwiGLU), "GQA", "Mixtral of Experts".

Before: architecture. Next: files.
"""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import util
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import get_device_states, set_device_states

from minqlora.architecture import Architecture, Experts, Rotary
from minqlora.lora import LoRALinear, made_by
from minqlora.matmul import cast_linear

# cos and sin of every position's angles, (T, Rd) each or (B, 1, T, Rd), for each rotary of the model; Rd
# numbers of a head are turned.
RotaryTables = dict[Rotary, tuple[Tensor, Tensor]]


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
        """Return cos and sin of the token's angles, (1, Rd) each, or (B, 1, 1, Rd) where rows are padded."""
        index = self.position
        if self.padding is not None:
            index = (self.position - self.padding[:, None, None]).clamp(min=0)
        return {rotary: (cos[index], sin[index]) for rotary, (cos, sin) in self.tables.items()}

    def mask(self, window: int | None) -> Tensor:
        """Return which places the token sees, bool (1, capacity) or (B, 1, 1, capacity)."""
        seen = self.positions <= self.position
        if window is not None:
            seen = seen & (self.positions > self.position - window)
        if self.padding is None:
            return seen[None]
        return seen & (self.positions >= self.padding[:, None, None, None])


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
        self.lm_head = Head(arch)
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
        return self.lm_head(hidden)


class Head(nn.Linear):
    """The output head: hidden states to logits, scaled and capped where the architecture says so."""

    def __init__(self, arch: Architecture):
        super().__init__(arch.hidden_size, arch.vocab_size, bias=False)
        self.scale, self.softcap = arch.logit_scale, arch.logit_softcap

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (..., D) to logits (..., vocab); the weight is cast to the dtype of hidden tile by tile."""
        logits = cast_linear(hidden, self.weight)
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else softcap(logits, self.softcap)


def softcap(x: Tensor, cap: float) -> Tensor:
    """Return x bent smoothly into (-cap, cap)."""
    return cap * torch.tanh(x / cap)


class Trunk(nn.Module):
    """Everything but the output head: embeddings, blocks, final norm."""

    def __init__(self, arch: Architecture, compute_dtype: torch.dtype):
        super().__init__()
        self.arch = arch
        self.compute_dtype = compute_dtype
        self.gradient_checkpointing = False  # each block is computed again for its backward
        self.offload = False  # and its input waits for that in host memory, where the device is another
        # from_pretrained, because the plain constructor would draw a random table first.
        self.embed_tokens = nn.Embedding.from_pretrained(torch.empty(arch.vocab_size, arch.hidden_size))
        self.layers = nn.ModuleList(Block(arch, i) for i in range(arch.n_layers))
        self.norm = RMSNorm(arch, arch.hidden_size)

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
        x = self.embed(input_ids)  # (B, T, D)
        rotary = self.rotary_tables(lengths, cache, like=x)
        host = HostInputs(x.device) if self.offload and x.device.type != "cpu" else None
        for block in self.layers:
            assert isinstance(block, Block)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = recomputed(block, x, rotary, lengths, host=host)
            else:
                x = block(x, rotary, lengths, cache)
        if cache is not None:
            cache.length += T
        return self.norm(x)

    def embed(self, input_ids: Tensor) -> Tensor:
        """Return the residual stream (B, T, D) at its source, in the compute dtype."""
        x = self.embed_tokens(input_ids).to(self.compute_dtype)
        if self.arch.embedding_scale != 1.0:
            # Rounded to the compute dtype first, as those models were trained: 55.5, not 55.4256.
            x = x * torch.tensor(self.arch.embedding_scale, dtype=x.dtype)
        return x

    def rotary_tables(self, lengths: list[int], cache: KVCache | None, like: Tensor) -> RotaryTables:
        """Return cos and sin of the angles of all positions, for each rotary of the model."""
        if isinstance(cache, StepCache):
            return cache.rotary_tables()
        start = 0 if cache is None else cache.length
        positions = [torch.arange(start, start + n, device=like.device) for n in lengths]
        if cache is not None and cache.padding is not None:
            positions = [(positions[0] - cache.padding[:, None, None]).clamp(min=0)]  # (B, 1, T)
        return {rotary: rotary_table(rotary, positions, like) for rotary in self.arch.rotaries}


def recomputed(
    block: "Block", x: Tensor, rotary: RotaryTables, lengths: list[int], host: "HostInputs | None" = None
) -> Tensor:
    """Return what the block makes of x (B, T, D), keeping for backward x alone, on the host where `host` is
    given. What else backward needs is made again when it asks for the first of it.

    This is gradient checkpointing without reentering autograd, as torch.utils.checkpoint has it, but for two
    things: the block's last product, a quarter of its work, is left out the second time, because backward
    needs what went into it and not what came out; and nothing here loads torch's compiler, which takes 70 MB.
    """
    kept = _Recomputed(block, x, (rotary, lengths), host)
    with torch.autograd.graph.saved_tensors_hooks(kept.forget, kept.again):
        return block(x, rotary, lengths)


class _Recomputed:
    # A block's input, and how to get from there to all that the block's operations have saved, by number.
    def __init__(self, block: "Block", x: Tensor, others: tuple[Any, ...], host: "HostInputs | None"):
        self.block, self.others, self.needs_grad = block, others, x.requires_grad
        # Without the graph behind it.
        kept = x.detach()
        self.input = (lambda: kept) if host is None else partial(host.fetch, host.keep(kept))
        self.random = torch.get_rng_state(), *get_device_states(x)  # dropout draws the same again
        self.n_saved = 0
        self.made: dict[int, Tensor] = {}

    def forget(self, saved: Tensor) -> int:
        """Return the number of what an operation wants to save."""
        self.n_saved += 1
        return self.n_saved - 1

    def again(self, number: int) -> Tensor:
        """Return what was to be saved, which is made once more with everything else, and handed out once."""
        if number not in self.made:
            self._make()
        return self.made.pop(number)

    def _make(self) -> None:
        state, devices, states = self.random
        saved: list[Tensor] = []

        def note(tensor: Tensor) -> Tensor:
            """Keep it, without the graph behind it."""
            saved.append(tensor.detach())
            return saved[-1]

        with (
            torch.enable_grad(),
            torch.random.fork_rng(devices),
            torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
            self.block.without_last_product(),
        ):
            torch.set_rng_state(state)
            set_device_states(devices, states)
            self.block(self.input().detach().requires_grad_(self.needs_grad), *self.others)
        if len(saved) != self.n_saved:
            raise RuntimeError(
                f"a block that had saved {self.n_saved} tensors saved {len(saved)} when recomputed"
            )
        self.made = dict(enumerate(saved))


class HostInputs:
    """Keeps the inputs of recomputed blocks, (B, T, D), in host memory from forward to backward.

    What leaves and returns travels on a stream of its own, beside the computation: a block's input is on its
    way back while the block after it is computed again.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.module = torch.get_device_module(device)
        self.side = self.module.Stream() if device.type == "cpu" else self.module.Stream(device)
        self.kept: list[Tensor] = []  # on the host, in the order of the blocks
        self.arriving: dict[int, tuple[Tensor, Any]] = {}

    def keep(self, tensor: Tensor) -> int:
        """Send a tensor to the host; return by which number `fetch` finds it."""
        is_cpu = self.device.type == "cpu"
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=not is_cpu)
        self.side.wait_stream(self.module.current_stream(self.device))
        with self.module.stream(self.side):
            host.copy_(tensor, non_blocking=True)
        if not is_cpu:  # or its memory would be handed out while it is read
            tensor.record_stream(self.side)
        self.kept.append(host)
        return len(self.kept) - 1

    def fetch(self, index: int) -> Tensor:
        """Return a tensor on the device again, and send for the one before it."""
        tensor, arrived = self.arriving.pop(index) if index in self.arriving else self._bring(index)
        if index > 0:  # backward goes from the last block to the first
            self.arriving[index - 1] = self._bring(index - 1)
        compute = self.module.current_stream(self.device)
        compute.wait_event(arrived)
        if self.device.type != "cpu":
            tensor.record_stream(compute)
        return tensor

    def _bring(self, index: int) -> tuple[Tensor, Any]:
        with self.module.stream(self.side):
            tensor = self.kept[index].to(self.device, non_blocking=True, copy=True)
            return tensor, self.side.record_event()


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


class Block(nn.Module):
    """Attention and MLP, each between norms where the architecture has them, added to the residual stream."""

    def __init__(self, arch: Architecture, index: int):
        super().__init__()
        self.names = arch.family.norms
        self.scale = arch.residual_scale
        # `enter` and `leave` as `compile_blocks` makes them; they are for training.
        self.compiled: tuple[Callable[..., Any], Callable[..., Any]] | None = None
        self.self_attn = Attention(arch, index)
        experts = arch.layers[index].experts
        self.mlp_name = arch.family.mlp
        self.add_module(
            self.mlp_name, MLP(arch, arch.intermediate_size) if experts is None else Mixture(arch, experts)
        )
        for name in vars(self.names).values():
            if name is not None:
                self.add_module(name, RMSNorm(arch, arch.hidden_size))

    def forward(
        self, x: Tensor, rotary: RotaryTables, lengths: list[int], cache: KVCache | None = None
    ) -> Tensor:
        """Map the residual stream (B, T, D) to its next state."""
        attention = self.self_attn
        table = None if attention.rotary is None else rotary[attention.rotary]
        if self.compiled is None or not self.training:
            return self.leave(x, attention(*self.enter(x, table), lengths, cache))
        enter, leave = self.compiled
        y = attention(*enter(self, *_of_any_length(x, table)), lengths, cache)
        return leave(self, *_of_any_length(x, y))

    def enter(self, x: Tensor, table: tuple[Tensor, Tensor] | None) -> list[Tensor]:
        """Return what attention takes: queries, keys and values, (B, heads, T, Hd) each."""
        return self.self_attn.heads(self._norm(self.names.before_attention, x), table)

    def leave(self, x: Tensor, y: Tensor) -> Tensor:
        """Add what attention returned, (B, T, H Hd), to the residual stream, and then what the MLP says."""
        y = self.self_attn.o_proj(y)
        x = self._add(x, self._norm(self.names.after_attention, y))
        y = self.get_submodule(self.mlp_name)(self._norm(self.names.before_mlp, x))
        return self._add(x, self._norm(self.names.after_mlp, y))

    @contextlib.contextmanager
    def without_last_product(self) -> Iterator[None]:
        """While it lasts, leave out the product that the block ends with, where only a sum is made of it."""
        mlp = self.get_submodule(self.mlp_name)
        last = mlp.get_submodule(mlp.names[2]) if isinstance(mlp, MLP) else None
        is_free = self.names.after_mlp is None and self.compiled is None
        if not isinstance(last, LoRALinear) or not is_free:
            yield
            return
        last.result_is_wanted = False
        try:
            yield
        finally:
            last.result_is_wanted = True

    def _norm(self, name: str | None, x: Tensor) -> Tensor:
        return x if name is None else self.get_submodule(name)(x)

    def _add(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y if self.scale == 1.0 else x + y * self.scale


class Attention(nn.Module):
    """Causal self-attention within each document; groups of query heads share a key and value head."""

    def __init__(self, arch: Architecture, index: int):
        super().__init__()
        self.index = index
        self.head_dim = arch.head_dim
        self.window, self.rotary = arch.layers[index].window, arch.layers[index].rotary
        self.scale, self.cap, self.dropout = (
            arch.attention_scale,
            arch.attention_softcap,
            arch.attention_dropout,
        )
        q_width, kv_width = arch.n_heads * arch.head_dim, arch.n_kv_heads * arch.head_dim
        self.widths, self.fused = [q_width, kv_width, kv_width], arch.family.fused
        if self.fused:
            self.qkv_proj = nn.Linear(arch.hidden_size, sum(self.widths), bias=arch.qkv_bias)
        else:
            self.q_proj = nn.Linear(arch.hidden_size, q_width, bias=arch.qkv_bias)
            self.k_proj = nn.Linear(arch.hidden_size, kv_width, bias=arch.qkv_bias)
            self.v_proj = nn.Linear(arch.hidden_size, kv_width, bias=arch.qkv_bias)
        self.o_proj = nn.Linear(q_width, arch.hidden_size, bias=arch.o_bias)
        self.qk_norm = arch.family.qk_norm
        if self.qk_norm is not None:
            self.q_norm = RMSNorm(arch, arch.head_dim if self.qk_norm == "head" else q_width)
            self.k_norm = RMSNorm(arch, arch.head_dim if self.qk_norm == "head" else kv_width)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, lengths: list[int], cache: KVCache | None = None
    ) -> Tensor:
        """Return what each token sees of the others, (B, T, H Hd), for its heads (B, heads, T, Hd)."""
        how: dict[str, Any] = dict(scale=self.scale, window=self.window, cap=self.cap)
        if cache is not None:
            k, v = cache.append(self.index, k, v)
            mask = cache.mask(self.window)
            return join_heads(attend(q, k, v, padding=cache.padding, mask=mask, **how))
        how["dropout"] = self.dropout if self.training else 0.0
        documents = zip(*(tensor.split(lengths, dim=2) for tensor in (q, k, v)), strict=True)
        parts = [attend(*document, **how) for document in documents]
        return made_by(join_heads(*parts), join_heads, *parts)

    def heads(self, x: Tensor, table: tuple[Tensor, Tensor] | None) -> list[Tensor]:
        """Return queries, keys and values, (B, heads, T, Hd) each, of x (B, T, D), turned by the angles of
        `rotary_table`; None: not turned."""
        if self.fused:
            parts = list(self.qkv_proj(x).split(self.widths, dim=-1))
        else:
            parts = [self.q_proj(x), self.k_proj(x), self.v_proj(x)]
        if self.qk_norm == "width":
            parts[:2] = self.q_norm(parts[0]), self.k_norm(parts[1])
        heads = [rearrange(part, "B T (H Hd) -> B H T Hd", Hd=self.head_dim) for part in parts]
        if self.qk_norm == "head":
            heads[:2] = self.q_norm(heads[0]), self.k_norm(heads[1])
        if table is not None:
            heads[:2] = rotate(heads[0], *table), rotate(heads[1], *table)
        return heads


def _of_any_length(x: Tensor, other: Any) -> tuple[Tensor, Any]:
    # Both, with T, their dimension but one, as a symbol to the compiler; other numbers it may rely on.
    for tensor in (x, *((other,) if isinstance(other, Tensor) else other or ())):
        torch._dynamo.maybe_mark_dynamic(tensor, tensor.dim() - 2)
    return x, other


def compile_blocks(model: CausalLM, backend: str | Callable[..., Any] = "inductor") -> None:
    """Let blocks be compiled for training: what stands before attention, and what stands behind it.

    Attention itself stays as it is. It is one kernel of PyTorch's for each document, and where documents end
    changes with every batch: inside, each new list of lengths would be compiled anew. What is compiled knows
    only T, as a symbol, and no block from the next, so that two graphs of each part (the first block's input
    needs no gradient) serve all blocks and all batches. Evaluation and generation stay eager, for which the
    parts would be compiled again. Blocks with a mixture of experts keep an eager second part: whom a token
    chooses is data.

    backend: of torch.compile, for tests. Dropout draws what it draws in eager mode.
    """
    options = {"fallback_random": True} if backend == "inductor" else None
    how: dict[str, Any] = dict(fullgraph=True, backend=backend, options=options)
    enter, leave = torch.compile(Block.enter, **how), torch.compile(Block.leave, **how)
    for block in model.model.layers:
        assert isinstance(block, Block)
        is_mixture = isinstance(block.get_submodule(block.mlp_name), Mixture)
        block.compiled = enter, Block.leave if is_mixture else leave


def missing_compiler(device: torch.device) -> str | None:
    """Return what torch.compile lacks to make kernels for a device, None if nothing."""
    if device.type == "cpu":
        compilers = map(shutil.which, [os.environ.get("CXX", "c++"), "g++", "clang++"])
        return None if any(compilers) else "no C++ compiler"
    return None if device.type == "mps" or util.find_spec("triton") else "no Triton"


def join_heads(*documents: Tensor) -> Tensor:
    """Return (B, T, H Hd) for the heads (B, H, T, Hd) of documents that stand end to end."""
    return rearrange(
        torch.cat(documents, dim=2) if len(documents) > 1 else documents[0], "B H T Hd -> B T (H Hd)"
    )


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
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scale, enable_gqa=grouped
    )


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
        return _turn(x, cos, sin)

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


class MLP(nn.Module):
    """SwiGLU: one projection gates another.

    width: inside. names: what checkpoints call the gate's, the other's and the last projection.
    """

    def __init__(
        self, arch: Architecture, width: int, names: Sequence[str] = ("gate_proj", "up_proj", "down_proj")
    ):
        super().__init__()
        self.activation, self.fused, self.names = arch.activation, arch.family.fused, names
        gate, up, down = names
        if self.fused:
            self.gate_up_proj = nn.Linear(arch.hidden_size, 2 * width, bias=arch.mlp_bias)
        else:
            self.add_module(gate, nn.Linear(arch.hidden_size, width, bias=arch.mlp_bias))
            self.add_module(up, nn.Linear(arch.hidden_size, width, bias=arch.mlp_bias))
        self.add_module(down, nn.Linear(width, arch.hidden_size, bias=arch.mlp_bias))

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., D) to (..., D)."""
        if self.fused:
            gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        else:
            gate, up = (getattr(self, name)(x) for name in self.names[:2])
        product = GatedProduct.apply(gate, up, self.activation)
        make = partial(gated_product, activation=self.activation)
        return getattr(self, self.names[2])(made_by(product, make, gate, up))


class Mixture(nn.Module):
    """A mixture of experts: each token goes through the few MLPs that the router likes best for it.

    The output is the sum of theirs, weighted by the router's probabilities. Experts that no token of the
    batch has chosen are not computed, and not decoded.
    """

    def __init__(self, arch: Architecture, experts: Experts):
        super().__init__()
        self.active, self.normalize = experts.active, experts.normalize
        self.gate = Router(arch.hidden_size, experts.count)
        names = arch.family.expert_matrices
        self.experts = nn.ModuleList(
            MLP(arch, experts.intermediate_size, names) for _ in range(experts.count)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, D) to (B, T, D)."""
        flat = x.reshape(-1, x.shape[-1])  # (tokens, D)
        share, chosen = self.gate(flat).topk(self.active, dim=-1)  # (tokens, active) each
        if self.normalize:
            share = share / share.sum(dim=-1, keepdim=True)
        y = torch.zeros_like(flat)
        for index in chosen.unique().tolist():
            token, place = (chosen == index).nonzero(as_tuple=True)
            part = self.experts[index](flat[token]) * share[token, place, None]
            y = y.index_add(0, token, part.to(y.dtype))
        return y.view_as(x)


class Router(nn.Module):
    """How likely each expert is for each token. Too small to quantize, and what errs here errs a lot."""

    def __init__(self, hidden_size: int, count: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        """Map (tokens, D) to probabilities (tokens, count), float32."""
        return F.linear(x, self.weight).softmax(dim=-1, dtype=torch.float32)


class GatedProduct(torch.autograd.Function):
    """act(gate) * up, elementwise. Saves its two inputs; plain operations would save act(gate) as well."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        """Return act(gate) * up; activation: "silu" or "gelu_tanh"."""
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return gated_product(gate, up, activation)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        """Return the gradients of both inputs."""
        gate, up = ctx.saved_tensors
        if ctx.activation == "silu":
            grad_gate = torch.ops.aten.silu_backward(grad * up, gate)
        else:
            grad_gate = torch.ops.aten.gelu_backward(grad * up, gate, approximate="tanh")
        return grad_gate, _activate(gate, ctx.activation).mul_(grad), None


def gated_product(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Return act(gate) * up."""
    return _activate(gate, activation).mul_(up)


def _activate(gate: Tensor, activation: str) -> Tensor:
    return F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")


class RMSNorm(nn.Module):
    """x / rms(x) in float32, times a weight.

    Llama rounds to the dtype of x before the weight multiplies; other families after it, some with 1 added to
    the weight.
    """

    def __init__(self, arch: Architecture, size: int):
        super().__init__()
        self.eps = arch.norm_eps
        self.offset, self.in_float32 = arch.family.norm_offset, arch.family.norm_in_float32
        self.weight = nn.Parameter(torch.empty(size))

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., size) to (..., size)."""
        y = Normalize.apply(x, self.eps, torch.float32 if self.in_float32 else x.dtype)
        make = partial(self._weighted, dtype=x.dtype)
        return made_by(make(y), make, y)

    def _weighted(self, y: Tensor, dtype: torch.dtype) -> Tensor:
        if not self.in_float32:
            return y * self.weight.to(dtype)
        return (y * (self.weight.float() + self.offset)).to(dtype)


class Normalize(torch.autograd.Function):
    """x / rms(x) over the last dimension. Saves its output and a number a row; plain operations save more."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        """Return x / sqrt(mean(x ** 2) + eps), computed in float32, in `dtype`."""
        x32 = x.float()
        reciprocal_rms = torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
        y = (x32 * reciprocal_rms).to(dtype)
        ctx.save_for_backward(y, reciprocal_rms)
        ctx.dtype = x.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient of x: grad less its part along y, scaled as x was."""
        y, reciprocal_rms = ctx.saved_tensors
        y32, grad32 = y.float(), grad.float()
        along = (grad32 * y32).mean(-1, keepdim=True)
        return torch.addcmul(grad32, y32, along, value=-1).mul_(reciprocal_rms).to(ctx.dtype), None, None
