"""Chapter 18. The data check: what a run is going to learn from, said before it begins.

Much of what goes wrong in fine-tuning goes wrong here, and no curve of the loss shows it: answers that were
cut away, an end that is never learned, the same rows in training and evaluation. So the examples on disk are
looked at, which are what training reads, and not what was meant::

    2,841 of 3,000 rows used (7 cut to length, 159 dropped: 159 without an answer), 171,038 tokens, 27% of ...
    12 ▁▃▆█▇▅▃▂▁▁▁▁ 256 tokens an example, half of them up to 57; end token learned in 2,834 of 2,841

Two examples are the same if their tokens are. A hash of 8 bytes stands for each; that any two of ten million
have the same without being so is less likely than one in 100,000::

    hash = sum over positions of mix(position * 2**32 + token)   modulo 2**64

`show` writes an example as its tokens, what is learned in colour: the one look that finds what no number
does.

Cost: one pass over the tokens, some 30 ns each; 16 bytes an example in memory.

Before: batch. Next: loss.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from minqlora.batch import LEARNED, WINDOW, Examples, Part, scrambled
from minqlora.data import IGNORE, DataReport, Example
from minqlora.tokenizer import Tokenizer

MAX_LOST = 0.2  # of the rows may be dropped, unless the user says that it may be more
BARS = "▁▂▃▄▅▆▇█"
N_BARS = 16
AT_ONCE = 128  # examples whose tokens are in memory together
COLOUR, PLAIN = (
    ("\x1b[32m", "\x1b[0m"),
    ("[[", "]]"),
)  # around what is learned: green, where there are colours


@dataclass
class DataCheck:
    """What a dataset comes to."""

    report: DataReport
    lengths: np.ndarray  # (n_examples,) int64, in tokens
    hashes: np.ndarray  # (n_examples,) uint64
    ended: int  # examples whose last token is an end token, and learned
    double_bos: int  # examples that begin with two beginning-of-text tokens

    @property
    def duplicates(self) -> int:
        """The number of examples that have stood before."""
        return len(self.hashes) - len(np.unique(self.hashes))

    def histogram(self) -> tuple[list[int], list[int]]:
        """Return bounds of lengths, and how many examples are longer than one and at most as long as the
        next."""
        shortest, longest = int(self.lengths.min()), int(self.lengths.max())
        bounds = np.linspace(shortest - 1, longest, min(N_BARS, longest - shortest + 1) + 1).astype(int)
        places = np.searchsorted(bounds, self.lengths, side="left") - 1
        return bounds.tolist(), np.bincount(places, minlength=len(bounds) - 1).tolist()

    def lines(self) -> list[str]:
        """Return two lines on what there is to learn from."""
        bounds, counts = self.histogram()
        tallest = max(counts)
        bars = "".join(BARS[(count * len(BARS) - 1) // tallest] if count else " " for count in counts)
        median = int(np.median(self.lengths))
        return [
            str(self.report),
            f"{bounds[0] + 1} {bars} {bounds[-1]:,} tokens an example, half of them up to {median:,}; "
            f"end token learned in {self.ended:,} of {self.report.used:,}",
        ]

    def warnings(self) -> list[str]:
        """Return a line on each thing that is probably not meant."""
        found, of_all = [], f"of {len(self.lengths):,} examples"
        if self.duplicates:
            found.append(f"repeated, token for token: {self.duplicates:,} {of_all}")
        if 2 * self.ended < self.report.used:
            found.append(
                f"the end token is learned in {self.ended:,} of {self.report.used:,} rows only, so the model "
                "may not learn when to stop; a longer --max_seq_length cuts fewer"
            )
        if self.double_bos:
            found.append(
                f"two beginning-of-text tokens: {self.double_bos:,} {of_all}; the text brings one, and the "
                "template or the tokenizer another"
            )
        return found

    def numbers(self) -> dict[str, Any]:
        """Return all of it as JSON: names and numbers, of the histogram lists of numbers."""
        bounds, counts = self.histogram()
        return asdict(self.report) | {
            "supervised_share": round(self.report.supervised / self.report.tokens, 4),
            "examples": len(self.lengths),
            "median_length": float(np.median(self.lengths)),
            "longest": bounds[-1],
            "length_bounds": bounds,
            "length_counts": counts,
            "end_token_learned": self.ended,
            "double_bos": self.double_bos,
            "duplicates": self.duplicates,
        }


def check(examples: Examples, report: DataReport, tokenizer: Tokenizer) -> DataCheck:
    """Return what a dataset comes to. `report`: of the same call of `tokenize`."""
    n = len(examples)
    lengths, hashes = np.empty(n, dtype=np.int64), np.empty(n, dtype=np.uint64)
    ended = double_bos = 0
    for first in range(0, n, AT_ONCE):
        held, ends = examples.piece(first, min(first + AT_ONCE, n))  # (n_tokens,) uint32, (<= AT_ONCE,)
        starts = np.concatenate([[0], ends[:-1]])
        here = slice(first, first + len(ends))
        lengths[here] = ends - starts
        tokens = (held & ~LEARNED).astype(np.uint64)
        positions = np.arange(len(held)) - np.repeat(starts, lengths[here])
        mixed = scrambled((positions.astype(np.uint64) << np.uint64(32)) | tokens, 0)
        hashes[here] = np.add.reduceat(mixed, starts)
        ended += int((np.isin(tokens[ends - 1], tokenizer.eos_ids) & (held[ends - 1] >= LEARNED)).sum())
        if tokenizer.bos_id is not None:
            begin = tokens[starts] == tokenizer.bos_id
            second = tokens[np.minimum(starts + 1, len(tokens) - 1)] == tokenizer.bos_id
            double_bos += int((begin & second & (lengths[here] > 1)).sum())
    return DataCheck(report, lengths, hashes, ended, double_bos)


def in_both(train: Part, train_check: DataCheck, held_out: Part, held_out_check: DataCheck) -> int:
    """Return how many of the examples held out are also learned from. The checks are of the datasets that the
    parts are parts of."""
    seen = np.isin(_hashes(held_out, held_out_check), _hashes(train, train_check))
    return int(seen.sum())


def _hashes(part: Part, checked: DataCheck) -> np.ndarray:
    windows = (range(i, min(i + WINDOW, len(part))) for i in range(0, len(part), WINDOW))
    pieces = [checked.hashes[part.rows(places)] for places in windows]
    return np.concatenate([*pieces, np.empty(0, dtype=np.uint64)])


def require_kept(report: DataReport, name: str) -> None:
    """Raise ValueError if more than MAX_LOST of a dataset's rows are dropped. name: of the dataset."""
    share = report.dropped / max(report.rows, 1)
    if share > MAX_LOST:
        raise ValueError(
            f"{name}: {report.dropped:,} of {report.rows:,} rows ({share:.0%}) would be lost, "
            f"{report.reasons}; look at the data, or go on without them: --allow_dropped"
        )


def show(example: Example, tokenizer: Tokenizer, *, colour: bool) -> str:
    """Return an example as text, `|` between its tokens, what is learned of it in green or, without colour,
    in [[ ]].

    What a terminal would act on is written as an escape; a line break is one, too, and ends the line.
    """
    opening, closing = COLOUR if colour else PLAIN
    written, learning = "", False
    for text, label in _readable(example, tokenizer):
        if (label != IGNORE) != learning:
            learning = not learning
            written += opening if learning else closing
        written += text.removesuffix("\n") + "|" + "\n" * text.endswith("\n")
    return written + (closing if learning else "")


def _readable(example: Example, tokenizer: Tokenizer) -> list[tuple[str, int]]:
    # The text of each token with its label. Bytes of one character that are several tokens stand together.
    found: list[tuple[str, int]] = []
    before: list[int] = []  # a token, for a decoder may take the space from the first
    ids: list[int] = []
    for token, label in zip(example.input_ids, example.labels, strict=True):
        ids.append(token)
        known = tokenizer.decode(before, skip_special_tokens=False)
        text = tokenizer.decode(before + ids, skip_special_tokens=False)[len(known) :]
        if text.endswith("\ufffd") and len(ids) < 4:
            continue
        found.append((_harmless(text), label))
        before, ids = [token], []
    if ids:  # the limit has cut a character in two
        found.append(("\ufffd", example.labels[-1]))
    return found


def _harmless(text: str) -> str:
    escaped = (
        letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text
    )
    return "".join(escaped).replace("\\n", "\\n\n") if "\n" in text else "".join(escaped)
