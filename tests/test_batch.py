"""Examples are tokenized once and come back as they were, in an order nobody stores, packed into rows."""

import csv
import errno
import gzip
import json
import math
import multiprocessing
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from minqlora import batch
from minqlora.batch import (
    LEARNED,
    Batch,
    Examples,
    Part,
    collate,
    order,
    pack,
    permuted,
    split,
    tokenize,
)
from minqlora.data import IGNORE, Example, encode, to_messages
from minqlora.tokenizer import Tokenizer

EMPTY = {"prompt": "a", "completion": ""}
LENGTH = 100  # max_seq_length


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Tokenizer:
    return Tokenizer(tiny_model)


def rows(count: int, first: int = 0) -> list[dict[str, Any]]:
    return [
        {"prompt": f"the {i}, then {i * i}", "completion": " on" * (i % 5 + 1)}
        for i in range(first, first + count)
    ]


def write(path: Path, rows: list[dict[str, Any]], end: str = "\n") -> Path:
    path.write_text("".join(json.dumps(row) + end for row in rows), encoding="utf-8")
    return path


def stored(folder: Path, examples: list[Example]) -> Examples:
    """Examples on disk, written as the docstring of the chapter says."""
    folder.mkdir()
    tokens = [token for example in examples for token in example.input_ids]
    learned = [label != IGNORE for example in examples for label in example.labels]
    held = np.array(tokens, dtype=np.uint32) + np.array(learned) * LEARNED
    held.astype("<u4").tofile(folder / "tokens.bin")
    ends = np.cumsum([0, *(len(example.input_ids) for example in examples)])
    ends.astype("<i8").tofile(folder / "ends.bin")
    return Examples(folder)


def of_lengths(folder: Path, lengths: list[int]) -> Part:
    """All examples of a folder, in the files' order or not, of these lengths."""
    return Part.whole(stored(folder, [Example([1] * length, [1] * length) for length in lengths]))


def contents(cache: Path) -> dict[str, bytes]:
    """The files of the one data set that a cache keeps."""
    (folder,) = cache.glob("tokens-*")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# -- tokenizing once ---------------------------------------------------------------------------------------


def test_every_example_is_what_its_row_gives_by_itself(tmp_path: Path, tokenizer: Tokenizer) -> None:
    given = rows(30) + [EMPTY] + rows(3, first=30)
    examples, report = tokenize([write(tmp_path / "a.jsonl", given)], tokenizer, LENGTH, tmp_path / "cache")
    alone = [encode(to_messages(row), tokenizer) for row in given if row != EMPTY]
    assert list(examples) == alone and len(examples) == 33
    assert [examples.length(i) for i in range(33)] == [len(example.input_ids) for example in alone]
    assert (report.rows, report.used, report.dropped) == (34, 33, 1)
    assert report.tokens == sum(len(example.input_ids) for example in alone)
    for place in (-1, 33):
        with pytest.raises(IndexError):
            examples[place]


def test_a_piece_is_some_examples_as_they_are_on_disk(tmp_path: Path) -> None:
    examples = stored(tmp_path / "stored", [Example([i] * i, [IGNORE] * (i - 1) + [i]) for i in range(1, 9)])
    held, ends = examples.piece(2, 5)
    assert ends.tolist() == [3, 7, 12] and (held & ~LEARNED).tolist() == [3] * 3 + [4] * 4 + [5] * 5
    assert [place + 1 for place, token in enumerate(held) if token >= LEARNED] == [3, 7, 12]


def test_the_largest_token_and_a_label_fit_into_four_bytes(tmp_path: Path) -> None:
    examples = [Example([2**31 - 1, 0, 5], [2**31 - 1, IGNORE, 5]), Example([0], [0])]
    assert list(stored(tmp_path / "stored", examples)) == examples


@pytest.mark.parametrize(("end", "workers"), [("\n", 1), ("\r\n", 2), ("\n\n \n", 1)])
def test_chunks_and_workers_give_the_same_bytes_as_one_chunk(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, end: str, workers: int
) -> None:
    tokenizer = Tokenizer(tiny_model)
    (new,) = tokenizer.add_tokens(["then"])  # since it was read: the workers have to hear of it
    first, second = write(tmp_path / "a.jsonl", rows(20), end), write(tmp_path / "b.jsonl", rows(9), end)
    first.write_bytes(b"\xef\xbb\xbf" + first.read_bytes())  # a byte order mark, which is no part of a row
    second.write_bytes(second.read_bytes().rstrip())  # no end of the last line
    tokenize([first, second], tokenizer, LENGTH, tmp_path / "one", workers=1)
    monkeypatch.setattr(batch, "CHUNK", 400)
    done: list[tuple[int, int]] = []
    examples, report = tokenize(
        [first, second],
        tokenizer,
        LENGTH,
        tmp_path / "many",
        workers=workers,
        progress=lambda *seen: done.append(seen),
    )
    assert contents(tmp_path / "one") == contents(tmp_path / "many")
    assert sorted(contents(tmp_path / "many")) == ["ends.bin", "report.json", "tokens.bin"]
    assert report.rows == len(examples) == 29
    assert all(example.input_ids.count(new) == 1 for example in examples)
    size = first.stat().st_size + second.stat().st_size
    assert len(done) > 4 and done == sorted(done) and done[-1] == (size, size)
    assert not list((tmp_path / "many").glob(".*.partial"))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Chunks of 200 bytes, and the lines at which those begin that are tokenized from here on."""
    monkeypatch.setattr(batch, "CHUNK", 200)
    tokenize_chunk, begun = batch._tokenize_chunk, []

    def count(tokenizer: Tokenizer, chunk: Any, *others: Any) -> str | None:
        begun.append(chunk.first)
        return tokenize_chunk(tokenizer, chunk, *others)

    monkeypatch.setattr(batch, "_tokenize_chunk", count)
    return begun


def test_the_second_time_nothing_is_tokenized(
    tmp_path: Path, tokenizer: Tokenizer, counted: list[int]
) -> None:
    path = write(tmp_path / "a.jsonl", rows(20))
    first, report = tokenize([path], tokenizer, LENGTH, tmp_path / "cache", workers=1)
    n_chunks = len(counted)
    again, report_again = tokenize([path], tokenizer, LENGTH, tmp_path / "cache", workers=1)
    assert n_chunks > 3 and len(counted) == n_chunks
    assert list(again) == list(first) and report_again == report


@pytest.mark.parametrize("broken", [OSError(errno.EIO, "I/O error"), KeyboardInterrupt()], ids=str)
def test_what_was_done_before_an_interruption_is_not_done_again(
    tmp_path: Path,
    tokenizer: Tokenizer,
    counted: list[int],
    monkeypatch: pytest.MonkeyPatch,
    broken: BaseException,
) -> None:
    path, cache = write(tmp_path / "a.jsonl", rows(20)), tmp_path / "cache"
    whole = batch._tokenize_chunk

    def break_at_the_third(*args: Any) -> str | None:
        if len(counted) == 2:
            raise broken
        return whole(*args)

    with monkeypatch.context() as patch:
        patch.setattr(batch, "_tokenize_chunk", break_at_the_third)
        with pytest.raises((ValueError, KeyboardInterrupt)):
            tokenize([path], tokenizer, LENGTH, cache, workers=1)
    before = list(counted)
    assert len(before) == 2 and not list(cache.glob("tokens-*"))
    tokenize([path], tokenizer, LENGTH, cache, workers=1)
    assert len(counted) == len(set(counted)) and counted[:2] == before
    tokenize([path], tokenizer, LENGTH, tmp_path / "undisturbed", workers=1)
    assert contents(cache) == contents(tmp_path / "undisturbed")


def test_a_half_written_chunk_is_done_again_and_a_half_joined_set_too(
    tmp_path: Path, tokenizer: Tokenizer, counted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, cache = write(tmp_path / "a.jsonl", rows(20)), tmp_path / "cache"

    def die(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(
            batch.os, "replace", lambda a, b: die() if Path(a).name == "joined" else os.rename(a, b)
        )
        with pytest.raises(KeyboardInterrupt):  # all is joined, and has not its name yet
            tokenize([path], tokenizer, LENGTH, cache, workers=1)
    n_chunks = len(counted)
    (partial,) = cache.glob(".*.partial")
    (partial / "joined" / "tokens.bin").write_bytes(b"half")
    (partial / "1.json").unlink()  # the sign that a chunk is whole
    (partial / "1.tokens").write_bytes(b"half")
    tokenize([path], tokenizer, LENGTH, cache, workers=1)
    assert len(counted) == n_chunks + 1
    tokenize([path], tokenizer, LENGTH, tmp_path / "undisturbed", workers=1)
    assert contents(cache) == contents(tmp_path / "undisturbed")


def test_what_is_kept_is_found_by_content_and_not_by_name(tmp_path: Path, tiny_model: Path) -> None:
    cache, path = tmp_path / "cache", write(tmp_path / "a.jsonl", rows(5))
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))

    def kept(path: Path, length: int = LENGTH) -> int:
        tokenize([path], Tokenizer(model), length, cache, workers=1)
        return len(list(cache.glob("tokens-*")))

    assert kept(path) == 1
    os.utime(path, (0, 0))
    assert kept(path.rename(tmp_path / "b.jsonl")) == 1
    assert kept(write(tmp_path / "b.jsonl", rows(5, first=1))) == 2
    assert kept(tmp_path / "b.jsonl", LENGTH - 1) == 3
    config = json.loads((model / "tokenizer_config.json").read_text())
    config["chat_template"] = "{# another one #}" + config["chat_template"]
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    assert kept(tmp_path / "b.jsonl") == 4
    content = json.loads((model / "tokenizer.json").read_text())
    content["model"]["merges"].pop()
    (model / "tokenizer.json").write_text(json.dumps(content))
    assert kept(tmp_path / "b.jsonl") == 5


def test_how_rows_become_examples_decides_what_is_found_again(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path, cache = write(tmp_path / "a.jsonl", rows(5)), tmp_path / "cache"

    def kept(path: Path = path, **recipe: Any) -> int:
        tokenize([path], tokenizer, LENGTH, cache, workers=1, **recipe)
        return len(list(cache.glob("tokens-*")))

    assert kept() == kept() == 1
    assert kept(dataset_format="pair") == 2
    assert kept(train_on_source=True) == 3
    assert kept(convert=shout) == kept(convert=shout) == 4
    assert kept(convert=whisper) == 5
    (tmp_path / "b.txt").write_bytes(path.read_bytes())
    assert kept(tmp_path / "b.txt") == 6  # the same content as text


def shout(row: dict[str, Any]) -> dict[str, Any]:
    return row | {"completion": row["completion"].upper()}


def whisper(row: dict[str, Any]) -> dict[str, Any]:
    return row | {"completion": row["completion"].lower()}


CONVERTED = """
import sys
from pathlib import Path
from minqlora import batch
from minqlora.tokenizer import Tokenizer

def convert(row):
    return {"prompt": row["title"], "completion": row["body"].upper()}

if __name__ == "__main__":
    batch.CHUNK = 400
    tokenizer = Tokenizer(sys.argv[1])
    examples, report = batch.tokenize(
        [Path(sys.argv[2])], tokenizer, 100, Path("cache"), convert=convert, workers=2
    )
    assert report.used == 60
    print(tokenizer.decode(examples[59].input_ids))
"""


def test_a_conversion_that_stands_in_the_script_reaches_the_workers(tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "script.py").write_text(CONVERTED)
    write(tmp_path / "a.jsonl", [{"title": f"T {i}", "body": f"the body {i}"} for i in range(60)])
    done = subprocess.run(
        [sys.executable, "script.py", tiny_model, "a.jsonl"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": str(Path(batch.__file__).parents[1])},
    )
    assert done.stdout == "user\nT 59\nassistant\nTHE BODY 59\n", done.stderr


def test_files_of_every_kind_together_are_their_rows_one_after_the_other(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "CHUNK", 200)
    given, folder = rows(30), tmp_path / "data"
    folder.mkdir()
    write(folder / "a.jsonl", given[:10])
    (folder / "b.json").write_text(json.dumps(given[10:15]))
    with open(folder / "c.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "completion"])
        writer.writeheader()
        writer.writerows(given[15:20])
    parquet.write_table(pa.Table.from_pylist(given[20:25]), folder / "d.parquet", row_group_size=2)
    (folder / "e.jsonl.gz").write_bytes(gzip.compress(write(tmp_path / "e.jsonl", given[25:]).read_bytes()))
    messages = [{"messages": to_messages(row)} for row in given]
    write(folder / "f.jsonl", messages)  # each file has a format of its own
    examples, report = tokenize([folder], tokenizer, LENGTH, tmp_path / "cache", workers=1)
    assert list(examples) == 2 * [encode(to_messages(row), tokenizer) for row in given]
    assert report.rows == report.used == 60


@pytest.mark.parametrize("suffix", [".csv", ".jsonl.gz"])
def test_a_broken_row_is_named_in_other_kinds_of_files_too(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    monkeypatch.setattr(batch, "CHUNK", 100)
    path = tmp_path / f"bad{suffix}"
    if suffix == ".csv":
        path.write_text("prompt,completion\n" + "Q,A\n" * 90 + "Q\n" + "Q,A\n" * 90)
        where = "row 92: 1 fields under 2 columns"
    else:
        path.write_bytes(gzip.compress(b'{"prompt": "Q", "completion": "A"}\n' * 90 + b'{"prompt": "Q"}'))
        where = "line 91: 'completion' is missing"
    with pytest.raises(ValueError, match=f"^{path}: {where}"):
        tokenize([path], tokenizer, LENGTH, tmp_path / "cache", workers=1)


def test_the_first_row_of_a_file_is_what_every_chunk_of_it_must_be(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "CHUNK", 200)
    path = write(tmp_path / "a.jsonl", rows(20) + [{"text": "x"}] * 20)
    with pytest.raises(
        ValueError, match=r"a.jsonl: line 21: found the keys \['text'\], but the format is pair"
    ):
        tokenize([path], tokenizer, LENGTH, tmp_path / "cache", workers=1)


def test_two_files_are_not_their_content_as_one(tmp_path: Path, tokenizer: Tokenizer) -> None:
    # A byte order mark is none in the middle of a file.
    mark, row = "\ufeff", json.dumps(rows(1)[0]) + "\n"
    for name, text in (("a", row), ("b", mark + row), ("ab", row + mark + row)):
        (tmp_path / f"{name}.jsonl").write_text(text, encoding="utf-8")
    examples, _ = tokenize([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], tokenizer, LENGTH, tmp_path)
    assert len(examples) == 2
    with pytest.raises(ValueError, match="ab.jsonl: line 2: not valid JSON"):
        tokenize([tmp_path / "ab.jsonl"], tokenizer, LENGTH, tmp_path)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_broken_line_is_named_in_whatever_chunk_and_by_whichever_worker(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setattr(batch, "CHUNK", 400)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # workers set it for themselves
    # Threads, which begin at once, in the place of processes; those are in the tests of chunks and of death.
    monkeypatch.setattr(
        batch, "ProcessPoolExecutor", lambda count, _, *start: ThreadPoolExecutor(count, "worker", *start)
    )
    good, bad = write(tmp_path / "good.jsonl", rows(5), "\n\n"), tmp_path / "bad.jsonl"
    lines = [json.dumps(row) for row in rows(40)]
    lines[22], lines[33] = '{"prompt": "Q"}', "and this"
    bad.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=rf"^{bad}: line 23: 'completion' is missing; found \['prompt'\]$"):
        tokenize([good, bad], tokenizer, LENGTH, tmp_path / "cache", workers=workers)
    # Corrected, it is another file: nothing is left to be gone on with.
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


@pytest.mark.parametrize("content", [[], [EMPTY], [EMPTY] * 3])
def test_files_without_anything_to_learn_are_refused_every_time(
    tmp_path: Path, tokenizer: Tokenizer, content: list[dict[str, str]]
) -> None:
    path, count = write(tmp_path / "a.jsonl", content), len(content)
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"a.jsonl: no row left .*\({count} read, {count} dropped"):
            tokenize([path], tokenizer, LENGTH, tmp_path / "cache")


def test_a_file_that_is_not_there_is_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=f"{tmp_path / 'nowhere.jsonl'}: no such file"):
        tokenize([tmp_path / "nowhere.jsonl"], tokenizer, LENGTH, tmp_path)


def tokenize_here(arguments: tuple[Path, Path, Path]) -> list[Example]:
    """Tokenize in a process of its own, in small chunks."""
    model, path, cache = arguments
    batch.CHUNK = 400
    return list(tokenize([path], Tokenizer(model), LENGTH, cache, workers=1)[0])


def test_of_two_processes_at_once_one_waits_for_the_other(
    tmp_path: Path, tiny_model: Path, tokenizer: Tokenizer
) -> None:
    path, cache = write(tmp_path / "a.jsonl", rows(60)), tmp_path / "cache"
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        one, two = pool.map(tokenize_here, [(tiny_model, path, cache)] * 2, chunksize=1)
    assert one == two == [encode(to_messages(row), tokenizer) for row in rows(60)]
    assert sorted(contents(cache)) == ["ends.bin", "report.json", "tokens.bin"]


KILLED = """
import os, signal, sys
from pathlib import Path
from minqlora import batch
from minqlora.tokenizer import Tokenizer

class Fatal(Tokenizer):
    def save(self, folder):
        super().save(folder)
        (Path(folder) / "tokenizer.json").write_text("broken")

batch.CHUNK = 400
model, path, cache = map(Path, sys.argv[1:])
if __name__ == "__main__":
    try:
        batch.tokenize([path], Fatal(model), 100, cache, workers=2)
    except ValueError as error:
        print(error)
"""


def test_workers_that_die_end_the_run_with_one_line(tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "killed.py").write_text(KILLED)
    path = write(tmp_path / "a.jsonl", rows(20))
    done = subprocess.run(
        [sys.executable, tmp_path / "killed.py", tiny_model, path, tmp_path / "cache"],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"PYTHONPATH": str(Path(batch.__file__).parents[1])},
    )
    assert "a process that tokenized was killed" in done.stdout, done.stderr
    assert done.stdout.count("\n") == 1


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_cache_that_cannot_be_written_is_one_line(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    path, cache = write(tmp_path / "a.jsonl", rows(3)), tmp_path / "cache"

    def refuse(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        with pytest.raises(ValueError) as refusal:
            tokenize([path], tokenizer, LENGTH, cache)
    assert str(refusal.value) == (
        f"{cache}: tokenized data cannot be kept there ({os.strerror(code)}); choose another --data_cache"
    )
    assert len(tokenize([path], tokenizer, LENGTH, cache)[0]) == 3
    with pytest.raises(ValueError, match=f"{path}: tokenized data cannot be kept there .File exists"):
        tokenize([path], tokenizer, LENGTH, path)


def test_a_full_disk_leaves_nothing_that_looks_whole(
    tmp_path: Path, tokenizer: Tokenizer, small_disk: Callable[[int], Path]
) -> None:
    path, disk = write(tmp_path / "a.jsonl", rows(3000)), small_disk(2**18)
    with pytest.raises(ValueError, match=f"{disk}: tokenized data cannot be kept there .No space left"):
        tokenize([path], tokenizer, LENGTH, disk, workers=1)
    assert not list(disk.glob("tokens-*"))


def test_what_is_kept_in_a_read_only_folder_is_used(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.jsonl", rows(3))
    first, _ = tokenize([path], tokenizer, LENGTH, tmp_path / "cache")

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(batch, "_alone", refuse)
    monkeypatch.setattr(Path, "mkdir", refuse)
    assert list(tokenize([path], tokenizer, LENGTH, tmp_path / "cache")[0]) == list(first)


# -- orders ------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 300), st.integers(0, 2**70))
def test_any_number_of_places_is_permuted_and_any_piece_can_be_had(n: int, key: int) -> None:
    whole = permuted(range(n), n, key)
    assert sorted(whole) == list(range(n))
    assert [permuted(range(i, i + 1), n, key)[0] for i in range(n)] == whole
    assert permuted(range(n // 3, n), n, key) == whole[n // 3 :]
    assert permuted([], n, key) == []


def test_every_number_of_places_up_to_300_is_permuted() -> None:
    for n in range(1, 301):
        for key in (0, 1, 10**9):
            assert sorted(permuted(range(n), n, key)) == list(range(n))


@pytest.mark.parametrize("n", [2, 3, 6, 17, 64])
@pytest.mark.parametrize("spread", [1, 1_000_003])
def test_each_example_is_as_often_the_first_as_any_other(n: int, spread: int) -> None:
    n_keys = max(50 * n, 1000)
    counts = np.zeros((2, n))
    for key in range(n_keys):
        first, *_, last = permuted([0, n - 1], n, spread * key)
        counts[0, first] += 1
        counts[1, last] += 1
    expected = n_keys / n
    # By chance alone the sum has the mean n - 1 and the standard deviation sqrt(2 (n - 1)). Ten of these
    # above the mean are reached once in 10,000 draws for n = 2, whose tail is the longest, else less often.
    chi_square = ((counts - expected) ** 2 / expected).sum(axis=1)
    assert (chi_square < n - 1 + 10 * math.sqrt(2 * (n - 1))).all()


def test_neighbours_do_not_stay_neighbours() -> None:
    n = 1000
    steps = np.concatenate([np.diff(permuted(range(n), n, key)) for key in range(20)])
    # |b - a| of two places drawn at random has the mean n / 3 and the standard deviation n / sqrt(18); the
    # mean of 19,980 of them stays within five of its standard deviations.
    assert abs(np.abs(steps).mean() - n / 3) < 5 * n / math.sqrt(18 * len(steps))


def test_an_order_is_a_permutation_decided_by_seed_and_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    orders = [tuple(order(20, seed, epoch)) for seed in range(3) for epoch in range(3)]
    assert all(sorted(one) == list(range(20)) for one in orders)
    assert len(set(orders)) == len(orders)
    monkeypatch.setattr(batch, "WINDOW", 7)
    assert tuple(order(20, 0, 0)) == orders[0]  # however much of it is made at a time
    assert list(order(0, 0, 0)) == []


# -- splits ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fifty(tmp_path_factory: pytest.TempPathFactory) -> Examples:
    return stored(
        tmp_path_factory.mktemp("fifty") / "stored",
        [Example([i] * (i + 1), [i] * (i + 1)) for i in range(50)],
    )


@pytest.mark.parametrize(("val_size", "held_out"), [(0.0, 0), (0.1, 5), (0.5, 25), (1, 1), (7, 7), (49, 49)])
def test_a_split_is_disjoint_whole_and_decided_by_the_seed(
    fifty: Examples, val_size: float, held_out: int
) -> None:
    train, val = split(fifty, val_size, seed=3)
    assert len(val) == held_out and sorted([*train, *val]) == list(fifty)
    assert [list(part) for part in split(fifty, val_size, seed=3)] == [list(train), list(val)]
    for part in (train, val):
        assert part.lengths(range(len(part))) == [len(example.input_ids) for example in part]
        assert [part.row(i) for i in range(len(part))] == [example.input_ids[0] for example in part]
        for place in (-1, len(part)):
            with pytest.raises(IndexError):
                part[place]


def test_another_seed_holds_out_others(fifty: Examples) -> None:
    assert sorted(split(fifty, 10, seed=3)[1]) != sorted(split(fifty, 10, seed=4)[1])


@pytest.mark.parametrize("val_size", [0.999, 50, 51])
def test_a_split_that_leaves_nothing_to_train_on_is_refused(fifty: Examples, val_size: float) -> None:
    with pytest.raises(ValueError, match=r"holds out \d+ of 50 examples: none is left to train on"):
        split(fifty, val_size, seed=0)


@pytest.mark.parametrize("val_size", [0.001, 0.009])
def test_less_than_one_example_cannot_be_held_out(fifty: Examples, val_size: float) -> None:
    with pytest.raises(ValueError, match=f"val_size {val_size} of 50 examples is less than one"):
        split(fifty, val_size, seed=0)


# -- packing -------------------------------------------------------------------------------------------------


def test_the_example_of_the_docstring(tmp_path: Path) -> None:
    part = of_lengths(tmp_path / "stored", [700, 600, 400, 300, 300])
    packed = [sorted(part.lengths(row)) for row in pack(part, 1000, seed=0, epoch=0)]
    assert sorted(packed) == [[300], [300, 700], [400, 600]]


class Lengths:
    """Stands for a Part where only lengths matter."""

    def __init__(self, lengths: list[int]):
        self.held = lengths

    def __len__(self) -> int:
        return len(self.held)

    def lengths(self, places: list[int]) -> list[int]:
        """The numbers of tokens of some examples."""
        return [self.held[place] for place in places]


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 50), max_size=300),
    seed=st.integers(0, 5),
    epoch=st.integers(0, 5),
)
def test_every_example_stands_in_one_row_and_no_row_overflows(
    lengths: list[int], seed: int, epoch: int
) -> None:
    part: Any = Lengths(lengths)
    packed = list(pack(part, 50, seed, epoch))
    assert sorted(place for row in packed for place in row) == list(range(len(lengths)))
    assert all(0 < sum(part.lengths(row)) <= 50 for row in packed)
    # Best fit never opens a row while another has room: at most one is half empty or more.
    assert sum(sum(part.lengths(row)) <= 25 for row in packed) <= 1
    assert list(pack(part, 50, seed, epoch)) == packed


def test_rows_of_real_lengths_are_nearly_full_and_in_a_new_order_every_epoch() -> None:
    generator = torch.Generator().manual_seed(0)
    part: Any = Lengths(torch.randint(20, 300, (10_000,), generator=generator).tolist())  # several windows
    first, second = (list(pack(part, 512, seed=1, epoch=epoch)) for epoch in (0, 1))
    for packed in (first, second):
        assert sum(part.held) / (512 * len(packed)) > 0.97
    assert first != second
    means = [sum(part.lengths(row)) / len(row) for row in first]
    # Rows of long examples do not all come first.
    assert abs(sum(means[:200]) / 200 - sum(means) / len(means)) < 15


# -- batches -----------------------------------------------------------------------------------------------


def test_targets_are_labels_one_place_on_and_never_cross_to_the_next_example() -> None:
    examples = [Example([5, 6, 7], [IGNORE, 6, 7]), Example([8], [8]), Example([9, 10], [9, 10])]
    together = collate(examples)
    assert together.input_ids.tolist() == [[5, 6, 7, 8, 9, 10]]
    assert together.targets.tolist() == [[6, 7, IGNORE, IGNORE, 10, IGNORE]]
    assert together.lengths == [3, 1, 2] and together.supervised == 3
    assert together.input_ids.dtype == together.targets.dtype == torch.int64


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=1, max_size=6), min_size=1, max_size=5
    )
)
def test_a_batch_is_its_examples_end_to_end(rows: list[list[tuple[int, bool]]]) -> None:
    examples = [
        Example([token for token, _ in row], [token if said else IGNORE for token, said in row])
        for row in rows
    ]
    together, alone = collate(examples), [collate([example]) for example in examples]
    assert torch.equal(together.input_ids, torch.cat([one.input_ids for one in alone], dim=1))
    assert torch.equal(together.targets, torch.cat([one.targets for one in alone], dim=1))
    assert isinstance(together, Batch) and together.supervised == sum(one.supervised for one in alone)
