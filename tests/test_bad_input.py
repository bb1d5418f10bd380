"""Whatever is wrong with data, options or a configuration is one line that says what to do, and code 2.

Each case of the table is a few files, flags, and the line; `...` in it stands for any text. Each goes through
the script as its command line does, and must leave every file as it was.
"""

import gzip
import io
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet
from test_finetune import shown

import finetune

PAIR = {"prompt": "Q", "completion": "A"}
ROWS = [PAIR | {"prompt": f"Q {i}"} for i in range(5)]


def lines(*rows: Any) -> bytes:
    """Rows as JSON Lines; what is text already is a line as it stands."""
    return b"".join((row if isinstance(row, str) else json.dumps(row)).encode() + b"\n" for row in rows)


def table(*rows: dict[str, Any]) -> bytes:
    """Rows as the bytes of a Parquet file."""
    sink = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(list(rows), pa.schema([]) if not rows else None), sink)
    return sink.getvalue()


def talk(*turns: tuple[str, Any], **others: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns], **others}


def call(function: Any) -> dict[str, Any]:
    answer = {"role": "assistant", "content": None, "tool_calls": [{"function": function}]}
    return {"messages": [{"role": "user", "content": "Q"}, answer]}


def gpt(**turn: Any) -> dict[str, Any]:
    return {"conversations": [{"from": "human", "value": "Q"}, turn]}


GOOD = lines(*ROWS)
KEYS = (
    "messages, a list of objects with role and content; or conversations, a list of objects with from and "
    "value; or instruction and output, with or without input; or prompt and completion, question and answer, "
    "or input and output; or text"
)
KINDS = ".jsonl, .ndjson, .json, .csv, .tsv, .parquet, .txt, .md"
IS_PAIR = (
    "but the format is pair: prompt and completion, question and answer, or input and output; rows of ..."
)
NOTHING = "no row left to learn from (0 read, 0 dropped)"
UTF8 = "; save the file as UTF-8"
# What lies in the current folder, the flags behind a good model's, and the line. A dataset that no flag names
# is the first file.
Case = tuple[dict[str, bytes], str, str]

ENCODINGS: dict[str, Case] = {
    "UTF-16 JSON Lines": (
        {"a.jsonl": GOOD.decode().encode("utf-16")},
        "",
        f"a.jsonl: line 1: not UTF-8 (invalid start byte at byte 0){UTF8}",
    ),
    "Latin-1 JSON Lines": (
        {"a.jsonl": GOOD + '{"prompt": "Größe", "completion": "A"}'.encode("latin-1")},
        "",
        f"a.jsonl: line 6: not UTF-8 (invalid start byte at byte 14){UTF8}",
    ),
    "UTF-16 JSON": (
        {"a.json": json.dumps(ROWS).encode("utf-16")},
        "",
        f"a.json: line 1: not UTF-8 (invalid start byte at byte 0){UTF8}",
    ),
    "UTF-16 CSV": (
        {"a.csv": "prompt,completion\r\nQ,A\r\n".encode("utf-16")},
        "",
        f"a.csv: line 1: not UTF-8 (...){UTF8}",
    ),
    "Latin-1 CSV": (
        {"a.csv": "prompt,completion\nQ,A\nGröße,A\n".encode("latin-1")},
        "",
        f"a.csv: line 3: not UTF-8 (...){UTF8}",
    ),
    "Latin-1 text": (
        {"a.txt": "one\ntwö\n".encode("latin-1")},
        "",
        f"a.txt: line 2: not UTF-8 (...){UTF8}",
    ),
    "a ZIP called JSON Lines": (
        {"a.jsonl": b"PK\x03\x04\xff\xfe"},
        "",
        f"a.jsonl: line 1: not UTF-8 (...){UTF8}",
    ),
    "a byte order mark in the middle": (
        {"a.jsonl": GOOD + b"\xef\xbb\xbf" + GOOD},
        "",
        "a.jsonl: line 6: not valid JSON (Unexpected UTF-8 BOM ... at column 1)",
    ),
    "half a surrogate pair": (
        {"a.jsonl": lines(r'{"prompt": "\ud83d", "completion": "A"}')},
        "",
        "a.jsonl: line 1: 'prompt' holds half of a surrogate pair, which is no character",
    ),
}
EMPTY: dict[str, Case] = {
    "an empty file": ({"a.jsonl": b""}, "", f"a.jsonl: {NOTHING}"),
    "blank lines": ({"a.jsonl": b"\n \n\r\n\t\n"}, "", f"a.jsonl: {NOTHING}"),
    "only a byte order mark": ({"a.jsonl": b"\xef\xbb\xbf"}, "", f"a.jsonl: {NOTHING}"),
    "an empty JSON file": ({"a.json": b""}, "", "a.json: not valid JSON (Expecting value at column 1)"),
    "an empty list": ({"a.json": b"[]"}, "", f"a.json: {NOTHING}"),
    "an empty CSV file": (
        {"a.csv": b""},
        "",
        "a.csv: expected the names of the columns in the first row, got nothing",
    ),
    "a blank first row": (
        {"a.csv": b"\nprompt,completion\nQ,A\n"},
        "",
        "a.csv: expected the names of the columns in the first row, got nothing",
    ),
    "a header alone": ({"a.csv": b"prompt,completion\n"}, "", f"a.csv: {NOTHING}"),
    "a table without rows": ({"a.parquet": table()}, "", f"a.parquet: {NOTHING}"),
    "an empty text": ({"a.txt": b""}, "", f"a.txt: {NOTHING}"),
    "a text of spaces": (
        {"a.txt": b" \n \n"},
        "",
        "a.txt: no row left to learn from (1 read, 1 dropped: 1 without an answer)",
    ),
    "empty answers alone": (
        {"a.jsonl": lines(PAIR | {"completion": ""})},
        "",
        "a.jsonl: no row left to learn from (1 read, 1 dropped: 1 without an answer)",
    ),
}
FILES: dict[str, Case] = {
    "no such file": ({"a.jsonl": GOOD}, "--dataset b.jsonl", "b.jsonl: no such file"),
    "no such folder": ({"a.jsonl": GOOD}, "--dataset nowhere/", "nowhere: no such file"),
    "a folder without data": (
        {"data/notes.docx": b"x"},
        "--dataset data",
        f"data: the folder holds no file of data ({KINDS})",
    ),
    "a folder of what only comes along": (
        {"data/README.md": b"x", "data/.cache/a.jsonl": GOOD, "data/LICENSE.txt": b"x"},
        "--dataset data",
        f"data: the folder holds no file of data ({KINDS})",
    ),
    "a spreadsheet": (
        {"a.xlsx": b"PK"},
        "",
        f"a.xlsx: the suffix .xlsx is of no known kind of data; known are {KINDS}, and all but .parquet ...",
    ),
    "no suffix": (
        {"data": GOOD},
        "--dataset data",
        "data: the suffix (none) is of no known kind of data; ...",
    ),
    "compressed Parquet": ({"a.parquet.gz": b""}, "", "a.parquet.gz: the suffix .gz is of no known kind ..."),
    "the same file twice": (
        {"a.jsonl": GOOD},
        "--dataset a.jsonl a.jsonl",
        "a.jsonl: given twice",
    ),
    "the same file by two names": (
        {"data/a.jsonl": GOOD},
        "--dataset data ./data/../data/a.jsonl",
        "data/../data/a.jsonl: given twice, first as data/a.jsonl",
    ),
    "not gzip": ({"a.jsonl.gz": GOOD}, "", "a.jsonl.gz: cannot be read (Not a gzipped file (b'{\"'))"),
    "gzip cut off": (
        {"a.jsonl.gz": gzip.compress(GOOD)[:-12]},
        "",
        "a.jsonl.gz: cannot be read (Compressed file ended before the end-of-stream marker was reached)",
    ),
    "gzip damaged": (
        {"a.csv.gz": gzip.compress(b"prompt,completion\n" + b"Q,A\n" * 9)[:10] + b"\xff" * 40},
        "",
        "a.csv.gz: cannot be read (Error -3 while decompressing data: ...)",
    ),
    "Parquet cut off": (
        {"a.parquet": table(PAIR)[:-20]},
        "",
        "a.parquet: not a Parquet file, or cut off (...)",
    ),
    "text called Parquet": ({"a.parquet": GOOD}, "", "a.parquet: not a Parquet file, or cut off (...)"),
    "held-out data that is not there": (
        {"a.jsonl": GOOD},
        "--eval_dataset b.jsonl",
        "b.jsonl: no such file",
    ),
}
JSON_ERRORS: dict[str, Case] = {
    "a line cut off": (
        {"a.jsonl": GOOD + b'{"prompt": "Q", "comp'},
        "",
        "a.jsonl: line 6: not valid JSON (Unterminated string starting at at column 17)",
    ),
    "two objects on a line": (
        {"a.jsonl": lines('{"prompt": "Q"} {"completion": "A"}')},
        "",
        "a.jsonl: line 1: not valid JSON (Extra data at column 17)",
    ),
    "quotes of Python": (
        {"a.jsonl": lines(str(PAIR))},
        "",
        "a.jsonl: line 1: not valid JSON (Expecting property name enclosed in double quotes at column 2)",
    ),
    "a huge line, broken at its end": (
        {"a.jsonl": GOOD + b'{"prompt": "' + b"Q" * 2**21 + b'", }'},
        "",
        "a.jsonl: line 6: not valid JSON (... at column 20971...)",
    ),
    "a number of thousands of digits": (
        {"a.jsonl": lines('{"prompt": ' + "1" * 5000 + "}")},
        "",
        "a.jsonl: line 1: not readable as JSON (Exceeds the limit (4300 digits) ...)",
    ),
    "endless nesting": (
        {"a.jsonl": lines("[" * 10**5)},
        "",
        "a.jsonl: line 1: expected a JSON object a line; ...",
    ),
    "nesting further on": (
        {"a.jsonl": lines(PAIR, '{"a":' * 10**5)},
        "",
        "a.jsonl: line 2: not readable as JSON (...)",
    ),
    "a list called JSON Lines": (
        {"a.jsonl": json.dumps(ROWS, indent=1).encode()},
        "",
        "a.jsonl: line 1: expected a JSON object a line; a file of one list is called .json",
    ),
    "a number for a row": (
        {"a.jsonl": lines(PAIR, 42)},
        "",
        "a.jsonl: line 2: expected a JSON object, got int",
    ),
    "null for a row": (
        {"a.jsonl": lines("null")},
        "",
        "a.jsonl: line 1: expected a JSON object, got NoneType",
    ),
    "a list of texts": ({"a.json": b'["Q", "A"]'}, "", "a.json: item 1: expected a JSON object, got str"),
    "an object of two lists": (
        {"a.json": b'{"train": [], "test": []}'},
        "",
        "a.json: expected a list of objects, or an object that holds one list, got the keys ['test', ...",
    ),
    "a JSON file of one text": (
        {"a.json": b'"Q"'},
        "",
        "a.json: expected a list of objects, or an object that holds one list, got str",
    ),
    "a JSON list cut off": (
        {"a.json": json.dumps(ROWS, indent=0).encode()[:-30]},
        "",
        "a.json: not valid JSON (... at line ..., column ...)",
    ),
}
TABLES: dict[str, Case] = {
    "a row too short": (
        {"a.csv": b"prompt,completion\nQ,A\nQ\n"},
        "",
        "a.csv: row 3: 1 fields under 2 columns (prompt, completion); a text with ',' in it stands in ...",
    ),
    "a row too long": (
        {"a.csv": b'prompt,completion\n"a\nb",A\nQ,one, two\n'},
        "",
        "a.csv: row 3: 3 fields under 2 columns (prompt, completion); a text with ',' in it stands in ...",
    ),
    "a quote that is never closed": (
        {"a.csv": b'prompt,completion\nQ,A\n"Q,A\nQ,A\n'},
        "",
        "a.csv: row 3: not valid CSV (unexpected end of data)",
    ),
    "text behind a quote": (
        {"a.csv": b'prompt,completion\n"Q"uestion,A\n'},
        "",
        "a.csv: row 2: not valid CSV (',' expected after '\"')",
    ),
    "line ends of an old Mac": (
        {"a.csv": b"prompt,completion\rQ,A\r"},
        "",
        "a.csv: row 1: not valid CSV (new-line ...)",
    ),
    "two columns of one name": (
        {"a.csv": b"prompt,completion,prompt\nQ,A,Q\n"},
        "",
        "a.csv: row 1: two columns are called 'prompt'",
    ),
    "no header": (
        {"a.csv": b"What is it?,This.\nAnd that?,That.\n"},
        "",
        f"a.csv: row 2: found the keys ['This.', 'What is it?'], expected {KEYS}",
    ),
    "a column missing": (
        {"a.csv": b"prompt,title\nQ,A\n"},
        "",
        "a.csv: row 2: 'completion' is missing; found ['prompt', 'title']",
    ),
    "commas in a TSV": (
        {"a.tsv": b"prompt,completion\nQ,A\n"},
        "",
        f"a.tsv: row 2: found the keys ['prompt,completion'], expected {KEYS}",
    ),
    "null in Parquet": (
        {"a.parquet": table(PAIR, PAIR | {"completion": None})},
        "",
        "a.parquet: row 2: 'completion' must be text, got null",
    ),
    "numbers in Parquet": (
        {"a.parquet": table({"prompt": 1, "completion": 2})},
        "",
        "a.parquet: row 1: 'prompt' must be text, got int",
    ),
}
KEYS_AND_VALUES: dict[str, Case] = {
    "keys of nothing known": (
        {"a.jsonl": lines({"body": "x"})},
        "",
        f"a.jsonl: line 1: found the keys ['body'], expected {KEYS}",
    ),
    "keys in capitals": (
        {"a.jsonl": lines({"Prompt": "Q"})},
        "",
        "a.jsonl: line 1: found the keys ['Prompt'] (which are known in small letters only), "
        f"expected {KEYS}",
    ),
    "no answer": (
        {"a.jsonl": lines({"prompt": "Q"})},
        "",
        "a.jsonl: line 1: 'completion' is missing; found ['prompt']",
    ),
    "an answer that is null": (
        {"a.jsonl": lines(*ROWS, {"question": "Q", "answer": None})},
        "",
        "a.jsonl: line 6: 'answer' must be text, got null",
    ),
    "an answer that is a number": (
        {"a.jsonl": lines({"question": "Q", "answer": 42})},
        "",
        "a.jsonl: line 1: 'answer' must be text, got int",
    ),
    "an answer that is a list": (
        {"a.jsonl": lines({"input": "Q", "output": ["A"]})},
        "",
        "a.jsonl: line 1: 'output' must be text, got list",
    ),
    "a prompt that is null": (
        {"a.jsonl": lines({"prompt": None, "response": "A"})},
        "",
        "a.jsonl: line 1: 'prompt' must be text, got null",
    ),
    "an input that is a number": (
        {"a.json": json.dumps([{"instruction": "Q", "input": 3, "output": "A"}]).encode()},
        "",
        "a.json: item 1: 'input' must be text, got int",
    ),
    "a system message that is a list": (
        {"a.jsonl": lines(PAIR | {"system": ["S"]})},
        "",
        "a.jsonl: line 1: 'system' must be text, got list",
    ),
    "messages that are null": (
        {"a.jsonl": lines({"messages": None})},
        "",
        "a.jsonl: line 1: messages must be a list of objects, got NoneType",
    ),
    "messages that are text": (
        {"a.csv": b'messages\n"[{""role"": ""user""}]"\n'},
        "",
        "a.csv: row 2: messages must be a list of objects, got str",
    ),
    "messages of texts": (
        {"a.jsonl": lines({"messages": ["Q", "A"]})},
        "",
        "a.jsonl: line 1: messages must be a list of objects, got list",
    ),
    "a message without a role": (
        {"a.jsonl": lines({"messages": [{"content": "Q"}]})},
        "",
        "a.jsonl: line 1: message 1: 'role' is missing; found ['content']",
    ),
    "a message without content": (
        {"a.jsonl": lines(talk(("user", "Q"), ("assistant", None)))},
        "",
        "a.jsonl: line 1: message 2: 'content' must be text, got null",
    ),
    "content in parts": (
        {"a.jsonl": lines(talk(("user", [{"type": "image"}]), ("assistant", "A")))},
        "",
        "a.jsonl: line 1: message 1: 'content' must be text, got list",
    ),
    "a conversation without an answer": (
        {"a.jsonl": lines(talk(("user", "Q")))},
        "",
        "a.jsonl: line 1: messages hold no answer: no message has the role 'assistant'",
    ),
    "a speaker nobody knows": (
        {"a.jsonl": lines(gpt(**{"from": "bard", "value": "A"}))},
        "",
        "a.jsonl: line 1: message 2: 'from' is 'bard', expected one of human, user, gpt, assistant, ...",
    ),
    "a turn without a value": (
        {"a.jsonl": lines(gpt(**{"from": "gpt"}))},
        "",
        "a.jsonl: line 1: message 2: 'value' is missing; found ['from']",
    ),
    "a call of nothing": (
        {"a.jsonl": lines(call({"arguments": "{}"}))},
        "",
        "a.jsonl: line 1: message 2: a tool call must have a function with a name",
    ),
    "arguments that are no JSON": (
        {"a.jsonl": lines(call({"name": "f", "arguments": "{x"}))},
        "",
        "a.jsonl: line 1: message 2: the arguments of f: not valid JSON (...)",
    ),
    "tools that are no list": (
        {"a.jsonl": lines(talk(("user", "Q"), ("assistant", "A"), tools={"name": "f"}))},
        "",
        "a.jsonl: line 1: 'tools' must be a list of objects, got dict",
    ),
    "tools for a template without": (
        {"a.jsonl": lines(talk(("user", "Q"), ("assistant", "A"), tools=[{"name": "f_1"}]))},
        "",
        "a.jsonl: line 1: the chat template does not write tools; leave them out, or take another model",
    ),
    "calls for a template without": (
        {"a.jsonl": lines(call({"name": "f_1", "arguments": "{}"}))},
        "",
        "a.jsonl: line 1: the chat template does not write tool calls; leave them out, or take another model",
    ),
    "a file of two formats": (
        {"a.jsonl": lines(PAIR, PAIR, talk(("user", "Q"), ("assistant", "A")))},
        "",
        f"a.jsonl: line 3: found the keys ['messages'], {IS_PAIR}",
    ),
    "another format than was said": (
        {"a.jsonl": lines(talk(("user", "Q"), ("assistant", "A")))},
        "--dataset_format pair",
        f"a.jsonl: line 1: found the keys ['messages'], {IS_PAIR}",
    ),
    "pairs said to be text": (
        {"a.jsonl": GOOD},
        "--dataset_format text",
        "a.jsonl: line 1: found the keys ['completion', 'prompt'], but the format is text: text; rows of ...",
    ),
    "a text that is a number": (
        {"a.jsonl": lines({"text": 5})},
        "",
        "a.jsonl: line 1: 'text' must be text, got int",
    ),
}
AMOUNTS: dict[str, Case] = {
    "longer than the model's context": (
        {"a.jsonl": lines(PAIR | {"prompt": "Q" * 700})},
        "",
        "the longest example has 7... tokens, more than the 512 that the model was made for "
        "(max_position_embeddings in config.json); --max_seq_length 512 cuts them",
    ),
    "held-out data longer than the model's context": (
        {"a.jsonl": GOOD, "b.jsonl": lines(PAIR | {"prompt": "Q" * 700})},
        "--eval_dataset b.jsonl",
        "the longest example has 7... tokens, more than the 512 that the model was made for ...",
    ),
    "every answer cut away": (
        {"a.jsonl": GOOD},
        "--max_seq_length 5",
        "a.jsonl: no row left to learn from (5 read, 5 dropped: 5 with the answer beyond --max_seq_length)",
    ),
    "a quarter of the answers empty": (
        {"a.jsonl": lines(PAIR | {"completion": ""}, *ROWS[:3])},
        "",
        "--dataset: 1 of 4 rows (25%) would be lost, 1 without an answer; look at the data, or go on without "
        "them: --allow_dropped",
    ),
    "half of the held-out answers empty": (
        {"a.jsonl": GOOD, "b.jsonl": lines(PAIR | {"completion": ""}, PAIR)},
        "--eval_dataset b.jsonl",
        "--eval_dataset: 1 of 2 rows (50%) would be lost, 1 without an answer; ...",
    ),
    "no token but the first": (
        {"a.jsonl": GOOD},
        "--max_seq_length 1",
        "--max_seq_length must be at least 2, got 1",
    ),
    "all held out": (
        {"a.jsonl": GOOD},
        "--val_size 5",
        "val_size 5 holds out 5 of 5 examples: none is left to train on",
    ),
    "less than one held out": (
        {"a.jsonl": GOOD},
        "--val_size 0.05",
        "val_size 0.05 of 5 examples is less than one; give the number of examples",
    ),
    "less than nothing held out": (
        {"a.jsonl": GOOD},
        "--val_size -1",
        "--val_size must be at least 0, got -1.0",
    ),
}
OPTIONS: dict[str, Case] = {
    "a misspelt option": (
        {"a.jsonl": GOOD},
        "--datset a.jsonl",
        "--datset: there is no such option; did you mean --dataset?",
    ),
    "an option of another tool": (
        {"a.jsonl": GOOD},
        "--flash_attn 2",
        "--flash_attn: there is no such option; see --help",
    ),
    "a format that there is not": (
        {"a.jsonl": GOOD},
        "--dataset_format chatml",
        "--dataset_format: expected one of auto, messages, sharegpt, alpaca, pair, text, got 'chatml'",
    ),
    "a word for a truth": (
        {"a.jsonl": GOOD},
        "--train_on_source maybe",
        "--train_on_source: expected true or false, got 'maybe'",
    ),
    "a word for a number": (
        {"a.jsonl": GOOD},
        "--learning_rate fast",
        "--learning_rate: expected a number, got 'fast'",
    ),
    "a share in per cent": ({"a.jsonl": GOOD}, "--val_size 5%", "--val_size: expected a number, got '5%'"),
    "a fraction for a count": (
        {"a.jsonl": GOOD},
        "--inspect 1.5",
        "--inspect: expected a whole number, got '1.5'",
    ),
    "fewer examples than none": ({"a.jsonl": GOOD}, "--inspect -1", "--inspect must be at least 0, got -1"),
    "an option twice": (
        {"a.jsonl": GOOD},
        "--lora_r 4 --lora-r 8",
        "--lora_r: given twice, first as --lora_r",
    ),
    "a value of no option": (
        {"a.jsonl": GOOD},
        "--seed 1 2",
        "--seed: expected a whole number, got the list ['1', '2']",
    ),
    "no dataset": ({"a.jsonl": GOOD}, "--dataset", "--dataset: expected a path, got nothing"),
    "steps below one": ({"a.jsonl": GOOD}, "--max_steps 0", "--max_steps must be at least 1, got 0"),
    "two kinds of evaluation": (
        {"a.jsonl": GOOD},
        "--val_size 2 --eval_dataset a.jsonl",
        "--eval_dataset and --val_size both say what to evaluate on; give one",
    ),
    "the best of nothing": (
        {"a.jsonl": GOOD},
        "--load_best",
        "--load_best needs something held out: --eval_dataset or --val_size",
    ),
    "quantized at 16 bits": (
        {"a.jsonl": GOOD},
        "--bits 16 --quantize_embeddings",
        "--quantize_embeddings and --bits 16 contradict each other",
    ),
}
CONFIGS: dict[str, Case] = {
    "broken YAML": (
        {"a.jsonl": GOOD, "c.yaml": b"lora_r: 4\n  seed: [1\n"},
        "--config c.yaml",
        "c.yaml, line 2: broken YAML: mapping values are not allowed here",
    ),
    "a list for a configuration": (
        {"a.jsonl": GOOD, "c.yaml": b"- lora_r\n"},
        "--config c.yaml",
        "c.yaml: expected a line `name: value` for each option",
    ),
    "a misspelt key": (
        {"a.jsonl": GOOD, "c.yaml": b"seed: 1\ndataset_fromat: text\n"},
        "--config c.yaml",
        "c.yaml, line 2: dataset_fromat: there is no such option; did you mean dataset_format?",
    ),
    "a nested value": (
        {"a.jsonl": GOOD, "c.yaml": b"lora_r:\n  q_proj: 4\n"},
        "--config c.yaml",
        "c.yaml, line 1: lora_r: expected a whole number, got something nested",
    ),
    "a rate that is no number": (
        {"a.jsonl": GOOD, "c.yaml": b"learning_rate: 2e-4x\n"},
        "--config c.yaml",
        "c.yaml, line 1: learning_rate: expected a number, got '2e-4x'",
    ),
    "nothing where something must be": (
        {"a.jsonl": GOOD, "c.yaml": b"lora_r:\n"},
        "--config c.yaml",
        "c.yaml, line 1: lora_r: expected a whole number, got null",
    ),
    "a configuration in UTF-16": (
        {"a.jsonl": GOOD, "c.yaml": "lora_r: 4\n".encode("utf-16")},
        "--config c.yaml",
        "c.yaml, line 1: broken YAML: not UTF-8 text",
    ),
    "no such configuration": ({"a.jsonl": GOOD}, "--config c.yaml", "c.yaml: No such file or directory"),
}
TABLE = ENCODINGS | EMPTY | FILES | JSON_ERRORS | TABLES | KEYS_AND_VALUES | AMOUNTS | OPTIONS | CONFIGS


def test_the_table_has_every_case_it_was_written_with() -> None:
    groups = [ENCODINGS, EMPTY, FILES, JSON_ERRORS, TABLES, KEYS_AND_VALUES, AMOUNTS, OPTIONS, CONFIGS]
    assert len(TABLE) == sum(map(len, groups)) >= 100


Refused = Callable[..., None]


@pytest.fixture
def refused(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Refused:
    """A function that writes files, calls the script with these flags, and asks for the line."""
    monkeypatch.chdir(tmp_path)

    def call_script(files: dict[str, bytes], flags: str, line: str, model: Path = tiny_model) -> None:
        for name, content in files.items():
            Path(name).parent.mkdir(exist_ok=True)
            Path(name).write_bytes(content)
        argv = ["--model", str(model), *flags.split()]
        argv += [] if "--dataset" in argv else ["--dataset", next(iter(files))]
        before = tree()
        monkeypatch.setattr(sys, "argv", ["finetune.py", *argv])
        capsys.readouterr()  # what came before
        with pytest.raises(SystemExit) as stop:
            finetune.main()
        said = shown(capsys.readouterr().err)
        assert stop.value.code == 2
        assert re.fullmatch(re.escape(f"error: {line}\n").replace(r"\.\.\.", ".*"), said), said
        assert len(said) < 500  # of a huge line, nothing is repeated
        assert tree() == before

    return call_script


def tree() -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in Path().rglob("*")}


@pytest.mark.parametrize("case", TABLE)
def test_bad_input_is_one_line_that_says_what_to_do(refused: Refused, case: str) -> None:
    refused(*TABLE[case])


# -- what a table cannot say -------------------------------------------------------------------------------


def test_parquet_without_pyarrow_says_how_to_get_it(
    refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    refused(
        {"a.parquet": table(PAIR)},
        "",
        "a.parquet: to read Parquet, install pyarrow: pip install '.[parquet]'",
    )


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="nothing is forbidden to this user")
def test_a_file_that_may_not_be_read_is_named(refused: Refused) -> None:
    Path("a.jsonl").touch(mode=0)
    refused({}, "--dataset a.jsonl", "a.jsonl: cannot be read (Permission denied)")


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs Linux's /proc")
def test_a_file_that_cannot_be_read_is_named(refused: Refused) -> None:
    Path("a.jsonl").symlink_to("/proc/self/mem")  # reading it at 0 is an I/O error, for root too
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "tree", dict)
        refused({}, "--dataset a.jsonl", "a.jsonl: cannot be read (Input/output error)")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_no_file(refused: Refused) -> None:
    os.mkfifo("a.jsonl")
    refused({}, "--dataset a.jsonl", "a.jsonl: neither a file nor a folder")


@pytest.fixture
def base_model(tiny_model: Path, tmp_path: Path) -> Path:
    """A model without a chat template."""
    folder = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    "row",
    [
        talk(("user", "Q"), ("assistant", "A"), ("user", "R"), ("assistant", "B")),
        talk(("system", "S"), ("user", "Q"), ("assistant", "A")),
        PAIR | {"system": "S"},
        talk(("user", "Q"), ("assistant", "A"), tools=[{"name": "f"}]),
        call({"name": "f"}),
    ],
    ids=["two-turns", "system", "system-key", "tools", "tool-call"],
)
def test_a_model_without_a_template_takes_no_conversations(
    refused: Refused, base_model: Path, row: dict[str, Any]
) -> None:
    line = "a.jsonl: line 1: the tokenizer has no chat template: only a prompt and its completion can be ..."
    refused({"a.jsonl": lines(row)}, "", line, base_model)


def test_a_template_that_refuses_a_role_is_quoted(refused: Refused, base_model: Path) -> None:
    (base_model / "chat_template.jinja").write_text("{{ raise_exception('no such role here') }}")
    line = "a.jsonl: line 1: ...: the chat template failed: no such role here (line 1 of the template)"
    refused({"a.jsonl": GOOD}, "", line, base_model)


@pytest.mark.parametrize(
    ("convert", "what"),
    [
        (lambda row: {"prompt": row["titel"]}, "convert failed: KeyError: 'titel'"),
        (lambda row: None, "convert returned NoneType, expected a dict"),
        (lambda row: {"title": "x"}, f"found the keys ['title'], expected {KEYS}"),
    ],
    ids=["raises", "forgets", "unknown"],
)
def test_a_conversion_that_fails_is_named_by_the_row(
    refused: Refused, monkeypatch: pytest.MonkeyPatch, convert: Any, what: str
) -> None:
    monkeypatch.setattr(finetune, "convert", convert)
    refused({"a.jsonl": GOOD}, "", f"a.jsonl: line 1: {what}")


# -- what only looks odd -----------------------------------------------------------------------------------

FINE: dict[str, tuple[dict[str, bytes], str]] = {
    "a byte order mark and Windows' line ends": (
        {"a.jsonl": b"\xef\xbb\xbf" + GOOD.replace(b"\n", b"\r\n")},
        "5 of 5",
    ),
    "a huge line": (
        {"a.jsonl": GOOD + lines(PAIR | {"completion": "on " * 2**18})},
        "6 of 6 rows used (1 cut",
    ),
    "semicolons of a spreadsheet": ({"a.csv": b"\xef\xbb\xbfprompt;completion\r\nQ;A\r\n"}, "1 of 1"),
    "a field beyond the csv module's limit": ({"a.csv": b"text\n" + b"on " * 2**17 + b"\n"}, "1 of 1"),
    "JSON Lines called JSON": ({"a.json": GOOD}, "5 of 5"),
    "files of several kinds": (
        {"d/a.jsonl": GOOD, "d/b.csv": b"input,output\nQ,A\n", "d/README.md": b"x"},
        "6 of 6",
    ),
    "a rate as 2e-4": ({"a.jsonl": GOOD, "c.yaml": b"learning_rate: 2e-4\n"}, "5 of 5"),
}


@pytest.mark.parametrize("case", FINE)
def test_what_only_looks_odd_is_read(
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    case: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    files, what = FINE[case]
    for name, content in files.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(content)
    argv = [
        "--model",
        str(tiny_model),
        "--dataset",
        Path(next(iter(files))).parts[0],
        "--max_seq_length",
        "500",
    ]
    argv += ["--config", "c.yaml"] if "c.yaml" in files else []
    monkeypatch.setattr(sys, "argv", ["finetune.py", *argv, "--inspect", "0"])
    finetune.main()
    assert what in capsys.readouterr().out
