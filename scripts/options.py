"""One typed configuration becomes flags, YAML keys and `--help`.

    @dataclass
    class Config:
        model: Path = option(REQUIRED, "folder of the base model", aliases=["model_name_or_path"])
        learning_rate: float = option(2e-4, "peak learning rate")
        max_steps: int | None = option(None, "stop after so many optimizer steps")
        double_quant: bool = option(True, "quantize the scales too: 4.127 bits per parameter, not 4.5")

    config = parse(Config)

    python scripts/finetune.py --model models/smollm2 --learning-rate 1e-4 --double_quant false
    python scripts/finetune.py --config run.yaml --max_steps 100      # the command line wins

Options declared `positional=True` need no flag: `scripts/quantize.py MODEL OUT` says what `--model MODEL
--out OUT` does.

The idea: a value is text until the converter of its field has seen it, whether it stood behind a flag or in a
YAML file. So `2e-4`, which PyYAML alone would hand over as a string, is a number in both, `007` stays text in
both, and both give the same message. In a name `_` and `-` are the same. A bare boolean flag means true.
`none` (in YAML also `null`) is None where None is allowed, so that a flag can undo a line of the file. Paths
start from the current folder, in a file too.

Every mistake of the user is a ValueError inside and, through `user_errors`, one line and exit code 2 outside.
argparse splits the command line and lays out the help; its own conversions and messages are not used.
"""

import argparse
import dataclasses
import difflib
import itertools
import math
import os
import re
import shutil
import sys
import types
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

REQUIRED: Any = dataclasses.MISSING  # as the default of an option that has none

# What a message and the help call one value of a type; a type that is not here is none of an option.
EXPECTED = {int: "a whole number", float: "a number", bool: "true or false", Path: "a path", str: "text"}
METAVAR = {int: "N", float: "X", bool: "true|false", Path: "PATH", str: "TEXT"}

C = TypeVar("C")


def option(
    default: Any,
    help: str,
    *,
    aliases: Sequence[str] = (),
    choices: Sequence[Any] = (),
    bare: str | None = None,
    positional: bool = False,
) -> Any:
    """Return a dataclass field that is also a flag and a YAML key.

    Args:
        default: the value when nothing is given; REQUIRED if something must be. A list is copied.
        help: what it is, with its unit; `--help` adds the default, unless this has `default:` in it.
        aliases: other names for it, on the command line and in YAML.
        choices: the values allowed, where the annotation is not a Literal, which says it better.
        bare: the text that the flag alone stands for, as `latest` in `--resume_from_checkpoint [PATH]`;
            a boolean's is `true`.
        positional: its value can also stand without the flag, before all flags, in the order of the fields;
            a list, which comes last of these, takes all words that are left.
    """
    metadata: dict[str, Any] = {"help": help, "aliases": tuple(aliases), "choices": tuple(choices)}
    metadata |= {"bare": bare, "positional": positional}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def parse(config_class: type[C], argv: Sequence[str] | None = None, description: str | None = None) -> C:
    """Return a `config_class` filled from the command line and the YAML file that `--config` names.

    Args:
        config_class: a dataclass of `option` fields; a ValueError of its `__post_init__` is the user's.
        argv: the command line without the program; None: this process's.
        description: the head of `--help`.

    Raises:
        SystemExit: code 2 after one line on stderr for a mistake of the user; code 0 after `--help`.
        TypeError: a field's annotation is none that text can be read into.
    """
    options = [_Option(field, hint) for field, hint in _fields(config_class)]
    with user_errors():
        values = _read_flags(options, sys.argv[1:] if argv is None else argv, description)
        file = values.pop("config", None)
        if file is not None:
            values = _convert(options, _read_yaml(file)) | values
        missing = [f"--{option.name}" for option in options if option.required and option.name not in values]
        if missing:
            raise ValueError(f"{', '.join(missing)}: required, and not given (see --help)")
        return config_class(**values)


def to_yaml(config: Any) -> str:
    """Return the configuration as YAML text, which `--config` reads back into an equal one."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    for name, value in values.items():
        if isinstance(value, list):
            values[name] = [str(item) if isinstance(item, Path) else item for item in value]
        elif isinstance(value, Path):
            values[name] = str(value)
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn a ValueError or OSError raised inside into one line on stderr, `error: ...`, and exit code 2.

    Whoever reads stdout may have had enough of it (`... | head`): then nothing is said, and the exit code is
    141, that of a program which the signal SIGPIPE ends.
    """
    try:
        yield
        sys.stdout.flush()  # what is still to be written fails here, and not where nobody can catch it
    except BrokenPipeError:
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # Python flushes it once more at the end
        raise SystemExit(141) from None
    except (ValueError, OSError) as error:
        message = str(error)
        if isinstance(error, OSError) and error.filename is not None:
            message = f"{error.filename}: {error.strerror}"
        print("error:", " ".join(map(str.strip, message.splitlines())) or repr(error), file=sys.stderr)
        raise SystemExit(2) from None


# -- a field and its converter -----------------------------------------------------------------------------


def _fields(config_class: Any) -> list[tuple["dataclasses.Field[Any]", Any]]:
    hints = get_type_hints(config_class)
    return [(field, hints[field.name]) for field in dataclasses.fields(config_class)]


class _Option:
    """One field: its type T, list[T] or either `| None`, where T may be a Literal, taken apart."""

    def __init__(self, field: "dataclasses.Field[Any]", hint: Any) -> None:
        metadata = field.metadata
        self.name: str = field.name
        self.names: list[str] = [field.name, *metadata.get("aliases", ())]
        self.help: str = metadata.get("help", "")
        factory = field.default_factory
        self.default = field.default if factory is dataclasses.MISSING else factory()
        self.required = self.default is dataclasses.MISSING
        self.positional: bool = metadata.get("positional", False)

        members = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
        self.optional = types.NoneType in members
        (kind, *others) = [member for member in members if member is not types.NoneType]
        self.many = get_origin(kind) is list
        if self.many:
            (kind,) = get_args(kind)
        self.choices: Sequence[Any] = metadata.get("choices", ())
        if get_origin(kind) is Literal:
            self.choices = get_args(kind)
            kind = type(self.choices[0])
        if others or kind not in EXPECTED:
            raise TypeError(f"{field.name}: text cannot be read into {hint}")
        self.kind: type = kind
        self.bare: str | None = "true" if kind is bool and not self.many else metadata.get("bare")

    def convert(self, given: Any) -> Any:
        """Return the value written as `given`: a text, None for YAML's null, or a list of these."""
        if given == [] and self.bare is not None:
            given = self.bare
        if self.optional and str(given).lower() == "none" and "none" not in self.choices:
            return None
        if not self.many or given == []:
            return self._convert_one(given)
        return [self._convert_one(item) for item in (given if isinstance(given, list) else [given])]

    def _convert_one(self, text: Any) -> Any:
        try:
            if not isinstance(text, str):
                raise ValueError("null, a list, or nothing at all")
            if self.choices:
                choices = {_text(choice): choice for choice in self.choices}
                return choices[text if text in choices else text.lower()]  # YAML's True is the choice `true`
            if self.kind is bool:
                return {"true": True, "false": False}[text.lower()]
            if self.kind is Path and not text:
                raise ValueError("an unset shell variable; Path('') would be the current folder")
            value = Path(text).expanduser() if self.kind is Path else self.kind(text)
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError("no option has a use for inf or nan")
            return value
        except (KeyError, ValueError, RuntimeError):  # RuntimeError: `~name`, and there is no such user
            one_of = f"one of {', '.join(map(_text, self.choices))}"
            expected = one_of if self.choices else EXPECTED[self.kind]
            got = {"None": "null", "[]": "nothing", "{}": "something nested"}.get(repr(text), repr(text))
            got = f"the list {got}" if got.startswith("[") else got
            raise ValueError(f"expected {expected}, got {got}") from None


def _text(value: Any) -> str:
    """Return a value as the user writes it."""
    if isinstance(value, list):
        return " ".join(map(_text, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


# What other trainers call an option of ours, for whoever comes from there; no spelling is near.
ELSEWHERE = {
    theirs: ours
    for ours, names in {
        "model": "base_model checkpoint_dir",
        "dataset": "data data_path data_files train_data train_file datasets",
        "eval_dataset": "eval_data eval_file validation_file test_data",
        "output_dir": "out output save_dir save_path",
        "lora_r": "r rank",
        "lora_alpha": "alpha",
        "lora_dropout": "dropout",
        "max_seq_length": "cutoff_len max_length max_seq_len seq_len sequence_len model_max_length",
        "packing": "packed sample_packing",
        "per_device_train_batch_size": "batch_size micro_batch_size train_batch_size",
        "gradient_accumulation_steps": "accumulate grad_accum",
        "num_train_epochs": "epochs num_epochs n_epochs",
        "max_steps": "steps iters iterations",
        "learning_rate": "lr",
        "lr_scheduler_type": "scheduler lr_scheduler",
        "warmup_steps": "warmup",
        "optim": "optimizer",
        "bits": "load_in_4bit",
        "max_new_tokens": "max_tokens n_predict",
    }.items()
    for theirs in names.split()
}


def _convert(
    options: Sequence[_Option], given: Iterable[tuple[str, str, Any]], dashes: str = ""
) -> dict[str, Any]:
    """Return the values by field name. `given` tells of each where it stands, its name and its text."""
    by_name = {name: option for option in options for name in option.names}
    values: dict[str, Any] = {}
    first: dict[str, str] = {}
    for where, name, written in given:
        name = name.replace("-", "_")
        option = by_name.get(name)
        if option is None:
            near = difflib.get_close_matches(name, by_name, n=1)
            near = [ours for ours in (ELSEWHERE.get(name), *near) if ours in by_name]
            hint = f"did you mean {dashes}{near[0]}?" if near else "see --help"
            raise ValueError(f"{where}: there is no such option; {hint}")
        if option.name in first:
            raise ValueError(f"{where}: given twice, first as {first[option.name]}")
        first[option.name] = where
        try:
            values[option.name] = option.convert(written)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    return values


# -- flags -------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)  # argparse would print a usage of forty flags above it


class _Collect(argparse.Action):
    """Keep each flag as it was typed, so that a message can quote it and a second one is seen."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        namespace.given.append((option_string, values))


class _Help(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        width = min(shutil.get_terminal_size().columns, 100)
        super().__init__(prog, max_help_position=min(34, width // 2), width=width)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        return f"{action.option_strings[0]} {action.metavar or ''}"  # aliases stand in the help text


@dataclass
class _Config:
    config: Path | None = option(None, "YAML file of these options, `name: value` a line; flags win over it")


def _read_flags(options: Sequence[_Option], argv: Sequence[str], description: str | None) -> dict[str, Any]:
    options = [_Option(*_fields(_Config)[0]), *options]
    first = [option.name for option in options if option.positional]
    parser = _Parser(
        usage=" ".join(["%(prog)s", *map(str.upper, first), "[--flag value ...]"]),
        description=description,
        formatter_class=_Help,
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument("--help", "-h", action="help", help="show this text and stop")
    for option in options:
        metavar = "|".join(map(_text, option.choices)) or METAVAR[option.kind]
        metavar += " ..." if option.many else ""
        default = "" if option.required else _text(option.default)
        notes = ["required" if option.required else f"default: {default or repr(option.default)}"]
        notes = [] if "default:" in option.help else notes  # it says more: what None comes to, for one
        notes += [f"alone: {option.bare}"] if option.bare not in (None, "true") else []
        notes += [f"also --{alias}" for alias in option.names[1:]]
        parser.add_argument(
            *(f"--{name}" for name in option.names),
            action=_Collect,
            nargs="*",  # how many are right is the converter's to say
            default=argparse.SUPPRESS,
            metavar=f"[{metavar}]" if option.bare else metavar,
            help=(option.help + (f" ({'; '.join(notes)})" if notes else "")).replace("%", "%%"),
        )
    words = list(itertools.takewhile(lambda word: not word.startswith("-"), argv))
    many = [option.many for option in options if option.positional][-1:] == [True]
    words = words if many else words[: len(first)]
    parsed, strays = parser.parse_known_args(_spell(argv[len(words) :]), argparse.Namespace(given=[]))
    if strays and not strays[0].startswith("-"):
        raise ValueError(f"unexpected {strays[0]!r}: a value stands behind its flag")
    given = [(f"--{name}", [word]) for name, word in zip(first, words, strict=False)]
    if len(words) > len(first):
        given[-1][1].extend(words[len(first) :])
    given += [(stray.partition("=")[0], []) for stray in strays[:1]] + parsed.given
    # One text is that text, none or several are a list: as a scalar and a list are in YAML.
    return _convert(
        options,
        [(flag, flag.removeprefix("--"), texts[0] if len(texts) == 1 else texts) for flag, texts in given],
        dashes="--",
    )


def _spell(argv: Sequence[str]) -> list[str]:
    """Return argv with each flag's `-` as `_`, and a negative number tied to the flag before it.

    `--x -1e-3` becomes `--x=-1e-3`, because argparse would take the number for an unknown flag.
    """
    tokens: list[str] = []
    for token in argv:
        if token.startswith("--"):
            flag, equals, value = token.partition("=")
            tokens.append("--" + flag[2:].replace("-", "_") + equals + value)
        elif re.match(r"-[\d.]", token) and tokens and re.fullmatch(r"--\w+", tokens[-1]):
            tokens[-1] += f"={token}"
        else:
            tokens.append(token)
    return tokens


# -- YAML --------------------------------------------------------------------------------------------------


def _read_yaml(path: Path) -> list[tuple[str, str, Any]]:
    """Return where each pair of a flat YAML file stands, its name, and its value as it is written there.

    Nodes are read, not objects: a node has its text before YAML 1.1 makes `2e-4` a string and `no` a boolean,
    and its line, and nothing that a tag names is built.
    """
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except UnicodeDecodeError as error:
        line, problem = data[: error.start].count(b"\n"), "not UTF-8 text"
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line if error.problem_mark else 0
        problem = ", ".join(part for part in (error.context, error.problem) if part)
    except yaml.reader.ReaderError as error:
        line, problem = text[: error.position].count("\n"), "a character that YAML does not allow"
    else:
        if root is not None and not isinstance(root, yaml.MappingNode):
            raise ValueError(f"{path}: expected a line `name: value` for each option")
        given = []
        for key, value in root.value if root is not None else []:  # None: nothing but comments
            name = str(_written(key))
            given.append((f"{path}, line {key.start_mark.line + 1}: {name}", name, _written(value)))
        return given
    raise ValueError(f"{path}, line {line + 1}: broken YAML: {problem}")


def _written(node: yaml.Node) -> Any:
    """Return a scalar's text, None for null, a list of these, and {} for what no option takes."""
    if isinstance(node, yaml.SequenceNode):
        return [_written(item) if isinstance(item, yaml.ScalarNode) else {} for item in node.value]
    if isinstance(node, yaml.ScalarNode):
        return None if node.tag == "tag:yaml.org,2002:null" else node.value
    return {}
