"""Chapter 21. The memory plan: what a run will need, said before it starts.

Training holds more than a model. Of a 7B model, in bytes a parameter and in all::

                         weights   gradients   moments
    full, float32          4          4          8       16       112 GB, of which 28 to hold it at all
    full, 16 bits          2          2          8       12        84 GB
    LoRA, 16-bit base      2       of the adapters        2        14 GB and the adapters
    QLoRA                  0.516   of the adapters        0.516     3.6 GB and the adapters

(so a 65B model takes over 780 GB to fine-tune in 16 bits, and under 48 with QLoRA). Adapters of rank 64 on
every linear layer of 7B are 160 million numbers at 4 bytes, as are their gradients; their moments take 8.

Besides these there is what passes through: every token of a micro-batch leaves behind, in each block, what
the backward pass will want again, and `saved_by_block` is the list of that. With checkpointing only the input
of each block stays, and one block at a time is computed again::

    a token in a block of 7B, 16 bits     saves 147 KiB      has an input of 8 KiB
    1,024 tokens in 32 blocks                   4.6 GiB                      0.25 and 0.2 for one block

No single sum is the peak: what is needed at one instant has gone at another. Four instants can be the
fullest, and the plan is the largest of them::

    loss                          all that is saved, and a chunk of logits
    backward of the last block    all that is saved, what one block works with, no gradients yet
    backward of the first block   nothing saved but one block's, all gradients
    update                        all gradients, and what the optimizer works with

With several micro-batches a step the gradients of the first are there all the time.

The plan is made from config.json alone: the model is built without memory, as it is before loading, and
adapters are put on it, so that parameters are counted and not estimated. It is the worst case of a run: full
rows, every token an answer's. Not counted are the process itself, a GPU's context (some 0.5 GB) and what an
allocator keeps for later; decoding buffers are, and what oneDNN keeps on a CPU, which no tensor holds.

Shapes and dtypes: bytes, as ints. Cost: a fraction of a second, no tensor.

Differences. The paper's figures (its appendix on memory) are of a run of 512 tokens a row, one row at a time.

Paper: "Memory Footprint".

Before: generate. Next: run.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from minqlora.architecture import Architecture, Layer
from minqlora.checkpoint import Quantization, quantized_bytes
from minqlora.lora import LoRAConfig, LoRALinear, adapters, attach
from minqlora.loss import CHUNK
from minqlora.matmul import TILE, WINDOW, numbers_of_rows
from minqlora.model import CausalLM
from minqlora.optim import BLOCK_SIZE, HEADROOM, NARROW_FROM
from minqlora.quantize import CHUNK as QUANTIZED_AT_A_TIME
from minqlora.quantize import RUN

# Bytes that oneDNN keeps of a shape of product: measured 550 to 660 KiB for most, of narrow weights and wide
# ones alike, on a CPU with AVX-512 (RSS after one product each, under tcmalloc, what was free given back).
KERNEL = 600 * 1024


@dataclass(frozen=True)
class Setup:
    """What is trained and how, as far as memory is concerned. The names are those of the command line."""

    method: Literal["qlora", "lora", "full"] = "qlora"  # full: every parameter, in the compute dtype
    adapter: LoRAConfig = LoRAConfig()
    quantization: Quantization = Quantization()
    quantize_embeddings: bool = False
    dtype: torch.dtype = torch.bfloat16  # of computing
    stored_dtype: torch.dtype = torch.bfloat16  # of embeddings and head, which stay as they are in the files
    adapter_dtype: torch.dtype = torch.float32
    gradient_checkpointing: bool = True
    offload: bool = False  # the inputs of checkpointed blocks wait in host memory
    per_device_train_batch_size: int = 1
    max_seq_length: int = 1024
    gradient_accumulation_steps: int = 16
    moment_bits: Literal[8, 32] = 32
    paged: Literal["auto", "always", "never"] = "auto"
    page_bytes: int = 2**24
    device: str = "cuda"

    @property
    def tokens(self) -> int:
        """The tokens of a micro-batch."""
        return self.per_device_train_batch_size * self.max_seq_length


@dataclass(frozen=True)
class Plan:
    """The bytes that a run holds at its fullest instant, by what they are for."""

    weights: int = field(metadata={"what": "linear layers of the blocks; quantized, the codes"})
    scales: int = field(metadata={"what": "scales of the codes"})
    embeddings: int = field(metadata={"what": "embeddings, output head and norms"})
    adapters: int = field(metadata={"what": "what is trained, if it is not the model"})
    gradients: int = field(metadata={"what": "of what is trained"})
    moments: int = field(metadata={"what": "AdamW's, on the device"})
    activations: int = field(metadata={"what": "what backward wants again; checkpointed, the blocks' inputs"})
    backward: int = field(metadata={"what": "what one block computes with in its backward pass"})
    logits: int = field(metadata={"what": "a chunk of logits, and the hidden states with their gradient"})
    workspace: int = field(metadata={"what": "decoded weights, pages of moments"})
    kernels: int = field(metadata={"what": "oneDNN's, of each shape of product on a CPU"})
    instant: str  # when that is
    instants: dict[str, int]  # the total at each of the instants that could be the fullest
    host: int  # bytes of moments in host memory, besides

    @property
    def parts(self) -> dict[str, int]:
        """What the total is the sum of."""
        return {part.name: getattr(self, part.name) for part in fields(self) if "what" in part.metadata}

    @property
    def total(self) -> int:
        """The bytes at the fullest instant."""
        return sum(self.parts.values())

    @property
    def largest(self) -> str:
        """The name of the largest part."""
        return max(self.parts, key=self.parts.__getitem__)

    @property
    def least(self) -> int:
        """The bytes that are needed however short the rows."""
        return self.instants["update"]


def skeleton(arch: Architecture, setup: Setup) -> CausalLM:
    """Return the model that `setup` trains, adapters and all, without memory.

    Raises ValueError as `add_lora` does for targets that the model has not.
    """
    with torch.device("meta"):
        model = CausalLM(arch, setup.dtype).requires_grad_(setup.method == "full")
        if setup.method != "full":
            attach(model, setup.adapter)
    return model.train()


def plan_memory(model: CausalLM, setup: Setup, memory: float | None = None) -> Plan:
    """Return the plan for a model of `skeleton`.

    memory: bytes that the device has, by which `paged="auto"` decides; None is enough.
    """
    plan = _plan(model, setup, paged=setup.paged == "always")
    short = memory is not None and plan.total > (1 - HEADROOM) * memory
    if short and setup.paged == "auto" and setup.device != "cpu":
        return _plan(model, setup, paged=True)
    return plan


def _plan(model: CausalLM, setup: Setup, *, paged: bool) -> Plan:
    arch, held = model.arch, held_bytes(model, setup)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = sum(parameter.numel() * _trained_dtype(setup).itemsize for parameter in trained)
    moments = sum(moment_bytes(parameter.numel(), setup.moment_bits) for parameter in trained)
    blocks = trained_blocks(model)
    layers = arch.layers[arch.n_layers - len(blocks) :]
    saved = [
        sum(part.nbytes for part in saved_by_block(block, layer, arch, setup))
        for block, layer in zip(blocks, layers, strict=True)
    ]
    D = setup.tokens * arch.hidden_size * setup.dtype.itemsize  # the residual stream
    working = block_bytes(arch, setup)
    decoding = workspace_bytes(model, setup)
    stays = D + rotary_bytes(arch, setup)  # of the last norm, and for every block
    before = gradients if setup.gradient_accumulation_steps > 1 else 0  # of an earlier micro-batch
    if setup.gradient_checkpointing:
        away = setup.offload and setup.device != "cpu"  # but for one that is used and one on its way
        kept, again = D * (min(len(saved), 2) if away else len(saved)), max(saved, default=0)
    else:
        kept, again = sum(saved), 0
    first = D + (again or max(saved, default=0))
    instants = {
        "loss": dict(
            gradients=before, activations=stays + kept, logits=logits_bytes(model, setup), workspace=decoding
        ),
        "backward of the last block": dict(
            gradients=before, activations=stays + kept, backward=working + again, workspace=decoding
        ),
        "backward of the first block": dict(
            gradients=gradients, activations=stays, backward=working + first, workspace=decoding
        ),
        "update": dict(gradients=gradients, workspace=decoding + update_bytes(trained, setup, paged)),
    }
    host = moments if paged and setup.device != "cpu" else 0
    held |= dict(moments=moments - host, backward=0, activations=0, logits=0)
    held |= dict(kernels=kernel_bytes(model, setup))
    totals = {name: sum((held | parts).values()) for name, parts in instants.items()}
    fullest = max(totals, key=totals.__getitem__)
    return Plan(**(held | instants[fullest]), instant=fullest, instants=totals, host=host)


def stored_dtype(config: Mapping[str, Any]) -> torch.dtype:
    """Return the dtype of a checkpoint's weights by its config.json, float32 if that does not say."""
    name = config.get("dtype") or config.get("torch_dtype")
    dtype = getattr(torch, name, None) if isinstance(name, str) else None
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


# ---- what is held from beginning to end --------------------------------------------------------------------


def held_bytes(model: CausalLM, setup: Setup) -> dict[str, int]:
    """Return the bytes of weights, scales, embeddings (head and norms with them) and adapters."""
    held = dict.fromkeys(("weights", "scales", "embeddings", "adapters"), 0)
    in_blocks = {id(weight) for weight in block_weights(model)}
    # Of a module that is trained whole the frozen original stays aside.
    aside = [parameter for module in adapters(model).base.values() for parameter in module.parameters()]
    for parameter in {id(one): one for one in [*model.parameters(), *aside]}.values():  # tied ones once
        in_block, n = id(parameter) in in_blocks, parameter.numel()
        is_table = parameter.dim() == 2 and parameter.shape[0] == model.arch.vocab_size
        kind = "weights" if in_block else "embeddings"
        if parameter.requires_grad and setup.method != "full":
            held["adapters"] += n * setup.adapter_dtype.itemsize
        elif setup.method == "qlora" and (in_block or (is_table and setup.quantize_embeddings)):
            codes, scales = quantized_bytes(tuple(parameter.shape), setup.quantization)
            held[kind] += codes
            held["scales"] += scales
        else:  # as load_model has it: tables in the dtype of the files, all else in that of computing
            stays = is_table and setup.method != "full"
            held[kind] += n * (setup.stored_dtype if stays else setup.dtype).itemsize
    return held


def block_weights(model: CausalLM) -> list[Tensor]:
    """Return the weights of the linear layers of the blocks: what QLoRA quantizes."""
    layers = model.model.layers.modules()
    return [layer.weight for layer in layers if isinstance(layer, nn.Linear | LoRALinear)]


def moment_bytes(n: int, bits: int) -> int:
    """Return the bytes of both moments of n numbers: 8 a number, or 2 and a scale for every 256."""
    return 2 * n + 8 * -(-n // BLOCK_SIZE) if bits == 8 and n >= NARROW_FROM else 8 * n


def _trained_dtype(setup: Setup) -> torch.dtype:
    return setup.dtype if setup.method == "full" else setup.adapter_dtype


# ---- what the tokens of a micro-batch leave behind ---------------------------------------------------------


class Saved(NamedTuple):
    """A tensor that a block saves for its backward pass."""

    what: str
    numbers: int
    itemsize: int

    @property
    def nbytes(self) -> int:
        """Its bytes."""
        return self.numbers * self.itemsize


def trained_blocks(model: CausalLM) -> list[nn.Module]:
    """Return the blocks that a gradient passes through: from the first that has anything to train."""
    blocks = list(model.model.layers)
    if any(parameter.requires_grad for parameter in model.model.embed_tokens.parameters()):
        return blocks
    trains = [any(parameter.requires_grad for parameter in block.parameters()) for block in blocks]
    return blocks[trains.index(True) :] if any(trains) else []


def saved_by_block(block: nn.Module, layer: Layer, arch: Architecture, setup: Setup) -> Iterator[Saved]:
    """Yield what a block of `skeleton` saves for backward, all rows being full.

    layer: what sets it apart from others of the architecture.
    """
    T, D, size = setup.tokens, arch.hidden_size, setup.dtype.itemsize
    adapted = {
        path.rpartition(".")[2]: module
        for path, module in block.named_modules()
        if isinstance(module, LoRALinear)
    }
    norms = arch.family.norms
    for name in vars(norms).values():
        if name is not None:
            yield from _saved_by_norm(name, T, D, arch, setup)
    qkv = ("q_proj", "k_proj", "v_proj", "qkv_proj")
    yield from _saved_by_linear(adapted, qkv, D, setup, made=norms.before_attention is not None)
    yield from _saved_by_attention(layer, arch, setup)
    # What attention in one operation has saved is its output, and of a single row that is o_proj's input.
    is_saved = arch.attention_softcap is None
    if not (setup.method == "full" and is_saved and setup.per_device_train_batch_size == 1):
        yield from _saved_by_linear(adapted, ("o_proj",), arch.n_heads * arch.head_dim, setup, made=is_saved)
    if layer.experts is not None:  # all frozen; each takes some of the tokens
        routed = T * layer.experts.active
        yield Saved("router: probabilities", T * layer.experts.count, 4)
        yield Saved("experts: gate and up", routed * 2 * layer.experts.intermediate_size, size)
        yield Saved("experts: outputs, before and after their probabilities multiply", routed * 2 * D, size)
        return
    gates = ("gate_proj", "up_proj", "gate_up_proj")
    yield from _saved_by_linear(adapted, gates, D, setup, made=norms.before_mlp is not None)
    yield Saved(
        "gate and up: outputs, of which either is the other's factor", T * 2 * arch.intermediate_size, size
    )
    yield from _saved_by_linear(adapted, ("down_proj",), arch.intermediate_size, setup, made=True)


def _saved_by_norm(name: str, rows: int, width: int, arch: Architecture, setup: Setup) -> Iterator[Saved]:
    wide = 4 if arch.family.norm_in_float32 else setup.dtype.itemsize
    yield Saved(f"{name}: x / rms(x)", rows * width, wide)
    yield Saved(f"{name}: 1 / rms(x)", rows, 4)


def _saved_by_linear(
    adapted: Mapping[str, LoRALinear], names: Sequence[str], width: int, setup: Setup, made: bool
) -> Iterator[Saved]:
    # Layers that share an input, which is saved once, or not at all if it is made again of what others save
    # (`lora.made_by`). A frozen layer without an adapter saves nothing of it.
    T, size = setup.tokens, setup.dtype.itemsize
    layers = {name: adapted[name] for name in names if name in adapted}
    what = ", ".join(layers or names)
    if setup.method == "full" or (layers and not setup.adapter.dropout):
        if setup.method == "full" or not made:
            yield Saved(f"{what}: input", T * width, size)
    elif layers:  # each of them has zeroed other numbers
        mask = 1 if setup.device == "cuda" else size
        yield Saved(f"{what}: inputs after dropout", T * width * len(layers), size)
        yield Saved(f"{what}: what dropout multiplied by", T * width * len(layers), mask)
    for layer in layers.values():
        N, K = layer.weight.shape
        yield Saved(f"{what}: input @ lora_A.T", T * layer.r, size)
        if setup.adapter_dtype != setup.dtype:
            yield Saved(f"{what}: lora_A and lora_B in the compute dtype", layer.r * (N + K), size)
        if layer.lora_magnitude_vector is not None:
            yield Saved(f"{what}: output, before DoRA stretches its rows", T * N, size)


def _saved_by_attention(layer: Layer, arch: Architecture, setup: Setup) -> Iterator[Saved]:
    T, size, length = setup.tokens, setup.dtype.itemsize, setup.max_seq_length
    q_width, kv_width = arch.n_heads * arch.head_dim, arch.n_kv_heads * arch.head_dim
    if arch.family.qk_norm is not None:
        q_rows, kv_rows = (1, 1) if arch.family.qk_norm == "width" else (arch.n_heads, arch.n_kv_heads)
        yield from _saved_by_norm("q_norm", T * q_rows, q_width // q_rows, arch, setup)
        yield from _saved_by_norm("k_norm", T * kv_rows, kv_width // kv_rows, arch, setup)
    yield Saved("attention: queries, turned", T * q_width, size)
    if arch.attention_softcap is not None:  # in plain operations
        scores = arch.n_heads * T * length
        yield Saved("attention: keys and values, a copy for each query head", T * 2 * q_width, size)
        yield Saved("attention: capped scores", scores, size)
        yield Saved("attention: mask", T * length, 1)
        yield Saved("attention: weights", scores, 4)
        if setup.dtype != torch.float32:
            yield Saved("attention: weights in the compute dtype", scores, size)
        return
    yield Saved("attention: keys, turned", T * kv_width, size)
    # Cut out of a fused product, values keep all of it.
    yield Saved("attention: values", T * (q_width + 2 * kv_width if arch.family.fused else kv_width), size)
    yield Saved("attention: output", T * q_width, size)
    yield Saved("attention: logarithm of each query's sum", T * arch.n_heads, 4)
    if layer.window is not None and layer.window < length:
        yield Saved("attention: mask of the window", T * length, size)


# ---- what is there for an instant --------------------------------------------------------------------------


def block_bytes(arch: Architecture, setup: Setup) -> int:
    """Return the bytes that one block works with in its backward pass, besides what is saved.

    In an MLP, of the gradient of down_proj's input: the base's part, the adapter's and their sum, less the
    input itself, which is not wanted any more. In attention, of the gradients of queries, keys and values: as
    they come and as they were before they turned. With either go the gradients of the residual stream and of
    the branch.
    """
    heads = (arch.n_heads + 2 * arch.n_kv_heads) * arch.head_dim
    is_mixture = all(layer.experts is not None for layer in arch.layers)
    width = 0 if is_mixture else arch.intermediate_size  # of the tokens that an expert gets, next to nothing
    return setup.tokens * (2 * max(width, heads) + 2 * arch.hidden_size) * setup.dtype.itemsize


def logits_bytes(model: CausalLM, setup: Setup) -> int:
    """Return the bytes of a chunk of logits in float32, over which their gradient is written.

    With them are the hidden states, those that are kept, and their gradient.
    """
    arch = model.arch
    chunks = 3 if arch.logit_softcap is not None else 1
    logits = min(CHUNK, setup.tokens) * arch.vocab_size * 4 * chunks
    if any(parameter.requires_grad for parameter in model.lm_head.parameters()):
        logits += arch.vocab_size * arch.hidden_size * 4
    if setup.device == "cpu" and setup.dtype == torch.float32 != setup.stored_dtype:
        rows = min(TILE // (4 * arch.hidden_size), arch.vocab_size)
        logits += min(CHUNK, setup.tokens) * rows * 4  # what a tile of the head makes before it is in place
    return logits + 3 * setup.tokens * arch.hidden_size * setup.dtype.itemsize


def update_bytes(trained: list[nn.Parameter], setup: Setup, paged: bool) -> int:
    """Return the bytes that the optimizer works with: two float32 numbers for each of a page, two more where
    the moments are narrow, and two pages of both moments on their way."""
    longest = max((parameter.numel() for parameter in trained), default=0)
    page = min(longest, setup.page_bytes // (4 if setup.moment_bits == 32 else 1))
    return page * (8 if setup.moment_bits == 32 else 16) + (4 * setup.page_bytes if paged else 0)


def workspace_bytes(model: CausalLM, setup: Setup) -> int:
    """Return the bytes in which weights are decoded: on a CPU a tile, and what goes with it, kept for good;
    elsewhere the largest weight. A head of another dtype than the hidden states is cast in tiles."""
    arch, size, block_size = model.arch, setup.dtype.itemsize, setup.quantization.block_size
    decoded = [weight.shape for weight in block_weights(model)] if setup.method == "qlora" else []
    is_cast = setup.method != "full" and setup.stored_dtype != setup.dtype
    head = [torch.Size((arch.vocab_size, arch.hidden_size))] if is_cast else []
    largest = max((math.prod(shape) for shape in decoded), default=0)
    tiled = decoded + head if setup.device == "cpu" else head
    tile = max((min(n, max(TILE // (k * size), 1)) * k * size for n, k in tiled), default=0)
    if setup.device != "cpu":
        return max(tile, largest * size + largest // block_size * 4)
    at_a_time = min(QUANTIZED_AT_A_TIME, largest)
    # By the names of `scratch`: the tile, in which borders stand as well; of quantizing, numbers, codes and
    # which lie above a border; of decoding, index and scales.
    quantizing, decoding = at_a_time * (4 + 1 + 1), min(RUN, largest) * 8
    return max(tile, 4 * at_a_time) + quantizing + decoding + min(WINDOW, largest // block_size) * 4


def kernel_bytes(model: CausalLM, setup: Setup) -> int:
    """Return the bytes that oneDNN keeps on a CPU of the products that `matmul.product` hands it: as much of
    each shape, forward and backward, whatever its size. A weight has tiles of one height, and the last one's.
    """
    if setup.device != "cpu" or setup.dtype != torch.float32:
        return 0
    shapes = {(*weight.shape, setup.tokens) for weight in block_weights(model)}
    shapes = shapes if setup.method == "qlora" else set()
    if setup.method != "full" and setup.stored_dtype != setup.dtype:
        shapes.add((model.arch.vocab_size, model.arch.hidden_size, min(CHUNK, setup.tokens)))
    products = set()
    for n, k, tokens in shapes:
        height = min(n, max(TILE // (k * setup.dtype.itemsize), 1))
        for rows in numbers_of_rows(tokens):
            products |= {(rows, height, k), (rows, n % height or height, k)}
    return 2 * len(products) * KERNEL


def rotary_bytes(arch: Architecture, setup: Setup) -> int:
    """Return the bytes of the rotary tables, cos and sin."""
    rotaries = {layer.rotary for layer in arch.layers if layer.rotary is not None}
    turned = sum(4 * len(rotary.frequencies) for rotary in rotaries)
    return setup.tokens * turned * setup.dtype.itemsize


# ---- what fits ---------------------------------------------------------------------------------------------


def largest_that_fits(fits: Callable[[int], bool], limit: int) -> int:
    """Return the largest number up to `limit` that fits, 0 if 1 does not; what fits one fits fewer."""
    fitting, too_many = 0, limit + 1
    while too_many - fitting > 1:
        middle = (fitting + too_many) // 2
        fitting, too_many = (middle, too_many) if fits(middle) else (fitting, middle)
    return fitting


def largest_batch(model: CausalLM, setup: Setup, memory: float, limit: int = 4096) -> int:
    """Return the most rows of a micro-batch that fit `memory` bytes, 0 if one does not."""

    def fits(rows: int) -> bool:
        """Plan for so many."""
        return plan_memory(model, replace(setup, per_device_train_batch_size=rows), memory).total <= memory

    return largest_that_fits(fits, limit)


def longest_row(model: CausalLM, setup: Setup, memory: float, limit: int = 2**20) -> int:
    """Return the most tokens of a row that fit `memory` bytes, one row a micro-batch; 0 if none do."""

    def fits(length: int) -> bool:
        """Plan for so many."""
        one = replace(setup, per_device_train_batch_size=1, max_seq_length=length)
        return plan_memory(model, one, memory).total <= memory

    return largest_that_fits(fits, limit)
