"""minqlora: QLoRA in pure PyTorch, to run, to change, and to read.

The whole method is one equation. A frozen weight lives in 4 bits, with scales in 8; a thin correction on top
of it is trained::

    Y = X @ dequant(dequant(nested_absmax, absmax_codes), packed).T + scaling * (X @ lora_A.T) @ lora_B.T

and the optimizer's moments for lora_A and lora_B are paged to host memory. Each of its parts is a chapter,
and a chapter imports only those above it, so the package reads from top to bottom:

    Part I, the method                 Part II, a transformer around it     Part III, a run
     1 codebook    the 16 levels        8 architecture  config.json          21 memory  what it will need
     2 reference   all of it, in NumPy  9 attention     who sees whom        22 run     the folder of a run
     3 quantize    blocks and scales   10 model         the network          23 report  what it looked like
     4 matmul      decode and multiply 11 files         tensors in and out
     5 nf4         NF4Tensor           12 checkpoint    files to a model
     6 lora        the adapters        13 adapter       PEFT folders
     7 optim       PagedAdamW          14 template      conversations to text
                                       15 tokenizer     text to tokens
                                       16 data          rows to labels
                                       17 batch         shuffled, packed
                                       18 check         what is in the data
                                       19 loss          cross entropy
                                       20 generate      one token at a time

Letters, in every shape comment: B batch, T time (positions), D width of the residual stream, H heads, Hd
width of a head, N out_features, K in_features, r rank, n_blocks quantization blocks.

Source: Dettmers, Pagnoni, Holtzman, Zettlemoyer, "QLoRA: Efficient Finetuning of Quantized LLMs", 2023; "the
paper" below.
"""

from minqlora import reference
from minqlora.adapter import add_lora, load_adapter, save_adapter
from minqlora.checkpoint import load_model
from minqlora.generate import generate, generate_batch
from minqlora.lora import LoRALinear, merge_lora, set_adapter
from minqlora.nf4 import NF4Tensor
from minqlora.optim import PagedAdamW

__all__ = [
    "LoRALinear",
    "NF4Tensor",
    "PagedAdamW",
    "add_lora",
    "generate",
    "generate_batch",
    "load_adapter",
    "load_model",
    "merge_lora",
    "reference",
    "save_adapter",
    "set_adapter",
]
