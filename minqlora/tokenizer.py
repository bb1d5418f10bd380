"""Chapter 15. Text to tokens and back.

A checkpoint folder brings its tokenizer as `tokenizer.json`, or, if it has only that, as SentencePiece's
`tokenizer.model`; and in `chat_template.jinja` or `tokenizer_config.json` the chat template::

    [{"role": "user", "content": "Hi"}]   ->   <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n

SentencePiece puts a space before a text, so that a word has the same token wherever it stands; what follows a
special token, or other text, has no such beginning::

    Hello            ->   ▁Hello                 encode("Hello")
    <s>[INST] Hello  ->   <s> [ INST ] ▁Hello    encode("<s>[INST] Hello")
    Hello            ->   Hello                  encode("Hello", continues=True)

Templates write their own beginning-of-text token; so text from a template is encoded without special tokens
being added, and where they are added to a text that begins with one already, there is still only one. A model
without a template is a base model: its default is the plain text of a prompt, after the tokens that the
tokenizer puts before a text, and then the completion and the end token (Chapter 16).

How this differs: a `tokenizer.model` is read by SentencePiece itself, so ids are its own. transformers
converts it, and what comes of that drops one of the spaces before a text, and joins spaces differently.

Paper: none. Formats: Hugging Face's `tokenizers` and chat templates; Kudo, Richardson, "SentencePiece", 2018.

Before: template. Next: data.
"""

import json
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, decoders
from tokenizers import Tokenizer as FastTokenizer

from minqlora.files import companions, write_atomically
from minqlora.template import TemplateSandbox, template_error

Message = dict[str, Any]  # {"role": "system" | "user" | "assistant", "content": text}

# The names by which tokenizer_config.json knows tokens that have a part to play.
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class Tokenizer:
    """The tokenizer of a checkpoint folder.

    `special_tokens` are the texts of the named tokens, None for one that is not set; `bos_id` and `pad_id`
    are the ids of two of them, or None. `eos_ids` are the tokens that end an answer, the first one is written
    after completions. `chat_template` is the default template's source or None, `templates` are all by name.
    Where `tokenizer.json` and `tokenizer.model` are both there, the former is read. Raises ValueError, naming
    the file, if the folder has no usable tokenizer.
    """

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        self._config, added = _read_config(self.folder)
        self._where = self.folder / "tokenizer_config.json"
        self._backend = self._open_backend()
        self.special_tokens = {
            name: _token_text(self._config, name, self._where) or self._backend.named.get(name)
            for name in NAMED_TOKENS
        }
        self._add_what_the_json_files_add(added)
        self._changed = False
        self.bos_id = self._id_of("bos_token")
        self.pad_id = self._id_of("pad_token")
        self.eos_ids = self._find_eos_ids()
        self._before, self._after = self._find_what_is_put_around()
        self.templates = _read_templates(self.folder, self._config)
        self.chat_template = self.templates.get("default")
        self._sandbox = TemplateSandbox()

    # -- text ----------------------------------------------------------------------------------------------

    def encode(self, text: str, *, add_special_tokens: bool = False, continues: bool = False) -> list[int]:
        """Return a text's token ids.

        add_special_tokens: with those that the tokenizer puts around a text; if the text begins with its
        beginning-of-text token already, there is no second one. continues: other text comes before, so this
        one is not marked as the beginning of a word where it does not begin with a space.
        """
        if add_special_tokens:
            return self.begin(text) + self._after
        return self.encode_all([text], [continues])[0]

    def encode_all(self, texts: Sequence[str], continues: Sequence[bool]) -> list[list[int]]:
        """Return the ids of some texts, each as `encode` does; all together, which is faster."""
        return self._backend.encode(texts, continues)

    def begin(self, text: str) -> list[int]:
        """Return the ids of a text that goes on: after the tokens that the tokenizer puts before a text, and
        without those that it puts behind one."""
        return self.begun(self.encode(text))

    def begun(self, ids: list[int]) -> list[int]:
        """Return what `begin` does, given the ids of the text alone."""
        if self.bos_id is not None and self._before[-1:] == ids[:1] == [self.bos_id]:
            ids = ids[1:]
        return self._before + ids

    def decode(self, ids: list[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of token ids."""
        return self._backend.decode(ids, skip_special_tokens)

    @property
    def vocab_size(self) -> int:
        """The number of ids: one more than the largest."""
        return self._backend.size

    def token(self, token_id: int) -> str | None:
        """Return a token as the vocabulary writes it, or None if there is no such id."""
        return self._backend.id_to_token(token_id)

    def token_id(self, token: str) -> int | None:
        """Return the id of a token as the vocabulary writes it, or None if there is no such token."""
        return self._backend.token_to_id(token)

    def add_tokens(self, tokens: Sequence[str]) -> list[int]:
        """Return the ids of tokens; those that are not in the vocabulary are added to it, at the next ids.

        Wherever its text stands, an added token is one token; it is text and not special. `save` keeps them.
        Raises ValueError for what is no text.
        """
        for token in tokens:
            if not isinstance(token, str) or not token.strip():
                raise ValueError(f"a token to add must be text with a character to see, got {token!r}")
            if self.token_id(token) is None:
                self._backend.add(AddedToken(token, normalized=False, special=False))
                self._changed = True
        return [token_id for token_id in map(self.token_id, tokens) if token_id is not None]

    def files(self) -> dict[str, bytes]:
        """Return the contents of the tokenizer's files by name, with the added tokens."""
        files = companions(self.folder)
        return files | self._changed_files(files) if self._changed else files

    def save(self, folder: Path | str) -> None:
        """Write the tokenizer's files, with the added tokens, into a folder, each whole or not at all.

        What goes with them goes along: chat templates, `generation_config.json`, a licence.
        """
        for name, content in self.files().items():
            path = Path(folder) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, content)

    # -- conversations -------------------------------------------------------------------------------------

    def render(
        self,
        messages: list[Message],
        *,
        add_generation_prompt: bool = False,
        tools: list[dict[str, Any]] | None = None,
        template: str | None = None,
        **variables: Any,
    ) -> str:
        """Write a conversation as text with a chat template.

        add_generation_prompt: end with the header of an answer that is yet to be generated. tools: JSON
        schemas of functions that the model may call. template: the name of one of `templates`; None is
        `default`, or `tool_use` if there are tools and it exists. variables: what else the template is to
        see, such as `enable_thinking` or `documents`.

        Raises ValueError if there is no such template, or if it rejects the conversation (a role it does not
        know, say) or breaks the sandbox.
        """
        if template is None:
            template = "tool_use" if tools is not None and "tool_use" in self.templates else "default"
        if template not in self.templates:
            others = f"; there are: {', '.join(sorted(self.templates))}" if self.templates else ""
            named = "" if template == "default" else f" named {template!r}"
            raise ValueError(f"{self.folder}: the tokenizer has no chat template{named}{others}")
        seen = {"messages": messages, "tools": tools, "add_generation_prompt": add_generation_prompt}
        seen |= {"documents": None} | self._template_tokens | variables
        try:
            return self._sandbox.write(self.templates[template], seen)
        except Exception as error:  # a template is a program, and fails in as many ways
            raise ValueError(f"{self.folder}: the chat template failed: {template_error(error)}") from None

    # -- the folder ----------------------------------------------------------------------------------------

    def _open_backend(self) -> "_TokenizerJson | _SentencePiece":
        path = self.folder / "tokenizer.json"
        if path.is_file():
            return _TokenizerJson(path)
        model = self.folder / "tokenizer.model"
        if model.is_file():
            return _SentencePiece(model, legacy=_flag(self._config, "legacy", False, self._where))
        raise ValueError(
            f"{path}: not found, and no tokenizer.model instead; `AutoTokenizer.from_pretrained(FOLDER)"
            ".save_pretrained(FOLDER)` of transformers makes it from other formats"
        )

    def _add_what_the_json_files_add(self, added: dict[int, AddedToken]) -> None:
        # First tokens with an id of their own, in its order, then those that are told by name alone.
        for token_id, token in sorted(added.items()):
            is_new = self.token_id(token.content) is None
            self._backend.add(token, token_id)
            if is_new and self.token_id(token.content) != token_id:
                raise ValueError(
                    f"{self.folder}: the added token {token.content!r} should have the id {token_id}, but "
                    f"tokenizer.json has its next place at {self.token_id(token.content)}"
                )
        named = [text for text in self.special_tokens.values() if text and self.token_id(text) is not None]
        for text in [*named, *_more_special_tokens(self._config, self._where)]:
            self._backend.add(AddedToken(text, normalized=False, special=True))

    def _id_of(self, name: str) -> int | None:
        text = self.special_tokens[name]
        return None if text is None else self.token_id(text)

    def _find_eos_ids(self) -> list[int]:
        # The text tokens end with, then what generation may stop at: later files only add to it.
        ids: list[int] = []
        for name in ("bos_token", "eos_token"):
            text = self.special_tokens[name]
            if text and self.token_id(text) is None:
                raise ValueError(f"{self._where}: {name} {text!r} is not in the vocabulary")
        eos_id = self._id_of("eos_token")
        if eos_id is not None:
            ids.append(eos_id)
        for file in ("generation_config.json", "config.json"):
            found = _read_json(self.folder / file).get("eos_token_id")
            found = found if isinstance(found, list) else [] if found is None else [found]
            if not all(type(token_id) is int and token_id >= 0 for token_id in found):
                raise ValueError(
                    f"{self.folder / file}: eos_token_id must be a token id or a list of these, got {found}"
                )
            ids.extend(found)
        if not ids:
            raise ValueError(
                f"{self.folder}: no eos_token in tokenizer_config.json, no eos_token_id in config.json"
            )
        return list(dict.fromkeys(ids))

    def _find_what_is_put_around(self) -> tuple[list[int], list[int]]:
        # tokenizer.json says itself what stands before and after a text; of a SentencePiece model the config
        # does. Unless it says otherwise, that is a beginning and no end, as these models were trained.
        if isinstance(self._backend, _TokenizerJson):
            return self._backend.around()
        begins = _flag(self._config, "add_bos_token", True, self._where)
        ends = _flag(self._config, "add_eos_token", False, self._where)
        eos_id = self._id_of("eos_token")
        before = [self.bos_id] if begins and self.bos_id is not None else []
        return before, [eos_id] if ends and eos_id is not None else []

    @cached_property
    def _template_tokens(self) -> dict[str, str]:
        # Every token that has a name, for instance `image_token`; a name without a token stays undefined.
        others = {
            name: value
            for name, value in self._config.items()
            if name.endswith("_token") and name not in NAMED_TOKENS and isinstance(value, str)
        }
        return others | {name: text for name, text in self.special_tokens.items() if text is not None}

    def _changed_files(self, files: dict[str, bytes]) -> dict[str, bytes]:
        # The JSON files that tell of added tokens, with the new ones in them.
        changed: dict[str, dict[str, Any]] = {}
        added = {token_id: _fields(token) for token_id, token in sorted(self._backend.added().items())}
        if isinstance(self._backend, _TokenizerJson):
            listed = [{"id": token_id, **fields} for token_id, fields in added.items()]
            changed["tokenizer.json"] = json.loads(files["tokenizer.json"]) | {"added_tokens": listed}
        if isinstance(self._backend, _SentencePiece) or "added_tokens_decoder" in self._config:
            # Where this key is, readers look into no other file for tokens.
            changed["tokenizer_config.json"] = self._config | {"added_tokens_decoder": added}
        return {name: json.dumps(c, ensure_ascii=False, indent=2).encode() for name, c in changed.items()}


# ---- two kinds of tokenizers -------------------------------------------------------------------------------


class _TokenizerJson:
    """`tokenizer.json`: the whole pipeline from text to ids is in the file, and a library runs it."""

    def __init__(self, path: Path):
        try:
            self._tokenizer = FastTokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{path}: not a tokenizer ({_one_line(error)})") from None
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._found_anywhere = {token.content for token in self.added().values()}
        self.named: dict[str, str] = {}  # the file does not say which token plays which part
        first = self._tokenizer.encode("a", add_special_tokens=False).tokens[:1]
        self._marks_beginnings = bool(first) and first[0][0] in "▁Ġ"

    def encode(self, texts: Sequence[str], continues: Sequence[bool]) -> list[list[int]]:
        """Return the ids of texts, each as its own beginning or as what follows other text."""
        if not self._marks_beginnings or not any(continues):
            return self._encode(texts)
        # Behind a line break no word begins. Where the break stays a token of its own, it is taken off.
        [mark] = self._encode(["\n"])
        ids = self._encode(
            ["\n" + text if goes_on else text for text, goes_on in zip(texts, continues, strict=True)]
        )
        for place, goes_on in enumerate(continues):
            if goes_on and ids[place][: len(mark)] == mark:
                ids[place] = ids[place][len(mark) :]
            elif goes_on:
                [ids[place]] = self._encode([texts[place]])
        return ids

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [found.ids for found in self._tokenizer.encode_batch(texts, add_special_tokens=False)]

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    @property
    def size(self) -> int:
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def id_to_token(self, token_id: int) -> str | None:
        return self._tokenizer.id_to_token(token_id)

    def token_to_id(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def added(self) -> dict[int, AddedToken]:
        return self._tokenizer.get_added_tokens_decoder()

    def add(self, token: AddedToken, token_id: int | None = None) -> None:
        """Have a token found in any text, with its id or the next one; the file's own stay as they are."""
        if token.content not in self._found_anywhere:
            self._found_anywhere.add(token.content)
            (self._tokenizer.add_special_tokens if token.special else self._tokenizer.add_tokens)([token])

    def around(self) -> tuple[list[int], list[int]]:
        """Return the ids that the file puts before and after a text."""
        ids = self._tokenizer.encode("a", add_special_tokens=False).ids
        whole = self._tokenizer.encode("a", add_special_tokens=True).ids
        starts = [i for i in range(len(whole)) if whole[i : i + len(ids)] == ids]
        return (whole[: starts[0]], whole[starts[0] + len(ids) :]) if starts else ([], [])


class _SentencePiece:
    """`tokenizer.model`: pieces and how they join; tokens added later are cut out before it sees a text.

    legacy: a space is put before every stretch of text, also after special tokens, as transformers long did.
    """

    def __init__(self, path: Path, legacy: bool):
        content = path.read_bytes()
        try:
            if not content:
                raise ValueError("an empty file")
            self._model = SentencePieceProcessor(model_proto=content)
            # A second message of the format's adds to the first: this one says add_dummy_prefix = false.
            self._inner = SentencePieceProcessor(model_proto=content + b"\x1a\x02\x18\x00")
            pieces = [self._model.id_to_piece(i) for i in range(self._model.get_piece_size())]
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"{path}: not a SentencePiece model, or damaged ({_one_line(error)}); if it is one of "
                "tiktoken's, the folder needs a tokenizer.json"
            ) from None
        self._legacy = legacy
        self._ids: dict[str, int] = {}
        self._added: dict[int, AddedToken] = {}
        self.named = {
            f"{name}_token": pieces[piece_id]
            for name, piece_id in (
                ("bos", self._model.bos_id()),
                ("eos", self._model.eos_id()),
                ("unk", self._model.unk_id()),
                ("pad", self._model.pad_id()),
            )
            if piece_id >= 0
        }
        for i, piece in enumerate(pieces):
            if self._model.is_control(i) or self._model.is_unknown(i):
                self.add(AddedToken(piece, normalized=False, special=True))
        marks_beginnings = self._model.encode("a") != self._inner.encode("a")
        joined = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        self._decoder = decoders.Sequence(
            [*joined, decoders.Strip(content=" ", left=1)] if marks_beginnings else joined
        )

    def encode(self, texts: Sequence[str], continues: Sequence[bool]) -> list[list[int]]:
        """Return the ids of texts, each as its own beginning or as what follows other text."""
        return list(map(self._encode, texts, continues))

    def _encode(self, text: str, continues: bool) -> list[int]:
        ids: list[int] = []
        place = 0
        for match in [*self._pattern.finditer(text), None]:
            stretch = text[place : match.start() if match else None]
            begins = not continues if place == 0 else self._legacy
            ids += (self._model if begins else self._inner).encode(stretch)
            if match:
                ids.append(self._ids[match[0] if match[0] in self._ids else match[0].strip()])
                place = match.end()
        return ids

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        """Return the text of ids; the space that was put before it is not its own."""
        tokens = []
        for token_id in ids:
            token = self.id_to_token(token_id)
            special = token_id in self._added and self._added[token_id].special
            if token is not None and not (special and skip_special_tokens):
                tokens.append(token)
        return self._decoder.decode(tokens)

    @property
    def size(self) -> int:
        return max(self._model.get_piece_size(), max(self._added, default=-1) + 1)

    def id_to_token(self, token_id: int) -> str | None:
        if token_id in self._added:
            return self._added[token_id].content
        return self._model.id_to_piece(token_id) if 0 <= token_id < self._model.get_piece_size() else None

    def token_to_id(self, token: str) -> int | None:
        if token in self._ids:
            return self._ids[token]
        piece_id = self._model.piece_to_id(token)  # that of <unk> for what is no piece
        return piece_id if self.id_to_token(piece_id) == token else None

    def added(self) -> dict[int, AddedToken]:
        return self._added

    def add(self, token: AddedToken, token_id: int | None = None) -> None:
        """Have a token found in any text, with the id given, or its own if it is a piece, or the next one."""
        if token_id is None and self._ids.get(token.content) is not None:
            return
        if token_id is None:
            token_id = self.token_to_id(token.content)
        if token_id is None:
            token_id = self.size
        self._added[token_id], self._ids[token.content] = token, token_id
        self.__dict__.pop("_pattern", None)

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        # Of two tokens that begin at the same place the longer one is meant.
        longest_first = sorted(self._added.values(), key=lambda token: -len(token.content))
        return re.compile("|".join(map(_pattern_of, longest_first)))


def _pattern_of(token: AddedToken) -> str:
    # A token may ask for the white space beside it, or not to be found inside a word.
    edges = (r"(?<!\w)", r"(?!\w)") if token.single_word else ("", "")
    left, right = r"\s*" if token.lstrip else "", r"\s*" if token.rstrip else ""
    return left + edges[0] + re.escape(token.content) + edges[1] + right


# ---- what the folder's JSON files say ----------------------------------------------------------------------


def _read_config(folder: Path) -> tuple[dict[str, Any], dict[int, AddedToken]]:
    # tokenizer_config.json and the added tokens by id. Before that file told of both, they stood in others,
    # which count where it does not know `added_tokens_decoder`.
    path = folder / "tokenizer_config.json"
    config = _read_json(path)
    if "added_tokens_decoder" in config:
        return config, _read_added_tokens(config["added_tokens_decoder"], path)
    config |= _read_json(folder / "special_tokens_map.json")
    special = {_token_text(config, name, path) for name in NAMED_TOKENS}
    special.update(_more_special_tokens(config, path))
    ids = _read_json(folder / "added_tokens.json")
    if not all(type(token_id) is int for token_id in ids.values()):
        raise ValueError(f"{folder}/added_tokens.json: expected a token id for each token, got {ids}")
    return config, {i: AddedToken(text, normalized=False, special=text in special) for text, i in ids.items()}


def _read_added_tokens(decoder: Any, path: Path) -> dict[int, AddedToken]:
    # {"32000": {"content": "<|im_start|>", "special": true, ...}}
    try:
        tokens = {int(token_id): AddedToken(**fields) for token_id, fields in decoder.items()}
        if not all(token.content for token in tokens.values()):
            raise ValueError("a token without text")
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: added_tokens_decoder must hold an object with content for each id ({_one_line(error)})"
        ) from None
    return tokens


def _more_special_tokens(config: dict[str, Any], path: Path) -> list[str]:
    # Special tokens without a part of their own; newer files call them extra, and may give each a name.
    for key in ("extra_special_tokens", "additional_special_tokens"):
        tokens = config.get(key)
        if tokens:
            tokens = list(tokens.values()) if isinstance(tokens, dict) else tokens
            if not isinstance(tokens, list):
                raise ValueError(f"{path}: {key} must be a list, got {type(tokens).__name__}")
            texts = [_token_text({key: token}, key, path) for token in tokens]
            return [text for text in texts if text]
    return []


def _read_templates(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    # By name, `default` the one that is meant when none is said. Files of their own win over the config.
    path = folder / "tokenizer_config.json"
    templates = config.get("chat_template")
    if templates is None:
        templates = {}
    elif isinstance(templates, str):
        templates = {"default": templates}
    elif isinstance(templates, list):
        try:
            templates = {part["name"]: part["template"] for part in templates}
        except (KeyError, TypeError):
            raise ValueError(f"{path}: chat_template is a list, but not of names and templates") from None
    if not isinstance(templates, dict) or not all(isinstance(text, str) for text in templates.values()):
        raise ValueError(
            f"{path}: chat_template must be text, or a list of names and templates, "
            f"got {type(config['chat_template']).__name__}"
        )
    files = {"default": folder / "chat_template.jinja"}
    files |= {file.stem: file for file in sorted(folder.glob("additional_chat_templates/*.jinja"))}
    return templates | {name: _read_text(file) for name, file in files.items() if file.is_file()}


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from None


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # also a number of thousands of digits, endless nesting
        raise ValueError(f"{path}: not valid JSON ({_one_line(error)})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def _token_text(config: dict[str, Any], name: str, path: Path) -> str | None:
    # A special token is written as text, or as an object that describes it.
    token = config.get(name)
    text = token.get("content") if isinstance(token, dict) else token
    if text is not None and not isinstance(text, str):
        raise ValueError(f"{path}: {name} must be text, got {type(text).__name__}")
    return text


def _flag(config: dict[str, Any], name: str, default: bool, path: Path) -> bool:
    value = config.get(name)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{path}: {name} must be true or false, got {value!r}")
    return default if value is None else value


def _fields(token: AddedToken) -> dict[str, Any]:
    names = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
    return {name: getattr(token, name) for name in names}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
