"""Quantize a checkpoint once: a 4-bit folder that loads here, and in transformers with bitsandbytes.

    python scripts/quantize.py MODEL_FOLDER OUT
    python scripts/quantize.py MODEL_FOLDER OUT --text wiki.txt --max_shard_size 2GB
    python scripts/finetune.py --model OUT --dataset train.jsonl      # starts without quantizing

One tensor is in memory at a time, so a model of any size passes through a small machine. The linear layers
inside blocks become 4-bit; embeddings, head, norms and the experts of a mixture stay as they are. At the end
stands what was lost: the error of each kind of layer, the worst layers, and with --text the perplexity of
both models, taken block by block: all windows of the text go through one block, in 16 bits and in 4, before
the next block is read. The report is also in OUT, as quantization_report.json.
"""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from evaluate import read_text, text_ids
from finetune import as_json, choose_device, show_progress
from minqlora import NF4Tensor
from minqlora.architecture import read_config
from minqlora.attention import Documents
from minqlora.checkpoint import (
    Quantization,
    default_dtype,
    find_model,
    flat_tensors,
    linear_weights,
    open_model,
    quantized_config,
    quantized_plan,
    replace_parameter,
)
from minqlora.files import SAVED_QUANT_TYPES, Checkpoint, companions, write_atomically, write_checkpoint
from minqlora.loss import supervised_loss
from minqlora.model import Block, CausalLM
from minqlora.tokenizer import Tokenizer
from options import REQUIRED, option, parse, user_errors

REPORT_FILE = "quantization_report.json"


@dataclass
class Config:
    """What can be set."""

    model: Path = option(
        REQUIRED,
        "folder of the 16-bit model, or a name that the local Hugging Face cache has",
        positional=True,
    )
    out: Path = option(REQUIRED, "folder to write, new or empty", positional=True)
    quant_type: str = option("nf4", "levels of the 4-bit code", choices=list(SAVED_QUANT_TYPES))
    double_quant: bool = option(True, "quantize the scales too: 4.127 bits per parameter, not 4.5")
    block_size: int = option(64, "weights that share a scale; bitsandbytes takes 32, 64, ..., 4096")
    max_shard_size: str = option("5GB", "largest file, in MB or GB (10**9 bytes)")
    text: Path | None = option(None, "text file to take both models' perplexity on (default: none is taken)")
    text_tokens: int = option(16384, "so much of the text, in tokens: the hidden states of all are held")
    max_seq_length: int = option(1024, "tokens of a window of text")
    dtype: Literal["bfloat16", "float32"] | None = option(
        None, "compute dtype of the perplexity (default: what the hardware does well)"
    )
    device: str | None = option(None, "cpu, cuda, ... (default: an accelerator if there is one)")

    def __post_init__(self) -> None:
        """Refuse values that cannot mean anything."""
        if self.block_size not in (32, 64, 128, 256, 512, 1024, 2048, 4096):
            raise ValueError(
                f"--block_size must be one that bitsandbytes has, 32 to 4096, got {self.block_size}"
            )
        if self.max_seq_length < 2 or self.text_tokens < 2:
            raise ValueError("--max_seq_length and --text_tokens must be at least 2")
        shard_bytes(self.max_shard_size)


def shard_bytes(text: str) -> int:
    """Return the bytes that --max_shard_size says; ValueError for what is no size."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([MG])B", text, re.IGNORECASE)
    size = float(match[1]) * {"M": 1e6, "G": 1e9}[match[2].upper()] if match else 0
    if size < 1:
        raise ValueError(f"--max_shard_size is a size such as 500MB or 5GB, got {text!r}")
    return int(size)


# ---- the copy ----------------------------------------------------------------------------------------------


def quantize_checkpoint(
    folder: Path | str,
    out: Path | str,
    quantization: Quantization,
    *,
    device: torch.device | str = "cpu",
    max_shard_bytes: int = 5_000_000_000,
    progress: Callable[[int, int], None] | None = None,
    observe: Callable[[str, Tensor, NF4Tensor], None] | None = None,
) -> None:
    """Write the 4-bit copy of a checkpoint folder, one tensor in memory at a time.

    out: a new or empty folder. device: where to quantize. max_shard_bytes, progress: as in
    `write_checkpoint`. observe: called with each quantized weight's name, what it was, and what became of it.

    Raises ValueError for a source that `load_model` refuses or that is in 4 bits already.
    """
    model, source = open_model(folder)
    if source.has_quantized:
        raise ValueError(f"{source.folder}: is in 4 bits already")
    names = source.in_file_order(name for name, _ in model.named_parameters())
    # bitsandbytes keeps experts, and what routes to them, in 16 bits, and must be told where it might not.
    linear = linear_weights(model)
    quantized = {name for name in linear if ".experts." not in name}
    left = {name.partition(".experts.")[0] for name in linear if ".experts." in name}
    skipped = sorted({f"{mixture}.{part}" for mixture in left for part in ("experts", "gate")})

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name in names:
            tensor = source.read(name)
            if name in quantized:
                tensor = tensor.to(device)
                weight = quantization(tensor)
                if observe is not None:
                    observe(name, tensor, weight)
                tensor = weight
            yield name, tensor

    dtype = source.dtype(names[0])
    config = quantized_config(read_config(source.folder), quantization, dtype, skipped)
    write_checkpoint(
        out,
        quantized_plan(source, names, quantized, quantization),
        flat_tensors(tensors()),
        files={"config.json": as_json(config)} | companions(source.folder),
        max_shard_bytes=max_shard_bytes,
        progress=progress,
    )


# ---- what is lost in the weights ---------------------------------------------------------------------------


@dataclass
class Errors:
    """Squared errors of some weights, and what they are to be compared with."""

    count: int = 0
    squared_error: float = 0.0
    squared: float = 0.0

    def add(self, weight: Tensor, decoded: Tensor) -> None:
        """Count a weight and what its 4 bits decode to, float32 both; the second is written over."""
        self.count += weight.numel()
        self.squared += torch.linalg.vector_norm(weight, dtype=torch.float64).item() ** 2
        error = torch.linalg.vector_norm(decoded.sub_(weight), dtype=torch.float64)
        self.squared_error += error.item() ** 2

    def as_row(self) -> dict[str, Any]:
        """Return the root mean square of the error, and that against the rms of the weights."""
        relative = math.sqrt(self.squared_error / self.squared) if self.squared else 0.0
        return {
            "parameters": self.count,
            "rmse": math.sqrt(self.squared_error / self.count),
            "relative_rmse": relative,
        }


@dataclass
class Quality:
    """The errors of all quantized weights, gathered as they pass."""

    by_kind: dict[str, Errors] = field(default_factory=dict)
    by_layer: dict[str, Errors] = field(default_factory=dict)
    held: int = 0  # bytes of all quantized weights

    def observe(self, name: str, weight: Tensor, quantized: NF4Tensor) -> None:
        """Take note of a weight and what became of it."""
        layer = name.removesuffix(".weight")
        self.by_layer[layer] = errors = Errors()
        errors.add(weight.float(), quantized.dequantize(torch.float32))
        kind = self.by_kind.setdefault(layer.rpartition(".")[2], Errors())
        kind.count += errors.count
        kind.squared_error += errors.squared_error
        kind.squared += errors.squared
        self.held += quantized.nbytes

    def report(self) -> dict[str, Any]:
        """Return the table by kind of layer, the worst five layers, and the bits of a parameter."""
        layers = [{"layer": name} | errors.as_row() for name, errors in self.by_layer.items()]
        return {
            "bits_per_parameter": 8 * self.held / sum(errors.count for errors in self.by_kind.values()),
            "kinds": [{"kind": kind} | errors.as_row() for kind, errors in self.by_kind.items()],
            "worst_layers": sorted(layers, key=lambda row: -row["relative_rmse"])[:5],
        }


# ---- what is lost in the predictions -----------------------------------------------------------------------


@torch.inference_mode()
def perplexities(
    source: Path, out: Path, windows: Tensor, dtype: torch.dtype, device: torch.device
) -> tuple[float, float]:
    """Return the perplexity of the 16-bit and of the 4-bit model on windows (n, T) of token ids.

    The hidden states of all windows go through one block after the other, so no more of either model is in
    memory than a block, or the embeddings, or the head.
    """
    model, in_16_bits = open_model(source, dtype)
    arch, windows = model.arch, windows.to(device)
    checkpoints = (in_16_bits, Checkpoint(out))

    def fill(module: nn.Module, path: str, checkpoint: Checkpoint, dtype: torch.dtype | None = dtype) -> None:
        for name in [name for name, _ in module.named_parameters()]:
            tensor = checkpoint.read(f"{path}.{name}").to(device)
            replace_parameter(
                module, name, tensor if isinstance(tensor, NF4Tensor) else tensor.to(dtype or tensor.dtype)
            )

    # What is not quantized is the same in both.
    fill(model.model.embed_tokens, "model.embed_tokens", checkpoints[0], dtype=None)
    embedded = [model.model.embed(window[None]) for window in windows]  # (1, T, D) each
    if not arch.tie_embeddings:
        model.model.embed_tokens.to("meta")  # to make room
    lengths = [windows.shape[1]]
    documents = Documents(lengths)
    rotary = model.model.rotary_tables(lengths, None, like=embedded[0])
    states = (embedded, list(embedded))
    for index in tqdm(range(arch.n_layers), desc="perplexity", unit="block", leave=False, disable=None):
        for checkpoint, hidden in zip(checkpoints, states, strict=True):
            with torch.device("meta"):
                block = Block(arch, index).eval()
            fill(block, f"model.layers.{index}", checkpoint)
            hidden[:] = [block(x, rotary, documents) for x in hidden]
    fill(model.model.norm, "model.norm", checkpoints[0])
    if not arch.tie_embeddings:
        fill(model.lm_head, "lm_head", checkpoints[0], dtype=None)
    else:
        model.lm_head.weight = model.model.embed_tokens.weight
    of_16_bits, of_4_bits = (_perplexity(model, hidden, windows) for hidden in states)
    return of_16_bits, of_4_bits


def _perplexity(model: CausalLM, hidden: list[Tensor], windows: Tensor) -> float:
    # hidden: of each window (1, T, D), as the last block leaves it.
    loss = 0.0
    for x, window in zip(hidden, windows, strict=True):
        loss += supervised_loss(model.model.norm(x)[:, :-1], window[None, 1:], model.lm_head).item()
    return math.exp(loss / windows[:, 1:].numel())


def read_windows(path: Path, tokenizer: Tokenizer, n_tokens: int, length: int) -> Tensor:
    """Return the beginning of a text file in windows (n, T) of token ids, each begun as a text is."""
    first, ids = text_ids(path, read_text(path)[: 32 * n_tokens], tokenizer, n_tokens)
    length = min(length - len(first), len(ids))
    return torch.tensor([first + ids[i : i + length] for i in range(0, len(ids) - length + 1, length)])


# ---- one run -----------------------------------------------------------------------------------------------


def print_report(report: dict[str, Any]) -> None:
    """Print what was lost."""
    print(f"{'layer':44}{'parameters':>15}{'rmse':>11}{'of their rms':>14}")
    for row in report["kinds"]:
        print(f"{row['kind']:44}{row['parameters']:15,}{row['rmse']:11.6f}{row['relative_rmse']:14.3%}")
    print("the worst five")
    for row in report["worst_layers"]:
        print(f"{row['layer']:44}{row['parameters']:15,}{row['rmse']:11.6f}{row['relative_rmse']:14.3%}")
    before, after = report["bytes_before"], report["bytes_after"]
    print(f"bits      {report['bits_per_parameter']:.3f} a quantized parameter")
    print(f"size      {before / 1e9:.3f} GB -> {after / 1e9:.3f} GB")
    if "perplexity" in report:
        found = report["perplexity"]
        print(
            f"text      perplexity {found['16_bits']:.4f} in 16 bits, {found['4_bits']:.4f} in 4, "
            f"on {found['tokens']:,} tokens"
        )


def main() -> None:
    """Quantize, measure, report."""
    config = parse(Config, description=__doc__.split("\n\n")[0] if __doc__ else None)
    with user_errors():
        source, device = find_model(config.model), choose_device(config.device)
        windows = None
        if config.text is not None:  # before the work, so that a mistake shows at once
            windows = read_windows(config.text, Tokenizer(source), config.text_tokens, config.max_seq_length)
        quality = Quality()
        with tqdm(unit="B", unit_scale=True, desc="writing", leave=False, disable=None) as bar:
            quantize_checkpoint(
                source,
                config.out,
                Quantization(config.quant_type, config.double_quant, config.block_size),
                device=device,
                max_shard_bytes=shard_bytes(config.max_shard_size),
                progress=lambda written, total: show_progress(bar, written, total),
                observe=quality.observe,
            )
        sizes = [
            sum(path.stat().st_size for path in Checkpoint(folder).files) for folder in (source, config.out)
        ]
        report = quality.report() | dict(zip(("bytes_before", "bytes_after"), sizes, strict=True))
        write_atomically(config.out / REPORT_FILE, as_json(report))  # the rest may take long, or not come
        if windows is not None:
            dtype = getattr(torch, config.dtype) if config.dtype else default_dtype(device)
            in_16, in_4 = perplexities(source, config.out, windows, dtype, device)
            report["perplexity"] = {"16_bits": in_16, "4_bits": in_4, "tokens": windows[:, 1:].numel()}
            write_atomically(config.out / REPORT_FILE, as_json(report))
        print_report(report)
        print(f"saved     {config.out}")


if __name__ == "__main__":
    main()
