"""Text becomes the tokens that transformers makes of it; a chat template writes text and does no more."""

import importlib.util
import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import SPECIALS
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

import minqlora.template
from minqlora.data import encode, encode_prompt
from minqlora.tokenizer import Tokenizer

TEXTS = [
    "",
    " ",
    "Hello, world!",
    "  two  spaces\tand\n\n\nlines\r\n",
    "def f(x: int = 12345) -> None:\n    return x  # 100 %",
    "Ünïcödé, ελληνικά, русский, עברית, العربية, हिन्दी, 中文, 日本語, 한국어",
    "🙂👩‍👩‍👧‍👦🏳️‍🌈 e\u0301 \u00a0\u200b\ufeff",
    "<|im_start|>user\nwho said <|im_end|>?<|endoftext|> <|no such token|>",
    "   leading," + " " * 70 + "and a long run of spaces" + " " * 33,
    "\x00\x01\x1b[0m\x7f \ud7ff\ue000\U0010ffff ▁x ▁▁y <0x41>",
]
CONVERSATIONS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " 2 + 2 =\n"}],
    [
        {"role": "user", "content": "Здравствуйте {{ 1 }} {% raw %}"},
        {"role": "assistant", "content": "你好 🙂"},
        {"role": "user", "content": "<b>&amp;</b>"},
        {"role": "assistant", "content": ""},
    ],
]


@pytest.fixture(scope="session")
def demo(demo_model: Path) -> Tokenizer:
    return Tokenizer(demo_model)


@pytest.fixture(scope="session")
def demo_oracle(demo_model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(demo_model)


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    """The tiny model's tokenizer, to change."""
    (tmp_path / "tokenizer").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json"):
        shutil.copy(tiny_model / name, tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def with_template(folder: Path, template: Any) -> Tokenizer:
    edit(folder / "tokenizer_config.json", chat_template=template)
    return Tokenizer(folder)


# -- text --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_token_ids_and_text_are_those_of_transformers(demo: Tokenizer, demo_oracle: Any, text: str) -> None:
    ids = demo.encode(text)
    assert ids == demo_oracle.encode(text, add_special_tokens=False)
    assert demo.encode(text, add_special_tokens=True) == demo_oracle.encode(text)
    assert demo.decode(ids) == demo_oracle.decode(ids, skip_special_tokens=True)
    assert demo.decode(ids, skip_special_tokens=False) == demo_oracle.decode(ids)


@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_token_ids_of_any_text_are_those_of_transformers(
    demo: Tokenizer, demo_oracle: Any, text: str
) -> None:
    ids = demo.encode(text)
    assert ids == demo_oracle.encode(text, add_special_tokens=False)
    assert demo.decode(ids) == demo_oracle.decode(ids, skip_special_tokens=True)


def test_padding_and_truncation_of_the_file_are_switched_off(folder: Path) -> None:
    edit(
        folder / "tokenizer.json",
        truncation={"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
        padding={
            "strategy": {"Fixed": 9},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "<|endoftext|>",
        },
    )
    assert len(Tokenizer(folder).encode("abcd")) == 4


def test_a_token_is_written_as_in_the_vocabulary(demo: Tokenizer) -> None:
    assert demo.token(2) == "<|im_end|>"
    assert demo.token(10**9) is None


# -- templates ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("messages", CONVERSATIONS, ids=["one", "system", "turns"])
@pytest.mark.parametrize("prompt", [False, True])
def test_conversations_are_written_as_transformers_writes_them(
    demo: Tokenizer, demo_oracle: Any, messages: list[dict[str, str]], prompt: bool
) -> None:
    expected = demo_oracle.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    text = demo.render(messages, add_generation_prompt=prompt)
    assert text == expected
    tokens = demo_oracle.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False)
    assert demo.encode(text) == tokens


# What templates on the Hub are made of, a line each; transformers is the oracle.
FEATURES = {
    "trim": "{% for m in messages %}\n  {% if m.role == 'user' %}\n{{ m['content'] | trim }}\n"
    "  {% endif %}\n{% endfor %}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}"
    "{{ ns.n }}",
    "break": "{% for m in messages %}{{ m.content }}{% if loop.index0 == 1 %}{% break %}{% endif %}"
    "{% endfor %}",
    "eos": "{{ eos_token }}{{ bos_token }}{{ unk_token }}",
    "tools": "{% if tools is defined and tools %}tools{% endif %}{{ messages[0].content }}",
    "undefined": "{{ nothing }}{% if nothing is defined %}!{% endif %}",
    "filters": "{{ messages[0].content | upper | replace('H', 'h') | default('x') }}{{ messages | length }}",
}


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("messages", CONVERSATIONS, ids=["one", "system", "turns"])
def test_templates_mean_what_they_mean_in_transformers(
    folder: Path, feature: str, messages: list[dict[str, str]]
) -> None:
    assert_rendered_alike(folder, FEATURES[feature], messages)


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0] | tojson }}",
        "{{ strftime_now('%Y') }}",
        "{% generation %}{{ messages[0].content }}{% endgeneration %}",
    ],
    ids=["tojson", "strftime_now", "generation"],
)
def test_templates_may_use_what_transformers_gives_them(folder: Path, template: str) -> None:
    assert_rendered_alike(folder, template, [{"role": "user", "content": "<ü>"}])


def test_a_special_token_that_is_not_set_is_undefined(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", bos_token=None)
    assert_rendered_alike(folder, "{{ bos_token }}{{ messages[0].content }}", CONVERSATIONS[0])


def assert_rendered_alike(folder: Path, template: str, messages: list[dict[str, str]]) -> None:
    from transformers import AutoTokenizer

    ours = with_template(folder, template)
    theirs = AutoTokenizer.from_pretrained(folder)
    assert ours.render(messages) == theirs.apply_chat_template(messages, tokenize=False)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__ }}",
        "{{ messages | attr('__class__') }}",
        "{{ messages | map(attribute='__class__') | list }}",
        "{{ messages[0].__init__.__globals__ }}",
        "{{ raise_exception.__globals__['__builtins__'] }}",
        "{{ cycler.__init__.__globals__.os.popen('true').read() }}",
        "{{ ('{0.__class__.__mro__}').format(messages) }}",
        "{{ '{0.__class__}'.format_map([messages]) }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'system'}) }}",
        "{% set ns = namespace(__class__=1) %}",
        "{% set ns = namespace() %}{% set ns.__html__ = 1 %}",
        "{% include 'config.json' %}",
        "{% import 'os' as os %}",
    ],
)
def test_the_sandbox_keeps_a_template_from_pythons_internals(folder: Path, template: str) -> None:
    assert_refused(with_template(folder, template), "")


# What would take hours or fill the memory, each in its own way.
TOO_MUCH = [
    "{{ 'a' * 10**9 }}",
    "{{ [0] * 10**9 }}",
    "{{ 9 ** 9 ** 9 ** 9 }}",
    "{{ 'a' | center(10**9) }}",
    "{{ 'a'.ljust(10**9) }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%*d' | format(10**9, 1) }}",
    "{{ '{:{}}'.format(1, 10**9) }}",
    "{{ [1] | tojson(indent=10**9) }}",
    "{{ 1.5 | round(10**9, 'ceil') }}",
    "{{ [1] | slice(10**9) | list }}",
    "{% set s = 'a' * 10**6 %}{{ s.replace('a', s) }}",
    "{% set s = 'a' * 10**6 %}{{ range(99999) | join(s) }}",
    "{% set s = 'a' * 10**6 %}{{ s.join(range(99999) | map('string')) }}",
    "{% set s = 'a' * 10**6 %}{{ range(99999) | map('replace', '1', s) | join }}",
    "{% set s = 'a' * 10**6 %}{% for i in range(99999) %}{{ s }}{% endfor %}",
    "{% set s = 'a' * 10**6 %}{% set x %}{% for i in range(99999) %}{{ s }}{% endfor %}{% endset %}",
    "{% set ns = namespace(s='a') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "{% set ns = namespace(s='a') %}{% for i in range(60) %}{% set ns.s = [ns.s, ns.s] %}{% endfor %}",
]
TOO_LONG = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% set many = range(99999) | list %}{{ many | select('in', many) | list }}",
]


@pytest.mark.parametrize("template", TOO_MUCH)
def test_no_template_makes_a_value_too_large(folder: Path, template: str) -> None:
    assert_refused(with_template(folder, template), "it makes a value of more than 10,000,000 characters")


@pytest.mark.parametrize("template", TOO_LONG)
def test_no_template_runs_on(folder: Path, template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(minqlora.template, "MAX_SECONDS", 0.1)
    assert_refused(with_template(folder, template), "it ran for more than 0.1 seconds")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "recursion"),
    ],
    ids=["range", "macro", "brackets"],
)
def test_ranges_and_depths_are_bounded(folder: Path, template: str, message: str) -> None:
    assert_refused(with_template(folder, template), message)


def assert_refused(tokenizer: Tokenizer, message: str) -> None:
    with pytest.raises(ValueError, match=f"the chat template failed: .*{message}") as refusal:
        tokenizer.render([{"role": "user", "content": "Hi"}])
    assert str(tokenizer.folder) in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_template_may_reject_a_conversation_in_its_own_words(folder: Path) -> None:
    tokenizer = with_template(folder, "{{ raise_exception('Roles must alternate!') }}")
    with pytest.raises(ValueError, match="the chat template failed: Roles must alternate!"):
        tokenizer.render([])


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}", "Unexpected end of template.*line 1"),
        ("{{ 1 }}\n{% endfor %}", "Encountered unknown tag 'endfor'.*line 2 of the template"),
        ("\n\n{{ nothing.content }}", r"'nothing' is undefined \(line 3 of the template\)$"),
        ("{{ messages + 1 }}", "can only concatenate list"),
        ("{{ messages[0].content / 2 }}", "unsupported operand"),
    ],
)
def test_a_template_that_breaks_says_how(folder: Path, template: str, message: str) -> None:
    tokenizer = with_template(folder, template)
    with pytest.raises(ValueError, match=f"the chat template failed: .*{message}"):
        tokenizer.render([{"role": "user", "content": "Hi"}])


@pytest.mark.parametrize(
    "template", ["{{ 1 / 0 }}", "{{ 'x'.index('y') + 1 }}{{ [].pop() }}", "{{ '{}'.format() }}"]
)
def test_any_failure_inside_a_template_is_told_with_its_folder(folder: Path, template: str) -> None:
    with pytest.raises(ValueError, match=f"{folder}: the chat template failed"):
        with_template(folder, template).render([])


def test_without_a_template_rendering_is_refused(folder: Path) -> None:
    tokenizer = with_template(folder, None)
    assert tokenizer.chat_template is None
    with pytest.raises(ValueError, match="has no chat template"):
        tokenizer.render([{"role": "user", "content": "Hi"}])


def test_a_template_in_a_file_of_its_own_wins(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("ü{{ messages[0].content }}", encoding="utf-8")
    assert Tokenizer(folder).render([{"role": "user", "content": "Hi"}]) == "üHi"


NAMED = [
    {"name": "default", "template": "{{ messages[0].content }}"},
    {"name": "tool_use", "template": "tools {{ tools | length }}"},
    {"name": "rag", "template": "{{ documents[0].text }}"},
]


def test_of_several_named_templates_the_one_that_is_asked_for_is_taken(folder: Path) -> None:
    tokenizer = with_template(folder, NAMED)
    hi = [{"role": "user", "content": "Hi"}]
    assert tokenizer.render(hi) == "Hi"
    assert tokenizer.render(hi, tools=[{"name": "f"}]) == "tools 1"
    assert tokenizer.render(hi, tools=[{"name": "f"}], template="default") == "Hi"
    assert tokenizer.render(hi, template="rag", documents=[{"text": "D"}]) == "D"
    with pytest.raises(ValueError, match="no chat template named 'RAG'; there are: default, rag, tool_use"):
        tokenizer.render(hi, template="RAG")


def test_named_templates_are_read_as_transformers_writes_them(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    with_template(folder, NAMED)
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "additional_chat_templates" / "rag.jinja").is_file()
    assert Tokenizer(tmp_path / "saved").templates == {part["name"]: part["template"] for part in NAMED}


def test_named_templates_without_a_default_are_no_chat_template(folder: Path) -> None:
    tokenizer = with_template(folder, NAMED[2:])
    assert tokenizer.chat_template is None
    with pytest.raises(ValueError, match="has no chat template; there are: rag"):
        tokenizer.render([{"role": "user", "content": "Hi"}])


# -- the end of an answer ----------------------------------------------------------------------------------


def test_the_first_end_token_is_the_tokenizers_own(folder: Path) -> None:
    edit(folder / "generation_config.json", eos_token_id=[0, 2, 5])
    edit(folder / "config.json", eos_token_id=7)
    assert Tokenizer(folder).eos_ids == [2, 0, 5, 7]


def test_an_end_token_may_be_written_as_an_object(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", eos_token={"content": "<|endoftext|>", "special": True})
    assert Tokenizer(folder).eos_ids[0] == 0


def test_the_models_config_can_say_what_ends_an_answer(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", eos_token=None)
    (folder / "generation_config.json").unlink()
    edit(folder / "config.json", eos_token_id=5)
    assert Tokenizer(folder).eos_ids == [5]


# -- what is refused ---------------------------------------------------------------------------------------


def test_a_tokenizer_that_never_ends_is_refused(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", eos_token=None)
    (folder / "generation_config.json").unlink()
    edit(folder / "config.json", eos_token_id=None)
    with pytest.raises(ValueError, match=f"{folder}.*no eos_token"):
        Tokenizer(folder)


def test_an_end_token_outside_the_vocabulary_is_refused(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", eos_token="<end>")
    with pytest.raises(ValueError, match="tokenizer_config.json: eos_token '<end>' is not in the vocabulary"):
        Tokenizer(folder)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", None, "not found"),
        ("tokenizer.json", b"{}", "not a tokenizer"),
        ("tokenizer.json", b'{"version": "1.0", ', "not a tokenizer"),
        ("tokenizer.json", b"\xff\xfe", "not a tokenizer"),
        ("tokenizer_config.json", b'{"eos_token": ', "not valid JSON"),
        ("tokenizer_config.json", b"\xff\xfe", "not valid JSON"),
        ("tokenizer_config.json", b"[]", "expected a JSON object, got list"),
        ("tokenizer_config.json", b'{"eos_token": 2}', "eos_token must be text, got int"),
        ("tokenizer_config.json", b'{"eos_token": {"content": []}}', "eos_token must be text, got list"),
        ("tokenizer_config.json", b'{"chat_template": 3}', "chat_template must be text, or .*, got int"),
        ("tokenizer_config.json", b'{"chat_template": ["x"]}', "chat_template is a list, but not of names"),
        ("tokenizer_config.json", b'{"chat_template": {"default": 1}}', "chat_template must be text"),
        (
            "tokenizer_config.json",
            b'{"added_tokens_decoder": []}',
            "added_tokens_decoder must hold an object",
        ),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"x": {}}}', "added_tokens_decoder must hold"),
        ("tokenizer_config.json", b'{"extra_special_tokens": "x"}', "extra_special_tokens must be a list"),
        ("generation_config.json", b"null", "expected a JSON object, got NoneType"),
        ("generation_config.json", b'{"eos_token_id": "2"}', "eos_token_id must be a token id or a list"),
        ("chat_template.jinja", b"\xff", "not UTF-8"),
        ("added_tokens.json", b'{"<x>": "1"}', "expected a token id for each token"),
        ("special_tokens_map.json", b"[]", "expected a JSON object, got list"),
    ],
    ids=str,
)
def test_a_damaged_file_is_named(folder: Path, name: str, content: bytes | None, message: str) -> None:
    (folder / name).unlink(missing_ok=True)
    if content is not None:
        if name == "tokenizer_config.json" and content.startswith(b"{") and content.endswith(b"}"):
            content = json.dumps({"eos_token": "<|im_end|>"} | json.loads(content)).encode()
        (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{folder / name}: {message}"):
        Tokenizer(folder)


# -- SentencePiece -----------------------------------------------------------------------------------------

# Special tokens inside text, and no two spaces in a row: see below for those.
SPECIAL_TEXTS = [
    "",
    "Hello",
    "<s>Hello",
    "<s>[INST] Hi there [/INST] Hello </s><s>[INST] x [/INST]",
    "a<s>b</s>c <unk>d</s>",
    "<s></s>",
    "</s>\n<s>\tÜber 🙂 中文",
]


def llama_models() -> list[Any]:
    """The paths of real SentencePiece models on this machine, or what is missing."""
    data, found = os.environ.get("MINQLORA_DATA"), importlib.util.find_spec("mistral_common")
    folder = Path(found.submodule_search_locations[0]) / "data" if found else Path("nowhere")
    paths = [Path(data) / "llama2_tokenizer.model"] if data else []
    paths += sorted(folder.glob("*.model.v*"))
    reason = "neither MINQLORA_DATA is set nor mistral-common installed: no SentencePiece model"
    skip = pytest.mark.skip(reason=reason)
    return [pytest.param(path, id=path.name) for path in paths] or [pytest.param(None, marks=skip)]


def piece_folder(folder: Path, model: Path | bytes, **config: Any) -> Path:
    """Write a folder that has a tokenizer only as tokenizer.model."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model if isinstance(model, bytes) else model.read_bytes())
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True} | named | config
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def trained_model(**options: Any) -> bytes:
    """Train a model of 300 pieces or so."""
    text = "the cat sat on the mat, a dog ran and an egg broke; we saw it all 12 times"
    sentences = [text[i % 50 : 20 + i % 60] for i in range(200)]
    writer = io.BytesIO()
    options = dict(model_type="bpe", vocab_size=330, byte_fallback=True, character_coverage=1.0) | options
    SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_writer=writer, minloglevel=2, **options
    )
    return writer.getvalue()


def gemma_model(**options: Any) -> bytes:
    """No space before a text, as Gemma's; tokens of its own; the ids of the special ones in another order."""
    ids = dict(pad_id=0, eos_id=1, bos_id=2, unk_id=3, eos_piece="<eos>", bos_piece="<bos>")
    rules = dict(add_dummy_prefix=False, remove_extra_whitespaces=False, normalization_rule_name="identity")
    own = dict(user_defined_symbols=["<start_of_turn>", "\n\n", "▁▁"])
    return trained_model(**(ids | rules | own | options))


@pytest.fixture(scope="session")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    named = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    folder = tmp_path_factory.mktemp("gemma")
    return piece_folder(folder, gemma_model(), tokenizer_class="GemmaTokenizer", **named)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small, but with the rules of Llama's: a space before a text, and bytes for what has no piece."""
    rules = dict(remove_extra_whitespaces=False, normalization_rule_name="identity")
    return piece_folder(tmp_path_factory.mktemp("llama"), trained_model(**rules))


@pytest.mark.parametrize("model", llama_models())
@pytest.mark.parametrize("legacy", [False, True])
def test_ids_of_a_real_model_are_sentencepieces_own(model: Path, legacy: bool, tmp_path: Path) -> None:
    ours = Tokenizer(piece_folder(tmp_path, model, legacy=legacy))
    theirs = SentencePieceProcessor(model_file=str(model))
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text)
        assert ours.encode(text, add_special_tokens=True) == [theirs.bos_id(), *theirs.encode(text)]
        assert ours.decode(ours.encode(text)) == text.replace("▁", " ")
    assert ours.vocab_size == theirs.get_piece_size()
    assert (ours.bos_id, ours.eos_ids) == (theirs.bos_id(), [theirs.eos_id()])


@pytest.mark.parametrize("model", llama_models())
@pytest.mark.parametrize("legacy", [False, True])
def test_special_tokens_inside_text_are_those_of_transformers(
    model: Path, legacy: bool, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    ours = Tokenizer(piece_folder(tmp_path, model, legacy=legacy))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in SPECIAL_TEXTS:
        if legacy:  # there transformers drops a space that stands behind a special token
            text = text.replace("> ", ">").replace("] ", "]")
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False)
        for skip in (False, True):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(" \nthe▁<"))))
def test_ids_of_any_text_are_sentencepieces_own_and_lose_nothing(llama: Path, gemma: Path, text: str) -> None:
    for folder in (llama, gemma):
        ours, theirs = pieces(folder)
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(ours.encode(text), skip_special_tokens=False) == text.replace("▁", " ")


LOADED: dict[Path, tuple[Tokenizer, SentencePieceProcessor]] = {}


def pieces(folder: Path) -> tuple[Tokenizer, SentencePieceProcessor]:
    """A folder's tokenizer and its oracle, loaded once."""
    if folder not in LOADED:
        theirs = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        LOADED[folder] = Tokenizer(folder), theirs
    return LOADED[folder]


@settings(max_examples=100, deadline=None)
@given(ids=st.lists(st.integers(0, 329), max_size=20), skip=st.booleans())
def test_any_ids_are_decoded_as_transformers_decodes_them(llama: Path, ids: list[int], skip: bool) -> None:
    ours, _ = pieces(llama)
    theirs = oracle(llama)
    assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)


ORACLES: dict[Path, Any] = {}


def oracle(folder: Path) -> Any:
    """A folder's tokenizer as transformers loads it, once."""
    from transformers import AutoTokenizer

    if folder not in ORACLES:
        ORACLES[folder] = AutoTokenizer.from_pretrained(folder)
    return ORACLES[folder]


def test_a_model_of_gemmas_kind_puts_no_space_before_a_text(gemma: Path) -> None:
    tokenizer, _ = pieces(gemma)
    assert tokenizer.encode("the") == tokenizer.encode("the", continues=True)
    assert tokenizer.encode("<bos><start_of_turn>the")[:2] == [2, tokenizer.token_id("<start_of_turn>")]
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.pad_id) == (2, [1], 0)
    assert tokenizer.decode(tokenizer.encode("  the cat")) == "  the cat"


def test_what_has_neither_piece_nor_bytes_is_unknown(tmp_path: Path) -> None:
    tokenizer = Tokenizer(piece_folder(tmp_path, trained_model(byte_fallback=False, vocab_size=60)))
    assert tokenizer.encode("the 🙂")[-1] == 0 and tokenizer.decode([0]) == ""
    assert tokenizer.special_tokens["unk_token"] == "<unk>"


def test_without_a_config_the_model_says_what_begins_and_ends_a_text(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(gemma_model())
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.special_tokens["bos_token"] == "<bos>" and tokenizer.eos_ids == [1]
    assert tokenizer.encode("the", add_special_tokens=True)[0] == 2


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("eos", [False, True])
def test_the_config_decides_what_is_put_around_a_text(
    llama: Path, tmp_path: Path, bos: bool, eos: bool
) -> None:
    model = (llama / "tokenizer.model").read_bytes()
    folder = piece_folder(tmp_path, model, add_bos_token=bos, add_eos_token=eos)
    assert Tokenizer(folder).encode("the cat", add_special_tokens=True) == oracle(folder).encode("the cat")


def test_where_both_files_are_there_tokenizer_json_is_read(llama: Path, folder: Path) -> None:
    shutil.copy(llama / "tokenizer.model", folder)
    assert Tokenizer(folder).encode("the") == oracle(folder).encode("the") != pieces(llama)[0].encode("the")
    (folder / "tokenizer.model").write_bytes(b"no model at all")
    assert Tokenizer(folder).encode("the") == oracle(folder).encode("the")


@pytest.mark.parametrize("content", [b"", b"IQ== 0\nIg== 1\n", None], ids=["empty", "tiktoken", "cut"])
def test_what_is_no_sentencepiece_model_is_refused(
    llama: Path, tmp_path: Path, content: bytes | None, capfd: pytest.CaptureFixture[str]
) -> None:
    content = (llama / "tokenizer.model").read_bytes()[:-7] if content is None else content
    folder = piece_folder(tmp_path, content)
    with pytest.raises(ValueError, match=f"{folder}/tokenizer.model: not a SentencePiece model, or damaged"):
        Tokenizer(folder)
    assert capfd.readouterr().err == ""


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_a_damaged_model_is_read_or_refused(
    llama: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    model = bytearray((llama / "tokenizer.model").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        model[data.draw(st.integers(0, len(model) - 1))] = data.draw(st.integers(0, 255))
    folder = piece_folder(tmp_path_factory.mktemp("damaged"), bytes(model))
    try:
        Tokenizer(folder).encode("the cat 🙂")
    except ValueError as error:
        assert str(folder) in str(error) and "\n" not in str(error)


@pytest.mark.parametrize("value", [1, "true"])
def test_a_flag_that_is_no_flag_is_refused(llama: Path, tmp_path: Path, value: Any) -> None:
    for name in ("legacy", "add_bos_token", "add_eos_token"):
        folder = piece_folder(tmp_path, llama / "tokenizer.model", **{name: value})
        with pytest.raises(ValueError, match=f"tokenizer_config.json: {name} must be true or false, got"):
            Tokenizer(folder)


# -- added tokens ------------------------------------------------------------------------------------------


def added(content: str, **fields: bool) -> dict[str, Any]:
    names = ("lstrip", "normalized", "rstrip", "single_word", "special")
    return {"content": content} | {name: fields.get(name, False) for name in names}


ADDED_TEXTS = ["<x>the<xx> cat<y>\n the<y>", "word wordy word", "<z>the"]


@pytest.mark.parametrize("where", ["decoder", "files", "names"])
@pytest.mark.parametrize("kind", ["llama", "json"])
def test_added_tokens_are_found_in_text_as_transformers_finds_them(
    request: pytest.FixtureRequest, tmp_path: Path, folder: Path, where: str, kind: str
) -> None:
    if kind == "llama":
        folder = piece_folder(tmp_path / "pieces", request.getfixturevalue("llama") / "tokenizer.model")
    n = Tokenizer(folder).vocab_size
    if where == "decoder":
        tokens = [
            added("<x>", special=True),
            added("<xx>"),
            added("<y>", special=True),
            added("<strip>", lstrip=True, rstrip=True),
            added("word", single_word=True),
        ]
        decoder = {str(n + i): token for i, token in enumerate(tokens)}
        edit(folder / "tokenizer_config.json", added_tokens_decoder=decoder)
    if where == "files":
        (folder / "added_tokens.json").write_text(json.dumps({"<x>": n, "<xx>": n + 1, "<z>": n + 2}))
        (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": added("<z>")}))
    if where == "names":
        edit(folder / "tokenizer_config.json", additional_special_tokens=["<x>", "<y>"])
    ours, theirs = Tokenizer(folder), oracle(folder)
    assert ours.vocab_size == len(theirs) > n
    for text in [*ADDED_TEXTS, *(["the  <strip>  cat", " <strip>"] if where == "decoder" else [])]:
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False)
        for skip in (False, True):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)


def test_an_added_token_may_take_the_place_of_a_piece(llama: Path, tmp_path: Path) -> None:
    decoder = {"320": added("<|im_start|>", special=True)}
    folder = piece_folder(tmp_path, llama / "tokenizer.model", added_tokens_decoder=decoder)
    tokenizer = Tokenizer(folder)
    assert tokenizer.encode("<|im_start|>", continues=True) == [320]
    assert tokenizer.token(320) == "<|im_start|>" and tokenizer.vocab_size == 330


def test_an_added_token_out_of_its_place_is_refused(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", added_tokens_decoder={"900": added("<x>")})
    with pytest.raises(ValueError, match=f"{folder}: the added token '<x>' should have the id 900, but"):
        Tokenizer(folder)


@pytest.mark.parametrize("kind", ["llama", "json", "decoder"])
def test_new_tokens_are_saved_so_that_transformers_gives_them_the_same_ids(
    request: pytest.FixtureRequest, folder: Path, tmp_path: Path, kind: str
) -> None:
    if kind == "llama":
        folder = piece_folder(tmp_path / "pieces", request.getfixturevalue("llama") / "tokenizer.model")
        edit(folder / "tokenizer_config.json", additional_special_tokens=["<x>"])
    if kind == "decoder":
        decoder = {str(i): added(text, special=True) for i, text in enumerate(SPECIALS)}
        edit(folder / "tokenizer_config.json", added_tokens_decoder=decoder)
    tokenizer = Tokenizer(folder)
    n, known = tokenizer.vocab_size, tokenizer.token(2)
    assert known and tokenizer.add_tokens(["<new>", known, "ünïque token", "<new>"]) == [n, 2, n + 1, n]
    assert tokenizer.vocab_size == n + 2
    tokenizer.save(tmp_path / "saved")
    text = "say <new>, ünïque token and <x>"
    ids = tokenizer.encode(text)
    assert n in ids and n + 1 in ids
    again = Tokenizer(tmp_path / "saved")
    assert again.encode(text) == oracle(tmp_path / "saved").encode(text, add_special_tokens=False) == ids
    assert again.decode(ids) == tokenizer.decode(ids) == oracle(tmp_path / "saved").decode(ids, True)
    assert "<new>" in again.decode(ids)  # it is text, and no special token


@pytest.mark.parametrize("token", ["", " ", None, 3])
def test_what_is_no_text_is_no_new_token(folder: Path, token: Any) -> None:
    with pytest.raises(ValueError, match="a token to add must be text"):
        Tokenizer(folder).add_tokens([token])


def test_saving_copies_what_is_there_byte_for_byte(folder: Path, tmp_path: Path) -> None:
    (folder / "chat_template.jinja").write_text("x")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("y")
    (folder / "model.safetensors").write_text("not a tokenizer's")
    Tokenizer(folder).save(tmp_path / "saved")
    names = ["additional_chat_templates/rag.jinja", "chat_template.jinja", "generation_config.json"]
    names += ["tokenizer.json", "tokenizer_config.json"]
    saved = tmp_path / "saved"
    files = [str(path.relative_to(saved)) for path in saved.rglob("*") if path.is_file()]
    assert sorted(files) == names
    for name in names:
        assert (saved / name).read_bytes() == (folder / name).read_bytes()


# -- one beginning, and no more ----------------------------------------------------------------------------


def test_a_text_that_has_its_beginning_gets_no_second_one(llama: Path, gemma: Path) -> None:
    for folder, bos in ((llama, "<s>"), (gemma, "<bos>")):
        tokenizer, _ = pieces(folder)
        ids = tokenizer.encode(bos + "the cat", add_special_tokens=True)
        assert ids.count(tokenizer.bos_id) == 1 and ids == tokenizer.encode(bos + "the cat")


def test_of_tokenizer_json_too_there_is_one_beginning(folder: Path) -> None:
    begin = {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    single = [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, text]
    rule = {"type": "TemplateProcessing", "single": single, "pair": [text, text], "special_tokens": begin}
    edit(folder / "tokenizer.json", post_processor=rule)
    tokenizer = Tokenizer(folder)
    for text in ("the", "<|im_start|>the"):
        ids = tokenizer.encode(text, add_special_tokens=True)
        assert ids == [1, *tokenizer.encode("the")]
    assert tokenizer.encode("", add_special_tokens=True) == [1]


@pytest.mark.parametrize("kind", ["llama", "json"])
def test_text_that_continues_has_the_tokens_it_has_inside_a_whole(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str
) -> None:
    folder = request.getfixturevalue("llama")
    if kind == "json":  # the same tokenizer, as transformers converts it
        oracle(folder).save_pretrained(tmp_path / "saved")
        (tmp_path / "saved" / "tokenizer.model").unlink(missing_ok=True)
        folder = tmp_path / "saved"
    tokenizer = Tokenizer(folder)
    whole = tokenizer.encode("<s>[INST] the cat [/INST] sat on</s>")
    start, end = "<s>[INST] the cat [/INST]", " sat on</s>"
    assert tokenizer.encode(start) + tokenizer.encode(end, continues=True) == whole
    if kind == "llama":  # converted, it drops the space that is in the text
        assert tokenizer.encode(start) + tokenizer.encode(end) != whole
    assert tokenizer.encode("the", continues=True) != tokenizer.encode("the")
    assert tokenizer.encode(" the", continues=True) == tokenizer.encode("the")
    assert tokenizer.encode("", continues=True) == []
    texts, continues = ["the", "the", "", "\n\n the", " the", start], [True, False, True, True, False, False]
    alone = [
        tokenizer.encode(text, continues=goes_on) for text, goes_on in zip(texts, continues, strict=True)
    ]
    assert tokenizer.encode_all(texts, continues) == alone and alone[0] != alone[1]


# -- the templates of real models, in their manner ---------------------------------------------------------

LLAMA2 = """{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}
{% set rest = messages[1:] %}{% else %}{% set system = false %}{% set rest = messages %}{% endif %}
{% for message in rest %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('Roles must alternate: user, assistant, user, ...') }}
    {% endif %}
    {% if loop.index0 == 0 and system != false %}
        {% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + message['content'] %}
    {% else %}
        {% set content = message['content'] %}
    {% endif %}
    {% if message['role'] == 'user' %}
{{- bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
    {%- elif message['role'] == 'assistant' %}
{{- ' ' + content.strip() + ' ' + eos_token }}
    {%- endif %}
{%- endfor %}"""

LLAMA3 = """{{- bos_token }}
{%- if date_string is not defined %}{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}
{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content | trim %}{%- set messages = messages[1:] %}
{%- else %}{%- set system = '' %}{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\n\nToday: ' + date_string + '\n\n' }}
{%- if tools is not none and tools %}
    {%- for tool in tools %}{{- tool | tojson(indent=4) }}{{- '\n\n' }}{%- endfor %}
{%- endif %}
{{- system + '<|eot_id|>' }}
{%- for message in messages %}
    {%- if 'tool_calls' in message %}
        {%- if not message.tool_calls | length == 1 %}
            {{- raise_exception('One tool call at a time') }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "' ~ call.name ~ '", ' }}
        {{- '"parameters": ' ~ (call.arguments | tojson) ~ '}<|eot_id|>' }}
    {%- elif message.role in ('tool', 'ipython') %}
        {{- '<|start_header_id|>ipython<|end_header_id|>\n\n' }}
        {%- if message.content is mapping or message.content is iterable and message.content is not string %}
            {{- message.content | tojson }}
        {%- else %}{{- message.content }}{%- endif %}
        {{- '<|eot_id|>' }}
    {%- else %}
        {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' }}
        {{- message.content | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"""

MISTRAL = """{{- bos_token }}
{%- set users = messages | selectattr('role', 'equalto', 'user') | list %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {%- if tools is not none and message == users[-1] %}
            {{- '[AVAILABLE_TOOLS] [' }}
            {%- for tool in tools %}
                {{- '{"type": "function", "function": {' }}
                {%- for key, value in tool.function.items() if key != 'return' %}
                    {{- '"' + key + '": ' + (('"' + value + '"') if value is string else value | tojson) }}
                    {%- if not loop.last %}{{- ', ' }}{%- endif %}
                {%- endfor %}
                {{- '}}' }}{%- if not loop.last %}{{- ', ' }}{%- else %}{{- ']' }}{%- endif %}
            {%- endfor %}
            {{- '[/AVAILABLE_TOOLS]' }}
        {%- endif %}
        {{- '[INST] ' + message.content + '[/INST]' }}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {{- '[TOOL_CALLS]' + (message.tool_calls | map(attribute='function') | list | tojson) + eos_token }}
    {%- elif message.role == 'assistant' %}
        {%- generation %}{{- ' ' + message.content | trim + eos_token }}{%- endgeneration %}
    {%- elif message.role == 'tool' %}
        {{- '[TOOL_RESULTS] ' + {'content': message.content | string} | tojson + '[/TOOL_RESULTS]' }}
    {%- endif %}
{%- endfor %}"""

GEMMA = """{{ bos_token }}{% set first = '' %}{% if messages[0]['role'] == 'system' -%}
{%- set first = messages[0]['content'] + '\n\n' -%}{%- set messages = messages[1:] -%}{%- endif -%}
{%- for message in messages -%}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\n' + (first if loop.first else '') }}
    {%- if message['content'] is string -%}{{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'image' -%}{{ '<start_of_image>' }}
            {%- elif item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"""

CHATML = """{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nHelp.<|im_end|>\n' }}{% endif %}
{% for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' + (message.content if message.content else '') -}}
    {{- '<|im_end|>' + '\n' -}}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

QWEN3 = """{%- if tools %}
    {{- '<|im_start|>system\n# Tools\n<tools>' }}
    {%- for tool in tools %}{{- '\n' ~ tool | tojson }}{%- endfor %}{{- '\n</tools><|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(searching=true, last=messages | length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages | length - 1) - loop.index0 %}
    {%- if ns.searching and message.role == 'user' and message.content is string and
           not (message.content.startswith('<tool_response>')) %}
        {%- set ns.searching = false %}{%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- macro thought(text) -%}<think>\n{{ text.strip('\n') }}\n</think>\n\n{%- endmacro %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == 'assistant' %}
        {%- set reasoning = '' %}
        {%- if message.reasoning_content is string %}{%- set reasoning = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\n' }}
        {%- if loop.index0 > ns.last and (loop.last or reasoning) %}{{- thought(reasoning) }}{%- endif %}
        {{- content }}
        {%- for call in message.tool_calls or [] %}
            {%- if call.function %}{%- set call = call.function %}{%- endif %}
            {{- '\n<tool_call>\n{"name": "' ~ call.name ~ '", "arguments": ' }}
            {{- call.arguments if call.arguments is string else call.arguments | tojson }}
            {{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\n<tool_response>\n' ~ content ~ '\n</tool_response>' }}
        {%- if loop.last or loop.nextitem.role != 'tool' %}{{- '<|im_end|>\n' }}{%- endif %}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- thought('') }}{%- endif %}
{%- endif %}"""

PHI = """{% for message in messages %}
{% if message['role'] == 'system' and 'tools' in message and message['tools'] is not none %}
{{ '<|system|>' + message['content'] + '<|tool|>' + message['tools'] + '<|/tool|><|end|>' }}
{% else %}{{ '<|' ~ message.role ~ '|>' ~ message.content ~ '<|end|>' }}
{% endif %}{% endfor %}
{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"""

MODELS = dict(llama2=LLAMA2, llama3=LLAMA3, mistral=MISTRAL, gemma=GEMMA, chatml=CHATML, qwen3=QWEN3, phi=PHI)
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": 'The weather in <a> city, für "heute".',
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    },
    {"type": "function", "function": {"name": "clock", "parameters": {}}},
]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich", "days": 2}}}
TALKS: dict[str, list[dict[str, Any]]] = {
    "one": [{"role": "user", "content": " Hi\n"}],
    "turns": [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "<think>\neasy\n</think>\n\n2"},
        {"role": "user", "content": "你好 🙂 <b>&amp;</b> {{ x }}"},
        {"role": "assistant", "content": "ok", "reasoning_content": "hm"},
    ],
    "system": [
        {"role": "system", "content": "Be brief. "},
        {"role": "user", "content": "the cat"},
        {"role": "assistant", "content": "sat on"},
        {"role": "user", "content": "the mat"},
    ],
    "tools": [
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "name": "weather", "content": "sun ☀"},
        {"role": "tool", "name": "clock", "content": "12"},
        {"role": "assistant", "content": "No."},
    ],
}


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("model", MODELS)
def test_templates_in_the_manner_of_real_models_write_what_transformers_writes(
    folder: Path, model: str, talk: str, prompt: bool
) -> None:
    from transformers import AutoTokenizer

    ours = with_template(folder, MODELS[model])
    theirs = AutoTokenizer.from_pretrained(folder)
    variables = dict(enable_thinking=False, date_string="26 Jul 2024")
    for tools in (None, TOOLS):
        options = dict(tools=tools, add_generation_prompt=prompt)
        try:
            expected = theirs.apply_chat_template(TALKS[talk], tokenize=False, **options, **variables)
        except Exception as refusal:
            with pytest.raises(ValueError, match="the chat template failed") as ours_too:
                ours.render(TALKS[talk], **options, **variables)
            assert str(refusal).split("\n")[0] in str(ours_too.value)
            continue
        assert ours.render(TALKS[talk], **options, **variables) == expected
        ids = theirs.apply_chat_template(TALKS[talk], return_dict=False, **options, **variables)
        text = ours.render(TALKS[talk], **options, **variables)
        assert ours.encode(text) == ids


@pytest.mark.parametrize("model", ["llama2", "mistral", "gemma", "chatml"])
@pytest.mark.parametrize("kind", ["llama", "gemma", "json"])
def test_a_conversation_begins_as_often_as_transformers_has_it_begin(
    request: pytest.FixtureRequest, folder: Path, tmp_path: Path, model: str, kind: str
) -> None:
    if kind != "json":
        folder = shutil.copytree(request.getfixturevalue(kind), tmp_path / kind)
    ours = with_template(folder, MODELS[model])
    theirs = oracle(folder)
    for talk in ("one", "turns", "system"):
        ids = theirs.apply_chat_template(TALKS[talk], add_generation_prompt=True, return_dict=False)
        text = ours.render(TALKS[talk], add_generation_prompt=True)
        assert ours.encode(text).count(ours.bos_id) == ids.count(theirs.bos_token_id)
        assert encode_prompt(TALKS[talk], ours).count(ours.bos_id) == ids.count(theirs.bos_token_id)


def test_a_conversation_is_learned_in_the_tokens_that_transformers_makes_of_it(
    llama: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(llama, tmp_path / "llama")
    ours = with_template(folder, LLAMA2)
    talk = [*TALKS["system"], {"role": "assistant", "content": "it ran"}]
    ids = oracle(folder).apply_chat_template(talk, return_dict=False)
    example = encode(talk, ours)
    assert example.input_ids == ids
    assert encode_prompt(talk[:-1], ours) == ids[: -len(ours.encode(" it ran </s>", continues=True))]
    assert example.labels.count(2) == 2  # both answers are learned, each with its end


def test_a_base_model_gets_the_plain_prompt_and_the_completion(llama: Path) -> None:
    tokenizer, _ = pieces(llama)
    pair = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": " sat"}]
    prompt = encode_prompt(pair[:1], tokenizer)
    assert prompt == [1, *tokenizer.encode("the cat")]
    assert encode(pair, tokenizer).input_ids == [*prompt, *tokenizer.encode("sat"), 2]
    with pytest.raises(ValueError, match="no chat template: only a prompt and its completion"):
        encode_prompt([{"role": "system", "content": "x"}, *pair[:1]], tokenizer)
