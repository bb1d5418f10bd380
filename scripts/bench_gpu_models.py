"""Models with random weights for the stages of `bench.py gpu`, made where they are used: nothing is read.

Ours are in NF4 from the start: random codes and scales, never a full-precision weight, so that 65B takes no
more than what its 4 bits do. Each random scale is near the one that gives the decoded weight its size::

    levels of NF4, drawn evenly       root mean square 0.57
    scales                            std / 0.57, give or take a quarter
    decoded                           root mean square about std

The peer's are quantized by the peer, one random weight after another, into a transformers model that was made
without memory.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bench_gpu_measure import Sizes
from finetune import accumulate_gradients
from minqlora import NF4Tensor, PagedAdamW, codebook
from minqlora.architecture import Architecture, architecture_from_config
from minqlora.batch import collate
from minqlora.checkpoint import replace_parameter
from minqlora.data import Example
from minqlora.lora import store_adapters
from minqlora.model import CausalLM
from minqlora.nf4 import Format
from plan import PRESETS, SIZES

STD = 0.02  # of weights, as models are initialised
TINY_MODEL = ((128, 192, 2, 4, 2), 256, 128)  # as in PRESETS


def model_config(name: str) -> dict[str, Any]:
    """Return what config.json says of a preset of plan.py, or of "tiny"."""
    sizes, vocab_size, context = TINY_MODEL if name == "tiny" else PRESETS[name]
    config: dict[str, Any] = dict(zip(SIZES, sizes, strict=True))
    return config | {"model_type": "llama", "vocab_size": vocab_size, "max_position_embeddings": context}


# ---- ours --------------------------------------------------------------------------------------------------


def random_nf4(
    shape: tuple[int, int], dtype: torch.dtype, generator: torch.Generator, std: float = STD
) -> NF4Tensor:
    """Return random codes and scales as an (N, K) weight, on the generator's device, that decodes to numbers
    of about this size. dtype: the one the weight stands for."""
    device, format = generator.device, Format(shape)
    levels = codebook.levels("nf4", device)
    usual = std / levels.square().mean().sqrt()  # float32 (): what a scale is near to

    def random_bytes(n: int) -> Tensor:
        return torch.randint(256, (n,), dtype=torch.uint8, device=device, generator=generator)

    parts = {
        "packed": random_bytes(-(-math.prod(shape) // 2)),
        "codebook": levels,
        "absmax_codes": random_bytes(format.n_blocks),
        "nested_absmax": (usual / 4).repeat(format.n_nested_blocks),
        "nested_codebook": codebook.dynamic_map(device),
        "offset": usual,
    }
    return NF4Tensor(parts, dtype, format)


def random_model(
    arch: Architecture, device: torch.device, dtype: torch.dtype, *, quantized: bool
) -> CausalLM:
    """Return a frozen model with random weights, those of the blocks' linear layers in NF4 if `quantized`."""
    torch.manual_seed(0)  # adapters are drawn from this one
    generator = torch.Generator(device).manual_seed(0)
    with torch.device("meta"):
        model = CausalLM(arch, dtype).requires_grad_(False)
    layers = model.model.layers.named_modules(prefix="model.layers")
    linear = {f"{path}.weight" for path, layer in layers if isinstance(layer, nn.Linear)}
    for name, parameter in list(model.named_parameters()):
        shape = tuple(parameter.shape)
        if name in linear and quantized:
            weight: Tensor = random_nf4((shape[0], shape[1]), dtype, generator)
        else:
            weight = random_weight(shape, dtype, generator)
        replace_parameter(model, name, weight)
    return model.train()


def random_weight(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Return normal numbers of a weight's usual size; ones for a norm."""
    weight = torch.empty(shape, dtype=dtype, device=generator.device)
    return weight.fill_(1) if len(shape) == 1 else weight.normal_(std=STD, generator=generator)


def architecture(name: str) -> Architecture:
    """Return the architecture of a model by its name."""
    return architecture_from_config(model_config(name))


def new_optimizer(model: CausalLM, paged: str = "auto") -> PagedAdamW:
    """Return an optimizer of what is trained, and let go of gradients that are left from another."""
    model.zero_grad()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return PagedAdamW(trained, paged=paged)


def keep_adapters_in(model: CausalLM, dtype: torch.dtype) -> None:
    """Store adapters, and so their gradients, in this dtype from here on."""
    model.zero_grad()
    store_adapters(model, dtype)


def our_step(
    model: CausalLM, optimizer: torch.optim.Optimizer, examples: Sequence[Example], micro_batches: int = 1
) -> float:
    """Train a step as scripts/finetune.py does, each micro-batch on the same examples; return the loss."""
    loss = accumulate_gradients(model, [collate(examples)] * micro_batches)
    optimizer.step()
    optimizer.zero_grad()
    return loss


def random_examples(rows: int, length: int, vocab_size: int) -> list[Example]:
    """Return rows of random tokens that are all learned."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(vocab_size, (rows, length), generator=generator).tolist()
    return [Example(row, row) for row in drawn]


# ---- the peer ----------------------------------------------------------------------------------------------


def peer_model(name: str, device: torch.device, dtype: torch.dtype) -> Any:
    """Return a transformers model with random weights, those of its blocks in bitsandbytes' Linear4bit, and
    with what `from_pretrained` would have noted of that."""
    from bitsandbytes.nn import Linear4bit, Params4bit
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    facts = {key: value for key, value in model_config(name).items() if key != "model_type"}
    config = LlamaConfig(**facts, tie_word_embeddings=False, dtype=dtype)
    options: dict[str, Any] = {"compress_statistics": True, "quant_type": "nf4"}
    torch.manual_seed(0)
    generator = torch.Generator(device).manual_seed(0)
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)
    for path, linear in list(model.model.layers.named_modules(prefix="model.layers")):
        if isinstance(linear, nn.Linear):
            weight = random_weight(tuple(linear.weight.shape), dtype, generator)
            with torch.device("meta"):
                layer = Linear4bit(
                    linear.in_features, linear.out_features, bias=False, compute_dtype=dtype, **options
                )
            layer.weight = Params4bit(weight, requires_grad=False, **options)
            layer.to(device)  # which is where it quantizes
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, layer)
    for path, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            replace_parameter(model, path, random_weight(tuple(parameter.shape), dtype, generator))
    model.model.rotary_emb = LlamaRotaryEmbedding(config).to(device)  # its buffers are in no checkpoint
    model.is_loaded_in_4bit = model.is_quantized = True
    return model


def peer_trainer(
    name: str, rank: int, examples: Sequence[Example], device: torch.device, dtype: torch.dtype
) -> tuple[Callable[[bool], None], Callable[[], float]]:
    """Return the peer set up as the documentation of PEFT does, trained under autocast as its Trainer does in
    16 bits: a function that switches checkpointing, and one that trains a step and returns the loss."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    base = prepare_model_for_kbit_training(peer_model(name, device, dtype), use_gradient_checkpointing=False)
    base.config.use_cache = False
    lora = LoraConfig(r=rank, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model: Any = get_peft_model(base, lora).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4, weight_decay=0.0)
    input_ids = torch.tensor([example.input_ids for example in examples], device=device)

    def checkpoint(wanted: bool) -> None:
        if wanted:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        else:
            model.gradient_checkpointing_disable()

    def step() -> float:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = model(input_ids=input_ids, labels=input_ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return checkpoint, step


# ---- the sizes of a stage ----------------------------------------------------------------------------------


def micro_batch(sizes: Sizes, vocab_size: int) -> list[Example]:
    """Return the examples of a micro-batch."""
    return random_examples(sizes.rows, sizes.length, vocab_size)
