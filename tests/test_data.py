"""What is learned is the answers and their ends, exactly; a row that is not used is counted or named."""

import csv
import gzip
import json
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pytest
from conftest import begin_texts
from hypothesis import example as with_example
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from tokenizers import Tokenizer as FastTokenizer

import chat
from minqlora import data
from minqlora.data import (
    FORMATS,
    IGNORE,
    Chunk,
    DataReport,
    Example,
    Recipe,
    Row,
    chunks,
    encode,
    encode_prompt,
    encode_rows,
    encode_text,
    find_files,
    read_rows,
    recognise,
    rows_of,
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
    begin_texts(folder)
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
        ({"instruction": "Do", "input": "this", "output": "done", "text": "Below is"}, "Do\n\nthis", "done"),
        ({"instruction": "Do", "context": "this", "response": "done"}, "Do\n\nthis", "done"),
        ({"prompt": "Q", "response": "A"}, "Q", "A"),
        ({"input": "Q", "output": "A"}, "Q", "A"),
        ({"question": "Q", "response": "B", "answer": "A"}, "Q", "A"),
        ({"prompt": "Q", "completion": "A", "system": ""}, "Q", "A"),
        ({"messages": [user("Q"), assistant("A")]}, "Q", "A"),
        ({"conversations": [user("Q"), assistant("A")]}, "Q", "A"),
        ({"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}, "Q", "A"),
        ({"messages": [{"from": "user", "value": "Q"}, {"from": "assistant", "value": "A"}]}, "Q", "A"),
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


def test_a_system_message_may_have_a_key_of_its_own() -> None:
    expected = [{"role": "system", "content": "S"}, user("Q"), assistant("A")]
    for row in (
        {"system": "S", "prompt": "Q", "completion": "A"},
        {"system": "S", "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
        {"system": "T", "messages": expected},  # the conversation's own counts
    ):
        assert to_messages(row) == expected


def test_sharegpt_speakers_become_roles() -> None:
    speakers = ["system", "human", "function", "observation", "tool", "gpt"]
    turns = [{"from": speaker, "value": "x"} for speaker in speakers]
    roles = [message["role"] for message in to_messages({"conversations": turns})]
    assert roles == ["system", "user", "tool", "tool", "tool", "assistant"]


def test_every_format_can_be_said_and_is_recognised() -> None:
    rows: dict[str, dict[str, Any]] = {
        "messages": {"messages": [user("Q"), assistant("A")]},
        "sharegpt": {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
        "alpaca": {"instruction": "Q", "output": "A"},
        "pair": {"question": "Q", "answer": "A"},
        "text": {"text": "Q"},
    }
    assert rows.keys() == FORMATS.keys()
    for name, row in rows.items():
        assert recognise(row) == name
        if name != "text":
            assert to_messages(row, name) == to_messages(row) == [user("Q"), assistant("A")]
    # Said to be something else than its keys would have it: which pair of keys counts is the user's to say.
    both = {"instruction": "T", "output": "B", "question": "Q", "answer": "A"}
    assert to_messages(both, "pair") == [user("Q"), assistant("A")]
    assert to_messages(both) == [user("T"), assistant("B")]


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


def test_what_is_given_is_learned_too_if_that_is_asked(tokenizer: Tokenizer) -> None:
    messages = [user("Q"), assistant("A"), user("R"), assistant("")]
    alone, with_source = encode(messages, tokenizer), encode(messages, tokenizer, train_on_source=True)
    assert with_source.input_ids == with_source.labels == alone.input_ids
    assert learned(alone, tokenizer) == ["A<|im_end|>"]
    # An answer that says nothing leaves nothing to learn, whatever was asked.
    assert encode([user("Q"), assistant("")], tokenizer, train_on_source=True) == Example([], [])


TOOL_TEMPLATE = """\
{% if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}{% for call in m.tool_calls or [] %}<call>{{ call.function | tojson }}</call>{% endfor -%}
<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def test_tools_and_their_calls_are_written_as_transformers_writes_them(
    tiny_model: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    folder = shutil.copytree(tiny_model, tmp_path / "model")
    (folder / "chat_template.jinja").write_text(TOOL_TEMPLATE)
    ours, theirs = Tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    function = {"name": "weather", "arguments": {"city": "Köln"}}
    answer = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}
    messages = [
        user("Rain?"),
        answer,
        {"role": "tool", "name": "weather", "content": "dry"},
        assistant("No."),
    ]

    # As OpenAI has it: no content beside a call, arguments as text. As tables have it: null for absent keys.
    written = json.loads(json.dumps(messages))
    written[1] |= {"content": None}
    written[1]["tool_calls"][0]["function"]["arguments"] = json.dumps(function["arguments"])
    written[0] |= {"tool_calls": None, "name": None}
    for tools in ([tool], json.dumps([tool])):
        row = json.dumps({"messages": written, "tools": tools})
        (example,), report = load(row, ours, 1000)
        expected = theirs.apply_chat_template(messages, tools=[tool], tokenize=False)
        assert text_of(example, ours) == expected.removesuffix("\n")
        call = '<call>{"name": "weather", "arguments": {"city": "Köln"}}</call><|im_end|>'
        assert learned(example, ours) == [call, "No.<|im_end|>"]
        assert report.used == 1


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


def encoded_one_by_one(
    messages: list[dict[str, str]], tokenizer: Tokenizer, library: FastTokenizer
) -> list[int]:
    """The tokens up to the end of the last answer that says anything, by a call for each text between two."""
    ids, last, written = [], 0, ""
    for i in range(1, len(messages)):
        if messages[i]["role"] == "assistant":
            prompt = tokenizer.render(messages[:i], add_generation_prompt=True)
            whole = tokenizer.render(messages[: i + 1])
            for text in (prompt[len(written) :], whole[len(prompt) :]):
                ids += library.encode(text, add_special_tokens=False).ids
            written = whole
            if messages[i]["content"]:
                last = len(ids) - 1  # behind the end token the template breaks the line
    return ids[:last]


@settings(max_examples=50, deadline=None)
@given(
    talks=st.lists(st.lists(st.tuples(texts, texts), min_size=1, max_size=3), max_size=5),
    together=st.integers(1, 300),
)
def test_conversations_tokenized_together_are_those_tokenized_one_by_one(
    tokenizer: Tokenizer, talks: list[list[tuple[str, str]]], together: int
) -> None:
    library = FastTokenizer.from_file(str(tokenizer.folder / "tokenizer.json"))
    conversations = [[m for q, a in talk for m in (user(q), assistant(a))] for talk in talks]
    rows = [Row("", {"messages": messages}) for messages in conversations]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "TOGETHER", together)
        examples = list(encode_rows(rows, tokenizer, Recipe(10**6), DataReport()))
    alone = [encode(messages, tokenizer) for messages in conversations]
    assert examples == [example for example in alone if example.supervised]
    assert [e.input_ids for e in alone] == [encoded_one_by_one(m, tokenizer, library) for m in conversations]


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


def test_half_a_character_that_only_the_template_reads_is_named_by_its_line(
    tiny_model: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    template = "{% for m in messages %}{{ m.name }}: {{ m.content }}<|im_end|>{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    talk = [user("Q") | {"name": "\ud83d"}, assistant("A") | {"name": "B"}]
    with pytest.raises(ValueError, match="rows.jsonl: line 1: 'conversation' holds half of a surrogate pair"):
        load(json.dumps({"messages": talk}), Tokenizer(folder))


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


# -- texts -------------------------------------------------------------------------------------------------


def test_a_text_is_learned_whole_with_its_end(plain: Tokenizer) -> None:
    (example,), report = load(json.dumps({"text": "the end"}), plain)
    assert text_of(example, plain) == "<|im_start|>the end<|im_end|>"
    assert example.labels == example.input_ids  # but for the first, which nothing predicts
    assert (report.rows, report.used, report.supervised) == (1, 1, len(example.input_ids) - 1)
    again, _ = load(json.dumps({"text": "<|im_start|>the end<|im_end|>"}), plain)
    assert again == [example]  # nothing stands there twice


@pytest.mark.parametrize("limit", range(2, 12))
def test_a_long_text_becomes_pieces_that_are_all_learned(tokenizer: Tokenizer, limit: int) -> None:
    whole = encode_text("a b c d e", tokenizer)
    assert len(whole) == 10
    examples, report = load(json.dumps({"text": "a b c d e"}), tokenizer, limit)
    assert sum([example.input_ids for example in examples], []) == whole
    assert all(2 <= len(example.input_ids) <= limit for example in examples)
    assert (report.rows, report.used, report.truncated, report.tokens) == (1, 1, 0, 10)
    assert report.supervised == 10 - len(examples)


def test_a_text_without_a_character_to_see_is_dropped(tokenizer: Tokenizer) -> None:
    examples, report = load('{"text": " \\n"}\n{"text": "a"}', tokenizer)
    assert len(examples) == report.used == report.empty == report.dropped == 1


@pytest.mark.parametrize("which", ["byte-level", "SentencePiece"])
def test_a_book_is_tokenized_piece_by_piece_as_it_is_whole(
    which: str, demo_model: Path, shared_data: Path, tmp_path: Path
) -> None:
    if which == "SentencePiece":
        shutil.copy(shared_data / "llama2_tokenizer.model", tmp_path / "tokenizer.model")
    book_of = Tokenizer(demo_model if which == "byte-level" else tmp_path)
    book = (shared_data / "wikitext2_valid.txt").read_text()[:200_000]
    assert len(list(data._pieces(book))) > 10 and "".join(data._pieces(book)) == book
    whole = book_of.begin(book)
    assert encode_text(book, book_of) == [*whole, book_of.eos_ids[0]]


def test_a_text_file_is_one_text_however_long(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    book = "".join(f"the line {i}\n" for i in range(200))
    (tmp_path / "book.txt").write_text(book)
    expected = encode_text(book, tokenizer)
    monkeypatch.setattr(data, "PASSAGE", 300)
    for size in (500, 10**6):
        parts = list(chunks(tmp_path / "book.txt", size))
        assert (len(parts) > 3) == (size == 500)
        rows = [row for part in parts for row in read_rows(part)]
        assert len(rows) > 5 and [row.begins for row in rows] == [True] + [False] * (len(rows) - 1)
        report = DataReport()
        examples = list(encode_rows(rows, tokenizer, Recipe(64), report))
        assert sum([example.input_ids for example in examples], []) == expected
        assert (report.rows, report.used, report.dropped) == (1, 1, 0)
    lines = [int(row.where.rpartition(" ")[2]) for row in rows]
    assert lines[0] == 1 and all(
        row.content["text"].startswith(f"the line {n - 1}\n") for n, row in zip(lines, rows, strict=True)
    )


# -- files -------------------------------------------------------------------------------------------------

AWKWARD = [
    {"prompt": 'a "quoted"\n, and; broken\ttext', "completion": "1"},
    {"prompt": "", "completion": " 数字 🙂 "},
    {"prompt": '"', "completion": "\r\n"},
    *({"prompt": f"Q {i}", "completion": "x" * i} for i in range(60)),
]


def write_csv(path: Path, delimiter: str) -> None:
    with open(path, "w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "completion"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(AWKWARD)


def write_lines(path: Path, end: str = "\n") -> None:
    path.write_text("".join(json.dumps(row) + end for row in AWKWARD))


WRITERS: dict[str, Callable[[Path], Any]] = {
    "a.jsonl": write_lines,
    "a.ndjson": lambda path: write_lines(path, "\r\n\n"),
    "a.JSON": lambda path: path.write_text(json.dumps(AWKWARD, indent=2, ensure_ascii=False), "utf-8"),
    "b.json": lambda path: path.write_text(json.dumps({"version": 1, "data": AWKWARD})),
    "c.json": write_lines,
    "a.csv": lambda path: write_csv(path, ","),
    "b.csv": lambda path: write_csv(path, ";"),
    "c.csv": lambda path: pyarrow.csv.write_csv(pa.Table.from_pylist(AWKWARD), path),
    "a.tsv": lambda path: write_csv(path, "\t"),
    "a.parquet": lambda path: parquet.write_table(pa.Table.from_pylist(AWKWARD), path, row_group_size=7),
}


# Parquet is compressed inside.
COMPRESSED = [(name, True) for name in WRITERS if name != "a.parquet"]


@pytest.mark.parametrize(("name", "compressed"), [*((name, False) for name in WRITERS), *COMPRESSED])
def test_every_kind_of_file_gives_the_same_rows_in_whatever_chunks(
    tmp_path: Path, name: str, compressed: bool
) -> None:
    path = tmp_path / name
    WRITERS[name](path)
    if compressed:
        path = path.with_name(name + ".gz")
        path.write_bytes(gzip.compress((tmp_path / name).read_bytes()))
    rows = list(rows_of([path]))
    assert [row.content for row in rows] == AWKWARD
    assert all(row.begins and row.ends for row in rows)
    for size in (1, 100, 1000):
        parts = list(chunks(path, size))
        assert [row for part in parts for row in read_rows(part)] == rows
        streamed = compressed or name in ("a.JSON", "b.json")
        assert (len(parts) == 1) if streamed else (len(parts) > 2)
        assert len(parts) < 10 or size < 1000
    numbers = [int(row.where.rpartition(" ")[2]) for row in rows]
    first, step = (2 if "sv" in name else 1), (2 if name == "a.ndjson" else 1)
    assert numbers == [first + step * i for i in range(len(AWKWARD))]


def test_a_folder_is_its_files_in_order_without_what_only_comes_along(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a/z.csv", "a/y.txt", "a/notes.docx", "README.md", "LICENSE", "license.txt"):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_text("x")
    (tmp_path / "data/.cache").mkdir()
    (tmp_path / "data/.cache/a.jsonl").write_text("x")
    (tmp_path / "more.jsonl.gz").write_text("x")
    found = find_files([tmp_path / "more.jsonl.gz", tmp_path / "data"])
    assert [str(path.relative_to(tmp_path)) for path in found] == [
        "more.jsonl.gz",
        "data/a/y.txt",
        "data/a/z.csv",
        "data/b.jsonl",
    ]
    assert find_files([tmp_path / "data/README.md"])  # who names it, means it


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.csv", "a.csv.gz", "a.txt"])
def test_of_a_file_only_a_part_is_in_memory(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "PASSAGE", 2**14)
    line = {"csv": "Q,{}\n", "jsonl": '{{"prompt": "Q", "completion": "{}"}}\n', "txt": "{}\n"}[
        name.split(".")[1]
    ]
    header = "prompt,completion\n" if "csv" in name else ""
    content = (header + line.format("x" * 1000) * 4000).encode()
    (tmp_path / name).write_bytes(gzip.compress(content, 1) if name.endswith("gz") else content)
    tracemalloc.start()
    count = sum(len(row.content) for part in chunks(tmp_path / name, 2**18) for row in read_rows(part))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count > 100 and peak < 2**20 < len(content) / 3


# -- one function of the user's ----------------------------------------------------------------------------


def test_a_conversion_comes_before_all_else(tokenizer: Tokenizer) -> None:
    def convert(row: dict[str, Any]) -> dict[str, Any]:
        return {"prompt": row.pop("title"), "completion": row.pop("body")}  # it may spoil the row it is given

    examples, report = load('{"title": "Q", "body": "A"}\n' * 2, tokenizer, convert=convert)
    assert examples == [encode([user("Q"), assistant("A")], tokenizer)] * 2 and report.used == 2


def test_the_format_of_the_first_row_is_that_of_all(tokenizer: Tokenizer) -> None:
    rows = [Row("1", {"prompt": "Q", "completion": "A"}), Row("2", {"text": "x"})]
    with pytest.raises(ValueError, match=r"^2: found the keys \['text'\], but the format is pair"):
        list(encode_rows(rows, tokenizer, Recipe(100), DataReport()))
    part = Chunk(Path("a.jsonl"), "jsonl", 0, None, 1, 0)
    for content, expected in ((" \n\n", "auto"), ('\n{"text": "x"}', "text")):
        part.path.write_text(content)
        assert data.format_of(part, Recipe(100)) == expected
