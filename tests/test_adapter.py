"""An adapter saved here runs in PEFT, one of PEFT's runs here, and no other is taken for what it is not."""

import json
import os
import resource
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

from minqlora import add_lora, load_adapter, load_model, save_adapter
from minqlora.lora import lora_layers
from minqlora.model import CausalLM

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
IDS = torch.randint(3, 260, (1, 30), generator=torch.Generator().manual_seed(5))
EVERY_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def load_ours(folder: Path) -> CausalLM:
    return load_model(folder, quant_type=None, dtype=torch.float32)


def load_theirs(folder: Path) -> Any:
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def adapted(folder: Path, seed: int = 0, **options: Any) -> CausalLM:
    """Return a model with adapters that do something: lora_B is not zero."""
    model = load_ours(folder)
    torch.manual_seed(seed)
    add_lora(model, **(dict(r=4, alpha=8) | options))
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.05)
    return model.eval()


def assert_same_logits(ours: Tensor, theirs: Tensor, base: Tensor, tolerance: float = 1e-3) -> None:
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()
    assert (base - theirs).abs().max() > 0.05 * theirs.abs().max()  # the adapter does matter


# -- to PEFT -----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_an_adapter_of_the_demo_model_gives_the_same_logits_in_peft(
    demo_model: Path, demo_text: Tensor, demo_fp32: CausalLM, tmp_path: Path
) -> None:
    from peft import PeftModel

    text = demo_text[:, :100]
    ours = adapted(demo_model, r=8, alpha=16)
    save_adapter(ours, tmp_path, base_model="HuggingFaceTB/SmolLM2-135M-Instruct")
    theirs = PeftModel.from_pretrained(load_theirs(demo_model), tmp_path).eval()
    assert_same_logits(ours(text), theirs(text).logits, demo_fp32(text))


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"r": 3, "alpha": 4.5},
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": ["self_attn.o_proj", "model.layers.1.mlp.up_proj"]},
        {"target_modules": r".*layers\.1\..*_proj"},
        {"dropout": 0.5},
    ],
    ids=str,
)
def test_any_adapter_gives_the_same_logits_in_peft_and_back_here(
    tiny_model: Path, tmp_path: Path, options: dict[str, Any], recwarn: pytest.WarningsRecorder
) -> None:
    from peft import PeftModel

    ours = adapted(tiny_model, **options)
    save_adapter(ours, tmp_path)
    theirs = PeftModel.from_pretrained(load_theirs(tiny_model), tmp_path).eval()
    assert_same_logits(ours(IDS), theirs(IDS).logits, load_ours(tiny_model)(IDS), tolerance=1e-5)
    assert not [str(w.message) for w in recwarn if "adapter" in str(w.message).lower()]  # no keys left over
    again = load_ours(tiny_model)
    assert load_adapter(again, tmp_path) == list(lora_layers(ours))
    assert torch.equal(again.eval()(IDS), ours(IDS))


def test_the_files_are_those_of_peft(tiny_model: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    save_adapter(adapted(tiny_model), tmp_path / "ours", base_model="tiny")
    config = LoraConfig(r=4, lora_alpha=8, target_modules=EVERY_LINEAR, task_type="CAUSAL_LM")
    get_peft_model(load_theirs(tiny_model), config).save_pretrained(tmp_path / "theirs")
    ours, theirs = (safetensors.torch.load_file(tmp_path / name / WEIGHTS) for name in ("ours", "theirs"))
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in ours.items()} == {
        name: (tensor.shape, tensor.dtype) for name, tensor in theirs.items()
    }
    our_config, their_config = (
        json.loads((tmp_path / name / CONFIG).read_text()) for name in ("ours", "theirs")
    )
    assert our_config.pop("base_model_name_or_path") == "tiny"
    our_config["target_modules"].sort()
    their_config["target_modules"].sort()
    assert our_config.items() <= their_config.items()  # no key of our own, no value that PEFT would not write


def test_the_first_step_of_training_has_pefts_gradients(tiny_model: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    ours = adapted(tiny_model)
    save_adapter(ours, tmp_path)
    theirs = PeftModel.from_pretrained(load_theirs(tiny_model), tmp_path, is_trainable=True)
    F.cross_entropy(ours(IDS)[0, :-1], IDS[0, 1:]).backward()
    theirs(IDS, labels=IDS).loss.backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    assert len(gradients) == 2 * len(lora_layers(ours)) == 28
    for name, layer in lora_layers(ours).items():
        for part in ("lora_A", "lora_B"):
            expected = gradients[f"base_model.model.{name}.{part}.default.weight"]
            torch.testing.assert_close(getattr(layer, part).grad, expected, rtol=1e-4, atol=1e-6)


# -- from PEFT ---------------------------------------------------------------------------------------------


def write_with_peft(model_folder: Path, folder: Path, **options: Any) -> Any:
    """Write an adapter that PEFT made and that does something; return PEFT's model."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    config = LoraConfig(**(dict(r=4, lora_alpha=8, target_modules=EVERY_LINEAR) | options))
    model = get_peft_model(load_theirs(model_folder), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    model.save_pretrained(folder)
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj"]},
        {"target_modules": r"model\.layers\.\d+\.mlp\.(up|down)_proj"},
        {"lora_dropout": 0.1},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": False},
        {"bias": "none", "task_type": "CAUSAL_LM"},
    ],
    ids=str,
)
def test_an_adapter_made_by_peft_gives_the_same_logits_here(
    tiny_model: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    theirs = write_with_peft(tiny_model, tmp_path, **options)
    ours = load_ours(tiny_model)
    load_adapter(ours, tmp_path)
    assert_same_logits(ours.eval()(IDS), theirs(IDS).logits, load_ours(tiny_model)(IDS), tolerance=1e-5)


@torch.no_grad()
def test_a_minimal_config_and_a_bfloat16_file_are_enough(tiny_model: Path, tmp_path: Path) -> None:
    ours = adapted(tiny_model)
    save_adapter(ours, tmp_path)
    minimal = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": EVERY_LINEAR}
    (tmp_path / CONFIG).write_text(json.dumps(minimal))
    held = safetensors.torch.load_file(tmp_path / WEIGHTS)
    safetensors.torch.save_file({k: v.bfloat16() for k, v in held.items()}, tmp_path / WEIGHTS)
    again = load_ours(tiny_model)
    load_adapter(again, tmp_path)
    for name, layer in lora_layers(again).items():
        assert layer.lora_B.dtype == torch.float32
        assert torch.equal(layer.lora_B, ours.get_submodule(name).lora_B.bfloat16().float())


def test_a_loaded_adapter_is_trainable_and_the_rest_is_frozen(tiny_model: Path, tmp_path: Path) -> None:
    save_adapter(adapted(tiny_model), tmp_path)
    model = load_ours(tiny_model)
    load_adapter(model, tmp_path)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trainable) == 28 and all("lora_" in name for name in trainable)


# -- what is refused ---------------------------------------------------------------------------------------


def assert_refused(model_folder: Path, adapter: Path, message: str) -> None:
    """The one that loads must say why, and leave the model as it was."""
    model = load_ours(model_folder)
    before = model(IDS)
    with pytest.raises(ValueError, match=message) as refusal:
        load_adapter(model, adapter)
    assert str(adapter) in str(refusal.value)
    assert not lora_layers(model)
    assert torch.equal(model(IDS), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_rslora": True}, "use_rslora = True is not supported"),
        ({"use_dora": True}, "use_dora = True is not supported"),
        ({"lora_bias": True, "bias": "none"}, "lora_bias = True is not supported"),
        ({"bias": "lora_only"}, "bias = 'lora_only' is not supported"),
        ({"rank_pattern": {"q_proj": 2}}, r"rank_pattern = \{'q_proj': 2\} is not supported"),
        ({"alpha_pattern": {"q_proj": 2}}, r"alpha_pattern = \{'q_proj': 2\} is not supported"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save = \['lm_head'\] is not supported"),
        ({"layers_to_transform": [1]}, r"layers_to_transform = \[1\] is not supported"),
        ({"exclude_modules": ["q_proj"]}, "exclude_modules = .* is not supported"),
        ({"trainable_token_indices": [5]}, r"trainable_token_indices = \[5\] is not supported"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication = .* is not supported"),
        ({"target_modules": ["embed_tokens"]}, "'embed_tokens' matches no linear layer"),
    ],
    ids=str,
)
def test_what_peft_saves_and_is_not_understood_is_refused_by_key(
    tiny_model: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    write_with_peft(tiny_model, tmp_path, **options)
    assert_refused(tiny_model, tmp_path, f"{CONFIG}: .*{message}")


@torch.no_grad()
@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_an_adapter_that_changed_the_base_is_refused(tiny_model: Path, tmp_path: Path, kind: str) -> None:
    theirs = write_with_peft(tiny_model, tmp_path, init_lora_weights=kind)
    ours = load_ours(tiny_model)
    try:
        load_adapter(ours, tmp_path)
    except ValueError as error:
        assert "init_lora_weights" in str(error)
    else:  # or it is understood
        assert_same_logits(ours.eval()(IDS), theirs(IDS).logits, load_ours(tiny_model)(IDS))


@torch.no_grad()
def test_an_adapter_on_the_output_head_counts_or_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    theirs = write_with_peft(tiny_model, tmp_path, target_modules=["q_proj", "lm_head"])
    edit_weights(tmp_path, lambda held: held.pop("base_model.model.lm_head.base_layer.weight", None))
    ours = load_ours(tiny_model)
    try:
        load_adapter(ours, tmp_path)
    except ValueError as error:
        assert "lm_head" in str(error)
    else:
        assert_same_logits(ours.eval()(IDS), theirs(IDS).logits, load_ours(tiny_model)(IDS))


def edit(folder: Path, **changes: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, change: Any) -> None:
    held = safetensors.torch.load_file(folder / WEIGHTS)
    change(held)
    safetensors.torch.save_file(held, folder / WEIGHTS)


KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / CONFIG).unlink(), f"{CONFIG}: not found"),
        (lambda folder: (folder / WEIGHTS).unlink(), f"{WEIGHTS}: not found"),
        (lambda folder: (folder / CONFIG).write_text("{"), f"{CONFIG}: not valid JSON"),
        (lambda folder: (folder / CONFIG).write_text("[]"), f"{CONFIG}: expected a JSON object"),
        (lambda folder: os.truncate(folder / WEIGHTS, 5), f"{WEIGHTS}: damaged or cut off"),
        (lambda folder: os.truncate(folder / WEIGHTS, 9000), f"{WEIGHTS}: damaged or cut off"),
        (lambda folder: edit(folder, peft_type="IA3"), f"{CONFIG}: peft_type = 'IA3' is not supported"),
        (lambda folder: edit(folder, fan_in_fan_out=True), f"{CONFIG}: fan_in_fan_out = True is not"),
        (lambda folder: edit(folder, r=None), f"{CONFIG}: r is missing or of the wrong type: None"),
        (lambda folder: edit(folder, r="4"), f"{CONFIG}: r is missing or of the wrong type: '4'"),
        (lambda folder: edit(folder, lora_alpha="8"), f"{CONFIG}: lora_alpha is missing or of the wrong"),
        (lambda folder: edit(folder, target_modules=None), f"{CONFIG}: target_modules is missing"),
        (lambda folder: edit(folder, target_modules=["c_attn"]), f"{CONFIG}: .*'c_attn' matches no linear"),
        (lambda folder: edit(folder, r=8), rf"{WEIGHTS}: .* has shape \(4, \d+\), but this model needs \(8"),
        (lambda folder: edit_weights(folder, lambda t: t.pop(KEY)), f"{WEIGHTS}: {KEY} is missing"),
        (
            lambda folder: edit_weights(folder, lambda t: t.update(other=torch.ones(1))),
            f"{WEIGHTS}: other has no place in this model",
        ),
        (lambda folder: edit(folder, target_modules=["q_proj"]), f"{WEIGHTS}: .* has no place in this model"),
    ],
    ids=[
        "no-config",
        "no-weights",
        "broken-config",
        "list-config",
        "cut-to-5",
        "cut-to-9000",
        "ia3",
        "fan-in-fan-out",
        "no-r",
        "r-text",
        "alpha-text",
        "no-targets",
        "other-targets",
        "other-r",
        "tensor-missing",
        "tensor-left-over",
        "fewer-targets",
    ],
)
def test_a_damaged_adapter_is_refused_by_file_and_key(
    tiny_model: Path, tmp_path: Path, damage: Any, message: str
) -> None:
    save_adapter(adapted(tiny_model), tmp_path)
    damage(tmp_path)
    assert_refused(tiny_model, tmp_path, message)


@pytest.mark.parametrize(
    "changes", [{"lora_dropout": 1.5}, {"lora_dropout": "0.1"}, {"target_modules": "("}], ids=str
)
def test_an_impossible_value_is_refused_by_file_and_key(
    tiny_model: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    save_adapter(adapted(tiny_model), tmp_path)
    edit(tmp_path, **changes)
    assert_refused(tiny_model, tmp_path, f"{CONFIG}: ")


def test_an_adapter_of_another_model_is_refused(tiny_model: Path, tmp_path: Path, make_llama: Any) -> None:
    save_adapter(adapted(make_llama(num_hidden_layers=3)), tmp_path / "deeper")
    assert_refused(
        tiny_model, tmp_path / "deeper", r"layers\.2\..* has no place in this model; was it trained"
    )
    save_adapter(adapted(make_llama(intermediate_size=128)), tmp_path / "wider")
    assert_refused(tiny_model, tmp_path / "wider", r"has shape \(.*128.*\), but this model needs \(.*96.*\)")


def test_a_second_adapter_on_a_model_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    model = adapted(tiny_model)
    save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match="has adapters already|matches no linear layer"):
        load_adapter(model, tmp_path)


def test_a_model_without_adapters_has_nothing_to_save(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no adapters to save"):
        save_adapter(load_ours(tiny_model), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


# -- whole or not at all -----------------------------------------------------------------------------------


def test_the_weights_are_there_before_the_config_says_so(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []
    replace = os.replace

    def noted(source: Path, target: Path) -> None:
        replace(source, target)
        seen.append(sorted(path.name for path in tmp_path.iterdir()))

    monkeypatch.setattr(os, "replace", noted)
    save_adapter(adapted(tiny_model), tmp_path)
    assert seen == [[WEIGHTS], [CONFIG, WEIGHTS]]


def test_a_save_that_fails_leaves_the_adapter_before_it_whole(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_adapter(adapted(tiny_model), tmp_path)
    shutil.copytree(tmp_path, tmp_path.parent / "before")

    def refuse(*_: Any) -> None:
        raise OSError("no")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="no"):
        save_adapter(adapted(tiny_model, seed=1), tmp_path)
    assert contents(tmp_path) == contents(tmp_path.parent / "before")


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files the way Linux does")
def test_a_full_disk_leaves_the_adapter_before_it_whole(tiny_model: Path, tmp_path: Path) -> None:
    save_adapter(adapted(tiny_model), tmp_path)
    before = contents(tmp_path)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    other = adapted(tiny_model, seed=1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limit[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            save_adapter(other, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert contents(tmp_path) == before


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
