"""Losses and likelihoods are transformers', intervals hold the truth as often as they say, and base, adapter
and merged model are each measured as itself."""

import json
import shutil
import sys
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from conftest import begin_texts, write_llama, write_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

import evaluate
import finetune
import merge
from evaluate import EXTRACTIONS, Loss, Share, windows
from minqlora import add_lora, generate, load_adapter, load_model, save_adapter
from minqlora.batch import Part, tokenize
from minqlora.data import IGNORE, encode_prompt
from minqlora.lora import lora_layers
from minqlora.model import CausalLM
from minqlora.tokenizer import Tokenizer

TEXT = "The sea is wide. Le café est fermé; 中文 too.\n" * 9


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Tokenizer:
    return Tokenizer(tiny_model)


@pytest.fixture(scope="module")
def tiny(tiny_model: Path) -> CausalLM:
    return load_model(tiny_model, quant_type=None, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def theirs(tiny_model: Path) -> Any:
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def run_folder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of finetune.py, as far as evaluate.py looks, on a base that is not quantized."""
    folder = tmp_path_factory.mktemp("runs") / "tiny-1"
    model = load_model(tiny_model, quant_type=None)
    torch.manual_seed(0)
    add_lora(model, r=4)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.2)
    save_adapter(model, folder)
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": str(tiny_model), "bits": 16}))
    return folder


@pytest.fixture
def measure(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., dict[str, Any]]:
    """A function that runs the script in float32 on the unquantized tiny model, or what is given, and returns
    what it writes."""

    def measure(*flags: str, of: tuple[str, ...] = ("--bits", "16")) -> dict[str, Any]:
        model = () if of[0].startswith("--") and of[0] != "--bits" else ("--model", str(tiny_model))
        given = [*model, *of, "--dtype", "float32", *flags, "--output", str(tmp_path / "found.json")]
        monkeypatch.setattr(sys, "argv", ["evaluate.py", "--data_cache", str(tmp_path / "cache"), *given])
        evaluate.main()
        return json.loads((tmp_path / "found.json").read_text())

    return measure


def value(document: dict[str, Any], title: str, contender: str = "base") -> float:
    [row] = [row for row in document["results"] if row["measure"] == title]
    return row["contenders"][contender]["value"]


def write(path: Path, content: str | list[dict[str, Any]]) -> Path:
    text = content if isinstance(content, str) else "".join(json.dumps(row) + "\n" for row in content)
    path.write_text(text, encoding="utf-8")
    return path


# -- text --------------------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(n=st.integers(2, 60), length=st.integers(3, 20), stride=st.integers(1, 19), begins=st.booleans())
def test_each_token_counts_once_with_as_much_context_as_the_stride_leaves(
    n: int, length: int, stride: int, begins: bool
) -> None:
    stride = min(stride, length - 1)
    first = [99] if begins else []
    found = windows(list(range(n)), first, length, stride)
    counted = [label for example in found for label in example.labels if label != IGNORE]
    assert counted == list(range(0 if begins else 1, n))
    for number, (ids, labels) in enumerate(found):
        assert len(ids) == len(labels) <= length and ids[: len(first)] == first
        assert labels[0] == IGNORE  # nothing stands before it
        if number:
            assert len(ids) == length and sum(label != IGNORE for label in labels) <= stride
        for token, label in zip(ids, labels, strict=True):
            assert label in (IGNORE, token)


@pytest.mark.parametrize(("length", "stride"), [(64, 32), (64, 63), (50, 7), (500, 250)])
def test_perplexity_is_that_of_transformers(
    measure: Callable[..., dict[str, Any]],
    theirs: Any,
    tokenizer: Tokenizer,
    tmp_path: Path,
    length: int,
    stride: int,
) -> None:
    path = write(tmp_path / "text.txt", TEXT)
    document = measure("--text", str(path), "--max_seq_length", str(length), "--stride", str(stride))
    # As transformers' documentation has it: a window slides, what it has counted before is masked.
    ids = torch.tensor([tokenizer.encode(TEXT)])
    total, counted, before = 0.0, 0, 1
    for end in [*range(length, ids.shape[1], stride), ids.shape[1]]:
        window = ids[:, max(end - length, 0) : end]
        labels = window.clone()
        labels[:, : -(end - before)] = -100
        with torch.no_grad():
            loss = theirs(window, labels=labels).loss
        total, counted, before = total + loss.item() * (end - before), counted + end - before, end
    assert counted == ids.shape[1] - 1
    assert value(document, "perplexity") == pytest.approx(np.exp(total / counted), rel=1e-4)
    n_bytes = len(TEXT.encode()) - 1  # the first token, a T, is not predicted
    assert value(document, "bits per byte") == pytest.approx(total / np.log(2) / n_bytes, rel=1e-4)
    low, high = (document["results"][0]["contenders"]["base"][end] for end in ("low", "high"))
    if length < 500:
        assert low < value(document, "perplexity") < high
    else:
        assert low is high is None  # a single window says nothing of how much it could have been


def test_a_beginning_of_text_token_stands_before_each_window_and_all_tokens_count(
    tmp_path: Path, measure: Callable[..., dict[str, Any]], theirs: Any, tiny_model: Path
) -> None:
    folder = tmp_path / "begins"
    shutil.copytree(tiny_model, folder)
    begin_texts(folder)
    text = write(tmp_path / "text.txt", TEXT[:50])
    document = measure("--text", str(text), of=("--model", str(folder), "--bits", "16"))
    ids = torch.tensor([[1, *Tokenizer(folder).encode(TEXT[:50])]])
    with torch.no_grad():
        loss = theirs(ids, labels=ids).loss.item()
    assert value(document, "perplexity") == pytest.approx(np.exp(loss), rel=1e-4)


def test_only_so_much_of_a_text_is_measured(
    measure: Callable[..., dict[str, Any]], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    beginning = "The sea is wide."
    count = len(tokenizer.encode(beginning))
    whole = measure("--text", str(write(tmp_path / "a.txt", beginning)))
    part = measure("--text", str(write(tmp_path / "b.txt", "\ufeff" + TEXT)), "--text_tokens", str(count))
    assert value(whole, "perplexity") == value(part, "perplexity")
    assert part["results"][0]["file"] == "b.txt" and part["options"]["text_tokens"] == count


# -- examples ----------------------------------------------------------------------------------------------

PAIRS = [{"prompt": f"What is {n}?", "completion": "x" * n} for n in range(1, 30)]


def test_the_loss_of_a_dataset_is_that_of_training(
    measure: Callable[..., dict[str, Any]], tiny: CausalLM, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    path = write(tmp_path / "pairs.jsonl", PAIRS)
    examples, _ = tokenize([path], tokenizer, 512, tmp_path / "cache")
    expected = finetune.evaluate(tiny, Part.whole(examples), len(examples), 4)
    document = measure("--dataset", str(path), "--max_seq_length", "512")
    tiny.eval()
    assert value(document, "loss per answer token") == pytest.approx(expected, rel=1e-5)
    assert document["results"][0]["items"] == 29
    assert measure("--dataset", str(path), "--max_samples", "3")["results"][0]["items"] == 3


# -- choices -----------------------------------------------------------------------------------------------

QUESTIONS = [
    {"question": f"Which is {n}?", "choices": ["one", " two things", "x" * (1 + n % 5), "é"], "answer": n % 4}
    for n in range(16)
]


def test_the_likeliest_choice_is_that_of_transformers(
    measure: Callable[..., dict[str, Any]], theirs: Any, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    raw, mean = [], []
    for row in QUESTIONS:
        prompt = encode_prompt([{"role": "user", "content": row["question"]}], tokenizer)
        likelihoods = []
        for choice in row["choices"]:
            ids = tokenizer.encode(choice)
            with torch.no_grad():
                logits = theirs(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
            likelihoods.append(logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None]).sum().item())
        per_token = np.array(likelihoods) / [len(tokenizer.encode(choice)) for choice in row["choices"]]
        raw.append(int(np.argmax(likelihoods)) == row["answer"])
        mean.append(int(np.argmax(per_token)) == row["answer"])
    document = measure("--choices", str(write(tmp_path / "c.jsonl", QUESTIONS)))
    assert 0 < np.mean(raw) < 1 and raw != mean
    assert value(document, "likeliest choice") == np.mean(raw)
    assert value(document, "likeliest choice, per token") == np.mean(mean)


def test_the_likelihoods_are_those_of_transformers(tiny: CausalLM, theirs: Any, tokenizer: Tokenizer) -> None:
    choices = [
        evaluate.Choice(**{k: row[k] for k in ("question", "choices")}, right=0) for row in QUESTIONS[:3]
    ]
    examples = [example for choice in choices for example in evaluate.choice_examples(choice, tokenizer)]
    for example, losses in zip(examples, evaluate.token_losses(tiny, examples), strict=True):
        ids, labels = torch.tensor([example.input_ids]), torch.tensor(example.labels)
        with torch.no_grad():
            expected = F.cross_entropy(theirs(ids).logits[0, :-1], labels[1:], reduction="none")
        torch.testing.assert_close(losses, expected[labels[1:] != IGNORE], rtol=1e-4, atol=1e-4)


def test_the_right_choice_may_be_told_by_its_text(measure: Callable[..., Any], tmp_path: Path) -> None:
    named = [row | {"answer": row["choices"][row["answer"]]} for row in QUESTIONS]
    by_place = measure("--choices", str(write(tmp_path / "a.jsonl", QUESTIONS)))
    by_text = measure("--choices", str(write(tmp_path / "b.jsonl", named)))
    assert value(by_place, "likeliest choice") == value(by_text, "likeliest choice")


def test_without_a_template_a_choice_is_a_word_apart(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, chat_template=None)
    write_llama(tmp_path)
    tokenizer = Tokenizer(tmp_path)
    for question, choice, text in [("A:", "b", "A: b"), ("A: ", "b", "A: b"), ("A:", " b", "A: b")]:
        [example, _] = evaluate.choice_examples(evaluate.Choice(question, [choice, "c"], 0), tokenizer)
        assert tokenizer.decode(example.input_ids) == text
        assert all(label == IGNORE for label in example.labels[: len(tokenizer.encode(question))])


# -- questions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "after", "last"),
    [
        ("48/2 = <<48/2=24>>24\n#### 72", 72, 72),
        ("#### 1,234.50 dollars", 1234.5, 1234.5),
        ("#### $10\n#### 11", 10, 11),
        ("####-7", -7, -7),
        ("#### $-7.0", -7, -7),
        ("It is 18.", None, 18),
        ("10-7", None, 7),
        ("They have 3 boxes, 1,000 each: $3,000.00!", None, 3000),
        ("1,2345", None, 2345),
        ("none", None, None),
        ("#### many, 5", None, 5),
    ],
)
def test_a_number_is_found_however_it_is_written(text: str, after: float | None, last: float | None) -> None:
    assert evaluate.number_after_hashes(text) == (None if after is None else Decimal(str(after)))
    assert evaluate.last_number(text) == (None if last is None else Decimal(str(last)))


def test_a_whole_answer_is_compared_but_for_white_space() -> None:
    of_given, of_wanted, _ = EXTRACTIONS["exact"]
    assert of_given(" a\n b ") == of_wanted("a b") != of_wanted("A b")


def asked_for(tiny: CausalLM, tokenizer: Tokenizer, messages: list[dict[str, str]]) -> str:
    prompt = encode_prompt(messages, tokenizer)
    return tokenizer.decode(list(generate(tiny, prompt, max_new_tokens=6, eos_ids=tokenizer.eos_ids)))


def test_questions_are_answered_as_each_alone_and_compared(
    measure: Callable[..., dict[str, Any]], tiny: CausalLM, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    asked = [f"Q{n}" * (n + 1) for n in range(5)]
    answers = [asked_for(tiny, tokenizer, [{"role": "user", "content": text}]) for text in asked]
    rows = [
        {"question": text, "answer": answer if n % 2 else answer + "!"}
        for n, (text, answer) in enumerate(zip(asked, answers, strict=True))
    ]
    path = write(tmp_path / "q.jsonl", rows)
    document = measure("--questions", str(path), "--max_new_tokens", "6", "--batch_size", "2")
    assert [row["given"]["base"] for row in document["answers"]] == answers
    assert [row["line"] for row in document["answers"]] == [1, 2, 3, 4, 5]
    assert value(document, "exact match") == 2 / 5


def test_the_numbers_of_gsm8k_are_recognised_and_counted_both_ways(
    measure: Callable[..., dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    tokenizer: Tokenizer,
) -> None:
    said = iter([["so\n#### 1,000", "it is 7.00"], ["#### 8", "none"]])
    monkeypatch.setattr(
        evaluate,
        "generate_batch",
        lambda model, prompts, **_: [tokenizer.encode(text) for text in next(said)],
    )
    rows = [
        {"question": "?" * n, "answer": f"...\n#### {right}"} for n, right in enumerate([1000, 7, 9, 3], 1)
    ]
    document = measure("--questions", str(write(tmp_path / "q.jsonl", rows)), "--batch_size", "2")
    assert value(document, "exact match of #### N") == 1 / 4
    assert value(document, "exact match of the last number") == 2 / 4


def test_few_shots_are_earlier_turns_and_are_not_counted(
    measure: Callable[..., dict[str, Any]], tiny: CausalLM, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    rows = [{"question": f"Q{n}", "answer": f"A{n}"} for n in range(4)]
    flags = ["--questions", str(write(tmp_path / "q.jsonl", rows)), "--max_new_tokens", "6"]
    document = measure(*flags, "--few_shot", "2", "--max_samples", "1")
    turns = [(role, f"{letter}{n}") for n in range(2) for role, letter in (("user", "Q"), ("assistant", "A"))]
    messages = [{"role": role, "content": text} for role, text in [*turns, ("user", "Q2")]]
    assert [row["given"]["base"] for row in document["answers"]] == [asked_for(tiny, tokenizer, messages)]


# -- contenders --------------------------------------------------------------------------------------------


def test_base_adapter_and_merged_are_measured_each_as_itself(
    measure: Callable[..., dict[str, Any]],
    run_folder: Path,
    tiny: CausalLM,
    tiny_model: Path,
    tokenizer: Tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    merged = tmp_path / "merged"
    flags = ["--adapter", str(run_folder), "--output_dir", str(merged), "--dtype", "float32"]
    monkeypatch.setattr(sys, "argv", ["merge.py", *flags])
    merge.main()
    path = write(tmp_path / "pairs.jsonl", PAIRS)
    both = measure("--dataset", str(path), of=("--adapter", str(run_folder), "--merged", str(merged)))
    tuned = load_model(tiny_model, quant_type=None, dtype=torch.float32)
    load_adapter(tuned, run_folder)
    examples, _ = tokenize([path], tokenizer, 1024, tmp_path / "cache")
    expected = [finetune.evaluate(model, Part.whole(examples), 29, 4) for model in (tiny, tuned)]
    tiny.eval()
    found = [value(both, "loss per answer token", name) for name in ("base", "tiny-1", "merged")]
    assert found == pytest.approx([*expected, expected[1]], rel=1e-5) and abs(found[0] - found[1]) > 0.01
    [row] = both["results"]
    assert row["against_base"].keys() == {"tiny-1", "merged"}
    apart = row["against_base"]["tiny-1"]
    assert (
        apart["value"] == pytest.approx(found[1] - found[0]) and apart["low"] < apart["value"] < apart["high"]
    )
    out = capsys.readouterr().out
    assert f"loss per answer token, {path.name}: 29 examples" in out
    assert all(f"  {name} " in out for name in ("base", "tiny-1", "merged"))
    alone = measure("--dataset", str(path), of=("--merged", str(merged)))
    assert value(alone, "loss per answer token", "merged") == found[2]


# -- intervals ---------------------------------------------------------------------------------------------


def test_a_shares_interval_is_wilsons() -> None:
    hits = np.arange(50) < 3
    z, n, p = 1.959963984540054, 50, 3 / 50
    middle, reach = p + z * z / (2 * n), z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = Share(hits).interval()  # type: ignore[misc]
    assert (low, high) == pytest.approx(
        ((middle - reach) / (1 + z * z / n), (middle + reach) / (1 + z * z / n))
    )
    low, high = Share(np.zeros(20, dtype=bool)).interval()  # type: ignore[misc]
    assert low == 0 and 0.1 < high < 0.2  # none of twenty does not mean never


def coverage(
    of_one: Callable[[np.random.Generator], tuple[float, float]], truth: float, n: int = 400
) -> float:
    random = np.random.default_rng(0)
    intervals = [of_one(random) for _ in range(n)]
    return float(np.mean([low <= truth <= high for low, high in intervals]))


def test_the_interval_of_a_paired_difference_holds_the_truth_as_often_as_it_says() -> None:
    def one(random: np.random.Generator) -> tuple[float, float]:
        ability = random.random(60)  # of questions: both contenders are better at easy ones
        base, tuned = ability > 0.8, ability + 0.1 * random.standard_normal(60) > 0.6
        return Share(tuned).difference(Share(base))[1]  # type: ignore[return-value]

    random = np.random.default_rng(1)
    ability, noise = random.random(10**6), 0.1 * random.standard_normal(10**6)
    truth = float((ability + noise > 0.6).mean() - (ability > 0.8).mean())
    # 0.95, less three standard deviations of 400 draws
    assert coverage(one, truth) > 0.95 - 3 * (0.95 * 0.05 / 400) ** 0.5
    same = Share(np.arange(30) < 9)
    apart, (low, high) = same.difference(same)  # type: ignore[misc]
    assert apart == 0 and low < 0 < high  # equal on thirty questions does not mean equal


def test_the_interval_of_a_loss_holds_the_truth_as_often_as_it_says() -> None:
    def one(random: np.random.Generator) -> tuple[float, float]:
        counts = random.integers(20, 60, 40)
        sums = counts * (2 + 0.5 * random.standard_normal(40))
        return Loss(sums, counts, "windows", exponentiated=True).interval()  # type: ignore[return-value]

    # A bootstrap of 40 is known to be a little narrow.
    assert 0.9 <= coverage(one, float(np.exp(2)), n=200) <= 0.99


def test_a_paired_difference_is_known_better_than_either() -> None:
    random = np.random.default_rng(0)
    counts = random.integers(20, 60, 50)
    means = 2 + random.standard_normal(50)
    base = Loss(counts * means, counts, "windows")
    tuned = Loss(counts * (means - 0.1 + 0.01 * random.standard_normal(50)), counts, "windows")
    apart, (low, high) = tuned.difference(base)  # type: ignore[misc]
    assert -0.11 < low < apart < high < -0.09
    assert base.interval()[1] - base.interval()[0] > 0.3  # type: ignore[index]


# -- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "nothing to measure: give --text, --dataset, --questions or --choices"),
        (["--text", "nowhere.txt"], "nowhere.txt: no such file"),
        (["--dataset", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["--questions", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["--choices", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (
            ["--text", "x", "--stride", "8", "--max_seq_length", "8"],
            "--stride 8 must be below --max_seq_length 8",
        ),
        (["--text", "x", "--stride", "0"], "--stride must be at least 1, got 0"),
        (["--text", "x", "--few_shot", "-1"], "--few_shot must be at least 0, got -1"),
        (["--text", "x", "--output", "nowhere/x.json"], "--output nowhere/x.json: there is no such folder"),
        (["--text", "x", "--extract", "number"], "expected one of auto, gsm8k, last_number, exact"),
        (["--text", "x", "--adapter", "base=x"], "the name 'base' is taken"),
    ],
    ids=str,
)
def test_a_wrong_option_is_one_line_and_code_2(
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    message: str,
) -> None:
    assert message in error_of(monkeypatch, capsys, "--model", str(tiny_model), *flags)


def error_of(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    """The one line of an exit with code 2."""
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--dtype", "float32", *flags])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        evaluate.main()
    out, err = capsys.readouterr()
    assert (stop.value.code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1
    return err


CHOICE = {"question": "?", "choices": ["a", "b"], "answer": 0}


@pytest.mark.parametrize(
    ("option", "content", "message"),
    [
        ("text", "", "too short a text"),
        ("text", b"caf\xe9", "x.jsonl: not UTF-8 (unexpected end of data at byte 3)"),
        ("dataset", "{}", "x.jsonl"),
        ("questions", "", "x.jsonl: is empty"),
        ("questions", "{", "x.jsonl: line 1: not valid JSON"),
        ("questions", "\n[]", "x.jsonl: line 2: expected a JSON object, got list"),
        ("questions", '{"question": "?"}', "x.jsonl: line 1: 'answer' is missing"),
        ("questions", '{"question": "?" , "answer": "no", "x": 1}', "--extract last_number finds no number"),
        (
            "questions",
            '{"question": "%s", "answer": "1"}' % ("a" * 400),
            "x.jsonl: line 1: the question takes 4",
        ),
        ("choices", json.dumps(CHOICE | {"question": ""}), "line 1: 'question' must be text, and not empty"),
        (
            "choices",
            json.dumps(CHOICE | {"choices": ["a"]}),
            "line 1: 'choices' must be a list of at least two",
        ),
        ("choices", json.dumps(CHOICE | {"choices": ["a", ""]}), "'choices' must be a list of at least two"),
        ("choices", json.dumps(CHOICE | {"answer": 2}), "line 1: 'answer' must be a place in choices"),
        ("choices", json.dumps(CHOICE | {"answer": True}), "'answer' must be a place in choices"),
        ("choices", json.dumps(CHOICE | {"answer": "c"}), "or one of them, got 'c'"),
    ],
    ids=str,
)
def test_a_file_that_cannot_be_measured_is_one_line_and_code_2(
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    option: str,
    content: str | bytes,
    message: str,
) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    flags = ["--model", str(tiny_model), f"--{option}", str(path), "--data_cache", str(tmp_path / "cache")]
    assert message in error_of(monkeypatch, capsys, *flags, "--extract", "last_number")
    assert not (tmp_path / "found.json").exists()


def test_windows_are_as_long_as_the_model_was_made_for_and_longer_ones_are_refused(
    measure: Callable[..., dict[str, Any]],
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = write(tmp_path / "text.txt", "a b c " * 200)
    options = measure("--text", str(path))["options"]
    assert (options["max_seq_length"], options["stride"]) == (512, 256)
    flags = ["--model", str(tiny_model), "--text", str(path), "--max_seq_length", "1024"]
    error = error_of(monkeypatch, capsys, *flags)
    assert "--max_seq_length 1024: the model was trained on 512 tokens at most" in error


def test_few_shots_that_take_all_and_a_base_without_a_template_are_refused(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "q.jsonl", [{"question": "Q", "answer": "A"}] * 2)
    flags = ["--questions", str(path), "--model"]
    error = error_of(monkeypatch, capsys, *flags, str(tiny_model), "--few_shot", "2")
    assert "no question is left after --few_shot 2" in error
    folder = tmp_path / "plain"
    folder.mkdir()
    size = write_tokenizer(folder, chat_template=None)
    write_llama(folder, vocab_size=size)
    error = error_of(monkeypatch, capsys, *flags, str(folder), "--few_shot", "1")
    assert "--few_shot needs a chat template" in error
