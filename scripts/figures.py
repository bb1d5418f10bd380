"""Draw the README's figures, from computed levels and from results committed under docs/results.

    make figures        or        python scripts/figures.py

nf4_levels.png   where the 16 levels stand under the normal density, and that each has about as much of it
demo_loss.png    loss and held-out loss of the demo run in docs/results/demo_metrics.jsonl
"""

import json
from pathlib import Path

import matplotlib
import numpy as np
from scipy.special import ndtr, ndtri

from minqlora.codebook import NF4_LEVELS, normal_float

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402 (the backend comes first)

ROOT = Path(__file__).resolve().parent.parent
BLUE, ORANGE, GREY = "#2563eb", "#ea580c", "#6b7280"


def main() -> None:
    """Draw every figure into docs/figures."""
    folder = ROOT / "docs" / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    plt.rcParams["font.size"] = 11
    plt.rcParams["axes.spines.top"] = plt.rcParams["axes.spines.right"] = False
    draw_levels(folder / "nf4_levels.png")
    draw_demo_loss(folder / "demo_loss.png")


def draw_levels(path: Path) -> None:
    """Draw the 16 NF4 levels under the normal density, and an evenly spaced code of 16 for comparison."""
    sigmas = float(ndtri(0.9677083))  # the outermost level stands at this quantile; 1.0 after scaling
    x = np.linspace(-1.15, 1.15, 600)
    density = np.exp(-((x * sigmas) ** 2) / 2)
    levels = np.array(NF4_LEVELS)
    assert np.array_equal(normal_float(4), levels.astype(np.float32)), (
        "the constants are not what the formula gives"
    )
    borders = np.concatenate([[-1.15], (levels[1:] + levels[:-1]) / 2, [1.15]])
    figure, axes = plt.subplots(figsize=(8, 3.6))
    for i, (left, right) in enumerate(zip(borders[:-1], borders[1:], strict=True)):
        inside = (x >= left) & (x <= right)
        axes.fill_between(x[inside], density[inside], color=BLUE, alpha=0.30 if i % 2 else 0.14, linewidth=0)
    axes.plot(x, density, color=GREY, linewidth=1)
    axes.vlines(levels, 0, np.exp(-((levels * sigmas) ** 2) / 2), color=BLUE, linewidth=1.6)
    axes.plot(levels, np.full(16, -0.06), "o", color=BLUE, markersize=5, clip_on=False)
    axes.plot(np.linspace(-1, 1, 16), np.full(16, -0.15), "o", color=ORANGE, markersize=5, clip_on=False)
    axes.text(1.2, -0.06, "NF4", color=BLUE, va="center")
    axes.text(1.2, -0.15, "evenly spaced", color=ORANGE, va="center")
    share = (ndtr(borders[1:] * sigmas) - ndtr(borders[:-1] * sigmas))[1:-1]
    axes.set_title(
        f"Each of the 14 inner levels stands for {share.min():.1%} to {share.max():.1%} of the weights",
        loc="left",
        fontsize=11,
    )
    axes.set_xlabel("weight / largest magnitude in its block of 64")
    axes.set_ylim(-0.2, 1.05)
    axes.set_xlim(-1.15, 1.15)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)


def draw_demo_loss(path: Path) -> None:
    """Draw the committed demo run: training loss of each step, and held-out loss before and after."""
    lines = (ROOT / "docs" / "results" / "demo_metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    training = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    held_out = [(row["step"], row["eval_loss"]) for row in rows if "eval_loss" in row]
    figure, axes = plt.subplots(figsize=(8, 3.2))
    axes.plot(*zip(*training, strict=True), color=GREY, linewidth=1, label="training, each step")
    axes.plot(*zip(*held_out, strict=True), "o--", color=BLUE, label="held-out modules")
    for step, loss in held_out:
        axes.annotate(f"{loss:.2f}", (step, loss), textcoords="offset points", xytext=(0, 8), color=BLUE)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss, nats a token")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)


if __name__ == "__main__":
    main()
