"""Measure what each code loses: the rms error of every quant_type, on normal numbers and on a real model.

    python scripts/bench.py error --output docs/results/error.json           # about a minute
    python scripts/bench.py error --model none                               # normal numbers alone

Every weight is quantized in blocks of 64 with its scales in 8 bits, decoded to float32, and compared with
what it was. `rms_error` is the root of the mean squared difference over all numbers of all weights;
`relative_rms_error` is that against the rms of the numbers themselves, and the one to compare. Bits are those
of a code, without the scales; rows stand by bits, then by error.

The model is any folder of safetensors, of which each `*_proj.weight` counts. A caution for the demo model:
its weights came through 4 bits already (demo_assets.py: GGUF's Q4_1, evenly spaced levels in blocks of 32),
so what is measured there is the loss of a second quantization.

The last line of output is the JSON that --output writes.
"""

import math
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import ROOT, as_document, parse_shape, print_document
from demo_assets import MODEL_NAME, fetch_model
from minqlora import NF4Tensor
from minqlora.codebook import QUANT_TYPES
from minqlora.files import Checkpoint
from options import option, parse, user_errors

DEMO_MODEL = ROOT / "assets" / MODEL_NAME


@dataclass
class Config:
    """What can be set."""

    model: Path | None = option(DEMO_MODEL, "folder of a model, or none (default: the demo model)")
    shape: str = option("4096x1024", "normal numbers to quantize, rows x columns")
    output: Path | None = option(None, "write the JSON here as well")

    def __post_init__(self) -> None:
        parse_shape(self.shape)


def main(argv: Sequence[str]) -> None:
    """Print a table for the normal numbers and one for the model, and the JSON document."""
    config = parse(Config, argv, description=__doc__.split("\n\n")[0] if __doc__ else None)
    normal = torch.randn(parse_shape(config.shape), generator=torch.Generator().manual_seed(0))
    rows = measure(f"normal {config.shape}", [normal])
    print_table(rows)
    if config.model is not None:
        with user_errors():
            folder = fetch_model(DEMO_MODEL.parent) if config.model == DEMO_MODEL else config.model
            model_rows = measure(folder.resolve().name, linear_weights(folder))
        print_table(model_rows)
        rows += model_rows
    command = shlex.join(["scripts/bench.py", "error", *argv])
    print_document(as_document(command, rows, ("torch",)), config.output)


def linear_weights(folder: Path) -> Iterator[Tensor]:
    """Yield the weights of a model's linear layers, those of its blocks, in float32; raises ValueError if it
    has none."""
    checkpoint = Checkpoint(folder)
    names = [name for name in checkpoint.names if name.endswith("_proj.weight")]
    if not names:
        raise ValueError(f"{folder}: holds no tensor named *_proj.weight")
    for name in names:
        if len(checkpoint.shape(name)) == 2:
            yield checkpoint.read(name).float()


def measure(case: str, weights: Iterable[Tensor]) -> list[dict[str, Any]]:
    """Return a row for each quant_type, by bits and error: what it loses of all the weights together."""
    squared_error = dict.fromkeys(QUANT_TYPES, 0.0)
    code_bits: dict[str, int] = {}
    squared, numbers, tensors = 0.0, 0, 0
    for weight in weights:
        squared += sum_of_squares(weight)
        numbers += weight.numel()
        tensors += 1
        for quant_type in QUANT_TYPES:
            quantized = NF4Tensor.from_float(weight, quant_type=quant_type, double_quant=True)
            squared_error[quant_type] += sum_of_squares(quantized.dequantize(torch.float32).sub_(weight))
            code_bits[quant_type] = (len(quantized.codebook) - 1).bit_length()
    rows = [
        {
            "stage": "error",
            "case": case,
            "tensors": tensors,
            "numbers": numbers,
            "quant_type": quant_type,
            "code_bits": code_bits[quant_type],
            "rms_error": math.sqrt(squared_error[quant_type] / numbers),
            "relative_rms_error": math.sqrt(squared_error[quant_type] / squared),
        }
        for quant_type in QUANT_TYPES
    ]
    return sorted(rows, key=lambda row: (row["code_bits"], row["relative_rms_error"]))


def sum_of_squares(numbers: Tensor) -> float:
    """Return the sum of squares, taken in float64."""
    return torch.linalg.vector_norm(numbers, dtype=torch.float64).item() ** 2


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print a line for each quant_type."""
    first = rows[0]
    print(f"{first['case']}: {first['numbers']:,} numbers in {first['tensors']} tensors")
    print(f"{'quant_type':12}{'bits':>6}{'rms error':>13}{'of their rms':>14}")
    for row in rows:
        print(
            f"{row['quant_type']:12}{row['code_bits']:6}{row['rms_error']:13.6f}"
            f"{row['relative_rms_error']:14.3%}"
        )
    print(flush=True)
