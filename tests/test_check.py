"""The check counts what training will read, and finds what no curve of a loss shows."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_batch import stored

from minqlora import check as chapter
from minqlora.batch import Examples, Part, split, tokenize
from minqlora.check import DataCheck, check, in_both, require_kept, show
from minqlora.data import IGNORE, DataReport, Example, encode
from minqlora.tokenizer import Tokenizer

BOS, END = 1, 2  # of the tiny model: <|im_start|> and <|im_end|>


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Tokenizer:
    return Tokenizer(tiny_model)


def learned(*ids: int) -> Example:
    return Example(list(ids), list(ids))


def checked(folder: Path, examples: list[Example], tokenizer: Tokenizer) -> tuple[DataCheck, Examples]:
    """The check of some examples, each a row that was used."""
    on_disk, report = stored(folder, examples), DataReport(rows=len(examples), used=len(examples))
    report.tokens = sum(len(example.input_ids) for example in examples)
    report.supervised = sum(example.supervised for example in examples)
    return check(on_disk, report, tokenizer), on_disk


# -- counting ----------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=4), min_size=1, max_size=40))
def test_repeated_examples_are_those_that_python_finds_equal(
    tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory, rows: list[list[int]]
) -> None:
    folder = tmp_path_factory.mktemp("check") / "stored"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chapter, "AT_ONCE", 7)
        found, _ = checked(folder, [learned(*row) for row in rows], tokenizer)
    assert found.duplicates == len(rows) - len(set(map(tuple, rows)))
    assert found.lengths.tolist() == list(map(len, rows))
    assert found.ended == sum(row[-1] == END for row in rows)
    assert found.double_bos == sum(row[:2] == [BOS, BOS] for row in rows)


def test_an_end_counts_only_if_it_is_learned(tokenizer: Tokenizer, tmp_path: Path) -> None:
    examples = [learned(5, END), Example([5, END], [5, IGNORE]), learned(5, 6), learned(END, 7)]
    found, _ = checked(tmp_path / "stored", examples, tokenizer)
    assert found.ended == 1
    assert found.warnings()[-1:] == [
        "the end token is learned in 1 of 4 rows only, so the model may not learn when to stop; a longer "
        "--max_seq_length cuts fewer"
    ]


def test_labels_do_not_tell_examples_apart_but_order_does(tokenizer: Tokenizer, tmp_path: Path) -> None:
    same = [learned(5, 6, END), Example([5, 6, END], [IGNORE, 6, END])]
    assert checked(tmp_path / "same", same, tokenizer)[0].duplicates == 1
    others = [learned(5, 6, END), learned(6, 5, END), learned(5, 6, END, END), learned(0, 5, 6, END)]
    assert checked(tmp_path / "others", others, tokenizer)[0].duplicates == 0


def test_what_is_probably_not_meant_is_said(tokenizer: Tokenizer, tmp_path: Path) -> None:
    examples = [learned(BOS, BOS, 5, END), learned(BOS, 5, END), learned(BOS, 5, END), learned(BOS, 5, END)]
    found, _ = checked(tmp_path / "stored", examples, tokenizer)
    assert found.warnings() == [
        "repeated, token for token: 2 of 4 examples",
        "two beginning-of-text tokens: 1 of 4 examples; the text brings one, and the template or the "
        "tokenizer another",
    ]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 3000), min_size=1, max_size=300))
def test_the_histogram_counts_every_example_once(lengths: list[int]) -> None:
    none = np.empty(0, dtype=np.uint64)
    found = DataCheck(DataReport(), np.array(lengths), none, 0, 0)
    bounds, counts = found.histogram()
    assert bounds == sorted(set(bounds)) and len(counts) == len(bounds) - 1 <= chapter.N_BARS
    between = zip(bounds, bounds[1:], strict=False)
    assert counts == [sum(low < length <= high for length in lengths) for low, high in between]
    assert sum(counts) == len(lengths)
    bars = found.lines()[1].split(" tokens")[0]
    assert sum(bars.count(bar) for bar in chapter.BARS) == sum(count > 0 for count in counts)
    assert chapter.BARS[-1] in bars


def test_the_numbers_are_flat_json(tokenizer: Tokenizer, tmp_path: Path) -> None:
    found, _ = checked(tmp_path / "stored", [learned(5, END), learned(5, 6, 7, END)], tokenizer)
    numbers = json.loads(json.dumps(found.numbers()))
    assert numbers == found.numbers()
    assert (numbers["rows"], numbers["examples"], numbers["longest"], numbers["median_length"]) == (
        2,
        2,
        4,
        3,
    )
    assert numbers["supervised_share"] == 0.6667 and numbers["end_token_learned"] == 2
    assert (numbers["length_bounds"], numbers["length_counts"]) == ([1, 2, 3, 4], [1, 0, 1])
    flat = (int, float)
    assert all(
        isinstance(value, flat) or all(isinstance(x, flat) for x in value) for value in numbers.values()
    )


# -- what is learned and evaluated -------------------------------------------------------------------------


def test_examples_held_out_that_are_learned_too_are_counted(tokenizer: Tokenizer, tmp_path: Path) -> None:
    ids = [10, 11, 12, 13, 14, 10, 11, 15]
    found, examples = checked(tmp_path / "one", [learned(i, END) for i in ids], tokenizer)
    for seed in range(5):
        train, held_out = split(examples, 4, seed)
        expected = sum(example in list(train) for example in held_out)
        assert in_both(train, found, held_out, found) == expected
    train, held_out = split(examples, 0, 0)
    assert in_both(train, found, held_out, found) == 0
    other, others = checked(tmp_path / "two", [learned(i, END) for i in (15, 99, 10, 10)], tokenizer)
    assert in_both(train, found, Part.whole(others), other) == 3


def test_a_repeated_row_of_a_file_is_found(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = [{"prompt": f"Q {i % 4}", "completion": "A"} for i in range(6)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    examples, report = tokenize([tmp_path / "a.jsonl"], tokenizer, 100, tmp_path / "cache")
    found = check(examples, report, tokenizer)
    assert found.duplicates == 2 and found.ended == 6 and not found.double_bos
    assert "6 of 6 rows used" in found.lines()[0] and "end token learned in 6 of 6" in found.lines()[1]


@pytest.mark.parametrize(
    ("lost", "rows", "refused"), [(1, 5, False), (2, 10, False), (3, 14, True), (1, 1, True)]
)
def test_more_than_a_fifth_may_not_be_lost(lost: int, rows: int, refused: bool) -> None:
    report = DataReport(rows=rows, used=rows - lost, empty=lost)
    if refused:
        with pytest.raises(ValueError, match=rf"^--dataset: {lost} of {rows} rows .*--allow_dropped$"):
            require_kept(report, "--dataset")
    else:
        require_kept(report, "--dataset")


# -- looking -----------------------------------------------------------------------------------------------


def conversation(tokenizer: Tokenizer, answer: str) -> Example:
    messages: list[dict[str, Any]] = [{"role": "user", "content": "the 22"}]
    return encode([*messages, {"role": "assistant", "content": answer}], tokenizer)


def test_an_example_is_shown_token_by_token_with_what_is_learned_marked(tokenizer: Tokenizer) -> None:
    example = conversation(tokenizer, "in")
    marked = show(example, tokenizer, colour=False)
    assert marked == (
        "<|im_start|>|u|s|er|\\n|\nt|he| |22|<|im_end|>|\\n|\n"
        "<|im_start|>|a|s|s|i|s|t|a|n|t|\\n|\n[[in|<|im_end|>|]]"
    )
    green = show(example, tokenizer, colour=True)
    assert green == marked.replace("[[", "\x1b[32m").replace("]]", "\x1b[0m")


def test_every_answer_is_marked_by_itself(tokenizer: Tokenizer) -> None:
    example = Example([5, END, 6, 7, END], [5, END, IGNORE, 7, END])
    assert show(example, tokenizer, colour=False).count("[[") == 2
    assert show(example, tokenizer, colour=False).count("]]") == 2


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="|[]\\<"), min_size=1, max_size=9))
def test_no_text_is_lost_and_nothing_acts_on_the_terminal(tokenizer: Tokenizer, answer: str) -> None:
    text = show(conversation(tokenizer, answer), tokenizer, colour=False)
    assert all(letter.isprintable() or letter == "\n" for letter in text)
    said = text.partition("[[")[2].removesuffix("]]").replace("\n", "").replace("|", "")
    escaped = "".join(x if x.isprintable() else x.encode("unicode_escape").decode() for x in answer)
    assert said == escaped + "<im_end>"


def test_words_keep_their_spaces_and_a_character_cut_in_two_is_told(demo_model: Path) -> None:
    demo = Tokenizer(demo_model)
    ids = demo.encode("a small 𓂀")  # of several tokens
    assert show(learned(*ids), demo, colour=False) == "[[a| small| |𓂀|]]"
    assert show(learned(*ids[:-1]), demo, colour=False).endswith("\ufffd|]]")
