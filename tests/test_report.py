"""The report says what a run's files say, in whatever state it is, and no text in it is more than text."""

import base64
import hashlib
import html.parser
import io
import json
import math
import os
import re
import shutil
import signal
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from test_finetune import ROWS, adapter_bytes, examples_in, metrics, shown
from test_finetune import run as run

import finetune
import minqlora.report
import minqlora.run
import report
from minqlora.data import Example, encode_prompt
from minqlora.report import (
    POINTS,
    Line,
    RunningMean,
    _mark,
    _ticks,
    chart,
    comparison_page,
    loss_png,
    number,
    prompts_in,
    prompts_of,
    read_run,
    run_page,
    smoothed,
    thinned,
    write_report,
)
from minqlora.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
VOID = {"meta", "link", "path", "br", "img", "input"}  # elements that no tag closes; `path` closes itself


class Page(html.parser.HTMLParser):
    """A page taken apart: its text, its scripts, and the elements that are open at its end."""

    def __init__(self, text: str):
        super().__init__()
        self.text, self.scripts, self.elements, self.addresses, self.open = "", [], [], [], []  # type: ignore
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.addresses += [value for name, value in attrs if name in ("src", "href", "action", "data")]
        assert not any(name.startswith("on") for name, _ in attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag
            self.text += " "

    def handle_data(self, data: str) -> None:
        inside = self.open[-1] if self.open else ""
        if inside == "script":
            self.scripts.append(data)
        elif inside != "style":
            self.text += data

    def charts(self) -> dict[str, list[dict[str, Any]]]:
        """The lines of each chart, by its title."""
        figures = [attrs for tag, attrs in self.elements if tag == "figure"]
        titles = [attrs["aria-label"] for _, attrs in self.elements if attrs.get("role") == "img"]
        return {
            title.split(",")[0]: json.loads(figure["data-chart"])["lines"]
            for title, figure in zip(titles, figures, strict=True)
        }


def parsed(text: str) -> Page:
    page = Page(text)
    assert page.open == [], page.open
    return page


def step_row(step: int, loss: float | None, **changes: Any) -> dict[str, Any]:
    row = {"step": step, "epoch": step / 100, "loss": loss, "grad_norm": 1.5, "learning_rate": 2e-4}
    row |= {"tokens_per_second": 100.0, "num_tokens": 50 * step, "supervised_tokens": 10 * step}
    return row | {"peak_memory_gib": 1.25, "paged_bytes": 0, "eta_seconds": 3.0} | changes


def write_run(
    folder: Path, rows: list[dict[str, Any]], completed: bool = True, samples: Any = (), **config: Any
) -> Path:
    """Write the folder of a run that never was."""
    folder.mkdir(parents=True)
    settings = dict(model="models/small", dataset=["data/train.jsonl"], bits=4, quant_type="nf4", lora_r=8)
    (folder / "config.yaml").write_text(yaml.safe_dump(settings | config))
    (folder / "environment.json").write_text('{"device": "cpu", "versions": {"torch": "2.13.0"}}')
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if samples:
        (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    if completed:
        (folder / "completed").touch()
    return folder


TRAINED = [
    {"step": 0, "eval_loss": 4.0, "eval_perplexity": math.exp(4)},
    *(step_row(step, 5 - step / 10) for step in range(1, 11)),
    {"step": 10, "eval_loss": 3.0, "eval_perplexity": math.exp(3)},
]
STATES: dict[str, tuple[list[dict[str, Any]], bool, str]] = {
    "completed": (TRAINED, True, "Completed after 10 steps."),
    "ended early": (TRAINED[:8], True, "Ended early, after 7 steps of 10:"),
    "stopped or going on": (TRAINED[:5], False, "Not finished: 4 steps of 10 had been logged"),
    "one step": (TRAINED[:2], False, "Not finished: 1 step of 10 had been logged"),
    "not begun": ([], False, "No step has been logged yet."),
    "evaluated, not begun": (TRAINED[:1], False, "No step has been logged yet."),
    "no evaluation": ([step_row(1, 2.0), step_row(2, 1.0)], False, "2 steps"),
    "all values equal": ([step_row(step, 2.0) for step in (1, 2, 3)], True, "3 steps"),
    "a loss of zero": ([step_row(1, 0.0, grad_norm=0.0), step_row(2, 0.0, grad_norm=0.0)], True, "2 steps"),
    "no number": (
        [step_row(1, 2.0), step_row(2, None, grad_norm=None), step_row(3, 1.5)],
        True,
        "The loss was not a number at step 2.",
    ),
    "nothing but no numbers": ([step_row(1, None, grad_norm=None)], False, "not a number at step 1."),
}


# -- numbers -----------------------------------------------------------------------------------------------


def test_the_running_mean_is_adamws_with_its_correction_and_forgets_what_is_no_number() -> None:
    mean, values = RunningMean(0.8), [3.0, 1.0, math.nan, 4.0, math.inf, 1.5]
    got = [mean.update(value) for value in values]
    finite = [value for value in values if math.isfinite(value)]
    for count, value in zip([1, 2, 2, 3, 3, 4], got, strict=True):
        weights = [0.2 * 0.8 ** (count - 1 - i) for i in range(count)]
        by_hand = sum(w * v for w, v in zip(weights, finite, strict=False)) / (1 - 0.8**count)
        assert math.isclose(value, by_hand)
    assert math.isnan(RunningMean().mean)


@given(
    st.lists(st.one_of(st.none(), st.floats(-1e9, 1e9)), min_size=1, max_size=5000),
)
def test_thinning_keeps_ends_extremes_and_order(values: list[float | None]) -> None:
    points = list(enumerate(values))
    kept = list(thinned(points))
    assert len(kept) <= max(2 * POINTS, 3 * POINTS + 2)
    assert kept == sorted(kept, key=lambda point: point[0]) and set(kept) <= set(points)
    assert {points[0], points[-1]} <= set(kept)
    numbers = [value for value in values if value is not None]
    left = [value for _, value in kept if value is not None]
    assert not numbers or (min(left), max(left)) == (min(numbers), max(numbers))
    assert (None in values) == any(value is None for _, value in kept)


def test_a_spike_of_one_step_in_100_000_is_still_there() -> None:
    points = [(step, 2.0 + step % 7 / 100) for step in range(100_000)]
    points[77_777] = (77_777, 99.0)
    assert (77_777, 99.0) in thinned(points) and len(thinned(points)) <= 3 * POINTS
    assert all(value is not None and value < 3 for step, value in smoothed(points) if step < 77_777)


@given(st.floats(-1e200, 1e200), st.floats(0, 1e200))
def test_ticks_are_evenly_apart_and_hold_all_between_them(low: float, above: float) -> None:
    marks = _ticks(low, low + above)
    assert 2 <= len(marks) <= 7
    slack = 1e-6 * (marks[-1] - marks[0])
    assert marks[0] <= low + slack and low + above <= marks[-1] + slack
    assert marks[0] < marks[-1]


def test_marks_of_an_axis_are_round_and_told_apart() -> None:
    assert [_mark(tick, 0.25) for tick in _ticks(3.1, 4.05, 4)] == [
        "3.00",
        "3.25",
        "3.50",
        "3.75",
        "4.00",
        "4.25",
    ]
    assert [_mark(tick, 2e-5) for tick in _ticks(0, 8e-5, 4)] == ["0", "2e-5", "4e-5", "6e-5", "8e-5"]
    assert [_mark(tick, 25_000) for tick in _ticks(0, 100_000, 4, whole=True)][-1] == "100,000"
    assert [number(x) for x in (2e-4, 0.123456, 12, 1234.5, None, 3.0, "text", True)] == [
        "0.0002",
        "0.1235",
        "12",
        "1,234",
        "–",
        "3",
        "text",
        "true",
    ]


def test_a_chart_puts_points_where_their_axes_say() -> None:
    drawn = chart("Loss", "nats", [Line("a", [(0, 4.0), (5, None), (10, 2.0)]), Line("b", [(5, 0.0)])])
    assert drawn is not None
    assert [(tick.place, tick.text) for tick in drawn.y_ticks] == [
        (100, "0"),
        (75, "1"),
        (50, "2"),
        (25, "3"),
        (0, "4"),
    ]
    assert [(tick.place, tick.text) for tick in drawn.x_ticks] == [(0, "0"), (50, "5"), (100, "10")]
    # A gap where there was no number, and dots for points without neighbours.
    assert drawn.lines[0].path == "M0.0 0.0h0M1000.0 500.0h0" and drawn.lines[1].path == "M500.0 1000.0h0"
    assert drawn.data["lines"][0]["text"] == ["4", "not a number", "2"]
    assert chart("Loss", "nats", [Line("a", [(1, None)]), Line("b", [])]) is None


# -- the page ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", STATES)
def test_a_run_in_any_state_has_a_page_that_says_so(tmp_path: Path, state: str) -> None:
    rows, completed, says = STATES[state]
    page = parsed(run_page(read_run(write_run(tmp_path / "a", rows, completed, max_steps=10))))
    assert says in " ".join(page.text.split())
    drawn = {"Loss", "Learning rate", "Gradient norm", "Throughput", "Peak memory"}
    if state == "nothing but no numbers":
        drawn -= {"Loss", "Gradient norm"}
    elif "not begun" in state:
        drawn = {"Loss"} if rows else set()
    assert set(page.charts()) == drawn
    assert "nan" not in page.text.lower().split() and "None" not in page.text


def test_the_page_holds_what_the_run_left(tmp_path: Path) -> None:
    samples = [
        {"step": step, "prompt": prompt, "text": f"{prompt}, {step}"}
        for step in (0, 5, 10)
        for prompt in ("first", "second")
    ]
    folder = write_run(tmp_path / "a", TRAINED, samples=samples, learning_rate=3e-4)
    memory = {"planned": {"four-bit_weights": 2**30, "none": 0}, "planned_bytes": 2**30}
    (folder / "memory.json").write_text(json.dumps(memory | {"measured_bytes": 2**31}))
    (folder / "data_check.json").write_text('{"rows_read": 1234, "share_supervised": 0.25}')
    sanity = {"loss_with_adapter": 2.5, "loss_without_adapter": 3.5, "gradient_norms": {"q_proj": 0.75}}
    (folder / "sanity.json").write_text(json.dumps(sanity | {"idle_adapters": 2, "skipped_steps": 3}))
    (folder / "adapter_model.safetensors").touch()
    page = parsed(run_page(read_run(folder)))
    text = " ".join(page.text.split())
    for told in (
        "small in 4 bits (NF4), with adapters of rank 8 on all linear layers, trained on train.jsonl.",
        "3 4 at first, −25%",  # held-out loss
        "tokens 500 100 of them supervised",
        "1.25 GiB",
        "first before first, 0 after 10 steps first, 10",
        "on the way step 5 first, 5",
        "Planned 1.00 GiB, measured 2.00 GiB: the plan was 50% too low.",
        "four-bit weights 1.00 GiB",
        "rows read 1,234 share supervised 0.25",
        "the loss is 2.500 with the adapter and 3.500 without it",
        "q_proj 0.75",
        "2 adapters still do nothing.",
        "3 steps were left out",
        f"python scripts/chat.py --adapter {folder}",
        f"python scripts/merge.py --adapter {folder} --output_dir {folder}-merged",
        "learning_rate 0.0003",
        "torch 2.13.0",
    ):
        assert told in text
    assert "--resume_from_checkpoint" not in text  # it has come to its end
    loss = page.charts()["Loss"]
    assert [line["x"] for line in loss] == [list(range(1, 11)), list(range(1, 11)), [0, 10]]
    assert loss[2]["text"] == ["4", "3"]


def test_a_run_that_stopped_says_how_to_go_on_in_words_that_a_shell_reads(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a run; rm", TRAINED[:4], completed=False)
    (folder / "checkpoint-3").mkdir()
    text = " ".join(parsed(run_page(read_run(folder))).text.split())
    assert f"--config '{folder}/config.yaml' --resume_from_checkpoint latest" in text


HOSTILE = "</script></pre></style><script>alert(1)</script><img src=x onerror=alert(1)>'\"&amp;{{ 7 * 7 }}"


def test_no_text_is_more_than_text(tmp_path: Path) -> None:
    samples = [{"step": 0, "prompt": HOSTILE, "text": HOSTILE}]
    folder = write_run(tmp_path / "a <script>x", TRAINED, samples=samples, model=HOSTILE, seed=HOSTILE)
    (folder / "data_check.json").write_text(json.dumps({HOSTILE: HOSTILE}))
    (folder / "environment.json").write_text(json.dumps({HOSTILE: HOSTILE}))
    norms = {HOSTILE: 1.0}
    (folder / "sanity.json").write_text(json.dumps({"gradient_norms": norms, "idle_adapters": HOSTILE}))
    (folder / "memory.json").write_text(json.dumps({"planned": norms}))
    alone = read_run(folder)
    other = read_run(write_run(tmp_path / "b", TRAINED))
    for page in (parsed(run_page(alone)), parsed(comparison_page([alone, other]))):
        assert len(page.scripts) == 1 and "img" not in [tag for tag, _ in page.elements]
        assert HOSTILE in page.text


def test_the_browser_is_told_to_run_this_script_and_fetch_nothing(tmp_path: Path) -> None:
    page = parsed(run_page(read_run(write_run(tmp_path / "a", TRAINED))))
    (script,) = page.scripts
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = [attrs["content"] for _, attrs in page.elements if "http-equiv" in attrs]
    assert policy.startswith("default-src 'none';") and f"script-src 'sha256-{digest}'" in policy
    assert page.addresses == ["data:,"]
    assert not re.search(r"https?:|@import|url\(", run_page(read_run(tmp_path / "a")))


def test_100_000_steps_are_a_page_of_less_than_a_megabyte(tmp_path: Path) -> None:
    rows = [step_row(step, 3 + math.sin(step) / 3 + 100 / step) for step in range(1, 100_001)]
    folder = write_run(tmp_path / "a", [TRAINED[0], *rows])
    began = time.perf_counter()
    page = run_page(read_run(folder))
    assert len(page.encode()) < 300_000 and time.perf_counter() - began < 20


def test_the_colours_of_texts_and_curves_stand_out_in_both_modes() -> None:
    def luminance(color: str) -> float:
        # WCAG 2's relative luminance
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    def contrast(one: str, other: str) -> float:
        low, high = sorted((luminance(one), luminance(other)))
        return (high + 0.05) / (low + 0.05)

    style = (ROOT / "minqlora" / "report.css").read_text()
    light, dark, _ = [
        dict(re.findall(r"--([\w-]+): (#\w{6})", rule)) for rule in re.findall(r":root {([^}]*)}", style)
    ]
    for colors in (light, dark):
        for name in ("text", "quiet"):
            assert min(contrast(colors[name], colors[under]) for under in ("page", "tint")) > 4.5
        assert contrast(colors["warn"], colors["warn-tint"]) > 4.5
        assert all(contrast(colors[f"c{i}"], colors["page"]) > 4.5 for i in range(minqlora.report.COLORS))


def test_the_package_is_installed_with_the_files_of_its_page() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    others = {path.name for path in (ROOT / "minqlora").iterdir() if path.is_file() and path.suffix != ".py"}
    assert set(project["tool"]["setuptools"]["package-data"]["minqlora"]) == others


# -- several runs ------------------------------------------------------------------------------------------


def test_a_comparison_shows_what_differs_and_no_more(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one", TRAINED, learning_rate=1e-4, seed=0, output_dir="one", lora_r=8)
    rows = [row | ({"loss": 1.0} if "loss" in row else {"eval_loss": 2.0}) for row in TRAINED]
    two = write_run(tmp_path / "two", rows[:-4], False, learning_rate=2e-4, seed=0, output_dir="two")
    page = parsed(comparison_page([read_run(one), read_run(two)]))
    text = " ".join(page.text.split())
    assert "2 runs compared one, two." in text
    assert "learning_rate 0.0001 0.0002" in text and "seed" not in text and "output_dir" not in text
    assert "held-out loss, at last 3 2" in text and "steps 10 7 (not finished)" in text
    assert [len(lines) for lines in page.charts().values()] == [2] * 6


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path: Path) -> None:
    runs = [read_run(write_run(tmp_path / parent / "same", TRAINED)) for parent in ("x", "y")]
    assert f"{tmp_path}/x/same, {tmp_path}/y/same." in parsed(comparison_page(runs)).text


# -- the script --------------------------------------------------------------------------------------------


def call(monkeypatch: pytest.MonkeyPatch, *argv: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["report.py", *map(str, argv)])
    report.main()


def test_the_script_rebuilds_one_and_compares_several(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b", "c"):
        write_run(tmp_path / name, TRAINED)
    call(monkeypatch, "a")
    assert capsys.readouterr().out.splitlines() == ["a/report.html", "a/loss.png"]
    assert Path("a/report.html").read_text() == run_page(read_run(Path("a")))
    call(monkeypatch, "a", "--output", "elsewhere.html")
    assert Path("elsewhere.html").read_text() == Path("a/report.html").read_text()
    call(monkeypatch, "a", "b", "c")
    assert "3 runs compared" in Path("comparison.html").read_text()
    call(monkeypatch, "--runs", "a", "b", "--output", "two.html")
    assert "2 runs compared" in Path("two.html").read_text()


BAD: dict[str, tuple[dict[str, str | None], str]] = {
    "no folder": ({}, "nowhere: no such folder; give a run's"),
    "no run": ({"config.yaml": None}, "has no config.yaml, so it is not the folder of a run"),
    "no metrics": ({"metrics.jsonl": None}, "has no metrics.jsonl, so it is not the folder of a run"),
    "broken line": ({"metrics.jsonl": "{}{\n"}, "line 1: expected a JSON object, got '{}{\\n'"),
    "no step": ({"metrics.jsonl": '{"loss": 1}\n'}, "line 1: expected a row with its step, got"),
    "step below 0": ({"metrics.jsonl": '{"step": -1}\n'}, "line 1: expected a row with its step, got"),
    "text for a number": (
        {"metrics.jsonl": '{"step": 1, "loss": "x"}\n'},
        "line 1: 'loss' is no number: 'x'",
    ),
    "broken YAML": ({"config.yaml": "a: [1\n"}, "config.yaml: expected YAML lines `name: value`, got"),
    "no object": ({"memory.json": "[1]"}, "memory.json: expected a JSON object, got '[1]'"),
    "not UTF-8": ({"data_check.json": "\udcff"}, "data_check.json: expected a JSON object"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_folder_that_is_no_run_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    changes, message = BAD[kind]
    folder = write_run(tmp_path / "a", TRAINED)
    for name, content in changes.items():
        (folder / name).unlink(missing_ok=True)
        if content is not None:
            (folder / name).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(SystemExit) as stop:
        call(monkeypatch, folder if changes else "nowhere")
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line and not (folder / "report.html").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["a", "a"], "the same run is named twice among a, a"),
        (["--runs"], "--runs: expected a path, got nothing"),
        ([], "--runs: required, and not given"),
        (["a", "--output", "."], "--output .: expected a file in a folder that exists"),
        (["a", "--output", "x/y.html"], "--output x/y.html: expected a file in a folder that exists"),
    ],
)
def test_what_cannot_be_asked_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    argv: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "a", TRAINED)
    with pytest.raises(SystemExit) as stop:
        call(monkeypatch, *argv)
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and message in line


def test_a_last_line_that_is_being_written_is_left_out(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", TRAINED[:4])
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')
    assert read_run(folder).last_step == 3


def test_numbers_that_are_none_are_gaps(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", [])
    lines = [f'{{"step": {i}, "loss": {x}}}' for i, x in enumerate(["NaN", "1e999", "1" * 400, "2"])]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert read_run(folder).values("loss") == [(0, None), (1, None), (2, None), (3, 2)]
    parsed(run_page(read_run(folder)))


# -- loss.png ----------------------------------------------------------------------------------------------


def test_the_picture_shows_both_losses(tmp_path: Path) -> None:
    image = pytest.importorskip("matplotlib.image")
    record = read_run(write_run(tmp_path / "a", TRAINED))
    pixels = image.imread(io.BytesIO(loss_png(record.values("loss"), record.values("eval_loss"))))
    for color in ((0x25, 0x63, 0xA8), (0xB0, 0x50, 0x0F)):
        near = abs(pixels[..., :3] * 255 - color).max(axis=-1) < 3
        assert near.sum() > 100


def test_without_matplotlib_there_is_a_page_and_no_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(minqlora.report, "find_spec", lambda name: None)
    folder = write_run(tmp_path / "a", TRAINED)
    assert write_report(folder) == [folder / "report.html"]


# -- in the course of a run --------------------------------------------------------------------------------


def test_a_run_ends_with_its_page_and_picture(run: Callable[..., Path], capsys: Any) -> None:
    folder = run(val_size=3)
    assert "report    run/report.html" in capsys.readouterr().out
    assert (folder / "report.html").read_text() == run_page(read_run(Path("run")))
    sanity = json.loads((folder / "sanity.json").read_text())
    assert sanity["loss_with_adapter"] != sanity["loss_without_adapter"]
    assert sanity["gradient_norms"]["q_proj"] > 0
    assert sanity["idle_adapters"] == sanity["skipped_steps"] == 0


def test_a_report_that_fails_spoils_nothing(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(folder: Path) -> None:
        raise RuntimeError("no\nink")

    monkeypatch.setattr(finetune, "write_report", fail)
    folder = run()  # no exit code
    assert (folder / "completed").exists() and (folder / "adapter_model.safetensors").exists()
    line = shown(capsys.readouterr().err).strip().splitlines()[-1]
    assert line == "warning   no report: no ink; scripts/report.py run tries again"


def test_an_interrupted_run_leaves_a_page_that_says_how_to_go_on(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    accumulate = finetune.accumulate_gradients

    def interrupt(*args: Any) -> float:
        os.kill(os.getpid(), signal.SIGTERM)
        return accumulate(*args)

    monkeypatch.setattr(finetune, "accumulate_gradients", interrupt)
    with pytest.raises(SystemExit) as stop:
        run()
    assert stop.value.code == 143
    text = " ".join(parsed(Path("run/report.html").read_text()).text.split())
    assert "Not finished: 1 step of 3" in text
    assert "finetune.py --config run/config.yaml --resume_from_checkpoint latest" in text


def test_a_run_that_fails_leaves_its_page_before_its_error(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(finetune, "accumulate_gradients", lambda model, batches: math.nan)
    with pytest.raises(SystemExit) as stop:
        run()
    assert stop.value.code == 1 and "No step has been logged yet" in Path("run/report.html").read_text()
    assert shown(capsys.readouterr().err).strip().splitlines()[-1].startswith("error: step 1: loss nan")


def test_the_progress_bar_says_where_a_run_is_in_100_columns(
    run: Callable[..., Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    folder = run()
    lines = re.split(r"[\r\n]", capsys.readouterr().err)
    assert max(map(len, lines)) <= 100
    losses = [row["loss"] for row in metrics(folder)]
    mean = RunningMean()
    smooth = [mean.update(loss) for loss in losses][-1]
    (last,) = {line for line in lines if line.startswith("step 3/3") and f"{losses[-1]:.3f}" in line}
    assert re.search(
        rf"loss {losses[-1]:.3f} \(mean {smooth:.3f}\), \d+ tokens/s, \d\.\d\d GiB, 00:00 left$", last
    )
    long = finetune.step_bar(100_000, 100_000)
    row = {"loss": 12.345, "tokens_per_second": 123456, "peak_memory_gib": 79.12, "eta_seconds": 359_999}
    finetune.show_step(long, row, 12.345)
    long.close()
    (line,) = [part for part in re.split(r"[\r\n]", capsys.readouterr().err) if "99:59:59 left" in part][-1:]
    assert len(line) <= 100


# -- answers in the course of a run ------------------------------------------------------------------------


def samples(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def test_answers_before_between_and_after_change_no_bit_of_the_result(
    run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = dict(max_steps=5, lora_dropout=0.2, val_size=3)
    plain = run("plain", **flags)
    sampled = run("sampled", **flags, sample_steps=2, sample_tokens=5)
    assert adapter_bytes(plain) == adapter_bytes(sampled)
    rows = samples(sampled)
    assert [row["step"] for row in rows] == [0, 0, 2, 2, 4, 4, 5, 5]
    prompts = {row["prompt"] for row in rows}
    asked = {row["prompt"] for row in ROWS["prompt and completion"]}
    assert len(prompts) == 2 and prompts < asked
    assert "step 5: 'Spell " in capsys.readouterr().out
    assert not (plain / "samples.jsonl").exists()


def test_the_answer_at_the_end_is_that_of_the_adapter_saved(
    run: Callable[..., Path], tiny_model: Path
) -> None:
    from minqlora import generate, load_adapter, load_model

    folder = run(sample_steps=100, sample_prompts="Spell one.", sample_tokens=6, bits=16, max_steps=6)
    first, last = samples(folder)
    tokenizer = Tokenizer(tiny_model)
    model = load_model(tiny_model, quant_type=None, dtype=finetune.torch.float32)
    load_adapter(model, folder)
    prompt = encode_prompt([{"role": "user", "content": "Spell one."}], tokenizer)
    answer = list(generate(model.eval(), prompt, max_new_tokens=6, eos_ids=tokenizer.eos_ids))
    assert last == {"step": 6, "prompt": "Spell one.", "text": tokenizer.decode(answer)}
    assert first["text"] != last["text"]


def test_answers_after_a_checkpoint_are_given_again_when_a_run_goes_on(
    run: Callable[..., Path], tmp_path: Path
) -> None:
    flags = dict(save_steps=1, sample_steps=1, sample_prompts="Spell one.", sample_tokens=4)
    whole = run("whole", **flags, max_steps=4)
    again = tmp_path / "again"
    shutil.copytree(whole, again)
    (again / "completed").unlink()
    run("again", **flags, max_steps=4, resume_from_checkpoint="latest")
    assert samples(again) == samples(whole) and len(samples(whole)) == 5


def test_early_stopping_has_its_last_answers_too(run: Callable[..., Path]) -> None:
    flags = dict(learning_rate=0, val_size=3, eval_steps=1, early_stopping_patience=2, max_steps=20)
    rows = samples(run(**flags, sample_steps=5, sample_tokens=2))
    assert [row["step"] for row in rows] == [0, 0, 3, 3]


def test_prompts_of_examples_are_shown_without_what_the_template_writes(
    tiny_model: Path, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS["prompt and completion"][:3]))
    tokenizer = Tokenizer(tiny_model)
    examples, _ = examples_in(rows, tiny_model)
    found = prompts_in(examples, 5, tokenizer)
    assert sorted(prompt.text for prompt in found) == ["Spell one.", "Spell three.", "Spell two."]
    assert found == prompts_of([prompt.text for prompt in found], tokenizer)
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS["messages"][:1]))
    examples, _ = examples_in(rows, tiny_model)
    (prompt,) = prompts_in(examples, 1, tokenizer)
    assert prompt.text.startswith("<|im_start|>system\nCount.")
    ids = tokenizer.encode("A text that is learned from its beginning has no prompt.")
    (prompt,) = prompts_in([Example(ids, ids)], 1, tokenizer)
    assert prompt.input_ids == ids[:16] and prompt.text == tokenizer.decode(ids[:16])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (dict(sample_prompts="Hello"), "--sample_prompts needs --sample_steps, which says how often"),
        (dict(sample_prompts="", sample_steps=1), "--sample_prompts: expected a text, got an empty one"),
        (dict(sample_steps=0), "--sample_steps must be at least 1, got 0"),
        (dict(sample_tokens=0), "--sample_tokens must be at least 1, got 0"),
        (dict(report_to="wandb"), "--report_to wandb: the package is not installed; pip install '.[wandb]'"),
        (dict(report_to="tensorbord"), "--report_to: expected one of none, tensorboard, wandb, got"),
    ],
)
def test_what_cannot_be_sampled_or_sent_is_one_line(
    run: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.setattr(minqlora.run.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        run(**flags)
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and message in line and not Path("run").exists()


def test_none_and_something_contradict_each_other() -> None:
    with pytest.raises(ValueError, match="^--report_to none wandb: give none alone, or who is to get it$"):
        finetune.Config(Path("m"), [Path("d")], report_to=["none", "wandb"])


# -- those who show metrics elsewhere ----------------------------------------------------------------------


def test_tensorboard_has_the_numbers_of_the_metrics_after_a_resume_too(
    run: Callable[..., Path],
) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    flags = dict(report_to="tensorboard", save_steps=1, val_size=3)
    folder = run(**flags)
    (folder / "completed").unlink()
    shutil.rmtree(folder / "checkpoint-3", ignore_errors=True)
    run(**flags, resume_from_checkpoint="latest", max_steps=4)
    events = reader.EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    for name in ("loss", "eval_loss", "learning_rate"):
        ours = [(row["step"], pytest.approx(row[name])) for row in metrics(folder) if name in row]
        assert [(event.step, event.value) for event in events.Scalars(name)] == ours


class FakeWandb:
    """What of Weights & Biases is used; keeps what it is given."""

    def __init__(self) -> None:
        self.begun: list[dict[str, Any]] = []
        self.rows: list[dict[str, Any]] = []
        self.finished = 0

    def init(self, **options: Any) -> "FakeWandb":
        self.begun.append(options)
        name = f"offline-run-2026_{len(self.begun)}-{options['id'] or 'newid'}"
        (Path(options["dir"]) / "wandb" / name).mkdir(parents=True)
        return self

    def Settings(self, **options: Any) -> None:
        pass

    def define_metric(self, name: str, step_metric: str) -> None:
        assert (name, step_metric) == ("*", "step")

    def log(self, row: dict[str, Any]) -> None:
        self.rows.append(row)

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture
def fake_wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)  # type: ignore[arg-type]
    monkeypatch.setattr(minqlora.run.importlib.util, "find_spec", lambda name: "here")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return fake


def test_wandb_stays_offline_and_a_run_that_goes_on_is_the_same_run(
    run: Callable[..., Path], fake_wandb: FakeWandb, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run(report_to="wandb", save_steps=2, max_steps=3)
    assert fake_wandb.rows == metrics(folder) and fake_wandb.finished == 1
    (options,) = fake_wandb.begun
    assert options["mode"] == "offline" and options["id"] is None and options["config"]["lora_r"] == 4
    (folder / "completed").unlink()
    monkeypatch.setenv("WANDB_MODE", "online")
    run(report_to="wandb", save_steps=2, max_steps=4, resume_from_checkpoint="latest")
    again = fake_wandb.begun[1]
    assert (again["id"], again["resume"], again["mode"]) == ("newid", "allow", "online")


def test_wandb_that_does_not_start_is_one_line(
    tmp_path: Path, fake_wandb: FakeWandb, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**options: Any) -> None:
        raise RuntimeError("api_key not configured (no-tty).\nCall wandb login")

    monkeypatch.setattr(fake_wandb, "init", refuse)
    expected = r"^--report_to wandb: it does not start \(api_key not .* login\); WANDB_MODE=offline needs"
    with pytest.raises(ValueError, match=expected):
        minqlora.run.WeightsAndBiases(tmp_path, {}, None)


def test_who_fails_to_show_metrics_is_left_behind(
    run: Callable[..., Path], fake_wandb: FakeWandb, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(row: dict[str, Any]) -> None:
        raise RuntimeError("gone")

    fake_wandb.log = fail  # type: ignore[method-assign]
    assert len(metrics(run(report_to="wandb"))) == 3
    said = capsys.readouterr().err
    assert said.count("warning   WeightsAndBiases: gone; going on without it") == 1


@pytest.mark.slow
def test_the_real_wandb_writes_an_offline_run(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    folder = run(report_to="wandb")
    (kept,) = (folder / "wandb").glob("offline-run-*-*/*.wandb")
    assert kept.stat().st_size > 0 and len(metrics(folder)) == 3
