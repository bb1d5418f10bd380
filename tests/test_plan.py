"""The memory plan as people meet it: scripts/plan.py, and what finetune.py says before and after."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import finetune
import plan
import planning
from minqlora.memory import plan_memory, skeleton
from options import parse

GIB = 2**30
ROWS = [{"prompt": f"What is {n} and {n}?", "completion": f"It is {n + n}."} for n in range(12)]


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """A function that runs scripts/plan.py and returns what it printed."""

    def run(*argv: str) -> str:
        monkeypatch.setattr(sys, "argv", ["plan.py", *argv])
        capsys.readouterr()
        plan.main()
        return capsys.readouterr().out

    return run


@pytest.fixture
def refused(say: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """A function that runs scripts/plan.py with a mistake and returns the one line about it."""

    def run(*argv: str) -> str:
        with pytest.raises(SystemExit) as end:
            say(*argv)
        assert end.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    return run


# -- scripts/plan.py -----------------------------------------------------------------------------------------


def test_the_table_has_a_column_for_each_way_and_adds_up(say: Callable[..., str]) -> None:
    lines = say("llama2-7b", "--memory", "24GB").splitlines()
    assert lines[0] == "llama2-7b: 6,738,415,616 parameters, computing in bfloat16"
    start = next(i for i, line in enumerate(lines) if line.startswith("GiB"))
    assert lines[start].split() == ["GiB", "QLoRA", "LoRA", "full"]
    table = {}
    for line in lines[start + 1 :]:
        name, *cells = line.rsplit(maxsplit=3)
        table[name] = [0.0 if text == "-" else float(text) for text in cells]
        if name == "in all":
            break
    total = table.pop("in all")
    for column in range(3):
        assert sum(row[column] for row in table.values()) == pytest.approx(total[column], abs=0.05)
    assert table["weights"][0] < table["weights"][1] / 3.9


def test_a_machine_reads_the_same(say: Callable[..., str]) -> None:
    found = json.loads(say("llama-65b", "--memory", "48GiB", "--max_seq_length", "512", "--json"))
    assert list(found["plans"]) == ["qlora", "lora", "full"]
    qlora, lora, full = found["plans"].values()
    assert found["memory"] == 48 * GIB - 0.5e9
    assert qlora["fits"] and not lora["fits"] and not full["fits"]
    assert qlora["total"] == sum(qlora["parts"].values()) == qlora["at"][qlora["fullest_at"]]
    assert qlora["parts"][qlora["largest"]] == max(qlora["parts"].values())
    assert full["trained"] == full["parameters"] == qlora["parameters"]
    assert qlora["largest_batch"] >= 1 and qlora["longest_row"] >= 512
    assert lora["largest_batch"] == lora["longest_row"] == 0


@pytest.mark.parametrize(
    ("memory", "model"),
    [("8GB", "llama2-7b"), ("12GB", "llama2-13b"), ("24GB", "llama-33b"), ("48GB", "llama-65b")],
)
def test_the_recipes_fit_their_cards(memory: str, model: str) -> None:
    request = plan.read_request(
        parse(plan.config_class(), [model, "--memory", memory, "--max_seq_length", "512"])
    )
    assert request.memory is not None and request.memory < plan.read_bytes("memory", memory)
    found = plan_memory(skeleton(request.arch, request.setup), request.setup, request.memory)
    assert found.total < request.memory


def test_what_fits_is_said_in_words(say: Callable[..., str]) -> None:
    text = say("llama3-8b", "--memory", "24GB")
    assert "What a GPU of 24GB leaves, 21.89 GiB, holds" in text
    assert "(the model was trained for 8,192)" in text
    assert "full    nothing: the model alone is too large" in text
    assert "in host memory" in text


@pytest.mark.parametrize(
    ("flags", "part", "factor"),
    [
        (["--lora_r", "32"], "adapters", 0.5),
        (["--adapter_dtype", "bfloat16"], "adapters", 0.5),
        (["--optim", "paged_adamw_8bit"], "moments", 0.254),
        (["--double_quant", "false"], "scales", 3.94),
        (["--max-seq-length", "2048"], "activations", 2.0),
        (["--per_device_train_batch_size", "3"], "activations", 3.0),
        (["--quantize_embeddings"], "embeddings", 0.25),
        (["--paged", "always"], "moments", 0.0),
        (["--lora_target_modules", "q_proj", "v_proj"], "gradients", 0.21),
    ],
)
def test_an_option_changes_its_part(flags: list[str], part: str, factor: float) -> None:
    def qlora(*flags: str) -> dict[str, int]:
        argv = ["llama2-7b", "--memory", "80GB", *flags]
        request = plan.read_request(parse(plan.config_class(), argv))
        return plan_memory(skeleton(request.arch, request.setup), request.setup, request.memory).parts

    assert qlora(*flags)[part] == pytest.approx(factor * qlora()[part], rel=0.02)


def test_of_a_folder_config_json_is_enough(say: Callable[..., str], tiny_model: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_model / "config.json", tmp_path)
    text = say(str(tmp_path))
    assert " parameters, computing in " in text and "What cpu of this machine has free" in text
    again = json.loads(say(str(tmp_path), "--json"))
    assert again["plans"]["qlora"]["fits"] is True


def test_where_nobody_says_what_is_free_it_says_so(
    say: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "free_memory", lambda device: None)
    assert "What fits, nobody says here; give the size of a GPU as --memory" in say("llama2-7b")
    assert json.loads(say("llama2-7b", "--json"))["plans"]["qlora"]["fits"] is None


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GB", 24e9), ("24GiB", 24 * GIB), ("0.5 gb", 0.5e9), ("500MB", 5e8), (".5TiB", 2**39), ("1KB", 1000)],
)
def test_a_size_is_read(text: str, size: float) -> None:
    assert plan.read_bytes("memory", text) == size


@pytest.mark.parametrize("text", ["24", "GB", "-1GB", "24 G", "1e9GB", "24GBs", "inf GB"])
def test_a_size_that_is_none_is_refused(refused: Callable[..., str], text: str) -> None:
    line = refused("llama2-7b", f"--memory={text}")
    assert line == f"error: --memory: expected a size such as 24GB or 24GiB, got {text!r}"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (
            ["lama2-7b"],
            "no such model folder: lama2-7b; without files there are plans for llama-7b, ",
        ),
        (["llama2-7b", "--memory", "500MB"], "--memory 500MB is no more than --reserve 0.5GB"),
        (["llama2-7b", "--lora_r", "0"], "--lora_r must be at least 1, got 0"),
        (["llama2-7b", "--max_seq_length", "1"], "--max_seq_length must be at least 2, got 1"),
        (["llama2-7b", "--lora_target_modules", "q_porj"], "'q_porj' matches no linear layer"),
        (["llama2-7b", "--learning_rate", "1"], "--learning_rate: there is no such option"),
        ([], "--model: required"),
    ],
)
def test_a_mistake_is_one_line(refused: Callable[..., str], argv: list[str], said: str) -> None:
    assert said in refused(*argv)


# -- finetune.py ---------------------------------------------------------------------------------------------


@pytest.fixture
def train(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """A function that trains the tiny model in an empty folder as the command line would."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))

    def run(**flags: Any) -> Path:
        given = dict(model=tiny_model, dataset="rows.jsonl", output_dir="run", dtype="float32", lora_r=4)
        given |= dict(max_seq_length=64, gradient_accumulation_steps=2, max_steps=2) | flags
        argv = [text for name, value in given.items() for text in (f"--{name}", str(value))]
        monkeypatch.setattr(sys, "argv", ["finetune.py", *argv])
        finetune.main()
        return tmp_path / "run"

    return run


def ends(code: int, train: Callable[..., Path], **flags: Any) -> None:
    with pytest.raises(SystemExit) as end:
        train(**flags)
    assert end.value.code == code


def test_a_run_says_its_plan_before_and_what_it_measured_after(
    train: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = train()
    out = capsys.readouterr().out
    before, after = [line for line in out.splitlines() if line.startswith("memory ")]
    assert before.startswith("memory    about 0.0") and "GiB: the largest part is " in before
    assert " GiB are free" in before and out.index(before) < out.index("model     ")
    kept = json.loads((folder / "memory.json").read_text())
    planned, measured = kept["planned_bytes"], kept["measured_bytes"]
    both = f"planned {planned / GIB:.2f} GiB, measured {measured / GIB:.2f} GiB"
    assert after == f"memory    {both}, the growth of the process: an allocator keeps what was freed"
    assert sum(kept["planned"].values()) == planned == kept["planned_at"][kept["fullest_at"]]
    assert 0 <= measured < GIB and kept["on_host_bytes"] == 0


def test_a_dry_run_reads_no_weight_and_leaves_no_run(
    train: Callable[..., Path], tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model, ignore=shutil.ignore_patterns("*.safetensors"))
    before = sorted(tmp_path.rglob("*"))
    ends(0, train, model=model, dry_run="true", max_steps=7)
    out = capsys.readouterr().out
    assert "data      12 of 12 rows used" in out and "memory    about " in out
    assert "dry run   7 steps to do; no weight was read, and no run written" in out
    assert sorted(tmp_path.rglob("*")) == before


def test_a_dry_run_says_what_is_wrong_with_the_options(
    train: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    ends(2, train, dry_run="true", lora_target_modules="q_porj")
    assert "error: target module 'q_porj' matches no linear layer" in capsys.readouterr().err


def test_a_run_of_few_steps_says_how_to_have_more(
    train: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    train(max_steps=2)
    assert "note      " not in capsys.readouterr().out  # they were asked for
    train(max_steps="none", output_dir="short", gradient_accumulation_steps=64)
    assert "note      1 optimizer step in all: a smaller --gradient_acc" in capsys.readouterr().out


def test_a_run_that_surely_cannot_fit_is_refused_before_anything_is_read(
    train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(planning, "free_memory", lambda device: 1000)
    monkeypatch.setattr(finetune, "load_model", lambda *_, **__: pytest.fail("read"))
    ends(2, train)
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert (
        "training does not fit cpu: it takes 0.01 GiB before the first token, but 0.00 GiB are free" in line
    )
    assert line.endswith(", or another device")
    assert not Path("run").exists()


def test_a_run_that_may_not_fit_is_warned(
    train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    short = dict(gradient_checkpointing="false", max_seq_length=1024)
    ends(0, train, dry_run="true", **short)
    assert "warning" not in capsys.readouterr().err
    monkeypatch.setattr(planning, "free_memory", lambda device: 12_000_000)
    ends(0, train, dry_run="true", **short)
    line = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("warning"))
    assert "more than what is free; if memory runs out, try " in line
    assert "--max_seq_length" in line


def test_the_way_out_that_saves_most_comes_first(tiny_model: Path) -> None:
    def ways(**changes: Any) -> list[str]:
        config = finetune.Config(model=tiny_model, dataset=[Path("rows")], **changes)
        return planning.what_saves_memory(config, tiny_model, torch.device("cpu"), torch.float32)

    assert ways(max_seq_length=8192, gradient_checkpointing="false")[0] == "a smaller --max_seq_length"
    assert ways(max_seq_length=8, lora_r=512)[:2] == ["a smaller --lora_r", "--optim paged_adamw_8bit"]
    assert "a smaller --per_device_train_batch_size" in ways(per_device_train_batch_size=8)
    assert ways(max_seq_length=2, lora_r=1, bits=16)[0] == "--bits 4"


def test_evaluation_takes_as_many_tokens_at_a_time_as_training() -> None:
    assert list(finetune.batches_within([3, 3, 4, 9, 20, 1], 10)) == [[0, 1, 2], [3], [4], [5]]
    assert list(finetune.batches_within([], 10)) == []
