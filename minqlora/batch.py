"""Chapter 17. Batches: examples on disk, in a new order every epoch, packed into rows of one length.

Tokenizing takes time and memory, training wants neither; so a dataset is tokenized once, by all cores, into
a folder of the cache, and training reads from there only what the next step needs. A token takes four bytes,
its label one bit of them::

    input_ids   1    4093   2683   28747   28705   28781   2          "2 + 2 =" and the answer "4"
    labels      -    -      -      -       28705   28781   2
    on disk     the ids, + 2**31 where there is a label

    tokens.bin  uint32, example after example            ends.bin  int64, where each example ends

Order. An epoch visits the examples in an order that seed and epoch decide and that nobody has to store: a
cipher of the places 0 ... n - 1 (a Feistel network) is a permutation of them, and any piece of it can be had
by itself. What is held out for evaluation is the beginning of such an order, too.

Rows. `pack` fills rows of `max_seq_length` with whole examples, so that every step does the same work and
nothing is padded::

    lengths 700 600 400 300 300 and 1,000 tokens a row  ->  [700 300] [600 400] [300]

A batch is its examples laid end to end in one row, (1, T); `lengths` keeps them apart in attention. `targets`
are the labels moved one place, so that position t holds the token to be predicted there.

Cost: 4 bytes a token and 8 an example on disk; in memory a window of examples, whatever the size of the data.

Source: best fit, decreasing: "Fewer Truncations Improve Language Modeling". Permutations by a cipher: Black
and Rogaway, "Ciphers with Arbitrary Finite Domains".

Before: data. Next: check.
"""

import array
import bisect
import contextlib
import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from minqlora.data import (
    IGNORE,
    Chunk,
    DataReport,
    Example,
    Recipe,
    chunks,
    encode_rows,
    find_files,
    format_of,
    kind_of,
    read_rows,
    reading,
)
from minqlora.files import fsync_folder, write_atomically
from minqlora.tokenizer import Tokenizer

LEARNED = np.uint32(2**31)  # added to a token that has a label
WINDOW = 4096  # examples that are packed together: enough to fill rows, few enough to keep the order random
CHUNK = 2**22  # bytes of a file that are tokenized at a time; what an interruption loses is one of these
VERSION = 2  # of what is on disk
ROUNDS = 8  # of the cipher: with the usual 4, some orders of half a dozen examples come oftener than others


class Examples(Sequence[Example]):
    """The examples in a folder of `tokenize`, read from disk one by one."""

    def __init__(self, folder: Path):
        # Read by position and not memory-mapped: mapped pages would count as this process's memory.
        self._tokens = open(folder / "tokens.bin", "rb", buffering=0)  # noqa: SIM115 (open for a run)
        self._ends = open(folder / "ends.bin", "rb", buffering=0)  # noqa: SIM115
        self._count = (folder / "ends.bin").stat().st_size // 8 - 1
        self.key = folder.name  # another one for other data, another tokenizer or another length

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, place: int) -> Example:  # type: ignore[override] # no slices
        """Return the example at a place."""
        if not 0 <= place < self._count:
            raise IndexError(place)
        start, stop = self._bounds(place)
        self._tokens.seek(4 * start)
        held = np.frombuffer(self._tokens.read(4 * (stop - start)), dtype="<u4")
        ids = (held & ~LEARNED).astype(np.int64)
        return Example(ids.tolist(), np.where(held & LEARNED, ids, IGNORE).tolist())

    def piece(self, first: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the examples at `first` to `stop` as they are on disk: tokens with the bit of their labels,
        (n_tokens,) uint32, and where each ends there, (stop - first,) int64."""
        self._ends.seek(8 * first)
        ends = np.frombuffer(self._ends.read(8 * (stop - first + 1)), dtype="<i8")
        self._tokens.seek(4 * int(ends[0]))
        held = np.frombuffer(self._tokens.read(4 * int(ends[-1] - ends[0])), dtype="<u4")
        return held, ends[1:] - ends[0]

    def length(self, place: int) -> int:
        """Return the number of tokens of the example at a place."""
        start, stop = self._bounds(place)
        return stop - start

    def _bounds(self, place: int) -> tuple[int, int]:
        self._ends.seek(8 * place)
        start, stop = np.frombuffer(self._ends.read(16), dtype="<i8").tolist()
        return start, stop


class Part(Sequence[Example]):
    """A run of places in the order that a seed gives to some examples."""

    def __init__(self, examples: Examples, seed: int, first: int, count: int):
        self._examples, self._seed, self._first, self._count = examples, seed, first, count
        self.key = examples.key

    @classmethod
    def whole(cls, examples: Examples) -> "Part":
        """Return all examples, in the order of seed 0."""
        return cls(examples, 0, 0, len(examples))

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, place: int) -> Example:  # type: ignore[override] # no slices
        """Return the example at a place of this part."""
        return self._examples[self.row(place)]

    def lengths(self, places: Sequence[int]) -> list[int]:
        """Return the numbers of tokens of the examples at some places of this part."""
        return [self._examples.length(row) for row in self.rows(places)]

    def row(self, place: int) -> int:
        """Return which of all examples is at a place of this part, counted from 0 in the files' order."""
        if not 0 <= place < self._count:
            raise IndexError(place)
        return self.rows([place])[0]

    def rows(self, places: Sequence[int]) -> list[int]:
        """Return what `row` does, for some places at once."""
        return permuted([self._first + place for place in places], len(self._examples), self._seed)


# ---- tokenizing once ---------------------------------------------------------------------------------------


def tokenize(
    paths: Sequence[Path],
    tokenizer: Tokenizer,
    max_seq_length: int,
    cache: Path,
    *,
    dataset_format: str = "auto",
    train_on_source: bool = False,
    convert: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Examples, DataReport]:
    """Return the examples of files and folders, tokenized, and what became of their rows.

    max_seq_length, dataset_format, train_on_source, convert: as in `Recipe`; convert is a function of a
    module, and stands by itself, because it is known by its source. cache: a folder; what the same files,
    tokenizer and recipe have left there is used, else it is made there: by `workers` processes (None: one a
    core), in chunks that an interrupted call leaves for the next one. progress: called with the bytes done
    and in all.

    Raises ValueError as `find_files` and `encode_rows`, if no row is left, and if the cache cannot be
    written.
    """
    recipe = Recipe(max_seq_length, dataset_format, train_on_source, convert)
    files = find_files(map(Path, paths))
    digest = _digest(files)
    digest.update(json.dumps([VERSION, CHUNK, recipe.key(), _fingerprint(tokenizer)]).encode())
    folder = cache / f"tokens-{digest.hexdigest()[:32]}"
    partial = cache / f".{folder.name}.partial"
    try:
        if not folder.is_dir():
            cache.mkdir(parents=True, exist_ok=True)
            with _alone(cache / f".{folder.name}.lock"):
                if not folder.is_dir():  # another process may have made it while this one waited
                    jobs = _plan(files, recipe, partial)
                    partial.mkdir(exist_ok=True)
                    problem = _tokenize_chunks(jobs, tokenizer, partial, workers, progress)
                    if problem is not None:
                        shutil.rmtree(partial)  # nobody will go on with it: the data must change first
                        raise ValueError(problem)
                    os.replace(_join(partial, len(jobs)), folder)
                    fsync_folder(cache)
                    shutil.rmtree(partial)
    except OSError as error:
        raise ValueError(
            f"{cache}: tokenized data cannot be kept there ({error.strerror}); choose another --data_cache"
        ) from None
    report = DataReport(**json.loads((folder / "report.json").read_text()))
    if not report.used:
        names = ", ".join(str(path) for path in paths)
        why = f": {report.reasons}" if report.dropped else ""
        raise ValueError(
            f"{names}: no row left to learn from ({report.rows} read, {report.dropped} dropped{why})"
        )
    return Examples(folder), report


def _fingerprint(tokenizer: Tokenizer) -> list[str]:
    files = sorted(tokenizer.files().items())
    return [f"{name} {hashlib.sha256(content).hexdigest()}" for name, content in files]


def _digest(files: Sequence[Path]) -> Any:
    # Of all that is in the files, and of their kinds.
    digest = hashlib.sha256()
    for path in files:
        with reading(path), open(path, "rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{kind_of(path)} {path.suffix.lower() == '.gz'} {content}\n".encode())
    return digest


_Job = tuple[Chunk, Recipe, Path]  # a chunk, how, and the beginning of the names of what comes of it


def _plan(files: Sequence[Path], recipe: Recipe, folder: Path) -> list[_Job]:
    # A file's first row says what all of its rows are.
    jobs: list[_Job] = []
    for path in files:
        of_file = list(chunks(path, CHUNK))
        of_recipe = recipe
        if of_file and recipe.dataset_format == "auto":
            of_recipe = replace(recipe, dataset_format=format_of(of_file[0], recipe))
        jobs += [(chunk, of_recipe, folder / str(i)) for i, chunk in enumerate(of_file, start=len(jobs))]
    return jobs


def _tokenize_chunks(
    jobs: list[_Job],
    tokenizer: Tokenizer,
    folder: Path,
    workers: int | None,
    progress: Callable[[int, int], None] | None,
) -> str | None:
    # Tokenizes the chunks that are missing; returns what is wrong with the first that is.
    missing = [job for job in jobs if not job[-1].with_suffix(".json").is_file()]
    total = sum(chunk.size for chunk, *_ in jobs)
    left = sum(chunk.size for chunk, *_ in missing)
    done = total - left
    # A process takes seconds to begin: as long as some megabytes.
    workers = min(workers or min(os.cpu_count() or 1, 1 + left // CHUNK), len(missing))
    with contextlib.ExitStack() as stack:
        results: Iterable[str | None]
        if workers > 1:
            # Not forked: a fork of a process with threads, as PyTorch has, may hang.
            context = multiprocessing.get_context("spawn")
            tokenizer.save(folder / "tokenizer")  # with tokens added since it was read
            pool = ProcessPoolExecutor(workers, context, _start_worker, (folder / "tokenizer",))
            stack.callback(pool.shutdown, cancel_futures=True)
            results = pool.map(_tokenize_in_worker, missing)
        else:
            results = (_tokenize_chunk(tokenizer, *job) for job in missing)
        try:
            for (chunk, *_), problem in zip(missing, results, strict=True):
                if problem is not None:
                    return problem
                done += chunk.size
                if progress is not None:
                    progress(done, total)
        except BrokenProcessPool:
            raise ValueError(
                f"{folder}: a process that tokenized was killed, for want of memory perhaps; what is done is "
                "kept, so start again"
            ) from None
    return None


_worker: dict[str, Tokenizer] = {}


def _start_worker(folder: Path) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core each
    _worker["tokenizer"] = Tokenizer(folder)


def _tokenize_in_worker(job: _Job) -> str | None:
    return _tokenize_chunk(_worker["tokenizer"], *job)


def _tokenize_chunk(tokenizer: Tokenizer, chunk: Chunk, recipe: Recipe, target: Path) -> str | None:
    # Writes TARGET.tokens, TARGET.lengths and, as the sign that both are whole, TARGET.json; returns what is
    # wrong with the data, for an exception loses its one line on the way through a pool.
    report, lengths = DataReport(), array.array("q")
    with open(target.with_suffix(".tokens"), "wb") as file:
        try:
            for example in encode_rows(read_rows(chunk), tokenizer, recipe, report):
                ids = np.array(example.input_ids, dtype=np.uint32)
                learned = np.array(example.labels) != IGNORE
                file.write((ids | (learned * LEARNED)).astype("<u4").tobytes())
                lengths.append(len(ids))
        except ValueError as error:
            return str(error)
        file.flush()
        os.fsync(file.fileno())
    write_atomically(target.with_suffix(".lengths"), np.array(lengths, dtype="<i8").tobytes())
    write_atomically(target.with_suffix(".json"), json.dumps(asdict(report)).encode())
    return None


def _join(folder: Path, count: int) -> Path:
    # The chunks' files become one of each kind, in a folder of their own; the chunks stay until it has its
    # name.
    joined = folder / "joined"
    joined.mkdir(exist_ok=True)
    report, end = DataReport(), 0
    with open(joined / "tokens.bin", "wb") as tokens, open(joined / "ends.bin", "wb") as ends:
        ends.write(np.zeros(1, dtype="<i8").tobytes())
        for i in range(count):
            with open(folder / f"{i}.tokens", "rb") as part:
                shutil.copyfileobj(part, tokens)
            lengths = np.fromfile(folder / f"{i}.lengths", dtype="<i8")
            ends.write((end + lengths.cumsum()).astype("<i8").tobytes())
            end += int(lengths.sum())
            report += DataReport(**json.loads((folder / f"{i}.json").read_text()))
        for file in (tokens, ends):
            file.flush()
            os.fsync(file.fileno())
    write_atomically(joined / "report.json", json.dumps(asdict(report)).encode())
    return joined


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    # Of two runs that prepare the same data one waits for the other.
    if os.name != "posix":
        yield
        return
    import fcntl

    with open(path, "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


# ---- orders ------------------------------------------------------------------------------------------------


def permuted(places: Sequence[int], n: int, key: int) -> list[int]:
    """Return where a permutation of 0 ... n - 1, decided by `key`, puts some places.

    Rounds of a Feistel network turn a number of 2 b bits into another, and no two into the same; numbers
    beyond n are turned again until they fall below it.
    """
    bits = max((n - 1).bit_length() + 1, 2) // 2
    mask = np.uint64(2**bits - 1)
    numbers = np.array(places, dtype=np.uint64)
    beyond = np.ones(len(numbers), dtype=bool)
    while beyond.any():
        left, right = numbers[beyond] >> np.uint64(bits), numbers[beyond] & mask
        for turn in range(ROUNDS):
            left, right = right, left ^ (scrambled(right, ROUNDS * key + turn) & mask)
        numbers[beyond] = (left << np.uint64(bits)) | right
        beyond = numbers >= n
    return numbers.tolist()


def scrambled(numbers: np.ndarray, key: int) -> np.ndarray:
    """Return other numbers for some of 64 bits, each decided by all bits of one and of the key: SplitMix64's
    mixing."""
    offset = (key + 1) * 0x9E3779B97F4A7C15 % 2**64
    x = numbers * np.uint64(0xD1B54A32D192ED03) + np.uint64(offset)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _epoch_key(seed: int, epoch: int) -> int:
    return seed * 1_000_003 + epoch + 1


def order(count: int, seed: int, epoch: int) -> Iterator[int]:
    """Yield the places 0 ... count - 1 in the order in which an epoch visits them."""
    for start in range(0, count, WINDOW):
        yield from permuted(range(start, min(start + WINDOW, count)), count, _epoch_key(seed, epoch))


def split(examples: Examples, val_size: float, seed: int) -> tuple[Part, Part]:
    """Return (train, held out): val_size is a share of the examples if below 1, else how many to hold out,
    drawn by seed.

    Raises ValueError if nothing would be left to train on, or nothing held out that was asked for.
    """
    count = round(val_size * len(examples)) if val_size < 1 else int(val_size)
    rest = len(examples) - count
    if val_size and not count:
        raise ValueError(
            f"val_size {val_size:g} of {len(examples)} examples is less than one; give the number of examples"
        )
    if rest <= 0:
        raise ValueError(
            f"val_size {val_size:g} holds out {count} of {len(examples)} examples: none is left to train on"
        )
    key = _epoch_key(seed, -1)
    return Part(examples, key, count, rest), Part(examples, key, 0, count)


# ---- rows and batches --------------------------------------------------------------------------------------


def pack(examples: Part, capacity: int, seed: int, epoch: int) -> Iterator[list[int]]:
    """Yield the rows of an epoch, each a list of places of examples that take at most `capacity` tokens.

    Within windows of the epoch's order the longest example comes first and goes where least room is left over
    ("best fit, decreasing"); then the window's rows are shuffled. Every example stands in one row.
    """
    visited = order(len(examples), seed, epoch)
    while window := list(itertools.islice(visited, WINDOW)):
        rows = _best_fit(dict(zip(window, examples.lengths(window), strict=True)), capacity)
        for place in order(len(rows), seed, epoch):
            yield rows[place]


def _best_fit(lengths: dict[int, int], capacity: int) -> list[list[int]]:
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), ascending
    for place in sorted(lengths, key=lambda place: -lengths[place]):  # stable: equals keep the epoch's order
        fitting = bisect.bisect_left(room, (lengths[place], 0))
        if fitting < len(room):
            left, row = room.pop(fitting)
        else:
            left, row = capacity, len(rows)
            rows.append([])
        rows[row].append(place)
        bisect.insort(room, (left - lengths[place], row))
    return rows


class Batch(NamedTuple):
    """Examples end to end: input_ids and targets (1, T) int64, targets the next labels; lengths sum to T."""

    input_ids: Tensor
    targets: Tensor
    lengths: list[int]

    @property
    def supervised(self) -> int:
        """The number of positions that carry loss."""
        return int((self.targets != IGNORE).sum())


def collate(examples: Sequence[Example]) -> Batch:
    """Lay examples end to end in one row."""
    input_ids = [token for example in examples for token in example.input_ids]
    # Each example's labels move one place to the left; its last token predicts nothing, and never the next
    # example's first.
    targets = [label for example in examples for label in [*example.labels[1:], IGNORE]]
    lengths = [len(example.input_ids) for example in examples]
    return Batch(torch.tensor([input_ids]), torch.tensor([targets]), lengths)
