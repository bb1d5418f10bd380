"""finetune.py trains what it says, the same every time, without a network; a mistake is one clear line."""

import io
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor
from tqdm import tqdm

import finetune
from minqlora.batch import Part, collate, order, pack, split, tokenize
from minqlora.codebook import QUANT_TYPES
from minqlora.data import IGNORE, DataReport
from minqlora.lora import lora_layers
from minqlora.model import compile_blocks
from minqlora.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
SINGLE, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"

NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
ROWS: dict[str, list[dict[str, Any]]] = {
    "prompt and completion": [
        {"prompt": f"Spell {word}.", "completion": "-".join(word) * (1 + i % 3)}
        for i, word in enumerate(NUMBERS)
    ],
    "question and answer": [
        {
            "question": f"Tom has {i} apples, eats {i // 2}.",
            "answer": f"He has <<{i}-{i // 2}>>\n#### {i - i // 2}",
        }
        for i in range(12)
    ],
    "alpaca": [
        {"instruction": "Reverse.", "input": word if i % 2 else "", "output": word[::-1]}
        for i, word in enumerate(NUMBERS)
    ],
    "messages": [
        {
            "messages": [
                {"role": "system", "content": "Count."},
                {"role": "user", "content": before},
                {"role": "assistant", "content": word},
                {"role": "user", "content": word},
                {"role": "assistant", "content": after},
            ]
        }
        for before, word, after in zip(NUMBERS, NUMBERS[1:], NUMBERS[2:], strict=False)
    ],
}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def run(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., Path]]:
    """A function that trains the tiny model as the command line would and returns the run's folder.

    It works in an empty folder, on a dozen rows (`rows.jsonl`); flags of the call win over these.
    """
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", ROWS["prompt and completion"])

    def train(name: str = "run", **flags: Any) -> Path:
        given = dict(model=tiny_model, dataset="rows.jsonl", output_dir=name, dtype="float32", lora_r=4)
        given |= dict(learning_rate=0.01, gradient_accumulation_steps=4, max_steps=3, packing="false")
        given |= flags
        argv = [
            text for name, value in given.items() if value is not None for text in (f"--{name}", str(value))
        ]
        monkeypatch.setattr(sys, "argv", ["finetune.py", *argv])
        finetune.main()
        return tmp_path / name

    capsys.readouterr()  # what the fixtures printed
    yield train
    for bar in list(
        getattr(tqdm, "_instances", ())
    ):  # a run cut short leaves its bar, and the next moves down
        bar.close()


def examples_in(path: Path, model: Path) -> tuple[Part, DataReport]:
    """The examples of a file as a run without a held-out part and with seed 7 has them."""
    cache = finetune.Config(model, [path]).data_cache
    assert cache.is_relative_to(os.environ["XDG_CACHE_HOME"])
    examples, report = tokenize([path], Tokenizer(model), 1024, cache)
    return split(examples, 0, seed=7)[0], report


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def adapter(folder: Path) -> dict[str, Tensor]:
    return safetensors.torch.load_file(folder / "adapter_model.safetensors")


def adapter_bytes(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


# -- a run -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ROWS)
def test_the_loss_falls_on_rows_of_every_format(
    run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    write_rows(tmp_path / "rows.jsonl", ROWS[kind])
    sizes = dict(per_device_train_batch_size=6, gradient_accumulation_steps=1)
    folder = run(**sizes, max_steps=15, eval_dataset="rows.jsonl")
    evaluations = [row for row in metrics(folder) if "eval_loss" in row]
    assert [row["step"] for row in evaluations] == [0, 15]
    assert evaluations[1]["eval_loss"] < 0.7 * evaluations[0]["eval_loss"]
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "completed",
        "config.yaml",
        "data_check.json",
        "environment.json",
        "loss.png",
        "memory.json",
        "metrics.jsonl",
        "report.html",
        "sanity.json",
    ]
    out = capsys.readouterr().out
    assert f"{len(ROWS[kind])} of {len(ROWS[kind])} rows used (0 cut to length, 0 dropped)" in out
    assert "float32 on cpu (as asked)" in out and "saved     run" in out


def test_what_the_check_of_the_data_found_stands_in_the_run_folder(
    run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(tmp_path / "held.jsonl", ROWS["prompt and completion"][:2])
    folder = run(max_steps=1, eval_dataset="held.jsonl")
    found = json.loads((folder / "data_check.json").read_text())
    assert (found["rows"], found["used"], found["empty"], found["beyond"]) == (12, 12, 0, 0)
    assert (found["held_out"], found["held_out_rows"], found["held_out_also_learned"]) == (2, 2, 2)
    said = capsys.readouterr()
    assert "end token learned in 12 of 12" in said.out
    assert "warning   2 of 2 held-out examples are learned from" in said.err


def test_inspecting_shows_examples_and_leaves_nothing(
    run: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(finetune, "load_model", None)
    run(inspect=2)
    out = capsys.readouterr().out
    assert out.count("\nexample ") == 2 == out.count("\n[[") and "|<|im_end|>|]]" in out and "\x1b" not in out
    assert "12 of 12 rows used" in out and not (tmp_path / "run").exists()
    # Even where a run would be refused: that is when one wants to look.
    write_rows(tmp_path / "rows.jsonl", [*ROWS["alpaca"], *[ROWS["alpaca"][0] | {"output": ""}] * 12])
    run(inspect=99)
    assert capsys.readouterr().out.count("\nexample ") == 12


def test_a_terminal_of_few_characters_is_no_reason_to_stop(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    run(inspect=1)
    sys.stdout.flush()
    assert b"12 of 12 rows used" in written.getvalue() and b"\n[[" in written.getvalue()


@pytest.mark.parametrize(("no_color", "coloured"), [("", True), ("1", False)])
def test_on_a_terminal_what_is_learned_is_green_unless_that_is_unwanted(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: Any, no_color: str, coloured: bool
) -> None:
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    run(inspect=1)
    assert ("\x1b[32m" in capsys.readouterr().out) == coloured


def test_rows_without_an_answer_may_be_allowed(run: Callable[..., Path], tmp_path: Path, capsys: Any) -> None:
    rows = [*ROWS["alpaca"], *[ROWS["alpaca"][0] | {"output": ""}] * 12]
    write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(SystemExit):
        run()
    assert "12 of 24 rows (50%) would be lost" in capsys.readouterr().err
    run(allow_dropped="true", max_steps=1)
    assert "12 of 24 rows used (0 cut to length, 12 dropped: 12 without an answer)" in capsys.readouterr().out


def test_raw_text_is_learned_and_so_are_prompts_if_asked(run: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("".join(f"the line {i}\n" for i in range(100)))
    flags: dict[str, Any] = dict(per_device_train_batch_size=4, gradient_accumulation_steps=1, max_steps=12)
    folder = run("text", **flags, dataset="book.txt", eval_dataset="book.txt", max_seq_length=64)
    first, *_, last = [row["eval_loss"] for row in metrics(folder) if "eval_loss" in row]
    assert last < 0.7 * first
    found = json.loads((folder / "data_check.json").read_text())
    assert found["rows"] == 1 and found["examples"] > 15 and found["supervised_share"] > 0.95
    answers, all_tokens = (
        json.loads(
            (run(name, max_steps=1, train_on_source=name).parent / name / "data_check.json").read_text()
        )
        for name in ("false", "true")
    )
    assert (
        answers["tokens"] == all_tokens["tokens"] == all_tokens["supervised"] + 12 > 2 * answers["supervised"]
    )


def test_a_conversion_in_the_script_is_what_is_learned(
    run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    write_rows(tmp_path / "rows.jsonl", [{"title": f"T {i}", "body": "B"} for i in range(12)])
    monkeypatch.setattr(finetune, "convert", lambda row: {"prompt": row["title"], "completion": row["body"]})
    run(inspect=1)
    assert "[[B|<|im_end|>|]]" in capsys.readouterr().out


def test_every_row_of_the_metrics_has_the_documented_keys(run: Callable[..., Path]) -> None:
    rows = metrics(run(val_size=4, eval_steps=2, max_steps=5))
    training = "step epoch loss grad_norm learning_rate tokens_per_second num_tokens supervised_tokens"
    training += " peak_memory_gib paged_bytes eta_seconds"
    evaluation = "step eval_loss eval_perplexity"
    kinds = [" ".join(row) for row in rows]
    assert kinds[0] == evaluation  # before the first step
    assert kinds.count(training) == 5 and kinds.count(evaluation) == 4 and len(kinds) == 9
    assert [row["step"] for row in rows] == [0, 1, 2, 2, 3, 4, 4, 5, 5]
    assert all(
        isinstance(value, int | float) and math.isfinite(value) for row in rows for value in row.values()
    )
    steps = [row for row in rows if "loss" in row]
    assert [row["eta_seconds"] > 0 for row in steps] == [True] * 4 + [False]
    assert all(row["tokens_per_second"] > 0 and 0.05 < row["peak_memory_gib"] < 100 for row in steps)
    assert all(math.isclose(math.exp(r["eval_loss"]), r["eval_perplexity"]) for r in rows if "eval_loss" in r)


def test_an_epoch_counts_every_token_once(run: Callable[..., Path], tmp_path: Path, tiny_model: Path) -> None:
    _, report = examples_in(tmp_path / "rows.jsonl", tiny_model)
    flags = dict(max_steps=None, gradient_accumulation_steps=5, per_device_train_batch_size=1)
    rows = metrics(run(**flags, num_train_epochs=2))
    assert [row["epoch"] for row in rows] == [0.4167, 0.8333, 1.0, 1.4167, 1.8333, 2.0]
    assert rows[2]["num_tokens"] == report.tokens and rows[-1]["num_tokens"] == 2 * report.tokens
    assert rows[-1]["supervised_tokens"] == 2 * report.supervised
    assert len(metrics(run("half", **flags, num_train_epochs=0.5))) == 2  # of three steps, rounded up


@pytest.mark.parametrize("packing", [False, True])
def test_every_epoch_visits_every_example_in_another_order(
    tiny_model: Path, tmp_path: Path, packing: bool
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", ROWS["alpaca"])
    examples, _ = examples_in(path, tiny_model)
    sizes = dict(per_device_train_batch_size=2, gradient_accumulation_steps=3 - packing)
    config = finetune.Config(tiny_model, [path], packing=packing, max_seq_length=100, **sizes)  # type: ignore[arg-type]
    steps = finetune.step_places(examples, config)
    epochs: list[list[int]] = []
    seen = 0.0
    for _ in range(2):
        places: list[int] = []
        while seen < len(epochs) + 1:
            seen, micro_batches = next(steps)
            assert len(micro_batches) <= 3 - packing
            assert all(len(one) == 2 or packing for one in micro_batches)
            assert all(sum(examples.lengths(one)) <= 200 for one in micro_batches)
            places += sum(micro_batches, [])
        assert seen == len(epochs) + 1 and sorted(places) == list(range(12))
        epochs.append(places)
    assert epochs[0] != epochs[1]


def loss_in_transformers(model_folder: Path, rows: Path) -> float:
    """The oracle: the mean loss of all answers' tokens, each example alone, all logits at once."""
    from transformers import LlamaForCausalLM

    theirs = LlamaForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    examples, report = examples_in(rows, model_folder)
    total = 0.0
    for example in examples:
        with torch.no_grad():
            logits = theirs(torch.tensor([example.input_ids])).logits[0, :-1]
        labels = torch.tensor(example.labels[1:])
        total += F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum").item()
    return total / report.supervised


def test_the_loss_is_the_mean_over_answer_tokens_whatever_the_micro_batches(
    run: Callable[..., Path], tiny_model: Path, tmp_path: Path
) -> None:
    expected = loss_in_transformers(tiny_model, tmp_path / "rows.jsonl")
    for size, count in [(1, 12), (5, 3), (12, 1)]:
        flags = dict(
            per_device_train_batch_size=size, gradient_accumulation_steps=count, max_steps=1, bits=16
        )
        first, step, _ = metrics(run(f"run-{size}", **flags, eval_dataset="rows.jsonl"))
        # The adapters begin at zero: before the first step the model is the base.
        assert math.isclose(first["eval_loss"], expected, rel_tol=1e-5)
        assert math.isclose(step["loss"], expected, rel_tol=1e-5)


def test_four_micro_batches_of_one_equal_one_of_four(run: Callable[..., Path]) -> None:
    one = adapter(
        run("one", per_device_train_batch_size=1, gradient_accumulation_steps=4, learning_rate=1e-3)
    )
    four = adapter(
        run("four", per_device_train_batch_size=4, gradient_accumulation_steps=1, learning_rate=1e-3)
    )
    assert one.keys() == four.keys()
    for name in one:
        torch.testing.assert_close(one[name], four[name], rtol=0, atol=1e-5)
    assert any((tensor != 0).any() for name, tensor in one.items() if "lora_B" in name)


def gradients(model: Any, batches: list[Any]) -> tuple[float, dict[str, Tensor]]:
    """The loss of an optimizer step, and the gradient it leaves."""
    model.zero_grad()
    loss = finetune.accumulate_gradients(model, batches)
    return loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(params=[4, 16], ids=["nf4", "unquantized"])
def moved_model(request: Any, run: Any, tiny_model: Path, tmp_path: Path) -> tuple[Any, Part]:
    """A model whose adapters do something, in float32, and the dozen examples."""
    config = finetune.Config(
        tiny_model, [tmp_path / "rows.jsonl"], dtype="float32", bits=request.param, lora_r=4
    )
    prepared = finetune.prepare(config)
    for layer in lora_layers(prepared.model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.1, generator=torch.Generator().manual_seed(layer.r))
    return prepared.model, prepared.train


def assert_same_gradients(ours: tuple[float, dict[str, Tensor]], theirs: Any) -> None:
    """To 1e-5 of the largest."""
    assert math.isclose(ours[0], theirs[0], rel_tol=1e-5) and len(ours[1]) == 28
    for name, gradient in theirs[1].items():
        largest = gradient.abs().max().item()
        assert largest > 0
        torch.testing.assert_close(ours[1][name], gradient, rtol=0, atol=1e-5 * largest)


def test_packed_rows_have_the_loss_and_gradients_of_their_examples_alone(
    moved_model: tuple[Any, Part],
) -> None:
    model, examples = moved_model
    rows = list(pack(examples, 130, seed=0, epoch=0))
    assert 2 <= len(rows) < 6 and max(map(len, rows)) > 2
    packed = gradients(model, [collate([examples[place] for place in row]) for row in rows])
    alone = gradients(model, [collate([example]) for example in examples])
    assert_same_gradients(packed, alone)


@pytest.mark.parametrize("k", [2, 3, 5])
def test_k_micro_batches_have_the_loss_and_gradient_of_one(moved_model: tuple[Any, Part], k: int) -> None:
    model, examples = moved_model
    whole = gradients(model, [collate(list(examples))])
    size = math.ceil(12 / k)  # the last of five is smaller
    parts = [
        collate([examples[i] for i in range(start, min(start + size, 12))]) for start in range(0, 12, size)
    ]
    assert len(parts) in (k, k - 1) and len({batch.supervised for batch in parts}) > 1
    assert_same_gradients(gradients(model, parts), whole)


def test_gradient_checkpointing_trains_the_same_adapter(run: Callable[..., Path]) -> None:
    flags = dict(lora_dropout=0.1)
    with_it = run("with", **flags, gradient_checkpointing="true")
    assert adapter_bytes(with_it) == adapter_bytes(run("without", **flags, gradient_checkpointing="false"))


def test_three_steps_are_those_of_peft_and_torchs_adamw(
    run: Callable[..., Path], tiny_model: Path, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    flags: dict[str, Any] = dict(bits=16, lora_alpha=8, seed=7, per_device_train_batch_size=2)
    flags |= dict(gradient_accumulation_steps=2, learning_rate=1e-3, lr_scheduler_type="linear", max_steps=3)
    flags |= dict(max_grad_norm=0.5, adam_beta2=0.9, weight_decay=0.1)
    ours = run("ours", **flags)
    start = run("start", **flags | dict(learning_rate=0, max_steps=1))  # the adapters as they were drawn

    base = LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, start, is_trainable=True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, betas=(0.9, 0.9), weight_decay=0.1)
    examples, _ = examples_in(tmp_path / "rows.jsonl", tiny_model)
    places = list(order(12, seed=7, epoch=0))
    for step in range(3):
        chosen = [examples[i] for i in places[4 * step : 4 * step + 4]]
        learned = sum(label != IGNORE for example in chosen for label in example.labels[1:])
        losses = []
        for example in chosen:
            logits = model(torch.tensor([example.input_ids])).logits[0, :-1]
            labels = torch.tensor(example.labels[1:])
            losses.append(F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum"))
        loss = torch.stack(losses).sum() / learned
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, 0.5)
        row = metrics(ours)[step]
        assert math.isclose(row["loss"], loss.item(), rel_tol=1e-5)
        assert math.isclose(row["grad_norm"], norm.item(), rel_tol=1e-4) and norm > 0.5
        optimizer.param_groups[0]["lr"] = 1e-3 * (1, 2 / 3, 1 / 3)[step]
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path / "theirs")
    ours_now, theirs_now, before = adapter(ours), adapter(tmp_path / "theirs"), adapter(start)
    for name in theirs_now:
        torch.testing.assert_close(ours_now[name], theirs_now[name], rtol=0, atol=2e-5)
    # Two steps of up to 1e-3: far more than the tolerance.
    assert max((ours_now[name] - before[name]).abs().max() for name in before) > 1e-3


# -- the same again ----------------------------------------------------------------------------------------


def test_the_same_seed_makes_the_same_adapter_to_the_byte(run: Callable[..., Path]) -> None:
    flags = dict(lora_dropout=0.1, val_size=3, per_device_train_batch_size=2)
    one = run("one", **flags)
    # Whatever was drawn in between: the seed is set, not continued.
    torch.rand(17)
    two = run("two", **flags)
    assert adapter_bytes(one) == adapter_bytes(two)
    forgetful = ("tokens_per_second", "eta_seconds", "peak_memory_gib")
    rows = [[{k: v for k, v in row.items() if k not in forgetful} for row in metrics(f)] for f in (one, two)]
    assert rows[0] == rows[1]
    assert adapter_bytes(run("other", **flags, seed=1)) != adapter_bytes(one)


def test_evaluation_does_not_change_what_is_trained(run: Callable[..., Path], tmp_path: Path) -> None:
    shutil.copy(tmp_path / "rows.jsonl", tmp_path / "heldout.jsonl")
    plain = run("plain", lora_dropout=0.1)
    watched = run("watched", lora_dropout=0.1, eval_dataset="heldout.jsonl", eval_steps=1)
    assert adapter_bytes(plain) == adapter_bytes(watched)


def test_a_runs_config_reproduces_it(run: Callable[..., Path], tiny_model: Path) -> None:
    one = run("one", val_size=0.25, lora_target_modules="q_proj", warmup_steps=1, lr_scheduler_type="cosine")
    config = yaml.safe_load((one / "config.yaml").read_text())
    assert list(config) == [field.name for field in fields(finetune.Config)]
    assert config["learning_rate"] == 0.01 and config["output_dir"] == "one"
    unset = dict.fromkeys(["model", "dataset", "dtype", "lora_r", "learning_rate", "max_steps"])
    two = run("two", **unset, gradient_accumulation_steps=None, config=one / "config.yaml")
    assert adapter_bytes(one) == adapter_bytes(two)
    again = yaml.safe_load((two / "config.yaml").read_text())
    assert again == config | {"output_dir": "two"}


def test_runs_without_a_folder_are_numbered_after_the_model(run: Callable[..., Path], tmp_path: Path) -> None:
    for _ in range(2):
        run(output_dir=None, max_steps=1)
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["tiny-1", "tiny-2"]


def test_of_two_runs_at_once_only_one_gets_a_folder(
    run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = finetune.load_model

    def load_while_another_starts(*args: Any, **kwargs: Any) -> Any:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "config.yaml").write_text("theirs")
        return load(*args, **kwargs)

    monkeypatch.setattr(finetune, "load_model", load_while_another_starts)
    with pytest.raises(SystemExit):
        run()
    assert (tmp_path / "run" / "config.yaml").read_text() == "theirs"


# -- schedules ---------------------------------------------------------------------------------------------


def rates(schedule: str, warmup: int, steps: int) -> list[float]:
    config = finetune.Config(Path("m"), [Path("d")], lr_scheduler_type=schedule, warmup_steps=warmup)  # type: ignore[arg-type]
    return [finetune.rate_factor(config, steps, step) for step in range(steps)]


def test_the_learning_rate_rises_to_its_peak_and_follows_its_schedule() -> None:
    assert rates("constant", 0, 3) == [1.0, 1.0, 1.0]
    assert rates("constant", 3, 5) == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates("linear", 0, 4) == [1.0, 0.75, 0.5, 0.25]
    assert rates("linear", 1, 5) == [0.5, 1.0, 0.75, 0.5, 0.25]
    assert rates("cosine", 0, 4) == pytest.approx([1.0, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5])
    assert rates("cosine", 2, 6)[2:] == pytest.approx(rates("cosine", 0, 4))
    assert rates("cosine", 9, 3) == pytest.approx([0.1, 0.2, 0.3])  # shorter than its warmup


def test_a_warmup_is_so_many_steps_or_a_share_of_all() -> None:
    def factors(**options: Any) -> list[float]:
        config = finetune.Config(Path("m"), [Path("d")], **options)
        return [finetune.rate_factor(config, 10, step) for step in range(10)]

    assert factors(warmup_ratio=0.25) == factors(warmup_steps=3) == [0.25, 0.5, 0.75] + [1.0] * 7
    assert factors(warmup_ratio=0.25, warmup_steps=1) == factors(warmup_steps=1)
    with pytest.raises(ValueError, match=r"--warmup_ratio must be in \[0, 1\), got 1.0"):
        factors(warmup_ratio=1.0)


def test_the_schedule_is_what_the_optimizer_gets(run: Callable[..., Path]) -> None:
    rows = metrics(run(learning_rate=0.01, warmup_steps=1, lr_scheduler_type="linear", max_steps=5))
    assert [row["learning_rate"] for row in rows] == pytest.approx([0.005, 0.01, 0.0075, 0.005, 0.0025])


# -- what is printed ---------------------------------------------------------------------------------------


def test_the_demos_bits_per_parameter_are_printed_at_load(
    demo_model: Path, docstrings: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = finetune.Config(
        demo_model, [docstrings[1]], output_dir=tmp_path / "run", lora_r=1, dtype="float32"
    )
    capsys.readouterr()
    prepared = finetune.prepare(config)
    out = capsys.readouterr().out
    # All but embeddings and norms: 210 matrices. 106,168,320 * 4.127 / 8 bytes = 54.8 MB.
    assert "106,168,320 of 134,515,008 parameters in NF4, 4.127 bits each (54.8 MB)" in out
    assert "rank 1 on 210 layers" in out
    assert len(prepared.train) > 300 and len(prepared.held_out) == prepared.n_held_out == 0


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_every_quant_type_trains_and_says_whether_it_can_be_saved(
    run: Callable[..., Path], capsys: pytest.CaptureFixture[str], quant_type: str
) -> None:
    folder = run(quant_type=quant_type, eval_dataset="rows.jsonl", max_steps=8, per_device_train_batch_size=3)
    first, *_, last = [row["eval_loss"] for row in metrics(folder) if "eval_loss" in row]
    assert last < first
    out = capsys.readouterr().out
    bits = 8 if quant_type in ("nf5", "nf6", "nf7", "nf8") else 4
    assert f" parameters in {quant_type.upper()}, {bits}." in out
    assert (f"{quant_type} is for comparison" in out) == (quant_type not in ("nf4", "fp4"))
    assert f"quant_type: {quant_type}\n" in (folder / "config.yaml").read_text()


def test_another_quant_type_is_one_line_with_the_nearest(run: Callable[..., Path], capsys: Any) -> None:
    with pytest.raises(SystemExit) as stop:
        run(quant_type="nf9")
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--quant_type" in line and "nf9" in line and "nf8" in line


def test_options_reach_what_they_are_for(
    run: Callable[..., Path], tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, quantization = [tmp_path / "rows.jsonl"], dict(double_quant=False, block_size=32)
    adapters = dict(lora_r=3, lora_alpha=5.0, lora_dropout=0.25, lora_target_modules=["q_proj"])
    data = dict(val_size=5, max_eval_samples=2, max_seq_length=40)
    options: dict[str, Any] = quantization | adapters | data
    config = finetune.Config(tiny_model, rows, dtype="bfloat16", gradient_checkpointing="false", **options)
    prepared = finetune.prepare(config)
    model, train, held_out = prepared.model, prepared.train, prepared.held_out
    weight, layers = model.model.layers[0].mlp.up_proj.weight, lora_layers(model)
    assert (weight.format.block_size, weight.absmax_codes, model.compute_dtype) == (32, None, torch.bfloat16)
    assert list(layers) == [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    assert {(layer.r, layer.alpha, layer.dropout.p) for layer in layers.values()} == {(3, 5.0, 0.25)}
    assert (len(train), len(held_out), prepared.n_held_out) == (7, 5, 2)
    assert prepared.folder == Path("runs/tiny-1")
    assert max(len(example.input_ids) for example in train) <= 40
    assert not model.model.gradient_checkpointing
    out = capsys.readouterr().out
    assert "5.008 bits each" in out  # 4 + 32 / 32, and the codebook: 61,440 parameters share its 64 bytes
    assert "bfloat16 on cpu (as asked)" in out and "(0 cut to length" not in out
    model = finetune.prepare(finetune.Config(tiny_model, rows, bits=16)).model
    assert model.model.gradient_checkpointing
    assert model.model.layers[0].mlp.up_proj.weight.dtype == model.compute_dtype
    out = capsys.readouterr().out
    assert "95,936 parameters, none quantized" in out and "what this hardware does well" in out


def test_the_result_of_training_lies_on_the_linears_of_the_blocks_alone(
    run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run()
    assert "rank 4 on 14 layers: " in capsys.readouterr().out
    assert len(adapter(folder)) == 28 and not any("lm_head" in name for name in adapter(folder))
    numbers = sum(tensor.numel() for tensor in adapter(folder).values())
    run("again")
    assert f"{numbers:,} parameters to train" in capsys.readouterr().out


def test_the_environment_is_written_down(run: Callable[..., Path]) -> None:
    environment = json.loads((run() / "environment.json").read_text())
    assert environment["compute_dtype"] == "float32" and environment["device"] == "cpu"
    assert environment["versions"]["torch"] == torch.__version__


# -- the real command, no network --------------------------------------------------------------------------

BLOCKED = """
import sys

def refuse(event, arguments):
    if event.startswith("socket."):
        raise PermissionError(f"{event} {arguments}: there is no network here")

sys.addaudithook(refuse)
sys.path.insert(0, "scripts")
import finetune

finetune.main()
import socket

for attempt in (socket.socket, lambda: socket.getaddrinfo("localhost", 80)):
    try:
        attempt()
    except PermissionError:
        print("blocked")
"""


def test_ten_steps_need_no_network(tiny_model: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", ROWS["question and answer"])
    command = [sys.executable, "-c", BLOCKED, "--model", str(tiny_model), "--dataset", str(rows)]
    command += [
        "--max_steps",
        "10",
        "--gradient_accumulation_steps",
        "1",
        "--output_dir",
        str(tmp_path / "run"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "completed").exists() and len(metrics(tmp_path / "run")) == 10
    assert done.stdout.endswith("blocked\nblocked\n")  # the block was there until the end


@pytest.mark.parametrize(
    ("environment", "flags", "message"),
    [
        ({"WORLD_SIZE": "2"}, [], "WORLD_SIZE is 2, but training runs on one device"),
        (
            {},
            ["--learning_rat", "1"],
            "--learning_rat: there is no such option; did you mean --learning_rate?",
        ),
    ],
    ids=["world-size", "unknown-flag"],
)
def test_the_real_command_refuses_in_one_line_with_code_2(
    tiny_model: Path, tmp_path: Path, environment: dict[str, str], flags: list[str], message: str
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", ROWS["alpaca"])
    command = [sys.executable, str(ROOT / "scripts/finetune.py"), "--model", str(tiny_model)]
    done = subprocess.run(
        [*command, "--dataset", str(rows), *flags],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {message}") and done.stderr.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl"]


@pytest.mark.slow  # half a minute
def test_the_demos_training_stays_below_a_gigabyte_and_a_half(
    demo_model: Path, docstrings: tuple[Path, Path], tmp_path: Path
) -> None:
    rows = run_demo(tmp_path / "run", "--max_steps", "4", "--max_eval_samples", "16")
    peak = max(row["peak_memory_gib"] for row in rows if "loss" in row)
    assert 0.3 < peak * 2**30 / 1e9 <= 1.5


def run_demo(folder: Path, *flags: str) -> list[dict[str, Any]]:
    """Train on the demo's data in a process of its own; return the metrics."""
    command = [sys.executable, "scripts/finetune.py", "--config", "scripts/configs/demo.yaml"]
    subprocess.run([*command, "--output_dir", str(folder), *flags], cwd=ROOT, check=True, capture_output=True)
    return metrics(folder)


@pytest.mark.slow  # two minutes
def test_moments_of_8_bits_reach_the_loss_of_32(
    demo_model: Path, docstrings: tuple[Path, Path], tmp_path: Path
) -> None:
    flags = ["--max_steps", "20", "--max_eval_samples", "32"]
    wide = run_demo(tmp_path / "wide", *flags, "--optim", "paged_adamw_32bit")
    narrow = run_demo(tmp_path / "narrow", *flags, "--optim", "paged_adamw_8bit")
    assert wide[-1]["eval_loss"] < 0.8 * wide[0]["eval_loss"]
    assert narrow[-1]["eval_loss"] == pytest.approx(wide[-1]["eval_loss"], rel=0.01)


@pytest.mark.slow  # a minute
def test_memory_does_not_grow_over_a_thousand_steps(tiny_model: Path, tmp_path: Path) -> None:
    lengths = [3 + 7 * i % 60 for i in range(300)]
    rows = [{"prompt": f"Count {n}.", "completion": " ".join(["one"] * n)} for n in lengths]
    write_rows(tmp_path / "rows.jsonl", rows)
    command = [sys.executable, "scripts/finetune.py", "--model", str(tiny_model), "--packing", "false"]
    command += ["--dataset", str(tmp_path / "rows.jsonl"), "--output_dir", str(tmp_path / "run")]
    command += ["--max_steps", "1000", "--gradient_accumulation_steps", "2", "--dtype", "float32"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    peaks = {row["step"]: row["peak_memory_gib"] for row in metrics(tmp_path / "run") if "loss" in row}
    assert peaks[1000] < 1.02 * peaks[100]


# -- what goes wrong on the way ----------------------------------------------------------------------------


@pytest.fixture
def broken_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss that is no number from the second step on."""
    loss, calls = finetune.supervised_loss, []

    def break_later(*args: Any) -> Tensor:
        calls.append(1)
        return loss(*args) * (math.nan if len(calls) > 6 else 1)

    monkeypatch.setattr(finetune, "supervised_loss", break_later)


def test_a_loss_that_is_no_number_stops_the_run_with_code_1(
    run: Callable[..., Path], tmp_path: Path, broken_loss: None, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        run()
    assert stop.value.code == 1
    assert "error: step 2: loss nan" in capsys.readouterr().err
    assert len(metrics(tmp_path / "run")) == 1
    held = {path.name for path in (tmp_path / "run").iterdir()}
    assert not {"completed", "adapter_model.safetensors"} & held


def test_the_error_of_a_run_begins_a_line(
    run: Callable[..., Path], broken_loss: None, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run()
    assert "\nerror: step 2" in "\n" + shown(capsys.readouterr().err)


# -- what is refused: one line that names the place, code 2, nothing left behind ---------------------------


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / CONFIG).read_text()) | changes
    (folder / CONFIG).write_text(json.dumps(config))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = safetensors.torch.load_file(folder / SINGLE)
    change(tensors)
    safetensors.torch.save_file(tensors, folder / SINGLE, metadata={"format": "pt"})


def truncate(path: Path, share: float) -> None:
    os.truncate(path, int(share * path.stat().st_size))


def edit_index(folder: Path, **changes: str) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] |= changes
    (folder / INDEX).write_text(json.dumps(index))


def add_line(line: str) -> Callable[[Path], None]:
    """Put a line after the dozen good ones: line 13."""

    def add(folder: Path) -> None:
        with open("rows.jsonl", "a") as file:
            file.write(line + "\n")

    return add


WEIGHT = "model.layers.1.mlp.up_proj.weight"
FIRST = "model-00001-of-00004.safetensors"
# What is done to a copy of the model (`model/`) beside `rows.jsonl`, flags, and what the line must name.
Case = tuple[Callable[[Path], Any], list[str], list[str]]

MISTAKES: dict[str, Case] = {
    "no config.json": (
        lambda m: (m / CONFIG).unlink(),
        [],
        ["model/config.json: not found", "holds config.json"],
    ),
    "broken config.json": (lambda m: truncate(m / CONFIG, 0.5), [], ["model/config.json: not valid JSON"]),
    "unsupported model_type": (
        lambda m: edit_config(m, model_type="mamba"),
        [],
        ["model/config.json: model_type 'mamba' is not supported", "supported: llama"],
    ),
    "unsupported rotary kind": (
        lambda m: edit_config(m, rope_parameters={"rope_type": "spiral"}),
        [],
        ["model/config.json", "'spiral'"],
    ),
    "no weights": (lambda m: (m / SINGLE).unlink(), [], ["model: holds neither model.safetensors nor"]),
    "no tokenizer.json": (lambda m: (m / "tokenizer.json").unlink(), [], ["model/tokenizer.json: not found"]),
    "broken tokenizer.json": (
        lambda m: truncate(m / "tokenizer.json", 0.5),
        [],
        ["model/tokenizer.json: not a tokenizer"],
    ),
    "empty weights": (
        lambda m: truncate(m / SINGLE, 0),
        [],
        ["model/model.safetensors: damaged or cut off (0 "],
    ),
    "header cut": (
        lambda m: os.truncate(m / SINGLE, 7),
        [],
        ["model.safetensors: damaged or cut off (7 bytes"],
    ),
    "names cut": (
        lambda m: os.truncate(m / SINGLE, 99),
        [],
        ["model.safetensors: damaged or cut off (99 bytes"],
    ),
    "half of the weights": (
        lambda m: truncate(m / SINGLE, 0.5),
        [],
        ["model.safetensors: damaged or cut off", "download it again"],
    ),
    "last byte cut": (
        lambda m: os.truncate(m / SINGLE, (m / SINGLE).stat().st_size - 1),
        [],
        ["model.safetensors: damaged or cut off", "download it again"],
    ),
    "missing tensor": (
        lambda m: edit_tensors(m, lambda t: t.pop(WEIGHT)),
        [],
        ["model: 1 of 21 tensors missing", WEIGHT],
    ),
    "tensor of another shape": (
        lambda m: edit_tensors(m, lambda t: t.update({WEIGHT: torch.ones(3, 5)})),
        [],
        ["model/model.safetensors", WEIGHT, "(3, 5)", "config.json asks for (96, 64)"],
    ),
    "integer tensor": (
        lambda m: edit_tensors(m, lambda t: t.update({WEIGHT: t[WEIGHT].to(torch.int8)})),
        [],
        ["model/model.safetensors", WEIGHT, "int8", "expected float32, float16 or bfloat16"],
    ),
    "NaN in a weight": (
        lambda m: edit_tensors(m, lambda t: t[WEIGHT].__setitem__((2, 3), math.nan)),
        [],
        ["model/model.safetensors", WEIGHT, "nan", "(2, 3)"],
    ),
    "no such dataset": (lambda m: None, ["--dataset", "nowhere.jsonl"], ["nowhere.jsonl: no such file"]),
    "broken line": (add_line('{"prompt": "Q", '), [], ["rows.jsonl: line 13: not valid JSON"]),
    "answer missing": (add_line('{"prompt": "Q"}'), [], ["rows.jsonl: line 13", "'completion' is missing"]),
    "answer null": (
        add_line('{"prompt": "Q", "completion": null}'),
        [],
        ["rows.jsonl: line 13", "'completion' must be text, got null"],
    ),
    "answer no text": (
        add_line('{"question": "Q", "answer": 42}'),
        [],
        ["rows.jsonl: line 13", "'answer' must be text, got int"],
    ),
    "unknown keys": (
        add_line('{"text": "Q"}'),
        [],
        ["rows.jsonl: line 13", "['text']", "but the format is pair: prompt and completion"],
    ),
    "held-out answer missing": (
        lambda m: Path("heldout.jsonl").write_text('{"prompt": "Q"}'),
        ["--eval_dataset", "heldout.jsonl"],
        ["heldout.jsonl: line 1", "'completion' is missing"],
    ),
    "nothing fits": (lambda m: None, ["--max_seq_length", "3"], ["rows.jsonl: no row left", "12 dropped"]),
    "all held out": (lambda m: None, ["--val_size", "12"], ["val_size 12 holds out 12 of 12"]),
    "unknown flag": (lambda m: None, ["--lora-rank", "4"], ["--lora_rank", "did you mean --lora_r"]),
    "rank zero": (lambda m: None, ["--lora_r", "0"], ["--lora_r must be at least 1, got 0"]),
    "no layer of that name": (
        lambda m: None,
        ["--lora_target_modules", "q_proj", "c_attn"],
        ["'c_attn' matches no linear layer", "q_proj"],
    ),
    "dropout of one": (lambda m: None, ["--lora_dropout", "1"], ["dropout must be in [0, 1)"]),
    "two kinds of evaluation": (
        lambda m: None,
        ["--eval_dataset", "rows.jsonl", "--val_size", "2"],
        ["--eval_dataset and --val_size", "give one"],
    ),
    "no such device": (lambda m: None, ["--device", "tpu7"], ["--device tpu7: not available here"]),
}

SHARD_MISTAKES: dict[str, Case] = {
    "missing shard": (lambda m: (m / FIRST).unlink(), [], [f"model/{FIRST}: shard not found", INDEX]),
    "truncated shard": (lambda m: truncate(m / FIRST, 0.9), [], [f"model/{FIRST}: damaged or cut off"]),
    "shard outside the folder": (
        lambda m: edit_index(m, **{WEIGHT: "../other.safetensors"}),
        [],
        [f"model/{INDEX}", "outside the folder", "other.safetensors"],
    ),
    "shard of another tensor": (
        lambda m: edit_index(m, **{WEIGHT: FIRST}),
        [],
        [f"model/{FIRST}: tensor {WEIGHT} not found", INDEX],
    ),
    "broken index": (lambda m: truncate(m / INDEX, 0.5), [], [f"model/{INDEX}: not an index of shards"]),
}


@pytest.fixture(scope="module")
def sharded_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaForCausalLM

    folder = shutil.copytree(tiny_model, tmp_path_factory.mktemp("sharded") / "model")
    (folder / SINGLE).unlink()
    LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16).save_pretrained(
        folder, max_shard_size="60KB"
    )
    assert (folder / FIRST).is_file()
    return folder


def shown(stderr: str) -> str:
    """What a terminal shows in the end: a carriage return begins the line again."""
    return "\n".join(line.rpartition("\r")[2] for line in stderr.split("\n"))


def assert_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flags: list[str], names: list[str]
) -> str:
    """The run must end with code 2 after one line that names all of these, and leave all files as they were.

    Returns stderr as it is.
    """

    def files() -> dict[str, bytes | None]:
        return {str(path): path.read_bytes() if path.is_file() else None for path in Path().rglob("*")}

    before = files()
    monkeypatch.setattr(sys, "argv", ["finetune.py", *flags])
    capsys.readouterr()  # what came before
    with pytest.raises(SystemExit) as stop:
        finetune.main()
    error = capsys.readouterr().err
    assert stop.value.code == 2
    line = shown(error)
    assert line.startswith("error: ") and line.count("\n") == 1
    for name in names:
        assert name in line
    assert files() == before
    return error


@pytest.mark.parametrize("mistake", [*MISTAKES, *SHARD_MISTAKES])
def test_a_mistake_is_one_line_that_names_the_place(
    run: Callable[..., Path],
    tiny_model: Path,
    sharded_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    mistake: str,
) -> None:
    shutil.copytree(sharded_model if mistake in SHARD_MISTAKES else tiny_model, "model")
    make, flags, names = (MISTAKES | SHARD_MISTAKES)[mistake]
    make(Path("model"))
    given = {"--model": "model", "--dataset": "rows.jsonl", "--dtype": "float32"}
    argv = [text for flag, value in given.items() if flag not in flags for text in (flag, value)]
    assert_refused(monkeypatch, capsys, argv + flags, names)


@pytest.fixture
def refused(
    run: Callable[..., Path],
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., str]:
    """A function that calls the script with these flags added to good ones; see assert_refused."""
    good = {"--model": str(tiny_model), "--dataset": "rows.jsonl", "--dtype": "float32", "--max_steps": "1"}

    def call(flags: list[str], *names: str) -> str:
        argv = [text for flag, value in good.items() if flag not in flags for text in (flag, value)]
        return assert_refused(monkeypatch, capsys, argv + flags, list(names))

    return call


def test_a_model_folder_that_is_not_there_is_called_that(refused: Callable[..., str]) -> None:
    refused(["--model", "nowhere"], "no such model folder: nowhere")


def test_a_model_folder_that_is_not_there_is_named(refused: Callable[..., str]) -> None:
    refused(["--model", "nowhere"], "nowhere")


def test_in_a_log_file_too_the_error_stands_alone(refused: Callable[..., str], tiny_model: Path) -> None:
    shutil.copytree(tiny_model, "model")
    edit_tensors(Path("model"), lambda t: t[WEIGHT].__setitem__((2, 3), math.nan))
    assert refused(["--model", "model"], WEIGHT).startswith("error: ")


@pytest.mark.parametrize("size", ["2", "16"])
def test_more_than_one_process_is_refused(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch, size: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", size)
    refused([], f"WORLD_SIZE is {size}", "start it without torchrun")


def test_one_process_under_torchrun_is_fine(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert (run(max_steps=1) / "completed").exists()


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ({"config.yaml": "model: x"}, "holds another run"),
        ({"notes.txt": "mine"}, "holds other files (notes.txt"),
    ],
)
def test_a_folder_that_is_used_is_refused_and_left_alone(
    refused: Callable[..., str], content: dict[str, str], what: str
) -> None:
    Path("mine").mkdir()
    for name, text in content.items():
        (Path("mine") / name).write_text(text)
    refused(["--output_dir", "mine"], f"mine: {what}", "choose another --output_dir")


def test_a_finished_run_is_not_trained_over(
    run: Callable[..., Path], refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run("mine", max_steps=1)
    monkeypatch.setattr(finetune, "tokenize", None)  # it shows before anything is loaded
    refused(["--output_dir", "mine"], "mine: holds another run")


def test_a_file_in_place_of_the_run_folder_is_refused(refused: Callable[..., str]) -> None:
    refused(["--output_dir", "rows.jsonl"], "rows.jsonl: is a file; choose another --output_dir")


def test_what_must_be_given_is_named(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused(monkeypatch, capsys, [], ["--model", "--dataset", "required"])


@pytest.mark.parametrize(
    "flags",
    [["--adam_beta2", "1"], ["--adam_beta2", "-1"], ["--lora_target_modules", "lm_head"]],
    ids=" ".join,
)
def test_an_option_that_cannot_train_is_refused_before_anything_is_written(
    refused: Callable[..., str], flags: list[str]
) -> None:
    refused(flags, flags[0].removeprefix("--lora_target_modules"))


@pytest.mark.parametrize("flags", [["--block_size", "63"], ["--seed", str(10**15)]], ids=" ".join)
def test_a_value_out_of_range_is_refused_by_option(refused: Callable[..., str], flags: list[str]) -> None:
    refused(flags, flags[0])


def test_a_world_size_that_is_no_number_is_named(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "two")
    refused([], "WORLD_SIZE")


def test_a_tokenizer_of_more_words_than_the_model_has_is_refused(
    refused: Callable[..., str], tiny_model: Path
) -> None:
    shutil.copytree(tiny_model, "model")
    path = Path("model/tokenizer.json")
    content = json.loads(path.read_text())
    word = dict(id=267, content="Spell", special=False, normalized=False)
    content["added_tokens"].append(word | dict(single_word=False, lstrip=False, rstrip=False))
    path.write_text(json.dumps(content))
    refused(["--model", "model"], "267")


# -- compiling ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "device", "missing", "deterministic", "expected"),
    [
        ("auto", "cpu", None, False, (False, "on a CPU eager is as fast here")),
        ("auto", "cuda", None, False, (True, "CUDA")),
        ("auto", "cuda", "no Triton", False, (False, "no Triton for cuda")),
        ("auto", "cuda", None, True, (False, "--deterministic")),
        ("auto", "mps", None, False, (False, "not tried on mps")),
        ("on", "cpu", None, True, (True, "as asked")),
        ("off", "cuda", None, False, (False, "as asked")),
    ],
)
def test_blocks_are_compiled_where_that_gains_something(
    asked, device, missing, deterministic, expected, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finetune, "missing_compiler", lambda device: missing)
    config = finetune.Config(Path("model"), [Path("rows")], compile=asked, deterministic=deterministic)
    assert finetune.compile_choice(config, torch.device(device)) == expected


def test_compiling_without_a_compiler_is_refused(run: Callable[..., Path], monkeypatch, capsys) -> None:
    monkeypatch.setattr(finetune, "missing_compiler", lambda device: "no C++ compiler")
    with pytest.raises(SystemExit) as stop:
        run(compile="on", device="cpu")
    assert stop.value.code == 2 and not Path("run").exists()
    error = capsys.readouterr().err.strip()
    assert error == "error: --compile on: no C++ compiler for cpu; install one, or leave it at auto"


def test_a_run_with_compiled_blocks_has_the_bits_of_an_eager_one(run, monkeypatch, capsys) -> None:
    monkeypatch.setattr(finetune, "missing_compiler", lambda device: None)
    monkeypatch.setattr(finetune, "compile_blocks", lambda model: compile_blocks(model, "aot_eager"))
    compiled = run("compiled", compile="on", packing="true", lora_dropout=0.5, device="cpu")
    assert "compile   on: as asked" in capsys.readouterr().out
    assert adapter_bytes(compiled) == adapter_bytes(
        run("eager", packing="true", lora_dropout=0.5, device="cpu")
    )
