"""An answer streams in whole characters, and the script answers with the model that a run was trained on."""

import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import chat
from minqlora import add_lora, load_adapter, load_model, save_adapter
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
    options = dict(max_new_tokens=9, temperature=0.7, top_p=0.9, seed=5)
    flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    talk(monkeypatch, "--model", str(tiny_model), "--prompt", "Hi", *flags)
    assert seen == [options | {"eos_ids": [2]}]


def test_a_conversation_remembers_what_was_said(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    heard: list[list[dict[str, str]]] = []

    def reply(model: Any, tokenizer: Any, messages: list[dict[str, str]], **options: Any) -> Any:
        heard.append([dict(message) for message in messages])
        yield from ("to ", messages[-1]["content"])

    said = iter(["one", "  two ", ""])
    monkeypatch.setattr(chat, "reply", reply)
    monkeypatch.setattr("builtins.input", lambda prompt: next(said))
    talk(monkeypatch, "--model", str(tiny_model), "--system", "S")
    assert [[f"{m['role'][0]}: {m['content']}" for m in messages] for messages in heard] == [
        ["s: S", "u: one"],
        ["s: S", "u: one", "a: to one", "u: two"],
    ]
    assert capsys.readouterr().out == "model: to one\nmodel: to two\n"


@pytest.mark.parametrize("end", [EOFError, KeyboardInterrupt])
def test_a_conversation_can_be_left_at_any_time(
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    end: type[BaseException],
) -> None:
    def leave(prompt: str) -> str:
        raise end

    monkeypatch.setattr("builtins.input", leave)
    talk(monkeypatch, "--model", str(tiny_model))
    assert capsys.readouterr() == ("\n", "")


# -- what is refused ---------------------------------------------------------------------------------------


def test_without_model_and_adapter_it_says_what_to_give(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = error_of(monkeypatch, capsys, "--prompt", "Hi")
    assert "give --model, or --adapter with a run of finetune.py" in error


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--temperature", "-1"], "--temperature must be >= 0 and --top_p in (0, 1], got -1.0 and 1.0"),
        (["--top_p", "0"], "got 0.0 and 0.0"),
        (["--top_p", "1.5"], "got 0.0 and 1.5"),
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


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_that_is_not_whole_is_one_line_and_code_2(
    tiny_model: Path,
    tmp_path: Path,
    run_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    missing: str,
) -> None:
    for path in run_folder.iterdir():
        if path.name != missing:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    error = error_of(monkeypatch, capsys, "--model", str(tiny_model), "--adapter", str(tmp_path))
    assert f"{tmp_path / missing}: not found" in error


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
