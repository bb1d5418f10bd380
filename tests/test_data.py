"""What is learned is the answers and their ends, exactly; a row that is not used is counted or named."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example as with_example
from hypothesis import given, settings
from hypothesis import strategies as st

import chat
from minqlora.data import (
    IGNORE,
    Chunk,
    DataReport,
    Example,
    Recipe,
    encode,
    encode_prompt,
    encode_rows,
    read_rows,
    to_messages,
)
from minqlora.tokenizer import Tokenizer

END = "<|im_end|>"
EMPTY = '{"prompt": "a", "completion": ""}'


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Tokenizer:
    return Tokenizer(tiny_model)


@pytest.fixture(scope="module")
def plain(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A tokenizer without a chat template, which puts a token before a whole text."""
    folder = shutil.copytree(tiny_model, tmp_path_factory.mktemp("plain") / "model")
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["chat_template"]
    path.write_text(json.dumps(config))
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}},
    }
    path.write_text(json.dumps(content))
    return Tokenizer(folder)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def learned(example: Example, tokenizer: Tokenizer) -> list[str]:
    """The runs of tokens with a label, as text: what the model is taught to write."""
    assert len(example.input_ids) == len(example.labels)
    runs: list[list[int]] = []
    before = IGNORE
    for token, label in zip(example.input_ids, example.labels, strict=True):
        assert label in (IGNORE, token)
        if label != IGNORE:
            if before == IGNORE:
                runs.append([])
            runs[-1].append(label)
        before = label
    return [tokenizer.decode(run, skip_special_tokens=False) for run in runs]


def text_of(example: Example, tokenizer: Tokenizer) -> str:
    return tokenizer.decode(example.input_ids, skip_special_tokens=False)


# -- rows to conversations ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "question", "answer"),
    [
        ({"prompt": "2 + 2 =", "completion": "4"}, "2 + 2 =", "4"),
        ({"question": "Q", "answer": "A", "id": 7}, "Q", "A"),
        ({"instruction": "Do", "input": "this", "output": "done"}, "Do\n\nthis", "done"),
        ({"instruction": "Do", "input": "", "output": "done"}, "Do", "done"),
        ({"instruction": "Do", "input": None, "output": "done"}, "Do", "done"),
        ({"instruction": "Do", "output": "done"}, "Do", "done"),
        ({"messages": [user("Q"), assistant("A")]}, "Q", "A"),
    ],
    ids=str,
)
def test_every_format_becomes_a_question_and_an_answer(
    row: dict[str, Any], question: str, answer: str
) -> None:
    assert to_messages(row) == [user(question), assistant(answer)]


def test_messages_stay_as_they_are() -> None:
    messages = [{"role": "system", "content": "S"}, user("Q"), assistant("A"), user("R"), assistant("B")]
    assert to_messages({"messages": messages}) == messages


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, r"found the keys \[\], expected messages, a list of .*; or prompt and completion, question and"),
        ({"body": "x"}, r"found the keys \['body'\], expected messages"),
        ({"prompt": "Q"}, r"'completion' is missing; found \['prompt'\]"),
        ({"prompt": "Q", "completion": None}, "'completion' must be text, got null"),
        ({"prompt": "Q", "completion": 4}, "'completion' must be text, got int"),
        ({"prompt": None, "completion": "A"}, "'prompt' must be text, got null"),
        ({"question": "Q", "answer": ["A"]}, "'answer' must be text, got list"),
        ({"question": "Q"}, "'answer' is missing"),
        ({"instruction": "Q", "input": 3, "output": "A"}, "'input' must be text, got int"),
        ({"instruction": "Q", "input": "I"}, "'output' is missing"),
        ({"messages": None}, "messages must be a list of objects, got NoneType"),
        ({"messages": []}, "no message has the role 'assistant'"),
        ({"messages": [user("Q")]}, "no message has the role 'assistant'"),
        ({"messages": [user("Q"), {"role": "assistant"}]}, "message 2: 'content' is missing"),
        (
            {"messages": [user("Q"), {"role": "assistant", "content": None}]},
            "message 2: 'content' must be text, got null",
        ),
        ({"messages": [{"content": "Q"}, assistant("A")]}, "message 1: 'role' is missing"),
        ({"messages": ["Q", "A"]}, "messages must be a list of objects"),
    ],
    ids=str,
)
def test_a_row_that_cannot_be_learned_from_is_refused(row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        to_messages(row)


# -- conversations to labels -------------------------------------------------------------------------------


def test_the_label_is_the_answer_and_its_end_token(tokenizer: Tokenizer) -> None:
    example = encode([user("2 + 2 ="), assistant("22 in the end")], tokenizer)
    assert text_of(example, tokenizer) == (
        "<|im_start|>user\n2 + 2 =<|im_end|>\n<|im_start|>assistant\n22 in the end<|im_end|>"
    )
    assert learned(example, tokenizer) == ["22 in the end<|im_end|>"]


def test_every_answer_of_a_conversation_is_learned_with_its_end(tokenizer: Tokenizer) -> None:
    messages = [
        {"role": "system", "content": "S"},
        user("Q"),
        assistant("A 1"),
        user("R"),
        assistant("A 2"),
        user("not answered"),
    ]
    example = encode(messages, tokenizer)
    assert learned(example, tokenizer) == ["A 1<|im_end|>", "A 2<|im_end|>"]
    assert text_of(example, tokenizer) == tokenizer.render(messages[:5]).removesuffix("\n")


def test_the_demos_template_is_learned_the_same_way(demo_model: Path) -> None:
    demo = Tokenizer(demo_model)
    messages = [user("Что это?"), assistant("Это — 数字 🙂."), user("And?"), assistant("\n 42 \n")]
    example = encode(messages, demo)
    assert learned(example, demo) == ["Это — 数字 🙂.<|im_end|>", "\n 42 \n<|im_end|>"]
    assert text_of(example, demo) == demo.render(messages).removesuffix("\n")


def test_an_answer_that_quotes_an_end_token_is_learned_to_its_real_end(tokenizer: Tokenizer) -> None:
    example = encode([user("Q"), assistant(f"say {END} now")], tokenizer)
    assert learned(example, tokenizer) == [f"say {END} now{END}"]


def test_an_empty_answer_between_others_is_not_learned(tokenizer: Tokenizer) -> None:
    messages = [user("Q"), assistant(""), user("R"), assistant("A")]
    assert learned(encode(messages, tokenizer), tokenizer) == ["A<|im_end|>"]


def test_a_template_that_writes_no_end_token_gets_one(tiny_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role[0] }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}a: {% endif %}"
    )
    tokenizer = Tokenizer(folder)
    example = encode([user("Q"), assistant("A"), user("R"), assistant("B")], tokenizer)
    assert learned(example, tokenizer) == [f"A\n{END}", f"B\n{END}"]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}", "differently"),
        (
            "{% for m in messages %}{{ m.content if m.role == 'user' or loop.last else '' }}{% endfor %}",
            "rewrites earlier turns",
        ),
        (
            "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}?{% endif %}",
            "differently",
        ),
    ],
    ids=["counts", "forgets", "asks"],
)
def test_a_template_that_hides_where_answers_stand_is_refused(
    tiny_model: Path, tmp_path: Path, template: str, message: str
) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(ValueError, match=message):
        encode([user("Q"), assistant("A"), user("R"), assistant("B")], Tokenizer(folder))


def test_without_a_template_the_completion_follows_the_prompt_and_the_end_token_follows_it(
    plain: Tokenizer,
) -> None:
    example = encode([user("2 + 2 ="), assistant(" 22")], plain)
    assert (
        text_of(example, plain) == "<|im_start|>2 + 2 = 22<|im_end|>"
    )  # one token before it all, and one only
    assert learned(example, plain) == [" 22<|im_end|>"]


def test_a_tokenizer_that_ends_every_text_does_not_end_the_prompt(plain: Tokenizer, tmp_path: Path) -> None:
    folder = shutil.copytree(plain.folder, tmp_path / "model")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["post_processor"]["single"].append({"SpecialToken": {"id": "<|im_end|>", "type_id": 0}})
    token = {"id": "<|im_end|>", "ids": [2], "tokens": ["<|im_end|>"]}
    content["post_processor"]["special_tokens"]["<|im_end|>"] = token
    (folder / "tokenizer.json").write_text(json.dumps(content))
    ending = Tokenizer(folder)
    assert ending.encode("2", add_special_tokens=True)[-1] == 2
    example = encode([user("2 + 2 ="), assistant(" 22")], ending)
    assert text_of(example, ending) == "<|im_start|>2 + 2 = 22<|im_end|>"
    assert encode_prompt([user("2 + 2 =")], ending) == example.input_ids[: example.labels.count(IGNORE)]


@pytest.mark.parametrize(
    "messages",
    [
        [user("Q"), assistant("A"), user("R"), assistant("B")],
        [{"role": "system", "content": "S"}, user("Q"), assistant("A")],
        [assistant("A")],
    ],
)
def test_without_a_template_a_conversation_is_refused(plain: Tokenizer, messages: Any) -> None:
    with pytest.raises(ValueError, match="no chat template: only a prompt and its completion"):
        encode(messages, plain)


texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<"), max_size=12)


@settings(max_examples=100, deadline=None)
@given(turns=st.lists(st.tuples(texts, texts), min_size=1, max_size=3), system=st.none() | texts)
@with_example(turns=[("", "\n"), ("", "0")], system=None)  # an answer that merges with what stands before it
def test_the_prompt_is_tokenized_as_chat_does_and_the_answer_is_all_that_is_learned(
    tokenizer: Tokenizer, turns: list[tuple[str, str]], system: str | None
) -> None:
    messages = [] if system is None else [{"role": "system", "content": system}]
    for question, answer in turns:
        messages += [user(question), assistant(answer)]
    example = encode(messages, tokenizer)
    answers = [answer + END for _, answer in turns if answer]
    assert learned(example, tokenizer) == answers
    if turns[-1][1]:
        prompt = prompt_in_chat(tokenizer, messages[:-1])
        assert example.input_ids[: len(prompt)] == prompt
        assert example.labels[len(prompt)] != IGNORE == example.labels[len(prompt) - 1]


def prompt_in_chat(tokenizer: Tokenizer, messages: list[dict[str, str]]) -> list[int]:
    """The tokens that chat.py gives the model."""
    prompts: list[list[int]] = []

    def generate(model: Any, prompt: list[int], **options: Any) -> list[int]:
        prompts.append(prompt)
        return []

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat, "generate", generate)
        assert "".join(chat.reply(None, tokenizer, messages)) == ""
    return prompts[0]


def test_without_a_template_too_the_prompt_is_what_chat_gives(plain: Tokenizer) -> None:
    example = encode([user("the end"), assistant(" er")], plain)
    prompt = prompt_in_chat(plain, [user("the end")])
    assert prompt[0] == 1 and example.input_ids[: len(prompt)] == prompt
    assert example.labels[len(prompt)] != IGNORE == example.labels[len(prompt) - 1]


# -- lines -------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages name files as they were given."""
    monkeypatch.chdir(tmp_path)


def load(
    content: str | bytes, tokenizer: Tokenizer, max_seq_length: int = 100, first_line: int = 1, **recipe: Any
) -> tuple[list[Example], DataReport]:
    """The examples in the lines of a file, and what became of its rows."""
    path = Path("rows.jsonl")
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    chunk, report = Chunk(path, "jsonl", 0, None, first_line, 0), DataReport()
    return list(encode_rows(read_rows(chunk), tokenizer, Recipe(max_seq_length, **recipe), report)), report


ROW = '{"prompt": "Q", "completion": "A"}'


def test_blank_lines_a_byte_order_mark_and_windows_line_ends_are_passed_over(
    tokenizer: Tokenizer,
) -> None:
    content = f"\ufeff{ROW}\r\n\n  \t\r\n{ROW}\n\n{ROW}"  # and no line end after the last
    examples, report = load(content, tokenizer)
    assert len(examples) == report.rows == report.used == 3
    assert examples[0] == examples[1] == examples[2] == encode([user("Q"), assistant("A")], tokenizer)


def test_unicode_line_separators_inside_a_text_do_not_end_a_row(tokenizer: Tokenizer) -> None:
    content = json.dumps({"prompt": "a\u2028b\x85c\x0bd", "completion": "e\u2029f"}, ensure_ascii=False)
    examples, _ = load(content, tokenizer)
    assert learned(examples[0], tokenizer) == ["e\u2029f<|im_end|>"]


def test_what_is_cut_and_dropped_is_counted(tokenizer: Tokenizer) -> None:
    whole = encode([user("Q"), assistant("1234")], tokenizer)
    n = len(whole.input_ids)  # the last five are the answer and its end; the second row is four shorter
    rows = '{"prompt": "Q", "completion": "1234"}\n{"prompt": "", "completion": "x"}'
    for length, cut, dropped in [(n, 0, 0), (n - 1, 1, 0), (n - 4, 1, 0), (n - 5, 1, 1), (n - 6, 0, 2)]:
        examples, report = load(rows, tokenizer, length)
        assert (report.rows, report.used, report.truncated, report.dropped) == (2, 2 - dropped, cut, dropped)
        assert report.tokens == sum(len(example.input_ids) for example in examples)
        # A first token is predicted from nothing, and so is never learned.
        assert report.supervised == sum(label != IGNORE for one in examples for label in one.labels[1:])
        if not dropped:
            assert examples[0] == Example(whole.input_ids[:length], whole.labels[:length])
    report = load(rows, tokenizer, n - 5)[1]
    assert "1 of 2 rows used (1 cut to length, 1 dropped: 1 with the answer beyond --max_seq_length)" in str(
        report
    )


def test_reports_of_the_parts_of_a_file_add_up(tokenizer: Tokenizer) -> None:
    parts = [f"{ROW}\n{EMPTY}", "", '{"prompt": "Q", "completion": "' + 200 * "1" + '"}']
    whole, report = load("\n".join(parts), tokenizer)
    pieces = [load(part, tokenizer) for part in parts]
    assert sum([examples for examples, _ in pieces], []) == whole
    assert sum([one for _, one in pieces], DataReport()) == report
    assert (report.rows, report.used, report.truncated, report.dropped) == (3, 2, 1, 1)


def test_a_row_with_an_empty_answer_is_dropped_and_counted(tokenizer: Tokenizer) -> None:
    examples, report = load(f"{ROW}\n{EMPTY}", tokenizer)
    assert len(examples) == report.used == report.dropped == 1 and report.truncated == 0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": "Q"', "not valid JSON"),
        (b'{"prompt": "Q", "completion": "A"} x', "not valid JSON"),
        (b"\xff\xfe", "not UTF-8"),
        (b'{"prompt": "\xe4", "completion": "A"}', "not UTF-8"),
        (b'"prompt"', "expected a JSON object, got str"),
        (b"null", "expected a JSON object, got NoneType"),
        (b"[]", "expected a JSON object, got list"),
        (b'{"prompt": "Q"}', "'completion' is missing"),
        (b'{"prompt": "Q", "completion": null}', "'completion' must be text, got null"),
        (b'{"prompt": "Q", "completion": 4}', "'completion' must be text, got int"),
        (
            b'{"messages": []}',
            r"found the keys \['messages'\], but the format is pair: prompt and completion",
        ),
    ],
    ids=str,
)
def test_a_broken_line_is_named_by_its_number(tokenizer: Tokenizer, line: bytes, message: str) -> None:
    content = b"\xef\xbb\xbf" + ROW.encode() + b"\n\n" + line + b"\n" + ROW.encode()
    with pytest.raises(ValueError, match=f"^rows.jsonl: line 3: .*{message}"):
        load(content, tokenizer)
    with pytest.raises(ValueError, match="^rows.jsonl: line 12: "):  # in a later piece of a file
        load(content.removeprefix(b"\xef\xbb\xbf"), tokenizer, first_line=10)


def test_a_byte_order_mark_is_one_at_the_beginning_of_a_file_only(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="line 2: not valid JSON"):
        load("\ufeff" + ROW, tokenizer, first_line=2)


@pytest.mark.parametrize(
    "line",
    [
        r'{"prompt": "half an emoji \ud83d", "completion": "A"}',
        '{"prompt": "Q", "completion": "A", "id": ' + 5000 * "1" + "}",
        100_000 * "[",
    ],
    ids=["lone-surrogate", "long-number", "deep"],
)
def test_an_odd_line_is_named_by_its_number_too(tokenizer: Tokenizer, line: str) -> None:
    with pytest.raises(ValueError, match="rows.jsonl: line 2: "):
        load(f"{ROW}\n{line}", tokenizer)


def test_a_conversation_that_the_template_refuses_is_named_by_its_line(
    tiny_model: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no system role') }}")
    with pytest.raises(ValueError, match=r"rows.jsonl: line 1: .*the chat template failed: no system role"):
        load(ROW, Tokenizer(folder))


def test_gsm8k_is_learned_from_as_it_comes(shared_data: Path, demo_model: Path) -> None:
    demo = Tokenizer(demo_model)
    lines = (shared_data / "gsm8k_train.jsonl").read_text().splitlines()[:20]
    examples, report = load("\n".join(lines), demo, max_seq_length=1024)
    assert report.used == 20 and report.truncated == report.dropped == 0
    for line, example in zip(lines, examples, strict=True):
        assert learned(example, demo) == [json.loads(line)["answer"] + END]
