"""Text becomes the tokens that transformers makes of it; a chat template writes text and does no more."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
        "{{ messages.__class__.__base__ }}",
        "{{ messages[0].__init__.__globals__ }}",
        "{{ raise_exception.__globals__['__builtins__'] }}",
        "{{ cycler.__init__.__globals__.os.popen('true').read() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'system'}) }}",
        "{{ ('{0.__class__.__mro__}').format(messages) }}",
        pytest.param("{% for i in range(999999) %}{% endfor %}"),
    ],
)
def test_the_sandbox_stops_what_a_template_has_no_business_with(folder: Path, template: str) -> None:
    tokenizer = with_template(folder, template)
    with pytest.raises(ValueError, match="the chat template failed: ") as refusal:
        tokenizer.render([{"role": "user", "content": "Hi"}])
    assert str(folder) in str(refusal.value)


def test_a_template_may_reject_a_conversation_in_its_own_words(folder: Path) -> None:
    tokenizer = with_template(folder, "{{ raise_exception('Roles must alternate!') }}")
    with pytest.raises(ValueError, match="the chat template failed: Roles must alternate!"):
        tokenizer.render([])


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}", "Unexpected end of template"),
        ("{{ nothing.content }}", "'nothing' is undefined"),
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


def test_of_several_named_templates_the_default_is_taken(folder: Path) -> None:
    named = [{"name": "rag", "template": "rag"}, {"name": "default", "template": "{{ messages[0].content }}"}]
    assert with_template(folder, named).render([{"role": "user", "content": "Hi"}]) == "Hi"


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
        ("generation_config.json", b"null", "expected a JSON object, got NoneType"),
    ],
    ids=str,
)
def test_a_damaged_file_is_named(folder: Path, name: str, content: bytes | None, message: str) -> None:
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{folder / name}: {message}"):
        Tokenizer(folder)
