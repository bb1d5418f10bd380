"""The benchmarks run, count what they say they count, and end with the document that figures are drawn from.

Nothing here looks at how fast anything is: sizes are tiny, and the machine is not to itself.
"""

import json
import math
import subprocess
import sys
from importlib import util
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import bench
import bench_error
import bench_quant
import bench_train
from minqlora.codebook import QUANT_TYPES

ROOT = Path(__file__).resolve().parents[1]


def run(*arguments: str) -> list[str]:
    """Run the script as the command line does; return the lines of its output."""
    done = subprocess.run(
        [sys.executable, "scripts/bench.py", *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def stop_of(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Run the script in this process, where it is expected to stop early; return the exit code."""
    monkeypatch.setattr(sys, "argv", ["bench.py", *arguments])
    with pytest.raises(SystemExit) as stop:
        bench.main()
    assert isinstance(stop.value.code, int)
    return stop.value.code


def positive(number: Any) -> bool:
    return isinstance(number, float) and math.isfinite(number) and number > 0


# -- the door ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no benchmark named; the first word is one of train, quant, error"),
        (["quantize"], "there is no benchmark 'quantize'; the first word is one of train, quant, error"),
        (["--rounds", "1"], "there is no benchmark '--rounds'; "),
        (["train", "--case", "main"], "--case: there is no such option; did you mean --cases?"),
        (["train", "--cases", "mian"], "--cases: expected one of main, growth, curve"),
        (["quant", "--contender", "peer"], "--contender: there is no such option"),
        (["quant", "--shapes", "64x64", "64"], "expected a shape, rows x columns, as in 576x1536; got '64'"),
        (["quant", "--rounds", "0"], "rounds and tokens must be positive"),
        (["quant", "--allocators", "jemalloc"], "--allocators: expected one of glibc, tcmalloc"),
        (["error", "--shape", "0x64"], "expected a shape, rows x columns, as in 576x1536; got '0x64'"),
        (["error", "--model", "no/such", "--shape", "8x64"], "no/such: "),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, message, monkeypatch, capsys):
    assert stop_of(monkeypatch, *arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {message}") and err.count("\n") == 1


@pytest.mark.parametrize("name", bench.BENCHMARKS)
def test_each_benchmark_has_a_help_of_its_own(name, monkeypatch, capsys):
    assert stop_of(monkeypatch, name, "--help") == 0
    out = capsys.readouterr().out
    assert f"usage: bench.py {name} " in " ".join(out.split()) and "--output" in out


def test_the_help_names_every_benchmark(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench.py", "--help"])
    bench.main()
    lines = capsys.readouterr().out.splitlines()
    assert all(any(line.startswith(f"{name} ") for line in lines) for name in bench.BENCHMARKS)


def test_a_document_is_printed_even_if_it_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit):
        bench.print_document({"rows": []}, tmp_path / "file" / "result.json")
    out, err = capsys.readouterr()
    assert json.loads(out) == {"rows": []} and err.startswith("error: ") and err.count("\n") == 1


# -- train -------------------------------------------------------------------------------------------------


def test_a_row_of_train_has_the_median_ratio_of_neighbours_or_none_without_a_peer():
    def runs(*speeds: float) -> list[dict[str, Any]]:
        others = dict(supervised_per_s=1.0, step_s=1.0, peak_mb=1.0, losses=[2.0, 1.0])
        return [dict(tokens_per_s=speed, **others) for speed in speeds]

    alone = {"minqlora": runs(30.0, 10.0, 22.0)}
    [row, *_] = bench_train.as_rows(alone | {"peer": runs(10.0, 10.0, 11.0)}, "random", "glibc")
    assert (row["ours"], row["peer"], row["ratio"], row["ratio_16bit"]) == (22.0, 10.0, 2.0, None)
    assert [row["ratio"] for row in bench_train.as_rows(alone, "random", "glibc")] == [None] * 4


def test_train_compares_the_losses_step_by_step():
    run = dict.fromkeys(bench_train.METRICS, 1.0)
    found = {"minqlora": [run | {"losses": [2.0, 1.0]}], "peer": [run | {"losses": [2.0, 1.25]}]}
    last = bench_train.as_rows(found, "curve", "glibc")[-1]
    assert last["metric"] == "losses" and last["largest_relative_difference"] == pytest.approx(0.2)


@pytest.mark.slow
def test_contenders_train_on_the_same_tokens_to_the_same_loss(tmp_path):
    pytest.importorskip("bitsandbytes")
    path = tmp_path / "train.json"
    flags = ["--cases", "gsm8k", "--steps", "1", "--rounds", "1", "--allocators", "glibc"]
    lines = run("train", *flags, "--output", str(path))
    document = json.loads(path.read_text(encoding="utf-8"))
    assert json.loads(lines[-1]) == document
    rows = {row["metric"]: row for row in document["rows"]}
    assert all(positive(rows[metric][who]) for metric in bench_train.METRICS for who in ("ours", "peer"))
    assert rows["losses"]["largest_relative_difference"] < 1e-3


# -- quant -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quant(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The document of a tiny run under glibc, which is also the last line of output."""
    path = tmp_path_factory.mktemp("results") / "folder" / "quant.json"
    lines = run("quant", "--quick", "--allocators", "glibc", "--output", str(path))
    document = json.loads(path.read_text(encoding="utf-8"))
    assert json.loads(lines[-1]) == document
    return document


def installed(name: str) -> bool:
    return util.find_spec(name) is not None


def test_quant_measures_every_stage_in_every_case(quant):
    weights = [f"{shape} {dtype}" for shape in ("72x192", "128x128") for dtype in ("float32", "bfloat16")]
    expected = [
        (stage, case) for case in weights for stage in ("quantize", "dequantize", "dequantize_out")
    ] + [(stage, "128x128 float32, 3 tokens") for stage in ("linear_forward", "linear_train")]
    assert [(row["stage"], row["case"]) for row in quant["rows"]] == expected


def test_quant_rows_are_times_and_our_time_over_each_other_one(quant):
    for row in quant["rows"]:
        assert (row["metric"], row["unit"], row["allocator"]) == ("time", "ms", "glibc")
        assert positive(row["ours"]) and positive(row["floor"]) and positive(row["scratch_mb"])
        for name in ("bitsandbytes", "torchao", "floor"):
            ratio = None if row[name] is None else pytest.approx(row["ours"] / row[name])
            assert row[f"ratio_{name}"] == ratio
            assert row["calls"].get(name, 0) == (0 if row[name] is None else 2)


def test_quant_counts_the_weight_and_its_4_bit_form_once(quant):
    (row,) = (row for row in quant["rows"] if (row["stage"], row["case"]) == ("quantize", "128x128 bfloat16"))
    # 2 bytes a weight and half a byte; a scale for 64 weights, a second scale for 256 scales, and the mean.
    n_bytes = 128 * 128 * 2.5 + 256 + 4 + 4
    assert row["gb_per_s"] == pytest.approx(n_bytes / (row["ours"] * 1e-3) / 1e9)
    assert all((row["gb_per_s"] is None) == (row["tokens"] is not None) for row in quant["rows"])


def test_quant_leaves_out_what_a_peer_cannot_do_and_says_so(quant):
    for row in quant["rows"]:
        decodes_into = row["stage"] == "dequantize_out"  # no peer does; under glibc nothing stands for it
        assert (row["bitsandbytes"] is not None) == (installed("bitsandbytes") and not decodes_into)
        takes = installed("torchao") and not decodes_into and row["shape"] != "72x192"
        assert (row["torchao"] is not None) == takes
    too_small = "torchao cannot take 72x192: no whole number of nested blocks, 64 * 256"
    assert (too_small in quant["skipped"]) == installed("torchao")
    absent = [f"{name} is not installed" for name in bench_quant.PEERS if not installed(name)]
    assert set(quant["skipped"]) - {too_small} == set(absent)


def test_quant_records_machine_versions_command_and_allocator(quant):
    assert quant["machine"] and quant["threads"] >= 1 and list(quant["allocators"]) == ["glibc"]
    assert quant["versions"]["torch"] == torch.__version__
    assert quant["command"].startswith("scripts/bench.py quant --quick --allocators glibc --output ")
    assert any("out=" in note for note in quant["notes"])


def test_quant_stops_where_it_does_not_run_under_the_allocator_it_names(capsys):
    maps = Path("/proc/self/maps")
    if maps.exists() and "tcmalloc" in maps.read_text():
        pytest.skip("these tests run under tcmalloc")
    bench_quant.require_allocator("glibc")
    with pytest.raises(SystemExit):
        bench_quant.require_allocator("tcmalloc")
    assert capsys.readouterr().err == "error: tcmalloc is not loaded in the process for tcmalloc\n"


def case(result: float) -> bench_quant.Case:
    calls = {"ours": lambda: torch.tensor([result]), "floor": lambda: torch.tensor([1.0])}
    return bench_quant.Case("dequantize", "1x1", "float32", None, None, calls)


def test_quant_refuses_to_time_a_wrong_result():
    bench_quant.warm_up(case(1.1), "ours")
    with pytest.raises(AssertionError, match="ours, dequantize of 1x1 float32: wrong by 30%"):
        bench_quant.warm_up(case(1.3), "ours")


@pytest.mark.parametrize(("seconds", "rounds", "expected"), [(1e9, 7, 7), (0.0, 7, 2), (0.0, 1, 1)])
def test_quant_gives_a_slow_contender_fewer_rounds(seconds, rounds, expected):
    row = bench_quant.measure(case(1.0), bench_quant.Config(rounds=rounds, seconds=seconds), "glibc")
    assert row["calls"] == {"ours": expected, "floor": expected}


# -- error -------------------------------------------------------------------------------------------------


def test_error_ranks_every_code_and_normal_float_is_the_best_of_the_4_bit_ones(tmp_path):
    path = tmp_path / "error.json"
    lines = run("error", "--model", "none", "--shape", "256x256", "--output", str(path))
    document = json.loads(lines[-1])
    assert json.loads(path.read_text(encoding="utf-8")) == document
    rows = document["rows"]
    assert sorted(row["quant_type"] for row in rows) == sorted(QUANT_TYPES)
    assert all(positive(row["rms_error"]) and positive(row["relative_rms_error"]) for row in rows)
    assert [row["code_bits"] for row in rows] == [2, 3, 4, 4, 4, 4, 4, 4, 5, 6, 7, 8]
    four = [row for row in rows if row["code_bits"] == 4]
    assert four[0]["quant_type"] == "nf4"
    assert four == sorted(four, key=lambda row: row["relative_rms_error"])


def test_error_of_nf4_and_fp4_is_that_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    rows = {row["quant_type"]: row for row in bench_error.measure("normal", [weight])}
    for quant_type in ("nf4", "fp4"):
        quantized = functional.quantize_4bit(weight, compress_statistics=True, quant_type=quant_type)
        error = (functional.dequantize_4bit(*quantized) - weight).square().mean().sqrt().item()
        # Codes are equal; 0.2 % of the scales are one of 256 levels apart.
        assert rows[quant_type]["rms_error"] == pytest.approx(error, rel=1e-3)
        relative = error / weight.square().mean().sqrt().item()
        assert rows[quant_type]["relative_rms_error"] == pytest.approx(relative, rel=1e-3)


def test_error_of_a_model_is_that_of_its_linear_weights_together(tmp_path):
    generator = torch.Generator().manual_seed(0)
    small, large = torch.randn(8, 64, generator=generator), 10 * torch.randn(4, 64, generator=generator)
    others = {"embed_tokens.weight": torch.full((2, 64), 1e6), "q_proj.bias": torch.full((8,), 1e6)}
    tensors = {"layers.0.q_proj.weight": small, "layers.0.down_proj.weight": large}
    safetensors.torch.save_file(tensors | others, tmp_path / "model.safetensors")
    together, one, other = (
        {row["quant_type"]: row for row in bench_error.measure("x", weights)}
        for weights in (bench_error.linear_weights(tmp_path), [small], [large])
    )
    for name, row in together.items():
        assert (row["tensors"], row["numbers"]) == (2, 12 * 64)
        total = one[name]["rms_error"] ** 2 * 8 * 64 + other[name]["rms_error"] ** 2 * 4 * 64
        assert row["rms_error"] == pytest.approx(math.sqrt(total / (12 * 64)))
        assert row["relative_rms_error"] == pytest.approx(
            math.sqrt(total / (small.square().sum() + large.square().sum()).item())
        )


def test_error_says_when_a_folder_has_no_linear_weights(tmp_path, monkeypatch, capsys):
    safetensors.torch.save_file({"wte.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    assert stop_of(monkeypatch, "error", "--shape", "8x64", "--model", str(tmp_path)) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}: holds no tensor named *_proj.weight\n"


def test_the_readme_quotes_the_committed_results():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = json.loads((ROOT / "docs/results/error.json").read_text())["rows"]
    assert len(rows) == 2 * len(QUANT_TYPES)
    missing = [
        f"{row['quant_type']}: {100 * row['relative_rms_error']:.2f}"
        for row in rows
        if f"{100 * row['relative_rms_error']:.2f}" not in readme
    ]
    assert not missing


@pytest.mark.parametrize("case", ["normal 4096x1024", "smollm2-135m-instruct"])
def test_nf4_loses_least_of_all_codes_of_4_bits(case):
    rows = json.loads((ROOT / "docs/results/error.json").read_text())["rows"]
    errors = {
        row["quant_type"]: row["relative_rms_error"]
        for row in rows
        if row["case"] == case and row["code_bits"] == 4
    }
    assert len(errors) == 6 and min(errors, key=errors.__getitem__) == "nf4"
