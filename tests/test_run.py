"""A run folder belongs to one run, and every line of its metrics can be read at any moment."""

import json
import os
import platform
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from minqlora.run import (
    MetricsLog,
    checkpoints,
    discard_after,
    environment,
    newest_checkpoint,
    next_run_folder,
    peak_memory_gib,
    prune_checkpoints,
    read_checkpoint,
    require_unused,
    save_checkpoint,
    set_rng_state,
    stop_requests,
)


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


# -- checkpoints -------------------------------------------------------------------------------------------


def write_files(folder: Path) -> None:
    (folder / "a.bin").write_bytes(bytes(range(256)))
    (folder / "b.json").write_text("{}")


def test_a_checkpoint_holds_its_files_its_state_and_their_checksums(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 40, write_files, {"epoch": 1.5})
    assert path == tmp_path / "checkpoint-40"
    assert sorted(file.name for file in path.iterdir()) == ["SHA256SUMS", "a.bin", "b.json", "state.json"]
    state = read_checkpoint(path)
    assert (state["step"], state["epoch"]) == (40, 1.5)
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=path, check=True)
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint-40"]


def test_a_save_that_fails_leaves_nothing_and_the_one_before_untouched(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, write_files, {})

    def fill_the_disk(folder: Path) -> None:
        write_files(folder)
        raise OSError(28, "No space left on device", str(folder))

    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(tmp_path, 2, fill_the_disk, {})
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint-1"]
    assert newest_checkpoint(tmp_path)[0].name == "checkpoint-1"


@pytest.mark.parametrize("file", ["a.bin", "b.json", "state.json", "SHA256SUMS"])
def test_any_flipped_byte_is_found_and_the_checkpoint_before_it_used(tmp_path: Path, file: str) -> None:
    save_checkpoint(tmp_path, 9, write_files, {})
    path = save_checkpoint(tmp_path, 10, write_files, {}) / file
    whole = path.read_bytes()
    for place in range(0, len(whole), max(len(whole) // 40, 1)):
        for flip in (0x01, 0x15, 0x80):
            flipped = bytearray(whole)
            flipped[place] ^= flip
            path.write_bytes(flipped)
            found, _, problems = newest_checkpoint(tmp_path)
            assert found.name == "checkpoint-9"
            assert len(problems) == 1 and str(path.parent) in problems[0]
    path.write_bytes(whole)
    assert newest_checkpoint(tmp_path)[0].name == "checkpoint-10"


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, write_files, {})
    (path / "a.bin").unlink()
    with pytest.raises(ValueError, match=r"no checkpoint to go on from: .*a\.bin: not found, but SHA256SUMS"):
        newest_checkpoint(tmp_path)
    (path / "SHA256SUMS").unlink()
    with pytest.raises(ValueError, match=r"SHA256SUMS: not found, so this is no checkpoint"):
        newest_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="it has none; start without --resume_from_checkpoint"):
        newest_checkpoint(tmp_path / "nowhere")


def test_a_checkpoint_under_another_name_is_not_taken_for_it(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, write_files, {}).rename(tmp_path / "checkpoint-2")
    with pytest.raises(ValueError, match="is of step 1, and so of another checkpoint"):
        read_checkpoint(tmp_path / "checkpoint-2")


def test_old_checkpoints_go_and_the_best_stays(tmp_path: Path) -> None:
    for step in (1, 9, 10, 11):
        save_checkpoint(tmp_path, step, write_files, {})
    (tmp_path / "checkpoint-old").mkdir()  # of somebody else
    prune_checkpoints(tmp_path, 2, also=tmp_path / "checkpoint-1")
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["checkpoint-1", "checkpoint-10", "checkpoint-11", "checkpoint-old"]
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-11", "checkpoint-10", "checkpoint-1"]


def test_what_comes_after_the_step_that_a_run_goes_on_from_is_deleted(tmp_path: Path) -> None:
    for step in (2, 9, 10):
        save_checkpoint(tmp_path, step, write_files, {})
    (tmp_path / "checkpoint-10" / "a.bin").unlink()
    discard_after(tmp_path, 9)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-9"]


def test_every_random_generator_goes_on_where_it_was(tmp_path: Path) -> None:
    def draw() -> list:
        return [random.random(), random.gauss(0, 1), np.random.rand(), *torch.rand(3).tolist()]

    random.gauss(0, 1)  # of which Python keeps a second one in store
    path = save_checkpoint(tmp_path, 1, write_files, {})
    drawn = draw()
    assert draw() != drawn
    set_rng_state(read_checkpoint(path)["rng"])
    assert draw() == drawn


# -- metrics of a run that goes on ---------------------------------------------------------------------------


def test_rows_after_the_checkpoint_are_taken_out_and_a_torn_line_too(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    for step in range(5):
        log.write({"step": step, "loss": 1.0})
    log.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "lo')
    log = MetricsLog(tmp_path, resumed_from=2)
    log.write({"step": 3, "loss": 2.0})
    log.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["loss"]) for row in rows] == [(0, 1.0), (1, 1.0), (2, 1.0), (3, 2.0)]


# -- signals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_signal_is_noted_and_the_handlers_come_back(
    number: int, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(number)
    with stop_requests() as request:
        assert request.number is None
        os.kill(os.getpid(), number)
        assert request.number == number and request.exit_code == code
    assert signal.getsignal(number) is before
    assert "stopping after this step; once more stops at once" in capsys.readouterr().err


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_a_second_signal_ends_the_process_at_once() -> None:
    code = (
        "import os, signal, time\nfrom minqlora.run import stop_requests\n"
        "with stop_requests():\n    for _ in range(2): os.kill(os.getpid(), signal.SIGTERM)\n"
        "    time.sleep(60)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60)
    assert done.returncode == 143


# -- memory ------------------------------------------------------------------------------------------------

FAULTS = """
import resource
import torch
from minqlora.run import keep_freed_memory
keep_freed_memory()
for step in range(20):
    if step == 10:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.ones(2**20) for _ in range(16)]
    del blocks
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="glibc's malloc")
def test_memory_that_is_freed_is_not_fetched_from_the_system_again() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    command = [sys.executable, "-c", FAULTS]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert int(done.stdout) < 1000  # 163,520 as glibc is set
