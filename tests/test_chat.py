"""An answer streams in whole characters, and the script answers with the model that a run was trained on."""

import io
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import chat
from minqlora import add_lora, load_adapter, load_model, save_adapter
from minqlora.data import DataReport, Recipe, encode_rows, rows_of
from minqlora.lora import lora_layers
from minqlora.model import CausalLM
from minqlora.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Tokenizer:
    return Tokenizer(tiny_model)


@pytest.fixture(scope="module")
def tiny(tiny_model: Path) -> CausalLM:
    return load_model(tiny_model, dtype=torch.float32)


@pytest.fixture(scope="module")
def run_folder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of finetune.py, as far as chat.py looks: an adapter that matters, and config.yaml."""
    folder = tmp_path_factory.mktemp("runs") / "tiny-1"
    model = load_model(tiny_model)
    torch.manual_seed(0)
    add_lora(model, r=4, dropout=0.5)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.3)
    save_adapter(model, folder)
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": str(tiny_model), "lora_r": 4}))
    return folder


class Terminal(io.StringIO):
    """What stands in for standard input where `input` is replaced."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is piped in, but where a test says so."""
    monkeypatch.setattr(sys, "stdin", Terminal())


def talk(monkeypatch: pytest.MonkeyPatch, *flags: str) -> None:
    """Call the script as the command line does, computing in float32."""
    monkeypatch.setattr(sys, "argv", ["chat.py", "--dtype", "float32", *flags])
    chat.main()


def error_of(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    """The one line of an exit with code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        talk(monkeypatch, *flags)
    out, err = capsys.readouterr()
    assert (stop.value.code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n")
    return err


# -- an answer, piece by piece -----------------------------------------------------------------------------


def test_the_pieces_are_the_answer(tiny: CausalLM, tokenizer: Tokenizer) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    prompt = tokenizer.encode(tokenizer.render(messages, add_generation_prompt=True))
    options: dict[str, Any] = dict(max_new_tokens=40, temperature=1.0, seed=1)
    ids = list(chat.generate(tiny, prompt, eos_ids=tokenizer.eos_ids, **options))
    pieces = list(chat.reply(tiny, tokenizer, messages, **options))
    assert len(ids) > 5 and "".join(pieces) == tokenizer.decode(ids)


def pieces_of(tokenizer: Tokenizer, ids: list[int], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(chat, "generate", lambda *_, **__: iter(ids))
    return list(chat.reply(None, tokenizer, [{"role": "user", "content": "Hi"}]))


def test_a_character_of_many_tokens_is_never_split(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "aé中🙂b👩‍👩‍👧"
    ids = tokenizer.encode(text)
    assert len(ids) == len(text.encode())  # a token for each byte
    pieces = pieces_of(tokenizer, ids, monkeypatch)
    assert "".join(pieces) == text
    assert [piece for piece in pieces if piece] == list(text)


def test_pieces_come_as_soon_as_their_tokens(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = itertools.count()
    ids = tokenizer.encode("abcdef")
    monkeypatch.setattr(chat, "generate", lambda *_, **__: (ids[next(asked)] for _ in ids))
    pieces = chat.reply(None, tokenizer, [{"role": "user", "content": "Hi"}])
    assert [next(pieces), next(pieces)] == ["a", "b"]
    assert next(asked) == 2


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 266), max_size=20))
def test_pieces_of_any_tokens_are_the_decoded_whole(tokenizer: Tokenizer, ids: list[int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        assert "".join(pieces_of(tokenizer, ids, patch)) == tokenizer.decode(ids)


@settings(max_examples=100, deadline=None)
@given(text=st.text())
def test_pieces_of_any_text_hold_no_broken_character(tokenizer: Tokenizer, text: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        pieces = pieces_of(tokenizer, tokenizer.encode(text), patch)
    assert "".join(pieces) == tokenizer.decode(tokenizer.encode(text))
    assert sum(piece.count("\ufffd") for piece in pieces) == text.count("\ufffd")


# -- the script --------------------------------------------------------------------------------------------


def test_one_prompt_is_answered_and_done(
    tiny_model: Path,
    tiny: CausalLM,
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    talk(monkeypatch, "--model", str(tiny_model), "--prompt", "Hi", "--max_new_tokens", "8")
    expected = "".join(chat.reply(tiny, tokenizer, [{"role": "user", "content": "Hi"}], max_new_tokens=8))
    assert capsys.readouterr().out == expected + "\n"


def test_a_run_is_enough_to_find_base_and_adapter(
    tiny_model: Path,
    run_folder: Path,
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = load_model(tiny_model, dtype=torch.float32)
    load_adapter(model, run_folder)
    messages = [{"role": "system", "content": "Short."}, {"role": "user", "content": "Hi"}]
    expected = "".join(chat.reply(model.eval(), tokenizer, messages, max_new_tokens=8)) + "\n"
    options = ["--prompt", "Hi", "--system", "Short.", "--max_new_tokens", "8"]
    talk(monkeypatch, "--model", str(tiny_model), *options)
    base = capsys.readouterr().out
    talk(monkeypatch, "--adapter", str(run_folder), *options)
    tuned = capsys.readouterr().out
    assert tuned == expected != base
    talk(monkeypatch, "--model", str(tiny_model), "--adapter", str(run_folder), *options)
    assert capsys.readouterr().out == tuned


def test_options_reach_generation(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []

    def generate(model: Any, prompt: list[int], **options: Any) -> list[int]:
        seen.append(options)
        return []

    monkeypatch.setattr(chat, "generate", generate)
    options = dict(max_new_tokens=9, temperature=0.7, top_k=7, top_p=0.9, repetition_penalty=1.1, seed=5)
    flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    talk(monkeypatch, "--model", str(tiny_model), "--prompt", "Hi", *flags)
    del seen[0]["prefix"]
    assert seen == [options | {"eos_ids": [2]}]


@pytest.fixture
def piped(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """A function that makes a text what is piped in."""
    return lambda text: monkeypatch.setattr(sys, "stdin", io.StringIO(text))


def test_what_is_piped_in_is_answered_once(
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    piped: Callable[[str], None],
) -> None:
    options = ["--model", str(tiny_model), "--max_new_tokens", "8"]
    talk(monkeypatch, *options, "--prompt", "Hi\nthere")
    expected = capsys.readouterr().out
    piped("Hi\nthere\n\n")
    talk(monkeypatch, *options)
    assert capsys.readouterr() == (expected, "")
    piped(" \n")
    assert "standard input is empty" in error_of(monkeypatch, capsys, *options)


def test_what_is_piped_in_must_be_text(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9"), encoding="utf-8"))
    error = error_of(monkeypatch, capsys, "--model", str(tiny_model))
    assert "standard input: not UTF-8 (unexpected end of data at byte 3)" in error


def test_an_answer_that_is_interrupted_is_130(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(chat, "generate", interrupted_after([60]))
    with pytest.raises(SystemExit) as stop:
        talk(monkeypatch, "--model", str(tiny_model), "--prompt", "Hi")
    assert stop.value.code == 130 and "Traceback" not in capsys.readouterr().err


def interrupted_after(ids: list[int]) -> Callable[..., Iterator[int]]:
    def generate(*_: Any, **__: Any) -> Iterator[int]:
        yield from ids
        raise KeyboardInterrupt

    return generate


# -- a stop text -------------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(
    text=st.text("abc\n", max_size=20), stop=st.lists(st.text("abc\n", min_size=1, max_size=4), max_size=3)
)
def test_an_answer_ends_before_a_stop_text_and_no_piece_shows_any_of_it(
    tokenizer: Tokenizer, text: str, stop: list[str]
) -> None:
    ids = tokenizer.encode(text)
    shown = list(chat.pieces(iter(ids), tokenizer, stop))
    # Token by token, what stands before a stop text as soon as there is one.
    texts = (tokenizer.decode(ids[:n]) for n in range(len(ids) + 1))
    ended = next((part for part in texts if any(end in part for end in stop)), text)
    assert "".join(shown) == chat.before_stop(ended, stop)
    assert not any(end in "".join(shown) for end in stop)


def test_text_is_held_back_only_while_it_may_be_a_stop_text(tokenizer: Tokenizer) -> None:
    asked = itertools.count()
    ids = tokenizer.encode("a-b--c---d")
    shown = chat.pieces((ids[next(asked)] for _ in ids), tokenizer, ["---"])
    # Each piece, and how many tokens it took to be sure of it.
    seen = [(piece, asked.__reduce__()[1][0]) for piece in shown if piece]
    assert seen == [("a", 1), ("-b", 3), ("--c", 6)]


def test_generation_goes_no_further_than_a_stop_text(tokenizer: Tokenizer) -> None:
    asked = itertools.count()
    ids = tokenizer.encode("a. b. c.")
    assert "".join(chat.pieces((ids[next(asked)] for _ in ids), tokenizer, [". "])) == "a"
    assert next(asked) == len(tokenizer.encode("a. "))


# -- a conversation ----------------------------------------------------------------------------------------


@pytest.fixture
def hold(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """A function that says some lines in a conversation and returns what is printed."""

    def hold(lines: list[Any], *flags: str) -> str:
        said = iter([*lines, EOFError])

        def listen(prompt: str) -> str:
            line = next(said)
            if not isinstance(line, str):
                raise line
            return line

        monkeypatch.setattr("builtins.input", listen)
        capsys.readouterr()
        talk(monkeypatch, "--model", str(tiny_model), "--max_new_tokens", "8", *flags)
        out, err = capsys.readouterr()
        assert err == ""
        return out

    return hold


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer) -> list[str]:
    """The prompts that a model hears which says "to 1", "to 2" and so on."""
    heard: list[str] = []

    def generate(model: Any, prompt: list[int], **options: Any) -> list[int]:
        heard.append(tokenizer.decode(prompt, skip_special_tokens=False))
        return tokenizer.encode(f"to {len(heard)}")

    monkeypatch.setattr(chat, "generate", generate)
    return heard


def turns(*texts: str) -> str:
    """A prompt: texts that begin with s:, u: or a:, and the header of an answer."""
    roles = {"s": "system", "u": "user", "a": "assistant"}
    said = "".join(f"<|im_start|>{roles[text[0]]}\n{text[3:]}<|im_end|>\n" for text in texts)
    return said + "<|im_start|>assistant\n"


def test_a_conversation_remembers_what_was_said(hold: Callable[..., str], heard: list[str]) -> None:
    out = hold(["one", "  two ", "", "never"], "--system", "S")
    assert heard == [turns("s: S", "u: one"), turns("s: S", "u: one", "a: to 1", "u: two")]
    assert out.split() == ["model:", "to", "1", "model:", "to", "2"]


@pytest.mark.parametrize("end", [EOFError, KeyboardInterrupt, "/quit", ""])
def test_a_conversation_can_be_left_at_any_time(hold: Callable[..., str], end: Any) -> None:
    assert hold([end]).strip() == ""


def test_commands_change_what_the_model_hears(hold: Callable[..., str], heard: list[str]) -> None:
    out = hold(["one", "/system Be short.", "two", "/reset", "three", "/system", "//four"])
    assert heard == [
        turns("u: one"),
        turns("s: Be short.", "u: one", "a: to 1", "u: two"),
        turns("s: Be short.", "u: three"),
        turns("u: three", "a: to 3", "u: /four"),
    ]
    assert [line for line in out.splitlines() if line and not line.startswith("model:")] == [
        "the system message is set",
        "forgotten",
        "there is no system message",
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/adaptor off", "there is no command /adaptor; /help lists them"),
        ("/adapter other", "there is no adapter 'other'; there is none; --adapter names a folder"),
        ("/adapter on", "there is no adapter 'on'; there is none"),
        ("/save", "/save needs the name of a file"),
        ("/save x.jsonl", "there is nothing to save yet"),
    ],
    ids=str,
)
def test_a_wrong_command_is_told_and_the_conversation_goes_on(
    hold: Callable[..., str], heard: list[str], line: str, message: str
) -> None:
    out = hold([line, "one"])
    assert f"error: {message}" in out and heard == [turns("u: one")]


def test_help_names_every_command(hold: Callable[..., str]) -> None:
    out = hold(["/help"])
    assert all(name in out for name in ("/adapter", "/system", "/reset", "/save", "/quit", "Ctrl-C"))


def test_a_saved_conversation_is_a_row_that_can_be_learned_from(
    hold: Callable[..., str], heard: list[str], tmp_path: Path, tokenizer: Tokenizer
) -> None:
    path = tmp_path / "said.jsonl"
    out = hold(["/system S", "eins é", f"/save {path}", "two", f"/save {path}", "/save /nowhere/x.jsonl"])
    assert f"saved as line 1 of {path}" in out and f"saved as line 2 of {path}" in out
    assert "error: " in out and "No such file" in out
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [len(row["messages"]) for row in rows] == [3, 5]
    assert rows[0]["messages"][1:] == [
        {"role": "user", "content": "eins é"},
        {"role": "assistant", "content": "to 1"},
    ]
    report = DataReport()
    assert len(list(encode_rows(rows_of([path]), tokenizer, Recipe(512), report))) == report.used == 2


def test_ctrl_c_stops_an_answer_and_what_was_said_of_it_counts(
    hold: Callable[..., str], heard: list[str], monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer
) -> None:
    usual, ids = chat.generate, tokenizer.encode("so far")
    answers = iter([interrupted_after(ids), interrupted_after([]), usual])
    monkeypatch.setattr(chat, "generate", lambda *args, **options: next(answers)(*args, **options))
    out = hold(["one", "two", "three"])
    assert out.count("[stopped]") == 2 and "model: so far [stopped]" in out
    assert heard == [turns("u: one", "a: so far", "u: three")]  # what was not answered was not said


def test_a_conversation_that_gets_long_loses_its_oldest_turns_whole(
    hold: Callable[..., str], heard: list[str], tokenizer: Tokenizer
) -> None:
    two_turns = len(tokenizer.encode(turns("s: S", "u: " + "1" * 20, "a: to 1", "u: " + "1" * 20)))
    said = [f"{n}" * 20 for n in range(1, 5)]
    out = hold([*said, "x" * 300, "five"], "--system", "S", "--max_context", str(two_turns + 8))
    u, a = [f"u: {text}" for text in said], [f"a: to {n}" for n in range(1, 5)]
    assert heard == [
        turns("s: S", u[0]),
        turns("s: S", u[0], a[0], u[1]),
        turns("s: S", u[1], a[1], u[2]),
        turns("s: S", u[2], a[2], u[3]),
        turns("s: S", u[3], a[3], "u: five"),
    ]
    told = f"left out from here on: {two_turns + 8} tokens at most"
    assert [line.partition(" turns")[0][-1] for line in out.splitlines() if told in line] == ["1", "2", "3"]
    assert "the question alone takes" in out and f"there is room for {two_turns}" in out


def test_turns_of_a_conversation_are_answered_as_with_a_fresh_cache(
    hold: Callable[..., str], tiny: CausalLM, tokenizer: Tokenizer, run_folder: Path
) -> None:
    flags = ["--adapter", str(run_folder), "--temperature", "0.7", "--seed", "3"]
    out = hold(["Hi", "Ha", "/adapter off", "/reset", "Ho"], *flags)
    model = load_adapted(run_folder)
    options: dict[str, Any] = dict(max_new_tokens=8, temperature=0.7, seed=3)
    expected, messages = [], []
    for question in ("Hi", "Ha"):
        messages.append({"role": "user", "content": question})
        expected.append("".join(chat.reply(model, tokenizer, messages, **options)))
        messages.append({"role": "assistant", "content": expected[-1]})
    expected.append("".join(chat.reply(tiny, tokenizer, [{"role": "user", "content": "Ho"}], **options)))
    assert [f"model: {answer}\n" in out for answer in expected] == [True] * 3, out


def load_adapted(folder: Path) -> CausalLM:
    model = load_model(yaml.safe_load((folder / "config.yaml").read_text())["model"], dtype=torch.float32)
    load_adapter(model, folder)
    return model.eval()


def test_a_step_of_a_conversation_reads_only_what_is_new(
    hold: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    usual = chat.PrefixCache.open

    def open_cache(self: Any, model: Any, prompt: list[int], capacity: int) -> Any:
        cache = usual(self, model, prompt, capacity)
        read.append(len(prompt) - cache.length)
        return cache

    monkeypatch.setattr(chat.PrefixCache, "open", open_cache)
    hold(["Hi " * 30, "Ha", "Ho"])
    assert read[0] > 100 and max(read[1:]) < 60


# -- several adapters --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def second_run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another run on the same base."""
    folder = tmp_path_factory.mktemp("others") / "tiny-1"
    model = load_model(tiny_model)
    torch.manual_seed(1)
    add_lora(model, r=2, target_modules=["q_proj", "down_proj"])
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.5)
    save_adapter(model, folder)
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": str(tiny_model), "bits": 4}))
    return folder


def test_adapters_are_switched_by_name_and_switched_off(
    hold: Callable[..., str], run_folder: Path, second_run: Path
) -> None:
    switches = ["", "off", "on", "second", "off", "on", "tiny-1", "third"]
    lines = [line for name in switches for line in (f"/adapter {name}".strip(), "/reset", "Hi")]
    out = hold(lines, "--adapter", str(run_folder), f"second={second_run}")
    told = [line for line in out.splitlines() if line.endswith("answers")]
    first, second, base = "tiny-1 answers", "second answers", "the base alone answers"
    assert told == [first, base, first, second, base, second, first]
    assert "error: there is no adapter 'third'; there is on, off, tiny-1, second" in out
    answers = [line for line in out.splitlines() if line.startswith("model: ")]
    assert answers[0] == answers[2] == answers[6] == answers[7]
    assert answers[1] == answers[4] and answers[3] == answers[5]
    assert len({answers[0], answers[1], answers[3]}) == 3


def test_two_adapters_need_two_names_and_one_base(
    tiny_model: Path,
    tmp_path: Path,
    run_folder: Path,
    second_run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    error = error_of(monkeypatch, capsys, "--adapter", str(run_folder), str(second_run))
    assert (
        f"the name 'tiny-1' is taken or empty; give another one, as in --adapter mine={second_run}" in error
    )
    for text in ("on=x", "=x", "name="):
        assert "is taken or empty" in error_of(monkeypatch, capsys, "--adapter", text)
    other = tmp_path / "a=b"
    shutil.copytree(second_run, other)
    (other / "config.yaml").write_text(yaml.safe_dump({"model": str(tiny_model), "bits": 16}))
    error = error_of(monkeypatch, capsys, "--adapter", str(run_folder), str(other))
    assert "--adapter a=b: was trained with bits = 16, and tiny-1 with 4; give --bits to put both" in error
    options = ["--adapter", str(run_folder), str(other), "--bits", "4", "--prompt", "Hi"]
    talk(monkeypatch, *options, "--max_new_tokens", "2")


def test_a_checkpoint_of_a_run_knows_its_base(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run_folder, tmp_path / "run" / "checkpoint-5")
    (tmp_path / "run" / "checkpoint-5" / "config.yaml").rename(tmp_path / "run" / "config.yaml")
    options = ["--prompt", "Hi", "--max_new_tokens", "4"]
    talk(monkeypatch, "--adapter", str(run_folder), *options)
    expected = capsys.readouterr().out
    talk(monkeypatch, "--adapter", str(tmp_path / "run" / "checkpoint-5"), *options)
    assert capsys.readouterr().out == expected


# -- many prompts ------------------------------------------------------------------------------------------

ASKED = """{"prompt": "Hi", "more": 1}
{"question": "Who?", "answer": "Me"}

{"instruction": "Add", "input": "1 2", "output": "3"}
{"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "é"}]}
{"messages": [{"role": "user", "content": "Ho"}, {"role": "assistant", "content": "gone"}]}
"""


@pytest.fixture
def ask_file(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[dict[str, Any]]]:
    """A function that has ASKED, or another text, answered, and returns the rows of the output."""

    def ask(*flags: str, asked: str = ASKED, name: str = "asked.jsonl") -> list[dict[str, Any]]:
        (tmp_path / name).write_text(asked, encoding="utf-8")
        files = ["--prompts", str(tmp_path / name), "--output", str(tmp_path / "out.jsonl")]
        talk(monkeypatch, "--model", str(tiny_model), "--max_new_tokens", "6", *files, *flags)
        return [json.loads(line) for line in (tmp_path / "out.jsonl").read_bytes().splitlines()]

    return ask


def test_a_file_of_prompts_is_answered_as_each_alone(
    ask_file: Callable[..., list[dict[str, Any]]],
    tiny: CausalLM,
    tokenizer: Tokenizer,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = ask_file("--batch_size", "2", "--temperature", "0.7", "--seed", "2", "--top_k", "30")
    assert "answered  5 prompts" in capsys.readouterr().out
    assert [row["line"] for row in rows] == [1, 2, 4, 5, 6]
    said = [
        row.get("messages") or [{"role": "user", "content": row["prompt"]}, {"content": row["completion"]}]
        for row in rows
    ]
    questions = [[message["content"] for message in messages[:-1]] for messages in said]
    assert questions == [["Hi"], ["Who?"], ["Add\n\n1 2"], ["S", "é"], ["Ho"]]
    for messages in said:
        pieces = chat.reply(
            tiny, tokenizer, messages[:-1], max_new_tokens=6, temperature=0.7, seed=2, top_k=30
        )
        assert messages[-1]["content"] == "".join(pieces)


def test_the_answers_to_a_file_can_be_learned_from(
    ask_file: Callable[..., Any], tmp_path: Path, tokenizer: Tokenizer
) -> None:
    ask_file()
    for number, line in enumerate((tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()):
        path = tmp_path / f"{number}.jsonl"  # one each, because what was asked for came in several formats
        path.write_text(line, encoding="utf-8")
        assert len(list(encode_rows(rows_of([path]), tokenizer, Recipe(512), DataReport()))) == 1
    assert number == 4


def test_a_text_file_asks_a_prompt_a_line(ask_file: Callable[..., Any]) -> None:
    rows = ask_file(asked="\ufeffone\n\n  two\n", name="asked.txt")
    assert [(row["line"], row["prompt"]) for row in rows] == [(1, "one"), (3, "two")]


def test_stop_texts_end_each_answer_of_a_batch(
    ask_file: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = [row["completion"] for row in ask_file(asked="one\ntwo\nthree", name="x.txt")]
    stop = [next(char for char in text if char.isprintable()) for text in full]
    (tmp_path / "out.jsonl").unlink()
    rows = ask_file("--stop", *stop, asked="one\ntwo\nthree", name="x.txt")
    assert [row["completion"] for row in rows] == [chat.before_stop(text, stop) for text in full]
    assert any(row["completion"] != text for row, text in zip(rows, full, strict=True))


def test_an_interrupted_file_goes_on_to_the_same_answers(
    ask_file: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    expected, output = ask_file("--batch_size", "1"), tmp_path / "out.jsonl"
    whole = output.read_bytes()
    output.unlink()
    usual, calls = chat.generate_batch, itertools.count(1)

    def stop_at_the_third(*args: Any, **options: Any) -> Any:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return usual(*args, **options)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(chat, "generate_batch", stop_at_the_third)
        ask_file("--batch_size", "1")
    assert stop.value.code == 130 and len(output.read_bytes().splitlines()) == 2
    output.write_bytes(whole[: len(output.read_bytes()) + 9])  # killed in the middle of the third
    capsys.readouterr()
    assert ask_file("--batch_size", "2") == expected and output.read_bytes() == whole
    assert "5 prompts, 2 of them before" in capsys.readouterr().out
    assert ask_file() == expected  # nothing is left to do


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--seed", "1", "was made with seed = 0, and this would be made with 1"),
        ("--temperature", "0.5", "was made with temperature = 0.0, and this would be made with 0.5"),
        ("--system", "Be brief.", "was made with system = None, and this would be made with Be brief."),
        ("--bits", "16", "was made with bits = 4, and this would be made with 16"),
    ],
)
def test_answers_of_two_kinds_never_stand_in_one_file(
    ask_file: Callable[..., Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flag: str,
    value: str,
    message: str,
) -> None:
    ask_file()
    before = (tmp_path / "out.jsonl").read_bytes()
    with pytest.raises(SystemExit) as stop:
        ask_file(flag, value)
    assert stop.value.code == 2 and f"out.jsonl: line 1 {message}; choose another" in capsys.readouterr().err
    assert (tmp_path / "out.jsonl").read_bytes() == before


def test_an_adapter_that_was_trained_on_is_another_adapter(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    config = chat.Config(model=Path("MODEL"), adapter=[str(folder)])
    (folder / "adapter_model.safetensors").write_bytes(b"one")
    first = chat.made_with(config)
    assert first == chat.made_with(config) and first["adapter"].startswith(f"{folder}, sha256 ")
    (folder / "adapter_model.safetensors").write_bytes(b"two")
    assert chat.made_with(config) != first


@pytest.mark.parametrize(
    ("asked", "name", "message"),
    [
        ("{", "a.jsonl", "a.jsonl: line 1: not valid JSON"),
        ('\n{"x": 1}', "a.jsonl", "a.jsonl: line 2: found the keys ['x'], expected prompt, question"),
        ("[1]", "a.jsonl", "a.jsonl: line 1: expected a JSON object, got list"),
        ('{"prompt": null}', "a.jsonl", "line 1: 'prompt' must be text, and not empty, got None"),
        ('{"prompt": " "}', "a.jsonl", "line 1: 'prompt' must be text, and not empty, got ' '"),
        ('{"messages": "Hi"}', "a.jsonl", "line 1: messages must be a list of objects, got str"),
        ('{"messages": []}', "a.jsonl", "line 1: messages must hold a question"),
        ('{"messages": [{"role": "user"}]}', "a.jsonl", "line 1: messages must hold a question"),
        ("\n \n", "a.txt", "a.txt: is empty"),
        ("a" * 600, "a.txt", "a.txt: line 1: the question alone takes"),
    ],
    ids=str,
)
def test_a_file_that_asks_nothing_is_one_line_and_nothing_is_written(
    ask_file: Callable[..., Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    asked: str,
    name: str,
    message: str,
) -> None:
    with pytest.raises(SystemExit) as stop:
        ask_file(asked=asked, name=name)
    assert stop.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()


def test_prompts_that_are_not_text_are_told_with_their_line(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\ncaf\xe9 two\n")
    flags = ["--model", str(tiny_model), "--prompts", str(tmp_path / "a.txt"), "--output"]
    error = error_of(monkeypatch, capsys, *flags, str(tmp_path / "out.jsonl"))
    assert "a.txt: line 2: not UTF-8 (invalid continuation byte at byte 3)" in error


@pytest.mark.parametrize(
    "content", ["other\n", '{"line": 9, "prompt": "one"}\n', '{"line": 1, "prompt": "x"}\n']
)
def test_an_output_of_something_else_is_never_touched(
    ask_file: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    (tmp_path / "out.jsonl").write_text(content + "unfinished")
    with pytest.raises(SystemExit) as stop:
        ask_file(asked="one\ntwo", name="a.txt")
    assert stop.value.code == 2
    assert "out.jsonl: line 1 is no answer to these prompts" in capsys.readouterr().err
    assert (tmp_path / "out.jsonl").read_text() == content + "unfinished"


# -- what is refused ---------------------------------------------------------------------------------------


def test_without_model_and_adapter_it_says_what_to_give(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = error_of(monkeypatch, capsys, "--prompt", "Hi")
    assert "give --model, or --adapter with a run of finetune.py" in error


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--temperature", "-1"], "--temperature must be at least 0, got -1.0"),
        (["--top_p", "0"], "--top_p must be above 0 and at most 1, got 0.0"),
        (["--top_k", "-1"], "--top_k must be a whole number, at least 0, got -1"),
        (["--repetition_penalty", "0"], "--repetition_penalty must be above 0, got 0.0"),
        (["--max_context", "1"], "--max_context must be at least 2, got 1"),
        (["--max_context", "513", "--prompt", "Hi"], "the model was trained on 512 tokens at most"),
        (["--batch_size", "0"], "--batch_size must be at least 1, got 0"),
        (["--stop", ""], "--stop must not be empty"),
        (["--prompts", "x"], "--prompts and --output go together"),
        (["--output", "x"], "--prompts and --output go together"),
        (["--prompts", "x", "--output", "x"], "--output x: is what --prompts reads"),
        (["--prompts", "x", "--output", "y", "--prompt", "Hi"], "--prompt and --prompts both say"),
        (["--prompts", "nowhere.txt", "--output", "y"], "nowhere.txt: no such file"),
        (["--max_new_tokens", "0"], "--max_new_tokens must be at least 1, got 0"),
        (["--adaptor", "x"], "did you mean --adapter?"),
        (["--device", "nonsense"], "--device nonsense: not available here"),
    ],
    ids=str,
)
def test_a_wrong_option_is_one_line_and_code_2(
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    message: str,
) -> None:
    assert message in error_of(monkeypatch, capsys, "--model", str(tiny_model), *flags)


def test_no_such_model_folder_is_one_line_and_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = error_of(monkeypatch, capsys, "--model", str(tmp_path / "nowhere"))
    assert str(tmp_path / "nowhere") in error


def test_with_a_model_given_the_adapters_folder_need_not_be_a_run(
    tiny_model: Path, tmp_path: Path, run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in run_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "config.yaml").write_text("base: a file of another tool\n")
    talk(monkeypatch, "--model", str(tiny_model), "--adapter", str(tmp_path), "--prompt", "Hi")


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("adapter_config.json", "--adapter {folder}: holds no adapter_config.json"),
        ("adapter_model.safetensors", "{folder}/adapter_model.safetensors: not found"),
    ],
)
def test_an_adapter_that_is_not_whole_is_one_line_and_code_2(
    tiny_model: Path,
    tmp_path: Path,
    run_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    missing: str,
    message: str,
) -> None:
    for path in run_folder.iterdir():
        if path.name != missing:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    error = error_of(monkeypatch, capsys, "--model", str(tiny_model), "--adapter", str(tmp_path))
    assert message.format(folder=tmp_path) in error


def test_folders_of_another_kind_are_told_apart(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = error_of(monkeypatch, capsys, "--adapter", str(tmp_path / "none"))
    assert f"--adapter {tmp_path / 'none'}: no such folder; give a run's" in error
    error = error_of(monkeypatch, capsys, "--model", str(run_folder))
    assert f"--model {run_folder}: is an adapter; give it as --adapter" in error


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "config.yaml: not found, so the base model is not known; give --model"),
        ("lora_r: 4\n", "config.yaml: names no model; give --model"),
        ("model: [1]\n", "config.yaml: names no model; give --model"),
        ("model: [1\n", "config.yaml: not valid YAML"),
        ("", "config.yaml: names no model; give --model"),
    ],
    ids=str,
)
def test_a_folder_that_is_no_run_is_one_line_and_code_2(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    content: str | None,
    message: str,
) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    if content is not None:
        (tmp_path / "config.yaml").write_text(content)
    assert message in error_of(monkeypatch, capsys, "--adapter", str(tmp_path))


def test_a_conversation_that_the_template_refuses_is_one_line_and_code_2(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in tiny_model.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('System role not supported') }}")
    error = error_of(monkeypatch, capsys, "--model", str(tmp_path), "--system", "S", "--prompt", "Hi")
    assert "System role not supported" in error


@pytest.mark.parametrize(
    ("name", "value"), [("bits", 16), ("quant_type", "int4"), ("double_quant", False), ("block_size", 32)]
)
def test_a_run_answers_with_the_base_that_it_was_trained_on(
    tiny_model: Path,
    tmp_path: Path,
    run_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    value: Any,
) -> None:
    for path in run_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    loaded: list[dict[str, Any]] = []
    monkeypatch.setattr(
        chat, "load_model", lambda *args, **options: loaded.append(options) or load_model(*args, **options)
    )
    options = ["--prompt", "Hi", "--max_new_tokens", "8"]
    talk(monkeypatch, "--adapter", str(run_folder), *options, f"--{name}", str(value).lower())
    expected = capsys.readouterr().out
    with open(tmp_path / "config.yaml", "a") as file:
        file.write(f"{name}: {str(value).lower()}\n")
    talk(monkeypatch, "--adapter", str(tmp_path), *options)
    assert capsys.readouterr().out == expected
    given, found = loaded
    default = dict(quant_type="nf4", double_quant=True, block_size=64)
    changed = {"quant_type": None} if name == "bits" else {name: value}
    assert found.items() >= (default | changed).items() and given == found


def test_the_real_command_answers_on_stdout_alone(tiny_model: Path, run_folder: Path) -> None:
    command = [sys.executable, "scripts/chat.py", "--adapter", str(run_folder), "--prompt", "Hi"]
    done = subprocess.run(
        [*command, "--max_new_tokens", "4"], cwd=ROOT, capture_output=True, text=True, env=os.environ
    )
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.strip()
