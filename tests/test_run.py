"""A run folder belongs to one run, and every line of its metrics can be read at any moment."""

import json
import sys
from pathlib import Path

import pytest
import torch

from minqlora.run import MetricsLog, environment, next_run_folder, peak_memory_gib, require_unused


def test_the_first_run_of_a_name_is_1(tmp_path: Path) -> None:
    assert next_run_folder(tmp_path / "nowhere", "demo") == tmp_path / "nowhere" / "demo-1"
    assert not (tmp_path / "nowhere").exists()


def test_the_next_run_comes_after_all_there_are(tmp_path: Path) -> None:
    for name in ["demo-2", "demo-10", "demo-old", "demo-3-copy", "demonstration-99", "other-50", "demo-"]:
        (tmp_path / name).mkdir()
    assert next_run_folder(tmp_path, "demo") == tmp_path / "demo-11"
    assert next_run_folder(tmp_path, "other") == tmp_path / "other-51"


def test_a_name_is_not_a_pattern(tmp_path: Path) -> None:
    (tmp_path / "llama[1]-1").mkdir()
    (tmp_path / "other-5").mkdir()
    assert next_run_folder(tmp_path, "llama[1]") == tmp_path / "llama[1]-2"
    assert next_run_folder(tmp_path, "*") == tmp_path / "*-1"


def test_a_new_or_an_empty_folder_may_be_used(tmp_path: Path) -> None:
    require_unused(tmp_path)
    require_unused(tmp_path / "a" / "b")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("config.yaml", "another run"),
        ("notes.txt", "other files"),
        (".hidden", "other files"),
        ("adapter_model.safetensors", "other files"),
    ],
)
def test_a_folder_that_holds_anything_is_refused(tmp_path: Path, name: str, what: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(ValueError, match=f"{tmp_path}: holds {what}.* choose another --output_dir"):
        require_unused(tmp_path)


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(ValueError, match=f"{tmp_path / 'run'}: is a file; choose another --output_dir"):
        require_unused(tmp_path / "run")


def test_a_row_of_metrics_is_on_disk_as_soon_as_it_is_written(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    for step in range(3):
        log.write({"step": step, "loss": 0.5, "name": "ü"})
        lines = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").split("\n")
        assert lines.pop() == "" and [json.loads(line)["step"] for line in lines] == list(range(step + 1))
    log.close()


def test_the_metrics_of_another_run_are_never_written_to(tmp_path: Path) -> None:
    MetricsLog(tmp_path).write({"step": 3})
    with pytest.raises(FileExistsError):
        MetricsLog(tmp_path)


def test_numbers_that_json_lacks_are_written_as_null(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    log.write({"loss": float("nan"), "eta": float("inf"), "least": -float("inf"), "step": 1, "rate": 0.5})
    log.close()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert row == {"loss": None, "eta": None, "least": None, "step": 1, "rate": 0.5}


def test_the_environment_names_versions_device_and_dtype() -> None:
    found = json.loads(json.dumps(environment(torch.device("cpu"), torch.bfloat16)))
    assert found["device"] == "cpu" and found["compute_dtype"] == "bfloat16"
    assert found["versions"]["torch"] == torch.__version__ and found["versions"]["minqlora"]
    assert found["threads"] == torch.get_num_threads()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_the_kernels_own_count() -> None:
    ours = peak_memory_gib(torch.device("cpu"))
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line]
    kib = int(line.split()[1])
    assert abs(ours * 2**20 - kib) <= 0.01 * kib
