"""Draw the README's figures, from computed numbers and from results committed under docs/results.

    make figures        or        python scripts/figures.py

method.png                  the way of X through a frozen 4-bit weight and its adapter, and what is kept where
nf4_levels.png              where the 16 levels stand under the normal density, beside those of Int4 and FP4
block_size_error.png        what a smaller block buys and costs, with and without double quantization
bits_per_parameter.png      where the 4.127 bits of a weight go
number_formats.png          bits, range and steps of the formats from fp32 down to NF4
quantile_quantization.png   levels from a weight's own quantiles against NF4, when the weight has outliers
training.png                speed and peak memory of training beside the peer, of docs/results/train_cpu.json
training_growth.png         how both grow with rows, batches and models, of docs/results/train_growth_cpu.json
demo_loss.png               loss and held-out loss of the demo run in docs/results/demo_metrics.jsonl

Normal weights have standard deviation 1 and a fixed seed, so that an error reads as a share of it.
"""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
from scipy.special import ndtr, ndtri
from torch import Tensor

from minqlora import NF4Tensor, codebook, quantize
from minqlora.codebook import NF4_LEVELS, normal_float
from minqlora.nf4 import SHARED_PARTS
from minqlora.report import loss_png

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402 (the backend comes first)
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.patches import ConnectionPatch, Patch, Rectangle  # noqa: E402
from matplotlib.ticker import PercentFormatter  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
BLUE, ORANGE, GREY, GREEN, RED = "#2563eb", "#ea580c", "#6b7280", "#059669", "#be123c"
LIGHT_BLUE = "#93c5fd"


def main() -> None:
    """Draw every figure into docs/figures."""
    folder = ROOT / "docs" / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    plt.rcParams["font.size"] = 11
    plt.rcParams["axes.titlesize"] = 11
    plt.rcParams["axes.titlelocation"] = "left"
    plt.rcParams["axes.spines.top"] = plt.rcParams["axes.spines.right"] = False
    draw_method(folder / "method.png")
    draw_levels(folder / "nf4_levels.png")
    draw_block_sizes(folder / "block_size_error.png")
    draw_bits_per_parameter(folder / "bits_per_parameter.png")
    draw_number_formats(folder / "number_formats.png")
    draw_quantiles(folder / "quantile_quantization.png")
    draw_training(folder / "training.png")
    draw_growth(folder / "training_growth.png")
    draw_demo_loss(folder / "demo_loss.png")


# ---- what the figures share --------------------------------------------------------------------------------


def normal_weight(n_rows: int = 1024, width: int = 2048) -> Tensor:
    """Return a (n_rows, width) weight from a standard normal, the same on every call."""
    return torch.randn(n_rows, width, generator=torch.Generator().manual_seed(0))


def rms(numbers: Tensor) -> float:
    """Return the root mean square, summed in float64."""
    return numbers.double().square().mean().sqrt().item()


def decoded(weight: Tensor, **options) -> Tensor:
    """Return what is left of a weight after `NF4Tensor.from_float` with these options."""
    return NF4Tensor.from_float(weight, **options).dequantize(torch.float32)


def short(number: float) -> str:
    """Return a number in three digits, or as it is if it is whole and fits: 0.00195, 1.4e-45, 65,504."""
    text = f"{number:,.0f}" if number < 1e6 and number == round(number) else f"{number:.3g}"
    return text.replace("e+", "e").replace("e-0", "e-")


def name_rows(axes: Axes, names: list[str], fontsize: float = 11) -> None:
    """Name the rows at y = 0, -1, -2 ... in place of a y axis; no names, no y axis."""
    axes.set_yticks(range(0, -len(names), -1), names, fontsize=fontsize)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


def save(figure: Figure, path: Path) -> None:
    """Write a figure, and let go of its memory."""
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)


# ---- the method --------------------------------------------------------------------------------------------


def draw_method(path: Path) -> None:
    """Draw the way from X to Y: through a frozen weight's decoded tile, and through its trained adapter."""
    figure, axes = plt.subplots(figsize=(8, 6.6))
    axes.set(xlim=(0, 100), ylim=(0, 86))
    axes.set_axis_off()
    axes.set_title("Y = X @ dequantize(W).T + scaling * (X @ lora_A.T) @ lora_B.T")
    for y, height, color, name_at, name in (
        (41, 45, GREY, 83, "frozen, in 4.127 bits a weight"),
        (19, 19, ORANGE, 35, "trained: the adapter, of rank r"),
        (0, 14, GREEN, 2.4, "moments: in host memory when a GPU's runs short"),
    ):
        axes.add_patch(Rectangle((12, y), 76, height, color=color, alpha=0.1, linewidth=0))
        axes.text(14, name_at, name, color=color, va="center", weight="bold", fontsize=10)
    _box(axes, (0, 44), (9, 9), "black", "X\n(T, K)")
    _box(axes, (91, 44), (9, 9), "black", "Y\n(T, N)")
    _draw_frozen_weight(axes)
    _draw_adapter_and_moments(axes)
    save(figure, path)


def _box(
    axes: Axes,
    corner: tuple[float, float],
    size: tuple[float, float],
    color: str,
    text: str,
    fontsize: int = 10,
) -> None:
    axes.add_patch(Rectangle(corner, *size, color=color, linewidth=0))
    x, y = corner[0] + size[0] / 2, corner[1] + size[1] / 2
    axes.text(x, y, text, color="white", ha="center", va="center", fontsize=fontsize, linespacing=1.3)


def _arrows(axes: Axes, *points: tuple[float, float], style: str = "-|>") -> None:
    # A line through all points, with its head at the last.
    axes.plot(*zip(*points[:-1], strict=True), color="black", linewidth=1.2, solid_joinstyle="miter")
    arrow = dict(arrowstyle=style, color="black", linewidth=1.2, shrinkA=0, shrinkB=0)
    axes.annotate("", xy=points[-1], xytext=points[-2], arrowprops=arrow)


def _draw_frozen_weight(axes: Axes) -> None:
    # Sixteen weights in two blocks of eight, with their codes and scales as they come out.
    tensor = NF4Tensor.from_float(normal_weight(1, 16) * 0.02, block_size=8, double_quant=False)
    assert tensor.absmax is not None
    codes = [code for byte in tensor.packed.tolist() for code in (byte >> 4, byte & 15)]
    for y, color, name in (
        (76.8, BLUE, "packed: which of the 16 levels of NF4, two codes in a byte"),
        (68.3, ORANGE, "absmax: the scale of a block of 64, in 8 bits"),
        (59.8, GREEN, "nested absmax: the scale of 256 of these, in 32 bits"),
    ):
        axes.text(14, y, name, fontsize=9, color=color, va="bottom")
    for place, code in enumerate(codes):
        _box(axes, (14 + 4.5 * place + (0.4 if place >= 8 else 0), 72.6), (4.1, 4), BLUE, str(code), 9)
    for place, scale in enumerate(tensor.absmax.tolist()):
        _box(axes, (14 + 36.4 * place, 64.1), (35.6, 4), ORANGE, f"{scale:.4f}", 9)
    _box(axes, (14, 55.6), (72, 4), GREEN, "nested_absmax, nested_codebook, offset", 9)
    _box(axes, (54, 43), (32, 9), BLUE, "a tile of W, in 16 or 32 bits:\nlevel x absmax", 9)
    _arrows(axes, (70, 55.6), (70, 52))
    axes.text(14, 53.3, "decoded for each product,\ndropped after it", fontsize=9, va="top")
    _arrows(axes, (9, 47), (54, 47))
    _arrows(axes, (86, 47), (91, 47))


def _draw_adapter_and_moments(axes: Axes) -> None:
    for x, text in ((24, "lora_A\n(r, K)"), (58, "lora_B\n(N, r)")):
        _box(axes, (x, 21), (18, 9), ORANGE, text)
    for x, text in ((24, "exp_avg, exp_avg_sq\nof lora_A"), (58, "exp_avg, exp_avg_sq\nof lora_B")):
        _box(axes, (x - 3, 5), (24, 7), GREEN, text, 9)
        _arrows(axes, (x + 9, 12), (x + 9, 21), style="<|-|>")
    axes.text(50, 16.5, "page by page", fontsize=9, va="center", ha="center")
    _arrows(axes, (4.5, 44), (4.5, 25.5), (24, 25.5))
    _arrows(axes, (42, 25.5), (58, 25.5))
    axes.text(50, 26.3, "(T, r)", fontsize=9, ha="center")
    _arrows(axes, (76, 25.5), (95.5, 25.5), (95.5, 44))
    axes.text(94.3, 33.5, "+ scaling *", fontsize=9, ha="right", va="center")


# ---- the levels --------------------------------------------------------------------------------------------


def draw_levels(path: Path) -> None:
    """Draw the 16 NF4 levels under the normal density they come from, and other codes' levels beneath."""
    formula = torch.from_numpy(normal_float(4))
    assert torch.equal(formula, codebook.levels("nf4")), f"the constants are not the formula's {formula}"
    figure, (above, below) = plt.subplots(2, 1, figsize=(7, 4.8), sharex=True, height_ratios=[3, 1.6])
    in_formula = _draw_formula(above)
    in_blocks = _draw_blocks(above)
    above.set_title(
        f"An inner NF4 level stands for {_least_to_most(in_formula)} of the normal it is made from,\n"
        f"and for {_least_to_most(in_blocks)} of normal weights in blocks of 64"
    )
    above.set_ylim(0)
    name_rows(above, [])
    above.spines["bottom"].set_visible(False)
    above.tick_params(bottom=False)
    _draw_rows_of_levels(below)
    figure.subplots_adjust(hspace=0.05)
    save(figure, path)


def _least_to_most(shares: np.ndarray) -> str:
    return f"{shares.min():.1%} to {shares.max():.1%}"


def _draw_formula(axes: Axes) -> np.ndarray:
    # The normal that the formula cuts up, and the share of it that each of the 14 inner levels has.
    levels = np.array(NF4_LEVELS)
    sigmas = float(ndtri(0.9677083))  # the outermost level stands at this quantile; 1.0 after scaling

    def density(x: np.ndarray) -> np.ndarray:
        return sigmas * np.exp(-((x * sigmas) ** 2) / 2) / math.sqrt(2 * math.pi)

    borders = np.concatenate([[-1.15], (levels[1:] + levels[:-1]) / 2, [1.15]])
    for i, (left, right) in enumerate(zip(borders[:-1], borders[1:], strict=True)):
        x = np.linspace(left, right, 50)
        axes.fill_between(x, density(x), color=BLUE, alpha=0.30 if i % 2 else 0.14, linewidth=0)
    x = np.linspace(-1.15, 1.15, 600)
    axes.plot(x, density(x), color=BLUE, linewidth=1)
    axes.vlines(levels, 0, density(levels), color=BLUE, linewidth=1.6)
    axes.text(0.66, 0.40, "the normal in\nNF4's formula", color=BLUE)
    return np.diff(ndtr(borders * sigmas))[1:-1]


def _draw_blocks(axes: Axes) -> np.ndarray:
    # What normal weights look like once divided by their block's largest, and the share of each inner level.
    scaled = quantize.scaled_sample(normal_weight(), block_size=64, n=2**21)
    inner = scaled[scaled.abs() < 0.9999].numpy()  # the largest itself is +-1: a point, not a density
    counts, edges = np.histogram(inner, bins=60, range=(-0.9999, 0.9999))
    density = counts / (len(scaled) * np.diff(edges))
    axes.plot((edges[1:] + edges[:-1]) / 2, density, color=ORANGE, linewidth=1.4)
    axes.text(0.27, 0.92, "normal weights in blocks of 64", color=ORANGE)
    codes = quantize.encode(scaled, codebook.levels("nf4")).bincount(minlength=16)
    return codes.numpy()[1:-1] / len(scaled)


def _draw_rows_of_levels(axes: Axes) -> None:
    # A row of dots for each code, with the error it makes.
    rows = {"NF4": "nf4", "Int4": "int4", "FP4, OCP E2M1": "fp4_e2m1", "FP4, bitsandbytes": "fp4"}
    weight = normal_weight()
    axes.text(1.2, 1, "rms error / σ", color=GREY, va="center")
    for y, (name, quant_type) in enumerate(rows.items()):
        color = BLUE if quant_type == "nf4" else GREY
        levels = codebook.levels(quant_type)
        error = rms(decoded(weight, quant_type=quant_type) - weight)
        axes.plot(levels, np.full(len(levels), -y), "o", color=color, markersize=5, clip_on=False)
        axes.text(-1.2, -y, name, color=color, va="center", ha="right")
        axes.text(1.2, -y, f"{error:.1%}", color=color, va="center")
    axes.set_xlabel("weight / largest magnitude in its block")
    axes.set_ylim(-len(rows) + 0.4, 1)
    axes.set_xlim(-1.15, 1.15)
    name_rows(axes, [])


# ---- blocks and bits ---------------------------------------------------------------------------------------


def draw_block_sizes(path: Path) -> None:
    """Draw the error of normal weights against the bits they take, for blocks of 32 to 4096."""
    weight = normal_weight()
    sizes = [2**i for i in range(5, 13)]
    measured = {}  # by double_quant, an array of (bits per parameter, error) for each block size
    for double_quant in (False, True):
        quantized = [
            NF4Tensor.from_float(weight, block_size=size, double_quant=double_quant) for size in sizes
        ]
        errors = [rms(one.dequantize(torch.float32) - weight) for one in quantized]
        measured[double_quant] = np.array([[one.bits_per_parameter for one in quantized], errors]).T
    figure, axes = plt.subplots(figsize=(8, 4.2))
    for size, single, double in zip(sizes, measured[False], measured[True], strict=True):
        (bits, error), (more_bits, same_error) = double, single
        axes.plot([bits - 4, more_bits - 4], [error, same_error], color=GREY, linewidth=0.6)
        axes.annotate(f"{size}", (more_bits - 4, same_error), (7, 4), textcoords="offset points", color=GREY)
    lines = {"scales in float32": (False, ORANGE), "scales in 8 bits: double quantization": (True, BLUE)}
    for label, (double_quant, color) in lines.items():
        bits, errors = measured[double_quant].T
        axes.plot(bits - 4, errors, "o-", color=color, label=label)
    double, single = measured[True][sizes.index(64)], measured[False][sizes.index(256)]
    axes.set_title(
        f"{double[0]:.3f} bits buy blocks of 64 and an error of {double[1]:.1%} with double quantization,\n"
        f"and {single[0]:.3f} bits blocks of 256 and {single[1]:.1%} without it"
    )
    ticks = [1 / 256, 1 / 64, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1]
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{4 + tick:.4f}".rstrip("0").rstrip(".") for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlim(right=1.5)
    axes.margins(y=0.08)
    axes.set_xlabel("bits per parameter (logarithmic in what comes on top of 4)")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=1))
    axes.set_ylabel("rms error / σ of the weights")
    axes.grid(alpha=0.25)
    more = (measured[True][:, 1] / measured[False][:, 1] - 1).max()
    note = f"numbers: block size\ngrey: the same blocks, error × {1 + more:.4f} at most"
    axes.legend(frameon=False, title=note, alignment="left")
    save(figure, path)


SMALL: dict[str, Any] = dict(fontsize=8.5, va="center")
PART_COLORS = dict(packed=BLUE, absmax=ORANGE, absmax_codes=ORANGE, nested_absmax=GREEN, offset=RED)


def draw_bits_per_parameter(path: Path) -> None:
    """Draw the bits of a weight by the part of an NF4Tensor that holds them, in three magnifications."""
    weight = normal_weight(576, 1536)  # the shape of the demo model's down_proj
    single, double = NF4Tensor.from_float(weight, double_quant=False), NF4Tensor.from_float(weight)
    bars = {
        "bfloat16": {"weight": weight.bfloat16()},
        "NF4": single.parts,
        "NF4, double\nquantization": double.parts,
    }
    total = double.bits_per_parameter
    windows = {(0.0, 17.5): 3, (3.95, 4.56): 2, (total - 0.0025, total + 0.0015): 1}  # and how many bars
    figure, panels = plt.subplots(3, 1, figsize=(8, 5.6), height_ratios=[3, 2.2, 1.3])
    for axes, (window, n_bars) in zip(panels, windows.items(), strict=True):
        for y, parts in enumerate(list(bars.values())[-n_bars:]):
            _stack_parts(axes, -y, parts, weight.numel(), window)
        axes.set_xlim(window)
        name_rows(axes, list(bars)[-n_bars:])
    for coarse, fine, window in zip(panels[:-1], panels[1:], list(windows)[1:], strict=True):
        _show_magnified(figure, coarse, fine, window)
    panels[0].set_title(
        f"Of 16 bits a weight NF4 leaves {single.bits_per_parameter:.4g}, "
        f"and with double quantization {total:.4g}"
    )
    assert double.offset is not None
    panels[-1].text(total + 0.00038, 0, _label("offset", double.offset, weight.numel()), color=RED, **SMALL)
    panels[-1].set_xlabel(f"bits per parameter of a ({weight.shape[0]}, {weight.shape[1]}) weight")
    figure.subplots_adjust(hspace=0.45)
    save(figure, path)


def _show_magnified(figure: Figure, coarse: Axes, fine: Axes, window: tuple[float, float]) -> None:
    # Two lines from a window of one axes to the upper corners of the axes beneath, which shows it.
    for x, corner in zip(window, (0, 1), strict=True):
        ends = (x, 0), (corner, 1), coarse.get_xaxis_transform(), fine.transAxes
        figure.add_artist(ConnectionPatch(*ends, color=GREY, linewidth=0.7, alpha=0.5))


def _stack_parts(axes: Axes, y: float, parts: dict[str, Tensor], n: int, window: tuple[float, float]) -> None:
    # One horizontal bar for a weight of n numbers, part after part; what is wide enough says what it is.
    left, width = 0.0, window[1] - window[0]
    for name, part in parts.items():
        if name in SHARED_PARTS:
            continue
        bits = 8 * part.nbytes / n
        axes.barh(y, bits, left=left, height=0.7, color=PART_COLORS.get(name, GREY), linewidth=0)
        visible_left, right = max(left, window[0]), left + bits
        if right - visible_left > 0.18 * width:
            middle = (visible_left + right) / 2
            axes.text(middle, y, _label(name, part, n), color="white", ha="center", **SMALL)
        left = right
    axes.text(left + 0.01 * width, y, f"{left:.4g}", va="center")


def _label(name: str, part: Tensor, n: int) -> str:
    bits = short(8 * part.nbytes / n)
    return f"{name}\n{8 * part.itemsize} bits / {n // part.numel():,} = {bits}"


# ---- number formats ----------------------------------------------------------------------------------------


CODE = "code: a place among the levels"
BIT_COLORS = {"sign": GREY, "exponent": ORANGE, "mantissa": BLUE, CODE: LIGHT_BLUE}


class NumberFormat(NamedTuple):
    """A format as far as it is drawn."""

    name: str
    bits: dict[str, int]  # how many of each kind in BIT_COLORS
    positive: np.ndarray  # its positive numbers, ascending; of a float the first and the last two
    smallest_normal: float | None = None  # floats below it lose mantissa bits


def float_format(name: str, dtype: torch.dtype) -> NumberFormat:
    """Return what a dtype's own bit patterns tell: those of positive floats ascend with the floats."""
    info = torch.finfo(dtype)
    mantissa = round(-math.log2(info.eps))
    pattern = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[dtype.itemsize]
    top = int(torch.tensor(info.max, dtype=dtype).view(pattern))
    positive = torch.tensor([1, top - 1, top], dtype=pattern).view(dtype).double().numpy()
    bits = {"sign": 1, "exponent": info.bits - 1 - mantissa, "mantissa": mantissa}
    return NumberFormat(name, bits, positive, info.smallest_normal)


def listed_format(name: str, bits: dict[str, int], levels: Tensor) -> NumberFormat:
    """Return a format that is a list of levels, to be multiplied by the scale of a block."""
    return NumberFormat(name, bits, levels[levels > 0].double().sort().values.numpy())


def draw_number_formats(path: Path) -> None:
    """Draw bits, range and steps of the number formats that a reader of this package meets."""
    floats = [
        float_format("fp32", torch.float32),
        float_format("bf16", torch.bfloat16),
        float_format("fp16", torch.float16),
        float_format("FP8 E5M2", torch.float8_e5m2),
        float_format("FP8 E4M3", torch.float8_e4m3fn),
    ]
    int8_levels = torch.arange(-127, 128) / 127  # symmetric, as Int4's
    scaled = [
        listed_format("int8", {CODE: 8}, int8_levels),
        listed_format("Int4", {CODE: 4}, codebook.levels("int4")),
        listed_format("FP4 E2M1", {"sign": 1, "exponent": 2, "mantissa": 1}, codebook.levels("fp4_e2m1")),
        listed_format("NF4", {CODE: 4}, codebook.levels("nf4")),
    ]
    ratios: dict[str, Any] = dict(width_ratios=[2, 2.6, 2.1], height_ratios=[len(floats), len(scaled)])
    figure, panels = plt.subplots(2, 3, figsize=(8.4, 5.6), **ratios)
    for (bits, ranges, numbers), formats in zip(panels, (floats, scaled), strict=True):
        _draw_bits(bits, formats)
        _draw_ranges(ranges, formats)
        _write_numbers(numbers, formats)
    _write_headers(*panels[0])
    panels[0, 1].set_xticks([1e-40, 1e-20, 1, 1e20, 1e40])
    panels[0, 1].set_xlabel("value")
    panels[1, 1].set_xticks([0.01, 0.1, 1], ["0.01", "0.1", "1"])
    panels[1, 1].set_xlabel("value / largest magnitude in the block")
    patches = [Patch(color=color, label=kind) for kind, color in BIT_COLORS.items()]
    figure.legend(handles=patches, loc="lower center", ncols=4, frameon=False, fontsize=9)
    title = (
        "Exponent bits buy range, mantissa bits buy small steps;\n"
        "int8 and the 4-bit formats have little range: a scale for each block brings it"
    )
    figure.suptitle(title, x=0.02, y=1.02, ha="left", fontsize=11)
    figure.subplots_adjust(hspace=0.38, wspace=0.05, bottom=0.16)
    save(figure, path)


def _draw_bits(axes: Axes, formats: list[NumberFormat]) -> None:
    for y, format in enumerate(formats):
        left = 0
        for kind, n in format.bits.items():
            axes.barh(-y, n, left=left, height=0.5, color=BIT_COLORS[kind], edgecolor="white", linewidth=0.8)
            left += n
        split = " + ".join(str(n) for n in format.bits.values())
        axes.text(left + 1, -y, split, va="center", fontsize=9, color=GREY)
    axes.set_xlim(0, 52)
    axes.set_ylim(-len(formats) + 0.4, 0.6)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    name_rows(axes, [format.name for format in formats])


def _draw_ranges(axes: Axes, formats: list[NumberFormat]) -> None:
    # From the smallest positive number, which is also the step next to zero, to the largest.
    for y, (_, _, positive, smallest_normal) in enumerate(formats):
        if smallest_normal is None:
            axes.plot(positive, np.full(len(positive), -y), "|", color="black", markersize=9)
        else:
            axes.plot([positive[0], positive[-1]], [-y, -y], color=GREY, linewidth=2)
            axes.plot([smallest_normal, positive[-1]], [-y, -y], color="black", linewidth=5)
        axes.plot(positive[0], -y, "o", color=GREEN, markersize=6)
        axes.plot(positive[-1] - positive[-2], -y + 0.3, "v", color=RED, markersize=6)
    axes.set_xscale("log")
    axes.set_ylim(-len(formats) + 0.4, 0.6)
    name_rows(axes, [])


def _write_numbers(axes: Axes, formats: list[NumberFormat]) -> None:
    for y, (_, _, positive, _) in enumerate(formats):
        columns = {1: (positive[0], GREEN), 2: (positive[-1] - positive[-2], RED), 3: (positive[-1], "black")}
        for x, (number, color) in columns.items():
            axes.text(x, -y, short(number), color=color, ha="right", va="center", fontsize=9.5)
    axes.set_xlim(0, 3)
    axes.set_ylim(-len(formats) + 0.4, 0.6)
    axes.axis("off")


def _write_headers(bits: Axes, ranges: Axes, numbers: Axes) -> None:
    bits.text(0, 0.6, "bits\n", fontsize=8.5)
    note = "range (thin: subnormal,\nfewer bits of mantissa)"
    ranges.text(0, 1, note, transform=ranges.transAxes, fontsize=8.5)
    numbers.text(1, 0.6, "● smallest > 0,\nstep at 0", color=GREEN, ha="right", fontsize=8.5)
    numbers.text(2, 0.6, "▼ step at\nthe top", color=RED, ha="right", fontsize=8.5)
    numbers.text(3, 0.6, "largest\n", ha="right", fontsize=8.5)


# ---- quantile quantization ---------------------------------------------------------------------------------


class Coded(NamedTuple):
    """A weight quantized one way, as far as it is drawn."""

    name: str
    bits: float  # per parameter
    decoded: Tensor
    levels: list[Tensor]  # times their scale: of the weight; or of two blocks, without and with an outlier


def draw_quantiles(path: Path) -> None:
    """Draw levels and errors of quantile quantization and NF4 on normal weights with outliers."""
    weight, is_outlier = weight_with_outliers()
    exact = torch.from_numpy(codebook.quantile_levels(weight.numpy()))
    approximate = torch.from_numpy(codebook.quantile_levels(weight.numpy(), bins=64))
    rows = [
        coded_as_one("quantiles, by a sort", weight, exact),
        coded_as_one("quantiles, by a\nhistogram of 64 bins", weight, approximate),
        coded_as_one("NF4, one scale", weight, codebook.levels("nf4"), weight.abs().max()),
        coded_in_blocks("quantiles of weight /\nscale, blocks of 64", weight, is_outlier, "quantile"),
        coded_in_blocks("NF4, blocks of 64", weight, is_outlier, "nf4"),
    ]
    errors = [
        (rms((row.decoded - weight)[~is_outlier]), rms((row.decoded - weight)[is_outlier])) for row in rows
    ]
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 4.6), width_ratios=[3, 2.2], sharey=True)
    _draw_levels_over_outliers(left, rows)
    _draw_errors(right, errors)

    off = (approximate - exact).abs()
    inner, outer = off[4:12].max(), torch.cat([off[:4], off[12:]]).max()
    note = f"up to {inner:.3f} σ off, outer 8 {outer:.3f} σ"
    left.text(0, -1.32, note, color=GREY, fontsize=8, ha="center", va="center")
    kept = decoded(weight, double_quant=False)[is_outlier] == weight[is_outlier]
    note = f"with float32 scales {kept.double().mean():.0%}\nof the outliers to the bit"
    right.text(0.11, -len(rows) + 0.62, note, color=GREY, fontsize=8.5, va="center")
    lines = (
        "Quantiles serve the many ({:.2f} σ) and lose the outliers ({:.1f} σ); NF4 with one scale does the",
        "opposite ({:.2f} and {:.1f} σ), and with a scale for 64 weights it keeps both ({:.2f} and {:.2f} σ)",
    )
    title = "\n".join(lines).format(*errors[0], *errors[2], *errors[4])
    figure.suptitle(title, x=-0.08, y=1.02, ha="left", fontsize=11)
    figure.subplots_adjust(wspace=0.08, top=0.84)
    save(figure, path)


def _draw_levels_over_outliers(axes: Axes, rows: list[Coded]) -> None:
    for y, row in enumerate(rows):
        for levels, color, shift in zip(row.levels, (BLUE, ORANGE), (0, 0.3), strict=False):
            axes.plot(levels, np.full(16, -y - shift), "|", color=color, markersize=9)
    axes.plot([], [], "|", color=BLUE, markersize=9, label="level")
    axes.plot([], [], "|", color=ORANGE, markersize=9, label="in a block with an outlier")
    axes.legend(frameon=False, fontsize=9, ncols=2, loc="lower left", bbox_to_anchor=(0, 0.98))
    for sign in (-1, 1):
        axes.axvspan(sign * 8, sign * 16, color=RED, alpha=0.08, linewidth=0)
        axes.text(sign * 12, 0.45, "outliers", color=RED, fontsize=9, ha="center")
    name_rows(axes, [f"{row.name}\n{row.bits:.4g} bits" for row in rows], fontsize=9)
    axes.set_ylim(-len(rows) + 0.4, 0.7)
    axes.set_xlabel("level × scale, in σ of the other weights\n(one weight in 1,024 is an outlier)")


def _draw_errors(axes: Axes, errors: list[tuple[float, float]]) -> None:
    for y, (many, outliers) in enumerate(errors):
        axes.plot([many, outliers], [-y, -y], color=GREY, linewidth=0.8, zorder=0)
        for x, color, side, align in ((many, BLUE, -7, "right"), (outliers, RED, 7, "left")):
            axes.plot(x, -y, "o", color=color)
            axes.annotate(
                f"{x:.2f}", (x, -y), (side, 0), textcoords="offset points", color=color, ha=align, va="center"
            )
    axes.plot([], [], "o", color=BLUE, label="other weights")
    axes.plot([], [], "o", color=RED, label="outliers")
    axes.legend(frameon=False, fontsize=9, ncols=2, loc="lower left", bbox_to_anchor=(0, 0.98))
    axes.set_xscale("log")
    axes.set_xlim(0.03, 60)
    axes.set_xticks([0.1, 1, 10], ["0.1", "1", "10"])
    axes.set_xlabel("rms error, in σ of\nthe other weights")
    axes.tick_params(axis="y", labelleft=False, length=0)
    axes.spines["left"].set_visible(False)


def weight_with_outliers() -> tuple[Tensor, Tensor]:
    """Return a normal (1024, 1024) weight with 1,024 outliers of 8 to 16 standard deviations, and where they
    are, bool (1024, 1024).
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2**20, generator=generator)
    where = torch.randperm(2**20, generator=generator)[:1024]
    weight[where] = weight[where].sign() * (8 + 8 * torch.rand(1024, generator=generator))
    is_outlier = torch.zeros(2**20, dtype=torch.bool)
    is_outlier[where] = True
    return weight.view(1024, 1024), is_outlier.view(1024, 1024)


def coded_as_one(name: str, weight: Tensor, levels: Tensor, scale: Tensor | float = 1.0) -> Coded:
    """Return a weight coded with one scale for all of it: 4 bits a weight, and next to nothing besides."""
    codes = quantize.encode((weight / scale).view(-1), levels)
    return Coded(name, 4.0, (levels[codes.int()] * scale).view_as(weight), [levels * scale])


def coded_in_blocks(name: str, weight: Tensor, is_outlier: Tensor, quant_type: str) -> Coded:
    """Return a weight coded in blocks of 64, and the levels of the middling block without and with an
    outlier.
    """
    quantized = NF4Tensor.from_float(weight, quant_type=quant_type)
    scales, has_outlier = weight.abs().view(-1, 64).amax(dim=1), is_outlier.view(-1, 64).any(dim=1)
    levels = [quantized.codebook * scales[blocks].median() for blocks in (~has_outlier, has_outlier)]
    return Coded(name, quantized.bits_per_parameter, quantized.dequantize(torch.float32), levels)


# ---- training ----------------------------------------------------------------------------------------------

CASES = {
    "gsm8k": "GSM8K, 4 examples a step",
    "gsm8k-checkpointed": "the same, checkpointed",
    "random": "512 random tokens",
}
CONTENDERS = {"ours": "minqlora", "peer": "transformers + PEFT + bitsandbytes"}
COLORS = {"ours": BLUE, "peer": GREY}


def train_rows(name: str, metric: str) -> list[dict[str, Any]]:
    """Return the rows of a metric in a committed result of `bench.py train`."""
    document = json.loads((ROOT / "docs" / "results" / name).read_text(encoding="utf-8"))
    return [row for row in document["rows"] if row["metric"] == metric]


def draw_training(path: Path) -> None:
    """Draw tokens a second and peak memory of each case, under each allocator, beside the peer's."""
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    for axes, metric, title, scale in zip(
        panels, ("tokens_per_s", "peak_mb"), ("tokens a second", "peak memory, GB"), (1, 1e-3), strict=True
    ):
        rows = train_rows("train_cpu.json", metric)
        for place, row in enumerate(rows):
            for offset, who in ((0.2, "ours"), (-0.2, "peer")):
                if row[who] is None:
                    continue
                value = row[who] * scale
                axes.barh(offset - place, value, 0.38, color=COLORS[who])
                text = f" {value:.0f}" if scale == 1 else f" {value:.1f}"
                axes.text(value, offset - place, text, va="center", fontsize=9)
        axes.set_title(title)
        axes.spines["bottom"].set_visible(False)
        axes.tick_params(bottom=False, labelbottom=False)
        name_rows(axes, [f"{CASES[row['case']]},\n{row['allocator']}" for row in rows], fontsize=9)
    handles = [Patch(color=COLORS[who], label=name) for who, name in CONTENDERS.items()]
    figure.legend(handles=handles, frameon=False, ncols=2, loc="lower center", bbox_to_anchor=(0.5, -0.06))
    figure.subplots_adjust(wspace=0.08)
    save(figure, path)


def draw_growth(path: Path) -> None:
    """Draw step time and peak memory against the length of a row, the examples in a batch, and the model."""
    sweeps = {"length": "tokens in a row", "batch": "rows of 256 tokens", "model": "parameters, millions"}
    figure, panels = plt.subplots(2, 3, figsize=(9, 5), sharex="col")
    for above_below, metric, label, scale in zip(
        panels, ("step_s", "peak_mb"), ("seconds a step", "peak memory, GB"), (1, 1e-3), strict=True
    ):
        rows = {row["case"]: row for row in train_rows("train_growth_cpu.json", metric)}
        for axes, (sweep, xlabel) in zip(above_below, sweeps.items(), strict=True):
            for who in CONTENDERS:
                points = sorted(
                    (x, row[who] * scale)
                    for case, row in rows.items()
                    if (x := _swept(case, sweep)) is not None and row[who] is not None
                )
                axes.plot(*zip(*points, strict=True), "o-", color=COLORS[who], markersize=4)
            axes.set_xscale("log", base=2)
            axes.set_ylim(0)
            ticks = sorted(x for case in rows if (x := _swept(case, sweep)) is not None)
            axes.set_xticks(ticks, [f"{x:,}" for x in ticks], fontsize=9)
            axes.minorticks_off()
            if metric == "peak_mb":
                axes.set_xlabel(xlabel)
        above_below[0].set_ylabel(label)
    handles = [Patch(color=COLORS[who], label=name) for who, name in CONTENDERS.items()]
    figure.legend(handles=handles, frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.5, 0.97))
    save(figure, path)


def _swept(case: str, sweep: str) -> int | None:
    # What a case of a sweep varies: a row of 256 tokens is also a batch of one, and 512 tokens go through
    # each model.
    known = {
        "length": {"length-512": 512},
        "batch": {"length-256": 1},
        "model": {"length-512": 135, "model-smollm2-360m": 362, "model-tinyllama-1.1b": 1100},
    }[sweep]
    name, _, number = case.partition("-")
    return known.get(case, int(number) if name == sweep and number.isdigit() else None)


# ---- the demo run ------------------------------------------------------------------------------------------


def draw_demo_loss(path: Path) -> None:
    """Draw the committed demo run as finetune.py draws every run."""
    lines = (ROOT / "docs" / "results" / "demo_metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    training = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    held_out = [(row["step"], row["eval_loss"]) for row in rows if "eval_loss" in row]
    path.write_bytes(loss_png(training, held_out))


if __name__ == "__main__":
    main()
