"""GSM8K from one command: what is held out is not learned from, and the figures come out in one document."""

import json
import sys
from pathlib import Path

import pytest

import gsm8k


def written(path: Path, n: int) -> Path:
    rows = [{"question": f"What is {i} plus 1?", "answer": f"It is\n#### {i + 1}"} for i in range(n)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_last_lines_are_held_out_and_every_line_is_in_one_part(tmp_path: Path) -> None:
    data = written(tmp_path / "all.jsonl", 9)
    train, held_out = gsm8k.split(data, 4, tmp_path / "parts")
    assert train.read_bytes() + held_out.read_bytes() == data.read_bytes()
    assert json.loads(held_out.read_text().splitlines()[0])["question"] == "What is 5 plus 1?"


def test_one_command_trains_evaluates_and_writes_the_figures(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, run, output = written(tmp_path / "all.jsonl", 12), tmp_path / "run", tmp_path / "out.json"
    arguments = ["gsm8k.py", data, "--model", tiny_model, "--output_dir", run, "--output", output]
    arguments += ["--held_out", 4, "--max_steps", 2, "--max_new_tokens", 4]
    monkeypatch.setattr(sys, "argv", [str(argument) for argument in arguments])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert gsm8k.main() == 0
    document = json.loads(output.read_text())
    assert document["steps"] == 2 and document["num_tokens"] > 0
    assert document["held_out_loss"]["after"] != document["held_out_loss"]["before"]
    exact = document["results"][0]
    assert exact["items"] == 4 and set(exact["contenders"]) == {"base", "run"}
    assert "answers" not in document
    assert len(json.loads((run / "gsm8k.json").read_text())["answers"]) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["nowhere.jsonl"],
            "nowhere.jsonl: no such file; DATA is GSM8K's train.jsonl, from github.com/openai/",
        ),
        (["few.jsonl"], "few.jsonl: 3 lines, of which --held_out 150 leave none to learn"),
        (["few.jsonl", "--held_out", "0"], "--held_out must be at least 1, got 0"),
        (["few.jsonl", "--output", "no/such.json"], "--output no/such.json: there is no such folder"),
    ],
)
def test_what_is_wrong_is_one_line_before_anything_is_written(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    written(tmp_path / "few.jsonl", 3)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["gsm8k.py", *arguments, "--output_dir", "run"])
    with pytest.raises(SystemExit) as stop:
        gsm8k.main()
    assert stop.value.code == 2 and capsys.readouterr().err.startswith(f"error: {message}")
    assert [path.name for path in tmp_path.iterdir()] == ["few.jsonl"]
