"""scripts/merge.py: a folder for everybody that computes what base and adapter did, and a true report."""

import json
import math
import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from conftest import write_llama, write_tokenizer
from torch import Tensor

import finetune
import merge
from merge import Config, Merge, write_merged
from minqlora import add_lora, load_adapter, load_model, save_adapter
from minqlora.files import Checkpoint
from minqlora.model import CausalLM
from options import user_errors

ROOT = Path(__file__).resolve().parents[1]
IDS = torch.randint(3, 260, (1, 30), generator=torch.Generator().manual_seed(5))

VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora and patterns": {
        "use_rslora": True,
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"down_proj": 3},
        "target_modules": ["q_proj", "down_proj"],
    },
    "dora": {"use_dora": True},
    "norms and head": {"modules_to_save": ["norm", "lm_head"]},
    "embedding": {"modules_to_save": ["embed_tokens"]},
    "tokens": {"trainable_token_indices": [7, 3, 200]},
    "tokens of the head": {"trainable_token_indices": {"lm_head": [9, 8]}},
}


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in float32, so that nothing is rounded on the way."""
    folder = tmp_path_factory.mktemp("base") / "tiny"
    folder.mkdir()
    size = write_tokenizer(folder)
    (folder / "generation_config.json").write_text(json.dumps({"max_new_tokens": 7}))
    return write_llama(folder, vocab_size=size, tie_word_embeddings=request.param, attention_bias=True)


def trained(model: CausalLM, folder: Path, **options: Any) -> CausalLM:
    """Add an adapter that does something, and save it."""
    torch.manual_seed(0)
    add_lora(model, **(dict(r=4, alpha=8) | options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape)
    save_adapter(model, folder)
    return model


def in_transformers(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Return what transformers makes of a folder, if it finds every key that it wants and no other."""
    transformers = pytest.importorskip("transformers")
    model, found = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, output_loading_info=True
    )
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def assert_close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    assert (a - b).abs().max() <= tolerance * b.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_merged_model_is_the_live_one_wherever_it_is_merged(
    base: Path, tmp_path: Path, variant: str
) -> None:
    live = trained(load_model(base, dtype=torch.float32), tmp_path / "run", **VARIANTS[variant])
    exact = load_model(base, quant_type=None, dtype=torch.float32)
    untouched = exact(IDS)
    load_adapter(exact, tmp_path / "run")
    for onto, model in (("dequantized", live), ("original", exact)):
        out = tmp_path / onto
        report = write_merged(Config(tmp_path / "run", out, base=base, onto=onto, dtype="float32"))  # type: ignore[arg-type]
        theirs = in_transformers(out)
        assert_close(theirs(IDS).logits, model(IDS))
        assert (model(IDS) - untouched).abs().max() > 1e-3 * untouched.abs().max()
        assert_close(load_model(out, quant_type=None, dtype=torch.float32)(IDS), model(IDS))
        assert report["onto"] == onto and report["base"] == "tiny" and report["adapter"] == "run"
        config = json.loads((out / "config.json").read_text())
        was_tied = json.loads((base / "config.json").read_text())["tie_word_embeddings"]
        splits = variant in ("norms and head", "embedding", "tokens of the head")
        assert report["untied"] == (was_tied and splits)
        assert config["tie_word_embeddings"] == (was_tied and not splits)


@torch.no_grad()
@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("use_dora", [False, True])
def test_what_was_taken_out_of_the_base_is_in_the_merged_model(
    base: Path, tmp_path: Path, init: str, use_dora: bool
) -> None:
    live = load_model(base, dtype=torch.float32, block_size=32)
    trained(live, tmp_path / "run", init=init, base=base, use_dora=use_dora)
    exact = load_model(base, quant_type=None, dtype=torch.float32)
    load_adapter(exact, tmp_path / "run")
    options: dict[str, Any] = dict(base=base, dtype="float32", block_size=32)
    for onto, model in (("dequantized", live), ("original", exact)):
        write_merged(Config(tmp_path / "run", tmp_path / onto, onto=onto, **options))  # type: ignore[arg-type]
        assert_close(in_transformers(tmp_path / onto)(IDS).logits, model(IDS), 1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kind", [True, "pissa", "olora"])
def test_pefts_own_folder_is_merged(base: Path, tmp_path: Path, kind: Any) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"], init_lora_weights=kind)
    theirs = get_peft_model(in_transformers(base), config)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    theirs.save_pretrained(tmp_path / "peft")
    # PEFT writes where the base was on this machine; here that is not a name but a folder, and found.
    write_merged(Config(tmp_path / "peft", tmp_path / "out", dtype="float32"))
    assert_close(in_transformers(tmp_path / "out")(IDS).logits, theirs.eval()(IDS).logits)


@torch.no_grad()
def test_a_base_in_4_bits_is_decoded(tmp_path: Path) -> None:
    from quantize import Quantization, quantize_checkpoint

    size = write_tokenizer(tmp_path)
    full = write_llama(tmp_path / "full", vocab_size=size, dtype=torch.bfloat16)
    quantize_checkpoint(full, tmp_path / "nf4", Quantization(block_size=128))
    live = trained(load_model(tmp_path / "nf4", dtype=torch.float32), tmp_path / "run", use_dora=True)
    report = write_merged(Config(tmp_path / "run", tmp_path / "out", base=tmp_path / "nf4", dtype="float32"))
    assert report["onto"] == "dequantized"
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert_close(in_transformers(tmp_path / "out")(IDS).logits, live(IDS))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [None, "float16"])
def test_shards_of_16_bits_with_all_that_goes_with_them(base: Path, tmp_path: Path, dtype: Any) -> None:
    trained(load_model(base, dtype=torch.float32), tmp_path / "run")
    exact = load_model(base, quant_type=None, dtype=torch.float32)
    load_adapter(exact, tmp_path / "run")
    out = tmp_path / "out"
    write_merged(Config(tmp_path / "run", out, base=base, dtype=dtype, max_shard_size="0.1MB"))
    assert len(list(out.glob("model-*-of-*.safetensors"))) > 1
    expected = torch.float16 if dtype else torch.bfloat16
    for path in out.glob("*.safetensors"):
        assert {tensor.dtype for tensor in safetensors.torch.load_file(path).values()} == {expected}
    assert_close(in_transformers(out)(IDS).logits, exact(IDS), 0.02)
    config = json.loads((out / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == (dtype or "bfloat16")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (base / name).read_bytes()


def test_numbers_too_large_for_float16_are_refused_and_nothing_is_left(base: Path, tmp_path: Path) -> None:
    model = load_model(base, quant_type=None, dtype=torch.float32)
    add_lora(model, r=1, alpha=1, target_modules=["q_proj"])
    for layer in model.model.layers:
        torch.nn.init.constant_(layer.self_attn.q_proj.lora_B, 1e7)
    save_adapter(model, tmp_path / "run")
    with pytest.raises(ValueError, match="q_proj.weight: has numbers that torch.float16 has not"):
        write_merged(Config(tmp_path / "run", tmp_path / "out", base=base, dtype="float16"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_one_tensor_of_the_base_is_in_memory_at_a_time(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(load_model(base, dtype=torch.float32), tmp_path / "run")
    read, alive = Checkpoint.read, []

    def watched(self: Checkpoint, name: str) -> Tensor:
        assert not [name for name, reference in alive if reference() is not None]
        tensor = read(self, name)
        alive.append((name, weakref.ref(tensor)))
        return tensor

    job = Merge(Config(tmp_path / "run", tmp_path / "out", base=base, onto="dequantized"))
    monkeypatch.setattr(Checkpoint, "read", watched)
    count = 0
    for _name, tensor in job.tensors():
        count += 1
        del tensor
    assert count == len(job.plan())


# -- the run it came from ------------------------------------------------------------------------------------


def write_run(folder: Path, base: Path, **values: Any) -> None:
    config = {"model": str(base), "bits": 4, "quant_type": "fp4", "double_quant": False, "block_size": 128}
    (folder / "config.yaml").write_text("\n".join(f"{k}: {v}" for k, v in (config | values).items()))


def test_base_and_quantization_are_those_of_the_run(base: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoint-20").mkdir(parents=True)
    write_run(run, base)
    for folder in (run, run / "checkpoint-20"):
        config = Config(folder, tmp_path / "out")
        assert config.base == base
        assert (config.bits, config.quant_type, config.double_quant, config.block_size) == (
            4,
            "fp4",
            False,
            128,
        )
    assert Config(run, tmp_path / "out", block_size=64).block_size == 64


def test_what_cannot_be_merged_is_refused_in_one_line(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    trained(load_model(base, dtype=torch.float32), run)
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, f"{run}/adapter_config.json: names no base model; give --base"),
        ({"base": tmp_path / "no"}, f"no such model folder: {tmp_path}/no"),
        ({"base": base, "onto": "dequantized", "bits": 16}, "was trained on 16 bits (--bits 16)"),
        ({"base": base, "max_shard_size": "lots"}, "--max_shard_size is a size such as 500MB"),
        ({"base": base, "verify": tmp_path / "no.txt"}, f"{tmp_path}/no.txt: no such file to verify on"),
        ({"base": write_llama(tmp_path / "deep", num_hidden_layers=1)}, "has no place in this model"),
        ({"adapter": tmp_path}, f"{tmp_path}/adapter_config.json: not found"),
    ]
    capsys.readouterr()
    for options, message in cases:
        with pytest.raises(SystemExit) as stopped, user_errors():
            write_merged(Config(**({"adapter": run, "output_dir": out} | options)))
        assert stopped.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and message in line
        assert not out.exists()


# -- from training to a merged model -------------------------------------------------------------------------

ROWS = [{"prompt": f"Spell <w{i % 2}> {i}.", "completion": f"{i}-<w{i % 2}>"} for i in range(12)]


def finetuned(folder: Path, base: Path, monkeypatch: pytest.MonkeyPatch, **flags: Any) -> Path:
    """Train a run for three steps; return its folder."""
    rows = folder / "rows.jsonl"
    rows.write_text("\n".join(map(json.dumps, ROWS)))
    given: dict[str, Any] = dict(model=base, dataset=rows, output_dir=folder / "run", dtype="float32")
    given |= dict(lora_r=4, learning_rate=0.01, gradient_accumulation_steps=4, max_steps=3) | flags
    argv = [text for name, value in given.items() for text in (f"--{name}", *str(value).split(" "))]
    monkeypatch.setattr(sys, "argv", ["finetune.py", *argv])
    with torch.enable_grad():
        finetune.main()
    return folder / "run"


FLAGS: dict[str, dict[str, Any]] = {
    "variants": dict(use_rslora=True, use_dora=True, lora_dropout=0.1, loraplus_lr_ratio=16),
    "patterns": dict(lora_rank_pattern="q_proj=2 mlp.up_proj=6", lora_alpha_pattern="q_proj=1.5"),
    "regex": dict(lora_target_modules=r".*\.(q|up)_proj", modules_to_save="norm lm_head"),
    "layers": dict(layers_to_transform="1", init_lora_weights="gaussian"),
    "pissa": dict(init_lora_weights="pissa_niter_4"),
    "olora": dict(init_lora_weights="olora", use_rslora=True),
    "loftq": dict(init_lora_weights="loftq"),
    "tokens": dict(new_tokens="<w0> <w1>"),
}


@torch.no_grad()
@pytest.mark.parametrize("flags", FLAGS)
def test_a_run_with_any_flags_loads_in_peft_and_merges(
    base: Path,
    tmp_path: Path,
    flags: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from peft import PeftModel

    roomy = base
    if flags == "tokens":  # rows to spare, as many models have
        tied = json.loads((base / "config.json").read_text())["tie_word_embeddings"]
        roomy = tmp_path / "roomy"
        roomy.mkdir()
        size = write_tokenizer(roomy)
        write_llama(roomy, vocab_size=size + 5, tie_word_embeddings=tied)
    run = finetuned(tmp_path, roomy, monkeypatch, **FLAGS[flags])
    out = capsys.readouterr().out
    assert ("has left of them" in out) == (flags in ("pissa", "olora"))
    live = load_model(roomy, dtype=torch.float32)
    load_adapter(live, run, base=roomy)
    assert str(tmp_path) not in (run / "adapter_config.json").read_text() + (run / "README.md").read_text()

    write_merged(Config(run, tmp_path / "out", onto="dequantized", dtype="float32"))
    assert_close(in_transformers(tmp_path / "out")(IDS).logits, live(IDS), 1e-4)
    exact = load_model(roomy, quant_type=None, dtype=torch.float32)
    load_adapter(exact, run)
    theirs = PeftModel.from_pretrained(in_transformers(roomy), run).eval()
    assert_close(theirs(IDS).logits, exact(IDS), 1e-4)
    if flags == "tokens":
        tokenizer = merge.Tokenizer(tmp_path / "out")
        ids = [tokenizer.token_id("<w0>"), tokenizer.token_id("<w1>")]
        assert ids == [size, size + 1] and tokenizer.encode("a<w0>")[-1:] == ids[:1]
        trained_rows = (in_transformers(tmp_path / "out").get_input_embeddings().weight).float()
        before = in_transformers(roomy).get_input_embeddings().weight.float()
        assert (trained_rows != before).any(1).nonzero().flatten().tolist() == ids


def test_flags_that_cannot_train_are_refused_before_anything_is_written(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        (dict(lora_rank_pattern="q_proj"), "--lora_rank_pattern is a list such as q_proj=8"),
        (dict(lora_rank_pattern="q_proj=0"), "q_proj must be at least 1, not 0"),
        (dict(init_lora_weights="magic"), "--init_lora_weights must be one of default, gaussian"),
        (dict(loraplus_lr_ratio=0), "--loraplus_lr_ratio must be positive"),
        (dict(modules_to_save="score"), "no module's path ends in 'score'"),
        (dict(new_tokens="<w0>"), "has rows for 267 tokens and none to spare for '<w0>'"),
        (dict(init_lora_weights="loftq", bits=16), "the model is not in 4 bits"),
    ]
    for flags, message in cases:
        with pytest.raises(SystemExit) as stopped:
            finetuned(tmp_path, base, monkeypatch, **flags)
        assert stopped.value.code == 2 and message in capsys.readouterr().err
        assert not (tmp_path / "run").exists()


# -- comparing -----------------------------------------------------------------------------------------------


def merged_by_command(*flags: Any) -> str:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "merge.py"), *map(str, flags)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@torch.no_grad()
def test_verify_measures_in_a_second_process_what_the_merge_did(base: Path, tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    live = trained(load_model(base, dtype=torch.float32, block_size=32), run, init="loftq", base=base)
    write_run(run, base, quant_type="nf4", double_quant=True, block_size=32, init_lora_weights="loftq")
    rows = [{"prompt": f"{i} and {i}?", "completion": f"{2 * i}, the sum of {i}."} for i in range(20)]
    sample = tmp_path / "sample.jsonl"
    sample.write_text("\n".join(map(json.dumps, rows)))
    said = merged_by_command(
        "--adapter", run, "--output_dir", out, "--verify", sample, "--verify_tokens", 300,
        "--dtype", "float32", "--compute_dtype", "float32",
    )  # fmt: skip
    assert "began as LoftQ, which makes up for rounding: use --onto dequantized" in said
    report = json.loads((out / "merge_report.json").read_text())
    assert str(tmp_path) not in json.dumps(report)
    found = report["verify"]
    assert f"{found['kl_per_token']:.6f} nats a token" in said

    config = Config(run, out, verify=sample, verify_tokens=300)
    rows_of_ids = merge.read_sample(config, merge.Tokenizer(out))
    assert 200 < sum(ids.numel() for ids, _ in rows_of_ids) <= 300
    theirs, divergence, losses = in_transformers(out), [], []
    for ids, targets in rows_of_ids:
        kept = targets != -100
        p = live(ids)[0, :-1][kept].log_softmax(-1)
        q = theirs(ids).logits[0, :-1][kept].log_softmax(-1)
        divergence.append(F.kl_div(q, p, reduction="none", log_target=True).sum(-1))
        losses.append(torch.stack([F.nll_loss(x, targets[kept], reduction="none") for x in (p, q)]))
    assert found["tokens"] == len(torch.cat(divergence)) < sum(ids.numel() for ids, _ in rows_of_ids)
    assert found["kl_per_token"] == pytest.approx(torch.cat(divergence).mean().item(), rel=1e-3)
    assert found["kl_largest"] == pytest.approx(torch.cat(divergence).max().item(), rel=1e-3)
    perplexities = [math.exp(loss) for loss in torch.cat(losses, 1).mean(1).tolist()]
    assert [found["perplexity_live"], found["perplexity_merged"]] == pytest.approx(perplexities, rel=1e-4)


@torch.no_grad()
def test_a_merge_onto_the_dequantized_base_is_no_other_model(base: Path, tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    trained(load_model(base, dtype=torch.float32), run, use_dora=True)
    text = tmp_path / "text.txt"
    text.write_text("The cat sat on the mat, and the mat was in the sun; then the rain came. " * 5)
    how: dict[str, Any] = dict(dtype="float32", compute_dtype="float32", device="cpu", max_seq_length=64)
    config = Config(run, out, base=base, onto="dequantized", verify=text, **how)
    write_merged(config)
    found = merge.verify(config)
    assert abs(found["kl_per_token"]) < 1e-7 and found["same_first_choice"] == 1.0
    assert found["perplexity_live"] == pytest.approx(found["perplexity_merged"], rel=1e-5)


def test_rows_to_verify_on_are_rows_in_any_kind_of_file(base: Path, tmp_path: Path) -> None:
    rows = [{"question": f"What is {n}?", "answer": f"It is {n}."} for n in range(3)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = [f"{row['question']},{row['answer']}\n" for row in rows]
    (tmp_path / "a.csv").write_text("question,answer\n" + "".join(lines))
    samples = [
        merge.read_sample(
            Config(tmp_path, tmp_path / "out", base=base, verify=tmp_path / name), merge.Tokenizer(base)
        )
        for name in ("a.jsonl", "a.csv")
    ]
    assert len(samples[0]) == 3
    for first, second in zip(*samples, strict=True):
        assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
