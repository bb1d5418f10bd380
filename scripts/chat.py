"""Talk to a model, with or without adapters.

    python scripts/chat.py --adapter runs/demo-1                      # a conversation; /help lists commands
    python scripts/chat.py --adapter runs/demo-1 --prompt "..."       # one answer, and done
    echo "..." | python scripts/chat.py --adapter runs/demo-1         # likewise
    python scripts/chat.py --adapter runs/demo-1 plain=runs/demo-2    # /adapter plain switches
    python scripts/chat.py --model MODEL_FOLDER --prompts asked.txt --output answered.jsonl

The base model is the one that the adapter was trained on. The answer appears as it is generated; Ctrl-C stops
it. An empty line, Ctrl-D or Ctrl-C at the prompt ends the conversation.

--prompts is a text file of a prompt a line, or JSONL with the key prompt, question, instruction or messages.
Its answers are written as they come, as rows that finetune.py can learn from, each with what it was made
with; a run that was interrupted goes on where it stopped, if model, adapter and sampling are the same.
"""

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from tqdm import tqdm

from finetune import choose_device
from minqlora import generate, generate_batch, load_adapter, load_model, set_adapter
from minqlora.adapter import WEIGHTS_FILE
from minqlora.checkpoint import default_dtype, find_model
from minqlora.codebook import QUANT_TYPES
from minqlora.data import encode_prompt, parse_row
from minqlora.generate import PrefixCache, Sampling
from minqlora.lora import adapters_disabled
from minqlora.model import CausalLM
from minqlora.tokenizer import Message, Tokenizer
from options import option, parse, user_errors

# ---- configuration -----------------------------------------------------------------------------------------

# What says how a base is quantized, and what is so where nobody says it.
QUANTIZATION = {
    "bits": 4,
    "quant_type": "nf4",
    "double_quant": True,
    "block_size": 64,
    "quantize_embeddings": False,
}
RESERVED = ("on", "off", "base", "merged")  # names that mean something else than an adapter


@dataclass
class ModelConfig:
    """What can be set about the model: which it is, and how it is loaded."""

    model: Path | None = option(
        None,
        "folder of the base model, or a name that the local Hugging Face cache has "
        "(default: the one the adapter's run was trained on)",
    )
    adapter: list[str] | None = option(
        None,
        "adapter folders: runs of finetune.py, their checkpoints, or PEFT's; the first is active, each is "
        "known by its folder's name, or as NAME=FOLDER says",
    )
    bits: Literal[4, 16] | None = option(
        None,
        "bits of the frozen linear layers; 16: no quantization (default: as the adapter was trained, else 4)",
    )
    quant_type: str | None = option(
        None,
        "levels of the 4-bit code (default: as the adapter was trained, else nf4)",
        choices=list(QUANT_TYPES),
    )
    double_quant: bool | None = option(
        None, "quantize the scales too (default: as the adapter was trained, else true)"
    )
    block_size: int | None = option(
        None, "weights that share a scale (default: as the adapter was trained, else 64)"
    )
    quantize_embeddings: bool | None = option(
        None, "embeddings and head in 4 bits too (default: as the adapter was trained, else false)"
    )
    cache: Path | None = option(
        None,
        "keep the quantized weights in this folder, and read them from there the next time",
        bare=f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/minqlora",
    )
    dtype: Literal["bfloat16", "float32"] | None = option(
        None, "compute dtype (default: what the hardware does well)"
    )
    device: str | None = option(None, "cpu, cuda, ... (default: an accelerator if there is one)")

    def __post_init__(self) -> None:
        """Find the base model, and how it was quantized in training."""
        if self.model is None and not self.adapter:
            raise ValueError("give --model, or --adapter with a run of finetune.py")
        runs: dict[str, dict[str, Any]] = {}
        if self.model is not None and is_adapter(self.model):
            raise ValueError(f"--model {self.model}: is an adapter; give it as --adapter")
        for name, folder in self.adapters().items():
            if not is_adapter(folder):
                what = "holds no adapter_config.json" if folder.is_dir() else "no such folder"
                raise ValueError(
                    f"--adapter {folder}: {what}; give a run's, as finetune.py prints it at the end"
                )
            runs[name] = {}
            try:
                runs[name] = run_config(folder)
            except ValueError:  # a config.yaml that is not ours matters only if the base is to be found in it
                if self.model is None:
                    raise
        decided = {key for key in ("model", *QUANTIZATION) if getattr(self, key) is not None}
        first = next(iter(runs.values()), {})
        if self.model is None:
            if "model" not in first:
                path = f"{next(iter(self.adapters().values()))}/config.yaml"
                raise ValueError(f"{path}: not found, so the base model is not known; give --model")
            self.model = Path(first["model"])
        # An adapter corrects the rounding of the base that it was trained on: another base is another model.
        fill_as_trained(self, first)
        for name, run in runs.items():
            for key in run.keys() & {"model", *QUANTIZATION} - decided:
                if str(run[key]) != str(getattr(self, key)):
                    raise ValueError(
                        f"--adapter {name}: was trained with {key} = {run[key]}, and {next(iter(runs))} with "
                        f"{getattr(self, key)}; give --{key} to put both on one base"
                    )
        if not isinstance(self.block_size, int) or self.block_size < 2 or self.block_size % 2:
            raise ValueError(f"--block_size must be even, got {self.block_size}")

    def adapters(self) -> dict[str, Path]:
        """Return the adapters' folders by name; ValueError for names that cannot be told apart."""
        folders: dict[str, Path] = {}
        for given in self.adapter or []:
            name, equals, folder = given.partition("=")
            if not equals or Path(given).is_dir():
                name, folder = Path(given).expanduser().resolve().name, given
            if not name or not folder or name in RESERVED or name in folders:
                raise ValueError(
                    f"--adapter {given}: the name {name!r} is taken or empty; give another one, as in "
                    f"--adapter mine={folder or 'FOLDER'}"
                )
            folders[name] = Path(folder).expanduser()
        return folders


@dataclass
class Config(ModelConfig):
    """What can be set."""

    prompt: str | None = option(None, "answer this and stop; without it, a conversation")
    prompts: Path | None = option(None, "answer what this file asks, and stop; needs --output")
    output: Path | None = option(None, "JSONL file for the answers to --prompts; what it holds is not redone")
    batch_size: int = option(8, "so many of --prompts are answered at once")
    system: str | None = option(None, "system message (default: the chat template's own, if it has one)")
    max_new_tokens: int = option(256, "longest answer in tokens")
    max_context: int | None = option(
        None, "longest conversation in tokens; older turns are left out (default: the model's own limit)"
    )
    temperature: float = option(0.0, "0: always the likeliest token; 1: the model's own odds")
    top_k: int = option(0, "draw from so many of the likeliest tokens; 0: from all")
    top_p: float = option(1.0, "draw from the likeliest tokens that have this much probability together")
    repetition_penalty: float = option(1.0, "above 1: less of what the conversation has already")
    stop: list[str] | None = option(
        None, r"texts that end an answer and are not shown; \n in them is the end of a line"
    )
    seed: int = option(0, "seed of the drawing")

    def __post_init__(self) -> None:
        """Find the base model, and refuse values that cannot mean anything."""
        for name in ("max_new_tokens", "batch_size", "max_context"):
            value = getattr(self, name)
            if value is not None and value < (2 if name == "max_context" else 1):
                raise ValueError(
                    f"--{name} must be at least {2 if name == 'max_context' else 1}, got {value}"
                )
        try:
            Sampling(**self.sampling())
        except ValueError as error:
            raise ValueError(f"--{error}") from None
        if (self.prompts is None) != (self.output is None):
            raise ValueError("--prompts and --output go together: what to answer, and where to")
        if self.prompts is not None and self.prompt is not None:
            raise ValueError("--prompt and --prompts both say what to answer; give one")
        if self.prompts is not None and self.prompts == self.output:
            raise ValueError(f"--output {self.output}: is what --prompts reads; choose another file")
        self.stop = [text.replace(r"\n", "\n") for text in self.stop or []]
        if "" in self.stop:
            raise ValueError("--stop must not be empty: every answer would end before it begins")
        super().__post_init__()

    def sampling(self) -> dict[str, Any]:
        """Return how tokens are to be chosen, as `generate` is told."""
        return {name: getattr(self, name) for name in Sampling.__dataclass_fields__}


def is_adapter(folder: Path) -> bool:
    """Return whether a folder holds an adapter, and not a model."""
    return (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file()


def run_config(folder: Path) -> dict[str, Any]:
    """Return the configuration of the run that an adapter folder is, or is a checkpoint of.

    Empty if it is none of finetune.py's. Raises ValueError for a config.yaml that is none of its either.
    """
    path = folder / "config.yaml"
    if not path.is_file() and folder.name.startswith("checkpoint-"):
        path = folder.parent / "config.yaml"
    if not path.is_file():
        return {}
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(config, dict) or not isinstance(config.get("model"), str):
        raise ValueError(f"{path}: names no model; give --model")
    return config


def fill_as_trained(config: Any, run: dict[str, Any]) -> None:
    """Give the options that say how the base is quantized, where they are None, the values of a run."""
    for name, default in QUANTIZATION.items():
        if getattr(config, name) is None:
            setattr(config, name, run.get(name, default))


# ---- the model ---------------------------------------------------------------------------------------------


class Speaker:
    """A base model with adapters by name, of which one is active, or none."""

    def __init__(self, config: ModelConfig):
        # ModelConfig.__post_init__ found them.
        assert config.model and config.block_size and config.double_quant is not None
        source, device = find_model(config.model), choose_device(config.device)
        # A run that added tokens has a tokenizer of its own.
        self._tokenizers: dict[str | None, Tokenizer] = {None: Tokenizer(source)}
        for name, folder in config.adapters().items():
            own = (folder / "tokenizer_config.json").is_file()
            self._tokenizers[name] = Tokenizer(folder) if own else self._tokenizers[None]
        self.model: CausalLM = load_model(
            source,
            quant_type=config.quant_type if config.bits == 4 else None,
            double_quant=config.double_quant,
            block_size=config.block_size,
            device=device,
            dtype=getattr(torch, config.dtype) if config.dtype else default_dtype(device),
            quantize_embeddings=bool(config.quantize_embeddings),
            cache=config.cache,
        )
        self.names = list(config.adapters())
        for name, folder in config.adapters().items():
            load_adapter(self.model, folder, name=name, base=source)
        self.model.eval()
        self.active: str | None = None
        self.switch(next(iter(self.names), None))

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of whoever is active."""
        return self._tokenizers[self.active]

    def switch(self, name: str | None) -> None:
        """Make an adapter the active one; None: the base alone."""
        if name is not None:
            set_adapter(self.model, name)
        self.active = name

    def speaking(self) -> contextlib.AbstractContextManager[None]:
        """Return the context in which the model is what is active."""
        return adapters_disabled(self.model) if self.active is None else contextlib.nullcontext()


# ---- an answer, piece by piece -----------------------------------------------------------------------------


def reply(
    model: CausalLM,
    tokenizer: Tokenizer,
    messages: list[Message],
    *,
    stop: Sequence[str] = (),
    **options: Any,
) -> Iterator[str]:
    """Yield the answer to a conversation in pieces of text, as generated.

    stop: as in `pieces`; options: those of `generate`.
    """
    prompt = encode_prompt(messages, tokenizer)
    return pieces(generate(model, prompt, eos_ids=tokenizer.eos_ids, **options), tokenizer, stop)


def pieces(tokens: Iterable[int], tokenizer: Tokenizer, stop: Sequence[str] = ()) -> Iterator[str]:
    """Yield the text of tokens as they come, in whole characters, up to the first of some stop texts.

    What may yet turn out to be the beginning of one is held back until that is known.
    """
    ids: list[int] = []
    shown = 0
    for token in tokens:
        ids.append(token)
        text = tokenizer.decode(ids)
        if text.endswith("\ufffd"):  # a character whose bytes are not all here yet
            continue
        whole = before_stop(text, stop)
        end = len(whole) - (unsure(whole, stop) if whole == text else 0)
        if end > shown:
            yield text[shown:end]
            shown = end
        if whole != text:
            return
    yield before_stop(tokenizer.decode(ids), stop)[shown:]


def before_stop(text: str, stop: Sequence[str]) -> str:
    """Return what stands before the first of some stop texts, all of the text if it holds none."""
    return text[: min([text.index(end) for end in stop if end in text], default=len(text))]


def unsure(text: str, stop: Sequence[str]) -> int:
    """Return how many of the last characters of a text are the beginning of a stop text."""
    beginnings = (end[:n] for end in stop for n in range(1, len(end)))
    return max((len(beginning) for beginning in beginnings if text.endswith(beginning)), default=0)


def fitting(messages: list[Message], tokenizer: Tokenizer, room: int) -> tuple[list[int], int]:
    """Return a conversation's prompt, of at most `room` tokens, and how many messages are left out of it.

    Turns are left out whole, the oldest first; the system message stays. Raises ValueError if the last
    question does not fit by itself, or as `encode_prompt`.
    """
    head = messages[:1] if messages[0]["role"] == "system" else []
    questions = [i for i, message in enumerate(messages) if message["role"] == "user" and i > len(head)]
    for first in [len(head), *questions]:
        prompt = encode_prompt([*head, *messages[first:]], tokenizer)
        if len(prompt) <= room:
            return prompt, first - len(head)
    raise ValueError(
        f"the question alone takes {len(prompt)} tokens and there is room for {room}; shorten it, lower "
        "--max_new_tokens, or raise --max_context"
    )


class Limits:
    """How many tokens a conversation and an answer may have."""

    def __init__(self, config: Config, model: CausalLM):
        trained = model.arch.max_positions
        self.context = config.max_context or trained
        if self.context > trained:
            raise ValueError(
                f"--max_context {self.context}: the model was trained on {trained} tokens at most"
            )
        self._answer = config.max_new_tokens
        # An answer gets what it asks for, but not more than half.
        self.prompt = self.context - min(self._answer, self.context // 2)

    def answer(self, prompt_length: int) -> int:
        """Return how long the answer to a prompt may be."""
        return min(self._answer, self.context - prompt_length)


# ---- a conversation ----------------------------------------------------------------------------------------

HELP = """\
/adapter on|off|NAME   answer with an adapter, or with the base alone
/system TEXT           set the system message; without TEXT, remove it
/reset                 forget what was said
/save FILE             add the conversation to a JSONL file, as a row that finetune.py can learn from
/quit                  end; so do an empty line, Ctrl-D and Ctrl-C
//TEXT                 say /TEXT
Ctrl-C stops an answer."""


class Conversation:
    """What was said, and by whom it is answered."""

    def __init__(self, speaker: Speaker, config: Config):
        self.speaker, self.config = speaker, config
        self.limits = Limits(config, speaker.model)
        self.system, self.said = config.system, list[Message]()
        self.left_out = 0  # of the oldest messages, which the model does not see any more
        self.prefix = PrefixCache()
        self.last = speaker.active  # the adapter that `/adapter on` means

    def messages(self) -> list[Message]:
        """Return all that was said, after the system message."""
        head: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        return head + self.said

    def ask(self, question: str) -> Generator[str, None, None]:
        """Yield the answer in pieces of text; what has come of it when the caller stops counts as said.

        Raises ValueError, the question forgotten, if there is no prompt for it.
        """
        answer = ""
        self.said.append({"role": "user", "content": question})
        try:
            prompt = self._prompt()
            with self.speaker.speaking():
                tokens = generate(
                    self.speaker.model,
                    prompt,
                    max_new_tokens=self.limits.answer(len(prompt)),
                    eos_ids=self.speaker.tokenizer.eos_ids,
                    seed=self.config.seed,
                    prefix=self.prefix,
                    **self.config.sampling(),
                )
                for piece in pieces(tokens, self.speaker.tokenizer, self.config.stop or ()):
                    answer += piece
                    yield piece
        finally:
            if answer:
                self.said.append({"role": "assistant", "content": answer})
            else:
                self.said.pop()

    def _prompt(self) -> list[int]:
        messages = self.messages()
        head = len(messages) - len(self.said)
        del messages[head : head + self.left_out]
        prompt, more = fitting(messages, self.speaker.tokenizer, self.limits.prompt)
        if more:
            self.left_out += more
            turns = sum(message["role"] == "user" for message in self.said[: self.left_out])
            print(
                f"[the first {turns} turns are left out from here on: {self.limits.context} tokens at most]"
            )
        return prompt

    def command(self, line: str) -> str:
        """Do what a line that begins with / says, and return a word about it.

        Raises ValueError for what cannot be done, and OSError for a file that cannot be written.
        """
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        match name:
            case "/reset":
                self.said, self.left_out = [], 0
                return "forgotten"
            case "/system":
                self.system = rest or None
                return "the system message is set" if rest else "there is no system message"
            case "/adapter":
                return self._switch(rest)
            case "/save":
                return self._save(rest)
            case "/help":
                return HELP
        raise ValueError(f"there is no command {name}; /help lists them")

    def _switch(self, name: str) -> str:
        names = self.speaker.names
        wanted = {"on": self.last, "off": None}.get(name, name)
        if name and name != "off" and wanted not in names:
            known = f"on, off, {', '.join(names)}" if names else "none; --adapter names a folder"
            raise ValueError(f"there is no adapter {name!r}; there is {known}")
        if name:
            self.speaker.switch(wanted)
            self.last = wanted or self.last
            self.prefix.clear()
        return f"{self.speaker.active or 'the base alone'} answers"

    def _save(self, name: str) -> str:
        if not name or not self.said:
            raise ValueError("there is nothing to save yet" if name else "/save needs the name of a file")
        path = Path(name).expanduser()
        with open(path, "ab+") as file:
            file.seek(0)
            content = file.read()
            start = b"\n" if content and not content.endswith(b"\n") else b""
            file.write(start + as_line({"messages": self.messages()}))
        return f"saved as line {len(content.splitlines()) + 1} of {path}"


def as_line(row: dict[str, Any]) -> bytes:
    """Return a row of a JSONL file."""
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"


def talk(conversation: Conversation) -> None:
    """Hold a conversation at the terminal."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (gives `input` arrow keys and a memory)
    while True:
        try:
            print()
            line = input("you: ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if line in ("", "/quit"):
            return
        try:
            if line.startswith("/") and not line.startswith("//"):
                print(conversation.command(line))
                continue
            print("model: ", end="", flush=True)
            show(conversation.ask(line.removeprefix("/") if line.startswith("//") else line))
        except KeyboardInterrupt:
            print(" [stopped]")
        except (ValueError, OSError) as error:
            print(f"error: {error}")


def show(answer: Generator[str, None, None]) -> None:
    """Print an answer as it comes."""
    with contextlib.closing(answer):  # or an answer that is stopped here would be said later, or never
        for piece in answer:
            print(piece, end="", flush=True)
    print()


# ---- many prompts ------------------------------------------------------------------------------------------


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the rows of a JSONL file with their lines, counted from 1; blank ones are passed over.

    Raises ValueError, naming file and line, for what is no JSON object.
    """
    for number, line in read_lines(path):
        yield number, parse_row(line, f"{path}: line {number}")


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines of a text file with their numbers, counted from 1; blank ones are passed over.

    Raises ValueError for a file that is not UTF-8, is not there, or has nothing in it.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    empty = True
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{path}: line {number}: not UTF-8 ({error.reason} at byte {error.start})"
                ) from None
            if text:
                empty = False
                yield number, text
    if empty:
        raise ValueError(f"{path}: is empty")


def read_prompts(path: Path) -> dict[int, list[Message]]:
    """Return the conversations that a file asks to be answered, by line.

    Raises ValueError, naming file and line, for what asks nothing.
    """
    if path.suffix != ".jsonl":
        return {number: [{"role": "user", "content": line}] for number, line in read_lines(path)}
    asked = {}
    for number, row in read_rows(path):
        try:
            asked[number] = asked_by(row)
        except ValueError as error:
            raise ValueError(f"{path}: line {number}: {error}") from None
    return asked


def asked_by(row: dict[str, Any]) -> list[Message]:
    """Return what a row asks: its prompt, or its messages but for a last answer."""
    if "messages" in row:
        messages = row["messages"]
        if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
            raise ValueError(f"messages must be a list of objects, got {type(messages).__name__}")
        messages = messages[:-1] if messages and messages[-1].get("role") == "assistant" else messages
        if not messages or not all(
            isinstance(m.get(key), str) for m in messages for key in ("role", "content")
        ):
            raise ValueError("messages must hold a question, each with a role and content that are text")
        return messages
    for key in ("prompt", "question", "instruction"):
        if key in row:
            parts = [row[key], row.get("input") or ""] if key == "instruction" else [row[key]]
            if not all(isinstance(part, str) for part in parts) or not row[key].strip():
                raise ValueError(f"{key!r} must be text, and not empty, got {row[key]!r}")
            return [{"role": "user", "content": "\n\n".join(filter(None, parts))}]
    raise ValueError(f"found the keys {sorted(row)}, expected prompt, question, instruction or messages")


def made_with(config: Config) -> dict[str, Any]:
    """Return all that decides what is answered to a prompt; of the adapter, a checksum of its weights too."""
    names = (*QUANTIZATION, "dtype", "system", "max_new_tokens", "max_context", "stop", "seed")
    active = next(iter(config.adapters().values()), None)
    adapter = (
        active and f"{active}, sha256 {hashlib.sha256((active / WEIGHTS_FILE).read_bytes()).hexdigest()}"
    )
    options = {name: getattr(config, name) for name in names} | config.sampling()
    return {"model": str(config.model), "adapter": adapter} | options


def answer_row(line: int, asked: list[Message], answer: str, made: dict[str, Any]) -> dict[str, Any]:
    """Return what is written of an answer: a row that finetune.py understands."""
    if asked == [{"role": "user", "content": asked[0]["content"]}]:
        row = {"line": line, "prompt": asked[0]["content"], "completion": answer}
    else:
        row = {"line": line, "messages": [*asked, {"role": "assistant", "content": answer}]}
    return row | {"made_with": made}


def answered_lines(path: Path, asked: dict[int, list[Message]], made: dict[str, Any]) -> set[int]:
    """Return the lines of the prompts whose answers a file holds; what a killed run left of a row is cut off.

    made: what answers are to be made with. Raises ValueError for a file that holds anything else.
    """
    *lines, unfinished = path.read_bytes().split(b"\n") if path.exists() else [b""]
    done = set()
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            is_answer = asked_by(row) == asked[row["line"]]
        except (ValueError, KeyError, TypeError):
            is_answer = False
        if not is_answer:
            raise ValueError(f"{path}: line {number} is no answer to these prompts; choose another --output")
        before = row.get("made_with") or {}
        for key, value in made.items():
            if before.get(key) != value:
                raise ValueError(
                    f"{path}: line {number} was made with {key} = {before.get(key)}, and this would be made "
                    f"with {value}; choose another --output"
                )
        done.add(row["line"])
    if unfinished:
        os.truncate(path, path.stat().st_size - len(unfinished))
    return done


def answer_file(speaker: Speaker, config: Config) -> None:
    """Answer the prompts of a file, several at once, and write each answer as soon as its batch is done.

    Raises ValueError for what is wrong in either file, before anything is written.
    """
    assert config.prompts and config.output
    asked = read_prompts(config.prompts)
    made = made_with(config)
    done = answered_lines(config.output, asked, made)
    limits, tokenizer, stop = Limits(config, speaker.model), speaker.tokenizer, config.stop or []
    head: list[Message] = [{"role": "system", "content": config.system}] if config.system else []
    waiting = {}
    for line in asked.keys() - done:
        try:
            waiting[line], _ = fitting(head + asked[line], tokenizer, limits.prompt)
        except ValueError as error:
            raise ValueError(f"{config.prompts}: line {line}: {error}") from None
    lines = sorted(waiting)
    with (
        open(config.output, "ab") as file,
        tqdm(total=len(asked), initial=len(done), unit="prompt", disable=None) as bar,
        speaker.speaking(),
    ):
        for start in range(0, len(lines), config.batch_size):
            some = lines[start : start + config.batch_size]
            answers = generate_batch(
                speaker.model,
                [waiting[line] for line in some],
                max_new_tokens=limits.answer(max(len(waiting[line]) for line in some)),
                eos_ids=tokenizer.eos_ids,
                seed=config.seed,
                ends=lambda ids: any(text in tokenizer.decode(ids) for text in stop),
                **config.sampling(),
            )
            for line, ids in zip(some, answers, strict=True):
                answer = before_stop(tokenizer.decode(ids), stop)
                file.write(as_line(answer_row(line, asked[line], answer, made)))
            file.flush()
            bar.update(len(some))
    before = f", {len(done):,} of them before" if done else ""
    print(f"answered  {len(asked):,} prompts{before}: {config.output}")


# ---- the command -------------------------------------------------------------------------------------------


def main() -> None:
    """Load, then answer."""
    config = parse(Config, description=__doc__.split("\n\n")[0] if __doc__ else None)
    try:
        with user_errors():
            prompt = config.prompt
            if prompt is None and config.prompts is None and not sys.stdin.isatty():
                prompt = read_question()
            speaker = Speaker(config)
            if config.prompts is not None:
                answer_file(speaker, config)
                return
            conversation = Conversation(speaker, config)
            if prompt is not None:
                show(conversation.ask(prompt))
                return
        talk(conversation)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        sys.exit(130)


def read_question() -> str:
    """Return what is piped in. Raises ValueError if that is nothing, or not text."""
    try:
        question = sys.stdin.read().strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input: not UTF-8 ({error.reason} at byte {error.start})") from None
    if not question:
        raise ValueError("standard input is empty: pipe a question in, or give --prompt")
    return question


if __name__ == "__main__":
    main()
