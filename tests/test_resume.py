"""Whatever ends a run, what it had done is kept, and from there it goes on to the bits of one left alone."""

import errno
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_finetune import ROOT, ROWS, adapter_bytes, examples_in, metrics, shown, write_rows
from test_finetune import run as run

import finetune
from minqlora.batch import order
from minqlora.run import checkpoints, read_checkpoint
from options import parse

Train = Callable[..., Path]


def cut(
    run: Train,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    after: int,
    number: int = signal.SIGINT,
    **flags: Any,
) -> Path:
    """Train, and send a signal in the step after which the run is to stop; return the run's folder.

    after: counted from where this session of the run began.
    """
    accumulate, calls = finetune.accumulate_gradients, []

    def interrupt(*args: Any) -> float:
        calls.append(1)
        if len(calls) == after:
            os.kill(os.getpid(), number)
        return accumulate(*args)

    with monkeypatch.context() as patch:
        patch.setattr(finetune, "accumulate_gradients", interrupt)
        with pytest.raises(SystemExit) as stop:
            run(name, **flags)
    assert stop.value.code == 128 + number
    return Path(name)


def fails(run: Train, *args: Any, **flags: Any) -> None:
    """Train, which must end with code 1."""
    with pytest.raises(SystemExit) as stop:
        run(*args, **flags)
    assert stop.value.code == 1


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def rows_but_times(folder: Path) -> list[dict[str, Any]]:
    times = ("tokens_per_second", "eta_seconds", "peak_memory_gib")
    return [{key: value for key, value in row.items() if key not in times} for row in metrics(folder)]


def assert_same(one: Path, other: Path) -> None:
    """The results and the metrics of two runs must be equal, and so must their last checkpoints."""
    assert adapter_bytes(one) == adapter_bytes(other)
    assert rows_but_times(one) == rows_but_times(other)
    assert (one / "completed").exists() and (other / "completed").exists()


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


# -- exact resume ------------------------------------------------------------------------------------------

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    # 12 rows are 2 steps of 2 x 3: an epoch ends after every second one.
    "dropout": dict(lora_dropout=0.2, per_device_train_batch_size=2, gradient_accumulation_steps=3),
    "packed": dict(packing="true", max_seq_length=130, lora_dropout=0.1, gradient_accumulation_steps=1),
    "cosine": dict(
        lr_scheduler_type="cosine", warmup_steps=3, weight_decay=0.1, gradient_checkpointing="false"
    ),
    "8-bit": dict(optim="paged_adamw_8bit", lora_r=64, lora_dropout=0.1, gradient_accumulation_steps=1),
    "paged": dict(paged="always", page_bytes=1024, bits=16),
    "narrow": dict(adapter_dtype="bfloat16", use_dora="true", gradient_checkpointing="offload"),
    "evaluated": dict(val_size=3, eval_steps=2, logging_steps=2, dtype="bfloat16", lora_dropout=0.1),
}


@pytest.mark.parametrize(
    ("name", "k"),
    [
        ("dropout", 1),
        ("dropout", 4),
        ("packed", 3),
        ("cosine", 2),
        ("8-bit", 1),
        ("paged", 3),
        ("narrow", 2),
        ("evaluated", 3),
    ],
)
def test_n_steps_are_k_and_a_resume_and_the_rest(
    run: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, k: int
) -> None:
    flags = CONFIGURATIONS[name] | dict(max_steps=6)
    whole = cut(run, monkeypatch, "whole", after=5, **flags)
    parts = cut(run, monkeypatch, "parts", after=k, **flags)
    assert [path.name for path in checkpoints(parts)] == [f"checkpoint-{k}"]
    again = flags | dict(resume_from_checkpoint="latest")
    torch.rand(5)  # nothing is taken over but what was saved
    cut(run, monkeypatch, "parts", after=5 - k, **again)
    # The adapter, the moments, the counts and the states of all random generators:
    assert files(whole / "checkpoint-5") == files(parts / "checkpoint-5")
    assert f"resumed   parts/checkpoint-{k}" in capsys.readouterr().out
    run("whole", **again)
    run("parts", **again)
    assert_same(whole, parts)
    run("undisturbed", **flags)
    assert_same(Path("undisturbed"), parts)


def test_8_bit_moments_are_kept_in_8_bits(run: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = cut(run, monkeypatch, "run", after=1, **CONFIGURATIONS["8-bit"])
    with finetune.open_safetensors(folder / "checkpoint-1/optimizer.safetensors") as file:
        dtypes = {str(file.get_tensor(key).dtype) for key in file.keys() if key.endswith("exp_avg")}  # noqa: SIM118
    assert "torch.uint8" in dtypes


def test_what_does_not_change_the_arithmetic_may_change(run: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    flags: dict[str, Any] = dict(max_steps=5, lora_dropout=0.1)
    run("undisturbed", **flags)
    cut(run, monkeypatch, "run", after=2, **flags)
    others = dict(paged="always", page_bytes=512, gradient_checkpointing="false", on_nonfinite="skip")
    others |= dict(save_steps=1, save_total_limit=1, max_time=60, data_cache="elsewhere")
    run("run", **flags | others, resume_from_checkpoint="latest")
    assert adapter_bytes(Path("run")) == adapter_bytes(Path("undisturbed"))
    assert "page_bytes: 512\n" in Path("run/config.yaml").read_text()


def test_more_steps_may_be_asked_for_and_fewer_than_done_are_refused(
    run: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cut(run, monkeypatch, "run", after=2, max_steps=3)
    with pytest.raises(SystemExit) as stop:
        run("run", max_steps=1, resume_from_checkpoint="latest")
    assert stop.value.code == 2
    assert "error: the run has done 2 of 1 steps already; ask for more" in capsys.readouterr().err
    run("run", max_steps=5, resume_from_checkpoint="latest")
    run("undisturbed", max_steps=5)
    assert_same(Path("run"), Path("undisturbed"))


def test_a_run_that_has_come_to_its_end_can_be_made_longer(
    run: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    run("run", max_steps=3, save_steps=2)
    assert [path.name for path in checkpoints(Path("run"))] == ["checkpoint-3", "checkpoint-2"]
    with pytest.raises(SystemExit):
        run("run", max_steps=3, save_steps=2, resume_from_checkpoint="latest")
    assert "the run has done 3 of 3 steps already; ask for more" in capsys.readouterr().err
    assert Path("run/completed").exists()
    run("run", max_steps=5, save_steps=2, resume_from_checkpoint="latest")
    run("undisturbed", max_steps=5)
    assert_same(Path("run"), Path("undisturbed"))


def test_a_run_that_was_killed_after_its_last_step_comes_to_its_end(run: Train) -> None:
    run("whole", max_steps=2, save_steps=2)
    shutil.copytree("whole", "killed")
    for name in ("completed", "adapter_model.safetensors", "adapter_config.json"):
        Path("killed", name).unlink()
    run("killed", max_steps=2, save_steps=2, resume_from_checkpoint="latest")
    assert_same(Path("killed"), Path("whole"))


# Another value for every option that changes the arithmetic.
OTHER_VALUES: dict[str, Any] = {
    "model": Path("other"),
    "dataset": [Path("other.jsonl")],
    "dataset_format": "pair",
    "train_on_source": True,
    "eval_dataset": [Path("rows.jsonl")],
    "val_size": 2.0,
    "bits": 16,
    "quant_type": "fp4",
    "double_quant": False,
    "block_size": 32,
    "quantize_embeddings": True,
    "lora_r": 5,
    "lora_alpha": 17.0,
    "lora_dropout": 0.5,
    "lora_target_modules": ["q_proj"],
    "lora_rank_pattern": ["q_proj=2"],
    "lora_alpha_pattern": ["q_proj=2"],
    "layers_to_transform": [0],
    "use_rslora": True,
    "use_dora": True,
    "init_lora_weights": "gaussian",
    "loraplus_lr_ratio": 16.0,
    "modules_to_save": ["norm"],
    "new_tokens": ["<think>"],
    "max_seq_length": 99,
    "packing": True,
    "per_device_train_batch_size": 3,
    "gradient_accumulation_steps": 3,
    "learning_rate": 0.02,
    "lr_scheduler_type": "linear",
    "warmup_steps": 1,
    "warmup_ratio": 0.1,
    "max_grad_norm": 0.1,
    "adam_beta2": 0.9,
    "weight_decay": 0.1,
    "optim": "paged_adamw_8bit",
    "adapter_dtype": "bfloat16",
    "dtype": "bfloat16",
    "device": "cpu",
    "seed": 1,
    "deterministic": True,
    "compile": "off",
}


def test_a_flag_that_changes_the_arithmetic_is_refused_by_name_and_every_other_is_not(
    run: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = cut(run, monkeypatch, "run", after=1)
    names = {field.name for field in fields(finetune.Config)}
    assert OTHER_VALUES.keys() == names - finetune.MAY_CHANGE
    assert names > finetune.MAY_CHANGE
    config = parse(finetune.Config, ["--config", "run/config.yaml", "--resume_from_checkpoint", "latest"])
    for name, value in OTHER_VALUES.items():
        changed = replace(config, **{name: value}, **({"val_size": 0.0} if name == "eval_dataset" else {}))
        shown = ".*" if isinstance(value, list) else str(value)
        with pytest.raises(
            ValueError, match=f"^--{name} {shown} would change the arithmetic of a run that began"
        ):
            finetune.find_resumed(changed)
    others = dict(num_train_epochs=9.0, max_steps=99, max_time=1.0, cache=Path("c"), data_cache=Path("d"))
    others |= dict(logging_steps=3, eval_steps=3, max_eval_samples=1, save_steps=3, save_total_limit=7)
    others |= dict(paged="never", page_bytes=64, on_nonfinite="skip", gradient_checkpointing="offload")
    others |= dict(
        resume_from_checkpoint=folder / "checkpoint-1", allow_dropped=True, inspect=1, dry_run=True
    )
    others |= dict(sample_tokens=3, report_to=["tensorboard"])
    together = dict(output_dir=Path("run"), early_stopping_patience=1, load_best=True)
    together |= dict(sample_steps=3, sample_prompts=["Hello"])
    assert others.keys() | together.keys() == finetune.MAY_CHANGE
    for name, value in others.items():
        found = finetune.find_resumed(replace(config, **{name: value}))
        assert found is not None and found[0] == folder / "checkpoint-1"


def refused(run: Train, capsys: pytest.CaptureFixture[str], *args: Any, **flags: Any) -> str:
    """Train, which must end with code 2 and one line; return it."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(*args, **flags)
    line = shown(capsys.readouterr().err)
    assert stop.value.code == 2 and line.startswith("error: ") and line.count("\n") == 1
    return line


def test_what_cannot_be_gone_on_with_is_named(
    run: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    latest = dict(resume_from_checkpoint="latest")
    assert "needs --output_dir" in refused(run, capsys, output_dir=None, **latest)
    assert "nowhere: no checkpoint to go on from: it has none" in refused(run, capsys, "nowhere", **latest)
    cut(run, monkeypatch, "run", after=1)
    path = Path("run/checkpoint-1")
    line = refused(run, capsys, "other", resume_from_checkpoint=path)
    assert "--output_dir other: a run goes on in its own folder, run" in line
    assert "holds another run; choose another --output_dir" in refused(run, capsys, "run")
    rows = (tmp_path / "rows.jsonl").read_text()
    write_rows(tmp_path / "rows.jsonl", ROWS["alpaca"])
    assert "--dataset: the files, the tokenizer or its chat template are not" in refused(
        run, capsys, **latest
    )
    (tmp_path / "rows.jsonl").write_text(rows)
    flip_a_byte(path / "adapter_model.safetensors")
    line = refused(run, capsys, **latest)
    assert "run: no checkpoint to go on from: run/checkpoint-1/adapter_model.safetensors: damaged" in line
    flip_a_byte(path / "adapter_model.safetensors")
    run(**latest)
    assert "run: that run has come to its end, and left no checkpoint" in refused(run, capsys, **latest)


@pytest.mark.parametrize("file", ["optimizer.safetensors", "adapter_model.safetensors", "state.json"])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_used(
    run: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], file: str
) -> None:
    flags: dict[str, Any] = dict(max_steps=6, save_steps=2, save_total_limit=1, lora_dropout=0.1)
    run("undisturbed", **flags)
    cut(run, monkeypatch, "run", after=5, **flags | dict(save_total_limit=2))
    assert [path.name for path in checkpoints(Path("run"))] == ["checkpoint-5", "checkpoint-4"]
    flip_a_byte(Path("run/checkpoint-5") / file)
    capsys.readouterr()
    cut(run, monkeypatch, "run", after=1, **flags, resume_from_checkpoint="latest")
    err = capsys.readouterr().err
    assert (
        f"warning   run/checkpoint-5/{file}: damaged" in err and "going on from checkpoint-4 instead" in err
    )
    # Of two checkpoints named 5 the new one stands, though only one may.
    assert [path.name for path in checkpoints(Path("run"))] == ["checkpoint-5"]
    run(**flags, resume_from_checkpoint="latest")
    assert_same(Path("run"), Path("undisturbed"))


def test_a_damaged_checkpoint_does_not_count_among_those_to_keep(
    run: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags: dict[str, Any] = dict(max_steps=9, save_steps=3, save_total_limit=2)
    cut(run, monkeypatch, "run", after=5, **flags)
    flip_a_byte(Path("run/checkpoint-5/state.json"))
    flags |= dict(save_steps=1, save_total_limit=1, resume_from_checkpoint="latest")
    cut(run, monkeypatch, "run", after=1, **flags)  # step 4
    assert [path.name for path in checkpoints(Path("run"))] == ["checkpoint-4"]


def test_a_run_may_go_back_to_an_older_checkpoint(run: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    flags: dict[str, Any] = dict(max_steps=6, save_steps=1, save_total_limit=9)
    cut(run, monkeypatch, "run", after=5, **flags)
    cut(run, monkeypatch, "run", after=1, **flags, resume_from_checkpoint="run/checkpoint-2")
    assert [path.name for path in checkpoints(Path("run"))] == [f"checkpoint-{i}" for i in (3, 2, 1)]
    assert [row["step"] for row in metrics(Path("run"))] == [1, 2, 3]


# -- signals and time --------------------------------------------------------------------------------------


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_the_real_command_saves_at_a_signal_and_the_printed_command_goes_on(
    run: Train, tiny_model: Path, tmp_path: Path, number: int
) -> None:
    script = str(ROOT / "scripts/finetune.py")
    steps, flags = 60, dict(lora_dropout=0.1, gradient_accumulation_steps=1)
    given: dict[str, Any] = dict(model=tiny_model, dataset="rows.jsonl", output_dir="a run", dtype="float32")
    given |= dict(lora_r=4, learning_rate=0.01, packing="false", max_steps=steps) | flags
    command = [sys.executable, script, *(text for key in given for text in (f"--{key}", str(given[key])))]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "a run/metrics.jsonl"
    while not (log.exists() and log.stat().st_size):
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(number)
    assert process.stderr is not None
    err = shown(process.stderr.read())
    assert process.wait() == 128 + number
    (path,) = checkpoints(log.parent)
    step = read_checkpoint(path)["step"]
    assert f"interrupted: step {step} is saved; go on with\n" in err
    assert metrics(log.parent)[-1]["step"] == step < steps
    (printed,) = [line for line in err.splitlines() if "--resume_from_checkpoint latest" in line]
    subprocess.run(shlex.split(printed), cwd=tmp_path, check=True, capture_output=True)
    run("undisturbed", max_steps=steps, **flags)
    assert_same(log.parent, tmp_path / "undisturbed")


def test_a_signal_at_the_very_end_does_not_take_the_result(
    run: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate = finetune.evaluate

    def interrupted(model: Any, *args: Any) -> float:
        # All but the evaluation is done, and may have taken hours.
        if Path("run/adapter_model.safetensors").exists():
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(model, *args)

    monkeypatch.setattr(finetune, "evaluate", interrupted)
    folder = run("run", val_size=2)
    assert (folder / "completed").exists() and metrics(folder)[-1]["eval_loss"] > 0


def test_an_interruption_while_loading_is_one_line_with_code_130(
    run: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(finetune, "load_model", interrupt)
    with pytest.raises(SystemExit) as stop:
        run("run")
    assert stop.value.code == 130 and not Path("run").exists()
    assert shown(capsys.readouterr().err).strip() == "interrupted before the first step"


def test_after_max_time_a_run_is_saved_and_goes_on(run: Train, capsys: pytest.CaptureFixture[str]) -> None:
    run("run", max_time=0)
    assert [row["step"] for row in metrics(Path("run"))] == [1]
    assert not Path("run/completed").exists()
    assert "out of time: step 1 is saved; go on with" in capsys.readouterr().err
    run("run", resume_from_checkpoint="latest")
    run("undisturbed")
    assert_same(Path("run"), Path("undisturbed"))


# -- which checkpoints are kept ----------------------------------------------------------------------------


def score(monkeypatch: pytest.MonkeyPatch, losses: list[float]) -> None:
    """Give the evaluations these losses, the first that before step 1."""
    given = iter(losses)
    monkeypatch.setattr(finetune, "evaluate", lambda *args: next(given))


def test_so_many_checkpoints_are_kept_and_the_best_besides(
    run: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    score(monkeypatch, [9, 5, 3, 4, 4, 4, 4])
    run("run", max_steps=6, save_steps=1, eval_steps=1, val_size=2)
    assert [path.name for path in checkpoints(Path("run"))] == [f"checkpoint-{i}" for i in (6, 5, 2)]
    score(monkeypatch, [9, 5, 3, 4, 4, 4, 4])
    run("one", max_steps=6, save_steps=1, save_total_limit=1)
    assert [path.name for path in checkpoints(Path("one"))] == ["checkpoint-6"]


@pytest.mark.parametrize("load_best", ["false", "true"])
def test_a_run_stops_early_when_it_gets_no_better(
    run: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], load_best: str
) -> None:
    flags: dict[str, Any] = dict(max_steps=9, save_steps=1, eval_steps=1, val_size=2, save_total_limit=1)
    score(monkeypatch, [2, 5, 3, 3, 4, 2])  # what was before step 1 has no adapter, and does not count
    folder = run(early_stopping_patience=2, load_best=load_best, **flags)
    rows = metrics(folder)
    assert [row["eval_loss"] for row in rows if "eval_loss" in row] == [2, 5, 3, 3, 4]
    assert rows[-1]["step"] == 4 and (folder / "completed").exists()
    best = adapter_bytes(folder / "checkpoint-2")
    assert (adapter_bytes(folder) == best) == (load_best == "true")
    assert adapter_bytes(folder / "checkpoint-4") != best
    out, err = capsys.readouterr()
    assert "step 4: no better for 2 evaluations, stopping" in out + err
    assert ("best      step 2, held-out loss 3.0000" in out) == (load_best == "true")
    assert "gradient  " in out


def test_patience_is_not_forgotten_by_a_resume(run: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    flags: dict[str, Any] = dict(max_steps=9, eval_steps=1, val_size=2, early_stopping_patience=2)
    for name, after in (("at-3", 3), ("at-4", 4)):  # step 4 is the one after which patience is at its end
        score(monkeypatch, [9, 5, 3, 3, 4, 2, 2])
        cut(run, monkeypatch, name, after=after, **flags)
        score(monkeypatch, [4] if after == 3 else [])
        run(name, **flags, resume_from_checkpoint="latest")
        assert metrics(Path(name))[-1]["step"] == 4 and Path(name, "completed").exists()


def test_a_best_checkpoint_that_is_not_there_is_said_and_the_last_step_is_the_result(
    run: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    score(monkeypatch, [9, 1, 2, 3])
    run("run", save_steps=1, eval_steps=1, val_size=2, max_steps=3)
    last = adapter_bytes(Path("run"))
    print_sanity = finetune.print_sanity

    def damage_it(*args: Any) -> None:
        print_sanity(*args)
        flip_a_byte(Path("again/checkpoint-1/adapter_model.safetensors"))

    monkeypatch.setattr(finetune, "print_sanity", damage_it)
    score(monkeypatch, [9, 1, 2, 3])
    run("again", save_steps=1, eval_steps=1, val_size=2, max_steps=3, load_best="true")
    assert "damaged" in capsys.readouterr().err and adapter_bytes(Path("again")) == last


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (dict(early_stopping_patience=2, val_size=2), "--early_stopping_patience needs --eval_steps"),
        (dict(early_stopping_patience=2, eval_steps=2), "--early_stopping_patience needs something held out"),
        (
            dict(load_best="true", eval_steps=2, val_size=2),
            "--load_best needs --eval_steps, and --save_steps equal",
        ),
        (dict(load_best="true", eval_steps=2, save_steps=2), "--load_best needs something held out"),
    ],
)
def test_what_can_never_find_a_best_step_is_refused(
    run: Train, capsys: pytest.CaptureFixture[str], flags: dict[str, Any], message: str
) -> None:
    assert message in refused(run, capsys, **flags)


# -- what goes wrong ---------------------------------------------------------------------------------------


def when(monkeypatch: pytest.MonkeyPatch, name: str, call: int, act: Callable[[], Any]) -> None:
    """Let one call of a function of the script, counted from 1, begin with something else."""
    function, calls = getattr(finetune, name), []

    def counted(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            act()
        return function(*args)

    monkeypatch.setattr(finetune, name, counted)


def raises(error: BaseException) -> Callable[[], Any]:
    def throw() -> None:
        raise error

    return throw


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_number_that_is_none_is_traced_to_its_layer_and_examples(
    run: Train,
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    where: str,
) -> None:
    prepare = finetune.prepare
    train, _ = examples_in(Path("rows.jsonl"), tiny_model)

    def plant(config: Any) -> Any:
        prepared = prepare(config)
        layer = prepared.model.get_submodule("model.layers.1.self_attn.o_proj")
        if where == "forward":
            layer.register_forward_hook(lambda m, x, y: y * (math.nan if prepared.step == 1 else 1))
        else:
            layer.lora_B.register_hook(lambda grad: grad * (math.inf if prepared.step == 1 else 1))
        return prepared

    monkeypatch.setattr(finetune, "prepare", plant)
    fails(run, "run", gradient_checkpointing="false", seed=7)
    line = shown(capsys.readouterr().err).strip().splitlines()[-1]
    assert line.startswith("error: step 2: loss ")
    layer = "model.layers.1.self_attn.o_proj" + (".lora_B" if where == "backward" else "")
    assert f"not finite first in {layer}, examples " in line
    assert "--on_nonfinite skip" in line and "checkpoint-1 is whole; to go on from there: " in line
    numbers = sorted(train.row(place) for place in list(order(12, seed=7, epoch=0))[4:8])
    assert f"examples {', '.join(map(str, numbers))};" in line


def test_steps_that_are_no_numbers_can_be_left_out_and_are_counted(
    run: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loss, calls = finetune.supervised_loss, []

    def break_in_step_2(*args: Any) -> torch.Tensor:
        calls.append(1)
        return loss(*args) * (math.nan if len(calls) == 6 else 1)

    monkeypatch.setattr(finetune, "supervised_loss", break_in_step_2)
    folder = run("run", on_nonfinite="skip", max_steps=4, save_steps=1, save_total_limit=9)
    assert [row["loss"] is None for row in metrics(folder)] == [False, True, False, False]
    assert "warning   1 steps were left out" in capsys.readouterr().err
    assert read_checkpoint(folder / "checkpoint-3")["skipped_steps"] == 1
    one, two, three = (files(folder / f"checkpoint-{i}") for i in (1, 2, 3))
    for name in ("adapter_model.safetensors", "optimizer.safetensors"):
        assert one[name] == two[name] != three[name]


OUT_OF_MEMORY = {
    "accelerator": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee elsewhere"),
    "torch on a cpu": RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes"),
    "python": MemoryError(),
}


@pytest.mark.parametrize("kind", OUT_OF_MEMORY)
def test_without_memory_the_last_finished_step_is_saved_and_what_to_change_is_said(
    run: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    flags: dict[str, Any] = dict(
        lora_dropout=0.2, per_device_train_batch_size=2, gradient_accumulation_steps=2
    )
    run("undisturbed", **flags, gradient_checkpointing="false")
    capsys.readouterr()
    with monkeypatch.context() as patch:
        # In the second micro-batch of step 3: dropout has been drawn, and a gradient is there.
        when(patch, "supervised_loss", 6, raises(OUT_OF_MEMORY[kind]))
        fails(run, "run", **flags, gradient_checkpointing="false")
    line = shown(capsys.readouterr().err).strip().splitlines()[-1]
    assert line.startswith("error: out of memory after step 2 (")
    assert "; the largest part is activations, 0.0" in line
    advice = line.partition("; try ")[2].partition("; ")[0].split(", ")
    assert len(advice) == 3 and {"--gradient_checkpointing true", "a smaller --max_seq_length"} < set(advice)
    assert "checkpoint-2 is whole; to go on from there: " in line
    run("run", **flags, gradient_checkpointing="true", resume_from_checkpoint="latest")
    assert_same(Path("run"), Path("undisturbed"))


def test_a_real_allocation_that_fails_is_recognised() -> None:
    with pytest.raises(RuntimeError) as failure:
        torch.empty(2**60, dtype=torch.uint8)
    run: Any = None
    with pytest.raises(AttributeError):  # it goes on to look at the run
        finetune.describe_out_of_memory(run, failure.value)


def test_without_memory_in_an_evaluation_the_step_before_it_is_saved(
    run: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags: dict[str, Any] = dict(lora_dropout=0.2, val_size=2, eval_steps=2, max_steps=4)
    run("undisturbed", **flags)
    with monkeypatch.context() as patch:
        when(patch, "evaluate", 2, raises(MemoryError("no room")))
        fails(run, "run", **flags)
    assert [path.name for path in checkpoints(Path("run"))] == ["checkpoint-2"]
    run("run", **flags, resume_from_checkpoint="latest")
    assert adapter_bytes(Path("run")) == adapter_bytes(Path("undisturbed"))


@pytest.mark.parametrize("kept", [[], ["checkpoint-2", "checkpoint-1"]], ids=["none-saved", "two-saved"])
def test_half_an_optimizer_step_is_not_saved(
    run: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kept: list[str]
) -> None:
    step, calls = finetune.PagedAdamW.step, []

    def half(self: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            self.param_groups[0]["params"] = self.param_groups[0]["params"][:3]
            step(self)
            raise MemoryError("no room")
        step(self)

    monkeypatch.setattr(finetune.PagedAdamW, "step", half)
    fails(run, "run", save_steps=1 if kept else None, max_steps=4)
    assert [path.name for path in checkpoints(Path("run"))] == kept
    said = "checkpoint-2 is whole" if kept else "there is no checkpoint to go on from"
    assert said in capsys.readouterr().err


def test_our_own_mistakes_are_not_explained_away(run: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    when(monkeypatch, "supervised_loss", 6, raises(RuntimeError("shapes do not match")))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        run("run")


def test_a_disk_that_fills_up_in_a_save_leaves_the_checkpoint_before_it(
    run: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fsync = os.fsync

    def full(descriptor: int) -> None:
        if Path("run/.checkpoint-2.partial/adapter_config.json").exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    flags: dict[str, Any] = dict(save_steps=1, max_steps=4)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        fails(run, "run", **flags)
    line = shown(capsys.readouterr().err).strip().splitlines()[-1]
    assert line.startswith(
        "error: run: No space left on device; checkpoint-1 is whole; to go on from there: "
    )
    assert not list(Path("run").glob(".*"))
    run("run", **flags, resume_from_checkpoint="latest")
    run("undisturbed", **flags)
    assert_same(Path("run"), Path("undisturbed"))


def test_on_a_disk_that_is_really_full_too(
    run: Train, small_disk: Callable[[int], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    disk, flags = small_disk(2**19), dict(save_steps=1, save_total_limit=99, max_steps=20)
    fails(run, disk / "run", **flags)
    kept = checkpoints(disk / "run")
    assert len(kept) >= 1 and not list((disk / "run").glob(".*"))
    for path in kept:
        read_checkpoint(path)
    line = shown(capsys.readouterr().err).strip().splitlines()[-1]
    assert "No space left on device" in line and f"; {kept[0].name} is whole" in line
    subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
    run(disk / "run", **flags, resume_from_checkpoint="latest")
    run("undisturbed", **flags)
    assert_same(disk / "run", Path("undisturbed"))


def test_a_disk_that_is_full_from_the_start_is_said(
    run: Train, small_disk: Callable[[int], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    disk = small_disk(2**16)
    fails(run, disk / "run", save_steps=1)
    line = shown(capsys.readouterr().err).strip().splitlines()[-1]
    assert "No space left on device; there is no checkpoint to go on from" in line


# -- killed ------------------------------------------------------------------------------------------------

# Runs are forked from a process that has imported everything and done nothing, which spares the seconds of
# importing PyTorch. Every other one is killed in the midst of a save, the rest anywhere, loading included.
KILLER = """
import os, random, shutil, signal, sys, time
from pathlib import Path

sys.path.insert(0, SCRIPTS)
import finetune

folder, n_kills, argv = Path("killed"), 0, sys.argv[1:]
in_saves = 0
chance = random.Random(5)
while not (folder / "completed").exists():
    if not list(folder.glob("checkpoint-*")):
        shutil.rmtree(folder, ignore_errors=True)  # killed before there was anything to go on from
    resume = ["--resume_from_checkpoint", "latest"] if folder.exists() else []
    child = os.fork()
    if child == 0:
        sys.argv = ["finetune.py", *argv, "--output_dir", str(folder), *resume]
        sys.stderr = sys.stdout = open(os.devnull, "w")
        try:
            finetune.main()
        except SystemExit as stop:
            os._exit(stop.code or 0)
        os._exit(0)
    enough = n_kills >= 40 and in_saves >= 10
    if not enough:
        if n_kills % 2:  # wait for a save, and then for some of it
            began = time.monotonic()
            while not list(folder.glob(".checkpoint-*")) and time.monotonic() - began < 5:
                pass
            time.sleep(chance.uniform(0, 0.01))
        else:
            time.sleep(chance.uniform(0, 1.0))
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        n_kills += 1
        in_saves += bool(list(folder.glob(".checkpoint-*")))
    else:
        assert status == 0, status
print(n_kills, in_saves)
"""


@pytest.mark.slow  # a minute
@pytest.mark.skipif(os.name != "posix", reason="forks")
def test_a_run_that_is_killed_over_and_over_ends_with_the_same_bits(
    run: Train, tiny_model: Path, tmp_path: Path
) -> None:
    flags: dict[str, Any] = dict(
        lora_dropout=0.2, save_steps=1, packing="true", max_seq_length=130, val_size=2
    )
    flags |= dict(max_steps=400, eval_steps=3, gradient_accumulation_steps=1, lr_scheduler_type="cosine")
    given: dict[str, Any] = dict(model=tiny_model, dataset="rows.jsonl", dtype="float32", lora_r=4) | flags
    given |= dict(learning_rate=0.01)
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            KILLER.replace("SCRIPTS", repr(str(ROOT / "scripts"))),
            *(text for key in given for text in (f"--{key}", str(given[key]))),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    n_kills, in_saves = map(int, done.stdout.split())
    assert n_kills >= 30 and in_saves >= 5
    run("undisturbed", **flags)
    assert_same(Path("undisturbed"), Path("killed"))
    for name in ("checkpoint-399", "checkpoint-398"):
        one, other = Path("undisturbed") / name, Path("killed") / name
        for file in ("adapter_model.safetensors", "optimizer.safetensors"):
            assert (one / file).read_bytes() == (other / file).read_bytes()
        states = [read_checkpoint(path) for path in (one, other)]
        for state in states:  # of the generators only PyTorch's is seeded, as only it is drawn from
            state["rng"] = state["rng"]["torch"]
        assert states[0] == states[1]
