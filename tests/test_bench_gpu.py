"""The stages of `bench.py gpu` run at toy size on any device, and what one of them loses the others keep."""

import inspect
import json
import math
import subprocess
import sys
from dataclasses import replace
from importlib import util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import bench
import bench_gpu
import bench_gpu_models
import bench_gpu_runs
import bench_gpu_train
from bench_gpu_measure import OUT_OF_MEMORY, TINY, Sizes, Timer, as_row, tried
from minqlora import NF4Tensor
from minqlora.checkpoint import Quantization, quantized_bytes

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
KEYS = {"stage", "case", "metric", "unit", "ours", "peer", "against", "floor", "ratio", "floor_ratio"}

peers = pytest.mark.skipif(
    not all(map(util.find_spec, bench_gpu_train.PEER)), reason="transformers, peft or bitsandbytes is missing"
)


def rows_of(stage: bench_gpu.Stage) -> list[dict[str, Any]]:
    """Run a stage at toy size in this process; return its rows."""
    device, *lines = bench_gpu.lines_of(stage, bench_gpu.Config(device="cpu", tiny=True))
    assert device["device"]["type"] == "cpu"
    assert json.loads(json.dumps(lines)) == lines
    rows = [line for line in lines if "skipped" not in line]
    for row in rows:
        assert row.keys() >= KEYS and row["stage"] == stage and "reason" not in row, row
        for key, other in (("ratio", "peer"), ("floor_ratio", "floor")):
            if row["ours"] is not None and row[other]:
                assert row[key] == pytest.approx(row["ours"] / row[other])
    return rows


def measured(rows: list[dict[str, Any]], key: str = "ours") -> list[float]:
    """Return the numbers under a key, which must all be there."""
    numbers = [row[key] for row in rows]
    assert all(math.isfinite(number) and number > 0 for number in numbers)
    return numbers


# -- the stages --------------------------------------------------------------------------------------------


@peers
def test_dequantize_compares_both_ways_with_every_peer_that_can_take_the_shape():
    copy, *rows = rows_of("dequantize")
    bandwidth = measured([copy], "floor")[0]
    found = {(row["case"].split(" b")[0], row["against"]) for row in rows}
    expected = {f"{way} {shape}" for way in ("quantize", "dequantize") for shape in ("128x128", "128x192")}
    assert {(case, "bitsandbytes") for case in expected} <= found
    assert not any("128x192" in case for case, against in found if against == "torchao")
    assert len(measured(rows)) == len(measured(rows, "peer")) == len(found)
    assert measured(rows, "floor") == [bandwidth] * len(rows)


def test_speed_counts_the_bytes_of_a_weight_in_16_bits_and_in_4():
    n_bytes = 2 * 4096 * 4096 + sum(quantized_bytes((4096, 4096), Quantization()))
    assert n_bytes / 4096**2 == pytest.approx(2.516, abs=5e-4)


@peers
def test_linear_compares_with_the_dense_layer():
    rows = rows_of("linear")
    assert {row["case"].split(", ")[1] for row in rows} == {"4 tokens"}
    measured(rows)
    measured(rows, "peer")
    assert len(set(measured(rows, "floor"))) == 1


@peers
def test_train_compares_every_mode_with_the_peer_that_has_it_and_with_16_bits():
    rows = rows_of("train")
    assert {row["metric"] for row in rows} == {"speed", "peak memory"}
    modes = {
        against: [row["case"] for row in rows if row["against"] == against and row["metric"] == "speed"]
        for against in (None, bench_gpu_train.SIXTEEN_BITS, "transformers + peft + bitsandbytes")
    }
    ours, sixteen_bits, peer = modes.values()
    assert ours == sixteen_bits == ["checkpointed", "no recompute", "offload"]
    assert peer == ["checkpointed", "no recompute"]
    measured(rows)
    measured([row for row in rows if row["against"]], "peer")
    measured([row for row in rows if row["metric"] == "peak memory" and not row["against"]], "floor")


def test_memory_measures_adapters_of_both_dtypes_with_moments_in_both_places():
    paging, *rows = rows_of("memory")
    assert paging["case"] == "tiny, 2 micro-batches, moments paged"
    assert measured([paging]) and measured([paging], "peer")
    wanted = [
        f"tiny, adapters in {dtype}, moments {where}"
        for dtype in ("float32", "bfloat16")
        for where in ("on the device", "paged")
    ]
    peaks = [row for row in rows if row["metric"] == "peak memory"]
    assert [row["case"] for row in peaks] == wanted
    measured(rows)
    floors = measured(peaks, "floor")
    assert floors[0] > floors[2] and floors[1] > floors[3]  # adapters in 16 bits take less
    assert all(row["peer"] is None for row in peaks)  # the paper has no figure of this size


@peers
def test_decode_compares_with_the_peer_and_16_bits():
    alone, *others = rows_of("decode")
    assert [row["against"] for row in others] == [
        bench_gpu_train.SIXTEEN_BITS,
        "transformers + bitsandbytes",
    ]
    measured([alone], "floor")
    measured(others, "peer")
    assert {row["ours"] for row in others} == set(measured([alone]))


def test_tests_are_counted_by_how_they_ended(tmp_path):
    code = (
        "import pytest\n"
        "pytestmark = pytest.mark.gpu\n"
        "def test_a(): pass\n"
        "def test_b(): assert False\n"
        "def test_c(): pytest.skip('no GPU')\n"
        "@pytest.fixture\n"
        "def broken(): raise OSError\n"
        "def test_d(broken): pass\n"
    )
    (tmp_path / "test_some.py").write_text(code)
    rows = list(bench_gpu_runs.tests(Sizes(tests=str(tmp_path)), CPU))
    assert {row["metric"]: row["ours"] for row in rows} == {"passed": 1, "failed": 2, "skipped": 1}
    assert rows[1]["reason"] == "these tests failed: test_some.test_b, test_some.test_d"
    assert rows[2]["tests"] == ["test_some.test_c"]


def metrics(*losses: float, tokens: int = 10) -> list[dict[str, Any]]:
    steps = [dict(loss=loss, num_tokens=tokens, supervised_tokens=5) for loss in losses]
    return [{"eval_loss": 4.0}, *steps, {"eval_loss": losses[-1] + 0.5}]


def test_demo_is_compared_with_the_cpu_only_where_both_learned_from_the_same_tokens():
    rows = list(bench_gpu_runs.beside_cpu(metrics(3.0, 2.0), metrics(3.0, 1.6), 2))
    assert [(row["ours"], row["peer"]) for row in rows] == [(2.5, 2.1), (2.0, 1.6), (0.25, None)]
    rows = list(bench_gpu_runs.beside_cpu(metrics(3.0, 2.0), metrics(3.0, 1.6, tokens=9), 2))
    assert [(row["ours"], row["peer"]) for row in rows] == [(2.5, None), (2.0, None)]
    assert all("other data" in row["note"] for row in rows)


def test_demo_trains_as_many_steps_as_the_cpu_did_and_then_more(monkeypatch, tmp_path):
    cpu = bench_gpu_runs.read_metrics(bench_gpu_runs.CPU_RUN)
    asked: list[int] = []
    built: list[Path] = []

    def finetune(steps: int, device: torch.device) -> list[dict[str, Any]]:
        asked.append(steps)
        return cpu

    monkeypatch.setattr(bench_gpu_runs, "finetune", finetune)
    monkeypatch.setattr(bench_gpu_runs, "ROOT", tmp_path)
    model = tmp_path / "assets" / bench_gpu_runs.MODEL_NAME
    model.mkdir(parents=True)
    (model / "config.json").touch()
    monkeypatch.setattr(bench_gpu_runs, "build_dataset", built.append)
    rows = list(bench_gpu_runs.demo(Sizes(), CPU))
    assert asked == [40, 200] and built == [tmp_path / "assets"]
    assert [row["ratio"] for row in rows[:2]] == [1.0, 1.0] and rows[2]["ours"] == 0.0
    assert len(rows[-1]["losses"]) == 40  # those of the run


def test_without_its_model_the_demo_is_skipped_and_nothing_is_downloaded(monkeypatch, tmp_path):
    monkeypatch.setattr(bench_gpu_runs, "ROOT", tmp_path)
    [line] = bench_gpu_runs.demo(TINY, CPU)
    wanted = tmp_path / "assets" / bench_gpu_runs.MODEL_NAME
    assert line == {"skipped": f"{wanted} is not there: make demo fetches it"}


def test_a_missing_peer_is_named_and_ours_is_measured_all_the_same(monkeypatch):
    monkeypatch.setattr(bench_gpu_train.util, "find_spec", lambda name: name != "bitsandbytes")
    lines = list(bench_gpu_train.decode(TINY, CPU))
    [skipped] = [line["skipped"] for line in lines if "skipped" in line]
    assert skipped == "bitsandbytes is not installed, so transformers + bitsandbytes is not measured"
    assert {line["against"] for line in lines if "skipped" not in line} == {
        None,
        bench_gpu_train.SIXTEEN_BITS,
    }


# -- random models -----------------------------------------------------------------------------------------


class LargestFloat(TorchDispatchMode):
    """Notes the most numbers that any floating-point result has."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.is_floating_point():
            self.numbers = max(self.numbers, result.numel())
        return result


@pytest.mark.parametrize("shape", [(96, 512), (3, 50)])
def test_a_random_nf4_weight_is_made_as_a_quantized_one_is_but_never_in_full(shape):
    like = NF4Tensor.from_float(torch.randn(shape, dtype=torch.bfloat16))
    with LargestFloat() as seen:
        made = bench_gpu_models.random_nf4(shape, torch.bfloat16, torch.Generator().manual_seed(0))
    assert seen.numbers <= 256  # a codebook's
    assert made.format == like.format and made.dtype == like.dtype
    assert {name: (part.dtype, part.shape) for name, part in made.parts.items()} == {
        name: (part.dtype, part.shape) for name, part in like.parts.items()
    }
    numbers = made.dequantize(torch.float32)
    assert numbers.isfinite().all()
    # 49,152 numbers: the size is known to a hundredth; of 150 to a tenth.
    assert numbers.square().mean().sqrt().item() == pytest.approx(bench_gpu_models.STD, rel=0.15)


def test_a_random_model_has_its_blocks_in_4_bits_and_the_rest_in_the_compute_dtype():
    arch = bench_gpu_models.architecture("tiny")
    model = bench_gpu_models.random_model(arch, CPU, torch.bfloat16, quantized=True)
    in_4_bits = {name for name, weight in model.named_parameters() if isinstance(weight, NF4Tensor)}
    linear = {f"{name}.weight" for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)}
    assert in_4_bits == linear - {"lm_head.weight"} and len(in_4_bits) == 14
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert not any(weight.is_meta or weight.requires_grad for weight in model.parameters())


@pytest.mark.parametrize("name", ["llama3-8b", "llama-65b"])
def test_the_peer_gets_the_sizes_that_ours_has(name):
    config, arch = bench_gpu_models.model_config(name), bench_gpu_models.architecture(name)
    sizes = ("hidden_size", "intermediate_size", "vocab_size")
    assert [config[size] for size in sizes] == [getattr(arch, size) for size in sizes]
    heads = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    assert [config[size] for size in heads] == [arch.n_layers, arch.n_heads, arch.n_kv_heads]


@peers
def test_the_peer_trains_its_adapters_alone_and_computes_a_block_again_where_it_is_asked_to():
    from bitsandbytes.nn import Linear4bit

    examples = bench_gpu_models.random_examples(2, 8, 256)
    checkpoint, step = bench_gpu_models.peer_trainer("tiny", 4, examples, CPU, torch.float32)
    model = inspect.getclosurevars(step).nonlocals["model"]
    assert sum(isinstance(layer, Linear4bit) for layer in model.modules()) == 14
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert len(trained) == 28 and all("lora_" in name for name in trained)
    calls = []
    [norm] = [layer for name, layer in model.named_modules() if name.endswith("layers.0.input_layernorm")]
    norm.register_forward_pre_hook(lambda *_: calls.append(1))
    before = step()
    assert len(calls) == 1
    checkpoint(True)
    after = step()
    assert len(calls) == 3 and after < before
    checkpoint(False)
    step()
    assert len(calls) == 4


# -- measuring ---------------------------------------------------------------------------------------------


def test_on_a_gpu_the_clock_runs_between_events_around_the_call_alone(monkeypatch):
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool):
            assert enable_timing

        def record(self) -> None:
            log.append("record")

        def elapsed_time(self, other: "Event") -> float:
            return 7.0

    class Cache:
        def zero_(self) -> None:
            log.append("flush")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append("synchronize"))
    timer = Timer(torch.device("cuda"))
    assert timer.flushed is None  # no memory is taken where that is measured
    timer.flushed = Cache()  # type: ignore[assignment]
    assert timer(lambda: log.append("call")) == 7.0
    assert log == ["synchronize", "flush", "record", "call", "record", "synchronize"]


def test_contenders_take_turns_and_medians_are_kept(monkeypatch):
    order: list[str] = []
    times = iter([1.0, 10.0, 5.0, 30.0, 2.0, 20.0])

    class Fake(Timer):
        def __call__(self, call):
            call()
            return next(times)

    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    assert Fake(CPU).in_turn(calls, 3) == {"a": 2.0, "b": 20.0}
    assert order == list("ababab")


def test_running_out_of_memory_is_a_finding_and_any_other_error_a_failure(capsys):
    def out_of_memory():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB\nand more")

    found, reason = tried(out_of_memory)
    assert found is None and reason == f"{OUT_OF_MEMORY}: CUDA out of memory. Tried to allocate 1 GiB"
    finding = as_row("65B", "peak memory", "GiB", None, 45.0, reason=reason)
    assert finding["ratio"] is None and finding["reason"] == reason
    assert bench_gpu.Result(rows=[finding]).errors == []

    found, reason = tried(lambda: [][0])
    assert reason == "IndexError: list index out of range" and "Traceback" in capsys.readouterr().err
    result = bench_gpu.Result(rows=[finding, as_row("a", "b", "c", None, reason=reason)], failed="late")
    assert result.errors == [reason, "late"]


def test_a_model_that_does_not_fit_is_a_row_and_the_next_is_measured(monkeypatch):
    def paper_model(name: str, device: torch.device) -> Any:
        if name == "llama-65b":
            raise torch.OutOfMemoryError("too large")
        return torch.nn.Module()

    monkeypatch.setattr(bench_gpu_train, "paper_model", paper_model)
    monkeypatch.setattr(bench_gpu_train, "keep_adapters_in", lambda model, dtype: None)
    monkeypatch.setattr(bench_gpu_train, "memory_rows", lambda name, *_: iter([name]))
    sizes = replace(TINY, paper={"llama-65b": 45.0, "tiny": None})
    first, *others = bench_gpu_train.memory(sizes, CPU)
    assert (first["ours"], first["peer"], first["reason"]) == (None, 45.0, f"{OUT_OF_MEMORY}: too large")
    assert others == ["tiny"] * 4


def test_a_step_that_runs_out_of_memory_leaves_the_other_modes_of_the_contender(monkeypatch):
    measure = bench_gpu_train.in_mode

    def in_mode(switches: tuple[bool, bool], *others: Any) -> bench_gpu_train.Found:
        if switches == bench_gpu_train.MODES["no recompute"]:
            raise torch.OutOfMemoryError("too much to keep")
        return measure(switches, *others)

    monkeypatch.setattr(bench_gpu_train, "in_mode", in_mode)
    monkeypatch.setattr(bench_gpu_train.util, "find_spec", lambda name: None)  # no peer
    rows = [line for line in bench_gpu_train.train(TINY, CPU) if "skipped" not in line]
    without = [row for row in rows if row["case"] == "no recompute"]
    assert [row["ours"] for row in without] == [None] * 4
    assert {row["reason"] for row in without} == {f"{OUT_OF_MEMORY}: too much to keep"}
    assert len(measured([row for row in rows if row["case"] != "no recompute"])) == 8


# -- the process of a stage --------------------------------------------------------------------------------


def collect(code: str, limit: float = 60) -> bench_gpu.Result:
    return bench_gpu.collect([sys.executable, "-c", code], {}, limit)


ROW = as_row("a case", "speed", "GB/s", 2.0, 1.0, against="them")
SAYS = f"import json; print('noise'); print(json.dumps({ROW!r}), flush=True)\n"


def test_the_rows_of_a_stage_that_breaks_are_kept(capsys):
    result = collect(SAYS + 'print(\'{"skipped": "x is missing"}\'); raise SystemExit(3)')
    assert (result.rows, result.skipped) == ([ROW], ["x is missing"])
    assert result.failed == "ended with code 3"
    out = capsys.readouterr().out
    assert out.count("\n") == 2 and "a case" in out and "skipped: x is missing" in out


def test_a_stage_that_takes_too_long_is_stopped_with_all_that_it_started():
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    result = collect(SAYS + child, limit=2)  # the grandchild holds the pipe as well
    assert result.rows == [ROW] and result.failed == "stopped after 2 seconds"


def test_every_stage_has_a_limit_and_together_they_take_nine_minutes():
    assert bench_gpu.LIMITS.keys() == bench_gpu.MODULES.keys()
    assert sum(bench_gpu.LIMITS.values()) <= 9 * 60


def test_a_stage_that_fails_makes_the_exit_code_1_and_the_others_run(tmp_path, monkeypatch, capsys):
    def fake(command, environment, limit):
        stage = environment[bench_gpu.IN_STAGE]
        assert command[-len(argv) :] == argv and limit == bench_gpu.LIMITS[stage]
        return bench_gpu.Result([ROW], failed="ended with code 1" if stage == "linear" else None)

    monkeypatch.setattr(bench_gpu, "collect", fake)
    argv = ["--stage", "linear", "decode", "--tiny", "--output_dir", str(tmp_path)]
    with pytest.raises(SystemExit) as stop:
        bench_gpu.main(argv)
    assert stop.value.code == 1
    assert capsys.readouterr().err == "error: something went wrong in linear; the rows say what\n"
    documents = {path.name: json.loads(path.read_text()) for path in tmp_path.iterdir()}
    assert documents.keys() == {"gpu_linear.json", "gpu_decode.json"}
    for document in documents.values():
        assert document["rows"] == [ROW] and document["command"].startswith("scripts/bench.py gpu --stage")
    assert documents["gpu_linear.json"]["failed"] and documents["gpu_decode.json"]["failed"] is None


def test_the_command_leaves_a_document_for_its_stage(tmp_path):
    command = [sys.executable, str(bench.DOOR), "gpu", "--tiny", "--device", "cpu", "--stage", "linear"]
    done = subprocess.run([*command, "--output_dir", str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads((tmp_path / "gpu_linear.json").read_text())
    assert json.loads(done.stdout.splitlines()[-1]) == document
    assert document["device"]["type"] == "cpu" and document["versions"]["torch"] == torch.__version__
    assert document["rows"] and document["failed"] is None


def test_a_folder_that_cannot_be_made_is_said_before_anything_is_measured(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setattr(bench_gpu, "collect", lambda *_: pytest.fail("measured"))
    with pytest.raises(SystemExit) as stop:
        bench_gpu.main(["--tiny", "--output_dir", str(tmp_path / "file" / "results")])
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'file' / 'results'}: Not a directory\n"


def test_a_package_without_metadata_costs_no_measurement():
    assert bench.version_of("torch") == torch.__version__
    assert bench.version_of("bench_gpu") is None


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_what_can_be_run(capsys):
    with pytest.raises(SystemExit) as stop:
        bench_gpu.main([])
    assert stop.value.code == 2
    wanted = "error: there is no GPU to measure; --tiny runs every stage at toy size on a CPU\n"
    assert capsys.readouterr().err == wanted
