"""Chapter 16. Data: from files of rows to rows of tokens that say what is to be learned.

A row becomes a conversation, a conversation a list of tokens, and beside each token stands its *label*: the
token itself where it belongs to an answer, -100 where it was given. An answer's end token is learned too, or
the model would never stop::

    {"prompt": "2 + 2 =", "completion": "4"}

    input_ids   <|im_start|> user \\n 2 + 2 = <|im_end|> \\n <|im_start|> assistant \\n   4   <|im_end|>
    labels        -100  -100 ...                                          -100 -100   4   <|im_end|>

Files. The suffix says of what kind a file is: JSON Lines, JSON, CSV, TSV, Parquet or text; all but Parquet
may be compressed (`.gz`). A file is read in chunks, by several processes or one after the other, and whatever
its size, only a part of it is in memory; but a JSON file that is one list is read whole.

Formats. The keys of a file's first row say what its rows are::

    messages   {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}
    sharegpt   {"conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}]}
    alpaca     {"instruction": ..., "input": ..., "output": ...}
    pair       {"prompt": ..., "completion": ...}, {"question": ..., "answer": ...} and the like
    text       {"text": ...}: no conversation; all of it is learned, in pieces of the maximum length

If the tokenizer has a chat template, conversations are written with it. Without one, which is how base models
come, the default is plain text: the prompt's, then the completion's and the end token; who asks gives the
prompt alone. The prompt is tokenized apart from its answer, because that is how it will come when somebody
asks.

Source of the format names: Stanford Alpaca; OpenAI's chat messages; ShareGPT, as FastChat writes it.

Before: tokenizer. Next: batch.
"""

import contextlib
import csv
import gzip
import inspect
import itertools
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from minqlora.tokenizer import Message, Tokenizer

# The label of a token that is given and not learned; what torch's cross entropy ignores by default.
IGNORE = -100

KINDS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".txt": "text",
    ".md": "text",
}
# What comes along with data and is none.
NO_DATA = re.compile(r"\.|(readme|licen[cs]e)\b", re.IGNORECASE)
PASSAGE = 2**20  # characters of a text file that are held at a time
TOGETHER = 2**18  # characters of conversations that are tokenized by one call
# Between two such lines a text can be cut: no token that a tokenizer of today makes would reach across.
LINE_BREAK = re.compile(r"\n(?= ?\S)")

# What the rows of a format hold, in the words of a message.
FORMATS = {
    "messages": "messages, a list of objects with role and content",
    "sharegpt": "conversations, a list of objects with from and value",
    "alpaca": "instruction and output, with or without input",
    "pair": "prompt and completion, question and answer, or input and output",
    "text": "text",
}
# The keys of a prompt, and for each those of its answer: of several the first that is there.
ANSWERS = {
    "instruction": ("output", "response", "completion"),
    "prompt": ("completion", "response", "output", "answer"),
    "question": ("answer", "response", "output"),
    "input": ("output", "response", "completion"),
}
CONTEXTS = ("input", "context")  # what an instruction is about: Alpaca's name for it, and Dolly's
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}

NO_TEMPLATE = (
    "the tokenizer has no chat template: only a prompt and its completion can be written; a file "
    "chat_template.jinja in the model's folder says how conversations are to be"
)


# ---- files to chunks ---------------------------------------------------------------------------------------


class Chunk(NamedTuple):
    """A part of a file that is read by itself."""

    path: Path
    kind: str  # one of KINDS' values
    start: int  # byte; of Parquet, row group
    stop: int | None  # None: to the end, however long it is
    first: int  # number of the first line in it; of CSV and Parquet, of the first row
    size: int  # in bytes, to measure progress by


def find_files(paths: Iterable[Path]) -> list[Path]:
    """Return the files of data among `paths` and within its folders, a folder's in the order of their names.

    In a folder, files of other kinds are passed over, and so are hidden ones, README and LICENSE. Raises
    ValueError, naming it, for what is not there, is of no known kind or given twice, and for a folder that
    holds no data.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        files = [path]
        if path.is_dir():
            inside = [(file, file.relative_to(path).parts) for file in sorted(path.rglob("*"))]
            files = [
                file
                for file, parts in inside
                if file.is_file() and kind_of(file) and not any(map(NO_DATA.match, parts))
            ]
            if not files:
                raise ValueError(f"{path}: the folder holds no file of data ({', '.join(KINDS)})")
        elif not path.exists():
            raise ValueError(f"{path}: no such file")
        elif not path.is_file():
            raise ValueError(f"{path}: neither a file nor a folder")
        elif kind_of(path) is None:
            raise ValueError(
                f"{path}: the suffix {path.suffix or '(none)'} is of no known kind of data; known are "
                f"{', '.join(KINDS)}, and all but .parquet also with .gz behind"
            )
        for file in files:
            first = found.setdefault(file.resolve(), file)
            if first is not file:
                raise ValueError(f"{file}: given twice" + (f", first as {first}" if first != file else ""))
    return list(found.values())


def kind_of(path: Path) -> str | None:
    """Return which of KINDS' values a file is by its name, or None."""
    name = path.name.lower()
    kind = KINDS.get(Path(name.removesuffix(".gz")).suffix)
    return None if kind == "parquet" and name.endswith(".gz") else kind


def chunks(path: Path, size: int = 2**23) -> Iterator[Chunk]:
    """Yield the chunks of a file, of whole rows and about `size` bytes each. What has to be read as one
    stream, a compressed file or a JSON list, is one chunk.

    Raises ValueError, naming the file, if it cannot be read.
    """
    kind = kind_of(path)
    assert kind is not None
    with reading(path):
        if kind == "json" and _holds_lines(path):
            kind = "jsonl"
        if kind == "parquet":
            yield from _chunks_of_row_groups(path, size)
        elif kind == "json" or path.suffix.lower() == ".gz":
            yield Chunk(path, kind, 0, None, 2 if kind in ("csv", "tsv") else 1, path.stat().st_size)
        elif kind in ("csv", "tsv"):
            yield from _chunks_of_csv(path, kind, size)
        else:
            yield from _chunks_of_lines(path, kind, size)


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Within this context, what the system has against reading a file is a ValueError that names the file."""
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:  # gzip raises all three
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise ValueError(f"{path}: cannot be read ({reason})") from None


def _open(path: Path) -> Any:
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else open(path, "rb")


def _holds_lines(path: Path) -> bool:
    # JSON Lines are often called .json: an object on the first line, and more after it.
    with _open(path) as file:
        first = file.readline()
        try:
            return first.lstrip(b"\xef\xbb\xbf \t").startswith(b"{") and bool(
                isinstance(json.loads(first.decode("utf-8-sig")), dict) and file.read(2**10).strip()
            )
        except (ValueError, RecursionError):
            return False


def _chunks_of_lines(path: Path, kind: str, size: int) -> Iterator[Chunk]:
    start, line = 0, 1
    with open(path, "rb") as file:
        while block := file.read(size):
            block += file.readline()
            yield Chunk(path, kind, start, start + len(block), line, len(block))
            start, line = start + len(block), line + block.count(b"\n")


def _chunks_of_csv(path: Path, kind: str, size: int) -> Iterator[Chunk]:
    # Only who reads all quotes before it knows whether a line's end is a row's.
    with open(path, "rb") as file:
        _, delimiter = _read_header(file, path, kind)
        start, first = file.tell(), 2
        for number, _ in _csv_rows(_lines(file, path, 2), path, 2, delimiter):
            stop = file.tell()
            if stop - start >= size:
                yield Chunk(path, kind, start, stop, first, stop - start)
                start, first = stop, number + 1
        if file.tell() > start:
            yield Chunk(path, kind, start, file.tell(), first, file.tell() - start)


def _chunks_of_row_groups(path: Path, size: int) -> Iterator[Chunk]:
    with _open_parquet(path) as file:
        start, first, rows, held = 0, 1, 0, 0
        for group in range(file.num_row_groups):
            metadata = file.metadata.row_group(group)
            rows, held = rows + metadata.num_rows, held + metadata.total_byte_size
            if held >= size or group == file.num_row_groups - 1:
                yield Chunk(path, "parquet", start, group + 1, first, held)
                start, first, held = group + 1, rows + 1, 0


def _open_parquet(path: Path) -> Any:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ValueError(f"{path}: to read Parquet, install pyarrow: pip install '.[parquet]'") from None
    try:
        return parquet.ParquetFile(path)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: not a Parquet file, or cut off ({_one_line(error)})") from None


# ---- chunks to rows ----------------------------------------------------------------------------------------


class Row(NamedTuple):
    """A row of a file, and where it stands, for messages."""

    where: str
    content: dict[str, Any]
    begins: bool = True  # a text of its own, or the next passage of a long one
    ends: bool = True


def read_rows(chunk: Chunk) -> Iterator[Row]:
    """Yield the rows of a chunk; blank lines are none. A text file is a row, or if it is long, several.

    Lines are counted from 1, and so are the rows of CSV, its header the first, as a spreadsheet numbers them.
    Raises ValueError, naming file and line or row, for what cannot be read.
    """
    readers = {"jsonl": _read_jsonl, "json": _read_json, "parquet": _read_parquet, "text": _read_text}
    with reading(chunk.path):
        yield from readers.get(chunk.kind, _read_csv)(chunk)


def rows_of(paths: Iterable[Path]) -> Iterator[Row]:
    """Yield the rows of files and folders, one after the other."""
    for path in find_files(paths):
        for chunk in chunks(path):
            yield from read_rows(chunk)


def _lines(file: IO[bytes], path: Path, first: int, stop: int | None = None) -> Iterator[str]:
    # From where an open file stands to the byte `stop`.
    left = None if stop is None else stop - file.tell()
    for number, line in enumerate(file, start=first):
        try:
            # A byte order mark is one at the beginning of a file only.
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path}: line {number}: not UTF-8 ({error.reason} at byte {error.start}); save the file as "
                "UTF-8"
            ) from None
        if left is not None:
            left -= len(line)
            if left <= 0:
                return


@contextlib.contextmanager
def _lines_of(chunk: Chunk) -> Iterator[Iterator[str]]:
    with _open(chunk.path) as file:
        file.seek(chunk.start)
        yield _lines(file, chunk.path, chunk.first, chunk.stop)


def _read_jsonl(chunk: Chunk) -> Iterator[Row]:
    with _lines_of(chunk) as lines:
        for number, line in enumerate(lines, start=chunk.first):
            if line.strip():
                where = f"{chunk.path}: line {number}"
                if number == 1 and line.lstrip().startswith("["):
                    raise ValueError(
                        f"{where}: expected a JSON object a line; a file of one list is called .json"
                    )
                yield Row(where, parse_row(line, where))


def _read_json(chunk: Chunk) -> Iterator[Row]:
    path = chunk.path
    with _lines_of(chunk) as lines:
        content = _parse_json("".join(lines), str(path))
    if isinstance(content, dict):
        lists = [value for value in content.values() if isinstance(value, list)]
        content = lists[0] if len(lists) == 1 else content
    if not isinstance(content, list):
        got = f"the keys {sorted(content)}" if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{path}: expected a list of objects, or an object that holds one list, got {got}")
    for number, row in enumerate(content, start=1):
        where = f"{path}: item {number}"
        yield Row(where, _object(row, where))


def parse_row(line: str, where: str) -> dict[str, Any]:
    """Return the object in a line of JSON; ValueError, beginning with `where`, if there is none."""
    return _object(_parse_json(line, where), where)


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise ValueError(f"{where}: not valid JSON ({error.msg} at {line}column {error.colno})") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, endless nesting
        raise ValueError(f"{where}: not readable as JSON ({error})") from None


def _object(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(row).__name__}")
    return row


def _read_csv(chunk: Chunk) -> Iterator[Row]:
    path = chunk.path
    with _open(path) as file:
        columns, delimiter = _read_header(file, path, chunk.kind)
        if chunk.stop is not None:
            file.seek(chunk.start)
        lines = _lines(file, path, chunk.first, chunk.stop)
        for number, fields in _csv_rows(lines, path, chunk.first, delimiter):
            if len(fields) != len(columns):
                raise ValueError(
                    f"{path}: row {number}: {len(fields)} fields under {len(columns)} columns "
                    f"({', '.join(columns)}); a text with {delimiter!r} in it stands in double quotes"
                )
            yield Row(f"{path}: row {number}", dict(zip(columns, fields, strict=True)))


def _read_header(file: IO[bytes], path: Path, kind: str) -> tuple[list[str], str]:
    # -> the names of the columns, and what stands between them: in CSV from a spreadsheet not always a comma
    lines = _lines(file, path, 1)
    first = next(lines, "")
    delimiter = "\t" if kind == "tsv" else next((mark for mark in ",;\t" if mark in first), ",")
    number, names = next(_csv_rows(itertools.chain([first], lines), path, 1, delimiter), (1, []))
    columns = [name.strip() for name in names]
    if number > 1 or not any(columns):
        raise ValueError(f"{path}: expected the names of the columns in the first row, got nothing")
    twice = [name for name in columns if name and columns.count(name) > 1]
    if twice:
        raise ValueError(f"{path}: row 1: two columns are called {twice[0]!r}")
    return columns, delimiter


def _csv_rows(
    lines: Iterator[str], path: Path, first: int, delimiter: str
) -> Iterator[tuple[int, list[str]]]:
    # The rows that are not blank, each with its number.
    csv.field_size_limit(2**31 - 1)  # a text may be longer than the 128 KiB that the module allows
    rows, number = csv.reader(lines, delimiter=delimiter, strict=True), first
    while True:
        try:
            fields = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            raise ValueError(f"{path}: row {number}: not valid CSV ({error})") from None
        if fields:
            yield number, fields
        number += 1


def _read_parquet(chunk: Chunk) -> Iterator[Row]:
    number = chunk.first
    with _open_parquet(chunk.path) as file:
        import pyarrow

        try:
            groups = list(range(chunk.start, chunk.stop or 0))
            for batch in file.iter_batches(batch_size=256, row_groups=groups):
                for row in batch.to_pylist():
                    yield Row(f"{chunk.path}: row {number}", row)
                    number += 1
        except pyarrow.ArrowException as error:
            raise ValueError(f"{chunk.path}: row {number}: damaged ({_one_line(error)})") from None


def _read_text(chunk: Chunk) -> Iterator[Row]:
    begins, is_last = chunk.start == 0, chunk.stop in (None, chunk.path.stat().st_size)
    held: list[str] = []
    first, length = chunk.first, 0
    with _lines_of(chunk) as lines:
        for number, line in enumerate(lines, start=chunk.first):
            if length >= PASSAGE:
                yield Row(f"{chunk.path}: line {first}", {"text": "".join(held)}, begins, ends=False)
                held, length, first, begins = [], 0, number, False
            held.append(line)
            length += len(line)
    if held:
        yield Row(f"{chunk.path}: line {first}", {"text": "".join(held)}, begins, ends=is_last)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


# ---- rows to conversations ---------------------------------------------------------------------------------


def recognise(row: dict[str, Any]) -> str:
    """Return which of FORMATS a row is in, by its keys. Raises ValueError for none."""
    for key in ("messages", "conversations"):
        if key in row:
            # Some call it one thing and mean the other; what an answer is called decides.
            turns = row[key] if isinstance(row[key], list) else []
            named = isinstance(turns[0], dict) and "from" in turns[0] if turns else key == "conversations"
            return "sharegpt" if named else "messages"
    for key in ANSWERS:
        if key in row:
            return "alpaca" if key == "instruction" else "pair"
    if "text" in row:
        return "text"
    expected = "; or ".join(FORMATS.values())
    raise ValueError(f"found the keys {sorted(row)}{_hint(row)}, expected {expected}")


def _hint(row: dict[str, Any]) -> str:
    known = {"messages", "conversations", "text", *ANSWERS}
    return "" if known.isdisjoint(map(str.lower, row)) else " (which are known in small letters only)"


def to_messages(row: dict[str, Any], dataset_format: str = "auto") -> list[Message]:
    """Return the conversation that a row holds: messages with a role and text content, at least one of them
    the assistant's. A text under the key `system` is its system message.

    Raises ValueError if the keys are not those of the format, or a text is missing, null or not text.
    """
    dataset_format = recognise(row) if dataset_format == "auto" else dataset_format
    if dataset_format in ("messages", "sharegpt"):
        key = "messages" if "messages" in row else "conversations"
        if key not in row:
            raise ValueError(_other_keys(row, dataset_format))
        messages = _checked_turns(row[key], key, dataset_format)
    else:
        messages = _exchange(row, dataset_format)
    if row.get("system") not in (None, "") and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": _text(row, "system")})
    return messages


def _exchange(row: dict[str, Any], dataset_format: str) -> list[Message]:
    keys = [key for key in ANSWERS if (key == "instruction") == (dataset_format == "alpaca")]
    prompt_key = next((key for key in keys if key in row), None)
    if prompt_key is None:
        raise ValueError(_other_keys(row, dataset_format))
    prompt = _text(row, prompt_key)
    for key in CONTEXTS if dataset_format == "alpaca" else ():
        if row.get(key) not in (None, ""):
            prompt += "\n\n" + _text(row, key)
    answer_keys = ANSWERS[prompt_key]
    answer = _text(row, next((key for key in answer_keys if key in row), answer_keys[0]))
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def _other_keys(row: dict[str, Any], dataset_format: str) -> str:
    return (
        f"found the keys {sorted(row)}, but the format is {dataset_format}: {FORMATS[dataset_format]}; rows "
        "of another format stand in a file of their own"
    )


def _checked_turns(turns: Any, key: str, dataset_format: str) -> list[Message]:
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f"{key} must be a list of objects, got {type(turns).__name__}")
    messages = []
    for number, turn in enumerate(turns, start=1):
        try:
            messages.append(_from_sharegpt(turn) if dataset_format == "sharegpt" else _checked_message(turn))
        except ValueError as error:
            raise ValueError(f"message {number}: {error}") from None
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError(f"{key} hold no answer: no message has the role 'assistant'")
    return messages


def _from_sharegpt(turn: dict[str, Any]) -> Message:
    speaker = _text(turn, "from")
    if speaker not in ROLES:
        raise ValueError(f"'from' is {speaker!r}, expected one of {', '.join(ROLES)}")
    return {"role": ROLES[speaker], "content": _text(turn, "value")}


def _checked_message(turn: dict[str, Any]) -> Message:
    _text(turn, "role")
    # Parquet gives every message the keys that any has, null where it has none.
    message = {key: value for key, value in turn.items() if value is not None}
    if message.get("tool_calls"):
        message["tool_calls"] = [_checked_call(call) for call in _objects(message, "tool_calls")]
        message.setdefault("content", "")
    if "content" not in message:
        _text(turn, "content")
    _text(message, "content")
    return message


def _checked_call(call: dict[str, Any]) -> dict[str, Any]:
    # OpenAI writes the arguments as JSON text; templates expect what it says.
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError("a tool call must have a function with a name")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = _parse_json(arguments or "{}", f"the arguments of {function['name']}")
    return call | {"function": function | {"arguments": arguments or {}}}


def _tools(row: dict[str, Any]) -> list[dict[str, Any]] | None:
    # The functions that a conversation may call; columns hold them as JSON text.
    tools = row.get("tools")
    if isinstance(tools, str) and tools.strip():
        tools = _parse_json(tools, "'tools'")
    return _objects({"tools": tools}, "tools") if tools else None


def _objects(row: dict[str, Any], key: str) -> list[dict[str, Any]]:
    if not isinstance(row[key], list) or not all(isinstance(item, dict) for item in row[key]):
        raise ValueError(f"{key!r} must be a list of objects, got {type(row[key]).__name__}")
    return row[key]


def _text(row: dict[str, Any], key: str) -> str:
    if key not in row:
        raise ValueError(f"{key!r} is missing; found {sorted(row)}")
    if not isinstance(row[key], str):
        kind = "null" if row[key] is None else type(row[key]).__name__
        raise ValueError(f"{key!r} must be text, got {kind}")
    try:
        row[key].encode()
    except UnicodeEncodeError:
        raise ValueError(f"{key!r} holds half of a surrogate pair, which is no character") from None
    return row[key]


# ---- conversations to tokens -------------------------------------------------------------------------------


class Example(NamedTuple):
    """One conversation as tokens; `labels`, as long, holds the ids to learn and -100 elsewhere."""

    input_ids: list[int]
    labels: list[int]

    @property
    def supervised(self) -> int:
        """The number of tokens that are learned. The first is predicted from nothing, and never is."""
        return len(self.labels[1:]) - self.labels[1:].count(IGNORE)


def encode(
    messages: list[Message],
    tokenizer: Tokenizer,
    *,
    tools: list[dict[str, Any]] | None = None,
    train_on_source: bool = False,
) -> Example:
    """Tokenize a conversation and label every answer of the assistant, its end token included.

    tools: the functions that it may call, for the template. train_on_source: label what was given, too. An
    empty answer is not learned, and a conversation without another one has no label at all. Raises ValueError
    if there is no chat template and more than a question and an answer to write, if the template changes
    earlier turns when later ones are added, or if it does not write tools or their calls.
    """
    turns = list(_turns(messages, tokenizer, tools))
    return _labelled(turns, _tokens_of(turns, tokenizer), tokenizer.eos_ids, train_on_source)


def encode_prompt(messages: list[Message], tokenizer: Tokenizer) -> list[int]:
    """Tokenize a conversation up to the answer that is asked for, just as `encode` does what stands before
    one.

    Earlier answers are tokenized by themselves: as one text, their first characters could become one token
    with what the template writes before them, which no model has seen. Only where a template changes
    earlier turns is there no telling them apart. Raises ValueError as `Tokenizer.render`.
    """
    if tokenizer.chat_template is None:
        if messages[0]["role"] == "system":
            raise ValueError(NO_TEMPLATE)
        return tokenizer.begin(messages[-1]["content"])
    text = tokenizer.render(messages, add_generation_prompt=True)
    try:
        turns = list(_turns(messages, tokenizer))
    except ValueError:
        turns = []
    written = turns[-1].written if turns else ""
    if not text.startswith(written):
        turns, written = [], ""
    earlier = [token for given, answer in _tokens_of(turns, tokenizer) for token in given + answer]
    return earlier + tokenizer.encode(text[len(written) :], continues=bool(written))


class _Turn(NamedTuple):
    """An answer of a conversation as text: what the template writes for it, and what before it."""

    says: bool  # anything at all
    given: str  # behind the answer before
    answer: str
    written: str  # all text of the conversation up to here


def _turns(
    messages: list[Message], tokenizer: Tokenizer, tools: list[dict[str, Any]] | None = None
) -> Iterator[_Turn]:
    written = ""
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt, answer = _segments(messages[: i + 1], tokenizer, tools)
        if not prompt.startswith(written):
            raise ValueError(
                "the chat template rewrites earlier turns, so where the answers stand cannot be told"
            )
        given, written = prompt[len(written) :], prompt + answer
        yield _Turn(bool(message["content"] or message.get("tool_calls")), given, answer, written)


_Tokens = list[tuple[list[int], list[int]]]  # for each turn, of what is given and of the answer with an end


def _tokens_of(turns: Sequence[_Turn], tokenizer: Tokenizer) -> _Tokens:
    # By one call for all: texts one by one would take the tokenizer a third longer.
    texts = [text for turn in turns for text in (turn.given, turn.answer)]
    goes_on = [after for turn in turns for after in (len(turn.given + turn.answer) < len(turn.written), True)]
    ids, ends = tokenizer.encode_all(texts, goes_on), set(tokenizer.eos_ids)
    tokens = list(zip(ids[::2], ids[1::2], strict=True))
    for _, answer in tokens:
        if ends.isdisjoint(answer):
            answer.append(tokenizer.eos_ids[0])
    if tokenizer.chat_template is None:
        # Only a text that no template wrote gets the tokenizer's own beginning of one.
        tokens = [(tokenizer.begun(given), answer) for given, answer in tokens]
    return tokens


def _labelled(
    turns: Sequence[_Turn], tokens: _Tokens, eos_ids: Sequence[int], train_on_source: bool
) -> Example:
    input_ids: list[int] = []
    labels: list[int] = []
    for turn, (given, answer) in zip(turns, tokens, strict=True):
        after_end = next(place for place in range(len(answer), 0, -1) if answer[place - 1] in eos_ids)
        input_ids += given + answer
        labels += [IGNORE] * len(given)
        labels += answer[:after_end] if turn.says else [IGNORE] * after_end
        labels += [IGNORE] * (len(answer) - after_end)
    while labels and labels[-1] == IGNORE:  # what the template writes after the last answer teaches nothing
        labels.pop()
    input_ids = input_ids[: len(labels)]
    return Example(input_ids, list(input_ids) if train_on_source else labels)


def _segments(
    messages: list[Message], tokenizer: Tokenizer, tools: list[dict[str, Any]] | None
) -> tuple[str, str]:
    # -> the text before the last message, which is the assistant's, and the text of that message with its end
    calls = messages[-1].get("tool_calls", [])
    if tokenizer.chat_template is None:
        if [message["role"] for message in messages] != ["user", "assistant"] or tools or calls:
            raise ValueError(NO_TEMPLATE)
        return messages[0]["content"], messages[1]["content"]
    prompt = tokenizer.render(messages[:-1], add_generation_prompt=True, tools=tools)
    whole = tokenizer.render(messages, tools=tools)
    _text({"conversation": whole}, "conversation")  # with what only the template reads: names, tools
    if not whole.startswith(prompt):
        raise ValueError("the chat template writes an answer differently from the prompt it answers")
    answer = whole[len(prompt) :]
    for what, listed, text in (("tools", tools or [], prompt), ("tool calls", calls, answer)):
        if not all(_function_name(item) in text for item in listed):
            raise ValueError(
                f"the chat template does not write {what}; leave them out, or take another model"
            )
    return prompt, answer


def _function_name(item: dict[str, Any]) -> str:
    function = item.get("function", item)
    return str(function.get("name", "")) if isinstance(function, dict) else ""


def encode_text(text: str, tokenizer: Tokenizer, *, begins: bool = True, ends: bool = True) -> list[int]:
    """Tokenize a text that is learned as it is: after the tokens that the tokenizer puts before a text, and
    with an end token behind, unless it is a passage that goes on from another or is gone on with.

    It is tokenized piece by piece, so that a book takes no more memory than a few pages.
    """
    ids: list[int] = []
    for number, piece in enumerate(_pieces(text)):
        if begins and number == 0:
            ids += tokenizer.begin(piece)
        else:
            ids += tokenizer.encode(piece, continues=True)
    if ends and not (ids and ids[-1] in tokenizer.eos_ids):
        ids.append(tokenizer.eos_ids[0])
    return ids


def _pieces(text: str, size: int = 2**14) -> Iterator[str]:
    start = 0
    while start < len(text):
        found = LINE_BREAK.search(text, start + size)
        stop = found.end() if found else len(text)
        yield text[start:stop]
        start = stop


# ---- rows to examples --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """How rows become examples."""

    max_seq_length: int  # tokens
    dataset_format: str = "auto"  # one of FORMATS, or by the keys of the first row
    train_on_source: bool = False  # learn what is given, too
    convert: Callable[[dict[str, Any]], dict[str, Any]] | None = None  # applied to each row before all else

    def key(self) -> list[Any]:
        """Return what tells this recipe from another."""
        source = None if self.convert is None else inspect.getsource(self.convert)
        return [self.max_seq_length, self.dataset_format, self.train_on_source, source]

    def converted(self, row: Row) -> dict[str, Any]:
        """Return the content of a row after the conversion. Raises ValueError if that fails."""
        if self.convert is None:
            return row.content
        try:
            content = self.convert(row.content)
        except Exception as error:  # it is the user's code
            raise ValueError(f"convert failed: {type(error).__name__}: {_one_line(error)}") from None
        if not isinstance(content, dict):
            raise ValueError(f"convert returned {type(content).__name__}, expected a dict")
        return content


@dataclass
class DataReport:
    """What became of the rows of a dataset."""

    rows: int = 0
    used: int = 0
    truncated: int = 0  # used, but cut to the maximum length
    empty: int = 0  # dropped: no answer in them says anything
    beyond: int = 0  # dropped: their answers begin beyond the maximum length
    tokens: int = 0
    supervised: int = 0

    @property
    def dropped(self) -> int:
        """The number of rows in which nothing is left to learn."""
        return self.empty + self.beyond

    @property
    def reasons(self) -> str:
        """Why rows were dropped."""
        parts = [f"{self.empty:,} without an answer"] if self.empty else []
        parts += [f"{self.beyond:,} with the answer beyond --max_seq_length"] if self.beyond else []
        return ", ".join(parts)

    def __str__(self) -> str:
        share = self.supervised / max(self.tokens, 1)
        reasons = f": {self.reasons}" if self.dropped else ""
        return (
            f"{self.used:,} of {self.rows:,} rows used "
            f"({self.truncated:,} cut to length, {self.dropped:,} dropped{reasons}), "
            f"{self.tokens:,} tokens, {share:.0%} of them supervised"
        )

    def __add__(self, other: "DataReport") -> "DataReport":
        """Return the counts of two parts of a dataset together."""
        return DataReport(*map(sum, zip(astuple(self), astuple(other), strict=True)))


def encode_rows(
    rows: Iterable[Row], tokenizer: Tokenizer, recipe: Recipe, report: DataReport
) -> Iterator[Example]:
    """Yield the examples in the rows of a file, and count in `report` what becomes of each row.

    A conversation longer than the recipe's maximum loses its end; if it loses all of its answers it is
    dropped; both are counted. A text that is longer becomes several examples. Raises ValueError, naming the
    row, if its keys are not those of the first row's format, or an answer is missing, null or not text.
    """
    limit, dataset_format = recipe.max_seq_length, recipe.dataset_format
    waiting: list[list[_Turn]] = []
    size = 0  # of the conversations that wait, in characters
    for row in rows:
        report.rows += row.begins
        with _naming(row):
            content = recipe.converted(row)
            if dataset_format == "auto":
                dataset_format = recognise(content)
            if dataset_format == "text":
                yield from _encode_passage(content, row, tokenizer, limit, report)
                continue
            turns = list(_turns(to_messages(content, dataset_format), tokenizer, _tools(content)))
        waiting.append(turns)
        size += len(turns[-1].written)
        if size >= TOGETHER:
            yield from _encode_conversations(waiting, tokenizer, recipe, report)
            waiting, size = [], 0
    yield from _encode_conversations(waiting, tokenizer, recipe, report)


def _encode_conversations(
    conversations: list[list[_Turn]], tokenizer: Tokenizer, recipe: Recipe, report: DataReport
) -> Iterator[Example]:
    limit = recipe.max_seq_length
    tokens = iter(_tokens_of(list(itertools.chain(*conversations)), tokenizer))
    for turns in conversations:
        of_turns = list(itertools.islice(tokens, len(turns)))
        whole = _labelled(turns, of_turns, tokenizer.eos_ids, recipe.train_on_source)
        example = Example(whole.input_ids[:limit], whole.labels[:limit])
        supervised = example.supervised
        if not supervised:
            report.beyond += whole.supervised > 0
            report.empty += whole.supervised == 0
            continue
        report.used += 1
        report.truncated += len(whole.labels) > limit
        report.tokens += len(example.input_ids)
        report.supervised += supervised
        yield example


def format_of(chunk: Chunk, recipe: Recipe) -> str:
    """Return the format of the first row of a chunk, or "auto" if it has none. Raises ValueError, naming the
    row, if it is in none that is known."""
    for row in read_rows(chunk):
        with _naming(row):
            return recognise(recipe.converted(row))
    return "auto"


@contextlib.contextmanager
def _naming(row: Row) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{row.where}: {error}") from None


def _encode_passage(
    content: dict[str, Any], row: Row, tokenizer: Tokenizer, limit: int, report: DataReport
) -> Iterator[Example]:
    if "text" not in content:
        raise ValueError(_other_keys(content, "text"))
    text = _text(content, "text")
    if not text.strip():
        report.empty += row.begins
        return
    report.used += row.begins
    ids = encode_text(text, tokenizer, begins=row.begins, ends=row.ends)
    cuts = [*range(0, len(ids), limit), len(ids)]
    if len(ids) % limit == 1 and len(ids) > limit > 2:
        cuts[-2] -= 1  # a token by itself is not predicted, and could not be learned
    for start, stop in itertools.pairwise(cuts):
        example = Example(ids[start:stop], ids[start:stop])
        if not example.supervised:
            continue
        report.tokens += len(example.input_ids)
        report.supervised += example.supervised
        yield example
