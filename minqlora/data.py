"""Chapter 15. Data: from lines of JSON to rows of tokens that say what is to be learned.

Every row becomes a conversation, every conversation a list of tokens, and beside each token stands its
*label*: the token itself where it belongs to an answer, -100 where it was given. An answer's end token is
learned too, or the model would never stop::

    {"prompt": "2 + 2 =", "completion": "4"}

    input_ids   <|im_start|> user \\n 2 + 2 = <|im_end|> \\n <|im_start|> assistant \\n   4   <|im_end|>
    labels        -100  -100 ...                                          -100 -100   4   <|im_end|>

Three kinds of rows are recognised by their keys: a pair (prompt / completion, question / answer), an Alpaca
row (instruction, input, output) and `messages`. If the tokenizer has a chat template, pairs are a question of
the user and the assistant's reply, written with the template. Without one, which is how base models come, the
default is plain text: the prompt's, then the completion's and the end token; who asks gives the prompt alone.

The prompt is tokenized apart from its answer, because that is how it will come when somebody asks.

Source of the format names: Stanford Alpaca; OpenAI's chat messages.

Before: tokenizer. Next: batch.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass
from typing import Any, NamedTuple

from minqlora.tokenizer import Message, Tokenizer

# The label of a token that is given and not learned; what torch's cross entropy ignores by default.
IGNORE = -100

NO_TEMPLATE = (
    "the tokenizer has no chat template: only a prompt and its completion can be written; a file "
    "chat_template.jinja in the model's folder says how conversations are to be"
)

PAIRS = (("prompt", "completion"), ("question", "answer"), ("instruction", "output"))


class Example(NamedTuple):
    """One conversation as tokens; `labels`, as long, holds the ids to learn and -100 elsewhere."""

    input_ids: list[int]
    labels: list[int]


@dataclass
class DataReport:
    """What became of the rows of a dataset."""

    rows: int = 0
    used: int = 0
    truncated: int = 0  # used, but cut to the maximum length
    dropped: int = 0  # nothing left to learn: the answer is empty, or beyond the maximum length
    tokens: int = 0
    supervised: int = 0

    def __str__(self) -> str:
        share = self.supervised / max(self.tokens, 1)
        return (
            f"{self.used:,} of {self.rows:,} rows used "
            f"({self.truncated:,} cut to length, {self.dropped:,} dropped), "
            f"{self.tokens:,} tokens, {share:.0%} of them supervised"
        )

    def __add__(self, other: "DataReport") -> "DataReport":
        """Return the counts of two parts of a dataset together."""
        return DataReport(*map(sum, zip(astuple(self), astuple(other), strict=True)))


def encode_rows(
    lines: Iterable[bytes],
    path: str,
    first_line: int,
    tokenizer: Tokenizer,
    max_seq_length: int,
    report: DataReport,
) -> Iterator[Example]:
    """Yield the examples in lines of JSON, and count in `report` what becomes of each row.

    lines: of the file `path`, the first of them its line `first_line`. max_seq_length: tokens; longer rows
    lose their end, rows that lose all of their answer are dropped, and both are counted. Raises ValueError,
    naming file and line, for a line that is not JSON, keys that are not understood, an answer that is
    missing, null or not text.
    """
    for number, line in enumerate(lines, start=first_line):
        where = f"{path}: line {number}"
        row = _parse(line, number, where)
        if row is None:
            continue
        report.rows += 1
        try:
            example = encode(to_messages(row), tokenizer)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        cut = len(example.input_ids) > max_seq_length
        if cut:
            example = Example(example.input_ids[:max_seq_length], example.labels[:max_seq_length])
        supervised = sum(label != IGNORE for label in example.labels[1:])
        if not supervised:
            report.dropped += 1
            continue
        report.used += 1
        report.truncated += cut
        report.tokens += len(example.input_ids)
        report.supervised += supervised
        yield example


def _parse(line: bytes, number: int, where: str) -> dict[str, Any] | None:
    # -> the row; a blank line is none
    try:
        text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        row = json.loads(text) if text.strip() else None
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 ({error.reason} at byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not valid JSON ({error.msg} at column {error.colno})") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, endless nesting
        raise ValueError(f"{where}: not readable as JSON ({error})") from None
    if text.strip() and not isinstance(row, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(row).__name__}")
    return row


def to_messages(row: dict[str, Any]) -> list[Message]:
    """Return the conversation that a row holds: messages with a role and text content, at least one of them
    the assistant's.

    Raises ValueError if the keys are not those of a known format, or a text is missing, null or not text.
    """
    if "messages" in row:
        return _checked_messages(row["messages"])
    for prompt_key, answer_key in PAIRS:
        if prompt_key in row:
            prompt = _text(row, prompt_key)
            if prompt_key == "instruction" and row.get("input") not in (None, ""):
                prompt += "\n\n" + _text(row, "input")
            return [
                {"role": "user", "content": prompt},
                {"role": "assistant", "content": _text(row, answer_key)},
            ]
    known = "; ".join(" and ".join(pair) for pair in PAIRS)
    raise ValueError(f"found the keys {sorted(row)}, expected messages, or one of: {known}")


def _checked_messages(messages: Any) -> list[Message]:
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ValueError(f"messages must be a list of objects, got {type(messages).__name__}")
    for number, message in enumerate(messages, start=1):
        try:
            _text(message, "role"), _text(message, "content")
        except ValueError as error:
            raise ValueError(f"message {number}: {error}") from None
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("messages hold no answer: no message has the role 'assistant'")
    return messages


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


def encode(messages: list[Message], tokenizer: Tokenizer) -> Example:
    """Tokenize a conversation and label every answer of the assistant, its end token included.

    An empty answer is not learned. Raises ValueError if there is no chat template and more than a question
    and an answer to write, or if the template changes earlier turns when later ones are added.
    """
    input_ids: list[int] = []
    labels: list[int] = []
    for content, given, learned, _ in _turns(messages, tokenizer):
        ends = [place for place, token in enumerate(learned) if token in tokenizer.eos_ids]
        after_end = ends[-1] + 1
        input_ids += given + learned
        labels += [IGNORE] * len(given)
        labels += learned[:after_end] if content else [IGNORE] * after_end
        labels += [IGNORE] * (len(learned) - after_end)
    while labels and labels[-1] == IGNORE:  # what the template writes after the last answer teaches nothing
        labels.pop()
    return Example(input_ids[: len(labels)], labels)


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
    written = turns[-1][-1] if turns else ""
    if not text.startswith(written):
        turns, written = [], ""
    earlier = [token for _, given, answer, _ in turns for token in given + answer]
    return earlier + tokenizer.encode(text[len(written) :], continues=bool(written))


def _turns(messages: list[Message], tokenizer: Tokenizer) -> Iterator[tuple[str, list[int], list[int], str]]:
    # For each answer: its content, the tokens given before it, its own with an end, and all text so far.
    written = ""
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt, answer = _segments(messages[: i + 1], tokenizer)
        if not prompt.startswith(written):
            raise ValueError(
                "the chat template rewrites earlier turns, so where the answers stand cannot be told"
            )
        if tokenizer.chat_template is None:
            # Only a text that no template wrote gets the tokenizer's own beginning of one.
            given = tokenizer.begin(prompt)
        else:
            given = tokenizer.encode(prompt[len(written) :], continues=bool(written))
        learned = tokenizer.encode(answer, continues=True)
        if not any(token in tokenizer.eos_ids for token in learned):
            learned.append(tokenizer.eos_ids[0])
        written = prompt + answer
        yield message["content"], given, learned, written


def _segments(messages: list[Message], tokenizer: Tokenizer) -> tuple[str, str]:
    # -> the text before the last message, which is the assistant's, and the text of that message with its end
    if tokenizer.chat_template is None:
        if [message["role"] for message in messages] != ["user", "assistant"]:
            raise ValueError(NO_TEMPLATE)
        return messages[0]["content"], messages[1]["content"]
    prompt = tokenizer.render(messages[:-1], add_generation_prompt=True)
    whole = tokenizer.render(messages)
    if not whole.startswith(prompt):
        raise ValueError("the chat template writes an answer differently from the prompt it answers")
    return prompt, whole[len(prompt) :]
