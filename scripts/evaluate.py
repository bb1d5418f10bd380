"""Measure a model: base against adapter against merged, in one table with 95 % confidence intervals.

    python scripts/evaluate.py --adapter runs/demo-1 --dataset heldout.jsonl
    python scripts/evaluate.py --adapter runs/gsm8k-1 --questions gsm8k_heldout.jsonl --output gsm8k.json
    python scripts/evaluate.py --model MODEL_FOLDER --text wiki.txt --choices science.jsonl
    python scripts/evaluate.py --adapter runs/demo-1 --merged merged --text wiki.txt

--text       perplexity and bits per byte of text files, by a window that slides over each
--dataset    loss per supervised token of what finetune.py learns from
--questions  greedy answers against those in the file: GSM8K's `#### N`, or the whole answer
--choices    the likeliest of some answers: {"question": ..., "choices": [..., ...], "answer": index or text}

An adapter and its base share one load, quantized as in training; for the base the adapter is switched off. A
merged model is loaded after them, as it is.

Intervals. A share of right answers has Wilson's; a loss the percentiles of a bootstrap, which draws windows
or examples again and again. Contenders answer the same questions, so their difference is measured in pairs
and is known better than either: shares by Bonett and Price's adjusted Wald interval, losses by the bootstrap.
"""

import gc
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor
from tqdm import tqdm

from chat import ModelConfig, Speaker, read_rows
from finetune import Config as FinetuneConfig
from finetune import as_json, choose_device
from minqlora import generate_batch, load_model
from minqlora.architecture import read_architecture
from minqlora.batch import collate, tokenize
from minqlora.checkpoint import default_dtype, find_model
from minqlora.data import IGNORE, Example, encode_prompt, to_messages
from minqlora.files import write_atomically
from minqlora.loss import CHUNK
from minqlora.model import CausalLM
from minqlora.tokenizer import Message, Tokenizer
from options import option, parse, user_errors

CONFIDENCE = 0.95
RESAMPLES = 2000
TOKENS_AT_ONCE = 2048  # of examples that go through the model end to end


@dataclass
class Config(ModelConfig):
    """What can be set."""

    merged: Path | None = option(None, "folder of a merged model, to compare with")
    text: list[Path] | None = option(None, "text files to take the perplexity of")
    dataset: list[Path] | None = option(None, "files of examples, as finetune.py reads them")
    questions: list[Path] | None = option(None, "files of questions and their answers, to be answered")
    choices: list[Path] | None = option(None, "JSONL files of questions with choices")
    output: Path | None = option(None, "JSON file for the results, and for the answers that were given")

    max_seq_length: int | None = option(
        None,
        "tokens of a window of text; longest example in tokens (default: 1024, or what the model was made "
        "for if that is less)",
    )
    stride: int | None = option(
        None, "tokens that the window moves on, which are counted; the rest is context (default: half of it)"
    )
    text_tokens: int | None = option(None, "measure so many tokens of each text (default: all)")
    max_samples: int | None = option(None, "measure so many examples of each other file (default: all)")
    extract: Literal["auto", "gsm8k", "last_number", "exact"] = option(
        "auto",
        "what of an answer counts: the number after ####, the last number, or all of it; auto: both numbers "
        "where every answer in the file has ####, else exact",
    )
    few_shot: int = option(0, "show the first so many questions of a file, answered, before each other one")
    max_new_tokens: int = option(256, "longest answer in tokens")
    batch_size: int = option(16, "questions that are answered at once")
    data_cache: Path = option(
        FinetuneConfig.__dataclass_fields__["data_cache"].default,
        "folder that keeps tokenized datasets, as finetune.py's",
    )

    def __post_init__(self) -> None:
        """Refuse values that cannot mean anything, and find the base model."""
        at_least = {
            0: "few_shot",
            1: "max_samples max_new_tokens batch_size stride",
            2: "max_seq_length text_tokens",
        }
        for least, names in at_least.items():
            for name in names.split():
                value = getattr(self, name)
                if value is not None and value < least:
                    raise ValueError(f"--{name} must be at least {least}, got {value}")
        if not (self.text or self.dataset or self.questions or self.choices):
            raise ValueError("nothing to measure: give --text, --dataset, --questions or --choices")
        if self.output is not None and not self.output.resolve().parent.is_dir():
            raise ValueError(f"--output {self.output}: there is no such folder")
        if self.model is not None or self.adapter or self.merged is None:
            super().__post_init__()
        if self.max_seq_length is None:
            source = self.model or self.merged
            assert source is not None  # or nobody would be measured
            self.max_seq_length = min(1024, read_architecture(find_model(source)).max_positions)
        if self.stride is None:
            self.stride = max(self.max_seq_length // 2, 1)
        if self.stride >= self.max_seq_length:
            raise ValueError(
                f"--stride {self.stride} must be below --max_seq_length {self.max_seq_length}: each token is "
                "predicted from one before it at least"
            )


# ---- figures and their intervals ---------------------------------------------------------------------------

Interval = tuple[float, float] | None


@dataclass
class Share:
    """The share of right answers. hits: (n,) bool, one for each question."""

    hits: np.ndarray
    items: str = "questions"

    def __len__(self) -> int:
        return len(self.hits)

    @property
    def value(self) -> float:
        """The share."""
        return float(self.hits.mean())

    def interval(self) -> Interval:
        """Return Wilson's score interval, which holds near 0 and 1 and for few questions."""
        test = stats.binomtest(int(self.hits.sum()), len(self.hits))
        return tuple(test.proportion_ci(CONFIDENCE, method="wilson"))

    def difference(self, other: "Share") -> tuple[float, Interval]:
        """Return this share less another one of the same questions, and the interval of that.

        Source: Bonett and Price, "Adjusted Wald Confidence Interval for a Difference of Binomial Proportions
        Based on Paired Data": one question more is taken to have turned right, and one wrong.
        """
        n = len(self.hits)
        better = (int((self.hits & ~other.hits).sum()) + 1) / (n + 2)
        worse = (int((~self.hits & other.hits).sum()) + 1) / (n + 2)
        z = stats.norm.ppf(0.5 + CONFIDENCE / 2)
        reach = z * np.sqrt((better + worse - (better - worse) ** 2) / (n + 2))
        middle = better - worse
        return self.value - other.value, (max(middle - reach, -1.0), min(middle + reach, 1.0))


@dataclass
class Loss:
    """A mean loss per token, as it is, scaled, or exponentiated (perplexity).

    sums: (n,) in nats over the tokens of each window or example; counts: (n,) how many these are.
    """

    sums: np.ndarray
    counts: np.ndarray
    items: str
    scale: float = 1.0
    exponentiated: bool = False

    def __len__(self) -> int:
        return len(self.sums)

    def _figure(self, sums: np.ndarray, counts: np.ndarray, axis: int = -1) -> Any:
        mean = self.scale * sums.sum(axis) / counts.sum(axis)
        return np.exp(mean) if self.exponentiated else mean

    @property
    def value(self) -> float:
        """The figure."""
        return float(self._figure(self.sums, self.counts))

    def interval(self) -> Interval:
        """Return the percentiles of a bootstrap over windows or examples, None for a single one."""
        return _bootstrap((self.sums, self.counts), self._figure)

    def difference(self, other: "Loss") -> tuple[float, Interval]:
        """Return this figure less another one of the same windows or examples, and the interval of that."""

        def differ(*parts: np.ndarray, axis: int) -> Any:
            ours, theirs = (self._figure(some[0], some[1], axis) for some in (parts[:2], parts[2:]))
            return ours - theirs

        parts = (self.sums, self.counts, other.sums, other.counts)
        return self.value - other.value, _bootstrap(parts, differ)


Figure = Share | Loss


def _bootstrap(parts: Sequence[np.ndarray], statistic: Callable[..., Any]) -> Interval:
    if len(parts[0]) < 2:
        return None
    options: dict[str, Any] = dict(paired=True, vectorized=True, method="percentile", batch=100, rng=0)
    found = stats.bootstrap(parts, statistic, n_resamples=RESAMPLES, confidence_level=CONFIDENCE, **options)
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


@dataclass
class Contender:
    """One who is measured."""

    name: str
    model: CausalLM
    tokenizer: Tokenizer


# ---- losses ------------------------------------------------------------------------------------------------


@torch.inference_mode()
def token_losses(model: CausalLM, examples: Sequence[Example]) -> list[Tensor]:
    """Return for each example the cross entropy of each of its supervised tokens but the first, in nats."""
    batch = collate(examples)
    hidden = model.model(batch.input_ids.to(model.device), batch.lengths)[0]  # (T, D)
    targets = batch.targets[0].to(model.device)  # (T,)
    kept = targets != IGNORE
    chunks = zip(hidden[kept].split(CHUNK), targets[kept].split(CHUNK), strict=True)
    losses = [
        F.cross_entropy(model.logits(some).float(), wanted, reduction="none") for some, wanted in chunks
    ]
    counts = [sum(label != IGNORE for label in example.labels[1:]) for example in examples]
    return list(torch.cat(losses).cpu().split(counts))


def summed_losses(model: CausalLM, examples: Sequence[Example], what: str) -> tuple[np.ndarray, np.ndarray]:
    """Return for each example the sum of its tokens' losses and how many tokens these are, (n,) each."""
    sums, counts = [], []
    with tqdm(total=len(examples), desc=what, leave=False, disable=None) as bar:
        for some in _grouped(examples):
            for losses in token_losses(model, some):
                sums.append(losses.double().sum().item())
                counts.append(len(losses))
            bar.update(len(some))
    return np.array(sums), np.array(counts)


def _grouped(examples: Iterable[Example]) -> Iterator[list[Example]]:
    group: list[Example] = []
    for example in examples:
        if group and sum(len(e.input_ids) for e in group) + len(example.input_ids) > TOKENS_AT_ONCE:
            yield group
            group = []
        group.append(example)
    if group:
        yield group


def text_ids(path: Path, text: str, tokenizer: Tokenizer, limit: int | None) -> tuple[list[int], list[int]]:
    """Return the token that begins every text, or none, and the first `limit` tokens of a text.

    Raises ValueError, naming the file, if nothing can be predicted in it.
    """
    ids = tokenizer.encode(text)[:limit]
    first = [token for token in tokenizer.begin("")[:1] if token == tokenizer.bos_id]
    if len(ids) + len(first) < 2:
        raise ValueError(f"{path}: too short a text to take a perplexity of")
    return first, ids


def windows(ids: list[int], first: list[int], length: int, stride: int) -> list[Example]:
    """Return a text as windows of at most `length` tokens, in which each token counts once.

    The first window counts as a whole, each later one its last `stride` tokens; what stands before them is
    context. first: the token that begins every text, or none; then the very first token is not predicted.
    """
    found = []
    counted = 0 if first else 1
    end = min(length - len(first), len(ids))
    while True:
        start = max(end - (length - len(first)), 0)
        context = counted - start
        found.append(Example(first + ids[start:end], [IGNORE] * (len(first) + context) + ids[counted:end]))
        if end == len(ids):
            return found
        counted, end = end, min(end + stride, len(ids))


def measure_text(contender: Contender, path: Path, text: str, config: Config) -> dict[str, Figure]:
    """Return the perplexity of a text and its bits per byte."""
    assert config.stride and config.max_seq_length  # by __post_init__
    tokenizer = contender.tokenizer
    first, ids = text_ids(path, text, tokenizer, config.text_tokens)
    longest = contender.model.arch.max_positions
    if min(config.max_seq_length, len(ids)) > longest:
        raise ValueError(
            f"--max_seq_length {config.max_seq_length}: the model was trained on {longest} tokens at most"
        )
    examples = windows(ids, first, config.max_seq_length, config.stride)
    sums, counts = summed_losses(contender.model, examples, path.name)
    counted = ids if first else ids[1:]
    n_bytes = len(tokenizer.decode(counted, skip_special_tokens=False).encode())
    # nats a token -> bits a byte
    scale = len(counted) / n_bytes / np.log(2)
    return {
        "perplexity": Loss(sums, counts, "windows", exponentiated=True),
        "bits per byte": Loss(sums, counts, "windows", scale=scale),
    }


def measure_dataset(contender: Contender, path: Path, config: Config) -> dict[str, Figure]:
    """Return the loss per supervised token of a file of examples."""
    assert config.max_seq_length  # by __post_init__
    examples, _ = tokenize([path], contender.tokenizer, config.max_seq_length, config.data_cache)
    count = min(len(examples), config.max_samples or len(examples))
    sums, counts = summed_losses(contender.model, [examples[i] for i in range(count)], path.name)
    return {"loss per answer token": Loss(sums, counts, "examples")}


# ---- questions ---------------------------------------------------------------------------------------------

# As people write them: $1,234.50 and -7, but not the difference 10-7.
NUMBER = r"(?<![\d.])-?\$?-?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?"


def number_after_hashes(answer: str) -> Decimal | None:
    """Return the number behind the first #### of an answer, as GSM8K's own grader does."""
    found = re.search(rf"####\s*({NUMBER})", answer)
    return _as_number(found[1]) if found else None


def last_number(answer: str) -> Decimal | None:
    """Return the last number of an answer."""
    found = re.findall(NUMBER, answer)
    return _as_number(found[-1]) if found else None


def _as_number(text: str) -> Decimal:
    # Compares equal however it is written: 1,200 and $1200.00.
    return Decimal(re.sub(r"[$,]", "", text))


def whole_answer(answer: str) -> str:
    """Return an answer on one line."""
    return " ".join(answer.split())


def number_wanted(answer: str) -> Decimal | None:
    """Return the number that an answer in the file comes to."""
    after = number_after_hashes(answer)
    return last_number(answer) if after is None else after


# What is taken of a given answer and of the one in the file, and what it is called.
EXTRACTIONS: dict[str, tuple[Callable[[str], Any], Callable[[str], Any], str]] = {
    "gsm8k": (number_after_hashes, number_after_hashes, "exact match of #### N"),
    "last_number": (last_number, number_wanted, "exact match of the last number"),
    "exact": (whole_answer, whole_answer, "exact match"),
}


@dataclass
class Question:
    """A question and what is right."""

    line: int
    asked: list[Message]
    answer: str
    given: dict[str, str] = field(default_factory=dict)  # by contender


def read_questions(path: Path, config: Config) -> tuple[list[Question], list[str]]:
    """Return the questions of a file, and how answers are to be extracted.

    Raises ValueError, naming the line, for a row that is none, and an answer that nothing can be taken of.
    """
    questions = []
    for line, row in read_rows(path):
        try:
            messages = to_messages(row)
        except ValueError as error:
            raise ValueError(f"{path}: line {line}: {error}") from None
        last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
        questions.append(Question(line, messages[:last], messages[last]["content"]))
    names: list[str] = [config.extract]
    if config.extract == "auto":
        has_hashes = all(number_after_hashes(question.answer) is not None for question in questions)
        names = ["gsm8k", "last_number"] if has_hashes else ["exact"]
    for name in names:
        for question in questions:
            if EXTRACTIONS[name][1](question.answer) is None:
                raise ValueError(
                    f"{path}: line {question.line}: --extract {name} finds no number in the answer "
                    f"{question.answer[:60]!r}; use --extract exact"
                )
    shown, asked = questions[: config.few_shot], questions[config.few_shot :][: config.max_samples]
    if not asked:
        raise ValueError(f"{path}: no question is left after --few_shot {config.few_shot}")
    turns = [turn for q in shown for turn in [*q.asked, {"role": "assistant", "content": q.answer}]]
    for question in asked:
        question.asked = turns + question.asked
    return asked, names


def measure_questions(
    contender: Contender, path: Path, questions: list[Question], extractions: list[str], config: Config
) -> dict[str, Figure]:
    """Return the share of a file's questions that are answered rightly; the answers go into the questions."""
    model, tokenizer = contender.model, contender.tokenizer
    prompts = []
    for question in questions:
        if len(question.asked) > 1 and tokenizer.chat_template is None:
            raise ValueError("--few_shot needs a chat template, and the tokenizer has none")
        prompts.append(encode_prompt(question.asked, tokenizer))
        if len(prompts[-1]) + config.max_new_tokens > model.arch.max_positions:
            raise ValueError(
                f"{path}: line {question.line}: the question takes {len(prompts[-1])} tokens, which "
                f"leaves less than --max_new_tokens of the model's {model.arch.max_positions}"
            )
    # Those of one length together: less padding.
    order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
    with tqdm(total=len(order), desc=path.name, leave=False, disable=None) as bar:
        for start in range(0, len(order), config.batch_size):
            some = order[start : start + config.batch_size]
            answers = generate_batch(
                model,
                [prompts[place] for place in some],
                max_new_tokens=config.max_new_tokens,
                eos_ids=tokenizer.eos_ids,
            )
            for place, ids in zip(some, answers, strict=True):
                questions[place].given[contender.name] = tokenizer.decode(ids)
            bar.update(len(some))
    figures: dict[str, Figure] = {}
    for extraction in extractions:
        of_given, of_wanted, title = EXTRACTIONS[extraction]
        hits = [
            of_given(question.given[contender.name]) == of_wanted(question.answer) for question in questions
        ]
        figures[title] = Share(np.array(hits))
    return figures


# ---- choices -----------------------------------------------------------------------------------------------


@dataclass
class Choice:
    """A question, what can be chosen, and the place of what is right."""

    question: str
    choices: list[str]
    right: int


def read_choices(path: Path, config: Config) -> list[Choice]:
    """Return the questions of a file. Raises ValueError, naming the line, for a row that is none."""
    found = []
    for line, row in read_rows(path):
        question, choices, answer = row.get("question"), row.get("choices"), row.get("answer")
        wrong = None
        if not isinstance(question, str) or not question:
            wrong = f"'question' must be text, and not empty, got {question!r}"
        elif not isinstance(choices, list) or len(choices) < 2 or not all(map(_is_choice, choices)):
            wrong = f"'choices' must be a list of at least two texts, got {choices!r}"
        elif type(answer) is int and 0 <= answer < len(choices):
            found.append(Choice(question, choices, answer))
        elif isinstance(answer, str) and answer in choices:
            found.append(Choice(question, choices, choices.index(answer)))
        else:
            wrong = f"'answer' must be a place in choices, counted from 0, or one of them, got {answer!r}"
        if wrong:
            raise ValueError(f"{path}: line {line}: {wrong}")
    return found[: config.max_samples]


def _is_choice(choice: Any) -> bool:
    return isinstance(choice, str) and bool(choice.strip())


def choice_examples(choice: Choice, tokenizer: Tokenizer) -> list[Example]:
    """Return each choice behind the question, as the assistant's answer, or as text that goes on."""
    prompt = encode_prompt([{"role": "user", "content": choice.question}], tokenizer)
    apart = tokenizer.chat_template is None and not choice.question[-1].isspace()
    examples = []
    for text in choice.choices:
        text = f" {text}" if apart and not text[0].isspace() else text
        ids = tokenizer.encode(text, continues=True)
        examples.append(Example(prompt + ids, [IGNORE] * len(prompt) + ids))
    return examples


def measure_choices(contender: Contender, path: Path, choices: list[Choice]) -> dict[str, Figure]:
    """Return how often the right choice is the likeliest: by all of it, and by its mean token."""
    examples = [example for choice in choices for example in choice_examples(choice, contender.tokenizer)]
    sums, counts = summed_losses(contender.model, examples, path.name)
    hits: tuple[list[bool], list[bool]] = ([], [])
    place = 0
    for choice in choices:
        some = slice(place, place + len(choice.choices))
        for kind, losses in zip(hits, (sums[some], sums[some] / counts[some]), strict=True):
            kind.append(int(losses.argmin()) == choice.right)
        place = some.stop
    return {
        "likeliest choice": Share(np.array(hits[0])),
        "likeliest choice, per token": Share(np.array(hits[1])),
    }


# ---- measuring ---------------------------------------------------------------------------------------------

Measure = Callable[[Contender], dict[str, Figure]]


def prepare(config: Config) -> tuple[list[tuple[Path, Measure]], dict[Path, list[Question]]]:
    """Return what is to be measured, with its file, and the questions of the files that have some.

    All files are read here, so that what is wrong in one shows before a model is loaded.
    """
    measures: list[tuple[Path, Measure]] = []
    asked: dict[Path, list[Question]] = {}
    for path in config.text or []:
        measures.append((path, partial(measure_text, path=path, text=read_text(path), config=config)))
    for path in config.dataset or []:
        if not path.exists():
            raise ValueError(f"{path}: no such file")
        measures.append((path, partial(measure_dataset, path=path, config=config)))
    for path in config.questions or []:
        asked[path], extractions = read_questions(path, config)
        how = dict(path=path, questions=asked[path], extractions=extractions, config=config)
        measures.append((path, partial(measure_questions, **how)))  # type: ignore[arg-type]
    for path in config.choices or []:
        measures.append((path, partial(measure_choices, path=path, choices=read_choices(path, config))))
    return measures, asked


def read_text(path: Path) -> str:
    """Return the text of a file; ValueError, naming it, if it is none."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from None


@dataclass
class Row:
    """A figure of a file, by contender."""

    path: Path
    title: str
    figures: dict[str, Figure] = field(default_factory=dict)


def measure_all(config: Config, measures: list[tuple[Path, Measure]]) -> list[Row]:
    """Load the contenders, one model at a time, and measure each."""
    rows: dict[tuple[int, str], Row] = {}

    def take(contender: Contender) -> None:
        for place, (path, measure) in enumerate(measures):
            for title, figure in measure(contender).items():
                row = rows.setdefault((place, title), Row(path, title))
                row.figures[contender.name] = figure

    if config.model is not None:
        speaker = Speaker(config)
        for name in (None, *speaker.names):
            speaker.switch(name)
            with speaker.speaking():
                take(Contender(name or "base", speaker.model, speaker.tokenizer))
        del speaker
        gc.collect()  # or its blocks, which refer to each other, would stay beside the next model
    if config.merged is not None:
        folder, device = find_model(config.merged), choose_device(config.device)
        dtype = getattr(torch, config.dtype) if config.dtype else default_dtype(device)
        model = load_model(folder, quant_type=None, device=device, dtype=dtype).eval()
        take(Contender("merged", model, Tokenizer(folder)))
    return list(rows.values())


# ---- the table ---------------------------------------------------------------------------------------------


def comparable(row: Row) -> dict[str, tuple[float, Interval]]:
    """Return what each contender differs by from the base, where both were measured on the same items."""
    base = row.figures.get("base")
    return {
        name: figure.difference(base)  # type: ignore[arg-type] # a row has one kind of figure
        for name, figure in row.figures.items()
        if base is not None and figure is not base and len(figure) == len(base)
    }


def as_document(config: Config, rows: list[Row], asked: dict[Path, list[Question]]) -> dict[str, Any]:
    """Return the results as they are written to --output."""

    def numbers(value: float, interval: Interval) -> dict[str, float | None]:
        low, high = interval or (None, None)
        return {"value": value, "low": low, "high": high}

    options = ("bits", "quant_type", "max_seq_length", "stride", "text_tokens", "max_samples", "few_shot")
    return {
        "model": (config.model or config.merged or Path()).name,
        "options": {name: getattr(config, name) for name in (*options, "max_new_tokens", "dtype")},
        "confidence": CONFIDENCE,
        "results": [
            {
                "file": row.path.name,
                "measure": row.title,
                "items": len(next(iter(row.figures.values()))),
                "item": next(iter(row.figures.values())).items,
                "contenders": {name: numbers(f.value, f.interval()) for name, f in row.figures.items()},
                "against_base": {name: numbers(*found) for name, found in comparable(row).items()},
            }
            for row in rows
        ],
        "answers": [
            {"file": path.name, "line": question.line, "expected": question.answer, "given": question.given}
            for path, questions in asked.items()
            for question in questions
        ],
    }


def print_table(document: dict[str, Any]) -> None:
    """Print the results for people."""
    print(f"{'':12}{'':>11}  {'95 % interval':20}{'against base':>12}  95 % interval")
    for row in document["results"]:
        percent = row["item"] == "questions"
        items = row["item"] if row["items"] != 1 else row["item"].removesuffix("s")
        print(f"{row['measure']}, {row['file']}: {row['items']:,} {items}")
        for name, found in row["contenders"].items():
            line = f"  {name:10}{_number(found['value'], percent):>11}  {_interval(found, percent):20}"
            if name in row["against_base"]:
                apart = row["against_base"][name]
                line += f"{_number(apart['value'], percent, '+'):>12}  {_interval(apart, percent, '+'):20}"
            print(line.rstrip())


def _number(value: float, percent: bool, sign: str = "") -> str:
    return f"{100 * value:{sign}.1f} %" if percent else f"{value:{sign}.4g}"


def _interval(found: dict[str, Any], percent: bool, sign: str = "") -> str:
    if found["low"] is None:
        return "-"
    return " to ".join(_number(found[end], percent, sign) for end in ("low", "high")).replace(" % to", " to")


def main() -> None:
    """Measure, print, write."""
    config = parse(Config, description=__doc__.split("\n\n")[0] if __doc__ else None)
    with user_errors():
        measures, asked = prepare(config)
        document = as_document(config, measure_all(config, measures), asked)
        print_table(document)
        if config.output is not None:
            write_atomically(config.output, as_json(document))
            print(f"saved     {config.output}")


if __name__ == "__main__":
    main()
