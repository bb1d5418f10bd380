"""scripts/quantize.py: a 4-bit folder that loads elsewhere too, and a true report of what it lost."""

import json
import math
import os
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from conftest import CHAT_TEMPLATE, write_llama, write_tokenizer
from torch import Tensor

import finetune
import quantize
from minqlora import NF4Tensor, load_model
from minqlora.checkpoint import Quantization
from minqlora.files import Checkpoint
from minqlora.model import Block
from minqlora.run import StopRequest
from minqlora.tokenizer import Tokenizer
from quantize import Config, perplexities, quantize_checkpoint, read_windows, shard_bytes

ROOT = Path(__file__).resolve().parents[1]
TEXT = "The cat sat on the mat, and the mat was in the sun; then the rain came. " * 20

# Rows of whole blocks: on some CPUs bitsandbytes decodes no others rightly.
WIDE = dict(hidden_size=256, intermediate_size=512)

VARIANTS = {
    "nf4": Quantization(),
    "fp4": Quantization("fp4"),
    "plain scales": Quantization(double_quant=False),
    "blocks of 128": Quantization(block_size=128),
    "fp4 in blocks of 256": Quantization("fp4", False, 256),
}


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def wide(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, torch.dtype]:
    """A model, its folder and dtype."""
    folder = tmp_path_factory.mktemp("wide") / "model"
    return write_llama(folder, dtype=request.param, **WIDE), request.param


def load_theirs(folder: Path, dtype: torch.dtype) -> Any:
    """Return what transformers makes of a folder, if it finds every key that it wants and no other."""
    pytest.importorskip("bitsandbytes")
    transformers = pytest.importorskip("transformers")
    model, found = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, output_loading_info=True
    )
    assert not any(found.values()), found
    # In eval mode bitsandbytes rounds the scales to bfloat16 on some CPUs.
    return model.train()


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        found = model(ids)
    return getattr(found, "logits", found)


# -- the copy ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantization", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("max_shard_bytes", [10**9, 200_000], ids=["one file", "shards"])
def test_the_copy_loads_in_transformers_and_gives_the_logits_of_both(
    wide, tmp_path: Path, quantization: Quantization, max_shard_bytes: int
) -> None:
    source, dtype = wide
    quantize_checkpoint(source, tmp_path / "out", quantization, max_shard_bytes=max_shard_bytes)
    assert (tmp_path / "out" / "model.safetensors").exists() is (max_shard_bytes == 10**9)
    theirs = load_theirs(tmp_path / "out", dtype)
    how = dict(
        quant_type=quantization.quant_type,
        double_quant=quantization.double_quant,
        block_size=quantization.block_size,
    )
    ours, again = load_model(source, dtype=dtype, **how), load_model(tmp_path / "out", dtype=dtype)
    count = 0
    for name, parameter in ours.named_parameters():
        if not isinstance(parameter, NF4Tensor):
            assert torch.equal(parameter, again.get_parameter(name)), name
            continue
        count += 1
        theirs_too, ours_too = theirs.get_parameter(name), again.get_parameter(name)
        assert theirs_too.quant_state.blocksize == parameter.format.block_size == quantization.block_size
        assert torch.equal(theirs_too.data.flatten(), parameter.packed)
        assert all(torch.equal(part, ours_too.parts[key]) for key, part in parameter.parts.items()), name
    assert count == 14
    ids = torch.arange(12).view(2, 6)
    expected = logits(theirs, ids)
    assert torch.equal(logits(ours, ids), expected) and torch.equal(logits(again, ids), expected)


def test_the_copy_of_tied_embeddings_has_no_head(tmp_path: Path) -> None:
    source = write_llama(tmp_path / "source", tie_word_embeddings=True, **WIDE)
    quantize_checkpoint(source, tmp_path / "out", Quantization())
    assert "lm_head.weight" not in Checkpoint(tmp_path / "out").names
    theirs, ours = (
        load_theirs(tmp_path / "out", torch.float32),
        load_model(tmp_path / "out", dtype=torch.float32),
    )
    ids = torch.arange(6)[None]
    assert torch.equal(logits(ours, ids), logits(theirs, ids))


def write_mixture(folder: Path, family: str) -> Path:
    """Write a small random mixture of experts with transformers."""
    transformers = pytest.importorskip("transformers")
    shape = dict(vocab_size=97, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
    shape |= dict(num_key_value_heads=2, max_position_embeddings=128, head_dim=64, tie_word_embeddings=False)
    torch.manual_seed(0)
    if family == "Mixtral":
        config = transformers.MixtralConfig(**shape, intermediate_size=128, num_local_experts=4)
    else:
        own = dict(moe_intermediate_size=64, num_experts=4, num_experts_per_tok=2, mlp_only_layers=[0])
        config = transformers.Qwen3MoeConfig(**shape, **own, intermediate_size=128)
    getattr(transformers, f"{family}ForCausalLM")(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", ["Mixtral", "Qwen3Moe"])
def test_the_copy_of_a_mixture_keeps_experts_in_16_bits_and_loads_there(family: str, tmp_path: Path) -> None:
    source = write_mixture(tmp_path / "source", family)
    quantize_checkpoint(source, tmp_path / "out", Quantization())
    held = Checkpoint(tmp_path / "out")
    quantized = {name for name in held.names if held.is_quantized(name)}
    assert quantized == {
        name for name in held.names if name.endswith("_proj.weight") and ".experts." not in name
    }
    assert any(".experts." in name for name in held.names) and len(quantized) == (
        8 if family == "Mixtral" else 11
    )
    theirs, ours = (
        load_theirs(tmp_path / "out", torch.float32),
        load_model(tmp_path / "out", dtype=torch.float32),
    )
    for name in quantized:
        assert torch.equal(theirs.get_parameter(name).data.flatten(), ours.get_parameter(name).packed), name
    ids = torch.arange(12).view(2, 6)
    # Experts are summed in another order there.
    torch.testing.assert_close(logits(ours, ids), logits(theirs, ids), rtol=1e-4, atol=1e-5)


def test_the_cache_keeps_experts_in_4_bits(tmp_path: Path) -> None:
    source = write_mixture(tmp_path / "source", "Mixtral")
    plain = load_model(source, dtype=torch.float32)
    for _ in range(2):
        kept = load_model(source, dtype=torch.float32, cache=tmp_path / "cache")
        expert = kept.get_parameter("model.layers.0.block_sparse_moe.experts.1.w1.weight")
        assert isinstance(expert, NF4Tensor)
        assert torch.equal(logits(kept, torch.arange(6)[None]), logits(plain, torch.arange(6)[None]))


def test_what_tells_how_to_use_a_model_comes_along(tiny_model: Path, tmp_path: Path) -> None:
    source = shutil.copytree(tiny_model, tmp_path / "source")
    along = {
        "chat_template.jinja": CHAT_TEMPLATE,
        "generation_config.json": "{}",
        "special_tokens_map.json": "{}",
        "LICENSE": "free",
        "additional_chat_templates/tools.jinja": "x",
    }
    for name, text in along.items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(text)
    for name in ("README.md", "training_args.bin", "optimizer.pt"):
        (source / name).write_text("not this")
    quantize_checkpoint(source, tmp_path / "out", Quantization())
    copied = {
        path.relative_to(tmp_path / "out").as_posix()
        for path in (tmp_path / "out").rglob("*")
        if path.is_file()
    }
    assert copied == {*along, "tokenizer.json", "tokenizer_config.json", "config.json", "model.safetensors"}
    assert all((tmp_path / "out" / name).read_text() == text for name, text in along.items())
    assert Tokenizer(tmp_path / "out").encode("the cat") == Tokenizer(tiny_model).encode("the cat")


def test_the_config_says_it_in_old_and_new_words(tiny_model: Path, tmp_path: Path) -> None:
    quantize_checkpoint(tiny_model, tmp_path / "out", Quantization("fp4", False))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    was = json.loads((tiny_model / "config.json").read_text())
    assert {key: config[key] for key in was} == was
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    said = config["quantization_config"]
    assert (said["quant_method"], said["load_in_4bit"]) == ("bitsandbytes", True)
    assert (said["bnb_4bit_quant_type"], said["bnb_4bit_use_double_quant"]) == ("fp4", False)
    assert said["bnb_4bit_compute_dtype"] == "bfloat16" and said["llm_int8_skip_modules"] is None


def test_a_folder_in_4_bits_is_not_quantized_again(tiny_model: Path, tmp_path: Path) -> None:
    quantize_checkpoint(tiny_model, tmp_path / "once", Quantization())
    with pytest.raises(ValueError, match="once: is in 4 bits already"):
        quantize_checkpoint(tmp_path / "once", tmp_path / "twice", Quantization())
    assert [path.name for path in tmp_path.iterdir()] == ["once"]


def test_a_bad_number_far_in_leaves_nothing_behind(tiny_model: Path, tmp_path: Path) -> None:
    source = shutil.copytree(tiny_model, tmp_path / "source")
    tensors = safetensors.torch.load_file(source / "model.safetensors")
    tensors["model.norm.weight"][3] = float("inf")  # the last but for none
    safetensors.torch.save_file(tensors, source / "model.safetensors")
    with pytest.raises(ValueError, match=r"model.norm.weight: holds inf \(first at index \(3,\)\)"):
        quantize_checkpoint(source, tmp_path / "out", Quantization())
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


# -- the report --------------------------------------------------------------------------------------------


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """A function that runs the script here; returns its exit code and what it printed."""

    def runner(*argv: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["quantize.py", *map(str, argv)])
        code: Any = 0
        try:
            quantize.main()
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return runner


def test_the_report_is_that_of_the_weights_themselves(tiny_model: Path, tmp_path: Path, run) -> None:
    out = tmp_path / "out"
    code, printed, _ = run(tiny_model, out, "--device", "cpu")
    assert code == 0
    report = json.loads((out / quantize.REPORT_FILE).read_text())
    was, now = Checkpoint(tiny_model), Checkpoint(out)
    errors: dict[str, list[Tensor]] = {}
    weights: dict[str, list[Tensor]] = {}
    layers: dict[str, float] = {}
    for name in filter(now.is_quantized, now.names):
        weight = was.read(name).double()
        error = now.read(name).dequantize(torch.float32).double() - weight
        kind = name.split(".")[-2]
        errors.setdefault(kind, []).append(error.flatten())
        weights.setdefault(kind, []).append(weight.flatten())
        layers[name.removesuffix(".weight")] = (error.norm() / weight.norm()).item()
    assert [row["kind"] for row in report["kinds"]] == list(report["kinds"] and errors)
    for row in report["kinds"]:
        error, weight = torch.cat(errors[row["kind"]]), torch.cat(weights[row["kind"]])
        assert row["parameters"] == len(weight)
        assert row["rmse"] == pytest.approx(error.square().mean().sqrt().item(), rel=1e-6)
        assert row["relative_rmse"] == pytest.approx((error.norm() / weight.norm()).item(), rel=1e-6)
        assert f"{row['relative_rmse']:.3%}" in printed
    worst = sorted(layers, key=lambda name: -layers[name])[:5]
    assert [row["layer"] for row in report["worst_layers"]] == worst
    assert all(
        row["relative_rmse"] == pytest.approx(layers[row["layer"]], rel=1e-6)
        for row in report["worst_layers"]
    )
    held = [now.read(name) for name in filter(now.is_quantized, now.names)]
    bits = 8 * sum(weight.nbytes for weight in held) / sum(weight.numel() for weight in held)
    assert (
        report["bits_per_parameter"] == pytest.approx(bits) and f"{bits:.3f} a quantized parameter" in printed
    )
    assert report["bytes_before"] == (tiny_model / "model.safetensors").stat().st_size
    assert report["bytes_after"] == (out / "model.safetensors").stat().st_size
    assert "perplexity" not in report


def whole_perplexity(model: Any, windows: Tensor) -> float:
    predicted = logits(model, windows)[:, :-1].float()
    return math.exp(F.cross_entropy(predicted.flatten(0, 1), windows[:, 1:].flatten()).item())


# A family with capped logits, local layers and scaled embeddings beside the plain one, and a mixture.
@pytest.mark.parametrize("family", ["llama", "gemma2", "Qwen3Moe"])
def test_perplexity_by_blocks_is_that_of_the_whole_models(family: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    source = tmp_path / "source"
    if family == "llama":
        write_llama(source)
    elif family == "Qwen3Moe":
        write_mixture(source, family)
    else:
        torch.manual_seed(0)
        sizes = dict(vocab_size=97, hidden_size=64, intermediate_size=128, num_hidden_layers=3, head_dim=16)
        more = dict(
            num_attention_heads=4, num_key_value_heads=2, sliding_window=8, final_logit_softcapping=0.5
        )
        transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**sizes, **more)).save_pretrained(source)
    quantize_checkpoint(source, tmp_path / "out", Quantization())
    windows = torch.randint(97, (3, 30), generator=torch.Generator().manual_seed(1))
    found = perplexities(source, tmp_path / "out", windows, torch.float32, torch.device("cpu"))
    in_16 = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    assert found[0] == pytest.approx(whole_perplexity(in_16, windows), rel=1e-5)
    in_4 = load_model(tmp_path / "out", dtype=torch.float32)
    assert found[1] == pytest.approx(whole_perplexity(in_4, windows), rel=1e-6)
    assert found[0] != found[1]


def test_perplexity_holds_one_block_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_llama(tmp_path / "source", num_hidden_layers=6)
    quantize_checkpoint(source, tmp_path / "out", Quantization())
    made: list[weakref.ref] = []

    def watched(*args: Any) -> Block:
        assert sum(earlier() is not None for earlier in made) <= 1  # the last one's name is not yet another's
        made.append(weakref.ref(block := Block(*args)))
        return block

    monkeypatch.setattr(quantize, "Block", watched)
    windows = torch.arange(60).view(2, 30)
    perplexities(source, tmp_path / "out", windows, torch.float32, torch.device("cpu"))
    assert len(made) == 12


def test_a_text_is_cut_into_windows_that_begin_as_a_text_does(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    tokenizer = Tokenizer(tiny_model)  # which puts nothing before a text
    ids = tokenizer.encode(TEXT)
    windows = read_windows(tmp_path / "text.txt", tokenizer, 100, 32)
    assert torch.equal(windows, torch.tensor(ids[:96]).view(3, 32))
    assert read_windows(tmp_path / "text.txt", tokenizer, 20, 32).shape == (1, 20)
    (tmp_path / "text.txt").write_text("a")
    with pytest.raises(ValueError, match="text.txt: too short a text"):
        read_windows(tmp_path / "text.txt", tokenizer, 100, 32)


def test_each_window_begins_with_the_token_that_begins_a_text(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Fast
    from tokenizers import processors

    write_tokenizer(tmp_path)
    path = str(tmp_path / "tokenizer.json")
    fast = Fast.from_file(path)
    fast.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)]
    )
    fast.save(path)
    (tmp_path / "text.txt").write_text(TEXT)
    windows = read_windows(tmp_path / "text.txt", Tokenizer(tmp_path), 100, 26)
    assert windows.shape == (4, 26) and (windows[:, 0] == 1).all() and not (windows[:, 1:] < 3).any()


# -- the command line --------------------------------------------------------------------------------------


def test_the_command_quantizes_measures_and_says_where(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    command = [
        sys.executable,
        str(ROOT / "scripts" / "quantize.py"),
        str(tiny_model),
        "out",
        "--device",
        "cpu",
    ]
    command += [
        "--text",
        "text.txt",
        "--text_tokens",
        "64",
        "--max_seq_length",
        "32",
        "--max_shard_size",
        "0.1MB",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "quantization_report.json").read_text())
    assert report["perplexity"]["tokens"] == 62 and report["perplexity"]["16_bits"] > 1
    assert f"perplexity {report['perplexity']['16_bits']:.4f} in 16 bits" in done.stdout
    assert done.stdout.endswith("saved     out\n") and len(list((tmp_path / "out").glob("model-*"))) > 1
    assert Tokenizer(tmp_path / "out").vocab_size and load_model(tmp_path / "out").arch.n_layers == 2


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["{model}"], "--out: required"),
        (["{model}", "{model}"], "exists and is not an empty folder; choose another"),
        (
            ["some/where", "{out}"],
            "no such model folder: some/where; nor is it in the local Hugging Face cache",
        ),
        (["{model}", "{out}", "--quant_type", "nf3"], "--quant_type: expected one of nf4, fp4"),
        (["{model}", "{out}", "--block_size", "48"], "--block_size must be one that bitsandbytes has"),
        (
            ["{model}", "{out}", "--max_shard_size", "5"],
            "--max_shard_size is a size such as 500MB or 5GB, got '5'",
        ),
        (["{model}", "{out}", "--max_shard_size", "0GB"], "--max_shard_size is a size"),
        (["{model}", "{out}", "--text", "{model}/none"], "none: no such file"),
        (["{model}", "{out}", "--max_seq_length", "1"], "must be at least 2"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    argv, message, tiny_model, tmp_path, run, monkeypatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    code, printed, line = run(*(word.format(model=tiny_model, out=tmp_path / "out") for word in argv))
    assert code == 2 and printed == "" and line.count("\n") == 1 and message in line, line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("written", "size"), [("5GB", 5 * 10**9), ("500MB", 5 * 10**8), ("1.5 gb", 1_500_000_000)]
)
def test_a_shard_size_is_read_in_decimal_units(written: str, size: int) -> None:
    assert Config(Path("a"), Path("b"), max_shard_size=written) and shard_bytes(written) == size


# -- what starts from it -----------------------------------------------------------------------------------


def test_a_run_starts_the_same_from_the_model_its_cache_and_its_copy(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    snapshot = tmp_path / "hub" / "models--org--tiny" / "snapshots" / "abc123"
    shutil.copytree(tiny_model, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc123")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    quantize_checkpoint(snapshot, "in-4-bits", Quantization())
    Path("rows.jsonl").write_text('{"prompt": "the cat", "completion": "the mat"}\n' * 8)
    how = dict(lora_r=4, gradient_accumulation_steps=2, dtype="float32", device="cpu", max_steps=3)
    losses = []
    starts: dict[str, dict[str, Any]] = {
        "plain": dict(model=Path("org/tiny")),
        "first": dict(model=Path("org/tiny"), cache=Path("cache")),
        "second": dict(model=Path("org/tiny"), cache=Path("cache")),
        "copy": dict(model=Path("in-4-bits")),
    }
    for name, start in starts.items():
        config = finetune.Config(dataset=[Path("rows.jsonl")], output_dir=Path(name), **start, **how)
        assert finetune.train(finetune.prepare(config), StopRequest()) == 0
        rows = [json.loads(line) for line in (Path(name) / "metrics.jsonl").read_text().splitlines()]
        losses.append([row["loss"] for row in rows if "loss" in row])
    assert len(losses[0]) == 3 and losses == [losses[0]] * 4
    assert len(list(Path("cache").iterdir())) == 1


@pytest.mark.parametrize("contradiction", [dict(bits=16), dict(quant_type="nf3")])
def test_a_cache_is_refused_for_what_it_cannot_keep(contradiction: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="--cache keeps 4-bit weights of the types nf4 and fp4"):
        finetune.Config(Path("m"), [Path("d")], cache=Path("c"), **contradiction)
    with pytest.raises(ValueError, match="--quantize_embeddings and --bits 16"):
        finetune.Config(Path("m"), [Path("d")], bits=16, quantize_embeddings=True)
