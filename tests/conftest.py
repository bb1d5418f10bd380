"""What several files of tests share: the demo's real model and data, and small models made on the spot.

Whatever loads slowly is loaded once a session, and nobody changes it: a test that adds adapters or trains
loads a model of its own.
"""

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: an oracle that asks a server is none
# Before a script is imported, whose defaults lie in the cache: what tests leave there goes with them.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="minqlora-tests-")

import pytest
import torch

import demo_assets

ROOT = Path(__file__).resolve().parents[1]

# A row of SmolLM2's own format; the system message only where the conversation brings one.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def pytest_configure(config: pytest.Config) -> None:
    """Leave out the news that other libraries have about themselves."""
    for module in ("transformers", "peft", "torch.jit"):
        config.addinivalue_line("filterwarnings", rf"ignore:::{module}")


def pytest_unconfigure(config: pytest.Config) -> None:
    """Delete the cache of the tests."""
    shutil.rmtree(os.environ["XDG_CACHE_HOME"], ignore_errors=True)


# -- the demo's real parts, and data that a machine may not have -------------------------------------------


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The folder of SmolLM2-135M-Instruct; skips with the reason where it cannot be had."""
    try:
        return demo_assets.fetch_model(ROOT / "assets")
    except ValueError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def docstrings() -> tuple[Path, Path]:
    """train.jsonl and heldout.jsonl of the demo."""
    return demo_assets.build_dataset(ROOT / "assets")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with GSM8K and the golden vectors; skips with the reason where it is not given."""
    folder = os.environ.get("MINQLORA_DATA")
    if not folder:
        pytest.skip("MINQLORA_DATA is not set: it names the folder with gsm8k_train.jsonl and others")
    return Path(folder)


@pytest.fixture(scope="session")
def demo_fp32(demo_model: Path) -> Any:
    """The demo model, not quantized, in float32."""
    from minqlora import load_model

    return load_model(demo_model, quant_type=None, dtype=torch.float32)


@pytest.fixture(scope="session")
def demo_theirs(demo_model: Path) -> Any:
    """The demo model as transformers loads it in float32: the oracle."""
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(demo_model, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def demo_text(demo_model: Path, docstrings: tuple[Path, Path]) -> torch.Tensor:
    """Token ids (1, 300) of real text: English and Python, as the demo trains on it."""
    from minqlora.tokenizer import Tokenizer

    rows = [json.loads(line) for line in docstrings[1].read_text(encoding="utf-8").splitlines()[:8]]
    text = "\n".join(row["prompt"] + "\n" + row["completion"] for row in rows)
    ids = Tokenizer(demo_model).encode(text)
    assert len(ids) >= 300
    return torch.tensor([ids[:300]])


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """A function that gives a folder on a disk of so many bytes; skips where none can be mounted."""
    mounted = []

    def mount(size: int) -> Path:
        folder = tmp_path / f"disk-{len(mounted)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("a disk of a few bytes is mounted, which this user or system may not")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


# -- small models ------------------------------------------------------------------------------------------


def write_tokenizer(folder: Path, chat_template: str | None = CHAT_TEMPLATE) -> int:
    """Write a byte-level tokenizer of 256 bytes, three special tokens and a few merges; return its size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    # Merges that run over the ends of words and answers, so that what is cut where shows in the tokens.
    pairs = [("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("i", "n"), ("Ċ", "Ċ"), ("o", "n"), ("e", "r"), ("2", "2")]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = SPECIALS + letters + ["".join(pair) for pair in pairs]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIALS)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
    }
    if chat_template is not None:
        config["chat_template"] = chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return len(tokens)


def begin_texts(folder: Path) -> None:
    """Let the tokenizer of a folder put <|im_start|> before a text, as Llama's puts its beginning of one."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}},
    }
    path.write_text(json.dumps(content))


def write_llama(folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """Write a small random Llama that transformers made; `changes` go into its config. Returns the folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = dict(vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False)
    others = dict(max_position_embeddings=512, bos_token_id=1, eos_token_id=2)
    generator = torch.Generator().manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**(shape | heads | others | changes)))
    for parameter in model.parameters():
        # Everything random: biases of 0 and norms of 1, as transformers leaves them, hide a forgotten one.
        noise = torch.randn(parameter.shape, generator=generator)
        scale = 0.15 if parameter.dim() == 2 else 0.3
        parameter.data = scale * noise + (1.0 if parameter.dim() == 1 else 0.0)
    folder.mkdir(parents=True, exist_ok=True)
    model.to(dtype).save_pretrained(folder)
    return folder


@pytest.fixture
def make_llama(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a small Llama, without a tokenizer, with the changes it is given."""
    return lambda **changes: write_llama(tmp_path / "llama", **changes)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llama of two layers, in bfloat16, and a tokenizer with a chat template.

    Session-wide: a test that changes it copies it first.
    """
    folder = tmp_path_factory.mktemp("models") / "tiny"
    folder.mkdir()
    size = write_tokenizer(folder)
    return write_llama(folder, vocab_size=size, dtype=torch.bfloat16)
