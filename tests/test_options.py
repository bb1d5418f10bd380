"""The command line: flags and YAML say the same thing, and a mistake is one line and exit code 2."""

import os
import string
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import options
from options import REQUIRED, option, parse, to_yaml, user_errors


@dataclass
class Config:
    model: Path = option(Path("here"), "folder of the base model", aliases=["model_name_or_path"])
    dataset: list[Path] = option([Path("a.jsonl")], "files of rows")
    learning_rate: float = option(2e-4, "peak learning rate; 30 % of runs change it", aliases=["lr"])
    lora_r: int = option(64, "rank")
    bits: Literal[4, 16] = option(4, "bits of a base weight; 16: no quantization")
    optim: str = option("adamw", "optimizer", choices=["adamw", "sgd"])
    packing: bool = option(False, "several rows in one sequence")
    gradient_checkpointing: Literal["true", "false", "offload"] = option("false", "recompute", bare="true")
    resume: str | None = option(None, "checkpoint to go on from", bare="latest")
    max_steps: int | None = option(None, "optimizer steps (default: by epochs)")
    prompt: str = option("", "text to answer")
    dtype: Literal["bfloat16", "float32"] | None = option(None, "compute dtype")
    eval_dataset: list[Path] | None = option(None, "files of rows held out")

    def __post_init__(self) -> None:
        if self.lora_r < 1:
            raise ValueError(f"lora_r must be 1 or more, got {self.lora_r}")


def read(*argv: str) -> Config:
    return parse(Config, argv)


@pytest.fixture
def read_yaml(tmp_path: Path) -> Any:
    def reader(text: str | bytes, *argv: str) -> Config:
        file = tmp_path / "run.yaml"
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        return parse(Config, ["--config", str(file), *argv])

    return reader


@pytest.fixture
def error_of(capsys: pytest.CaptureFixture[str]) -> Any:
    """Run a call that must end with exit code 2; return the one line that it printed, without `error: `."""

    def catch(call: Any, *args: str) -> str:
        with pytest.raises(SystemExit) as stop:
            call(*args)
        out, err = capsys.readouterr()
        assert stop.value.code == 2
        assert out == ""
        assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n"), err
        return err.removeprefix("error: ").rstrip("\n")

    return catch


# -- flags -------------------------------------------------------------------------------------------------


def test_nothing_given_is_the_dataclass_itself():
    assert read() == Config()


def test_a_default_list_is_not_shared():
    read().dataset.append(Path("b.jsonl"))
    assert read().dataset == [Path("a.jsonl")]


@pytest.mark.parametrize("argv", [["--learning_rate", "1e-3"], ["--learning-rate=1e-3"], ["--lr", "1e-3"]])
def test_space_equals_dash_underscore_and_alias_are_the_same(argv):
    assert read(*argv) == Config(learning_rate=1e-3)


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        (["--model", "some/folder"], "model", Path("some/folder")),
        (["--dataset", "x", "y z"], "dataset", [Path("x"), Path("y z")]),
        (["--dataset", "x"], "dataset", [Path("x")]),
        (["--lora_r", "8"], "lora_r", 8),
        (["--bits", "16"], "bits", 16),
        (["--optim", "sgd"], "optim", "sgd"),
        (["--packing"], "packing", True),
        (["--packing", "true"], "packing", True),
        (["--packing", "False"], "packing", False),
        (["--gradient_checkpointing"], "gradient_checkpointing", "true"),
        (["--gradient_checkpointing", "offload"], "gradient_checkpointing", "offload"),
        (["--resume"], "resume", "latest"),
        (["--resume", "checkpoint-8"], "resume", "checkpoint-8"),
        (["--max_steps", "10"], "max_steps", 10),
        (["--max_steps", "none"], "max_steps", None),
        (["--dtype", "float32"], "dtype", "float32"),
        (["--dtype", "None"], "dtype", None),
        (["--eval_dataset", "x", "y"], "eval_dataset", [Path("x"), Path("y")]),
        (["--eval_dataset", "none"], "eval_dataset", None),
        (["--learning_rate", "-1e-3"], "learning_rate", -1e-3),
        (["--max_steps", "-1"], "max_steps", -1),
        (["--prompt", "2e-4"], "prompt", "2e-4"),
        (["--prompt", "- a list?"], "prompt", "- a list?"),
        (["--prompt=--packing"], "prompt", "--packing"),
        (["--prompt=a=b"], "prompt", "a=b"),
        (["--prompt="], "prompt", ""),
        (["--prompt", "none"], "prompt", "none"),
    ],
)
def test_a_flag_is_read_by_its_type(argv, name, value):
    assert read(*argv) == replace(Config(), **{name: value})
    assert type(getattr(read(*argv), name)) is type(value)


def test_flags_after_a_bare_flag_are_their_own():
    assert read("--packing", "--resume", "--lora_r", "8") == Config(packing=True, resume="latest", lora_r=8)


def test_a_path_may_start_at_home():
    assert read("--model=~/m").model == Path.home() / "m"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--lora_r"], "--lora_r: expected a whole number, got nothing"),
        (["--dataset"], "--dataset: expected a path, got nothing"),
        (["--lora_r", "1e1"], "--lora_r: expected a whole number, got '1e1'"),
        (["--learning_rate", "fast"], "--learning_rate: expected a number, got 'fast'"),
        (["--learning_rate", "nan"], "--learning_rate: expected a number, got 'nan'"),
        (
            ["--learning_rate", "1e-4", "2e-4"],
            "--learning_rate: expected a number, got the list ['1e-4', '2e-4']",
        ),
        (["--learning_rate", "none"], "--learning_rate: expected a number, got 'none'"),
        (["--packing", "maybe"], "--packing: expected true or false, got 'maybe'"),
        (["--bits", "8"], "--bits: expected one of 4, 16, got '8'"),
        (["--optim", "adam"], "--optim: expected one of adamw, sgd, got 'adam'"),
        (["--model="], "--model: expected a path, got ''"),
        (["--prompt", "two", "words"], "--prompt: expected text, got the list ['two', 'words']"),
        (["--lerning-rate", "1"], "--lerning_rate: there is no such option; did you mean --learning_rate?"),
        (["--lerning_rate=1"], "--lerning_rate: there is no such option; did you mean --learning_rate?"),
        (["-learning_rate", "1"], "-learning_rate: there is no such option; did you mean --learning_rate?"),
        (["--r", "8"], "--r: there is no such option; did you mean --lora_r?"),
        (["--train-file", "x"], "--train_file: there is no such option; did you mean --dataset?"),
        (["--batch_size", "8"], "--batch_size: there is no such option; see --help"),  # nor here
        (["--xyzzy"], "--xyzzy: there is no such option; see --help"),
        (["file.jsonl"], "unexpected 'file.jsonl': a value stands behind its flag"),
        (["--lora_r=8", "9"], "unexpected '9': a value stands behind its flag"),
        (["--lora_r", "8", "--lora-r", "8"], "--lora_r: given twice, first as --lora_r"),
        (["--lr", "1", "--learning_rate", "1"], "--learning_rate: given twice, first as --lr"),
        (["--lora_r", "0"], "lora_r must be 1 or more, got 0"),
    ],
)
def test_a_wrong_flag_is_one_line_that_says_what_came_and_what_was_expected(argv, message, error_of):
    assert error_of(read, *argv) == message


@pytest.mark.parametrize("short", ["--learning", "--pack", "--mod", "--config_file"])
def test_an_abbreviation_is_no_flag(short, error_of):
    assert error_of(read, short, "1").startswith(f"{short}: there is no such option; ")


def test_what_is_required_and_missing_is_named(error_of):
    @dataclass
    class Strict:
        model: Path = option(REQUIRED, "folder")
        dataset: list[Path] = option(REQUIRED, "files")

    message = error_of(lambda: parse(Strict, ["--model", "m"]))
    assert message == "--dataset: required, and not given (see --help)"
    assert parse(Strict, ["--model", "m", "--dataset", "d"]) == Strict(Path("m"), [Path("d")])


def test_the_command_line_of_the_process_is_the_default(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["finetune.py", "--lora_r", "8"])
    assert parse(Config) == Config(lora_r=8)


@pytest.mark.parametrize("annotation", [int | str, dict[str, int], list[dict[str, int]], bytes])
def test_an_annotation_that_text_cannot_fill_is_the_programmers_mistake(annotation):
    Odd = dataclass(type("Odd", (), {"__annotations__": {"x": annotation}, "x": option(None, "")}))
    with pytest.raises(TypeError, match="x: text cannot be read into"):
        parse(Odd, [])


@dataclass
class Pair:
    model: Path = option(REQUIRED, "what is read", positional=True)
    out: Path = option(Path("here"), "what is written", positional=True)
    lora_r: int = option(64, "rank")


@pytest.mark.parametrize(
    "argv",
    [
        ["a", "b", "--lora_r", "8"],
        ["a", "--out", "b", "--lora-r", "8"],
        ["--lora_r", "8", "--out", "b", "--model", "a"],
    ],
)
def test_a_positional_option_stands_first_or_behind_its_flag(argv):
    assert parse(Pair, argv) == Pair(Path("a"), Path("b"), 8)


def test_positional_options_are_filled_in_order():
    assert parse(Pair, ["a"]) == Pair(Path("a"))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["a", "b", "c"], "unexpected 'c': a value stands behind its flag"),
        (["a", "--model", "b"], "--model: given twice, first as --model"),
        ([], "--model: required, and not given (see --help)"),
    ],
)
def test_a_mistake_with_positional_options_is_named(argv, message, error_of):
    assert error_of(parse, Pair, argv) == message


@dataclass
class Many:
    to: Path = option(REQUIRED, "where to", positional=True)
    parts: list[Path] = option(REQUIRED, "what of", positional=True)
    lora_r: int = option(64, "rank")


@pytest.mark.parametrize(
    "argv", [["x", "a", "b", "--lora_r", "8"], ["x", "--parts", "a", "b", "--lora_r", "8"]]
)
def test_a_positional_list_takes_the_words_that_are_left(argv):
    assert parse(Many, argv) == Many(Path("x"), [Path("a"), Path("b")], 8)


def test_help_shows_what_stands_first(capsys):
    with pytest.raises(SystemExit):
        parse(Pair, ["--help"])
    assert "MODEL OUT [--flag value ...]" in capsys.readouterr().out


# -- YAML --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("learning_rate: 2e-5", "learning_rate", 2e-5),  # PyYAML: the string '2e-5'
        ("learning-rate: 1", "learning_rate", 1.0),
        ("lr: 1", "learning_rate", 1.0),
        ("lora_r: '8'", "lora_r", 8),
        ("packing: True", "packing", True),
        ("gradient_checkpointing: true", "gradient_checkpointing", "true"),  # PyYAML: a boolean
        ("gradient_checkpointing: False", "gradient_checkpointing", "false"),
        ("resume: null", "resume", None),
        ("resume:", "resume", None),
        ("max_steps: ~", "max_steps", None),
        ("max_steps: none", "max_steps", None),
        ("dtype: null", "dtype", None),
        ("eval_dataset:", "eval_dataset", None),
        ("dataset: [x, y]", "dataset", [Path("x"), Path("y")]),
        ("dataset:\n- x\n- 2024-01-01", "dataset", [Path("x"), Path("2024-01-01")]),  # PyYAML: a date
        ("dataset: x", "dataset", [Path("x")]),
        ("prompt: 007", "prompt", "007"),  # PyYAML: 7
        ("prompt: no", "prompt", "no"),  # PyYAML: False
        ("prompt: |\n  two\n  lines", "prompt", "two\nlines"),
        ("prompt: é", "prompt", "é"),
    ],
)
def test_a_yaml_value_is_read_as_it_is_written(line, name, value, read_yaml):
    config = read_yaml(f"# a comment\n{line}")
    assert config == replace(Config(), **{name: value})
    assert type(getattr(config, name)) is type(value)


@pytest.mark.parametrize("text", ["", "# nothing yet\n", "\ufeff", "{}"])
def test_an_empty_file_changes_nothing(text, read_yaml):
    assert read_yaml(text) == Config()


def test_the_command_line_wins_wherever_it_stands(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("lr: 1\nlora_r: 8\nmax_steps: 5\n")
    want = Config(learning_rate=2.0, lora_r=8, max_steps=None)
    assert read("--learning_rate", "2", "--max_steps", "none", "--config", str(file)) == want
    assert read(f"--config={file}", "--learning_rate", "2", "--max_steps", "none") == want


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\nlora_r: many", "line 2: lora_r: expected a whole number, got 'many'"),
        ("lora_r: null", "line 1: lora_r: expected a whole number, got null"),
        ("lora_r:", "line 1: lora_r: expected a whole number, got null"),
        ("packing: yes", "line 1: packing: expected true or false, got 'yes'"),
        ("bits: 8", "line 1: bits: expected one of 4, 16, got '8'"),
        ("lr: [1e-4]", "line 1: lr: expected a number, got the list ['1e-4']"),
        ("model: [a, b]", "line 1: model: expected a path, got the list ['a', 'b']"),
        ("dataset: []", "line 1: dataset: expected a path, got nothing"),
        ("dataset: [a, null]", "line 1: dataset: expected a path, got null"),
        ("dataset: [[a]]", "line 1: dataset: expected a path, got something nested"),
        ("dataset: &a [*a]", "line 1: dataset: expected a path, got something nested"),
        ("lora_r: {a: 1}", "line 1: lora_r: expected a whole number, got something nested"),
        ("lora_r: 8\nlora_r: 8", "line 2: lora_r: given twice, first as FILE, line 1: lora_r"),
        ("lr: 8\nlearning-rate: 8", "line 2: learning-rate: given twice, first as FILE, line 1: lr"),
        ("lora_r: 8\nlora_q: 8", "line 2: lora_q: there is no such option; did you mean lora_r?"),
        ("xyzzy: 8", "line 1: xyzzy: there is no such option; see --help"),
        ("config: other.yaml", "line 1: config: there is no such option; see --help"),
        ("lora_r: 8\nmodel: [a", "line 2: broken YAML: while parsing a flow sequence, expected ',' or ']', "),
        ("lora_r: 8\n\tbits: 4", "line 2: broken YAML: "),
        ("lora_r: 8\n---\nlora_r: 8", "line 2: broken YAML: expected a single document in the stream"),
        ("lora_r: 8\nprompt: \x01", "line 2: broken YAML: a character that YAML does not allow"),
        (b"lora_r: 8\nprompt: \xff", "line 2: broken YAML: not UTF-8 text"),
    ],
)
def test_a_wrong_line_of_yaml_is_named_with_its_file(text, message, read_yaml, error_of, tmp_path):
    file = tmp_path / "run.yaml"
    assert error_of(read_yaml, text).startswith(f"{file}, {message.replace('FILE', str(file))}")


@pytest.mark.parametrize("text", ["- lora_r: 8", "lora_r"])
def test_a_file_that_is_no_mapping_is_refused(text, read_yaml, error_of, tmp_path):
    want = f"{tmp_path / 'run.yaml'}: expected a line `name: value` for each option"
    assert error_of(read_yaml, text) == want


def test_a_yaml_tag_builds_nothing(read_yaml, tmp_path):
    made = tmp_path / "made"
    assert read_yaml(f"dataset: !!python/object/apply:os.mkdir ['{made}']").dataset == [made]
    assert not made.exists()


def test_a_config_file_that_is_not_there_is_named(error_of, tmp_path):
    assert (
        error_of(read, "--config", f"{tmp_path}/no.yaml") == f"{tmp_path}/no.yaml: No such file or directory"
    )
    assert error_of(read, "--config", str(tmp_path)) == f"{tmp_path}: Is a directory"
    assert error_of(read, "--config") == "--config: expected a path, got nothing"
    assert error_of(read, "--config", "a", "--config", "b") == "--config: given twice, first as --config"


# -- flags and YAML agree ----------------------------------------------------------------------------------

words = st.text(st.characters(exclude_categories=["C"]), min_size=1).filter(
    lambda text: text.lower() != "none"
)
paths = words.map(Path).filter(lambda path: not str(path).startswith("~"))
configs = st.builds(
    Config,
    model=paths,
    dataset=st.lists(paths, min_size=1, max_size=3),
    learning_rate=st.floats(allow_nan=False, allow_infinity=False),
    lora_r=st.integers(min_value=1),
    bits=st.sampled_from([4, 16]),
    optim=st.sampled_from(["adamw", "sgd"]),
    packing=st.booleans(),
    gradient_checkpointing=st.sampled_from(["true", "false", "offload"]),
    resume=st.none() | words,
    max_steps=st.none() | st.integers(),
    prompt=st.text(string.printable) | words,
    dtype=st.sampled_from([None, "bfloat16", "float32"]),
    eval_dataset=st.none() | st.lists(paths, min_size=1, max_size=3),
)


@given(configs)
@settings(deadline=None)  # the first example waits for the disk
def test_to_yaml_is_read_back_into_an_equal_configuration(tmp_path_factory, config):
    file = tmp_path_factory.mktemp("yaml") / "config.yaml"
    file.write_bytes(to_yaml(config).encode())
    assert read("--config", str(file)) == config


@given(configs)
@settings(deadline=None)
def test_the_same_values_as_flags_give_an_equal_configuration(config):
    lists = {name: value for name, value in asdict(config).items() if isinstance(value, list)}
    argv = []
    for name, value in asdict(config).items():
        if isinstance(value, list):  # a path that begins with a dash would be a flag, so say where it is
            argv += [f"--{name}", *(str(Path.cwd() / item) for item in value)]
        else:
            argv.append(f"--{name}={str(value).lower() if isinstance(value, bool | None) else value}")
    here = {name: [Path.cwd() / path for path in paths] for name, paths in lists.items()}
    assert read(*argv) == replace(config, **here)


@given(st.text())
@settings(deadline=None)
def test_any_yaml_text_is_read_or_refused_and_never_crashes(tmp_path_factory, text):
    file = tmp_path_factory.mktemp("yaml") / "config.yaml"
    file.write_bytes(text.encode(errors="surrogatepass"))
    try:
        read("--config", str(file))
    except SystemExit as stop:
        assert stop.code == 2


def test_the_yaml_is_also_what_pyyaml_reads():
    assert yaml.safe_load(to_yaml(Config(max_steps=3)))["max_steps"] == 3
    assert yaml.safe_load(to_yaml(Config()))["model"] == "here"


# -- help and errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [80, 100])
def test_help_has_each_option_with_its_default_and_fits_the_terminal(columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit) as stop:
        parse(Config, ["--help"], "Fine-tune.\n\n    python finetune.py --config run.yaml")
    out, err = capsys.readouterr()
    assert stop.value.code == 0 and err == ""
    assert "Fine-tune.\n\n    python finetune.py --config run.yaml\n" in out  # kept as it was written
    assert max(map(len, out.splitlines())) <= columns
    text = " ".join(out.split())
    assert "--learning_rate X peak learning rate; 30 % of runs change it (default: 0.0002; also --lr)" in text
    assert "--model PATH folder of the base model (default: here; also --model_name_or_path)" in text
    assert "--dataset PATH ... files of rows (default: a.jsonl)" in text
    assert "--bits 4|16 bits of a base weight; 16: no quantization (default: 4)" in text
    assert "--packing [true|false] several rows in one sequence (default: false)" in text
    assert "--resume [TEXT] checkpoint to go on from (default: none; alone: latest)" in text
    assert "--prompt TEXT text to answer (default: '')" in text
    assert "--max_steps N optimizer steps (default: by epochs) --prompt" in text  # its own words, once
    assert "--config PATH YAML file" in text


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("row 3:\n   no answer"), "row 3: no answer"),
        (ValueError(), "ValueError()"),
        (
            FileNotFoundError(2, "No such file or directory", "a  b.json"),
            "a  b.json: No such file or directory",
        ),
        (OSError("the disk is full"), "the disk is full"),
    ],
)
def test_user_errors_prints_one_line_and_exits_with_2(error, message, error_of):
    def fail() -> None:
        with user_errors():
            raise error

    assert error_of(fail) == message


def test_user_errors_leaves_a_bug_its_traceback():
    with pytest.raises(KeyError), user_errors():
        raise KeyError("ours")


def test_a_script_ends_with_code_2_and_no_traceback():
    code = "import options, dataclasses; options.parse(dataclasses.make_dataclass('C', []))"
    environment = {**os.environ, "PYTHONPATH": str(Path(options.__file__).parent)}
    command = [sys.executable, "-c", code, "--what"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert done.stderr == "error: --what: there is no such option; see --help\n"


@pytest.mark.parametrize("printed", ["'a line'", "'a line\\n' * 100_000"])
def test_a_reader_who_goes_away_ends_a_script_without_a_word(printed):
    code = f"import options\nwith options.user_errors():\n    print({printed})"
    environment = {**os.environ, "PYTHONPATH": str(Path(options.__file__).parent)}
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=writing, stderr=subprocess.PIPE, text=True, env=environment
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")
