"""Chapter 23. The report: what a run shows while it goes, and the page that it leaves to look at.

A run is read back from the files in its folder and becomes `report.html`, one file that needs nothing else:
what was trained on what, curves, answers before and after. Two things are done to a curve first. A long run
has more points than a screen has columns; of every bucket of neighbours the least and the greatest stay, so
that no spike is lost::

    loss    4.1 4.0 9.7 3.9 | 3.8 3.6 3.7 3.5          two buckets of four
    kept            9.7 3.9 | 3.8         3.5

And where noise hides the course, a mean that forgets is drawn over it, AdamW's own with its correction for
the beginning, here of the n-th value::

    mean <- mean + (value - mean) * (1 - decay) / (1 - decay**n)

The page is a Jinja template, `report.html` beside this file, with `report.css` and `report.js`; what is drawn
comes from here as numbers and texts, and the template escapes every text. Its content security policy allows
this one script and nothing from anywhere else, so that the browser too keeps a prompt from being more than
text.

Shapes and dtypes: none; steps are whole numbers, values floats, or None for what is no number. Cost: a few
hundred points a curve, whatever the length of the run; a page of 100,000 steps stays below 1 MB.

Before: run. Next: the scripts.
"""

import base64
import hashlib
import io
import json
import math
import shlex
import statistics
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from minqlora.data import IGNORE, Example, encode_prompt
from minqlora.files import write_atomically
from minqlora.generate import generate_batch
from minqlora.model import CausalLM
from minqlora.run import MetricsLog, checkpoints
from minqlora.tokenizer import Tokenizer

POINTS = 200  # buckets of a curve; two points of each are kept
COLORS = 6  # that report.css has for curves; further ones are dashed

# ---- while a run goes --------------------------------------------------------------------------------------


class RunningMean:
    """A mean that forgets: the weight of a value falls by `decay` with each one after it."""

    def __init__(self, decay: float = 0.9):
        self.decay, self.mean, self._left = decay, math.nan, 1.0  # _left: decay ** values so far

    def update(self, value: float) -> float:
        """Take a value in and return the mean; what is no number changes nothing."""
        if math.isfinite(value):
            self._left *= self.decay
            before = value if math.isnan(self.mean) else self.mean
            self.mean = before + (value - before) * (1 - self.decay) / (1 - self._left)
        return self.mean


class Prompt(NamedTuple):
    """A prompt to answer in the course of a run: as a person reads it, and as the model does."""

    text: str
    input_ids: list[int]


def prompts_of(texts: Sequence[str], tokenizer: Tokenizer) -> list[Prompt]:
    """Return texts as a user would say them to the model."""
    return [Prompt(text, encode_prompt([{"role": "user", "content": text}], tokenizer)) for text in texts]


def prompts_in(examples: Sequence[Example], count: int, tokenizer: Tokenizer) -> list[Prompt]:
    """Return what stands before the first answer of the first `count` examples; of an example that is learned
    from its beginning, the beginning.
    """
    before, after = "", ""
    if tokenizer.chat_template is not None:
        mark = "\N{OBJECT REPLACEMENT CHARACTER}"
        message = {"role": "user", "content": mark}
        before, _, after = tokenizer.render([message], add_generation_prompt=True).partition(mark)
    prompts = []
    for place in range(min(count, len(examples))):
        ids, labels = examples[place]
        first = next(i for i, label in enumerate(labels) if label != IGNORE)
        given = ids[: first if first > 1 else 16]
        text = tokenizer.decode(given, skip_special_tokens=False)
        if text.startswith(before) and text.endswith(after):  # what the template writes around is no news
            text = text[len(before) : len(text) - len(after)]
        prompts.append(Prompt(text, given))
    return prompts


class Samples:
    """`samples.jsonl`: what a model answers to the same prompts in the course of a run.

    resumed_from: as in `MetricsLog`.
    """

    def __init__(
        self,
        folder: Path,
        prompts: Sequence[Prompt],
        tokenizer: Tokenizer,
        max_new_tokens: int,
        resumed_from: int | None = None,
    ):
        self._prompts, self._tokenizer, self._max_new_tokens = prompts, tokenizer, max_new_tokens
        self._log = MetricsLog(folder, resumed_from, "samples.jsonl")
        # Of the last answers. A checkpoint comes after the answers of its step.
        self.step = -1 if resumed_from is None else resumed_from

    def take(self, model: CausalLM, step: int) -> Iterator[tuple[str, str]]:
        """Let the model answer after a step; yield each prompt with its answer.

        The likeliest token is taken throughout, so no random generator is asked, and training goes on to the
        same bits.
        """
        training = model.training
        model.eval()
        ids = [prompt.input_ids for prompt in self._prompts]
        answers = generate_batch(
            model, ids, max_new_tokens=self._max_new_tokens, eos_ids=self._tokenizer.eos_ids
        )
        model.train(training)
        self.step = step
        for prompt, answer in zip(self._prompts, answers, strict=True):
            text = self._tokenizer.decode(answer)
            self._log.write({"step": step, "prompt": prompt.text, "text": text})
            yield prompt.text, text


# ---- a run, read back --------------------------------------------------------------------------------------


@dataclass
class RunRecord:
    """What a run's folder tells of it; what the folder does not have is empty."""

    folder: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    steps: list[dict[str, Any]]  # the rows of metrics.jsonl that are of steps
    evaluations: list[dict[str, Any]]  # and those that are of evaluations
    samples: list[dict[str, Any]]
    memory: dict[str, Any]
    data_check: dict[str, Any]
    sanity: dict[str, Any]
    completed: bool

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.folder.resolve().name

    @property
    def last_step(self) -> int:
        """The last step that was logged; 0 if none was."""
        return self.steps[-1]["step"] if self.steps else 0

    def values(self, key: str) -> list[tuple[int, float | None]]:
        """Return (step, value) of each row that has the key."""
        rows = self.evaluations if key.startswith("eval_") else self.steps
        return [(row["step"], row[key]) for row in rows if key in row]


def read_run(folder: Path) -> RunRecord:
    """Return what the folder of a run tells, whether or not the run has come to its end.

    Raises ValueError, naming the file and its line, for a folder that is none of a run and for a damaged
    file. A last line that is still being written is left out.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; give a run's, as finetune.py prints it at the end")
    for name in ("config.yaml", "metrics.jsonl"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder}: has no {name}, so it is not the folder of a run of finetune.py")
    rows = _read_rows(folder / "metrics.jsonl")
    for number, row in enumerate(rows, start=1):
        for key, value in row.items():
            if value is not None and not isinstance(value, int | float):
                raise ValueError(f"{folder}/metrics.jsonl: line {number}: {key!r} is no number: {value!r}")
    return RunRecord(
        folder,
        _read_object(folder / "config.yaml"),
        _read_object(folder / "environment.json"),
        [row for row in rows if "loss" in row],
        [row for row in rows if "eval_loss" in row],
        [row for row in _read_rows(folder / "samples.jsonl") if {"prompt", "text"} <= row.keys()],
        _read_object(folder / "memory.json"),
        _read_object(folder / "data_check.json"),
        _read_object(folder / "sanity.json"),
        (folder / "completed").exists(),
    )


def _read_rows(path: Path) -> list[dict[str, Any]]:
    rows = []
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    for number, line in enumerate(lines, start=1):
        if not line.endswith(b"\n"):
            break
        row = _parsed(f"{path}: line {number}", line)
        if type(row.get("step")) is not int or row["step"] < 0:
            raise ValueError(f"{path}: line {number}: expected a row with its step, got {_start(line)}")
        rows.append(row)
    return rows


def _read_object(path: Path) -> dict[str, Any]:
    return _parsed(str(path), path.read_bytes()) if path.exists() else {}


def _parsed(where: str, content: bytes) -> dict[str, Any]:
    # Of NaN, infinity and numbers too large for a float nothing is left that JSON's readers agree on: None.
    try:
        text = content.decode()
        parsed = yaml.safe_load(text) if where.endswith(".yaml") else json.loads(text)
    except (ValueError, RecursionError, yaml.YAMLError):
        parsed = None
    if not isinstance(parsed, dict):
        kind = "YAML lines `name: value`" if where.endswith(".yaml") else "a JSON object"
        raise ValueError(f"{where}: expected {kind}, got {_start(content)}")
    return {key: None if _is_no_number(value) else value for key, value in parsed.items()}


def _is_no_number(value: Any) -> bool:
    return isinstance(value, int | float) and not abs(value) < 1e300


def _start(content: bytes) -> str:
    return repr(content[:40].decode(errors="replace")) + ("..." if len(content) > 40 else "")


# ---- curves ------------------------------------------------------------------------------------------------

Points = Sequence[tuple[int, float | None]]


def smoothed(points: Points) -> list[tuple[int, float | None]]:
    """Return points under a mean that remembers a fiftieth of them, but 5 of few."""
    mean = RunningMean(1 - 1 / max(5, len(points) / 50))
    return [(step, None if value is None else mean.update(value)) for step, value in points]


def thinned(points: Points) -> Points:
    """Return at most 3 points of each of `POINTS` buckets: the least, the greatest, and one that is no
    number.
    """
    if len(points) <= 2 * POINTS:
        return points
    kept = {0, len(points) - 1}
    for bucket in range(POINTS):
        places = range(bucket * len(points) // POINTS, (bucket + 1) * len(points) // POINTS)
        there = {place: value for place in places if (value := points[place][1]) is not None}
        if there:
            kept |= {min(there, key=there.__getitem__), max(there, key=there.__getitem__)}
        kept |= set([place for place in places if place not in there][:1])
    return [points[place] for place in sorted(kept)]


class Line(NamedTuple):
    """What is drawn of one quantity: a line, a faint one behind another, or dots with a line.

    The only line of a chart needs no name.
    """

    name: str
    points: Points
    color: int = 0
    style: Literal["line", "faint", "dots"] = "line"


class Drawn(NamedTuple):
    """A line as the template draws it, in thousandths of the width and height of its chart."""

    name: str
    classes: str
    path: str
    dots: str
    last: str  # the last value, as text


class Tick(NamedTuple):
    """A mark on an axis, at so many percent of its length from the left or the top."""

    place: float
    text: str


class Chart(NamedTuple):
    """A chart as the template draws it; `data` is what report.js looks hover values up in."""

    title: str
    unit: str
    wide: bool
    lines: list[Drawn]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    data: dict[str, Any]


def chart(
    title: str, unit: str, lines: Sequence[Line], *, from_zero: bool = True, wide: bool = False
) -> Chart | None:
    """Return lines over the steps of a run as a chart, None if there is no number to draw.

    from_zero: whether the axis of values begins at 0 or near the least of them.
    """
    lines = [line._replace(points=thinned(line.points)) for line in lines]
    lines = [line for line in lines if any(value is not None for _, value in line.points)]
    values = [value for line in lines for _, value in line.points if value is not None]
    if not values:
        return None
    last = max(1, *(step for line in lines for step, _ in line.points))
    marks = _ticks(min(0, *values) if from_zero else min(values), max(values))
    low, high = marks[0], marks[-1]
    drawn, data = [], []
    for line in lines:
        places = [
            (1000 * step / last, None if value is None else 1000 * (high - value) / (high - low))
            for step, value in line.points
        ]
        texts = ["not a number" if value is None else number(value) for _, value in line.points]
        kind = f"c{line.color % COLORS} {line.style}" + " dashed" * (line.color >= COLORS)
        dots = "".join(f"M{x:.1f} {y:.1f}h0" for x, y in places if y is not None)
        drawn.append(Drawn(line.name, kind, _path(places), dots * (line.style == "dots"), texts[-1]))
        heights = [None if y is None else round(y, 1) for _, y in places]
        data.append({"x": [step for step, _ in line.points], "y": heights, "text": texts})
    return Chart(
        title,
        unit,
        wide,
        drawn,
        [Tick(100 * step / last, f"{step:,.0f}") for step in _ticks(0, last, 3, whole=True) if step <= last],
        [Tick(100 * (high - mark) / (high - low), _mark(mark, marks[1] - marks[0])) for mark in marks],
        {"last": last, "lines": data},
    )


def _path(places: Sequence[tuple[float, float | None]]) -> str:
    # A gap where there is no number; a point between gaps is a line of no length, a dot with round ends.
    parts, pen_down = [], False
    for (x, y), (_, after) in zip(places, [*places[1:], (0, None)], strict=True):
        if y is not None:
            parts.append(f"{'L' if pen_down else 'M'}{x:.1f} {y:.1f}")
            parts += ["h0"] * (not pen_down and after is None)
        pen_down = y is not None
    return "".join(parts)


def _ticks(low: float, high: float, parts: int = 5, whole: bool = False) -> list[float]:
    # Round numbers, whole ones if asked, from at or below `low` to at or above `high`, with at most so many
    # parts of their range between these two.
    size = max(abs(low), abs(high))
    if size < 1e-200:
        low, high = 0.0, 1.0
    elif high - low <= 1e-9 * size:
        low, high = low - size / 10, high + size / 10
    rough = max((high - low) / parts, float(whole))
    power = 10.0 ** math.floor(math.log10(rough))
    steps = [n * power for n in (1, 2, 2.5, 5, 10) if not whole or n * power % 1 == 0]
    apart = next(step for step in steps if step >= 0.999 * rough)
    first, last = math.floor(low / apart + 1e-9), math.ceil(high / apart - 1e-9)
    return [apart * i for i in range(first, last + 1)]


def _mark(value: float, apart: float) -> str:
    # All marks of an axis with the same decimals, as many as tell them apart.
    if abs(value) < apart / 2:
        return "0"
    if not 1e-4 <= apart < 1e7:
        return f"{value:.2g}".replace("e-0", "e-").replace("e+0", "e")
    exponent = math.floor(math.log10(apart))
    decimals = max(0, -exponent + (round(apart / 10**exponent, 6) % 1 != 0))
    return f"{value:,.{decimals}f}"


def number(value: Any) -> str:
    """Return a number as a person writes it, in 4 digits that count; other values as their text."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "–" if value is None else value if isinstance(value, str) else json.dumps(value, default=str)
    if value == round(value) or abs(value) >= 1000:
        return f"{value:,.0f}" if abs(value) < 1e12 else f"{value:.3e}"
    if abs(value) < 1e-3:
        return f"{value:.3g}".replace("e-0", "e-")
    # From 1 on with its zeros, so that a value does not change its width under the pointer.
    return f"{value:#.4g}".rstrip(".") if abs(value) >= 1 else f"{value:.4g}"


# ---- the page ----------------------------------------------------------------------------------------------


class Figure(NamedTuple):
    """A number of the kind a reader came for, with its name and a note below."""

    value: str
    name: str
    note: str = ""


class Table(NamedTuple):
    """Rows of texts, the first of each its name; a head, if it has one."""

    rows: list[list[str]]
    head: Sequence[str] = ()


class Bar(NamedTuple):
    """A length in percent, its name and its value as text."""

    name: str
    percent: float
    value: str


class Sample(NamedTuple):
    """A prompt and what was answered to it: (when, text), in the order of steps."""

    prompt: str
    answers: list[tuple[str, str]]


@dataclass
class Section:
    """A part of the page; what it does not have is left out."""

    title: str
    note: str = ""
    charts: list[Chart] = field(default_factory=list)
    bars: list[Bar] = field(default_factory=list)
    table: Table | None = None
    samples: list[Sample] = field(default_factory=list)
    commands: list[tuple[str, str]] = field(default_factory=list)  # what for, and the line to type
    folded: list[tuple[str, Table]] = field(default_factory=list)  # behind a click

    def __bool__(self) -> bool:
        return bool(self.charts or self.bars or self.table or self.samples or self.commands or self.folded)


def page(
    title: str, lede: str, figures: list[Figure], warnings: list[str], sections: Sequence[Section]
) -> str:
    """Return an HTML page that needs no other file; all texts are escaped."""
    here = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(here),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = (here / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("report.html").render(
        title=title,
        lede=lede,
        figures=figures,
        warnings=warnings,
        sections=[section for section in sections if section],
        style=(here / "report.css").read_text(encoding="utf-8"),
        script=script,
        script_digest=digest,
    )


def run_page(run: RunRecord) -> str:
    """Return the page of one run."""
    given = {name: value for name, value in run.config.items() if value is not None}
    return page(
        run.name,
        f"{_what_was_trained(run)} {_how_far(run)}",
        _figures(run),
        _warnings(run),
        [
            Section("Curves", charts=_curves(run)),
            Section("Answers before and after", samples=_samples(run)),
            _memory(run),
            Section("The data", table=_table(_in_words(run.data_check))),
            _sanity(run),
            Section("What next", commands=_commands(run)),
            Section(
                "Everything else",
                folded=[
                    (name, table)
                    for name, table in [
                        ("Configuration, by the names of its options", _table(given)),
                        ("Environment and versions", _table(_flat(run.environment))),
                    ]
                    if table
                ],
            ),
        ],
    )


def _what_was_trained(run: RunRecord) -> str:
    config = run.config
    rounded = f"in {config.get('bits', 4)} bits ({str(config.get('quant_type', 'nf4')).upper()})"
    base = rounded if config.get("bits", 4) != 16 else "unquantized"
    targets = config.get("lora_target_modules") or ["all-linear"]
    layers = "all linear layers" if targets == ["all-linear"] else _listed(targets)
    data = _listed([Path(str(path)).name for path in config.get("dataset") or ["unknown data"]])
    model = Path(str(config.get("model"))).name
    return f"{model} {base}, with adapters of rank {config.get('lora_r')} on {layers}, trained on {data}."


def _listed(names: Sequence[str], shown: int = 4) -> str:
    return ", ".join(map(str, names[:shown])) + f" and {len(names) - shown} more" * (len(names) > shown)


def _how_far(run: RunRecord) -> str:
    planned = run.config.get("max_steps")
    done = f"{run.last_step:,} step" + "s" * (run.last_step != 1)
    if not run.steps:
        return "No step has been logged yet."
    if run.completed and planned and run.last_step < planned:
        return f"Ended early, after {done} of {planned:,}: the held-out loss got no better."
    if run.completed:
        return f"Completed after {done}."
    of = f" of {planned:,}" if planned else ""
    return f"Not finished: {done}{of} had been logged when this page was written."


def _figures(run: RunRecord) -> list[Figure]:
    found = []
    held_out = [value for _, value in run.values("eval_loss") if value is not None]
    if held_out:
        note = f"perplexity {number(math.exp(min(held_out[-1], 700)))}"
        if len(held_out) > 1:
            change = held_out[-1] / held_out[0] - 1 if held_out[0] else 0.0
            note = f"{number(held_out[0])} at first, {change:+.0%}".replace("-", "−")
        found.append(Figure(number(held_out[-1]), "held-out loss", note))
    losses = [value for _, value in smoothed(run.values("loss")) if value is not None]
    if losses:
        found.append(Figure(number(losses[-1]), "training loss", f"smoothed; {number(losses[0])} at first"))
    if run.steps:
        last = run.steps[-1]
        found.append(Figure(number(run.last_step), "steps", f"{number(last.get('epoch'))} epochs"))
        supervised = f"{number(last.get('supervised_tokens'))} of them supervised"
        found.append(Figure(number(last.get("num_tokens")), "tokens", supervised))
        speeds = [value for _, value in run.values("tokens_per_second") if value is not None]
        took = f"{_duration(training_seconds(run))} of training"
        found.append(Figure(number(round(statistics.median(speeds or [0]))), "tokens a second", took))
        peaks = [value for _, value in run.values("peak_memory_gib") if value is not None]
        if peaks:
            where = "resident, on the CPU" if run.environment.get("device") == "cpu" else "of device memory"
            found.append(Figure(f"{max(peaks):.2f} GiB", "peak memory", where))
    return found


def training_seconds(run: RunRecord) -> float:
    """Return how long the steps of a run took, evaluations left out."""
    seconds, before = 0.0, 0
    for row in run.steps:
        tokens, speed = row.get("num_tokens") or before, row.get("tokens_per_second")
        seconds += (tokens - before) / speed if speed else 0.0
        before = tokens
    return seconds


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def _warnings(run: RunRecord) -> list[str]:
    found = []
    bad = [step for step, value in run.values("loss") if value is None]
    if bad:
        steps = _listed([f"{step:,}" for step in bad])
        found.append(f"The loss was not a number at step{'s' * (len(bad) > 1)} {steps}.")
    if run.sanity.get("idle_adapters"):
        found.append(f"{number(run.sanity['idle_adapters'])} adapters still do nothing.")
    if run.sanity.get("skipped_steps"):
        found.append(f"{number(run.sanity['skipped_steps'])} steps were left out, being not finite.")
    return found


def _curves(run: RunRecord) -> list[Chart]:
    def lines(key: str) -> list[Line]:
        """Return one line, or if it is noisy a faint one with a mean over it."""
        points = run.values(key)
        if key not in NOISY:
            return [Line("", points)]
        return [Line("each step", points, 0, "faint"), Line("smoothed", smoothed(points))]

    losses = [*lines("loss"), Line("held out", run.values("eval_loss"), 1, "dots")]
    charts = [chart("Loss", "nats a supervised token", losses, from_zero=False, wide=True)]
    charts += [chart(title, unit, lines(key)) for title, unit, key in QUANTITIES]
    return [one for one in charts if one is not None]


# Title, unit and key of each curve but the loss.
QUANTITIES = (
    ("Learning rate", "of AdamW", "learning_rate"),
    ("Gradient norm", "before clipping", "grad_norm"),
    ("Throughput", "tokens a second", "tokens_per_second"),
    ("Peak memory", "GiB so far", "peak_memory_gib"),
)
NOISY = {"loss", "grad_norm", "tokens_per_second"}


def _samples(run: RunRecord) -> list[Sample]:
    last = max((row["step"] for row in run.samples), default=0)
    answers: dict[str, list[tuple[str, str]]] = {}
    for row in run.samples:
        when = {0: "before", last: f"after {last:,} steps"}.get(row["step"], f"step {row['step']:,}")
        answers.setdefault(str(row["prompt"]), []).append((when, str(row["text"])))
    return [Sample(prompt, texts) for prompt, texts in answers.items()]


def _memory(run: RunRecord) -> Section:
    planned, measured = run.memory.get("planned_bytes"), run.memory.get("measured_bytes")
    note = ""
    if planned and measured:
        off = f"{abs(planned / measured - 1):.0%} too {'high' if planned > measured else 'low'}"
        note = f"Planned {_gib(planned)}, measured {_gib(measured)}: the plan was {off}."
    parts = {name: size for name, size in (run.memory.get("planned") or {}).items() if size}
    return Section("Memory, planned and measured", note, bars=_bars(_in_words(parts), _gib))


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def _bars(sizes: dict[str, float], text: Callable[[float], str]) -> list[Bar]:
    largest = max(sizes.values(), default=0) or 1
    ordered = sorted(sizes.items(), key=lambda item: -item[1])
    return [Bar(name, 100 * size / largest, text(size)) for name, size in ordered]


def _sanity(run: RunRecord) -> Section:
    on, off = run.sanity.get("loss_with_adapter"), run.sanity.get("loss_without_adapter")
    note = ""
    if on is not None and off is not None:
        note = (
            f"On an example of the training data the loss is {number(on)} with the adapter and {number(off)} "
            "without it. The file was read back and holds what was trained."
        )
    norms = {
        name: norm for name, norm in (run.sanity.get("gradient_norms") or {}).items() if norm is not None
    }
    norms_note = " The bars are the norm of the last gradient, by kind of layer." if norms else ""
    return Section("The adapter", note + norms_note, bars=_bars(norms, number))


def _table(values: dict[str, Any]) -> Table | None:
    rows = [[str(name), _value(value)] for name, value in values.items()]
    return Table(rows) if rows else None


def _in_words(values: dict[str, Any]) -> dict[str, Any]:
    return {name.replace("_", " "): value for name, value in values.items()}


def _value(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_value, value)) or "–"
    return str(value).lower() if isinstance(value, bool) else number(value)


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= value if isinstance(value, dict) else {name: value}
    return flat


def _commands(run: RunRecord) -> list[tuple[str, str]]:
    folder = str(run.folder)
    commands = []
    if not run.completed and checkpoints(run.folder):
        config = str(run.folder / "config.yaml")
        words = ["scripts/finetune.py", "--config", config, "--resume_from_checkpoint", "latest"]
        commands.append(("Go on where it stopped", words))
    if (run.folder / "adapter_model.safetensors").exists():
        merged = f"{folder}-merged"
        commands.append(("Talk to it", ["scripts/chat.py", "--adapter", folder]))
        merge = ["scripts/merge.py", "--adapter", folder, "--output_dir", merged]
        commands.append(("Merge it into an ordinary model folder", merge))
    commands.append(("Compare it with another run", ["scripts/report.py", folder, "OTHER_RUN"]))
    return [(what, shlex.join(["python", *words])) for what, words in commands]


# ---- several runs ------------------------------------------------------------------------------------------


def comparison_page(runs: Sequence[RunRecord]) -> str:
    """Return a page on several runs: what came of each, what differs between them, their curves together."""
    own_names = len({run.name for run in runs}) == len(runs)
    names = [run.name if own_names else str(run.folder) for run in runs]
    head = ["", *names]
    kinds = [("Training loss", "nats a supervised token", "loss")]
    kinds += [("Held-out loss", "nats a supervised token", "eval_loss"), *QUANTITIES]
    charts = []
    for title, unit, key in kinds:
        style: Literal["line", "dots"] = "dots" if key == "eval_loss" else "line"
        lines = [
            Line(name, smoothed(run.values(key)) if key in NOISY else run.values(key), color, style)
            for color, (name, run) in enumerate(zip(names, runs, strict=True))
        ]
        is_loss = key.endswith("loss")
        unit += ", smoothed" * (key in NOISY)
        charts.append(chart(title, unit, lines, from_zero=not is_loss, wide=is_loss))
    differences = _differing([run.config for run in runs], leave_out=["output_dir"])
    surroundings = _differing([_flat(run.environment) for run in runs])
    return page(
        f"{len(runs)} runs compared",
        _listed(names, shown=8) + ".",
        [],
        [f"{name}: {text}" for name, run in zip(names, runs, strict=True) for text in _warnings(run)],
        [
            Section("What came of them", table=Table(_outcomes(runs), head)),
            Section("What differs", table=Table(differences + surroundings, head)),
            Section("Curves", charts=[one for one in charts if one is not None]),
        ],
    )


def _outcomes(runs: Sequence[RunRecord]) -> list[list[str]]:
    columns = []
    for run in runs:
        held_out = [value for _, value in run.values("eval_loss") if value is not None]
        losses = [value for _, value in smoothed(run.values("loss")) if value is not None]
        peaks = [value for _, value in run.values("peak_memory_gib") if value is not None]
        column = {
            "held-out loss, at first": number(held_out[0] if held_out else None),
            "held-out loss, at last": number(held_out[-1] if held_out else None),
            "held-out loss, best": number(min(held_out, default=None)),
            "training loss, smoothed, at last": number(losses[-1] if losses else None),
            "steps": number(run.last_step) + " (not finished)" * (not run.completed),
            "tokens": number(run.steps[-1].get("num_tokens") if run.steps else None),
            "time of training": _duration(training_seconds(run)),
            "peak memory": f"{max(peaks):.2f} GiB" if peaks else "–",
        }
        columns.append(column)
    return [[name, *(column[name] for column in columns)] for name in columns[0]]


def _differing(records: Sequence[dict[str, Any]], leave_out: Collection[str] = ()) -> list[list[str]]:
    names = dict.fromkeys(name for record in records for name in record if name not in leave_out)
    rows = [[name, *(_value(record.get(name)) for record in records)] for name in names]
    return [row for row in rows if len(set(row[1:])) > 1]


# ---- files -------------------------------------------------------------------------------------------------


def write_report(folder: Path) -> list[Path]:
    """Write `report.html` into the folder of a run, and `loss.png` if matplotlib is installed; return what
    was written. Raises ValueError as `read_run`.
    """
    run = read_run(folder)
    written = [folder / "report.html"]
    write_atomically(written[0], run_page(run).encode())
    if run.steps and find_spec("matplotlib"):
        written.append(folder / "loss.png")
        write_atomically(written[1], loss_png(run.values("loss"), run.values("eval_loss")))
    return written


def loss_png(training: Points, held_out: Points) -> bytes:
    """Return the curves of the loss as a picture, for where a page is too much. Needs matplotlib."""
    from matplotlib.figure import Figure as Canvas
    from matplotlib.ticker import MaxNLocator

    def columns(points: Points) -> tuple[list[int], list[float]]:
        points = thinned(points)
        return [step for step, _ in points], [math.nan if y is None else y for _, y in points]

    # Not through pyplot, which keeps figures and asks for a display.
    figure = Canvas(figsize=(8, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.plot(*columns(training), color="#2563a8", alpha=0.3, linewidth=1, label="training, each step")
    axes.plot(*columns(smoothed(training)), color="#2563a8", label="training, smoothed")
    if held_out:
        axes.plot(*columns(held_out), "o:", color="#b0500f", markersize=4, label="held out")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss, nats a supervised token")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=150)
    return content.getvalue()
