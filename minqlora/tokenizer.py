"""Chapter 12. Text to tokens and back, and the chat template that turns a conversation into text.

A checkpoint folder brings its tokenizer as `tokenizer.json`, and in `tokenizer_config.json` the chat
template: a small Jinja program that writes a conversation the way the model saw conversations in training::

    [{"role": "user", "content": "Hi"}]   ->   <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n

A template comes with a model somebody else made, so it runs in Jinja's sandbox, where it can read what it is
given and nothing else. Templates write their own beginning-of-text token; so text from a template is encoded
without special tokens being added, and there is never a second one.

Before: adapter. Next: data.
"""

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as FastTokenizer

Message = dict[str, Any]  # {"role": "system" | "user" | "assistant", "content": text}


class Tokenizer:
    """The tokenizer of a checkpoint folder.

    `eos_ids` are the tokens that end an answer, the first one is written after completions; `chat_template`
    is the template's source or None. Raises ValueError, naming the file, if the folder has no usable
    tokenizer.
    """

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        path = self.folder / "tokenizer.json"
        if not path.is_file():
            raise ValueError(f"{path}: not found")
        try:
            self._tokenizer = FastTokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{path}: not a tokenizer ({error})") from None
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._config = _read_json(self.folder / "tokenizer_config.json")
        self.special_tokens = {
            key: _token_text(self._config.get(key))
            for key in ("bos_token", "eos_token", "pad_token", "unk_token")
        }
        self.eos_ids = self._find_eos_ids()
        template_file = self.folder / "chat_template.jinja"
        template = self._config.get("chat_template")
        if template_file.is_file():
            template = template_file.read_text("utf-8")
        if isinstance(template, list):  # several, by name
            template = {part["name"]: part["template"] for part in template}.get("default")
        self.chat_template: str | None = template

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Return a text's token ids; add_special_tokens adds those the tokenizer puts around a text."""
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: list[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of token ids."""
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    @property
    def vocab_size(self) -> int:
        """The number of ids: one more than the largest."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def token(self, token_id: int) -> str | None:
        """Return a token as the vocabulary writes it, or None if there is no such id."""
        return self._tokenizer.id_to_token(token_id)

    def render(self, messages: list[Message], *, add_generation_prompt: bool = False) -> str:
        """Write a conversation as text with the chat template.

        add_generation_prompt: end with the header of an answer that is yet to be generated. Raises ValueError
        if there is no template, or if it rejects the conversation (a role it does not know, say) or breaks
        the sandbox.
        """
        if self.chat_template is None:
            raise ValueError(f"{self.folder}: the tokenizer has no chat template")
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationBlock]
        )
        environment.globals["raise_exception"] = _raise_template_error
        environment.globals["strftime_now"] = lambda text: datetime.now().strftime(text)
        environment.filters["tojson"] = _to_json
        known = {name: token for name, token in self.special_tokens.items() if token is not None}
        try:
            template = environment.from_string(self.chat_template)
            return template.render(messages=messages, add_generation_prompt=add_generation_prompt, **known)
        except Exception as error:  # a template is a program, and fails in as many ways
            raise ValueError(f"{self.folder}: the chat template failed: {error}") from None

    def _find_eos_ids(self) -> list[int]:
        # The text tokens end with, then what generation may stop at: later files only add to it.
        ids: list[int] = []
        eos_token = self.special_tokens["eos_token"]
        if eos_token:
            eos_id = self._tokenizer.token_to_id(eos_token)
            if eos_id is None:
                raise ValueError(
                    f"{self.folder}/tokenizer_config.json: eos_token {eos_token!r} is not in the vocabulary"
                )
            ids.append(eos_id)
        for name in ("generation_config.json", "config.json"):
            found = _read_json(self.folder / name).get("eos_token_id")
            ids.extend(found if isinstance(found, list) else [] if found is None else [found])
        if not ids:
            raise ValueError(
                f"{self.folder}: no eos_token in tokenizer_config.json, no eos_token_id in config.json"
            )
        return list(dict.fromkeys(ids))


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def _token_text(token: Any) -> str | None:
    # A special token is written as text, or as an object that describes it.
    return token.get("content") if isinstance(token, dict) else token


def _to_json(value: Any, indent: int | None = None) -> str:
    # Jinja's own tojson escapes for HTML and for ASCII; models were trained on neither.
    return json.dumps(value, ensure_ascii=False, indent=indent)


class _GenerationBlock(Extension):
    # {% generation %} marks answers in some templates; data.py finds them itself, and the text just passes.
    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_template_error(message: str) -> None:
    raise jinja2.TemplateError(message)
