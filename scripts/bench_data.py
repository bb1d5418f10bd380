"""Measure what a large dataset costs: time to prepare it, and memory while it is trained on.

    python scripts/bench.py data --output docs/results/data_cpu.json
    python scripts/bench.py data --rows 20000        # a quick look

GSM8K's rows (the demo's where that is not there), numbered and repeated to --rows of them, over 1 GB by
default, are read, written with the chat template, tokenized and kept on disk, beside the tokenizers library's
own `encode_batch` on the first of the same texts. Then finetune.py does a few steps on that file and on one
of 2,000 rows, by turns with several seeds: the median of the peak memory should be the same. One run tells
little: what the allocator keeps depends on the shapes of the first batches. The last line of output is the
JSON that --output writes.
"""

import itertools
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import yaml
from tokenizers import Tokenizer as Library
from tqdm import tqdm

from bench import ROOT, as_document, data_file, print_document, take_turns
from demo_assets import fetch_model
from finetune import convert
from minqlora.batch import tokenize
from minqlora.files import write_atomically
from minqlora.tokenizer import Tokenizer
from options import option, parse, user_errors

FEW = 2000  # rows of the small file
MAX_SEQ_LENGTH = 512
BATCH = 1000  # texts that encode_batch gets at a time
BATCHES = 200  # of them: its speed does not depend on how many
SEEDS = 5  # runs on each file
CACHE = ROOT / "assets" / "bench-data" / "cache"


@dataclass
class Config:
    """What can be set."""

    rows: int = option(2_000_000, "rows of the large file")
    steps: int = option(4, "training steps on each file")
    output: Path | None = option(None, "write the JSON here as well")
    contender: Literal["all", "minqlora", "encode_batch"] = option(
        "all", "run this one alone, in this process"
    )


def main(argv: Sequence[str]) -> None:
    """Make the files, then run one contender, or all in turn, and print what came out."""
    config = parse(Config, argv, description=__doc__.split("\n\n")[0] if __doc__ else None)
    with user_errors():
        model = fetch_model(ROOT / "assets")
        large = make_rows(config.rows)
    if config.contender == "all":
        compare(config, argv, model, large)
        return
    prepare = prepared_by_us if config.contender == "minqlora" else prepared_by_the_library
    began = time.perf_counter()
    tokens = prepare(large, model)
    print(json.dumps({"tokens": tokens, "tokens_per_s": tokens / (time.perf_counter() - began)}))


def make_rows(count: int) -> Path:
    """Return a JSONL file of so many rows, no two the same, which is made if it is not there."""
    path = ROOT / "assets" / "bench-data" / f"{count}.jsonl"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [json.loads(line) for line in data_file(None).read_text(encoding="utf-8").splitlines()]
        with TemporaryDirectory(dir=path.parent) as folder:
            part = Path(folder) / path.name
            with open(part, "w", encoding="utf-8") as file:
                for number, row in zip(tqdm(range(count), disable=None), itertools.cycle(rows), strict=False):
                    asked = next(iter(row))
                    file.write(json.dumps(row | {asked: f"{row[asked]}\n({number})"}) + "\n")
            part.replace(path)
    return path


def prepared_by_us(path: Path, model: Path) -> int:
    """Read, write with the template, tokenize and keep a file's rows; return the number of tokens."""
    shutil.rmtree(CACHE, ignore_errors=True)
    _, report = tokenize([path], Tokenizer(model), MAX_SEQ_LENGTH, CACHE, convert=convert)
    return report.tokens


def prepared_by_the_library(path: Path, model: Path) -> int:
    """Tokenize the texts of a file's rows by `encode_batch`, the least that must be done."""
    library = Library.from_file(str(model / "tokenizer.json"))
    tokens = 0
    for texts in itertools.islice(batches(path), BATCHES):
        tokens += sum(map(len, library.encode_batch(texts, add_special_tokens=False)))
    return tokens


def batches(path: Path) -> Iterator[list[str]]:
    """Yield the texts of a file's rows, some at a time."""
    with open(path, encoding="utf-8") as file:
        while lines := list(itertools.islice(file, BATCH)):
            yield ["".join(row.values()) for row in map(json.loads, lines)]


def compare(config: Config, argv: Sequence[str], model: Path, large: Path) -> None:
    """Run both contenders, and the training on both files; print a table and the JSON document."""
    shown = "{name:14}{tokens:15,} tokens{tokens_per_s:12,.0f} tokens/s"
    _, medians = take_turns("data", ("minqlora", "encode_batch"), [f"--rows={config.rows}"], 1, shown)
    speed = {name: found["tokens_per_s"] for name, found in medians.items()}
    row: dict[str, Any] = {"stage": "data", "metric": "tokens_per_s", "unit": "tokens/s", "floor": None}
    row |= {"rows": config.rows, "megabytes": large.stat().st_size / 1e6}
    row |= {"ours": speed["minqlora"], "peer": speed["encode_batch"]}
    rows = [row | {"ratio": speed["minqlora"] / speed["encode_batch"]}]
    with TemporaryDirectory(dir=large.parent) as folder:
        peaks: dict[Path, list[float]] = {make_rows(FEW): [], large: []}
        for seed in range(SEEDS):
            for path, found in peaks.items():
                found.append(trained(path, model, Path(folder), config.steps, seed))
                print(f"training on {path.name:16}{found[-1]:8.3f} GiB", flush=True)
    for path, found in peaks.items():
        row = {"stage": "data", "metric": "peak_memory_gib", "unit": "GiB", "rows": int(path.stem)}
        rows.append(row | {"ours": statistics.median(found), "runs": found})
    ratio, grown = rows[0]["ratio"], rows[-1]["ours"] / rows[1]["ours"]
    print(f"{ratio:.2f} of encode_batch's speed; {grown:.3f} times the memory of {FEW:,} rows")
    command = " ".join(["scripts/bench.py data", *argv])
    print_document(as_document(command, rows, ("torch", "tokenizers")), config.output)


def trained(path: Path, model: Path, folder: Path, steps: int, seed: int) -> float:
    """Fine-tune for some steps on a file; return the peak memory of that process in GiB."""
    run = folder / f"{path.stem}-{seed}"
    settings = {"model": str(model), "dataset": [str(path)], "output_dir": str(run), "max_steps": steps}
    settings |= {"data_cache": str(CACHE), "lora_r": 16, "max_seq_length": MAX_SEQ_LENGTH, "dtype": "float32"}
    settings |= {"gradient_accumulation_steps": 1, "seed": seed}
    config = folder / f"{path.stem}.yaml"
    write_atomically(config, yaml.safe_dump(settings).encode())
    command = [sys.executable, str(ROOT / "scripts" / "finetune.py"), "--config", str(config)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return max(row["peak_memory_gib"] for row in rows if "peak_memory_gib" in row)
