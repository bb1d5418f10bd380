"""Chapter 10. The transformer: one decoder-only model, described by an Architecture.

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

Two things are not as in a textbook. Documents: several examples can stand end to end in one row, and
`lengths` says where each ends. That takes the place of padding. And memory: RMSNorm and SwiGLU save for
backward only what they cannot recompute for next to nothing, and adapters make their inputs again of that
(`made_by`). A block's input can be all that stays of it (`gradient_checkpointing`), and that can wait in host
memory (`HostInputs`). On accelerators all of a block but attention is compiled for training
(`compile_blocks`).

Shapes and dtypes: input_ids (B, T) int64; the residual stream (B, T, D) in the compute dtype. Norms are taken
in float32. Embeddings and head stay in the checkpoint's dtype and are cast where they are used.

Paper: "Attention Is All You Need"; RMSNorm, "GLU Variants Improve Transformer" (SwiGLU), "Mixtral of
Experts".

Before: attention. Next: files.
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

from minqlora.architecture import Architecture, Experts
from minqlora.attention import (
    Documents,
    KVCache,
    RotaryTables,
    StepCache,
    attend,
    attend_to_documents,
    join_heads,
    rotary_table,
    rotate,
    softcap,
)
from minqlora.lora import LoRALinear, made_by
from minqlora.matmul import cast_linear, returned


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
        documents = Documents.of(lengths, x, self.arch)
        host = HostInputs(x.device) if self.offload and x.device.type != "cpu" else None
        for block in self.layers:
            assert isinstance(block, Block)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = recomputed(block, x, rotary, documents, host)
            else:
                x = block(x, rotary, documents, cache)
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
    block: "Block", x: Tensor, rotary: RotaryTables, documents: Documents, host: "HostInputs | None" = None
) -> Tensor:
    """Return what the block makes of x (B, T, D), keeping for backward x alone, on the host where `host` is
    given. What else backward needs is made again when it asks for the first of it.

    This is gradient checkpointing without reentering autograd, as torch.utils.checkpoint has it, but for two
    things: the block's last product, a quarter of its work, is left out the second time, because backward
    needs what went into it and not what came out; and nothing here loads torch's compiler, which takes 70 MB.
    """
    kept = _Recomputed(block, x, (rotary, documents), host)
    with torch.autograd.graph.saved_tensors_hooks(kept.forget, kept.again):
        return kept.run(x)


class _Recomputed:
    # A block's input, and how to get from there to all that the block's operations have saved, by number.
    def __init__(self, block: "Block", x: Tensor, others: tuple[Any, ...], host: "HostInputs | None"):
        self.block, self.others, self.needs_grad = block, others, x.requires_grad
        kept = x.detach()  # without the graph behind it
        self.input = (lambda: kept) if host is None else partial(host.fetch, host.keep(kept))
        self.device, self.random = x.device, _random_states(x.device)  # dropout draws the same again
        self.n_saved = 0
        self.made: dict[int, Tensor] = {}

    def run(self, x: Tensor) -> Tensor:
        """Return what the block makes of x."""
        return self.block(x, *self.others, in_parts=True)

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
        saved: list[Tensor] = []

        def note(tensor: Tensor) -> Tensor:
            """Keep it, without the graph behind it."""
            saved.append(tensor.detach())
            return saved[-1]

        hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
        x, before = self.input().detach().requires_grad_(self.needs_grad), _random_states(self.device)
        _set_random_states(self.device, self.random)
        try:
            with torch.enable_grad(), hooks, self.block.without_last_product():
                self.run(x)
        finally:
            _set_random_states(self.device, before)
        if len(saved) != self.n_saved:
            raise RuntimeError(
                f"a block that had saved {self.n_saved} tensors saved {len(saved)} when recomputed"
            )
        self.made = dict(enumerate(saved))


def _random_states(device: torch.device) -> list[Tensor]:
    # Of the generators of the host and of a device that has one of its own.
    module = torch.get_device_module(device)
    own = [module.get_rng_state(device)] if hasattr(module, "get_rng_state") else []
    return [torch.get_rng_state(), *own]


def _set_random_states(device: torch.device, states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.get_device_module(device).set_rng_state(state, device)


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


# Of a block, compiled: `enter`, `leave`, and `leave_but_last`.
Parts = tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]


class Block(nn.Module):
    """Attention and MLP, each between norms where the architecture has them, added to the residual stream."""

    def __init__(self, arch: Architecture, index: int):
        super().__init__()
        self.names = arch.family.norms
        self.scale = arch.residual_scale
        # By `compile_blocks` and `compile_steps`: for training, and for steps of one token.
        self.compiled: Parts | None = None
        self.compiled_step: Parts | None = None
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
        self,
        x: Tensor,
        rotary: RotaryTables,
        documents: Documents,
        cache: KVCache | None = None,
        in_parts: bool = False,
    ) -> Tensor:
        """Map the residual stream (B, T, D) to its next state. in_parts: the last product is not compiled
        into one with what is before it, so that `without_last_product` can leave it out."""
        attention = self.self_attn
        table = None if attention.rotary is None else rotary[attention.rotary]
        if isinstance(cache, StepCache):
            compiled = self.compiled_step
        else:
            compiled = self.compiled if self.training else None
        if compiled is None:
            return self.leave(x, attention(*self.enter(x, table), documents, cache))
        enter, leave, leave_but_last = compiled
        y = attention(*enter(self, *_of_any_length(x, table)), documents, cache)
        if in_parts and isinstance(self.get_submodule(self.mlp_name), MLP):
            return self.last(*leave_but_last(self, *_of_any_length(x, y)))
        return leave(self, *_of_any_length(x, y))

    def enter(self, x: Tensor, table: tuple[Tensor, Tensor] | None) -> list[Tensor]:
        """Return what attention takes: queries, keys and values, (B, heads, T, Hd) each."""
        return self.self_attn.heads(self._norm(self.names.before_attention, x), table)

    def leave(self, x: Tensor, y: Tensor) -> Tensor:
        """Add what attention returned, (B, T, H Hd), to the residual stream, and then what the MLP says."""
        x = self._attended(x, y)
        y = self.get_submodule(self.mlp_name)(self._norm(self.names.before_mlp, x))
        return self._add(x, self._norm(self.names.after_mlp, y))

    def leave_but_last(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return the residual stream with attention's part, and what the MLP's last projection takes."""
        x = self._attended(x, y)
        mlp = self.get_submodule(self.mlp_name)
        assert isinstance(mlp, MLP)
        return x, mlp.gated(self._norm(self.names.before_mlp, x))

    def last(self, x: Tensor, gated: Tensor) -> Tensor:
        """Add the MLP's last projection to the residual stream."""
        mlp = self.get_submodule(self.mlp_name)
        assert isinstance(mlp, MLP)
        return self._add(x, self._norm(self.names.after_mlp, mlp.down(gated)))

    def _attended(self, x: Tensor, y: Tensor) -> Tensor:
        return self._add(x, self._norm(self.names.after_attention, self.self_attn.o_proj(y)))

    @contextlib.contextmanager
    def without_last_product(self) -> Iterator[None]:
        """While it lasts, leave out the product that the block ends with, where only a sum is made of it."""
        mlp = self.get_submodule(self.mlp_name)
        last = mlp.down if isinstance(mlp, MLP) else None
        if not isinstance(last, LoRALinear) or self.names.after_mlp is not None:
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
        self, q: Tensor, k: Tensor, v: Tensor, documents: Documents, cache: KVCache | None = None
    ) -> Tensor:
        """Return what each token sees of the others, (B, T, H Hd), for its heads (B, heads, T, Hd)."""
        how: dict[str, Any] = dict(scale=self.scale, window=self.window, cap=self.cap)
        if cache is not None:
            k, v = cache.append(self.index, k, v)
            mask = cache.mask(self.window)
            return join_heads(attend(q, k, v, padding=cache.padding, mask=mask, **how))
        how["dropout"] = self.dropout if self.training else 0.0
        return attend_to_documents(q, k, v, documents, **how)

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
    # Both, with T, their dimension but one, as a symbol to the compiler; other numbers it may rely on, and on
    # a T of 1 too.
    if x.shape[-2] > 1:
        for tensor in (x, *((other,) if isinstance(other, Tensor) else other or ())):
            torch._dynamo.maybe_mark_dynamic(tensor, tensor.dim() - 2)
    return x, other


def compile_blocks(model: CausalLM, backend: str | Callable[..., Any] = "inductor") -> None:
    """Let blocks be compiled for training: what stands before attention, and what stands behind it.

    Attention itself stays as it is. It is PyTorch's kernels, and where documents end changes with every
    batch: inside, each new list of lengths would be compiled anew. What is compiled knows only T, as a
    symbol, and no block from the next, so that two graphs of each part (the first block's input needs no
    gradient) serve all blocks and all batches. Evaluation and prompts stay eager, for which the parts would
    be compiled again. Blocks with a mixture of experts keep an eager second part: whom a token chooses is
    data. Where blocks are recomputed, the last product is eager too (`Block.without_last_product`).

    backend: of torch.compile, for tests. Dropout draws what it draws in eager mode.
    """
    for block, parts in _compiled_parts(model, backend, {"fallback_random": True}):
        block.compiled = parts


def compile_steps(model: CausalLM, backend: str | Callable[..., Any] = "inductor") -> None:
    """Let steps with a `StepCache` be compiled likewise, once: eager, they are some thirty small kernels a
    block besides the products. Numbers are rounded as in eager mode, so answers do not change."""
    if all(block.compiled_step for block in _blocks(model)):
        return
    for block, parts in _compiled_parts(model, backend, {"emulate_precision_casts": True}):
        block.compiled_step = parts


def leave_steps_eager(model: CausalLM) -> None:
    """Let steps with a `StepCache` be eager for good, because what was compiled for them does not run."""
    for block in _blocks(model):
        block.compiled_step = Block.enter, Block.leave, Block.leave_but_last


def _compiled_parts(
    model: CausalLM, backend: str | Callable[..., Any], options: dict[str, Any]
) -> Iterator[tuple[Block, Parts]]:
    how: dict[str, Any] = dict(fullgraph=True, backend=backend)
    if backend == "inductor":
        how["options"] = options
    parts: Parts = Block.enter, Block.leave, Block.leave_but_last
    enter, leave, leave_but_last = (torch.compile(part, **how) for part in parts)
    for block in _blocks(model):
        is_mixture = isinstance(block.get_submodule(block.mlp_name), Mixture)
        yield block, (enter, Block.leave if is_mixture else leave, leave_but_last)


def _blocks(model: CausalLM) -> list[Block]:
    return [block for block in model.model.layers if isinstance(block, Block)]


def missing_compiler(device: torch.device) -> str | None:
    """Return what torch.compile lacks to make kernels for a device, None if nothing."""
    if device.type == "cpu":
        compilers = map(shutil.which, [os.environ.get("CXX", "c++"), "g++", "clang++"])
        return None if any(compilers) else "no C++ compiler"
    return None if device.type == "mps" or util.find_spec("triton") else "no Triton"


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

    @property
    def down(self) -> nn.Module:
        """The last projection, (..., width) to (..., D)."""
        return self.get_submodule(self.names[2])

    def gated(self, x: Tensor) -> Tensor:
        """Return act(gate) * up (..., width), of x (..., D)."""
        if self.fused:
            gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        else:
            gate, up = (getattr(self, name)(x) for name in self.names[:2])
        product = GatedProduct.apply(gate, up, self.activation)
        return made_by(product, partial(gated_product, activation=self.activation), gate, up)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., D) to (..., D)."""
        y: Tensor = self.down(self.gated(x))
        return y


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
        return returned(gated_product(gate, up, activation))

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
        return returned(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient of x: grad less its part along y, scaled as x was."""
        y, reciprocal_rms = ctx.saved_tensors
        y32, grad32 = y.float(), grad.float()
        along = (grad32 * y32).mean(-1, keepdim=True)
        return torch.addcmul(grad32, y32, along, value=-1).mul_(reciprocal_rms).to(ctx.dtype), None, None
